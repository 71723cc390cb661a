"""Where arrays live: on which axes of a mesh they vary, how they are divided, and who decides that.

Inside `jax.shard_map` with checked replication, each array's type says over which mesh axes it varies. On a
mesh with `AxisType.Explicit` axes the type says how the array is divided, and JAX refuses products for which that
is ambiguous. Outside of both, nothing here does anything.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

# Arrays with fewer numbers than this are kept whole on every device.
SMALLEST_DIVIDED = 4096


def varying_axes(tree: Any) -> frozenset[str]:
    """The mesh axes over which any array of a tree varies, as far as JAX keeps account of them."""
    axes: frozenset[str] = frozenset()
    for leaf in jax.tree.leaves(tree):
        kind = leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.typeof(leaf)
        manual = getattr(kind, "manual_axis_type", None)
        # Until JAX 0.9 the axes stood in `vma`.
        own = getattr(kind, "vma", None) if manual is None else manual.varying
        axes |= own or frozenset()
    return axes


def vary(tree: Any, axes: frozenset[str]) -> Any:
    """A tree whose arrays vary over some mesh axes at least, as types go: the values stay."""

    def one(leaf: Any) -> Any:
        missing = tuple(sorted(axes - varying_axes(leaf)))
        if not missing:
            return leaf
        if hasattr(jax.lax, "pcast"):
            return jax.lax.pcast(leaf, missing, to="varying")
        # JAX 0.8.
        return jax.lax.pvary(leaf, missing)  # pyright: ignore[reportAttributeAccessIssue]

    return jax.tree.map(one, tree)


def sum_over(function: Callable[[Any], Any], values: Any) -> Any:
    """The sum of a function over the first axis of its argument, one value at a time."""
    first = jax.eval_shape(function, jax.tree.map(lambda v: v[0], values))
    zeros = jax.tree.map(
        lambda leaf: vary(jnp.zeros(leaf.shape, leaf.dtype), varying_axes(leaf)), first
    )
    return jax.lax.scan(
        lambda total, value: (jax.tree.map(jnp.add, total, function(value)), None), zeros, values
    )[0]


def mean_over(tree: Any, axis_name: Any) -> Any:
    """The mean of a tree over a mapped axis; None is no axis."""
    if axis_name is None:
        return tree
    if is_checked(axis_name) and not varying_axes(tree) & _names(axis_name):
        return tree
    return jax.lax.pmean(tree, axis_name)


def is_checked(axis_name: Any) -> bool:
    """Whether JAX keeps account of what varies over a mapped axis."""
    return bool(varying_axes(jax.lax.axis_index(axis_name)))


def _names(axis_name: Any) -> frozenset[str]:
    return frozenset((axis_name,) if isinstance(axis_name, str) else axis_name)


def automatic(function: Callable[..., Any], *args: Any, out: Any) -> Any:
    """Calls a function whose arrays the compiler may divide as it likes.

    Args:
      function: the function.
      *args: its arguments.
      out: the `PartitionSpec` of its results on a mesh with explicit axes, or a tree of them.

    Returns:
      What the function returns.
    """
    mesh = _explicit_mesh(args)
    if mesh is None:
        return function(*args)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.sharding.auto_axes(function, out_sharding=out)(*args)


def specs_of(tree: Any) -> Any:
    """How the arrays of a tree are divided, as far as their types say."""
    return jax.tree.map(lambda leaf: jax.typeof(leaf).sharding.spec, tree)


def _explicit_mesh(tree: Any) -> Any:
    for leaf in jax.tree.leaves(tree):
        mesh = jax.typeof(leaf).sharding.mesh
        if AxisType.Explicit in mesh.axis_types:
            return mesh
    return None


def divided_axis(shape: tuple[int, ...], devices: int) -> int | None:
    """The axis along which an array is divided among devices; None if it is too small to be.

    It is the first that divides evenly, or else the longest, which then has to be filled up.
    """
    if devices == 1 or math.prod(shape) < SMALLEST_DIVIDED:
        return None
    even = [axis for axis, size in enumerate(shape) if size % devices == 0]
    return even[0] if even else shape.index(max(shape))


def may_be_filled_up(shape: tuple[int, ...]) -> bool:
    """Whether an array of a shape is large enough to be divided, and so to be filled up for that, on some mesh."""
    return math.prod(shape) >= SMALLEST_DIVIDED


def spec_of_shape(shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """How an array of a state is divided over all axes of a mesh; whole where it cannot be evenly."""
    axis = divided_axis(shape, mesh.size)
    if axis is None or shape[axis] % mesh.size:
        return PartitionSpec()
    return PartitionSpec(*(None,) * axis, mesh.axis_names)


def place(array: Array, mesh: Mesh, divided: bool) -> Array:
    """An array of a state where it belongs: divided over a mesh and filled up for that, or whole on each device."""
    axis = divided_axis(array.shape, mesh.size) if divided else None
    if axis is not None:
        missing = -array.shape[axis] % mesh.size
        array = jnp.pad(array, [(0, missing if i == axis else 0) for i in range(array.ndim)])
    spec = spec_of_shape(array.shape, mesh) if divided else PartitionSpec()
    context = jax.sharding.get_abstract_mesh()
    current = mesh if context.empty else context
    if AxisType.Explicit in current.axis_types:
        return jax.sharding.reshard(array, NamedSharding(current, spec))
    return jax.lax.with_sharding_constraint(array, NamedSharding(current, spec))


def unfilled(array: Array, shape: tuple[int, ...]) -> Array:
    """An array without what `place` has filled it up with."""
    return array if array.shape == shape else array[tuple(map(slice, shape))]
