"""Layers that are applied once for all examples are refused: their derivatives cannot be told apart."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tkfac_jax as tkfac
from tkfac_jax.layers.per_example import SHARED


class Positions(nn.Module):
    """Tokens and positions, the latter with or without an axis of examples."""

    broadcast: bool

    @nn.compact
    def __call__(self, tokens):
        positions = jnp.arange(tokens.shape[-1])
        if self.broadcast:
            positions = jnp.broadcast_to(positions, tokens.shape)
        x = nn.Embed(7, 5, name="tokens")(tokens) + nn.Embed(4, 5, name="positions")(positions)
        return nn.Dense(3, name="last")(jnp.tanh(x))


def positions_problem(broadcast, mapped=False):
    tokens = jax.random.randint(jax.random.key(0), (16, 4), 0, 7)
    model = Positions(broadcast)
    params = jax.jit(model.init)(jax.random.key(1), tokens)["params"]

    def predict(params, tokens):
        return model.apply({"params": params}, tokens)

    if mapped:
        return jax.vmap(predict, (None, 0)), params, tokens
    return predict, params, tokens


@pytest.mark.parametrize("mapped", [False, True])
def test_positions_without_an_axis_of_examples_are_refused(mapped):
    predict, params, tokens = positions_problem(broadcast=False, mapped=mapped)
    with pytest.warns(UserWarning, match="kernel 'positions/embedding'.*applied once for all"):
        layers = tkfac.find_layers(predict, params, tokens)
    assert list(layers) == ["last", "tokens"]
    assert layers.fallback == {"positions/embedding": SHARED}
    with pytest.raises(ValueError, match="positions/embedding"):
        tkfac.find_layers(predict, params, tokens, on_unsupported="error")


def test_positions_with_an_axis_of_examples_are_exact():
    """The mean over examples of the trace of the position's share: as from each example alone."""
    predict, params, tokens = positions_problem(broadcast=True)
    layers = tkfac.find_layers(predict, params, tokens, on_unsupported="error")
    fisher = jax.jit(tkfac.exact_fisher(predict, tkfac.Categorical(), layers))
    received = fisher(params, tokens)["positions"]
    tokens = np.asarray(tokens)
    alone = [fisher(params, tokens[i : i + 1])["positions"] for i in range(len(tokens))]
    expected = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *alone)
    for array, reference in zip(received, expected, strict=True):
        # The parameters are float32.
        np.testing.assert_allclose(array, reference, rtol=1e-5)


@pytest.mark.parametrize("how", ["shared vector", "one for each example"])
def test_an_argument_without_examples(how):
    """A vector that conditions all examples at once."""
    first, last = nn.Dense(3), nn.Dense(2)
    x, time = jnp.ones((5, 3)), jnp.ones((4,) if how == "shared vector" else (5, 4))
    params = {
        "first": jax.jit(first.init)(jax.random.key(0), time)["params"],
        "last": jax.jit(last.init)(jax.random.key(1), x)["params"],
    }

    def predict(params, x, time):
        hidden = x + first.apply({"params": params["first"]}, time)
        return last.apply({"params": params["last"]}, hidden)

    layers = tkfac.find_layers(predict, params, x, time, on_unsupported="ignore")
    assert ("first" in layers) == (how != "shared vector")


def test_examples_that_are_not_the_first_axis_of_the_input():
    layer = nn.Dense(2)
    x = jnp.ones((7, 5, 3))
    params = jax.jit(layer.init)(jax.random.key(0), x)["params"]

    def predict(params, x):
        return jnp.swapaxes(layer.apply({"params": params}, x), 0, 1)

    assert list(tkfac.find_layers(predict, params, x, on_unsupported="error")) == ["."]


def test_a_function_that_cannot_be_mapped_or_has_no_arguments_is_not_judged():
    layer = nn.Dense(2)
    x = jnp.ones((5, 3))
    params = jax.jit(layer.init)(jax.random.key(0), x)["params"]

    def closed_over(params):
        return layer.apply({"params": params}, x)

    def unmappable(params, x):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return layer.apply({"params": params}, jax.pure_callback(lambda x: x, shape, x))

    assert list(tkfac.find_layers(closed_over, params)) == ["."]
    assert list(tkfac.find_layers(unmappable, params, x)) == ["."]

    def key_alone(params, key):
        return layer.apply({"params": params}, x) + jax.random.normal(key)

    assert list(tkfac.find_layers(key_alone, params, jax.random.key(0))) == ["."]


