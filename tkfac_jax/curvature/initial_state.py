"""Factors and inverses before the first statistics.

They come from one compiled program. Called one by one, its operations would be compiled for each size of factor: in a
new process that takes seconds, even for a network of three small layers.
"""

import functools
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from tkfac_jax.curvature.damping import Damping, DampingArgument
from tkfac_jax.curvature.factors import zero_factors
from tkfac_jax.curvature.inverses import invert_damping
from tkfac_jax.curvature.storage import Factors, Inverses, Storage
from tkfac_jax.layers.spec import LayerSpec

Averaging = Literal["factors", "moments"]


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
