"""Likelihoods: the loss of an example, targets drawn from the model, and the Fisher that goes with them.

The Fisher information is the second moment of the derivatives of the negative log-likelihood when
the targets are drawn from the model itself (Gao et al. 2021, section 3.2). A likelihood therefore
needs two methods, `nll` and `sample`; any object that has them is accepted (`Likelihood`).
"""

import dataclasses
import math
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Num, PRNGKeyArray

from tkfac_jax.fisher.positions import (
    Mask,
    at_least_float32,
    check_float,
    check_shapes,
    fisher_loss_of_positions,
    fisher_scale_of_positions,
    loss_of_positions,
    one_position,
    position_weights,
)


@runtime_checkable
class Likelihood(Protocol):
    """What the library needs of a likelihood.

    Further methods are optional:

    * `fisher_nll(outputs, targets)`, where the loss is not the full negative log-likelihood (but a mean over
      positions, say): like `nll`, but scaled so that the second moment of its derivatives is the Fisher
      that should be used. Without it, `nll` is used.
    * `fisher_scale(outputs)`, a number: without a mask, `fisher_nll` is that multiple of `nll`. The empirical Fisher
      then comes from the gradient's own backward pass. It must be defined where both of them are.
    * `num_fisher_vectors(outputs)`, a whole number, and `fisher_vector(outputs, index)`, of the shape of the outputs:
      vectors whose outer products, summed, are the Fisher of each example's outputs. `exact_fisher` needs them.
    * `fisher_product(outputs, tangents)`, of the shape of the outputs: that Fisher times a tangent of each example's
      outputs, for `adaptive_tkfac`. Without it the vectors are used, or else the Hessian of `nll`.

    For masks of positions, all but `sample` take a further keyword argument `mask`.
    """

    def nll(self, outputs: Any, targets: Any) -> Array:
        """Negative log-likelihood of each example, shape `(batch,)`."""
        ...

    def sample(self, key: Any, outputs: Any) -> Any:
        """Targets drawn from the model's own distribution, in the form that `nll` takes."""
        ...


@dataclasses.dataclass(frozen=True)
class Categorical:
    """Categorical distribution given by logits: classification, language models.

    Outputs are logits `(batch, ..., classes)`, targets integers `(batch, ...)`. The axes in between are
    positions (tokens, pixels): the loss of an example is the sum over its positions.

    Attributes:
      average_positions: the loss is the mean over an example's positions instead, and the Fisher
        is that of one position.

    Example:
      >>> import jax.numpy as jnp, tkfac_jax as tkfac
      >>> nll = tkfac.Categorical().nll(jnp.zeros((2, 4)), jnp.array([0, 3]))
      >>> [f"{value:.3f}" for value in nll]
      ['1.386', '1.386']
    """

    average_positions: bool = False

    def nll(
        self,
        outputs: Float[Array, "batch *positions classes"],
        targets: Int[Array, "batch *positions"],
        mask: Mask = None,
    ) -> Float[Array, " batch"]:
        """Negative log-likelihood of each example.

        Args:
          outputs: logits.
          targets: class indices from 0 to `classes - 1`.
          mask: False where a position is padding.

        Returns:
          The sum (or mean) over positions, one number per example, in at least float32.

        Raises:
          ValueError: the targets are not integers or not of the shape of the outputs without classes.
        """
        return loss_of_positions(self._position_nll(outputs, targets), self.average_positions, mask)

    def fisher_nll(
        self,
        outputs: Float[Array, "batch *positions classes"],
        targets: Int[Array, "batch *positions"],
        mask: Mask = None,
    ) -> Float[Array, " batch"]:
        """The loss whose derivatives make the Fisher; see `Likelihood`."""
        return fisher_loss_of_positions(
            self._position_nll(outputs, targets), self.average_positions, mask
        )

    def fisher_scale(self, outputs: Float[Array, "batch *positions classes"]) -> float:
        """What `fisher_nll` is a multiple of `nll` by; see `Likelihood`."""
        return fisher_scale_of_positions(outputs.shape[:-1], self.average_positions)

    def sample(
        self, key: PRNGKeyArray | Array, outputs: Float[Array, "batch *positions classes"]
    ) -> Int[Array, "batch *positions"]:
        """Class indices drawn from the softmax of the logits."""
        return jax.random.categorical(key, outputs)

    def num_fisher_vectors(self, outputs: Float[Array, "batch *positions classes"]) -> int:
        """One vector for each position and class."""
        return math.prod(outputs.shape[1:])

    def fisher_vector(
        self,
        outputs: Float[Array, "batch *positions classes"],
        index: Int[Array, ""],
        mask: Mask = None,
    ) -> Float[Array, "batch *positions classes"]:
        """`sqrt(p_k) (e_k - p)` at one position; over the classes k they make `diag(p) - p p^T`."""
        logits = at_least_float32(outputs)
        classes = logits.shape[-1]
        p = jax.nn.softmax(logits)
        chosen = jax.nn.one_hot(index % classes, classes, dtype=p.dtype)
        vectors = jnp.sqrt(jnp.sum(p * chosen, -1, keepdims=True)) * (chosen - p)
        here = one_position(
            logits.shape[:-1], index // classes, self.average_positions, mask, p.dtype
        )
        return (vectors * here[..., None]).astype(outputs.dtype)

    def fisher_product(
        self,
        outputs: Float[Array, "batch *positions classes"],
        tangents: Float[Array, "batch *positions classes"],
        mask: Mask = None,
    ) -> Float[Array, "batch *positions classes"]:
        """`(diag(p) - p p^T) t` at each position."""
        p, t = jax.nn.softmax(at_least_float32(outputs)), at_least_float32(tangents)
        products = p * (t - jnp.sum(p * t, axis=-1, keepdims=True))
        weights = position_weights(outputs.shape[:-1], self.average_positions, mask, p.dtype)
        return products * weights[..., None]

    def _position_nll(self, outputs: Array, targets: Array) -> Array:
        check_float("Categorical", outputs)
        if not jnp.issubdtype(targets.dtype, jnp.integer):
            msg = f"Categorical expects integer class indices as targets; got {targets.dtype}."
            raise ValueError(msg)
        check_shapes("Categorical", outputs.shape[:-1], targets.shape)
        logits = at_least_float32(outputs)
        # Optax looks the label's logit up, and JAX cannot differentiate a lookup in logits that are divided
        # over explicit mesh axes. Wrong labels give NaN, and negative ones count from the end, there as here.
        classes = logits.shape[-1]
        labels = jnp.where(targets < 0, targets + classes, targets)[..., None]
        chosen = labels == jnp.arange(classes)
        own = jnp.sum(logits, axis=-1, where=chosen)
        own = jnp.where(chosen.any(-1), own, jnp.nan)
        return jax.nn.logsumexp(logits, axis=-1) - own


