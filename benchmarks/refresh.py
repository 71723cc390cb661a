"""The longest and the mean step with all inverses at once, and with them spread over the interval.

    python -m benchmarks.refresh --data-dir DIR [--steps 360] [--out-dir benchmarks/results]

The autoencoder of `benchmarks.autoencoder` on MNIST with TKFAC at its best settings there, new statistics and
inverses every 20 steps. Each step is timed by itself; two trainings that differ in `spread_inverses` alone
advance in turns. Training losses are means over the whole training set.
"""

import os

# LAPACK's threads would compete with XLA's.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import tkfac_jax as tkfac
from benchmarks.autoencoder import BATCH_SIZE, INTERVAL, WIDTHS, autoencoder_problem, best_tkfac
from benchmarks.figures import table
from benchmarks.runner import Problem, environment
from benchmarks.series import write_results

NAMES = {False: "all at once", True: "spread"}


class Training:
    """A training whose steps are timed one by one."""

    def __init__(self, problem: Problem, spread: bool):
        """Compiles all kinds of steps on a copy."""
        self.problem, self.step_ms, self.kinds = problem, [], []
        layers = problem.find_layers()
        optimizer = best_tkfac(layers)
        self.train_step = tkfac.make_train_step(
            problem.predict,
            problem.likelihood,
            optimizer,
            layers=layers,
            fisher_interval=INTERVAL,
            inverse_interval=INTERVAL,
            spread_inverses=spread,
            has_aux=True,
        )
        self.params = jax.tree.map(jnp.array, problem.params)
        self.opt_state = optimizer.init(self.params)
        begun = jax.tree.map(jnp.array, (self.params, self.opt_state))
        for step in range(INTERVAL + 1):
            self._step(step)
        self.params, self.opt_state = begun
        self.step_ms = []

    def _step(self, number: int) -> None:
        rng = np.random.default_rng((0, number))
        images = self.problem.inputs[rng.integers(len(self.problem.inputs), size=BATCH_SIZE)]
        key = jax.random.key(number)
        started = time.perf_counter()
        self.params, self.opt_state, _ = self.train_step(
            self.params, self.opt_state, {}, images, targets=images, key=key
        )
        jax.block_until_ready((self.params, self.opt_state))
        self.step_ms.append(1e3 * (time.perf_counter() - started))

    def advance(self, first: int, steps: int) -> None:
        """Makes some steps."""
        for number in range(first, first + steps):
            self._step(number)

    def record(self) -> dict[str, Any]:
        """What the training reached, and its times by the place of a step in the interval, medians."""
        places = [
            float(np.median(self.step_ms[place + INTERVAL :: INTERVAL]))
            for place in range(INTERVAL)
        ]
        figures = self.problem.evaluate(self.params, {})
        return {"ms_by_place": places, **figures}


def results_table(records: dict[str, dict[str, Any]]) -> str:
    """Longest and mean step, and what the trainings reached."""
    rows = [("inverses", "longest step, ms", "mean step, ms", "longest / mean", "training loss")]
    for name, record in records.items():
        longest, mean = max(record["ms_by_place"]), float(np.mean(record["ms_by_place"]))
        row = (name, f"{longest:.0f}", f"{mean:.0f}", f"{longest / mean:.2f}")
        rows.append((*row, f"{record['train_loss']:.2f}"))
    return table(rows)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data-dir", type=Path, required=True, help="directory of the MNIST files")
    parser.add_argument("--out-dir", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--steps", type=int, default=360, help="steps of each training")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="hidden widths")
    options = parser.parse_args()

    problem = autoencoder_problem(options.data_dir, 0, tuple(options.widths))
    trainings = {NAMES[spread]: Training(problem, spread) for spread in (False, True)}
    for first in tqdm(range(0, options.steps, INTERVAL), desc="refresh", unit="interval"):
        for training in trainings.values():
            training.advance(first, min(INTERVAL, options.steps - first))
    records = {name: training.record() for name, training in trainings.items()}
    print(results_table(records))
    options.out_dir.mkdir(parents=True, exist_ok=True)
    results = {"environment": environment(), "steps": options.steps, "runs": records}
    write_results(results, options.out_dir / "refresh.json")


if __name__ == "__main__":
    main()
