"""How statistics and inverses enter the state, and how gradients leave it preconditioned."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Int

from tkfac_jax.curvature.damping import Damping
from tkfac_jax.curvature.damping_argument import DampingArgument
from tkfac_jax.curvature.factors import (
    Decay,
    KroneckerFactors,
    average_factors,
    average_moments,
    decay_at,
    kronecker_factors,
)
from tkfac_jax.curvature.inverses import KroneckerInverses, Share, invert_factors, shares
from tkfac_jax.curvature.precondition import precondition
from tkfac_jax.curvature.state import Averaging, LayerFaults, TkfacState, initial_curvature
from tkfac_jax.curvature.storage import Storage, check_shapes, inverses_in_shape
from tkfac_jax.fisher.layer_statistics import (
    LayerStatistics,
    Rule,
    Statistics,
    check_statistics,
    trace_restricted,
)
from tkfac_jax.layers.spec import Layers, LayerSpec, visible_layers
from tkfac_jax.linalg.divided_stacks import Devices
from tkfac_jax.linalg.finite import all_finite
from tkfac_jax.linalg.inversion import Inverse
from tkfac_jax.linalg.meshes import automatic, mean_over, specs_of, varying_axes

# The fields of the state that change with new statistics, and with new inverses.
ADDED = ("factors", "factor_updates", "skipped_statistics", "faults")
REFRESHED = ("inverses", "failed_inversions", "refreshed", "faults")


class Curvature(NamedTuple):
    """How the state's factors and inverses are made; the options as in `scale_by_tkfac`."""

    layers: Layers
    damping: Damping
    decay: Decay
    averaging: Averaging
    inverse: Inverse
    storage: Storage
    axis_name: str | None = None
    norm_constraint: float | Array | None = None
    rule: Rule = trace_restricted

    def init(self, params: Any) -> Any:
        """The state before the first statistics: the inverses are those of the damping alone."""
        active = {n: self.layers[n] for n in visible_layers(self.layers, params, "params")}
        factors, inverses = initial_curvature(active, self.damping, self.averaging, self.storage)

        # One buffer for each counter: a state that holds one twice could not be donated.
        def zero() -> Array:
            return jnp.zeros((), jnp.int32)

        return TkfacState(
            step=zero(),
            factors=factors,
            inverses=inverses,
            factor_updates=zero(),
            skipped_statistics=zero(),
            failed_inversions=zero(),
            refreshed={name: zero() for name in active},
            skipped_updates=zero(),
            faults={name: LayerFaults(zero(), zero(), zero()) for name in active},
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
        active = {name: self.layers[name] for name in visible}
        check_shapes(state.factors, state.inverses, active)
        return active

    def add(
        self, state: TkfacState, statistics: Statistics, active: Mapping[str, LayerSpec]
    ) -> dict[str, Any]:
        """Lets statistics enter the averages, or counts them as skipped if they are not finite.

        Returns:
          The fields of the state that change, `ADDED`.
        """
        check_statistics(statistics, self.layers, self.rule)
        statistics = mean_over(statistics, self.axis_name)
        apart = varying_axes(statistics) - varying_axes(state)
        if apart:
            msg = (
                f"the statistics vary over the mesh axes {sorted(apart)}, and the state does not: give axis_name "
                "to the Fisher function or to the optimizer, so that they are averaged."
            )
            raise ValueError(msg)

        def averaged(
            statistics: Statistics,
            factors: dict[str, KroneckerFactors],
            step: Array,
            weight: Array,
            argument: DampingArgument,
        ) -> tuple[dict[str, KroneckerFactors], dict[str, Array]]:
            def averages(
                statistics: Statistics, factors: dict[str, KroneckerFactors]
            ) -> dict[str, KroneckerFactors]:
                new = {name: kronecker_factors(statistics[name]) for name in active}
                old = self.storage.load_factors(factors, active)
                if self.averaging == "factors":
                    damped = argument.damping.damp(new, active, step)
                    return self.storage.store_factors(average_factors(old, damped, weight))
                return self.storage.store_factors(average_moments(old, new, weight))

            # Numbers that overflow in the layer's own dtype are not finite either.
            statistics = {
                name: LayerStatistics(*(array.astype(spec.dtype) for array in statistics[name]))
                for name, spec in active.items()
            }
            # Whole averages, read for their finiteness before one of them is chosen, would all be written to memory
            # first. What is wrong with more than a moment, as with a damping, is wrong in each column; the barrier
            # keeps the compiler from making these out of the whole averages.
            again = averages(*jax.lax.optimization_barrier((statistics, factors)))
            columns = jax.tree.map(lambda array: array[..., :1] if array.ndim else array, again)
            good = {name: all_finite((statistics[name], columns[name])) for name in active}
            accepted = _all(good)
            new = averages(statistics, factors)
            kept = jax.tree.map(lambda new, old: jnp.where(accepted, new, old), new, factors)
            return kept, good

        weight = decay_at(self.decay, state.factor_updates)
        factors, good = automatic(
            averaged,
            statistics,
            state.factors,
            state.step,
            weight,
            DampingArgument(self.damping),
            out=(specs_of(state.factors), PartitionSpec()),
        )
        accepted = _all(good)
        return {
            "factors": factors,
            "factor_updates": state.factor_updates + accepted.astype(jnp.int32),
            "skipped_statistics": state.skipped_statistics + (~accepted).astype(jnp.int32),
            "faults": _count(state.faults, "statistics", {n: ~flag for n, flag in good.items()}),
        }

    def refresh(
        self,
        state: TkfacState,
        active: Mapping[str, LayerSpec],
        names: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """Inverts the damped factors; failures keep their old inverse and are counted.

        Args:
          state: the state.
          active: its layers.
          names: the layers whose inverses are refreshed; None: all.

        Returns:
          The fields of the state that change, `REFRESHED`.
        """
        names = list(active) if names is None else names

        def inverted(
            factors: dict[str, KroneckerFactors],
            old: dict[str, KroneckerInverses],
            step: Array,
            argument: DampingArgument,
        ) -> tuple[dict[str, KroneckerInverses], dict[str, Array]]:
            damped = self.storage.load_factors(factors, active)
            if self.averaging == "moments":
                damped = argument.damping.damp(damped, active, step)
            old = {name: inverses_in_shape(active[name], inverse) for name, inverse in old.items()}
            devices = Devices(self.axis_name, self.storage.mesh, self.storage.divided)
            new, failures = invert_factors(damped, old, active, self.inverse, devices)
            return self.storage.store_inverses(new), failures

        chosen = {name: state.inverses[name] for name in names}
        inverses, failures = automatic(
            inverted,
            state.factors,
            chosen,
            state.step,
            DampingArgument(self.damping),
            out=(specs_of(chosen), PartitionSpec()),
        )
        refreshed = {
            name: jnp.where(failures[name] > 0, state.refreshed[name], state.step) for name in names
        }
        return {
            "inverses": state.inverses | inverses,
            "failed_inversions": state.failed_inversions + _total(failures),
            "refreshed": state.refreshed | refreshed,
            "faults": _count(state.faults, "inversions", failures),
        }

    def refresh_share(
        self, state: TkfacState, active: Mapping[str, LayerSpec], share: Share
    ) -> dict[str, Any]:
        """Refreshes the inverses of one share of the layers; see `refresh`."""
        plan = shares(active, share.of)
        if isinstance(share.number, int) and not 0 <= share.number < share.of:
            msg = f"{share}; expected a number from 0 to {share.of - 1}."
            raise ValueError(msg)
        return jax.lax.switch(
            share.number, [lambda names=names: self.refresh(state, active, names) for names in plan]
        )

    def precondition(
        self,
        updates: Any,
        state: TkfacState,
        active: Mapping[str, LayerSpec],
    ) -> tuple[Any, dict[str, Any]]:
        """Preconditions the layers' gradients; a layer whose step is not finite makes none.

        Args:
          updates: the gradients.
          state: the state.
          active: its layers.

        Returns:
          The updates, and the fields of the state that change.
        """
        updates, good = precondition(
            updates,
            state.inverses,
            active,
            self.norm_constraint,
        )
        bad = {name: ~flag for name, flag in good.items()}
        return updates, {
            "skipped_updates": state.skipped_updates + _total(bad),
            "faults": _count(state.faults, "updates", bad),
        }


def _all(flags: Mapping[str, Array]) -> Bool[Array, ""]:
    if not flags:
        return jnp.array(True)
    # XLA copies what leads to a scalar into every operation that takes it, here all flags into all factors: programs
    # would grow with the square of the number of layers. A sort stays where it is.
    return jnp.sort(jnp.stack(list(flags.values())))[0]


def _total(numbers: Mapping[str, Array]) -> Int[Array, ""]:
    return sum((n.astype(jnp.int32) for n in numbers.values()), jnp.zeros((), jnp.int32))


def _count(
    faults: dict[str, LayerFaults], field: str, more: Mapping[str, Array]
) -> dict[str, LayerFaults]:
    """The faults of the layers with further ones of a kind."""
    return faults | {
        name: faults[name]._replace(
            **{field: getattr(faults[name], field) + number.astype(jnp.int32)}
        )
        for name, number in more.items()
    }
