"""TKFAC without a learning rate to tune: step length, momentum and damping are chosen while training.

Each step goes along two directions, the preconditioned gradient and the previous step, as far as a quadratic model
of the loss says is best. How well the model foretells the change of the loss decides about the damping. All of
this is Martens and Grosse 2015, sections 6 and 7, on the factors of TKFAC.
"""

from collections.abc import Callable
from typing import Any

import optax
from jax.sharding import Mesh
from jaxtyping import Array

from tkfac_jax.curvature.damping import Damping, normal_damping
from tkfac_jax.curvature.factors import Decay
from tkfac_jax.curvature.storage import Storage
from tkfac_jax.curvature.transitions import Curvature
from tkfac_jax.fisher.fisher_functions import Likelihoods
from tkfac_jax.fisher.joint_likelihood import as_likelihood
from tkfac_jax.fisher.layer_statistics import Rule, trace_restricted
from tkfac_jax.layers.spec import Layers
from tkfac_jax.linalg.cholesky import cholesky_inverse
from tkfac_jax.linalg.inversion import Inverse
from tkfac_jax.optimizers.adaptive_state import DampingPolicy
from tkfac_jax.optimizers.adaptive_step import Adaptive
from tkfac_jax.optimizers.option_checks import (
    check_devices,
    check_number,
    check_options,
    check_rule,
)
from tkfac_jax.optimizers.plan import Plan, PlannedTransformation, with_plan
from tkfac_jax.optimizers.refresh_schedule import Interval, Intervals, check_interval
from tkfac_jax.optimizers.tkfac_and_kfac import DEFAULT_FALLBACK, with_fallback

NOTHING_ADAPTIVE = (
    "learning_rate, momentum and a constant damping (damping_interval=None) are all given, so that nothing is left to "
    "adapt: use tkfac(...)."
)


