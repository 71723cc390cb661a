"""Inverses made of products of matrices alone, from the inverses in use: for GPUs and TPUs."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tkfac_jax.linalg.cholesky import cholesky_inverse
from tkfac_jax.linalg.inversion import Inverse
from tkfac_jax.linalg.meshes import vary, varying_axes

# The iteration converges if the eigenvalues of `M X` are below 2. Where the largest one found is above LARGEST, X is
# scaled so that it is at LARGEST were it found MARGIN times too small.
POWER_ITERATIONS, LARGEST, MARGIN = 8, 1.5, 1.1

# Norm of the residual before the last iteration from which on an inverse is not taken. Below it, what does not fall
# any more is rounding.
LARGEST_RESIDUAL = 0.03


@dataclasses.dataclass(frozen=True)
class NewtonSchulzInverse:
    """See `newton_schulz_inverse`."""

    otherwise: Inverse
    max_iterations: int
    tolerance: float

    def __call__(self, matrices: Float[Array, "batch n n"]) -> Float[Array, "batch n n"]:
        """Inverts matrices of whose inverses nothing is known."""
        return self.otherwise(matrices)

    def improve(
        self, matrices: Float[Array, "batch n n"], guesses: Float[Array, "batch n n"]
    ) -> tuple[Float[Array, "batch n n"], Bool[Array, " batch"]]:
        """Inverts matrices of whose inverses there are guesses.

        Returns:
          The inverses, and for which matrices they were reached; where not, there is no more to say of them.
        """
        products = _product(matrices, guesses)
        eigenvalues = _largest_eigenvalues(products)
        scales = jnp.where(eigenvalues > LARGEST, LARGEST / (MARGIN * eigenvalues), 1)
        guesses, products = (scales[:, None, None] * array for array in (guesses, products))

        def iterate(state: _Iterate) -> _Iterate:
            return improved(state, _product(matrices, state.inverses))

        def improved(state: _Iterate, products: Array) -> _Iterate:
            # Compared here: an identity matrix would be read from memory.
            row, column = (
                jax.lax.broadcasted_iota(jnp.int32, products.shape, axis) for axis in (1, 2)
            )
            residuals = jnp.where(row == column, 1 - products, -products)
            traces = (residuals * residuals.mT).sum((1, 2))
            norms = jnp.linalg.norm(residuals, axis=(1, 2))
            falling = traces < state.traces
            new = 2 * state.inverses - _product(state.inverses, products)
            return _Iterate(
                state.iterations + 1,
                jnp.where(falling[:, None, None], new, state.inverses),
                jnp.where(falling, traces, state.traces),
                jnp.where(falling, norms, state.norms),
                falling & (norms > self.tolerance),
            )

        nothing = jnp.full_like(scales, jnp.inf)
        start = _Iterate(jnp.zeros((), jnp.int32), guesses, nothing, nothing, nothing > 0)
        found = jax.lax.while_loop(
            lambda state: state.going_on.any() & (state.iterations < self.max_iterations),
            iterate,
            vary(improved(start, products), varying_axes(products)),
        )
        inverses = (found.inverses + found.inverses.mT) / 2
        return inverses, found.norms < LARGEST_RESIDUAL


class _Iterate(NamedTuple):
    """Where the iteration is.

    Attributes:
      iterations: their number.
      inverses: the inverses.
      traces: of the squares of the residuals before the last iteration, `sum (1 - eigenvalue of M X)^2`. In exact
        arithmetic they fall whenever the iteration converges, while norms may rise at first.
      norms: the Frobenius norms of these residuals, which include what rounding leaves.
      going_on: for which matrices there is more to do.
    """

    iterations: Int[Array, ""]
    inverses: Float[Array, "batch n n"]
    traces: Float[Array, " batch"]
    norms: Float[Array, " batch"]
    going_on: Bool[Array, " batch"]


def newton_schulz_inverse(
    otherwise: Inverse = cholesky_inverse, *, max_iterations: int = 12, tolerance: float = 1e-3
) -> NewtonSchulzInverse:
    """An `inverse` for accelerators, which starts at the inverses in use.

    The Newton-Schulz iteration `X <- X (2 I - M X)` squares the residual `I - M X`, and consists of two products of
    matrices, which a GPU makes many times faster than it factorises. It takes few iterations where little has changed
    since the inverses in use were computed: at short intervals, once the first averages have settled. On a CPU
    `cholesky_inverse` is much faster.

    Args:
      otherwise: inverts those matrices that the iteration does not reach within `max_iterations`, with retries at more
        damping as usual: when there is nothing yet but damping, when a matrix is not positive definite, and when its
        condition is too bad for the iteration in the dtype of the factor.
      max_iterations: at least 1.
      tolerance: Frobenius norm of the residual, below 1, under which one more iteration is the last. The relative
        error is its square at most; what rounding leaves; or, where `max_iterations` end it, at most 1e-3.

    Returns:
      The `inverse` for `scale_by_tkfac` and the optimizers.

    Raises:
      ValueError: a number is out of its range.

    Source: Schulz 1933, "Iterative Berechnung der reziproken Matrix"; not in the paper.
    """
    if max_iterations < 1:
        msg = f"max_iterations={max_iterations}; expected at least 1."
        raise ValueError(msg)
    if not 0 < tolerance < 1:
        msg = f"tolerance={tolerance}; expected a number between 0 and 1."
        raise ValueError(msg)
    return NewtonSchulzInverse(otherwise, max_iterations, tolerance)


def _largest_eigenvalues(products: Float[Array, "batch n n"]) -> Float[Array, " batch"]:
    """About the largest eigenvalue of each product of two positive definite matrices, by power iterations."""
    batch, size, _ = products.shape
    # Without a pattern that a matrix could have.
    vectors = jnp.cos(jnp.arange(size, dtype=products.dtype) ** 2)[None, :, None]
    vectors = jnp.broadcast_to(vectors / math.sqrt(size), (batch, size, 1))
    norms = jnp.ones_like(products[:, :1, :1])
    for _ in range(POWER_ITERATIONS):
        vectors = _product(products, vectors / norms)
        norms = jnp.linalg.norm(vectors, axis=1, keepdims=True)
    return norms[:, 0, 0]


def _product(left: Array, right: Array) -> Array:
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)
