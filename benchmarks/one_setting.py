"""`tkfacw` at one setting for three tasks, beside other designs of it and beside its peers.

    python -m benchmarks.one_setting --data-dir DIR [--tasks gpt autoencoder resnet20] [--methods ...] [--seeds 0]

The tasks are those of `benchmarks.defaults`. Each method, a variant of `tkfacw` or a peer, runs at each of `--rates`,
or else at its own; all with a warm-up over a twentieth of the steps and a cosine down to 0, on the same batches from
the same initial parameters. Results are kept in one file, run by run: what is there already is not run again, so that
the command can be stopped, given again, and extended. With `--table` it only shows what there is; with `--picture` it
draws the final loss against the rate.
"""

import os

# LAPACK's threads would compete with XLA's.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import functools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import optax
from filelock import FileLock

import tkfac_jax as tkfac
from benchmarks.autoencoder import growing_decay
from benchmarks.defaults import TASKS, WITH_DATA, schedule
from benchmarks.directions import (
    adam_in_ball,
    momentum_in_ball,
    muon_in_ball,
    power_inverse,
    preconditioned_in_ball,
    without,
)
from benchmarks.figures import mean_and_deviation, table
from benchmarks.runner import Method, Run, environment, race
from benchmarks.series import write_results

RATE = 0.04
INTERVAL = 10
NAMES = ("gpt", "autoencoder", "resnet20")
Build = Callable[[tkfac.Layers, Any], Any]


class Variant(NamedTuple):
    """A design.

    Attributes:
      build: from layers and schedule to the optimizer.
      rate: its learning rate, if no other is asked for.
      interval: steps between statistics and inverses; None for a first-order method.
      estimator: the Fisher of the statistics.
      shape: from the rate and the number of steps to the schedule.
    """

    build: Build
    rate: float = RATE
    interval: int | None = INTERVAL
    estimator: str = "sampled"
    shape: Callable[[float, int], optax.Schedule] = schedule


def tkfacw(**options: Any) -> Build:
    """The optimizer with options."""
    return lambda layers, rate: tkfac.tkfacw(rate, layers, **options)


def from_pieces(**options: Any) -> Build:
    """Its pieces, put together otherwise."""
    interval = {"fisher_interval": INTERVAL, "inverse_interval": INTERVAL, "averaging": "factors"}
    options = interval | {"decay": decay_of(0.95**INTERVAL)} | options
    return lambda layers, rate: preconditioned_in_ball(layers, rate, **options)


def decay_of(limit: float) -> Callable[[Any], Any]:
    """A plain mean at first, then a moving average."""
    return lambda updates: growing_decay(updates).clip(max=limit)


def at_intervals(interval: int) -> Variant:
    """Statistics and inverses every so many steps."""
    options = {"fisher_interval": interval, "inverse_interval": interval}
    return Variant(tkfacw(**options), interval=interval)


def with_warm_up(share: float) -> Callable[[float, int], optax.Schedule]:
    """The schedule with a warm-up over another share of the steps."""

    def shape(rate: float, steps: int) -> optax.Schedule:
        warm = round(share * steps)
        if not warm:
            return optax.cosine_decay_schedule(rate, steps)
        return optax.warmup_cosine_decay_schedule(0.0, rate, warm, steps)

    return shape


