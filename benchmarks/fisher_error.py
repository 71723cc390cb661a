"""How far TKFAC and KFAC are from the exact Fisher: Figures 1 and 2 and Theorem 4.4 of the paper.

    python -m benchmarks.fisher_error --data-dir DIR [--epochs 20] [--seeds 0 1 2 3 4] [--out-dir results/fisher_error]

A network 196-20-20-20-20-10 without biases (`--width` for other hidden layers) learns MNIST at 14 x 14 pixels by TKFAC.
Once an epoch both approximations are compared with the exact Fisher block of every layer, at the same parameters and on
the same images: Frobenius norms of the errors, the bound of Theorem 4.4, and traces. The expectation over targets is
taken in closed form.
A run that is stopped goes on where it was when the command is given again.
"""

import os

# LAPACK's threads would compete with XLA's.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

import tkfac_jax as tkfac
from benchmarks.figures import table
from benchmarks.mnist import load_images, load_labels
from benchmarks.runner import Method, Problem, Run, environment, race
from benchmarks.series import columns, write_json
from tkfac_jax import analysis
from tkfac_jax.curvature.factors import kronecker_factors

HIDDEN, CLASSES = (20, 20, 20, 20), 10
BATCH_SIZE = 500
# Of the paper's fully connected network, Table 2, and its intervals.
RATE, DAMPING, INTERVAL = 0.03, 0.03, 100
RULES = {"TKFAC": tkfac.trace_restricted, "KFAC": tkfac.independent}
ACTIVATIONS: dict[str, tuple[Callable[..., Any], Any]] = {
    "relu": (nn.relu, nn.initializers.he_normal()),
    "tanh": (jnp.tanh, nn.initializers.lecun_normal()),
}
QUANTITIES = ("norm", "error_TKFAC", "error_KFAC", "bound", "trace", "trace_TKFAC", "trace_KFAC")


class Network(nn.Module):
    """The fully connected network, without biases as in the paper."""

    activation: str = "relu"
    hidden: tuple[int, ...] = HIDDEN

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits `(batch, 10)` of images `(batch, 196)`."""
        activation, init = ACTIVATIONS[self.activation]
        for width in self.hidden:
            x = activation(nn.Dense(width, use_bias=False, kernel_init=init)(x))
        return nn.Dense(CLASSES, use_bias=False, kernel_init=init)(x)


def halve(images: np.ndarray) -> np.ndarray:
    """Images `(examples, 784)` at half the resolution, `(examples, 196)`: means of 2 x 2 pixels."""
    return images.reshape(-1, 14, 2, 14, 2).mean((2, 4)).reshape(-1, 196)


def approximated_blocks(
    predict: Callable[..., Any], layers: tkfac.Layers, params: Any, images: Any
) -> dict[str, dict[str, jax.Array]]:
    """By layer its exact Fisher block and both approximations, in the order of `analysis.fisher_blocks`."""
    model, batch = (predict, tkfac.Categorical(), layers), (params, {}, images)
    blocks = {
        name: {"exact": block}
        for name, block in analysis.fisher_blocks(*model, *batch, has_aux=True).items()
    }
    for approximation, rule in RULES.items():
        statistics = tkfac.exact_fisher(*model, rule=rule, has_aux=True)(*batch)
        for name, own in blocks.items():
            own[approximation] = analysis.dense(kronecker_factors(statistics[name]), layers[name])
    return blocks


def compare(
    predict: Callable[..., Any], layers: tkfac.Layers, params: Any, images: Any
) -> dict[str, dict[str, jax.Array]]:
    """By layer its `QUANTITIES`: Frobenius norms, the bound of Theorem 4.4 on TKFAC's error, and traces."""
    bounds = analysis.theorem_bound(
        predict, tkfac.Categorical(), layers, params, {}, images, has_aux=True
    )
    compared = {}
    for name, blocks in approximated_blocks(predict, layers, params, images).items():
        exact = blocks["exact"]
        own = {"norm": jnp.linalg.norm(exact), "bound": bounds[name], "trace": jnp.trace(exact)}
        for rule in RULES:
            error = analysis.approximation_error(exact, blocks[rule])
            own[f"error_{rule}"] = error.absolute
            own[f"trace_{rule}"] = error.trace_approximation
        compared[name] = own
    return compared


