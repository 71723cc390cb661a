"""Tags that turn the backward pass of a model into statistics of its layers.

After each registered layer an identity `tag(output, inputs, slot)` is inserted. Its backward rule
receives the derivative with respect to the output and returns the layer's statistics as the
cotangent of `slot`, a zero that the forward pass ignores. One pull-back therefore yields the
statistics of all layers as the "gradient" with respect to the slots: nothing else is kept, and
the uses of a layer that is applied several times add up by themselves.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tkfac_jax import linen
from tkfac_jax.layers import Layers, LayerSpec, named_leaves
from tkfac_jax.linen import LayerCall, ModuleCall
from tkfac_jax.matrices import gradient_rows, input_rows, patch_bytes

Sharing = Literal["expand", "reduce"]

# Patches of a convolution are made for so many bytes of examples at a time: small enough to stay in
# the cache of a CPU, large enough for full matrix products.
CHUNK_BYTES = 4 * 2**20


class LayerStatistics(NamedTuple):
    """The statistics of one layer, means over examples.

    The Fisher block of the layer is approximated by `input_moment (x) output_moment / trace`, the
    kernel's rows as in `kernel.reshape(-1, d_out)` and the bias last.

    Attributes:
      input_moment: under `trace_restricted` `E[tr(G) L]`, under `independent` `E[L]`.
      output_moment: under `trace_restricted` `E[tr(L) G]`, under `independent` `E[G]`.
      trace: under `trace_restricted` `E[tr(L) tr(G)]`, under `independent` the number of uses of the layer (1).
    """

    input_moment: Float[Array, "d_in d_in"]
    output_moment: Float[Array, "d_out d_out"]
    trace: Float[Array, ""]


Rule = Callable[[Array, Array, int], LayerStatistics]


def trace_restricted(
    inputs: Float[Array, "rows d_in"], gradients: Float[Array, "rows d_out"], locations: int
) -> LayerStatistics:
    """Statistics of TKFAC, summed over rows: one row per example and location.

    With `L = a a^T` and `G = g g^T` of a row: `sum tr(G) L`, `sum tr(L) G` and `sum tr(L) tr(G)`.

    Args:
      inputs: inputs `a`, the homogeneous coordinate included.
      gradients: derivatives `g` of each example's own loss with respect to the layer's output.
      locations: rows per example; not used by this rule.

    Returns:
      The sums. Divided by the number of examples they are the statistics of Gao et al. 2021,
      Eq. (4.9), and for a convolution Eq. (4.13).
    """
    del locations
    input_traces = jnp.sum(inputs * inputs, axis=-1)
    output_traces = jnp.sum(gradients * gradients, axis=-1)
    return LayerStatistics(
        _moment(inputs * output_traces[:, None], inputs),
        _moment(gradients * input_traces[:, None], gradients),
        input_traces @ output_traces,
    )


def independent(
    inputs: Float[Array, "rows d_in"], gradients: Float[Array, "rows d_out"], locations: int
) -> LayerStatistics:
    """Statistics of KFAC, summed over rows: one row per example and location.

    `sum L`, `sum G / locations` and the number of examples: inputs and gradients are taken as
    independent, and gradients as alike at all locations.

    Args:
      inputs: inputs `a`, the homogeneous coordinate included.
      gradients: derivatives `g` of each example's own loss with respect to the layer's output.
      locations: rows per example.

    Returns:
      The sums. Divided by the number of examples they are the factors of Martens and Grosse 2015,
      and for a convolution of Grosse and Martens 2016.
    """
    # Counted from the data, because under jax.vmap a constant would count for one lane, not for all.
    rows = jnp.sum(jnp.where(jnp.isnan(inputs[:, 0]), 1, 1).astype(inputs.dtype))
    return LayerStatistics(
        _moment(inputs, inputs), _moment(gradients, gradients) / locations, rows / locations
    )


def _moment(left: Array, right: Array) -> Array:
    # The default precision of accelerators would round the products to bfloat16 or TF32.
    return jnp.matmul(left.T, right, precision=jax.lax.Precision.HIGHEST)


def zero_slots(layers: Layers) -> dict[str, LayerStatistics]:
    """Zeros in the shapes of the statistics, one `LayerStatistics` per layer."""
    return {
        name: LayerStatistics(
            jnp.zeros((spec.d_in, spec.d_in), spec.dtype),
            jnp.zeros((spec.d_out, spec.d_out), spec.dtype),
            jnp.zeros((), spec.dtype),
        )
        for name, spec in layers.items()
    }


@contextlib.contextmanager
def tagging(
    layers: Layers, params: Any, slots: dict[str, LayerStatistics], rule: Rule, sharing: Sharing
) -> Iterator[set[str]]:
    """Tags the layers that are applied inside the context.

    Args:
      layers: the layers to tag.
      params: the parameters that the modules are given in the context; no two leaves the same object.
      slots: where the statistics go; see `zero_slots`.
      rule: `trace_restricted` or `independent`.
      sharing: what happens to several locations of an example; see `sampled_fisher`.

    Yields:
      The names of the layers that have been tagged so far.
    """
    leaves = named_leaves(params)
    spec_of = {id(leaves[spec.kernel]): spec for spec in layers.values()}
    tagged: set[str] = set()

    def observe(call: ModuleCall, output: Any) -> Any:
        if not isinstance(call.layer, LayerCall):
            return output
        spec = spec_of.get(id(call.layer.kernel))
        if spec is None:
            return output
        tagged.add(spec.name)
        accumulate = functools.partial(_accumulate, spec, rule, sharing)
        return _tag(output, call.layer.inputs, slots[spec.name], accumulate)

    with linen.intercept(observe):
        yield tagged


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _tag(output: Array, inputs: Array, slot: LayerStatistics, accumulate: Any) -> Array:
    """The identity on `output`; backwards, `slot` receives `accumulate(inputs, output gradient)`."""
    del inputs, slot, accumulate
    return output


def _tag_forward(
    output: Array, inputs: Array, slot: LayerStatistics, accumulate: Any
) -> tuple[Array, Array]:
    del slot, accumulate
    return output, inputs


def _tag_backward(accumulate: Any, inputs: Array, gradient: Array) -> tuple[Array, None, Any]:
    return gradient, None, accumulate(inputs, gradient)


_tag.defvjp(_tag_forward, _tag_backward)


def _accumulate(
    spec: LayerSpec, rule: Rule, sharing: Sharing, inputs: Array, gradients: Array
) -> LayerStatistics:
    """Sums a layer's statistics over the examples of one call, so many at a time as fit in a chunk."""

    def statistics_of(inputs: Array, gradients: Array) -> LayerStatistics:
        rows = input_rows(spec, inputs)
        gradient = gradient_rows(spec, gradients)
        if sharing == "reduce":
            rows = rows.mean(axis=1, keepdims=True)
            gradient = gradient.sum(axis=1, keepdims=True)
        locations = rows.shape[1]
        return rule(
            rows.reshape(-1, rows.shape[-1]), gradient.reshape(-1, gradient.shape[-1]), locations
        )

    # Only the rows of a convolution are larger than its input.
    if spec.geometry is None or inputs.ndim == 3:
        return statistics_of(inputs, gradients)
    examples = len(inputs)
    chunk = max(1, CHUNK_BYTES // patch_bytes(spec, gradients))
    if chunk >= examples:
        return statistics_of(inputs, gradients)

    def add_chunk(
        total: LayerStatistics, arrays: tuple[Array, Array]
    ) -> tuple[LayerStatistics, None]:
        return jax.tree.map(jnp.add, total, statistics_of(*arrays)), None

    # The first chunk takes what does not divide evenly, and its sums start the accumulation.
    first = examples % chunk or chunk
    chunks = (_in_chunks(inputs[first:], chunk), _in_chunks(gradients[first:], chunk))
    total = statistics_of(inputs[:first], gradients[:first])
    return jax.lax.scan(add_chunk, total, chunks)[0]


def _in_chunks(array: Array, chunk: int) -> Array:
    return array.reshape(-1, chunk, *array.shape[1:])
