"""Whether numbers are finite."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool


def all_finite(tree: Any) -> Bool[Array, ""]:
    """Whether all entries of a tree's arrays are finite, and not so large that their sum overflows."""
    sums = [_sum(array) for array in jax.tree.leaves(tree)]
    return jnp.isfinite(jnp.stack(sums)).all() if sums else jnp.array(True)


def finite_matrices(matrices: Array) -> Bool[Array, "*batch"]:
    """The same for each matrix of a stack."""
    return jnp.isfinite(_sum(matrices, (-2, -1)))


def _sum(array: Array, axis: Sequence[int] | None = None) -> Array:
    # One pass of additions; comparing each entry takes several, and a program for each.
    return jnp.sum(array, axis=axis, dtype=jnp.promote_types(array.dtype, jnp.float32))
