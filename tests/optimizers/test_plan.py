"""What an optimizer was built with is said once: those who step it read it, and refuse what disagrees."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec
from networks import fresh, mlp_problem

import tkfac_jax as tkfac
from tkfac_jax.fisher.layer_statistics import statistics_type
from tkfac_jax.optimizers.plan import Plan

PREDICT, PARAMS, X, Y, LAYERS = mlp_problem()
CATEGORICAL = tkfac.Categorical()
*_, OTHERS = mlp_problem(d_in=3)

OPTIMIZERS = {
    "scale_by_tkfac": tkfac.scale_by_tkfac,
    "tkfac": lambda layers, **options: tkfac.tkfac(0.05, layers, **options),
    "kfac": lambda layers, **options: tkfac.kfac(0.05, layers, **options),
    "tkfacw": lambda layers, **options: tkfac.tkfacw(0.05, layers, **options),
    "adaptive_tkfac": lambda layers, **options: tkfac.adaptive_tkfac(
        layers, CATEGORICAL, initial_damping=0.1, **options
    ),
    "multi_steps": lambda layers, **options: tkfac.multi_steps(
        tkfac.tkfac(0.05, layers, **options), 2
    ),
}
WRAPPERS = {
    "chain": lambda inner: optax.chain(optax.clip_by_global_norm(1.0), inner),
    "named_chain": lambda inner: optax.named_chain(("first", inner)),
    "masked": lambda inner: optax.masked(inner, True),
    "apply_if_finite": lambda inner: optax.apply_if_finite(inner, 3),
    "_replace": lambda inner: inner._replace(init=inner.init),
    "a tree map": lambda inner: jax.tree.map(lambda function: function, inner),
}


def make_step(optimizer, **options):
    return tkfac.make_train_step(PREDICT, CATEGORICAL, optimizer, **options)


def trained(optimizer, steps=4, **options):
    """Parameters and state after some steps of `make_train_step`."""
    step = make_step(optimizer, **options)
    params, state = fresh(PARAMS), jax.jit(optimizer.init)(PARAMS)
    for t in range(steps):
        params, state, _ = step(params, state, X, targets=Y, key=jax.random.key(t))
    return params, state


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_tells_what_it_was_built_with(name):
    options = {"fisher_interval": 3, "inverse_interval": 6, "spread_inverses": True}
    optimizer = OPTIMIZERS[name](LAYERS, axis_name="devices", **options)
    init, update = optimizer
    assert isinstance(optimizer, optax.GradientTransformationExtraArgs)
    assert (init, update) == (optimizer.init, optimizer.update)
    assert optimizer.plan == Plan(
        LAYERS,
        **options,
        rule=tkfac.independent if name == "kfac" else tkfac.trace_restricted,
        axis_name="devices",
        likelihood=CATEGORICAL if name == "adaptive_tkfac" else None,
    )
    told = OPTIMIZERS[name](LAYERS).plan
    default = 10 if name == "tkfacw" else None
    assert (told.fisher_interval, told.inverse_interval, told.axis_name) == (default, default, None)


@pytest.mark.parametrize("name", ["tkfac", "kfac", "tkfacw", "adaptive_tkfac"])
def test_a_step_reads_the_plan(name):
    options = {"fisher_interval": 2, "inverse_interval": 4}
    optimizer = OPTIMIZERS[name](LAYERS, **options)
    received = trained(optimizer)
    _, state = received
    assert int(optax.tree.get(state, "factor_updates")) == 2
    rule = tkfac.independent if name == "kfac" else tkfac.trace_restricted
    assert_equal(received, trained(optimizer, layers=LAYERS, rule=rule, **options))
    # An interval that is given to the step alone is no disagreement, where the optimizer has none by itself.
    if name != "tkfacw":
        assert_equal(received, trained(OPTIMIZERS[name](LAYERS), **options))


def test_without_any_interval_each_step_is_with_everything():
    _, state = trained(tkfac.tkfac(0.05, LAYERS), steps=3)
    assert int(optax.tree.get(state, "factor_updates")) == 3
    assert set(map(int, optax.tree.get(state, "refreshed").values())) == {2}


def test_inverses_are_spread_as_the_optimizer_says():
    options = {"fisher_interval": 3, "inverse_interval": 3}
    optimizer = tkfac.tkfac(0.05, LAYERS, spread_inverses=True, **options)
    assert_equal(
        trained(optimizer, 5),
        trained(tkfac.tkfac(0.05, LAYERS), 5, spread_inverses=True, **options),
    )
    _, state = trained(optimizer, 5)
    assert len(set(map(int, optax.tree.get(state, "refreshed").values()))) > 1


@pytest.mark.parametrize(
    ("built", "told", "message"),
    [
        ({"fisher_interval": 2}, {"fisher_interval": 3}, "fisher_interval is 3 here and 2 in the optimizer"),
        ({"inverse_interval": 2}, {"inverse_interval": 1}, "inverse_interval is 1 here and 2 in the optimizer"),
        ({}, {"layers": OTHERS}, r"layers is of 3 layers, Dense_0 \(4 x 5\).* here and of 3 layers, Dense_0 \(5 x 5\)"),
        ({}, {"layers": dict(LAYERS)}, "layers is dict; expected what find_layers"),
        ({}, {"rule": tkfac.independent}, "rule is tkfac_jax.independent here and tkfac_jax.trace_restricted in"),
        ({"axis_name": "i"}, {"axis_name": "j"}, "axis_name is 'j' here and 'i' in the optimizer"),
        (
            {"inverse_interval": 2, "spread_inverses": True},
            {"spread_inverses": False},
            "spread_inverses is False here and True in the optimizer",
        ),
        ({"fisher_interval": 2}, {"plan": Plan(LAYERS, 7)}, "fisher_interval is 7 here and 2 in the optimizer"),
        ({}, {"plan": tkfac.tkfac(0.05, LAYERS)}, "plan is PlannedTransformation; expected the plan of the"),
        ({}, {"rule": "kfac"}, "rule='kfac'; expected tkfac_jax.trace_restricted"),
        ({}, {"fisher_interval": np.int64(0)}, "fisher_interval=0; expected a whole number of steps"),
        ({}, {"fisher_interval": 2.0}, "fisher_interval=2.0; expected a whole number of steps"),
        ({"inverse_interval": jnp.asarray(-2)}, {}, "inverse_interval=-2; expected a whole number of steps"),
        ({}, {"fisher_interval": 0}, "fisher_interval=0; expected a whole number of steps"),
        ({}, {"inverse_interval": -1}, "inverse_interval=-1; expected a whole number of steps"),
    ],
)  # fmt: skip
def test_what_disagrees_is_refused_and_both_are_named(unchecked, built, told, message):
    with pytest.raises(ValueError, match=message):
        make_step(tkfac.tkfac(0.05, LAYERS, **built), **told)


def test_intervals_that_are_arrays_are_numbers_and_traced_ones_are_refused():
    _, state = trained(tkfac.tkfac(0.05, LAYERS, fisher_interval=jnp.asarray(2)), fisher_interval=2)
    assert int(optax.tree.get(state, "factor_updates")) == 2

    def traced(interval):
        make_step(tkfac.tkfac(0.05, LAYERS, fisher_interval=interval))

    with pytest.raises(ValueError, match=r"fisher_interval=.*known when the step is built"):
        jax.jit(traced)(2)


class OfItsOwn:
    """A likelihood that says nothing of when it equals another."""

    def nll(self, outputs, targets):
        return CATEGORICAL.nll(outputs, targets)

    def sample(self, key, outputs):
        return CATEGORICAL.sample(key, outputs)


@dataclasses.dataclass
class Weighted(OfItsOwn):
    """A likelihood that holds an array."""

    weights: Any


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (tkfac.Normal(2.0), tkfac.Normal(2.0), True),
        (tkfac.Normal(2.0), tkfac.Normal(1.0), False),
        (tkfac.Normal(2.0), tkfac.Bernoulli(), False),
        (Weighted(np.ones(3)), Weighted(np.ones(3)), True),
        (Weighted(np.ones(3)), Weighted(2 * np.ones(3)), False),
        (OfItsOwn(), OfItsOwn(), True),
        (OfItsOwn(), tkfac.Normal(), False),
        ({"a": tkfac.Normal()}, {"a": tkfac.Normal()}, True),
        ({"a": tkfac.Normal()}, {"a": tkfac.Bernoulli()}, False),
        ({"a": tkfac.Normal()}, {"b": tkfac.Normal()}, False),
    ],
)
def test_the_likelihood_of_adaptive_tkfac_is_that_of_the_step(one, other, same):
    optimizer = tkfac.adaptive_tkfac(LAYERS, one, initial_damping=0.1)
    if same:
        tkfac.make_train_step(PREDICT, other, optimizer)
    else:
        with pytest.raises(ValueError, match=r"likelihood is .* here and .* in the optimizer"):
            tkfac.make_train_step(PREDICT, other, optimizer)


@pytest.mark.parametrize("name", WRAPPERS)
def test_what_drops_the_plan_is_told_it_or_the_arguments(name):
    inner = tkfac.tkfac(0.05, LAYERS, fisher_interval=2, inverse_interval=4)
    wrapped = WRAPPERS[name](inner)
    assert getattr(wrapped, "plan", None) is None
    with pytest.raises(ValueError, match=r"Give plan=inner\.plan, where inner is"):
        make_step(wrapped)
    with pytest.raises(ValueError, match=r"Give plan=inner\.plan, where inner is"):
        make_step(wrapped, layers=LAYERS, fisher_interval=2)
    make_step(wrapped, plan=inner.plan)


def test_a_step_goes_by_the_plan_that_is_given_or_by_the_arguments():
    inner = tkfac.tkfac(0.05, LAYERS, fisher_interval=2, inverse_interval=4)
    wrapped = WRAPPERS["chain"](inner)
    by_plan = trained(wrapped, plan=inner.plan)
    assert int(optax.tree.get(by_plan[1], "factor_updates")) == 2
    assert_equal(by_plan, trained(wrapped, layers=LAYERS, fisher_interval=2, inverse_interval=4))


def test_an_optimizer_whose_arguments_are_injected_takes_them_as_arguments_of_the_step():
    injected = optax.inject_hyperparams(tkfac.kfac)(learning_rate=0.05, layers=LAYERS)
    with pytest.raises(ValueError, match="inject_hyperparams"):
        make_step(injected)
    options = {"layers": LAYERS, "fisher_interval": 2, "inverse_interval": 2}
    received = trained(injected, rule=tkfac.independent, **options)
    expected = trained(OPTIMIZERS["kfac"](LAYERS), fisher_interval=2, inverse_interval=2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), received[0], expected[0])


@pytest.mark.parametrize(
    "name", ["scale_by_tkfac", "tkfac", "kfac", "adaptive_tkfac", "multi_steps"]
)
def test_statistics_of_the_other_rule_are_refused(name):
    """Those of tkfac given to kfac would be damped as if they were KFAC's, without a word."""
    own, other = tkfac.trace_restricted, tkfac.independent
    if name == "kfac":
        own, other = other, own
    optimizer = OPTIMIZERS[name](LAYERS)
    state = jax.jit(optimizer.init)(PARAMS)

    def updated(rule):
        def update(params, state):
            fisher = tkfac.exact_fisher(PREDICT, CATEGORICAL, LAYERS, rule=rule)
            return optimizer.update(
                params,
                state,
                params,
                statistics=lambda: fisher(params, X),
                outputs_fn=lambda params: PREDICT(params, X),
                targets=Y,
            )

        return jax.eval_shape(update, PARAMS, state)

    updated(own)
    expected, received = statistics_type(own).__name__, statistics_type(other).__name__
    with pytest.raises(
        ValueError, match=f"layer 'Dense_0' are {received}; expected {expected}, of the rule"
    ):
        updated(other)


