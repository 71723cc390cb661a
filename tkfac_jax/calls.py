"""Calls of layers: what the library must know of one, who is told about it, and how users describe their own.

A `LayerCall` says which kernel and bias a layer used, on which input, with which output. The
hooks for Linen (`linen`) and NNX (`nnx`) make them from module calls, `tag` makes one by hand. All
of them end in `report`, which shows the call to the observer of the moment (`observing`): to
`find_layers`, which notes it, or to a Fisher function, which tags the output.
"""

import contextlib
import contextvars
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tkfac_jax.matrices import Attend, Contraction, Convolution, Form, Layout, Lookup

Kind = Literal["dense", "conv", "embed", "norm"]

# Entries that the library puts next to a kernel in params, so that they pass through the same
# transformations as the kernel does: "tkfac/<token>/<number of the parameter>".
ROUTE_PREFIX = "tkfac/"


class LayerCall(NamedTuple):
    """One call of a layer: the arrays that it used and what it did with them.

    Build one with `dense_call`, `conv_call` or `embed_call`.

    Attributes:
      kind: `"dense"`, `"conv"`, `"embed"` or `"norm"`.
      kernel: the kernel, the very object that the layer was given.
      bias: the bias, or None.
      inputs: the input of the call, or a function without arguments that computes it when it is needed.
      output: the output of the call, before anything else was done with it.
      layout: how kernel and bias are matrices.
      form: which rows the call multiplied with them.
    """

    kind: Kind
    kernel: Any
    bias: Any
    inputs: Any
    output: Any
    layout: Layout
    form: Form


class Call(NamedTuple):
    """One call of a layer, or of a module that is not treated as one, as an observer sees it.

    Attributes:
      parameters: the parameters of the module itself (not of its children), by name.
      layer: the call as a layer; the reason why it is not treated as one; or None, where a method of a layer
        was called that says nothing about what the layer is used for.
      routes: what the library put next to the parameters; see `ROUTE_PREFIX`.
      names: what the hook knows of the parameters' names in `params`, by their keys in `parameters`.
      name: a name for the layer that a user gave, or None.
    """

    parameters: Mapping[str, Any]
    layer: LayerCall | str | None
    routes: Mapping[str, Any] = {}
    names: Mapping[str, str] = {}
    name: str | None = None


Observer = Callable[[Call], Any]

_observer: contextvars.ContextVar[Observer | None] = contextvars.ContextVar(
    "tkfac_jax_observer", default=None
)
# A function that JAX has traced already (jax.checkpoint and jax.jit keep traces) would be traced again
# under a value that it has not seen.
_trace_context = jax.make_user_context(default_value=None)
_trace_numbers = itertools.count()
# Hooks of other libraries that must be switched on while an observer is set.
HOOKS: list[Callable[[], contextlib.AbstractContextManager[None]]] = []


@contextlib.contextmanager
def observing(observer: Observer, *, retrace: bool = True) -> Iterator[None]:
    """Shows `observer` each call of a layer in the context; what it returns replaces the layer's output.

    Args:
      observer: what is shown the calls.
      retrace: functions inside that JAX has traced already are traced again, so that no call is
        hidden; outside of a trace that compiles them again, too.
    """
    with contextlib.ExitStack() as stack:
        if retrace:
            stack.enter_context(_trace_context(next(_trace_numbers)))
        for hook in HOOKS:
            stack.enter_context(hook())
        reset = _observer.set(observer)
        stack.callback(_observer.reset, reset)
        yield


def is_observed() -> bool:
    """Whether there is an observer."""
    return _observer.get() is not None


def report(call: Call, output: Any) -> Any:
    """Shows a call to the observer.

    Args:
      call: the call.
      output: what the module returned: the layer's output, or a tree that it stands in.

    Returns:
      The output with what the observer made of the layer's output in its place.
    """
    observer = _observer.get()
    if observer is None:
        return output
    replacement = observer(call)
    if not isinstance(call.layer, LayerCall) or replacement is call.layer.output:
        return output
    replaced = call.layer.output
    return jax.tree.map(lambda leaf: replacement if leaf is replaced else leaf, output)


def dense_call(
    kernel: Any, inputs: Array, output: Array, bias: Any = None, *, transposed: bool = False
) -> LayerCall:
    """A product over the last axis: `output = inputs @ kernel + bias`.

    Args:
      kernel: `(d_in, d_out)`, or `(d_out, d_in)` if `transposed`.
      inputs: `(batch, ..., d_in)`.
      output: `(batch, ..., d_out)`, before any activation.
      bias: `(d_out,)`, or None.
      transposed: the layer computes `inputs @ kernel.T`.
    """
    rows, columns = ((1,), (0,)) if transposed else ((0,), (1,))
    layout = Layout(jnp.shape(kernel), (), rows, columns, *_bias(bias, columns))
    form = Contraction.last_axis(jnp.ndim(inputs))
    return LayerCall("dense", kernel, bias, inputs, output, layout, form)


def conv_call(
    kernel: Any,
    inputs: Array,
    output: Array,
    bias: Any = None,
    *,
    geometry: Convolution,
    transposed: bool = False,
) -> LayerCall:
    """A convolution with channels last.

    Args:
      kernel: `(*window, d_in / groups, d_out)`, or with the last two axes swapped if `transposed`.
      inputs: `(batch, *spatial, d_in)`.
      output: `(batch, *spatial, d_out)`, before any activation.
      bias: `(d_out,)`, or None.
      geometry: how the kernel visits the input.
      transposed: the kernel's channels are `(d_out, d_in)`.
    """
    shape, rank = jnp.shape(kernel), len(geometry.window)
    if geometry.groups == 1:
        split, blocks = shape, ()
        inner, outer = (rank + 1, rank) if transposed else (rank, rank + 1)
    else:
        split = (*shape[:-1], geometry.groups, shape[-1] // geometry.groups)
        blocks, inner, outer = (rank + 1,), rank, rank + 2
    layout = Layout(split, blocks, (*range(rank), inner), (outer,), *_bias(bias, (*blocks, outer)))
    return LayerCall("conv", kernel, bias, inputs, output, layout, geometry)


def embed_call(table: Any, tokens: Array, output: Array) -> LayerCall:
    """A lookup of rows of a table: `output = table[tokens]`.

    Args:
      table: `(vocabulary, features)`.
      tokens: integers `(batch, ...)`.
      output: `(batch, ..., features)`.
    """
    layout = Layout(jnp.shape(table), (), (0,), (1,))
    return LayerCall("embed", table, None, tokens, output, layout, Lookup(jnp.shape(table)[0]))


def attend_call(table: Any, query: Array, output: Array) -> LayerCall:
    """The product with the transpose of a table of embeddings: `output = query @ table.T`.

    Args:
      table: `(vocabulary, features)`.
      query: `(batch, ..., features)`.
      output: `(batch, ..., vocabulary)`.
    """
    layout = Layout(jnp.shape(table), (), (0,), (1,))
    return LayerCall("embed", table, None, query, output, layout, Attend())


def _bias(bias: Any, axes: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    return ((), 0) if bias is None else (axes, 1)


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
