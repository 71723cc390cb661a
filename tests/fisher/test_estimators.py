"""Which Fisher the statistics are of: closed forms, masks, weights and several likelihoods."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from networks import as_float64, fresh, mlp_problem

import tkfac_jax as tkfac
from tkfac_jax.linalg.factor_structure import dense

# Sums of a few hundred float64 products.
ROUNDING = {"rtol": 1e-9, "atol": 1e-12}
RULES = {"tkfac": tkfac.trace_restricted, "kfac": tkfac.independent}
LIKELIHOODS = {
    "categorical": (tkfac.Categorical(), "categorical"),
    "bernoulli": (tkfac.Bernoulli(), "bernoulli"),
    "normal": (tkfac.Normal(0.5), 0.5),
}


def assert_equal(received, expected):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **ROUNDING), received, expected)


@functools.cache
def linear_problem(positions=(), d_in=3, d_out=4, batch=5):
    """One Dense layer without bias: its outputs are the model's."""
    model = nn.Dense(d_out, use_bias=False, dtype=jnp.float64)

    @jax.jit
    def make():
        x = jax.random.normal(jax.random.key(0), (batch, *positions, d_in), jnp.float64)
        return x, as_float64(model.init(jax.random.key(1), x)["params"])

    x, params = make()

    def predict(params, x):
        return model.apply({"params": params}, x)

    return predict, params, x, tkfac.find_layers(predict, params, x)


@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("rule", RULES)
def test_exact_fisher_is_the_closed_form(name, rule):
    likelihood, key = LIKELIHOODS[name]
    predict, params, x, layers = linear_problem()
    fisher = tkfac.exact_fisher(predict, likelihood, layers, rule=RULES[rule])
    received = jax.jit(fisher)(params, x)["."]
    a = np.asarray(x)
    fishers = np.stack([oracles.output_fisher(key, row) for row in a @ params["kernel"]])
    traces, norms = np.trace(fishers, axis1=1, axis2=2), (a * a).sum(1)
    if rule == "tkfac":
        expected = (
            np.einsum("n,ni,nj->ij", traces, a, a) / len(a),
            np.einsum("n,nij->ij", norms, fishers) / len(a),
            traces @ norms / len(a),
        )
    else:
        expected = (a.T @ a / len(a), fishers.mean(0), 1.0)
    for array, reference in zip(received, expected, strict=True):
        np.testing.assert_allclose(array, reference, **ROUNDING)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_fisher_vectors_make_the_fisher_of_the_outputs(name):
    likelihood, key = LIKELIHOODS[name]
    outputs = jax.random.normal(jax.random.key(0), (2, 3, 4), jnp.float64)
    vector = jax.jit(likelihood.fisher_vector)
    vectors = np.stack(
        [vector(outputs, jnp.asarray(i)) for i in range(likelihood.num_fisher_vectors(outputs))]
    ).reshape(-1, 2, 12)
    received = np.einsum("kni,knj->nij", vectors, vectors)
    for example, matrix in zip(np.asarray(outputs), received, strict=True):
        expected = np.zeros((12, 12))
        for t in range(3):
            place = slice(4 * t, 4 * t + 4)
            expected[place, place] = oracles.output_fisher(key, example[t])
        np.testing.assert_allclose(matrix, expected, **ROUNDING)


def test_the_mean_of_many_samples_tends_to_the_exact_fisher():
    predict, params, inputs, _, layers = mlp_problem()
    likelihood = tkfac.Categorical()
    exact = jax.jit(tkfac.exact_fisher(predict, likelihood, layers))(params, inputs)
    many = tkfac.sampled_fisher(predict, likelihood, layers, num_samples=5000)
    sampled = jax.jit(many)(params, inputs, key=jax.random.key(0))
    for name in layers:
        # 30,000 draws of relative deviation of about 1.
        np.testing.assert_allclose(sampled[name].trace, exact[name].trace, rtol=0.05)


