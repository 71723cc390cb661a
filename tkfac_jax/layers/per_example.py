"""Whether a function applies its layers to the examples, each for itself.

Statistics are means over examples, and need the derivative of each example's own loss. A layer that is
applied once for all of them (positions that are looked up without an axis of examples, say) receives the
sum of the derivatives, from which they cannot be told apart. To find such layers the function is traced,
abstractly, in two ways: mapped over many copies of the batch, where what depends on the examples is mapped
with them; and on a batch of another size, where what has an axis of examples has another shape. A layer that
shows neither is applied once for all.

Nor do statistics see a layer whose output the function itself differentiates, as in the residual of a differential
equation: the derivatives that are pulled back pass by on other ways.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array

from tkfac_jax.layers.layer_call import Call, LayerCall, observing
from tkfac_jax.layers.routes import Routes, split_arrays
from tkfac_jax.layers.spec import LayerSpec

# A number of copies, and of examples, that no axis of a model's own has. Nothing is computed; but JAX traces a
# `jax.debug.print` of the model once for each, so that it must not be too large.
MANY = 1_009

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

            def observe(call: Call) -> Any:
                layer = call.layer
                if not isinstance(layer, LayerCall):
                    return None
                match, _ = routes.match_layer(call, layer)
                if match is None or match.name not in self.stacks:
                    return layer.output
                return note(match.name, layer.output)

            with observing(observe):
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