def fisher_problem(
    data_dir: Path, seed: int, activation: str, examples: int, hidden: tuple[int, ...] = HIDDEN
) -> tuple[Problem, np.ndarray]:
    """The network on MNIST, compared whenever it is evaluated; and the images on which it is compared."""
    images, labels = halve(load_images(data_dir, "train")), load_labels(data_dir, "train")
    chosen = images[np.random.default_rng(seed).choice(len(images), examples, replace=False)]
    model, likelihood = Network(activation, hidden), tkfac.Categorical()
    params = model.init(jax.random.key(seed), images[:1])["params"]

    def predict(params: Any, model_state: Any, x: Any) -> tuple[Any, Any]:
        return model.apply({"params": params}, x), model_state

    layers = tkfac.find_layers(predict, params, {}, images[:1])
    compare_at = jax.jit(lambda params, images: compare(predict, layers, params, images))

    @jax.jit
    def mean_nll(params: Any, images: Any, labels: Any) -> jax.Array:
        return likelihood.nll(predict(params, {}, images)[0], labels).mean()

    def evaluate(params: Any, model_state: Any) -> dict[str, float]:
        del model_state
        compared = compare_at(params, chosen)
        return {"train_loss": float(mean_nll(params, images, labels))} | {
            f"{name} {quantity}": float(own[quantity])
            for name, own in compared.items()
            for quantity in QUANTITIES
        }

    return Problem(predict, likelihood, params, {}, images, labels, BATCH_SIZE, evaluate), chosen


def training_method(activation: str, hidden: tuple[int, ...]) -> Method:
    """TKFAC with the paper's settings for its fully connected network."""
    return Method(
        "TKFAC",
        f"{activation}, hidden layers {hidden}, lr {RATE:g}, damping {DAMPING:g}",
        lambda layers: tkfac.tkfac(RATE, layers, damping=DAMPING),
        INTERVAL,
    )


def by_layer(curves: Sequence[Mapping[str, Any]], quantity: str) -> np.ndarray:
    """A quantity of all layers, `(seeds, points, layers)`, of the seeds' columns."""
    names = [name for name in curves[0] if name.endswith(f" {quantity}")]
    return np.array([[curve[name] for name in names] for curve in curves]).transpose(0, 2, 1)


