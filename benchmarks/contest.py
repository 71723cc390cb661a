"""Full-batch problems for which natural gradient is taken most: TKFAC adaptive, kfac-jax, L-BFGS and Adam, in seconds.

Each method tries four settings for some seconds; then all run at their best setting for equal seconds, in turns.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import tkfac_jax as tkfac
from benchmarks.figures import goals_table, plot_curves, tuning_table
from benchmarks.peers import has_kfac_jax, kfac_jax_adaptive
from benchmarks.runner import Method, Problem, Run, environment, race_for
from benchmarks.series import write_results

MIN_DAMPING = 1e-12
DAMPINGS = (1.0, 1e-1, 1e-2, 1e-4)
RATES = (1e-2, 3e-3, 1e-3, 3e-4)
MEMORIES = (10, 30, 100, 300)


def adaptive(initial_damping: float, likelihood: Any) -> Method:
    """TKFAC with everything adaptive, new statistics and inverses at each step."""
    return Method(
        "TKFAC adaptive",
        f"initial damping {initial_damping:g}",
        lambda layers: tkfac.adaptive_tkfac(
            layers, likelihood, initial_damping=initial_damping, min_damping=MIN_DAMPING
        ),
        1,
        estimator="exact",
        # The damping changes at the fifth step.
        programs=5,
    )


def lbfgs(memory: int) -> Method:
    """L-BFGS with the zoom line search of Optax."""
    return Method(
        "L-BFGS",
        f"memory {memory}",
        lambda _: optax.lbfgs(memory_size=memory),
        make_step=_line_search_step,
    )


def _line_search_step(problem: Problem, optimizer: Any) -> Callable[..., Any]:
    def step(trees: Any, inputs: Any, targets: Any, key: Any) -> Any:
        del key
        params, state, model_state = trees

        def loss_fn(params: Any) -> jax.Array:
            outputs, _ = problem.predict(params, model_state, inputs)
            return problem.likelihood.nll(outputs, targets).mean()

        value, grad = optax.value_and_grad_from_state(loss_fn)(params, state=state)
        updates, state = optimizer.update(
            grad, state, params, value=value, grad=grad, value_fn=loss_fn
        )
        return optax.apply_updates(params, updates), state, model_state

    return jax.jit(step, donate_argnums=0)


def trials(likelihood: Any) -> dict[str, list[Method]]:
    """Four settings of each method."""
    found = {
        "TKFAC adaptive": [adaptive(damping, likelihood) for damping in DAMPINGS],
        "L-BFGS": [lbfgs(memory) for memory in MEMORIES],
        "Adam": [
            Method("Adam", f"lr {rate:g}", lambda _, rate=rate: optax.adam(rate)) for rate in RATES
        ],
    }
    if has_kfac_jax():
        found["kfac-jax adaptive"] = [
            kfac_jax_adaptive(initial_damping=damping, min_damping=MIN_DAMPING, inverse_interval=1)
            for damping in DAMPINGS
        ]
    return found


def arguments(doc: str | None, out_dir: str, seconds: float) -> argparse.ArgumentParser:
    """The options of a contest."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=seconds, help="of each method's run")
    parser.add_argument("--tuning-seconds", type=float, default=seconds / 6, help="of each trial")
    parser.add_argument("--turn", type=int, default=10, help="steps between evaluations")
    parser.add_argument("--seed", type=int, default=0, help="of parameters and points")
    parser.add_argument("--out-dir", type=Path, default=Path(out_dir))
    return parser


def hold(
    name: str,
    problem: Problem,
    options: argparse.Namespace,
    goals: Sequence[float],
    shown: Mapping[str, str],
) -> list[dict[str, Any]]:
    """Tunes and runs all methods on a problem, prints tables and writes records and a picture.

    Args:
      name: of the problem.
      problem: the problem; a step takes all of its examples.
      options: what `arguments` parsed.
      goals: values of the first shown figure.
      shown: from the evaluation's figures to their labels.

    Returns:
      The records of the runs.
    """
    tuning, best = {}, []
    for method, tried in trials(problem.likelihood).items():
        if len(tried) == 1:
            best.append(tried[0])
            continue
        runs = [Run(problem, trial, options.seed) for trial in tried]
        race_for(runs, options.tuning_seconds, options.turn, f"{name}, {method}")
        tuning[method] = [
            {"settings": run.method.settings, "steps": run.step, "train_loss": _number(run.loss)}
            for run in runs
        ]
        best.append(tried[int(np.argmin([run.loss for run in runs]))])
    print(tuning_table(tuning, ".3g"))
    runs = [Run(problem, method, options.seed) for method in best]
    race_for(runs, options.seconds, options.turn, name)
    records = [run.record() for run in runs]
    figure, label = next(iter(shown.items()))
    print(f"{name}: steps and seconds to a {label}, and the lowest of the run")
    print(goals_table(records, goals, {figure: ""}, lowest=True))
    options.out_dir.mkdir(parents=True, exist_ok=True)
    results = {
        "environment": environment(),
        "seed": options.seed,
        "tuning": tuning,
        "runs": records,
    }
    write_results(results, options.out_dir / f"{name}.json")
    plot_curves(records, None, dict(shown), options.out_dir / f"{name}.png")
    return records


def _number(value: float) -> float | None:
    return value if np.isfinite(value) else None


def full_batch(
    predict: Callable[[Any, Any], Any],
    likelihood: Any,
    params: Any,
    inputs: np.ndarray,
    targets: np.ndarray,
    figures: Callable[[Any], dict[str, jax.Array]],
) -> Problem:
    """A problem whose steps take all examples, evaluated by one program; of its training loss 0 is the least."""
    least = likelihood.nll(jnp.asarray(targets), jnp.asarray(targets)).mean()

    @jax.jit
    def evaluate(params: Any) -> dict[str, jax.Array]:
        loss = likelihood.nll(predict(params, jnp.asarray(inputs)), jnp.asarray(targets)).mean()
        return {"train_loss": loss - least, **figures(params)}

    return Problem(
        lambda params, model_state, inputs: (predict(params, inputs), model_state),
        likelihood,
        params,
        {},
        inputs,
        targets,
        len(inputs),
        lambda params, _: {name: float(value) for name, value in evaluate(params).items()},
    )