def adaptive_tkfac(
    layers: Layers,
    likelihood: Likelihoods,
    *,
    initial_damping: float | Array,
    damping_interval: Interval | None = 5,
    damping_decay: float | Array = 0.9,
    min_damping: float | Array = 1e-8,
    max_damping: float | Array = 1e8,
    calibrate_damping: bool = False,
    learning_rate: optax.ScalarOrSchedule | None = None,
    momentum: float | Array | None = None,
    l2: float | Array = 0.0,
    reject_steps: bool = False,
    warmup_steps: int | Array = 0,
    fallback: optax.GradientTransformation = DEFAULT_FALLBACK,
    damping_rule: Callable[[Any], Damping] | None = None,
    decay: Decay = 0.95,
    fisher_interval: Interval | None = None,
    inverse_interval: Interval | None = None,
    inverse: Inverse | None = None,
    factor_dtype: Any = None,
    inverse_dtype: Any = None,
    spread_inverses: bool = False,
    axis_name: str | None = None,
    mesh: Mesh | None = None,
    shard_state: bool = False,
    rule: Rule | None = None,
) -> PlannedTransformation:
    """TKFAC that chooses its own step length, momentum and damping.

    With the preconditioned gradient `u`, the previous step `d`, and the exact Gauss-Newton matrix `G` of the batch, the
    step is `s = -alpha u + mu d` with the `alpha` and `mu` that minimise

        1/2 s^T (G + (lambda + l2) I) s + gradient^T s

    Every `damping_interval` steps the ratio of the actual to the predicted change of the batch's loss, the latter
    without the term of lambda, is taken: above 3/4 the damping `lambda` is multiplied by
    `damping_decay ** damping_interval`, below 1/4 divided by it. Inverses are damped as of when they are computed: the
    factors are averages of the undamped ones, `averaging="moments"`.

    Parameters of no layer take the step of `fallback` as it is; the model knows of it when it chooses the lengths.

    The update function is `update(grads, state, params, *, statistics, outputs_fn, targets, model_outputs_fn=None,
    refresh_inverses=None, adapt_damping=None, position_mask=None, example_weights=None)`:

    * `statistics` and `refresh_inverses` as in `scale_by_tkfac`.
    * `outputs_fn(params)` are the model's outputs on the batch, `targets` those of the batch. The outputs are
      differentiated in forward mode, which functions under `jax.custom_vjp` do not allow.
    * `model_outputs_fn(params)`, the outputs on the first examples of the batch only, lets the matrix `G` be taken
      over these: a quarter of the batch is cheaper and serves as well.
    * `adapt_damping`: None changes the damping at every `damping_interval`-th step, inside `lax.cond`; a Python bool
      decides when the program is compiled, as `make_train_step` does.
    * `position_mask` and `example_weights` as in `sampled_fisher`.

    The gradient has to be that of `likelihood.nll(outputs_fn(params), targets).mean()`, without a term for `l2`.
    What is chained after the optimizer changes steps of which it does not know. A step with numbers that are not
    finite is not made.

    Meant for losses without much noise from batch to batch: full or large batches. It wants the whole
    batch, and so refuses `multi_steps`.

    Args:
      layers: what `find_layers` returned.
      likelihood: what the outputs mean, or a mapping; see `sampled_fisher`. Its Fisher of the outputs is taken from its
        `fisher_product` or `fisher_vector`, or is the Hessian of its `nll`.
      initial_damping: the first lambda, in units of curvature: a positive number.
      damping_interval: steps between changes of the damping; None: it stays.
      damping_decay: by which factor the damping may change per step, in (0, 1).
      min_damping: bound of the damping.
      max_damping: bound of the damping.
      calibrate_damping: at the first step, divide `initial_damping` by the root of 10 as long as that
        lowers the loss after the step; each trial takes new inverses and two evaluations.
      learning_rate: alpha, a number or a schedule; None: the model's.
      momentum: mu; None: the model's.
      l2: the coefficient of a term `l2 / 2 |w|^2` of the layers' parameters, which the optimizer adds to the loss: to
        its gradient, to the model and to the damping of the inverses.
      reject_steps: evaluate the loss after every step; do not make a step that raises it, but raise the damping.
      warmup_steps: updates at the start that only gather statistics, at each of them, and make no step.
      fallback: optimizer of the parameters of no layer.
      damping_rule: from lambda to the damping; None is `normal_damping`. KFAC takes `factored_damping`, with
        `rule=tkfac_jax.independent` here and in its Fisher function.
      decay: see `scale_by_tkfac`, as are all further arguments.
      fisher_interval: T_FIM, steps between new statistics.
      inverse_interval: T_INV, steps between new inverses.
      inverse: inverts stacks of matrices; None is `cholesky_inverse`.
      factor_dtype: dtype in which the factors are stored.
      inverse_dtype: dtype in which the inverses are stored.
      spread_inverses: spreads new inverses over the interval.
      axis_name: mapped axis over which statistics, losses and the model are averaged and inversions divided.
      mesh: mesh of a program under `jax.jit`, among whose devices the inversions are divided.
      shard_state: with `mesh`, factors and inverses are divided over its devices.
      rule: that of the statistics; None is `trace_restricted`, TKFAC's.

    Returns:
      The optimizer; its state is an `AdaptiveState`.

    Raises:
      ValueError: an argument is wrong, or nothing is left to adapt; at `update`, `params` are not given.
      TypeError: at `update`, `statistics`, `outputs_fn` or `targets` are not given.

    Source: Martens and Grosse 2015, sections 6.4 to 7, with the factors of Gao et al. 2021.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, optax, tkfac_jax as tkfac
      >>> model, likelihood = nn.Dense(2), tkfac.Normal()
      >>> x = jax.random.normal(jax.random.key(0), (8, 3), jnp.float32)
      >>> y = x[:, :2] + 1
      >>> params = model.init(jax.random.key(1), x)["params"]
      >>> predict = lambda params, x: model.apply({"params": params}, x)
      >>> layers = tkfac.find_layers(predict, params, x)
      >>> fisher = tkfac.exact_fisher(predict, likelihood, layers)
      >>> optimizer = tkfac.adaptive_tkfac(layers, likelihood, initial_damping=1e-3)
      >>> @jax.jit
      ... def train_step(params, state):
      ...     outputs_fn = lambda params: predict(params, x)
      ...     loss_fn = lambda params: likelihood.nll(outputs_fn(params), y).mean()
      ...     updates, state = optimizer.update(
      ...         jax.grad(loss_fn)(params), state, params,
      ...         statistics=lambda: fisher(params, x), outputs_fn=outputs_fn, targets=y)
      ...     return optax.apply_updates(params, updates), state
      >>> state = jax.jit(optimizer.init)(params)
      >>> for _ in range(3):
      ...     params, state = train_step(params, state)
      >>> bool(abs(predict(params, x) - y).max() < 1e-2)
      True
    """
    check_options(layers, decay)
    check_devices(axis_name, mesh, shard_state)
    _check_numbers(initial_damping, min_damping, max_damping, damping_decay, l2, momentum)
    _check_steps(damping_interval, warmup_steps)
    if damping_interval is None and learning_rate is not None and momentum is not None:
        raise ValueError(NOTHING_ADAPTIVE)
    # A default of None, as that of inverse: optax.inject_hyperparams takes a function for a schedule.
    damping_rule = normal_damping if damping_rule is None else damping_rule
    rule = trace_restricted if rule is None else rule
    check_rule(rule)
    curvature = Curvature(
        layers,
        damping_rule(initial_damping),
        decay,
        "moments",
        cholesky_inverse if inverse is None else inverse,
        Storage(factor_dtype, inverse_dtype, mesh, shard_state),
        axis_name,
        rule=rule,
    )
    adaptive = Adaptive(
        curvature,
        Intervals.checked(fisher_interval, inverse_interval, spread_inverses),
        as_likelihood(likelihood),
        with_fallback(optax.set_to_zero(), fallback, layers),
        damping_rule,
        DampingPolicy(damping_interval, damping_decay, min_damping, max_damping),
        initial_damping,
        calibrate_damping,
        learning_rate,
        momentum,
        l2,
        reject_steps,
        warmup_steps,
    )
    plan = Plan(
        layers, fisher_interval, inverse_interval, spread_inverses, rule, axis_name, likelihood
    )
    return with_plan(optax.GradientTransformationExtraArgs(adaptive.init, adaptive.update), plan)


