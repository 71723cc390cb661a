"""A convolution and a Dense layer in float64, and the same network in NumPy by the chain rule."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracles
from networks import as_float64

import tkfac_jax as tkfac


class Small(nn.Module):
    """A convolution and a Dense layer, both with bias."""

    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Conv(3, (3, 2), strides=(2, 1), dtype=jnp.float64)(x))
        return nn.Dense(3, dtype=jnp.float64)(x.reshape(len(x), -1))


@functools.cache
def small_problem():
    model = Small()

    @jax.jit
    def make():
        x = jax.random.normal(jax.random.key(0), (5, 4, 3, 2), jnp.float64)
        y = jax.random.randint(jax.random.key(1), (5,), 0, 3)
        return x, y, as_float64(model.init(jax.random.key(2), x)["params"])

    x, y, params = make()

    def predict(params, x):
        return model.apply({"params": params}, x)

    return predict, params, x, y, tkfac.find_layers(predict, params, x)


def to_matrices(params):
    return {
        name: np.concatenate(
            [
                np.asarray(p["kernel"]).reshape(-1, p["kernel"].shape[-1]),
                np.asarray(p["bias"])[None],
            ]
        )
        for name, p in params.items()
    }


class SmallOracle:
    """The same network in NumPy: gradients and moments from explicit patches and the chain rule."""

    def __init__(self, x, y):
        patches = [oracles.patches(image, (3, 2), (2, 1), "SAME", (1, 1)) for image in x]
        self.a_conv = oracles.with_one(np.stack(patches))
        self.one_hot = np.eye(3)[np.asarray(y)]

    def backward(self, params):
        conv_output = self.a_conv @ params["Conv_0"]
        hidden = np.tanh(conv_output)
        a_dense = oracles.with_one(hidden.reshape(len(hidden), -1))
        logits = a_dense @ params["Dense_0"]
        p = np.exp(logits)
        g_dense = p / p.sum(1, keepdims=True) - self.one_hot
        g_hidden = (g_dense @ params["Dense_0"][:-1].T).reshape(hidden.shape)
        return {
            "Conv_0": (self.a_conv, g_hidden * (1 - hidden**2)),
            "Dense_0": (a_dense[:, None], g_dense[:, None]),
        }

    def gradients(self, params):
        return {
            name: np.einsum("nli,nlo->io", a, g) / len(a)
            for name, (a, g) in self.backward(params).items()
        }

    def statistics(self, params):
        return {
            name: oracles.trace_restricted(a, g) for name, (a, g) in self.backward(params).items()
        }
