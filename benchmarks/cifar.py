"""The paper's experiments on CIFAR-10 and CIFAR-100: SGDM, Adam, KFAC, TKFAC_nor and TKFAC_new side by side.

    python -m benchmarks.cifar --data-dir DIR --dataset cifar10 --network resnet20 [--epochs 8] [--seeds 0 1]

Figures 5 and 10: `--part 1 --dataset cifar10 --network vgg16`. Figure 6: `--dataset cifar100` with `vgg16` and with
`resnet20`. Table 1: both networks with both data sets. The paper trains for 200 epochs with five seeds.

Batches of 128, cropped at random out of 4 more pixels on each side (black ones) and mirrored at random, anew for every
batch; cross-entropy without weight decay; momentum 0.9; statistics and inverses every 100 steps. The settings are
those of Table 2, or `--rate` in place of its learning rates; with `--tune` each method first tries five of the paper's
grids, these and what is next to them, on short runs with the whole schedule, and the lowest training loss decides. In
part 2 the learning rate is divided by 10 every 40 of 200 epochs (KFAC, TKFAC) or every 60 (SGDM, Adam), or `--drop`,
scaled to `--epochs`; in part 1 it is constant.

What the paper leaves open: BatchNorm's parameters are no layers of KFAC and TKFAC; Adam trains them with Table 2's
setting of Adam (or at `--fallback-rate`) and the schedule of their method. Losses and accuracies are those of the
model at rest, with BatchNorm's running averages and images as they are, over all of the test set and the first
`--evaluation-examples` of the training set. ResNet20 has 16, 32 and 64 channels as He et al. define it, with 0.27
million parameters; `--width 4` gives it the 64, 128 and 256 of the code that accompanies the paper.

All methods of a seed advance in turns, and runs that are stopped go on where they were when the command is given
again. What a results file of the same experiment in the directory already holds, trials of as many steps too, is kept
and not run again, and each seed is added when it is done, so that methods and seeds can be run in several sittings,
side by side, and on several machines. Seconds are those of the training steps, for batches made beforehand. The
official binary files are read from DIR, or downloaded there.
"""

import os

# LAPACK's threads would compete with XLA's.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from filelock import FileLock

import tkfac_jax as tkfac
from benchmarks.cifar_data import FORMATS, channel_statistics, crop_and_flip, load_split
from benchmarks.figures import mean_and_deviation, mean_record, plot_curves, table, tuning_table
from benchmarks.networks import VGG16, WIDTHS, ResNet, predict_with_batch_stats
from benchmarks.runner import Method, Problem, Run, choose, environment, race
from benchmarks.series import write_results

BATCH_SIZE = 128
EVALUATION_BATCH = 500
EVALUATION_EXAMPLES = 10_000
INTERVAL = 100
MOMENTUM = 0.9
# Of the paper's runs and between its divisions of the learning rate, in epochs.
WHOLE_RUN = 200
FIRST_ORDER_DROP, SECOND_ORDER_DROP = 60, 40

Setting = tuple[float, ...]

# Of the numbers of a setting: Table 2's alpha, lambda and nu.
NUMBERS = {
    "SGDM": ("lr",),
    "Adam": ("lr", "epsilon"),
    "KFAC": ("lr", "damping"),
    "TKFAC_nor": ("lr", "damping"),
    "TKFAC_new": ("lr", "damping", "floor"),
}
# Which of them the trials vary.
VARIED = {
    "SGDM": ("lr",),
    "Adam": ("lr",),
    "KFAC": ("lr", "damping"),
    "TKFAC_nor": ("lr", "damping"),
    # Before a network has fitted its data its traces are far above any floor of the grid that is not ruinous.
    "TKFAC_new": ("lr",),
}
GRIDS = {
    "lr": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0),
    "damping": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
}
RESNET_SETTINGS: dict[str, Setting] = {
    "SGDM": (0.03,),
    "Adam": (1e-3, 1e-8),
    "KFAC": (1e-3, 1e-3),
    "TKFAC_nor": (1e-3, 1e-3),
    "TKFAC_new": (1e-3, 1e-3, 1e-2),
}
TABLE_2: dict[tuple[int, str], dict[str, Setting]] = {
    (1, "vgg16"): {
        "SGDM": (0.01,),
        "Adam": (1e-3, 1e-8),
        "KFAC": (1e-3, 1e-3),
        "TKFAC_nor": (1e-3, 1e-3),
    },
    (2, "vgg16"): {
        "SGDM": (0.03,),
        "Adam": (3e-4, 1e-8),
        "KFAC": (1e-3, 1e-3),
        "TKFAC_nor": (1e-3, 1e-3),
        "TKFAC_new": (1e-3, 1e-3, 1.0),
    },
    (2, "resnet20"): RESNET_SETTINGS,
    # The paper trains ResNet32 for a figure about its layers and gives it no settings.
    (2, "resnet32"): RESNET_SETTINGS,
}


