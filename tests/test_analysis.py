import functools
import itertools
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from networks import as_float64, convnet_problem, spec
from networks import mlp_problem as make_mlp_problem

import tkfac_jax as tkfac
from tkfac_jax import analysis
from tkfac_jax.curvature.factors import kronecker_factors

# Sums of a few hundred float64 products.
ROUNDING = {"rtol": 1e-10, "atol": 1e-12}
mlp_problem = functools.cache(make_mlp_problem)
RULES = {"tkfac": tkfac.trace_restricted, "kfac": tkfac.independent}


def problem(model, x, **options):
    """A float64 model: predict, params with biases that are not zero, layers."""
    params = as_float64(jax.jit(model.init)(jax.random.key(3), x)["params"])
    params = jax.tree.map(lambda p: p + 0.1 * jnp.cos(jnp.arange(p.size)).reshape(p.shape), params)

    def predict(params, x):
        return model.apply({"params": params}, x)

    return predict, params, tkfac.find_layers(predict, params, x, **options)


def jitted(function, predict, likelihood, layers, **options):
    """A function of the module as a function of params and inputs."""
    return jax.jit(partial(function, predict, likelihood, layers, **options))


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float64)


def rows_last(layer):
    """Kernel or scale as rows, the bias beneath."""
    kernel = next(layer[k] for k in ("kernel", "embedding", "scale") if k in layer)
    matrix = kernel.reshape(-1, kernel.shape[-1] if kernel.ndim > 1 else 1)
    bias = [layer["bias"].reshape(-1, matrix.shape[-1])] if "bias" in layer else []
    return jnp.concatenate([matrix, *bias])


def categorical_blocks(predict, params, x, matrices):
    """`mean_n sum_y p(y) w w^T`, w the gradient of `log p(y)` of one example's own forward pass.

    Args:
      matrices: from a layer's name to the function from a tree like params to its matrix, or batch of matrices.
    """

    def log_p(params, example):
        return jax.nn.log_softmax(predict(params, example[None])[0])

    derivatives = jax.jit(lambda *args: (jnp.exp(log_p(*args)), jax.jacrev(log_p)(*args)))
    blocks = dict.fromkeys(matrices, 0.0)
    for example in x:
        p, jacobian = jax.tree.map(np.asarray, derivatives(params, example))
        for k, name in itertools.product(range(len(p)), matrices):
            matrix = np.asarray(matrices[name](jax.tree.map(lambda leaf, k=k: leaf[k], jacobian)))
            w = matrix.reshape(*matrix.shape[:-2], -1)
            blocks[name] = blocks[name] + p[k] * w[..., :, None] * w[..., None, :] / len(x)
    return blocks


@pytest.mark.parametrize(
    ("likelihood", "oracle"),
    [
        (tkfac.Categorical(), "categorical"),
        (tkfac.Bernoulli(), "bernoulli"),
        (tkfac.Normal(variance=0.5), 0.5),
    ],
    ids=["categorical", "bernoulli", "normal"],
)
@pytest.mark.parametrize("use_bias", [True, False])
def test_the_block_of_a_linear_model_in_closed_form(likelihood, oracle, use_bias):
    x = normal(0, 5, 3)
    predict, params, layers = problem(nn.Dense(4, use_bias=use_bias, dtype=jnp.float64), x)
    received = analysis.fisher_blocks(predict, likelihood, layers, params, x)["."]
    inputs = oracles.with_one(x) if use_bias else np.asarray(x)
    expected = np.mean(
        [
            np.kron(np.outer(a, a), oracles.output_fisher(oracle, z))
            for a, z in zip(inputs, predict(params, x), strict=True)
        ],
        axis=0,
    )
    np.testing.assert_allclose(received, expected, **ROUNDING)


