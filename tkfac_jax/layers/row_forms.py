"""Inputs and output gradients as rows.

Every layer is one or more products `rows @ matrix`. `Layout` (`kernel_matrix`) says how a kernel is those matrices,
with a bias as further rows; a form (`Contraction`, `Convolution`, `Lookup`, `Attend`, `Scaling`) says which
rows one call multiplied, without the 1 that belongs to a bias. So the gradient of the matrix is, per
example, `sum_i a_i g_i^T` over the locations i, where `a_i` is an input row and `g_i` the derivative with
respect to the output row.
"""

import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tkfac_jax.layers.kernel_matrix import Axes, Padding
from tkfac_jax.linalg.factor_structure import Structure, moment


class TokenRows(NamedTuple):
    """Rows that are zero almost everywhere, such as one-hot vectors, by the squares of their entries.

    Attributes:
      tokens: places of the entries; a place may occur several times, its squares then add up.
      squares: squares of the entries.
      size: length of a row.
    """

    tokens: Int[Array, "batch locations entries"]
    squares: Float[Array, "batch locations entries"]
    size: int


Rows = Array | TokenRows


def squared_norms(structure: Structure, rows: Rows) -> Float[Array, "*blocks batch locations"]:
    """The squared length of each row of a factor; a last entry that the rows lack is 1."""
    if isinstance(rows, TokenRows):
        return rows.squares.sum(-1)
    return jnp.sum(rows * rows, axis=-1) + (structure.size - rows.shape[-1])


def rows_moment(
    structure: Structure,
    rows: Rows,
    weights: Float[Array, "*blocks batch locations"],
    precision: jax.lax.PrecisionLike,
) -> Array:
    """The weighted second moment of rows, summed over examples and locations; see `factor_structure.moment`."""
    if isinstance(rows, TokenRows):
        # The second moment of one-hot vectors is diagonal: the weighted counts of the tokens.
        weighted = rows.squares * weights[..., None]
        return jnp.zeros(rows.size, weighted.dtype).at[rows.tokens].add(weighted)
    flat = rows.reshape(*rows.shape[:-3], -1, rows.shape[-1])
    return moment(structure, flat, weights.reshape(*flat.shape[:-1]), precision)


def reduce_locations(
    inputs: Rows, gradients: Array, weights: Float[Array, "batch locations"] | None
) -> tuple[Rows, Array]:
    """One location for each example: the mean of its input rows and the sum of its gradient rows.

    Args:
      inputs: input rows.
      gradients: gradient rows.
      weights: 0 where a location is padding; None: all count.
    """
    present = None if weights is None else (weights > 0).astype(weights.dtype)
    if present is not None:
        gradients = gradients * present[..., None]
    return _mean_row(inputs, present), gradients.sum(axis=-2, keepdims=True)


def _mean_row(rows: Rows, present: Array | None) -> Rows:
    if isinstance(rows, TokenRows):
        tokens = rows.tokens[..., 0]
        share = jnp.ones_like(rows.squares[..., 0]) if present is None else present
        share = share / jnp.maximum(share.sum(-1, keepdims=True), 1)
        # The mean of one-hot vectors has, at a token, its share of the locations.
        same = (tokens[:, :, None] == tokens[:, None, :]).astype(share.dtype)
        squares = share * jnp.einsum("nij,nj->ni", same, share)
        return TokenRows(tokens[:, None], squares[:, None], rows.size)
    if present is None:
        return rows.mean(axis=-2, keepdims=True)
    share = present / jnp.maximum(present.sum(-1, keepdims=True), 1)
    return jnp.sum(rows * share[..., None], axis=-2, keepdims=True)


class Contraction(NamedTuple):
    """A product over some axes of the input: Dense, DenseGeneral, Einsum.

    All axes are counted from the front. The axes that are neither features nor blocks are examples (the
    first) and locations (the others), in the order of `input_rest`.
    """

    input_blocks: Axes
    input_rest: Axes
    input_features: Axes
    output_blocks: Axes
    output_rest: Axes
    output_features: Axes

    @classmethod
    def last_axis(cls, ndim: int) -> "Contraction":
        """The product over the last axis, as of a Dense layer."""
        rest, last = tuple(range(ndim - 1)), (ndim - 1,)
        return cls((), rest, last, (), rest, last)

    def rows(
        self, inputs: Array, gradients: Array
    ) -> tuple[Float[Array, "*blocks batch locations rows"], Array]:
        """The input rows and the gradient rows of a call."""
        return (
            _as_rows(inputs, self.input_blocks, self.input_rest, self.input_features),
            _as_rows(gradients, self.output_blocks, self.output_rest, self.output_features),
        )


def _as_rows(array: Array, blocks: Axes, rest: Axes, features: Axes) -> Array:
    shape = array.shape
    lead = (math.prod(shape[axis] for axis in blocks),) if blocks else ()
    batch = shape[rest[0]] if rest else 1
    width = math.prod(shape[axis] for axis in features)
    return array.transpose(*blocks, *rest, *features).reshape(*lead, batch, -1, width)


