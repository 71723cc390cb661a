"""What each kind of training step computes: one function to compile, or two, one after the other.

Plain steps are one. Where new statistics come from a program of their own, it is the first of two. Where they come
with the gradient and often, a CPU is better served by two halves, the gradient with the statistics and the update: a
program asks for all of its memory at once, and what is more than some tens of megabytes the system gives anew at each
step, page by page. The first of two is the same for all kinds of steps, and compiled once.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from tkfac_jax.curvature.inverses import Share
from tkfac_jax.curvature.state import find_state
from tkfac_jax.fisher.estimators import Batch, Estimator, first_examples
from tkfac_jax.fisher.fisher_functions import HIGHEST, Likelihoods, Precision, Sharings, fisher_of
from tkfac_jax.fisher.layer_statistics import Options, Rule, Statistics, trace_restricted
from tkfac_jax.fisher.value_and_grad import Gradients, gradients_with_fisher
from tkfac_jax.layers.spec import Layers
from tkfac_jax.optimizers.layer_lengths import find_ball
from tkfac_jax.optimizers.refresh_schedule import share_at

Refresh = Literal["none", "share", "all"]

# Where new statistics are at least so many steps apart, another forward pass for them costs little: on ResNet20 a step
# with them then takes an eighth longer, and a quarter less memory.
SELDOM = 10

# Where they are fewer steps apart than this, halves spare more than a twentieth of the time (autoencoder, on a CPU: a
# tenth of steps with new inverses, a sixth of those with new statistics alone). Else a program more is not worth it.
OFTEN = 5


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
      inverse_interval: as there.
      shares: over how many shares inverses are spread; 1: they are not.
      apart: new statistics come from a program of their own.
      has_aux: as there.
      statistics_args: as there.
      model_args: as there.
      axis_name: as there.
    """

    inverse_interval: int
    shares: int = 1
    apart: bool = False
    has_aux: bool = False
    statistics_args: Callable[..., tuple[Any, ...]] | None = None
    model_args: Callable[..., tuple[Any, ...]] | None = None
    axis_name: str | None = None


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

    def step(
        self,
        kind: Kind,
        params: Any,
        opt_state: Any,
        args: Any,
        data: dict[str, Any],
        given: Gradients | Statistics | None = None,
    ) -> tuple[Any, Any, dict[str, Any]]:
        """A step of some kind.

        Args:
          kind: what is new in it.
          params: the parameters.
          opt_state: the optimizer's state.
          args: the further arguments of the model.
          data: targets, key, mask and weights.
          given: what another program has found before; see `before`.

        Returns:
          The parameters, the state and the metrics.
        """
        if isinstance(given, Gradients):
            return self._update(kind, params, opt_state, args, data, given)
        together = kind.statistics and given is None and self._come_together()
        found = self._gather(params, args, data, with_statistics=together)
        if kind.statistics and not together:
            new = self._statistics(params, opt_state, args, data) if given is None else given
            found = found._replace(statistics=new)
        return self._update(kind, params, opt_state, args, data, found)

    def _come_together(self) -> bool:
        """Whether statistics come with the gradient, and not from a forward pass of their own."""
        return not self.options.apart and self.options.statistics_args is None

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
        """Gradient and statistics, without the outputs, which the other half does not need."""
        del opt_state
        found = self._gather(params, args, data, with_statistics=True)
        aux = (None, found.predicted[1]) if self.options.has_aux else None
        return found._replace(predicted=aux)

    def _gather(
        self, params: Any, args: Any, data: dict[str, Any], *, with_statistics: bool
    ) -> Gradients:
        """The gradient, and statistics with it."""
        gradients_of = self.with_statistics if with_statistics else self.without_statistics
        return gradients_of(params, *args, **data)

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
            # What only adaptive_tkfac looks at.
            adapt_damping=kind.adapt_damping,
            outputs_fn=self._outputs_fn(args),
            targets=data["targets"],
            model_outputs_fn=self._outputs_fn(args, options.model_args),
            position_mask=data["position_mask"],
            example_weights=data["example_weights"],
            axis_name=options.axis_name,
        )
        metrics = {"loss": found.loss} | told_by_state(opt_state)
        if options.has_aux:
            metrics["aux"] = found.predicted[1]
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


def told_by_state(opt_state: Any) -> dict[str, Array]:
    """What an optimizer's state tells about how it goes."""
    curvature, ball = find_state(opt_state), find_ball(opt_state)
    told = {
        "skipped_statistics": curvature.skipped_statistics,
        "failed_inversions": curvature.failed_inversions,
    }
    if ball is not None:
        told["relative_change"] = ball.relative_change
    # Arrays of their own: the next step is given the state's, and their memory.
    return {name: jnp.array(value) for name, value in told.items()}


def takes_statistics_apart(
    layers: Layers, fisher_interval: int, wanted: bool | None = None
) -> bool:
    """Whether new statistics come from a program of their own: as wanted, or where it spares memory cheaply."""
    if wanted is not None:
        return wanted
    return fisher_interval >= SELDOM and any(spec.kind == "conv" for spec in layers.values())
