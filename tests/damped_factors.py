"""Matrices to invert: layers with damped factors, and inverses that are in use."""

import jax.numpy as jnp
import numpy as np
from networks import spec

import tkfac_jax as tkfac
from tkfac_jax.curvature.factors import KroneckerFactors


def positive_definite(seed, size, dtype=jnp.float64):
    root = np.random.default_rng(seed).normal(size=(size, size))
    return jnp.asarray(root @ root.T + 0.1 * np.eye(size), dtype)


def layers_of(sizes, biased):
    layers = {
        f"layer_{i}": spec(*size, has_bias=bias)
        for i, (size, bias) in enumerate(zip(sizes, biased, strict=True))
    }
    factors = {
        name: KroneckerFactors(
            positive_definite(i, d_in), positive_definite(i + 100, d_out), jnp.ones(())
        )
        for i, (name, (d_in, d_out)) in enumerate(zip(layers, sizes, strict=True))
    }
    old = {
        name: tkfac.KroneckerInverses.from_factors(
            layers[name], 7 * jnp.eye(len(f.phi)), 7 * jnp.eye(len(f.psi))
        )
        for name, f in factors.items()
    }
    return layers, factors, old