@pytest.mark.parametrize("estimator", ["exact", "empirical"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_padded_positions_contribute_nothing(estimator, rule, average, sharing):
    """Sequences of length 3 and 3 padded to 5: as if the padding were not there."""
    predict, params, short, layers = linear_problem((3,), batch=2)
    targets = jax.random.randint(jax.random.key(2), (2, 3), 0, 4)
    likelihood = tkfac.Categorical(average_positions=average)
    options = {"rule": RULES[rule], "sharing": sharing}
    long = np.pad(short, ((0, 0), (0, 2), (0, 0)), constant_values=7.0)
    mask = np.arange(5)[None, :] < np.array([[3], [3]])
    if estimator == "exact":
        fisher = jax.jit(tkfac.exact_fisher(predict, likelihood, layers, **options))
        expected = fisher(params, short)
        received = fisher(params, long, position_mask=mask)
    else:
        fisher = jax.jit(tkfac.empirical_fisher(predict, likelihood, layers, **options))
        expected = fisher(params, short, targets=targets)
        padded = np.pad(targets, ((0, 0), (0, 2)))
        received = fisher(params, long, targets=padded, position_mask=mask)
    assert_equal(received, expected)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("estimator", ["exact", "empirical", "sampled"])
def test_examples_of_weight_zero_contribute_nothing(estimator, rule):
    predict, params, inputs, targets, layers = mlp_problem(8)
    make = functools.partial(
        tkfac.value_and_grad_with_fisher, predict, tkfac.Categorical(), layers, estimator=estimator
    )
    f = make(rule=RULES[rule])
    if estimator == "sampled":
        # Samples differ between batches: here only that weights scale the loss and stay finite.
        f = make(rule=RULES[rule], num_samples=3)
    f, inputs, targets = jax.jit(f), np.asarray(inputs), np.asarray(targets)
    key = jax.random.key(0)
    # The mean stays one over the number of examples: four of eight count twice.
    weights = jnp.array([2.0] * 4 + [0.0] * 4)
    (loss, _), gradient, received = f(
        params, inputs, targets=targets, key=key, example_weights=weights
    )
    (half_loss, _), half_gradient, expected = f(params, inputs[:4], targets=targets[:4], key=key)
    np.testing.assert_allclose(loss, half_loss, rtol=1e-12)
    assert_equal(gradient, half_gradient)
    if estimator != "sampled":
        assert_equal(received, expected)
    else:
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(received))


def two_headed_problem():
    apply, params, x, _ = linear_problem(d_out=7)

    def predict(params, x):
        y = apply(params, x)
        return {"class": y[:, :4], "value": y[:, 4:]}

    likelihoods = {"class": tkfac.Categorical(), "value": tkfac.Normal(2.0)}
    return predict, fresh(params), x, likelihoods, tkfac.find_layers(predict, params, x)


def test_several_likelihoods_have_the_sum_of_their_fishers():
    predict, params, x, likelihoods, layers = two_headed_problem()
    received = jax.jit(tkfac.exact_fisher(predict, likelihoods, layers))(params, x)
    alone = [
        jax.jit(tkfac.exact_fisher(lambda p, x, n=name: predict(p, x)[n], likelihood, layers))(
            params, x
        )
        for name, likelihood in likelihoods.items()
    ]
    assert_equal(received, jax.tree.map(lambda a, b: np.asarray(a) + b, *alone))


def test_several_likelihoods_train():
    predict, params, x, likelihoods, layers = two_headed_problem()
    targets = {"class": jnp.zeros(5, int), "value": jnp.ones((5, 3))}
    optimizer = tkfac.tkfac(0.1, layers, damping=0.1)
    step = tkfac.make_train_step(
        predict, likelihoods, optimizer, layers=layers, fisher_interval=1, inverse_interval=1
    )
    opt_state = jax.jit(optimizer.init)(params)
    losses = []
    for i in range(5):
        params, opt_state, metrics = step(
            params, opt_state, x, targets=targets, key=jax.random.key(i)
        )
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]


def test_sharing_for_each_layer():
    predict, params, x, layers = linear_problem((3,))
    targets = jnp.zeros((5, 3), int)

    def statistics(**options):
        fisher = tkfac.empirical_fisher(predict, tkfac.Categorical(), layers, **options)
        return jax.jit(fisher)(params, x, targets=targets)

    received = statistics(sharing={".": "reduce"})
    assert_equal(received, statistics(sharing="reduce"))
    assert not np.allclose(received["."].trace, statistics()["."].trace)


