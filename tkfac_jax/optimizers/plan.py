"""What an optimizer tells about itself to those who step it: its layers, intervals, rule and axis.

They are said once, when the optimizer is built. `make_train_step` and `multi_steps` read them from the optimizer's
`plan`; what they are told themselves must agree with it.
"""

import dataclasses
import functools
import inspect
import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import optax
from jax.core import Tracer

from tkfac_jax.fisher.layer_statistics import Rule, independent, trace_restricted
from tkfac_jax.layers.spec import Layers
from tkfac_jax.optimizers.refresh_schedule import Interval, check_interval

NO_PLAN = (
    "the optimizer does not say which layers it preconditions: wrappers of Optax's, such as chain, named_chain, "
    "masked, apply_if_finite and inject_hyperparams, drop the plan of the one inside. Give plan=inner.plan, where "
    "inner is what tkfac(...) or scale_by_tkfac(...) returned; or layers, fisher_interval and inverse_interval, and "
    "rule, axis_name and spread_inverses too, where the one inside has others than the defaults."
)


class Plan(NamedTuple):
    """What an optimizer was built with, as far as a training step must know it.

    Attributes:
      layers: the layers that it preconditions.
      fisher_interval: steps between new statistics; None: it was not told, which means 1.
      inverse_interval: steps between new inverses, likewise.
      spread_inverses: whether new inverses are spread over the interval.
      rule: of the statistics that it takes.
      axis_name: mapped axis over which it averages, or None.
      likelihood: what the outputs mean, if it was told, as `adaptive_tkfac` is.
    """

    layers: Layers
    fisher_interval: Interval | None = None
    inverse_interval: Interval | None = None
    spread_inverses: bool = False
    rule: Rule = trace_restricted
    axis_name: str | None = None
    likelihood: Any = None


class PlannedTransformation(optax.GradientTransformationExtraArgs):
    """An Optax transformation with a `plan`: still the two functions, `init, update = optimizer`.

    Attributes:
      plan: what it was built with; None for one that was made from its functions alone, as by `_replace`.
    """

    plan: Plan | None = None


def with_plan(optimizer: optax.GradientTransformation, plan: Plan | None) -> PlannedTransformation:
    """An optimizer that tells its plan."""
    planned = PlannedTransformation(optimizer.init, optimizer.update)
    planned.plan = plan
    return planned


def plan_of(optimizer: Any, given: Plan | None = None) -> Plan | None:
    """The plan of an optimizer; or the one that is given for it, because Optax's wrappers drop the attribute.

    Raises:
      ValueError: there are two, and they differ.
    """
    own = getattr(optimizer, "plan", None)
    if given is None:
        return own
    if not isinstance(given, Plan):
        msg = f"plan is {type(given).__name__}; expected the plan of the optimizer inside: plan=inner.plan."
        raise ValueError(msg)
    return given if own is None else _merged(own, given._asdict() | _spread(given))


def agreed_plan(optimizer: Any, plan: Plan | None, **told: Any) -> Plan:
    """What holds for a step: what it was told, or else what its optimizer was told.

    Args:
      optimizer: the optimizer.
      plan: its plan, where it does not tell one; or None.
      **told: fields of the plan as the step was told them; None: it was not.

    Raises:
      ValueError: both were told a field, and they disagree; or the optimizer has no plan, and its layers or an interval
        are not given.
    """
    own = plan_of(optimizer, plan)
    given = {name: value for name, value in told.items() if value is not None}
    if own is None:
        if not {"layers", "fisher_interval", "inverse_interval"} <= set(given):
            raise ValueError(NO_PLAN)
        return Plan(**given)
    return _merged(own, given)


def _merged(own: Plan, given: Mapping[str, Any]) -> Plan:
    """A plan with what is given for some of its fields, if that agrees with it; None: nothing is."""
    fields = own._asdict() | _spread(own)
    merged = {name: agreed(name, value, fields[name]) for name, value in given.items()}
    # Of a field that nobody was told, the plan's own value.
    return own._replace(**{name: value for name, value in merged.items() if value is not None})


def _spread(plan: Plan) -> dict[str, Any]:
    """Whether inverses are spread, as a field: that they are not is nothing that an optimizer was told."""
    return {"spread_inverses": plan.spread_inverses or None}


def agreed(name: str, given: Any, planned: Any) -> Any:
    """What is given, or else what is planned; None for either: nothing is.

    Raises:
      ValueError: both are, and they disagree.
    """
    if given is None or planned is None:
        return planned if given is None else given
    if _differ(given, planned):
        here, there = _shown(given), _shown(planned)
        if here == there:
            here, there = "of some form", "of another"
        msg = (
            f"{name} is {here} here and {there} in the optimizer: say it once, when the optimizer is built, or the "
            "same in both places."
        )
        raise ValueError(msg)
    return given


def known_interval(name: str, interval: Any) -> int:
    """A number of steps as a Python int; None is 1.

    Raises:
      ValueError: it is not a whole number of at least 1, or not known before the step is traced.
    """
    check_interval(name, interval)
    if isinstance(interval, Tracer):
        msg = f"{name}={interval!r}; expected a whole number of steps that is known when the step is built."
        raise ValueError(msg)
    return 1 if interval is None else operator.index(interval)


def _differ(one: Any, other: Any) -> bool:
    """Whether two values are known not to be the same. Objects of one class that do not say, and tracers, may be."""
    if one is other or any(isinstance(value, Tracer) for value in (one, other)):
        return False
    parts, others = _parts(one), _parts(other)
    if parts is not None and others is not None:
        if type(one) is not type(other) or set(parts) != set(others):
            return True
        return any(_differ(parts[name], others[name]) for name in parts)
    says_nothing = type(one).__eq__ is object.__eq__ and not _is_function(one)
    if type(one) is type(other) and says_nothing:
        return False
    return not np.all(one == other)


def _parts(value: Any) -> dict[Any, Any] | None:
    """What a value consists of, by name or place; None: it has no parts."""
    if isinstance(value, Mapping) and not isinstance(value, Layers):
        return dict(value)
    if isinstance(value, tuple | list):
        return dict(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return None


def _is_function(value: Any) -> bool:
    return inspect.isroutine(value) or isinstance(value, type | functools.partial)


def _shown(value: Any) -> str:
    """A value as a message shows it."""
    if isinstance(value, Layers):
        sizes = (f"{name} ({spec.phi} x {spec.psi})" for name, spec in value.items())
        return f"of {len(value)} layers, {', '.join(sizes)}"
    if isinstance(value, Plan):
        fields = zip(Plan._fields, value, strict=True)
        return f"({'; '.join(f'{name} {_shown(own)}' for name, own in fields)})"
    if value is trace_restricted or value is independent:
        return f"tkfac_jax.{value.__name__}"
    return repr(value)
