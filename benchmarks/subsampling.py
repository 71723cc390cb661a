"""Statistics over a part of each batch: what a step then costs, and what the training reaches.

    python -m benchmarks.subsampling --data-dir DIR [--steps 480] [--intervals 1 5] [--out-dir benchmarks/results]

The autoencoder of `benchmarks.autoencoder` on MNIST with TKFAC at its best settings there. Trainings that differ only
in the share of each batch of 500 over which statistics are taken (`make_train_step(statistics_args=...)`) advance in
turns. Losses are means over the whole training set and test set.
"""

import os

# LAPACK's threads would compete with XLA's.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.autoencoder import BATCH_SIZE, WIDTHS, autoencoder_problem, trials
from benchmarks.figures import table
from benchmarks.runner import Method, Run, environment, race
from benchmarks.series import write_results

# Batches are divided by these numbers.
DIVISORS = (1, 2, 4, 8)
BEST_SETTING = "lr 0.3, damping 0.2, norm constraint 0.5"


def methods(intervals: Sequence[int]) -> list[Method]:
    """TKFAC with statistics over all of each batch, and over parts of it."""
    best = next(method for method in trials()["TKFAC"] if method.settings == BEST_SETTING)
    fisher_interval, inverse_interval = intervals
    best = dataclasses.replace(best, interval=fisher_interval, inverse_interval=inverse_interval)

    def of_part(examples: int) -> Method:
        return dataclasses.replace(
            best,
            name=f"{examples} examples",
            statistics_args=lambda state, images: (state, images[:examples]),
        )

    return [
        dataclasses.replace(best, name=f"{BATCH_SIZE} examples")
        if divisor == 1
        else of_part(BATCH_SIZE // divisor)
        for divisor in DIVISORS
    ]


def results_table(records: Sequence[dict[str, Any]]) -> str:
    """Time of a step and losses at the end, by the number of examples; the time also as share of the first's."""
    rows = [("statistics over", "ms per step", "ratio", "training loss", "test loss")]
    for record in records:
        milliseconds, end = record["median_step_ms"], record["curve"][-1]
        ratio = milliseconds / records[0]["median_step_ms"]
        losses = f"{end['train_loss']:.2f}", f"{end['test_loss']:.2f}"
        rows.append((record["method"], f"{milliseconds:.0f}", f"{ratio:.2f}", *losses))
    return table(rows)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data-dir", type=Path, required=True, help="directory of the MNIST files")
    parser.add_argument("--out-dir", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--steps", type=int, default=480, help="steps of each training")
    parser.add_argument(
        "--intervals", type=int, nargs=2, default=(1, 5), help="of statistics and of inverses"
    )
    parser.add_argument("--turn", type=int, default=60, help="steps between evaluations")
    parser.add_argument("--seed", type=int, default=0, help="of parameters and batches")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="hidden widths")
    options = parser.parse_args()

    problem = autoencoder_problem(options.data_dir, options.seed, tuple(options.widths))
    runs = [Run(problem, method, options.seed) for method in methods(options.intervals)]
    race(runs, options.steps, options.turn, "subsampling")
    records = [run.record() for run in runs]
    print(results_table(records))
    options.out_dir.mkdir(parents=True, exist_ok=True)
    results = {"environment": environment(), "seed": options.seed, "intervals": options.intervals}
    write_results(results | {"runs": records}, options.out_dir / "subsampling.json")


if __name__ == "__main__":
    main()
