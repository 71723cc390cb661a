"""How factors and inverses stand in the state: their dtypes, and how they are divided over a mesh."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tkfac_jax.curvature.factors import KroneckerFactors
from tkfac_jax.curvature.inverses import KroneckerInverses
from tkfac_jax.layers.spec import LayerSpec
from tkfac_jax.linalg.meshes import may_be_filled_up, place, unfilled

Factors = dict[str, KroneckerFactors]
Inverses = dict[str, KroneckerInverses]


class Storage(NamedTuple):
    """How factors and inverses are stored.

    Attributes:
      factor_dtype: dtype of the stored factors; None: that of the layer's statistics.
      inverse_dtype: dtype of the stored inverses; None: likewise.
      mesh: mesh of the program under `jax.jit`, or None.
      divided: factors and inverses are divided over the mesh, not kept whole on each of its devices.
    """

    factor_dtype: Any = None
    inverse_dtype: Any = None
    mesh: Mesh | None = None
    divided: bool = False

    def store_factors(self, factors: Mapping[str, KroneckerFactors]) -> Factors:
        """Factors as they stand in the state."""
        stored = dict(factors)
        if self.factor_dtype is not None:
            stored = {
                name: KroneckerFactors(
                    f.phi.astype(self.factor_dtype), f.psi.astype(self.factor_dtype), f.delta
                )
                for name, f in factors.items()
            }
        return self._place(stored)

    def load_factors(
        self, factors: Mapping[str, KroneckerFactors], layers: Mapping[str, LayerSpec]
    ) -> Factors:
        """Factors in their own shapes, in a dtype to compute with: that of the statistics, or their own if wider."""
        return {
            name: jax.tree.map(
                lambda array, dtype=layers[name].dtype: array.astype(
                    jnp.promote_types(array.dtype, dtype)
                ),
                factors_in_shape(layers[name], factor),
            )
            for name, factor in factors.items()
        }

    def store_inverses(self, inverses: Mapping[str, KroneckerInverses]) -> Inverses:
        """Inverses, of the dtype in which they are stored, as they stand in the state."""
        return self._place(dict(inverses))

    def _place(self, tree: Any) -> Any:
        mesh = self.mesh
        if mesh is None:
            return tree
        return jax.tree.map(lambda array: place(array, mesh, self.divided), tree)


def factors_in_shape(spec: LayerSpec, factors: KroneckerFactors) -> KroneckerFactors:
    """A layer's stored factors in their own shapes."""
    return KroneckerFactors(*map(unfilled, factors, _factor_shapes(spec)))


def inverses_in_shape(spec: LayerSpec, inverses: KroneckerInverses) -> KroneckerInverses:
    """A layer's stored inverses in their own shapes."""
    phi, psi, bias = _inverse_shapes(spec)
    return KroneckerInverses(
        unfilled(inverses.phi, phi),
        unfilled(inverses.psi, psi),
        None if inverses.bias is None or bias is None else unfilled(inverses.bias, bias),
    )


def check_shapes(
    factors: Mapping[str, KroneckerFactors],
    inverses: Mapping[str, KroneckerInverses],
    layers: Mapping[str, LayerSpec],
) -> None:
    """Refuses factors and inverses of a state whose shapes are not those of the layers, or filled up from them.

    Raises:
      ValueError: those of a layer are not.
    """
    for name, spec in layers.items():
        for what, arrays, expected in (
            ("factors", factors[name], _factor_shapes(spec)),
            ("inverses", inverses[name], _inverse_shapes(spec)),
        ):
            received = tuple(None if array is None else jnp.shape(array) for array in arrays)
            if not all(map(_may_be_filled, received, expected)):
                msg = (
                    f"layer '{name}': the state's {what} have shapes {received}; expected {expected}. Give the state "
                    "that an optimizer of these layers has made (a checkpoint of other layers, or of another format, "
                    "fits no more), and of one with an axis of devices one device's: "
                    "jax.tree.map(lambda leaf: leaf[0], state)."
                )
                raise ValueError(msg)


def _factor_shapes(spec: LayerSpec) -> tuple[tuple[int, ...], ...]:
    """The shapes of phi, psi and delta."""
    return (*spec.batch, *spec.phi.shape), (*spec.batch, *spec.psi.shape), spec.batch


def _inverse_shapes(
    spec: LayerSpec,
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...] | None]:
    """The shapes of the inverses of phi and psi, and of the bias's row of the first, if it is kept apart."""
    psi = (*spec.batch, *spec.psi.shape)
    if not spec.bias_apart:
        return (*spec.batch, *spec.phi.shape), psi, None
    rows = spec.phi.size - 1
    return (*spec.batch, rows, rows), psi, (*spec.batch, rows + 1)


def _may_be_filled(received: tuple[int, ...] | None, expected: tuple[int, ...] | None) -> bool:
    """Whether an array has its own shape or, divided over a mesh, one that is filled up along one axis."""
    if received is None or expected is None:
        return received is expected
    if received == expected:
        return True
    if len(received) != len(expected) or not may_be_filled_up(expected):
        return False
    more = [have - want for have, want in zip(received, expected, strict=True)]
    return min(more, default=0) >= 0 and sum(extra > 0 for extra in more) <= 1
