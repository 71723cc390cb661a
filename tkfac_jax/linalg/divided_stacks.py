"""Dividing the inversion of many matrices among devices.

Matrices are sorted by size and dealt out in rounds, one to each device, the largest first. A round is one
stack, in which matrices are filled up to the size of its first; rounds of one size are one stack. As
neighbours in the order are of similar size little is added, and every device does the same. Sizes that are
nearly equal, as of a layer's inputs with a bias and another's outputs, are one stack on a single device, too: a
program is compiled for each stack.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float

from tkfac_jax.linalg.meshes import is_checked

StackFunction = Callable[["Stack"], Any]

# Sizes are nearly equal that differ by one, or by one in so many.
NEARLY = 128


class Piece(NamedTuple):
    """Matrices `start` to `stop` of all those of one size."""

    size: int
    start: int
    stop: int


class Stack(NamedTuple):
    """Matrices of one size, and what is known of them.

    Attributes:
      matrices: shape `(n, size, size)`.
      guesses: what their inverses might be, in the same shape; or None.
    """

    matrices: Array
    guesses: Array | None = None

    def taken(self, start: int, stop: int) -> "Stack":
        """Some of them."""
        return jax.tree.map(lambda array: array[start:stop], self)

    def identities(self, count: int) -> "Stack":
        """So many identity matrices of the same size and dtype, with the right guesses if there are any."""

        def one(array: Array) -> Array:
            size = array.shape[-1]
            return jnp.broadcast_to(jnp.eye(size, dtype=array.dtype), (count, size, size))

        return jax.tree.map(one, self)

    def filled(self, size: int) -> "Stack":
        """Filled up to a size with the mean diagonal of each, so that scale and condition stay theirs."""
        own = self.matrices.shape[-1]
        if own == size:
            return self
        mean = jnp.diagonal(self.matrices, axis1=-2, axis2=-1).sum(-1) / own
        return Stack(
            _filled(self.matrices, mean, size),
            None if self.guesses is None else _filled(self.guesses, 1 / mean, size),
        )


class Devices(NamedTuple):
    """The devices that divide the work; one, if neither a mapped axis nor a mesh is given.

    Attributes:
      axis_name: mapped axis of `jax.pmap` or `jax.shard_map`, on which all devices hold the same matrices.
      mesh: mesh over whose devices a program under `jax.jit` is divided.
      divided: with a mesh, each device is left with the results of its own share, not with those of all.
    """

    axis_name: Any = None
    mesh: Mesh | None = None
    divided: bool = False

    def number(self) -> int:
        """The number of devices."""
        if self.axis_name is not None:
            return jax.lax.axis_size(self.axis_name)
        return 1 if self.mesh is None else self.mesh.size

    def map(
        self, function: StackFunction, stack: Stack
    ) -> tuple[Float[Array, "n size size"], Bool[Array, " n"]]:
        """Applies a function to a stack, each device to an equal share of it.

        Args:
          function: from matrices to as many matrices and flags, one by one.
          stack: the matrices, a multiple of the number of devices.

        Returns:
          What the function returns for the whole stack.
        """
        if self.axis_name is not None:
            share = len(stack.matrices) // self.number()
            start = jax.lax.axis_index(self.axis_name) * share
            own = jax.tree.map(
                lambda array: jax.lax.dynamic_slice_in_dim(array, start, share), stack
            )
            matrices, flags = function(own)
            return _gather(matrices, self.axis_name), _gather(flags, self.axis_name)
        if self.mesh is None:
            return function(stack)
        context = jax.sharding.get_abstract_mesh()
        mesh = self.mesh if context.empty else context
        axes = mesh.axis_names

        # What is wanted whole is gathered here, once for the stack: from one that is divided, the compiler
        # would fetch every matrix by itself.
        def on_own(own: Stack) -> tuple[Array, Array]:
            results = function(own)
            return results if self.divided else jax.tree.map(gather, results)

        gather = functools.partial(_gather, axis_name=axes)
        share, whole = PartitionSpec(axes), PartitionSpec()
        # A constraint on the stack would not do: what is done matrix by matrix is a loop on CPUs, which the
        # compiler does not divide.
        return jax.shard_map(
            on_own,
            mesh=mesh,
            in_specs=share,
            out_specs=share if self.divided else whole,
            check_vma=False,
        )(stack)


def _gather(own: Array, axis_name: Any) -> Array:
    """The shares of all devices, one after the other."""
    if not is_checked(axis_name):
        return jax.lax.all_gather(own, axis_name, tiled=True)
    # What all devices gather is the same on all, which has to be said where JAX checks it.
    if hasattr(jax.lax, "all_gather_invariant"):  # JAX 0.8
        gather = jax.lax.all_gather_invariant  # pyright: ignore[reportAttributeAccessIssue]
        return gather(own, axis_name, tiled=True)
    return jax.lax.all_gather(own, axis_name, tiled=True, to="invarying")


def map_matrices(
    function: StackFunction,
    groups: Mapping[int, Sequence[Stack]],
    devices: Devices,
) -> dict[int, Any]:
    """Applies a function to all matrices, divided among devices.

    Args:
      function: from a stack of n matrices to a pair of matrices `(n, size, size)` and an array `(n,)` of flags,
        matrix by matrix. What a matrix is filled up with, a multiple of the identity, must not matter to the rest of
        its result.
      groups: by size, all matrices of that size, in parts: with guesses in all of them, or in none.
      devices: the devices.

    Returns:
      By size, what the function returns for the matrices.
    """
    found: dict[int, list[Any]] = {size: [] for size in groups}
    counts = {size: sum(len(part.matrices) for part in parts) for size, parts in groups.items()}
    count = devices.number()
    ended: Array | None = None
    for pieces in deal(counts, count):
        largest = pieces[0].size
        parts = [
            _after(ended, part).filled(largest)
            for piece in pieces
            for part in _taken(groups[piece.size], piece)
        ]
        missing = -sum(len(part.matrices) for part in parts) % count
        if missing:
            parts.append(parts[0].identities(missing))
        matrices, flags = devices.map(function, _joined(parts))
        if count == 1:
            # Always true, which the compiler does not know: it would put all stacks together before it works on the
            # first one, and hold them all in memory.
            ended = flags.sum() >= 0
        start = 0
        for size, first, stop in pieces:
            end = start + stop - first
            found[size].append((matrices[start:end, :size, :size], flags[start:end]))
            start = end
    return {size: _joined(results) for size, results in found.items()}


def _taken(parts: Sequence[Stack], piece: Piece) -> list[Stack]:
    """The matrices of a piece, in parts."""
    taken, start = [], 0
    for part in parts:
        count = len(part.matrices)
        first, last = max(piece.start - start, 0), min(piece.stop - start, count)
        taken += [part.taken(first, last)] if first < last else []
        start += count
    return taken


def _after(ended: Array | None, part: Stack) -> Stack:
    """The same matrices, not before something has ended."""
    return part if ended is None else jax.tree.map(lambda array: jnp.where(ended, array, 0), part)


def _joined(parts: Sequence[Any]) -> Any:
    """Trees of arrays, one after the other; a single one is not copied."""
    return (
        jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *parts)
        if len(parts) > 1
        else parts[0]
    )


def deal(counts: Mapping[int, int], devices: int) -> list[list[Piece]]:
    """Deals matrices out to devices.

    Args:
      counts: by size, how many matrices there are.
      devices: the number of devices.

    Returns:
      The stacks, each as the pieces that it consists of, the largest first. Only where nothing smaller is left
      is a stack not a multiple of the number of devices.
    """
    stacks: list[list[Piece]] = []
    free = 0
    for size in sorted(counts, reverse=True):
        count = counts[size]
        largest = stacks[-1][0].size if stacks else math.inf
        if largest - size <= max(1, size // NEARLY):
            stacks[-1].append(Piece(size, 0, count))
            free = (free - count) % devices
            continue
        taken = min(free, count)
        if taken:
            stacks[-1].append(Piece(size, 0, taken))
            free -= taken
        if taken < count:
            stacks.append([Piece(size, taken, count)])
            free = -(count - taken) % devices
    return stacks


def _filled(
    matrices: Float[Array, "n size size"], diagonal: Float[Array, " n"], size: int
) -> Float[Array, "n larger larger"]:
    """Matrices of a larger size, with a number of each one's own on the rest of the diagonal."""
    own = matrices.shape[-1]
    rest = diagonal[:, None] * (jnp.arange(size) >= own)
    wider = jnp.pad(matrices, ((0, 0), (0, size - own), (0, size - own)))
    return wider + rest[:, :, None] * jnp.eye(size, dtype=matrices.dtype)
