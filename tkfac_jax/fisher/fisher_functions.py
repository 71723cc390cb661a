"""Fisher functions: the statistics of all layers on a batch.

The functions here build other functions, once, from a model's `predict`, a likelihood and the
layers. What they return is pure: it can be jitted, mapped, and called inside `lax.cond`. All of
them pull derivatives of the outputs back through the tagged model (see `tagging`); they differ in
which derivatives they pull back (see `estimators`).
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from tkfac_jax.fisher.estimators import (
    Batch,
    Estimator,
    empirical_estimate,
    exact_estimate,
    sampled_estimate,
)
from tkfac_jax.fisher.joint_likelihood import as_likelihood
from tkfac_jax.fisher.layer_statistics import Options, Rule, Sharing, Statistics, trace_restricted
from tkfac_jax.fisher.likelihoods import Likelihood
from tkfac_jax.fisher.tagged_model import TaggedModel
from tkfac_jax.layers.spec import Layers

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
    check_num_samples(num_samples)
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


def check_num_samples(num_samples: Any) -> None:
    """Refuses what is no number of samples."""
    if not (isinstance(num_samples, int) and num_samples >= 1):
        msg = f"num_samples={num_samples!r}; expected a whole number of at least 1."
        raise ValueError(msg)
