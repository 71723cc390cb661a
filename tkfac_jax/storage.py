"""How factors and inverses stand in the state: their dtypes, and how they are divided over a mesh."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tkfac_jax.factors import KroneckerFactors
from tkfac_jax.inverses import KroneckerInverses, keeps_bias_apart
from tkfac_jax.layers import LayerSpec
from tkfac_jax.meshes import place, unfilled

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
    return KroneckerFactors(
        unfilled(factors.phi, (*spec.batch, *spec.phi.shape)),
        unfilled(factors.psi, (*spec.batch, *spec.psi.shape)),
        unfilled(factors.delta, spec.batch),
    )


def inverses_in_shape(spec: LayerSpec, inverses: KroneckerInverses) -> KroneckerInverses:
    """A layer's stored inverses in their own shapes."""
    rows = spec.phi.size - 1
    shape = (rows, rows) if keeps_bias_apart(spec) else spec.phi.shape
    bias = inverses.bias
    return KroneckerInverses(
        unfilled(inverses.phi, (*spec.batch, *shape)),
        unfilled(inverses.psi, (*spec.batch, *spec.psi.shape)),
        None if bias is None else unfilled(bias, (*spec.batch, spec.phi.size)),
    )
