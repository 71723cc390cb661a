"""Finding the layers of a function.

`find_layers` traces the function abstractly and notes which layer uses which leaf of `params`. Where a
layer is given the very array that stands in `params`, nothing more has to be asked. Where a
transformation stands in between, the kernel that the layer sees is compared with the parameter
(`kernel_values`), because the Fisher block of a scaled or normalised kernel is not the block of the parameter.
"""

import dataclasses
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from tkfac_jax.layers.kernel_uses import (
    Notes,
    Use,
    conflict,
    kernels_of_outputs,
    refuse_shared_biases,
    trace_uses,
)
from tkfac_jax.layers.kernel_values import check_values
from tkfac_jax.layers.parameter_tree import named_leaves
from tkfac_jax.layers.per_example import check_calls
from tkfac_jax.layers.row_forms import Convolution
from tkfac_jax.layers.spec import Layers, LayerSpec, keeps_bias_apart
from tkfac_jax.linalg.factor_structure import Structure

NOT_FOUND = "no supported layer uses it as it stands in params (it is unused, or changed before a layer uses it)"


def unjitted(fun: Callable[..., Any]) -> Callable[..., Any]:
    """The function under `jax.jit`: a cached trace would hide the module calls from the library."""
    return inspect.unwrap(fun, stop=lambda inner: not isinstance(inner, jax.stages.Wrapped))


