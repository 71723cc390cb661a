"""Calls of layers: what the library must know of one, and who is told about it.

A `LayerCall` says which kernel and bias a layer used, on which input, with which output. The
hooks for Linen (`flax_linen`) and NNX (`flax_nnx`) make them from module calls, `tag` (`register`) makes
one by hand. All of them end in `report`, which shows the call to the observer of the moment (`observing`): to
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

from tkfac_jax.layers.kernel_matrix import Layout
from tkfac_jax.layers.row_forms import Attend, Contraction, Convolution, Form, Lookup

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
