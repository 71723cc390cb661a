"""The statistics of a layer, from the rows of its calls; the rules of TKFAC and KFAC."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tkfac_jax.layers.row_forms import (
    Convolution,
    Form,
    Lookup,
    Rows,
    reduce_locations,
    rows_moment,
    squared_norms,
)
from tkfac_jax.layers.spec import Layers, LayerSpec
from tkfac_jax.linalg.meshes import sum_over

Sharing = Literal["expand", "reduce"]

# Patches of a convolution are made for so many bytes of examples at a time: small enough to stay in
# the cache of a CPU, large enough for full matrix products.
CHUNK_BYTES = 4 * 2**20


class LayerStatistics(NamedTuple):
    """The statistics of one layer, means over examples.

    Those of the rule `independent` are `IndependentStatistics`, whose fields are the same.

    The Fisher block of the layer is approximated by `input_moment (x) output_moment / trace`, the
    kernel's rows as in `kernel.reshape(-1, d_out)` and the bias last. The moments have the shapes of
    the layer's factors: `(d_in, d_in)` and `(d_out, d_out)` unless the layer's spec says otherwise (stacked
    layers and groups have leading axes, large factors only some of their entries).

    Attributes:
      input_moment: under `trace_restricted` `E[tr(G) L]`, under `independent` `E[L]`.
      output_moment: under `trace_restricted` `E[tr(L) G]`, under `independent` `E[G]`.
      trace: under `trace_restricted` `E[tr(L) tr(G)]`, under `independent` the number of uses of the layer (1).
    """

    input_moment: Float[Array, "..."]
    output_moment: Float[Array, "..."]
    trace: Float[Array, "..."]


class IndependentStatistics(LayerStatistics):
    """The statistics of one layer under `independent`, KFAC's rule: of another type, so that they are told apart."""


class RowWeights(NamedTuple):
    """What each row counts in the sums of a layer's statistics.

    Attributes:
      inputs: weight of `a a^T` in the input moment.
      outputs: weight of `g g^T` in the output moment.
      traces: the row's share of the trace.
    """

    inputs: Float[Array, "*blocks batch locations"]
    outputs: Float[Array, "*blocks batch locations"]
    traces: Float[Array, "*blocks batch locations"]


Rule = Callable[[Array, Array, Array | None], RowWeights]


def trace_restricted(
    inputs: Float[Array, "*blocks batch locations"],
    gradients: Float[Array, "*blocks batch locations"],
    weights: Float[Array, "batch locations"] | None = None,
) -> RowWeights:
    """The rule of TKFAC: `L = a a^T` is weighted by `tr(G)`, and `G = g g^T` by `tr(L)`.

    Args:
      inputs: squared norms `tr(L)` of the inputs `a`, the homogeneous coordinate included.
      gradients: squared norms `tr(G)` of the derivatives `g` of each example's own loss with respect to the
        layer's output.
      weights: what each location counts, 0 for padding; the gradients carry its root already. None: 1.

    Returns:
      The weights. The weighted sums, divided by the number of examples, are the statistics of Gao
      et al. 2021, Eq. (4.9), and for a convolution Eq. (4.13).
    """
    if weights is not None:
        present = (weights > 0).astype(inputs.dtype)
        inputs, gradients = inputs * present, gradients * present
    return RowWeights(gradients, inputs, inputs * gradients)


