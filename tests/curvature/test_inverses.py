import jax
import jax.numpy as jnp
import numpy as np
import pytest
from damped_factors import layers_of, positive_definite

import tkfac_jax as tkfac
from tkfac_jax.curvature.inverses import invert_factors
from tkfac_jax.linalg.factor_structure import Structure, moment


@pytest.mark.usefixtures("platform")
def test_cholesky_inverse():
    stack = jnp.stack([positive_definite(seed, 6) for seed in range(3)])
    received = jax.jit(tkfac.cholesky_inverse)(stack)
    np.testing.assert_allclose(received, np.linalg.inv(stack), rtol=1e-9)
    np.testing.assert_array_equal(received, received.mT)


@pytest.mark.usefixtures("platform")
@pytest.mark.parametrize("size", [255, 257, 515, 1025])
def test_large_matrices_are_inverted(size):
    # Of the matrix only the lower triangle is read.
    matrix = positive_definite(size, size)
    received = jax.jit(tkfac.cholesky_inverse)(jnp.tril(matrix)[None])[0]
    # The condition number is about 40 times the size.
    np.testing.assert_allclose(received, np.linalg.inv(matrix), rtol=1e-7, atol=1e-10)
    np.testing.assert_allclose(received, received.T, rtol=0, atol=1e-14)


def test_a_gpu_has_few_products_to_compile():
    """One for a statistic, one for a stack of inverses; on a CPU strips and halves make several of each."""
    size = 600
    structure = Structure.of_size(size)

    def products(function, *shapes, platform):
        given = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        lowered = jax.jit(function).trace(*given).lower(lowering_platforms=(platform,))
        return lowered.as_text().count("stablehlo.dot_general")

    for function, shapes in (
        (lambda rows, weights: moment(structure, rows, weights), ((size, size), (size,))),
        (tkfac.cholesky_inverse, ((2, size, size),)),
    ):
        assert products(function, *shapes, platform="cuda") == 1
        assert products(function, *shapes, platform="cpu") > 1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_inverses_by_halves_lose_no_more_digits_than_those_of_lapack(dtype):
    size, condition = 300, 1e3 if dtype == jnp.float32 else 1e10
    basis, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(size, size)))
    scales = np.geomspace(1, condition, size)
    matrix, expected = (basis / scales) @ basis.T, (basis * scales) @ basis.T

    def error(received):
        return np.linalg.norm(received - expected) / np.linalg.norm(expected)

    received = tkfac.cholesky_inverse(jnp.asarray(matrix, dtype)[None])[0]
    solve = jax.scipy.linalg.cho_solve
    factor = jax.scipy.linalg.cho_factor(jnp.asarray(matrix, dtype))
    lapack = solve(factor, jnp.eye(size, dtype=dtype))
    assert error(received) < 3 * error(lapack)


@pytest.mark.usefixtures("platform")
@pytest.mark.parametrize("size", [3, 300])
@pytest.mark.parametrize("where", [0, -1])
def test_cholesky_inverse_says_nan_where_it_fails(size, where):
    bad = jnp.eye(size).at[where, where].set(-1)
    stack = jnp.stack([positive_definite(0, size), bad])
    received = tkfac.cholesky_inverse(stack)
    assert bool(jnp.isfinite(received[0]).all())
    assert bool(jnp.isnan(received[1]).any())


@pytest.mark.usefixtures("platform")
@pytest.mark.parametrize("largest_joined", [0, 2**16])
def test_all_layers_are_inverted_with_and_without_bias(largest_joined, monkeypatch):
    monkeypatch.setattr("tkfac_jax.layers.spec.LARGEST_JOINED", largest_joined)
    layers, factors, old = layers_of([(5, 3), (5, 5), (2, 3)], [True, False, True])
    received, failures = jax.jit(lambda f, o: invert_factors(f, o, layers, tkfac.cholesky_inverse))(
        factors, old
    )
    assert not any(failures.values())
    for name, inverse in received.items():
        np.testing.assert_allclose(
            inverse.phi_matrix(), np.linalg.inv(factors[name].phi), rtol=1e-9
        )
        np.testing.assert_allclose(inverse.psi, np.linalg.inv(factors[name].psi), rtol=1e-9)
        assert (inverse.bias is None) == (largest_joined > 0 or not layers[name].has_bias)


def test_nearly_equal_sizes_share_a_program():
    """One of the stack, and one that takes its matrices one or two at a time for a CPU."""
    layers, factors, old = layers_of([(5, 3), (3, 5), (2, 3)], [True, False, True])
    shapes = []

    def watched(stack):
        shapes.append(stack.shape)
        return tkfac.cholesky_inverse(stack)

    jax.eval_shape(lambda f: invert_factors(f, old, layers, watched), factors)
    expected = [(2, 5, 5), (1, 5, 5), (1, 5, 5), (4, 3, 3), (1, 3, 3), (1, 3, 3)]
    assert sorted(shapes) == sorted(expected)


