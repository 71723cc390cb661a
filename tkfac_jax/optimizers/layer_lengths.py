"""Optax transformations that give each layer's step its length: relative to the weights, and within a ball."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from tkfac_jax.curvature.lengths import largest, norm, relative_to, within_ball
from tkfac_jax.layers.parameter_matrices import ParameterMatrix, parameter_matrices
from tkfac_jax.layers.parameter_tree import named_leaves, replace_leaves
from tkfac_jax.layers.spec import Layers
from tkfac_jax.linalg.meshes import automatic, specs_of
from tkfac_jax.optimizers.option_checks import check_layers, check_number

MISSING_PARAMS = (
    "update() needs the parameters, whose norms decide about the lengths of steps: give it "
    "update(grads, state, params, ...)."
)


class NormBallState(NamedTuple):
    """The state of `keep_in_norm_ball`.

    Attributes:
      radius: by layer or parameter, the radius of the ball of each of its matrices; those of outputs grow.
      relative_change: of the last step, the largest change of a matrix as a share of its norm; those of zeros do not
        count.
    """

    radius: dict[str, Float[Array, "*batch"]]
    relative_change: Float[Array, ""]


def scale_by_layer_norm_ratio(
    layers: Layers, floor: float | Array = 0.1
) -> optax.GradientTransformation:
    """Scales each layer's update to the norm of its weights.

    With the kernel `K`, the bias `b` and the update `U` of both as one matrix,

        U_K <- n U_K / ||U||_F,    U_b <- max(||b||, n) U_b / ||U||_F,    n = max(||K||_F, floor sqrt(d_out))

    so that after `optax.scale_by_learning_rate` the learning rate is the relative change of a layer's weights. Each
    layer of a stack, and each group of a convolution, is a matrix by itself. Parameters of no layer with two axes and
    more are treated alike, their last axis being `d_out`, unless they are called `scale` or `bias`; all other
    leaves, and `optax.MaskedNode`, pass through unchanged. An update that is 0 or not finite becomes 0.

    Args:
      layers: what `find_layers` returned.
      floor: what counts as the least norm, by the root of the number of outputs, so that weights of 0 can grow; a
        kernel of the usual initial values has about 1. A bias larger than its kernel moves by its own norm, and
        the kernel does not move with it.

    Returns:
      The transformation; it has no state. Its update function needs the parameters.

    Raises:
      ValueError: an argument is wrong; at `update`, the parameters are not given or not those of the layers.

    Source: the layerwise trust ratio of You et al. 2017 (LARS, arXiv:1708.03888) and You et al. 2020 (LAMB,
      arXiv:1904.00962), there of each parameter by itself.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, optax, tkfac_jax as tkfac
      >>> model = nn.Dense(2, use_bias=False)
      >>> x = jnp.ones((5, 3))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> layers = tkfac.find_layers(lambda params, x: model.apply({"params": params}, x), params, x)
      >>> optimizer = optax.chain(tkfac.scale_by_layer_norm_ratio(layers), optax.scale_by_learning_rate(0.1))
      >>> grads = jax.tree.map(jnp.ones_like, params)
      >>> updates, _ = optimizer.update(grads, optimizer.init(params), params)
      >>> lengths = [jnp.linalg.norm(tree["kernel"]) for tree in (updates, params)]
      >>> bool(jnp.isclose(lengths[0], 0.1 * lengths[1]))
      True
    """
    check_layers(layers)
    check_number("floor", floor, lambda value: value >= 0, "a number of at least 0")

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        def scaled(matrix: ParameterMatrix, step: Any, weights: Any) -> dict[str, Array]:
            least = floor * matrix.d_out**0.5
            rows = relative_to(matrix.rows_of(weights), matrix.rows_of(step), least)
            return matrix.leaves_of(rows, step)

        steps: dict[str, Array] = {}
        for matrix, step, weights in _of_each_matrix(layers, updates, params).values():
            function = functools.partial(scaled, matrix)
            steps |= automatic(function, step, weights, out=specs_of(step))
        return replace_leaves(updates, steps), state

    return optax.GradientTransformation(optax.identity().init, update)


def keep_in_norm_ball(
    layers: Layers, radius: float | Array = 1.0, *, output_growth: float | Array = 0.3
) -> optax.GradientTransformation:
    """Shortens each layer's step so that its weights stay in a ball.

    With kernel and bias as one matrix `W`, and `W_0` its first value,

        R = max(||W_0||_F, radius sqrt(d_out)),    W + U <- (W + U) min(1, R / ||W + U||_F)

    Steps of a length relative to the weights would let these grow without bound. A layer that makes outputs
    (`LayerSpec.makes_outputs`) must reach the scale and the mean of its targets: where a step would lead out of its
    ball, `R` first grows by `output_growth` times what the step goes outwards, `<U, W> / ||W||_F`. Comes last in a
    chain, behind the learning rate. Which parameters are matrices, and which pass through unchanged, as in
    `scale_by_layer_norm_ratio`.

    Args:
      layers: what `find_layers` returned.
      radius: least radius of a ball, by the root of the number of outputs, so that weights of 0 can grow: 1 is about
        the norm of a kernel of the usual initial values. With `inf` there is no ball.
      output_growth: how much the ball of a layer that makes outputs grows, as a share of what a step out of it goes
        outwards; 0: not at all.

    Returns:
      The transformation; its state is a `NormBallState`, in which `relative_change` tells what the last step did. Its
      update function needs the parameters.

    Raises:
      ValueError: an argument is wrong; at `update`, the parameters are not given or not those of the layers.

    Source: kin to Hyperball (arXiv:2606.16899), which keeps weights on the sphere.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, optax, tkfac_jax as tkfac
      >>> model = nn.Dense(2, use_bias=False)
      >>> x = jnp.ones((5, 3))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> layers = tkfac.find_layers(lambda params, x: model.apply({"params": params}, x), params, x)
      >>> optimizer = optax.chain(optax.sgd(10.0), tkfac.keep_in_norm_ball(layers, output_growth=0.0))
      >>> state = optimizer.init(params)
      >>> updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
      >>> norm = jnp.linalg.norm(optax.apply_updates(params, updates)["kernel"])
      >>> bool(jnp.isclose(norm, jnp.maximum(jnp.linalg.norm(params["kernel"]), 2**0.5)))
      True
    """
    check_layers(layers)
    check_number("radius", radius, lambda value: value >= 0, "a number of at least 0")
    check_number("output_growth", output_growth, lambda value: value >= 0, "a number of at least 0")

    def init(params: Any) -> NormBallState:
        leaves = named_leaves(params)

        def first(matrix: ParameterMatrix, weights: dict[str, Array]) -> Array:
            start = norm(matrix.rows_of(weights))
            return jnp.maximum(start, jnp.asarray(radius * matrix.d_out**0.5, start.dtype))

        matrices = parameter_matrices(layers, params, "params")
        found = {
            name: _without_axes(functools.partial(first, matrix), _chosen(matrix, leaves))
            for name, matrix in matrices.items()
        }
        return NormBallState(found, jnp.zeros(()))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        def kept(matrix: ParameterMatrix, step: Any, weights: Any, radius: Array) -> Any:
            rows = matrix.rows_of(weights), matrix.rows_of(step)
            move = within_ball(*rows, radius, output_growth if matrix.makes_outputs else 0.0)
            return matrix.leaves_of(move.step, step), move.radius, move.change

        steps: dict[str, Array] = {}
        radii, changes = dict(state.radius), []
        for name, (matrix, step, weights) in _of_each_matrix(layers, updates, params).items():
            function = functools.partial(kept, matrix)
            own = state.radius[name]
            out = specs_of(step), specs_of(own), specs_of(own)
            shortened, radii[name], change = automatic(function, step, weights, own, out=out)
            steps |= shortened
            changes.append(change)
        change = largest(changes).astype(state.relative_change.dtype)
        return replace_leaves(updates, steps), NormBallState(radii, change)

    return optax.GradientTransformation(init, update)


def find_ball(opt_state: Any) -> NormBallState | None:
    """The last `NormBallState` in an optimizer's state, if there is one."""
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda leaf: isinstance(leaf, NormBallState))
    found = [leaf for leaf in leaves if isinstance(leaf, NormBallState)]
    return found[-1] if found else None


def _of_each_matrix(
    layers: Layers, updates: Any, params: Any
) -> dict[str, tuple[ParameterMatrix, dict[str, Array], dict[str, Array]]]:
    """The matrices by name, each with its leaves of the updates and of the parameters."""
    if params is None:
        raise ValueError(MISSING_PARAMS)
    steps, weights = named_leaves(updates), named_leaves(params)
    matrices = parameter_matrices(layers, updates, "updates")
    if set(matrices) - set(parameter_matrices(layers, params, "params")):
        msg = "updates and params do not hold the same parameters: give update() those that the gradients belong to."
        raise ValueError(msg)
    return {
        name: (matrix, _chosen(matrix, steps), _chosen(matrix, weights))
        for name, matrix in matrices.items()
    }


def _chosen(matrix: ParameterMatrix, leaves: dict[str, Any]) -> dict[str, Array]:
    return {name: leaves[name] for name in matrix.parameters}


def _without_axes(function: Callable[[Any], Array], weights: dict[str, Array]) -> Array:
    """What a function makes of parameters, whole on each device of a mesh."""
    return automatic(function, weights, out=jax.sharding.PartitionSpec())
