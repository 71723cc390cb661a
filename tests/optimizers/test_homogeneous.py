import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from small_network import SmallOracle, small_problem, to_matrices

import tkfac_jax as tkfac


def with_others(params):
    """The small network's parameters, and three that no layer claims: a table, a scale, and the scales of a stack."""
    key = jax.random.key(5)
    return params | {
        "position": {"table": jax.random.normal(key, (3, 2), jnp.float64)},
        "norm": {"scale": jnp.ones(4, jnp.float64)},
        "norms": {"scale": jnp.ones((2, 4), jnp.float64)},
    }


def other_gradients(others, step):
    """Gradients of the others, in NumPy or JAX alike."""
    numbers = {"table": 0.7, "scale": 0.2, "scales": 0.4}
    return {name: w * numbers[name] + 0.3 * (step % 3) - 0.2 for name, w in others.items()}


def others_of(params):
    return {
        "table": params["position"]["table"],
        "scale": params["norm"]["scale"],
        "scales": params["norms"]["scale"],
    }


def tree_of(others):
    return {
        "position": {"table": others["table"]},
        "norm": {"scale": others["scale"]},
        "norms": {"scale": others["scales"]},
    }


@functools.cache
def extended():
    predict, params, x, y, _ = small_problem()
    params = with_others(params)
    network = lambda params, x: predict({n: params[n] for n in ("Conv_0", "Dense_0")}, x)  # noqa: E731
    layers = tkfac.find_layers(network, params, x, on_unsupported="ignore")
    return network, params, x, y, layers


def make_step(optimizer, rule=tkfac.trace_restricted):
    """A step of the extended problem whose loss is multiplied by a number."""
    network, _, x, y, layers = extended()
    fisher = tkfac.empirical_fisher(network, tkfac.Categorical(), layers, rule=rule)

    @jax.jit
    def step(params, state, number, factor):
        grads = jax.grad(lambda p: tkfac.Categorical().nll(network(p, x), y).mean())(params)
        grads |= tree_of(other_gradients(others_of(params), number))
        grads = jax.tree.map(lambda g: g * factor.astype(g.dtype), grads)

        def statistics():
            found = fisher(params, x, targets=y)
            return {name: scaled(own, factor) for name, own in found.items()}

        updates, state = optimizer.update(grads, state, params, statistics=statistics)
        return optax.apply_updates(params, updates), state

    return step


def scaled(statistics, factor):
    """The statistics of a loss that is multiplied by a number."""
    if isinstance(statistics, tkfac.IndependentStatistics):
        return statistics._replace(output_moment=statistics.output_moment * factor**2)
    return type(statistics)(*(array * factor.astype(array.dtype) ** 2 for array in statistics))


def trained(optimizer, steps, factor=1.0, params=None, rule=tkfac.trace_restricted):
    step = make_step(optimizer, rule)
    params = extended()[1] if params is None else params
    state = jax.jit(optimizer.init)(params)
    for number in range(steps):
        params, state = step(params, state, number, jnp.asarray(factor))
    return params, state


SETTINGS = {
    "as it is": {},
    "weight decay": {"weight_decay": 0.3},
    "KFAC's rule": {"rule": tkfac.independent},
    "no momentum, a small ball": {"momentum": 0.0, "ball_radius": 0.1, "damping": 0.05},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_twenty_steps_equal_the_equations(name):
    options = SETTINGS[name]
    _, params, x, y, layers = extended()
    # In float64, unlike those of Optax.
    schedule = lambda step: 0.02 + 0.018 * jnp.minimum(step.astype(float), 10)  # noqa: E731
    optimizer = tkfac.tkfacw(schedule, layers, fisher_interval=2, inverse_interval=4, **options)
    rule = options.get("rule", tkfac.trace_restricted)
    received, _ = trained(optimizer, 20, rule=rule)

    oracle = SmallOracle(x, y)

    def moments(matrices):
        if rule is tkfac.trace_restricted:
            return oracle.statistics(matrices)
        return {n: oracles.independent(*both) for n, both in oracle.backward(matrices).items()}

    small = {n: params[n] for n in layers}
    matrices, others = oracles.tkfacw(
        to_matrices(small),
        {n: np.asarray(w) for n, w in others_of(params).items()},
        lambda matrices, others, t: (oracle.gradients(matrices), other_gradients(others, t)),
        moments,
        steps=20,
        rate=lambda t: 0.02 + 0.18 * min(t / 10, 1),
        momentum=options.get("momentum", 0.9),
        share=options.get("damping", 0.2),
        floor=0.1,
        radius=options.get("ball_radius", 1.0),
        cap=0.95**2,
        t_fim=2,
        t_inv=4,
        weight_decay=options.get("weight_decay", 0.0),
        vectors=("scale", "scales"),
        outputs=("Dense_0",),
    )
    for layer, expected in matrices.items():
        found = to_matrices({layer: received[layer]})[layer]
        assert np.abs(found - to_matrices(small)[layer]).max() > 0.1
        # Twenty steps of float64, each of which amplifies rounding a little.
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11)
    for other, expected in others.items():
        np.testing.assert_allclose(others_of(received)[other], expected, rtol=1e-9, atol=1e-11)


