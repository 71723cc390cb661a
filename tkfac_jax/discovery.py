"""Finding the layers of a function.

`find_layers` traces the function abstractly and watches which module uses which leaf of `params`.
A leaf is recognised by identity: the module must have been given the very array that stands in
`params`, not one computed from it, because the Fisher block of a scaled or transformed kernel is
not the block of the parameter.
"""

import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tkfac_jax import linen
from tkfac_jax.layers import Layers, LayerSpec, named_leaves
from tkfac_jax.linen import ConvGeometry, LayerCall, ModuleCall

NOT_FOUND = (
    "no supported layer uses it as it stands in params (it is unused, or cast, scaled or passed "
    "through a transformation such as nn.scan or nn.remat before a layer uses it)"
)


def unjitted(fun: Callable[..., Any]) -> Callable[..., Any]:
    """The function under `jax.jit`: a cached trace would hide the module calls from the library."""
    return inspect.unwrap(fun, stop=lambda inner: not isinstance(inner, jax.stages.Wrapped))


class _Use(NamedTuple):
    """One use of a kernel by a supported layer, as static facts."""

    kind: str
    bias: str | None
    geometry: ConvGeometry | None
    dtype: np.dtype


def find_layers(
    fun: Callable[..., Any],
    params: Any,
    *args: Any,
    on_unsupported: Literal["warn", "error", "ignore"] = "warn",
    **kwargs: Any,
) -> Layers:
    """Finds the layers that a function applies, by abstract tracing: nothing is computed.

    Supported are `nn.Dense`, and `nn.Conv` over two spatial axes with any stride, padding and
    kernel dilation. Every other parameter is left to the fallback optimizer, with its reason.

    Args:
      fun: a function `fun(params, *args, **kwargs)` that applies Flax modules, any number of them.
      params: its parameters; arrays or `jax.ShapeDtypeStruct`.
      *args: further arguments: inputs, batch statistics, dropout keys. Arrays are traced, all else is static.
      on_unsupported: what to do about a kernel (a parameter of two or more axes) that is left to
        the fallback: `"warn"` (a `UserWarning` that names it), `"error"` (a `ValueError`) or `"ignore"`.
      **kwargs: further keyword arguments of `fun`.

    Returns:
      The layers, in the order of their parameters.

    Raises:
      ValueError: `on_unsupported` is none of the three; no layer was found; or a kernel is left to
        the fallback and `on_unsupported="error"`.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, tkfac_jax as tkfac
      >>> model = nn.Sequential([nn.Dense(400), nn.relu, nn.Dense(10, use_bias=False)])
      >>> x = jnp.ones((1, 99), jnp.float32)
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> print(tkfac.find_layers(lambda p, x: model.apply({"params": p}, x), params, x))
      layer     kind   d_in  d_out     MB
      -----------------------------------
      layers_0  dense   100    400  1.360
      layers_2  dense   400     10  1.281
      total                         2.641
      MB: factors and inverses, two of each per layer
    """
    if on_unsupported not in ("warn", "error", "ignore"):
        msg = f'on_unsupported={on_unsupported!r}; expected "warn", "error" or "ignore".'
        raise ValueError(msg)
    shapes = {name: tuple(jnp.shape(leaf)) for name, leaf in named_leaves(params).items()}
    uses, reasons = _trace_uses(unjitted(fun), params, args, kwargs)
    _refuse_shared_biases(uses, reasons)

    specs = []
    for kernel, kernel_uses in uses.items():
        if kernel in reasons:
            continue
        reason = _conflict(kernel_uses)
        if reason is None:
            specs.append(_spec(kernel, shapes[kernel], kernel_uses))
        else:
            reasons[kernel] = reason
    order = list(shapes)
    specs.sort(key=lambda spec: order.index(spec.kernel))
    owned = {name for spec in specs for name in (spec.kernel, spec.bias)}
    fallback = tuple((name, reasons.get(name, NOT_FOUND)) for name in shapes if name not in owned)
    if not specs:
        msg = "find_layers found no supported layer: " + (
            "; ".join(f"'{name}': {reason}" for name, reason in fallback)
            or "params has no leaves. Pass the parameters that fun applies its modules with."
        )
        raise ValueError(msg)
    _report_kernels(fallback, shapes, on_unsupported)
    return Layers(tuple(specs), fallback)