def _resnet(depth: int, classes: int, width: float) -> nn.Module:
    return ResNet(depth, classes, tuple(round(channels * width) for channels in WIDTHS))


NETWORKS: dict[str, Callable[[int, float], nn.Module]] = {
    "resnet20": functools.partial(_resnet, 20),
    "resnet32": functools.partial(_resnet, 32),
    "vgg16": VGG16,
}


class Cifar(NamedTuple):
    """A data set: images as bytes, `(examples, 32, 32, 3)`, and labels."""

    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    classes: int

    def first(self, train: int | None, test: int | None = None) -> "Cifar":
        """The set with so many of its first examples; None: all."""
        (images, labels), (test_images, test_labels) = self.train, self.test
        return Cifar(
            (images[:train], labels[:train]), (test_images[:test], test_labels[:test]), self.classes
        )


def load_cifar(data_dir: Path, dataset: str) -> Cifar:
    """Both splits of `"cifar10"` or `"cifar100"`."""
    train, test = (load_split(data_dir, dataset, split) for split in ("train", "test"))
    return Cifar(train, test, FORMATS[dataset].classes)


def cifar_problem(
    data: Cifar, model: nn.Module, seed: int, evaluation_examples: int | None = EVALUATION_EXAMPLES
) -> Problem:
    """A network with its initial parameters and a data set, whose training batches are cropped and mirrored.

    Images stay bytes until `predict` normalises them by mean and deviation of the training set's channels.
    """
    likelihood = tkfac.Categorical()
    mean, deviation = channel_statistics(data.train[0])
    forward = predict_with_batch_stats(model)
    evaluated = data.first(evaluation_examples).train

    def normalised(images: Any) -> jax.Array:
        return (jnp.asarray(images, jnp.float32) - mean) / deviation

    def predict(params: Any, batch_stats: Any, images: Any) -> tuple[jax.Array, Any]:
        return forward(params, batch_stats, normalised(images))

    @jax.jit
    def totals(params: Any, batch_stats: Any, images: Any, labels: Any) -> Any:
        variables = {"params": params, "batch_stats": batch_stats}
        logits: Any = model.apply(variables, normalised(images), train=False)
        return jnp.stack(
            [likelihood.nll(logits, labels).sum(), (logits.argmax(-1) == labels).sum()]
        )

    def averages(params: Any, batch_stats: Any, images: Any, labels: Any) -> np.ndarray:
        parts = [
            (images[start : start + EVALUATION_BATCH], labels[start : start + EVALUATION_BATCH])
            for start in range(0, len(labels), EVALUATION_BATCH)
        ]
        total = np.sum([totals(params, batch_stats, *part) for part in parts], axis=0)
        return total / len(labels)

    def evaluate(params: Any, batch_stats: Any) -> dict[str, float]:
        figures = {}
        for split, examples in (("train", evaluated), ("test", data.test)):
            loss, accuracy = averages(params, batch_stats, *examples)
            figures |= {f"{split}_loss": float(loss), f"{split}_accuracy": float(accuracy)}
        return figures

    init = jax.jit(functools.partial(model.init, train=False))
    variables = init(jax.random.key(seed), normalised(data.train[0][:1]))
    return Problem(
        predict,
        likelihood,
        variables["params"],
        variables["batch_stats"],
        *data.train,
        BATCH_SIZE,
        evaluate,
        crop_and_flip,
    )


