"""Fisher functions: the statistics of all layers on a batch.

The functions here build other functions, once, from a model's `predict`, a likelihood and the
layers. What they return is pure: it can be jitted, mapped, and called inside `lax.cond`. All of
them pull derivatives of the outputs back through the tagged model (see `capture`); they differ in
where the targets come from, and so in which derivatives they pull back.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tkfac_jax.capture import (
    LayerStatistics,
    Rule,
    Sharing,
    tagging,
    trace_restricted,
    zero_slots,
)
from tkfac_jax.discovery import unjitted
from tkfac_jax.layers import Layers, visible_layers
from tkfac_jax.likelihoods import Likelihood

Statistics = dict[str, LayerStatistics]
Estimator = Literal["sampled", "empirical"]

MISSING_KEY = (
    "the sampled Fisher draws targets from the model and needs a key: pass key=jax.random.key(...), "
    "another one at each step."
)
MISSING_TARGETS = "the empirical Fisher takes the data's targets: pass targets=..."


def sampled_fisher(
    predict: Callable[..., Any],
    likelihood: Likelihood,
    layers: Layers,
    *,
    num_samples: int = 1,
    sharing: Sharing = "expand",
    rule: Rule = trace_restricted,
    has_aux: bool = False,
    axis_name: str | None = None,
) -> Callable[..., Statistics]:
    """Builds the function that estimates the Fisher's statistics with targets drawn from the model.

    This is the Fisher information as the paper defines it (Gao et al. 2021, section 3.2): inputs
    from the data, targets from the model's own distribution.

    Args:
      predict: the model, `predict(params, *args, **kwargs) -> outputs`, as given to `find_layers`.
      likelihood: what the outputs mean.
      layers: the layers to gather statistics for.
      num_samples: targets drawn per example; the statistics are averaged over them.
      sharing: several locations of one example (of an image, of a sequence): `"expand"` counts each
        as an observation of its own, as Eq. (4.13); `"reduce"` first averages the inputs and sums
        the gradients over them.
      rule: `trace_restricted` (TKFAC) or `independent` (KFAC).
      has_aux: `predict` returns `(outputs, aux)`; `aux` is dropped.
      axis_name: mapped axis (of `jax.pmap`, `jax.vmap`, or `jax.shard_map` with `check_vma=False`) over
        which the statistics are averaged.

    Returns:
      `fisher(params, *args, key, **kwargs)`: the statistics, a dictionary from a layer's name to its
      `LayerStatistics`, means over the examples. The statistics of equal micro-batches average to
      those of the whole batch.

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
    _check_options(sharing, rule)
    if not (isinstance(num_samples, int) and num_samples >= 1):
        msg = f"num_samples={num_samples!r}; expected a whole number of at least 1."
        raise ValueError(msg)
    model = _Tagged(unjitted(predict), layers, rule, sharing, has_aux)

    def fisher(params: Any, *args: Any, key: Any = None, **kwargs: Any) -> Statistics:
        if key is None:
            raise ValueError(MISSING_KEY)
        outputs, pull_back = model.linearize(params, args, kwargs)
        statistics = _sampled(likelihood, outputs, pull_back, key, num_samples, axis_name)
        return _average(statistics, axis_name)

    return fisher


def empirical_fisher(
    predict: Callable[..., Any],
    likelihood: Likelihood,
    layers: Layers,
    *,
    sharing: Sharing = "expand",
    rule: Rule = trace_restricted,
    has_aux: bool = False,
    axis_name: str | None = None,
) -> Callable[..., Statistics]:
    """Builds the function that estimates the statistics with the targets of the data.

    The empirical Fisher: the second moment of the derivatives of the training loss itself. It is
    not the Fisher information, but needs no random numbers.

    Args:
      predict: the model, `predict(params, *args, **kwargs) -> outputs`, as given to `find_layers`.
      likelihood: what the outputs mean.
      layers: the layers to gather statistics for.
      sharing: see `sampled_fisher`.
      rule: `trace_restricted` (TKFAC) or `independent` (KFAC).
      has_aux: `predict` returns `(outputs, aux)`; `aux` is dropped.
      axis_name: mapped axis (of `jax.pmap`, `jax.vmap`, or `jax.shard_map` with `check_vma=False`) over
        which the statistics are averaged.

    Returns:
      `fisher(params, *args, targets, **kwargs)`: the statistics; see `sampled_fisher`.

    Raises:
      ValueError: an option is wrong; when called: `targets` is missing, or a layer is not applied.
    """
    _check_options(sharing, rule)
    model = _Tagged(unjitted(predict), layers, rule, sharing, has_aux)

    def fisher(params: Any, *args: Any, targets: Any = None, **kwargs: Any) -> Statistics:
        if targets is None:
            raise ValueError(MISSING_TARGETS)
        outputs, pull_back = model.linearize(params, args, kwargs)
        return _average(_with_targets(likelihood, outputs, pull_back, targets), axis_name)

    return fisher


