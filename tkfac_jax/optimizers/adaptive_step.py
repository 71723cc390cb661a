"""One step of the adaptive optimizer: directions, the lengths along them, and what the step says about the damping."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from tkfac_jax.curvature.damping import Damping
from tkfac_jax.curvature.inverses import Share
from tkfac_jax.curvature.transitions import Curvature
from tkfac_jax.fisher.estimators import Batch
from tkfac_jax.layers.parameter_tree import replace_leaves, visible_leaves
from tkfac_jax.optimizers.adaptive_state import AdaptiveState, DampingPolicy
from tkfac_jax.optimizers.objective import Objective
from tkfac_jax.optimizers.quadratic_model import Quadratic
from tkfac_jax.optimizers.refresh_schedule import Intervals, Missing, renew

# What calibration divides the damping by from trial to trial.
CALIBRATION_FACTOR = 10**0.5

MISSING_OUTPUTS = (
    "update() needs the keyword arguments 'outputs_fn', the model's outputs on the batch as a function of "
    "the parameters, such as lambda params: predict(params, inputs), and 'targets', those of the batch."
)


class Adaptive(NamedTuple):
    """The options of `adaptive_tkfac`, and the two functions of the optimizer."""

    curvature: Curvature
    intervals: Intervals
    likelihood: Any
    fallback: optax.GradientTransformationExtraArgs
    damping_rule: Callable[[Any], Damping]
    policy: DampingPolicy
    initial_damping: float | Array
    calibrate_damping: bool
    learning_rate: Any
    momentum: float | Array | None
    l2: float | Array
    reject_steps: bool
    warmup_steps: int | Array

    def init(self, params: Any) -> AdaptiveState:
        """The state before the first step."""
        layers = self.curvature.layers
        dtype = jnp.result_type(*(spec.dtype for spec in layers.values()))
        start = jnp.asarray(self.initial_damping, dtype)
        return AdaptiveState(
            curvature=self._damped(start).init(params),
            previous=jax.tree.map(
                lambda label, leaf: (
                    jnp.zeros_like(leaf) if label == "tkfac" else optax.MaskedNode()
                ),
                layers.labels(params),
                params,
            ),
            fallback=self.fallback.init(params),
            warmup_left=jnp.asarray(self.warmup_steps, jnp.int32),
            damping_interval=self.policy.interval_or_zero(),
            damping=start,
            learning_rate=jnp.zeros((), dtype),
            momentum=jnp.zeros((), dtype),
            ratio=jnp.full((), jnp.nan, dtype),
            skipped_steps=jnp.zeros((), jnp.int32),
            rejected_steps=jnp.zeros((), jnp.int32),
        )

    def update(
        self,
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        statistics: Any = Missing,
        outputs_fn: Callable[[Any], Any] | None = None,
        targets: Any = None,
        model_outputs_fn: Callable[[Any], Any] | None = None,
        refresh_inverses: bool | Share | None = None,
        adapt_damping: bool | None = None,
        position_mask: Any = None,
        example_weights: Any = None,
        axis_name: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, AdaptiveState]:
        """Makes one step; see `adaptive_tkfac`. An `axis_name` stands in for that of the optimizer, if it has none."""
        if params is None:
            msg = "update() needs the parameters: optimizer.update(grads, state, params, ...)."
            raise ValueError(msg)
        if outputs_fn is None or targets is None:
            raise TypeError(MISSING_OUTPUTS)
        layers = self.curvature.layers
        objective = Objective(
            outputs_fn,
            outputs_fn if model_outputs_fn is None else model_outputs_fn,
            self.likelihood,
            targets,
            Batch(position_mask, example_weights),
            self.l2,
            layers.parameters,
            axis_name if self.curvature.axis_name is None else self.curvature.axis_name,
        )
        others, fallback = self.fallback.update(updates, state.fallback, params, **extra_args)
        gradient = objective.gradient(updates, params)
        start = _Start(params, gradient, others, bool(layers.fallback))
        warming = state.warmup_left > 0 if self._may_warm() else None
        state = self._renew(objective, state, start, statistics, refresh_inverses, warming)
        proposal = self._propose(objective, state, start)
        verdict = self._judge(objective, state, start, proposal, adapt_damping)
        idle = verdict.rejected if warming is None else verdict.rejected | warming
        if warming is not None or self.reject_steps:
            others = jax.tree.map(lambda step: jnp.where(idle, 0, step), others)
            fallback = _select(idle, state.fallback, fallback)
        moved = proposal.finite & ~idle
        own = {name: jnp.where(moved, step, 0) for name, step in proposal.step.items()}
        # Computed once: else it would be computed again for the new parameters, from a copy of the previous step.
        own = jax.lax.optimization_barrier(own)
        one = 1 if warming is None else 1 - warming.astype(jnp.int32)
        return replace_leaves(others, own), AdaptiveState(
            curvature=state.curvature._replace(
                step=optax.safe_increment(state.curvature.step)
                if warming is None
                else state.curvature.step + one,
                **proposal.counted,
            ),
            previous=replace_leaves(state.previous, own),
            fallback=fallback,
            warmup_left=jnp.maximum(state.warmup_left - 1, 0),
            damping_interval=self.policy.interval_or_zero(),
            damping=verdict.damping,
            learning_rate=jnp.where(moved, -proposal.lengths[0], 0).astype(state.damping.dtype),
            momentum=jnp.where(moved, proposal.lengths[1], 0).astype(state.damping.dtype),
            ratio=verdict.ratio,
            skipped_steps=state.skipped_steps + one * (~proposal.finite).astype(jnp.int32),
            rejected_steps=state.rejected_steps + one * verdict.rejected.astype(jnp.int32),
        )

    def _may_warm(self) -> bool:
        """Whether there may be steps that only gather statistics, as far as is known when the program is traced."""
        return not (isinstance(self.warmup_steps, int) and self.warmup_steps == 0)

    def _damped(self, damping: float | Array) -> Curvature:
        """How inverses are made under a damping."""
        return self.curvature._replace(damping=self.damping_rule(damping + self.l2))

    def _renew(
        self,
        objective: Objective,
        state: AdaptiveState,
        start: "_Start",
        statistics: Any,
        refresh_inverses: bool | Share | None,
        warming: Any,
    ) -> AdaptiveState:
        """New statistics and inverses, where they are due, and before the first inverses a new damping."""
        active = self.curvature.active(start.gradient, state.curvature)

        def renewed(state: AdaptiveState, statistics: Any, refresh: Any) -> AdaptiveState:
            damped, old = self._damped(state.damping), state.curvature
            new = renew(damped, self.intervals, old, active, statistics, refresh, warming)
            return state._replace(curvature=new)

        state = renewed(state, statistics, False)
        if self.calibrate_damping and (refresh_inverses is None or refresh_inverses is True):
            first = state.curvature.step == 0
            damping = jax.lax.cond(
                first if warming is None else first & ~warming,
                lambda: self._calibrate(objective, state, start, active),
                lambda: state.damping,
            )
            state = state._replace(damping=damping)
        return renewed(state, None, refresh_inverses)

    def _calibrate(
        self, objective: Objective, state: AdaptiveState, start: "_Start", active: Any
    ) -> Float[Array, ""]:
        """The damping, lowered as long as that lowers the loss after the step."""

        def attempt(carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
            candidate, best, lowest, _ = carry
            inverses = self._damped(candidate).refresh(state.curvature, active)
            trial = state._replace(
                damping=candidate, curvature=state.curvature._replace(**inverses)
            )
            proposal = self._propose(objective, trial, start)
            loss = objective.loss(proposal.end(start)).astype(lowest.dtype)
            better = proposal.finite & (loss < lowest)
            best, lowest = jnp.where(better, candidate, best), jnp.where(better, loss, lowest)
            return (
                candidate / jnp.asarray(CALIBRATION_FACTOR, candidate.dtype),
                best,
                lowest,
                better,
            )

        def unfinished(carry: tuple[Array, Array, Array, Array]) -> Array:
            candidate, _, _, better = carry
            return better & (candidate >= self.policy.smallest)

        dtype = state.damping.dtype
        begin = (state.damping, state.damping, jnp.full((), jnp.inf, dtype), jnp.ones((), bool))
        return jax.lax.while_loop(unfinished, attempt, begin)[1]

    def _propose(self, objective: Objective, state: AdaptiveState, start: "_Start") -> "_Proposal":
        """The step of the layers, of the lengths at which the model is smallest where they are not given."""
        active = self.curvature.active(start.gradient, state.curvature)
        steps, counted = self.curvature.precondition(start.gradient, state.curvature, active)
        names = self.curvature.layers.parameters
        natural = {n: leaf for n, leaf in visible_leaves(steps).items() if n in names}
        previous = {n: leaf for n, leaf in visible_leaves(state.previous).items() if n in names}
        directions: list[Mapping[str, Array]] = [natural, previous]
        rate = self.learning_rate
        rate: Any = rate(state.curvature.step) if callable(rate) else rate
        # The first length is that along the natural gradient, which goes uphill.
        given = [None if rate is None else -rate, self.momentum]
        if start.has_others:
            others = visible_leaves(start.others)
            directions.append({n: leaf for n, leaf in others.items() if n not in names})
            given.append(1.0)

        def along() -> tuple[Quadratic, Quadratic]:
            return objective.along(start.params, start.gradient, directions, state.damping)

        if None in given:
            damped, undamped = along()
            # A model that is not finite has its minimum nowhere.
            nowhere = 0 * (damped.matrix.sum() + damped.slope.sum())
            lengths = damped.minimum(given) + nowhere
            predict = lambda: undamped.value(lengths)  # noqa: E731
        else:
            lengths = jnp.stack([jnp.asarray(length, state.damping.dtype) for length in given])
            predict = lambda: along()[1].value(lengths)  # noqa: E731

        finite = jnp.isfinite(lengths).all()
        step = {
            name: jnp.where(finite, lengths[0] * leaf + lengths[1] * previous[name], 0).astype(
                leaf.dtype
            )
            for name, leaf in natural.items()
        }
        return _Proposal(step, lengths, finite, predict, counted)

    def _judge(
        self,
        objective: Objective,
        state: AdaptiveState,
        start: "_Start",
        proposal: "_Proposal",
        adapt: bool | None,
    ) -> "_Verdict":
        """Compares what a step does with what the model says, where that is to be known."""
        dtype = state.damping.dtype
        never = jnp.zeros((), bool)
        adapts = self.policy.interval is not None and adapt is not False
        if not adapts and not self.reject_steps:
            return _Verdict(never, state.ratio, state.damping)

        # Outside the conditional it shares the forward pass of the gradient.
        loss = objective.loss(start.params).astype(dtype)

        def look() -> tuple[Array, Array]:
            after = objective.loss(proposal.end(start))
            return proposal.predict().astype(dtype), after.astype(dtype)

        due = self.policy.is_due(state.curvature.step) if adapt is None else jnp.array(adapts)
        if self._may_warm():
            due &= state.warmup_left == 0
        nan = jnp.full((), jnp.nan, dtype)
        always = self.reject_steps or adapt is not None
        predicted, after = look() if always else jax.lax.cond(due, look, lambda: (nan, nan))
        rounding = 10 * jnp.finfo(dtype).eps * jnp.abs(loss)
        compared = proposal.finite & jnp.isfinite(loss)
        known = compared & (jnp.abs(predicted) > rounding)
        foretold = jnp.isfinite(after) & (predicted < 0)
        ratio = jnp.where(foretold, (after - loss) / predicted, -jnp.inf)
        rejected = never
        if self.reject_steps:
            rejected = proposal.finite & ~(after <= loss + rounding) & (state.warmup_left == 0)
            due |= rejected
        changed = self.policy.next(state.damping, jnp.where(rejected, -jnp.inf, ratio))
        return _Verdict(
            rejected,
            jnp.where(due & known, ratio, state.ratio),
            jnp.where(due & (known | (compared & rejected)), changed, state.damping),
        )


class _Start(NamedTuple):
    """Where a step starts: parameters, gradient of the objective, and the fallback's steps."""

    params: Any
    gradient: Any
    others: Any
    has_others: bool


class _Proposal(NamedTuple):
    """A step of the layers' parameters, by their names.

    Attributes:
      step: by name of a parameter, what is added to it.
      lengths: along the directions.
      finite: whether the lengths are.
      predict: how the undamped model says that the loss changes.
      counted: fields of the `TkfacState` that change.
    """

    step: dict[str, Array]
    lengths: Float[Array, " k"]
    finite: Array
    predict: Callable[[], Array]
    counted: dict[str, Any]

    def end(self, start: _Start) -> Any:
        """The parameters after the step."""
        return optax.apply_updates(start.params, replace_leaves(start.others, self.step))


class _Verdict(NamedTuple):
    """What a step was found to do: whether it is rejected, the ratio, and the next damping."""

    rejected: Array
    ratio: Array
    damping: Array


def _select(which: Array, one: Any, other: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(which, a, b), one, other)
