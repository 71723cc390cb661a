"""What the library knows about Flax Linen: which module calls it can treat, and how to watch them.

`describe_call` turns the call of a Linen module into a `LayerCall` (this kernel, this bias, this
geometry) or into the reason why the call is not one that the library can treat. `intercept`
shows every call and its output to a function. Nothing else in the package looks into a module.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jaxtyping import Array

Padding = str | tuple[tuple[int, int], ...]


class ConvGeometry(NamedTuple):
    """How a convolution visits its input.

    Attributes:
      window: spatial size of the kernel, `(height, width)`.
      strides: steps of the window, per spatial axis.
      dilation: distance between the taps of the kernel, per spatial axis.
      padding: `"SAME"`, `"VALID"`, `"CIRCULAR"` and so on, or explicit `(low, high)` pairs.
    """

    window: tuple[int, ...]
    strides: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: Padding


class LayerCall(NamedTuple):
    """One call of a supported module: the arrays that it used and what it did with them.

    Attributes:
      kind: `"dense"` or `"conv"`.
      kernel: the kernel, the very object that the module was given.
      bias: the bias, or None.
      inputs: the input of the call, features last.
      geometry: for a convolution, how it visits its input; for a dense layer None.
    """

    kind: str
    kernel: Any
    bias: Any
    inputs: Array
    geometry: ConvGeometry | None


class ModuleCall(NamedTuple):
    """One call of any Linen module, as the interceptor sees it.

    Attributes:
      module: the class name of the module, such as `"BatchNorm"`.
      parameters: the module's own parameters (not those of its children), by name.
      layer: the call as a layer, or the reason why it is not treated as one.
    """

    module: str
    parameters: Mapping[str, Any]
    layer: LayerCall | str


Observer = Callable[[ModuleCall, Any], Any]


@contextlib.contextmanager
def intercept(observer: Observer) -> Iterator[None]:
    """Shows `observer` each method call of a module with parameters, and lets it replace the output.

    Args:
      observer: called as `observer(call, output)` after the method; what it returns replaces the output.
    """

    def interceptor(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        output = next_fun(*args, **kwargs)
        module = context.module
        if context.method_name == "setup" or module.scope is None:
            return output
        parameters = _own_parameters(module)
        if not parameters:
            return output
        layer = _describe(module, context.method_name, parameters, args, kwargs)
        return observer(ModuleCall(type(module).__name__, parameters, layer), output)

    with nn.intercept_methods(interceptor):
        yield


def _own_parameters(module: nn.Module) -> dict[str, Any]:
    own = {}
    for name, value in module.variables.get("params", {}).items():
        # A box such as nn.Partitioned is a subtree of one leaf; a child module is a mapping.
        leaves = [] if isinstance(value, Mapping) else jax.tree.leaves(value)
        if len(leaves) == 1:
            own[name] = leaves[0]
    return own


def _describe(
    module: nn.Module, method: str, parameters: Mapping[str, Any], args: Any, kwargs: Any
) -> LayerCall | str:
    name = type(module).__name__
    supported = next((cls for cls in DESCRIPTIONS if isinstance(module, cls)), None)
    if supported is None or method != "__call__":
        return f"{name} is not a supported layer"
    if type(module).__call__ is not supported.__call__:
        return f"{name} overrides {supported.__name__}.__call__"
    described = DESCRIPTIONS[supported](module)
    if isinstance(described, str):
        return described
    kind, geometry = described
    inputs = args[0] if args else kwargs["inputs"]
    return LayerCall(kind, parameters["kernel"], parameters.get("bias"), inputs, geometry)


Description = tuple[str, ConvGeometry | None] | str


def _describe_dense(module: nn.Dense) -> Description:
    if module.dot_general is not None or module.dot_general_cls is not None:
        return "a Dense layer with its own dot_general is not supported"
    return "dense", None


def _describe_conv(module: nn.Conv) -> Description:
    window = _broadcast(module.kernel_size, 1)
    rank = len(window)
    unsupported = {
        f"a convolution over {rank} spatial axes": rank != 2,
        f"feature_group_count={module.feature_group_count}": module.feature_group_count != 1,
        f"input_dilation={module.input_dilation}": set(_broadcast(module.input_dilation, rank))
        != {1},
        "a masked kernel": module.mask is not None,
        "a convolution with its own conv_general_dilated": module.conv_general_dilated is not None
        or module.conv_general_dilated_cls is not None,
    }
    for reason, holds in unsupported.items():
        if holds:
            return f"{reason} is not supported"
    padding = module.padding
    if not isinstance(padding, str):
        padding = tuple(
            (pad, pad) if isinstance(pad, int) else (int(pad[0]), int(pad[1]))
            for pad in ((padding,) * rank if isinstance(padding, int) else padding)
        )
    geometry = ConvGeometry(
        window,
        _broadcast(module.strides, rank),
        _broadcast(module.kernel_dilation, rank),
        padding,
    )
    return "conv", geometry


def _broadcast(value: int | Sequence[int] | None, rank: int) -> tuple[int, ...]:
    """Flax takes None, a number or a sequence where there is one number per spatial axis."""
    if value is None:
        value = 1
    return (value,) * rank if isinstance(value, int) else tuple(int(v) for v in value)


# What each supported class is described by: its kind and geometry, or why it cannot be treated.
DESCRIPTIONS: dict[type[nn.Module], Callable[[Any], Description]] = {
    nn.Dense: _describe_dense,
    nn.Conv: _describe_conv,
}
