"""Every layer that the README's table of coverage speaks of, and how each is checked.

`python tests/coverage_cases.py` writes the table into the README; `test_coverage.py` checks every row.
"""

import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

F64 = {"dtype": jnp.float64, "param_dtype": jnp.float64}


class Layer(NamedTuple):
    """One layer of Flax and an input for it.

    Attributes:
      row: the row of the table that it stands for.
      linen: makes the Linen module, or None.
      nnx: makes the NNX module from `rngs`, or None.
      shape: shape of the input.
      features: number of axes of the output, from the end, that are features; None: a norm, whose locations are
        not told apart.
      matrix: from the parameters (of one layer, by name) to matrices `(*blocks, d_in, d_out)`.
      tokens: the input is integers below this.
      method: name of the method that applies the layer.
      example_axis: axis of input and output that counts the examples.
    """

    row: str
    linen: Callable[[], Any] | None
    nnx: Callable[[Any], Any] | None
    shape: tuple[int, ...]
    features: int | None = 1
    matrix: Callable[[dict[str, Any]], Any] | None = None
    tokens: int | None = None
    method: str = "__call__"
    example_axis: int = 0


def rows_last(params):
    """Kernel rows and then the bias, for a kernel whose last axis is the output."""
    kernel = params["kernel"]
    matrix = kernel.reshape(-1, kernel.shape[-1])
    return jnp.concatenate([matrix, params["bias"][None]]) if "bias" in params else matrix


def split_rows(rows):
    """For a kernel whose first `rows` axes are inputs and whose others, as the bias's, are outputs."""

    def matrix(params):
        kernel = params["kernel"]
        d_in = int(np.prod(kernel.shape[:rows]))
        parts = [kernel.reshape(d_in, -1)]
        if "bias" in params:
            parts.append(params["bias"].reshape(1, -1))
        return jnp.concatenate(parts)

    return matrix


def blocks_first(rows):
    """As `split_rows`, one matrix for each index of the first axis of kernel and bias."""
    return jax.vmap(split_rows(rows))


def grouped(groups):
    """A convolution's kernel, one matrix for each group of output channels."""

    def matrix(params):
        kernel, bias = params["kernel"], params["bias"]
        kernels = jnp.split(kernel, groups, axis=-1)
        biases = jnp.split(bias, groups)
        return jnp.stack(
            [rows_last({"kernel": k, "bias": b}) for k, b in zip(kernels, biases, strict=True)]
        )

    return matrix


def transposed(params):
    """A kernel stored `(*window, out, in)`."""
    return rows_last({**params, "kernel": jnp.swapaxes(params["kernel"], -1, -2)})


def norm_rows(params):
    """Scale above bias, one column."""
    return jnp.concatenate([params[k] for k in ("scale", "bias") if k in params])[:, None]


def table_rows(params):
    return params["embedding"]


def conv(row, shape, window, channels=4, matrix=rows_last, **options):
    return Layer(
        row,
        functools.partial(nn.Conv, channels, window, **options, **F64),
        functools.partial(nnx.Conv, shape[-1], channels, window, **options, **F64),
        shape,
        1,
        matrix,
    )


def conv_transpose(row, shape, window, matrix=rows_last, **options):
    return Layer(
        row,
        functools.partial(nn.ConvTranspose, 3, window, **options, **F64),
        functools.partial(nnx.ConvTranspose, shape[-1], 3, window, **options, **F64),
        shape,
        1,
        matrix,
    )


def norm(name, shape, nnx_options=(), **options):
    make_nnx = functools.partial(
        getattr(nnx, name), shape[-1], **dict(nnx_options), **options, **F64
    )
    return Layer(
        "LayerNorm, RMSNorm, BatchNorm, GroupNorm, InstanceNorm",
        functools.partial(getattr(nn, name), **options, **F64),
        make_nnx,
        shape,
        None,
        norm_rows,
    )


DENSE = "Dense / Linear, any number of axes"
GENERAL = "DenseGeneral / LinearGeneral"
EINSUM = "Einsum that is a matrix product"
CONV = "Conv in 1, 2, 3 dimensions: strides, padding, both dilations"
GROUPS = "Conv with groups, depthwise: a block per group"
TRANSPOSE = "ConvTranspose"
EMBED = "Embed: diagonal input factor, by token counts"

