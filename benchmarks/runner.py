"""Trains one problem with several optimizers side by side, and can be stopped and resumed at any point.

All methods advance in turns, a few steps each, so that a machine whose speed drifts is equally kind
to all. What they have reached is written after each turn: the curve, and a checkpoint.
"""

import dataclasses
import functools
import json
import os
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import tkfac_jax as tkfac


class Problem(NamedTuple):
    """What is trained.

    Attributes:
      predict: `predict(params, model_state, inputs) -> (outputs, model_state)`, in training mode.
      likelihood: what the outputs mean.
      params: initial parameters.
      model_state: initial state of the model, such as BatchNorm's.
      inputs: training inputs, examples first.
      targets: training targets.
      batch_size: examples of a step; what is left over at the end of an epoch is dropped.
      evaluate: `evaluate(params, model_state) -> figures`, a dictionary of floats with `train_loss`.
      augment: `augment(inputs, rng) -> inputs`, random changes of each training batch; None: no changes.
    """

    predict: Callable[..., Any]
    likelihood: Any
    params: Any
    model_state: Any
    inputs: np.ndarray
    targets: np.ndarray
    batch_size: int
    evaluate: Callable[[Any, Any], dict[str, float]]
    augment: Callable[[np.ndarray, np.random.Generator], np.ndarray] | None = None

    def find_layers(self) -> tkfac.Layers:
        """The layers of the model, found on a batch."""
        batch = self.inputs[: self.batch_size]
        return tkfac.find_layers(self.predict, self.params, self.model_state, batch)


@dataclasses.dataclass(frozen=True)
class Method:
    """An optimizer with its settings.

    Attributes:
      name: the method's name in tables and pictures.
      settings: the settings as text, which tell apart the trials of one method.
      build: from the layers to the optimizer.
      interval: steps between new statistics and inverses; None for a first-order method.
      inverse_interval: steps between new inverses, where that is another number.
      estimator: the Fisher of the statistics.
      model_args: see `tkfac.make_train_step`.
      statistics_args: likewise.
      make_step: from problem and optimizer to a training step
        `(params, opt_state, model_state), inputs, targets, key -> the same three`; None: what the intervals say.
      programs: number of steps after which every program has been compiled.
    """

    name: str
    settings: str
    build: Callable[[tkfac.Layers], Any]
    interval: int | None = None
    inverse_interval: int | None = None
    estimator: Any = "sampled"
    model_args: Callable[..., tuple[Any, ...]] | None = None
    statistics_args: Callable[..., tuple[Any, ...]] | None = None
    make_step: Callable[..., Callable[..., Any]] | None = None
    programs: int = 2

    @property
    def slug(self) -> str:
        """The method and its settings as a file name."""
        return re.sub(r"[^A-Za-z0-9.]+", "-", f"{self.name} {self.settings}").strip("-")


