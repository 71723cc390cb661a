import functools

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
