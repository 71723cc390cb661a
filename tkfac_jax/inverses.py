"""Inverses of symmetric positive definite matrices, in batches of equal size, and what to do when one fails."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tkfac_jax.division import Devices, Stack, map_matrices
from tkfac_jax.factors import KroneckerFactors
from tkfac_jax.finite import finite_matrices
from tkfac_jax.layers import LayerSpec
from tkfac_jax.meshes import vary, varying_axes
from tkfac_jax.threads import limit_lapack_threads

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
    """Inverts symmetric positive definite matrices by their Cholesky factors, on CPUs found by halves.

    Errors are of the size of those of LAPACK's factor and solve with the identity. By halves most of the work,
    `7/4 n^3` instead of `10/3 n^3` operations, is in matrix products.

    Args:
      matrices: the matrices; only the lower triangles are read.

    Returns:
      The inverses, symmetric up to rounding. Where a matrix is not positive definite, NaN.
    """
    limit_lapack_threads()
    return jax.lax.platform_dependent(
        matrices,
        cpu=_one_by_one,
        # On a GPU halves take as long, and each size of their products is searched for its fastest program.
        default=lambda matrices: _inverse_and_factor(matrices, 0)[0],
    )


def _one_by_one(matrices: Float[Array, "batch n n"]) -> Float[Array, "batch n n"]:
    """Inverts matrix by matrix.

    Batched LAPACK calls of jaxlib 0.10 wait inside XLA's CPU thread pool for tasks of the same pool: two of them in
    one program can take all its threads and never return. Single ones do not wait.
    """
    if len(matrices) == 1:
        return _by_halves(matrices[0])[None]
    return jax.lax.map(_by_halves, matrices)


def _by_halves(matrices: Float[Array, "*batch n n"]) -> Float[Array, "*batch n n"]:
    levels = min(LARGEST_LEVELS, (matrices.shape[-1] // SMALLEST_BLOCK).bit_length())
    if levels == 0:
        return _inverse_and_factor(matrices, levels)[0]
    # Nobody asks for the whole matrix's factor: one product less than where it is needed.
    halves = _Halves.of(matrices, levels)
    corner = _product(halves.lower, halves.below)
    return _join(halves.upper + _product(halves.below.mT, corner), corner.mT, corner, halves.lower)


def _inverse_and_factor(
    matrices: Float[Array, "*batch n n"], levels: int
) -> tuple[Float[Array, "*batch n n"], Float[Array, "*batch n n"]]:
    """The inverses, and those of the Cholesky factors: all but the blocks of the last level are matrix products."""
    if levels == 0:
        identity = jnp.eye(matrices.shape[-1], dtype=matrices.dtype)
        identity = jnp.broadcast_to(identity, matrices.shape)
        factor = jax.lax.linalg.cholesky(matrices, symmetrize_input=False)
        factor = jax.lax.linalg.triangular_solve(factor, identity, left_side=True, lower=True)
        return _product(factor.mT, factor), factor
    halves = _Halves.of(matrices, levels)
    below = _product(halves.lower_factor, halves.below)
    corner = _product(halves.lower_factor.mT, below)
    inverse = _join(halves.upper + _product(below.mT, below), corner.mT, corner, halves.lower)
    above = jnp.zeros_like(below.mT)
    return inverse, _join(halves.upper_factor, above, below, halves.lower_factor)


class _Halves(NamedTuple):
    """What the inverses of `[[A, .], [B, C]]` are made of, with the Schur complement `S = C - B A^-1 B^T`.

    Attributes:
      upper: `A^-1`.
      upper_factor: the inverse of A's Cholesky factor.
      below: `-B A^-1`.
      lower: `S^-1`.
      lower_factor: the inverse of S's Cholesky factor.
    """

    upper: Array
    upper_factor: Array
    below: Array
    lower: Array
    lower_factor: Array

    @classmethod
    def of(cls, matrices: Float[Array, "*batch n n"], levels: int) -> "_Halves":
        """Inverts A, and then S."""
        half = matrices.shape[-1] // 2
        upper, upper_factor = _inverse_and_factor(matrices[..., :half, :half], levels - 1)
        # The sign is changed here, where a slice is copied anyway.
        root = _product(-matrices[..., half:, :half], upper_factor.mT)
        rest = matrices[..., half:, half:] - _product(root, root.mT)
        lower, lower_factor = _inverse_and_factor(rest, levels - 1)
        return cls(upper, upper_factor, _product(root, upper_factor), lower, lower_factor)


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
      inverse: inverts a stack of symmetric positive definite matrices, shape `(n, d, d)`; one with a method `improve`
        starts at the inverses that are in use.
      devices: the devices that divide the work.

    Returns:
      The inverses, in the dtypes of the old ones, and for each layer how many of its matrices could not be
      inverted even with more damping: there the old inverse stays.
    """
    inverted, succeeded = {}, {}
    groups: dict[Any, dict[int, list[Any]]] = defaultdict(lambda: defaultdict(list))
    for name in old:
        for which in ("phi", "psi"):
            structure = getattr(layers[name], which)
            factor = _at_least_float32(factors[name], which)
            if structure.kind == "diagonal":
                inverses, good = _invert_diagonals(factor.reshape(-1, structure.size))
                inverted[name, which] = inverses.reshape(factor.shape)
                succeeded[name, which] = good
            else:
                size = structure.block
                guesses = None
                if isinstance(inverse, ImprovingInverse):
                    guesses = _in_use(old[name], which).astype(factor.dtype)
                    guesses = guesses.reshape(-1, size, size)
                stack = Stack(factor.reshape(-1, size, size), guesses)
                groups[factor.dtype][size].append((name, which, stack))

    for by_size in groups.values():
        stacks = {size: [stack for _, _, stack in members] for size, members in by_size.items()}
        results = map_matrices(lambda stack: _invert(stack, inverse), stacks, devices)
        for size, members in by_size.items():
            start = 0
            for name, which, stack in members:
                end = start + len(stack.matrices)
                shape = getattr(factors[name], which).shape
                inverted[name, which] = results[size][0][start:end].reshape(shape)
                succeeded[name, which] = results[size][1][start:end]
                start = end

    return _replace_good(old, layers, inverted, succeeded)


