"""Inverses by Cholesky factors and by Newton-Schulz from those in use: alone, and in whole trainings side by side.

    python -m benchmarks.inverses [--data-dir DIR] [--intervals 1/1 1/5 10/10] [--steps 300]

Alone: the 16 factors of the autoencoder of `benchmarks.autoencoder`, made of noise whose directions have deviations
from 1 to 1/55: moving averages of weight 0.95 over 25 batches, damped, and the inverses of what they were one batch
earlier. Times are medians of calls that are waited for, and of ten at once, by the call; errors are those of the worst
matrix, relative to its inverse in float64.

Trainings, with DIR for MNIST: TKFAC at its best settings for the autoencoder. Those that differ in `inverse=` alone
take turns of 20 steps or a whole cycle of the intervals, in loops that wait for no step; a time is that of a turn by
its steps, the median over the turns from step 100 on. The first steps, when little of the inverses in use is right,
are shown apart. All batches of an epoch are on the device from the start. Losses are means over the whole training
set. `--lock FILE` as in `benchmarks.speed`.
"""

import os

# LAPACK's threads would compete with XLA's.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import tkfac_jax as tkfac
from benchmarks.autoencoder import (
    BATCH_SIZE,
    PIXELS,
    WIDTHS,
    Autoencoder,
    autoencoder_problem,
    best_tkfac,
)
from benchmarks.figures import table
from benchmarks.loops import Intervals, interval_pair
from benchmarks.runner import Method, Problem, environment, make_step
from benchmarks.series import write_results
from benchmarks.turns import Turns
from tkfac_jax.curvature.inverses import invert_factors

TURN, SETTLED = 20, 100
BATCHES, DECAY, SPREAD, DAMPING = 25, 0.95, 4.0, 3e-3
CALLS, AT_ONCE = 15, 10
# A layer's phi and psi.
Pair = tuple[np.ndarray, np.ndarray]

INVERSES = {"Cholesky": None, "Newton-Schulz": tkfac.newton_schulz_inverse()}


