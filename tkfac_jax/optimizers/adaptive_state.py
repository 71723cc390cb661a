"""The state of the adaptive optimizer, and how its damping changes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tkfac_jax.curvature.state import TkfacState
from tkfac_jax.optimizers.refresh_schedule import Interval

# A ratio of actual to predicted change within these bounds leaves the damping as it is.
GOOD_RATIO, POOR_RATIO = 0.75, 0.25


class AdaptiveState(NamedTuple):
    """The state of `adaptive_tkfac`: arrays and trees of arrays only.

    Attributes:
      curvature: factors and inverses, as in `scale_by_tkfac`. Its `step` does not count the warm-up.
      previous: the previous step of the layers, a tree of the structure of the parameters.
      fallback: the state of the fallback.
      warmup_left: number of steps still to come that only gather statistics.
      damping_interval: steps between changes of the damping, as the optimizer was told; 0: it stays.
      damping: lambda, the damping of the next step, in units of curvature.
      learning_rate: alpha, the last step's length along the preconditioned gradient.
      momentum: mu, its length along the previous step.
      ratio: the last ratio of actual to predicted change of the loss; NaN before the first.
      skipped_steps: number of steps that were not made because a number was not finite.
      rejected_steps: number of steps that were not made because they would have raised the loss.
    """

    curvature: TkfacState
    previous: Any
    fallback: Any
    warmup_left: Int[Array, ""]
    damping_interval: Int[Array, ""]
    damping: Float[Array, ""]
    learning_rate: Float[Array, ""]
    momentum: Float[Array, ""]
    ratio: Float[Array, ""]
    skipped_steps: Int[Array, ""]
    rejected_steps: Int[Array, ""]


def find_adaptive(opt_state: Any) -> AdaptiveState | None:
    """The first `AdaptiveState` in an optimizer's state; None if there is none."""
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda leaf: isinstance(leaf, AdaptiveState))
    return next((leaf for leaf in leaves if isinstance(leaf, AdaptiveState)), None)


class DampingPolicy(NamedTuple):
    """When and how the damping changes."""

    interval: Interval | None
    decay: float | Array
    smallest: float | Array
    largest: float | Array

    def interval_or_zero(self) -> Int[Array, ""]:
        """The interval as a number; 0: the damping stays."""
        return jnp.asarray(0 if self.interval is None else self.interval, jnp.int32)

    def is_due(self, step: Array) -> Array:
        """Whether the damping may change after a step."""
        if self.interval is None:
            return jnp.zeros((), bool)
        return (step + 1) % self.interval == 0

    def next(self, damping: Array, ratio: Array) -> Array:
        """The damping after a ratio of actual to predicted change."""
        factor = jnp.asarray(self.decay, damping.dtype) ** (
            1 if self.interval is None else self.interval
        )
        change = jnp.where(ratio > GOOD_RATIO, factor, jnp.where(ratio < POOR_RATIO, 1 / factor, 1))
        return jnp.clip(damping * change, self.smallest, self.largest).astype(damping.dtype)