LAYERS = {
    "dense": Layer(
        DENSE,
        lambda: nn.Dense(3, **F64),
        lambda rngs: nnx.Linear(4, 3, rngs=rngs, **F64),
        (3, 4),
        1,
        rows_last,
    ),
    "dense on a sequence": Layer(
        DENSE,
        lambda: nn.Dense(3, use_bias=False, **F64),
        lambda rngs: nnx.Linear(4, 3, use_bias=False, rngs=rngs, **F64),
        (3, 2, 5, 4),
        1,
        rows_last,
    ),
    "several output axes": Layer(
        GENERAL,
        lambda: nn.DenseGeneral((2, 3), **F64),
        lambda rngs: nnx.LinearGeneral(4, (2, 3), rngs=rngs, **F64),
        (3, 5, 4),
        2,
        split_rows(1),
    ),
    "several input axes": Layer(
        GENERAL,
        lambda: nn.DenseGeneral(3, axis=(-2, -1), **F64),
        lambda rngs: nnx.LinearGeneral((2, 4), 3, axis=(-2, -1), rngs=rngs, **F64),
        (3, 5, 2, 4),
        1,
        split_rows(2),
    ),
    "input axis in the middle": Layer(
        GENERAL,
        lambda: nn.DenseGeneral((2, 2), axis=1, **F64),
        lambda rngs: nnx.LinearGeneral(4, (2, 2), axis=1, rngs=rngs, **F64),
        (3, 4, 5),
        2,
        split_rows(1),
    ),
    "einsum": Layer(
        EINSUM,
        lambda: nn.Einsum((4, 2, 3), "btd,dhk->bthk", **F64),
        lambda rngs: nnx.Einsum("btd,dhk->bthk", (4, 2, 3), (2, 3), rngs=rngs, **F64),
        (3, 5, 4),
        2,
        split_rows(1),
    ),
    "einsum with ellipsis": Layer(
        EINSUM,
        lambda: nn.Einsum((2, 4, 3), "...hd,hdk->...k", use_bias=False, **F64),
        lambda rngs: nnx.Einsum("...hd,hdk->...k", (2, 4, 3), rngs=rngs, **F64),
        (3, 5, 2, 4),
        1,
        split_rows(2),
    ),
    "conv 1-D": conv(CONV, (3, 7, 2), (3,), strides=2),
    "conv causal": conv(CONV, (3, 7, 2), (3,), padding="CAUSAL", kernel_dilation=2),
    "conv 2-D": conv(CONV, (2, 5, 4, 2), (3, 2), padding="VALID", use_bias=False),
    "conv circular": conv(CONV, (2, 5, 4, 2), (3, 2), padding="CIRCULAR", strides=(2, 1)),
    "conv 3-D": conv(CONV, (2, 3, 4, 3, 2), (2, 3, 2), kernel_dilation=(1, 1, 2)),
    "conv dilated input": conv(
        CONV, (2, 3, 4, 2), (2, 2), input_dilation=(2, 3), padding=((1, 1), (0, 2))
    ),
    "conv groups": conv(GROUPS, (2, 4, 3, 4), (2, 2), 6, grouped(2), feature_group_count=2),
    "conv depthwise": conv(
        GROUPS, (2, 5, 3), (3,), 6, grouped(3), feature_group_count=3, strides=2
    ),
    "transposed conv": conv_transpose(TRANSPOSE, (2, 3, 2, 2), (3, 2), strides=(2, 2)),
    "transposed conv valid": conv_transpose(
        TRANSPOSE, (2, 3, 2), (2,), strides=(3,), padding="VALID"
    ),
    "transposed conv explicit": conv_transpose(
        TRANSPOSE, (2, 3, 2, 2), (2, 2), padding=((1, 2), (0, 1)), kernel_dilation=(2, 1)
    ),
    "transposed conv, transposed kernel": conv_transpose(
        TRANSPOSE, (2, 3, 2), (3,), transposed, strides=(2,), transpose_kernel=True
    ),
    "embed": Layer(
        EMBED,
        lambda: nn.Embed(6, 3, **F64),
        lambda rngs: nnx.Embed(6, 3, rngs=rngs, **F64),
        (3, 5),
        1,
        table_rows,
        tokens=6,
    ),
    "attend": Layer(
        "Embed.attend, tied with the lookup: the diagonal of the vocabulary's factor",
        lambda: nn.Embed(6, 3, **F64),
        lambda rngs: nnx.Embed(6, 3, rngs=rngs, **F64),
        (3, 2, 3),
        1,
        lambda params: table_rows(params).T,
        method="attend",
    ),
    "layer norm": norm("LayerNorm", (3, 5, 4)),
    "layer norm without bias": norm("LayerNorm", (3, 4), use_bias=False),
    "rms norm": norm("RMSNorm", (3, 5, 4)),
    "group norm": norm("GroupNorm", (3, 5, 4), num_groups=2),
    "instance norm": norm("InstanceNorm", (3, 5, 2, 4)),
    "batch norm": norm("BatchNorm", (3, 5, 4), use_running_average=True),
    "batched einsum": Layer(
        EINSUM,
        lambda: nn.Einsum((2, 4, 3), "bthd,hdk->bthk", **F64),
        lambda rngs: nnx.Einsum("bthd,hdk->bthk", (2, 4, 3), (2, 3), rngs=rngs, **F64),
        (3, 5, 2, 4),
        1,
        blocks_first(1),
    ),
    "batched dense": Layer(
        GENERAL,
        lambda: nn.DenseGeneral(3, axis=-1, batch_dims=(0,), **F64),
        lambda rngs: nnx.LinearGeneral(4, 3, axis=-1, batch_axis={0: 2}, rngs=rngs, **F64),
        (2, 3, 5, 4),
        1,
        blocks_first(1),
        example_axis=1,
    ),
}


