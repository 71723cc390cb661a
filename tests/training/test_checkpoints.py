"""What of a state is format: checkpoints of earlier releases go on, and states of other shapes are refused."""

from pathlib import Path

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tkfac_jax as tkfac
from tkfac_jax.layers import spec

# By optimizer, parameters and state after three steps, as `flax.serialization.to_state_dict` has them, and the
# parameters two steps later. Written before the package had rooms, with `LARGEST_JOINED = 40` as in conftest.py.
FIRST_FORMAT = Path(__file__).parent / "checkpoints" / "first_format.msgpack"
X = np.random.default_rng(0).standard_normal((6, 3, 3, 1)).astype(np.float32)
Y = np.arange(6) % 2
OPTIMIZERS = {
    "tkfac": lambda layers: tkfac.tkfac(0.05, layers, damping=0.1, averaging="moments"),
    "adaptive_tkfac": lambda layers: tkfac.adaptive_tkfac(
        layers, tkfac.Categorical(), initial_damping=0.1
    ),
}


class Network(nn.Module):
    """A convolution, a norm for the fallback, a dense layer that keeps its bias apart and one that does not."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(3, (2, 2))(x)).reshape(len(x), -1)
        x = nn.LayerNorm()(x)
        x = nn.relu(nn.Dense(4)(x))
        return nn.Dense(2)(x)


def predict(params, x):
    return Network().apply({"params": params}, x)


def problem():
    shapes = jax.eval_shape(Network().init, jax.random.key(0), X)["params"]
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, jnp.float32), shapes)
    return params, tkfac.find_layers(predict, params, X)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_checkpoint_of_the_first_format_goes_on(name):
    params, layers = problem()
    assert {layer.bias_apart for layer in layers.values()} == {True, False}
    optimizer = OPTIMIZERS[name](layers)
    saved = flax.serialization.msgpack_restore(FIRST_FORMAT.read_bytes())[name]
    template = params, jax.jit(optimizer.init)(params)
    received = flax.serialization.from_state_dict(template, saved["checkpoint"])
    assert int(optax.tree.get(received[1], "refreshed")["Dense_0"]) == 2
    step = tkfac.make_train_step(
        predict,
        tkfac.Categorical(),
        optimizer,
        fisher_interval=2,
        inverse_interval=2,
        estimator="exact",
    )
    for _ in range(2):
        received = step(*received, X, targets=Y)[:2]
    expected = flax.serialization.from_state_dict(params, saved["params_two_steps_later"])
    # In float32, on machines that add up in other orders.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), received[0], expected
    )


def test_what_of_the_layers_is_format():
    """Changing it makes checkpoints of large layers useless."""
    conftest, spec.LARGEST_JOINED = spec.LARGEST_JOINED, 2**16
    try:
        small, large = (problem_of_width(width)["."].bias_apart for width in (255, 256))
    finally:
        spec.LARGEST_JOINED = conftest
    assert (small, large) == (False, True)


def problem_of_width(width):
    model = nn.Dense(width)
    x = jax.ShapeDtypeStruct((1, 256), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    return tkfac.find_layers(lambda params, x: model.apply({"params": params}, x), params, x)


def test_a_state_of_other_shapes_is_refused_with_the_layer_and_both_shapes(monkeypatch):
    params, layers = problem()
    state = tkfac.tkfac(0.1, layers).init(params)
    monkeypatch.setattr(spec, "LARGEST_JOINED", 2**16)
    _, others = problem()
    message = (
        r"layer 'Dense_0': the state's inverses have shapes \(\(27, 27\), \(4, 4\), \(28,\)\); "
        r"expected \(\(28, 28\), \(4, 4\), None\)"
    )
    with pytest.raises(ValueError, match=message):
        tkfac.tkfac(0.1, others).update(params, state, params, statistics=None)
    with pytest.raises(ValueError, match=message):
        tkfac.diagnostics(state, others)


def test_factors_of_other_shapes_are_refused():
    params, layers = problem()
    state = tkfac.scale_by_tkfac(layers).init(params)
    diagonal = tkfac.find_layers(predict, params, X, max_factor_size=10)
    with pytest.raises(
        ValueError, match=r"'Dense_0': the state's factors have shapes \(\(28, 28\).*\(\(28,\)"
    ):
        tkfac.scale_by_tkfac(diagonal).update(params, state, params, statistics=None)


@pytest.mark.parametrize(("kind", "numbers"), [("stack", (4, 3)), ("embedding", (8, 6))])
def test_states_of_more_are_refused_as_those_of_less_are(kind, numbers):
    """Arrays are filled up only where they are large enough to be divided over a mesh."""

    def problem(number):
        if kind == "embedding":
            model, x = nn.Embed(number, 3), jnp.zeros((2, 4), jnp.int32)
        else:
            model, x = Stack(number), jnp.ones((2, 3))
        params = model.init(jax.random.key(0), x)["params"]
        return params, tkfac.find_layers(lambda p, x: model.apply({"params": p}, x), params, x)

    more, fewer = map(problem, numbers)
    for (others, other_layers), (params, layers) in ((more, fewer), (fewer, more)):
        state = tkfac.scale_by_tkfac(other_layers).init(others)
        with pytest.raises(ValueError, match="the state's factors have shapes"):
            tkfac.scale_by_tkfac(layers).update(params, state, params, statistics=None)


class OfStack(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x), None


class Stack(nn.Module):
    number: int

    @nn.compact
    def __call__(self, x):
        stack = nn.scan(
            OfStack, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.number
        )
        return stack()(x)[0]
