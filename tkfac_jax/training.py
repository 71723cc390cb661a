"""A training step in which every kind of step is a compiled program of its own."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
import optax

from tkfac_jax.accumulation import AccumulationState
from tkfac_jax.adaptation import find_adaptive
from tkfac_jax.capture import Options, Rule, trace_restricted
from tkfac_jax.curvature import Share, find_state
from tkfac_jax.discovery import unjitted
from tkfac_jax.estimators import Batch, Estimator, first_examples
from tkfac_jax.gradients import Gradients, check_estimator, gradients_with_fisher
from tkfac_jax.layers import Layers
from tkfac_jax.schedule import check_interval, first_step_of, num_shares, share_at
from tkfac_jax.statistics import (
    HIGHEST,
    Likelihoods,
    Precision,
    Sharings,
    fisher_of,
)

ACCUMULATING = (
    "the optimizer is one of multi_steps, whose steps make_train_step cannot tell apart from micro-steps: give "
    "make_train_step the optimizer itself and whole batches, or write the step by hand."
)

Refresh = Literal["none", "share", "all"]

# Where new statistics are at least so many steps apart, another forward pass for them costs little.
SELDOM = 10


def make_train_step(
    predict: Callable[..., Any],
    likelihood: Likelihoods,
    optimizer: optax.GradientTransformationExtraArgs,
    *,
    layers: Layers,
    fisher_interval: int,
    inverse_interval: int,
    estimator: Estimator = "sampled",
    num_samples: int = 1,
    sharing: Sharings = "expand",
    rule: Rule = trace_restricted,
    precision: Precision = HIGHEST,
    has_aux: bool = False,
    spread_inverses: bool = False,
    statistics_apart: bool | None = None,
    statistics_args: Callable[..., tuple[Any, ...]] | None = None,
    steps_from_rows: bool = True,
    axis_name: str | None = None,
    model_args: Callable[..., tuple[Any, ...]] | None = None,
) -> Callable[..., Any]:
    """Builds a training step that compiles one program for each kind of step.

    Plain steps, steps with new statistics and steps with new inverses are separate programs, so
    that a plain step carries no `lax.cond` and none of its copies. A counter on the host picks; it is
    read from the state at the first call, and whenever the state is not the one returned last. The
    buffers of `params` and `opt_state` are donated: use what the step returns.

    Args:
      predict: the model, `predict(params, *args) -> outputs`.
      likelihood: what the outputs mean, or a mapping (see `sampled_fisher`); the loss is the mean of its `nll` over
        the examples.
      optimizer: an Optax optimizer with one `scale_by_tkfac` in it, such as `tkfac(...)`, or `adaptive_tkfac(...)`.
      layers: what `find_layers` returned.
      fisher_interval: T_FIM, steps between new statistics. The optimizer's own intervals are not used.
      inverse_interval: T_INV, steps between new inverses.
      estimator: `"sampled"`, `"empirical"` or `"exact"`, the Fisher of the statistics.
      num_samples: targets drawn per example by the sampled estimator.
      sharing: see `sampled_fisher`.
      rule: `trace_restricted` (TKFAC) or `independent` (KFAC).
      precision: precision of the statistics' matrix products.
      has_aux: `predict` returns `(outputs, aux)`, as with the new state of BatchNorm.
      spread_inverses: spreads new inverses over `inverse_interval`, a few layers at a time, so that no step takes much
        longer than others; the first step refreshes all. The optimizer's own option is not used.
      statistics_apart: new statistics come from a program of their own, which makes another forward pass: with
        convolutions such a step then takes little more memory than a plain one, and more time. None: if there are
        convolutions and `fisher_interval` is at least 10.
      statistics_args: from the arguments of `predict` to those with only the first examples of the batch, such as
        `lambda images: (images[:128],)`, over which the statistics are then taken: cheaper, noisier, and unbiased where
        examples come in random order. BatchNorm then normalises them by averages of their own.
      steps_from_rows: Flax's dense layers that are wider than the batch has rows make their steps from these rows, if
        that takes fewer operations than from their gradient; the steps are the same. Not at steps with new inverses.
        False: never, as for layers that a `jax.lax.scan` of your own repeats, whose repetitions are not seen.
      axis_name: run under `jax.pmap` with this axis: every argument has a leading device axis, and
        loss, gradient and statistics are averaged over it.
      model_args: for `adaptive_tkfac`: from the arguments of `predict` to those with only the first examples of the
        batch, such as `lambda images: (images[:125],)`, over which its quadratic model is then taken.

    Returns:
      `step(params, opt_state, *args, targets, key=None, position_mask=None, example_weights=None)`, which returns
      `(params, opt_state, metrics)`; `metrics` is a dictionary with `loss`, and `aux` if `has_aux`. Only the sampled
      Fisher needs a `key`; mask and weights as in `sampled_fisher`.

    Raises:
      ValueError: an interval is not a whole number of at least 1, or another option is wrong; when
        called, the state holds no `TkfacState` or several.
    """
    check_interval("fisher_interval", fisher_interval)
    check_interval("inverse_interval", inverse_interval)
    check_estimator(estimator)
    predict = unjitted(predict)
    options: dict[str, Any] = {"has_aux": has_aux, "axis_name": axis_name}

    def gradients(estimator: Estimator | None) -> Callable[..., Gradients]:
        return gradients_with_fisher(
            predict,
            likelihood,
            layers,
            estimator,
            num_samples=num_samples,
            options=Options(rule, sharing, precision),
            average=True,
            **options,
        )

    apart = takes_statistics_apart(layers, fisher_interval, statistics_apart)
    with_fisher, without_fisher = gradients(estimator), gradients(None)
    options |= {"sharing": sharing, "rule": rule, "precision": precision}
    fisher = fisher_of(estimator, predict, likelihood, layers, num_samples, **options)

    num = num_shares(len(layers), inverse_interval)

    def only_fisher(params: Any, args: Any, data: dict[str, Any]) -> Any:
        if statistics_args is not None:
            args = statistics_args(*args)
            outputs = jax.eval_shape(_outputs_fn(predict, has_aux, args), params)
            examples = jax.tree.leaves(outputs)[0].shape[0]
            batch = Batch(data["position_mask"], data["example_weights"])
            targets, batch = first_examples(examples, data["targets"], batch)
            of_first = {"position_mask": batch.mask, "example_weights": batch.weights}
            data = data | {"targets": targets} | of_first
        return fisher(params, *args, **data)

    def program(new_statistics: bool, refresh: Refresh, adapt_damping: bool) -> Callable[..., Any]:
        alone = apart or statistics_args is not None
        gradients_of = with_fisher if new_statistics and not alone else without_fisher

        def run(
            params: Any, opt_state: Any, args: Any, data: dict[str, Any], statistics: Any = None
        ) -> Any:
            # Inverses that this step replaces are of no use for steps from rows.
            from_rows = steps_from_rows and refresh == "none"
            inverses = find_state(opt_state).inverses if from_rows else None
            found = gradients_of(params, *args, **data, inverses=inverses)
            if new_statistics and alone and statistics is None:
                statistics = only_fisher(params, args, data)
            updates, opt_state = optimizer.update(
                found.gradient,
                opt_state,
                params,
                statistics=found.statistics if statistics is None else statistics,
                refresh_inverses=_which(refresh, opt_state, inverse_interval, num),
                row_steps=found.row_steps,
                # What only adaptive_tkfac looks at.
                adapt_damping=adapt_damping,
                outputs_fn=_outputs_fn(predict, has_aux, args),
                targets=data["targets"],
                model_outputs_fn=_outputs_fn(predict, has_aux, args, model_args),
                position_mask=data["position_mask"],
                example_weights=data["example_weights"],
                axis_name=axis_name,
            )
            metrics = {"loss": found.loss} | ({"aux": found.predicted[1]} if has_aux else {})
            return optax.apply_updates(params, updates), opt_state, metrics

        step = _compiled(run, axis_name, donated=(0, 1))
        if not (new_statistics and apart):
            return step
        return _in_two(step, _compiled(only_fisher, axis_name))

    programs: dict[tuple[bool, Refresh, bool], Callable[..., Any]] = {}
    counter = _HostCounter()

    def step(
        params: Any,
        opt_state: Any,
        *args: Any,
        targets: Any,
        key: Any = None,
        position_mask: Any = None,
        example_weights: Any = None,
    ) -> Any:
        number, of = counter.read(opt_state), num if spread_inverses else 1
        kind = (
            (True, "none", False)
            if counter.warmup_left
            else (
                number % fisher_interval == 0,
                _refresh_at(number, inverse_interval, of),
                counter.damping_interval > 0 and (number + 1) % counter.damping_interval == 0,
            )
        )
        if kind not in programs:
            programs[kind] = program(*kind)
        data = {
            "targets": targets,
            "key": key,
            "position_mask": position_mask,
            "example_weights": example_weights,
        }
        params, opt_state, metrics = programs[kind](params, opt_state, args, data)
        counter.advance(opt_state)
        return params, opt_state, metrics

    return step


def takes_statistics_apart(
    layers: Layers, fisher_interval: int, wanted: bool | None = None
) -> bool:
    """Whether new statistics come from a program of their own: as wanted, or where it spares memory cheaply."""
    if wanted is not None:
        return wanted
    return fisher_interval >= SELDOM and any(spec.kind == "conv" for spec in layers.values())


def _compiled(
    function: Callable[..., Any], axis_name: str | None, donated: tuple[int, ...] = ()
) -> Callable[..., Any]:
    if axis_name is not None:
        return jax.pmap(function, axis_name=axis_name, donate_argnums=donated)
    return jax.jit(function, donate_argnums=donated)


def _in_two(step: Callable[..., Any], gather: Callable[..., Any]) -> Callable[..., Any]:
    """A step whose statistics another program has gathered."""

    def in_two(params: Any, opt_state: Any, args: Any, data: dict[str, Any]) -> Any:
        return step(params, opt_state, args, data, gather(params, args, data))

    return in_two


def _outputs(predicted: Any, has_aux: bool) -> Any:
    return predicted[0] if has_aux else predicted


def _outputs_fn(
    predict: Callable[..., Any],
    has_aux: bool,
    args: tuple[Any, ...],
    part: Callable[..., tuple[Any, ...]] | None = None,
) -> Callable[[Any], Any]:
    """The outputs as a function of the parameters, on all of the batch or on a part of it."""
    chosen = args if part is None else part(*args)
    return lambda params: _outputs(predict(params, *chosen), has_aux)


def _refresh_at(step: int, interval: int, of: int) -> Refresh:
    """Which inverses are refreshed at a step, if they are spread over an interval in so many shares."""
    if step == 0 or of == 1:
        return "all" if step % interval == 0 else "none"
    first = first_step_of(share_at(step, interval, of), interval, of)
    return "share" if step % interval == first else "none"


def _which(refresh: Refresh, opt_state: Any, interval: int, of: int) -> bool | Share:
    """The optimizer's `refresh_inverses`."""
    if refresh == "share":
        return Share(share_at(find_state(opt_state).step, interval, of), of)
    return refresh == "all"


