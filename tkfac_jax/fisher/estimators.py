"""Which derivatives of the outputs are pulled back, and so which Fisher the statistics are of.

An estimate takes the outputs and the map `pull_back` from derivatives of the outputs to statistics summed over
examples; it returns the statistics' mean over the examples.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tkfac_jax.fisher.joint_likelihood import check_closed_form
from tkfac_jax.linalg.meshes import sum_over

Estimator = Literal["sampled", "empirical", "exact"]
PullBack = Callable[[Any], Any]
Estimate = Callable[[Any, PullBack], Any]


class Batch(NamedTuple):
    """What is known of a batch's examples beside inputs and targets.

    Attributes:
      mask: False where a position of an example is padding, `(batch, *positions)`, or a mapping of such for a
        mapping of likelihoods; None: no padding.
      weights: what each example's loss is multiplied by, `(batch,)`; None: 1.
    """

    mask: Any = None
    weights: Array | None = None

    @property
    def location_mask(self) -> Array | None:
        """The mask for the layers: the one that there is, if it is one."""
        masks = jax.tree.leaves(self.mask)
        return masks[0] if len(masks) == 1 else None

    def options(self) -> dict[str, Any]:
        """The mask as a keyword argument of a likelihood's methods, where there is one."""
        return {} if self.mask is None else {"mask": self.mask}


def first_examples(examples: int, targets: Any, batch: Batch) -> tuple[Any, Batch]:
    """The targets, masks and weights of the first examples; weights such that their mean stays that of the batch.

    Raises:
      ValueError: there are fewer targets than examples.
    """
    size = jax.tree.leaves(targets)[0].shape[0]
    if examples > size:
        msg = (
            f"the outputs are of {examples} examples and the targets of {size}; expected at most so many outputs: of "
            "the batch, or of its first examples."
        )
        raise ValueError(msg)
    if examples == size:
        return targets, batch
    targets, mask = jax.tree.map(lambda leaf: leaf[:examples], (targets, batch.mask))
    if batch.weights is None:
        return targets, Batch(mask)
    weights = batch.weights[:examples]
    ratio = batch.weights.mean() / jnp.where(weights.sum() > 0, weights.mean(), 1)
    return targets, Batch(mask, weights * ratio)


def nll_of(likelihood: Any, outputs: Any, targets: Any, batch: Batch) -> Array:
    """The weighted loss of each example, `(batch,)`."""
    values = _per_example(likelihood.nll(outputs, targets, **batch.options()))
    return values if batch.weights is None else values * batch.weights


def empirical_estimate(likelihood: Any, batch: Batch, targets: Any) -> Estimate:
    """The statistics under given targets."""

    def estimate(outputs: Any, pull_back: PullBack) -> Any:
        sums, examples = _with_targets(likelihood, batch, outputs, pull_back, targets)
        return _divide(sums, examples)

    return estimate


def sampled_estimate(
    likelihood: Any, batch: Batch, key: Any, num_samples: int, axis_name: str | None
) -> Estimate:
    """The mean of the statistics under targets drawn from the model."""

    def estimate(outputs: Any, pull_back: PullBack) -> Any:
        outputs = jax.lax.stop_gradient(outputs)
        # Devices that were given the same key must not draw the same targets.
        own_key = (
            key if axis_name is None else jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        )

        def one_sample(key: Any) -> tuple[Any, Array]:
            targets = likelihood.sample(key, outputs)
            return _with_targets(likelihood, batch, outputs, pull_back, targets)

        if num_samples == 1:
            return _divide(*one_sample(own_key))
        keys = jax.random.split(own_key, num_samples)
        sums, examples = sum_over(one_sample, keys)
        return _divide(sums, examples)

    return estimate


def exact_estimate(likelihood: Any) -> Callable[[Batch], Estimate]:
    """The expectation of the statistics under the model's own targets.

    Raises:
      ValueError: the likelihood does not say what its Fisher is.
    """
    check_closed_form(likelihood)

    def on(batch: Batch) -> Estimate:
        def estimate(outputs: Any, pull_back: PullBack) -> Any:
            outputs = jax.lax.stop_gradient(outputs)
            count = likelihood.num_fisher_vectors(outputs)
            examples = jax.tree.leaves(outputs)[0].shape[0]
            roots = None if batch.weights is None else jnp.sqrt(batch.weights)

            def one_vector(index: Array) -> tuple[Any, Array]:
                vector = likelihood.fisher_vector(outputs, index, **batch.options())
                # With the root of their number the sum becomes a mean, so that what does not
                # depend on the vector (KFAC's input moment) keeps its scale.
                scaled = jax.tree.map(lambda v: v * jnp.sqrt(jnp.asarray(count, v.dtype)), vector)
                return pull_back(weighted(scaled, roots)), jnp.asarray(examples)

            return _divide(*sum_over(one_vector, jnp.arange(count)))

        return estimate

    return on


def _with_targets(
    likelihood: Any, batch: Batch, outputs: Any, pull_back: PullBack, targets: Any
) -> tuple[Any, Array]:
    """The statistics under given targets, summed over examples, and the number of examples."""
    nll = getattr(likelihood, "fisher_nll", likelihood.nll)

    def total(outputs: Any) -> tuple[Array, int]:
        values = _per_example(nll(outputs, targets, **batch.options()))
        # The sum, not the mean: each example then carries the derivative of its own loss.
        weights = 1 if batch.weights is None else jnp.sqrt(batch.weights)
        return (values * weights).sum(), len(values)

    cotangent, examples = jax.grad(total, has_aux=True)(outputs)
    return pull_back(cotangent), jnp.asarray(examples)


def weighted(tree: Any, weights: Array | None) -> Any:
    """Multiplies what belongs to each example, the first axis of all arrays, by its weight."""
    if weights is None:
        return tree
    return jax.tree.map(
        lambda leaf: leaf * weights.astype(leaf.dtype).reshape(-1, *(1,) * (leaf.ndim - 1)), tree
    )


def _divide(sums: Any, examples: Array) -> Any:
    return jax.tree.map(lambda leaf: leaf / examples.astype(leaf.dtype), sums)


def _per_example(values: Array) -> Array:
    if jnp.ndim(values) != 1:
        msg = (
            f"the likelihood's nll returned shape {jnp.shape(values)}; expected one number per "
            "example, shape (batch,)."
        )
        raise ValueError(msg)
    return values
