import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import mlp_problem

import tkfac_jax as tkfac
from tkfac_jax.estimators import Batch
from tkfac_jax.joint import as_likelihood
from tkfac_jax.layers import named_leaves
from tkfac_jax.quadratic import Quadratic, gauss_newton

LIKELIHOODS = [
    tkfac.Categorical(),
    tkfac.Bernoulli(),
    tkfac.Normal(0.7),
    tkfac.Bernoulli(average_positions=True),
]


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
    ],
)
def test_directions_that_decide_nothing_get_no_length(matrix, slope, expected):
    received = model_of(matrix, slope).minimum([None, None])
    np.testing.assert_allclose(received, expected, rtol=1e-12)


def test_lengths_that_are_given_stay():
    model = model_of([[4.0, 1.0, 0.5], [1.0, 3.0, 0.2], [0.5, 0.2, 2.0]], [2.0, -1.0, 0.3])
    one = model.minimum([None, 0.9, 1.0])
    np.testing.assert_allclose(one, [-(2.0 + 0.9 + 0.5) / 4, 0.9, 1.0], rtol=1e-12)
    two = model.minimum([None, None, 1.0])
    expected = -np.linalg.solve(model.matrix[:2, :2], model.slope[:2] + model.matrix[:2, 2])
    np.testing.assert_allclose(two, [*expected, 1.0], rtol=1e-12)
    np.testing.assert_allclose(model.minimum([0.1, 0.2, 1.0]), [0.1, 0.2, 1.0])


def dense_products(predict, likelihood, params, directions, weights, mask):
    """The products through `J^T F J`, with the whole Jacobian and F as the Hessian of the loss."""
    jacobian = jax.jacrev(predict)(params)
    outputs = np.asarray(predict(params))
    batch, size = outputs.shape[0], outputs[0].size

    def nll(flat, example):
        one = flat.reshape(1, *outputs.shape[1:])
        options = {} if mask is None else {"mask": mask[example : example + 1]}
        target = likelihood.sample(jax.random.key(3), jnp.asarray(outputs))[example : example + 1]
        return likelihood.nll(one, target, **options)[0]

    products = np.zeros((len(directions), len(directions)))
    for example in range(batch):
        fisher = jax.hessian(functools.partial(nll, example=example))(
            jnp.asarray(outputs[example].ravel())
        )
        tangents = [
            sum(
                np.tensordot(np.asarray(named_leaves(jacobian)[n])[example], d, axes=d.ndim)
                for n, d in direction.items()
            ).reshape(size)
            for direction in directions
        ]
        for i, t in enumerate(tangents):
            for j, u in enumerate(tangents):
                products[i, j] += weights[example] * (t @ np.asarray(fisher) @ u) / batch
    return products


@functools.cache
def directions_of_mlp():
    _, params, *_ = mlp_problem()
    leaves = named_leaves(params)
    rng = np.random.default_rng(0)
    draw = lambda names: {n: jnp.asarray(rng.normal(size=leaves[n].shape)) for n in names}  # noqa: E731
    # The third is over parameters of its own.
    first = [n for n in leaves if "Dense_1" not in n]
    return [draw(first), draw(first), draw([n for n in leaves if "Dense_1" in n])]


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_products_through_the_gauss_newton_matrix_equal_the_dense_ones(likelihood, weighted):
    predict, params, x, _, _ = mlp_problem()
    outputs_fn = lambda params: predict(params, x)  # noqa: E731
    outputs = outputs_fn(params)
    weights = np.linspace(0.2, 2.0, len(x)) if weighted else np.ones(len(x))
    positions = outputs.shape[:-1] if isinstance(likelihood, tkfac.Categorical) else outputs.shape
    mask = None
    if weighted and len(positions) == 2:
        mask = jnp.arange(outputs.size).reshape(outputs.shape) % 4 > 0
    received = gauss_newton(
        outputs_fn,
        likelihood,
        params,
        directions_of_mlp(),
        likelihood.sample(jax.random.key(3), outputs),
        Batch(mask, jnp.asarray(weights) if weighted else None),
    )
    expected = dense_products(outputs_fn, likelihood, params, directions_of_mlp(), weights, mask)
    np.testing.assert_allclose(received, expected, rtol=1e-10, atol=1e-12)


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
