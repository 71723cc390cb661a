"""How a Kronecker factor is stored: whole, as blocks on its diagonal, or as its diagonal alone.

A factor is a symmetric matrix of one row per input (or output) of a layer. `Structure` says which of
its entries are kept; the functions here are all that the rest of the package does with a factor, so
that nothing else asks how it is stored. Leading axes (layers of a stack, groups of a
convolution) are a batch throughout.
"""

import functools
import itertools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Kind = Literal["full", "blocks", "diagonal"]

# About so many rows of a symmetric product are computed together: narrower strips are slower than what they spare.
# Smaller products, and those over fewer examples and locations, are computed whole.
STRIP = 160
SMALLEST_IN_STRIPS = 256


class Structure(NamedTuple):
    """Which entries of a factor are kept.

    Attributes:
      kind: `"full"`; `"blocks"`: equal blocks on the diagonal; `"diagonal"`: the diagonal alone.
      size: rows of the matrix.
      block: rows of one block; the last block is filled up with zeros. Equal to `size` unless `kind` is `"blocks"`.
    """

    kind: Kind
    size: int
    block: int

    @classmethod
    def of_size(cls, size: int, limit: int | None = None, large: Kind = "full") -> "Structure":
        """A full matrix, or the structure `large` if it has more than `limit` rows."""
        if limit is None or size <= limit or large == "full":
            return cls("full", size, size)
        if large == "diagonal":
            return cls("diagonal", size, size)
        # As even as possible: three blocks of 34 rather than two of 49 and a rest of 2.
        return cls("blocks", size, math.ceil(size / math.ceil(size / limit)))

    @property
    def num_blocks(self) -> int:
        """Blocks on the diagonal."""
        return math.ceil(self.size / self.block)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that holds the factor, without leading axes."""
        if self.kind == "full":
            return (self.size, self.size)
        if self.kind == "diagonal":
            return (self.size,)
        return (self.num_blocks, self.block, self.block)

    def __str__(self) -> str:
        if self.kind == "full":
            return str(self.size)
        if self.kind == "diagonal":
            return f"{self.size} diagonal"
        return f"{self.size} in {self.num_blocks} blocks"


def moment(
    structure: Structure,
    rows: Float[Array, "*batch rows size"],
    weights: Float[Array, "*batch rows"],
    precision: jax.lax.PrecisionLike = jax.lax.Precision.HIGHEST,
) -> Float[Array, "..."]:
    """The weighted second moment of rows, summed: `sum_n weights_n rows_n rows_n^T`.

    Args:
      structure: which entries to compute.
      rows: the rows; where they lack their last entry it is 1, the homogeneous coordinate of a bias.
      weights: one weight per row, not negative.
      precision: precision of the matrix products.

    Returns:
      The factor, `(*batch, *structure.shape)`.
    """
    if structure.kind == "full" and min(structure.size, rows.shape[-2]) >= SMALLEST_IN_STRIPS:
        # For a GPU each strip would be searched for its fastest program, which takes seconds, and be too small for it.
        return jax.lax.platform_dependent(
            rows,
            weights,
            cpu=functools.partial(_symmetric_product, structure.size, precision=precision),
            default=functools.partial(_moment, structure, precision=precision),
        )
    return _moment(structure, rows, weights, precision)


def _moment(
    structure: Structure,
    rows: Float[Array, "*batch rows n"],
    weights: Float[Array, "*batch rows"],
    precision: jax.lax.PrecisionLike,
) -> Float[Array, "..."]:
    """What `moment` computes, in one product."""
    if rows.shape[-1] < structure.size:
        rows = jnp.concatenate([rows, jnp.ones_like(rows[..., :1])], axis=-1)
    weighted = rows * weights[..., None]
    if structure.kind == "diagonal":
        return jnp.sum(weighted * rows, axis=-2)
    if structure.kind == "full":
        return jnp.matmul(weighted.mT, rows, precision=precision)
    return jnp.einsum(
        "...nki,...nkj->...kij",
        _split(structure, weighted),
        _split(structure, rows),
        precision=precision,
    )


def _symmetric_product(
    size: int,
    rows: Float[Array, "*batch rows n"],
    weights: Float[Array, "*batch rows"],
    precision: jax.lax.PrecisionLike,
) -> Float[Array, "*batch size size"]:
    """`rows^T diag(weights) rows` in strips, each as far as its block of the diagonal: the rest is their transposes.

    The homogeneous coordinate is a strip of its own, for which the rows need not be copied.
    """
    width = rows.shape[-1]
    weighted = rows * weights[..., None]
    count = round(width / STRIP)
    ends = [width * number // count for number in range(count + 1)]
    bounds = list(itertools.pairwise(ends))
    strips = [
        jnp.matmul(weighted[..., start:end].mT, rows[..., :end], precision=precision)
        for start, end in bounds
    ]
    if width < size:
        last = jnp.matmul(weights[..., None, :], rows, precision=precision)
        strips.append(jnp.concatenate([last, weights.sum(-1)[..., None, None]], axis=-1))
        bounds.append((width, size))
    whole = [
        jnp.concatenate([strip, *(below[..., start:end].mT for below in strips[number:])], axis=-1)
        for number, ((start, end), strip) in enumerate(zip(bounds, strips, strict=True), 1)
    ]
    return jnp.concatenate(whole, axis=-2)


def trace(structure: Structure, factor: Array) -> Float[Array, "*batch"]:
    """The trace of a factor."""
    if structure.kind == "diagonal":
        return factor.sum(-1)
    traces = jnp.diagonal(factor, axis1=-2, axis2=-1).sum(-1)
    return traces if structure.kind == "full" else traces.sum(-1)


def add_to_diagonal(structure: Structure, factor: Array, value: Float[Array, "*batch"]) -> Array:
    """Adds a multiple of the identity, one for each factor of the batch."""
    value = value[(...,) + (None,) * len(structure.shape)]
    if structure.kind == "diagonal":
        return factor + value
    return factor + value * jnp.eye(structure.block, dtype=factor.dtype)


def multiply(
    structure: Structure, factor: Array, matrix: Float[Array, "*batch size columns"]
) -> Float[Array, "*batch size columns"]:
    """The product of a factor and a matrix."""
    if structure.kind == "diagonal":
        return factor[..., None] * matrix
    if structure.kind == "full":
        return factor @ matrix
    blocks = _split(structure, matrix.mT)
    product = jnp.einsum("...kij,...mkj->...kim", factor, blocks)
    rows = product.reshape(*product.shape[:-3], -1, product.shape[-1])
    return rows[..., : structure.size, :]


def dense(structure: Structure, factor: Array) -> Float[Array, "*batch size size"]:
    """The factor as a matrix, zeros where nothing is kept."""
    if structure.kind == "full":
        return factor
    batch = factor.shape[: factor.ndim - len(structure.shape)]
    identity_matrix = jnp.eye(structure.size, dtype=factor.dtype)
    return multiply(
        structure, factor, jnp.broadcast_to(identity_matrix, (*batch, *identity_matrix.shape))
    )


def _split(structure: Structure, rows: Float[Array, "*batch rows size"]) -> Array:
    """Splits the last axis into blocks, filled up with zeros: `(*batch, rows, blocks, block)`."""
    missing = structure.num_blocks * structure.block - structure.size
    padded = jnp.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, missing)])
    return padded.reshape(*rows.shape[:-1], structure.num_blocks, structure.block)
