"""Which parameter a layer uses, also where transformations stand in between.

Outside of transformations a layer is given the very array that stands in `params`. Inside `nn.remat`,
`nn.scan`, `jax.jit` and so on it is given another one. So the library may put an entry next to the
kernel, in the same dictionary: it takes the same way through every transformation, its key says
whose neighbour it is, and what a backward pass leaves in it comes out sliced, stacked or summed exactly as the
kernel's gradient does.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from flax.core import FrozenDict

from tkfac_jax.layers.flax_nnx import accompany
from tkfac_jax.layers.layer_call import ROUTE_PREFIX, Call, LayerCall
from tkfac_jax.layers.parameter_tree import named_leaves, parameter_name

_tokens = itertools.count()


class Match(NamedTuple):
    """A parameter that a call uses.

    Attributes:
      name: its name in `params`.
      as_it_stands: the call was given the array in `params` itself.
      entry: what stands next to it, or None.
    """

    name: str
    as_it_stands: bool
    entry: Any


class Routes(NamedTuple):
    """Recognises parameters inside a function that was given `params`.

    Attributes:
      params: the parameters with the entries in them, for the function.
      owners: from the identity of a leaf to its name.
      entries: from the key of an entry to the name of the parameter that it stands next to.
      names: all names of parameters.
    """

    params: Any
    owners: Mapping[int, str]
    entries: Mapping[str, str]
    names: frozenset[str]

    @classmethod
    def through(cls, params: Any, entries: Mapping[str, Any]) -> "Routes":
        """Puts entries next to parameters, where those stand in a dictionary.

        Args:
          params: the parameters; no two leaves the same object.
          entries: from a parameter's name to what to put next to it.
        """
        leaves = named_leaves(params)
        # A key that was never used before: a function that was traced without it, or with another
        # Fisher function's, is traced again.
        token = next(_tokens)
        keys = {f"{ROUTE_PREFIX}{token}/{i}": name for i, name in enumerate(entries)}
        by_name = {name: key for key, name in keys.items()}

        def insert(node: Any, path: tuple[Any, ...]) -> Any:
            name = parameter_name(path)
            if isinstance(node, nnx.Variable):
                return accompany(node, by_name[name], entries[name]) if name in by_name else node
            if type(node) in (dict, FrozenDict):
                children = {}
                for key, child in node.items():
                    child_path = (*path, jax.tree_util.DictKey(key))
                    children[key] = insert(child, child_path)
                    key_of_entry = by_name.get(parameter_name(child_path))
                    if key_of_entry is not None and not isinstance(child, nnx.Variable):
                        children[key_of_entry] = entries[parameter_name(child_path)]
                return type(node)(children)
            below, treedef = jax.tree_util.tree_flatten_with_path(
                node, is_leaf=lambda other: other is not node
            )
            if len(below) == 1 and below[0][1] is node:
                return node
            return jax.tree.unflatten(
                treedef, [insert(child, (*path, *step)) for step, child in below]
            )

        # NNX refuses Variables of another trace than the one in which its transformations run.
        params = jax.tree.map(lambda leaf: leaf, params)
        routed = insert(params, ()) if entries else params
        owners = {id(leaf): name for name, leaf in leaves.items()}
        return cls(routed, owners, keys, frozenset(leaves))

    def match(self, call: Call, key: str) -> Match | None:
        """The parameter that a call has under a key of its own, or None if it cannot be told."""
        leaf = call.parameters[key]
        entry_name, entry = next(
            (
                (self.entries[route], value)
                for route, value in call.routes.items()
                if route in self.entries and self.entries[route].rpartition("/")[2] == key
            ),
            (None, None),
        )
        name = self.owners.get(id(leaf))
        if name is not None:
            return Match(name, True, entry if entry_name == name else None)
        if entry_name is not None:
            return Match(entry_name, False, entry)
        hint = call.names.get(key)
        return Match(hint, False, None) if hint in self.names else None

    def match_layer(self, call: Call, layer: LayerCall) -> tuple[Match | None, Match | None]:
        """The kernel and the bias of a layer's call."""
        found = []
        for array in (layer.kernel, layer.bias):
            key = next((k for k, leaf in call.parameters.items() if leaf is array), None)
            found.append(None if array is None or key is None else self.match(call, key))
        return found[0], found[1]


def split_arrays(tree: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
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
