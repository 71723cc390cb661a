"""Layer calls from the attributes that Flax gives its layer classes, in Linen and NNX alike."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from tkfac_jax.layers.kernel_matrix import Layout
from tkfac_jax.layers.layer_call import LayerCall, attend_call, conv_call, embed_call
from tkfac_jax.layers.row_forms import Contraction, Convolution, Scaling

Parameters = Mapping[str, Any]


def broadcast(value: int | Sequence[int] | None, rank: int) -> tuple[int, ...]:
    """Flax takes None, a number or a sequence where there is one number per axis; None means 1."""
    if value is None:
        value = 1
    return (value,) * rank if isinstance(value, int) else tuple(int(v) for v in value)


def convolution(
    window: int | Sequence[int],
    strides: int | Sequence[int] | None,
    padding: Any,
    dilation: int | Sequence[int] | None,
    input_dilation: int | Sequence[int] | None,
    groups: int,
) -> Convolution:
    """The geometry of a convolution."""
    window = broadcast(window, 1)
    rank = len(window)
    return Convolution(
        window,
        broadcast(strides, rank),
        broadcast(dilation, rank),
        _padding(padding, rank),
        broadcast(input_dilation, rank),
        groups,
    )


def _padding(padding: Any, rank: int) -> str | tuple[tuple[int, int], ...]:
    if isinstance(padding, str):
        return padding
    pads = (padding,) * rank if isinstance(padding, int) else padding
    return tuple((pad, pad) if isinstance(pad, int) else (int(pad[0]), int(pad[1])) for pad in pads)


def transposed_convolution(
    window: int | Sequence[int],
    strides: int | Sequence[int] | None,
    padding: Any,
    dilation: int | Sequence[int] | None,
    flipped: bool,
) -> Convolution | str:
    """The geometry of a transposed convolution: one of stride 1 over the dilated input.

    The padding is that of `jax.lax.conv_transpose`: names speak of the convolution whose transpose
    this is, numbers of the dilated input itself.
    """
    window = broadcast(window, 1)
    rank = len(window)
    strides, dilation = broadcast(strides, rank), broadcast(dilation, rank)
    spans = [(w - 1) * d + 1 for w, d in zip(window, dilation, strict=True)]
    padding = _padding(padding, rank)
    if padding == "SAME":
        totals = [span + stride - 2 for span, stride in zip(spans, strides, strict=True)]
        lows = [
            span - 1 if stride > span - 1 else math.ceil(total / 2)
            for span, stride, total in zip(spans, strides, totals, strict=True)
        ]
    elif padding == "VALID":
        totals = [
            span + stride - 2 + max(span - stride, 0)
            for span, stride in zip(spans, strides, strict=True)
        ]
        lows = [span - 1 for span in spans]
    elif isinstance(padding, str):
        return f"a transposed convolution with padding {padding!r} is not supported"
    else:
        lows, totals = [low for low, _ in padding], [low + high for low, high in padding]
    pads = tuple((low, total - low) for low, total in zip(lows, totals, strict=True))
    return Convolution(window, (1,) * rank, dilation, pads, strides, flipped=flipped)


def contraction_of_axes(
    kernel: Any,
    bias: Any,
    inputs: Array,
    output: Array,
    *,
    axes: tuple[int, ...],
    batch_axes: tuple[int, ...],
) -> LayerCall:
    """A product over given axes of the input, as of DenseGeneral and LinearGeneral.

    The kernel is `(*batch, *contracted, *features)`, the output `(*batch, *rest, *features)`, and there
    is one matrix for each index of the batch axes.
    """
    ndim = inputs.ndim
    axes = tuple(axis % ndim for axis in axes)
    blocks = tuple(axis % ndim for axis in batch_axes)
    rest = tuple(axis for axis in range(ndim) if axis not in axes and axis not in blocks)
    shape = jnp.shape(kernel)
    first, second = len(blocks), len(blocks) + len(axes)
    features = tuple(range(second, len(shape)))
    lead = tuple(range(first))
    layout = Layout(
        shape,
        lead,
        tuple(range(first, second)),
        features,
        *(((), 0) if bias is None else ((*lead, *features), 1)),
    )
    form = Contraction(
        blocks,
        rest,
        axes,
        lead,
        tuple(range(first, first + len(rest))),
        tuple(range(first + len(rest), output.ndim)),
    )
    return LayerCall("dense", kernel, bias, inputs, output, layout, form)


def contraction_of_einsum(
    equation: str, kernel: Any, bias: Any, inputs: Array, output: Array
) -> LayerCall | str:
    """An Einsum of input and kernel, where it is a matrix product, or one for each block."""
    operands, result = equation.replace(" ", "").split("->")
    left, right = operands.split(",")
    # An ellipsis stands for the input's further axes; digits cannot be labels of a user's.
    named = len(left.replace("...", ""))
    left, result = (
        text.replace("...", "".join(str(i) for i in range(inputs.ndim - named)))
        for text in (left, result)
    )
    labels = (left, right, result)
    whole = f"the einsum {equation!r} is not a matrix product: "
    if "..." in right or any(len(set(text)) != len(text) for text in labels):
        return whole + "it has an ellipsis in the kernel or repeats a label"
    blocks = [label for label in result if label in right and label in left]
    columns = [label for label in result if label in right and label not in left]
    rows = [label for label in right if label in left and label not in result]
    rest = [label for label in left if label in result and label not in right]
    if len(blocks) + len(columns) + len(rows) != len(right):
        return whole + "it sums over an axis of the kernel alone"
    if len(blocks) + len(rest) + len(rows) != len(left):
        return whole + "it sums over an axis of the input alone"
    if not rows:
        return whole + "it sums over no axis"

    def places(chosen: Sequence[str], text: str) -> tuple[int, ...]:
        return tuple(text.index(label) for label in chosen)

    bias_labels = [label for label in result if label in right]
    layout = Layout(
        jnp.shape(kernel),
        places(blocks, right),
        places(rows, right),
        places(columns, right),
        *(((), 0) if bias is None else (places(bias_labels, right), 1)),
    )
    form = Contraction(
        places(blocks, left),
        places(rest, left),
        places(rows, left),
        places(blocks, result),
        places(rest, result),
        places(columns, result),
    )
    return LayerCall("dense", kernel, bias, inputs, output, layout, form)


def norm_call(scale: Any, bias: Any, normalised: Callable[[], Array], output: Array) -> LayerCall:
    """Scale and bias of a norm over its last axis.

    Args:
      scale: `(features,)`, or None.
      bias: `(features,)`, or None; one of the two is there.
      normalised: gives the input as it is before scale and bias, `(batch, ..., features)`.
      output: the norm's output.
    """
    form = Scaling(scale is not None, bias is not None)
    kernel, bias = (bias, None) if scale is None else (scale, bias)
    (size,) = jnp.shape(kernel)
    layout = Layout((size, 1), (), (0,), (1,), *(((), 0) if bias is None else ((0,), size)))
    return LayerCall("norm", kernel, bias, normalised, output, layout, form)


def argument(args: Sequence[Any], kwargs: Mapping[str, Any], name: str) -> Any:
    """The first argument of a call."""
    return args[0] if args else kwargs[name]


def refused(reason: str) -> Callable[..., str]:
    """Describes a layer that cannot be treated."""
    return lambda *_: reason


def describe_einsum(
    module: Any, parameters: Parameters, args: Any, kwargs: Any, output: Any
) -> LayerCall | str:
    """Describes a call of Einsum."""
    equation = args[1] if len(args) > 1 else kwargs.get("einsum_str")
    return contraction_of_einsum(
        equation or module.einsum_str or "",
        parameters["kernel"],
        parameters.get("bias"),
        argument(args, kwargs, "inputs"),
        output,
    )


def describe_conv(
    module: Any, parameters: Parameters, args: Any, kwargs: Any, output: Any
) -> LayerCall | str:
    """Describes a call of Conv."""
    if module.mask is not None:
        return "a masked kernel is not supported"
    geometry = convolution(
        module.kernel_size,
        module.strides,
        module.padding,
        module.kernel_dilation,
        module.input_dilation,
        module.feature_group_count,
    )
    inputs = argument(args, kwargs, "inputs")
    return conv_call(
        parameters["kernel"], inputs, output, parameters.get("bias"), geometry=geometry
    )


def describe_conv_transpose(
    module: Any, parameters: Parameters, args: Any, kwargs: Any, output: Any
) -> LayerCall | str:
    """Describes a call of ConvTranspose."""
    if module.mask is not None:
        return "a masked kernel is not supported"
    geometry = transposed_convolution(
        module.kernel_size,
        module.strides,
        module.padding,
        module.kernel_dilation,
        module.transpose_kernel,
    )
    if isinstance(geometry, str):
        return geometry
    return conv_call(
        parameters["kernel"],
        argument(args, kwargs, "inputs"),
        output,
        parameters.get("bias"),
        geometry=geometry,
        transposed=module.transpose_kernel,
    )


def describe_embed(
    module: Any, parameters: Parameters, args: Any, kwargs: Any, output: Any
) -> LayerCall:
    """Describes a lookup of Embed."""
    del module
    return embed_call(parameters["embedding"], argument(args, kwargs, "inputs"), output)


def describe_attend(
    module: Any, parameters: Parameters, args: Any, kwargs: Any, output: Any
) -> LayerCall:
    """Describes a call of Embed.attend."""
    del module
    return attend_call(parameters["embedding"], argument(args, kwargs, "query"), output)


def scales_last_axis(module: Any, output: Array) -> bool:
    """Whether the features of a norm are on the last axis."""
    names = ("axis", "feature_axes", "feature_axis")
    axes = next((getattr(module, name) for name in names if hasattr(module, name)), -1)
    return broadcast(axes, 1) in ((-1,), (output.ndim - 1,))
