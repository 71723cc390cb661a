"""Small Flax models that several tests share.

A program of one operation takes about as long to compile as a small network: what makes a model is one program,
and a model is made once.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

import tkfac_jax as tkfac
from tkfac_jax.layers.kernel_matrix import Layout
from tkfac_jax.layers.spec import keeps_bias_apart
from tkfac_jax.linalg.factor_structure import Structure


def as_float64(tree):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float64), tree)


def spec(d_in, d_out, *, has_bias=False, kind="dense", name=".", dtype="float64", large=None):
    """The spec of a layer that is one matrix; `d_in` counts the bias."""
    layout = Layout((d_in - has_bias, d_out), (), (0,), (1,), *(((1,), 1) if has_bias else ((), 0)))
    phi = Structure.of_size(d_in, *(large or ()))
    return tkfac.LayerSpec(
        name=name,
        kind=kind,
        kernel="kernel",
        bias="bias" if has_bias else None,
        kernel_shape=(d_in - has_bias, d_out),
        bias_shape=(d_out,) if has_bias else None,
        dtype=dtype,
        layout=layout,
        phi=phi,
        psi=Structure.of_size(d_out, *(large or ())),
        bias_apart=keeps_bias_apart(layout, phi),
    )


class Mlp(nn.Module):
    """Three Dense layers, the second without bias."""

    widths: tuple[int, ...] = (5, 4, 3)

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(self.widths[0], dtype=jnp.float64)(x))
        x = nn.tanh(nn.Dense(self.widths[1], use_bias=False, dtype=jnp.float64)(x))
        return nn.Dense(self.widths[2], dtype=jnp.float64)(x)


class ConvNet(nn.Module):
    """A convolution with BatchNorm (in training mode where its state is mutable) and a Dense layer."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Conv(4, (3, 3), strides=2, dtype=self.dtype, param_dtype=self.dtype)(x)
        x = nn.BatchNorm(use_running_average=not train, dtype=self.dtype, param_dtype=self.dtype)(x)
        x = nn.relu(x).reshape(len(x), -1)
        return nn.Dense(3, dtype=self.dtype, param_dtype=self.dtype)(x)


def fresh(tree):
    """A copy, which may be donated."""
    return jax.tree.map(jnp.copy, tree)


@functools.cache
def _mlp_problem(batch, d_in):
    model = Mlp()

    @jax.jit
    def make():
        inputs = jax.random.normal(jax.random.key(1), (batch, d_in), jnp.float64)
        targets = jax.random.randint(jax.random.key(2), (batch,), 0, 3)
        params = as_float64(model.init(jax.random.key(3), inputs)["params"])
        # Biases that are not zero, so that a misplaced bias row cannot hide.
        return (
            inputs,
            targets,
            jax.tree.map(lambda p: p + 0.1 * jnp.cos(jnp.arange(p.size)).reshape(p.shape), params),
        )

    def predict(params, inputs):
        return model.apply({"params": params}, inputs)

    inputs, targets, params = make()
    return predict, params, inputs, targets, tkfac.find_layers(predict, params, inputs)


def mlp_problem(batch=6, d_in=4):
    """A float64 Mlp with classification data: predict, params, inputs, targets, layers."""
    predict, params, *others = _mlp_problem(batch, d_in)
    return predict, fresh(params), *others


@functools.cache
def _convnet_problem(batch, dtype):
    model = ConvNet(dtype)

    @jax.jit
    def make():
        inputs = jax.random.normal(jax.random.key(1), (batch, 6, 6, 2), dtype)
        targets = jax.random.randint(jax.random.key(2), (batch,), 0, 3)
        return inputs, targets, model.init(jax.random.key(3), inputs)

    def predict(params, batch_stats, inputs):
        outputs, new = model.apply(
            {"params": params, "batch_stats": batch_stats}, inputs, mutable=["batch_stats"]
        )
        return outputs, new["batch_stats"]

    inputs, targets, variables = make()
    params, batch_stats = variables["params"], variables["batch_stats"]
    layers = tkfac.find_layers(predict, params, batch_stats, inputs)
    return predict, params, batch_stats, inputs, targets, layers


def convnet_problem(batch=8, dtype=jnp.float32):
    """A ConvNet with classification data: predict (with aux), params, batch_stats, inputs, targets, layers."""
    predict, params, batch_stats, *others = _convnet_problem(batch, dtype)
    return predict, fresh(params), fresh(batch_stats), *others


class Small(nn.Module):
    """One convolution with BatchNorm and one dense layer, which compile in a moment."""

    classes: int
    width: float

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(3, (3, 3), strides=8)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.5)(x))
        return nn.Dense(self.classes)(x.reshape(len(x), -1))
