"""Numbers that go wrong: parameters stay finite, old inverses in use, and the state says what happened, and where."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import mlp_problem, spec

import tkfac_jax as tkfac
from tkfac_jax.curvature.inverses import invert_factors
from tkfac_jax.curvature.state import find_state
from tkfac_jax.layer_diagnostics import diagnostics_table
from tkfac_jax.layers.spec import Layers

# Compiled programs are kept between examples; the first one pays.
PATIENT = settings(
    deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
)
SHAPES = [(1, 1), (6, 3)]
OPTIMIZERS = {
    "factors": {},
    "moments": {"averaging": "moments"},
    "trace damping": {"damping": tkfac.trace_damping(1e-3, 1e-3)},
    "norm constraint": {"averaging": "moments", "norm_constraint": 1.0},
    "tkfacw": None,
}
BAD = [np.nan, np.inf, -np.inf]


def params_of(shape, dtype):
    d_in, d_out = shape
    return {"kernel": jnp.ones((d_in, d_out), dtype), "bias": jnp.ones(d_out, dtype)}


def layers_of(shape, dtype):
    d_in, d_out = shape
    return Layers((spec(d_in + 1, d_out, has_bias=True, dtype=dtype),))


@functools.cache
def training_of(shape, dtype, name):
    """A first state and a jitted step `(params, state, gradient, statistics)` on one layer."""
    layers, options = layers_of(shape, dtype), OPTIMIZERS[name]
    optimizer = (
        tkfac.tkfacw(1e-3, layers) if options is None else tkfac.tkfac(1e-3, layers, **options)
    )
    params = params_of(shape, dtype)

    @jax.jit
    def step(params, state, gradient, statistics):
        updates, state = optimizer.update(gradient, state, params, statistics={".": statistics})
        return optax.apply_updates(params, updates), state

    return params, optimizer.init(params), step


def statistics_of(rng, shape, dtype, input_scale, gradient_scale, rank, activity):
    """The statistics of a few examples in NumPy, by Eq. (4.9)."""
    d_in, d_out = shape
    inputs = input_scale * activity * rng.normal(size=(rank, d_in))
    inputs = np.concatenate([inputs, np.ones((rank, 1))], 1).astype(dtype)
    gradients = (gradient_scale * rng.normal(size=(rank, d_out))).astype(dtype)
    with np.errstate(all="ignore"):
        norms_in, norms_out = (inputs**2).sum(1), (gradients**2).sum(1)
        return tkfac.LayerStatistics(
            (inputs.T * norms_out) @ inputs / rank,
            (gradients.T * norms_in) @ gradients / rank,
            np.asarray((norms_in * norms_out).mean(), dtype),
        )


def assert_finite(tree):
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


@PATIENT
@given(
    shape=st.sampled_from(SHAPES),
    name=st.sampled_from(list(OPTIMIZERS)),
    scales=st.lists(
        st.tuples(*[st.floats(-20, 20)] * 3, st.sampled_from([1, 2, 9]), st.sampled_from([0, 1])),
        min_size=1,
        max_size=4,
    ),
    fault=st.none() | st.tuples(st.integers(0, 3), st.sampled_from(BAD), st.integers(0, 3)),
    seed=st.integers(0, 100),
)
def test_parameters_stay_finite_at_every_scale(shape, name, scales, fault, seed):
    """Scales of inputs, derivatives and gradients from 1e-20 to 1e20, dead inputs, rank one, and a bad number."""
    # Of the two dtypes the one whose numbers end sooner.
    rng, dtype = np.random.default_rng(seed), "float32"
    params, state, step = training_of(shape, dtype, name)
    for i, (input_scale, gradient_scale, own, rank, activity) in enumerate(scales):
        statistics = statistics_of(
            rng, shape, dtype, 10.0**input_scale, 10.0**gradient_scale, rank, activity
        )
        gradient = jax.tree.map(
            lambda p, s=10.0**own: (s * rng.normal(size=p.shape)).astype(dtype), params
        )
        if fault is not None and fault[0] == i:
            _, bad, where = fault
            if where == 3:
                gradient["kernel"].flat[0] = bad
            else:
                spoilt = np.array(statistics[where])
                spoilt.flat[0] = bad
                statistics = statistics._replace(**{statistics._fields[where]: spoilt})
        before = find_state(state)
        params, state = step(params, state, gradient, statistics)
        after = find_state(state)
        assert_finite(params)
        assert_finite((after.factors, after.inverses))
        counted = int(after.factor_updates + after.skipped_statistics)
        assert counted == i + 1
        if not all(np.isfinite(array).all() for array in statistics):
            assert int(after.skipped_statistics) == int(before.skipped_statistics) + 1
            jax.tree.map(np.testing.assert_array_equal, after.factors, before.factors)
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient)):
            assert int(after.skipped_updates) == int(before.skipped_updates) + 1
    faults = find_state(state).faults["."]
    assert int(faults.statistics) == int(find_state(state).skipped_statistics)
    assert int(faults.updates) == int(find_state(state).skipped_updates)


@PATIENT
@given(
    size=st.sampled_from([1, 7]),
    exponent=st.floats(0, 14),
    scale=st.floats(-20, 20),
    dtype=st.sampled_from(["float32", "float64"]),
    seed=st.integers(0, 100),
)
def test_inverses_of_any_condition_number(size, exponent, scale, dtype, seed):
    """Where the dtype carries the condition number the inverse is right; beyond that it is finite, or counted."""
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.normal(size=(size, size)))
    eigenvalues = 10.0**scale * np.logspace(0, -exponent, size)
    matrix = (basis * eigenvalues) @ basis.T
    old = tkfac.KroneckerInverses(jnp.eye(size, dtype=dtype), jnp.ones((1, 1), dtype), None)
    factors = tkfac.KroneckerFactors(
        jnp.asarray(matrix, dtype), jnp.ones((1, 1), dtype), jnp.ones((), dtype)
    )
    received, failures = inverse_of(size, dtype)(factors, old)
    assert_finite(received)
    if failures:
        np.testing.assert_array_equal(received.phi, old.phi)
    condition = eigenvalues[0] / eigenvalues[-1]
    rounding = 10 * size * condition * np.finfo(dtype).eps
    if rounding < 0.1:
        expected = (basis / eigenvalues) @ basis.T
        assert not failures
        np.testing.assert_allclose(
            received.phi, expected, rtol=rounding, atol=rounding * np.abs(expected).max()
        )


@functools.cache
def inverse_of(size, dtype):
    layers = {".": spec(size, 1, dtype=dtype)}

    @jax.jit
    def invert(factors, old):
        new, failures = invert_factors({".": factors}, {".": old}, layers, tkfac.cholesky_inverse)
        return new["."], failures["."]

    return invert


def one_step(gradient=None, statistics=None, **options):
    """An update on the Mlp; what is given replaces a layer's gradient or statistics."""
    predict, params, x, y, layers = mlp_problem()
    likelihood = tkfac.Categorical()
    f = tkfac.value_and_grad_with_fisher(predict, likelihood, layers, estimator="empirical")
    _, grads, stats = jax.jit(lambda: f(params, x, targets=y))()
    optimizer = tkfac.tkfac(0.1, layers, damping=0.1, **options)
    state = optimizer.init(params)
    update = jax.jit(lambda g, s, stats: optimizer.update(g, s, params, statistics=stats))
    updates, state = update(grads | (gradient or {}), state, stats | (statistics or {}))
    return updates, state, layers


