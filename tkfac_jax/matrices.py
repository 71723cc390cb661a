"""Kernels, inputs and output gradients as matrices.

A kernel is the matrix `kernel.reshape(-1, d_out)`, a bias its last row. The input of a layer is,
per example and location, the row that this matrix multiplies: `[a, 1]` with a bias. For a
convolution the row is the patch that a location sees, ordered as the kernel is.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tkfac_jax.layers import LayerSpec
from tkfac_jax.linen import ConvGeometry


def input_rows(spec: LayerSpec, inputs: Array) -> Float[Array, "batch locations d_in"]:
    """The inputs of a layer as rows, one per example and location.

    Args:
      spec: the layer.
      inputs: the input of one call, `(batch, ..., features)`; without a batch axis, one example.

    Returns:
      The rows in the dtype of the layer's statistics, the homogeneous coordinate 1 last if the
      layer has a bias.
    """
    inputs = inputs.astype(spec.dtype)
    if spec.geometry is not None:
        inputs = _patches(inputs, spec.geometry)
        event_axes = 3
    else:
        event_axes = 1
    rows = _as_rows(inputs, event_axes)
    if spec.has_bias:
        rows = jnp.concatenate([rows, jnp.ones_like(rows[..., :1])], axis=-1)
    return rows


def gradient_rows(spec: LayerSpec, gradients: Array) -> Float[Array, "batch locations d_out"]:
    """The derivatives with respect to a layer's output as rows, one per example and location.

    Args:
      spec: the layer.
      gradients: the derivatives, in the shape of the output of the call.

    Returns:
      The rows in the dtype of the layer's statistics.
    """
    return _as_rows(gradients.astype(spec.dtype), 1 if spec.geometry is None else 3)


def _as_rows(array: Array, event_axes: int) -> Array:
    """Merges all axes between the first and the last; without a batch axis there is one example."""
    if array.ndim <= event_axes:
        array = array[None]
    return array.reshape(array.shape[0], -1, array.shape[-1])


def _patches(images: Array, geometry: ConvGeometry) -> Array:
    """The patch that each output location sees: `(..., height, width, taps * channels)`.

    Slices of the padded image, one per tap of the kernel: exact copies in the order of the kernel,
    where `lax.conv_general_dilated_patches` multiplies at the default precision and orders by channel.
    """
    padded = _pad(images, geometry)
    spans = [(w - 1) * d + 1 for w, d in zip(geometry.window, geometry.dilation, strict=True)]
    height, width = (
        (size - span) // stride + 1
        for size, span, stride in zip(padded.shape[-3:-1], spans, geometry.strides, strict=True)
    )
    (stride_h, stride_w), (dilation_h, dilation_w) = geometry.strides, geometry.dilation
    taps = [
        padded[
            ...,
            i * dilation_h : i * dilation_h + (height - 1) * stride_h + 1 : stride_h,
            j * dilation_w : j * dilation_w + (width - 1) * stride_w + 1 : stride_w,
            :,
        ]
        for i in range(geometry.window[0])
        for j in range(geometry.window[1])
    ]
    return jnp.concatenate(taps, axis=-1)


def _pad(images: Array, geometry: ConvGeometry) -> Array:
    spans = [(w - 1) * d + 1 for w, d in zip(geometry.window, geometry.dilation, strict=True)]
    mode = {"CIRCULAR": "wrap", "REFLECT": "reflect"}.get(str(geometry.padding), "constant")
    if not isinstance(geometry.padding, str):
        pads = list(geometry.padding)
    elif mode != "constant":
        pads = [((span - 1) // 2, span // 2) for span in spans]
    else:
        pads = jax.lax.padtype_to_pads(
            images.shape[-3:-1], spans, geometry.strides, geometry.padding
        )
    widths = [(0, 0)] * (images.ndim - 3) + [(int(lo), int(hi)) for lo, hi in pads] + [(0, 0)]
    if mode != "constant":
        return jnp.pad(images, widths, mode=mode)
    # lax.pad also takes the negative padding that lax.conv_general_dilated allows.
    return jax.lax.pad(images, jnp.zeros((), images.dtype), [(*width, 0) for width in widths])


def patch_bytes(spec: LayerSpec, gradients: Array) -> int:
    """Bytes of one example's input rows, for a convolution with output gradients `(batch, ..., features)`."""
    return math.prod(gradients.shape[1:-1]) * spec.d_in * jnp.dtype(spec.dtype).itemsize