class Mixed(nn.Module):
    """Locations, a norm, and a layer that is applied twice."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(3, (2, 2), dtype=jnp.float64, name="conv")(x)
        x = nn.LayerNorm(dtype=jnp.float64, name="norm")(x)
        shared = nn.Dense(3, dtype=jnp.float64, name="shared")
        x = jnp.tanh(shared(jnp.tanh(shared(x))))
        return nn.Dense(3, dtype=jnp.float64, name="last")(x.reshape(len(x), -1))


class Tokens(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Embed(5, 2, dtype=jnp.float64, name="table")(x)
        return nn.Dense(3, dtype=jnp.float64, name="last")(jnp.tanh(x).sum(1))


@pytest.mark.parametrize("name", ["mixed", "tokens"])
def test_blocks_are_the_expected_products_of_per_example_gradients(name):
    """With all correlations: between locations, between uses, between a norm's features."""
    if name == "mixed":
        model, x = Mixed(), normal(0, 3, 2, 3, 2)
    else:
        model, x = Tokens(), jnp.array([[0, 4, 4], [1, 2, 0]])
    predict, params, layers = problem(model, x, norms="exact")
    assert set(layers) == set(params)
    received = jitted(analysis.fisher_blocks, predict, tkfac.Categorical(), layers)(params, x)
    matrices = {n: lambda tree, n=n: rows_last(tree[n]) for n in layers}
    expected = categorical_blocks(predict, params, x, matrices)
    assert list(received) == list(layers)
    for layer in layers:
        np.testing.assert_allclose(received[layer], expected[layer], **ROUNDING, err_msg=layer)


class Cell(nn.Module):
    @nn.compact
    def __call__(self, carry, _):
        return jnp.tanh(nn.Dense(3, dtype=jnp.float64, name="dense")(carry)), None


class Stack(nn.Module):
    """Two Dense layers that nn.scan runs through, and one more."""

    @nn.compact
    def __call__(self, x):
        scanned = nn.scan(Cell, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x, _ = scanned(name="stack")(x, None)
        return nn.Dense(3, dtype=jnp.float64, name="last")(x)


def test_stacked_layers_have_a_block_each():
    x = normal(0, 4, 3)
    predict, params, layers = problem(Stack(), x)
    name = "stack/dense"
    received = jitted(analysis.fisher_blocks, predict, tkfac.Categorical(), layers)(params, x)
    assert received[name].shape == (2, 12, 12)
    assert received["last"].shape == (12, 12)
    matrices = {
        name: lambda tree: jnp.concatenate(
            [tree["stack"]["dense"]["kernel"], tree["stack"]["dense"]["bias"][:, None]], axis=1
        )
    }
    expected = categorical_blocks(predict, params, x, matrices)[name]
    np.testing.assert_allclose(received[name], expected, **ROUNDING)
    errors = jitted(analysis.approximation_errors, predict, tkfac.Categorical(), layers)(params, x)
    assert errors[name].relative.shape == (2,)
    # One location, one use: the trace identity holds for each layer of the stack.
    np.testing.assert_allclose(
        errors[name].trace_approximation, errors[name].trace_exact, rtol=1e-10
    )


class Grouped(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (2,), feature_group_count=2, dtype=jnp.float64, name="grouped")(x)
        return nn.Dense(3, dtype=jnp.float64, name="last")(jnp.tanh(x).reshape(len(x), -1))


def test_the_groups_of_a_convolution_have_a_block_each():
    x = normal(0, 3, 3, 6)
    predict, params, layers = problem(Grouped(), x)
    received = jitted(analysis.fisher_blocks, predict, tkfac.Categorical(), layers)(params, x)[
        "grouped"
    ]
    assert received.shape == (2, 14, 14)

    def of_group(tree, group):
        channels = slice(2 * group, 2 * group + 2)
        return rows_last({k: v[..., channels] for k, v in tree["grouped"].items()})

    matrices = {"grouped": lambda tree: jnp.stack([of_group(tree, group) for group in range(2)])}
    expected = categorical_blocks(predict, params, x, matrices)["grouped"]
    np.testing.assert_allclose(received, expected, **ROUNDING)
    errors = jitted(analysis.approximation_errors, predict, tkfac.Categorical(), layers)(params, x)
    assert errors["grouped"].absolute.shape == (2,)


def test_batch_statistics_belong_to_the_model():
    """The gradient of one example's output goes through the statistics of the whole batch."""
    predict, params, batch_stats, x, _, layers = convnet_problem(batch=3, dtype=jnp.float64)
    params = as_float64(params)
    received = jitted(analysis.fisher_blocks, predict, tkfac.Normal(), layers, has_aux=True)(
        params, batch_stats, x
    )
    jacobian = jax.jit(jax.jacrev(lambda params: predict(params, batch_stats, x)[0]))(params)
    for name in layers:
        layer = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), jacobian[name])
        w = np.asarray(jax.vmap(rows_last)(layer)).reshape(3 * 3, -1)
        np.testing.assert_allclose(received[name], w.T @ w / 3, **ROUNDING)


