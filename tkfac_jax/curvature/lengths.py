"""The lengths of matrices: of weights, of directions and of steps."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

Rows = tuple[Array, ...]


def norm(rows: Rows) -> Float[Array, "*batch"]:
    """The Frobenius norm of each matrix, whose rows may stand in several arrays."""
    return jnp.sqrt(sum(_squares(part) for part in rows))


def times(scale: Float[Array, "*batch"], rows: Rows) -> Rows:
    """Each matrix times a number of its own; where the number is 0, zeros, whatever the matrix holds."""
    own = scale[..., None, None]
    return tuple(jnp.where(own == 0, 0, own * part) for part in rows)


def at_length(direction: Rows, length: Float[Array, "*batch"]) -> Rows:
    """Each direction at a length.

    Args:
      direction: rows of matrices.
      length: their new Frobenius norms.

    Returns:
      The matrices. One whose direction is 0 or not finite, or whose length is not finite, is 0.
    """
    found = norm(direction)
    usable = (found > 0) & jnp.isfinite(found) & jnp.isfinite(length)
    return times(jnp.where(usable, length / jnp.where(usable, found, 1), 0), direction)


class Move(NamedTuple):
    """A step of matrices that stays in their balls.

    Attributes:
      step: rows of the step.
      change: by what share of the weights' norm each matrix changes; 0 where the weights are 0.
    """

    step: Rows
    change: Float[Array, "*batch"]


def within_ball(weights: Rows, step: Rows, radius: Float[Array, "*batch"]) -> Move:
    """The step whose end is that of a given one, or the nearest point to it of a ball around 0.

    With `s = min(1, radius / ||W + U||)` the step is `s (W + U) - W`, computed as `s U - (1 - s) W`, which is `U` to
    the last bit where `s` is 1.
    """
    old, length = norm(weights), norm(step)
    end = norm(tuple(part + more for part, more in zip(weights, step, strict=True)))
    outside = end > radius
    scale = jnp.where(outside, radius / jnp.where(outside, end, 1), 1)
    shrunk = times(1 - scale, weights)
    inside = tuple(part - less for part, less in zip(times(scale, step), shrunk, strict=True))
    # ||s U - (1 - s) W||^2 by the law of cosines, so that the step need not be read again.
    product = (end**2 - old**2 - length**2) / 2
    squared = (scale * length) ** 2 + ((1 - scale) * old) ** 2 - 2 * scale * (1 - scale) * product
    moved = jnp.sqrt(jnp.maximum(squared, 0))
    return Move(inside, jnp.where(old > 0, moved / jnp.where(old > 0, old, 1), 0))


def largest(values: Sequence[Float[Array, "..."]]) -> Float[Array, ""]:
    """The largest of some numbers, 0 if there are none."""
    flat = [value.ravel() for value in values]
    return jnp.concatenate(flat).max() if flat else jnp.zeros(())


def _squares(part: Array) -> Float[Array, "*batch"]:
    return jnp.sum(part * part, axis=(-2, -1))
