"""Trains a small GPT on the documentation inside Python's standard library: Adam and TKFAC side by side.

    python -m benchmarks.gpt [--steps 400] [--tune] [--out-dir results/gpt]

The text is `pydoc_data.topics`, what `help("assert")` and its like print: nothing is downloaded. It depends on
the version of Python a little. The model predicts characters. Its blocks are stacked by `nn.scan`: one
kernel in `params` holds the kernels of all blocks, and each block has its own factors.
Every method takes the same batches from the same initial parameters, at the best of the settings in
`trials()`; `--tune` tries them all first. The table counts the steps that each needs to reach the training
loss at which Adam ends.
"""

import os

# LAPACK's threads would compete with XLA's.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import platform
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import tkfac_jax as tkfac
from benchmarks.autoencoder import growing_decay
from benchmarks.figures import plot_curves, results_table, tuning_table
from benchmarks.runner import Method, Problem, Run, choose, environment, race
from benchmarks.series import write_results

# Tokens: printable ASCII, the newline, and one for every other character.
VOCABULARY = 95 + 2
CONTEXT = 64
WIDTH = 64
BLOCKS = 2
HEADS = 4
BATCH_SIZE = 32
TEST_PART = 10
EVALUATION_EXAMPLES = 512
INTERVAL = 10
WARM_UP = 20
FALLBACK_RATE = 0.01
TURN = 10


class Block(nn.Module):
    """A transformer block with norms before attention and MLP."""

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        """The residual stream `(batch, positions, width)` after the block; nothing besides, as `nn.scan` asks."""
        width, mask = x.shape[-1], nn.make_causal_mask(x[..., 0])
        x = x + nn.MultiHeadDotProductAttention(HEADS)(nn.LayerNorm()(x), mask=mask)
        hidden = nn.gelu(nn.Dense(4 * width)(nn.LayerNorm()(x)))
        return x + nn.Dense(width)(hidden), None


