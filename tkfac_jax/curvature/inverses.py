"""The inverses of a layer's damped factors: all those of one size are inverted as one stack."""

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tkfac_jax.curvature.factors import KroneckerFactors
from tkfac_jax.layers.spec import LayerSpec
from tkfac_jax.linalg.divided_stacks import Devices, Stack, map_matrices
from tkfac_jax.linalg.inversion import ImprovingInverse, Inverse, invert_diagonals, invert_stack

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
        if spec.bias_apart:
            return cls(phi[..., :-1, :-1], psi, phi[..., -1, :])
        return cls(phi, psi, None)

    def phi_matrix(self) -> Float[Array, "..."]:
        """The inverse of phi in the form of the factor."""
        if self.bias is None:
            return self.phi
        column, row = self.bias[..., :-1, None], self.bias[..., None, :]
        return jnp.concatenate([jnp.concatenate([self.phi, column], -1), row], -2)


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
                inverses, good = invert_diagonals(factor.reshape(-1, structure.size))
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
        results = map_matrices(lambda stack: invert_stack(stack, inverse), stacks, devices)
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
            inverses, good = invert_diagonals(diagonals.reshape(-1, structure.block))
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


class Share(NamedTuple):
    """One share of the layers, whose inverses are refreshed while those of the others stay.

    Attributes:
      number: which one, from 0 to `of - 1`; may be traced.
      of: how many shares there are. If they are more than layers, some are empty.
    """

    number: int | Array
    of: int


def shares(layers: Mapping[str, LayerSpec], of: int) -> list[list[str]]:
    """Divides layers into shares of about equal cost of their inverses; more shares than layers leave some empty."""
    plan: list[list[str]] = [[] for _ in range(of)]
    loads = [0] * len(plan)
    cost = {name: _cost_of_inverses(spec) for name, spec in layers.items()}
    for name in sorted(cost, key=lambda name: -cost[name]):
        lightest = loads.index(min(loads))
        plan[lightest].append(name)
        loads[lightest] += cost[name]
    return plan


def _cost_of_inverses(spec: LayerSpec) -> int:
    """The cost of a layer's inverses, in a common unit."""
    return math.prod(spec.batch) * sum(
        structure.size
        if structure.kind == "diagonal"
        else structure.num_blocks * structure.block**3
        for structure in (spec.phi, spec.psi)
    )
