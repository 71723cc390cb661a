"""Condition numbers of factors, from their inverses."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tkfac_jax.linalg.factor_structure import Structure
from tkfac_jax.linalg.lapack_threads import limit_lapack_threads


def condition_number(
    structure: Structure, inverse: Array, batch: tuple[int, ...]
) -> Float[Array, "*batch"]:
    """Largest over smallest eigenvalue: of a matrix the same as of its inverse."""
    # LAPACK knows no dtype below float32.
    inverse = inverse.astype(jnp.promote_types(inverse.dtype, jnp.float32))
    if structure.kind == "blocks":
        inverse = _fill_padding(structure, inverse)
    eigenvalues = inverse if structure.kind == "diagonal" else _eigenvalues(inverse)
    eigenvalues = eigenvalues.reshape(*batch, -1)
    smallest, largest = eigenvalues.min(-1), eigenvalues.max(-1)
    return jnp.where(smallest <= 0, jnp.inf, largest / smallest)


def _fill_padding(structure: Structure, blocks: Float[Array, "*batch n n"]) -> Array:
    """Puts a diagonal element of a block for its padding: it lies between the block's eigenvalues."""
    rows = jnp.arange(structure.num_blocks * structure.block).reshape(structure.num_blocks, -1)
    kept = rows < structure.size
    identity = jnp.eye(structure.block, dtype=blocks.dtype)
    return jnp.where(kept[:, :, None] & kept[:, None, :], blocks, blocks[..., :1, :1] * identity)


def _eigenvalues(matrices: Float[Array, "*batch n n"]) -> Float[Array, "matrices n"]:
    """The eigenvalues of symmetric matrices, ascending."""
    limit_lapack_threads()
    flat = matrices.reshape(-1, *matrices.shape[-2:])
    # One matrix at a time on CPUs: two batched LAPACK calls in one program can wait for each other for ever.
    return jax.lax.platform_dependent(
        flat,
        cpu=lambda flat: jax.lax.map(jnp.linalg.eigvalsh, flat),
        default=jnp.linalg.eigvalsh,
    )