def test_statistics_know_their_rule_through_transformations():
    for rule, expected in (
        (tkfac.trace_restricted, tkfac.LayerStatistics),
        (tkfac.independent, tkfac.IndependentStatistics),
    ):
        fisher = jax.jit(tkfac.exact_fisher(PREDICT, CATEGORICAL, LAYERS, rule=rule))
        statistics = jax.tree.map(lambda leaf: 2 * leaf, fisher(PARAMS, X))
        assert {type(own) for own in statistics.values()} == {expected}
        assert isinstance(statistics["Dense_0"], tkfac.LayerStatistics)


@pytest.mark.parametrize("build", [OPTIMIZERS["scale_by_tkfac"], OPTIMIZERS["adaptive_tkfac"]])
def test_what_is_no_rule_is_refused(build, unchecked):
    with pytest.raises(ValueError, match=r"rule='kfac'; expected tkfac_jax\.trace_restricted or"):
        build(LAYERS, rule="kfac")


def test_layers_that_differ_in_nothing_that_is_shown():
    """Of one name and size, but of another place in params."""
    spec = LAYERS["Dense_0"]
    one, other = (
        tkfac.Layers((dataclasses.replace(spec, kernel=kernel),)) for kernel in ("a", "b")
    )
    with pytest.raises(ValueError, match="layers is of some form here and of another in"):
        make_step(tkfac.scale_by_tkfac(one), layers=other)


