"""Damping: what is added to the Kronecker factors before they are inverted.

A damping has one method, `damp(factors, layers, step)`, which sees all layers at once because the
trace damping of dense layers depends on the convolutions. All values of damping are in units of
curvature, so that a damping of `lambda` means adding `lambda` times the identity to the Fisher.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tkfac_jax.curvature.factors import KroneckerFactors
from tkfac_jax.layers.spec import LayerSpec
from tkfac_jax.linalg.factor_structure import add_to_diagonal, trace

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


class _Identity:
    """Stands for an object that need not be hashable: only the same object is equal."""

    def __init__(self, value: Any):
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.value is other.value


def _without_array(leaf: Any) -> Any:
    """What is compared of a leaf: None for an array, a number itself, and of all else whether it is the same."""
    if isinstance(leaf, jax.Array):
        return None
    return leaf if isinstance(leaf, int | float) else _Identity(leaf)


@jax.tree_util.register_pytree_node_class
class DampingArgument:
    """A damping as an argument of compiled functions: its arrays are the leaves, and all else is its structure.

    The structures of two are equal if they are of one class, with equal numbers and otherwise the same objects.
    """

    def __init__(self, damping: Damping):
        """Takes the damping apart."""
        leaves, structure = jax.tree.flatten(damping)
        self._arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
        self._rest = structure, tuple(map(_without_array, leaves))

    @property
    def damping(self) -> Any:
        """The damping, with the arrays that this one has."""
        structure, rest = self._rest
        arrays = iter(self._arrays)
        leaves = [
            next(arrays) if leaf is None else leaf.value if isinstance(leaf, _Identity) else leaf
            for leaf in rest
        ]
        return jax.tree.unflatten(structure, leaves)

    def tree_flatten(self) -> tuple[list[Any], Any]:
        """The arrays, and all else."""
        return self._arrays, self._rest

    @classmethod
    def tree_unflatten(cls, auxiliary: Any, children: Sequence[Any]) -> "DampingArgument":
        """The inverse of `tree_flatten`; a child may be anything that JAX puts in an array's place."""
        new = object.__new__(cls)
        new._arrays, new._rest = list(children), auxiliary
        return new


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
        value = _at(self.value, step)
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
        floor, dense_damping = _at(self.floor, step), _at(self.dense_damping, step)
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
        value = _at(self.value, step)
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


def _at(value: Value, step: Array) -> float | Array:
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
