"""Inverses of symmetric positive definite matrices, in batches of equal size, and what to do when one fails."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tkfac_jax.factors import KroneckerFactors
from tkfac_jax.layers import LayerSpec

Inverse = Callable[[Array], Array]

# Shares of a matrix's mean diagonal that are added to it after a failed inversion, one retry each.
RETRY_DAMPING = (1e-4, 1e-2, 1.0)


class KroneckerInverses(NamedTuple):
    """The inverses of a layer's two damped factors, the bias's row of the first one apart.

    The inverse of phi is `[[phi, q], [q^T, s]]` with `bias = [q, s]`: kernel and bias are
    preconditioned without being concatenated.

    Attributes:
      phi: the kernel's rows and columns of the inverse of phi.
      psi: the inverse of psi.
      bias: the bias's row of the inverse of phi, the corner last; None for a layer without bias.
    """

    phi: Float[Array, "rows rows"]
    psi: Float[Array, "d_out d_out"]
    bias: Float[Array, " d_in"] | None

    @classmethod
    def from_matrices(
        cls, phi: Float[Array, "d_in d_in"], psi: Float[Array, "d_out d_out"], has_bias: bool
    ) -> "KroneckerInverses":
        """Takes the inverses as whole matrices."""
        return cls(phi[:-1, :-1], psi, phi[-1]) if has_bias else cls(phi, psi, None)

    def phi_matrix(self) -> Float[Array, "d_in d_in"]:
        """The inverse of phi as one matrix."""
        if self.bias is None:
            return self.phi
        return jnp.block([[self.phi, self.bias[:-1, None]], [self.bias[None, :]]])


def cholesky_inverse(matrices: Float[Array, "batch n n"]) -> Float[Array, "batch n n"]:
    """Inverts symmetric positive definite matrices by their Cholesky factors.

    Args:
      matrices: the matrices; only the lower triangles are read.

    Returns:
      The inverses, symmetric. Where a matrix is not positive definite, NaN.
    """
    # Batched LAPACK calls of jaxlib 0.10 wait inside XLA's CPU thread pool for tasks of the same pool:
    # two of them in one program can take all its threads and never return. Single ones do not wait.
    return jax.lax.platform_dependent(
        matrices,
        cpu=lambda matrices: jax.lax.map(_cholesky_inverse, matrices),
        default=_cholesky_inverse,
    )


def _cholesky_inverse(matrices: Float[Array, "*batch n n"]) -> Float[Array, "*batch n n"]:
    identity = jnp.broadcast_to(jnp.eye(matrices.shape[-1], dtype=matrices.dtype), matrices.shape)
    factor = jax.lax.linalg.cholesky(matrices, symmetrize_input=False)
    half = jax.lax.linalg.triangular_solve(factor, identity, left_side=True, lower=True)
    return jnp.matmul(half.mT, half, precision=jax.lax.Precision.HIGHEST)


def invert_factors(
    factors: Mapping[str, KroneckerFactors],
    old: Mapping[str, KroneckerInverses],
    layers: Mapping[str, LayerSpec],
    inverse: Inverse,
) -> tuple[dict[str, KroneckerInverses], Int[Array, ""]]:
    """Inverts the damped factors of all layers.

    Args:
      factors: the damped factors, by layer.
      old: the inverses that are in use.
      layers: the layers.
      inverse: inverts a stack of symmetric positive definite matrices, shape `(n, d, d)`.

    Returns:
      The inverses, and how many of them failed even with more damping: there the old one stays.
    """
    matrices = {
        (name, which): getattr(factors[name], which) for name in old for which in ("phi", "psi")
    }
    groups = defaultdict(list)
    for key, matrix in matrices.items():
        groups[matrix.shape, matrix.dtype].append(key)

    inverted, succeeded = {}, {}
    for keys in groups.values():
        results, good = _invert_with_retries(jnp.stack([matrices[key] for key in keys]), inverse)
        for i, key in enumerate(keys):
            inverted[key], succeeded[key] = results[i], good[i]

    new = {}
    for name, kept in old.items():
        candidate = KroneckerInverses.from_matrices(
            inverted[name, "phi"], inverted[name, "psi"], layers[name].has_bias
        )
        phi_good, psi_good = succeeded[name, "phi"], succeeded[name, "psi"]
        good = KroneckerInverses(phi_good, psi_good, None if kept.bias is None else phi_good)
        new[name] = jax.tree.map(jnp.where, good, candidate, kept)
    failures = jnp.stack([~good for good in succeeded.values()]).sum(dtype=jnp.int32)
    return new, failures


def _invert_with_retries(
    matrices: Float[Array, "batch n n"], inverse: Inverse
) -> tuple[Float[Array, "batch n n"], Bool[Array, " batch"]]:
    """Inverts a stack, the failures again with more damping; also says which ones succeeded."""
    mean_diagonal = jnp.trace(matrices, axis1=-2, axis2=-1) / matrices.shape[-1]
    shares = jnp.asarray(RETRY_DAMPING, matrices.dtype)
    first = inverse(matrices)

    def unfinished(carry: tuple[Array, Array, Array]) -> Array:
        attempt, _, good = carry
        return (attempt < len(RETRY_DAMPING)) & ~good.all()

    def retry(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        attempt, results, good = carry
        extra = shares[attempt] * mean_diagonal
        damped = matrices + extra[:, None, None] * jnp.eye(matrices.shape[-1], dtype=matrices.dtype)
        again = inverse(damped)
        kept = jnp.where(good[:, None, None], results, again)
        return attempt + 1, kept, good | _is_good(again)

    _, results, good = jax.lax.while_loop(
        unfinished, retry, (jnp.zeros((), jnp.int32), first, _is_good(first))
    )
    return results, good


def _is_good(inverses: Float[Array, "batch n n"]) -> Bool[Array, " batch"]:
    """Finite, and positive on the diagonal, as the inverse of a positive definite matrix is."""
    diagonal = jnp.diagonal(inverses, axis1=-2, axis2=-1)
    return jnp.isfinite(inverses).all((-2, -1)) & (diagonal > 0).all(-1)