class Run:
    """One method on its way: where it is, how long it took and what it reached."""

    def __init__(
        self,
        problem: Problem,
        method: Method,
        seed: int,
        folder: Path | None = None,
        *,
        averaging: float | None = None,
    ):
        """Starts a run, or resumes the one whose checkpoint lies in the folder.

        With `averaging`, the weight of the past in a moving average of the parameters, what the average reaches is
        evaluated as well: figures `averaged_...`.
        """
        self.problem, self.method, self.seed = problem, method, seed
        self.checkpoint = folder and folder / f"{method.slug}.msgpack"
        self.layers = problem.find_layers()
        optimizer = method.build(self.layers)
        self.train_step = (
            make_step(problem, method, optimizer)
            if method.make_step is None
            else method.make_step(problem, optimizer)
        )
        params = jax.tree.map(jnp.array, problem.params)
        # One program: operation by operation, init takes seconds to compile.
        self.trees = (params, jax.jit(optimizer.init)(params), problem.model_state)
        self.step, self.seconds, self.step_ms = 0, 0.0, []
        self.averaging = averaging
        self.average = None if averaging is None else jax.tree.map(jnp.array, params)
        self.order: tuple[int, Any] = (-1, None)
        structure = self._compile()
        if self.checkpoint and self.checkpoint.exists():
            self._restore(self.checkpoint, structure)
        else:
            self.curve = [{"step": 0, "seconds": 0.0, **self._evaluate()}]

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one pass over the training set."""
        return len(self.problem.inputs) // self.problem.batch_size

    @property
    def loss(self) -> float:
        """The last training loss over the whole training set, infinite where it is not a number."""
        loss = self.curve[-1]["train_loss"]
        return loss if np.isfinite(loss) else float("inf")

    def advance(self, steps: int) -> None:
        """Makes some steps, then evaluates and writes down where it is."""
        batches = [self._batch(self.step + i) for i in range(steps)]
        started = time.perf_counter()
        for i, (inputs, targets) in enumerate(batches):
            self.trees = self.train_step(self.trees, inputs, targets, self._key(self.step + i))
            if self.averaging is not None:
                weight = max(1 - self.averaging, 1 / (self.step + i + 1))
                self.average = _moved(self.average, self.trees[0], weight)
        jax.block_until_ready((self.trees, self.average))
        elapsed = time.perf_counter() - started
        self.step += steps
        self.seconds += elapsed
        self.step_ms.append(1e3 * elapsed / steps)
        self.curve.append({"step": self.step, "seconds": self.seconds, **self._evaluate()})
        if self.checkpoint:
            self._save(self.checkpoint)

    def record(self) -> dict[str, Any]:
        """The run as JSON."""
        return {
            "method": self.method.name,
            "settings": self.method.settings,
            "median_step_ms": float(np.median(self.step_ms)) if self.step_ms else None,
            "curve": self.curve,
        }

    def _evaluate(self) -> dict[str, float]:
        params, _, model_state = self.trees
        figures = self.problem.evaluate(params, model_state)
        if self.averaging is None:
            return figures
        averaged = self.problem.evaluate(self.average, model_state)
        return figures | {f"averaged_{name}": value for name, value in averaged.items()}

    def _batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        epoch, place = divmod(step, self.steps_per_epoch)
        if self.order[0] != epoch:
            permutation = np.random.default_rng((self.seed, epoch)).permutation(
                len(self.problem.inputs)
            )
            self.order = (epoch, permutation)
        size = self.problem.batch_size
        chosen = self.order[1][place * size : (place + 1) * size]
        inputs, targets = self.problem.inputs[chosen], self.problem.targets[chosen]
        if self.problem.augment is not None:
            # Of the step alone, so that a resumed run sees the same inputs; the 1 tells it from the order's seed.
            inputs = self.problem.augment(inputs, np.random.default_rng((self.seed, step, 1)))
        return inputs, targets

    def _key(self, step: int) -> jax.Array:
        return jax.random.fold_in(jax.random.key(self.seed), step)

    def _compile(self) -> Any:
        """Makes a few steps on a copy, which compiles every program before time is taken; returns its structure."""
        trees = jax.tree.map(jnp.array, self.trees)
        for _ in range(self.method.programs):
            trees = self.train_step(trees, *self._batch(0), self._key(0))
        if self.averaging is not None:
            jax.block_until_ready(_moved(jax.tree.map(jnp.array, self.average), trees[0], 1.0))
        jax.block_until_ready(trees)
        return jax.tree.structure((trees, self.average))

    def _save(self, path: Path) -> None:
        facts = {
            "step": self.step,
            "seconds": self.seconds,
            "step_ms": self.step_ms,
            "curve": self.curve,
        }
        # Only the leaves: not every optimizer's state is of types that Flax knows how to take apart.
        leaves = jax.tree.leaves((self.trees, self.average))
        state = {"leaves": leaves, "facts": json.dumps(facts)}
        partial = path.with_suffix(".partial")
        partial.write_bytes(flax.serialization.msgpack_serialize(jax.device_get(state)))
        partial.replace(path)

    def _restore(self, path: Path, structure: Any) -> None:
        state: Any = flax.serialization.msgpack_restore(path.read_bytes())
        leaves = map(jnp.asarray, state["leaves"])
        self.trees, self.average = jax.tree.unflatten(structure, leaves)
        facts = json.loads(state["facts"])
        self.step, self.seconds = facts["step"], facts["seconds"]
        self.step_ms, self.curve = facts["step_ms"], facts["curve"]


@functools.partial(jax.jit, donate_argnums=0)
def _moved(average: Any, params: Any, weight: float) -> Any:
    """The average moved towards the parameters."""
    return optax.incremental_update(params, average, weight)


def make_step(problem: Problem, method: Method, optimizer: Any) -> Callable[..., Any]:
    """A step `(params, opt_state, model_state), inputs, targets, key -> the same three`."""
    if method.interval is not None:
        inner = tkfac.make_train_step(
            problem.predict,
            problem.likelihood,
            optimizer,
            fisher_interval=method.interval,
            inverse_interval=method.inverse_interval or method.interval,
            estimator=method.estimator,
            has_aux=True,
            model_args=method.model_args,
            statistics_args=method.statistics_args,
        )
    else:

        def loss_fn(params: Any, model_state: Any, inputs: Any, targets: Any) -> Any:
            outputs, model_state = problem.predict(params, model_state, inputs)
            return problem.likelihood.nll(outputs, targets).mean(), model_state

        def first_order(
            params: Any, opt_state: Any, model_state: Any, inputs: Any, *, targets: Any, key: Any
        ) -> Any:
            del key
            (loss, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(
                params, model_state, inputs, targets
            )
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, {"loss": loss, "aux": aux}

        inner = jax.jit(first_order, donate_argnums=(0, 1))

    def step(trees: Any, inputs: Any, targets: Any, key: Any) -> Any:
        params, opt_state, model_state = trees
        params, opt_state, metrics = inner(
            params, opt_state, model_state, inputs, targets=targets, key=key
        )
        return params, opt_state, metrics["aux"]

    return step


def race(runs: Sequence[Run], steps: int, turn: int, title: str) -> None:
    """Advances all runs to a number of steps, in turns, with a progress bar."""
    total = sum(max(0, steps - run.step) for run in runs)
    with tqdm(total=total, desc=title, unit="step", mininterval=1) as bar:
        while any(run.step < steps for run in runs):
            for run in runs:
                part = min(turn, steps - run.step)
                if part > 0:
                    run.advance(part)
                    bar.update(part)
                    bar.set_postfix_str(f"{run.method.name} {run.loss:.4g}")


def race_for(runs: Sequence[Run], seconds: float, turn: int, title: str) -> None:
    """Advances all runs for a number of seconds each, in turns of about equal seconds, with a progress bar."""
    slice_ = seconds / 20
    with tqdm(total=round(seconds * len(runs)), desc=title, unit="s", mininterval=1) as bar:
        while any(run.seconds < seconds for run in runs):
            for run in runs:
                started = run.seconds
                until = min(seconds, started + slice_)
                while run.seconds < until:
                    run.advance(turn)
                bar.update(round(run.seconds - started))
                bar.set_postfix_str(f"{run.method.name} {run.loss:.4g}")


def best_of(
    problem: Problem,
    trials: Sequence[Method],
    steps: int,
    turn: int,
    seed: int,
    folder: Path,
    earlier: Sequence[dict[str, Any]] = (),
) -> tuple[Method, list[dict[str, Any]]]:
    """Runs all trials of one method for some steps; returns the best one and what all reached.

    A trial that is stopped goes on from its checkpoint, which lies in the folder until the trial is written down. One
    that is among earlier ones is not run again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known = {(record["settings"], record["steps"]): record for record in earlier}
    records = []
    for method in trials:
        if (method.settings, steps) in known:
            records.append(known[method.settings, steps])
            continue
        written = folder / f"{method.slug}.json"
        if written.exists():
            records.append(json.loads(written.read_text()))
            continue
        run = Run(problem, method, seed, folder)
        race([run], steps, turn, f"{method.name} {method.settings}")
        records.append(
            {"settings": method.settings, "steps": steps, "train_loss": _json_number(run.loss)}
        )
        written.write_text(json.dumps(records[-1]))
        (folder / f"{method.slug}.msgpack").unlink(missing_ok=True)
    losses = [np.inf if r["train_loss"] is None else r["train_loss"] for r in records]
    return trials[int(np.argmin(losses))], records


def choose(
    problem: Problem,
    trials: Mapping[str, Sequence[Method]],
    steps: int,
    turn: int,
    seed: int,
    folder: Path | None,
    earlier: Mapping[str, Sequence[dict[str, Any]]] = {},
) -> tuple[list[Method], dict[str, list[dict[str, Any]]]]:
    """The best trial of each method and what all trials reached; without a folder the first of each, untried."""
    if folder is None:
        return [tried[0] for tried in trials.values()], {}
    found = {
        name: best_of(problem, tried, steps, turn, seed, folder, earlier.get(name, ()))
        for name, tried in trials.items()
    }
    return [best for best, _ in found.values()], {name: tried for name, (_, tried) in found.items()}


def _json_number(value: float) -> float | None:
    return value if np.isfinite(value) else None


def environment() -> dict[str, Any]:
    """What a figure depends on besides the code."""
    return {
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "OPENBLAS_NUM_THREADS": os.environ.get("OPENBLAS_NUM_THREADS"),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS"),
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES"),
    }
