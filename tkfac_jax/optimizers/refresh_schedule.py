"""When new statistics and new inverses are due, and how they are then made."""

import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.core import Tracer
from jaxtyping import Array, Bool

from tkfac_jax.curvature.inverses import Share
from tkfac_jax.curvature.state import TkfacState
from tkfac_jax.curvature.transitions import ADDED, REFRESHED, Curvature
from tkfac_jax.layers.spec import LayerSpec

Interval = int | Array

MISSING_STATISTICS = (
    "update() needs the keyword argument 'statistics': a function such as lambda: fisher(params, "
    "inputs, key=key), the statistics themselves, or None for a step without new ones."
)


class Missing:
    """Stands for an argument that was not given, where None means something."""


class Intervals(NamedTuple):
    """The steps between statistics and between inverses; see `scale_by_tkfac`."""

    fisher: Interval
    inverse: Interval
    spread: bool = False

    @classmethod
    def checked(cls, fisher: Any, inverse: Any, spread: bool) -> "Intervals":
        """The intervals, if they are right; None is 1.

        Raises:
          ValueError: one is not a whole number of at least 1; or inverses are spread over one that is not known.
        """
        fisher, inverse = (1 if interval is None else interval for interval in (fisher, inverse))
        check_interval("fisher_interval", fisher)
        check_interval("inverse_interval", inverse)
        if spread and not isinstance(inverse, int):
            msg = (
                "spread_inverses needs an inverse_interval that is a Python int: the layers are shared out "
                "beforehand."
            )
            raise ValueError(msg)
        return cls(fisher, inverse, spread)


def renew(
    curvature: Curvature,
    intervals: Intervals,
    state: TkfacState,
    active: Mapping[str, LayerSpec],
    statistics: Any,
    refresh_inverses: bool | Share | None,
    warming: Bool[Array, ""] | None = None,
) -> TkfacState:
    """Lets the statistics of a step enter the factors, and refreshes the inverses, where either is due.

    Args:
      curvature: how factors and inverses are made.
      intervals: the steps between them.
      state: the state before.
      active: its layers.
      statistics: a function, the statistics themselves or None; see `scale_by_tkfac`.
      refresh_inverses: None, a bool or a `Share`; see `scale_by_tkfac`.
      warming: whether this step only gathers statistics, and refreshes no inverses; None: it never does.

    Returns:
      The state; its `step` is the same.

    Raises:
      TypeError: the statistics are missing.
    """
    if statistics is Missing:
        raise TypeError(MISSING_STATISTICS)
    if callable(statistics):
        make: Callable[[], Any] = statistics
        # Always at the steps of a warm-up: they are all the step 0.
        due = _is_due(state.step, intervals.fisher)
        state = _if(due, state, ADDED, lambda: curvature.add(state, make(), active))
    elif statistics is not None:
        state = state._replace(**curvature.add(state, statistics, active))

    if isinstance(refresh_inverses, Share):
        return state._replace(**curvature.refresh_share(state, active, refresh_inverses))
    if refresh_inverses is not None:
        return state._replace(**curvature.refresh(state, active)) if refresh_inverses else state
    if intervals.spread:
        due, change = _share_due(curvature, state, active, intervals.inverse)
    else:
        due = _is_due(state.step, intervals.inverse)
        change = lambda: curvature.refresh(state, active)  # noqa: E731
    return _if(due if warming is None else ~warming & due, state, REFRESHED, change)


def num_shares(layers: int, interval: int) -> int:
    """The number of shares when inverses are spread over an interval: at most one a step, one a layer."""
    return max(1, min(layers, interval))


def share_at(step: Any, interval: int, of: int) -> Any:
    """The number of the share that is due at a step or was the last to be."""
    return (step % interval) * of // interval


def first_step_of(number: Any, interval: int, of: int) -> Any:
    """The step of the interval at which a share is due."""
    return (number * interval + of - 1) // of


def _is_due(step: Array, interval: Interval) -> Any:
    return True if isinstance(interval, int) and interval == 1 else step % interval == 0


def _share_due(
    curvature: Curvature, state: TkfacState, active: Mapping[str, LayerSpec], interval: Any
) -> tuple[Any, Callable[[], dict[str, Any]]]:
    """Whether a share of the layers is due, and what refreshes it; at the first step it is all of them."""
    of = num_shares(len(active), interval)
    number = share_at(state.step, interval, of)

    def share_or_all() -> dict[str, Any]:
        return jax.lax.cond(
            state.step == 0,
            lambda: curvature.refresh(state, active),
            lambda: curvature.refresh_share(state, active, Share(number, of)),
        )

    return state.step % interval == first_step_of(number, interval, of), share_or_all


def _if(
    due: Any, state: TkfacState, fields: tuple[str, ...], change: Callable[[], dict[str, Any]]
) -> TkfacState:
    """The state with the fields that a function changes, if due. Other fields do not pass the conditional."""
    if due is True:
        return state._replace(**change())
    kept = {field: getattr(state, field) for field in fields}
    return state._replace(**jax.lax.cond(due, change, lambda: kept))


def check_interval(name: str, interval: Any) -> None:
    """Refuses a number of steps that is not a whole number of at least 1; a traced one, and None, may be."""
    if interval is None or isinstance(interval, Tracer):
        return
    try:
        right = operator.index(interval) >= 1
    except TypeError:
        right = False
    if not right:
        msg = f"{name}={interval}; expected a whole number of steps, at least 1."
        raise ValueError(msg)
