"""Inverses of symmetric positive definite matrices, in batches of equal size, and what to do when one fails."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tkfac_jax.division import Devices, map_matrices
from tkfac_jax.factors import KroneckerFactors
from tkfac_jax.finite import finite_matrices
from tkfac_jax.layers import LayerSpec
from tkfac_jax.meshes import vary, varying_axes
from tkfac_jax.threads import limit_lapack_threads

Inverse = Callable[[Array], Array]

# Shares of a matrix's mean diagonal that are added to it, one attempt after the other until an inversion succeeds.
DAMPING_SHARES = (0.0, 1e-4, 1e-2, 1.0)

# Sizes below which halving a matrix no longer pays, and how often it is halved at most: eight blocks leave
# little outside matrix products, and more would only compile longer.
SMALLEST_BLOCK = 128
LARGEST_LEVELS = 3

# Kernels of no more entries than this are preconditioned together with their bias: XLA takes long to compile the
# products of single rows for a CPU, and copying such a kernel takes next to nothing.
LARGEST_JOINED = 2**16

ONE_DEVICE = Devices()


class KroneckerInverses(NamedTuple):
    """The inverses of a layer's two damped factors, the bias's row of the first one apart.

    The inverse of phi is `[[phi, q], [q^T, s]]` with `bias = [q, s]`: kernel and bias are
    preconditioned without being concatenated. A small layer, one without bias, or one whose input factor is not
    stored whole, has the inverse of phi as one array and no `bias`.

    Attributes:
      phi: the kernel's rows and columns of the inverse of phi, or all of them.
      psi: the inverse of psi.
      bias: the bias's row of the inverse of phi, the corner last; or None.
    """

    phi: Float[Array, "..."]
    psi: Float[Array, "..."]
    bias: Float[Array, "*batch d_in"] | None

    @classmethod
    def from_factors(cls, spec: LayerSpec, phi: Array, psi: Array) -> "KroneckerInverses":
        """Takes the inverses in the form of the layer's factors."""
        if keeps_bias_apart(spec):
            return cls(phi[..., :-1, :-1], psi, phi[..., -1, :])
        return cls(phi, psi, None)

    def phi_matrix(self) -> Float[Array, "..."]:
        """The inverse of phi in the form of the factor."""
        if self.bias is None:
            return self.phi
        column, row = self.bias[..., :-1, None], self.bias[..., None, :]
        return jnp.concatenate([jnp.concatenate([self.phi, column], -1), row], -2)


def keeps_bias_apart(spec: LayerSpec) -> bool:
    """Whether the bias is one row of an input factor that is stored whole, and the kernel is large."""
    large = spec.d_in * spec.d_out > LARGEST_JOINED
    return large and spec.phi.kind == "full" and spec.layout.bias_rows == 1


def cholesky_inverse(matrices: Float[Array, "batch n n"]) -> Float[Array, "batch n n"]:
    """Inverts symmetric positive definite matrices by their Cholesky factors, found by halves.

    As exact as LAPACK's factor and solve with the identity; most of the work, `2 n^3` instead of `10/3 n^3`
    operations, is in matrix products.

    Args:
      matrices: the matrices; only the lower triangles are read.

    Returns:
      The inverses, symmetric up to rounding. Where a matrix is not positive definite, NaN.
    """
    limit_lapack_threads()
    # Batched LAPACK calls of jaxlib 0.10 wait inside XLA's CPU thread pool for tasks of the same pool:
    # two of them in one program can take all its threads and never return. Single ones do not wait.
    return jax.lax.platform_dependent(
        matrices,
        cpu=lambda matrices: jax.lax.map(_cholesky_inverse, matrices),
        default=_cholesky_inverse,
    )