def test_bad_statistics_name_their_layer():
    bad = tkfac.LayerStatistics(jnp.full((5, 5), jnp.nan), jnp.eye(4), jnp.ones(()))
    updates, state, layers = one_step(statistics={"Dense_1": bad})
    assert_finite(updates)
    assert diagnostics_table(tkfac.diagnostics(state, layers)).endswith(
        "failed statistics: Dense_1 (1)"
    )


@pytest.mark.parametrize("make", [tkfac.normal_damping, tkfac.factored_damping])
def test_a_damping_that_is_not_a_number_leaves_the_averages_as_they_are(make):
    """Averages are looked at in one column only; there it shows."""
    predict, params, x, y, layers = mlp_problem()
    fisher = tkfac.empirical_fisher(predict, tkfac.Categorical(), layers)
    statistics = jax.jit(fisher)(params, x, targets=y)
    damping = make(lambda step: jnp.where(step == 1, jnp.nan, 0.1))
    optimizer = tkfac.scale_by_tkfac(layers, damping=damping)
    update = jax.jit(lambda state: optimizer.update(params, state, params, statistics=statistics))
    _, first = update(optimizer.init(params))
    _, second = update(first)
    assert_finite(second)
    assert int(second.skipped_statistics) == 1
    assert [int(faults.statistics) for faults in second.faults.values()] == [1] * len(layers)
    jax.tree.map(np.testing.assert_array_equal, second.factors, first.factors)


