"""The loss along a few directions as a quadratic function, with the exact Gauss-Newton matrix of the batch.

Directions are dictionaries from names of parameters to arrays. Of the matrix only its products with the directions
are needed: the outputs are linearised once, and each direction is pushed forward through that.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tkfac_jax.curvature.precondition import inner_product
from tkfac_jax.fisher.estimators import Batch, first_examples, weighted
from tkfac_jax.fisher.joint_likelihood import fisher_product
from tkfac_jax.layers.parameter_tree import named_leaves, replace_leaves
from tkfac_jax.linalg.meshes import mean_over

Direction = Mapping[str, Array]

# Two directions are parallel when the sine of their angle, squared, is below this many rounding errors.
PARALLEL = 1e3


class Quadratic(NamedTuple):
    """`1/2 c^T matrix c + slope^T c`, the change of the loss after steps of the lengths `c` along directions.

    Attributes:
      matrix: symmetric.
      slope: products of the directions with the gradient.
    """

    matrix: Float[Array, "k k"]
    slope: Float[Array, " k"]

    def value(self, lengths: Float[Array, " k"]) -> Float[Array, ""]:
        """The change of the loss that the model predicts."""
        return 0.5 * lengths @ self.matrix @ lengths + self.slope @ lengths

    def minimum(self, given: Sequence[float | Array | None]) -> Float[Array, " k"]:
        """The lengths at which the model is smallest.

        Args:
          given: by direction its length, or None where it is to be found; at most two are.

        Returns:
          The lengths. Of two directions that are parallel the second gets 0, and so does one without curvature.
        """
        free = [i for i, length in enumerate(given) if length is None]
        dtype = self.slope.dtype
        lengths = jnp.stack([jnp.asarray(0 if g is None else g, dtype) for g in given])
        slope = self.slope + self.matrix @ lengths
        if len(free) == 1:
            (i,) = free
            lengths = lengths.at[i].set(_lowest(self.matrix[i, i], slope[i]))
        elif free:
            i, j = free
            pair = _lowest_of_two(
                self.matrix[i, i], self.matrix[i, j], self.matrix[j, j], slope[i], slope[j]
            )
            lengths = lengths.at[jnp.asarray(free)].set(jnp.stack(pair))
        return lengths


def gauss_newton(
    outputs_fn: Callable[[Any], Any],
    likelihood: Any,
    params: Any,
    directions: Sequence[Direction],
    targets: Any,
    batch: Batch,
    axis_name: Any = None,
) -> Float[Array, "k k"]:
    """The products of all pairs of directions through the Gauss-Newton matrix.

    The matrix is `J^T F J`, the mean over the examples: `J` is the derivative of an example's outputs, `F` the Fisher
    of its likelihood.

    Args:
      outputs_fn: the outputs as a function of the parameters, for all examples of the batch or only for its first.
      likelihood: what the outputs mean.
      params: the parameters.
      directions: each a dictionary from names of parameters to arrays.
      targets: the data's targets.
      batch: mask and weights of the examples.
      axis_name: mapped axis over which the products are averaged.

    Returns:
      The symmetric matrix of products, in at least float32.

    Raises:
      ValueError: there are more outputs than targets.
    """
    outputs, tangents = _push_forward(outputs_fn, params, directions)
    examples = jax.tree.leaves(outputs)[0].shape[0]
    targets, batch = first_examples(examples, targets, batch)
    products = [
        weighted(fisher_product(likelihood, outputs, t, targets, batch.mask), batch.weights)
        for t in tangents
    ]
    entries = {
        (i, j): inner_product(tangents[i], products[j]) / examples
        for j in range(len(products))
        for i in range(j + 1)
    }
    return symmetric(mean_over(entries, axis_name), len(directions))


def symmetric(entries: Mapping[tuple[int, int], Array], size: int) -> Float[Array, "k k"]:
    """A symmetric matrix from the entries of its upper triangle."""
    rows = [[entries[min(i, j), max(i, j)] for j in range(size)] for i in range(size)]
    return jnp.stack([jnp.stack(row) for row in rows])


def _push_forward(
    outputs_fn: Callable[[Any], Any], params: Any, directions: Sequence[Direction]
) -> tuple[Any, list[Any]]:
    """The outputs, and their derivatives along the directions; those of the same parameters share a linearisation."""
    leaves = named_leaves(params)
    maps: dict[tuple[str, ...], Callable[[Any], Any]] = {}
    outputs, tangents = None, []
    for direction in directions:
        names = tuple(direction)
        if names not in maps:
            outputs, maps[names] = jax.linearize(
                lambda own: outputs_fn(replace_leaves(params, own)),
                {name: leaves[name] for name in names},
            )
        own = {name: array.astype(leaves[name].dtype) for name, array in direction.items()}
        tangents.append(maps[names](own))
    return outputs, tangents


def _lowest(curvature: Array, slope: Array) -> Array:
    """Where `1/2 curvature x^2 + slope x` is smallest; 0 if there is no curvature."""
    return jnp.where(curvature > 0, -slope / jnp.where(curvature > 0, curvature, 1), 0)


def _lowest_of_two(
    first: Array, mixed: Array, second: Array, slope: Array, second_slope: Array
) -> tuple[Array, Array]:
    """Where the quadratic function of two variables is smallest, or of the first, if it decides nothing."""
    # In units in which both curvatures are 1: their product could overflow.
    curved = (first > 0) & (second > 0)
    units = [jnp.sqrt(jnp.where(curved, curvature, 1)) for curvature in (first, second)]
    cosine = mixed / units[0] / units[1]
    sine_squared = 1 - cosine**2
    independent = curved & (sine_squared > PARALLEL * jnp.finfo(first.dtype).eps)
    below = jnp.where(independent, sine_squared, 1)
    s, t = slope / units[0], second_slope / units[1]
    return (
        jnp.where(independent, (cosine * t - s) / below / units[0], _lowest(first, slope)),
        jnp.where(
            independent,
            (cosine * s - t) / below / units[1],
            jnp.where(first > 0, 0, _lowest(second, second_slope)),
        ),
    )
