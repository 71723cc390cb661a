import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from networks import mlp_problem

import tkfac_jax as tkfac
from tkfac_jax.fisher.estimators import Batch
from tkfac_jax.fisher.joint_likelihood import as_likelihood
from tkfac_jax.layers.parameter_tree import named_leaves
from tkfac_jax.optimizers.quadratic_model import Quadratic, gauss_newton


def model_of(matrix, slope):
    return Quadratic(jnp.asarray(matrix, jnp.float64), jnp.asarray(slope, jnp.float64))


def test_the_minimum_of_two_directions_is_where_the_derivative_vanishes():
    model = model_of([[4.0, 1.0], [1.0, 3.0]], [2.0, -1.0])
    expected = -np.linalg.solve(model.matrix, model.slope)
    received = model.minimum([None, None])
    np.testing.assert_allclose(received, expected, rtol=1e-12)
    np.testing.assert_allclose(
        model.value(received), -0.5 * model.slope @ np.linalg.inv(model.matrix) @ model.slope
    )


@pytest.mark.parametrize("scale", [1e-140, 1e-6, 1e140])
def test_the_minimum_does_not_depend_on_the_units_of_a_direction(scale):
    model = model_of([[4.0, 1.0], [1.0, 3.0]], [2.0, -1.0])
    units = np.array([scale, 1.0])
    scaled = model_of(model.matrix * np.outer(units, units), model.slope * units)
    np.testing.assert_allclose(
        scaled.minimum([None, None]) * units, model.minimum([None, None]), rtol=1e-9
    )


@pytest.mark.parametrize(
    ("matrix", "slope", "expected"),
    [
        # Parallel: the second is twice the first.
        ([[4.0, 8.0], [8.0, 16.0]], [2.0, 4.0], [-0.5, 0.0]),
        # No previous step.
        ([[4.0, 0.0], [0.0, 0.0]], [2.0, 0.0], [-0.5, 0.0]),
        # No gradient of its own.
        ([[0.0, 0.0], [0.0, 5.0]], [0.0, -1.0], [0.0, 0.2]),
        # No curvature at all: nothing says how far to go.
        ([[0.0, 0.0], [0.0, 0.0]], [1.0, 1.0], [0.0, 0.0]),
        # A curvature that is not positive, as that of a loss may be.
        ([[-1.0, 0.5], [0.5, 5.0]], [1.0, -1.0], [0.0, 0.2]),
        ([[4.0, 3.0], [3.0, -2.0]], [2.0, 1.0], [-0.5, 0.0]),
        # Parallel but for rounding.
        ([[4.0, 8.0], [8.0, 16.0 + 1e-12]], [2.0, 4.0 + 1e-6], [-0.5, 0.0]),
    ],
)
def test_directions_that_decide_nothing_get_no_length(matrix, slope, expected):
    received = model_of(matrix, slope).minimum([None, None])
    np.testing.assert_allclose(received, expected, rtol=1e-12)


def test_what_counts_as_parallel_depends_on_the_dtype():
    """A squared sine of 1e-5 says something in float64; of float32 it is a hundred rounding errors."""
    model = model_of([[1.0, 1.0], [1.0, 1.0 + 1e-5]], [-1.0, -2.0])
    low = Quadratic(*(array.astype(jnp.float32) for array in model))
    np.testing.assert_allclose(
        model.minimum([None, None]), -np.linalg.solve(model.matrix, model.slope), rtol=1e-9
    )
    received = low.minimum([None, None])
    assert received.dtype == jnp.float32
    np.testing.assert_array_equal(received, [1.0, 0.0])


def test_lengths_that_are_given_stay():
    model = model_of([[4.0, 1.0, 0.5], [1.0, 3.0, 0.2], [0.5, 0.2, 2.0]], [2.0, -1.0, 0.3])
    one = model.minimum([None, 0.9, 1.0])
    np.testing.assert_allclose(one, [-(2.0 + 0.9 + 0.5) / 4, 0.9, 1.0], rtol=1e-12)
    two = model.minimum([None, None, 1.0])
    expected = -np.linalg.solve(model.matrix[:2, :2], model.slope[:2] + model.matrix[:2, 2])
    np.testing.assert_allclose(two, [*expected, 1.0], rtol=1e-12)
    np.testing.assert_allclose(model.minimum([0.1, 0.2, 1.0]), [0.1, 0.2, 1.0])
    flat = model_of([[0.0, 0.5], [0.5, 2.0]], [1.0, 1.0])
    np.testing.assert_array_equal(flat.minimum([None, 0.3]), [0.0, 0.3])