def test_blocks_of_a_float32_model_are_summed_in_float64():
    predict, params, batch_stats, x, _, layers = convnet_problem(batch=2)
    blocks = jitted(analysis.fisher_blocks, predict, tkfac.Categorical(), layers, has_aux=True)(
        params, batch_stats, x
    )
    assert {block.dtype for block in blocks.values()} == {jnp.dtype(jnp.float64)}


def test_masks_weights_and_several_likelihoods():
    predict, params, x, _, layers = mlp_problem(batch=3)
    blocks = partial(jitted(analysis.fisher_blocks, predict, tkfac.Categorical(), layers), params)
    weights = jnp.array([0.5, 0.0, 2.0])
    weighted, each = blocks(x, example_weights=weights), [blocks(x[n : n + 1]) for n in range(3)]
    for name in layers:
        expected = sum(float(w) * block[name] for w, block in zip(weights, each, strict=True)) / 3
        np.testing.assert_allclose(weighted[name], expected, **ROUNDING)

    def heads(params, x):
        outputs = predict(params, x)
        return {"class": outputs, "value": outputs[:, :2]}

    likelihoods = {"class": tkfac.Categorical(), "value": tkfac.Normal()}
    joint = jitted(analysis.fisher_blocks, heads, likelihoods, layers)(params, x)
    value = jitted(
        analysis.fisher_blocks, lambda params, x: predict(params, x)[:, :2], tkfac.Normal(), layers
    )(params, x)
    # A masked position is one that is not predicted.
    mask = jnp.array([[True, True, False]] * 3)
    masked = jitted(analysis.fisher_blocks, predict, tkfac.Normal(), layers)(
        params, x, position_mask=mask
    )
    for name, block in blocks(x).items():
        np.testing.assert_allclose(joint[name], block + value[name], **ROUNDING)
        np.testing.assert_allclose(masked[name], value[name], **ROUNDING)


def test_dense_is_the_kronecker_product():
    phi, psi, delta = normal(0, 2, 3, 3), normal(1, 2, 4, 4), jnp.array([2.0, 5.0])
    received = analysis.dense(tkfac.KroneckerFactors(phi, psi, delta))
    for i in range(2):
        np.testing.assert_allclose(received[i], delta[i] * np.kron(phi[i], psi[i]), rtol=1e-15)


@pytest.mark.parametrize("large", ["diagonal", "blocks"])
def test_dense_knows_how_a_factor_is_stored(large):
    layer = spec(5, 3, large=(4, large))
    root = normal(0, 5, 5)
    whole = root @ root.T
    if large == "diagonal":
        phi, kept = jnp.diagonal(whole), np.eye(5)
    else:
        kept = np.zeros((5, 5))
        kept[:3, :3] = kept[3:, 3:] = 1
        padded = jnp.zeros((6, 6)).at[:5, :5].set(whole)
        phi = jnp.stack([padded[:3, :3], padded[3:, 3:]])
    factors = tkfac.KroneckerFactors(phi, normal(1, 3, 3), jnp.asarray(2.0))
    expected = 2 * np.kron(whole * kept, factors.psi)
    np.testing.assert_allclose(analysis.dense(factors, layer), expected, rtol=1e-15)
    with pytest.raises(ValueError, match=r"phi has shape .*, which is not one square matrix"):
        analysis.dense(factors)
    with pytest.raises(ValueError, match=r"layer '\.': phi has shape"):
        analysis.dense(factors, spec(4, 3))