def find_layers(
    fun: Callable[..., Any],
    params: Any,
    *args: Any,
    on_unsupported: Literal["warn", "error", "ignore"] = "warn",
    norms: Literal["fallback", "exact"] = "fallback",
    max_factor_size: int | None = None,
    large_factors: Literal["diagonal", "blocks"] = "diagonal",
    **kwargs: Any,
) -> Layers:
    """Finds the layers that a function applies, by abstract tracing.

    Nothing is computed, with one exception: kernels that reach their layers through transformations
    (`nn.remat`, `nn.scan`, a cast) are compared with the parameters, on random numbers.

    Every parameter that belongs to no supported layer is left to the fallback optimizer, with its reason.

    Args:
      fun: a function `fun(params, *args, **kwargs)` that applies Flax modules, any number of them.
      params: its parameters; arrays or `jax.ShapeDtypeStruct`.
      *args: further arguments: inputs, batch statistics, dropout keys. Arrays are traced, all else is static.
      on_unsupported: what to do about a kernel (a parameter of two or more axes) that is left to
        the fallback: `"warn"` (a `UserWarning` that names it), `"error"` (a `ValueError`) or `"ignore"`.
      norms: what to do with scale and bias of norms: leave them to the fallback, or treat each norm
        as a layer whose one block is exact.
      max_factor_size: factors with more rows than this are not stored whole; None: all are.
      large_factors: what larger factors become: their diagonal alone, or blocks on the diagonal of at
        most `max_factor_size` rows. The input factor of an embedding is always diagonal.
      **kwargs: further keyword arguments of `fun`.

    Returns:
      The layers, in the order of their parameters.

    Raises:
      ValueError: an option is none of those above; no layer was found; or a kernel is left to
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
    _check_options(on_unsupported, norms, max_factor_size, large_factors)
    fun = unjitted(fun)
    shapes = {name: tuple(jnp.shape(leaf)) for name, leaf in named_leaves(params).items()}
    notes = trace_uses(fun, params, args, kwargs, norms)
    refuse_shared_biases(notes)

    specs, making = [], kernels_of_outputs(notes)
    for kernel, kernel_uses in notes.uses.items():
        notes.remarks.update(
            {use.bias: f"it goes with '{kernel}'" for use in kernel_uses if use.bias is not None}
        )
        if kernel in notes.reasons:
            continue
        reason = conflict(kernel_uses)
        if reason is None:
            spec = _spec(kernel, shapes, kernel_uses, max_factor_size, large_factors)
            # Of a stack of layers, not all do.
            last = kernel in making and not spec.stack
            specs.append(dataclasses.replace(spec, makes_outputs=last))
        else:
            notes.reasons[kernel] = reason
    order = list(shapes)
    specs.sort(key=lambda spec: order.index(spec.kernel))
    specs = _keep_treatable(specs, notes, fun, params, args, kwargs)
    owned = {name for spec in specs for name in (spec.kernel, spec.bias)}
    said = dict.fromkeys(shapes, NOT_FOUND) | notes.remarks | notes.reasons
    fallback = tuple((name, said[name]) for name in shapes if name not in owned)
    if not specs:
        msg = "find_layers found no supported layer: " + (
            "; ".join(f"'{name}': {reason}" for name, reason in fallback)
            or "params has no leaves. Pass the parameters that fun applies its modules with."
        )
        raise ValueError(msg)
    # What stacks a norm's scale or a bias gives it a second axis, but makes no kernel of it.
    vectors = {use.bias for uses in notes.uses.values() for use in uses} | notes.norms
    kernels = [(n, why) for n, why in fallback if len(shapes[n]) >= 2 and n not in vectors]
    _report_kernels(kernels, shapes, on_unsupported)
    return Layers(tuple(specs), fallback)


def _spec(
    kernel: str,
    shapes: Mapping[str, tuple[int, ...]],
    uses: list[Use],
    limit: int | None,
    large: Literal["diagonal", "blocks"],
) -> LayerSpec:
    first = uses[0]
    parent, _, last = kernel.rpartition("/")
    is_own = last in ("kernel", "embedding") or first.kind == "norm"
    given = next((use.name for use in uses if use.name is not None), None)
    phi = Structure.of_size(first.layout.d_in, limit, large)
    if first.kind == "embed":
        phi = Structure("diagonal", first.layout.d_in, first.layout.d_in)
    return LayerSpec(
        name=given or ((parent or ".") if is_own else kernel),
        kind=first.kind,
        kernel=kernel,
        bias=first.bias,
        kernel_shape=shapes[kernel],
        bias_shape=None if first.bias is None else shapes[first.bias],
        dtype=jnp.result_type(*(use.dtype for use in uses)).name,
        layout=first.layout,
        phi=phi,
        psi=Structure.of_size(first.layout.d_out, limit, large),
        stack=first.stack,
        routed=any(use.routed for use in uses),
        named=any(use.named for use in uses),
        geometry=first.form if isinstance(first.form, Convolution) else None,
        bias_apart=keeps_bias_apart(first.layout, phi),
    )


def _keep_treatable(
    specs: list[LayerSpec],
    notes: Notes,
    fun: Callable[..., Any],
    params: Any,
    args: Any,
    kwargs: Any,
) -> list[LayerSpec]:
    """Leaves out the layers whose kernel is not the parameter itself, or that see no examples."""
    suspects = [
        spec for spec in specs if not all(use.as_it_stands for use in notes.uses[spec.kernel])
    ]
    reasons = check_values(fun, params, args, kwargs, suspects) if suspects else {}
    specs = [spec for spec in specs if spec.kernel not in reasons]
    reasons |= check_calls(fun, params, args, kwargs, specs)
    notes.reasons.update(reasons)
    return [spec for spec in specs if spec.kernel not in reasons]


def _check_options(on_unsupported: Any, norms: Any, max_factor_size: Any, large: Any) -> None:
    for name, value, allowed in (
        ("on_unsupported", on_unsupported, ("warn", "error", "ignore")),
        ("norms", norms, ("fallback", "exact")),
        ("large_factors", large, ("diagonal", "blocks")),
    ):
        if value not in allowed:
            expected = ", ".join(f'"{v}"' for v in allowed[:-1]) + f' or "{allowed[-1]}"'
            msg = f"{name}={value!r}; expected {expected}."
            raise ValueError(msg)
    if max_factor_size is not None and not (
        isinstance(max_factor_size, int) and max_factor_size >= 1
    ):
        msg = (
            f"max_factor_size={max_factor_size!r}; expected a whole number of at least 1, or None."
        )
        raise ValueError(msg)


def _report_kernels(
    kernels: list[tuple[str, str]], shapes: Mapping[str, tuple[int, ...]], how: str
) -> None:
    for name, reason in kernels if how != "ignore" else ():
        message = (
            f"kernel '{name}' of shape {shapes[name]} is left to the fallback optimizer: {reason}. "
            'Pass on_unsupported="ignore" to find_layers to accept this.'
        )
        if how == "error":
            raise ValueError(message)
        warnings.warn(message, UserWarning, stacklevel=3)