def warm_up_stable_decay(rate: float, steps: int) -> optax.Schedule:
    """A constant rate, of which only the last fifth of the steps goes down to 0."""
    warm, end = max(1, steps // 20), steps // 5
    parts = [
        optax.linear_schedule(0.0, rate, warm),
        optax.constant_schedule(rate),
        optax.linear_schedule(rate, 0.0, end),
    ]
    return optax.join_schedules(parts, [warm, steps - end])


def constant(rate: float, steps: int) -> optax.Schedule:
    """A constant rate after the warm-up."""
    return optax.warmup_constant_schedule(0.0, rate, max(1, steps // 20))


def embeddings_and_output_by_adam(layers: tkfac.Layers, rate: Any) -> Any:
    """TKFAC on the hidden layers alone."""
    last = list(layers)[-1]
    chosen = without(layers, ("embed",), ("head", last))
    return tkfac.tkfacw(rate, chosen)


def adamw(layers: tkfac.Layers, rate: Any) -> Any:
    """AdamW with the decay of squares that suits Transformers."""
    del layers
    return optax.adamw(rate, b2=0.95, weight_decay=0.0)


def muon(layers: tkfac.Layers, rate: Any) -> Any:
    """Optax's Muon, Adam at the same rate for what is no matrix."""
    del layers
    return optax.contrib.muon(rate, adam_b2=0.95)


VARIANTS: dict[str, Variant] = {
    "tkfacw": Variant(tkfacw()),
    "raw moments averaged": Variant(tkfacw(averaging="moments")),
    "averages over 200 steps": Variant(tkfacw(decay=growing_decay)),
    "averages over 6 steps": Variant(tkfacw(decay=decay_of(0.2))),
    "share 0.05": Variant(tkfacw(damping=0.05)),
    "share 0.1": Variant(tkfacw(damping=0.1)),
    "share 0.4": Variant(tkfacw(damping=0.4)),
    "share 1": Variant(tkfacw(damping=1.0)),
    "no ball": Variant(tkfacw(ball_radius=float("inf"))),
    "radius 0.1": Variant(tkfacw(ball_radius=0.1)),
    "radius 0.3": Variant(tkfacw(ball_radius=0.3)),
    "radius 3": Variant(tkfacw(ball_radius=3.0)),
    "floor 0.3": Variant(tkfacw(floor=0.3)),
    "momentum 0.8": Variant(tkfacw(momentum=0.8)),
    "momentum 0.95": Variant(tkfacw(momentum=0.95)),
    "momentum 0.98": Variant(tkfacw(momentum=0.98)),
    "interval 1": at_intervals(1),
    "interval 5": at_intervals(5),
    "interval 25": at_intervals(25),
    "empirical Fisher": Variant(tkfacw(), estimator="empirical"),
    "KFAC's rule": Variant(tkfacw(rule=tkfac.independent)),
    "powers 1/2": Variant(from_pieces(inverse=power_inverse(0.5))),
    "powers 3/4": Variant(from_pieces(inverse=power_inverse(0.75))),
    "polar factor after it": Variant(from_pieces(polar=True)),
    "embeddings, output by Adam": Variant(embeddings_and_output_by_adam),
    "weight decay 0.1": Variant(tkfacw(weight_decay=0.1)),
    "no warm-up": Variant(tkfacw(), shape=with_warm_up(0.0)),
    "warm-up 1%": Variant(tkfacw(), shape=with_warm_up(0.01)),
    "constant, last fifth down": Variant(tkfacw(), shape=warm_up_stable_decay),
    "constant": Variant(tkfacw(), shape=constant),
    "Muon in the ball": Variant(muon_in_ball, 0.03, None),
    "Adam in the ball": Variant(adam_in_ball, 0.03, None),
    "momentum in the ball": Variant(momentum_in_ball, 0.03, None),
    "AdamW": Variant(adamw, 0.003, None),
    "Muon": Variant(muon, 0.02, None),
}
# Whose average of the parameters is evaluated, too: the weight of the past.
AVERAGED = {"constant": 0.98}


def method(name: str, rate: float, steps: int) -> Method:
    """A variant at a rate, for a training of so many steps."""
    variant = VARIANTS[name]
    shape = variant.shape(rate, steps)
    return Method(
        name,
        f"rate {rate:g}",
        lambda layers: variant.build(layers, shape),
        variant.interval,
        estimator=variant.estimator,
    )


def identity(record: dict[str, Any]) -> tuple[Any, ...]:
    """What tells one run from another."""
    return tuple(record[key] for key in ("task", "method", "rate", "steps", "seed"))


def read(path: Path) -> list[dict[str, Any]]:
    """The runs of a file of results; none if there is no file."""
    return json.loads(path.read_text())["runs"] if path.exists() else []


def add(path: Path, record: dict[str, Any]) -> None:
    """Adds a run to a file, to which another command may add at the same moment."""
    with FileLock(f"{path}.lock"):
        runs = {identity(run): run for run in [*read(path), record]}
        order = [*VARIANTS]
        ordered = sorted(
            runs.values(),
            key=lambda run: (
                list(TASKS).index(run["task"]),
                run["steps"],
                order.index(run["method"]),
                run["rate"],
                run["seed"],
            ),
        )
        write_results({"environment": environment(), "runs": ordered}, path)


def results_table(runs: Sequence[dict[str, Any]]) -> str:
    """The final training loss and what the test says, by method and rate: a column for each task and length."""
    columns = list(dict.fromkeys((run["task"], run["steps"]) for run in runs))
    rows = [("method", "rate", *(f"{task}, {steps}" for task, steps in columns))]
    for name in dict.fromkeys(run["method"] for run in runs):
        own = [run for run in runs if run["method"] == name]
        for rate in sorted({run["rate"] for run in own}):
            cells = []
            for task, steps in columns:
                chosen = [
                    run["end"]
                    for run in own
                    if (run["task"], run["steps"], run["rate"]) == (task, steps, rate)
                ]
                cells.append(_cell(task, chosen))
            rows.append((name, f"{rate:g}", *cells))
    return table(rows)


def _cell(task: str, ends: Sequence[dict[str, Any]]) -> str:
    if not ends:
        return ""
    if any(end["train_loss"] is None for end in ends):
        return "diverged"
    key, _, form = TASKS[task].test
    digits = ".2f" if task == "autoencoder" else ".3f"
    cell = mean_and_deviation([end["train_loss"] for end in ends], digits)
    cell += f"; {mean_and_deviation([end[key] for end in ends], form)}"
    if "averaged_train_loss" in ends[0]:
        averaged = mean_and_deviation([end["averaged_train_loss"] for end in ends], digits)
        cell += f" (averaged {averaged})"
    return cell


def parse_options() -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--data-dir", type=Path, help="directory of the files of MNIST and of CIFAR's folder"
    )
    parser.add_argument("--tasks", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument(
        "--methods", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="METHOD"
    )
    parser.add_argument("--rates", type=float, nargs="+", help="of all methods")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of networks and batches")
    parser.add_argument("--steps", type=int, help="of every task, if not its own number")
    parser.add_argument("--table", action="store_true", help="only show what there is")
    parser.add_argument("--picture", type=Path, help="draw the losses against the rates")
    parser.add_argument("--out", type=Path, default=Path("results/one_setting.json"))
    options = parser.parse_args()
    needing = [name for name in options.tasks if name in WITH_DATA]
    if needing and options.data_dir is None and not (options.table or options.picture):
        parser.error(f"for {' and '.join(needing)} give --data-dir; see benchmarks.defaults.")
    return options


def run_all(options: argparse.Namespace) -> None:
    """Makes the runs that are asked for and are not there yet."""
    options.out.parent.mkdir(parents=True, exist_ok=True)
    make_problem = functools.lru_cache(maxsize=1)(
        lambda task, seed: TASKS[task].problem(options.data_dir, seed)
    )
    for task in options.tasks:
        steps = options.steps or TASKS[task].steps
        for seed in options.seeds:
            for name in options.methods:
                for rate in options.rates or (VARIANTS[name].rate,):
                    facts = {
                        "task": task,
                        "method": name,
                        "rate": rate,
                        "steps": steps,
                        "seed": seed,
                    }
                    if identity(facts) in map(identity, read(options.out)):
                        continue
                    run = Run(
                        make_problem(task, seed),
                        method(name, rate, steps),
                        seed,
                        averaging=AVERAGED.get(name),
                    )
                    race([run], steps, max(1, steps // 4), f"{task}, {name}, {rate:g}")
                    record = run.record()
                    losses = [point["train_loss"] for point in run.curve]
                    facts |= {"end": run.curve[-1], "train_losses": losses}
                    add(options.out, facts | {"ms": record["median_step_ms"]})


def main() -> None:
    """Runs the benchmark."""
    options = parse_options()
    if not (options.table or options.picture):
        run_all(options)
    runs = read(options.out)
    print(results_table(runs))
    if options.picture:
        draw(runs, options.picture)
        print(f"The losses are in {options.picture}.")


def draw(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws the final training loss against the rate, as a multiple of the method's own, one plot a task."""
    import matplotlib.pyplot as plt

    runs = [run for run in runs if run["steps"] == TASKS[run["task"]].steps and run["seed"] == 0]
    methods = Counter((run["task"], run["method"]) for run in runs)
    tasks = [task for task in NAMES if any(methods[task, name] > 2 for name in VARIANTS)]
    figure, plots = plt.subplots(1, len(tasks), figsize=(4.5 * len(tasks), 3.6), squeeze=False)
    for plot, task in zip(plots[0], tasks, strict=True):
        own = [run for run in runs if run["task"] == task]
        for name in dict.fromkeys(run["method"] for run in own):
            points = sorted(
                (run["rate"] / VARIANTS[name].rate, run["end"]["train_loss"] or float("nan"))
                for run in own
                if run["method"] == name
            )
            if len(points) > 2:
                plot.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        plot.set_xscale("log", base=2)
        plot.set(xlabel="rate / the method's own", title=task)
    plots[0][0].set_ylabel("training loss at the end")
    plots[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    main()