def _check_numbers(
    initial_damping: Any,
    min_damping: Any,
    max_damping: Any,
    damping_decay: Any,
    l2: Any,
    momentum: Any,
) -> None:
    for name, value in (
        ("initial_damping", initial_damping),
        ("min_damping", min_damping),
        ("max_damping", max_damping),
    ):
        check_number(name, value, lambda value: value > 0, "a positive number")
    bounds = (min_damping, initial_damping, max_damping)
    if all(isinstance(bound, int | float) for bound in bounds) and sorted(bounds) != list(bounds):
        msg = (
            f"min_damping, initial_damping, max_damping are {bounds}; expected them in this order."
        )
        raise ValueError(msg)
    check_number("damping_decay", damping_decay, lambda value: 0 < value < 1, "a number in (0, 1)")
    check_number("l2", l2, lambda value: value >= 0, "a number of at least 0")
    check_number("momentum", momentum, lambda value: 0 <= value < 1, "a number in [0, 1)")


def _check_steps(damping_interval: Any, warmup_steps: Any) -> None:
    if damping_interval is not None:
        check_interval("damping_interval", damping_interval)
    if isinstance(warmup_steps, float) or (isinstance(warmup_steps, int) and warmup_steps < 0):
        msg = f"warmup_steps={warmup_steps!r}; expected a whole number of at least 0."
        raise ValueError(msg)
