"""The state of the optimizer, and how statistics and inverses enter it."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from tkfac_jax.capture import LayerStatistics
from tkfac_jax.damping import Damping
from tkfac_jax.factors import (
    Decay,
    KroneckerFactors,
    average_factors,
    average_moments,
    decay_at,
    kronecker_factors,
    zero_factors,
)
from tkfac_jax.inverses import Inverse, KroneckerInverses, invert_factors
from tkfac_jax.layers import Layers, LayerSpec, visible_layers
from tkfac_jax.statistics import Statistics, check_statistics

Averaging = Literal["factors", "moments"]


class TkfacState(NamedTuple):
    """The state of `scale_by_tkfac`: arrays and dictionaries of arrays only.

    Attributes:
      step: number of updates so far.
      factors: by layer, the moving averages; of the damped factors under `averaging="factors"`, of the
        undamped ones under `averaging="moments"`.
      inverses: by layer, the inverses of the damped factors, as of the last refresh.
      factor_updates: number of statistics that have entered the averages.
      skipped_statistics: number of statistics that were left out because they were not finite.
      failed_inversions: number of inverses that could not be computed, so that the old one stayed.
    """

    step: Int[Array, ""]
    factors: dict[str, KroneckerFactors]
    inverses: dict[str, KroneckerInverses]
    factor_updates: Int[Array, ""]
    skipped_statistics: Int[Array, ""]
    failed_inversions: Int[Array, ""]


class Curvature(NamedTuple):
    """How the state's factors and inverses are made; the options as in `scale_by_tkfac`."""

    layers: Layers
    damping: Damping
    decay: Decay
    averaging: Averaging
    inverse: Inverse
    axis_name: str | None

    def init(self, params: Any) -> Any:
        """The state before the first statistics: the inverses are those of the damping alone."""
        active = {n: self.layers[n] for n in visible_layers(self.layers, params, "params")}
        # One buffer for each counter: a state that holds one twice could not be donated.
        step, *counters = (jnp.zeros((), jnp.int32) for _ in range(4))
        unknown = {name: zero_factors(spec) for name, spec in active.items()}
        damped = self.damping.damp(unknown, active, step)
        inverses, _ = invert_factors(damped, _identity_inverses(active), active, self.inverse)
        factors = damped if self.averaging == "factors" else unknown
        return TkfacState(step, factors, inverses, *counters)

    def active(self, updates: Any, state: TkfacState) -> dict[str, LayerSpec]:
        """The layers that the state knows, after a check that the updates hold them."""
        visible = visible_layers(self.layers, updates, "updates")
        if set(visible) != set(state.inverses):
            msg = (
                f"updates hold the layers {sorted(visible)}, the state those of {sorted(state.inverses)}. "
                "Give update() gradients of the structure of the parameters that init() was given."
            )
            raise ValueError(msg)
        return {name: self.layers[name] for name in visible}

    def add(
        self, state: TkfacState, statistics: Statistics, active: Mapping[str, LayerSpec]
    ) -> TkfacState:
        """Lets statistics enter the averages, or counts them as skipped if they are not finite."""
        check_statistics(statistics, self.layers)
        if self.axis_name is not None:
            statistics = jax.lax.pmean(statistics, self.axis_name)
        new = {}
        for name, spec in active.items():
            dtype = jnp.dtype(spec.dtype)
            new[name] = kronecker_factors(
                LayerStatistics(*(array.astype(dtype) for array in statistics[name]))
            )
        weight = decay_at(self.decay, state.factor_updates)
        if self.averaging == "factors":
            damped = self.damping.damp(new, active, state.step)
            averaged = average_factors(state.factors, damped, weight)
        else:
            averaged = average_moments(state.factors, new, weight)
        finite = [jnp.isfinite(array).all() for array in jax.tree.leaves(statistics)]
        accepted = jnp.stack(finite).all()
        return state._replace(
            factors=jax.tree.map(
                lambda new, old: jnp.where(accepted, new, old), averaged, state.factors
            ),
            factor_updates=state.factor_updates + accepted.astype(jnp.int32),
            skipped_statistics=state.skipped_statistics + (~accepted).astype(jnp.int32),
        )

    def refresh(self, state: TkfacState, active: Mapping[str, LayerSpec]) -> TkfacState:
        """Inverts the damped factors; failures keep their old inverse and are counted."""
        damped = state.factors
        if self.averaging == "moments":
            damped = self.damping.damp(damped, active, state.step)
        inverses, failures = invert_factors(damped, state.inverses, active, self.inverse)
        return state._replace(
            inverses=inverses, failed_inversions=state.failed_inversions + failures
        )


def _identity_inverses(active: Mapping[str, LayerSpec]) -> dict[str, KroneckerInverses]:
    return {
        name: KroneckerInverses.from_matrices(
            jnp.eye(spec.d_in, dtype=spec.dtype),
            jnp.eye(spec.d_out, dtype=spec.dtype),
            spec.has_bias,
        )
        for name, spec in active.items()
    }
