"""The paper's 8-layer autoencoder on MNIST: SGD-momentum, Adam, KFAC and TKFAC side by side.

    python -m benchmarks.autoencoder --data-dir DIR [--epochs 12] [--seeds 0] [--out-dir results/autoencoder]

With `--methods Adam TKFAC "TKFAC adaptive" "kfac-jax adaptive" --tuning-epochs 2 --turn 20 --averaging 0.95` it
measures what needs no learning rate; kfac-jax wants the environment that `make peers` makes.

784-1000-500-250-30-250-500-1000-784, ReLU, binary cross-entropy summed over pixels, batches of 500.
First each method tries five settings for `--tuning-epochs`, with the first seed; then all methods run at their best
setting with each seed, in turns of one epoch. Tables and picture have the means over the seeds. Runs that are stopped
go on where they were when the command is given again.
The official MNIST files are read from DIR, or downloaded there.
"""

import os

# LAPACK's threads would compete with XLA's.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import tkfac_jax as tkfac
from benchmarks.figures import goals_table, mean_record, plot_curves, results_table, tuning_table
from benchmarks.mnist import load_images
from benchmarks.peers import has_kfac_jax, kfac_jax_adaptive
from benchmarks.runner import Method, Problem, Run, best_of, environment, race
from benchmarks.series import write_results

WIDTHS = (1000, 500, 250, 30, 250, 500, 1000)
PIXELS = 784
BATCH_SIZE = 500
EVALUATION_BATCH = 5000
INTERVAL = 20
GOAL = 61.0
GOALS = (61.3, 60.0, 58.0)
# Of the adaptive methods: the first damping and its lower bound.
DAMPINGS = ((150.0, 1e-2), (150.0, 1e-3), (10.0, 1e-2), (1.0, 1e-2), (1.0, 1e-3))
# Examples of a batch over which the adaptive method's quadratic model is taken.
MODEL_EXAMPLES = 64