def invert_damping(
    factors: Mapping[str, KroneckerFactors], layers: Mapping[str, LayerSpec], dtype: Any = None
) -> dict[str, KroneckerInverses]:
    """Inverts factors that hold nothing but their damping, on the diagonal.

    Args:
      factors: the damped factors, by layer.
      layers: the layers.
      dtype: dtype of the inverses; None: that of the layer's statistics.

    Returns:
      The inverses; where the damping is 0 or not finite, identities.
    """
    inverted = {}
    for name, damped in factors.items():
        spec, found = layers[name], {}
        for which in ("phi", "psi"):
            structure = getattr(spec, which)
            factor = _at_least_float32(damped, which)
            whole = structure.kind != "diagonal"
            diagonals = jnp.diagonal(factor, axis1=-2, axis2=-1) if whole else factor
            inverses, good = _invert_diagonals(diagonals.reshape(-1, structure.block))
            inverses = jnp.where(good[:, None], inverses, 1).reshape(diagonals.shape)
            inverses = inverses.astype(spec.dtype if dtype is None else dtype)
            if whole:
                inverses = inverses[..., None] * jnp.eye(structure.block, dtype=inverses.dtype)
            found[which] = inverses
        inverted[name] = KroneckerInverses.from_factors(spec, found["phi"], found["psi"])
    return inverted


def _in_use(old: KroneckerInverses, which: str) -> Array:
    """One of the two inverses that are in use, in the form of its factor."""
    return old.phi_matrix() if which == "phi" else old.psi


def _at_least_float32(factors: KroneckerFactors, which: str) -> Array:
    """One of a layer's two factors, in a dtype that LAPACK knows."""
    factor = getattr(factors, which)
    return factor.astype(jnp.promote_types(factor.dtype, jnp.float32))


def _replace_good(
    old: Mapping[str, KroneckerInverses],
    layers: Mapping[str, LayerSpec],
    inverted: Mapping[tuple[str, str], Array],
    succeeded: Mapping[tuple[str, str], Array],
) -> tuple[dict[str, KroneckerInverses], dict[str, Int[Array, ""]]]:
    """The new inverses in the place of the old ones, and how many of each layer's are not good: there the old stay."""
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


def _invert(
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