def independent(
    inputs: Float[Array, "*blocks batch locations"],
    gradients: Float[Array, "*blocks batch locations"],
    weights: Float[Array, "batch locations"] | None = None,
) -> RowWeights:
    """The rule of KFAC: `sum L`, `sum G / locations` and the number of examples.

    Inputs and gradients are taken as independent, and gradients as alike at all locations.

    Args:
      inputs: squared norms of the inputs.
      gradients: squared norms of the derivatives of each example's own loss.
      weights: what each location counts, 0 for padding; the gradients carry its root already. None: 1.

    Returns:
      The weights. The weighted sums, divided by the number of examples, are the factors of Martens and
      Grosse 2015, and for a convolution of Grosse and Martens 2016.
    """
    del gradients
    # Counted from the data, because under jax.vmap a constant would count for one lane, not for all.
    counted = jnp.where(jnp.isnan(inputs), 1, 1).astype(inputs.dtype)
    present = counted
    if weights is not None:
        counted, present = counted * weights, counted * (weights > 0)
    locations = jnp.maximum(present.sum(-1, keepdims=True), 1)
    return RowWeights(counted, present / locations, counted / locations)


class Options(NamedTuple):
    """How statistics are made; see `sampled_fisher`.

    Attributes:
      rule: `trace_restricted` or `independent`.
      sharing: what happens to several locations of an example, for each layer or for all.
      precision: precision of the matrix products.
    """

    rule: Rule = trace_restricted
    sharing: Sharing | Mapping[str, Sharing] = "expand"
    precision: jax.lax.PrecisionLike = jax.lax.Precision.HIGHEST

    def sharing_of(self, name: str) -> Sharing:
        """What happens to the locations of a layer."""
        return self.sharing if isinstance(self.sharing, str) else self.sharing.get(name, "expand")


def statistics_type(rule: Rule) -> type[LayerStatistics]:
    """The type of a rule's statistics. A rule of a user's own takes the place of TKFAC's."""
    return IndependentStatistics if rule is independent else LayerStatistics


def zero_slots(
    layers: Mapping[str, LayerSpec], rule: Rule = trace_restricted
) -> dict[str, LayerStatistics]:
    """Zeros in the shapes of a rule's statistics, by layer."""
    make = statistics_type(rule)
    return {
        name: make(
            jnp.zeros((*spec.batch, *spec.phi.shape), spec.dtype),
            jnp.zeros((*spec.batch, *spec.psi.shape), spec.dtype),
            jnp.zeros(spec.batch, spec.dtype),
        )
        for name, spec in layers.items()
    }


class Counting(NamedTuple):
    """What counts in a batch.

    Attributes:
      mask: 1 where a position of an example counts, 0 where it is padding, `(batch, *positions)`; None: all count.
      weights: what each example counts, `(batch,)`; None: 1.
    """

    mask: Array | None = None
    weights: Array | None = None

    def locations(self, batch: int, locations: int, dtype: str) -> Array | None:
        """What each location of a layer counts, `(batch, locations)`; None: all the same.

        A mask of positions speaks of a layer's locations where they are as many.
        """
        mask = None
        if self.mask is not None and len(self.mask) == batch:
            flat = self.mask.reshape(batch, -1)
            mask = flat.astype(dtype) if flat.shape[1] == locations else None
        if self.weights is None or len(self.weights) != batch:
            return mask
        weights = jnp.broadcast_to(self.weights[:, None].astype(dtype), (batch, locations))
        return weights if mask is None else weights * mask


