"""Damping: what is added to the Kronecker factors before they are inverted.

A damping has one method, `damp(factors, layers, step)`, which sees all layers at once because the
trace damping of dense layers depends on the convolutions. All values of damping but the share of `relative_damping`
are in units of curvature, so that a damping of `lambda` means adding `lambda` times the identity to the Fisher.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array

from tkfac_jax.curvature.factors import KroneckerFactors
from tkfac_jax.layers.spec import LayerSpec
from tkfac_jax.linalg.factor_structure import Structure, add_to_diagonal, trace

Value = float | Array | Callable[[Array], Any]


@runtime_checkable
class Damping(Protocol):
    """What the optimizer needs of a damping."""

    def damp(
        self,
        factors: Mapping[str, KroneckerFactors],
        layers: Mapping[str, LayerSpec],
        step: Array,
    ) -> dict[str, KroneckerFactors]:
        """The damped factors of all layers; `delta` is handed on as it is.

        What is compiled with a damping is kept for it: like all that is traced, it must depend on nothing that changes.
        """
        ...


class NormalDamping(NamedTuple):
    """See `normal_damping`."""

    value: Value

    def damp(
        self,
        factors: Mapping[str, KroneckerFactors],
        layers: Mapping[str, LayerSpec],
        step: Array,
    ) -> dict[str, KroneckerFactors]:
        """Damps all layers by Eq. (5.15)."""
        value = at_step(self.value, step)
        return {
            name: _normal(layers[name], layer, layer.delta, value)
            for name, layer in factors.items()
        }


class TraceDamping(NamedTuple):
    """See `trace_damping`."""

    floor: Value
    dense_damping: Value

    def damp(
        self,
        factors: Mapping[str, KroneckerFactors],
        layers: Mapping[str, LayerSpec],
        step: Array,
    ) -> dict[str, KroneckerFactors]:
        """Damps convolutions by Eq. (5.16) and dense layers by Eqs. (5.17) and (5.15)."""
        floor, dense_damping = at_step(self.floor, step), at_step(self.dense_damping, step)
        expansion = _expansion([layer.delta for layer in factors.values()], floor)
        damped = {}
        for name, layer in factors.items():
            spec = layers[name]
            if spec.kind == "conv":
                delta = jnp.maximum(layer.delta, jnp.asarray(floor, layer.delta.dtype))
                shifts = delta / spec.d_in, delta / spec.d_out
                damped[name] = _damped(spec, layer, jnp.sqrt(delta), *shifts)
            else:
                delta = layer.delta * expansion.astype(layer.delta.dtype)
                damped[name] = _normal(spec, layer, delta, dense_damping)
        return damped


class FactoredDamping(NamedTuple):
    """See `factored_damping`."""

    value: Value

    def damp(
        self,
        factors: Mapping[str, KroneckerFactors],
        layers: Mapping[str, LayerSpec],
        step: Array,
    ) -> dict[str, KroneckerFactors]:
        """Damps all layers by factored Tikhonov damping."""
        value = at_step(self.value, step)
        damped = {}
        for name, layer in factors.items():
            spec = layers[name]
            shift = _root(value, layer.delta.dtype)
            mean_in = trace(spec.phi, layer.phi) / spec.d_in
            mean_out = trace(spec.psi, layer.psi) / spec.d_out
            # A layer without signal has traces of 0, and any split of the damping is as good.
            alive = (mean_in > 0) & (mean_out > 0)
            pi = jnp.sqrt(jnp.where(alive, mean_in, 1) / jnp.where(alive, mean_out, 1))
            damped[name] = _damped(spec, layer, jnp.sqrt(layer.delta), pi * shift, shift / pi)
        return damped


class RelativeDamping(NamedTuple):
    """See `relative_damping`."""

    share: Value

    def damp(
        self,
        factors: Mapping[str, KroneckerFactors],
        layers: Mapping[str, LayerSpec],
        step: Array,
    ) -> dict[str, KroneckerFactors]:
        """Damps each factor by a share of its own mean eigenvalue."""
        share = at_step(self.share, step)
        return {
            name: KroneckerFactors(
                _with_share(layers[name].phi, layer.phi, share),
                _with_share(layers[name].psi, layer.psi, share),
                layer.delta,
            )
            for name, layer in factors.items()
        }


def normal_damping(value: Value) -> NormalDamping:
    """The damping of TKFAC_nor: `sqrt(delta) Phi + sqrt(lambda) I`, `sqrt(delta) Psi + sqrt(lambda) I`.

    Args:
      value: lambda, in units of curvature: a positive number, a schedule (a function of the step)
        or a traced scalar.

    Returns:
      A damping for `scale_by_tkfac` and `tkfac`. A bare value given there means the same.

    Raises:
      ValueError: the value is a number and not positive.

    Source: Gao et al. 2021, Eq. (5.15).
    """
    _check_positive("damping", value)
    return NormalDamping(value)


def trace_damping(floor: Value, dense_damping: Value) -> TraceDamping:
    """The damping of TKFAC_new, which ties the damping of convolutions to their traces.

    With `d = max(floor, delta)`, convolutions use `sqrt(d) Phi + d / d_in I` and
    `sqrt(d) Psi + d / d_out I`; all other layers take `beta delta` for `delta`, where `beta` is the largest
    `d / delta` of all layers, and then normal damping. Layers of trace 0 do not count for `beta`.

    Args:
      floor: nu, the smallest trace that is believed, in units of curvature: a positive number, a
        schedule or a traced scalar.
      dense_damping: lambda of the dense layers' normal damping, likewise.

    Returns:
      A damping for `scale_by_tkfac` and `tkfac`, meant for the trace-restricted rule.

    Raises:
      ValueError: a value is a number and not positive.

    Source: Gao et al. 2021, Eqs. (5.16) and (5.17).
    """
    _check_positive("floor of trace damping", floor)
    _check_positive("dense_damping", dense_damping)
    return TraceDamping(floor, dense_damping)


def factored_damping(value: Value) -> FactoredDamping:
    """The damping of KFAC: `A + pi sqrt(lambda) I`, `G + sqrt(lambda) / pi I`.

    `pi` is the root of the ratio of the factors' mean diagonals: the larger factor takes the larger
    part of the damping.

    Args:
      value: lambda, in units of curvature: a positive number, a schedule or a traced scalar.

    Returns:
      A damping for `scale_by_tkfac`; the one that `kfac` uses for a bare value.

    Raises:
      ValueError: the value is a number and not positive.

    Source: Martens and Grosse 2015, section 6.3.
    """
    _check_positive("damping", value)
    return FactoredDamping(value)


def relative_damping(share: Value) -> RelativeDamping:
    """The damping of `tkfacw`: each factor, of trace 1, with a share of its own mean eigenvalue added.

    With `d` rows, `Phi / tr(Phi) + share / d I`, and likewise for Psi. Neither the scale of the loss nor that of the
    layer enters, nor does the coefficient delta: what is left of the inverse is a direction, whose length means
    nothing. Let `scale_by_layer_norm_ratio` follow. A factor of trace 0, of a layer without signal, is taken for
    `I / d`.

    Unlike Eq. (5.16), whose `delta / d` is not homogeneous, it is the same for the loss and for any multiple of it.

    Args:
      share: the damping as a multiple of the factor's mean eigenvalue, a number without unit: positive, a schedule (a
        function of the step) or a traced scalar.

    Returns:
      A damping for `scale_by_tkfac`, for either rule; the one that `tkfacw` uses for a bare value.

    Raises:
      ValueError: the share is a number and not positive.

    Source: after Gao et al. 2021, Eqs. (4.9) and (5.16).
    """
    _check_positive("share of relative damping", share)
    return RelativeDamping(share)


def at_step(value: Value, step: Array) -> float | Array:
    """A value of damping at a step."""
    return value(step) if callable(value) else value


def _root(value: float | Array, dtype: Any) -> Array:
    return jnp.sqrt(jnp.asarray(value, dtype))


def _normal(
    spec: LayerSpec, factors: KroneckerFactors, delta: Array, damping: float | Array
) -> KroneckerFactors:
    shift = jnp.broadcast_to(_root(damping, delta.dtype), delta.shape)
    return _damped(spec, factors, jnp.sqrt(delta), shift, shift)


def _damped(
    spec: LayerSpec, factors: KroneckerFactors, root: Array, phi_shift: Array, psi_shift: Array
) -> KroneckerFactors:
    """`root Phi + phi_shift I`, `root Psi + psi_shift I`."""

    def scaled(factor: Array) -> Array:
        return factor * root.reshape(*root.shape, *(1,) * (factor.ndim - root.ndim))

    return KroneckerFactors(
        add_to_diagonal(spec.phi, scaled(factors.phi), phi_shift),
        add_to_diagonal(spec.psi, scaled(factors.psi), psi_shift),
        factors.delta,
    )


def _with_share(structure: Structure, factor: Array, share: float | Array) -> Array:
    """A factor of trace 1, and a share of its mean eigenvalue on the diagonal."""
    total = trace(structure, factor)
    # Divided entry by entry, not multiplied by a reciprocal: this is exact for any power of two.
    by = jnp.where(total > 0, total, 1)
    own = factor / by.reshape(*by.shape, *(1,) * (factor.ndim - by.ndim))
    without_signal = jnp.where(total > 0, 0, jnp.ones((), total.dtype))
    shift = (without_signal + jnp.asarray(share, total.dtype)) / structure.size
    return add_to_diagonal(structure, own, shift)


def _expansion(deltas: list[Array], floor: float | Array) -> Array:
    """The factor beta of Eq. (5.17), at least 1 and finite."""
    ratios = [
        jnp.where(delta > 0, jnp.maximum(floor / jnp.where(delta > 0, delta, 1), 1), 1)
        for delta in deltas
    ]
    beta = jnp.concatenate([ratio.ravel() for ratio in ratios]).max()
    # floor / delta overflows for the smallest deltas; the root of the largest number leaves room
    # for the product with another layer's delta.
    return jnp.minimum(beta, jnp.sqrt(jnp.finfo(beta.dtype).max))


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, int | float) and not value > 0:
        msg = f"{name}={value}; expected a positive number, a schedule or a traced scalar."
        raise ValueError(msg)
