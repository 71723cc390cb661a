"""Moving averages of gradients that know no scale, and that nothing enters that is not finite."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from tkfac_jax.linalg.finite import all_finite


class MomentumState(NamedTuple):
    """The state of `nesterov_momentum`.

    Attributes:
      momentum: the momentum of each gradient, in at least float32.
    """

    momentum: Any


class AdamState(NamedTuple):
    """The state of `scale_by_adam_without_epsilon`; gradients that were left out do not count.

    Attributes:
      entered: by parameter, the number of gradients that entered.
      first: their moving average, in at least float32.
      second: that of their squares.
    """

    entered: Any
    first: Any
    second: Any


def nesterov_momentum(decay: float | Array) -> optax.GradientTransformation:
    """Momentum as Nesterov's, of the gradient: `m <- decay m + g`, then `decay m + g`.

    A gradient with an entry that is not finite is handed on as it is and leaves its momentum alone.
    """

    def init(params: Any) -> MomentumState:
        return MomentumState(jax.tree.map(_zeros, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, MomentumState]:
        del params

        def plus_gradient(gradient: Array, momentum: Array) -> Array:
            return decay * momentum + gradient.astype(momentum.dtype)

        def moved(gradient: Array, momentum: Array) -> Array:
            new = plus_gradient(gradient, momentum)
            return jnp.where(all_finite(new), new, momentum)

        def ahead(gradient: Array, momentum: Array) -> Array:
            return plus_gradient(gradient, momentum).astype(gradient.dtype)

        momentum = jax.tree.map(moved, updates, state.momentum)
        return jax.tree.map(ahead, updates, momentum), MomentumState(momentum)

    return optax.GradientTransformation(init, update)


def scale_by_adam_without_epsilon(
    b1: float = 0.9, b2: float = 0.99
) -> optax.GradientTransformation:
    """Adam's direction, the mean of gradients by the root of that of their squares, both without their bias.

    Without an epsilon it is the same for the loss and for any multiple of it. Where the mean of the squares is 0 there
    is no step. A gradient with an entry that is not finite makes no step and enters no mean.

    Source: Kingma and Ba 2015, Algorithm 1, with an epsilon of 0.
    """

    def init(params: Any) -> AdamState:
        numbers = jax.tree.map(lambda _: jnp.zeros((), jnp.int32), params)
        return AdamState(numbers, jax.tree.map(_zeros, params), jax.tree.map(_zeros, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, AdamState]:
        del params

        def moved(gradient: Array, number: Array, first: Array, second: Array) -> _Leaf:
            wide = gradient.astype(first.dtype)
            counted = jnp.asarray(optax.safe_increment(number))
            mean = b1 * first + (1 - b1) * wide
            squares = b2 * second + (1 - b2) * (wide * wide)
            # Squares of finite numbers may overflow.
            good = all_finite((mean, squares))
            step = _ratio(mean, squares, b1, b2, counted)
            return _Leaf(
                jnp.where(good, step, 0).astype(gradient.dtype),
                jnp.where(good, counted, number),
                jnp.where(good, mean, first),
                jnp.where(good, squares, second),
            )

        found = jax.tree.map(moved, updates, *state)
        step, *moments = (
            jax.tree.map(
                lambda leaf, at=at: leaf[at], found, is_leaf=lambda x: isinstance(x, _Leaf)
            )
            for at in range(4)
        )
        return step, AdamState(*moments)

    return optax.GradientTransformation(init, update)


class _Leaf(NamedTuple):
    """What an update makes of one leaf."""

    step: Array
    number: Array
    first: Array
    second: Array


def _ratio(mean: Array, squares: Array, b1: float, b2: float, number: Int[Array, ""]) -> Array:
    exponent = number.astype(mean.dtype)
    mean = mean / (1 - b1**exponent)
    squares = squares / (1 - b2**exponent)
    return jnp.where(squares > 0, mean / jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)


def _zeros(leaf: Any) -> Array:
    return jnp.zeros_like(leaf, jnp.promote_types(leaf.dtype, jnp.float32))
