"""How users describe layers of their own: classes by `register_layer`, single calls by `tag`."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

from jaxtyping import Array

from tkfac_jax.layers.layer_call import (
    Call,
    LayerCall,
    conv_call,
    dense_call,
    embed_call,
    is_observed,
    report,
)
from tkfac_jax.layers.row_forms import Convolution

Describe = Callable[
    [Any, Mapping[str, Any], tuple[Any, ...], Mapping[str, Any], Any], LayerCall | str
]

_descriptions: dict[tuple[type, str], Describe] = {}

# Called with each class and method that is registered, by the hooks that must know of it.
ON_REGISTER: list[Callable[[type, str], None]] = []


def register_layer(module_class: type, describe: Describe, *, method: str = "__call__") -> None:
    """Teaches the library a layer class of your own, of Flax Linen or NNX.

    Subclasses are treated likewise unless they override the method. The kernel that `describe` names
    goes through the same checks as that of a layer of Flax.

    Args:
      module_class: a subclass of `flax.linen.Module` or `flax.nnx.Module`.
      describe: called as `describe(module, parameters, args, kwargs, output)` after each call, with the
        module's own parameters by name, the arguments of the call and what it returned. It returns a
        `LayerCall`, made by `dense_call`, `conv_call` or `embed_call` from those very arrays, or a string: the
        reason why this call cannot be treated.
      method: name of the method that applies the layer.

    Raises:
      ValueError: `module_class` is not a class or has no such method.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, tkfac_jax as tkfac
      >>> class Projection(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x):
      ...         return x @ self.param("w", nn.initializers.normal(), (x.shape[-1], 2))
      >>> def describe(module, parameters, args, kwargs, output):
      ...     return tkfac.dense_call(parameters["w"], args[0], output)
      >>> tkfac.register_layer(Projection, describe)
      >>> x = jnp.ones((5, 3))
      >>> params = Projection().init(jax.random.key(0), x)["params"]
      >>> list(tkfac.find_layers(lambda p, x: Projection().apply({"params": p}, x), params, x))
      ['w']
    """
    if not isinstance(module_class, type) or not callable(getattr(module_class, method, None)):
        msg = f"register_layer: {module_class!r} is not a class with a method '{method}'."
        raise ValueError(msg)
    _descriptions[module_class, method] = describe
    for hook in ON_REGISTER:
        hook(module_class, method)


def describe_call(
    module: Any,
    method: str,
    parameters: Mapping[str, Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    output: Any,
) -> LayerCall | str | None:
    """A call as a layer, by what is registered for its class; or why not; None for a layer's other methods."""
    own = type(module)
    known = next((cls for cls in own.__mro__ if (cls, method) in _descriptions), None)
    if known is None:
        classes = {cls for cls, _ in _descriptions}
        if any(cls in classes for cls in own.__mro__):
            return None
        return f"{own.__name__} is not a supported layer"
    if getattr(own, method) is not getattr(known, method):
        return f"{own.__name__} overrides {known.__name__}.{method}"
    return describe_as(known, module, method, parameters, args, kwargs, output)


def describe_as(
    known: type,
    module: Any,
    method: str,
    parameters: Mapping[str, Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    output: Any,
) -> LayerCall | str:
    """A call as a layer of a class that is registered."""
    return _descriptions[known, method](module, parameters, args, kwargs, output)


def tag(
    output: Array,
    inputs: Array,
    *,
    name: str,
    kernel: Array,
    bias: Array | None = None,
    kind: Literal["dense", "conv", "embed"] = "dense",
    geometry: Convolution | None = None,
    transposed: bool = False,
) -> Array:
    """Marks by hand the output of a layer, in a function of raw JAX or of another library.

    Outside `find_layers` and the Fisher functions it is the identity. Go on with what it returns.

    Args:
      output: the layer's output, before any activation: `inputs @ kernel + bias`, for example.
      inputs: the layer's input, features last, examples first.
      name: the layer's name. If the kernel reaches the layer through a transformation (such as
        `jax.checkpoint`), the parameters are looked for under this name and "/kernel" or "/bias".
      kernel: the kernel, the very array that stands in `params`.
      bias: the bias, likewise; None if there is none.
      kind: what the layer is; see `dense_call`, `conv_call` and `embed_call`.
      geometry: of a convolution.
      transposed: the kernel's last two axes are `(d_out, d_in)`.

    Returns:
      The output.

    Raises:
      ValueError: the kind is unknown, or a convolution has no geometry.

    Example:
      >>> import jax, jax.numpy as jnp, tkfac_jax as tkfac
      >>> def predict(params, x):
      ...     y = x @ params["w"] + params["b"]
      ...     return tkfac.tag(y, x, name="first", kernel=params["w"], bias=params["b"])
      >>> params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
      >>> list(tkfac.find_layers(predict, params, jnp.ones((5, 3))))
      ['first']
    """
    if not is_observed():
        return output
    if kind == "dense":
        call = dense_call(kernel, inputs, output, bias, transposed=transposed)
    elif kind == "conv" and geometry is not None:
        call = conv_call(kernel, inputs, output, bias, geometry=geometry, transposed=transposed)
    elif kind == "embed":
        call = embed_call(kernel, inputs, output)
    else:
        msg = f'layer \'{name}\': kind={kind!r}; expected "dense", "conv" (with geometry=...) or "embed".'
        raise ValueError(msg)
    parameters = {"kernel": kernel} if bias is None else {"kernel": kernel, "bias": bias}
    names = {key: f"{name}/{key}" for key in parameters}
    return report(Call(parameters, call, names=names, name=name), output)
