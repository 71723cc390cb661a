import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tkfac_jax as tkfac
from tkfac_jax.fisher.joint_likelihood import as_likelihood, fisher_product

LIKELIHOODS = [tkfac.Categorical(), tkfac.Bernoulli(), tkfac.Normal(0.7)]


def targets_for(likelihood, key, outputs):
    return likelihood.sample(key, outputs)


def test_categorical_nll_is_the_cross_entropy_summed_over_positions(keys):
    logits = jax.random.normal(next(keys), (4, 3, 5))
    targets = jax.random.randint(next(keys), (4, 3), 0, 5)
    p = np.exp(np.asarray(logits))
    p = p / p.sum(-1, keepdims=True)
    expected = -np.log(np.take_along_axis(p, np.asarray(targets)[..., None], -1))[..., 0]
    np.testing.assert_allclose(
        tkfac.Categorical().nll(logits, targets), expected.sum(1), rtol=1e-12
    )
    np.testing.assert_allclose(
        tkfac.Categorical(average_positions=True).nll(logits, targets), expected.mean(1), rtol=1e-12
    )


def test_bernoulli_nll(keys):
    logits = jax.random.normal(next(keys), (4, 6))
    targets = jax.random.uniform(next(keys), (4, 6))
    p, t = 1 / (1 + np.exp(-np.asarray(logits))), np.asarray(targets)
    expected = -(t * np.log(p) + (1 - t) * np.log(1 - p))
    np.testing.assert_allclose(tkfac.Bernoulli().nll(logits, targets), expected.sum(1), rtol=1e-12)
    binary = jnp.zeros((4, 6), int)
    assert tkfac.Bernoulli().nll(logits, binary).shape == (4,)


def test_normal_nll_is_minus_the_log_density(keys):
    means, targets = (jax.random.normal(next(keys), (4, 6)) for _ in range(2))
    expected = -jax.scipy.stats.norm.logpdf(targets, means, np.sqrt(0.7)).sum(1)
    np.testing.assert_allclose(tkfac.Normal(0.7).nll(means, targets), expected, rtol=1e-12)


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=str)
def test_samples_have_the_form_of_targets_and_the_right_mean(likelihood, keys):
    outputs = jnp.broadcast_to(jnp.array([0.3, -1.0, 0.8]), (20_000, 3))
    targets = jax.jit(likelihood.sample)(next(keys), outputs)
    assert jax.eval_shape(likelihood.nll, outputs, targets).shape == (20_000,)
    outputs, targets = np.asarray(outputs), np.asarray(targets)
    if isinstance(likelihood, tkfac.Categorical):
        received = np.bincount(targets, minlength=3) / len(targets)
        expected = jax.nn.softmax(outputs[0])
    else:
        received = targets.mean(0)
        expected = (
            outputs[0] if isinstance(likelihood, tkfac.Normal) else jax.nn.sigmoid(outputs[0])
        )
    # Five standard errors of the mean of 20,000 draws of a deviation of at most 0.84.
    np.testing.assert_allclose(received, expected, atol=5 * 0.84 / np.sqrt(20_000))


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=str)
def test_the_expected_squared_score_is_minus_the_expected_second_derivative(likelihood, keys):
    """The information equality: nll and sample belong to the same distribution."""
    outputs = jax.random.normal(next(keys), (1, 3))
    draws = 40_000

    def scores(key):
        target = likelihood.sample(key, outputs)
        return jax.grad(lambda o: likelihood.nll(o, target).sum())(outputs)[0]

    def curvature(key):
        target = likelihood.sample(key, outputs)
        return jax.hessian(lambda o: likelihood.nll(o, target).sum())(outputs)[0, :, 0, :]

    g = np.asarray(jax.jit(jax.vmap(scores))(jax.random.split(next(keys), draws)))
    expected = jax.jit(curvature)(next(keys))
    # A standard error is at most 3 / sqrt(draws) for these scores; six of them.
    np.testing.assert_allclose(g.T @ g / draws, expected, atol=6 * 3 / np.sqrt(draws))


@pytest.mark.parametrize("kind", [tkfac.Categorical, tkfac.Bernoulli, tkfac.Normal])
def test_averaged_positions_scale_loss_by_t_and_fisher_by_root_t(kind, keys):
    outputs = jax.random.normal(next(keys), (2, 5, 3))
    positions = 5 if kind is tkfac.Categorical else 15
    targets = jax.jit(kind().sample)(next(keys), outputs)
    total = np.asarray(kind().nll(outputs, targets))
    averaged = kind(average_positions=True)
    np.testing.assert_allclose(averaged.nll(outputs, targets), total / positions, rtol=1e-12)
    np.testing.assert_allclose(
        averaged.fisher_nll(outputs, targets), total / np.sqrt(positions), rtol=1e-12
    )
    np.testing.assert_allclose(kind().fisher_nll(outputs, targets), total, rtol=1e-12)


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=str)
def test_losses_are_computed_in_float32_at_least(likelihood, keys):
    outputs = jax.random.normal(next(keys), (2, 3)).astype(jnp.bfloat16)
    targets = likelihood.sample(next(keys), outputs)
    assert jax.eval_shape(likelihood.nll, outputs, targets).dtype == jnp.float32


