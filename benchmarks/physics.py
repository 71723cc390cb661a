"""Physics-informed networks, Poisson and heat equation in two dimensions: the error against the exact solution.

    python -m benchmarks.physics [--equations poisson heat] [--seconds 60] [--out-dir results/physics]

A network of tanh, in float64, is to fulfil a differential equation at fixed points inside a domain, and given values
at points of its boundary. Values, first derivatives and Laplacian go through the layers together, as rows of
one array: each layer has the same kernel for all rows, and its bias as a last input that is 1 for values and 0 for
derivatives. To the optimizer the rows are shared locations, as in Dangel, Mueller and Zeinhofer 2024.
"""

import os

# LAPACK's threads would compete with XLA's.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import tkfac_jax as tkfac
from benchmarks.contest import arguments, full_batch, hold
from benchmarks.runner import Problem

WIDTHS = (64, 64, 64)
GOALS = (1e-2, 1e-3, 1e-4, 1e-5)
CONDUCTIVITY = 0.05


class Jets(nn.Module):
    """A network of tanh that carries values, first derivatives and Laplacian along.

    Attributes:
      space: number of coordinates that the Laplacian is over, the first ones.
      widths: of the hidden layers.
    """

    space: int = 2
    widths: tuple[int, ...] = WIDTHS

    @nn.compact
    def __call__(self, points: jax.Array) -> jax.Array:
        """From points `(batch, coordinates)` to `(batch, 1 + coordinates + 1)`: value, derivatives, Laplacian."""
        batch, coordinates = points.shape
        directions = jnp.broadcast_to(
            jnp.eye(coordinates, dtype=points.dtype), (batch, coordinates, coordinates)
        )
        rows = jnp.concatenate(
            [points[:, None], directions, jnp.zeros_like(points[:, None])], axis=1
        )
        for width in self.widths:
            rows = self._tanh(self._affine(rows, width))
        return self._affine(rows, 1)[..., 0]

    def _affine(self, rows: jax.Array, width: int) -> jax.Array:
        ones = jnp.zeros_like(rows[..., :1]).at[:, 0].set(1)
        return nn.Dense(width, use_bias=False, param_dtype=jnp.float64)(
            jnp.concatenate([rows, ones], axis=-1)
        )

    def _tanh(self, rows: jax.Array) -> jax.Array:
        value = jnp.tanh(rows[:, :1])
        slope = 1 - value**2
        squares = jnp.sum(rows[:, 1 : 1 + self.space] ** 2, axis=1, keepdims=True)
        laplacian = slope * rows[:, -1:] - 2 * value * slope * squares
        return jnp.concatenate([value, slope * rows[:, 1:-1], laplacian], axis=1)


class Equation(NamedTuple):
    """A differential equation on a unit cube with its exact solution.

    Attributes:
      coordinates: number of coordinates; of three the last is time.
      solution: exact solution at points.
      operator: from the network's rows to the left-hand side.
      source: right-hand side at points.
      interior: number of points inside.
      boundary: number of points on each face where values are given.
    """

    coordinates: int
    solution: Callable[[Any], Any]
    operator: Callable[[Any], Any]
    source: Callable[[Any], Any]
    interior: int
    boundary: int


EQUATIONS = {
    # -Laplacian u = f.
    "poisson": Equation(
        2,
        lambda z: np.cos(np.pi * z[:, 0]) * np.cos(np.pi * z[:, 1]),
        lambda rows: -rows[:, 3],
        lambda z: 2 * np.pi**2 * np.cos(np.pi * z[:, 0]) * np.cos(np.pi * z[:, 1]),
        900,
        30,
    ),
    # du/dt = conductivity Laplacian u.
    "heat": Equation(
        3,
        lambda z: (
            np.exp(-2 * np.pi**2 * CONDUCTIVITY * z[:, 2])
            * np.sin(np.pi * z[:, 0])
            * np.sin(np.pi * z[:, 1])
        ),
        lambda rows: rows[:, 3] - CONDUCTIVITY * rows[:, 4],
        lambda z: np.zeros(len(z)),
        1500,
        100,
    ),
}


def collocation(equation: Equation, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Points and targets; inside the residual is an output, on faces the value.

    Returns:
      Points with two more columns: 1 inside and 0 on faces; and what the output is multiplied by, such that the
      loss is half the mean square inside plus half that on the faces. And the targets, so weighted.
    """
    rng = np.random.default_rng(seed)
    inside = rng.uniform(size=(equation.interior, equation.coordinates))
    faces = []
    for axis in range(equation.coordinates):
        # In time only the beginning is given.
        for end in (0.0, 1.0) if axis < 2 else (0.0,):
            face = rng.uniform(size=(equation.boundary, equation.coordinates))
            face[:, axis] = end
            faces.append(face)
    on_faces = np.concatenate(faces)
    size = len(inside) + len(on_faces)
    weights = np.concatenate(
        [np.full(len(part), np.sqrt(size / len(part))) for part in (inside, on_faces)]
    )
    points = np.concatenate([inside, on_faces])
    flags = np.concatenate([np.ones(len(inside)), np.zeros(len(on_faces))])
    values = np.concatenate([equation.source(inside), equation.solution(on_faces)])
    return np.column_stack([points, flags, weights]), (weights * values)[:, None]


def physics_problem(name: str, seed: int, widths: tuple[int, ...] = WIDTHS) -> Problem:
    """An equation with its network's initial parameters."""
    equation = EQUATIONS[name]
    inputs, targets = collocation(equation, seed)
    model = Jets(widths=widths)
    params = model.init(jax.random.key(seed), inputs[:1, : equation.coordinates])["params"]

    def predict(params: Any, inputs: Any) -> Any:
        points, inside, weights = inputs[:, :-2], inputs[:, -2], inputs[:, -1]
        rows: Any = model.apply({"params": params}, points)
        outputs = jnp.where(inside > 0, equation.operator(rows), rows[:, 0])
        return (weights * outputs)[:, None]

    axis = np.linspace(0, 1, 21)
    grid = np.stack(np.meshgrid(*[axis] * equation.coordinates), axis=-1)
    grid = grid.reshape(-1, equation.coordinates)
    exact = equation.solution(grid)

    def figures(params: Any) -> dict[str, jax.Array]:
        rows: Any = model.apply({"params": params}, jnp.asarray(grid))
        return {"error": jnp.linalg.norm(rows[:, 0] - exact) / np.linalg.norm(exact)}

    return full_batch(predict, tkfac.Normal(), params, inputs, targets, figures)


def main() -> None:
    """Runs the benchmark."""
    jax.config.update("jax_enable_x64", True)
    parser = arguments(__doc__, "results/physics", 60)
    parser.add_argument("--equations", nargs="+", choices=list(EQUATIONS), default=list(EQUATIONS))
    options = parser.parse_args()
    for name in options.equations:
        problem = physics_problem(name, options.seed)
        shown = {"error": "relative error", "train_loss": "training loss"}
        hold(name, problem, options, GOALS, shown)


if __name__ == "__main__":
    main()