class Problem(NamedTuple):
    """A layer with an input, parameters and a function that applies it."""

    apply: Callable[[Any, Any], Any]
    params: Any
    inputs: Any
    by_name: Callable[[Any], dict[str, Any]]


def make(layer: Layer, framework: str) -> Problem:
    """The layer with random parameters; its first axis of the input is the examples."""
    rng = np.random.default_rng(0)
    if layer.tokens is None:
        inputs = jnp.asarray(rng.normal(size=layer.shape))
    else:
        inputs = jnp.asarray(rng.integers(0, layer.tokens, size=layer.shape))

    def randomly(tree):
        return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), tree)

    if framework == "linen":
        module = layer.linen()
        start = inputs if layer.method == "__call__" else jnp.zeros((1, 1), int)
        variables = jax.eval_shape(module.init, jax.random.key(0), start)
        others = {k: randomly(v) for k, v in variables.items() if k != "params"}
        others = jax.tree.map(abs, others)

        def apply(params, x):
            return module.apply({"params": params, **others}, x, method=layer.method)

        return Problem(apply, randomly(variables["params"]), inputs, dict)
    module = nnx.jit(lambda: layer.nnx(rngs=nnx.Rngs(0)))()
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)

    def apply(params, x):
        return getattr(nnx.merge(graphdef, params, rest, copy=True), layer.method)(x)

    return Problem(apply, randomly(params), inputs, lambda p: nnx.to_pure_dict(nnx.state(p)))


# Rows that no single layer stands for: what they say, and the tests that check them.
FURTHER = {
    "MultiHeadDotProductAttention / MultiHeadAttention, LSTM, GRU and other cells, by their projections": (
        "exact",
        "exact",
    ),
    "a layer applied several times; nn.RNN and scans over time: uses add up": ("exact", "exact"),
    "remat (with policies), jit, and both nested": ("exact", "exact"),
    "scan over stacked layers: factors of its own for each layer": ("exact", "exact"),
    "vmap over the batch, over stacked layers": ("exact", "exact"),
    "parameters cast to bfloat16 or float16 before use": ("exact", "exact"),
    "factors above max_factor_size": ("diagonal or blocks", "diagonal or blocks"),
    "stacked along another axis than the first": ("fallback", "fallback"),
    "kernels scaled, masked, or normalised (WeightNorm, SpectralNorm, map_variables)": (
        "fallback",
        "fallback",
    ),
    "ConvLocal; circular ConvTranspose; own dot_general; OptimizedLSTMCell of Linen": (
        "fallback",
        "fallback",
    ),
    "LoRA, other modules with parameters of their own: see register_layer": (
        "fallback",
        "fallback",
    ),
}


def table():
    """The table of coverage, in Markdown."""
    lines = ["| layer or transformation | Linen | NNX |", "| --- | --- | --- |"]
    for row in dict.fromkeys(layer.row for layer in LAYERS.values()):
        norms = row.startswith("LayerNorm")
        status = 'exact with `norms="exact"`, else fallback' if norms else "exact"
        status = "approximated" if row.startswith("Embed.attend") else status
        lines.append(f"| {row} | {status} | {status} |")
    lines += [f"| {row} | {linen} | {own} |" for row, (linen, own) in FURTHER.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    readme = pathlib.Path(__file__).parents[1] / "README.md"
    before, _, rest = readme.read_text().partition("<!-- coverage -->\n")
    _, _, after = rest.partition("<!-- end of coverage -->")
    readme.write_text(f"{before}<!-- coverage -->\n{table()}\n<!-- end of coverage -->{after}")