class Autoencoder(nn.Module):
    """The fully connected autoencoder, of orthogonal kernels scaled for ReLU."""

    widths: tuple[int, ...] = WIDTHS

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of the pixels, `(batch, 784)`, of images of the same shape."""
        init = nn.initializers.orthogonal(2**0.5)
        for width in self.widths:
            x = nn.relu(nn.Dense(width, kernel_init=init)(x))
        return nn.Dense(PIXELS, kernel_init=init)(x)


def autoencoder_problem(data_dir: Path, seed: int, widths: tuple[int, ...] = WIDTHS) -> Problem:
    """The autoencoder with its initial parameters and MNIST, inputs being targets."""
    train, test = load_images(data_dir, "train"), load_images(data_dir, "test")
    model, likelihood = Autoencoder(widths), tkfac.Bernoulli()
    params = model.init(jax.random.key(seed), train[:1])["params"]

    def predict(params: Any, model_state: Any, x: Any) -> tuple[Any, Any]:
        return model.apply({"params": params}, x), model_state

    @jax.jit
    def total_nll(params: Any, images: Any) -> jax.Array:
        logits, _ = predict(params, {}, images)
        return likelihood.nll(logits, images).sum()

    def mean_nll(params: Any, images: np.ndarray) -> float:
        parts = np.array_split(images, -(-len(images) // EVALUATION_BATCH))
        return float(sum(float(total_nll(params, part)) for part in parts) / len(images))

    def evaluate(params: Any, model_state: Any) -> dict[str, float]:
        del model_state
        return {"train_loss": mean_nll(params, train), "test_loss": mean_nll(params, test)}

    return Problem(predict, likelihood, params, {}, train, train, BATCH_SIZE, evaluate)


def growing_decay(updates: jax.Array) -> jax.Array:
    """A plain mean of the first statistics, which becomes a moving average of weight 0.95."""
    return jnp.minimum(0.95, 1 - 1 / (updates + 1))


def first_order(
    name: str, optimizer: Callable[[float], Any], rates: tuple[float, ...]
) -> list[Method]:
    """A first-order method at several learning rates."""
    return [Method(name, f"lr {rate:g}", lambda _, rate=rate: optimizer(rate)) for rate in rates]


def second_order(
    name: str,
    optimizer: Callable[..., Any],
    settings: tuple[tuple[float, float, float], ...],
) -> list[Method]:
    """A Kronecker-factored method at several learning rates, dampings and norm constraints."""

    def build(layers: tkfac.Layers, rate: float, damping: float, constraint: float) -> Any:
        return optimizer(
            rate,
            layers,
            damping=damping,
            norm_constraint=constraint,
            decay=growing_decay,
            averaging="moments",
        )

    return [
        Method(
            name,
            "lr {:g}, damping {:g}, norm constraint {:g}".format(*setting),
            lambda layers, setting=setting: build(layers, *setting),
            INTERVAL,
        )
        for setting in settings
    ]


def best_tkfac(layers: tkfac.Layers, **options: Any) -> Any:
    """TKFAC at the best of its settings below, for other benchmarks."""
    return tkfac.tkfac(
        0.3,
        layers,
        damping=0.2,
        norm_constraint=0.25,
        decay=growing_decay,
        averaging="moments",
        **options,
    )


def adaptive(initial_damping: float, min_damping: float) -> Method:
    """TKFAC with everything adaptive."""
    return Method(
        "TKFAC adaptive",
        f"initial damping {initial_damping:g}, at least {min_damping:g}, intervals 10 and 20",
        lambda layers: tkfac.adaptive_tkfac(
            layers,
            tkfac.Bernoulli(),
            initial_damping=initial_damping,
            min_damping=min_damping,
            decay=0.7,
        ),
        10,
        inverse_interval=20,
        model_args=lambda state, images: (state, images[:MODEL_EXAMPLES]),
        programs=11,
    )


def trials() -> dict[str, list[Method]]:
    """Five settings of each method."""
    settings = (
        (0.3, 0.3, 1.1),
        (0.3, 0.3, 0.5),
        (0.3, 0.2, 0.5),
        (0.3, 0.1, 0.5),
        (0.3, 0.2, 0.25),
    )
    return {
        "SGD-momentum": first_order(
            "SGD-momentum",
            lambda rate: optax.sgd(rate, momentum=0.9),
            (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
        ),
        "Adam": first_order("Adam", optax.adam, (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)),
        "KFAC": second_order("KFAC", tkfac.kfac, settings),
        "TKFAC": second_order("TKFAC", tkfac.tkfac, settings),
        "TKFAC adaptive": [adaptive(*dampings) for dampings in DAMPINGS],
        "kfac-jax adaptive": [
            kfac_jax_adaptive(initial_damping=first, min_damping=least) for first, least in DAMPINGS
        ],
    }


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data-dir", type=Path, required=True, help="directory of the MNIST files")
    parser.add_argument("--out-dir", type=Path, default=Path("results/autoencoder"))
    parser.add_argument("--epochs", type=int, default=12, help="epochs of the final runs")
    parser.add_argument("--tuning-epochs", type=int, default=5, help="epochs of each trial")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="of parameters and batches"
    )
    parser.add_argument("--methods", nargs="*", choices=list(trials()), default=list(trials())[:4])
    parser.add_argument("--turn", type=int, help="steps between evaluations; an epoch if not given")
    parser.add_argument(
        "--averaging",
        type=float,
        help="weight of the past in averages of the parameters, such as 0.95",
    )
    parser.add_argument("--goals", type=float, nargs="+", default=GOALS, help="training losses")
    parser.add_argument(
        "--widths", type=int, nargs="+", default=WIDTHS, help="of the hidden layers"
    )
    options = parser.parse_args()

    seed, widths = options.seeds[0], tuple(options.widths)
    # The trials and the runs of the first seed share theirs.
    make_problem = functools.lru_cache(maxsize=1)(
        lambda seed: autoencoder_problem(options.data_dir, seed, widths)
    )
    problem = make_problem(seed)
    epoch = len(problem.inputs) // BATCH_SIZE
    options.out_dir.mkdir(parents=True, exist_ok=True)
    if "kfac-jax adaptive" in options.methods and not has_kfac_jax():
        options.methods.remove("kfac-jax adaptive")
    tuning, best = {}, []
    for name in options.methods:
        method, tuning[name] = best_of(
            problem,
            trials()[name],
            options.tuning_epochs * epoch,
            epoch,
            seed,
            options.out_dir / f"tuning-{options.tuning_epochs}-epochs-seed-{seed}",
        )
        best.append(method)
    print(tuning_table(tuning, ".2f"))

    records = []
    for seed in options.seeds:
        checkpoints = options.out_dir / f"checkpoints-seed-{seed}"
        checkpoints.mkdir(exist_ok=True)
        problem = make_problem(seed)
        runs = [
            Run(problem, method, seed, checkpoints, averaging=options.averaging) for method in best
        ]
        race(runs, options.epochs * epoch, options.turn or epoch, f"autoencoder, seed {seed}")
        records += [run.record() | {"seed": seed} for run in runs]
    means = [
        mean_record([record for record in records if record["method"] == method.name])
        for method in best
    ]
    print(results_table(means, GOAL, ".2f"))
    print(
        goals_table(means, options.goals, {"train_loss": "", "averaged_train_loss": ", averaged"})
    )

    results = {
        "environment": environment(),
        "seeds": options.seeds,
        "widths": options.widths,
        "batch_size": BATCH_SIZE,
        "interval": INTERVAL,
        "tuning": tuning,
        "runs": records,
    }
    write_results(results, options.out_dir / "autoencoder.json")
    picture = options.out_dir / "autoencoder.png"
    shown = {"train_loss": "training loss", "test_loss": "test loss"}
    plot_curves(means, epoch, shown, picture)
    print(f"The curves are in {picture}.")


if __name__ == "__main__":
    main()