class Convolution(NamedTuple):
    """How a convolution visits its input, over any number of spatial axes.

    Attributes:
      window: spatial size of the kernel.
      strides: steps of the window, per spatial axis.
      dilation: distance between the taps of the kernel, per spatial axis.
      padding: `"SAME"`, `"VALID"`, `"CIRCULAR"`, `"REFLECT"`, `"CAUSAL"`, or explicit `(low, high)` pairs.
      input_dilation: distance between the input's elements, per spatial axis: the stride of a
        transposed convolution.
      groups: the channels are split into so many independent groups.
      flipped: the taps of the kernel are in reverse order, as in the transpose of a convolution.
    """

    window: tuple[int, ...]
    strides: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: Padding
    input_dilation: tuple[int, ...]
    groups: int = 1
    flipped: bool = False

    def rows(
        self, inputs: Array, gradients: Array
    ) -> tuple[Float[Array, "*blocks batch locations rows"], Array]:
        """The input rows (the patches, ordered as the kernel is) and the gradient rows of a call."""
        event_axes = len(self.window) + 1
        batch = inputs.shape[0] if inputs.ndim > event_axes else 1
        patches = self._patches(inputs.reshape(-1, *inputs.shape[-event_axes:]))
        gradients = gradients.reshape(batch, -1, gradients.shape[-1])
        if self.groups == 1:
            return patches.reshape(*gradients.shape[:2], -1), gradients
        shape = (*gradients.shape[:2], -1, self.groups, inputs.shape[-1] // self.groups)
        grouped = jnp.moveaxis(patches.reshape(shape), 3, 0)
        rows = grouped.reshape(*grouped.shape[:3], -1)
        by_group = gradients.reshape(*gradients.shape[:2], self.groups, -1)
        return rows, jnp.moveaxis(by_group, 2, 0)

    def patch_bytes(self, channels: int, gradients: Array) -> int:
        """Bytes of one example's input rows, for gradients `(..., *spatial, features)`."""
        locations = math.prod(gradients.shape[-1 - len(self.window) : -1])
        return locations * math.prod(self.window) * channels * gradients.dtype.itemsize

    def _patches(self, images: Array) -> Float[Array, "batch *locations values"]:
        """What each output location sees.

        Slices of the padded image, one per tap of the kernel: exact copies in the order of the
        kernel, where `lax.conv_general_dilated_patches` multiplies at the default precision and
        orders by channel.
        """
        padded = self._pad(images)
        counts = [
            (size - span) // stride + 1
            for size, span, stride in zip(
                padded.shape[1:-1], self._spans, self.strides, strict=True
            )
        ]
        taps = []
        for tap in itertools.product(*map(range, self.window)):
            slices = [
                slice(i * dilation, i * dilation + (count - 1) * stride + 1, stride)
                for i, dilation, count, stride in zip(
                    tap, self.dilation, counts, self.strides, strict=True
                )
            ]
            taps.append(padded[:, *slices])
        if self.flipped:
            taps.reverse()
        return jnp.concatenate(taps, axis=-1)

    def _pad(self, images: Array) -> Array:
        spans, sizes = self._spans, images.shape[1:-1]
        mode = {"CIRCULAR": "wrap", "REFLECT": "reflect"}.get(str(self.padding), "constant")
        if not isinstance(self.padding, str):
            pads = list(self.padding)
        elif mode != "constant":
            pads = [((span - 1) // 2, span // 2) for span in spans]
        elif self.padding == "CAUSAL":
            pads = [(span - 1, 0) for span in spans]
        else:
            pads = jax.lax.padtype_to_pads(sizes, spans, self.strides, self.padding)
        if mode != "constant":
            widths = [(0, 0), *((int(low), int(high)) for low, high in pads), (0, 0)]
            return jnp.pad(images, widths, mode=mode)
        # lax.pad also takes the negative padding that lax.conv_general_dilated allows.
        configuration = [
            (int(low), int(high), gap - 1)
            for (low, high), gap in zip(pads, self.input_dilation, strict=True)
        ]
        zero = jnp.zeros((), images.dtype)
        return jax.lax.pad(images, zero, [(0, 0, 0), *configuration, (0, 0, 0)])

    @property
    def _spans(self) -> list[int]:
        return [(w - 1) * d + 1 for w, d in zip(self.window, self.dilation, strict=True)]


class Lookup(NamedTuple):
    """Rows of a table, looked up by tokens: the product with one-hot vectors that are never made.

    Attributes:
      size: rows of the table.
    """

    size: int

    def rows(self, inputs: Array, gradients: Array) -> tuple[TokenRows, Array]:
        """The one-hot input rows and the gradient rows of a call."""
        gradients = gradients.reshape(
            gradients.shape[0] if inputs.ndim else 1, -1, gradients.shape[-1]
        )
        tokens = inputs.reshape(*gradients.shape[:2], 1)
        return TokenRows(tokens, jnp.ones(tokens.shape, gradients.dtype), self.size), gradients


class Attend(NamedTuple):
    """The product with a table's transpose, as of tied embeddings: the roles of the two rows are swapped."""

    def rows(self, inputs: Array, gradients: Array) -> tuple[Array, Array]:
        """The gradients, on the side of the table's rows, and the inputs, on that of its columns."""
        rows, columns = Contraction.last_axis(inputs.ndim).rows(inputs, gradients)
        return columns, rows


class Scaling(NamedTuple):
    """The scale and bias of a norm, elementwise on its last axis: one exact block of both.

    Attributes:
      scaled: there is a scale.
      shifted: there is a bias.
    """

    scaled: bool
    shifted: bool

    def rows(self, inputs: Array, gradients: Array) -> tuple[Array, Array]:
        """Per example the gradient of scale and bias; and the single number 1.

        Args:
          inputs: the normalised input, before scale and bias.
          gradients: derivatives with respect to the norm's output.
        """
        flat = gradients.reshape(
            gradients.shape[0] if gradients.ndim > 1 else 1, -1, gradients.shape[-1]
        )
        parts = [jnp.sum(flat * inputs.reshape(flat.shape), axis=1)] if self.scaled else []
        parts += [flat.sum(axis=1)] if self.shifted else []
        rows = jnp.concatenate(parts, axis=-1)[:, None]
        return rows, jnp.ones_like(rows[..., :1])


Form = Contraction | Convolution | Lookup | Attend | Scaling
