"""Kernels and biases as matrices."""

import math
from typing import NamedTuple

from jaxtyping import Array, Float

Padding = str | tuple[tuple[int, int], ...]
Axes = tuple[int, ...]


class Layout(NamedTuple):
    """How a kernel is a matrix, or a batch of independent matrices (the groups of a convolution).

    Attributes:
      shape: the kernel is first reshaped to this.
      blocks: axes of `shape` along which the matrices are independent; usually none.
      inputs: axes that make the rows of a matrix.
      outputs: axes that make its columns.
      bias: axes that the bias has, in its own order; empty if there is none.
      bias_rows: rows that the bias adds beneath the kernel's: 1, or one per feature for a norm's bias.
    """

    shape: tuple[int, ...]
    blocks: Axes
    inputs: Axes
    outputs: Axes
    bias: Axes = ()
    bias_rows: int = 0

    @property
    def rows(self) -> int:
        """Rows of a matrix that come from the kernel."""
        return math.prod(self.shape[axis] for axis in self.inputs)

    @property
    def d_in(self) -> int:
        """Rows of a matrix, those of the bias counted."""
        return self.rows + self.bias_rows

    @property
    def d_out(self) -> int:
        """Columns of a matrix."""
        return math.prod(self.shape[axis] for axis in self.outputs)

    @property
    def batch(self) -> tuple[int, ...]:
        """`()`, or the number of independent matrices."""
        return (math.prod(self.shape[axis] for axis in self.blocks),) if self.blocks else ()

    def kernel_to_matrix(self, kernel: Array, stack: int = 0) -> Float[Array, "*batch rows d_out"]:
        """The kernel as matrices; its first `stack` axes stay in front."""
        lead = kernel.shape[:stack]
        order = (*self.blocks, *self.inputs, *self.outputs)
        split = kernel.reshape(*lead, *self.shape)
        return _permute(split, order, stack).reshape(*lead, *self.batch, self.rows, self.d_out)

    def matrix_to_kernel(self, matrix: Array, shape: tuple[int, ...], stack: int = 0) -> Array:
        """The inverse of `kernel_to_matrix`, for a kernel of that shape."""
        lead = matrix.shape[:stack]
        order = (*self.blocks, *self.inputs, *self.outputs)
        split = matrix.reshape(*lead, *(self.shape[axis] for axis in order))
        return _permute(split, _inverse(order), stack).reshape(shape)

    def bias_to_matrix(self, bias: Array, stack: int = 0) -> Float[Array, "*batch bias_rows d_out"]:
        """The bias as the last rows of the matrices."""
        lead = bias.shape[:stack]
        split = bias.reshape(*lead, *(self.shape[axis] for axis in self.bias))
        return _permute(split, self._bias_order, stack).reshape(
            *lead, *self.batch, self.bias_rows, self.d_out
        )

    def matrix_to_bias(self, matrix: Array, shape: tuple[int, ...], stack: int = 0) -> Array:
        """The inverse of `bias_to_matrix`, for a bias of that shape."""
        lead = matrix.shape[:stack]
        sizes = [self.shape[axis] for axis in self.bias]
        split = matrix.reshape(*lead, *(sizes[i] for i in self._bias_order))
        return _permute(split, _inverse(self._bias_order), stack).reshape(shape)

    @property
    def _bias_order(self) -> Axes:
        if self.bias_rows != 1:
            return tuple(range(len(self.bias)))
        return tuple(self.bias.index(axis) for axis in (*self.blocks, *self.outputs))


def _permute(array: Array, order: Axes, stack: int) -> Array:
    """Permutes the axes after the first `stack` ones."""
    return array.transpose(*range(stack), *(stack + axis for axis in order))


def _inverse(order: Axes) -> Axes:
    return tuple(order.index(axis) for axis in range(len(order)))
