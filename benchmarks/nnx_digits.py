"""Trains a Flax NNX network on scikit-learn's digits: SGD-momentum, Adam, KFAC and TKFAC side by side.

    python -m benchmarks.nnx_digits [--steps 220] [--tune] [--out-dir results/nnx_digits]

The network of separable convolutions is written in Flax NNX and split once into its parameters and its
running averages, `nnx.split(model, nnx.Param, ...)`; both are ordinary trees from then on. Every method takes
the same batches from the same initial parameters, at the best of the settings in `trials()`; `--tune` tries
them all first. The table counts the steps that each needs to reach the training loss at which Adam ends.
"""

import os

# LAPACK's threads would compete with XLA's.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import tkfac_jax as tkfac
from benchmarks.digits import digits_data, results_table
from benchmarks.figures import plot_curves, tuning_table
from benchmarks.runner import Method, Problem, Run, choose, environment, race
from benchmarks.series import write_results

BATCH_SIZE = 128
INTERVAL = 10
FALLBACK_RATE = 0.03
TURN = 10


class Separable(nnx.Module):
    """A convolution of each channel by itself and a 1 x 1 convolution across them, with BatchNorm and ReLU."""

    def __init__(self, d_in: int, d_out: int, strides: int, rngs: nnx.Rngs):
        """Takes channels before and after."""
        self.depthwise = nnx.Conv(
            d_in, d_in, (3, 3), strides=strides, feature_group_count=d_in, rngs=rngs
        )
        self.pointwise = nnx.Conv(d_in, d_out, (1, 1), rngs=rngs)
        self.norm = nnx.BatchNorm(d_out, momentum=0.9, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Features `(batch, rows, columns, d_out)`."""
        return nnx.relu(self.norm(self.pointwise(self.depthwise(x))))


class ConvNet(nnx.Module):
    """A 3 x 3 convolution, two separable ones, a mean over pixels and a Linear layer."""

    def __init__(self, rngs: nnx.Rngs):
        """Initialises the layers."""
        self.stem = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.first = Separable(16, 32, 2, rngs)
        self.second = Separable(32, 64, 1, rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits `(batch, 10)` of images `(batch, 8, 8, 1)`."""
        x = nnx.relu(self.norm(self.stem(x)))
        x = self.second(self.first(x))
        return self.head(x.mean(axis=(1, 2)))


def nnx_problem(seed: int) -> Problem:
    """The network with its initial parameters and the digits, split into training and test set."""
    (train_x, train_y), (test_x, test_y) = digits_data(seed)
    likelihood = tkfac.Categorical()
    graph, params, averages = nnx.split(ConvNet(nnx.Rngs(seed)), nnx.Param, nnx.BatchStat)

    def predict(params: Any, averages: Any, x: Any) -> tuple[jax.Array, Any]:
        model = nnx.merge(graph, params, averages, copy=True)
        logits = model(x)
        return logits, nnx.state(model, nnx.BatchStat)

    @jax.jit
    def figures(params: Any, averages: Any) -> dict[str, jax.Array]:
        model = nnx.merge(graph, params, averages, copy=True)
        model.eval()
        train_logits, test_logits = model(jnp.asarray(train_x)), model(jnp.asarray(test_x))
        return {
            "train_loss": likelihood.nll(train_logits, jnp.asarray(train_y)).mean(),
            "test_accuracy": (test_logits.argmax(-1) == test_y).mean(),
        }

    def evaluate(params: Any, averages: Any) -> dict[str, float]:
        return {name: float(value) for name, value in figures(params, averages).items()}

    return Problem(predict, likelihood, params, averages, train_x, train_y, BATCH_SIZE, evaluate)


def trials() -> dict[str, list[Method]]:
    """Five settings of each method; the one found best with seed 0 after 220 steps stands first."""
    kfac = ((0.03, 0.01), (0.1, 0.03), (0.03, 0.03), (0.1, 0.01), (0.3, 0.03))
    trace = ((0.1, 0.01), (0.1, 0.03), (0.03, 0.03), (0.03, 0.01), (0.3, 0.03))
    return {
        "SGD-momentum": [
            Method(
                "SGD-momentum", f"lr {rate:g}", lambda _, rate=rate: optax.sgd(rate, momentum=0.9)
            )
            for rate in (1.0, 0.3, 0.01, 0.03, 0.1)
        ],
        "Adam": [
            Method("Adam", f"lr {rate:g}", lambda _, rate=rate: optax.adam(rate))
            for rate in (0.03, 0.001, 0.003, 0.01, 0.1)
        ],
        "KFAC": second_order("KFAC", tkfac.kfac, kfac),
        "TKFAC": second_order("TKFAC", tkfac.tkfac, trace),
    }


def second_order(
    name: str, optimizer: Callable[..., Any], settings: tuple[tuple[float, float], ...]
) -> list[Method]:
    """A Kronecker-factored method at several learning rates and dampings."""

    def build(layers: tkfac.Layers, rate: float, damping: float) -> Any:
        return optimizer(rate, layers, damping=damping, fallback=optax.adam(FALLBACK_RATE))

    return [
        Method(
            name,
            "lr {:g}, damping {:g}".format(*setting),
            lambda layers, setting=setting: build(layers, *setting),
            INTERVAL,
        )
        for setting in settings
    ]


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=220, help="training steps of each method")
    parser.add_argument("--seed", type=int, default=0, help="of parameters, split and batches")
    parser.add_argument("--tune", action="store_true", help="try all settings, not the best alone")
    parser.add_argument("--out-dir", type=Path, default=Path("results/nnx_digits"))
    options = parser.parse_args()

    problem = nnx_problem(options.seed)
    print(problem.find_layers())
    folder = options.out_dir / f"tuning-{options.steps}-steps-seed-{options.seed}"
    best, tuning = choose(
        problem, trials(), options.steps, TURN, options.seed, folder if options.tune else None
    )
    if tuning:
        print(tuning_table(tuning))

    runs = [Run(problem, method, options.seed) for method in best]
    race(runs, options.steps, TURN, "nnx_digits")
    records = [run.record() for run in runs]
    print(results_table(records))

    options.out_dir.mkdir(parents=True, exist_ok=True)
    results = {
        "environment": environment(),
        "seed": options.seed,
        "interval": INTERVAL,
        "tuning": tuning,
        "runs": records,
    }
    write_results(results, options.out_dir / "nnx_digits.json")
    picture = options.out_dir / "nnx_digits.png"
    shown = {"train_loss": "training loss", "test_accuracy": "test accuracy"}
    plot_curves(records, None, shown, picture)
    print(f"The curves are in {picture}.")


if __name__ == "__main__":
    main()