def test_statistics_that_overflow_in_the_dtype_of_the_layer_name_it():
    """In double precision they are finite; what overflows is not in the column that is looked at."""
    layers = layers_of((6, 3), "float32")
    large = jnp.eye(7).at[-1, -1].set(1e300)
    statistics = {".": tkfac.LayerStatistics(large, jnp.eye(3), jnp.ones(()))}
    optimizer = tkfac.scale_by_tkfac(layers)
    params = params_of((6, 3), jnp.float32)
    _, state = optimizer.update(params, optimizer.init(params), params, statistics=statistics)
    assert int(state.skipped_statistics) == 1
    assert_finite(state)


@pytest.mark.parametrize("damping", [tkfac.normal_damping, tkfac.factored_damping])
def test_averages_take_no_memory_beside_the_state(damping):
    """A program that is given statistics writes the averages where the old ones were."""
    layers = layers_of((600, 2), "float32")
    params = params_of((600, 2), jnp.float32)
    optimizer = tkfac.scale_by_tkfac(layers, damping=damping(0.1))
    state = optimizer.init(params)
    statistics = {".": tkfac.LayerStatistics(*state.factors["."])}

    def update(state, statistics):
        _, state = optimizer.update(
            params, state, params, statistics=statistics, refresh_inverses=False
        )
        return state

    compiled = jax.jit(update, donate_argnums=0).lower(state, statistics).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < state.factors["."].phi.nbytes


def test_bad_gradients_name_their_layer_and_stop_nothing_else():
    bad = {"kernel": jnp.full((5, 4), jnp.inf)}
    updates, state, layers = one_step(gradient={"Dense_1": bad})
    assert_finite(updates)
    np.testing.assert_array_equal(updates["Dense_1"]["kernel"], 0)
    assert float(jnp.abs(updates["Dense_0"]["kernel"]).max()) > 0
    assert diagnostics_table(tkfac.diagnostics(state, layers)).endswith(
        "failed updates: Dense_1 (1)"
    )


def test_a_factor_that_is_not_positive_definite_keeps_the_old_inverse_and_names_its_layer():
    negative = tkfac.LayerStatistics(jnp.eye(5), -1e3 * jnp.eye(4), jnp.ones(()))
    updates, state, layers = one_step(statistics={"Dense_1": negative}, averaging="moments")
    assert_finite(updates)
    found = find_state(state)
    assert int(found.failed_inversions) == 1
    # The one from before the first statistics: that of the damping alone.
    np.testing.assert_allclose(found.inverses["Dense_1"].psi, np.eye(4) / np.sqrt(0.1), rtol=1e-12)
    assert diagnostics_table(tkfac.diagnostics(state, layers)).endswith(
        "failed inversions: Dense_1 (1)"
    )


def test_a_bad_gradient_of_the_fallback_leaves_its_averages_alone():
    predict, params, x, _, _ = mlp_problem()
    layers = tkfac.find_layers(
        lambda p, x: predict(p | {"scale": p["scale"]}, x) * p["scale"],
        params | {"scale": jnp.ones(3)},
        x,
    )
    params = params | {"scale": jnp.ones(3)}
    optimizer = tkfac.tkfac(0.1, layers)
    state = optimizer.init(params)
    gradient = params | {"scale": jnp.full(3, jnp.nan)}
    updates, state = jax.jit(lambda g, s: optimizer.update(g, s, params, statistics=None))(
        gradient, state
    )
    assert_finite(updates)
    assert_finite(jax.tree.leaves(state))
    assert int(optax.tree.get(state, "total_notfinite")) == 1


@pytest.mark.parametrize("case", ["dead", "one example"])
def test_dead_layers_and_batches_of_one(case):
    predict, params, x, y, _ = mlp_problem()
    x, y = (0 * x, y) if case == "dead" else (x[:1], y[:1])
    # Without biases the later layers see zeros only.
    params = jax.tree.map(lambda p: p * (p.ndim > 1), params)
    layers = tkfac.find_layers(predict, params, x)
    optimizer = tkfac.tkfac(0.05, layers, damping=1e-3)
    step = tkfac.make_train_step(
        predict,
        tkfac.Categorical(),
        optimizer,
        fisher_interval=1,
        inverse_interval=1,
    )
    state = optimizer.init(params)
    for t in range(3):
        params, state, _ = step(params, state, x, targets=y, key=jax.random.key(t))
        assert_finite((params, find_state(state).inverses))
    assert int(find_state(state).failed_inversions) == 0