def as_float32(tree):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)


@pytest.mark.parametrize("exponent", [-20, -1, 7, 20])
def test_the_loss_times_a_power_of_two_gives_the_same_bits(exponent):
    optimizer = tkfac.tkfacw(0.05, extended()[-1], fisher_interval=2, inverse_interval=2)
    params = as_float32(extended()[1])
    expected, _ = trained(optimizer, 6, 1.0, params)
    received, _ = trained(optimizer, 6, 2.0**exponent, params)
    jax.tree.map(np.testing.assert_array_equal, received, expected)


def test_the_loss_times_three_gives_the_same_to_rounding():
    optimizer = tkfac.tkfacw(0.05, extended()[-1], fisher_interval=2, inverse_interval=2)
    expected, _ = trained(optimizer, 6, 1.0)
    received, _ = trained(optimizer, 6, 3.0)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13), received, expected
    )


class Autoencoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(12)(nn.tanh(nn.Dense(5)(x)))


def test_the_sum_over_pixels_and_their_mean_are_trained_alike():
    x = jax.random.uniform(jax.random.key(0), (16, 12), jnp.float32)
    first = Autoencoder().init(jax.random.key(1), x)["params"]
    predict = lambda params, x: Autoencoder().apply({"params": params}, x)  # noqa: E731
    layers = tkfac.find_layers(predict, first, x)
    found = []
    for average in (False, True):
        optimizer = tkfac.tkfacw(0.05, layers, fisher_interval=5, inverse_interval=5)
        likelihood = tkfac.Bernoulli(average_positions=average)
        step = tkfac.make_train_step(predict, likelihood, optimizer)
        params, state = jax.tree.map(jnp.copy, first), jax.jit(optimizer.init)(first)
        for i in range(20):
            params, state, _ = step(params, state, x, targets=x, key=jax.random.key(i))
        found.append(params)
    # Float32, whose rounding twenty steps amplify.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), *found)


def regression(model, x, y, steps, rate, **options):
    """Parameters, state and losses of a training on squares, with a cosine down to 0."""
    params = model.init(jax.random.key(1), x)["params"]
    predict = lambda params, x: model.apply({"params": params}, x)  # noqa: E731
    layers = tkfac.find_layers(predict, params, x)
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, steps // 20, steps)
    optimizer = tkfac.tkfacw(schedule, layers, **options)
    step = tkfac.make_train_step(predict, tkfac.Normal(), optimizer)
    state, told = jax.jit(optimizer.init)(params), []
    for i in range(steps):
        params, state, metrics = step(params, state, x, targets=y, key=jax.random.key(i))
        told.append(metrics)
    return params, state, jax.device_get(told)


class Net(nn.Module):
    outputs: int = 1
    output_init: Any = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.outputs, kernel_init=self.output_init)(nn.tanh(nn.Dense(16)(x)))


def line(mean=0.0):
    """Inputs and targets whose variance is 1 about a mean."""
    x = jax.random.normal(jax.random.key(0), (64, 3), jnp.float32)
    y = jnp.sin(x @ jnp.array([[1.0], [0.5], [-1.0]], jnp.float32))
    return x, mean + (y - y.mean()) / y.std()


def excess(told):
    """The mean of the squares of the errors at the end, of targets of variance 1."""
    return 2 * (told[-1]["loss"] - 0.5 * np.log(2 * np.pi))


def test_an_output_layer_of_zeros_fits():
    _, _, told = regression(Net(1, nn.initializers.zeros), *line(), 400, 0.05)
    assert excess(told) < 0.05


def test_targets_far_from_zero_are_reached():
    """Balls that stay as they are would hold the outputs near 0."""
    _, _, told = regression(Net(), *line(100.0), 1000, 0.05)
    assert excess(told) < 0.05


