"""A training step in which every kind of step is a compiled program of its own."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax

from tkfac_jax.fisher.estimators import Estimator
from tkfac_jax.fisher.fisher_functions import HIGHEST, Likelihoods, Precision, Sharings
from tkfac_jax.fisher.layer_statistics import Rule
from tkfac_jax.fisher.value_and_grad import check_estimator
from tkfac_jax.layers.discovery import unjitted
from tkfac_jax.layers.spec import Layers
from tkfac_jax.optimizers.option_checks import check_layers, check_rule
from tkfac_jax.optimizers.plan import Plan, agreed_plan, known_interval
from tkfac_jax.optimizers.refresh_schedule import (
    check_interval,
    first_step_of,
    num_shares,
    share_at,
)
from tkfac_jax.training.step_counter import StepCounter
from tkfac_jax.training.step_functions import (
    OFTEN,
    Kind,
    Refresh,
    StepFunctions,
    StepOptions,
    takes_statistics_apart,
)

DONATED = (
    "the step of make_train_step donates the buffers of params and opt_state: give the next step those that it "
    "returned, or copy what is needed again, with jax.tree.map(jnp.copy, ...), before the step."
)


def make_train_step(
    predict: Callable[..., Any],
    likelihood: Likelihoods,
    optimizer: optax.GradientTransformationExtraArgs,
    *,
    layers: Layers | None = None,
    fisher_interval: int | None = None,
    inverse_interval: int | None = None,
    plan: Plan | None = None,
    estimator: Estimator = "sampled",
    num_samples: int = 1,
    sharing: Sharings = "expand",
    rule: Rule | None = None,
    precision: Precision = HIGHEST,
    has_aux: bool = False,
    spread_inverses: bool | None = None,
    statistics_apart: bool | None = None,
    statistics_args: Callable[..., tuple[Any, ...]] | None = None,
    axis_name: str | None = None,
    model_args: Callable[..., tuple[Any, ...]] | None = None,
) -> Callable[..., Any]:
    """Builds a training step that compiles one program for each kind of step.

    What the optimizer was built with (its layers, intervals, rule and axis) is read from its `plan`, and need not be
    said again; what is said here must agree with it.

    Plain steps, steps with new statistics and steps with new inverses are separate programs, so that a plain step
    carries no `lax.cond` and none of its copies. On a CPU, steps with new statistics that are fewer than five steps
    apart are two programs, the gradient with the statistics, which they have in common, and the update; their memory
    is used again at each step. A counter on the host picks; it is read from the state at the first call, and whenever
    the state is not the one returned last. The buffers of `params` and `opt_state` are donated: use what the step
    returns.

    Args:
      predict: the model, `predict(params, *args) -> outputs`.
      likelihood: what the outputs mean, or a mapping (see `sampled_fisher`); the loss is the mean of its `nll` over
        the examples.
      optimizer: an Optax optimizer with one `scale_by_tkfac` in it, such as `tkfac(...)`, or `adaptive_tkfac(...)`.
      layers: what `find_layers` returned; None: the layers of the plan, as for the further arguments with None.
      fisher_interval: T_FIM, steps between new statistics; 1, if the optimizer does not say either.
      inverse_interval: T_INV, steps between new inverses, likewise.
      plan: the plan of the optimizer inside, where a wrapper of Optax's, such as `optax.chain`, has dropped it. With
        neither, `layers` and both intervals are to be given.
      estimator: `"sampled"`, `"empirical"` or `"exact"`, the Fisher of the statistics.
      num_samples: targets drawn per example by the sampled estimator.
      sharing: see `sampled_fisher`.
      rule: `trace_restricted` (TKFAC) or `independent` (KFAC), as the optimizer's.
      precision: precision of the statistics' matrix products.
      has_aux: `predict` returns `(outputs, aux)`, as with the new state of BatchNorm.
      spread_inverses: spreads new inverses over `inverse_interval`, a few layers at a time, so that no step takes much
        longer than others; the first step refreshes all.
      statistics_apart: new statistics come from a program of their own, which makes another forward pass: with
        convolutions such a step then takes little more memory than a plain one, and more time. None: if there are
        convolutions and `fisher_interval` is at least 10.
      statistics_args: from the arguments of `predict` to those with only the first examples of the batch, such as
        `lambda images: (images[:128],)`, over which the statistics are then taken: cheaper, noisier, and unbiased where
        examples come in random order. BatchNorm then normalises them by averages of their own.
      axis_name: run under `jax.pmap` with this axis: every argument has a leading device axis, and
        loss, gradient and statistics are averaged over it.
      model_args: for `adaptive_tkfac`: from the arguments of `predict` to those with only the first examples of the
        batch, such as `lambda images: (images[:125],)`, over which its quadratic model is then taken.

    Returns:
      `step(params, opt_state, *args, targets, key=None, position_mask=None, example_weights=None)`, which returns
      `(params, opt_state, metrics)`; `metrics` is a dictionary with `loss`, `skipped_statistics` and
      `failed_inversions` as the state counts them, `relative_change` (the largest of a layer's weights in this step) of
      `tkfacw`, and `aux` if `has_aux`. Only the sampled
      Fisher needs a `key`; mask and weights as in `sampled_fisher`.

    Raises:
      ValueError: an interval is not a whole number of at least 1, or another option is wrong or not that of the
        optimizer; it has no plan, and what a plan would say is not given; when called, the state holds no
        `TkfacState` or several.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, tkfac_jax as tkfac
      >>> model = nn.Dense(2)
      >>> x, y = jnp.ones((5, 3)), jnp.zeros((5, 2))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> predict = lambda params, x: model.apply({"params": params}, x)
      >>> layers = tkfac.find_layers(predict, params, x)
      >>> optimizer = tkfac.tkfac(0.1, layers, fisher_interval=10, inverse_interval=10)
      >>> step = tkfac.make_train_step(predict, tkfac.Normal(), optimizer)
      >>> state = jax.jit(optimizer.init)(params)
      >>> for i in range(3):
      ...     key = jax.random.fold_in(jax.random.key(1), i)
      ...     params, state, metrics = step(params, state, x, targets=y, key=key)
      >>> sorted(metrics)
      ['failed_inversions', 'loss', 'skipped_statistics']
    """
    check_estimator(estimator)
    check_interval("fisher_interval", fisher_interval)
    check_interval("inverse_interval", inverse_interval)
    if layers is not None:
        check_layers(layers)
    if rule is not None:
        check_rule(rule)
    plan = agreed_plan(
        optimizer,
        plan,
        layers=layers,
        fisher_interval=fisher_interval,
        inverse_interval=inverse_interval,
        spread_inverses=spread_inverses,
        rule=rule,
        axis_name=axis_name,
        likelihood=likelihood,
    )
    layers, axis_name = plan.layers, plan.axis_name
    fisher_interval = known_interval("fisher_interval", plan.fisher_interval)
    inverse_interval = known_interval("inverse_interval", plan.inverse_interval)
    predict = unjitted(predict)
    shares = num_shares(len(layers), inverse_interval) if plan.spread_inverses else 1
    functions = StepFunctions.build(
        predict,
        likelihood,
        optimizer,
        layers,
        StepOptions(
            inverse_interval=inverse_interval,
            shares=shares,
            apart=takes_statistics_apart(layers, fisher_interval, statistics_apart),
            has_aux=has_aux,
            statistics_args=statistics_args,
            model_args=model_args,
            axis_name=axis_name,
        ),
        estimator=estimator,
        num_samples=num_samples,
        rule=plan.rule,
        sharing=sharing,
        precision=precision,
    )

    programs = _Programs(functions, axis_name)
    counter = StepCounter()
    often = fisher_interval < OFTEN

    def kind_of_next(number: int) -> Kind:
        if counter.warmup_left:
            return Kind(True, "none")
        return Kind(
            number % fisher_interval == 0,
            _refresh_at(number, inverse_interval, shares),
            counter.damping_interval > 0 and (number + 1) % counter.damping_interval == 0,
        )

    def step(
        params: Any,
        opt_state: Any,
        *args: Any,
        targets: Any,
        key: Any = None,
        position_mask: Any = None,
        example_weights: Any = None,
    ) -> Any:
        kind = kind_of_next(counter.read(opt_state))
        # What adaptive_tkfac does with the model shares the forward pass of the gradient, within one program.
        in_halves = often and axis_name is None and not counter.adaptive and counter.on_cpu
        data = {
            "targets": targets,
            "key": key,
            "position_mask": position_mask,
            "example_weights": example_weights,
        }
        params, opt_state, metrics = programs.of(kind, in_halves)(params, opt_state, args, data)
        counter.advance(opt_state)
        return params, opt_state, metrics

    return _explaining_donation(step)


def _explaining_donation(step: Callable[..., Any]) -> Callable[..., Any]:
    """The step, whose error about a deleted array says how arrays come to be deleted."""

    @functools.wraps(step)
    def explained(*args: Any, **kwargs: Any) -> Any:
        try:
            return step(*args, **kwargs)
        except (RuntimeError, ValueError) as error:
            if "deleted" in str(error):
                error.add_note(DONATED)
            raise

    return explained


class _Programs:
    """The compiled programs, each made when a step first needs it."""

    def __init__(self, functions: StepFunctions, axis_name: str | None):
        self._functions = functions
        self._axis_name = axis_name
        self._before = functools.cache(self._make_before)
        self.of = functools.cache(self._make)

    def _make(self, kind: Kind, in_halves: bool) -> Callable[..., Any]:
        """A kind of step: one program, or two."""
        step = self._compiled(functools.partial(self._functions.step, kind), donated=(0, 1))
        first = self._before(in_halves) if kind.statistics else None
        if first is None:
            return step

        def in_two(params: Any, opt_state: Any, args: Any, data: dict[str, Any]) -> Any:
            given = first(params, opt_state, args, data)
            return step(params, opt_state, args, data, given)

        return in_two

    def _make_before(self, in_halves: bool) -> Callable[..., Any] | None:
        """The first of the two, the same for all kinds of steps."""
        function = self._functions.before(in_halves=in_halves)
        return None if function is None else self._compiled(function)

    def _compiled(
        self, function: Callable[..., Any], donated: tuple[int, ...] = ()
    ) -> Callable[..., Any]:
        if self._axis_name is not None:
            return jax.pmap(function, axis_name=self._axis_name, donate_argnums=donated)
        return jax.jit(function, donate_argnums=donated)


def _refresh_at(step: int, interval: int, of: int) -> Refresh:
    """Which inverses are refreshed at a step, if they are spread over an interval in so many shares."""
    if step == 0 or of == 1:
        return "all" if step % interval == 0 else "none"
    first = first_step_of(share_at(step, interval, of), interval, of)
    return "share" if step % interval == first else "none"
