"""The names of parameters, and trees of parameters by these names."""

from collections.abc import Mapping
from typing import Any

import jax
import optax


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


def visible_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a tree of parameters by their names, but for those hidden behind `optax.MaskedNode`."""
    return {name: leaf for name, leaf in named_leaves(tree).items() if not is_masked(leaf)}


def replace_leaves(tree: Any, new: Mapping[str, Any]) -> Any:
    """A tree of parameters with other leaves under some of the names."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: new.get(parameter_name(path), leaf), tree, is_leaf=is_masked
    )


def is_masked(leaf: Any) -> bool:
    """Whether a leaf is the placeholder that `optax.masked` puts for a hidden parameter."""
    return isinstance(leaf, optax.MaskedNode)