@pytest.mark.parametrize("how", ["vmap of grad", "grad of sum", "jacfwd", "jvp", "jit"])
def test_layers_that_the_function_differentiates_are_refused(how):
    """A residual of a differential equation takes derivatives of the network with respect to its input."""
    layer, last = nn.Dense(4), nn.Dense(1)
    x = jnp.ones((5, 2))
    params = {
        "first": jax.jit(layer.init)(jax.random.key(0), x)["params"],
        "last": jax.jit(last.init)(jax.random.key(1), jnp.ones((1, 4)))["params"],
    }

    def network(params, x):
        hidden = jnp.tanh(layer.apply({"params": params["first"]}, x))
        return last.apply({"params": params["last"]}, hidden)[0]

    def residual(params, x):
        one = {
            "jacfwd": jax.jacfwd,
            "jit": lambda f, argnums: jax.jit(jax.grad(jax.jit(f), argnums)),
        }
        each = jax.vmap(one.get(how, jax.grad)(network, argnums=1), (None, 0))
        if how == "grad of sum":
            values = lambda x: jax.vmap(network, (None, 0))(params, x)  # noqa: E731
            return jax.grad(lambda x: values(x).sum())(x)
        if how == "jvp":
            return jax.jvp(lambda x: jax.vmap(network, (None, 0))(params, x), (x,), (x,))[1]
        return each(params, x)

    outer = nn.Dense(2)
    params["outer"] = jax.jit(outer.init)(jax.random.key(2), x)["params"]

    def predict(params, x):
        found = residual(params, x)
        return found.sum() + outer.apply({"params": params["outer"]}, x)

    layers = tkfac.find_layers(predict, params, x, on_unsupported="ignore")
    assert list(layers) == ["outer"]
    said = layers.fallback["first/kernel"], layers.fallback["last/kernel"]
    if how == "jit":
        # Inside of it the layers cannot be told.
        assert all(said)
    else:
        assert all("differentiated inside the function" in reason for reason in said)
    with pytest.raises(ValueError, match="first/kernel"):
        tkfac.find_layers(predict, params, x, on_unsupported="error")


def test_layers_that_the_function_computes_again_are_not_differentiated():
    layer, x = nn.Dense(4), jnp.ones((5, 2))
    params = jax.jit(layer.init)(jax.random.key(0), x)["params"]
    apply = lambda params, x: layer.apply({"params": params}, x)  # noqa: E731
    for fun in (jax.checkpoint(apply), jax.jit(apply)):
        assert list(tkfac.find_layers(fun, params, x)) == ["."]


def test_nnx_positions_without_an_axis_of_examples_are_refused():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.tokens = nnx.Embed(7, 5, rngs=rngs)
            self.positions = nnx.Embed(4, 5, rngs=rngs)

        def __call__(self, tokens):
            return self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[-1]))

    graphdef, params, rest = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)
    layers = tkfac.find_layers(
        lambda p, t: nnx.merge(graphdef, p, rest)(t),
        params,
        jnp.zeros((16, 4), int),
        on_unsupported="ignore",
    )
    assert layers.fallback == {"positions/embedding": SHARED}


@pytest.mark.parametrize("mapped", [False, True])
def test_a_function_that_prints_is_traced_in_little_time(mapped):
    """JAX traces what prints once for each copy of what is mapped."""
    model, x = nn.Dense(3), jnp.ones((4, 5))
    params = model.init(jax.random.key(0), x)["params"]

    def one(params, x):
        y = model.apply({"params": params}, x)
        jax.debug.print("{}", y.sum())
        return y

    predict = jax.vmap(one, in_axes=(None, 0)) if mapped else one
    assert list(tkfac.find_layers(predict, params, x)) == ["."]