def accumulate(
    spec: LayerSpec,
    form: Form,
    options: Options,
    inputs: Array,
    gradients: Array,
    counting: Counting,
) -> LayerStatistics:
    """Sums a layer's statistics over the examples of one call, so many at a time as fit in a chunk."""
    inputs = inputs if isinstance(form, Lookup) else inputs.astype(spec.dtype)
    gradients = gradients.astype(spec.dtype)

    # Only the rows of a convolution are larger than its input.
    if isinstance(form, Convolution) and inputs.ndim == len(form.window) + 2:
        chunk = max(1, CHUNK_BYTES // form.patch_bytes(inputs.shape[-1], gradients))
        if chunk < len(inputs):
            # A divisor, unless it is much smaller, spares a second program for the rest.
            divisor = max(size for size in range(1, chunk + 1) if len(inputs) % size == 0)
            chunk = divisor if 2 * divisor >= chunk else chunk
            return _accumulate_chunks(spec, form, options, inputs, gradients, counting, chunk)
    rows = form.rows(inputs, gradients)
    batch, locations = rows[1].shape[-3:-1]
    weights = counting.locations(batch, locations, spec.dtype)
    return _statistics(spec, options, rows, weights)


def _accumulate_chunks(
    spec: LayerSpec,
    form: Convolution,
    options: Options,
    inputs: Array,
    gradients: Array,
    counting: Counting,
    chunk: int,
) -> LayerStatistics:
    """Sums the statistics of a convolution over chunks of examples."""

    def statistics_of(inputs: Array, gradients: Array, weights: Array | None) -> LayerStatistics:
        rows = form.rows(inputs, gradients)
        return _statistics(spec, options, rows, weights)

    examples = len(inputs)
    weights = counting.locations(examples, math.prod(gradients.shape[1:-1]), spec.dtype)

    # Chunks are cut out where they are used: as the argument of a scan they would be a copy of all of them.
    def statistics_from(start: Any, size: int = chunk) -> LayerStatistics:
        arrays = jax.tree.map(
            lambda array: jax.lax.dynamic_slice_in_dim(array, start, size),
            (inputs, gradients, weights),
        )
        return statistics_of(*arrays)

    rest = examples % chunk
    sums = sum_over(statistics_from, jnp.arange(rest, examples, chunk))
    return jax.tree.map(jnp.add, statistics_from(0, rest), sums) if rest else sums


def _statistics(
    spec: LayerSpec, options: Options, rows: tuple[Rows, Array], weights: Array | None
) -> LayerStatistics:
    """Sums over the examples and locations of input rows and gradient rows."""
    inputs, gradients = rows
    if options.sharing_of(spec.name) == "reduce":
        inputs, gradients = reduce_locations(inputs, gradients, weights)
        weights = None if weights is None else weights.max(-1, keepdims=True)
    squares = squared_norms(spec.phi, inputs), squared_norms(spec.psi, gradients)
    counts = options.rule(*squares, weights)
    return statistics_type(options.rule)(
        rows_moment(spec.phi, inputs, counts.inputs, options.precision),
        rows_moment(spec.psi, gradients, counts.outputs, options.precision),
        counts.traces.sum((-2, -1)),
    )


Statistics = dict[str, LayerStatistics]


def check_statistics(statistics: Any, layers: Layers, rule: Rule) -> None:
    """Refuses statistics that are not those of the layers.

    Raises:
      ValueError: a layer is missing or unknown, or its statistics are of another rule or have other shapes.
    """
    if not isinstance(statistics, dict) or set(statistics) != set(layers):
        received = sorted(statistics) if isinstance(statistics, dict) else type(statistics).__name__
        msg = (
            f"statistics are for {received}; expected a dictionary for the layers {sorted(layers)}. "
            "Build the Fisher function and the optimizer from the same layers."
        )
        raise ValueError(msg)
    for name, spec in layers.items():
        batch = spec.batch
        expected = ((*batch, *spec.phi.shape), (*batch, *spec.psi.shape), batch)
        received = tuple(jnp.shape(array) for array in statistics[name])
        # A list or another tuple of three arrays is of no rule.
        expected_type = statistics_type(rule)
        if type(statistics[name]) is not expected_type:
            msg = (
                f"statistics of layer '{name}' are {type(statistics[name]).__name__}; expected "
                f"{expected_type.__name__}, of the rule {getattr(rule, '__name__', rule)}. Give the Fisher function "
                "and the optimizer the same rule: rule=tkfac_jax.independent for kfac(...), "
                "tkfac_jax.trace_restricted, the default, for tkfac(...); and multi_steps(...) around a wrapper of "
                "Optax's the plan of the optimizer inside."
            )
            raise ValueError(msg)
        if received != expected:
            msg = f"statistics of layer '{name}' have shapes {received}; expected {expected}."
            raise ValueError(msg)
