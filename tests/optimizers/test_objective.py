import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from networks import mlp_problem

import tkfac_jax as tkfac
from tkfac_jax.fisher.estimators import Batch
from tkfac_jax.layers.parameter_tree import named_leaves
from tkfac_jax.optimizers.objective import Objective

L2, DAMPING = 0.3, 0.05
MASK = np.array([[1, 1, 0], [1, 1, 1], [1, 0, 1], [1, 1, 1]], bool)
WEIGHTS = np.array([0.5, 1.0, 2.0, 0.3])
# The layer in the middle is left to the fallback.
OWN = frozenset(
    {"Dense_0/kernel", "Dense_0/bias", "Dense_2/kernel", "Dense_2/bias"},
)


@functools.cache
def problem():
    """The network's parameters as a tree and in NumPy, and inputs and targets of three positions each."""
    _, params, *_ = mlp_problem()
    own = {name: np.asarray(leaf) for name, leaf in named_leaves(params).items()}
    random = np.random.default_rng(2)
    return params, own, random.normal(size=(4, 3, 4)), random.integers(0, 3, (4, 3))


def objective(l2):
    predict, *_ = mlp_problem()
    _, _, x, y = problem()
    outputs_fn = lambda params: predict(params, jnp.asarray(x))  # noqa: E731
    batch = Batch(jnp.asarray(MASK), jnp.asarray(WEIGHTS))
    return Objective(
        outputs_fn, outputs_fn, tkfac.Categorical(), jnp.asarray(y), batch, l2, OWN, None
    )


def dense_loss(params, l2):
    """The loss in NumPy, also for complex parameters."""
    _, _, x, y = problem()
    logits = oracles.mlp(params, x)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = -np.take_along_axis(log_p, y[..., None], -1)[..., 0]
    penalty = sum((params[name] ** 2).sum() for name in OWN)
    return ((nll * MASK).sum(1) * WEIGHTS).mean() + l2 / 2 * penalty


@pytest.mark.parametrize("l2", [0.0, L2])
def test_loss_and_gradient_have_the_term_of_the_layers_only(l2):
    params, own, *_ = problem()

    @jax.jit
    def received(params):
        plain, regularised = objective(0.0), objective(l2)
        gradient = jax.grad(plain.loss)(params)
        return regularised.loss(params), regularised.gradient(gradient, params)

    loss, gradient = received(params)
    np.testing.assert_allclose(loss, dense_loss(own, l2), rtol=1e-12)
    expected = oracles.jacobian(lambda params: dense_loss(params, l2), own)
    np.testing.assert_allclose(
        oracles.in_one_vector(named_leaves(gradient), own), expected, rtol=1e-9, atol=1e-12
    )


def test_a_gradient_keeps_its_dtype_and_without_l2_stays_as_it_is():
    params, *_ = problem()
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    for l2 in (L2, jnp.asarray(L2)):
        kinds = jax.eval_shape(objective(l2).gradient, low, params)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(kinds)} == {"bfloat16"}
    assert objective(0.0).gradient(low, params) is low


def test_the_model_along_directions_is_the_dense_one():
    """Along two directions of the layers and one of the fallback, of which damping and l2 know nothing."""
    params, own, x, _ = problem()
    random = np.random.default_rng(3)
    directions = [
        {n: jnp.asarray(random.normal(size=own[n].shape)) for n in sorted(names)}
        for names in (OWN, OWN, set(own) - OWN)
    ]

    @jax.jit
    def along(params, damping):
        gradient = objective(L2).gradient(jax.grad(objective(0.0).loss)(params), params)
        return objective(L2).along(params, gradient, directions, damping)

    fishers = [
        oracles.example_fisher("categorical", one, mask)
        for one, mask in zip(oracles.mlp(own, x), MASK, strict=True)
    ]
    jacobian = oracles.jacobian(lambda params: oracles.mlp(params, x), own)
    matrix = oracles.gauss_newton(jacobian, fishers, WEIGHTS)
    gradient = oracles.jacobian(lambda params: dense_loss(params, L2), own)
    of_layers = oracles.in_one_vector({n: np.ones(own[n].shape) for n in OWN}, own)
    stacked = np.stack([oracles.in_one_vector(d, own) for d in directions])
    lengths = np.array([0.7, -0.4, 1.0])
    step = lengths @ stacked
    for model, diagonal in zip(
        along(params, jnp.asarray(DAMPING)), (L2 + DAMPING, L2), strict=True
    ):
        expected = 0.5 * step @ (matrix + diagonal * np.diag(of_layers)) @ step + gradient @ step
        np.testing.assert_allclose(model.value(jnp.asarray(lengths)), expected, rtol=1e-10)
        np.testing.assert_allclose(model.slope, stacked @ gradient, rtol=1e-9)
