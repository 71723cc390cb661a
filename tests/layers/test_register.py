"""Layers that users describe or mark themselves."""

import functools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tkfac_jax as tkfac

ROUNDING = {"rtol": 1e-10, "atol": 1e-12}


def assert_equal(received, expected):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **ROUNDING), received, expected)


@functools.cache
def numbers():
    x = jax.random.normal(jax.random.key(0), (5, 3), jnp.float64)
    w = jax.random.normal(jax.random.key(1), (3, 2), jnp.float64)
    return np.asarray(x), np.asarray(w)


def data():
    """Inputs, kernel, bias and targets, for each test its own."""
    x, w = map(jnp.array, numbers())
    return x, w, jnp.array([0.3, -0.2]), jnp.ones((5, 2))


def statistics_of(predict, params):
    x, _, _, y = data()
    layers = tkfac.find_layers(predict, params, x)
    (spec,) = layers.values()
    fisher = tkfac.empirical_fisher(predict, tkfac.Normal(), layers)
    return spec, jax.jit(fisher)(params, x, targets=y)[spec.name]


@functools.cache
def flax_statistics():
    _, w, b, _ = data()
    model = nn.Dense(2, dtype=jnp.float64)
    return statistics_of(
        lambda p, x: jnp.tanh(model.apply({"params": p}, x)), {"kernel": w, "bias": b}
    )[1]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_tag_by_hand_equals_a_layer_of_flax(transposed, checkpointed):
    _, w, b, _ = data()
    kernel = w.T if transposed else w
    params = {"first": {"kernel": kernel, "bias": b}}

    def layer(own, x):
        y = x @ (own["kernel"].T if transposed else own["kernel"]) + own["bias"]
        marked = tkfac.tag(
            y, x, name="first", kernel=own["kernel"], bias=own["bias"], transposed=transposed
        )
        return jnp.tanh(marked)

    def predict(params, x):
        return (jax.checkpoint(layer) if checkpointed else layer)(params["first"], x)

    spec, received = statistics_of(predict, params)
    assert (spec.name, spec.d_in, spec.d_out) == ("first", 4, 2)
    assert_equal(received, flax_statistics())
    layers = tkfac.Layers((spec,))
    optimizer = tkfac.scale_by_tkfac(layers, damping=0.1)
    state = jax.eval_shape(optimizer.init, params)
    updates, _ = jax.eval_shape(
        optimizer.update, params, state, params, statistics={"first": received}
    )
    assert updates["first"]["kernel"].shape == kernel.shape


class OwnLinen(nn.Module):
    """A layer of a user's own, with its own names."""

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.normal(dtype=jnp.float64), (x.shape[-1], 2))
        b = self.param("b", nn.initializers.normal(dtype=jnp.float64), (2,))
        return x @ w + b, "more"


class OwnNnx(nnx.Module):
    """The same for NNX."""

    def __init__(self, w, b):
        self.w, self.b = nnx.Param(w), nnx.Param(b)

    def __call__(self, x):
        return x @ self.w[...] + self.b[...], "more"


def describe(module, parameters, args, kwargs, output):
    return tkfac.dense_call(parameters["w"], args[0], output[0], parameters["b"])


tkfac.register_layer(OwnLinen, describe)
tkfac.register_layer(OwnNnx, describe)


def test_a_registered_layer_of_linen():
    _, w, b, _ = data()

    def predict(params, x):
        y, more = OwnLinen().apply({"params": params}, x)
        assert more == "more"
        return jnp.tanh(y)

    assert_equal(statistics_of(predict, {"w": w, "b": b})[1], flax_statistics())


@pytest.mark.parametrize("remat", [False, True])
def test_a_registered_layer_of_nnx(remat):
    _, w, b, _ = data()
    graphdef, params, rest = nnx.split(OwnNnx(w, b), nnx.Param, ...)

    def run(module, x):
        return module(x)[0]

    def predict(params, x):
        module = nnx.merge(graphdef, params, rest)
        return jnp.tanh((nnx.remat(run) if remat else run)(module, x))

    spec, received = statistics_of(predict, params)
    assert (spec.kernel, spec.bias, spec.routed) == ("w", "b", remat)
    assert_equal(received, flax_statistics())


class Linear(eqx.Module):
    """A layer of Equinox that marks its output."""

    weight: jax.Array
    bias: jax.Array
    name: str = eqx.field(static=True)

    def __call__(self, x):
        return tkfac.tag(
            self.weight @ x + self.bias,
            x,
            name=self.name,
            kernel=self.weight,
            bias=self.bias,
            transposed=True,
        )


def test_equinox():
    """A model that is written for one example and mapped, with kernels `(d_out, d_in)`, trained."""
    x, w, b, y = data()
    params, static = eqx.partition(Linear(w.T, b, "only"), eqx.is_array)

    def predict(params, x):
        return jnp.tanh(jax.vmap(eqx.combine(params, static))(x))

    spec, received = statistics_of(predict, params)
    assert (spec.name, spec.kernel, spec.bias) == ("only", "weight", "bias")
    assert_equal(received, flax_statistics())

    optimizer = tkfac.tkfac(0.1, tkfac.Layers((spec,)), damping=0.1)
    step = tkfac.make_train_step(
        predict,
        tkfac.Normal(),
        optimizer,
        layers=tkfac.Layers((spec,)),
        fisher_interval=1,
        inverse_interval=1,
        estimator="exact",
    )
    opt_state, losses = jax.jit(optimizer.init)(params), []
    for _ in range(5):
        params, opt_state, metrics = step(params, opt_state, x, targets=y)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]


def test_a_layer_that_describes_itself_as_untreatable():
    class Odd(OwnLinen):
        pass

    tkfac.register_layer(Odd, lambda *_: "Odd layers are odd")
    x, w, b, _ = data()
    with pytest.raises(ValueError, match="'w': Odd layers are odd"):
        tkfac.find_layers(
            lambda p, x: Odd().apply({"params": p}, x)[0],
            {"w": w, "b": b},
            x,
            on_unsupported="ignore",
        )


def test_messages(unchecked):
    x, w, _, _ = data()
    with pytest.raises(ValueError, match="is not a class with a method 'run'"):
        tkfac.register_layer(OwnLinen, describe, method="run")
    with pytest.raises(ValueError, match="layer 'first': kind='conv'; expected"):
        tkfac.find_layers(
            lambda p, x: tkfac.tag(x @ p["w"], x, name="first", kernel=p["w"], kind="conv"),
            {"w": w},
            x,
        )


def test_a_function_that_jax_has_traced_before_does_not_hide_its_tags():
    """It is called without observer first, so that JAX has a trace of it in which the tag is nothing."""

    @jax.jit
    def first_layer(w, x):
        return tkfac.tag(x @ w, x, name="first", kernel=w)

    def predict(params, x):
        return first_layer(params["first"]["kernel"], x)

    params = {"first": {"kernel": jnp.eye(3, 2)}}
    x = jax.random.normal(jax.random.key(0), (5, 3))
    predict(params, x)
    layers = tkfac.find_layers(predict, params, x)
    assert layers["first"].named
    (received,) = tkfac.exact_fisher(predict, tkfac.Normal(), layers)(params, x).values()
    # Two outputs of Fisher 1.
    np.testing.assert_allclose(received.trace, 2 * np.mean(np.sum(np.square(x), -1)), rtol=1e-12)