def summarise(curves: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How often, of all comparisons of one layer, the bound and the paper's claims hold."""
    found = {quantity: by_layer(curves, quantity) for quantity in QUANTITIES}
    sums = {rule: found[f"error_{rule}"].sum(-1) for rule in RULES}
    return {
        "comparisons": found["bound"].size,
        "bound_violations": int((found["error_TKFAC"] > found["bound"]).sum()),
        "TKFAC_nearer": int((found["error_TKFAC"] < found["error_KFAC"]).sum()),
        "sums": sums["TKFAC"].size,
        "TKFAC_sum_smaller": int((sums["TKFAC"] < sums["KFAC"]).sum()),
    }


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """A ratio of figures that are not negative; 0 where a layer without signal has 0 below."""
    return above / np.where(below > 0, below, 1)


def training_table(curves: Sequence[Mapping[str, Any]]) -> str:
    """The sums of the layers' errors along training, means over seeds with their standard deviation."""

    def cell(values: np.ndarray) -> str:
        return f"{values.mean():.3g} ± {values.std():.2g}"

    head = ("step", "training loss", "error of TKFAC", "error of KFAC", "bound of Theorem 4.4")
    rows: list[tuple[str, ...]] = [head]
    losses = np.array([curve["train_loss"] for curve in curves])
    sums = [by_layer(curves, q).sum(-1) for q in ("error_TKFAC", "error_KFAC", "bound")]
    for i, step in enumerate(curves[0]["step"]):
        rows.append((str(step), *(cell(values[:, i]) for values in (losses, *sums))))
    return table(rows)


def layer_table(curves: Sequence[Mapping[str, Any]]) -> str:
    """Relative errors and traces of every layer, means over seeds and all comparisons."""
    found = {quantity: by_layer(curves, quantity) for quantity in QUANTITIES}
    columns_ = {
        "error of TKFAC / norm": ratio(found["error_TKFAC"], found["norm"]),
        "error of KFAC / norm": ratio(found["error_KFAC"], found["norm"]),
        "bound / error of TKFAC": ratio(found["bound"], found["error_TKFAC"]),
        "trace of TKFAC / exact": ratio(found["trace_TKFAC"], found["trace"]),
        "trace of KFAC / exact": ratio(found["trace_KFAC"], found["trace"]),
    }
    names = [name.split()[0] for name in curves[0] if name.endswith(" bound")]
    rows = [("layer", *columns_)]
    for i, name in enumerate(names):
        rows.append((name, *(f"{values[..., i].mean():.4g}" for values in columns_.values())))
    return table(rows)


def plot_errors(curves: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws the sums of errors, relative errors and traces along training: means over seeds, and their range."""
    drawing, panels = plt.subplots(1, 3, figsize=(13, 3.8))
    steps = np.array(curves[0]["step"])
    norm, trace = by_layer(curves, "norm"), by_layer(curves, "trace").sum(-1)

    def draw(panel: Any, values: np.ndarray, label: str, style: str = "-") -> None:
        (line,) = panel.plot(steps, values.mean(0), style, label=label)
        panel.fill_between(steps, values.min(0), values.max(0), color=line.get_color(), alpha=0.2)

    for rule in RULES:
        error = by_layer(curves, f"error_{rule}")
        draw(panels[0], error.sum(-1), rule)
        draw(panels[1], ratio(error, norm).mean(-1), rule)
        draw(panels[2], ratio(by_layer(curves, f"trace_{rule}").sum(-1), trace), rule)
    draw(panels[0], by_layer(curves, "bound").sum(-1), "bound of Theorem 4.4", "--")
    panels[0].set(ylabel="sum of the layers' errors", yscale="log")
    panels[1].set(ylabel="error / norm of the exact block, mean", ylim=(0, None))
    panels[2].set(ylabel="trace / exact trace, all layers")
    for panel in panels:
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    drawing.tight_layout()
    drawing.savefig(path, dpi=80)
    plt.close(drawing)


def plot_blocks(blocks: Mapping[str, Mapping[str, jax.Array]], path: Path) -> None:
    """Draws exact blocks, approximations and absolute errors, a layer in a row, on one scale of grey in each."""
    # Few shades, for a small file.
    shades = plt.get_cmap("gray", 16)
    drawing, panels = plt.subplots(
        len(blocks), 5, figsize=(10, 2 * len(blocks)), squeeze=False, layout="constrained"
    )
    for row, (name, own) in zip(panels, blocks.items(), strict=True):
        exact = np.abs(own["exact"])
        images = {"exact": exact}
        for rule in RULES:
            images[rule] = np.abs(own[rule])
            images[f"|exact - {rule}|"] = np.abs(own["exact"] - own[rule])
        # The few largest entries would leave the others black.
        white = float(np.quantile(exact, 0.99))
        for panel, (title, image) in zip(row, images.items(), strict=True):
            panel.imshow(image, cmap=shades, vmin=0, vmax=white, interpolation_stage="data")
            panel.set(xticks=[], yticks=[])
            panel.set_title(title, fontsize=9)
        row[0].set_ylabel(name)
    drawing.savefig(path, dpi=70)
    plt.close(drawing)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data-dir", type=Path, required=True, help="directory of the MNIST files")
    parser.add_argument("--out-dir", type=Path, default=Path("results/fisher_error"))
    parser.add_argument("--epochs", type=int, default=20, help="epochs, compared after each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--activation", choices=list(ACTIVATIONS), default="relu")
    parser.add_argument("--examples", type=int, default=500, help="of the batch that is compared")
    parser.add_argument("--width", type=int, default=HIDDEN[0], help="units of each hidden layer")
    options = parser.parse_args()
    hidden = (options.width,) * len(HIDDEN)

    curves, blocks = {}, {}
    for seed in options.seeds:
        problem, chosen = fisher_problem(
            options.data_dir, seed, options.activation, options.examples, hidden
        )
        folder = options.out_dir / f"checkpoints-seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        run = Run(problem, training_method(options.activation, hidden), seed, folder)
        epoch = run.steps_per_epoch
        race([run], options.epochs * epoch, epoch, f"seed {seed}")
        curves[str(seed)] = columns(run.curve)
        if not blocks:
            layers = tkfac.Layers(tuple(run.layers.values())[1:-1])
            at_end = functools.partial(approximated_blocks, problem.predict, layers)
            blocks = jax.jit(at_end)(run.trees[0], chosen)
    found, summary = list(curves.values()), summarise(list(curves.values()))
    print(training_table(found))
    print(layer_table(found))
    print(
        "The bound of Theorem 4.4 was violated in {bound_violations} of {comparisons} comparisons of a layer; TKFAC "
        "was nearer to the exact block than KFAC in {TKFAC_nearer} of them, and its sum of errors the smaller one in "
        "{TKFAC_sum_smaller} of {sums}.".format(**summary)
    )
    results = {
        "environment": environment(),
        "activation": options.activation,
        "hidden": hidden,
        "examples": options.examples,
        "batch_size": BATCH_SIZE,
        "summary": summary,
        "curves": curves,
    }
    write_json(results, options.out_dir / "fisher_error.json")
    plot_errors(found, options.out_dir / "fisher_error.png")
    plot_blocks(blocks, options.out_dir / "fisher_blocks.png")
    print(f"The pictures are fisher_error.png and fisher_blocks.png in {options.out_dir}.")


if __name__ == "__main__":
    main()
