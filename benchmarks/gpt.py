"""Trains a small GPT on the documentation inside Python's standard library: Adam, KFAC and TKFAC side by side.

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
import json
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import tkfac_jax as tkfac
from benchmarks.figures import plot_curves, steps_to_reach, table
from benchmarks.runner import Method, Problem, Run, best_of, environment, race

# Tokens: printable ASCII, the newline, and one for every other character.
VOCABULARY = 128 - 32 + 1
CONTEXT = 64
WIDTH = 64
BLOCKS = 2
HEADS = 4
BATCH_SIZE = 32
TEST_PART = 10
EVALUATION_EXAMPLES = 512
INTERVAL = 10
WARM_UP = 20


class Block(nn.Module):
    """A transformer block with norms before attention and MLP."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, None]:
        """The residual stream `(batch, positions, width)` after the block; nothing besides, as `nn.scan` asks."""
        width = x.shape[-1]
        x = x + nn.MultiHeadDotProductAttention(HEADS)(nn.LayerNorm()(x), mask=mask)
        hidden = nn.gelu(nn.Dense(4 * width)(nn.LayerNorm()(x)))
        return x + nn.Dense(width)(hidden), None


class GPT(nn.Module):
    """A causal language model of characters."""

    width: int = WIDTH
    blocks: int = BLOCKS

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits of the next character, `(batch, positions, vocabulary)`, after tokens `(batch, positions)`."""
        # Each example looks its positions up by itself: statistics are means over examples.
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[-1]), tokens.shape)
        x = nn.Embed(VOCABULARY, self.width, name="tokens")(tokens)
        x = x + nn.Embed(CONTEXT, self.width, name="positions")(positions)
        stack = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.blocks,
        )
        x, _ = stack(name="blocks")(x, nn.make_causal_mask(tokens))
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
        return {
            name: float(mean_nll(params, inputs[part], targets[part]))
            for name, part in (
                ("train_loss", train[:EVALUATION_EXAMPLES]),
                ("test_loss", test[:EVALUATION_EXAMPLES]),
            )
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
        # The norms' stacked scales and biases have two axes and would be warned of.
        {"on_unsupported": "ignore"},
    )
