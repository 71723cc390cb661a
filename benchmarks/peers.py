"""kfac-jax as a method of the benchmarks, with everything adaptive or nothing.

`make peers` makes the environment that has it. Without it the methods are left out, and that is said.
"""

import importlib
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp

import tkfac_jax as tkfac
from benchmarks.runner import Method, Problem

BURN_IN = 10
DAMPING_INTERVAL = 5


def has_kfac_jax() -> bool:
    """Whether kfac-jax can be imported; says so if not."""
    found = importlib.util.find_spec("kfac_jax") is not None
    if not found:
        print(
            "kfac-jax is left out: it is not installed; `make peers` makes an environment with it."
        )
    return found


def kfac_jax_adaptive(
    *, initial_damping: float, min_damping: float = 1e-8, inverse_interval: int = 5, **options: Any
) -> Method:
    """kfac-jax's `Optimizer` that chooses damping, learning rate and momentum; statistics at each step."""
    return Method(
        "kfac-jax adaptive",
        f"initial damping {initial_damping:g}, at least {min_damping:g}, intervals 1 and {inverse_interval}",
        lambda _: _Deferred(),
        make_step=lambda problem, _: _Step(
            problem,
            {},
            use_adaptive_learning_rate=True,
            use_adaptive_momentum=True,
            use_adaptive_damping=True,
            damping_adaptation_interval=DAMPING_INTERVAL,
            initial_damping=initial_damping,
            min_damping=min_damping,
            curvature_update_period=1,
            inverse_update_period=inverse_interval,
            num_burnin_steps=BURN_IN,
            **options,
        ),
        # New inverses are a conditional; the step that changes the damping is a program of its own.
        programs=DAMPING_INTERVAL,
    )


def kfac_jax_constant(
    *, learning_rate: float, damping: float, fisher_interval: int, inverse_interval: int
) -> Method:
    """kfac-jax's `Optimizer` with a constant learning rate, momentum and damping."""
    return Method(
        "kfac-jax",
        f"lr {learning_rate:g}, damping {damping:g}, intervals {fisher_interval} and {inverse_interval}",
        lambda _: _Deferred(),
        make_step=lambda problem, _: _Step(
            problem,
            {"learning_rate": learning_rate, "momentum": 0.9, "damping": damping},
            curvature_update_period=fisher_interval,
            inverse_update_period=inverse_interval,
            num_burnin_steps=0,
        ),
    )


class _Deferred:
    """Stands for the optimizer's `init`: kfac-jax makes its state from the first batch, in the first step."""

    def init(self, params: Any) -> Any:
        """No state."""
        del params
        return {}


class _Step:
    """A training step of kfac-jax."""

    def __init__(self, problem: Problem, settings: dict[str, float], **options: Any):
        self.kfac_jax = importlib.import_module("kfac_jax")
        self.problem = problem
        # Of every step.
        self.settings = jax.tree.map(jnp.asarray, settings)
        self.burn_in = options["num_burnin_steps"]
        self.optimizer = self.kfac_jax.Optimizer(
            jax.value_and_grad(self._loss, has_aux=True),
            l2_reg=0.0,
            value_func_has_aux=True,
            value_func_has_state=False,
            multi_device=False,
            **options,
        )

    def __call__(self, trees: Any, inputs: Any, targets: Any, key: Any) -> Any:
        """Makes one step; the first makes the state, and burns the factors in on the first batch."""
        params, state, model_state = trees
        batch = (inputs, targets)
        begins = not jax.tree.leaves(state)
        if begins:
            state = self.optimizer.init(params, key, batch)
        params, state, _ = self.optimizer.step(
            params,
            state,
            key,
            data_iterator=iter([batch] * (self.burn_in + 1 if begins else 1)),
            **self.settings,
        )
        return params, state, model_state

    def _loss(self, params: Any, batch: Any) -> Any:
        inputs, targets = batch
        outputs, _ = self.problem.predict(params, self.problem.model_state, inputs)
        self._register(outputs, targets)
        return self.problem.likelihood.nll(outputs, targets).mean(), {}

    def _register(self, outputs: Any, targets: Any) -> None:
        """Tells kfac-jax what the outputs mean."""
        likelihood = self.problem.likelihood
        if isinstance(likelihood, tkfac.Bernoulli):
            self.kfac_jax.register_multi_bernoulli_predictive_distribution(outputs, targets)
        elif isinstance(likelihood, tkfac.Normal):
            self.kfac_jax.register_normal_predictive_distribution(
                outputs, targets, variance=likelihood.variance
            )
        elif isinstance(likelihood, tkfac.Categorical):
            self.kfac_jax.register_softmax_cross_entropy_loss(outputs, targets)
        else:
            msg = f"{likelihood!r}: kfac-jax has no loss for it here."
            raise TypeError(msg)