@pytest.mark.parametrize(
    ("sizes", "largest_matrices"),
    [
        ([(400, 390), (380, 370), (360, 350)], 3),
        # The second stack is of two sizes, which are filled up one by one.
        ([(400, 400), (320, 320), (319, 319)], 4.5),
    ],
    ids=["single", "pairs"],
)
def test_one_stack_at_a_time_takes_memory(sizes, largest_matrices):
    """What is inverted is put together when the larger matrices are done."""
    layers, factors, old = layers_of(sizes, [False] * 3)

    def inverted(factors, old):
        return invert_factors(factors, old, layers, jnp.positive)

    compiled = jax.jit(inverted, donate_argnums=1).lower(factors, old).compile()
    largest = factors["layer_0"].phi.nbytes
    assert compiled.memory_analysis().temp_size_in_bytes < largest_matrices * largest
    # They are inverted all the same, and each is what it was.
    received, failures = compiled(factors, old)
    assert not any(failures.values())
    for name, inverse in received.items():
        np.testing.assert_array_equal(inverse.phi, factors[name].phi)
        np.testing.assert_array_equal(inverse.psi, factors[name].psi)


@pytest.mark.parametrize("number", [3, 4])
def test_each_matrix_of_a_stack_is_retried_by_itself(number):
    """Healthy ones get no damping, whether or not they are inverted together with one that does."""
    layers, factors, old = layers_of([(4, 4), (4, 4 if number == 4 else 9)], [False, False])
    rank_one = jnp.ones((4, 4)) - 1e-9 * jnp.eye(4)
    factors["layer_0"] = factors["layer_0"]._replace(phi=jnp.nan * rank_one)
    factors["layer_1"] = factors["layer_1"]._replace(phi=rank_one)
    received, failures = jax.jit(lambda f, o: invert_factors(f, o, layers, tkfac.cholesky_inverse))(
        factors, old
    )
    assert {name: int(n) for name, n in failures.items()} == {"layer_0": 1, "layer_1": 0}
    np.testing.assert_array_equal(received["layer_0"].phi, 7 * np.eye(4))
    damped = np.linalg.inv(rank_one + 1e-4 * np.mean(np.diag(rank_one)) * np.eye(4))
    np.testing.assert_allclose(received["layer_1"].phi, damped, rtol=1e-6)
    for name in layers:
        healthy = np.linalg.inv(factors[name].psi)
        np.testing.assert_allclose(received[name].psi, healthy, rtol=1e-9)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_a_singular_matrix_is_retried_with_more_damping(dtype):
    """Rank one, and pushed below zero by rounding: Cholesky fails, a little damping mends it."""
    layers, factors, old = layers_of([(4, 3)], [False])
    ones = jnp.asarray(np.ones((4, 4)) - 1e-6 * np.eye(4), dtype)
    factors["layer_0"] = factors["layer_0"]._replace(
        phi=ones, psi=factors["layer_0"].psi.astype(dtype)
    )
    old = jax.tree.map(lambda leaf: leaf.astype(dtype), old)
    received, failures = invert_factors(factors, old, layers, tkfac.cholesky_inverse)
    assert not any(failures.values())
    damped = np.asarray(ones, np.float64) + 1e-4 * np.mean(np.diag(ones)) * np.eye(4)
    # The condition number is 4e4.
    np.testing.assert_allclose(
        received["layer_0"].phi, np.linalg.inv(damped), rtol=2e-2 if dtype == jnp.float32 else 1e-6
    )
    np.testing.assert_allclose(
        received["layer_0"].psi, np.linalg.inv(factors["layer_0"].psi), rtol=1e-3
    )


def test_a_trace_that_overflows_does_no_harm():
    layers, factors, old = layers_of([(5, 3)], [False])
    large = jnp.full(5, 8e37, jnp.float32)
    factors["layer_0"] = factors["layer_0"]._replace(phi=jnp.diag(large))
    received, failures = invert_factors(factors, old, layers, tkfac.cholesky_inverse)
    assert not any(failures.values())
    np.testing.assert_allclose(np.diag(received["layer_0"].phi), 1 / 8e37, rtol=1e-5)


@pytest.mark.parametrize("bad", [jnp.nan, -5.0], ids=["nan", "negative"])
def test_a_hopeless_matrix_leaves_the_old_inverse(bad):
    layers, factors, old = layers_of([(4, 3), (4, 2)], [True, True])
    factors["layer_0"] = factors["layer_0"]._replace(phi=bad * jnp.eye(4))
    received, failures = jax.jit(lambda f, o: invert_factors(f, o, layers, tkfac.cholesky_inverse))(
        factors, old
    )
    assert {name: int(n) for name, n in failures.items()} == {"layer_0": 1, "layer_1": 0}
    np.testing.assert_array_equal(received["layer_0"].phi_matrix(), 7 * np.eye(4))
    np.testing.assert_allclose(
        received["layer_0"].psi, np.linalg.inv(factors["layer_0"].psi), rtol=1e-9
    )
    np.testing.assert_allclose(
        received["layer_1"].phi_matrix(), np.linalg.inv(factors["layer_1"].phi), rtol=1e-9
    )


@pytest.mark.parametrize("count", [1, 2])
def test_many_large_inverses_in_one_program_return(count):
    """Batched LAPACK calls of one program can wait for each other for ever; these must not."""
    sizes = [400, 399, 398, 397, 396, 395, 200, 199, 50, 49, 48, 47]
    stacks = [jnp.asarray(np.stack([2 * np.eye(size, dtype=np.float32)] * count)) for size in sizes]
    inverses = jax.jit(lambda stacks: [tkfac.cholesky_inverse(stack) for stack in stacks])(stacks)
    for inverse in inverses:
        np.testing.assert_allclose(np.diagonal(inverse, axis1=1, axis2=2), 0.5, rtol=1e-6)
