"""How the damping compares with the curvature, layer by layer."""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float

from tkfac_jax.curvature.damping import Damping, FactoredDamping, RelativeDamping, at_step
from tkfac_jax.curvature.factors import KroneckerFactors
from tkfac_jax.curvature.state import Averaging, TkfacState
from tkfac_jax.layers.spec import LayerSpec
from tkfac_jax.linalg.factor_structure import Structure


def damping_ratios(
    state: TkfacState, active: Mapping[str, LayerSpec], damping: Damping, averaging: Averaging
) -> dict[str, tuple[Array | None, Array | None]]:
    """The damping ratios of all layers."""
    if isinstance(damping, RelativeDamping):
        share = jnp.asarray(at_step(damping.share, state.step))
        shares = {name: jnp.broadcast_to(share, spec.batch) for name, spec in active.items()}
        return {name: (own, own) for name, own in shares.items()}
    # Diagonals are enough, and have no padding.
    layers = {
        name: dataclasses.replace(
            spec, phi=_diagonal_structure(spec.phi), psi=_diagonal_structure(spec.psi)
        )
        for name, spec in active.items()
    }
    factors = {name: _diagonals(spec, state.factors[name]) for name, spec in active.items()}
    halves = {
        name: KroneckerFactors(factor.phi / 2, factor.psi / 2, factor.delta)
        for name, factor in factors.items()
    }
    # A damping is a multiple of the factor and one of the identity; the second, which depends on the
    # ratio of the two factors at most, is what is left as both vanish. That ratio is the same before and
    # after factored damping, so that the damped averages do as well.
    whole = damping.damp(factors, layers, state.step)
    half = damping.damp(halves, layers, state.step)

    def ratio(name: str, which: str) -> Array:
        diagonal, delta = getattr(factors[name], which), factors[name].delta
        added = jnp.mean(2 * getattr(half[name], which) - getattr(whole[name], which), -1)
        if averaging == "moments":
            mean = delta * diagonal.mean(-1)
        elif isinstance(damping, FactoredDamping):
            mean = jnp.sqrt(delta) * jnp.maximum(diagonal.mean(-1) - added, 0)
        else:
            mean = delta / diagonal.shape[-1]
        return added / mean

    return {name: (ratio(name, "phi"), ratio(name, "psi")) for name in active}


def _diagonal_structure(structure: Structure) -> Structure:
    return Structure("diagonal", structure.size, structure.size)


def _diagonals(spec: LayerSpec, factors: KroneckerFactors) -> KroneckerFactors:
    """The diagonals of a layer's factors, in a dtype to compute with."""
    dtype = jnp.promote_types(factors.phi.dtype, spec.dtype)
    return KroneckerFactors(
        _diagonal(spec.phi, factors.phi).astype(dtype),
        _diagonal(spec.psi, factors.psi).astype(dtype),
        factors.delta.astype(dtype),
    )


def _diagonal(structure: Structure, factor: Array) -> Float[Array, "*batch size"]:
    if structure.kind == "diagonal":
        return factor
    diagonal = jnp.diagonal(factor, axis1=-2, axis2=-1)
    if structure.kind == "full":
        return diagonal
    return diagonal.reshape(*diagonal.shape[:-2], -1)[..., : structure.size]
