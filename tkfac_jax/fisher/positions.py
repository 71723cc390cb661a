"""The positions of an example's outputs: what their losses and Fishers make of them, and their checks."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

Mask = Bool[Array, "batch *positions"] | None


def loss_of_positions(position_nll: Array, average: bool, mask: Mask) -> Array:
    """The loss of each example: the sum over its positions, or their mean."""
    axes = tuple(range(1, position_nll.ndim))
    total = _masked(position_nll, mask).sum(axes)
    return total / _num_positions(position_nll.shape, mask, total.dtype) if average else total


def fisher_loss_of_positions(position_nll: Array, average: bool, mask: Mask) -> Array:
    """The loss whose derivatives make the Fisher of an example, or of one of its positions."""
    total = loss_of_positions(position_nll, False, mask)
    # Positions are independent given the outputs, so derivatives scaled by 1/sqrt(positions) have
    # the mean of the positions' Fishers as their second moment.
    if average:
        return total / jnp.sqrt(_num_positions(position_nll.shape, mask, total.dtype))
    return total


def fisher_scale_of_positions(shape: tuple[int, ...], average: bool) -> float:
    """What the second is a multiple of the first by, without a mask."""
    return math.sqrt(max(math.prod(shape[1:]), 1)) if average else 1.0


def _masked(values: Array, mask: Mask) -> Array:
    if mask is None:
        return values
    check_shapes("position_mask", values.shape, mask.shape, "the mask has")
    return jnp.where(mask, values, 0)


def _num_positions(shape: tuple[int, ...], mask: Mask, dtype: Any) -> Array:
    """The number of positions of each example that are not padding, at least 1."""
    if mask is None:
        return jnp.asarray(max(math.prod(shape[1:]), 1), dtype)
    counted = jnp.asarray(mask, bool).sum(tuple(range(1, len(shape))))
    return jnp.maximum(counted, 1).astype(dtype)


def one_position(
    shape: tuple[int, ...], index: Array, average: bool, mask: Mask, dtype: Any
) -> Array:
    """1 at one position of each example and 0 elsewhere; scaled, for averaged positions, as their Fisher asks."""
    here = jax.nn.one_hot(index, math.prod(shape[1:]), dtype=dtype).reshape(1, *shape[1:])
    here = _masked(jnp.broadcast_to(here, shape), mask)
    if not average:
        return here
    scale = jnp.sqrt(_num_positions(shape, mask, dtype))
    return here / scale.reshape(-1, *(1,) * (len(shape) - 1))


def position_weights(shape: tuple[int, ...], average: bool, mask: Mask, dtype: Any) -> Array:
    """What the Fisher of each position counts for in that of its example."""
    counted = _masked(jnp.ones(shape, dtype), mask)
    if not average:
        return counted
    number = _num_positions(shape, mask, dtype)
    return counted / number.reshape(-1, *(1,) * (len(shape) - 1))


def at_least_float32(outputs: Array) -> Array:
    """The outputs in a dtype to compute with."""
    return outputs.astype(jnp.promote_types(outputs.dtype, jnp.float32))


def check_float(name: str, array: Array, role: str = "outputs") -> None:
    """Refuses what is not floating-point."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        msg = (
            f"{name} expects floating-point {role}; got {array.dtype}. "
            f"Convert them with .astype(jnp.float32) if they are real numbers."
        )
        raise ValueError(msg)


def check_shapes(
    name: str, expected: tuple[int, ...], received: tuple[int, ...], what: str = "targets have"
) -> None:
    """Refuses what has not the shape that the outputs ask for."""
    if expected != received or not expected:
        msg = f"{name}: {what} shape {received}; the outputs ask for {expected or '(batch, ...)'}."
        raise ValueError(msg)
