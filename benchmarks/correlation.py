"""How strongly products of activations and gradients are correlated between locations: Figures 7 and 8 of the paper.

    python -m benchmarks.correlation --data-dir DIR [--steps 0 5000 10000 | --epochs 0 13 26] [--seeds 0]

`--steps 0 30 60 --interval 10 --turn 30` is a run of a few minutes on two cores. ResNet32 learns CIFAR-10 by TKFAC. A
product is one entry of `a_i u_i^T`: one number of the patch that location i sees, times one of the gradient there of
the example's own loss, its target drawn from the model. Assumption 4.1 says that such products at two locations are
uncorrelated. Drawn are absolute correlations over examples, means over some products drawn at random, for one layer of
each stage. The official binary files are read from DIR. A run that is stopped goes on where it was when the command is
given again.
"""

import os

# LAPACK's threads would compete with XLA's.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

import tkfac_jax as tkfac
from benchmarks.damping import DAMPING, RATE, add_length, arguments, facts, problem_of, to_steps
from benchmarks.figures import table
from benchmarks.runner import Method, Problem, Run, race
from benchmarks.series import rounded, write_json

STAGES = 3
# Rows plus columns between two locations.
DISTANCES = (1, 2, 4)
# Products whose examples are shuffled, to see how large correlations are by chance.
SHUFFLED = 4
# Locations in the pictures' enlarged parts.
ENLARGED = 64
# Few colours, for small files.
SHADES: dict[str, Any] = {
    "cmap": plt.get_cmap("viridis", 20),
    "vmin": 0,
    "vmax": 1,
    "interpolation_stage": "data",
}


class Entry(NamedTuple):
    """Which entry of `a_i u_i^T`: a place of the 3 x 3 window, an input channel and an output channel."""

    row: int
    column: int
    channel: int
    output: int


class Correlations(NamedTuple):
    """What is found of a layer.

    Attributes:
      absolute: mean over products of the absolute correlation of two locations, `(locations, locations)`.
      by_chance: the mean of its entries beside the diagonal with the examples shuffled, at each location otherwise.
      trace_ratio: of the diagonal of the exact block, its products' part over what it is under Assumption 4.1.
    """

    absolute: np.ndarray
    by_chance: np.ndarray
    trace_ratio: np.ndarray


def middle_layers(depth: int) -> list[str]:
    """The first convolution of the middle block of each stage."""
    blocks = (depth - 2) // (2 * STAGES)
    return [f"ResidualBlock_{stage * blocks + blocks // 2}/Conv_0" for stage in range(STAGES)]


