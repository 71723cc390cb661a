"""Loss, gradient and statistics of all layers from one forward pass."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float

from tkfac_jax.fisher.estimators import (
    Batch,
    Estimate,
    Estimator,
    empirical_estimate,
    exact_estimate,
    nll_of,
    sampled_estimate,
)
from tkfac_jax.fisher.fisher_functions import (
    HIGHEST,
    MISSING_KEY,
    Likelihoods,
    Precision,
    Sharings,
    check_num_samples,
)
from tkfac_jax.fisher.joint_likelihood import as_likelihood, fisher_scale
from tkfac_jax.fisher.layer_statistics import Options, Rule, Statistics, trace_restricted
from tkfac_jax.fisher.tagged_model import TaggedModel, Wanted
from tkfac_jax.layers.spec import Layers
from tkfac_jax.linalg.meshes import mean_over, vary, varying_axes


def value_and_grad_with_fisher(
    predict: Callable[..., Any],
    likelihood: Likelihoods,
    layers: Layers,
    *,
    estimator: Estimator = "sampled",
    num_samples: int = 1,
    sharing: Sharings = "expand",
    rule: Rule = trace_restricted,
    precision: Precision = HIGHEST,
    has_aux: bool = False,
    axis_name: str | None = None,
) -> Callable[..., Any]:
    """Builds the function that gives loss, gradient and statistics from one forward pass.

    The outputs are linearised once; their linearisation is pulled back once for the gradient and
    once per sample for the statistics. The empirical Fisher of a batch without mask and weights needs the one pull-back
    of the gradient alone, unless the likelihood has a `fisher_nll` without a `fisher_scale`; see `Likelihood`.

    Args:
      predict: the model, `predict(params, *args, **kwargs) -> outputs`, as given to `find_layers`.
      likelihood: what the outputs mean, or a mapping (see `sampled_fisher`); the loss is the mean of its `nll` over
        the examples.
      layers: the layers to gather statistics for.
      estimator: `"sampled"`, `"empirical"` or `"exact"`; see `sampled_fisher`, `empirical_fisher`, `exact_fisher`.
      num_samples: targets drawn per example by the sampled estimator.
      sharing: see `sampled_fisher`.
      rule: `trace_restricted` (TKFAC) or `independent` (KFAC).
      precision: precision of the statistics' matrix products.
      has_aux: `predict` returns `(outputs, aux)`.
      axis_name: mapped axis over which the statistics are averaged. Loss and gradient are not: they are those of the
        device's own examples, under `jax.shard_map` whether it checks replication or not.

    Returns:
      `f(params, *args, targets, key=None, position_mask=None, example_weights=None, **kwargs)`, which returns
      `((loss, predicted), gradient, statistics)`, where `predicted` is what `predict` returned: the outputs, or
      `(outputs, aux)`. Mask and weights as in `sampled_fisher`, in the loss too.

    Raises:
      ValueError: an option is wrong; when called: `key` is missing, or a layer is not applied.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, tkfac_jax as tkfac
      >>> model = nn.Dense(2)
      >>> x, y = jnp.ones((5, 3)), jnp.ones((5, 2))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> predict = lambda params, x: model.apply({"params": params}, x)
      >>> layers = tkfac.find_layers(predict, params, x)
      >>> f = tkfac.value_and_grad_with_fisher(predict, tkfac.Normal(), layers)
      >>> (loss, outputs), gradient, statistics = f(params, x, targets=y, key=jax.random.key(1))
      >>> outputs.shape, gradient["kernel"].shape, list(statistics)
      ((5, 2), (3, 2), ['.'])
    """
    check_estimator(estimator)
    gradients_of = gradients_with_fisher(
        predict,
        likelihood,
        layers,
        estimator,
        num_samples=num_samples,
        options=Options(rule, sharing, precision),
        has_aux=has_aux,
        axis_name=axis_name,
    )

    def value_and_grad(params: Any, *args: Any, targets: Any, **kwargs: Any) -> Any:
        gradients = gradients_of(params, *args, targets=targets, **kwargs)
        return (gradients.loss, gradients.predicted), gradients.gradient, gradients.statistics

    return value_and_grad


class Gradients(NamedTuple):
    """What one forward pass gives.

    Attributes:
      loss: the mean loss of the batch.
      predicted: what `predict` returned.
      gradient: of the loss.
      statistics: of the layers, or None.
    """

    loss: Float[Array, ""]
    predicted: Any
    gradient: Any
    statistics: Statistics | None


def gradients_with_fisher(
    predict: Callable[..., Any],
    likelihood: Likelihoods,
    layers: Layers,
    estimator: Estimator | None,
    *,
    num_samples: int,
    options: Options,
    has_aux: bool,
    axis_name: str | None,
    average: bool = False,
) -> Callable[..., Gradients]:
    """Builds the function behind `value_and_grad_with_fisher`, whose arguments it takes.

    Args:
      predict: the model.
      likelihood: what the outputs mean.
      layers: the layers.
      estimator: the Fisher of the statistics; None: no statistics.
      num_samples: targets drawn per example.
      options: how statistics are made.
      has_aux: `predict` returns `(outputs, aux)`.
      axis_name: mapped axis over which the statistics are averaged.
      average: loss and gradient are averaged over it, too.

    Returns:
      `f(params, *args, targets, key, position_mask, example_weights, **kwargs)`.
    """
    check_num_samples(num_samples)
    model = TaggedModel.build(predict, layers, options, has_aux)
    likelihood = as_likelihood(likelihood)
    estimates = _Estimates.of(estimator, likelihood, num_samples, axis_name)

    def gradients_of(
        params: Any,
        *args: Any,
        targets: Any,
        key: Any = None,
        position_mask: Any = None,
        example_weights: Any = None,
        **kwargs: Any,
    ) -> Gradients:
        batch = Batch(position_mask, example_weights)
        estimate = estimates.on(batch, targets, key)
        axes = varying_axes((params, args, kwargs, batch, targets))
        wanted = Wanted(
            vary(params, axes),
            None if estimate is None else model.zero_slots(axes),
        )
        outputs, pull_back, aux = model.linearize(wanted, params, batch, args, kwargs)
        loss, derivative = jax.value_and_grad(
            lambda outputs: nll_of(likelihood, outputs, targets, batch).mean()
        )(outputs)
        scale = estimates.one_pass_scale(outputs, batch)
        gradient, statistics = _pulled_back(pull_back, outputs, derivative, estimate, scale)
        if statistics is not None:
            statistics = mean_over(statistics, axis_name)
        if average and axis_name is not None:
            loss, gradient = jax.lax.pmean((loss, gradient), axis_name)
        predicted = (outputs, aux) if has_aux else outputs
        return Gradients(loss, predicted, gradient, statistics)

    return gradients_of


class _Estimates(NamedTuple):
    """How statistics are estimated, whatever the batch.

    Attributes:
      estimator: the Fisher; None: no statistics.
      likelihood: what the outputs mean.
      num_samples: targets drawn per example.
      axis_name: mapped axis whose devices draw targets of their own.
      exact: the exact estimate, if that is wanted.
    """

    estimator: Estimator | None
    likelihood: Any
    num_samples: int
    axis_name: str | None
    exact: Callable[[Batch], Estimate] | None

    @classmethod
    def of(
        cls, estimator: Estimator | None, likelihood: Any, num_samples: int, axis_name: str | None
    ) -> "_Estimates":
        """Refuses the exact Fisher of a likelihood without a closed form."""
        exact = exact_estimate(likelihood) if estimator == "exact" else None
        return cls(estimator, likelihood, num_samples, axis_name, exact)

    def on(self, batch: Batch, targets: Any, key: Any) -> Estimate | None:
        """The estimate on a batch."""
        if self.estimator is None:
            return None
        if self.exact is not None:
            return self.exact(batch)
        if self.estimator == "empirical":
            return empirical_estimate(self.likelihood, batch, targets)
        if key is None:
            raise ValueError(MISSING_KEY)
        return sampled_estimate(self.likelihood, batch, key, self.num_samples, self.axis_name)

    def one_pass_scale(self, outputs: Any, batch: Batch) -> float | None:
        """What the pull-back of an estimate is the gradient multiplied by; None: it is another direction."""
        same_targets = self.estimator == "empirical"
        if same_targets and batch.mask is None and batch.weights is None:
            return fisher_scale(self.likelihood, outputs)
        return None


def _pulled_back(
    pull_back: Callable[[Any], Wanted],
    outputs: Any,
    derivative: Any,
    estimate: Estimate | None,
    scale: float | None,
) -> Wanted:
    """The gradient, and statistics where there is an estimate, in one pull-back if its scale is known."""
    if estimate is None:
        return pull_back(derivative)
    if scale is None:
        gradient = pull_back(derivative).gradient
        return Wanted(gradient, estimate(outputs, lambda c: pull_back(c).statistics))
    both = estimate(outputs, pull_back)
    return both._replace(gradient=jax.tree.map(lambda leaf: leaf / scale, both.gradient))


def check_estimator(estimator: Any) -> None:
    """Refuses what is no estimator."""
    if estimator not in ("sampled", "empirical", "exact"):
        msg = f'estimator={estimator!r}; expected "sampled", "empirical" or "exact".'
        raise ValueError(msg)