def _trace_uses(
    fun: Callable[..., Any], params: Any, args: Any, kwargs: Any
) -> tuple[dict[str, list[_Use]], dict[str, str]]:
    """Watches an abstract call of `fun`: the uses of each kernel, and why other parameters are left."""
    uses: dict[str, list[_Use]] = {}
    reasons: dict[str, str] = {}

    def traced(params: Any, arrays: list[Any]) -> Any:
        owner = {id(leaf): name for name, leaf in named_leaves(params).items()}

        def observe(call: ModuleCall, output: Any) -> Any:
            names = {key: owner.get(id(leaf)) for key, leaf in call.parameters.items()}
            if isinstance(call.layer, LayerCall):
                _record_layer(call.layer, owner, output, uses, reasons)
            else:
                for name in names.values():
                    if name is not None:
                        reasons.setdefault(name, call.layer)
            return output

        args, kwargs = combine(arrays)
        with linen.intercept(observe):
            return fun(params, *args, **kwargs)

    arrays, combine = _split_arrays((args, kwargs))
    jax.eval_shape(traced, params, arrays)
    return uses, reasons


def _split_arrays(tree: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """Splits off the arrays of a tree, so that flags such as `train=True` stay Python values."""
    leaves, treedef = jax.tree.flatten(tree)
    array_like = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, array_like)]

    def combine(arrays: list[Any]) -> Any:
        combined = list(leaves)
        for place, array in zip(places, arrays, strict=True):
            combined[place] = array
        return jax.tree.unflatten(treedef, combined)

    return [leaves[place] for place in places], combine


def _record_layer(
    layer: LayerCall,
    owner: Mapping[int, str],
    output: Any,
    uses: dict[str, list[_Use]],
    reasons: dict[str, str],
) -> None:
    kernel = owner.get(id(layer.kernel))
    bias = None if layer.bias is None else owner.get(id(layer.bias))
    if kernel is None:
        return
    if layer.bias is not None and bias is None:
        reasons.setdefault(kernel, "the bias used with it does not stand in params")
        return
    dtype = jnp.promote_types(output.dtype, jnp.float32)
    uses.setdefault(kernel, []).append(_Use(layer.kind, bias, layer.geometry, dtype))


def _refuse_shared_biases(uses: dict[str, list[_Use]], reasons: dict[str, str]) -> None:
    pairs = dict.fromkeys((use.bias, kernel) for kernel, found in uses.items() for use in found)
    kernels_of = Counter(bias for bias, _ in pairs if bias is not None)
    for bias, kernel in pairs:
        if bias is not None and kernels_of[bias] > 1:
            reasons.setdefault(kernel, f"its bias '{bias}' is used with other kernels too")


def _conflict(uses: list[_Use]) -> str | None:
    for field in ("kind", "bias", "geometry"):
        values = {getattr(use, field) for use in uses}
        if len(values) > 1:
            return (
                f"it is used with several values of {field}: {', '.join(sorted(map(str, values)))}"
            )
    return None


def _spec(kernel: str, shape: tuple[int, ...], uses: list[_Use]) -> LayerSpec:
    parent, _, last = kernel.rpartition("/")
    dtype = jnp.result_type(*(use.dtype for use in uses))
    return LayerSpec(
        name=(parent or ".") if last == "kernel" else kernel,
        kind=uses[0].kind,
        kernel=kernel,
        bias=uses[0].bias,
        kernel_shape=shape,
        dtype=dtype.name,
        geometry=uses[0].geometry,
    )


def _report_kernels(
    fallback: tuple[tuple[str, str], ...], shapes: Mapping[str, tuple[int, ...]], how: str
) -> None:
    for name, reason in fallback:
        if len(shapes[name]) < 2 or how == "ignore":
            continue
        message = (
            f"kernel '{name}' of shape {shapes[name]} is left to the fallback optimizer: {reason}. "
            'Pass on_unsupported="ignore" to find_layers to accept this.'
        )
        if how == "error":
            raise ValueError(message)
        warnings.warn(message, UserWarning, stacklevel=3)
