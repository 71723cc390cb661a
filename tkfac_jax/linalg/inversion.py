"""Inverting stacks of matrices, and what to do when one of them fails."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tkfac_jax.linalg.divided_stacks import Stack
from tkfac_jax.linalg.finite import finite_matrices
from tkfac_jax.linalg.meshes import vary, varying_axes

Inverse = Callable[[Array], Array]


@runtime_checkable
class ImprovingInverse(Protocol):
    """An inverse that is given the inverses in use."""

    def __call__(self, matrices: Array) -> Array:
        """Inverts matrices of whose inverses nothing is known, or that `improve` did not invert."""
        ...

    def improve(self, matrices: Array, guesses: Array) -> tuple[Array, Array]:
        """Inverts matrices `(n, d, d)` of whose inverses there are guesses; also says which ones it did, `(n,)`."""
        ...


# Shares of a matrix's mean diagonal that are added to it, one attempt after the other until an inversion succeeds.
DAMPING_SHARES = (0.0, 1e-4, 1e-2, 1.0)


def invert_diagonals(
    diagonals: Float[Array, "batch n"],
) -> tuple[Float[Array, "batch n"], Bool[Array, " batch"]]:
    """Inverts diagonal matrices; also says which ones are positive definite."""
    inverses = 1 / diagonals
    return inverses, (jnp.isfinite(inverses) & (inverses > 0)).all(-1)


def invert_stack(
    stack: Stack, inverse: Inverse
) -> tuple[Float[Array, "batch n n"], Bool[Array, " batch"]]:
    """Inverts a stack, from guesses where there are any; also says which ones succeeded."""
    if stack.guesses is None or not isinstance(inverse, ImprovingInverse):
        return _invert_with_retries(stack.matrices, inverse)
    improved, reached = inverse.improve(stack.matrices, stack.guesses)
    reached &= _is_good(improved)

    def without_guesses(improved: Array, reached: Array) -> tuple[Array, Array]:
        found, succeeded = _invert_with_retries(stack.matrices, inverse)
        return jnp.where(reached[:, None, None], improved, found), reached | succeeded

    return jax.lax.cond(
        reached.all(), lambda *improved: improved, without_guesses, improved, reached
    )


def _invert_with_retries(
    matrices: Float[Array, "batch n n"], inverse: Inverse
) -> tuple[Float[Array, "batch n n"], Bool[Array, " batch"]]:
    """Inverts a stack, the failures again with more damping; also says which ones succeeded."""
    if len(matrices) == 1:
        return _in_turns(matrices, inverse, 1)

    def singly(matrices: Array) -> Array:
        return jnp.concatenate([inverse(matrix[None]) for matrix in matrices])

    # What one or two take fits into a CPU's caches; and while one core is busy with a small block of one matrix,
    # another goes on with the other.
    return jax.lax.platform_dependent(
        matrices,
        cpu=lambda matrices: _in_turns(matrices, singly, 1 if len(matrices) % 2 else 2),
        default=lambda matrices: _in_turns(matrices, inverse, len(matrices)),
    )


def _in_turns(
    matrices: Float[Array, "batch n n"], inverse: Inverse, number: int
) -> tuple[Float[Array, "batch n n"], Bool[Array, " batch"]]:
    """Inverts so many matrices at a time, again until none of them fails or there is no more damping to try."""
    shares = jnp.asarray(DAMPING_SHARES, matrices.dtype)

    # An inverse takes the place of its matrix. Each attempt inverts all of its turn: then the inverse is compiled once,
    # and no results are merged.
    def attempt(carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        first, tried, results, good = carry
        own = jax.lax.dynamic_slice_in_dim(results, first, number)
        # Divided before it is summed: the sum may overflow, and no share of infinity is a number.
        mean_diagonal = (jnp.diagonal(own, axis1=-2, axis2=-1) / own.shape[-1]).sum(-1)
        extra = shares[tried] * mean_diagonal
        # Compared here: an identity matrix from outside would be written to memory, and read.
        row, column = (jax.lax.broadcasted_iota(jnp.int32, own.shape, axis) for axis in (1, 2))
        found = inverse(jnp.where(row == column, own + extra[:, None, None], own))
        succeeded = _is_good(found)
        over = succeeded | (tried == len(DAMPING_SHARES) - 1)
        done = over.all()
        return (
            first + jnp.where(done, number, 0),
            jnp.where(done, 0, jnp.where(over, tried, tried + 1)),
            jax.lax.dynamic_update_slice_in_dim(results, jnp.where(done, found, own), first, 0),
            jax.lax.dynamic_update_slice_in_dim(good, succeeded, first, 0),
        )

    start = (
        jnp.zeros((), jnp.int32),
        jnp.zeros(number, jnp.int32),
        matrices,
        jnp.zeros_like(matrices[:, 0, 0], bool),
    )
    start = vary(start, varying_axes(matrices))
    _, _, results, good = jax.lax.while_loop(lambda carry: carry[0] < len(matrices), attempt, start)
    return results, good


def _is_good(inverses: Float[Array, "batch n n"]) -> Bool[Array, " batch"]:
    """Finite, and positive on the diagonal, as the inverse of a positive definite matrix is."""
    diagonal = jnp.diagonal(inverses, axis1=-2, axis2=-1)
    return finite_matrices(inverses) & (diagonal > 0).all(-1)
