"""How a function applies its layers: to the examples, each for itself; directly; and whether kernels serve for more.

Statistics are means over examples, and need the derivative of each example's own loss. A layer that is
applied once for all of them (positions that are looked up without an axis of examples, say) receives the
sum of the derivatives, from which they cannot be told apart. To find such layers the function is traced,
abstractly, in two ways: mapped over many copies of the batch, where what depends on the examples is mapped
with them; and on a batch of another size, where what has an axis of examples has another shape. A layer that
shows neither is applied once for all.

Nor do statistics see a layer whose output the function itself differentiates, as in the residual of a differential
equation: the derivatives that are pulled back pass by on other ways.

The rows of a batch are those of a layer only where each of its calls is seen and happens once, and where its kernel
serves for nothing else.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap
from jaxtyping import Array

from tkfac_jax.calls import Call, LayerCall, observing
from tkfac_jax.layers import LayerSpec, named_leaves, parameter_name, replace_leaves
from tkfac_jax.routes import Routes, split_arrays

# A number of copies, and of examples, that no axis of a model's own has. Nothing is computed; but JAX traces a
# `jax.debug.print` of the model once for each, so that it must not be too large.
MANY = 1_009

# Marks the outputs of calls in a traced function, and nothing else.
MARK = "tkfac/direct/"

Noted = TypeVar("Noted")

SHARED = (
    "it is applied once for all examples, so that their derivatives cannot be told apart: give its input an axis of "
    "examples, as by jnp.broadcast_to"
)

DIFFERENTIATED = (
    "its output is differentiated inside the function, where its statistics cannot be seen: carry the derivatives "
    "through the layers as further rows instead"
)


class _Function(NamedTuple):
    """A function whose layers are watched; fields as in `check_calls`, the arrays of the arguments apart."""

    fun: Callable[..., Any]
    params: Any
    combine: Callable[[list[Any]], Any]
    stacks: Mapping[str, tuple[int, ...]]
    routed: frozenset[str]

    def watched(self, note: Callable[[str, Array], Array]) -> Callable[[Any, list[Any]], Any]:
        """The function of parameters and arrays, every output of whose layers goes through `note(kernel, output)`."""

        def call(params: Any, arrays: list[Any]) -> Any:
            entries = {name: jnp.zeros((*self.stacks[name], 1)) for name in self.routed}
            routes = Routes.through(params, entries)
            args, kwargs = self.combine(arrays)
            with _changing(routes, self.stacks, lambda kernel, layer: note(kernel, layer.output)):
                return self.fun(routes.params, *args, **kwargs)

        return call

    def mapped_with(self, arrays: list[Any], of_examples: list[bool]) -> set[str] | None:
        """The kernels whose layers are mapped with copies of the batch; None if it cannot be mapped."""
        dependent: set[str] = set()
        copies = [
            jax.ShapeDtypeStruct((MANY, *array.shape), array.dtype) if is_one else array
            for array, is_one in zip(arrays, of_examples, strict=True)
        ]

        def note(kernel: str, output: Array) -> Array:
            # Without derivatives, because custom_vmap has none in reverse.
            return output + 0 * _mark(kernel, dependent)(jax.lax.stop_gradient(output))

        axes = [0 if is_one else None for is_one in of_examples]
        mapped = jax.vmap(self.watched(note), in_axes=(None, axes))
        return dependent if _traces(mapped, self.params, copies) else None

    def having_axis(self, arrays: list[Any], size: int | None) -> set[str]:
        """The kernels whose layers have an axis of that size in an output."""
        found: set[str] = set()

        def note(kernel: str, output: Array) -> Array:
            if size in output.shape:
                found.add(kernel)
            return output

        return found if _traces(self.watched(note), self.params, arrays) else set()


def check_calls(
    fun: Callable[..., Any], params: Any, args: Any, kwargs: Any, specs: list[LayerSpec]
) -> dict[str, str]:
    """The layers none of whose calls is applied to the examples each for itself, or whose output is differentiated.

    The examples are those of the function's arguments that have an axis of the size of its first output's first
    axis, or all of its arguments if none has. A function that has no arrays as arguments, or cannot be
    mapped, is not judged.

    Args:
      fun: the function, not jitted.
      params: its parameters, for their shapes.
      args: its further arguments, for their shapes.
      kwargs: likewise.
      specs: the layers.

    Returns:
      For each kernel of such a layer, the reason why it cannot be treated.
    """
    arrays, combine = split_arrays((args, kwargs))
    stacks = {spec.kernel: spec.stack for spec in specs}
    routed = frozenset(spec.kernel for spec in specs if spec.routed)
    function = _Function(fun, params, combine, stacks, routed)
    differentiated: set[str] = set()
    outputs = function.watched(lambda kernel, y: _note_derivatives(kernel, differentiated)(y))
    examples = _num_examples(jax.eval_shape(outputs, params, arrays))
    reasons = dict.fromkeys(differentiated, DIFFERENTIATED)
    of_examples = [examples in array.shape for array in arrays]
    if not any(of_examples):
        of_examples = [True] * len(arrays)
    dependent = function.mapped_with(arrays, of_examples) if arrays else None
    if dependent is None or dependent == set(stacks):
        return reasons
    more = [_with_many_examples(array, examples) for array in arrays]
    # Where the function wants its own number of examples, an axis of that size has to do.
    has_axis = function.having_axis(more, MANY) or function.having_axis(arrays, examples)
    return reasons | {kernel: SHARED for kernel in stacks if kernel not in dependent | has_axis}


def used_elsewhere(
    fun: Callable[[Any], Any], params: Any, specs: Sequence[LayerSpec]
) -> frozenset[str]:
    """The layers whose kernel or bias reaches the outputs otherwise than through calls of the layer.

    The function is traced, abstractly, with two copies of these parameters, and as if the layers' calls returned their
    inputs. Then only what does not come from the calls makes an output differ from copy to copy.

    Args:
      fun: the outputs as a function of the parameters.
      params: the parameters.
      specs: the layers; none is routed.

    Returns:
      Their names; all, if the function cannot be mapped over copies.
    """

    def is_used(specs: Sequence[LayerSpec]) -> bool:
        kernels = {spec.kernel for spec in specs}
        own = kernels | {spec.bias for spec in specs if spec.bias is not None}
        leaves = {name: leaf for name, leaf in named_leaves(params).items() if name in own}

        def outputs(own: Mapping[str, Array]) -> Any:
            routes = Routes.through(replace_leaves(params, own), {})

            def of_inputs(kernel: str, layer: LayerCall) -> Array:
                del kernel
                # Of the inputs alone; but with their copies, if a kernel is in them.
                return jnp.full(layer.output.shape, _of_inputs(layer))

            with _changing(routes, kernels, of_inputs):
                return fun(routes.params)

        return not is_independent(outputs, leaves)

    if not specs or not is_used(specs):
        return frozenset()
    return frozenset(spec.name for spec in specs if len(specs) == 1 or is_used([spec]))


def direct_calls(
    fun: Callable[[Any], Any],
    params: Any,
    specs: Sequence[LayerSpec],
    note: Callable[[LayerSpec, LayerCall], Noted | None],
) -> tuple[dict[str, list[Noted]], frozenset[str]]:
    """The layers all of whose calls the function makes itself, once each: in no loop, branch or transformed function.

    The function is traced, abstractly, and its own operations are looked through for the outputs of the calls.

    Args:
      fun: a function of the parameters.
      params: the parameters.
      specs: the layers; none is routed.
      note: what is to be known of a call; None leaves the layer out.

    Returns:
      By name of such a layer, what was noted of its calls, in their order; and the layers, of all, whose kernel and
      bias are seen to reach the outputs through calls of their layer only.
    """
    spec_of = {spec.kernel: spec for spec in specs}
    noted: dict[str, list[Noted]] = {}
    left_out: set[str] = set()
    marked: dict[str, tuple[str, tuple[int, ...]]] = {}

    def watched(params: Any) -> Any:
        routes = Routes.through(params, {})

        def marking(kernel: str, layer: LayerCall) -> Array:
            spec = spec_of[kernel]
            found = note(spec, layer)
            if found is None:
                left_out.add(spec.name)
                return layer.output
            noted.setdefault(spec.name, []).append(found)
            mark = f"{MARK}{len(marked)}"
            marked[mark] = spec.name, layer.output.shape
            # What stands for the inputs goes along, so that they are found by way of the mark.
            output, _ = jax.lax.optimization_barrier((layer.output, _of_inputs(layer)))
            # The pull-back of a derivative inside is not that of the function.
            return _note_derivatives(spec.name, left_out)(checkpoint_name(output, mark))

        with _changing(routes, spec_of, marking):
            return fun(routes.params)

    jaxpr = jax.make_jaxpr(watched)(params).jaxpr
    places: Counter[str] = Counter()
    for operation in jaxpr.eqns:
        mark = _mark_of(operation)
        # A call that is mapped has an axis more here.
        if mark in marked and operation.outvars[0].aval.shape == marked[mark][1]:
            places[mark] += 1
    left_out |= {name for mark, (name, _) in marked.items() if places[mark] != 1}
    reached = _reached_beside(marked, jaxpr)
    leaves = zip(jaxpr.invars, jax.tree_util.tree_leaves_with_path(params), strict=True)
    elsewhere = {parameter_name(path) for variable, (path, _) in leaves if variable in reached}
    alone = frozenset(spec.name for spec in specs if not elsewhere & {spec.kernel, spec.bias})
    return {name: found for name, found in noted.items() if name not in left_out}, alone


def _reached_beside(marked: Container[str | None], jaxpr: Any) -> set[Any]:
    """The variables that the outputs may depend on, were the marked outputs of calls functions of their inputs alone.

    A function that is called counts as if all of its outputs depended on all that it is given.
    """
    source = {variable: operation for operation in jaxpr.eqns for variable in operation.outvars}

    def inputs(operation: Any) -> Any:
        if _mark_of(operation) in marked:
            barrier = source.get(operation.invars[0])
            if barrier is not None and barrier.primitive.name == "optimization_barrier":
                return barrier.invars[1:]
        return operation.invars

    reached: set[Any] = set()
    ahead = list(jaxpr.outvars)
    while ahead:
        variable = ahead.pop()
        # Literals are no variables.
        if hasattr(variable, "val") or variable in reached:
            continue
        reached.add(variable)
        if variable in source:
            ahead.extend(inputs(source[variable]))
    return reached


def _mark_of(operation: Any) -> str | None:
    return operation.params["name"] if operation.primitive.name == "name" else None


def _of_inputs(layer: LayerCall) -> Array:
    """A number that depends on all of a call's inputs, and on nothing else."""
    inputs: Any = layer.inputs
    inputs = inputs() if callable(inputs) else inputs
    return jnp.sum(inputs).astype(layer.output.dtype)