def schedule(rate: float, drop: int, steps: int | None) -> optax.ScalarOrSchedule:
    """The learning rate divided by 10 every `drop` of 200 epochs, scaled to a run of so many steps; None: constant."""
    if steps is None:
        return rate
    between = max(1, round(steps * drop / WHOLE_RUN))
    return optax.exponential_decay(rate, between, 0.1, staircase=True)


def adam(setting: Setting, drop: int, steps: int | None) -> optax.GradientTransformation:
    """Adam of a learning rate and an epsilon."""
    rate, epsilon = setting
    return optax.adam(schedule(rate, drop, steps), b1=MOMENTUM, eps=epsilon)


def make_method(
    name: str, setting: Setting, fallback: Setting, steps: int | None, drop: int | None = None
) -> Method:
    """A method with a setting.

    Args:
      name: the method.
      setting: its numbers.
      fallback: the setting of BatchNorm's Adam.
      steps: those of `schedule`.
      drop: likewise; by default the paper's for this method.
    """
    text = ", ".join(
        f"{what} {value:g}" for what, value in zip(NUMBERS[name], setting, strict=True)
    )
    first_order = name in ("SGDM", "Adam")
    drop = drop or (FIRST_ORDER_DROP if first_order else SECOND_ORDER_DROP)
    rate = schedule(setting[0], drop, steps)
    if name == "SGDM":
        return Method(name, text, lambda _: optax.sgd(rate, momentum=MOMENTUM))
    if name == "Adam":
        return Method(name, text, lambda _: adam(setting, drop, steps))

    def build(layers: tkfac.Layers) -> optax.GradientTransformationExtraArgs:
        damping = setting[1]
        return (tkfac.kfac if name == "KFAC" else tkfac.tkfac)(
            rate,
            layers,
            momentum=MOMENTUM,
            damping=tkfac.trace_damping(setting[2], damping) if name == "TKFAC_new" else damping,
            decay=0.95,
            fallback=adam(fallback, drop, steps),
        )

    return Method(name, text, build, INTERVAL)


def neighbours(name: str, setting: Setting) -> list[Setting]:
    """Five settings of the paper's grids: the given one first, then those that differ from it in one number."""
    varied = VARIED[name]
    count = 4 // len(varied) + 1
    found = [setting]
    for what in varied:
        grid, place = GRIDS[what], NUMBERS[name].index(what)
        start = grid.index(setting[place]) - count // 2
        start = min(max(start, 0), len(grid) - count)
        found += [
            (*setting[:place], value, *setting[place + 1 :])
            for value in grid[start : start + count]
            if value != setting[place]
        ]
    return found


def trials(
    part: int,
    network: str,
    steps: int,
    drop: int | None = None,
    fallback_rate: float | None = None,
    rate: float | None = None,
) -> dict[str, list[Method]]:
    """Five settings of each method for runs of so many steps, Table 2's first unless there is a rate.

    Args:
      part: of the paper's section 6.
      network: one of `NETWORKS`.
      steps: of a run.
      drop: as in `make_method`.
      fallback_rate: learning rate of BatchNorm's Adam; None: Table 2's of Adam.
      rate: learning rate of the first setting, one of the grid; None: Table 2's.
    """
    settings = TABLE_2[part, network]
    horizon = steps if part == 2 else None
    adam_rate, epsilon = settings["Adam"]
    fallback = (adam_rate if fallback_rate is None else fallback_rate, epsilon)
    if rate is not None:
        settings = {name: (rate, *setting[1:]) for name, setting in settings.items()}
    return {
        name: [
            make_method(name, tried, fallback, horizon, drop) for tried in neighbours(name, setting)
        ]
        for name, setting in settings.items()
    }


def results_table(records: Sequence[dict[str, Any]]) -> str:
    """What each method reached at the end, over its seeds: mean and standard deviation."""
    rows = [("method", "settings", "test accuracy (%)", "training loss", "ms per step")]
    for runs in by_setting(records):
        ends = [run["curve"][-1] for run in runs]
        rows.append(
            (
                runs[0]["method"],
                runs[0]["settings"],
                mean_and_deviation([100 * end["test_accuracy"] for end in ends], ".2f"),
                mean_and_deviation([end["train_loss"] for end in ends], ".4f"),
                mean_and_deviation([run["median_step_ms"] for run in runs], ".0f"),
            )
        )
    return table(rows)