class GPT(nn.Module):
    """A causal language model of characters."""

    width: int = WIDTH
    blocks: int = BLOCKS
    context: int = CONTEXT

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits of the next character, `(batch, positions, vocabulary)`, after tokens `(batch, positions)`."""
        # Each example looks its positions up by itself: statistics are means over examples.
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[-1]), tokens.shape)
        x = nn.Embed(VOCABULARY, self.width, name="tokens")(tokens)
        x = x + nn.Embed(self.context, self.width, name="positions")(positions)
        stack = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.blocks,
        )
        x, _ = stack(name="blocks")(x)
        return nn.Dense(VOCABULARY, name="head")(nn.LayerNorm()(x))


def encode(text: str) -> np.ndarray:
    """The tokens of a text."""
    codes = np.array([ord(character) for character in text])
    newline, other = VOCABULARY - 2, VOCABULARY - 1
    tokens = np.where((codes >= 32) & (codes < 127), codes - 32, other)
    return np.where(codes == ord("\n"), newline, tokens).astype(np.int32)


def read_text() -> tuple[np.ndarray, np.ndarray]:
    """All topics in alphabetical order, cut into pieces: tokens and those that follow, `(examples, CONTEXT)` each."""
    tokens = encode("\n\n".join(topics[name] for name in sorted(topics)))
    starts = np.arange(0, len(tokens) - CONTEXT, CONTEXT)
    pieces = tokens[starts[:, None] + np.arange(CONTEXT + 1)]
    return pieces[:, :-1], pieces[:, 1:]


def gpt_problem(seed: int, width: int = WIDTH, blocks: int = BLOCKS) -> Problem:
    """The model with its initial parameters and the text, split into training and test set by pieces."""
    inputs, targets = read_text()
    order = np.random.default_rng(seed).permutation(len(inputs))
    test, train = np.split(order, [len(order) // TEST_PART])
    model, likelihood = GPT(width, blocks), tkfac.Categorical(average_positions=True)
    params = model.init(jax.random.key(seed), inputs[:1])["params"]

    def predict(params: Any, model_state: Any, tokens: Any) -> tuple[Any, Any]:
        return model.apply({"params": params}, tokens), model_state

    @jax.jit
    def mean_nll(params: Any, chosen_inputs: Any, chosen_targets: Any) -> jax.Array:
        logits, _ = predict(params, {}, chosen_inputs)
        return likelihood.nll(logits, chosen_targets).mean()

    def evaluate(params: Any, model_state: Any) -> dict[str, float]:
        del model_state
        parts = {"train_loss": train, "test_loss": test}
        chosen = {name: part[:EVALUATION_EXAMPLES] for name, part in parts.items()}
        return {
            name: float(mean_nll(params, inputs[part], targets[part]))
            for name, part in chosen.items()
        }

    return Problem(
        predict,
        likelihood,
        params,
        {},
        inputs[train],
        targets[train],
        BATCH_SIZE,
        evaluate,
    )


def schedule(rate: float, steps: int) -> optax.Schedule:
    """The learning rate of every method: a linear rise, then a cosine down to zero at the last step."""
    return optax.warmup_cosine_decay_schedule(0.0, rate, WARM_UP, max(steps, WARM_UP + 1))


def adam(rate: float, steps: int) -> optax.GradientTransformation:
    """Adam, of all parameters or of the norms that TKFAC leaves to it."""
    return optax.adam(schedule(rate, steps), b2=0.99)


def trials(steps: int) -> dict[str, list[Method]]:
    """Five settings of each method for runs of so many steps; the best one after 400 with seed 0 stands first."""

    def build(layers: tkfac.Layers, rate: float, damping: float, constraint: float) -> Any:
        return tkfac.tkfac(
            schedule(rate, steps),
            layers,
            damping=damping,
            norm_constraint=constraint,
            decay=growing_decay,
            averaging="moments",
            fallback=adam(FALLBACK_RATE, steps),
        )

    rates = (0.01, 0.003, 0.006, 0.014, 0.02)
    settings = (
        (0.1, 1e-4, 0.01),
        (0.1, 1e-4, 0.03),
        (0.1, 1e-4, 0.003),
        (0.1, 3e-4, 0.01),
        (0.05, 1e-4, 0.01),
    )
    return {
        "Adam": [
            Method("Adam", f"lr {rate:g}", lambda _, rate=rate: adam(rate, steps)) for rate in rates
        ],
        "TKFAC": [
            Method(
                "TKFAC",
                "lr {:g}, damping {:g}, norm constraint {:g}".format(*setting),
                lambda layers, setting=setting: build(layers, *setting),
                INTERVAL,
            )
            for setting in settings
        ],
    }


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=400, help="training steps of each method")
    parser.add_argument("--seed", type=int, default=0, help="of parameters, split and batches")
    parser.add_argument("--tune", action="store_true", help="try all settings, not the best alone")
    parser.add_argument("--out-dir", type=Path, default=Path("results/gpt"))
    options = parser.parse_args()

    problem = gpt_problem(options.seed)
    print(problem.find_layers())
    folder = options.out_dir / f"tuning-{options.steps}-steps-seed-{options.seed}"
    best, tuning = choose(
        problem,
        trials(options.steps),
        options.steps,
        TURN,
        options.seed,
        folder if options.tune else None,
    )
    if tuning:
        print(tuning_table(tuning))

    runs = [Run(problem, method, options.seed) for method in best]
    race(runs, options.steps, TURN, "gpt")
    records = [run.record() for run in runs]
    adam = next(record for record in records if record["method"] == "Adam")
    print(results_table(records, adam["curve"][-1]["train_loss"], ".3f"))

    options.out_dir.mkdir(parents=True, exist_ok=True)
    results = {
        "environment": environment() | {"python": platform.python_version()},
        "seed": options.seed,
        "batch_size": BATCH_SIZE,
        "interval": INTERVAL,
        "tuning": tuning,
        "runs": records,
    }
    write_results(results, options.out_dir / "gpt.json")
    picture = options.out_dir / "gpt.png"
    shown = {"train_loss": "training loss", "test_loss": "test loss"}
    plot_curves(records, None, shown, picture, log=False)
    print(f"The curves are in {picture}.")


if __name__ == "__main__":
    main()
