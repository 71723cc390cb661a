"""A damping as an argument of compiled functions."""

from collections.abc import Sequence
from typing import Any

import jax

from tkfac_jax.curvature.damping import Damping


class _Identity:
    """Stands for an object that need not be hashable: only the same object is equal."""

    def __init__(self, value: Any):
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.value is other.value


def _without_array(leaf: Any) -> Any:
    """What is compared of a leaf: None for an array, a number itself, and of all else whether it is the same."""
    if isinstance(leaf, jax.Array):
        return None
    return leaf if isinstance(leaf, int | float) else _Identity(leaf)


@jax.tree_util.register_pytree_node_class
class DampingArgument:
    """A damping as an argument of compiled functions: its arrays are the leaves, and all else is its structure.

    The structures of two are equal if they are of one class, with equal numbers and otherwise the same objects.
    """

    def __init__(self, damping: Damping):
        """Takes the damping apart."""
        leaves, structure = jax.tree.flatten(damping)
        self._arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
        self._rest = structure, tuple(map(_without_array, leaves))

    @property
    def damping(self) -> Any:
        """The damping, with the arrays that this one has."""
        structure, rest = self._rest
        arrays = iter(self._arrays)
        leaves = [
            next(arrays) if leaf is None else leaf.value if isinstance(leaf, _Identity) else leaf
            for leaf in rest
        ]
        return jax.tree.unflatten(structure, leaves)

    def tree_flatten(self) -> tuple[list[Any], Any]:
        """The arrays, and all else."""
        return self._arrays, self._rest

    @classmethod
    def tree_unflatten(cls, auxiliary: Any, children: Sequence[Any]) -> "DampingArgument":
        """The inverse of `tree_flatten`; a child may be anything that JAX puts in an array's place."""
        new = object.__new__(cls)
        new._arrays, new._rest = list(children), auxiliary
        return new