def is_independent(fun: Callable[[Any], Any], arrays: Any) -> bool:
    """Whether nothing that a function returns depends on its arrays: it is traced with two copies of them.

    Args:
      fun: a function of a tree of arrays, which returns arrays.
      arrays: the tree, for its shapes.

    Returns:
      Whether it is so. Not, if the function cannot be mapped over copies.
    """
    copies = jax.tree.map(
        lambda array: jax.ShapeDtypeStruct((2, *jnp.shape(array)), array.dtype), arrays
    )
    # An output that differs from copy to copy cannot be returned as one.
    return _traces(jax.vmap(fun, out_axes=None, axis_size=2), copies)


def _changing(
    routes: Routes, kernels: Container[str], change: Callable[[str, LayerCall], Array]
) -> contextlib.AbstractContextManager[None]:
    """Within it, the calls of layers of these kernels return what `change(kernel, call)` makes of them."""

    def observe(call: Call) -> Any:
        layer = call.layer
        if not isinstance(layer, LayerCall):
            return None
        match, _ = routes.match_layer(call, layer)
        if match is None or match.name not in kernels:
            return layer.output
        return change(match.name, layer)

    return observing(observe)


def _num_examples(outputs: Any) -> int | None:
    first = next(iter(jax.tree.leaves(outputs)), None)
    return None if first is None or not first.shape else first.shape[0]