def test_metrics_tell_how_it_goes():
    _, state, told = regression(Net(), *line(), 3, 0.05)
    assert set(told[-1]) == {"loss", "skipped_statistics", "failed_inversions", "relative_change"}
    change = optax.tree.get(state, "relative_change")
    assert told[-1]["relative_change"] == change
    assert told[1]["relative_change"] > 0


def test_no_gradient_makes_no_step_and_zero_weights_grow():
    optimizer = tkfac.tkfacw(0.1, extended()[-1])
    params = jax.tree.map(jnp.zeros_like, extended()[1])
    state = jax.jit(optimizer.init)(params)
    update = jax.jit(functools.partial(optimizer.update, statistics=None))
    none, after = update(params, state, params)
    assert not any(leaf.any() for leaf in jax.tree.leaves(none))
    some, _ = update(jax.tree.map(jnp.ones_like, params), after, params)
    kernel = some["Dense_0"]["kernel"]
    whole = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in some["Dense_0"].values()))
    # The floor, 0.1 times the root of three outputs, times the rate.
    np.testing.assert_allclose(whole, 0.01 * 3**0.5, rtol=1e-6)
    assert (kernel < 0).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_gradient_is_a_step_that_was_not(bad):
    """The layer makes none, neither do the others' averages move, and the next step is as if there had been none."""
    optimizer = tkfac.tkfacw(0.1, extended()[-1])
    params = extended()[1]
    update = jax.jit(functools.partial(optimizer.update, statistics=None))
    gradient = jax.tree.map(lambda p: p + 1, params)
    _, state = update(gradient, jax.jit(optimizer.init)(params), params)
    broken = jax.tree.map(lambda g: g.at[(0,) * g.ndim].set(bad), gradient)
    steps, after = update(broken, state, params)
    assert not any(leaf.any() for leaf in jax.tree.leaves(steps))
    assert int(optax.tree.get(after, "skipped_updates")) == 2
    expected, _ = update(gradient, state, params)
    received, _ = update(gradient, after, params)
    jax.tree.map(np.testing.assert_array_equal, received, expected)


def test_layers_of_one_unit():
    class One(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(1)(nn.Dense(1, use_bias=False)(x))

    x, _ = line()
    params, _, told = regression(One(), x[:, :1], 2 * x[:, :1] + 1, 60, 0.1)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    assert told[-1]["loss"] < told[0]["loss"]


def test_steps_under_scan_are_those_of_a_loop():
    network, params, x, y, layers = extended()
    optimizer = tkfac.tkfacw(
        0.05, layers, fisher_interval=2, inverse_interval=4, spread_inverses=True
    )
    fisher = tkfac.exact_fisher(network, tkfac.Categorical(), layers)

    def step(carry, _):
        params, state = carry
        grads = jax.grad(lambda p: tkfac.Categorical().nll(network(p, x), y).mean())(params)
        updates, state = optimizer.update(
            grads, state, params, statistics=lambda: fisher(params, x)
        )
        return (optax.apply_updates(params, updates), state), None

    first = params, jax.jit(optimizer.init)(params)
    received, _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=6))(first)
    expected, jitted = first, jax.jit(step)
    for _ in range(6):
        expected, _ = jitted(expected, None)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), received, expected
    )


class Tokens(nn.Module):
    """Parameters in bfloat16: an embedding, whose factor is a diagonal, a stack, and a wide layer in blocks."""

    @nn.compact
    def __call__(self, tokens):
        options = {"param_dtype": jnp.bfloat16, "dtype": jnp.float32}
        x = nn.Embed(7, 6, **options)(tokens)

        class Block(nn.Module):
            @nn.compact
            def __call__(self, x):
                return jnp.tanh(nn.Dense(6, **options)(x)), None

        x, _ = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)(
            name="blocks"
        )(x)
        return nn.Dense(3, **options)(nn.Dense(20, **options)(x))