def _accumulates(opt_state: Any) -> bool:
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda leaf: isinstance(leaf, AccumulationState))
    return any(isinstance(leaf, AccumulationState) for leaf in leaves)


class _HostCounter:
    """The number of the next step, kept on the host so that picking a program waits for no device."""

    def __init__(self) -> None:
        self._number = 0
        self._seen: Any = None
        self.warmup_left = 0
        self.damping_interval = 0

    def read(self, opt_state: Any) -> int:
        """The number of the step that `opt_state` is about to make; in a warm-up, of the one after that."""
        step = find_state(opt_state).step
        if step is not self._seen:
            if _accumulates(opt_state):
                raise ValueError(ACCUMULATING)
            self._number = _on_host(step)
            adaptive = find_adaptive(opt_state)
            self.warmup_left = 0 if adaptive is None else _on_host(adaptive.warmup_left)
            self.damping_interval = 0 if adaptive is None else _on_host(adaptive.damping_interval)
        return self._number

    def advance(self, opt_state: Any) -> None:
        """Counts one step, which returned `opt_state`."""
        if self.warmup_left:
            self.warmup_left -= 1
        else:
            self._number += 1
        self._seen = find_state(opt_state).step


def _on_host(number: Any) -> int:
    # Of a number that several processes hold, each can read its own copy.
    own = number.addressable_data(0) if isinstance(number, jax.Array) else number
    return int(np.asarray(own).flat[0])
