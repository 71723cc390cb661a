"""The table of coverage in the README, row by row, against brute force."""

import functools
import itertools
import pathlib
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from coverage_cases import F64, LAYERS, make, table
from flax import nnx

import tkfac_jax as tkfac

RULES = {
    "tkfac": (tkfac.trace_restricted, oracles.trace_restricted),
    "kfac": (tkfac.independent, oracles.independent),
}
# Sums of a few hundred float64 products.
ROUNDING = {"rtol": 1e-9, "atol": 1e-11}


def rows_by_brute_force(problem, layer, head_gradient):
    """The input rows and gradient rows of a layer, from Flax's own layer and jax.vjp alone.

    The gradient of the layer's matrix, with the output's gradient masked to one location, is `a g^T`; with ones in
    place of the gradient it is `a 1^T`.

    Args:
      head_gradient: the gradient of the loss with respect to the layer's output.

    Returns:
      `(examples, locations, *blocks, d_in)` and `(examples, locations, *blocks, d_out)`.
    """

    def at(example, location, gradients):
        inputs, own = (
            jnp.take(array, jnp.array([example]), layer.example_axis)
            for array in (problem.inputs, gradients)
        )
        ndim = 0 if layer.features is None else own.ndim - layer.features
        locations = jnp.eye(int(np.prod(own.shape[:ndim])))
        mask = locations[location].reshape(own.shape[:ndim] + (1,) * (own.ndim - ndim))
        _, pull_back = jax.vjp(lambda params: problem.apply(params, inputs), problem.params)
        if layer.features is None:
            return layer.matrix(problem.by_name(pull_back(own)[0]))[..., 0], jnp.ones(1)
        product, ones = (
            layer.matrix(problem.by_name(pull_back(mask * g)[0])) for g in (own, jnp.ones_like(own))
        )
        a = ones[..., 0]
        squares = jnp.sum(a * a, -1, keepdims=True)
        g = jnp.einsum("...io,...i->...o", product, a) / jnp.where(squares > 0, squares, 1)
        return a, g

    @jax.jit
    def rows(params):
        gradients = head_gradient(problem.apply(params, problem.inputs))
        one = jnp.take(gradients, jnp.array([0]), layer.example_axis)
        locations = (
            1 if layer.features is None else int(np.prod(one.shape[: one.ndim - layer.features]))
        )
        return jax.vmap(jax.vmap(at, (None, 0, None)), (0, None, None))(
            jnp.arange(problem.inputs.shape[layer.example_axis]), jnp.arange(locations), gradients
        )

    return [np.asarray(side) for side in rows(problem.params)]


def expected_statistics(oracle, inputs, gradients):
    """An oracle's moments, block by block; locations that do not belong to a block are left out."""
    blocks = inputs.shape[2:-1]
    moments = []
    for block in itertools.product(*map(range, blocks)):
        a, g = (side[(slice(None), slice(None), *block)] for side in (inputs, gradients))
        inside = [np.flatnonzero((example != 0).any(-1)) for example in a]
        if blocks:
            a = np.stack([rows[places] for rows, places in zip(a, inside, strict=True)])
            g = np.stack([rows[places] for rows, places in zip(g, inside, strict=True)])
        moments.append(oracle(a, g))
    if not blocks:
        return moments[0]
    return [np.stack(side) for side in zip(*moments, strict=True)]


def with_head(problem, layer):
    """A model with the layer and a fixed, nonlinear head on it, and targets."""
    axis = layer.example_axis
    output = jax.eval_shape(problem.apply, problem.params, problem.inputs)
    width = int(np.prod(output.shape)) // output.shape[axis]
    rng = np.random.default_rng(1)
    head = jnp.asarray(rng.normal(size=(width, 3)) / np.sqrt(width))
    targets = jnp.asarray(rng.normal(size=(output.shape[axis], 3)))

    def head_of(y):
        y = jnp.moveaxis(jnp.tanh(y), axis, 0)
        return y.reshape(len(y), -1) @ head

    def predict(params, x):
        return head_of(problem.apply(params, x))

    return predict, targets, jax.grad(lambda y: 0.5 * jnp.sum((head_of(y) - targets) ** 2))


class Case(NamedTuple):
    """A layer under a head.

    Attributes:
      statistics: by rule.
      rows: those of the layer's inputs and output gradients, by brute force.
    """

    problem: Any
    layers: tkfac.Layers
    statistics: dict[str, Any]
    rows: list[np.ndarray]


@functools.cache
def make_case(name, framework):
    layer = LAYERS[name]
    problem = make(layer, framework)
    predict, targets, head_gradient = with_head(problem, layer)
    layers = tkfac.find_layers(predict, problem.params, problem.inputs, norms="exact")

    @jax.jit
    def statistics(params, inputs):
        return {
            rule: tkfac.empirical_fisher(predict, tkfac.Normal(), layers, rule=package_rule)(
                params, inputs, targets=targets
            )
            for rule, (package_rule, _) in RULES.items()
        }

    rows = rows_by_brute_force(problem, layer, head_gradient)
    return Case(problem, layers, statistics(problem.params, problem.inputs), rows)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("framework", ["linen", "nnx"])
