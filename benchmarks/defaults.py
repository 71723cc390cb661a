"""One setting of TKFAC for four tasks, beside Adam as people start with it: nothing is tuned for a task.

    python -m benchmarks.defaults --data-dir DIR [--tasks digits gpt autoencoder resnet20] [--seeds 0 1]

* digits: the network of `benchmarks.digits`, 220 steps;
* gpt: that of `benchmarks.gpt`, 400 steps;
* autoencoder: that of `benchmarks.autoencoder`, 360 steps (3 epochs), on the loss averaged over pixels;
* resnet20: ResNet20 on CIFAR-10 as in `benchmarks.cifar`, 390 steps (an epoch).

DIR holds the official files of MNIST (in itself or in `mnist`) and the folder `cifar-10-batches-bin`; what is not
there is downloaded there. Digits and gpt need none. Both methods take the same batches from the same
initial parameters, in turns. Runs that are stopped go on where they were when the command is given again.
"""

import os

# LAPACK's threads would compete with XLA's.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import optax

import tkfac_jax as tkfac
from benchmarks import autoencoder, cifar, digits, gpt
from benchmarks.cifar import by_setting
from benchmarks.figures import mean_and_deviation, mean_curve, plot_curves, table
from benchmarks.runner import Method, Problem, Run, environment, race
from benchmarks.series import write_results

LEARNING_RATE = 0.1
DAMPING = 3e-4
NORM_CONSTRAINT = 0.005
FALLBACK_RATE = 0.01
INTERVAL = 10
# Each evaluation of ResNet20 on all of CIFAR-10 takes as long as a hundred steps.
CIFAR_EXAMPLES = 1000


class Task(NamedTuple):
    """One of the four tasks.

    Attributes:
      problem: from the directory of the data and a seed to the problem.
      steps: training steps.
      turn: steps between evaluations.
      test: the figure of the test set that is shown: its key, what it is called, and its format.
    """

    problem: Callable[[Any, int], Problem]
    steps: int
    turn: int
    test: tuple[str, str, str]


def autoencoder_problem(data_dir: Path, seed: int) -> Problem:
    """MNIST's autoencoder, trained on the mean over pixels; the losses shown are sums over pixels, as elsewhere."""
    problem = autoencoder.autoencoder_problem(data_dir, seed)
    return problem._replace(likelihood=tkfac.Bernoulli(average_positions=True))


def resnet20_problem(data_dir: Path, seed: int) -> Problem:
    """ResNet20 on CIFAR-10, evaluated on a part of both sets."""
    data = cifar.load_cifar(data_dir, "cifar10").first(None, CIFAR_EXAMPLES)
    model = cifar.NETWORKS["resnet20"](data.classes, 1.0)
    return cifar.cifar_problem(data, model, seed, evaluation_examples=CIFAR_EXAMPLES)


ACCURACY = ("test_accuracy", "accuracy", ".1%")
TASKS = {
    "digits": Task(lambda _, seed: digits.digits_problem(seed), 220, 20, ACCURACY),
    "gpt": Task(lambda _, seed: gpt.gpt_problem(seed), 400, 20, ("test_loss", "loss", ".3f")),
    "autoencoder": Task(autoencoder_problem, 360, 120, ("test_loss", "loss", ".2f")),
    "resnet20": Task(resnet20_problem, 390, 130, ACCURACY),
}
WITH_DATA = ("autoencoder", "resnet20")


def default(layers: tkfac.Layers, steps: int) -> optax.GradientTransformationExtraArgs:
    """The default of `docs/choosing.md` for a training of so many steps, whatever the task."""
    return tkfac.tkfac(
        schedule(LEARNING_RATE, steps),
        layers,
        damping=DAMPING,
        norm_constraint=NORM_CONSTRAINT,
        averaging="moments",
        decay=autoencoder.growing_decay,
        fallback=optax.adam(schedule(FALLBACK_RATE, steps)),
    )


def schedule(rate: float, steps: int) -> optax.Schedule:
    """A linear rise over a twentieth of the steps, then a cosine down to zero."""
    return optax.warmup_cosine_decay_schedule(0.0, rate, max(1, steps // 20), steps)


def methods(steps: int) -> list[Method]:
    """Adam and TKFAC, each at one setting for every task."""
    return [
        Method("Adam", "lr 0.001", lambda _: optax.adam(1e-3)),
        Method("TKFAC", "the default", lambda layers: default(layers, steps), INTERVAL),
    ]


def results_table(records: Mapping[str, Sequence[dict[str, Any]]]) -> str:
    """What each method reached at the end of each task, over its seeds."""
    rows = [("task", "method", "training loss", "test", "ms per step")]
    for name, runs in records.items():
        key, called, form = TASKS[name].test
        for own in by_setting(runs):
            ends = [run["curve"][-1] for run in own]
            rows.append(
                (
                    f"{name}, {ends[0]['step']} steps",
                    own[0]["method"],
                    mean_and_deviation([end["train_loss"] for end in ends], ".3g"),
                    f"{called} {mean_and_deviation([end[key] for end in ends], form)}",
                    mean_and_deviation([run["median_step_ms"] for run in own], ".3g"),
                )
            )
    return table(rows)


def train(name: str, options: argparse.Namespace, seed: int) -> tuple[list[dict[str, Any]], int]:
    """Trains both methods on a task with one seed; returns their records and the steps of an epoch."""
    task = TASKS[name]
    steps = options.steps or task.steps
    folder = options.out_dir / f"{name}-{steps}-steps-seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    problem = task.problem(options.data_dir, seed)
    runs = [Run(problem, method, seed, folder) for method in methods(steps)]
    race(runs, steps, task.turn, f"{name}, seed {seed}")
    return [run.record() | {"seed": seed} for run in runs], runs[0].steps_per_epoch


def parse_options() -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--data-dir", type=Path, help="directory of the files of MNIST and of CIFAR's folder"
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of networks and batches")
    parser.add_argument("--steps", type=int, help="of every task, for a quick try")
    parser.add_argument("--out-dir", type=Path, default=Path("results/defaults"))
    options = parser.parse_args()
    needing = [name for name in options.tasks if name in WITH_DATA]
    if needing and options.data_dir is None:
        parser.error(
            f"for {' and '.join(needing)} give --data-dir: a directory with the files of MNIST and with CIFAR-10's "
            "folder cifar-10-batches-bin, or into which they are downloaded."
        )
    return options


def main() -> None:
    """Runs the benchmark."""
    options = parse_options()
    records: dict[str, list[dict[str, Any]]] = {}
    shown = {"train_loss": "training loss"}
    for name in options.tasks:
        records[name], epoch = [], 1
        for seed in options.seeds:
            more, epoch = train(name, options, seed)
            records[name] += more
        means = [
            {**runs[0], "curve": mean_curve([run["curve"] for run in runs])}
            for runs in by_setting(records[name])
        ]
        plot_curves(means, epoch, shown, options.out_dir / f"{name}.png")
    print(results_table(records))
    results = {"environment": environment(), "seeds": options.seeds, "runs": records}
    write_results(results, options.out_dir / "defaults.json")
    print(f"The curves are in {options.out_dir}.")


if __name__ == "__main__":
    main()
