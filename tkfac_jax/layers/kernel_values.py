"""Whether the kernel that a layer sees is the parameter itself.

A transformation may hand a layer another array than the one in `params` (`nn.remat`, `nn.scan`, a cast) and
it may change it (weight normalisation, a scale). To tell, the function is called on random
parameters and pulled back through tags that reveal the kernel they saw, as the cotangent of a slot that
travels with the kernel: stacked, sliced and summed as a gradient is. What the layers compute does not
enter, so that the compiler removes it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tkfac_jax.layers.layer_call import Call, LayerCall, observing
from tkfac_jax.layers.parameter_tree import named_leaves
from tkfac_jax.layers.routes import Routes, split_arrays
from tkfac_jax.layers.spec import LayerSpec

CHANGED = (
    "a transformation changes it before the layer uses it (a scale, a normalisation, an axis other than "
    "the first mapped)"
)

UNREACHED = "the function's outputs do not depend on the layer"


class Slot(NamedTuple):
    """Zeros that receive what a tag saw, summed over the uses of a layer; and how many uses there were.

    Attributes:
      kernel: the kernel.
      uses: the number of uses, in the shape of the kernel.
      bias: the bias, or None.
      bias_uses: the number of uses, in the shape of the bias, or None.
      stacked: zeros of a shape by which the axis that is mapped can be told.
    """

    kernel: Array
    uses: Array
    bias: Array | None
    bias_uses: Array | None
    stacked: Array


def check_values(
    fun: Callable[..., Any], params: Any, args: Any, kwargs: Any, specs: list[LayerSpec]
) -> dict[str, str]:
    """Compares the kernels that layers see with the parameters.

    Args:
      fun: the function, not jitted.
      params: its parameters, for their shapes.
      args: its further arguments, for their shapes.
      kwargs: likewise.
      specs: the layers to check.

    Returns:
      For each kernel that is not what the layer sees, the reason.
    """
    shapes = jax.eval_shape(lambda tree: tree, params)
    leaves, treedef = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)
    values = jax.tree.unflatten(treedef, [_random(rng, leaf) for leaf in leaves])
    try:
        seen, errors = _reveal(fun, values, args, kwargs, specs)
    except Exception as error:
        if len(specs) == 1:
            return {specs[0].kernel: f"{CHANGED}: {error}".splitlines()[0]}
        # Which of the layers it was, only a run with each alone can tell.
        alone = [check_values(fun, params, args, kwargs, [spec]) for spec in specs]
        return {kernel: reason for found in alone for kernel, reason in found.items()}
    reasons = {}
    named = named_leaves(values)
    for spec in specs:
        slot = seen[spec.name]
        if not np.all(np.asarray(slot.uses) > 0):
            reasons[spec.kernel] = UNREACHED
        elif not all(
            np.allclose(
                received, uses * named[name], rtol=errors[spec.name], atol=errors[spec.name]
            )
            for name, received, uses in (
                (spec.kernel, slot.kernel, slot.uses),
                (spec.bias, slot.bias, slot.bias_uses),
            )
            if name is not None and received is not None and uses is not None
        ):
            reasons[spec.kernel] = CHANGED
    return reasons


def _random(rng: np.random.Generator, leaf: jax.ShapeDtypeStruct) -> Any:
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        return jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype)
    return _zeros(leaf)


def _zeros(leaf: Any) -> Any:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), leaf.shape)
    return jnp.zeros(leaf.shape, leaf.dtype)


def _reveal(
    fun: Callable[..., Any], values: Any, args: Any, kwargs: Any, specs: list[LayerSpec]
) -> tuple[dict[str, Slot], dict[str, float]]:
    """What the tags saw, and the relative errors that the dtypes of the kernels allow."""
    arrays, combine = split_arrays((args, kwargs))
    arrays = [
        _zeros(array) if isinstance(array, jax.ShapeDtypeStruct) else array for array in arrays
    ]
    errors: dict[str, float] = {}

    @jax.jit
    def run(values: Any, arrays: list[Any]) -> dict[str, Slot]:
        def outputs(slots: dict[str, Slot]) -> list[Array]:
            entries = {spec.kernel: slots[spec.name] for spec in specs if spec.routed}
            routes = Routes.through(values, entries)
            args, kwargs = combine(arrays)
            observe = functools.partial(_tag_call, routes, slots, specs, errors)
            with observing(observe):
                predicted = fun(routes.params, *args, **kwargs)
            leaves = jax.tree.leaves(predicted)
            return [leaf for leaf in leaves if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)]

        named = named_leaves(values)
        slots = {spec.name: _slot(spec, named) for spec in specs}
        predicted, pull_back = jax.vjp(outputs, slots)
        return pull_back([jnp.zeros_like(leaf) for leaf in predicted])[0]

    return jax.tree.map(np.asarray, run(values, arrays)), errors


def _slot(spec: LayerSpec, leaves: dict[str, Array]) -> Slot:
    kernel = jnp.zeros_like(leaves[spec.kernel])
    bias = None if spec.bias is None else jnp.zeros_like(leaves[spec.bias])
    return Slot(kernel, kernel, bias, bias, jnp.zeros((*spec.stack, *_mark(spec))))


def _mark(spec: LayerSpec) -> tuple[int, int]:
    """Sizes that no stacked axis has."""
    largest = max(spec.stack, default=0)
    return largest + 1, largest + 2


def _tag_call(
    routes: Routes,
    slots: dict[str, Slot],
    specs: list[LayerSpec],
    errors: dict[str, float],
    call: Call,
) -> Any:
    layer = call.layer
    if not isinstance(layer, LayerCall):
        return None
    kernel, _ = routes.match_layer(call, layer)
    spec = next((s for s in specs if kernel is not None and s.kernel == kernel.name), None)
    if kernel is None or spec is None:
        return layer.output
    slot = slots[spec.name]
    if isinstance(kernel.entry, Slot) and kernel.entry.kernel.dtype == slot.kernel.dtype:
        slot = kernel.entry
    if slot.stacked.shape != _mark(spec):
        msg = f"it is mapped along another axis than the first, of {slot.stacked.shape}"
        raise ValueError(msg)
    # A cast rounds once; sums over many uses round a little at each.
    error = 2 * jnp.finfo(layer.kernel.dtype).eps + 100 * jnp.finfo(slot.kernel.dtype).eps
    errors[spec.name] = max(errors.get(spec.name, 0.0), float(error))
    return _show(layer.output, layer.kernel, layer.bias, slot)


@jax.custom_vjp
def _show(output: Array, kernel: Array, bias: Array | None, slot: Slot) -> Array:
    """The identity on `output`; backwards, `slot` receives kernel and bias."""
    del kernel, bias, slot
    return output


def _show_forward(
    output: Array, kernel: Array, bias: Array | None, slot: Slot
) -> tuple[Array, Any]:
    return output, (kernel, bias, slot)


def _show_backward(residuals: Any, gradient: Array) -> tuple[Array, None, None, Slot]:
    kernel, bias, slot = residuals
    shown = Slot(
        kernel.astype(slot.kernel.dtype),
        jnp.ones_like(slot.kernel),
        None if bias is None else bias.astype(slot.bias.dtype),
        None if bias is None else jnp.ones_like(slot.bias),
        jnp.zeros_like(slot.stacked),
    )
    return gradient, None, None, shown


_show.defvjp(_show_forward, _show_backward)
