import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from networks import as_float64

import tkfac_jax as tkfac
from tkfac_jax.curvature.state import find_state
from tkfac_jax.optimizers.accumulation import multi_steps

MICRO_BATCHES = 3
INPUTS = jax.random.normal(jax.random.key(0), (4 * MICRO_BATCHES, 2), jnp.float64)
TARGETS = jax.random.randint(jax.random.key(1), (4 * MICRO_BATCHES,), 0, 3)


class Tiny(nn.Module):
    """Two layers whose factors have one size, which compiles quickly."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(3, dtype=jnp.float64)(x))
        return nn.Dense(3, use_bias=False, dtype=jnp.float64)(x)


PARAMS = as_float64(jax.jit(Tiny().init)(jax.random.key(2), INPUTS)["params"])


def predict(params, inputs):
    return Tiny().apply({"params": params}, inputs)


LAYERS = tkfac.find_layers(predict, PARAMS, INPUTS)
LIKELIHOOD = tkfac.Categorical()
VALUE_AND_GRAD = jax.jit(
    tkfac.value_and_grad_with_fisher(predict, LIKELIHOOD, LAYERS, estimator="exact")
)


def micro_batches(step=0):
    """The data of a whole step in equal parts, other ones at each step."""
    inputs = jnp.roll(INPUTS, step, axis=0) + 0.1 * step
    parts = (array.reshape(MICRO_BATCHES, -1, *array.shape[1:]) for array in (inputs, TARGETS))
    return list(zip(*parts, strict=True))


def optimizer_with(fisher_interval=1, inverse_interval=1, name="tkfac"):
    intervals = {"fisher_interval": fisher_interval, "inverse_interval": inverse_interval}
    if name == "tkfacw":
        return tkfac.tkfacw(0.3, LAYERS, **intervals)
    return tkfac.tkfac(0.3, LAYERS, damping=1e-2, **intervals)


def gradient_and_statistics(params, batch):
    inputs, targets = batch
    return VALUE_AND_GRAD(params, inputs, targets=targets)[1:]


def update_by(optimizer, kind):
    """A jitted update with the statistics from a function, as themselves, or none."""

    def update(params, state, gradient, given):
        statistics = {"function": lambda: given, "given": given, "none": None}[kind]
        return optimizer.update(gradient, state, params, statistics=statistics)

    return jax.jit(update)


def assert_close(received, expected):
    # Means of means, in float64, through inverses whose condition numbers are below 1e4.
    jax.tree.map(lambda r, e: np.testing.assert_allclose(r, e, 1e-10, 1e-13), received, expected)


def assert_equal(received, expected):
    jax.tree.map(np.testing.assert_array_equal, received, expected)


@pytest.mark.parametrize(
    ("intervals", "kinds", "name"),
    [
        ((1, 1), ["function"], "tkfac"),
        ((2, 3), ["function"], "tkfac"),
        ((2, 3), ["given", "none"], "tkfac"),
        ((2, 3), ["function"], "tkfacw"),
    ],
    ids=["function", "function at intervals", "given at intervals", "tkfacw"],
)
def test_micro_batches_update_as_the_whole_batch(intervals, kinds, name):
    optimizer = optimizer_with(*intervals, name)
    accumulating = multi_steps(
        optimizer, MICRO_BATCHES, layers=LAYERS, fisher_interval=intervals[0]
    )
    wholes = [update_by(optimizer, kind) for kind in kinds]
    parts = [update_by(accumulating, kind) for kind in kinds]
    params, state = PARAMS, jax.jit(accumulating.init)(PARAMS)
    whole_state = state.inner_state
    for step in range(5):
        batches = micro_batches(step)
        whole = jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *batches)
        expected, whole_state = wholes[step % len(kinds)](
            params, whole_state, *gradient_and_statistics(params, whole)
        )
        for i, batch in enumerate(batches):
            given = gradient_and_statistics(params, batch)
            updates, state = parts[step % len(kinds)](params, state, *given)
            if i < MICRO_BATCHES - 1:
                assert_equal(updates, jax.tree.map(jnp.zeros_like, updates))
                assert int(state.mini_step) == i + 1
        assert_close((updates, state.inner_state), (expected, whole_state))
        params = optax.apply_updates(params, updates)
    assert int(find_state(state).factor_updates) == (5 if intervals[0] == 1 else 3)
    assert int(find_state(state).step) == 5


def test_optax_multi_steps_sees_the_statistics_of_the_last_micro_batch_only():
    whole = jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *micro_batches())
    gradient, statistics = gradient_and_statistics(PARAMS, whole)
    expected, _ = whole_update(gradient, statistics)
    with_last, _ = whole_update(gradient, gradient_and_statistics(PARAMS, micro_batches()[-1])[1])
    # Its accumulator is float32 unless it is told otherwise.
    trap = optax.MultiSteps(optimizer_with(), MICRO_BATCHES, accumulator_dtype=jnp.float64)
    update, state = update_by(trap, "function"), jax.jit(trap.init)(PARAMS)
    for batch in micro_batches():
        updates, state = update(PARAMS, state, *gradient_and_statistics(PARAMS, batch))
    assert_close(updates, with_last)
    differences = jax.tree.map(lambda a, b: abs(a - b).max() / abs(b).max(), updates, expected)
    assert max(jax.tree.leaves(differences)) > 0.05


@pytest.fixture(scope="module")
def accumulating():
    """A first state, and updates with statistics that are given and with none."""
    optimizer = multi_steps(optimizer_with(), MICRO_BATCHES, layers=LAYERS)

    @jax.jit
    def give(state, gradient, statistics):
        return optimizer.update(gradient, state, PARAMS, statistics=statistics)

    @jax.jit
    def give_none(state, gradient):
        return optimizer.update(gradient, state, PARAMS, statistics=None)

    return jax.jit(optimizer.init)(PARAMS), give, give_none


@jax.jit
def whole_update(gradient, statistics):
    """The first update with a gradient and statistics."""
    optimizer = optimizer_with()
    return optimizer.update(gradient, optimizer.init(PARAMS), PARAMS, statistics=statistics)


def gradients_and_statistics():
    return [gradient_and_statistics(PARAMS, batch) for batch in micro_batches()]


def test_statistics_that_are_not_finite_are_skipped_and_counted(accumulating):
    state, give, _ = accumulating
    before = find_state(state)
    parts = gradients_and_statistics()
    for i, (gradient, statistics) in enumerate(parts):
        if i == 1:
            statistics = jax.tree.map(lambda array: array * jnp.nan, statistics)
        updates, state = give(state, gradient, statistics)
    after = find_state(state)
    assert int(after.skipped_statistics) == 1
    assert int(after.factor_updates) == 0
    assert_equal(after.factors, before.factors)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))
    # The next whole step starts from a clean mean.
    for gradient, statistics in parts:
        updates, state = give(state, gradient, statistics)
    assert int(find_state(state).factor_updates) == 1
    assert int(find_state(state).skipped_statistics) == 1


def test_without_statistics_the_factors_stay(accumulating):
    """Even where they were due: the optimizer inside has an interval of 1."""
    state, give, give_none = accumulating
    parts = gradients_and_statistics()
    for _ in range(2):
        for gradient, statistics in parts:
            updates, state = give(state, gradient, statistics)
        assert int(find_state(state).skipped_statistics) == 0
        known = find_state(state).factors
        for gradient, _ in parts:
            updates, state = give_none(state, gradient)
        assert_equal(find_state(state).factors, known)
    assert int(find_state(state).factor_updates) == 2
    assert int(find_state(state).step) == 4
    assert float(abs(updates["Dense_0"]["kernel"]).max()) > 0


@pytest.mark.parametrize("given", [(2,), (0, 1)])
def test_statistics_of_some_micro_batches_are_averaged(accumulating, given):
    state, give, give_none = accumulating
    parts = gradients_and_statistics()
    for i, (gradient, statistics) in enumerate(parts):
        updates, state = (
            give(state, gradient, statistics) if i in given else give_none(state, gradient)
        )
    mean = lambda *arrays: sum(arrays) / len(arrays)  # noqa: E731
    gradient = jax.tree.map(mean, *(gradient for gradient, _ in parts))
    statistics = jax.tree.map(mean, *(parts[i][1] for i in given))
    assert_close((updates, state.inner_state), whole_update(gradient, statistics))


def test_a_donated_scan_calls_the_function_when_it_is_due():
    calls = []
    fisher = tkfac.exact_fisher(predict, LIKELIHOOD, LAYERS)
    optimizer = multi_steps(optimizer_with(3), MICRO_BATCHES, layers=LAYERS, fisher_interval=3)

    def body(carry, batch):
        params, state = carry
        inputs, targets = batch
        gradient = jax.grad(lambda p: LIKELIHOOD.nll(predict(p, inputs), targets).mean())(params)

        def statistics():
            jax.debug.callback(lambda step: calls.append(int(step)), find_state(state).step)
            return fisher(params, inputs)

        updates, state = optimizer.update(gradient, state, params, statistics=statistics)
        return (optax.apply_updates(params, updates), state), state.mini_step

    run = jax.jit(lambda carry, batches: jax.lax.scan(body, carry, batches), donate_argnums=0)
    batches = jax.tree.map(
        lambda *arrays: jnp.stack(arrays), *(b for step in range(4) for b in micro_batches(step))
    )
    carry = (jax.tree.map(jnp.array, PARAMS), jax.jit(optimizer.init)(PARAMS))
    described = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), carry)
    for _ in range(2):
        carry, mini_steps = run(carry, batches)
    jax.effects_barrier()
    assert mini_steps.tolist() == [1, 2, 0] * 4
    assert described == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), carry)
    assert sorted(calls) == [0] * 3 + [3] * 3 + [6] * 3
    assert int(find_state(carry[1]).step) == 8


def test_refresh_inverses_is_passed_on_with_the_last_micro_batch():
    optimizer = multi_steps(optimizer_with(1, 100), 2, layers=LAYERS)
    gradient, statistics = gradients_and_statistics()[0]

    @functools.partial(jax.jit, static_argnums=0)
    def inverses_after(refreshes):
        state = optimizer.init(PARAMS)
        for refresh in refreshes:
            _, state = optimizer.update(
                gradient, state, PARAMS, statistics=statistics, refresh_inverses=refresh
            )
        return find_state(state).inverses

    start = inverses_after(())
    assert_equal(inverses_after((True, False)), start)
    refreshed = inverses_after((False, True))
    assert not np.allclose(refreshed["Dense_0"].psi, start["Dense_0"].psi)


def test_gradients_in_low_precision_are_averaged_in_float32():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    # An optimizer that stops before the layers, so that what it is given comes out.
    hidden = optax.masked(tkfac.scale_by_tkfac(LAYERS), False)
    optimizer = multi_steps(hidden, 2, layers=LAYERS, fisher_interval=1)
    state = optimizer.init(params)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.gradients)} == {"float32"}
    for value in (1.0, 1 / 64):
        gradient = jax.tree.map(lambda leaf, value=value: jnp.full_like(leaf, value), params)
        updates, state = optimizer.update(gradient, state, params, statistics=None)
    # In bfloat16, 1 + (1 / 64 - 1) / 2 = 0.5078125 is exact only if the difference is.
    for leaf in jax.tree.leaves(updates):
        assert leaf.dtype == jnp.bfloat16
        np.testing.assert_array_equal(leaf.astype(jnp.float32), 0.5078125)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optimizer": "tkfac"}, "optimizer is str; expected an Optax optimizer"),
        ({"every_k": 0}, "every_k=0; expected the number of micro-batches"),
        ({"every_k": 2.0}, "every_k=2.0; expected the number of micro-batches"),
        ({"layers": {"Dense_0": 1}}, "layers is dict; expected what find_layers"),
        ({"fisher_interval": 0}, "fisher_interval=0; expected a whole number of steps"),
    ],
    ids=["optimizer", "every_k", "every_k float", "layers", "fisher_interval"],
)
def test_wrong_arguments(unchecked, arguments, message):
    right = {"optimizer": optimizer_with(), "every_k": 2, "layers": LAYERS}
    with pytest.raises(ValueError, match=message):
        multi_steps(**right | arguments)


def test_an_optimizer_without_statistics_is_refused():
    optimizer = multi_steps(optax.adam(1e-3), 2, layers=LAYERS, fisher_interval=1)
    with pytest.raises(ValueError, match="holds 0 TkfacState; expected exactly one"):
        optimizer.init(PARAMS)


def test_an_optimizer_that_compares_losses_is_refused():
    adaptive = tkfac.adaptive_tkfac(LAYERS, tkfac.Categorical(), initial_damping=0.1)
    with pytest.raises(ValueError, match="adaptive_tkfac compares losses of the whole batch"):
        jax.eval_shape(multi_steps(adaptive, 2, layers=LAYERS).init, PARAMS)


def test_missing_and_foreign_statistics_are_refused():
    optimizer = multi_steps(optimizer_with(), 2, layers=LAYERS)
    state = jax.jit(optimizer.init)(PARAMS)
    gradient, statistics = gradients_and_statistics()[0]
    with pytest.raises(TypeError, match="needs the keyword argument 'statistics'"):
        optimizer.update(gradient, state, PARAMS)
    few = {name: statistics[name] for name in list(statistics)[:1]}
    with pytest.raises(ValueError, match="statistics are for"):
        optimizer.update(gradient, state, PARAMS, statistics=lambda: few)
