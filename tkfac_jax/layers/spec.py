"""What is known about the layers of a model: `LayerSpec`, `Layers`, and the names of parameters."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tkfac_jax.layers.kernel_matrix import Layout
from tkfac_jax.layers.parameter_tree import is_masked, named_leaves, parameter_name
from tkfac_jax.layers.row_forms import Convolution
from tkfac_jax.linalg.factor_structure import Structure

# Part of the format of states: it decides, when layers are found, in which shapes their inverses are kept, and a state
# of other shapes is refused. Kernels of no more entries are preconditioned together with their bias: XLA takes long to
# compile the products of single rows for a CPU, and copying such a kernel takes next to nothing.
LARGEST_JOINED = 2**16


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """What is known about one layer without looking at numbers.

    A layer whose kernel is several independent matrices (the layers of a stack, the groups of a
    convolution) has as many factors, along leading axes of all its arrays: `batch`.

    Attributes:
      name: the layer's place in `params`, such as `"encoder/Dense_0"`.
      kind: `"dense"`, `"conv"`, `"embed"` or `"norm"`.
      kernel: name of the kernel among the parameters, such as `"encoder/Dense_0/kernel"`.
      bias: name of the bias, or None.
      kernel_shape: shape of the kernel.
      bias_shape: shape of the bias, or None.
      dtype: name of the dtype of the layer's statistics and factors, at least float32.
      layout: how kernel and bias are matrices.
      phi: how the input factor is stored.
      psi: how the output factor is stored.
      stack: leading axes of the kernel along which layers are stacked, by their sizes; usually none.
      routed: the kernel reaches the layer through transformations, and the layer's statistics leave
        them through an entry next to the kernel in `params`; see `routes`.
      named: the kernel is recognised by the name that was given to `tag`.
      geometry: for a convolution, how it visits its input; otherwise None.
      bias_apart: the state keeps the bias's row of the input factor's inverse in an array of its own.
      makes_outputs: the layer is the last that makes an array of the function's outputs, as far as shapes tell.
    """

    name: str
    kind: str
    kernel: str
    bias: str | None
    kernel_shape: tuple[int, ...]
    bias_shape: tuple[int, ...] | None
    dtype: str
    layout: Layout
    phi: Structure
    psi: Structure
    stack: tuple[int, ...] = ()
    routed: bool = False
    named: bool = False
    geometry: Convolution | None = None
    bias_apart: bool = False
    makes_outputs: bool = False

    @property
    def has_bias(self) -> bool:
        """Whether the layer has a bias, the last row of its kernel as a matrix."""
        return self.bias is not None

    @property
    def d_in(self) -> int:
        """Rows of the kernel as a matrix, the homogeneous coordinate of a bias counted."""
        return self.layout.d_in

    @property
    def d_out(self) -> int:
        """Columns of the kernel as a matrix."""
        return self.layout.d_out

    @property
    def batch(self) -> tuple[int, ...]:
        """Leading axes of the layer's factors; `()` for a layer that is one matrix."""
        return (*self.stack, *self.layout.batch)

    @property
    def num_bytes(self) -> int:
        """Memory of the layer's factors and their inverses."""
        numbers = math.prod(self.phi.shape) + math.prod(self.psi.shape)
        return 2 * math.prod(self.batch) * numbers * np.dtype(self.dtype).itemsize


def keeps_bias_apart(layout: Layout, phi: Structure) -> bool:
    """Whether the bias is one row of an input factor that is stored whole, and the kernel is large."""
    large = layout.d_in * layout.d_out > LARGEST_JOINED
    return large and phi.kind == "full" and layout.bias_rows == 1


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

    @property
    def parameters(self) -> frozenset[str]:
        """The names of the layers' kernels and biases."""
        names = (name for spec in self.values() for name in (spec.kernel, spec.bias))
        return frozenset(name for name in names if name is not None)

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
        owned = self.parameters
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "tkfac" if parameter_name(path) in owned else "fallback", params
        )

    def __str__(self) -> str:
        rows = [("layer", "kind", "d_in", "d_out", "MB")]
        rows += [
            (s.name, _kind(s), str(s.phi), str(s.psi), f"{s.num_bytes / 1e6:.3f}")
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


def _kind(spec: LayerSpec) -> str:
    """The kind of a layer, and of how many matrices it consists."""
    return " x ".join([spec.kind, *map(str, spec.batch)])


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
        expected: dict[str, tuple[int, ...]] = {spec.kernel: spec.kernel_shape}
        if spec.bias is not None:
            expected[spec.bias] = spec.bias_shape or ()
        hidden = [p for p in expected if any(f"{p}/".startswith(f"{m}/") or not m for m in masked)]
        for parameter in (p for p in expected if p not in hidden):
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
