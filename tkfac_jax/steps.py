"""What each kind of training step computes: one function to compile, or two, one after the other.

Plain steps are one. Where new statistics come from a program of their own, it is the first of two. Where they come
with the gradient, a CPU is better served by two halves, the gradient with the statistics and the update: a program asks
for all of its memory at once, and what is more than some tens of megabytes the system gives anew at each step, page
by page. The first of two is the same for all kinds of steps, and compiled once.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from tkfac_jax.capture import Options, Rule, trace_restricted
from tkfac_jax.curvature import Share, find_state
from tkfac_jax.dependence import is_independent
from tkfac_jax.estimators import Batch, Estimator, first_examples
from tkfac_jax.gradients import Gradients, gradients_with_fisher
from tkfac_jax.layers import Layers, named_leaves, replace_leaves
from tkfac_jax.rowwise import LayerRows
from tkfac_jax.schedule import share_at
from tkfac_jax.statistics import HIGHEST, Likelihoods, Precision, Sharings, fisher_of
from tkfac_jax.tagged import Statistics

Refresh = Literal["none", "share", "all"]

# Where new statistics are at least so many steps apart, another forward pass for them costs little.
SELDOM = 10


class Kind(NamedTuple):
    """A kind of step.

    Attributes:
      statistics: it takes new statistics.
      refresh: which inverses it refreshes.
      adapt_damping: it is one in which `adaptive_tkfac` adapts its damping.
    """

    statistics: bool
    refresh: Refresh
    adapt_damping: bool = False


class StepOptions(NamedTuple):
    """Options of `make_train_step`, and what follows from them.

    Attributes:
      fisher_interval: as there.
      inverse_interval: as there.
      shares: over how many shares inverses are spread; 1: they are not.
      apart: new statistics come from a program of their own.
      has_aux: as there.
      steps_from_rows: as there.
      statistics_args: as there.
      model_args: as there.
      axis_name: as there.
    """

    fisher_interval: int
    inverse_interval: int
    shares: int = 1
    apart: bool = False
    has_aux: bool = False
    steps_from_rows: bool = True
    statistics_args: Callable[..., tuple[Any, ...]] | None = None
    model_args: Callable[..., tuple[Any, ...]] | None = None
    axis_name: str | None = None

    def refreshes(self) -> list[Refresh]:
        """Which inverses steps with new statistics may refresh."""
        if self.shares > 1:
            return ["all", "share", "none"]
        return ["all", "none"] if self.fisher_interval % self.inverse_interval else ["all"]


class StepFunctions(NamedTuple):
    """The functions of all kinds of steps; `params`, `opt_state`, `args` and `data` are a step's arguments.

    Attributes:
      predict: the model.
      optimizer: the optimizer.
      layers: the layers.
      with_statistics: gradient and statistics from one forward pass.
      without_statistics: the gradient.
      fisher: the statistics.
      options: the options.
    """

    predict: Callable[..., Any]
    optimizer: optax.GradientTransformationExtraArgs
    layers: Layers
    with_statistics: Callable[..., Gradients]
    without_statistics: Callable[..., Gradients]
    fisher: Callable[..., Statistics]
    options: StepOptions

    @classmethod
    def build(
        cls,
        predict: Callable[..., Any],
        likelihood: Likelihoods,
        optimizer: optax.GradientTransformationExtraArgs,
        layers: Layers,
        options: StepOptions,
        *,
        estimator: Estimator = "sampled",
        num_samples: int = 1,
        rule: Rule = trace_restricted,
        sharing: Sharings = "expand",
        precision: Precision = HIGHEST,
    ) -> "StepFunctions":
        """Takes the arguments of `make_train_step`, `predict` not jitted."""
        made = Options(rule, sharing, precision)
        common: dict[str, Any] = {"has_aux": options.has_aux, "axis_name": options.axis_name}
        with_statistics, without_statistics = (
            gradients_with_fisher(
                predict,
                likelihood,
                layers,
                which,
                num_samples=num_samples,
                options=made,
                average=True,
                **common,
            )
            for which in (estimator, None)
        )
        common |= made._asdict()
        fisher = fisher_of(estimator, predict, likelihood, layers, num_samples, **common)
        return cls(predict, optimizer, layers, with_statistics, without_statistics, fisher, options)

    def before(self, *, in_halves: bool) -> Callable[..., Any] | None:
        """What comes before all steps with new statistics, as a program of its own.

        Args:
          in_halves: steps whose statistics come with the gradient are made in two halves.

        Returns:
          `(params, opt_state, args, data) -> given`; None: nothing does.
        """
        if self.options.apart:
            return self._statistics
        return self._first_half if in_halves and self._come_together() else None

    def step(self, kind: Kind, *, in_halves: bool) -> Callable[..., Any]:
        """A kind of step, `(params, opt_state, args, data[, given]) -> (params, opt_state, metrics)`; see `before`."""
        halved = in_halves and kind.statistics and self._come_together()
        return functools.partial(self._second_half if halved else self._whole, kind)

    def _come_together(self) -> bool:
        """Whether statistics come with the gradient, and not from a forward pass of their own."""
        return not self.options.apart and self.options.statistics_args is None

    def _whole(
        self,
        kind: Kind,
        params: Any,
        opt_state: Any,
        args: Any,
        data: dict[str, Any],
        statistics: Statistics | None = None,
    ) -> tuple[Any, Any, dict[str, Any]]:
        """A whole step, for which another program may have taken the statistics."""
        together = kind.statistics and self._come_together()
        found = self._gather(params, args, data, with_statistics=together)
        if kind.statistics and not together:
            if statistics is None:
                statistics = self._statistics(params, opt_state, args, data)
            found = found._replace(statistics=statistics)
        return self._update(kind, params, opt_state, args, data, found)

    def _statistics(
        self, params: Any, opt_state: Any, args: Any, data: dict[str, Any]
    ) -> Statistics:
        """The statistics by themselves, over the examples that are chosen for them."""
        del opt_state
        if self.options.statistics_args is not None:
            args = self.options.statistics_args(*args)
            outputs = jax.eval_shape(self._outputs_fn(args), params)
            examples = jax.tree.leaves(outputs)[0].shape[0]
            batch = Batch(data["position_mask"], data["example_weights"])
            targets, batch = first_examples(examples, data["targets"], batch)
            of_first = {"position_mask": batch.mask, "example_weights": batch.weights}
            data = data | {"targets": targets} | of_first
        return self.fisher(params, *args, **data)

    def _first_half(
        self, params: Any, opt_state: Any, args: Any, data: dict[str, Any]
    ) -> Gradients:
        """What the other half needs: no outputs, no gradients for which rows stand in, no rows that it does not use.

        It does in one kind of step or another; they share this half.
        """
        found = self._gather(params, args, data, with_statistics=True)
        leaves = named_leaves(found.gradient)
        own = {
            leaf: leaves[leaf]
            for name in found.rows
            for leaf in (self.layers[name].kernel, self.layers[name].bias)
            if leaf is not None
        }

        rows = {name: kept._replace(gradient=None) for name, kept in found.rows.items()}

        def other_half(own: dict[str, Any], rows: dict[str, LayerRows]) -> Any:
            gradient = replace_leaves(found.gradient, own)
            changed = found._replace(gradient=gradient, rows=self._standing_for(gradient, rows))
            return [
                self._update(Kind(True, refresh), params, opt_state, args, data, changed)
                for refresh in self.options.refreshes()
            ]

        needless = {}
        if own and is_independent(lambda own: other_half(own, rows), own):
            needless = dict.fromkeys(own)
        elif own and is_independent(lambda rows: other_half(own, rows), rows):
            rows = {}
        return Gradients(
            found.loss,
            (None, found.predicted[1]) if self.options.has_aux else None,
            replace_leaves(found.gradient, needless),
            found.statistics,
            rows,
        )

    def _second_half(
        self,
        kind: Kind,
        params: Any,
        opt_state: Any,
        args: Any,
        data: dict[str, Any],
        given: Gradients,
    ) -> tuple[Any, Any, dict[str, Any]]:
        """The update; a gradient that nothing needs is 0."""
        gradient = jax.tree.map(
            lambda parameter, own: jnp.zeros_like(parameter) if own is None else own,
            params,
            given.gradient,
        )
        rows = self._standing_for(gradient, given.rows)
        found = given._replace(gradient=gradient, rows=rows)
        return self._update(kind, params, opt_state, args, data, found)

    def _standing_for(self, gradient: Any, rows: dict[str, LayerRows]) -> dict[str, LayerRows]:
        """Rows as those that stand for the leaves of a gradient."""
        leaves = named_leaves(gradient)
        specs = {name: self.layers[name] for name in rows}
        own = {
            name: (leaves[spec.kernel], None if spec.bias is None else leaves[spec.bias])
            for name, spec in specs.items()
        }
        return {name: kept._replace(gradient=own[name]) for name, kept in rows.items()}

    def _gather(
        self, params: Any, args: Any, data: dict[str, Any], *, with_statistics: bool
    ) -> Gradients:
        """The gradient, and statistics with it."""
        gradients_of = self.with_statistics if with_statistics else self.without_statistics
        return gradients_of(params, *args, **data, keep_rows=self.options.steps_from_rows)

    def _update(
        self,
        kind: Kind,
        params: Any,
        opt_state: Any,
        args: Any,
        data: dict[str, Any],
        found: Gradients,
    ) -> tuple[Any, Any, dict[str, Any]]:
        options = self.options
        updates, opt_state = self.optimizer.update(
            found.gradient,
            opt_state,
            params,
            statistics=found.statistics,
            refresh_inverses=self._which(kind.refresh, opt_state),
            layer_rows=found.rows,
            # What only adaptive_tkfac looks at.
            adapt_damping=kind.adapt_damping,
            outputs_fn=self._outputs_fn(args),
            targets=data["targets"],
            model_outputs_fn=self._outputs_fn(args, options.model_args),
            position_mask=data["position_mask"],
            example_weights=data["example_weights"],
            axis_name=options.axis_name,
        )
        metrics = {"loss": found.loss} | ({"aux": found.predicted[1]} if options.has_aux else {})
        return optax.apply_updates(params, updates), opt_state, metrics

    def _outputs_fn(
        self, args: tuple[Any, ...], part: Callable[..., tuple[Any, ...]] | None = None
    ) -> Callable[[Any], Any]:
        """The outputs as a function of the parameters, on all of the batch or on a part of it."""
        chosen = args if part is None else part(*args)

        def outputs(params: Any) -> Any:
            predicted = self.predict(params, *chosen)
            return predicted[0] if self.options.has_aux else predicted

        return outputs

    def _which(self, refresh: Refresh, opt_state: Any) -> bool | Share:
        """The optimizer's `refresh_inverses`."""
        if refresh == "share":
            interval, of = self.options.inverse_interval, self.options.shares
            return Share(share_at(find_state(opt_state).step, interval, of), of)
        return refresh == "all"


def takes_statistics_apart(
    layers: Layers, fisher_interval: int, wanted: bool | None = None
) -> bool:
    """Whether new statistics come from a program of their own: as wanted, or where it spares memory cheaply."""
    if wanted is not None:
        return wanted
    return fisher_interval >= SELDOM and any(spec.kind == "conv" for spec in layers.values())