def test_kfac_takes_no_rule():
    with pytest.raises(TypeError, match="rule"):
        tkfac.kfac(0.1, LAYERS, rule=tkfac.trace_restricted)


def test_the_rule_of_scale_by_tkfac_may_be_that_of_kfac():
    optimizer = tkfac.scale_by_tkfac(
        LAYERS, damping=tkfac.factored_damping(0.1), rule=tkfac.independent
    )
    params, _ = trained(optax.chain(optimizer, optax.scale(-0.05)), plan=optimizer.plan)
    expected, _ = trained(tkfac.kfac(0.05, LAYERS, damping=0.1, momentum=0.0))
    assert_equal(params, expected)


def test_a_step_runs_under_the_axis_of_the_optimizer():
    """With the axis said to the optimizer alone, as when it is said to both."""
    devices = 2
    optimizer = tkfac.tkfac(0.05, LAYERS, axis_name="devices")
    data = [jnp.stack([part] * devices) for part in (X, Y)]
    ends = []
    for options in ({}, {"axis_name": "devices"}):
        step = make_step(optimizer, estimator="exact", **options)
        params = jax.tree.map(lambda leaf: jnp.stack([leaf] * devices), PARAMS)
        state = jax.pmap(optimizer.init)(params)
        ends.append(step(params, state, data[0], targets=data[1])[0])
    assert_equal(*ends)


