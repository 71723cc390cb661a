"""The Optax transformation `scale_by_tkfac`."""

from typing import Any

import optax
from jax.sharding import Mesh
from jaxtyping import Array

from tkfac_jax.curvature.damping import Damping, Value, normal_damping
from tkfac_jax.curvature.factors import Decay
from tkfac_jax.curvature.inverses import Share
from tkfac_jax.curvature.state import Averaging
from tkfac_jax.curvature.storage import Storage
from tkfac_jax.curvature.transitions import Curvature
from tkfac_jax.fisher.layer_statistics import Rule, trace_restricted
from tkfac_jax.layers.spec import Layers
from tkfac_jax.linalg.cholesky import cholesky_inverse
from tkfac_jax.linalg.inversion import Inverse
from tkfac_jax.optimizers.option_checks import (
    check_damping,
    check_devices,
    check_number,
    check_options,
    check_rule,
)
from tkfac_jax.optimizers.plan import Plan, PlannedTransformation, with_plan
from tkfac_jax.optimizers.refresh_schedule import Interval, Intervals, Missing, renew


def scale_by_tkfac(
    layers: Layers,
    *,
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
      fisher_interval: T_FIM, steps between new statistics; None, if nobody says otherwise, is 1.
      inverse_interval: T_INV, steps between new inverses, likewise.
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
      rule: that of the statistics: None is `trace_restricted`, TKFAC's; or `independent`, KFAC's.

    Returns:
      The transformation; its state is a `TkfacState`, and its `plan` tells `make_train_step` what it was built with.

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
    rule = trace_restricted if rule is None else rule
    check_rule(rule)
    check_damping(damping, rule)
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
        rule,
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

    plan = Plan(layers, fisher_interval, inverse_interval, spread_inverses, rule, axis_name)
    return with_plan(optax.GradientTransformationExtraArgs(curvature.init, update), plan)