def test_errors_are_frobenius_norms():
    exact = jnp.stack([jnp.diag(jnp.array([3.0, 4.0])), jnp.zeros((2, 2)), jnp.zeros((2, 2))])
    approximation = jnp.stack([jnp.diag(jnp.array([3.0, 1.0])), jnp.zeros((2, 2)), jnp.eye(2)])
    received = analysis.approximation_error(exact, approximation)
    np.testing.assert_allclose(received.absolute, [3, 0, np.sqrt(2)])
    np.testing.assert_allclose(received.relative, [3 / 5, 0, np.inf])
    np.testing.assert_allclose(received.trace_exact, [7, 0, 0])
    np.testing.assert_allclose(received.trace_approximation, [4, 0, 2])
    assert np.isnan(analysis.approximation_error(exact[0], exact[0] * jnp.nan).relative)
    with pytest.raises(ValueError, match=r"has shape \(3, 2, 2\), its approximation \(2, 2\)"):
        analysis.approximation_error(exact, exact[0])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", ["deep linear", "one example"])
def test_where_kronecker_approximations_are_exact(case, rule):
    """Gradients that do not depend on the inputs; and a batch of one."""
    if case == "one example":
        predict, params, x, _, layers = mlp_problem(batch=1)
        likelihood = tkfac.Categorical()
    else:
        x, likelihood = normal(0, 6, 3), tkfac.Normal(variance=0.3)
        model = nn.Sequential([nn.Dense(width, dtype=jnp.float64) for width in (4, 3, 2)])
        predict, params, layers = problem(model, x)
    errors = jitted(analysis.approximation_errors, predict, likelihood, layers, rule=RULES[rule])(
        params, x
    )
    assert list(errors) == list(layers)
    for error in errors.values():
        assert float(error.trace_exact) > 0
        np.testing.assert_allclose(error.relative, 0, atol=1e-12)


def scaled_outputs(directions, scales):
    """One linear layer without bias whose outputs are multiplied by a number per example: `G = scale^2 I`."""
    kernel = normal(1, directions.shape[1], 2)

    def predict(params, x):
        return nn.Dense(2, use_bias=False).apply({"params": params}, x) * scales[:, None]

    params = {"kernel": kernel}
    layers = tkfac.find_layers(predict, params, directions)

    def errors(rule=tkfac.trace_restricted):
        function = analysis.approximation_errors
        return jitted(function, predict, tkfac.Normal(), layers, rule=rule)(params, directions)

    return errors


def test_independent_pairs_are_exact_under_both_rules():
    """Every input with every scale: the empirical distribution is a product."""
    inputs, scales = normal(0, 3, 4), jnp.array([0.5, 2.0])
    pairs = scaled_outputs(jnp.repeat(inputs, 2, axis=0), jnp.tile(scales, 3))
    for rule in RULES.values():
        np.testing.assert_allclose(pairs(rule=rule)["."].relative, 0, atol=1e-12)


def test_sizes_that_go_together_are_exact_under_tkfac_only():
    """Inputs `c a` with gradients of size s: `E[c^2 s^2] a a^T (x) I`, where KFAC has `E[c^2] E[s^2]`."""
    c, s = np.array([1.0, 2.0, 4.0]), np.array([0.5, 1.0, 3.0])
    pairs = scaled_outputs(jnp.asarray(c)[:, None] * normal(0, 1, 4), jnp.asarray(s))
    exact, product = np.mean(c**2 * s**2), np.mean(c**2) * np.mean(s**2)
    np.testing.assert_allclose(pairs()["."].relative, 0, atol=1e-12)
    kfac = pairs(rule=tkfac.independent)["."]
    np.testing.assert_allclose(kfac.relative, abs(1 - product / exact), rtol=1e-10)