@pytest.mark.parametrize("check_vma", [True, False])
def test_micro_batches_are_averaged_over_the_axis_of_the_optimizer(check_vma):
    """What `multi_steps` keeps between two micro-batches is the same on all devices, and the whole batch's at last."""
    mesh = jax.make_mesh((2,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    x, y = jnp.concatenate([X, 2 * X[:2]]), jnp.concatenate([Y, Y[:2]])
    inner = tkfac.scale_by_tkfac(LAYERS, axis_name="devices", averaging="moments")
    optimizer = tkfac.multi_steps(inner, 2)
    fisher = tkfac.empirical_fisher(PREDICT, CATEGORICAL, LAYERS)

    def micro_step(state, x, y):
        # The gradients are the same on all devices; the statistics are each device's own.
        statistics = fisher(PARAMS, x, targets=y)
        _, state = optimizer.update(PARAMS, state, PARAMS, statistics=statistics)
        return state

    split = PartitionSpec("devices")
    whole = PartitionSpec()
    run = jax.jit(
        jax.shard_map(
            micro_step,
            mesh=mesh,
            in_specs=(whole, split, split),
            out_specs=whole,
            check_vma=check_vma,
        )
    )
    state = run(jax.jit(optimizer.init)(PARAMS), x[:4], y[:4])
    expected = fisher(PARAMS, x[:4], targets=y[:4])

    def assert_same_on_all(received, expected):
        for device in range(2):
            own = received.addressable_data(device)
            np.testing.assert_allclose(own, expected, rtol=1e-10, atol=1e-14)

    jax.tree.map(assert_same_on_all, state.statistics, expected)
    state = run(state, x[4:], y[4:])
    assert int(state.mini_step) == 0
    deltas = optax.tree.get(state, "factors")
    for name, statistics in fisher(PARAMS, x, targets=y).items():
        np.testing.assert_allclose(deltas[name].delta, statistics.trace, rtol=1e-10)


def test_micro_batches_go_by_the_plan_inside():
    inner = tkfac.tkfac(0.05, LAYERS, fisher_interval=3)
    assert tkfac.multi_steps(inner, 2).plan == inner.plan
    assert tkfac.multi_steps(inner, 2, layers=LAYERS, fisher_interval=3).plan == inner.plan
    with pytest.raises(ValueError, match="fisher_interval is 2 here and 3 in the optimizer"):
        tkfac.multi_steps(inner, 2, fisher_interval=2)
    with pytest.raises(ValueError, match="layers is of 3 layers"):
        tkfac.multi_steps(inner, 2, layers=OTHERS)
    chained = optax.chain(inner)
    with pytest.raises(ValueError, match=r"Give plan=inner\.plan"):
        tkfac.multi_steps(chained, 2)
    assert tkfac.multi_steps(chained, 2, plan=inner.plan).plan == inner.plan
    with pytest.raises(ValueError, match=r"Give plan=inner\.plan.*; or layers and fisher_interval"):
        tkfac.multi_steps(chained, 2, layers=LAYERS)
    told = tkfac.multi_steps(chained, 2, layers=LAYERS, fisher_interval=3)
    assert told.plan == Plan(LAYERS, 3)
    with pytest.raises(ValueError, match="optimizer is one of multi_steps"):
        trained(tkfac.multi_steps(tkfac.tkfac(0.05, LAYERS), 2))


def test_what_a_plan_was_not_told_is_no_disagreement():
    optimizer = tkfac.tkfac(0.05, LAYERS, fisher_interval=2)
    _, state = trained(optimizer, plan=Plan(LAYERS, inverse_interval=4))
    assert int(optax.tree.get(state, "factor_updates")) == 2
    assert set(map(int, optax.tree.get(state, "refreshed").values())) == {0}


class Nested(NamedTuple):
    inner: Any


@dataclasses.dataclass
class Holder:
    inner: Any

    def nll(self, outputs, targets):
        return CATEGORICAL.nll(outputs, targets)

    def sample(self, key, outputs):
        return CATEGORICAL.sample(key, outputs)


class Callable(Holder):
    def __call__(self):
        return 1


@pytest.mark.parametrize(
    ("make", "same"),
    [
        (lambda: Holder(Nested(np.ones(3))), True),
        (lambda: Holder(Holder(np.arange(2))), True),
        (lambda: Holder({"a": np.ones(2)}), True),
        (lambda: Callable(1), True),
        (lambda: Holder({"a": np.random.default_rng().normal(size=2)}), False),
        (lambda: Holder([1, Nested(next(NUMBERS))]), False),
    ],
)
def test_likelihoods_that_hold_others_are_compared_part_by_part(make, same):
    optimizer = tkfac.adaptive_tkfac(LAYERS, make(), initial_damping=0.1)
    if same:
        tkfac.make_train_step(PREDICT, make(), optimizer)
    else:
        with pytest.raises(ValueError, match=r"likelihood is .* here and"):
            tkfac.make_train_step(PREDICT, make(), optimizer)


NUMBERS = iter(range(10))


def test_traced_intervals_are_refused_by_name_whatever_else_is_told():
    def build(interval):
        make_step(tkfac.tkfac(0.05, LAYERS, fisher_interval=interval), fisher_interval=2)

    # What is told is a number of steps by itself; a traced one cannot be compared with it.
    jax.eval_shape(build, 3)

    def untold(interval):
        make_step(tkfac.tkfac(0.05, LAYERS, fisher_interval=interval))

    with pytest.raises(ValueError, match="known when the step is built"):
        jax.eval_shape(untold, 3)


def test_trace_damping_is_for_the_rule_of_tkfac():
    with pytest.raises(ValueError, match="trace damping is defined for TKFAC"):
        tkfac.scale_by_tkfac(
            LAYERS, damping=tkfac.trace_damping(1e-3, 1e-3), rule=tkfac.independent
        )