@dataclasses.dataclass(frozen=True)
class Bernoulli:
    """Independent Bernoulli variables given by logits: binary cross-entropy, autoencoders.

    Outputs are logits, targets values in [0, 1] of the same shape, `(batch, ...)`. Every axis but the
    first counts positions: the loss of an example is the sum over them.

    Attributes:
      average_positions: the loss is the mean over an example's positions instead, and the Fisher
        is that of one position.
    """

    average_positions: bool = False

    def nll(
        self, outputs: Float[Array, "batch *positions"], targets: Array, mask: Mask = None
    ) -> Float[Array, " batch"]:
        """Negative log-likelihood of each example.

        Args:
          outputs: logits.
          targets: values in [0, 1], in the shape of the outputs.
          mask: False where a position is padding.

        Returns:
          The sum (or mean) over positions, one number per example, in at least float32.

        Raises:
          ValueError: outputs that are not floating point, or targets of another shape.
        """
        return loss_of_positions(self._position_nll(outputs, targets), self.average_positions, mask)

    def fisher_nll(
        self, outputs: Float[Array, "batch *positions"], targets: Array, mask: Mask = None
    ) -> Float[Array, " batch"]:
        """The loss whose derivatives make the Fisher; see `Likelihood`."""
        return fisher_loss_of_positions(
            self._position_nll(outputs, targets), self.average_positions, mask
        )

    def fisher_scale(self, outputs: Float[Array, "batch *positions"]) -> float:
        """What `fisher_nll` is a multiple of `nll` by; see `Likelihood`."""
        return fisher_scale_of_positions(outputs.shape, self.average_positions)

    def sample(
        self, key: PRNGKeyArray | Array, outputs: Float[Array, "batch *positions"]
    ) -> Float[Array, "batch *positions"]:
        """Zeros and ones drawn with the sigmoid of the logits as probability."""
        return jax.random.bernoulli(key, jax.nn.sigmoid(outputs)).astype(outputs.dtype)

    def num_fisher_vectors(self, outputs: Float[Array, "batch *positions"]) -> int:
        """One vector for each position."""
        return math.prod(outputs.shape[1:])

    def fisher_vector(
        self, outputs: Float[Array, "batch *positions"], index: Int[Array, ""], mask: Mask = None
    ) -> Float[Array, "batch *positions"]:
        """`sqrt(p (1 - p))` at one position: the Fisher is diagonal."""
        p = jax.nn.sigmoid(at_least_float32(outputs))
        here = one_position(p.shape, index, self.average_positions, mask, p.dtype)
        return (jnp.sqrt(p * (1 - p)) * here).astype(outputs.dtype)

    def fisher_product(
        self,
        outputs: Float[Array, "batch *positions"],
        tangents: Float[Array, "batch *positions"],
        mask: Mask = None,
    ) -> Float[Array, "batch *positions"]:
        """`p (1 - p) t` at each position."""
        p = jax.nn.sigmoid(at_least_float32(outputs))
        weights = position_weights(outputs.shape, self.average_positions, mask, p.dtype)
        return p * (1 - p) * weights * tangents

    def _position_nll(self, outputs: Array, targets: Array) -> Array:
        check_float("Bernoulli", outputs)
        check_shapes("Bernoulli", outputs.shape, targets.shape)
        logits = at_least_float32(outputs)
        return optax.sigmoid_binary_cross_entropy(logits, targets.astype(logits.dtype))


