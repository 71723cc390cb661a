"""The number of the next step, kept on the host."""

import functools
from typing import Any

import jax
import numpy as np

from tkfac_jax.curvature.state import TkfacState, find_state
from tkfac_jax.optimizers.accumulation import AccumulationState
from tkfac_jax.optimizers.adaptive_state import find_adaptive

ACCUMULATING = (
    "the optimizer is one of multi_steps, whose steps make_train_step cannot tell apart from micro-steps: give "
    "make_train_step the optimizer itself and whole batches, or write the step by hand."
)


def is_on_cpu(array: Any) -> bool:
    """Whether an array is on a CPU, or will be."""
    if isinstance(array, jax.Array):
        return next(iter(array.devices())).platform == "cpu"
    return jax.default_backend() == "cpu"


def _accumulates(opt_state: Any) -> bool:
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda leaf: isinstance(leaf, AccumulationState))
    return any(isinstance(leaf, AccumulationState) for leaf in leaves)


class StepCounter:
    """The number of the next step, kept on the host so that picking a program waits for no device."""

    def __init__(self) -> None:
        self._where: Any = ()
        self._number = 0
        self._seen: Any = None
        self.warmup_left = 0
        self.damping_interval = 0
        self.adaptive = False
        self.on_cpu = False

    def read(self, opt_state: Any) -> int:
        """The number of the step that `opt_state` is about to make; in a warm-up, of the one after that."""
        step = self._state(opt_state).step
        if step is not self._seen:
            if _accumulates(opt_state):
                raise ValueError(ACCUMULATING)
            self._number = _on_host(step)
            adaptive = find_adaptive(opt_state)
            self.adaptive = adaptive is not None
            self.on_cpu = is_on_cpu(step)
            self.warmup_left = 0 if adaptive is None else _on_host(adaptive.warmup_left)
            self.damping_interval = 0 if adaptive is None else _on_host(adaptive.damping_interval)
        return self._number

    def advance(self, opt_state: Any) -> None:
        """Counts one step, which returned `opt_state`."""
        if self.warmup_left:
            self.warmup_left -= 1
        else:
            self._number += 1
        self._seen = self._state(opt_state).step

    def _state(self, opt_state: Any) -> TkfacState:
        """The `TkfacState` in a state: where the last one was, if it is there, which is found much faster."""
        try:
            found = functools.reduce(_entry, self._where, opt_state)
        except (AttributeError, IndexError, KeyError, TypeError):
            found = None
        if not isinstance(found, TkfacState):
            found = find_state(opt_state)
            paths, _ = jax.tree.flatten_with_path(opt_state, is_leaf=lambda leaf: leaf is found)
            self._where = next(path for path, leaf in paths if leaf is found)
        return found


def _entry(tree: Any, key: Any) -> Any:
    """What a key of a path stands for in a tree."""
    match key:
        case jax.tree_util.GetAttrKey(name=name):
            return getattr(tree, name)
        case jax.tree_util.SequenceKey(idx=index):
            return tree[index]
        case jax.tree_util.DictKey(key=name):
            return tree[name]
        case _:
            raise TypeError(key)


def _on_host(number: Any) -> int:
    # Of a number that several processes hold, each can read its own copy.
    own = number.addressable_data(0) if isinstance(number, jax.Array) else number
    return int(np.asarray(own).flat[0])
