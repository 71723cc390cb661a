"""Gradient accumulation for an optimizer with statistics.

`optax.MultiSteps` accumulates gradients only. What else an update takes, it hands to the optimizer as it
came with the last micro-batch: the factors would see a part of the batch, and a function that makes statistics would be
called at every micro-step, most often in vain. Statistics are means over examples, as gradients are: here both are
averaged over the micro-batches.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from tkfac_jax.curvature.state import find_state
from tkfac_jax.fisher.layer_statistics import Statistics, check_statistics, zero_slots
from tkfac_jax.layers.spec import Layers
from tkfac_jax.linalg.meshes import mean_over
from tkfac_jax.optimizers.adaptive_state import find_adaptive
from tkfac_jax.optimizers.option_checks import check_layers
from tkfac_jax.optimizers.plan import (
    Plan,
    PlannedTransformation,
    agreed,
    plan_of,
    with_plan,
)
from tkfac_jax.optimizers.refresh_schedule import (
    MISSING_STATISTICS,
    Interval,
    Missing,
    check_interval,
)

NO_PLAN = (
    "the optimizer does not say which layers it preconditions, and how often: wrappers of Optax's, such as chain, drop "
    "the plan of the one inside. Give plan=inner.plan, where inner is what tkfac(...) or scale_by_tkfac(...) returned; "
    "or layers and fisher_interval, if its rule is TKFAC's and it has no axis_name."
)
WHOLE_BATCHES = (
    "adaptive_tkfac compares losses of the whole batch: it cannot be given the batch in parts by multi_steps. Use it "
    "with whole batches, divided over several devices if need be, or accumulate for tkfac(...)."
)


class AccumulationState(NamedTuple):
    """The state of `multi_steps`: arrays only.

    Attributes:
      mini_step: number of micro-batches since the last update; 0 right after one.
      gradients: mean of their gradients, in at least float32.
      statistics: mean of those of their statistics that were given.
      num_statistics: the number of these.
      inner_state: the optimizer's state.
    """

    mini_step: Int[Array, ""]
    gradients: Any
    statistics: Statistics
    num_statistics: Int[Array, ""]
    inner_state: Any


def multi_steps(
    optimizer: optax.GradientTransformation,
    every_k: int,
    *,
    layers: Layers | None = None,
    fisher_interval: Interval | None = None,
    plan: Plan | None = None,
) -> PlannedTransformation:
    """Updates once in `every_k` micro-batches, with the means of their gradients and of their statistics.

    The result is the optimizer's update on the whole batch, if the micro-batches are equally large and their
    gradients and statistics are means over examples. The update function is that of `scale_by_tkfac`, once for each
    micro-batch. It returns updates of zero, except with the last one. `statistics` is

    * a function without arguments: called inside `lax.cond`, for the micro-batches of every `fisher_interval`-th
      whole step only;
    * the statistics of the micro-batch: averaged with the others, whatever the interval;
    * None: this micro-batch gives none. If some give none, the mean is that of the others; if all do, the update
      leaves the factors alone.

    Layers, interval, rule and axis are those of the optimizer's `plan`: with an axis, the statistics of each
    micro-batch are averaged over it as they come. `refresh_inverses` and all other arguments go to the optimizer as
    they come with the last micro-batch. Statistics of one micro-batch that are not finite spoil the mean, which the
    optimizer skips and counts as it would those of the whole batch.

    Not for `make_train_step`, which decides about statistics and inverses at every call: it wants the optimizer
    itself and whole batches.

    Args:
      optimizer: an Optax optimizer with one `scale_by_tkfac` in it, such as `tkfac(...)`.
      every_k: micro-batches of a whole step.
      layers: what `find_layers` returned, the layers of the optimizer; None: those of its plan.
      fisher_interval: T_FIM, whole steps between new statistics; None: that of its plan. Without a plan both are to be
        given, and the rule is TKFAC's.
      plan: the plan of the optimizer inside, where a wrapper of Optax's, such as `optax.chain`, has dropped it.

    Returns:
      The transformation, with a `plan` of its own; its state is an `AccumulationState`. It holds a second set of
      gradients and of statistics.

    Raises:
      ValueError: an argument is wrong; at `init`, the optimizer has no `TkfacState` or several, or is an
        `adaptive_tkfac`; at `update`, the statistics are not those of the layers.
      TypeError: at `update`, `statistics` is not given.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, tkfac_jax as tkfac
      >>> model = nn.Dense(2)
      >>> batch = jax.random.normal(jax.random.key(0), (8, 3), jnp.float32)
      >>> params = model.init(jax.random.key(1), batch)["params"]
      >>> predict = lambda params, x: model.apply({"params": params}, x)
      >>> layers = tkfac.find_layers(predict, params, batch)
      >>> fisher = tkfac.exact_fisher(predict, tkfac.Normal(), layers)
      >>> optimizer = tkfac.multi_steps(tkfac.tkfac(0.1, layers), 2)
      >>> @jax.jit
      ... def micro_step(state, x):
      ...     grads = jax.grad(lambda params: (predict(params, x) ** 2).sum(-1).mean())(params)
      ...     return optimizer.update(grads, state, params, statistics=lambda: fisher(params, x))
      >>> updates, state = micro_step(jax.jit(optimizer.init)(params), batch[:4])
      >>> bool(updates["kernel"].any()), int(state.mini_step)
      (False, 1)
      >>> updates, state = micro_step(state, batch[4:])
      >>> bool(updates["kernel"].any()), int(state.mini_step)
      (True, 0)
    """
    plan = _checked_plan(optimizer, every_k, layers, fisher_interval, plan)
    inner = optax.with_extra_args_support(optimizer)

    def init(params: Any) -> AccumulationState:
        inner_state = inner.init(params)
        find_state(inner_state)
        if find_adaptive(inner_state) is not None:
            raise ValueError(WHOLE_BATCHES)
        # Of each a buffer of its own: a state that holds one twice could not be donated.
        mini_step, num_statistics = (jnp.zeros((), jnp.int32) for _ in range(2))
        gradients = jax.tree.map(_zeros_to_add_to, params)
        return AccumulationState(
            mini_step, gradients, zero_slots(plan.layers, plan.rule), num_statistics, inner_state
        )

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        statistics: Any = Missing,
        **extra_args: Any,
    ) -> tuple[Any, AccumulationState]:
        if statistics is Missing:
            raise TypeError(MISSING_STATISTICS)

        def finish(state: AccumulationState, *, given: bool) -> tuple[Any, AccumulationState]:
            mean = jax.tree.map(_cast_like, state.gradients, updates)
            arguments = extra_args | {"statistics": state.statistics if given else None}
            steps, inner_state = inner.update(mean, state.inner_state, params, **arguments)
            zeros = jax.tree.map(jnp.zeros_like, state._replace(inner_state=None))
            return steps, zeros._replace(inner_state=inner_state)

        def wait(state: AccumulationState) -> tuple[Any, AccumulationState]:
            arguments = extra_args | {"statistics": None, "refresh_inverses": False}
            steps, _ = jax.eval_shape(
                lambda inner_state: inner.update(updates, inner_state, params, **arguments),
                state.inner_state,
            )
            zeros = jax.tree.map(lambda step: jnp.zeros(step.shape, step.dtype), steps)
            return zeros, state._replace(mini_step=state.mini_step + 1)

        gradients = jax.tree.map(
            lambda mean, new: _running_mean(mean, new, state.mini_step), state.gradients, updates
        )
        state = state._replace(gradients=gradients)
        state, surely = _add(state, statistics, plan)
        is_last = state.mini_step == every_k - 1
        branches = [wait, functools.partial(finish, given=True)]
        # Often only the program knows whether there are statistics. The optimizer must not meet zeros for none.
        if not surely:
            branches.append(functools.partial(finish, given=False))
        kind = jnp.where(is_last, 1 + (state.num_statistics == 0), 0)
        return jax.lax.switch(kind, branches, state)

    return with_plan(optax.GradientTransformationExtraArgs(init, update), plan)


def _add(state: AccumulationState, statistics: Any, plan: Plan) -> tuple[AccumulationState, bool]:
    """Averages a micro-batch's statistics with those before; says whether there are any in every case."""

    def add(state: AccumulationState, new: Any) -> AccumulationState:
        check_statistics(new, plan.layers, plan.rule)
        new = mean_over(new, plan.axis_name)
        number = state.num_statistics
        mean = jax.tree.map(
            lambda mean, new: _running_mean(mean, new, number), state.statistics, new
        )
        return state._replace(statistics=mean, num_statistics=number + 1)

    if statistics is None:
        return state, False
    if not callable(statistics):
        return add(state, statistics), True
    make: Callable[[], Any] = statistics
    interval = 1 if plan.fisher_interval is None else plan.fisher_interval
    if isinstance(interval, int) and interval == 1:
        return add(state, make()), True
    due = find_state(state.inner_state).step % interval == 0
    state = jax.lax.cond(due, lambda state: add(state, make()), lambda state: state, state)
    return state, False