def value_and_grad_with_fisher(
    predict: Callable[..., Any],
    likelihood: Likelihood,
    layers: Layers,
    *,
    estimator: Estimator = "sampled",
    num_samples: int = 1,
    sharing: Sharing = "expand",
    rule: Rule = trace_restricted,
    has_aux: bool = False,
    axis_name: str | None = None,
) -> Callable[..., Any]:
    """Builds the function that gives loss, gradient and statistics from one forward pass.

    The outputs are linearised once; their linearisation is pulled back once for the gradient and
    once per sample for the statistics.

    Args:
      predict: the model, `predict(params, *args, **kwargs) -> outputs`, as given to `find_layers`.
      likelihood: what the outputs mean; the loss is the mean of its `nll` over the examples.
      layers: the layers to gather statistics for.
      estimator: `"sampled"` or `"empirical"`; see `sampled_fisher` and `empirical_fisher`.
      num_samples: targets drawn per example by the sampled estimator.
      sharing: see `sampled_fisher`.
      rule: `trace_restricted` (TKFAC) or `independent` (KFAC).
      has_aux: `predict` returns `(outputs, aux)`.
      axis_name: mapped axis over which the statistics are averaged (loss and gradient are not).

    Returns:
      `f(params, *args, targets, key=None, **kwargs) -> ((loss, predicted), gradient, statistics)`, where
      `predicted` is what `predict` returned: the outputs, or `(outputs, aux)`.

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
    _check_options(sharing, rule)
    if estimator not in ("sampled", "empirical"):
        msg = f'estimator={estimator!r}; expected "sampled" or "empirical".'
        raise ValueError(msg)
    model = _Tagged(unjitted(predict), layers, rule, sharing, has_aux)

    def value_and_grad(
        params: Any, *args: Any, targets: Any, key: Any = None, **kwargs: Any
    ) -> Any:
        if estimator == "sampled" and key is None:
            raise ValueError(MISSING_KEY)
        outputs, pull_back_all, aux = model.linearize_with_params(params, args, kwargs)

        def mean_nll(outputs: Any) -> Array:
            return _per_example(likelihood.nll, outputs, targets).mean()

        loss, derivative = jax.value_and_grad(mean_nll)(outputs)
        gradient, _ = pull_back_all(derivative)

        def pull_back(cotangent: Any) -> Statistics:
            return pull_back_all(cotangent)[1]

        if estimator == "sampled":
            statistics = _sampled(likelihood, outputs, pull_back, key, num_samples, axis_name)
        else:
            statistics = _with_targets(likelihood, outputs, pull_back, targets)
        predicted = (outputs, aux) if has_aux else outputs
        return (loss, predicted), gradient, _average(statistics, axis_name)

    return value_and_grad


class _Tagged(NamedTuple):
    """A model whose registered layers are tagged, so that a pull-back yields their statistics."""

    predict: Callable[..., Any]
    layers: Layers
    rule: Rule
    sharing: Sharing
    has_aux: bool

    def linearize(
        self, params: Any, args: Any, kwargs: Any
    ) -> tuple[Any, Callable[[Any], Statistics]]:
        """Outputs, and the map from output derivatives to statistics summed over examples."""
        visible_layers(self.layers, params, "params")
        params = _distinct(params)
        outputs, pull_back, _ = jax.vjp(
            lambda slots: self._call(params, slots, args, kwargs),
            zero_slots(self.layers),
            has_aux=True,
        )
        return outputs, lambda cotangent: pull_back(cotangent)[0]

    def linearize_with_params(
        self, params: Any, args: Any, kwargs: Any
    ) -> tuple[Any, Callable[[Any], Any], Any]:
        """Outputs, the map from their derivatives to `(gradient, statistics)`, and aux."""
        visible_layers(self.layers, params, "params")
        return jax.vjp(
            lambda params, slots: self._call(params, slots, args, kwargs),
            params,
            zero_slots(self.layers),
            has_aux=True,
        )

    def _call(self, params: Any, slots: Statistics, args: Any, kwargs: Any) -> tuple[Any, Any]:
        with tagging(self.layers, params, slots, self.rule, self.sharing) as tagged:
            predicted = self.predict(params, *args, **kwargs)
        for name in self.layers:
            if name not in tagged:
                msg = (
                    f"layer '{name}' was not applied to its kernel as it stands in params, so it has no "
                    "statistics. Pass the same predict and params as to find_layers, and no part of it "
                    "under jax.jit or nn.jit: a cached trace hides its layers."
                )
                raise ValueError(msg)
        return predicted if self.has_aux else (predicted, None)


def _distinct(params: Any) -> Any:
    """Copies leaves that are one object in two places: layers are told apart by identity."""
    seen: set[int] = set()

    def copy_if_seen(leaf: Any) -> Any:
        if id(leaf) in seen:
            return jnp.array(leaf, copy=True)
        seen.add(id(leaf))
        return leaf

    return jax.tree.map(copy_if_seen, params)


def _per_example(nll: Callable[[Any, Any], Array], outputs: Any, targets: Any) -> Array:
    values = nll(outputs, targets)
    if jnp.ndim(values) != 1:
        msg = (
            f"the likelihood's nll returned shape {jnp.shape(values)}; expected one number per "
            "example, shape (batch,)."
        )
        raise ValueError(msg)
    return values


def _with_targets(
    likelihood: Any, outputs: Any, pull_back: Callable[[Any], Statistics], targets: Any
) -> Statistics:
    """Means over examples of the statistics under given targets."""
    nll = getattr(likelihood, "fisher_nll", likelihood.nll)

    def total(outputs: Any) -> tuple[Array, int]:
        values = _per_example(nll, outputs, targets)
        # The sum, not the mean: each example then carries the derivative of its own loss.
        return values.sum(), len(values)

    cotangent, examples = jax.grad(total, has_aux=True)(outputs)
    return jax.tree.map(lambda sums: sums / examples, pull_back(cotangent))


def _sampled(
    likelihood: Any,
    outputs: Any,
    pull_back: Callable[[Any], Statistics],
    key: Any,
    num_samples: int,
    axis_name: str | None,
) -> Statistics:
    """Means over examples and samples of the statistics under targets drawn from the model."""
    outputs = jax.lax.stop_gradient(outputs)
    if axis_name is not None:
        # Devices that were given the same key must not draw the same targets.
        key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))

    def one_sample(key: Any) -> Statistics:
        targets = likelihood.sample(key, outputs)
        return _with_targets(likelihood, outputs, pull_back, targets)

    if num_samples == 1:
        return one_sample(key)
    samples = jax.lax.map(one_sample, jax.random.split(key, num_samples))
    return jax.tree.map(lambda sample: sample.mean(axis=0), samples)


def _average(statistics: Statistics, axis_name: str | None) -> Statistics:
    return statistics if axis_name is None else jax.lax.pmean(statistics, axis_name)


def _check_options(sharing: str, rule: Any) -> None:
    if sharing not in ("expand", "reduce"):
        msg = f'sharing={sharing!r}; expected "expand" or "reduce".'
        raise ValueError(msg)
    if not callable(rule):
        msg = f"rule={rule!r}; expected tkfac_jax.trace_restricted or tkfac_jax.independent."
        raise ValueError(msg)


def check_statistics(statistics: Any, layers: Layers) -> None:
    """Refuses statistics that are not those of the layers.

    Raises:
      ValueError: a layer is missing or unknown, or its statistics have other shapes.
    """
    if not isinstance(statistics, dict) or set(statistics) != set(layers):
        received = sorted(statistics) if isinstance(statistics, dict) else type(statistics).__name__
        msg = (
            f"statistics are for {received}; expected a dictionary for the layers {sorted(layers)}. "
            "Build the Fisher function and the optimizer from the same layers."
        )
        raise ValueError(msg)
    for name, spec in layers.items():
        expected = ((spec.d_in, spec.d_in), (spec.d_out, spec.d_out), ())
        received = tuple(jnp.shape(array) for array in statistics[name])
        if received != expected:
            msg = f"statistics of layer '{name}' have shapes {received}; expected {expected}."
            raise ValueError(msg)
