"""How large TKFAC's damping is beside the curvature of ResNet20 on CIFAR-10: Figure 3 of the paper.

    python -m benchmarks.damping --data-dir DIR [--steps 2000 | --epochs 5] [--seeds 0] [--out-dir results/damping]

`--steps 60 --interval 10 --turn 10` is a run of a few minutes on two cores. Three runs side by side: normal damping,
trace damping, and trace damping without a floor of the traces. Every `--turn` steps the trace and the damping ratios of
every layer are written down, as `tkfac_jax.diagnostics` gives them. The official binary files are read from DIR.
A run that is stopped goes on where it was when the command is given again.
"""

import os

# LAPACK's threads would compete with XLA's.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

import tkfac_jax as tkfac
from benchmarks.cifar_data import load_split
from benchmarks.figures import table
from benchmarks.networks import ResNet, predict_with_batch_stats
from benchmarks.runner import Method, Problem, Run, environment, race
from benchmarks.series import columns, write_json

BATCH_SIZE, EVALUATED = 128, 500
# Of the paper's ResNet20, Table 2, part II.
RATE, DAMPING, FLOOR = 1e-3, 1e-3, 1e-2
# Below every trace, and above what float32 would flush to zero.
NO_FLOOR = 1e-30
FIGURES = ("trace", "phi_ratio", "psi_ratio")
LABELS = {
    "phi_ratio": "damping / mean diagonal of $\\delta\\Phi$",
    "psi_ratio": "damping / mean diagonal of $\\delta\\Psi$",
    "trace": "trace $\\delta$",
}


def read_cifar(data_dir: Path) -> tuple[np.ndarray, np.ndarray]:
    """CIFAR-10's training images, bytes `(examples, 32, 32, 3)`, and their labels."""
    return load_split(data_dir, "cifar10", "train")


def scaled(images: Any) -> jax.Array:
    """Bytes as float32 of about mean 0 and variance 1."""
    return (jnp.asarray(images, jnp.float32) - 127.5) / 64


def resnet_problem(
    data_dir: Path, seed: int, *, depth: int, width: int, batch_size: int = BATCH_SIZE
) -> Problem:
    """A residual network, `width` channels in its first stage, with CIFAR-10; without augmentation."""
    images, labels = read_cifar(data_dir)
    model, likelihood = ResNet(depth, widths=(width, 2 * width, 4 * width)), tkfac.Categorical()
    init = jax.jit(lambda key, x: model.init(key, scaled(x), train=False))
    variables = init(jax.random.key(seed), images[:1])

    in_training = predict_with_batch_stats(model)

    def predict(params: Any, batch_stats: Any, x: Any) -> tuple[Any, Any]:
        return in_training(params, batch_stats, scaled(x))

    @jax.jit
    def loss(params: Any, batch_stats: Any, x: Any, y: Any) -> jax.Array:
        logits: Any = model.apply(
            {"params": params, "batch_stats": batch_stats}, scaled(x), train=False
        )
        return likelihood.nll(logits, y).mean()

    def evaluate(params: Any, batch_stats: Any) -> dict[str, float]:
        return {"train_loss": float(loss(params, batch_stats, *evaluated))}

    evaluated = images[:EVALUATED], labels[:EVALUATED]
    return Problem(
        predict,
        likelihood,
        variables["params"],
        variables["batch_stats"],
        images,
        labels,
        batch_size,
        evaluate,
    )


def dampings() -> dict[str, Any]:
    """The dampings that are compared."""
    return {
        "normal damping": tkfac.normal_damping(DAMPING),
        "trace damping": tkfac.trace_damping(FLOOR, DAMPING),
        "trace damping, no floor": tkfac.trace_damping(NO_FLOOR, DAMPING),
    }


def training_method(name: str, interval: int) -> Method:
    """TKFAC with one of the dampings."""
    return Method(
        name,
        f"lr {RATE:g}, interval {interval}",
        lambda layers: tkfac.tkfac(RATE, layers, damping=dampings()[name]),
        interval,
    )


class WatchedRun(Run):
    """A run of one of the dampings, whose curve also holds what its state says of every layer."""

    def _evaluate(self) -> dict[str, float]:
        figures = super()._evaluate()
        # Before the first statistics there are no ratios.
        return figures | self._report() if self.step else figures

    @functools.cached_property
    def _figures(self) -> Any:
        """The function from the optimizer's state to the figures of every layer."""
        damping = dampings()[self.method.name]

        # In one program, condition numbers that nobody asks for are not computed.
        @jax.jit
        def figures(state: Any) -> dict[str, dict[str, Any]]:
            found = tkfac.diagnostics(state, self.layers, damping=damping)
            return {
                name: {figure: getattr(layer, figure) for figure in FIGURES}
                for name, layer in found.items()
            }

        return figures

    def _report(self) -> dict[str, float]:
        found = self._figures(self.trees[1])
        # jax.jit sorts names; layers have an order.
        return {
            f"{name} {figure}": float(found[name][figure])
            for name in self.layers
            for figure in FIGURES
        }