def _running_mean(mean: Array, new: Array, number: Int[Array, ""]) -> Array:
    """The mean of so many values and a new one."""
    return mean + (new.astype(mean.dtype) - mean) / (number + 1).astype(mean.dtype)


def _zeros_to_add_to(leaf: Array) -> Array:
    """Zeros in a dtype that does not lose what is added."""
    return jnp.zeros_like(leaf, jnp.promote_types(leaf.dtype, jnp.float32))


def _cast_like(array: Array, other: Array) -> Array:
    return array.astype(other.dtype)


def _checked_plan(
    optimizer: Any, every_k: Any, layers: Any, fisher_interval: Any, plan: Plan | None
) -> Plan:
    """The plan by which micro-batches are gathered, if all that was given for it is right."""
    if not isinstance(optimizer, optax.GradientTransformation):
        msg = (
            f"optimizer is {type(optimizer).__name__}; expected an Optax optimizer with one scale_by_tkfac in it, "
            "such as tkfac(...)."
        )
        raise ValueError(msg)
    if not isinstance(every_k, int) or every_k < 1:
        msg = (
            f"every_k={every_k!r}; expected the number of micro-batches of a whole step, a whole number of at least 1. "
            "It cannot change during training: give optimizers of their own to the parts of the training."
        )
        raise ValueError(msg)
    if layers is not None:
        check_layers(layers)
    check_interval("fisher_interval", fisher_interval)
    own = plan_of(optimizer, plan)
    if own is None:
        if layers is None or fisher_interval is None:
            raise ValueError(NO_PLAN)
        own = Plan(layers)
    agreed("layers", layers, own.layers)
    return own._replace(
        fisher_interval=agreed("fisher_interval", fisher_interval, own.fisher_interval)
    )
