"""From statistics to Kronecker factors, and the moving average of either."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tkfac_jax.fisher.layer_statistics import LayerStatistics
from tkfac_jax.layers.spec import LayerSpec

Decay = float | Array | Callable[[Array], Array]


class KroneckerFactors(NamedTuple):
    """A layer's Fisher block as `delta * phi (x) psi`, or the damped factors of that block.

    Attributes:
      phi: the input factor, `(d_in, d_in)` unless the layer's spec says otherwise; symmetric. Undamped, under
        the trace-restricted rule, its trace is 1.
      psi: the output factor, `(d_out, d_out)`; likewise.
      delta: the coefficient. Under the trace-restricted rule it is the trace of the block, in units
        of curvature (squared derivatives of the loss).
    """

    phi: Float[Array, "..."]
    psi: Float[Array, "..."]
    delta: Float[Array, "*batch"]


def kronecker_factors(statistics: LayerStatistics) -> KroneckerFactors:
    """The Kronecker factors of one layer.

    `delta = trace`, `Phi = input_moment / trace`, `Psi = output_moment / trace`.

    Args:
      statistics: the layer's statistics under either rule. Under `independent`, whose trace is 1,
        the result is KFAC's `E[L]`, `E[G]` with a coefficient of 1.

    Returns:
      The factors. A layer without signal (trace 0) has factors of 0.

    Source: Gao et al. 2021, Eqs. (4.9) and (4.13).
    """
    trace = statistics.trace

    def normalise(moment: Array) -> Array:
        by = trace.reshape(*trace.shape, *(1,) * (moment.ndim - trace.ndim))
        # Times 0 and not 0, so that what is not finite stays so.
        return jnp.where(by > 0, moment / jnp.where(by > 0, by, 1), 0 * moment)

    return KroneckerFactors(
        normalise(statistics.input_moment),
        normalise(statistics.output_moment),
        jnp.maximum(trace, 0),
    )


def zero_factors(spec: LayerSpec) -> KroneckerFactors:
    """The factors of a layer about which nothing is known yet."""
    return KroneckerFactors(
        jnp.zeros((*spec.batch, *spec.phi.shape), spec.dtype),
        jnp.zeros((*spec.batch, *spec.psi.shape), spec.dtype),
        jnp.zeros(spec.batch, spec.dtype),
    )


def average_factors(
    old: Mapping[str, KroneckerFactors], new: Mapping[str, KroneckerFactors], decay: Array
) -> dict[str, KroneckerFactors]:
    """Moving average of factors: `decay * old + (1 - decay) * new`.

    Source: Gao et al. 2021, Eqs. (5.18) and (5.19), where the factors are damped ones.
    """
    return {name: _average(old[name], new[name], decay) for name in old}


def average_moments(
    old: Mapping[str, KroneckerFactors], new: Mapping[str, KroneckerFactors], decay: Array
) -> dict[str, KroneckerFactors]:
    """Moving average of the statistics behind undamped factors.

    The three statistics `delta * phi`, `delta * psi` and `delta` are averaged, so that the trace of
    the block stays the exact trace of the averaged Fisher.
    """
    return {
        name: kronecker_factors(
            LayerStatistics(*_average(_moments(old[name]), _moments(new[name]), decay))
        )
        for name in old
    }


def _moments(factors: KroneckerFactors) -> KroneckerFactors:
    def times_delta(factor: Array) -> Array:
        delta = factors.delta
        return factor * delta.reshape(*delta.shape, *(1,) * (factor.ndim - delta.ndim))

    return KroneckerFactors(times_delta(factors.phi), times_delta(factors.psi), factors.delta)


def _average(old: KroneckerFactors, new: KroneckerFactors, decay: Array) -> KroneckerFactors:
    def mean(old: Array, new: Array) -> Array:
        weight = decay.astype(old.dtype)
        return weight * old + (1 - weight) * new.astype(old.dtype)

    return jax.tree.map(mean, old, new)


def decay_at(decay: Decay, updates: Int[Array, ""]) -> Float[Array, ""]:
    """The weight of the old average at a factor update.

    Args:
      decay: a number (the first update then replaces what was there), or a function of the number
        of earlier updates.
      updates: the number of earlier updates.

    Returns:
      The weight, in [0, 1].
    """
    if callable(decay):
        return jnp.asarray(decay(updates), dtype=float)
    return jnp.where(updates == 0, 0.0, jnp.asarray(decay, dtype=float))