def test_errors_are_those_of_the_blocks_and_tkfac_keeps_the_trace():
    predict, params, x, _, layers = mlp_problem()
    likelihood = tkfac.Categorical()
    received = jitted(analysis.approximation_errors, predict, likelihood, layers)(params, x)
    blocks = jitted(analysis.fisher_blocks, predict, likelihood, layers)(params, x)
    statistics = jax.jit(tkfac.exact_fisher(predict, likelihood, layers))(params, x)
    for name in layers:
        phi, psi, delta = kronecker_factors(statistics[name])
        difference = blocks[name] - delta * np.kron(phi, psi)
        norm = np.linalg.norm(blocks[name])
        np.testing.assert_allclose(received[name].absolute, np.linalg.norm(difference), rtol=1e-10)
        np.testing.assert_allclose(
            received[name].relative, np.linalg.norm(difference) / norm, rtol=1e-10
        )
        np.testing.assert_allclose(
            received[name].trace_approximation, received[name].trace_exact, rtol=1e-10
        )
        assert 0.01 < received[name].relative < 1


def test_errors_of_factors_that_are_not_stored_whole():
    """They know their structure: dropping entries of a factor changes the error, not the trace."""
    predict, params, x, _, whole = mlp_problem()
    layers = tkfac.find_layers(predict, params, x, max_factor_size=3, large_factors="blocks")
    assert any(layer.phi.kind == "blocks" for layer in layers.values())
    blocks, full = (
        jitted(analysis.approximation_errors, predict, tkfac.Categorical(), found)(params, x)
        for found in (layers, whole)
    )
    for name in layers:
        assert not np.isclose(blocks[name].absolute, full[name].absolute)
        np.testing.assert_allclose(
            blocks[name].trace_approximation, full[name].trace_exact, rtol=1e-10
        )


@pytest.mark.parametrize("batch", [1, 2, 6])
def test_the_bound_of_theorem_4_4(batch):
    predict, params, x, _, layers = mlp_problem(batch)
    likelihood = tkfac.Categorical()
    received = jitted(analysis.theorem_bound, predict, likelihood, layers)(params, x)
    errors = jitted(analysis.approximation_errors, predict, likelihood, layers)(params, x)
    blocks = jitted(analysis.fisher_blocks, predict, likelihood, layers)
    each = [blocks(params, x[n : n + 1]) for n in range(batch)]
    for name in layers:
        traces = [np.trace(block[name]) for block in each]
        pairs = [np.sqrt(a * b) for a, b in itertools.combinations(traces, 2)]
        expected = 2 * (batch - 1) / batch * max(pairs, default=0)
        np.testing.assert_allclose(received[name], expected, rtol=1e-10)
        # Rounding alone, where the batch is one example.
        assert errors[name].absolute <= received[name] + 1e-12


def test_the_bound_is_about_dense_layers_only():
    predict, params, batch_stats, x, _, layers = convnet_problem(batch=2)
    received = jitted(analysis.theorem_bound, predict, tkfac.Categorical(), layers, has_aux=True)(
        params, batch_stats, x
    )
    assert list(received) == ["Dense_0"]


def test_wrong_arguments_are_named():
    class Unknown:
        def nll(self, outputs, targets): ...

        def sample(self, key, outputs): ...

    predict, params, x, _, layers = mlp_problem()
    for function in (analysis.fisher_blocks, analysis.approximation_errors, analysis.theorem_bound):
        with pytest.raises(ValueError, match="Unknown has no closed form"):
            function(predict, Unknown(), layers, params, x)
        with pytest.raises(ValueError, match=r"layer 'Dense_0': params should hold"):
            function(predict, tkfac.Normal(), layers, {}, x)
