"""The complete optimizer `tkfacw`: nothing in it knows the scale of the loss."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from tkfac_jax.curvature.damping import Damping, Value, relative_damping
from tkfac_jax.curvature.factors import Decay
from tkfac_jax.curvature.state import Averaging
from tkfac_jax.fisher.layer_statistics import Rule
from tkfac_jax.layers.spec import Layers
from tkfac_jax.linalg.inversion import Inverse
from tkfac_jax.optimizers.gradient_moments import nesterov_momentum, scale_by_adam_without_epsilon
from tkfac_jax.optimizers.layer_lengths import keep_in_norm_ball, scale_by_layer_norm_ratio
from tkfac_jax.optimizers.option_checks import check_number, is_zero
from tkfac_jax.optimizers.plan import PlannedTransformation, with_plan
from tkfac_jax.optimizers.preconditioner import scale_by_tkfac
from tkfac_jax.optimizers.refresh_schedule import Interval
from tkfac_jax.optimizers.tkfac_and_kfac import with_fallback

# The weight of the past in averages of the factors, per step: they reach back about 20 steps, whatever the interval.
DECAY_PER_STEP = 0.95


def tkfacw(
    learning_rate: optax.ScalarOrSchedule,
    layers: Layers,
    *,
    weight_decay: float | Array = 0.0,
    mask: Any = None,
    momentum: float | Array = 0.9,
    damping: Value | Damping = 0.2,
    floor: float | Array = 0.1,
    ball_radius: float | Array = 1.0,
    fallback: optax.GradientTransformation | None = None,
    decay: Decay | None = None,
    fisher_interval: Interval | None = 10,
    inverse_interval: Interval | None = 10,
    averaging: Averaging = "factors",
    inverse: Inverse | None = None,
    factor_dtype: Any = None,
    inverse_dtype: Any = None,
    spread_inverses: bool = False,
    axis_name: str | None = None,
    mesh: Mesh | None = None,
    shard_state: bool = False,
    rule: Rule | None = None,
) -> PlannedTransformation:
    """TKFAC's direction at lengths relative to the weights: one learning rate for all parameters, used as AdamW's is.

    The curvature gives each layer's step its direction, and the layer's weights its length. With kernel and bias as one
    matrix `W`, and `g` its gradient:

        m <- momentum m + g,    M = momentum m + g                              Nesterov's momentum
        D = (Phi + damping / d_in I)^-1 M (Psi + damping / d_out I)^-1          factors of trace 1, (4.9) and (4.13)
        U = -learning_rate (max(||W||, floor sqrt(d_out)) D / ||D|| + weight_decay W)
        W <- (W + U) min(1, R / ||W + U||),    R = max(||W_0||, ball_radius sqrt(d_out))

    where the norm of the length is the kernel's, or the bias's for the bias's own step if that is larger, and where
    the ball of a layer that makes outputs grows if it has to; see `scale_by_layer_norm_ratio`, `keep_in_norm_ball`.
    Each layer of a stack is a matrix by itself. All other parameters go by Adam (0.9 and 0.99, without an epsilon)
    at the same learning rate; those with two axes and more at the same lengths and within a ball, too. So nothing
    depends on the scale of the loss: multiplied by a power of two, it gives the same trajectory, bit by bit.

    Until there are factors, and where a layer has no signal, steps go along the momentum. A layer whose gradient or
    step is not finite makes no step, and no gradient that is not finite enters the average of its parameter.

    Args:
      learning_rate: the relative change of a layer's weights in a step, a number or a schedule: 0.04 after a warm-up
        over a twentieth of the steps, and then a cosine down to 0, is the setting to start with.
      layers: what `find_layers` returned.
      weight_decay: decoupled, multiplied by the learning rate, as in `optax.adamw`.
      mask: which parameters decay, as in `optax.adamw`; None: all.
      momentum: of the gradient; 0 keeps none.
      damping: a bare value is the share of `relative_damping`; or a damping.
      floor: see `scale_by_layer_norm_ratio`.
      ball_radius: `radius` of `keep_in_norm_ball`; `jnp.inf`: no ball.
      fallback: optimizer of the other parameters, complete with its own learning rate; None: what is said above.
      decay: see `scale_by_tkfac`, as are all further arguments. None: averages reach back about 20 steps,
        `min(0.95 ** fisher_interval, 1 - 1 / (n + 1))`.
      fisher_interval: T_FIM, steps between new statistics.
      inverse_interval: T_INV, steps between new inverses.
      averaging: `"factors"` or `"moments"`.
      inverse: inverts stacks of matrices; None is `cholesky_inverse`.
      factor_dtype: dtype in which the factors are stored.
      inverse_dtype: dtype in which the inverses are stored.
      spread_inverses: spreads new inverses over the interval.
      axis_name: mapped axis over which statistics are averaged and inversions divided.
      mesh: mesh of a program under `jax.jit`, among whose devices the inversions are divided.
      shard_state: with `mesh`, factors and inverses are divided over its devices.
      rule: that of the statistics; None is `trace_restricted`, TKFAC's.

    Returns:
      The optimizer; its update function takes `statistics`, see `scale_by_tkfac`, and needs the parameters.

    Raises:
      ValueError, TypeError: see `scale_by_tkfac` and `scale_by_layer_norm_ratio`.

    Source: directions Gao et al. 2021, Eqs. (4.9) and (4.13); lengths after LARS and LAMB, see
      `scale_by_layer_norm_ratio`; the ball after Hyperball, see `keep_in_norm_ball`.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, optax, tkfac_jax as tkfac
      >>> model = nn.Dense(2)
      >>> x, y = jnp.ones((5, 3)), jnp.zeros((5, 2))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> predict = lambda params, x: model.apply({"params": params}, x)
      >>> layers = tkfac.find_layers(predict, params, x)
      >>> schedule = optax.warmup_cosine_decay_schedule(0.0, 0.04, warmup_steps=5, decay_steps=100)
      >>> optimizer = tkfac.tkfacw(schedule, layers)
      >>> step = tkfac.make_train_step(predict, tkfac.Normal(), optimizer)
      >>> state = jax.jit(optimizer.init)(params)
      >>> for i in range(3):
      ...     key = jax.random.fold_in(jax.random.key(1), i)
      ...     params, state, metrics = step(params, state, x, targets=y, key=key)
      >>> bool(metrics["relative_change"] <= 0.04)
      True
    """
    check_number("momentum", momentum, lambda value: 0 <= value < 1, "a number in [0, 1)")
    check_number("weight_decay", weight_decay, lambda value: value >= 0, "a number of at least 0")
    preconditioner = scale_by_tkfac(
        layers,
        damping=damping if isinstance(damping, Damping) else relative_damping(damping),
        decay=_decay_over_steps(fisher_interval) if decay is None else decay,
        fisher_interval=fisher_interval,
        inverse_interval=inverse_interval,
        averaging=averaging,
        inverse=inverse,
        factor_dtype=factor_dtype,
        inverse_dtype=inverse_dtype,
        spread_inverses=spread_inverses,
        axis_name=axis_name,
        mesh=mesh,
        shard_state=shard_state,
        rule=rule,
    )
    direction = optax.chain(nesterov_momentum(momentum), preconditioner)
    decayed = [] if is_zero(weight_decay) else [optax.add_decayed_weights(weight_decay, mask)]
    lengths = [
        scale_by_layer_norm_ratio(layers, floor),
        *decayed,
        optax.scale_by_learning_rate(learning_rate),
        keep_in_norm_ball(layers, ball_radius),
    ]
    if fallback is None:
        others = scale_by_adam_without_epsilon()
        both = optax.partition({"tkfac": direction, "fallback": others}, layers.labels)
        optimizer = optax.chain(both, *lengths)
    else:
        optimizer = with_fallback(optax.chain(direction, *lengths), fallback, layers)
    # The last to be made, since optax.chain and optax.partition drop the plan.
    return with_plan(_in_float32(optimizer), preconditioner.plan)


def _in_float32(
    optimizer: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer with gradients and directions in at least float32; its updates have the gradients' dtypes.

    Directions have no scale, so that between its parts they would overflow in float16.
    """

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        wide = jax.tree.map(lambda g: g.astype(jnp.promote_types(g.dtype, jnp.float32)), updates)
        steps, state = optimizer.update(wide, state, params, **extra_args)
        return jax.tree.map(lambda step, g: step.astype(g.dtype), steps, updates), state

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def _decay_over_steps(interval: Interval | None) -> Decay:
    """The weight of an average that reaches back equally many steps, whatever the interval."""
    limit = DECAY_PER_STEP ** (1 if interval is None else interval)

    def decay(updates: Int[Array, ""]) -> Float[Array, ""]:
        return jnp.minimum(limit, 1 - 1 / (updates.astype(float) + 1))

    return decay
