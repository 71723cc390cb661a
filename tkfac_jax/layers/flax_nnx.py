"""What the library knows about Flax NNX: its layers, how to watch them, and how entries travel with a parameter.

NNX has no interceptors, so the methods of the layer classes are wrapped, once, when they are registered;
while nobody observes, a wrapper only asks for that. An entry next to a parameter (`routes`) stands inside its
Variable, which reads as before: so it goes through `nnx.merge` and every transformation of NNX with it.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from tkfac_jax.layers.flax_descriptions import (
    Parameters,
    argument,
    broadcast,
    contraction_of_axes,
    describe_attend,
    describe_conv,
    describe_conv_transpose,
    describe_einsum,
    describe_embed,
    norm_call,
    refused,
    scales_last_axis,
)
from tkfac_jax.layers.layer_call import Call, LayerCall, dense_call, is_observed, report
from tkfac_jax.layers.register import ON_REGISTER, describe_as, register_layer

METADATA = "tkfac"

_watched: set[Callable[..., Any]] = set()


@jax.tree_util.register_pytree_with_keys_class
class Accompanied:
    """An array and the entry next to it, as the value of one Variable."""

    def __init__(self, array: Any, entry: Any):
        self.array = array
        self.entry = entry

    def tree_flatten_with_keys(self) -> tuple[Any, None]:
        """The array and the entry."""
        key = jax.tree_util.GetAttrKey
        return ((key("array"), self.array), (key("entry"), self.entry)), None

    @classmethod
    def tree_unflatten(cls, auxiliary: None, children: Any) -> "Accompanied":
        """The inverse of `tree_flatten_with_keys`."""
        del auxiliary
        return cls(*children)

    def __getitem__(self, index: Any) -> Any:
        return self.array if index is Ellipsis else self.array[index]


def accompany(variable: nnx.Variable, key: str, entry: Any) -> nnx.Variable:
    """A copy of a Variable that carries an entry, and the entry's key as metadata."""
    metadata = dict(variable.get_metadata()) | {METADATA: key}
    value = Accompanied(_raw(variable), entry)
    return _accompanied_class(type(variable)).from_metadata(value, metadata)


def _raw(variable: nnx.Variable) -> Any:
    # Flax 0.12.0 has only the attribute, which later versions deprecate.
    return (
        variable.get_raw_value() if hasattr(nnx.Variable, "get_raw_value") else variable.raw_value
    )


@functools.cache
def _accompanied_class(base: type) -> type:
    """A subclass of a Variable class whose value reads as the array alone."""

    def array_of(value: Any) -> Any:
        return value.array if isinstance(value, Accompanied) else value

    if hasattr(base, "get_value"):

        def get_value(self: Any, **options: Any) -> Any:
            return array_of(base.get_value(self, **options))

        body = {"get_value": get_value}
    else:
        value = base.value
        body = {"value": property(lambda self: array_of(value.fget(self)), value.fset)}
    return type(base)(base.__name__, (base,), body)


def _watch(module_class: type, method: str) -> None:
    """Wraps a method of an NNX class so that its calls are reported."""
    if not issubclass(module_class, nnx.Module) or method not in vars(module_class):
        return
    original = vars(module_class)[method]
    if original in _watched:
        return

    @functools.wraps(original)
    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        if not is_observed():
            return output
        parameters, routes = _own_parameters(self)
        if not parameters:
            return output
        # The class that was wrapped, not that of the module: a subclass that calls super() adds to
        # the output afterwards.
        layer = describe_as(module_class, self, method, parameters, args, kwargs, output)
        return report(Call(parameters, layer, routes), output)

    _watched.add(watched)
    setattr(module_class, method, watched)


ON_REGISTER.append(_watch)


def _own_parameters(module: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameters of the module itself, and what the library has put next to them."""
    own, routes = {}, {}
    for name, variable in vars(module).items():
        if not isinstance(variable, nnx.Param):
            continue
        own[name] = variable[...]
        value, key = _raw(variable), variable.get_metadata().get(METADATA)
        # A value that was overwritten (by a normalisation, say) has no entry any more.
        if key is not None and isinstance(value, Accompanied):
            routes[key] = value.entry
    return own, routes


def _linear(
    module: nnx.Linear, parameters: Parameters, args: Any, kwargs: Any, output: Any
) -> LayerCall | str:
    if module.dot_general is not jax.lax.dot_general:
        return "a Linear layer with its own dot_general is not supported"
    inputs = argument(args, kwargs, "inputs")
    return dense_call(parameters["kernel"], inputs, output, parameters.get("bias"))


def _linear_general(
    module: nnx.LinearGeneral, parameters: Parameters, args: Any, kwargs: Any, output: Any
) -> LayerCall | str:
    own = module.dot_general not in (None, jax.lax.dot_general)
    if own or module.dot_general_cls is not None:
        return "a LinearGeneral layer with its own dot_general is not supported"
    return contraction_of_axes(
        parameters["kernel"],
        parameters.get("bias"),
        argument(args, kwargs, "inputs"),
        output,
        axes=broadcast(module.axis, 1),
        batch_axes=tuple(module.batch_axis),
    )


def _conv(
    module: nnx.Conv, parameters: Parameters, args: Any, kwargs: Any, output: Any
) -> LayerCall | str:
    if module.conv_general_dilated is not jax.lax.conv_general_dilated:
        return "a convolution with its own conv_general_dilated is not supported"
    return describe_conv(module, parameters, args, kwargs, output)


def _norm(
    module: Any, parameters: Parameters, args: Any, kwargs: Any, output: Any
) -> LayerCall | str:
    if not scales_last_axis(module, output):
        return f"{type(module).__name__} with features on axes other than the last is not supported"

    def normalised() -> Any:
        plain = copy.copy(module)
        for name, variable in vars(module).items():
            if name in ("scale", "bias"):
                setattr(plain, name, None)
            elif isinstance(variable, nnx.BatchStat):
                # The running averages have been updated by the call itself.
                setattr(plain, name, nnx.BatchStat(variable[...]))
        return plain(*args, **kwargs)

    return norm_call(parameters.get("scale"), parameters.get("bias"), normalised, output)


register_layer(nnx.Linear, _linear)

register_layer(nnx.LinearGeneral, _linear_general)

register_layer(nnx.Einsum, describe_einsum)

register_layer(nnx.Conv, _conv)

register_layer(nnx.ConvTranspose, describe_conv_transpose)

register_layer(nnx.Embed, describe_embed)

register_layer(nnx.Embed, describe_attend, method="attend")

register_layer(nnx.LoRA, refused("LoRA multiplies two matrices at once: not supported"))

for norm in (nnx.LayerNorm, nnx.RMSNorm, nnx.BatchNorm, nnx.GroupNorm, nnx.InstanceNorm):
    register_layer(norm, _norm)