@pytest.mark.parametrize("large", ["blocks", "diagonal"])
def test_low_precision_stacks_and_large_factors(large):
    tokens = jax.random.randint(jax.random.key(0), (8, 4), 0, 7)
    targets = tokens % 3
    params = Tokens().init(jax.random.key(1), tokens)["params"]
    predict = lambda params, tokens: Tokens().apply({"params": params}, tokens)  # noqa: E731
    layers = tkfac.find_layers(predict, params, tokens, max_factor_size=8, large_factors=large)
    assert {"full", large} <= {spec.psi.kind for spec in layers.values()}
    optimizer = tkfac.tkfacw(0.1, layers, fisher_interval=2, inverse_interval=2)
    likelihood = tkfac.Categorical(average_positions=True)
    step = tkfac.make_train_step(predict, likelihood, optimizer)
    state, losses = jax.jit(optimizer.init)(params), []
    for i in range(30):
        params, state, metrics = step(params, state, tokens, targets=targets, key=jax.random.key(i))
        losses.append(float(metrics["loss"]))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert losses[-1] < 0.1 * losses[0]


def test_masks_of_weight_decay_and_frozen_layers():
    _, params, _, _, layers = extended()
    zeros = jax.tree.map(jnp.zeros_like, params)
    decaying = jax.tree.map(lambda p: p.ndim > 1, params)
    optimizer = tkfac.tkfacw(0.1, layers, weight_decay=0.5, mask=decaying)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params, statistics=None)
    # Kernels shrink by rate times decay, and so does what is no layer's.
    expected = jax.tree.map(lambda p: -0.05 * p if p.ndim > 1 else 0 * p, params)
    jax.tree.map(lambda u, e: np.testing.assert_allclose(u, e, rtol=1e-12), updates, expected)

    frozen = optax.partition(
        {True: tkfac.tkfacw(0.1, layers), False: optax.set_to_zero()},
        lambda params: {
            n: jax.tree.map(lambda _, n=n: n != "Dense_0", t) for n, t in params.items()
        },
    )
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = frozen.update(ones, frozen.init(params), params, statistics=None)
    assert not any(leaf.any() for leaf in jax.tree.leaves(updates["Dense_0"]))
    assert all(leaf.any() for leaf in jax.tree.leaves(updates["Conv_0"]))


def test_a_fallback_of_the_users_own_is_complete():
    _, params, _, _, layers = extended()
    optimizer = tkfac.tkfacw(0.1, layers, fallback=optax.sgd(0.5))
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = optimizer.update(ones, optimizer.init(params), params, statistics=None)
    for name in ("position", "norm", "norms"):
        jax.tree.map(lambda u: np.testing.assert_array_equal(u, -0.5), updates[name])
    expected, _ = tkfac.tkfacw(0.1, layers).update(
        ones, tkfac.tkfacw(0.1, layers).init(params), params, statistics=None
    )
    for name in layers:
        jax.tree.map(np.testing.assert_array_equal, updates[name], expected[name])


def test_messages(unchecked):
    layers = extended()[-1]
    for options, message in (
        ({"momentum": 1.0}, "momentum=1.0; expected a number in"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0"),
        ({"damping": 0.0}, "share of relative damping=0.0"),
        ({"floor": -0.1}, "floor=-0.1"),
        ({"ball_radius": -1.0}, "radius=-1.0"),
        ({"fisher_interval": 0}, "fisher_interval=0"),
    ):
        with pytest.raises(ValueError, match=message):
            tkfac.tkfacw(0.1, layers, **options)
    optimizer = tkfac.tkfacw(0.1, layers)
    params = extended()[1]
    with pytest.raises(ValueError, match="needs the parameters"):
        optimizer.update(params, optimizer.init(params), statistics=None)
    with pytest.raises(TypeError, match="statistics"):
        optimizer.update(params, optimizer.init(params), params)


def test_scaled_gradients_in_float16_are_stepped_along():
    """Preconditioned, and by momentum, they are larger than what float16 holds."""
    optimizer = tkfac.tkfacw(0.05, extended()[-1], fisher_interval=1, inverse_interval=1)
    network, _, x, y, layers = extended()
    params = as_float32(extended()[1])
    fisher = tkfac.empirical_fisher(network, tkfac.Categorical(), layers)

    @jax.jit
    def update(state, gradient):
        return optimizer.update(
            gradient, state, params, statistics=lambda: fisher(params, x, targets=y)
        )

    rng = np.random.default_rng(0)
    gradient = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float16), params)
    large = jax.tree.map(lambda g: g * jnp.float16(4096), gradient)
    state = others = jax.jit(optimizer.init)(params)
    for _ in range(5):
        expected, state = update(state, gradient)
        received, others = update(others, large)
    assert int(optax.tree.get(others, "skipped_updates")) == 0
    assert {leaf.dtype for leaf in jax.tree.leaves(received)} == {jnp.dtype(jnp.float16)}
    jax.tree.map(np.testing.assert_array_equal, received, expected)
