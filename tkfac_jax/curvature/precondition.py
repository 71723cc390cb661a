"""Inverse factors times gradients, and the bound on the length of the step."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from tkfac_jax.curvature.inverses import KroneckerInverses
from tkfac_jax.curvature.storage import inverses_in_shape
from tkfac_jax.layers.kernel_matrix import Layout
from tkfac_jax.layers.parameter_tree import named_leaves, replace_leaves
from tkfac_jax.layers.spec import LayerSpec
from tkfac_jax.linalg.factor_structure import multiply
from tkfac_jax.linalg.finite import all_finite
from tkfac_jax.linalg.meshes import automatic, specs_of


def precondition_kernel(
    spec: LayerSpec, inverses: KroneckerInverses, kernel: Array, bias: Array | None
) -> tuple[Array, Array | None, Bool[Array, ""]]:
    """The natural gradient of one layer: `Phi^-1 W Psi^-1`, the bias as last row of `W`.

    Args:
      spec: the layer.
      inverses: the inverses of the layer's damped factors, as they stand in the state.
      kernel: gradient of the kernel.
      bias: gradient of the bias, or None.

    Returns:
      The preconditioned gradients, in the shapes and dtypes of the gradients; and whether they are finite. What is
      not is zero.

    Source: Gao et al. 2021, Algorithm 1.
    """
    layout, stack = spec.layout, len(spec.stack)
    inverses = inverses_in_shape(spec, inverses)
    # Inverses may be stored in low precision; products are not computed in it.
    dtype = jnp.promote_types(inverses.psi.dtype, jnp.float32)
    phi, psi = inverses.phi.astype(dtype), inverses.psi.astype(dtype)
    matrix = layout.kernel_to_matrix(kernel, stack).astype(dtype)

    def times_psi(rows: Array) -> Array:
        if spec.psi.kind == "full":
            return rows @ psi
        return multiply(spec.psi, psi, rows.mT).mT

    last = None if bias is None else layout.bias_to_matrix(bias, stack).astype(dtype)
    parts: tuple[Array, ...]
    if last is None or inverses.bias is None:
        whole = matrix if last is None else jnp.concatenate([matrix, last], -2)
        parts = (times_psi(multiply(spec.phi, phi, whole)),)
    else:
        coupling = inverses.bias[..., None, :-1].astype(dtype)
        corner = inverses.bias[..., None, -1:].astype(dtype)
        parts = (
            times_psi(phi @ matrix + coupling.mT * last),
            times_psi(coupling @ matrix + corner * last),
        )

    # What overflows in a gradient's own dtype is not finite either.
    dtypes = [array.dtype for array in (kernel, bias) if array is not None]
    if len(set(dtypes)) > len(parts):
        parts = _kernel_and_bias(layout, parts[0])
    parts = tuple(part.astype(own) for part, own in zip(parts, dtypes, strict=False))
    finite = all_finite(parts)
    parts = tuple(jnp.where(finite, part, 0) for part in parts)
    if len(dtypes) > len(parts):
        parts = _kernel_and_bias(layout, parts[0])
    kernel_step = layout.matrix_to_kernel(parts[0], kernel.shape, stack)
    if bias is None:
        return kernel_step, None, finite
    return kernel_step, layout.matrix_to_bias(parts[1], bias.shape, stack), finite


def _kernel_and_bias(layout: Layout, matrix: Array) -> tuple[Array, Array]:
    """The rows of kernel and bias."""
    return matrix[..., : layout.rows, :], matrix[..., layout.rows :, :]


def precondition(
    gradients: Any,
    inverses: Mapping[str, KroneckerInverses],
    layers: Mapping[str, LayerSpec],
    norm_constraint: float | Array | None = None,
) -> tuple[Any, dict[str, Bool[Array, ""]]]:
    """Preconditions the layers' gradients in a tree and hands every other leaf on as it is.

    Args:
      gradients: the gradients, a tree of the structure of the parameters.
      inverses: the inverses of the damped factors, by layer.
      layers: the layers.
      norm_constraint: bound `c` on the product of step and gradient, `u <- u min(1, sqrt(c / <u, g>))`, taken
        over all layers; in units of the loss. None: no bound.

    Returns:
      A tree of the same structure and dtypes; and by layer, whether its step was finite. A step that was not is zero.
    """
    leaves = named_leaves(gradients)
    steps: dict[str, Array] = {}
    good: dict[str, Array] = {}
    for name, inverse in inverses.items():
        spec = layers[name]
        bias = None if spec.bias is None else leaves[spec.bias]
        given = leaves[spec.kernel], bias
        kernel_step, bias_step, good[name] = automatic(
            functools.partial(precondition_kernel, spec),
            inverse,
            *given,
            out=(*specs_of(given), PartitionSpec()),
        )
        steps[spec.kernel] = kernel_step
        if spec.bias is not None and bias_step is not None:
            steps[spec.bias] = bias_step
    if norm_constraint is not None:
        steps = _constrain(steps, leaves, norm_constraint)
    return replace_leaves(gradients, steps), good


def inner_product(one: Any, other: Any) -> Float[Array, ""]:
    """The sum of the products of two trees' entries, in at least float32."""

    def product(one: Array, other: Array) -> Array:
        wide = one.astype(jnp.promote_types(one.dtype, jnp.float32))
        return jnp.sum(wide * other)

    products = jax.tree.leaves(jax.tree.map(product, one, other))
    return sum(products, jnp.zeros((), jnp.float32))


def slope_along(steps: Any, gradients: Any) -> Float[Array, ""]:
    """The product of steps and gradients; where an array of the step is all 0 the gradient's may be anything."""

    def product(step: Array, gradient: Array) -> Array:
        stays = jnp.sum(jnp.abs(step)) == 0
        return jnp.where(stays, 0, inner_product(step, gradient))

    products = jax.tree.leaves(jax.tree.map(product, steps, gradients))
    return sum(products, jnp.zeros((), jnp.float32))


def _constrain(
    steps: dict[str, Array], gradients: Mapping[str, Any], bound: float | Array
) -> dict[str, Array]:
    product = slope_along(steps, {name: gradients[name] for name in steps})
    positive = product > 0
    scale = jnp.where(positive, jnp.sqrt(bound / jnp.where(positive, product, 1)), 1)
    # Products of finite numbers can overflow, and cancel each other then.
    scale = jnp.where(jnp.isnan(product), 0, scale)
    scale = jnp.minimum(scale, 1)
    return {name: (step * scale).astype(step.dtype) for name, step in steps.items()}
