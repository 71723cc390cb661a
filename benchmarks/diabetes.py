"""Regression on scikit-learn's diabetes data, full batch: training loss in seconds, and the test error.

    python -m benchmarks.diabetes [--seconds 30] [--out-dir results/diabetes]

A network of tanh, 10-64-64-1, in float64; inputs and target standardised, a quarter held out. It has more
parameters than there are examples: the training loss compares optimizers; the lowest test error comes long before
the end.
"""

import os

# LAPACK's threads would compete with XLA's.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_diabetes
from sklearn.model_selection import train_test_split

import tkfac_jax as tkfac
from benchmarks.contest import arguments, full_batch, hold
from benchmarks.figures import table
from benchmarks.runner import Problem

GOALS = (1e-1, 1e-2, 1e-3, 1e-4)


class Regressor(nn.Module):
    """Two hidden layers of tanh."""

    widths: tuple[int, ...] = (64, 64)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Means `(batch, 1)` of inputs `(batch, 10)`."""
        for width in self.widths:
            x = nn.tanh(nn.Dense(width, param_dtype=jnp.float64)(x))
        return nn.Dense(1, param_dtype=jnp.float64)(x)


def diabetes_problem(seed: int) -> Problem:
    """The regression with its network's initial parameters."""
    inputs, targets = map(np.asarray, load_diabetes(return_X_y=True))
    parts = train_test_split(inputs, targets[:, None], test_size=0.25, random_state=seed)
    train_x, test_x, train_y, test_y = map(np.asarray, parts)
    x_mean, x_std, y_mean, y_std = (
        train_x.mean(0),
        train_x.std(0),
        train_y.mean(),
        train_y.std(),
    )
    train_x, test_x = (train_x - x_mean) / x_std, (test_x - x_mean) / x_std
    train_y, test_y = (train_y - y_mean) / y_std, (test_y - y_mean) / y_std
    model = Regressor()
    params = model.init(jax.random.key(seed), train_x[:1])["params"]

    def predict(params: Any, inputs: Any) -> Any:
        return model.apply({"params": params}, inputs)

    def figures(params: Any) -> dict[str, jax.Array]:
        return {"test_error": jnp.mean((predict(params, jnp.asarray(test_x)) - test_y) ** 2)}

    return full_batch(predict, tkfac.Normal(), params, train_x, train_y, figures)


def main() -> None:
    """Runs the benchmark."""
    jax.config.update("jax_enable_x64", True)
    options = arguments(__doc__, "results/diabetes", 30).parse_args()
    shown = {"train_loss": "training loss", "test_error": "test error"}
    records = hold("diabetes", diabetes_problem(options.seed), options, GOALS, shown)
    rows = [("method", "lowest test error", "at step", "at the end")]
    for record in records:
        best = min(record["curve"], key=lambda point: point["test_error"])
        rows.append(
            (
                record["method"],
                f"{best['test_error']:.3f}",
                str(best["step"]),
                f"{record['curve'][-1]['test_error']:.3f}",
            )
        )
    print(table(rows))


if __name__ == "__main__":
    main()