@pytest.mark.parametrize("name", LAYERS)
def test_layer(name, framework, rule):
    layer, case = LAYERS[name], make_case(name, framework)
    (spec,) = case.layers.values()
    assert not case.layers.fallback
    received = case.statistics[rule][spec.name]
    _, oracle = RULES[rule]
    a, g = case.rows
    if layer.method == "attend":
        # The table's rows are on the side of the outputs there.
        a, g = g, a
    expected = expected_statistics(oracle, a, g)
    assert (spec.d_in, spec.d_out) == (a.shape[-1], g.shape[-1])
    if spec.phi.kind == "diagonal":
        expected = (np.diagonal(expected[0], axis1=-2, axis2=-1), *expected[1:])
        if name == "embed":
            # The whole factor of a lookup is diagonal: nothing is left out.
            assert np.count_nonzero(oracle(a, g)[0]) == np.count_nonzero(expected[0])
    for array, reference in zip(received, expected, strict=True):
        np.testing.assert_allclose(array, reference, **ROUNDING)


def test_the_readme_shows_the_table():
    readme = pathlib.Path(__file__).parents[2] / "README.md"
    assert table() in readme.read_text(), "python tests/coverage_cases.py writes the table"


def test_tied_embeddings_add_their_uses_up():
    """Lookup and attend on one table: the sum of the statistics of two tables that are equal."""

    class Two(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            hidden = jnp.tanh(nn.Embed(6, 3, name="first", **F64)(tokens))
            return nn.Embed(6, 3, name="second", **F64).attend(hidden)

    class Tied(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            embed = nn.Embed(6, 3, name="both", **F64)
            return embed.attend(jnp.tanh(embed(tokens)))

    tokens = jnp.array([[0, 5, 5, 2], [1, 0, 3, 3]])
    tied = jax.jit(Tied().init)(jax.random.key(0), tokens)["params"]
    apart = {"first": tied["both"], "second": tied["both"]}
    received = []
    for model, params in ((Two(), apart), (Tied(), tied)):

        def predict(params, tokens, model=model):
            return model.apply({"params": params}, tokens)

        layers = tkfac.find_layers(predict, params, tokens)
        assert not layers.fallback
        fisher = jax.jit(tkfac.exact_fisher(predict, tkfac.Categorical(), layers))
        received.append(jax.tree.map(np.asarray, fisher(params, tokens)))
    expected = jax.tree.map(np.add, received[0]["first"], received[0]["second"])
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, **ROUNDING), received[1]["both"], expected
    )


@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_batch_norm_in_training(framework):
    """The block of scale and bias is that of the gradients of each example's own loss."""
    x = jax.random.normal(jax.random.key(0), (5, 3, 4), jnp.float64)
    values = {"bias": jnp.array([0.1, -0.3, 0.2, 0.4]), "scale": jnp.array([1.5, 0.0, -0.7, 1.0])}
    if framework == "linen":
        model = nn.BatchNorm(use_running_average=False, **F64)
        state = jax.jit(model.init)(jax.random.key(0), x)["batch_stats"]

        def apply(params, x):
            variables = {"params": params, "batch_stats": state}
            return model.apply(variables, x, mutable=["batch_stats"])[0]

        params = values
    else:
        graphdef, params, rest = nnx.split(
            nnx.BatchNorm(4, rngs=nnx.Rngs(0), **F64), nnx.Param, ...
        )
        params = jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(values))
        # NNX makes the running averages in float32 whatever the dtype.
        rest = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), rest)

        def apply(params, x):
            return nnx.merge(graphdef, params, rest, copy=True)(x)

    def predict(params, x):
        return jnp.tanh(apply(params, x)).sum(1)

    layers = tkfac.find_layers(predict, params, x, norms="exact")
    targets = jnp.ones((5, 4))
    fisher = jax.jit(tkfac.empirical_fisher(predict, tkfac.Normal(), layers))
    received = fisher(params, x, targets=targets)

    def losses(params):
        return 0.5 * jnp.sum((predict(params, x) - targets) ** 2, -1)

    bias, scale = (
        np.asarray(leaf) for leaf in jax.tree.leaves(jax.jit(jax.jacobian(losses))(params))
    )
    rows = np.concatenate([scale, bias], 1)
    np.testing.assert_allclose(received["."].input_moment, rows.T @ rows / 5, **ROUNDING)
    np.testing.assert_allclose(received["."].trace, np.sum(rows**2) / 5, **ROUNDING)


@pytest.mark.parametrize("framework", ["linen", "nnx"])
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "attend"])
def test_a_layer_is_preconditioned_as_its_matrix(name, framework):
    """`Phi^-1 W Psi^-1`, block by block, where the case itself says what the matrix of a kernel is."""
    layer, case = LAYERS[name], make_case(name, framework)
    problem = case.problem
    optimizer = tkfac.scale_by_tkfac(case.layers, damping=0.1)
    leaves, treedef = jax.tree.flatten(problem.params)
    rng = np.random.default_rng(2)
    gradient = treedef.unflatten([jnp.asarray(rng.normal(size=leaf.shape)) for leaf in leaves])

    @jax.jit
    def matrices(gradient, params, statistics):
        state = optimizer.init(params)
        updates, _ = optimizer.update(gradient, state, params, statistics=statistics)
        return [layer.matrix(problem.by_name(tree)) for tree in (updates, gradient)]

    received, matrix = map(np.asarray, matrices(gradient, problem.params, case.statistics["tkfac"]))
    moments = expected_statistics(oracles.trace_restricted, *case.rows)
    for block in np.ndindex(matrix.shape[:-2]):
        factors = oracles.normalised([side[block] for side in moments])
        phi, psi = oracles.normal_damping(factors, 0.1)
        expected = np.linalg.inv(phi) @ matrix[block] @ np.linalg.inv(psi)
        np.testing.assert_allclose(received[block], expected, rtol=1e-7, atol=1e-9)
