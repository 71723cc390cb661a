"""The Optax transformations: `scale_by_tkfac`, and the complete optimizers `tkfac` and `kfac`."""

import inspect
from collections.abc import Callable
from typing import Any

import optax
from jax.sharding import Mesh
from jaxtyping import Array

from tkfac_jax.curvature import Averaging, Curvature, Share
from tkfac_jax.damping import Damping, TraceDamping, Value, factored_damping, normal_damping
from tkfac_jax.factors import Decay
from tkfac_jax.inverses import Inverse, cholesky_inverse
from tkfac_jax.layers import Layers
from tkfac_jax.schedule import Interval, Intervals, Missing, renew
from tkfac_jax.storage import Storage

DEFAULT_FALLBACK = optax.adam(1e-3)


def scale_by_tkfac(
    layers: Layers,
    *,
    damping: Value | Damping = 1e-3,
    decay: Decay = 0.95,
    fisher_interval: Interval = 1,
    inverse_interval: Interval = 1,
    averaging: Averaging = "factors",
    norm_constraint: float | Array | None = None,
    inverse: Inverse | None = None,
    factor_dtype: Any = None,
    inverse_dtype: Any = None,
    spread_inverses: bool = False,
    axis_name: str | None = None,
    mesh: Mesh | None = None,
    shard_state: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Preconditions the gradients of the layers with TKFAC's approximation of the inverse Fisher.

    A layer's gradient `W` as a matrix becomes `Phi^-1 W Psi^-1` with the damped, averaged factors. All
    other leaves, and `optax.MaskedNode`, pass through unchanged.

    The update function is `update(grads, state, params=None, *, statistics, refresh_inverses=None)`:

    * `statistics` is a function without arguments that returns the statistics, called inside
      `lax.cond` at every `fisher_interval`-th step only; or the statistics themselves, which are then used
      at this step; or None, for a step that leaves the factors alone.
    * `refresh_inverses`: None refreshes the inverses at every `inverse_interval`-th step, inside
      `lax.cond`; a Python bool decides when the program is compiled; a `Share` refreshes those of one share of
      the layers.

    Statistics that are not finite are skipped and counted; so are inversions that fail even with
    more damping, where the old inverse stays; and a layer whose step is not finite makes none.

    Args:
      layers: what `find_layers` returned.
      damping: the damping of the factors, in units of curvature: a positive number, a schedule (a
        function of the step) or a traced scalar, which mean `normal_damping`; or the result of
        `normal_damping`, `trace_damping` or `factored_damping`.
      decay: epsilon, the weight of the old average: a number in [0, 1), where the first update
        replaces, or a function of the number of earlier factor updates.
      fisher_interval: T_FIM, steps between new statistics.
      inverse_interval: T_INV, steps between new inverses.
      averaging: `"factors"` averages the damped factors, as Eqs. (5.18) and (5.19); `"moments"` averages
        the statistics and damps them when they are inverted.
      norm_constraint: bound on `<update, gradient>`, in units of the loss; see `precondition`. It
        comes before the learning rate.
      inverse: inverts a stack `(n, d, d)` of symmetric positive definite matrices, with NaN where
        that fails; None is `cholesky_inverse`. Not called at `init`, where there is nothing but damping. One with a
        method `improve`, such as `newton_schulz_inverse()`, starts at the inverses in use.
      factor_dtype: dtype in which the factors are stored, such as `jnp.bfloat16` to save memory; None: the dtype
        of the layer's statistics, at least float32. Averages are computed in the wider of the two.
      inverse_dtype: dtype in which the inverses are stored, likewise; they are computed, and multiplied
        with, in at least float32.
      spread_inverses: spreads new inverses over the interval, a few layers at a time, so that no step takes
        much longer than others; the first step refreshes all.
      axis_name: mapped axis of `jax.pmap` or `jax.shard_map`: statistics are averaged over it, if their Fisher
        function has not done it, and the inversions are divided among its devices.
      mesh: mesh of a program under `jax.jit`, among whose devices the inversions are divided.
      shard_state: with `mesh`, factors and inverses are divided over its devices, not kept whole on each; see
        `state_shardings`. Where no axis divides evenly, they are filled up with zeros.

    Returns:
      The transformation; its state is a `TkfacState`.

    Raises:
      ValueError: an argument is out of range; at `init`, the parameters do not match the layers; at
        `update`, the gradients or statistics do not.
      TypeError: at `update`, `statistics` is not given.

    Source: Gao et al. 2021, Algorithm 1.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, optax, tkfac_jax as tkfac
      >>> model = nn.Dense(2)
      >>> x = jnp.ones((5, 3))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> predict = lambda params, x: model.apply({"params": params}, x)
      >>> layers = tkfac.find_layers(predict, params, x)
      >>> fisher = tkfac.sampled_fisher(predict, tkfac.Normal(), layers)
      >>> optimizer = optax.chain(tkfac.scale_by_tkfac(layers), optax.scale(-0.1))
      >>> state = optimizer.init(params)
      >>> grads = jax.grad(lambda params: predict(params, x).sum())(params)
      >>> statistics = fisher(params, x, key=jax.random.key(1))
      >>> updates, state = optimizer.update(grads, state, params, statistics=statistics)
      >>> int(optax.tree.get(state, "step"))
      1
    """
    check_options(layers, decay, averaging)
    check_devices(axis_name, mesh, shard_state)
    intervals = Intervals.checked(fisher_interval, inverse_interval, spread_inverses)
    if norm_constraint is not None:
        check_number(
            "norm_constraint", norm_constraint, lambda value: value > 0, "a positive number"
        )
    curvature = Curvature(
        layers,
        damping if isinstance(damping, Damping) else normal_damping(damping),
        decay,
        averaging,
        cholesky_inverse if inverse is None else inverse,
        Storage(factor_dtype, inverse_dtype, mesh, shard_state),
        axis_name,
        norm_constraint,
    )

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        statistics: Any = Missing,
        refresh_inverses: bool | Share | None = None,
        **extra_args: Any,
    ) -> tuple[Any, Any]:
        del params, extra_args
        active = curvature.active(updates, state)
        state = renew(curvature, intervals, state, active, statistics, refresh_inverses)
        updates, counted = curvature.precondition(updates, state, active)
        return updates, state._replace(step=optax.safe_increment(state.step), **counted)

    return optax.GradientTransformationExtraArgs(curvature.init, update)


def tkfac(
    learning_rate: optax.ScalarOrSchedule,
    layers: Layers,
    *,
    momentum: float | Array = 0.9,
    weight_decay: float | Array = 0.0,
    mask: Any = None,
    fallback: optax.GradientTransformation = DEFAULT_FALLBACK,
    damping: Value | Damping = 1e-3,
    decay: Decay = 0.95,
    fisher_interval: Interval = 1,
    inverse_interval: Interval = 1,
    averaging: Averaging = "factors",
    norm_constraint: float | Array | None = None,
    inverse: Inverse | None = None,
    factor_dtype: Any = None,
    inverse_dtype: Any = None,
    spread_inverses: bool = False,
    axis_name: str | None = None,
    mesh: Mesh | None = None,
    shard_state: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """TKFAC, Algorithm 1 of the paper, on the layers; a complete optimizer of its own for all else.

    On the layers: precondition, add decoupled weight decay, multiply by minus the learning rate,
    then momentum on the scaled step, `m <- momentum m + zeta`, `w <- w + m`.

    Args:
      learning_rate: alpha, of the layers: a number or a schedule.
      layers: what `find_layers` returned.
      momentum: tau; 0 keeps no momentum.
      weight_decay: decoupled weight decay of the layers, multiplied by the learning rate.
      mask: which of the layers' parameters decay, as in `optax.add_decayed_weights`; None: all.
      fallback: optimizer of the other parameters, with its own learning rate; `optax.adam(1e-3)` if
        none is given.
      damping: see `scale_by_tkfac`, as are all further arguments.
      decay: epsilon, the weight of the old average.
      fisher_interval: T_FIM, steps between new statistics.
      inverse_interval: T_INV, steps between new inverses.
      averaging: `"factors"` or `"moments"`.
      norm_constraint: bound on `<update, gradient>`, before the learning rate.
      inverse: inverts stacks of matrices; None is `cholesky_inverse`.
      factor_dtype: dtype in which the factors are stored.
      inverse_dtype: dtype in which the inverses are stored.
      spread_inverses: spreads new inverses over the interval.
      axis_name: mapped axis over which statistics are averaged and inversions divided.
      mesh: mesh of a program under `jax.jit`, among whose devices the inversions are divided.
      shard_state: with `mesh`, factors and inverses are divided over its devices.

    Returns:
      The optimizer; its update function takes `statistics`, see `scale_by_tkfac`.

    Raises:
      ValueError, TypeError: see `scale_by_tkfac`.

    Source: Gao et al. 2021, Algorithm 1.
    """
    check_number("momentum", momentum, lambda value: 0 <= value < 1, "a number in [0, 1)")
    check_number("weight_decay", weight_decay, lambda value: value >= 0, "a number of at least 0")
    steps: list[optax.GradientTransformation] = [
        scale_by_tkfac(
            layers,
            damping=damping,
            decay=decay,
            fisher_interval=fisher_interval,
            inverse_interval=inverse_interval,
            averaging=averaging,
            norm_constraint=norm_constraint,
            inverse=inverse,
            factor_dtype=factor_dtype,
            inverse_dtype=inverse_dtype,
            spread_inverses=spread_inverses,
            axis_name=axis_name,
            mesh=mesh,
            shard_state=shard_state,
        )
    ]
    if not _is_zero(weight_decay):
        steps.append(optax.add_decayed_weights(weight_decay, mask))
    steps.append(optax.scale_by_learning_rate(learning_rate))
    if not _is_zero(momentum):
        steps.append(optax.trace(momentum))
    return with_fallback(optax.chain(*steps), fallback, layers)


def kfac(
    learning_rate: optax.ScalarOrSchedule,
    layers: Layers,
    *,
    damping: Value | Damping = 1e-3,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """KFAC, the paper's baseline, on the machinery of `tkfac`.

    Its statistics must come from a Fisher function built with `rule=tkfac_jax.independent`.

    Args:
      learning_rate: learning rate of the layers: a number or a schedule.
      layers: what `find_layers` returned.
      damping: a bare value is the lambda of `factored_damping`; or a damping.
      **options: see `tkfac`, whose other arguments are all taken.

    Returns:
      The optimizer; see `tkfac`.

    Raises:
      ValueError: `damping` is trace damping, which is defined for the trace-restricted rule; and see
        `scale_by_tkfac`.

    Source: Martens and Grosse 2015.
    """
    if isinstance(damping, TraceDamping):
        msg = "trace damping is defined for TKFAC; give kfac a number or factored_damping(...)."
        raise ValueError(msg)
    damper = damping if isinstance(damping, Damping) else factored_damping(damping)
    return tkfac(learning_rate, layers, damping=damper, **options)


# optax.inject_hyperparams reads the signature to know what can be injected.
kfac.__signature__ = inspect.signature(tkfac)  # pyright: ignore[reportFunctionMemberAccess]


def with_fallback(
    optimizer: optax.GradientTransformation, fallback: optax.GradientTransformation, layers: Layers
) -> optax.GradientTransformationExtraArgs:
    """An optimizer for the layers' parameters, and another for all else."""
    # A gradient that is not finite must not reach the fallback's averages.
    guarded = optax.apply_if_finite(fallback, max_consecutive_errors=2**31 - 1)
    return optax.partition({"tkfac": optimizer, "fallback": guarded}, layers.labels)


def _is_zero(value: Any) -> bool:
    return isinstance(value, int | float) and value == 0


def check_options(layers: Any, decay: Any, averaging: Any = "moments") -> None:
    """Refuses options of the factors that are wrong."""
    if not isinstance(layers, Layers):
        msg = f"layers is {type(layers).__name__}; expected what find_layers(predict, params, ...) returned."
        raise ValueError(msg)
    check_number("decay", decay, lambda value: 0 <= value < 1, "a number in [0, 1) or a function")
    if averaging not in ("factors", "moments"):
        msg = f'averaging={averaging!r}; expected "factors" or "moments".'
        raise ValueError(msg)


def check_devices(axis_name: Any, mesh: Any, shard_state: bool) -> None:
    """Refuses options of several devices that do not go together."""
    if axis_name is not None and mesh is not None:
        msg = (
            f"axis_name={axis_name!r} and a mesh are given; expected one of them: axis_name under jax.pmap and "
            "jax.shard_map, mesh under jax.jit."
        )
        raise ValueError(msg)
    if mesh is not None and not isinstance(mesh, Mesh):
        msg = f"mesh is {type(mesh).__name__}; expected a jax.sharding.Mesh, as of jax.make_mesh(...)."
        raise ValueError(msg)
    if shard_state and mesh is None:
        msg = "shard_state=True needs the mesh over which the state is divided: give mesh=..."
        raise ValueError(msg)


def check_number(name: str, value: Any, allowed: Callable[[Any], bool], expected: str) -> None:
    """Checks numbers only: a traced scalar or a function has no value yet."""
    if isinstance(value, int | float) and not allowed(value):
        msg = f"{name}={value}; expected {expected}."
        raise ValueError(msg)
