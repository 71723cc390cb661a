"""Which parameters of a function are the kernels of layers that the library can treat.

`find_layers` traces the function abstractly and watches which module uses which leaf of `params`.
A leaf is recognised by identity: the module must have been given the very array that stands in
`params`, not one computed from it, because the Fisher block of a scaled or transformed kernel is
not the block of the parameter.
"""

import dataclasses
import inspect
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tkfac_jax import linen
from tkfac_jax.linen import ConvGeometry, LayerCall, ModuleCall

NOT_FOUND = (
    "no supported layer uses it as it stands in params (it is unused, or cast, scaled or passed "
    "through a transformation such as nn.scan or nn.remat before a layer uses it)"
)


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """What is known about one layer without looking at numbers.

    Attributes:
      name: the layer's place in `params`, such as `"encoder/Dense_0"`.
      kind: `"dense"` or `"conv"`.
      kernel: name of the kernel among the parameters, such as `"encoder/Dense_0/kernel"`.
      bias: name of the bias, or None.
      kernel_shape: shape of the kernel, output features last.
      dtype: name of the dtype of the layer's statistics and factors, at least float32.
      geometry: for a convolution, how it visits its input; for a dense layer None.
    """

    name: str
    kind: str
    kernel: str
    bias: str | None
    kernel_shape: tuple[int, ...]
    dtype: str
    geometry: ConvGeometry | None = None

    @property
    def has_bias(self) -> bool:
        """Whether the layer has a bias, the last row of its kernel as a matrix."""
        return self.bias is not None

    @property
    def d_in(self) -> int:
        """Rows of the kernel as a matrix, the homogeneous coordinate of a bias counted."""
        return math.prod(self.kernel_shape[:-1]) + self.has_bias

    @property
    def d_out(self) -> int:
        """Columns of the kernel as a matrix."""
        return self.kernel_shape[-1]

    @property
    def num_bytes(self) -> int:
        """Memory of the layer's two factors and their two inverses."""
        return 2 * (self.d_in**2 + self.d_out**2) * np.dtype(self.dtype).itemsize


class Layers(Mapping[str, LayerSpec]):
    """The layers of a function: an immutable, hashable mapping from a layer's name to its `LayerSpec`.

    `print(layers)` shows a table of the layers and of the parameters that are left to the fallback.
    """

    def __init__(self, specs: tuple[LayerSpec, ...], fallback: tuple[tuple[str, str], ...] = ()):
        """Takes the specs in the order of the parameters, and `(parameter, reason)` pairs."""
        self._specs = {spec.name: spec for spec in specs}
        self._fallback = tuple(fallback)
        self._key = (tuple(specs), self._fallback)

    def __getitem__(self, name: str) -> LayerSpec:
        return self._specs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layers) and self._key == other._key

    @property
    def fallback(self) -> Mapping[str, str]:
        """The parameters that belong to no layer: from a parameter's name to the reason."""
        return MappingProxyType(dict(self._fallback))

    def labels(self, params: Any) -> Any:
        """Labels each parameter for `optax.partition`.

        Args:
          params: the parameters, or a tree of their structure.

        Returns:
          A tree of the same structure: `"tkfac"` where the parameter is the kernel or bias of a
          layer, `"fallback"` elsewhere.

        Example:
          >>> import flax.linen as nn, jax, jax.numpy as jnp, tkfac_jax as tkfac
          >>> model = nn.Sequential([nn.Dense(4), nn.LayerNorm()])
          >>> params = model.init(jax.random.key(0), jnp.ones((2, 3)))["params"]
          >>> layers = tkfac.find_layers(lambda p, x: model.apply({"params": p}, x), params, jnp.ones((2, 3)))
          >>> layers.labels(params)["layers_0"]
          {'bias': 'tkfac', 'kernel': 'tkfac'}
          >>> layers.labels(params)["layers_1"]
          {'bias': 'fallback', 'scale': 'fallback'}
        """
        owned = {name for spec in self.values() for name in (spec.kernel, spec.bias)}
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "tkfac" if parameter_name(path) in owned else "fallback", params
        )

    def __str__(self) -> str:
        rows = [("layer", "kind", "d_in", "d_out", "MB")]
        rows += [
            (s.name, s.kind, str(s.d_in), str(s.d_out), f"{s.num_bytes / 1e6:.3f}")
            for s in self.values()
        ]
        total = sum(spec.num_bytes for spec in self.values()) / 1e6
        rows.append(("total", "", "", "", f"{total:.3f}"))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = [
            "  ".join(
                cell.ljust(width) if i < 2 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        lines.insert(1, "-" * max(len(line) for line in lines))
        lines.append("MB: factors and inverses, two of each per layer")
        if self._fallback:
            lines.append("left to the fallback:")
            lines += [f"  {name}: {reason}" for name, reason in self._fallback]
        return "\n".join(lines)

    __repr__ = __str__


def parameter_name(path: tuple[Any, ...]) -> str:
    """Names a leaf by its path in the tree, such as `"encoder/Dense_0/kernel"`.

    The attribute of a box around the leaf (`nn.Partitioned`, for example) is not part of the name.
    """
    if path and isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name == "value":
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a tree of parameters by their names, `optax.MaskedNode` counted as a leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_masked)
    return {parameter_name(path): leaf for path, leaf in leaves}


def is_masked(leaf: Any) -> bool:
    """Whether a leaf is the placeholder that `optax.masked` puts for a hidden parameter."""
    return isinstance(leaf, optax.MaskedNode)


def visible_layers(layers: Mapping[str, LayerSpec], tree: Any, what: str) -> list[str]:
    """The layers whose parameters a tree holds, not hidden behind `optax.MaskedNode`.

    Args:
      layers: the layers, by name.
      tree: parameters, or a tree of their structure.
      what: what the tree is, for the message.

    Returns:
      The names of the layers, in order.

    Raises:
      ValueError: a kernel or bias is missing, has another shape, or is hidden without the other.
    """
    leaves = named_leaves(tree)
    # A mask may hide a module whole: then the placeholder stands for the subtree.
    masked = [name for name, leaf in leaves.items() if is_masked(leaf)]
    visible = []
    for name, spec in layers.items():
        expected = {spec.kernel: spec.kernel_shape}
        if spec.bias is not None:
            expected[spec.bias] = (spec.d_out,)
        hidden = [p for p in expected if any(f"{p}/".startswith(f"{m}/") or not m for m in masked)]
        for parameter in expected.keys() - set(hidden):
            shape = jnp.shape(leaves[parameter]) if parameter in leaves else "nothing"
            if shape != expected[parameter]:
                msg = (
                    f"layer '{name}': {what} should hold '{parameter}' of shape {expected[parameter]}; "
                    f"found {shape}. Use the layers that find_layers returned for these parameters."
                )
                raise ValueError(msg)
        if 0 < len(hidden) < len(expected):
            msg = f"layer '{name}': mask its kernel and its bias together, in {what}."
            raise ValueError(msg)
        if not hidden:
            visible.append(name)
    return visible


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
    pairs = {(use.bias, kernel) for kernel, found in uses.items() for use in found}
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
