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
from tkfac_jax.structures import identity
from tkfac_jax.tagged import Statistics, check_statistics

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
      refreshed: by layer, the step at which all of its inverses were last computed; 0 at first.
    """

    step: Int[Array, ""]
    factors: dict[str, KroneckerFactors]
    inverses: dict[str, KroneckerInverses]
    factor_updates: Int[Array, ""]
    skipped_statistics: Int[Array, ""]
    failed_inversions: Int[Array, ""]
    refreshed: dict[str, Int[Array, ""]]


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


class Curvature(NamedTuple):
    """How the state's factors and inverses are made; the options as in `scale_by_tkfac`."""

    layers: Layers
    damping: Damping
    decay: Decay
    averaging: Averaging
    inverse: Inverse
    axis_name: str | None
    factor_dtype: Any = None
    inverse_dtype: Any = None

    def init(self, params: Any) -> Any:
        """The state before the first statistics: the inverses are those of the damping alone."""
        active = {n: self.layers[n] for n in visible_layers(self.layers, params, "params")}
        # One buffer for each counter: a state that holds one twice could not be donated.
        step, updates, skipped, failed = (jnp.zeros((), jnp.int32) for _ in range(4))
        unknown = {name: zero_factors(spec) for name, spec in active.items()}
        damped = self.damping.damp(unknown, active, step)
        start = {name: self._identity_inverses(spec) for name, spec in active.items()}
        inverses, _ = invert_factors(damped, start, active, self.inverse)
        factors = self._store(damped if self.averaging == "factors" else unknown)
        refreshed = {name: jnp.zeros((), jnp.int32) for name in active}
        return TkfacState(step, factors, inverses, updates, skipped, failed, refreshed)

    def _store(self, factors: dict[str, KroneckerFactors]) -> dict[str, KroneckerFactors]:
        if self.factor_dtype is None:
            return factors
        dtype = self.factor_dtype
        return {
            name: KroneckerFactors(f.phi.astype(dtype), f.psi.astype(dtype), f.delta)
            for name, f in factors.items()
        }

    def _load(
        self, factors: Mapping[str, KroneckerFactors], active: Mapping[str, LayerSpec]
    ) -> Any:
        """Factors in a dtype to compute with: that of the statistics, or their own if it is wider."""
        return {
            name: jax.tree.map(
                lambda array, spec=active[name]: array.astype(
                    jnp.promote_types(array.dtype, spec.dtype)
                ),
                factor,
            )
            for name, factor in factors.items()
        }

    def _identity_inverses(self, spec: LayerSpec) -> KroneckerInverses:
        dtype = spec.dtype if self.inverse_dtype is None else self.inverse_dtype
        return KroneckerInverses.from_factors(
            spec,
            identity(spec.phi, spec.batch, dtype),
            identity(spec.psi, spec.batch, dtype),
        )

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
        old = self._load(state.factors, active)
        if self.averaging == "factors":
            damped = self.damping.damp(new, active, state.step)
            averaged = self._store(average_factors(old, damped, weight))
        else:
            averaged = self._store(average_moments(old, new, weight))
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
        damped = self._load(state.factors, active)
        if self.averaging == "moments":
            damped = self.damping.damp(damped, active, state.step)
        inverses, failures = invert_factors(damped, state.inverses, active, self.inverse)
        refreshed = {
            name: jnp.where(failures[name] > 0, last, state.step)
            for name, last in state.refreshed.items()
        }
        total = jnp.stack(list(failures.values())).sum(dtype=jnp.int32)
        return state._replace(
            inverses=inverses,
            failed_inversions=state.failed_inversions + total,
            refreshed=refreshed,
        )
