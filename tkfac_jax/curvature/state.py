"""The state of the optimizer, and its factors and inverses before the first statistics.

Those come from one compiled program. Called one by one, its operations would be compiled for each size of factor: in a
new process that takes seconds, even for a network of three small layers.
"""

import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from tkfac_jax.curvature.damping import Damping
from tkfac_jax.curvature.damping_argument import DampingArgument
from tkfac_jax.curvature.factors import KroneckerFactors, zero_factors
from tkfac_jax.curvature.inverses import KroneckerInverses, invert_damping
from tkfac_jax.curvature.storage import Factors, Inverses, Storage
from tkfac_jax.layers.spec import LayerSpec

Averaging = Literal["factors", "moments"]


class LayerFaults(NamedTuple):
    """How often the numbers of one layer went wrong.

    Attributes:
      statistics: statistics that were not finite, or made factors that were not.
      inversions: inverses that could not be computed, so that the old one stayed.
      updates: steps that were not finite and became zero.
    """

    statistics: Int[Array, ""]
    inversions: Int[Array, ""]
    updates: Int[Array, ""]


class TkfacState(NamedTuple):
    """The state of `scale_by_tkfac`: arrays and dictionaries of arrays only.

    Attributes:
      step: number of updates so far.
      factors: by layer, the moving averages; of the damped factors under `averaging="factors"`, of the
        undamped ones under `averaging="moments"`. With `shard_state=True`, these and the inverses may be filled up
        with zeros along one axis.
      inverses: by layer, the inverses of the damped factors, as of the last refresh.
      factor_updates: number of statistics that have entered the averages.
      skipped_statistics: number of statistics that were left out because they were not finite.
      failed_inversions: number of inverses that could not be computed, so that the old one stayed.
      refreshed: by layer, the step at which all of its inverses were last computed; 0 at first.
      skipped_updates: number of layers' steps that were left out because they were not finite.
      faults: by layer, how often its numbers went wrong.
    """

    step: Int[Array, ""]
    factors: dict[str, KroneckerFactors]
    inverses: dict[str, KroneckerInverses]
    factor_updates: Int[Array, ""]
    skipped_statistics: Int[Array, ""]
    failed_inversions: Int[Array, ""]
    refreshed: dict[str, Int[Array, ""]]
    skipped_updates: Int[Array, ""]
    faults: dict[str, LayerFaults]


def find_state(opt_state: Any) -> TkfacState:
    """The one `TkfacState` in an optimizer's state.

    Raises:
      ValueError: there is none, or there are several.
    """
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda leaf: isinstance(leaf, TkfacState))
    found = [leaf for leaf in leaves if isinstance(leaf, TkfacState)]
    if len(found) != 1:
        msg = (
            f"the optimizer state holds {len(found)} TkfacState; expected exactly one. Give the state of an optimizer "
            "with one scale_by_tkfac in it, such as tkfac(...)."
        )
        raise ValueError(msg)
    return found[0]


def initial_curvature(
    layers: Mapping[str, LayerSpec], damping: Damping, averaging: Averaging, storage: Storage
) -> tuple[Factors, Inverses]:
    """Factors of zeros, damped if the damped ones are averaged, and the inverses of the damping alone.

    Args:
      layers: the layers.
      damping: the damping at step 0.
      averaging: what the factors are averages of.
      storage: how factors and inverses stand in the state.

    Returns:
      Factors and inverses as they stand in the state.
    """
    return _initial_curvature(DampingArgument(damping), tuple(layers.items()), averaging, storage)


@functools.partial(jax.jit, static_argnames=("items", "averaging", "storage"))
def _initial_curvature(
    argument: DampingArgument,
    items: tuple[tuple[str, LayerSpec], ...],
    averaging: Averaging,
    storage: Storage,
) -> tuple[Factors, Inverses]:
    layers = dict(items)
    unknown = {name: zero_factors(spec) for name, spec in layers.items()}
    damped = argument.damping.damp(unknown, layers, jnp.zeros((), jnp.int32))
    inverses = invert_damping(damped, layers, storage.inverse_dtype)
    factors = damped if averaging == "factors" else unknown
    return storage.store_factors(factors), storage.store_inverses(inverses)
