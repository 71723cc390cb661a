"""Flax's TrainState, whose `apply_gradients` takes the statistics."""

from typing import Any

import optax
from flax.training import train_state

from tkfac_jax.curvature.inverses import Share

# What adaptive_tkfac wants to know of the batch.
OF_THE_BATCH = ("outputs_fn", "targets", "model_outputs_fn", "position_mask", "example_weights")


class _NotGiven:
    """Stands for an argument that was not given, where None means something."""


class TrainState(train_state.TrainState):
    """Flax's `TrainState` with statistics: `apply_gradients` passes them on to the optimizer.

    All else is Flax's own: `create`, `replace`, fields of a subclass (the state of BatchNorm, a key), and
    what it does with gradients that overwrite their parameters. Optimizers that take no
    statistics may be used too; they do not see them.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, tkfac_jax as tkfac
      >>> model = nn.Dense(2)
      >>> x, y = jnp.ones((5, 3)), jnp.zeros((5, 2))
      >>> predict = lambda params, x: model.apply({"params": params}, x)
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> layers = tkfac.find_layers(predict, params, x)
      >>> likelihood = tkfac.Normal()
      >>> fisher = tkfac.exact_fisher(predict, likelihood, layers)
      >>> optimizer = tkfac.tkfac(0.1, layers, damping=0.1, fisher_interval=10, inverse_interval=10)
      >>> state = tkfac.TrainState.create(apply_fn=model.apply, params=params, tx=optimizer)
      >>> @jax.jit
      ... def train_step(state, x, y):
      ...     loss = lambda params: likelihood.nll(predict(params, x), y).mean()
      ...     grads = jax.grad(loss)(state.params)
      ...     return state.apply_gradients(grads=grads, statistics=lambda: fisher(state.params, x))
      >>> state = train_step(state, x, y)
      >>> int(state.step)
      1
    """

    # Narrower in Flax, where they are not checked: params may be a plain dictionary, and JAX puts
    # other things than arrays into a tree. Up to Optax 0.2.5 the type of states admits no empty state.
    step: Any
    params: Any
    opt_state: Any

    def apply_gradients(
        self,
        *,
        grads: Any,
        statistics: Any = _NotGiven,
        refresh_inverses: bool | Share | None = None,
        **kwargs: Any,
    ) -> "TrainState":
        """Makes one step.

        Args:
          grads: gradients, of the structure of `params`.
          statistics: a function without arguments, `Statistics`, or None; see `scale_by_tkfac`.
          refresh_inverses: see `scale_by_tkfac`.
          **kwargs: fields to replace; and what `adaptive_tkfac` wants to know of the batch, such as `outputs_fn` and
            `targets`, which goes to the optimizer, unless a field of the state has the name.

        Returns:
          The state with new `params` and `opt_state`, and `step` one higher.

        Raises:
          TypeError: `statistics` is not given, and the optimizer needs it.
          ValueError: see `scale_by_tkfac`.
        """
        extra_args: dict[str, Any] = {"refresh_inverses": refresh_inverses}
        if statistics is not _NotGiven:
            extra_args["statistics"] = statistics
        passed_on = [name for name in OF_THE_BATCH if name in kwargs and not hasattr(self, name)]
        extra_args |= {name: kwargs.pop(name) for name in passed_on}
        optimizer = optax.with_extra_args_support(self.tx)

        def update(updates: Any, state: Any, params: Any = None) -> Any:
            return optimizer.update(updates, state, params, **extra_args)

        # Flax's own method makes the step, with an optimizer that has its further arguments already.
        informed = self.replace(tx=optax.GradientTransformation(optimizer.init, update))
        return super(TrainState, informed).apply_gradients(
            grads=grads, **({"tx": self.tx} | kwargs)
        )
