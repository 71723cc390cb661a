"""The lengths of matrices: of weights, of directions and of steps."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

Rows = tuple[Array, ...]


def norm(rows: Rows) -> Float[Array, "*batch"]:
    """The Frobenius norm of each matrix, whose rows may stand in several arrays."""
    return jnp.sqrt(sum(_squares(part) for part in rows))


def times(scale: Float[Array, "*batch"], part: Array) -> Float[Array, "*batch rows d_out"]:
    """Each matrix times a number of its own; where the number is 0, zeros, whatever the matrix holds."""
    own = scale[..., None, None]
    return jnp.where(own == 0, 0, own * part)


def relative_to(weights: Rows, direction: Rows, floor: float | Array) -> Rows:
    """A direction at lengths relative to the weights: `max(||K||, floor) D / ||D||`.

    The direction has one length. Rows after the first, those of a bias, are multiplied by their own norm where that is
    larger than the kernel's: a bias can grow as far as it must, and the kernel's step does not grow with it.

    Args:
      weights: rows of the kernels `K`, and of biases if there are any.
      direction: rows of the directions `D`.
      floor: least norm of the weights.

    Returns:
      The steps. One whose direction is 0 or not finite, or whose weights are not finite, is 0.
    """
    found = norm(direction)
    kernel, *rest = (norm((part,)) for part in weights)
    own = jnp.maximum(kernel, jnp.asarray(floor, kernel.dtype))
    lengths = (own, *(jnp.maximum(other, own) for other in rest))
    usable = (found > 0) & jnp.isfinite(found) & jnp.isfinite(norm(weights))

    def scaled(length: Array, part: Array) -> Array:
        return times(jnp.where(usable, length / jnp.where(usable, found, 1), 0), part)

    return tuple(map(scaled, lengths, direction))


class Move(NamedTuple):
    """A step of matrices that stays in their balls.

    Attributes:
      step: rows of the steps.
      radius: of the balls.
      change: by what share of the weights' norm each matrix changes; 0 where the weights are 0.
    """

    step: Rows
    radius: Float[Array, "*batch"]
    change: Float[Array, "*batch"]


def within_ball(
    weights: Rows, step: Rows, radius: Float[Array, "*batch"], growth: float | Array = 0.0
) -> Move:
    """The step whose end is that of a given one, or the nearest point to it of a ball around 0.

    With `s = min(1, radius / ||W + U||)` the step is `s (W + U) - W`, computed as `s U - (1 - s) W`, which is `U` to
    the last bit where `s` is 1.

    Args:
      weights: rows of the weights `W`.
      step: rows of the steps `U`.
      radius: of the balls.
      growth: where a step would leave a ball, its radius grows first, by this share of what the step goes outwards,
        `<U, W> / ||W||`. What only goes sideways lets no ball grow.
    """
    old, length = norm(weights), norm(step)
    end = norm(tuple(part + more for part, more in zip(weights, step, strict=True)))
    product = (end**2 - old**2 - length**2) / 2
    outwards = jnp.where(old > 0, jnp.maximum(product, 0) / jnp.where(old > 0, old, 1), length)
    grown = radius + growth * outwards
    # Norms of the largest numbers overflow: then there is nothing to compare with.
    radius = jnp.where((end > radius) & jnp.isfinite(grown), grown, radius)
    outside = (end > radius) & jnp.isfinite(end)
    scale = jnp.where(outside, radius / jnp.where(outside, end, 1), 1)
    inside = tuple(
        times(scale, more) - times(1 - scale, part)
        for part, more in zip(weights, step, strict=True)
    )
    # ||s U - (1 - s) W||^2 by the law of cosines, so that the step need not be read again.
    squared = (scale * length) ** 2 + ((1 - scale) * old) ** 2 - 2 * scale * (1 - scale) * product
    moved = jnp.sqrt(jnp.where(jnp.isfinite(squared), jnp.maximum(squared, 0), 0))
    return Move(inside, radius, jnp.where(old > 0, moved / jnp.where(old > 0, old, 1), 0))


def largest(values: Sequence[Float[Array, "..."]]) -> Float[Array, ""]:
    """The largest of some numbers, 0 if there are none."""
    flat = [value.ravel() for value in values]
    return jnp.concatenate(flat).max() if flat else jnp.zeros(())


def _squares(part: Array) -> Float[Array, "*batch"]:
    return jnp.sum(part * part, axis=(-2, -1))