@pytest.mark.parametrize("kind", ["diagonal", "blocks"])
def test_large_factors_keep_some_of_their_entries(kind):
    """Diagonals and blocks of the whole moments; preconditioning is the solve with what is kept."""
    predict, params, x, whole = linear_problem(d_in=5, d_out=4)
    layers = tkfac.find_layers(predict, params, x, max_factor_size=3, large_factors=kind)
    assert ("diagonal" if kind == "diagonal" else "in 2 blocks") in str(layers)
    exact = [
        jax.jit(tkfac.exact_fisher(predict, tkfac.Categorical(), own))(params, x)["."]
        for own in (whole, layers)
    ]
    kept = [
        np.equal.outer(np.arange(size), np.arange(size))
        if kind == "diagonal"
        else np.equal.outer(np.arange(size) // block, np.arange(size) // block)
        for size, block in ((5, 3), (4, 2))
    ]
    spec = layers["."]
    factors = []
    for which, mask, structure in zip((0, 1), kept, (spec.phi, spec.psi), strict=True):
        expected = np.where(mask, exact[0][which], 0)
        np.testing.assert_allclose(dense(structure, exact[1][which]), expected, **ROUNDING)
        factors.append(expected / exact[0].trace)
    optimizer = tkfac.scale_by_tkfac(layers, damping=0.1)
    gradient = jax.tree.map(jnp.ones_like, params)
    received, _ = jax.jit(optimizer.update)(
        gradient, jax.jit(optimizer.init)(params), params, statistics={".": exact[1]}
    )
    phi, psi = oracles.normal_damping((*factors, float(exact[0].trace)), 0.1)
    expected = np.linalg.inv(phi) @ np.ones((5, 4)) @ np.linalg.inv(psi)
    np.testing.assert_allclose(received["kernel"], expected, rtol=1e-8)


def test_a_large_vocabulary_needs_no_matrix_of_its_size():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            embed = nn.Embed(50_000, 8)
            return embed.attend(nn.Dense(8)(embed(tokens)))

    model, tokens = Model(), jnp.zeros((2, 3), int)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    layers = tkfac.find_layers(lambda p, t: model.apply({"params": p}, t), params, tokens)
    spec = layers["Embed_0"]
    assert (spec.phi.shape, spec.psi.shape) == ((50_000,), (8, 8))
    assert spec.num_bytes < 1e6
    assert "50000 diagonal" in str(layers)


def test_factors_and_inverses_in_other_dtypes():
    predict, params, inputs, targets, layers = mlp_problem()
    fisher = tkfac.empirical_fisher(predict, tkfac.Categorical(), layers)
    gradient = jax.tree.map(jnp.ones_like, params)

    def update(**options):
        optimizer = tkfac.scale_by_tkfac(layers, damping=0.1, **options)

        @jax.jit
        def run(params):
            statistics = fisher(params, inputs, targets=targets)
            return optimizer.update(gradient, optimizer.init(params), params, statistics=statistics)

        return run(params)

    expected, _ = update()
    received, state = update(factor_dtype=jnp.float32, inverse_dtype=jnp.bfloat16)
    assert {f.phi.dtype for f in state.factors.values()} == {jnp.dtype("float32")}
    assert {f.psi.dtype for f in state.inverses.values()} == {jnp.dtype("bfloat16")}
    for new, old in zip(jax.tree.leaves(received), jax.tree.leaves(expected), strict=True):
        # bfloat16 has 8 bits, and products of three factors round each.
        np.testing.assert_allclose(new, old, rtol=0.1, atol=0.05 * float(jnp.abs(old).max()))


@pytest.mark.parametrize("precision", [None, jax.lax.Precision.HIGHEST])
def test_the_precision_of_the_statistics(precision):
    """Every product of the statistics has the highest precision unless the user says otherwise."""
    predict, params, x, layers = linear_problem()
    options = {} if precision is not None else {"precision": jax.lax.Precision.DEFAULT}
    fisher = tkfac.empirical_fisher(predict, tkfac.Categorical(), layers, **options)
    # The model's own products have the default precision, which is another one in these tests.
    with jax.default_matmul_precision("default"):
        program = str(jax.make_jaxpr(lambda: fisher(params, x, targets=jnp.zeros(5, int)))())
    assert program.count("Precision.HIGHEST") == (4 if precision is not None else 0)


def test_devices_that_are_given_one_key_draw_targets_of_their_own():
    predict, params, x, _, layers = mlp_problem()
    likelihood, key = tkfac.Categorical(), jax.random.key(3)
    averaged = tkfac.sampled_fisher(predict, likelihood, layers, axis_name="devices")
    alone = tkfac.sampled_fisher(predict, likelihood, layers)
    received = jax.jit(
        jax.vmap(lambda x: averaged(params, x, key=key), axis_name="devices", out_axes=None)
    )(jnp.stack([x, x]))
    draws = [alone(params, x, key=jax.random.fold_in(key, device)) for device in range(2)]
    assert not np.allclose(draws[0]["Dense_0"].trace, draws[1]["Dense_0"].trace)
    jax.tree.map(
        lambda mean, *own: np.testing.assert_allclose(mean, np.mean(own, axis=0), rtol=1e-12),
        received,
        *draws,
    )
