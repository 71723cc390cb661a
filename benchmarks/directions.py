"""Directions and lengths that `tkfacw` is compared with: Muon's, Adam's, Newton-Muon's, powers of the factors."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import tkfac_jax as tkfac
from tkfac_jax.layers.parameter_matrices import parameter_matrices
from tkfac_jax.layers.parameter_tree import named_leaves, replace_leaves
from tkfac_jax.optimizers.gradient_moments import nesterov_momentum, scale_by_adam_without_epsilon
from tkfac_jax.optimizers.plan import with_plan

# Of the quintic iteration that Muon is published with (Jordan et al. 2024).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonalized(matrices: jax.Array) -> jax.Array:
    """About the polar factors of matrices `(..., rows, columns)`, by Muon's iteration."""
    wide = matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices
    norm = jnp.sqrt(jnp.sum(wide * wide, (-2, -1), keepdims=True))
    found = jnp.where(norm > 0, wide / jnp.where(norm > 0, norm, 1), 0)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = found @ found.mT
        found = a * found + (b * gram + c * gram @ gram) @ found
    return found.mT if wide is not matrices else found


def polar_factor(layers: tkfac.Layers) -> optax.GradientTransformation:
    """Replaces each layer's update, kernel and bias as one matrix, by its polar factor."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        leaves, new = named_leaves(updates), {}
        for name, matrix in parameter_matrices(layers, updates, "updates").items():
            if name in layers:
                rows = matrix.rows_of(leaves)
                found = orthogonalized(jnp.concatenate(rows, -2))
                kernel = rows[0].shape[-2]
                parts = (found[..., :kernel, :], found[..., kernel:, :])[: len(rows)]
                new |= matrix.leaves_of(parts, leaves)
        return replace_leaves(updates, new), state

    return optax.GradientTransformation(optax.identity().init, update)


def in_ball(
    direction: optax.GradientTransformation,
    layers: tkfac.Layers,
    rate: optax.Schedule,
    radius: float = 1.0,
) -> optax.GradientTransformation:
    """Another direction at the lengths of `tkfacw`, within its balls, and the rest by the same Adam."""
    others = scale_by_adam_without_epsilon()
    return optax.chain(
        optax.partition({"tkfac": direction, "fallback": others}, layers.labels),
        tkfac.scale_by_layer_norm_ratio(layers),
        optax.scale_by_learning_rate(rate),
        tkfac.keep_in_norm_ball(layers, radius),
    )


def muon_in_ball(layers: tkfac.Layers, rate: optax.Schedule) -> optax.GradientTransformation:
    """Muon's direction."""
    return in_ball(optax.chain(nesterov_momentum(0.9), polar_factor(layers)), layers, rate)


def adam_in_ball(layers: tkfac.Layers, rate: optax.Schedule) -> optax.GradientTransformation:
    """Adam's direction."""
    return in_ball(scale_by_adam_without_epsilon(b2=0.95), layers, rate)


def momentum_in_ball(layers: tkfac.Layers, rate: optax.Schedule) -> optax.GradientTransformation:
    """The momentum's direction."""
    return in_ball(nesterov_momentum(0.9), layers, rate)


def preconditioned_in_ball(
    layers: tkfac.Layers,
    rate: optax.Schedule,
    *,
    polar: bool = False,
    decay: Callable[[Any], Any],
    **options: Any,
) -> optax.GradientTransformation:
    """`tkfacw` from its pieces, with the polar factor after the preconditioning, or other inverses."""
    preconditioner = tkfac.scale_by_tkfac(
        layers, damping=tkfac.relative_damping(0.2), decay=decay, **options
    )
    after = [polar_factor(layers)] if polar else []
    direction = optax.chain(nesterov_momentum(0.9), preconditioner, *after)
    return with_plan(in_ball(direction, layers, rate), preconditioner.plan)


def power_inverse(power: float) -> Callable[[jax.Array], jax.Array]:
    """In the place of inverses, matrices to the power of minus `power`, one eigendecomposition after the other."""

    def one(matrix: jax.Array) -> jax.Array:
        values, vectors = jnp.linalg.eigh(matrix)
        return (vectors * values**-power) @ vectors.mT

    return lambda matrices: jax.lax.map(one, matrices)


def without(layers: tkfac.Layers, kinds: tuple[str, ...], names: tuple[str, ...]) -> tkfac.Layers:
    """The layers but those of some kinds or names, whose parameters are left to the fallback."""
    kept = [s for s in layers.values() if s.kind not in kinds and s.name not in names]
    left = [s for s in layers.values() if s not in kept]
    reasons = [(s.kernel, "left to Adam") for s in left]
    reasons += [(s.bias, "left to Adam") for s in left if s.bias is not None]
    return tkfac.Layers(tuple(kept), (*layers.fallback.items(), *reasons))
