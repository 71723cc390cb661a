"""Tags that turn the backward pass of a model into statistics of its layers.

After each registered layer an identity `tag(output, inputs, slot)` is inserted. Its backward rule
receives the derivative with respect to the output and returns the layer's statistics as the
cotangent of `slot`, a zero that the forward pass ignores. One pull-back therefore yields the
statistics of all layers as the "gradient" with respect to the slots: nothing else is kept, and
the uses of a layer that is applied several times add up by themselves. A layer that its kernel reaches
through transformations has its slot next to the kernel in `params` (`routes`), so that the slots of
stacked layers are stacked too.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array

from tkfac_jax.fisher.layer_statistics import Counting, LayerStatistics, Options, accumulate
from tkfac_jax.layers.layer_call import Call, LayerCall, observing
from tkfac_jax.layers.routes import Routes
from tkfac_jax.layers.spec import Layers, LayerSpec
from tkfac_jax.linalg.meshes import automatic, vary, varying_axes


class Tagged(NamedTuple):
    """What `tagging` yields.

    Attributes:
      params: the parameters to give to the model.
      names: the layers that have been tagged so far.
    """

    params: Any
    names: set[str]


@contextlib.contextmanager
def tagging(
    layers: Layers,
    params: Any,
    slots: Mapping[str, LayerStatistics],
    options: Options,
    counting: Counting,
) -> Iterator[Tagged]:
    """Tags the layers that are applied inside the context.

    Args:
      layers: the layers to tag.
      params: the parameters; no two leaves the same object.
      slots: by layer, where its statistics go; see `zero_slots`.
      options: how they are made.
      counting: what counts in the batch.

    Yields:
      The parameters that the model must be given in the context, and the names of the layers that have
      been tagged so far.
    """
    entries = {spec.kernel: slots[name] for name, spec in layers.items() if spec.routed}
    routes = Routes.through(params, entries)
    spec_of = {spec.kernel: spec for spec in layers.values()}
    tagged: set[str] = set()

    def observe(call: Call) -> Any:
        layer = call.layer
        if not isinstance(layer, LayerCall):
            return None
        match, _ = routes.match_layer(call, layer)
        spec = spec_of.get(match.name) if match is not None else None
        if match is None or spec is None:
            return layer.output
        tagged.add(spec.name)
        # An entry that a cast has changed would receive statistics in low precision.
        entry = match.entry
        survives = isinstance(entry, LayerStatistics) and entry.trace.dtype == spec.dtype
        return _attach(spec, layer, entry if survives else slots[spec.name], options, counting)

    # Entries in params make transformations trace again by themselves; a name does not.
    with observing(observe, retrace=any(spec.named for spec in layers.values())):
        yield Tagged(routes.params, tagged)


def _attach(
    spec: LayerSpec, layer: LayerCall, slot: LayerStatistics, options: Options, counting: Counting
) -> Array:
    """The output of a call, which leaves the call's statistics in a slot when it is pulled back."""
    inputs: Any = layer.inputs
    inputs = inputs() if callable(inputs) else inputs
    statistics_of = functools.partial(accumulate, spec, layer.form, options)
    backwards = functools.partial(_slot_cotangent, statistics_of, varying_axes(slot))
    return _tag(layer.output, inputs, counting, slot, backwards)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _tag(output: Array, inputs: Array, counting: Counting, slot: Any, backwards: Any) -> Array:
    del inputs, counting, slot, backwards
    return output


def _tag_forward(
    output: Array, inputs: Array, counting: Counting, slot: Any, backwards: Any
) -> tuple[Array, tuple[Array, Counting]]:
    del slot, backwards
    return output, (inputs, counting)


def _tag_backward(
    backwards: Any, residuals: tuple[Array, Counting], gradient: Array
) -> tuple[Array, None, None, LayerStatistics]:
    inputs, counting = residuals
    return gradient, None, None, backwards(inputs, gradient, counting)


_tag.defvjp(_tag_forward, _tag_backward)


def _slot_cotangent(
    statistics_of: Callable[[Array, Array, Counting], LayerStatistics],
    axes: frozenset[str],
    inputs: Array,
    gradients: Array,
    counting: Counting,
) -> LayerStatistics:
    """Statistics as a cotangent of a slot: it must vary over the mesh axes that the slot varies over."""
    return vary(automatic(statistics_of, inputs, gradients, counting, out=PartitionSpec()), axes)