STEPS = 10_000


@functools.cache
def soak(with_faults):
    """The loss of a regression after 10,000 steps, with faults injected at random into two in a hundred.

    The network is linear, so that all its minima are equally good: what differs is the optimizer's doing.
    """
    rng = jax.random.key(0)
    true = jax.random.normal(rng, (4, 2), jnp.float32)
    inputs = jax.random.normal(jax.random.key(1), (64, 4), jnp.float32)
    noise = jax.random.normal(jax.random.key(2), (64, 2), jnp.float32)
    targets = inputs @ true + 0.5 * noise

    def predict(params, x):
        hidden = x @ params["first"]
        hidden = tkfac.tag(hidden, x, name="first", kernel=params["first"])
        return tkfac.tag(hidden @ params["second"], hidden, name="second", kernel=params["second"])

    params = {
        "first": 0.5 * jax.random.normal(jax.random.key(3), (4, 8), jnp.float32),
        "second": 0.3 * jax.random.normal(jax.random.key(4), (8, 2), jnp.float32),
    }
    layers = tkfac.find_layers(predict, params, inputs)
    likelihood = tkfac.Normal()
    f = tkfac.value_and_grad_with_fisher(predict, likelihood, layers)
    optimizer = tkfac.tkfac(
        optax.cosine_decay_schedule(0.02, STEPS),
        layers,
        damping=1e-2,
        inverse_interval=5,
        norm_constraint=1.0,
    )

    def faulty(key, gradient, statistics):
        """Spoils the gradient or the statistics of a layer."""
        which = jax.random.randint(key, (), 0, 6)
        kinds = {
            0: (jnp.nan, 0, 0),
            1: (jnp.inf, 0, 0),
            2: (0, jnp.nan, 0),
            3: (0, jnp.inf, 0),
            4: (0, 0, 1.0),
            5: (0, 0, 0),
        }
        to_gradient, to_statistics, negate = (
            jnp.array([kinds[k][i] for k in kinds], jnp.float32)[which] for i in range(3)
        )
        gradient = gradient | {"first": gradient["first"].at[0, 0].add(to_gradient)}
        second = statistics["second"]
        # A second moment cannot be negative: the factor is then not positive definite, until it is averaged out.
        moment = second.output_moment.at[0, 0].add(to_statistics)
        moment = moment - negate * 20 * second.output_moment
        # The last kind is a batch without signal.
        alive = jnp.where(which == 5, 0.0, 1.0)
        first = jax.tree.map(lambda leaf: alive * leaf, statistics["first"])
        spoilt = statistics | {
            "first": first,
            "second": second._replace(output_moment=moment),
        }
        return gradient, spoilt

    def one(carry, key):
        params, state = carry
        batch, draw, when, what = jax.random.split(key, 4)
        rows = jax.random.randint(batch, (16,), 0, 64)
        _, gradient, statistics = f(params, inputs[rows], targets=targets[rows], key=draw)
        if with_faults:
            spoilt = faulty(what, gradient, statistics)
            is_faulty = jax.random.uniform(when) < 0.02
            gradient, statistics = jax.tree.map(
                lambda bad, good: jnp.where(is_faulty, bad, good), spoilt, (gradient, statistics)
            )
        updates, state = optimizer.update(gradient, state, params, statistics=statistics)
        return (optax.apply_updates(params, updates), state), None

    (params, state), _ = jax.jit(
        lambda params: jax.lax.scan(
            one, (params, optimizer.init(params)), jax.random.split(jax.random.key(5), STEPS)
        )
    )(params)
    loss = likelihood.nll(predict(params, inputs), targets).mean()
    return float(loss), jax.device_get((params, find_state(state)))


def test_ten_thousand_steps_with_faults_end_where_those_without_end():
    loss, (params, state) = soak(with_faults=True)
    expected, (_, clean) = soak(with_faults=False)
    assert_finite((params, state))
    assert loss == pytest.approx(expected, rel=0.01)
    # Of about 200 faults two in six are in the gradient, two in the statistics; a sixth makes bad factors.
    assert int(state.step) == STEPS
    assert int(state.skipped_updates) > 40
    assert int(state.skipped_statistics) > 40
    assert int(state.failed_inversions) > 5
    assert int(clean.skipped_updates + clean.skipped_statistics + clean.failed_inversions) == 0