def _with_many_examples(array: Any, examples: int | None) -> Any:
    """The array's shape with `MANY` for the first axis of that size."""
    shape = array.shape
    if examples not in shape:
        return array
    place = shape.index(examples)
    return jax.ShapeDtypeStruct((*shape[:place], MANY, *shape[place + 1 :]), array.dtype)


def _traces(fun: Callable[..., Any], *args: Any) -> bool:
    """Traces a function abstractly, if it can be."""
    try:
        jax.eval_shape(fun, *args)
    except Exception:
        return False
    return True


def _note_derivatives(kernel: str, differentiated: set[str]) -> Callable[[Array], Array]:
    """The identity, which notes the kernel if the function differentiates it."""

    @jax.custom_jvp
    def same(output: Array) -> Array:
        return output

    @same.defjvp
    def rule(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
        differentiated.add(kernel)
        return primals[0], tangents[0]

    return same


def _mark(kernel: str, dependent: set[str]) -> Callable[[Array], Array]:
    """The identity, which notes the kernel if it is mapped over the copies."""

    @custom_vmap
    def same(output: Array) -> Array:
        return output

    @same.def_vmap
    def rule(size: int, is_mapped: list[bool], output: Array) -> tuple[Array, bool]:
        if size == MANY:
            dependent.add(kernel)
        return same(output), is_mapped[0]

    return same
