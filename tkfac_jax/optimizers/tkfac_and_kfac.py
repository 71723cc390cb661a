"""The complete optimizers `tkfac` and `kfac`."""

import inspect
from typing import Any

import optax
from jax.sharding import Mesh
from jaxtyping import Array

from tkfac_jax.curvature.damping import Damping, Value, factored_damping
from tkfac_jax.curvature.factors import Decay
from tkfac_jax.curvature.state import Averaging
from tkfac_jax.fisher.layer_statistics import Rule, independent
from tkfac_jax.layers.spec import Layers
from tkfac_jax.linalg.inversion import Inverse
from tkfac_jax.optimizers.option_checks import check_number, is_zero
from tkfac_jax.optimizers.plan import PlannedTransformation, with_plan
from tkfac_jax.optimizers.preconditioner import scale_by_tkfac
from tkfac_jax.optimizers.refresh_schedule import Interval

DEFAULT_FALLBACK = optax.adam(1e-3)


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
    fisher_interval: Interval | None = None,
    inverse_interval: Interval | None = None,
    averaging: Averaging = "factors",
    norm_constraint: float | Array | None = None,
    inverse: Inverse | None = None,
    factor_dtype: Any = None,
    inverse_dtype: Any = None,
    spread_inverses: bool = False,
    axis_name: str | None = None,
    mesh: Mesh | None = None,
    shard_state: bool = False,
    rule: Rule | None = None,
) -> PlannedTransformation:
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
      rule: that of the statistics; None is `trace_restricted`, TKFAC's.

    Returns:
      The optimizer; its update function takes `statistics`, see `scale_by_tkfac`.

    Raises:
      ValueError, TypeError: see `scale_by_tkfac`.

    Source: Gao et al. 2021, Algorithm 1.
    """
    check_number("momentum", momentum, lambda value: 0 <= value < 1, "a number in [0, 1)")
    check_number("weight_decay", weight_decay, lambda value: value >= 0, "a number of at least 0")
    preconditioner = scale_by_tkfac(
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
        rule=rule,
    )
    steps: list[optax.GradientTransformation] = [preconditioner]
    if not is_zero(weight_decay):
        steps.append(optax.add_decayed_weights(weight_decay, mask))
    steps.append(optax.scale_by_learning_rate(learning_rate))
    if not is_zero(momentum):
        steps.append(optax.trace(momentum))
    # The last to be made, since optax.chain and optax.partition drop the plan.
    return with_plan(with_fallback(optax.chain(*steps), fallback, layers), preconditioner.plan)


def kfac(
    learning_rate: optax.ScalarOrSchedule,
    layers: Layers,
    *,
    damping: Value | Damping = 1e-3,
    **options: Any,
) -> PlannedTransformation:
    """KFAC, the paper's baseline, on the machinery of `tkfac`.

    Its statistics must come from a Fisher function built with `rule=tkfac_jax.independent`; others are refused.

    Args:
      learning_rate: learning rate of the layers: a number or a schedule.
      layers: what `find_layers` returned.
      damping: a bare value is the lambda of `factored_damping`; or a damping.
      **options: see `tkfac`, whose other arguments are all taken but `rule`.

    Returns:
      The optimizer; see `tkfac`.

    Raises:
      ValueError: `damping` is trace damping, which is defined for the trace-restricted rule; and see
        `scale_by_tkfac`.

    Source: Martens and Grosse 2015.
    """
    damper = damping if isinstance(damping, Damping) else factored_damping(damping)
    return tkfac(learning_rate, layers, damping=damper, rule=independent, **options)


# optax.inject_hyperparams reads the signature to know what can be injected.
_signature = inspect.signature(tkfac)
_without_rule = [own for own in _signature.parameters.values() if own.name != "rule"]
kfac.__signature__ = _signature.replace(parameters=_without_rule)  # pyright: ignore[reportFunctionMemberAccess]


def with_fallback(
    optimizer: optax.GradientTransformation, fallback: optax.GradientTransformation, layers: Layers
) -> optax.GradientTransformationExtraArgs:
    """An optimizer for the layers' parameters, and another for all else."""
    # A gradient that is not finite must not reach the fallback's averages.
    guarded = optax.apply_if_finite(fallback, max_consecutive_errors=2**31 - 1)
    return optax.partition({"tkfac": optimizer, "fallback": guarded}, layers.labels)
