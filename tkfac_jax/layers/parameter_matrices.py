"""The parameters that are matrices: a layer's kernel and bias together, and what else has two axes and more.

What treats whole matrices, such as their lengths, need not know what a kernel looks like: `ParameterMatrix` takes
arrays of parameters, gradients or steps to matrices and back.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from tkfac_jax.layers.kernel_matrix import Layout
from tkfac_jax.layers.parameter_tree import is_masked, named_leaves
from tkfac_jax.layers.spec import LayerSpec, visible_layers

# Parameters of these names are vectors, whatever their axes: a norm in a stack of layers has a scale for each.
NAMES_OF_VECTORS = ("scale", "bias")


class ParameterMatrix(NamedTuple):
    """One or two parameters as a matrix, or as a stack of independent ones.

    Attributes:
      kernel: name of the parameter that makes the upper rows.
      bias: name of the one that makes the last rows, or None.
      layout: how they are matrices.
      stack: number of leading axes of the parameters along which matrices are stacked, before those of the layout.
      makes_outputs: as `LayerSpec` says.
    """

    kernel: str
    bias: str | None
    layout: Layout
    stack: int = 0
    makes_outputs: bool = False

    @property
    def d_out(self) -> int:
        """Columns of a matrix."""
        return self.layout.d_out

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of its parameters."""
        return (self.kernel,) if self.bias is None else (self.kernel, self.bias)

    def rows_of(self, leaves: Mapping[str, Any]) -> tuple[Float[Array, "*batch rows d_out"], ...]:
        """The rows of the kernel, and those of the bias beneath, in at least float32."""
        kernel = self.layout.kernel_to_matrix(_widened(leaves[self.kernel]), self.stack)
        if self.bias is None:
            return (kernel,)
        return kernel, self.layout.bias_to_matrix(_widened(leaves[self.bias]), self.stack)

    def leaves_of(self, rows: tuple[Array, ...], like: Mapping[str, Any]) -> dict[str, Array]:
        """The inverse of `rows_of`, in the shapes and dtypes of some leaves."""
        kernel = like[self.kernel]
        leaves = {self.kernel: self.layout.matrix_to_kernel(rows[0], kernel.shape, self.stack)}
        if self.bias is not None:
            shape = like[self.bias].shape
            leaves[self.bias] = self.layout.matrix_to_bias(rows[1], shape, self.stack)
        return {name: leaf.astype(like[name].dtype) for name, leaf in leaves.items()}


def parameter_matrices(
    layers: Mapping[str, LayerSpec], tree: Any, what: str
) -> dict[str, ParameterMatrix]:
    """The matrices among the parameters that a tree holds, not hidden behind `optax.MaskedNode`.

    Args:
      layers: the layers, by name.
      tree: parameters, or a tree of their structure.
      what: what the tree is, for messages.

    Returns:
      By the names of layers, their kernels and biases; by their own names, parameters of no layer that have two axes
      and more, their last one being the columns. Scales and biases of no layer are not among them.

    Raises:
      ValueError: the tree is not that of the layers.
    """
    specs = {name: layers[name] for name in visible_layers(layers, tree, what)}
    found = {
        name: ParameterMatrix(
            spec.kernel, spec.bias, spec.layout, len(spec.stack), spec.makes_outputs
        )
        for name, spec in specs.items()
    }
    owned = {name for spec in layers.values() for name in (spec.kernel, spec.bias)}
    for name, leaf in named_leaves(tree).items():
        if name not in owned and not is_masked(leaf) and _is_matrix(name, jnp.shape(leaf)):
            found[name] = ParameterMatrix(name, None, _layout_of(jnp.shape(leaf)))
    return found


def _is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) >= 2 and name.rsplit("/", 1)[-1] not in NAMES_OF_VECTORS


def _layout_of(shape: tuple[int, ...]) -> Layout:
    """One matrix, whose columns are the last axis."""
    last = len(shape) - 1
    return Layout(shape, (), tuple(range(last)), (last,))


def _widened(array: Array) -> Array:
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))