@functools.cache
def directions_of_mlp():
    _, params, *_ = mlp_problem()
    leaves = named_leaves(params)
    rng = np.random.default_rng(0)
    draw = lambda names: {n: jnp.asarray(rng.normal(size=leaves[n].shape)) for n in names}  # noqa: E731
    # The third is over parameters of its own.
    first = [n for n in leaves if "Dense_1" not in n]
    return [draw(first), draw(first), draw([n for n in leaves if "Dense_1" in n])]


@functools.cache
def sequences():
    """Inputs of three positions each, the network's parameters in NumPy, and its Jacobian."""
    _, params, *_ = mlp_problem()
    own = {name: np.asarray(leaf) for name, leaf in named_leaves(params).items()}
    x = np.random.default_rng(1).normal(size=(4, 3, 4))
    return x, own, oracles.jacobian(lambda params: oracles.mlp(params, x), own)


@pytest.mark.parametrize("kind", [tkfac.Categorical, tkfac.Bernoulli, tkfac.Normal])
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_products_through_the_gauss_newton_matrix_are_those_of_the_dense_one(kind, average, masked):
    """With weights, and with masks of which one hides a whole example."""
    predict, params, *_ = mlp_problem()
    x, own, jacobian = sequences()
    outputs = oracles.mlp(own, x)
    positions = outputs.shape[:2] if kind is tkfac.Categorical else outputs.shape
    mask = weights = None
    if masked:
        mask = np.arange(np.prod(positions)).reshape(positions) % 4 > 0
        mask[1] = False
        weights = np.array([0.2, 2.0, 0.0, 1.3])
    name = {tkfac.Categorical: "categorical", tkfac.Bernoulli: "bernoulli", tkfac.Normal: 0.7}[kind]
    fishers = [
        oracles.example_fisher(name, one, None if mask is None else mask[i], average)
        for i, one in enumerate(outputs)
    ]
    matrix = oracles.gauss_newton(jacobian, fishers, np.ones(4) if weights is None else weights)
    stacked = np.stack([oracles.in_one_vector(d, own) for d in directions_of_mlp()])
    options = {"variance": 0.7} if kind is tkfac.Normal else {}
    likelihood = kind(average_positions=average, **options)

    @jax.jit
    def products(params, mask, weights):
        targets = jnp.zeros(positions, int if kind is tkfac.Categorical else float)
        return gauss_newton(
            lambda params: predict(params, x),
            likelihood,
            params,
            directions_of_mlp(),
            targets,
            Batch(mask, weights),
        )

    np.testing.assert_allclose(
        products(params, mask, weights), stacked @ matrix @ stacked.T, rtol=1e-10, atol=1e-12
    )


def test_outputs_of_the_first_examples_give_their_mean():
    predict, params, x, y, _ = mlp_problem()
    whole, part = (
        gauss_newton(
            lambda params, n=n: predict(params, x[:n]),
            tkfac.Categorical(),
            params,
            directions_of_mlp(),
            y[:n],
            Batch(),
        )
        for n in (6, 2)
    )
    received = gauss_newton(
        lambda params: predict(params, x[:2]),
        tkfac.Categorical(),
        params,
        directions_of_mlp(),
        y,
        Batch(),
    )
    np.testing.assert_allclose(received, part, rtol=1e-12)
    assert not np.allclose(received, whole)


def test_weights_of_the_first_examples_keep_the_mean_of_the_batch():
    """With padding at the end of the batch, whose weights are 0, the matrix is not that of a full batch."""
    predict, params, x, y, _ = mlp_problem()
    weights = jnp.asarray([1.0, 1, 1, 0, 0, 0])
    arguments = tkfac.Categorical(), params, directions_of_mlp(), y
    alone = gauss_newton(lambda params: predict(params, x[:2]), *arguments[:-1], y[:2], Batch())
    received = gauss_newton(lambda params: predict(params, x[:2]), *arguments, Batch(None, weights))
    np.testing.assert_allclose(received, alone / 2, rtol=1e-12)


def test_more_outputs_than_targets():
    predict, params, x, y, _ = mlp_problem()
    with pytest.raises(ValueError, match="the outputs are of 6 examples and the targets of 4"):
        gauss_newton(
            lambda params: predict(params, x),
            as_likelihood(tkfac.Categorical()),
            params,
            directions_of_mlp(),
            y[:4],
            Batch(),
        )