def test_likelihoods_fulfil_the_protocol():
    for likelihood in LIKELIHOODS:
        assert isinstance(likelihood, tkfac.Likelihood)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: tkfac.Normal().nll(jnp.ones((2, 3), int), jnp.ones((2, 3))),
            "Normal expects floating-point outputs; got int64",
        ),
        (
            lambda: tkfac.Normal().nll(jnp.ones((2, 3)), jnp.ones((2, 3), int)),
            r"Normal expects floating-point targets; got int64. Convert them with .astype\(jnp.float32\)",
        ),
        (
            lambda: tkfac.Normal().sample(jax.random.key(0), jnp.ones((2, 3), int)),
            "Normal expects floating-point outputs",
        ),
        (
            lambda: tkfac.Bernoulli().nll(jnp.ones((2, 3), int), jnp.ones((2, 3))),
            "Bernoulli expects floating-point outputs",
        ),
        (
            lambda: tkfac.Categorical().nll(jnp.ones((2, 3)), jnp.ones((2,))),
            "Categorical expects integer class indices as targets; got float64",
        ),
        (
            lambda: tkfac.Categorical().nll(jnp.ones((2, 3)), jnp.ones((3,), int)),
            r"targets have shape \(3,\); the outputs ask for \(2,\)",
        ),
        (
            lambda: tkfac.Normal().nll(jnp.ones((2, 3)), jnp.ones((2,))),
            r"Normal: targets have shape \(2,\); the outputs ask for \(2, 3\)",
        ),
        (
            lambda: tkfac.Bernoulli().nll(jnp.ones((2, 3)), jnp.ones((2, 1))),
            "Bernoulli: targets have shape",
        ),
        (lambda: tkfac.Normal(0.0), "Normal: variance=0.0; expected a positive number"),
    ],
)
def test_messages(call, message, unchecked):
    with pytest.raises(ValueError, match=message):
        call()


def test_categorical_is_the_cross_entropy_of_optax():
    """Also for negative labels, which count from the end, labels out of range, and impossible classes."""
    logits = jax.random.normal(jax.random.key(0), (7, 4)).at[0, 1].set(-jnp.inf)
    labels = jnp.array([0, 1, 2, 3, -1, -4, 4])

    def losses(logits):
        received = tkfac.Categorical().nll(logits, labels)
        return received, optax.softmax_cross_entropy_with_integer_labels(logits, labels)

    np.testing.assert_allclose(*losses(logits), rtol=1e-12)
    received, expected = (
        jax.grad(lambda logits, i=i: losses(logits)[i][:6].sum())(logits) for i in range(2)
    )
    np.testing.assert_allclose(received, expected, rtol=1e-12, atol=1e-15)


class Vectors:
    """A likelihood that says its Fisher only by vectors."""

    def __init__(self, likelihood):
        self.nll, self.sample = likelihood.nll, likelihood.sample
        self.num_fisher_vectors = likelihood.num_fisher_vectors
        self.fisher_vector = likelihood.fisher_vector


class Losses:
    """A likelihood that says nothing of its Fisher."""

    def __init__(self, likelihood):
        self.nll, self.sample = likelihood.nll, likelihood.sample


@pytest.mark.parametrize("kind", [lambda likelihood: likelihood, Vectors, Losses])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "likelihood",
    [
        *LIKELIHOODS,
        tkfac.Categorical(average_positions=True),
        tkfac.Bernoulli(average_positions=True),
        tkfac.Normal(0.7, average_positions=True),
    ],
    ids=str,
)
def test_fisher_products_equal_those_of_the_dense_fisher(likelihood, masked, kind, keys):
    outputs, tangents = (jax.random.normal(next(keys), (2, 3, 2)) for _ in range(2))
    targets = likelihood.sample(next(keys), outputs)
    mask = jnp.arange(targets.size).reshape(targets.shape) % 4 > 0 if masked else None
    options = {} if mask is None else {"mask": mask}

    # All three have natural parameters for outputs: the Fisher is the Hessian, of any targets.
    def nll(flat):
        return likelihood.nll(flat.reshape(outputs.shape), targets, **options).sum()

    fisher = np.asarray(jax.hessian(nll)(outputs.ravel()))
    expected = (fisher @ np.asarray(tangents).ravel()).reshape(outputs.shape)
    received = fisher_product(kind(likelihood), outputs, tangents, targets, mask)
    np.testing.assert_allclose(received, expected, rtol=1e-10, atol=1e-12)


def test_fisher_products_of_a_joint_likelihood_are_each_its_own(keys):
    likelihoods = {"a": tkfac.Normal(0.5), "b": tkfac.Bernoulli(), "c": Losses(tkfac.Bernoulli())}
    outputs, tangents = (
        {name: jax.random.normal(next(keys), (2, 3)) for name in "ab"} for _ in range(2)
    )
    outputs["c"], tangents["c"] = outputs["b"], tangents["b"]
    targets = {name: jnp.zeros((2, 3)) for name in "abc"}
    mask = {"b": jnp.arange(6).reshape(2, 3) < 5}
    received = fisher_product(as_likelihood(likelihoods), outputs, tangents, targets, mask)
    np.testing.assert_allclose(received["a"], tangents["a"] / 0.5, rtol=1e-12)
    p = jax.nn.sigmoid(outputs["b"])
    np.testing.assert_allclose(received["b"], p * (1 - p) * tangents["b"] * mask["b"], rtol=1e-12)
    np.testing.assert_allclose(received["c"], p * (1 - p) * tangents["b"], rtol=1e-12)