@dataclasses.dataclass(frozen=True)
class Normal:
    """Independent normal variables of one known variance, given by their means: regression.

    Outputs are means, targets values of the same shape, `(batch, ...)`. Every axis but the first counts
    positions: the loss of an example is the sum over them.

    Attributes:
      variance: the variance of each variable, in squared units of the targets.
      average_positions: the loss is the mean over an example's positions instead, and the Fisher
        is that of one position.
    """

    variance: float = 1.0
    average_positions: bool = False

    def __post_init__(self) -> None:
        """Refuses a variance that is not positive."""
        if isinstance(self.variance, int | float) and not self.variance > 0:
            msg = f"Normal: variance={self.variance}; expected a positive number."
            raise ValueError(msg)

    def nll(
        self,
        outputs: Num[Array, "batch *positions"],
        targets: Num[Array, "batch *positions"],
        mask: Mask = None,
    ) -> Float[Array, " batch"]:
        """Negative log-likelihood of each example, its constant included.

        Args:
          outputs: means.
          targets: values in the shape of the outputs.
          mask: False where a position is padding.

        Returns:
          The sum (or mean) over positions, one number per example, in at least float32.

        Raises:
          ValueError: outputs or targets that are not floating point, or targets of another shape.
        """
        return loss_of_positions(self._position_nll(outputs, targets), self.average_positions, mask)

    def fisher_nll(
        self,
        outputs: Num[Array, "batch *positions"],
        targets: Num[Array, "batch *positions"],
        mask: Mask = None,
    ) -> Float[Array, " batch"]:
        """The loss whose derivatives make the Fisher; see `Likelihood`."""
        return fisher_loss_of_positions(
            self._position_nll(outputs, targets), self.average_positions, mask
        )

    def fisher_scale(self, outputs: Num[Array, "batch *positions"]) -> float:
        """What `fisher_nll` is a multiple of `nll` by; see `Likelihood`."""
        return fisher_scale_of_positions(outputs.shape, self.average_positions)

    def sample(
        self, key: PRNGKeyArray | Array, outputs: Num[Array, "batch *positions"]
    ) -> Float[Array, "batch *positions"]:
        """Values drawn around the means with the variance."""
        check_float("Normal", outputs)
        deviation = jnp.sqrt(jnp.asarray(self.variance, outputs.dtype))
        return outputs + deviation * jax.random.normal(key, outputs.shape, outputs.dtype)

    def num_fisher_vectors(self, outputs: Num[Array, "batch *positions"]) -> int:
        """One vector for each position."""
        return math.prod(outputs.shape[1:])

    def fisher_vector(
        self, outputs: Num[Array, "batch *positions"], index: Int[Array, ""], mask: Mask = None
    ) -> Float[Array, "batch *positions"]:
        """`1 / sqrt(variance)` at one position."""
        dtype = at_least_float32(outputs).dtype
        here = one_position(outputs.shape, index, self.average_positions, mask, dtype)
        return (here / jnp.sqrt(jnp.asarray(self.variance, dtype))).astype(outputs.dtype)

    def fisher_product(
        self,
        outputs: Num[Array, "batch *positions"],
        tangents: Num[Array, "batch *positions"],
        mask: Mask = None,
    ) -> Float[Array, "batch *positions"]:
        """`t / variance` at each position."""
        dtype = at_least_float32(outputs).dtype
        weights = position_weights(outputs.shape, self.average_positions, mask, dtype)
        return tangents * (weights / jnp.asarray(self.variance, dtype))

    def _position_nll(self, outputs: Array, targets: Array) -> Array:
        check_float("Normal", outputs)
        check_float("Normal", targets, "targets")
        check_shapes("Normal", outputs.shape, targets.shape)
        means = at_least_float32(outputs)
        squares = (targets.astype(means.dtype) - means) ** 2 / self.variance
        return 0.5 * (squares + jnp.log(2 * math.pi * self.variance))
