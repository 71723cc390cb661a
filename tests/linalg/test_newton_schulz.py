"""Inverses by the Newton-Schulz iteration, beside those of NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from damped_factors import layers_of, positive_definite
from networks import mlp_problem

import tkfac_jax as tkfac
from tkfac_jax.curvature.inverses import invert_factors
from tkfac_jax.linalg.divided_stacks import Devices
from tkfac_jax.linalg.inversion import ImprovingInverse

SIZE = 30


def relative_error(received, expected):
    return np.linalg.norm(received - expected) / np.linalg.norm(expected)


def changed(matrix, change):
    """A matrix after one more average: eigenvalues of `new old^-1` from 0.95 on."""
    return 0.95 * matrix + change


def small_change(matrix, seed=7):
    rows = np.random.default_rng(seed).normal(size=(3, SIZE)) @ np.linalg.cholesky(matrix).T
    return jnp.asarray(0.05 * rows.T @ rows / 3)


def one_large_direction(matrix, seed=7):
    """One eigenvalue of `new old^-1` becomes about a hundred."""
    vector = np.linalg.cholesky(matrix) @ np.random.default_rng(seed).normal(size=SIZE)
    return jnp.asarray(100 / SIZE * np.outer(vector, vector))


@pytest.mark.parametrize("tolerance", [1e-2, 1e-5])
@pytest.mark.parametrize("change", [small_change, one_large_direction])
def test_inverses_are_reached_from_those_before_a_change(change, tolerance):
    old = [positive_definite(seed, SIZE) for seed in range(3)]
    new = [changed(matrix, change(matrix)) for matrix in old]
    inverse = tkfac.newton_schulz_inverse(max_iterations=20, tolerance=tolerance)
    received, reached = jax.jit(inverse.improve)(jnp.stack(new), jnp.linalg.inv(jnp.stack(old)))
    assert bool(reached.all())
    np.testing.assert_array_equal(received, received.mT)
    for matrix, found in zip(new, received, strict=True):
        assert relative_error(found, np.linalg.inv(matrix)) < tolerance**2


def test_each_iteration_squares_the_residual():
    old = positive_definite(0, SIZE)
    new = changed(old, small_change(old))
    guess = jnp.linalg.inv(old)
    residuals = [np.eye(SIZE) - new @ guess]
    for _ in range(2):
        residuals.append(residuals[-1] @ residuals[-1])
    for count in (1, 2):
        inverse = tkfac.newton_schulz_inverse(max_iterations=count, tolerance=1e-12)
        received, _ = inverse.improve(new[None], guess[None])
        expected = np.linalg.inv(new) @ (np.eye(SIZE) - residuals[count])
        np.testing.assert_allclose(received[0], (expected + expected.T) / 2, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "matrix",
    [
        positive_definite(0, SIZE) - 5 * jnp.eye(SIZE),
        jnp.full((SIZE, SIZE), jnp.nan),
        jnp.full((SIZE, SIZE), jnp.inf),
        jnp.zeros((SIZE, SIZE)),
        # From a guess that is no more than a scale this would take some twenty iterations.
        jnp.diag(jnp.geomspace(1e-6, 1, SIZE)),
    ],
    ids=["indefinite", "nan", "inf", "zero", "far"],
)
def test_what_is_not_reached_is_told_apart(matrix):
    good = positive_definite(1, SIZE)
    inverse = tkfac.newton_schulz_inverse()
    guesses = jnp.stack([jnp.eye(SIZE), jnp.linalg.inv(good)])
    received, reached = jax.jit(inverse.improve)(jnp.stack([matrix, good]), guesses)
    np.testing.assert_array_equal(reached, [False, True])
    assert relative_error(received[1], np.linalg.inv(good)) < 1e-9


def test_float32_takes_what_rounding_leaves():
    """A tolerance below rounding is never met: iterations end where the residual does not fall any more."""
    matrix = positive_definite(0, SIZE, jnp.float32)
    guess = jnp.linalg.inv(changed(matrix, small_change(matrix)).astype(jnp.float32))
    inverse = tkfac.newton_schulz_inverse(max_iterations=1000, tolerance=1e-30)
    received, reached = jax.jit(inverse.improve)(matrix[None], guess[None])
    assert bool(reached[0])
    expected = np.linalg.inv(np.asarray(matrix, np.float64))
    own = relative_error(tkfac.cholesky_inverse(matrix[None])[0], expected)
    assert relative_error(received[0], expected) < 10 * own


def with_guesses(layers, factors, changes=1e-3):
    """Inverses in use of factors that have changed a little since."""
    return {
        name: tkfac.KroneckerInverses.from_factors(
            layers[name],
            *(jnp.linalg.inv(factor + changes * jnp.diag(jnp.diag(factor))) for factor in pair[:2]),
        )
        for name, pair in factors.items()
    }


def hopeless(matrices):
    return jnp.full_like(matrices, jnp.nan)


@pytest.mark.parametrize("largest_joined", [0, 2**16])
def test_nothing_else_inverts_what_is_reached(largest_joined, monkeypatch):
    monkeypatch.setattr("tkfac_jax.layers.spec.LARGEST_JOINED", largest_joined)
    # Sizes of 5, 6 and 4: some are filled up.
    layers, factors, _ = layers_of([(6, 5), (5, 5), (4, 6)], [True, False, True])
    old = with_guesses(layers, factors)
    inverse = tkfac.newton_schulz_inverse(hopeless)
    received, failures = jax.jit(lambda f, o: invert_factors(f, o, layers, inverse))(factors, old)
    assert not any(failures.values())
    for name, found in received.items():
        assert relative_error(found.phi_matrix(), np.linalg.inv(factors[name].phi)) < 1e-6
        assert relative_error(found.psi, np.linalg.inv(factors[name].psi)) < 1e-6


def test_what_is_not_reached_is_inverted_otherwise():
    layers, factors, _ = layers_of([(5, 5), (5, 4)], [False, False])
    old = with_guesses(layers, factors)
    # From nothing but a damping, as before the first statistics; in a stack with three others.
    factors["layer_0"] = factors["layer_0"]._replace(phi=jnp.diag(jnp.geomspace(1e-6, 1, 5)))
    old["layer_0"] = old["layer_0"]._replace(phi=jnp.eye(5))

    def inverted(otherwise):
        inverse = tkfac.newton_schulz_inverse(otherwise)
        return jax.jit(lambda f, o: invert_factors(f, o, layers, inverse))(factors, old)

    received, failures = inverted(tkfac.cholesky_inverse)
    assert not any(failures.values())
    np.testing.assert_allclose(
        received["layer_0"].phi, np.linalg.inv(factors["layer_0"].phi), rtol=1e-9
    )
    failed, failures = inverted(hopeless)
    assert {name: int(number) for name, number in failures.items()} == {"layer_0": 1, "layer_1": 0}
    np.testing.assert_array_equal(failed["layer_0"].phi, np.eye(5))
    # Those that were reached are the same, whatever becomes of the others.
    np.testing.assert_array_equal(failed["layer_0"].psi, received["layer_0"].psi)
    np.testing.assert_array_equal(failed["layer_1"].phi, received["layer_1"].phi)


@pytest.mark.parametrize("how", ["mesh", "pmap", "shard_map"])
def test_devices_divide_what_is_reached(how):
    count = 3
    layers, factors, _ = layers_of([(5, 3), (5, 5), (2, 3), (4, 4)], [True, False, True, False])
    old = with_guesses(layers, factors)
    inverse = tkfac.newton_schulz_inverse(hopeless)
    mesh = jax.make_mesh((count,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    devices = Devices(mesh=mesh) if how == "mesh" else Devices(axis_name="d")

    def inverted(factors, old):
        return invert_factors(factors, old, layers, inverse, devices)

    if how == "mesh":
        received, failures = jax.jit(inverted)(factors, old)
    elif how == "shard_map":
        whole = jax.sharding.PartitionSpec()
        mapped = jax.shard_map(inverted, mesh=mesh, in_specs=whole, out_specs=whole)
        received, failures = jax.jit(mapped)(factors, old)
    else:
        copies = jax.tree.map(lambda leaf: jnp.stack([leaf] * count), (factors, old))
        mapped = jax.pmap(inverted, axis_name="d", devices=jax.devices()[:count])
        received, failures = jax.tree.map(lambda leaf: leaf[-1], mapped(*copies))
    assert not any(map(int, failures.values()))
    for name, found in received.items():
        assert relative_error(found.phi_matrix(), np.linalg.inv(factors[name].phi)) < 1e-6
        assert relative_error(found.psi, np.linalg.inv(factors[name].psi)) < 1e-6


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_a_training_is_that_of_cholesky_inverses(dtype):
    """With inverses that are stored in 8 bits of precision, too, from where the iteration starts."""
    predict, params, x, y = mlp_problem()[:4]
    layers = tkfac.find_layers(predict, params, x)

    @functools.partial(jax.jit, static_argnums=0)
    def train(inverse, params):
        optimizer = tkfac.tkfac(
            0.1, layers, damping=0.1, inverse=inverse, inverse_dtype=dtype, inverse_interval=2
        )
        fisher = tkfac.sampled_fisher(predict, tkfac.Categorical(), layers)

        def step(carry, key):
            params, state = carry
            grads = jax.grad(lambda p: tkfac.Categorical().nll(predict(p, x), y).mean())(params)
            statistics = fisher(params, x, key=key)
            updates, state = optimizer.update(grads, state, params, statistics=statistics)
            return (optax.apply_updates(params, updates), state), None

        start = (params, optimizer.init(params))
        (params, state), _ = jax.lax.scan(step, start, jax.random.split(jax.random.key(0), 9))
        return params, state

    expected, _ = train(None, params)
    inverse = tkfac.newton_schulz_inverse(max_iterations=30, tolerance=1e-5)
    received, state = train(inverse, params)
    assert int(optax.tree.get(state, "failed_inversions")) == 0
    for one, other in zip(jax.tree.leaves(received), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6 if dtype is None else 2e-2, atol=1e-8)


def test_without_guesses_it_is_the_other_inverse():
    stack = jnp.stack([positive_definite(seed, 6) for seed in range(2)])
    inverse = tkfac.newton_schulz_inverse()
    assert isinstance(inverse, ImprovingInverse)
    assert not isinstance(tkfac.cholesky_inverse, ImprovingInverse)
    np.testing.assert_array_equal(inverse(stack), tkfac.cholesky_inverse(stack))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_iterations": 0}, "max_iterations=0; expected at least 1"),
        ({"tolerance": 0.0}, "tolerance=0.0; expected a number between 0 and 1"),
        ({"tolerance": 1.0}, "tolerance=1.0; expected a number between 0 and 1"),
    ],
)
def test_wrong_numbers_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tkfac.newton_schulz_inverse(**options)
