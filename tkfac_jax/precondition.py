"""Inverse factors times gradients, and the bound on the length of the step."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tkfac_jax.inverses import KroneckerInverses
from tkfac_jax.layers import LayerSpec, is_masked, parameter_name


def precondition_kernel(
    inverses: KroneckerInverses,
    kernel: Float[Array, "*window features d_out"],
    bias: Float[Array, " d_out"] | None,
) -> tuple[Float[Array, "*window features d_out"], Float[Array, " d_out"] | None]:
    """The natural gradient of one layer: `Phi^-1 W Psi^-1`, the bias as last row of `W`.

    Args:
      inverses: the inverses of the layer's damped factors.
      kernel: gradient of the kernel.
      bias: gradient of the bias, or None.

    Returns:
      The preconditioned gradients, in the dtypes of the gradients.

    Source: Gao et al. 2021, Algorithm 1.
    """
    dtype = inverses.psi.dtype
    matrix = kernel.reshape(-1, kernel.shape[-1]).astype(dtype)
    if bias is None or inverses.bias is None:
        rows = inverses.phi @ matrix @ inverses.psi
        return rows.reshape(kernel.shape).astype(kernel.dtype), None
    coupling, corner = inverses.bias[:-1], inverses.bias[-1]
    row = bias.astype(dtype)
    rows = (inverses.phi @ matrix + coupling[:, None] * row[None, :]) @ inverses.psi
    last = (coupling @ matrix + corner * row) @ inverses.psi
    return rows.reshape(kernel.shape).astype(kernel.dtype), last.astype(bias.dtype)


def precondition(
    gradients: Any,
    inverses: Mapping[str, KroneckerInverses],
    layers: Mapping[str, LayerSpec],
    norm_constraint: float | Array | None = None,
) -> Any:
    """Preconditions the layers' gradients in a tree and hands every other leaf on as it is.

    Args:
      gradients: the gradients, a tree of the structure of the parameters.
      inverses: the inverses of the damped factors, by layer.
      layers: the layers.
      norm_constraint: bound `c` on the product of step and gradient, `u <- u min(1, sqrt(c / <u, g>))`, taken
        over all layers; in units of the loss. None: no bound.

    Returns:
      A tree of the same structure and dtypes.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(gradients, is_leaf=is_masked)
    names = [parameter_name(path) for path, _ in flat]
    leaves = dict(zip(names, (leaf for _, leaf in flat), strict=True))
    steps: dict[str, Array] = {}
    for name, inverse in inverses.items():
        spec = layers[name]
        bias = None if spec.bias is None else leaves[spec.bias]
        kernel_step, bias_step = precondition_kernel(inverse, leaves[spec.kernel], bias)
        steps[spec.kernel] = kernel_step
        if spec.bias is not None and bias_step is not None:
            steps[spec.bias] = bias_step
    if norm_constraint is not None:
        steps = _constrain(steps, leaves, norm_constraint)
    return jax.tree.unflatten(treedef, [steps.get(name, leaves[name]) for name in names])


def _constrain(
    steps: dict[str, Array], gradients: Mapping[str, Any], bound: float | Array
) -> dict[str, Array]:
    product = sum(
        jnp.vdot(step.astype(jnp.promote_types(step.dtype, jnp.float32)), gradients[name])
        for name, step in steps.items()
    )
    positive = product > 0
    scale = jnp.where(positive, jnp.sqrt(bound / jnp.where(positive, product, 1)), 1)
    scale = jnp.minimum(scale, 1)
    return {name: (step * scale).astype(step.dtype) for name, step in steps.items()}
