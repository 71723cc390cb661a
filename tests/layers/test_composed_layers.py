"""Layers made of others: every projection of attention and of recurrent cells, against brute force.

Where each use of a projection is given a copy of its parameters of its own, the gradient with respect to a copy
is `a g^T` of that use; statistics are sums over uses of its products.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tkfac_jax as tkfac

F64 = {"dtype": jnp.float64, "param_dtype": jnp.float64}
# Sums of a few hundred float64 products.
ROUNDING = {"rtol": 1e-9, "atol": 1e-11}
BATCH, LENGTH, WIDTH = 3, 4, 4


def randomly(tree, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(0.7 * rng.normal(size=leaf.shape)), tree)


@functools.cache
def inputs():
    return jax.random.normal(jax.random.key(5), (BATCH, LENGTH, WIDTH), jnp.float64)


def statistics_of_uses(gradients):
    """From `a g^T` of each example and use, `(batch, uses, d_in, d_out)`."""
    w = np.asarray(gradients)
    return (
        np.einsum("nuio,nujo->ij", w, w) / len(w),
        np.einsum("nuio,nuip->op", w, w) / len(w),
        np.sum(w * w) / len(w),
    )


def assert_statistics(received, expected, rounding=ROUNDING):
    assert set(received) == set(expected)
    for name, gradients in expected.items():
        for array, reference in zip(received[name], statistics_of_uses(gradients), strict=True):
            np.testing.assert_allclose(array, reference, **rounding)


def received_statistics(predict, params, x):
    layers = tkfac.find_layers(predict, params, x, on_unsupported="error")
    assert not layers.fallback
    targets = jnp.ones(jax.eval_shape(predict, params, x).shape)
    fisher = tkfac.empirical_fisher(predict, tkfac.Normal(), layers)
    return jax.jit(fisher)(params, x, targets=targets)


def loss(outputs):
    """That of `Normal` with targets of 1."""
    return 0.5 * jnp.sum((outputs - 1) ** 2)


def attention(matrices, x):
    """Attention of two heads, with matrices of their own for each example and position."""

    def project(name, rows):
        with_one = jnp.concatenate([rows, jnp.ones_like(rows[..., :1])], -1)
        return jnp.einsum("bti,btio->bto", with_one, matrices[name])

    heads = [project(name, x).reshape(BATCH, LENGTH, 2, -1) for name in ("query", "key", "value")]
    query, key, value = heads
    scores = jnp.einsum("bthk,bshk->bhts", query, key) / np.sqrt(query.shape[-1])
    mixed = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores), value)
    return project("out", mixed.reshape(BATCH, LENGTH, -1))


@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_attention(framework):
    x = inputs()
    if framework == "linen":
        model = nn.MultiHeadDotProductAttention(2, **F64)
        params = randomly(jax.eval_shape(model.init, jax.random.key(0), x)["params"])
        own = params

        def apply(params, x):
            return model.apply({"params": params}, x)

    else:
        model = nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=nnx.Rngs(0), **F64)
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        params = randomly(params)
        own = nnx.to_pure_dict(params)

        def apply(params, x):
            return nnx.merge(graphdef, params, rest, copy=True)(x)

    matrices = {}
    for name in ("query", "key", "value", "out"):
        kernel, bias = own[name]["kernel"], own[name]["bias"]
        d_out = bias.size
        matrix = jnp.concatenate([kernel.reshape(-1, d_out), bias.reshape(1, d_out)])
        matrices[name] = jnp.broadcast_to(matrix, (BATCH, LENGTH, *matrix.shape))
    # jax.nn.dot_product_attention, which NNX calls, takes its scores in float32.
    rounding = ROUNDING if framework == "linen" else {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(
        jax.jit(attention)(matrices, x), jax.jit(apply)(params, x), **rounding
    )
    expected = jax.jit(jax.grad(lambda m: loss(jnp.tanh(attention(m, x)))))(matrices)
    received = received_statistics(lambda p, x: jnp.tanh(apply(p, x)), params, x)
    assert_statistics(received, expected, rounding)


def linen_cell(name):
    cell = getattr(nn, name)(3, **F64)

    def init(x):
        return cell.init(jax.random.key(0), cell.initialize_carry(jax.random.key(0), x.shape), x)

    params = randomly(jax.eval_shape(init, jnp.ones((1, WIDTH)))["params"])

    def unrolled(steps, x):
        carry = cell.initialize_carry(jax.random.key(0), x[:, 0].shape)
        outputs = []
        for t in range(LENGTH):
            own = jax.tree.map(lambda leaf, t=t: leaf[t], steps)
            carry, y = cell.apply({"params": own}, carry, x[:, t])
            outputs.append(y)
        return jnp.stack(outputs, 1)

    def predict(params, x):
        return jnp.tanh(nn.RNN(cell).apply({"params": {"cell": params}}, x))

    return predict, params, lambda steps, x: jnp.tanh(unrolled(steps, x))


def nnx_cell(name):
    cell = getattr(nnx, name)(WIDTH, 3, rngs=nnx.Rngs(0), **F64)
    graphdef, params, rest = nnx.split(nnx.RNN(cell, rngs=nnx.Rngs(0)), nnx.Param, ...)
    params = randomly(params)

    def predict(params, x):
        return jnp.tanh(nnx.merge(graphdef, params, rest, copy=True)(x))

    def unrolled(steps, x):
        first = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[0], steps), rest, copy=True)
        carry = first.cell.initialize_carry(x[:, 0].shape, rngs=nnx.Rngs(0))
        outputs = []
        for t in range(LENGTH):
            own = jax.tree.map(lambda leaf, t=t: leaf[t], steps)
            carry, y = nnx.merge(graphdef, own, rest, copy=True).cell(carry, x[:, t])
            outputs.append(y)
        return jnp.tanh(jnp.stack(outputs, 1))

    return predict, params, unrolled


CELLS = {
    "linen LSTM": functools.partial(linen_cell, "LSTMCell"),
    "linen GRU": functools.partial(linen_cell, "GRUCell"),
    "linen MGU": functools.partial(linen_cell, "MGUCell"),
    "linen simple": functools.partial(linen_cell, "SimpleCell"),
    "nnx LSTM": functools.partial(nnx_cell, "LSTMCell"),
    "nnx optimized LSTM": functools.partial(nnx_cell, "OptimizedLSTMCell"),
    "nnx GRU": functools.partial(nnx_cell, "GRUCell"),
    "nnx simple": functools.partial(nnx_cell, "SimpleCell"),
}


@pytest.mark.parametrize("name", CELLS)
def test_recurrent_cells(name):
    predict, params, unrolled = CELLS[name]()
    x = inputs()
    steps = jax.tree.map(lambda leaf: jnp.asarray(np.stack([leaf] * LENGTH)), params)
    np.testing.assert_allclose(jax.jit(unrolled)(steps, x), jax.jit(predict)(params, x), **ROUNDING)
    one = jax.grad(lambda steps, x: loss(unrolled(steps, x)))
    gradients = jax.jit(jax.vmap(lambda x: one(steps, x[None])))(x)
    expected = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        parts = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        layer, which = (parts[:-2], parts[-2]) if parts[-1] == "value" else (parts[:-1], parts[-1])
        expected.setdefault("/".join(layer), {})[which] = leaf
    for layer, own in expected.items():
        rows = [own["kernel"]] + ([own["bias"][:, :, None]] if "bias" in own else [])
        expected[layer] = np.concatenate(rows, axis=2)
    assert_statistics(received_statistics(predict, params, x), expected)
