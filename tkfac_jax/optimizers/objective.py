"""The loss of a batch as the adaptive optimizer sees it: with its l2 term, and as a model along directions."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from tkfac_jax.curvature.precondition import inner_product, slope_along
from tkfac_jax.fisher.estimators import Batch, nll_of
from tkfac_jax.layers.parameter_tree import named_leaves, replace_leaves, visible_leaves
from tkfac_jax.linalg.meshes import mean_over, varying_axes
from tkfac_jax.optimizers.quadratic_model import Quadratic, gauss_newton, symmetric


class Objective(NamedTuple):
    """The loss of the batch as a function of the parameters, with the layers' l2 term.

    Attributes:
      outputs_fn: the outputs on the batch as a function of the parameters.
      model_outputs_fn: those on its first examples, over which the Gauss-Newton matrix is taken.
      likelihood: what the outputs mean.
      targets: the targets of the batch.
      batch: mask and weights of its examples.
      l2: coefficient of the l2 term.
      layer_parameters: names of the layers' parameters, which the l2 term is of.
      axis_name: mapped axis over which losses and products are averaged.
    """

    outputs_fn: Callable[[Any], Any]
    model_outputs_fn: Callable[[Any], Any]
    likelihood: Any
    targets: Any
    batch: Batch
    l2: float | Array
    layer_parameters: frozenset[str]
    axis_name: str | None

    def loss(self, params: Any) -> Float[Array, ""]:
        """The mean loss of the examples, averaged over devices, with the l2 term."""
        outputs = self.outputs_fn(params)
        nll = nll_of(self.likelihood, outputs, self.targets, self.batch).mean()
        mean = mean_over(nll, self.axis_name)
        _check_averaged(mean, params)
        return self._penalised(mean, params)

    def gradient(self, gradient: Any, params: Any) -> Any:
        """A gradient of the likelihood's loss with that of the l2 term."""
        if isinstance(self.l2, int | float) and self.l2 == 0:
            return gradient
        leaves = named_leaves(params)
        own = self._own(gradient)
        regularised = {n: (g + self.l2 * leaves[n]).astype(g.dtype) for n, g in own.items()}
        return replace_leaves(gradient, regularised)

    def along(
        self, params: Any, gradient: Any, directions: list[Mapping[str, Array]], damping: Array
    ) -> tuple[Quadratic, Quadratic]:
        """The change of the loss along directions, as the damped and as the undamped model have it."""
        matrix = gauss_newton(
            self.model_outputs_fn,
            self.likelihood,
            params,
            directions,
            self.targets,
            self.batch,
            self.axis_name,
        )
        _check_averaged(matrix, params)
        leaves = named_leaves(gradient)
        slope = jnp.stack([slope_along(d, {name: leaves[name] for name in d}) for d in directions])
        squares = self._squares(directions)
        undamped = Quadratic(matrix + self.l2 * squares, slope)
        return Quadratic(undamped.matrix + damping * squares, slope), undamped

    def _squares(self, directions: list[Mapping[str, Array]]) -> Float[Array, "k k"]:
        """The products of pairs of directions; of those that are not of the layers 0."""
        own = [all(name in self.layer_parameters for name in d) for d in directions]
        entries = {
            (i, j): inner_product(directions[i], directions[j])
            if own[i] and own[j]
            else jnp.zeros((), jnp.float32)
            for j in range(len(directions))
            for i in range(j + 1)
        }
        return symmetric(entries, len(directions))

    def _penalised(self, loss: Array, params: Any) -> Array:
        own = self._own(params)
        return loss + 0.5 * self.l2 * inner_product(own, own)

    def _own(self, tree: Any) -> dict[str, Array]:
        return {n: leaf for n, leaf in visible_leaves(tree).items() if n in self.layer_parameters}


def _check_averaged(value: Array, params: Any) -> None:
    """Refuses what differs between devices although the parameters do not."""
    apart = varying_axes(value) - varying_axes(params)
    if apart:
        msg = (
            f"the losses vary over the mesh axes {sorted(apart)}, and the parameters do not: give axis_name to "
            "adaptive_tkfac, so that losses and products are averaged."
        )
        raise ValueError(msg)