def by_setting(records: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The runs of each method with each of its settings, in the order in which they come."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["method"], record["settings"]), []).append(record)
    return list(groups.values())


def run_seed(
    problem: Problem,
    methods: Sequence[Method],
    seed: int,
    folder: Path,
    steps: int,
    turn: int,
    title: str,
) -> list[dict[str, Any]]:
    """Trains all methods with one seed; what they hold in memory is freed before the next seed."""
    folder.mkdir(parents=True, exist_ok=True)
    runs = [Run(problem, method, seed, folder) for method in methods]
    race(runs, steps, turn, title)
    return [run.record() | {"seed": seed, "environment": environment()} for run in runs]


def earlier_results(path: Path, experiment: Mapping[str, Any]) -> dict[str, Any]:
    """Runs and tuning of a results file, if there is one.

    Raises:
      ValueError: it is of another experiment.
    """
    if not path.exists():
        return {"runs": [], "tuning": {}}
    found = json.loads(path.read_text())
    other = [name for name, value in experiment.items() if found.get(name) != value]
    if other:
        msg = f"{path} is of another experiment, by its {', '.join(other)}: give another --out-dir."
        raise ValueError(msg)
    # A file has null for what is not finite.
    runs = [run | {"curve": [_with_nan(point) for point in run["curve"]]} for run in found["runs"]]
    return {"runs": runs, "tuning": found["tuning"]}


def add_results(
    path: Path,
    experiment: Mapping[str, Any],
    tuning: Mapping[str, Any],
    records: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Adds runs to a results file, beside those of the same experiment that it holds by now; returns all of them."""
    order = list(NUMBERS)
    # Another command may end at the same moment.
    with FileLock(f"{path}.lock"):
        earlier = earlier_results(path, experiment)
        runs = {_identity(record): record for record in [*earlier["runs"], *records]}
        records = sorted(runs.values(), key=lambda run: (run["seed"], order.index(run["method"])))
        tuning = {**earlier["tuning"], **tuning}
        write_results({**experiment, "tuning": tuning, "runs": records}, path)
    return records


def _with_nan(point: Mapping[str, float | None]) -> dict[str, float]:
    return {name: float("nan") if value is None else value for name, value in point.items()}


def _identity(record: Mapping[str, Any]) -> tuple[str, str, int]:
    return record["method"], record["settings"], record["seed"]


def parse_options() -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data-dir", type=Path, required=True, help="directory of CIFAR's folders")
    parser.add_argument("--dataset", choices=FORMATS, default="cifar10")
    parser.add_argument("--network", choices=NETWORKS, default="resnet20")
    parser.add_argument("--width", type=float, default=1.0, help="channels, as a multiple")
    parser.add_argument(
        "--part", type=int, choices=(1, 2), default=2, help="of section 6; 1: constant rates"
    )
    parser.add_argument(
        "--drop",
        type=int,
        metavar="EPOCHS",
        help=f"of {WHOLE_RUN} epochs, after how many the learning rates are divided by 10, for all methods alike; "
        f"by default {SECOND_ORDER_DROP} for KFAC and TKFAC, {FIRST_ORDER_DROP} for SGDM and Adam",
    )
    parser.add_argument(
        "--rate",
        type=float,
        choices=GRIDS["lr"],
        help="learning rate of all methods; by default Table 2's of each",
    )
    parser.add_argument(
        "--fallback-rate",
        type=float,
        metavar="RATE",
        help="learning rate of the Adam that trains BatchNorm's parameters beside KFAC and TKFAC; "
        "by default Table 2's of Adam",
    )
    parser.add_argument("--epochs", type=int, default=8, help="epochs of the final runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of networks and batches")
    parser.add_argument("--methods", nargs="+", choices=NUMBERS, help="all of the part by default")
    parser.add_argument("--tune", action="store_true", help="try five settings with the first seed")
    parser.add_argument("--tuning-epochs", type=int, default=2, help="epochs of each trial")
    parser.add_argument("--turn", type=int, help="steps between evaluations; an epoch if not given")
    parser.add_argument(
        "--evaluation-examples",
        type=int,
        default=EVALUATION_EXAMPLES,
        help="of the training set, for its loss and accuracy",
    )
    parser.add_argument(
        "--examples", type=int, help="at most so many examples of each split, for a quick try"
    )
    parser.add_argument("--out-dir", type=Path, default=Path("results/cifar"))
    options = parser.parse_args()
    if (options.part, options.network) not in TABLE_2:
        parser.error(f"Table 2 has no settings of part {options.part} for {options.network}.")
    if options.drop is not None and (options.drop < 1 or options.part == 1):
        parser.error(
            "--drop takes a number of epochs of at least 1, and part 1 has constant rates."
        )
    if options.fallback_rate is not None and options.fallback_rate < 0:
        parser.error(f"--fallback-rate {options.fallback_rate:g} is negative.")
    if options.examples is not None and options.examples < BATCH_SIZE:
        parser.error(f"--examples {options.examples} is less than a batch of {BATCH_SIZE}.")
    settings = TABLE_2[options.part, options.network]
    options.methods = options.methods or list(settings)
    for name in options.methods:
        if name not in settings:
            parser.error(f"part {options.part} of the paper is without {name}.")
    return options


def main() -> None:
    """Runs the benchmark."""
    options = parse_options()
    data = load_cifar(options.data_dir, options.dataset).first(options.examples, options.examples)
    model = NETWORKS[options.network](data.classes, options.width)
    # The trials and the runs of the first seed share theirs.
    make_problem = functools.lru_cache(maxsize=1)(
        functools.partial(
            cifar_problem, data, model, evaluation_examples=options.evaluation_examples
        )
    )
    epoch = len(data.train[0]) // BATCH_SIZE
    steps, turn = options.epochs * epoch, options.turn or epoch
    title = f"{options.dataset}-{options.network}-width-{options.width:g}-part-{options.part}"
    if options.drop:
        title += f"-drop-{options.drop}"
    if options.fallback_rate is not None:
        title += f"-fallback-rate-{options.fallback_rate:g}"
    if options.examples:
        title += f"-examples-{options.examples}"

    experiment = {
        "dataset": options.dataset,
        "network": options.network,
        "width": options.width,
        "part": options.part,
        "epochs": options.epochs,
        "drop": options.drop,
        "fallback_rate": options.fallback_rate,
        "batch_size": BATCH_SIZE,
        "interval": INTERVAL,
        "train_examples": len(data.train[0]),
        "test_examples": len(data.test[0]),
        "evaluation_examples": options.evaluation_examples,
    }
    path = options.out_dir / f"{title}.json"
    try:
        earlier = earlier_results(path, experiment)
    except ValueError as error:
        raise SystemExit(str(error)) from None

    seed, tuning_steps = options.seeds[0], options.tuning_epochs * epoch
    rates = options.drop, options.fallback_rate, options.rate
    tried = trials(options.part, options.network, tuning_steps, *rates)
    best, tuning = choose(
        make_problem(seed),
        {name: tried[name] for name in options.methods},
        tuning_steps,
        turn,
        seed,
        options.out_dir / title / f"tuning-{tuning_steps}-steps-seed-{seed}"
        if options.tune
        else None,
        earlier["tuning"],
    )
    if tuning:
        print(tuning_table(tuning))
    # The same settings with the schedule of the final runs.
    final = trials(options.part, options.network, steps, *rates)
    methods = [
        next(method for method in final[found.name] if method.settings == found.settings)
        for found in best
    ]

    done = {_identity(record) for record in earlier["runs"]}
    for seed in options.seeds:
        missing = [m for m in methods if (m.name, m.settings, seed) not in done]
        if missing:
            folder = options.out_dir / title / f"{steps}-steps-seed-{seed}"
            found = run_seed(
                make_problem(seed), missing, seed, folder, steps, turn, f"{title}, seed {seed}"
            )
            add_results(path, experiment, tuning, found)
    records = add_results(path, experiment, tuning, [])
    print(results_table(records))

    picture = options.out_dir / f"{title}.png"
    means = [mean_record(runs) for runs in by_setting(records)]
    shown = {"train_loss": "training loss", "test_accuracy": "test accuracy"}
    plot_curves(means, epoch, shown, picture)
    print(f"The curves are in {picture}.")


if __name__ == "__main__":
    main()
