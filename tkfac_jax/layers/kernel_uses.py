"""Which layers use which kernel, as one abstract call of a function shows."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tkfac_jax.layers.kernel_matrix import Layout
from tkfac_jax.layers.layer_call import Call, LayerCall, observing
from tkfac_jax.layers.parameter_tree import named_leaves
from tkfac_jax.layers.routes import Routes, split_arrays
from tkfac_jax.layers.row_forms import Form

OTHER_METHOD = (
    "its layer is applied by another method than __call__, as by nn.WeightNorm and nn.SpectralNorm"
)

NORM = 'it belongs to a norm; find_layers(..., norms="exact") gives it an exact block'


class Use(NamedTuple):
    """One use of a kernel by a supported layer, as static facts."""

    kind: str
    bias: str | None
    layout: Layout
    stack: tuple[int, ...]
    form: Form
    dtype: np.dtype
    as_it_stands: bool
    routed: bool
    named: bool
    name: str | None


class Notes(NamedTuple):
    """What an abstract call of the function has shown.

    Attributes:
      uses: by kernel, the uses that can be treated.
      reasons: by parameter, why it is left to the fallback.
      remarks: by parameter, what to say if no use has been found.
      norms: the parameters of norms.
      calls: the kernel and the shape of the output of each call, in their order.
      outputs: the shapes of the function's outputs.
    """

    uses: dict[str, list[Use]]
    reasons: dict[str, str]
    remarks: dict[str, str]
    norms: set[str]
    calls: list[tuple[str, tuple[int, ...]]]
    outputs: list[tuple[int, ...]]


def trace_uses(fun: Callable[..., Any], params: Any, args: Any, kwargs: Any, norms: str) -> Notes:
    """Watches an abstract call of `fun`: the uses of each kernel, and why other parameters are left."""
    arrays, combine = split_arrays((args, kwargs))

    def watch(with_entries: bool) -> Notes:
        notes = Notes({}, {}, {}, set(), [], [])

        def traced(params: Any, arrays: list[Any]) -> Any:
            # Two leaves may be one tracer only outside of a trace: here each has its own.
            leaves = {n: leaf for n, leaf in named_leaves(params).items() if hasattr(leaf, "dtype")}
            entries = {name: jnp.zeros_like(leaf) for name, leaf in leaves.items()}
            routes = Routes.through(params, entries if with_entries else {})
            args, kwargs = combine(arrays)
            with observing(lambda call: _note(call, routes, leaves, norms, notes)):
                return fun(routes.params, *args, **kwargs)

        predicted = jax.eval_shape(traced, params, arrays)
        notes.outputs.extend(jnp.shape(leaf) for leaf in jax.tree.leaves(predicted))
        return notes

    try:
        return watch(with_entries=True)
    except Exception:
        return watch(with_entries=False)


def _note(call: Call, routes: Routes, leaves: Mapping[str, Any], norms: str, notes: Notes) -> Any:
    """Notes one call: a use of its kernel, or why its parameters are left."""
    layer = call.layer
    if not isinstance(layer, LayerCall) or (layer.kind == "norm" and norms == "fallback"):
        for match in filter(None, (routes.match(call, key) for key in call.parameters)):
            if isinstance(layer, LayerCall):
                notes.norms.add(match.name)
            if layer is None:
                notes.remarks[match.name] = OTHER_METHOD
            elif not any(use.name for use in notes.uses.get(match.name, ())):
                # A module that marks its layers by hand has reported them by now.
                notes.reasons.setdefault(match.name, layer if isinstance(layer, str) else NORM)
        return layer.output if isinstance(layer, LayerCall) else None
    kernel, bias = routes.match_layer(call, layer)
    if kernel is None:
        return layer.output
    if layer.bias is not None and bias is None:
        notes.reasons.setdefault(kernel.name, "the bias used with it does not stand in params")
        return layer.output
    whole, seen = jnp.shape(leaves[kernel.name]), jnp.shape(layer.kernel)
    stack = whole[: len(whole) - len(seen)]
    if whole[len(stack) :] != seen:
        reason = f"a transformation gives the layer shape {seen} of its shape {whole}: only leading axes may be mapped"
        notes.reasons.setdefault(kernel.name, reason)
        return layer.output
    entry_survives = kernel.entry is not None and kernel.entry.dtype == leaves[kernel.name].dtype
    if stack and not entry_survives:
        reason = "its layers are stacked, and statistics cannot be told apart there"
        notes.reasons.setdefault(kernel.name, reason)
        return layer.output
    dtype = jnp.promote_types(layer.output.dtype, jnp.float32)
    use = Use(
        layer.kind,
        None if bias is None else bias.name,
        layer.layout,
        stack,
        layer.form,
        dtype,
        kernel.as_it_stands and (bias is None or bias.as_it_stands),
        not kernel.as_it_stands and kernel.entry is not None,
        not kernel.as_it_stands and kernel.entry is None,
        call.name,
    )
    notes.uses.setdefault(kernel.name, []).append(use)
    notes.calls.append((kernel.name, jnp.shape(layer.output)))
    return layer.output


def kernels_of_outputs(notes: Notes) -> set[str]:
    """The kernels of the layers that make the outputs: for each of these, the last call of the same size.

    What follows a layer (a cast, a scale, a lost axis) is not seen. The first axis, of the examples, has to stay, so
    that what a model returns beside its outputs, such as BatchNorm's state, is not taken for any.
    """
    found = set()
    for shape in notes.outputs:
        alike = [
            kernel
            for kernel, made in notes.calls
            if math.prod(made) == math.prod(shape) and made[:1] == shape[:1] != ()
        ]
        found.update(alike[-1:])
    return found


def refuse_shared_biases(notes: Notes) -> None:
    """Notes the kernels whose bias goes with other kernels, too."""
    pairs = dict.fromkeys(
        (use.bias, kernel) for kernel, found in notes.uses.items() for use in found
    )
    kernels_of = Counter(bias for bias, _ in pairs if bias is not None)
    for bias, kernel in pairs:
        if bias is not None and kernels_of[bias] > 1:
            notes.reasons.setdefault(kernel, f"its bias '{bias}' is used with other kernels too")


def conflict(uses: list[Use]) -> str | None:
    """Why the uses of a kernel cannot be one layer's; None if they can."""
    for field in ("kind", "bias", "stack", "layout"):
        values = {getattr(use, field) for use in uses}
        if len(values) > 1:
            return (
                f"it is used with several values of {field}: {', '.join(sorted(map(str, values)))}"
            )
    return None
