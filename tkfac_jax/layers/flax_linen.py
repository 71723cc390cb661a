"""What the library knows about Flax Linen: its layers, and how to watch them.

Nothing else in the package looks into a Linen module. The descriptions go into the same table as
those that users register.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax

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
from tkfac_jax.layers.layer_call import HOOKS, ROUTE_PREFIX, Call, LayerCall, dense_call, report
from tkfac_jax.layers.register import describe_call, register_layer


@contextlib.contextmanager
def intercept() -> Iterator[None]:
    """Reports each method call of a Linen module that has parameters of its own."""

    def interceptor(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        output = next_fun(*args, **kwargs)
        module = context.module
        if context.method_name == "setup" or module.scope is None:
            return output
        parameters, routes = _own_parameters(module)
        if not parameters:
            return output
        layer = describe_call(module, context.method_name, parameters, args, kwargs, output)
        return report(Call(parameters, layer, routes), output)

    with nn.intercept_methods(interceptor):
        yield


HOOKS.append(intercept)


def _own_parameters(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameters of the module itself, and what the library has put next to them."""
    own, routes = {}, {}
    for name, value in module.variables.get("params", {}).items():
        if name.startswith(ROUTE_PREFIX):
            routes[name] = value
            continue
        # A box such as nn.Partitioned is a subtree of one leaf; a child module is a mapping.
        leaves = [] if isinstance(value, Mapping) else jax.tree.leaves(value)
        if len(leaves) == 1:
            own[name] = leaves[0]
    return own, routes


def _own_dot_general(module: Any) -> bool:
    return module.dot_general is not None or module.dot_general_cls is not None


def _dense(
    module: nn.Dense, parameters: Parameters, args: Any, kwargs: Any, output: Any
) -> LayerCall | str:
    if _own_dot_general(module):
        return "a Dense layer with its own dot_general is not supported"
    inputs = argument(args, kwargs, "inputs")
    return dense_call(parameters["kernel"], inputs, output, parameters.get("bias"))


def _dense_general(
    module: nn.DenseGeneral, parameters: Parameters, args: Any, kwargs: Any, output: Any
) -> LayerCall | str:
    if _own_dot_general(module):
        return "a DenseGeneral layer with its own dot_general is not supported"
    inputs = argument(args, kwargs, "inputs")
    return contraction_of_axes(
        parameters["kernel"],
        parameters.get("bias"),
        inputs,
        output,
        axes=broadcast(module.axis, 1),
        batch_axes=tuple(module.batch_dims),
    )


def _conv(
    module: nn.Conv, parameters: Parameters, args: Any, kwargs: Any, output: Any
) -> LayerCall | str:
    if module.conv_general_dilated is not None or module.conv_general_dilated_cls is not None:
        return "a convolution with its own conv_general_dilated is not supported"
    return describe_conv(module, parameters, args, kwargs, output)


def _norm(
    module: Any, parameters: Parameters, args: Any, kwargs: Any, output: Any
) -> LayerCall | str:
    if not scales_last_axis(module, output):
        return f"{type(module).__name__} with features on axes other than the last is not supported"
    plain = module.clone(
        parent=None, **{name: False for name in ("use_scale", "use_bias") if hasattr(module, name)}
    )
    others = {name: value for name, value in module.variables.items() if name != "params"}

    def normalised() -> Any:
        return plain.apply(others, *args, **kwargs, mutable=list(others))[0]

    return norm_call(parameters.get("scale"), parameters.get("bias"), normalised, output)


register_layer(nn.Dense, _dense)

register_layer(nn.DenseGeneral, _dense_general)

register_layer(nn.Einsum, describe_einsum)

register_layer(nn.Conv, _conv)

register_layer(
    nn.ConvLocal, refused("ConvLocal has a kernel of its own at every location: not supported")
)

register_layer(nn.ConvTranspose, describe_conv_transpose)

register_layer(nn.Embed, describe_embed)

register_layer(nn.Embed, describe_attend, method="attend")

for norm in (nn.LayerNorm, nn.RMSNorm, nn.BatchNorm, nn.GroupNorm, nn.InstanceNorm):
    register_layer(norm, _norm)