def _cholesky_inverse(matrices: Float[Array, "*batch n n"]) -> Float[Array, "*batch n n"]:
    levels = min(LARGEST_LEVELS, (matrices.shape[-1] // SMALLEST_BLOCK).bit_length())
    return _gram(_inverse_factor(matrices, levels), levels)


def _inverse_factor(
    matrices: Float[Array, "*batch n n"], levels: int
) -> Float[Array, "*batch n n"]:
    """The inverses of the Cholesky factors, by halves: all but the blocks of the last level are matrix products.

    `[[A, .], [B, C]]` has the factor `[[K, 0], [B K^-T, M]]` with `K K^T = A`, `M M^T = C - B A^-1 B^T`.
    """
    size = matrices.shape[-1]
    if levels == 0:
        identity = jnp.broadcast_to(jnp.eye(size, dtype=matrices.dtype), matrices.shape)
        factor = jax.lax.linalg.cholesky(matrices, symmetrize_input=False)
        return jax.lax.linalg.triangular_solve(factor, identity, left_side=True, lower=True)
    half = size // 2
    first = _inverse_factor(matrices[..., :half, :half], levels - 1)
    below = _product(matrices[..., half:, :half], first.mT)
    rest = matrices[..., half:, half:] - _product(below, below.mT)
    second = _inverse_factor(rest, levels - 1)
    corner = -_product(_product(second, below), first)
    above = jnp.zeros_like(matrices[..., :half, half:])
    return _join(first, above, corner, second)


def _gram(factors: Float[Array, "*batch n n"], levels: int) -> Float[Array, "*batch n n"]:
    """`L^T L` of lower triangular matrices, without the products with the zeros above."""
    if levels == 0:
        return _product(factors.mT, factors)
    half = factors.shape[-1] // 2
    corner, second = factors[..., half:, :half], factors[..., half:, half:]
    first = _gram(factors[..., :half, :half], levels - 1) + _product(corner.mT, corner)
    below = _product(second.mT, corner)
    return _join(first, below.mT, below, _gram(second, levels - 1))


def _join(a: Array, b: Array, c: Array, d: Array) -> Array:
    """`[[a, b], [c, d]]`."""
    return jnp.concatenate([jnp.concatenate([a, b], -1), jnp.concatenate([c, d], -1)], -2)


def _product(left: Array, right: Array) -> Array:
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)


def invert_factors(
    factors: Mapping[str, KroneckerFactors],
    old: Mapping[str, KroneckerInverses],
    layers: Mapping[str, LayerSpec],
    inverse: Inverse,
    devices: Devices = ONE_DEVICE,
) -> tuple[dict[str, KroneckerInverses], dict[str, Int[Array, ""]]]:
    """Inverts the damped factors of all layers.

    Args:
      factors: the damped factors, by layer.
      old: the inverses that are in use.
      layers: the layers.
      inverse: inverts a stack of symmetric positive definite matrices, shape `(n, d, d)`.
      devices: the devices that divide the work.

    Returns:
      The inverses, in the dtypes of the old ones, and for each layer how many of its matrices could not be
      inverted even with more damping: there the old inverse stays.
    """
    inverted, succeeded = {}, {}
    groups: dict[Any, dict[int, list[Any]]] = defaultdict(lambda: defaultdict(list))
    for name in old:
        for which in ("phi", "psi"):
            structure, factor = getattr(layers[name], which), getattr(factors[name], which)
            # LAPACK knows no dtype below float32.
            factor = factor.astype(jnp.promote_types(factor.dtype, jnp.float32))
            if structure.kind == "diagonal":
                inverses, good = _invert_diagonals(factor.reshape(-1, structure.size))
                inverted[name, which] = inverses.reshape(factor.shape)
                succeeded[name, which] = good
            else:
                groups[factor.dtype][structure.block].append((name, which, factor))

    for by_size in groups.values():
        stacks = {
            size: [factor.reshape(-1, size, size) for _, _, factor in members]
            for size, members in by_size.items()
        }
        results = map_matrices(
            lambda stack: _invert_with_retries(stack, inverse),
            {
                size: jnp.concatenate(own) if len(own) > 1 else own[0]
                for size, own in stacks.items()
            },
            devices,
        )
        for size, members in by_size.items():
            start = 0
            for (name, which, factor), own in zip(members, stacks[size], strict=True):
                end = start + len(own)
                inverted[name, which] = results[size][0][start:end].reshape(factor.shape)
                succeeded[name, which] = results[size][1][start:end]
                start = end

    new, failures = {}, {}
    for name, kept in old.items():
        spec = layers[name]
        fresh = KroneckerInverses.from_factors(spec, inverted[name, "phi"], inverted[name, "psi"])
        good = {which: succeeded[name, which] for which in ("phi", "psi")}
        new[name] = KroneckerInverses(
            _replace(kept.phi, fresh.phi, good["phi"], spec.batch),
            _replace(kept.psi, fresh.psi, good["psi"], spec.batch),
            None
            if kept.bias is None or fresh.bias is None
            else _replace(kept.bias, fresh.bias, good["phi"], spec.batch),
        )
        failures[name] = sum((~flags).sum(dtype=jnp.int32) for flags in good.values())
    return new, failures


def _replace(old: Array, new: Array, good: Array, batch: tuple[int, ...]) -> Array:
    """The new inverses where they are good; matrix by matrix, or block by block."""
    blocks = good.size // math.prod(batch)
    flags = good.reshape(*batch, *((blocks,) if blocks > 1 else ()))
    flags = flags.reshape(*flags.shape, *(1,) * (old.ndim - flags.ndim))
    return jnp.where(flags, new.astype(old.dtype), old)


def _invert_diagonals(
    diagonals: Float[Array, "batch n"],
) -> tuple[Float[Array, "batch n"], Bool[Array, " batch"]]:
    """Inverts diagonal matrices; also says which ones are positive definite."""
    inverses = 1 / diagonals
    return inverses, (jnp.isfinite(inverses) & (inverses > 0)).all(-1)


def _invert_with_retries(
    matrices: Float[Array, "batch n n"], inverse: Inverse
) -> tuple[Float[Array, "batch n n"], Bool[Array, " batch"]]:
    """Inverts a stack, the failures again with more damping; also says which ones succeeded."""
    # Divided before it is summed: the sum may overflow, and no share of infinity is a number.
    mean_diagonal = (jnp.diagonal(matrices, axis1=-2, axis2=-1) / matrices.shape[-1]).sum(-1)
    shares = jnp.asarray(DAMPING_SHARES, matrices.dtype)

    # Each attempt inverts all of the stack: then the inverse is compiled once, and no results are merged.
    def attempt(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        tried, _, good = carry
        tried = jnp.where(good, tried, tried + 1)
        extra = shares[tried] * mean_diagonal
        # Compared here: an identity matrix from outside would be written to memory, and read.
        row, column = (jax.lax.broadcasted_iota(jnp.int32, matrices.shape, axis) for axis in (1, 2))
        results = inverse(jnp.where(row == column, matrices + extra[:, None, None], matrices))
        return tried, results, _is_good(results)

    def unfinished(carry: tuple[Array, Array, Array]) -> Array:
        tried, _, good = carry
        return (~good & (tried < len(DAMPING_SHARES) - 1)).any()

    none = jnp.zeros(len(matrices), jnp.int32)
    start = vary((none - 1, jnp.zeros_like(matrices), none > 0), varying_axes(matrices))
    _, results, good = jax.lax.while_loop(unfinished, attempt, start)
    return results, good


def _is_good(inverses: Float[Array, "batch n n"]) -> Bool[Array, " batch"]:
    """Finite, and positive on the diagonal, as the inverse of a positive definite matrix is."""
    diagonal = jnp.diagonal(inverses, axis1=-2, axis2=-1)
    return finite_matrices(inverses) & (diagonal > 0).all(-1)