def draw_entries(spec: tkfac.LayerSpec, count: int, seed: int) -> list[Entry]:
    """Entries of a 3 x 3 convolution's products, drawn at random."""
    numbers = np.random.default_rng(seed).integers(
        (3, 3, spec.d_in // 9, spec.d_out), size=(count, 4)
    )
    return [Entry(*map(int, row)) for row in numbers]


def products(inputs: Any, gradients: Any, entries: Sequence[Entry]) -> jax.Array:
    """The products of a 3 x 3 convolution padded by 1, `(batch, locations, entries)`.

    Args:
      inputs: of the layer, `(batch, height, width, channels)`.
      gradients: with respect to its outputs, `(batch, height / stride, width / stride, outputs)`.
      entries: which ones.
    """
    padded = jnp.pad(inputs, ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = gradients.shape[1:3]
    stride = inputs.shape[1] // height

    def product(entry: Entry) -> jax.Array:
        rows = slice(entry.row, entry.row + stride * (height - 1) + 1, stride)
        columns = slice(entry.column, entry.column + stride * (width - 1) + 1, stride)
        return padded[:, rows, columns, entry.channel] * gradients[..., entry.output]

    return jnp.stack([product(entry) for entry in entries], -1).reshape(
        len(inputs), height * width, -1
    )


def products_of(
    predict: Callable[..., Any], likelihood: Any, entries: Mapping[str, Sequence[Entry]]
) -> Callable[..., dict[str, jax.Array]]:
    """The function from `params, model_state, images, key` to the products of some layers."""

    def watched(slots: Mapping[str, Any], *args: Any) -> tuple[Any, dict[str, tuple[Any, Any]]]:
        """Outputs, and inputs and outputs of the layers; what is in the slots is added to the latter."""
        seen = {}

        def watch(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
            name = "/".join(context.module.path)
            output = next_fun(*args, **kwargs)
            if name not in entries or context.method_name != "__call__":
                return output
            seen[name] = args[0], output
            return output + slots.get(name, 0)

        with nn.intercept_methods(watch):
            outputs, _ = predict(*args)
        return outputs, seen

    @jax.jit
    def compute(params: Any, model_state: Any, images: Any, key: Any) -> dict[str, jax.Array]:
        args = (params, model_state, images)
        shapes = jax.eval_shape(lambda *args: watched({}, *args)[1], *args)
        slots = {name: jnp.zeros(out.shape, out.dtype) for name, (_, out) in shapes.items()}

        def own_losses(slots: Any) -> tuple[Any, Any]:
            """The sum over examples, so that each carries the derivative of its own loss."""
            outputs, seen = watched(slots, *args)
            targets = likelihood.sample(key, jax.lax.stop_gradient(outputs))
            return likelihood.nll(outputs, targets).sum(), seen

        gradients, seen = jax.grad(own_losses, has_aux=True)(slots)
        return {
            name: products(seen[name][0], gradient, entries[name])
            for name, gradient in gradients.items()
        }

    return compute


def absolute_correlations(values: np.ndarray) -> np.ndarray:
    """Absolute correlations over examples of products `(examples, locations, products)`, means over the products.

    Products that are the same for all examples, as where the patch sees only padding, do not count.
    """
    locations = values.shape[1]
    total, counted = np.zeros((2, locations, locations))
    for product in np.moveaxis(values, -1, 0):
        centred = product - product.mean(0)
        norm = np.linalg.norm(centred, axis=0)
        alive = np.ptp(product, axis=0) > 0
        unit = centred / np.where(alive, norm, 1)
        total += np.abs(unit.T @ unit)
        counted += np.outer(alive, alive)
    return (total / np.maximum(counted, 1)).astype(np.float32)


def beside_diagonal(matrix: np.ndarray) -> float:
    """The mean of the entries beside the diagonal."""
    return float((matrix.sum() - np.trace(matrix)) / (matrix.size - len(matrix)))


def correlations(values: np.ndarray, seed: int) -> Correlations:
    """What is found of a layer from its products `(examples, locations, products)`."""
    shuffled = np.random.default_rng(seed).permuted(values[..., :SHUFFLED], axis=0)
    # Under targets from the model, products have mean 0 and need no centring.
    exact, assumed = (values.sum(1) ** 2).sum(), (values**2).sum()
    return Correlations(
        absolute_correlations(values),
        np.asarray(beside_diagonal(absolute_correlations(shuffled))),
        np.asarray(exact / assumed),
    )


def measure(
    problem: Problem, run: Run, compute: Callable[..., Any], examples: int, seed: int
) -> dict[str, Correlations]:
    """The correlations at a run's parameters, over the first examples in batches as in training."""
    params, _, model_state = run.trees
    size, parts = problem.batch_size, []
    for i in range(-(-examples // size)):
        images = problem.inputs[i * size : (i + 1) * size]
        key = jax.random.fold_in(jax.random.key(seed), i)
        parts.append(jax.device_get(compute(params, model_state, images, key)))
    return {
        name: correlations(np.concatenate([part[name] for part in parts]), seed)
        for name in parts[0]
    }


def advance_to(step: int, run: Run, turn: int) -> None:
    """Trains up to a step.

    Raises:
      SystemExit: the run is beyond it.
    """
    if run.step > step:
        msg = f"The run is at step {run.step}, and step {step} was not measured; give another --out-dir."
        raise SystemExit(msg)
    race([run], step, turn, f"to step {step}")


def save(found: Mapping[str, Correlations], path: Path) -> None:
    """Writes what is found of all layers."""
    arrays = {
        f"{name}:{field}": getattr(own, field)
        for name, own in found.items()
        for field in Correlations._fields
    }
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez(file, **arrays)
    partial.replace(path)


def load(path: Path) -> dict[str, Correlations]:
    """Reads what `save` wrote."""
    with np.load(path) as arrays:
        names = dict.fromkeys(key.split(":")[0] for key in arrays)
        return {
            name: Correlations(*(arrays[f"{name}:{field}"] for field in Correlations._fields))
            for name in names
        }


def summarise(own: Correlations) -> dict[str, float | None]:
    """The mean absolute correlation at some distances, over all pairs and by chance, and the ratio of traces."""
    side = round(len(own.absolute) ** 0.5)
    places = np.stack(np.divmod(np.arange(side * side), side), -1)
    apart = np.abs(places[:, None] - places[None]).sum(-1)
    figures = {f"distance {d}": own.absolute[apart == d].mean() for d in DISTANCES if d < side}
    figures |= {
        "all pairs": beside_diagonal(own.absolute),
        "by chance": own.by_chance,
        "trace ratio": own.trace_ratio,
    }
    return {name: rounded(float(value), 4) for name, value in figures.items()}


def summary_table(summaries: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """What was found at each step of each layer."""
    first = next(iter(next(iter(summaries.values())).values()))
    rows = [("layer", "step", *first)]
    for step, layers in summaries.items():
        for name, figures in layers.items():
            rows.append((name, step, *(f"{figures.get(key, np.nan):.3g}" for key in first)))
    return table(rows)


def middle(matrix: np.ndarray, size: int) -> np.ndarray:
    """The middle part of a matrix's diagonal."""
    start = max(0, (len(matrix) - size) // 2)
    return matrix[start : start + size, start : start + size]


def plot_enlarged(matrix: np.ndarray, title: str, path: Path) -> None:
    """Draws a matrix of correlations, and the middle of its diagonal larger and larger (Figure 7)."""
    drawing, panels = plt.subplots(1, 3, figsize=(10, 3.5), layout="constrained")
    sizes = (len(matrix), max(ENLARGED, len(matrix) // 4), ENLARGED)
    for panel, size in zip(panels, sizes, strict=True):
        panel.imshow(middle(matrix, size), **SHADES)
        panel.set(xticks=[], yticks=[])
        panel.set_title(f"{min(size, len(matrix))} locations", fontsize=9)
    panels[0].set_ylabel(title)
    drawing.colorbar(panels.flat[0].images[0], ax=panels)
    drawing.savefig(path, dpi=70)
    plt.close(drawing)


def plot_along_training(found: Mapping[int, Mapping[str, Correlations]], path: Path) -> None:
    """Draws the middle of the diagonals: a layer in a column, a step in a row (Figure 8)."""
    layers = list(next(iter(found.values())))
    drawing, panels = plt.subplots(
        len(found),
        len(layers),
        figsize=(2.8 * len(layers), 2.6 * len(found)),
        squeeze=False,
        layout="constrained",
    )
    for row, (step, own) in zip(panels, found.items(), strict=True):
        for panel, name in zip(row, layers, strict=True):
            part = middle(own[name].absolute, ENLARGED)
            panel.imshow(part, **SHADES, interpolation="nearest")
            panel.set(xticks=[], yticks=[])
            panel.set_title(name, fontsize=8)
        row[0].set_ylabel(f"step {step}")
    drawing.colorbar(panels.flat[0].images[0], ax=panels)
    drawing.savefig(path, dpi=70)
    plt.close(drawing)


def main() -> None:
    """Runs the benchmark."""
    parser = arguments(__doc__, "results/correlation", depth=32)
    add_length(parser, nargs="+", default=[0, 5000, 10000], help="at which it is measured")
    parser.add_argument("--turn", type=int, default=500, help="steps between checkpoints")
    parser.add_argument("--examples", type=int, default=1024, help="of the correlations")
    parser.add_argument("--products", type=int, default=32, help="drawn at random, of each layer")
    options = parser.parse_args()

    method = Method(
        "TKFAC",
        f"lr {RATE:g}, damping {DAMPING:g}, interval {options.interval}",
        lambda layers: tkfac.tkfac(RATE, layers, damping=DAMPING),
        options.interval,
    )
    summaries = {}
    for seed in options.seeds:
        problem, folder = problem_of(options, seed)
        run = Run(problem, method, seed, folder)
        entries = {
            name: draw_entries(run.layers[name], options.products, seed)
            for name in middle_layers(options.depth)
        }
        compute = products_of(problem.predict, problem.likelihood, entries)
        found = {}
        steps = options.steps
        if options.epochs is not None:
            steps = [to_steps(epochs, run) for epochs in options.epochs]
        for step in sorted(steps):
            written = folder / f"correlations-{step}.npz"
            if not written.exists():
                advance_to(step, run, options.turn)
                save(measure(problem, run, compute, options.examples, seed), written)
            loaded = load(written)
            found[step] = {name: loaded[name] for name in entries}
        summaries[str(seed)] = {
            str(step): {name: summarise(own) for name, own in layers.items()}
            for step, layers in found.items()
        }
        print(f"seed {seed}:")
        print(summary_table(summaries[str(seed)]))
        first = next(iter(found.values()))
        name, own = next(iter(first.items()))
        plot_enlarged(own.absolute, name, options.out_dir / f"correlation-start-seed-{seed}.png")
        plot_along_training(found, options.out_dir / f"correlation-seed-{seed}.png")
    results = {
        **facts(options),
        "examples": options.examples,
        "products": options.products,
        "correlations": summaries,
    }
    write_json(results, options.out_dir / "correlation.json")
    print(f"The pictures are in {options.out_dir}.")


if __name__ == "__main__":
    main()