def shown_layers(curve: Mapping[str, Any]) -> list[str]:
    """Four convolutions, from the first to the last, and the dense layer, as in Figure 3."""
    names = [name.split()[0] for name in curve if name.endswith(" trace")]
    convs = [name for name in names if "Conv" in name]
    places = np.linspace(0, len(convs) - 1, 4).round().astype(int)
    return [convs[i] for i in places] + [name for name in names if name not in convs]


def damping_table(curves: Mapping[str, Mapping[str, Any]]) -> str:
    """Traces and ratios of some layers at the first and the last record.

    The last column is what is added to the diagonal of `sqrt(delta) Phi` beside the mean of this diagonal.
    """

    def cell(values: Sequence[float | None]) -> str:
        return ", ".join("not finite" if v is None else f"{v:.3g}" for v in (values[1], values[-1]))

    steps = next(iter(curves.values()))["step"]
    head = ("damping", "layer", f"trace at {steps[1]}, {steps[-1]}", "ratio of Phi", "ratio of Psi")
    rows: list[tuple[str, ...]] = [(*head, "ratio of Phi x root of the trace")]
    for name, curve in curves.items():
        for layer in shown_layers(curve):
            trace, phi, psi = (curve[f"{layer} {figure}"] for figure in FIGURES)
            roots = [
                None if t is None or p is None else p * t**0.5
                for t, p in zip(trace, phi, strict=True)
            ]
            rows.append((name, layer, *map(cell, (trace, phi, psi, roots))))
    return table(rows)


def plot(curves: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draws ratios and traces of some layers along training, a damping in a row."""
    drawing, panels = plt.subplots(
        len(curves), 3, figsize=(12, 3 * len(curves)), squeeze=False, sharex=True, sharey="col"
    )
    for row, (name, curve) in zip(panels, curves.items(), strict=True):
        for panel, figure in zip(row, LABELS, strict=True):
            for layer in shown_layers(curve):
                values = [np.nan if v is None else v for v in curve[f"{layer} {figure}"]]
                panel.plot(curve["step"], values, label=layer)
            panel.set(yscale="log", ylabel=LABELS[figure])
            panel.set_title(name, fontsize=10)
            panel.grid(alpha=0.3)
            if figure.endswith("ratio"):
                panel.axhline(1, color="black", linewidth=0.8, linestyle=":")
    panels[0][0].legend(fontsize=7)
    for panel in panels[-1]:
        panel.set_xlabel("step")
    drawing.tight_layout()
    drawing.savefig(path, dpi=80)
    plt.close(drawing)


def arguments(doc: str | None, out_dir: str, depth: int) -> argparse.ArgumentParser:
    """The options of a benchmark that trains a residual network on CIFAR-10."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    parser.add_argument("--data-dir", type=Path, required=True, help="directory of the CIFAR files")
    parser.add_argument("--out-dir", type=Path, default=Path(out_dir))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--interval", type=int, default=100, help="between statistics and inverses")
    parser.add_argument("--depth", type=int, default=depth, help="of the network")
    parser.add_argument("--width", type=int, default=16, help="channels of the first stage")
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE)
    return parser


def add_length(parser: argparse.ArgumentParser, **steps: Any) -> None:
    """The option `--steps`, of that form, and `--epochs` in its place."""
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, **steps)
    length.add_argument(
        "--epochs",
        type=float,
        nargs=steps.get("nargs"),
        help="instead of --steps, also parts of one",
    )


def to_steps(epochs: float, run: Run) -> int:
    """The steps of so many epochs."""
    return round(epochs * run.steps_per_epoch)


def problem_of(options: argparse.Namespace, seed: int) -> tuple[Problem, Path]:
    """What the options say is trained with a seed, and the folder of its checkpoints."""
    folder = options.out_dir / f"checkpoints-seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"depth": options.depth, "width": options.width, "batch_size": options.batch_size}
    return resnet_problem(options.data_dir, seed, **sizes), folder


def facts(options: argparse.Namespace) -> dict[str, Any]:
    """What the results depend on."""
    names = ("depth", "width", "batch_size", "interval")
    return {"environment": environment()} | {name: getattr(options, name) for name in names}


def main() -> None:
    """Runs the benchmark."""
    parser = arguments(__doc__, "results/damping", depth=20)
    add_length(parser, default=2000)
    parser.add_argument("--turn", type=int, default=100, help="steps between records")
    options = parser.parse_args()

    curves = {}
    for seed in options.seeds:
        problem, folder = problem_of(options, seed)
        methods = [training_method(name, options.interval) for name in dampings()]
        runs = [WatchedRun(problem, method, seed, folder) for method in methods]
        steps = options.steps if options.epochs is None else to_steps(options.epochs, runs[0])
        race(runs, steps, options.turn, f"seed {seed}")
        curves[str(seed)] = {run.method.name: columns(run.curve, 4) for run in runs}
    write_json(facts(options) | {"curves": curves}, options.out_dir / "damping.json")
    for seed, of_seed in curves.items():
        print(f"seed {seed}:")
        print(damping_table(of_seed))
        plot(of_seed, options.out_dir / f"damping-seed-{seed}.png")
    print(f"The pictures are in {options.out_dir}.")


if __name__ == "__main__":
    main()
