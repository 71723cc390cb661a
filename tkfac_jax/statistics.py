"""Fisher functions: the statistics of all layers on a batch.

The functions here build other functions, once, from a model's `predict`, a likelihood and the
layers. What they return is pure: it can be jitted, mapped, and called inside `lax.cond`. All of
them pull derivatives of the outputs back through the tagged model (see `capture`); they differ in
which derivatives they pull back (see `estimators`).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float

from tkfac_jax.capture import Options, Rule, Sharing, trace_restricted
from tkfac_jax.dependence import used_elsewhere
from tkfac_jax.estimators import (
    Batch,
    Estimate,
    Estimator,
    empirical_estimate,
    exact_estimate,
    nll_of,
    sampled_estimate,
)
from tkfac_jax.inverses import KroneckerInverses
from tkfac_jax.joint import as_likelihood
from tkfac_jax.layers import Layers
from tkfac_jax.likelihoods import Likelihood
from tkfac_jax.meshes import mean_over, vary, varying_axes
from tkfac_jax.rowwise import RowStep, RowSteps
from tkfac_jax.tagged import Statistics, TaggedModel, Wanted

Likelihoods = Likelihood | Mapping[str, Likelihood]
Sharings = Sharing | Mapping[str, Sharing]
Precision = jax.lax.PrecisionLike
HIGHEST = jax.lax.Precision.HIGHEST

MISSING_KEY = (
    "the sampled Fisher draws targets from the model and needs a key: pass key=jax.random.key(...), "
    "another one at each step."
)
MISSING_TARGETS = "the empirical Fisher takes the data's targets: pass targets=..."


def sampled_fisher(
    predict: Callable[..., Any],
    likelihood: Likelihoods,
    layers: Layers,
    *,
    num_samples: int = 1,
    sharing: Sharings = "expand",
    rule: Rule = trace_restricted,
    precision: Precision = HIGHEST,
    has_aux: bool = False,
    axis_name: str | None = None,
) -> Callable[..., Statistics]:
    """Builds the function that estimates the Fisher's statistics with targets drawn from the model.

    This is the Fisher information as the paper defines it (Gao et al. 2021, section 3.2): inputs
    from the data, targets from the model's own distribution.

    Args:
      predict: the model, `predict(params, *args, **kwargs) -> outputs`, as given to `find_layers`.
      likelihood: what the outputs mean. For several outputs a mapping, with outputs and targets under the
        same keys; the loss is then the sum.
      layers: the layers to gather statistics for.
      num_samples: targets drawn per example; the statistics are averaged over them.
      sharing: several locations of one example (of an image, of a sequence): `"expand"` counts each
        as an observation of its own, as Eq. (4.13); `"reduce"` first averages the inputs and sums
        the gradients over them, and wants the examples on the first axis of every layer's input. A mapping
        says it for each layer by name; layers that it leaves out are expanded.
      rule: `trace_restricted` (TKFAC) or `independent` (KFAC).
      precision: precision of the statistics' matrix products.
      has_aux: `predict` returns `(outputs, aux)`; `aux` is dropped.
      axis_name: mapped axis (of `jax.pmap`, `jax.vmap` or `jax.shard_map`) over which the statistics are averaged.

    Returns:
      `fisher(params, *args, key, position_mask=None, example_weights=None, **kwargs)`: the statistics, a
      dictionary from a layer's name to its `LayerStatistics`, means over the examples. The statistics of
      equal micro-batches average to those of the whole batch.

      `position_mask`, `(batch, *positions)`, is False where a position of an example is padding: it then counts
      neither in the likelihood nor in a layer with as many locations. `example_weights`, `(batch,)`, is what
      each example's loss is multiplied by; the mean stays one over the number of examples.

    Raises:
      ValueError: an option is wrong; when called: `key` is missing, or a layer is not applied.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, tkfac_jax as tkfac
      >>> model = nn.Dense(2, use_bias=False)
      >>> x = jnp.ones((5, 3))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> predict = lambda params, x: model.apply({"params": params}, x)
      >>> layers = tkfac.find_layers(predict, params, x)
      >>> fisher = tkfac.sampled_fisher(predict, tkfac.Normal(), layers)
      >>> statistics = fisher(params, x, key=jax.random.key(1))
      >>> statistics["."].input_moment.shape, statistics["."].output_moment.shape
      ((3, 3), (2, 2))
    """
    _check_num_samples(num_samples)
    model = TaggedModel.build(predict, layers, Options(rule, sharing, precision), has_aux)
    likelihood = as_likelihood(likelihood)

    def fisher(
        params: Any,
        *args: Any,
        key: Any = None,
        position_mask: Any = None,
        example_weights: Any = None,
        **kwargs: Any,
    ) -> Statistics:
        if key is None:
            raise ValueError(MISSING_KEY)
        batch = Batch(position_mask, example_weights)
        estimate = sampled_estimate(likelihood, batch, key, num_samples, axis_name)
        return model.statistics(estimate, batch, axis_name, params, args, kwargs)

    return fisher


def empirical_fisher(
    predict: Callable[..., Any],
    likelihood: Likelihoods,
    layers: Layers,
    *,
    sharing: Sharings = "expand",
    rule: Rule = trace_restricted,
    precision: Precision = HIGHEST,
    has_aux: bool = False,
    axis_name: str | None = None,
) -> Callable[..., Statistics]:
    """Builds the function that estimates the statistics with the targets of the data.

    The empirical Fisher: the second moment of the derivatives of the training loss itself. It is
    not the Fisher information, but needs no random numbers.

    Args:
      predict: the model, `predict(params, *args, **kwargs) -> outputs`, as given to `find_layers`.
      likelihood: what the outputs mean, or a mapping; see `sampled_fisher`.
      layers: the layers to gather statistics for.
      sharing: see `sampled_fisher`.
      rule: `trace_restricted` (TKFAC) or `independent` (KFAC).
      precision: precision of the statistics' matrix products.
      has_aux: `predict` returns `(outputs, aux)`; `aux` is dropped.
      axis_name: mapped axis over which the statistics are averaged; see `sampled_fisher`.

    Returns:
      `fisher(params, *args, targets, position_mask=None, example_weights=None, **kwargs)`: the statistics;
      see `sampled_fisher`.

    Raises:
      ValueError: an option is wrong; when called: `targets` is missing, or a layer is not applied.
    """
    model = TaggedModel.build(predict, layers, Options(rule, sharing, precision), has_aux)
    likelihood = as_likelihood(likelihood)

    def fisher(
        params: Any,
        *args: Any,
        targets: Any = None,
        position_mask: Any = None,
        example_weights: Any = None,
        **kwargs: Any,
    ) -> Statistics:
        if targets is None:
            raise ValueError(MISSING_TARGETS)
        batch = Batch(position_mask, example_weights)
        estimate = empirical_estimate(likelihood, batch, targets)
        return model.statistics(estimate, batch, axis_name, params, args, kwargs, targets)

    return fisher


def exact_fisher(
    predict: Callable[..., Any],
    likelihood: Likelihoods,
    layers: Layers,
    *,
    sharing: Sharings = "expand",
    rule: Rule = trace_restricted,
    precision: Precision = HIGHEST,
    has_aux: bool = False,
    axis_name: str | None = None,
) -> Callable[..., Statistics]:
    """Builds the function that computes the statistics' expectation over targets in closed form.

    The Fisher of an example's outputs is a sum of outer products of vectors, which are pulled back
    one after the other: as many backward passes as an example has outputs (classes times positions). For all
    three likelihoods this is also the Gauss-Newton matrix.

    Args:
      predict: the model, `predict(params, *args, **kwargs) -> outputs`, as given to `find_layers`.
      likelihood: what the outputs mean, or a mapping; it needs `num_fisher_vectors` and `fisher_vector`, as the
        likelihoods of this package have them.
      layers: the layers to gather statistics for.
      sharing: see `sampled_fisher`.
      rule: `trace_restricted` (TKFAC) or `independent` (KFAC).
      precision: precision of the statistics' matrix products.
      has_aux: `predict` returns `(outputs, aux)`; `aux` is dropped.
      axis_name: mapped axis over which the statistics are averaged; see `sampled_fisher`.

    Returns:
      `fisher(params, *args, position_mask=None, example_weights=None, **kwargs)`: the statistics; see
      `sampled_fisher`, whose expectation they are.

    Raises:
      ValueError: an option is wrong, or the likelihood has no closed form; when called: a layer is
        not applied.

    Example:
      >>> import jax.numpy as jnp, tkfac_jax as tkfac, flax.linen as nn, jax
      >>> model = nn.Dense(2, use_bias=False)
      >>> x = jnp.array([[2.0, 0.0]])
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> predict = lambda params, x: model.apply({"params": params}, x)
      >>> layers = tkfac.find_layers(predict, params, x)
      >>> fisher = tkfac.exact_fisher(predict, tkfac.Normal(variance=0.5), layers)
      >>> float(fisher(params, x)["."].trace)  # |x|^2 times two outputs of Fisher 1 / 0.5
      16.0
    """
    model = TaggedModel.build(predict, layers, Options(rule, sharing, precision), has_aux)
    likelihood = as_likelihood(likelihood)
    estimate_on = exact_estimate(likelihood)

    def fisher(
        params: Any,
        *args: Any,
        position_mask: Any = None,
        example_weights: Any = None,
        **kwargs: Any,
    ) -> Statistics:
        batch = Batch(position_mask, example_weights)
        return model.statistics(estimate_on(batch), batch, axis_name, params, args, kwargs)

    return fisher


def fisher_of(
    estimator: Estimator,
    predict: Callable[..., Any],
    likelihood: Likelihoods,
    layers: Layers,
    num_samples: int,
    **options: Any,
) -> Callable[..., Statistics]:
    """The Fisher function of an estimator's name, which takes what any of them needs: `targets` and `key`."""
    if estimator == "sampled":
        options["num_samples"] = num_samples
    build = {"sampled": sampled_fisher, "empirical": empirical_fisher, "exact": exact_fisher}
    needs = {"sampled": "key", "empirical": "targets", "exact": None}[estimator]
    fisher = build[estimator](predict, likelihood, layers, **options)

    def chosen(params: Any, *args: Any, targets: Any, key: Any, **kwargs: Any) -> Statistics:
        given = {"key": key, "targets": targets}
        needed = {name: value for name, value in given.items() if name == needs}
        return fisher(params, *args, **needed, **kwargs)

    return chosen


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
    once per sample for the statistics.

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
      row_steps: by layer, the step made from the rows of the batch, where that may be cheaper.
    """

    loss: Float[Array, ""]
    predicted: Any
    gradient: Any
    statistics: Statistics | None
    row_steps: dict[str, RowStep]


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
      `f(params, *args, targets, key, position_mask, example_weights, inverses=None, **kwargs)`. With the inverses of
      an optimizer's state it makes steps from rows.
    """
    _check_num_samples(num_samples)
    model = TaggedModel.build(predict, layers, options, has_aux)
    likelihood = as_likelihood(likelihood)
    exact_on = exact_estimate(likelihood) if estimator == "exact" else None

    def estimate_on(batch: Batch, targets: Any, key: Any) -> Estimate:
        if exact_on is not None:
            return exact_on(batch)
        if estimator == "empirical":
            return empirical_estimate(likelihood, batch, targets)
        if key is None:
            raise ValueError(MISSING_KEY)
        return sampled_estimate(likelihood, batch, key, num_samples, axis_name)

    def gradients_of(
        params: Any,
        *args: Any,
        targets: Any,
        key: Any = None,
        position_mask: Any = None,
        example_weights: Any = None,
        inverses: Mapping[str, KroneckerInverses] | None = None,
        **kwargs: Any,
    ) -> Gradients:
        batch = Batch(position_mask, example_weights)
        estimate = None if estimator is None else estimate_on(batch, targets, key)
        axes = varying_axes((params, args, kwargs, batch, targets))
        rows = RowSteps(layers, {} if inverses is None else inverses, params)
        wanted = Wanted(
            vary(params, axes),
            None if estimate is None else model.zero_slots(axes),
            rows.zero_slots(axes),
        )
        outputs, pull_back, aux = model.linearize(wanted, params, batch, args, kwargs, rows)
        rows.pulls_back()
        loss, derivative = jax.value_and_grad(
            lambda outputs: nll_of(likelihood, outputs, targets, batch).mean()
        )(outputs)
        pulled = pull_back(derivative)
        gradient, steps = pulled.gradient, pulled.steps
        statistics = None
        if estimate is not None:
            summed = estimate(outputs, lambda cotangent: pull_back(cotangent).statistics)
            statistics = mean_over(summed, axis_name)
        if average and axis_name is not None:
            loss, gradient, steps = jax.lax.pmean((loss, gradient, steps), axis_name)
        found = rows.steps(gradient, steps)
        # What else a kernel does for the outputs is in its gradient, and in no rows.
        others = used_elsewhere(
            lambda params: model.outputs(params, args, kwargs), params, [layers[n] for n in found]
        )
        row_steps = {name: step for name, step in found.items() if name not in others}
        predicted = (outputs, aux) if has_aux else outputs
        return Gradients(loss, predicted, gradient, statistics, row_steps)

    return gradients_of


def check_estimator(estimator: Any) -> None:
    """Refuses what is no estimator."""
    if estimator not in ("sampled", "empirical", "exact"):
        msg = f'estimator={estimator!r}; expected "sampled", "empirical" or "exact".'
        raise ValueError(msg)


def _check_num_samples(num_samples: Any) -> None:
    if not (isinstance(num_samples, int) and num_samples >= 1):
        msg = f"num_samples={num_samples!r}; expected a whole number of at least 1."
        raise ValueError(msg)