class Training:
    """A training whose turns are timed."""

    def __init__(
        self, problem: Problem, name: str, intervals: Intervals, batches: Sequence[jax.Array]
    ):
        """Makes a turn on a copy, which compiles all programs."""
        self.problem, self.batches = problem, batches
        self.name, self.intervals = name, intervals
        cycle = math.lcm(*intervals)
        self.turn = cycle * math.ceil(TURN / cycle)
        method = Method(
            "TKFAC",
            "",
            lambda layers: best_tkfac(layers, inverse=INVERSES[name]),
            intervals[0],
            inverse_interval=intervals[1],
        )
        layers = problem.find_layers()
        optimizer = method.build(layers)
        self.train_step = make_step(problem, method, optimizer)
        params = jax.tree.map(jnp.array, problem.params)
        self.trees = (params, jax.jit(optimizer.init)(params), problem.model_state)
        self.keys = [jax.random.key(number) for number in range(self.turn)]
        begun = jax.tree.map(jnp.array, self.trees)
        self.step, self.turns = 0, []
        self.advance()
        self.trees, self.step, self.turns = begun, 0, []

    def advance(self) -> None:
        """Makes a turn, and writes down its milliseconds by step."""
        started = time.perf_counter()
        for key in self.keys:
            batch = self.batches[self.step % len(self.batches)]
            self.trees = self.train_step(self.trees, batch, batch, key)
            self.step += 1
        jax.block_until_ready(self.trees)
        self.turns.append(1e3 * (time.perf_counter() - started) / self.turn)

    def record(self) -> dict[str, Any]:
        """What was measured, and what the training reached."""
        settled = max(1, min(SETTLED // self.turn, len(self.turns) - 1))
        return {
            "inverse": self.name,
            "intervals": "{}/{}".format(*self.intervals),
            "steps": self.step,
            "turn": self.turn,
            "ms": self.turns,
            "first_ms": float(np.median(self.turns[:settled])),
            "median_ms": float(np.median(self.turns[settled:] or self.turns)),
            "failed_inversions": int(optax.tree.get(self.trees[1], "failed_inversions")),
            **self.problem.evaluate(self.trees[0], self.trees[2]),
        }


def train(
    problem: Problem, intervals: Sequence[Intervals], steps: int, turns: Turns
) -> list[dict[str, Any]]:
    """Trainings with each inverse at each pair of intervals, in turns."""
    order = np.random.default_rng(0).permutation(len(problem.inputs))
    order = order[: len(order) // BATCH_SIZE * BATCH_SIZE].reshape(-1, BATCH_SIZE)
    batches = [jnp.asarray(problem.inputs[chosen]) for chosen in order]
    plans = [(name, pair) for pair in intervals for name in INVERSES]
    with turns.compiling():
        trainings = [
            Training(problem, name, pair, batches) for name, pair in tqdm(plans, desc="compile")
        ]
    with turns.timing(), tqdm(total=steps * len(trainings), desc="train") as bar:
        while any(training.step < steps for training in trainings):
            for training in trainings:
                if training.step < steps:
                    training.advance()
                    bar.update(training.turn)
    return [training.record() for training in trainings]


def moving_averages(size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A damped moving average of second moments, and what it was one batch earlier."""
    basis, _ = np.linalg.qr(rng.standard_normal((size, size)))
    basis *= np.exp(-SPREAD * np.arange(size) / size)
    average, earlier, weight = np.zeros((size, size)), np.zeros((size, size)), 0.0
    for _ in range(BATCHES + 1):
        earlier = average / max(weight, 1e-9)
        rows = rng.standard_normal((BATCH_SIZE, size)) @ basis.T
        average = DECAY * average + (1 - DECAY) / BATCH_SIZE * rows.T @ rows
        weight = DECAY * weight + 1 - DECAY
    average /= weight
    damping = DAMPING * np.trace(average) / size * np.eye(size)
    return average + damping, earlier + damping


def _float32(pair: Pair) -> tuple[jax.Array, jax.Array]:
    phi, psi = (jnp.asarray(matrix, jnp.float32) for matrix in pair)
    return phi, psi


class Alone:
    """New inverses of all factors, without a training."""

    def __init__(
        self,
        name: str,
        layers: tkfac.Layers,
        factors: Mapping[str, Pair],
        earlier: Mapping[str, Pair],
    ):
        """Compiles the program; each layer has its two factors."""
        self.name, self.factors = name, factors
        inverse = INVERSES[name] or tkfac.cholesky_inverse
        self.given = (
            {
                layer: tkfac.KroneckerFactors(*_float32(pair), jnp.ones(()))
                for layer, pair in factors.items()
            },
            {
                layer: tkfac.KroneckerInverses.from_factors(
                    layers[layer], *_float32((np.linalg.inv(phi), np.linalg.inv(psi)))
                )
                for layer, (phi, psi) in earlier.items()
            },
        )
        started = time.perf_counter()
        self.program = (
            jax.jit(lambda factors, old: invert_factors(factors, old, layers, inverse))
            .lower(*self.given)
            .compile()
        )
        self.compile_seconds = time.perf_counter() - started

    def measure(self, calls: int) -> float:
        """Milliseconds of a call, of so many that are waited for together."""
        started = time.perf_counter()
        jax.block_until_ready([self.program(*self.given) for _ in range(calls)])
        return 1e3 * (time.perf_counter() - started) / calls

    def record(self) -> dict[str, Any]:
        """Times and errors."""
        self.measure(1)
        found, failures = self.program(*self.given)
        errors = []
        for layer, inverses in found.items():
            pairs = zip((inverses.phi_matrix(), inverses.psi), self.factors[layer], strict=True)
            for received, matrix in pairs:
                expected = np.linalg.inv(matrix)
                error = np.linalg.norm(received - expected) / np.linalg.norm(expected)
                errors.append(float(error))
        return {
            "inverse": self.name,
            "ms": float(np.median([self.measure(1) for _ in range(CALLS)])),
            "at_once_ms": float(np.median([self.measure(AT_ONCE) for _ in range(CALLS // 3)])),
            "error": max(errors),
            "failed_inversions": sum(map(int, failures.values())),
            "compile_seconds": self.compile_seconds,
        }


def alone(widths: tuple[int, ...], turns: Turns) -> list[dict[str, Any]]:
    """Both inverses of the same factors."""
    model, pixels = Autoencoder(widths), jnp.zeros((2, PIXELS))
    params = jax.jit(model.init)(jax.random.key(0), pixels)["params"]
    layers = tkfac.find_layers(lambda params, x: model.apply({"params": params}, x), params, pixels)
    rng = np.random.default_rng(0)
    factors: dict[str, Pair] = {}
    earlier: dict[str, Pair] = {}
    for name, spec in layers.items():
        phi, earlier_phi = moving_averages(spec.phi.size, rng)
        psi, earlier_psi = moving_averages(spec.psi.size, rng)
        factors[name], earlier[name] = (phi, psi), (earlier_phi, earlier_psi)
    with turns.compiling():
        contenders = [Alone(name, layers, factors, earlier) for name in INVERSES]
    with turns.timing():
        return [contender.record() for contender in contenders]


def alone_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Times, and the largest error."""
    rows = [["inverse", "ms", "ms, ten at once", "largest error", "compile, s"]]
    rows += [
        [
            record["inverse"],
            f"{record['ms']:.3g}",
            f"{record['at_once_ms']:.3g}",
            f"{record['error']:.0e}",
            f"{record['compile_seconds']:.1f}",
        ]
        for record in records
    ]
    return table(rows)


def results_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Times, and their ratio to those of the first inverse at the same intervals; and losses."""
    first = {record["intervals"]: record for record in reversed(records)}
    rows = [
        [
            "intervals",
            "inverse",
            "ms a step",
            "ratio",
            "in the first steps",
            "ratio",
            "training loss",
        ]
    ]
    for record in records:
        base = first[record["intervals"]]
        rows.append(
            [
                record["intervals"],
                record["inverse"],
                *(
                    text
                    for name in ("median_ms", "first_ms")
                    for text in (f"{record[name]:.3g}", f"{record[name] / base[name]:.2f}")
                ),
                f"{record['train_loss']:.2f}",
            ]
        )
    return table(rows)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data-dir", type=Path, help="directory of the MNIST files")
    parser.add_argument(
        "--intervals",
        nargs="+",
        type=interval_pair,
        default=[(1, 1), (1, 5), (10, 10)],
        metavar="STATISTICS/INVERSES",
        help="steps between new statistics and between new inverses",
    )
    parser.add_argument("--steps", type=int, default=300, help="steps of each training")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="hidden widths")
    parser.add_argument("--out-dir", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--lock", type=Path, help="a file that processes on one accelerator share")
    options = parser.parse_args()

    widths, turns = tuple(options.widths), Turns(options.lock)
    results: dict[str, Any] = {"environment": environment(), "alone": alone(widths, turns)}
    print(alone_table(results["alone"]), "\n")
    if options.data_dir is not None:
        problem = autoencoder_problem(options.data_dir, 0, widths)
        results["runs"] = train(problem, options.intervals, options.steps, turns)
        print(results_table(results["runs"]))
    options.out_dir.mkdir(parents=True, exist_ok=True)
    write_results(results, options.out_dir / f"inverses-{jax.default_backend()}.json")


if __name__ == "__main__":
    main()
