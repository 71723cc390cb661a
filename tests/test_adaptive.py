import functools

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from networks import fresh, mlp_problem

import tkfac_jax as tkfac
from tkfac_jax.layers import named_leaves
from tkfac_jax.precondition import precondition

CATEGORICAL = tkfac.Categorical()


def step_by_hand(predict, likelihood, layers, optimizer, rule=tkfac.trace_restricted, **keywords):
    """A jitted training step of a user's own, with the exact Fisher."""
    fisher = tkfac.exact_fisher(predict, likelihood, layers, rule=rule)

    @jax.jit
    def step(params, state, x, y):
        outputs_fn = lambda params: predict(params, x)  # noqa: E731
        loss, gradient = jax.value_and_grad(
            lambda params: likelihood.nll(outputs_fn(params), y).mean()
        )(params)
        updates, state = optimizer.update(
            gradient,
            state,
            params,
            statistics=lambda: fisher(params, x),
            outputs_fn=outputs_fn,
            targets=y,
            **keywords,
        )
        return optax.apply_updates(params, updates), state, loss

    return step


def run(optimizer, steps, rule=tkfac.trace_restricted, likelihood=CATEGORICAL, y=None):
    """Parameters, states and losses of some steps on the small network's only batch."""
    predict, params, x, targets, layers = mlp_problem()
    y = targets if y is None else y
    step = step_by_hand(predict, likelihood, layers, optimizer(layers), rule)
    state = jax.jit(optimizer(layers).init)(params)
    trace = [(params, state, None)]
    for _ in range(steps):
        params, state, loss = step(params, state, x, y)
        trace.append((params, state, float(loss)))
    return trace


def adaptive(layers, likelihood=CATEGORICAL, **options):
    options = {"initial_damping": 0.1} | options
    return tkfac.adaptive_tkfac(layers, likelihood, **options)


def vector(tree):
    return np.concatenate([np.ravel(leaf) for leaf in named_leaves(tree).values()])


def difference(one, other):
    return vector(one) - vector(other)


@functools.cache
def dense_matrix(which):
    """Gauss-Newton matrix and gradient of the small network in float64, from its whole Jacobian; by parameters."""
    predict, _, x, y, _ = mlp_problem()
    params = which.params
    logits = np.asarray(predict(params, x))
    jacobian = np.concatenate(
        [
            np.reshape(leaf, (*logits.shape, -1))
            for leaf in named_leaves(jax.jacrev(lambda p: predict(p, x))(params)).values()
        ],
        axis=-1,
    )
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    fisher = np.stack([np.diag(row) - np.outer(row, row) for row in p])
    matrix = np.einsum("bci,bcd,bdj->ij", jacobian, fisher, jacobian) / len(x)
    gradient = np.einsum("bci,bc->i", jacobian, p - np.eye(3)[np.asarray(y)]) / len(x)
    return matrix, gradient


class At:
    """Parameters as a key of a cache, by identity."""

    def __init__(self, params):
        self.params = params


def natural_gradient(state, gradient_tree, layers):
    """The preconditioned gradient, with the state's own inverses; these are tested elsewhere."""
    own = {name: layers[name] for name in layers}
    return precondition(gradient_tree, state.curvature.inverses, own)[0]


@pytest.mark.parametrize(
    ("options", "l2"),
    [({}, 0.0), ({"l2": 0.3}, 0.3), ({"learning_rate": 0.2}, 0.0), ({"momentum": 0.5}, 0.0)],
    ids=["both", "l2", "learning rate given", "momentum given"],
)
def test_lengths_are_those_of_the_dense_model(options, l2):
    """Both lengths of the second step minimise the model, computed with dense matrices in NumPy."""
    predict, _, x, y, layers = mlp_problem()
    damping = 0.1
    trace = run(lambda layers: adaptive(layers, damping_interval=None, **options), 2)
    (start, _, _), (first, _, _), (second, state, _) = trace
    matrix, gradient = dense_matrix(At(first))
    weights, previous = vector(first), difference(first, start)
    gradient = gradient + l2 * weights
    tree = jax.grad(lambda p: CATEGORICAL.nll(predict(p, x), y).mean() + l2 / 2 * squares(p))(first)
    natural = vector(natural_gradient(state, tree, layers))
    directions = np.stack([-natural, previous], axis=1)
    model = directions.T @ (matrix + (damping + l2) * np.eye(len(matrix))) @ directions
    slope = directions.T @ gradient
    expected = -np.linalg.solve(model, slope)
    if "learning_rate" in options:
        expected = np.array([0.2, -(slope[1] + 0.2 * model[0, 1]) / model[1, 1]])
    if "momentum" in options:
        expected = np.array([-(slope[0] + 0.5 * model[0, 1]) / model[0, 0], 0.5])
    received = np.array([state.learning_rate, state.momentum])
    np.testing.assert_allclose(received, expected, rtol=1e-7)
    np.testing.assert_allclose(difference(second, first), directions @ expected, rtol=1e-6)


def squares(tree):
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree))


def test_the_ratio_is_that_of_the_dense_model():
    predict, _, x, y, _ = mlp_problem()
    trace = run(lambda layers: adaptive(layers, damping_interval=1), 1)
    (start, _, _), (end, state, before) = trace
    matrix, gradient = dense_matrix(At(start))
    step = difference(end, start)
    after = float(CATEGORICAL.nll(predict(end, x), y).mean())
    expected = (after - before) / (gradient @ step + 0.5 * step @ matrix @ step)
    np.testing.assert_allclose(state.ratio, expected, rtol=1e-7)


@functools.cache
def linear_problem():
    """A linear model under Normal: predict, params, inputs, targets, layers, and the least loss."""
    model = nn.Dense(2, param_dtype=jnp.float64)
    x, noise = (
        jax.random.normal(jax.random.key(i), shape, jnp.float64)
        for i, shape in enumerate([(12, 3), (12, 2)])
    )
    y = x[:, :2] * 3 - 1 + noise
    params = model.init(jax.random.key(2), x)["params"]

    def predict(params, x):
        return model.apply({"params": params}, x)

    design = np.concatenate([x, np.ones((12, 1))], axis=1)
    solution = np.linalg.lstsq(design, np.asarray(y), rcond=None)[0]
    least = float(tkfac.Normal().nll(jnp.asarray(design @ solution), y).mean())
    return predict, params, x, y, tkfac.find_layers(predict, params, x), least


def test_one_step_on_a_linear_model_reaches_the_minimum():
    predict, params, x, y, layers, least = linear_problem()
    likelihood = tkfac.Normal()
    optimizer = tkfac.adaptive_tkfac(layers, likelihood, initial_damping=1e-14, min_damping=1e-16)
    step = step_by_hand(predict, likelihood, layers, optimizer)
    params, state, before = step(params, optimizer.init(params), x, y)
    after = float(likelihood.nll(predict(params, x), y).mean())
    assert before > least + 1
    # The damping's root, 1e-7, is what the factors are off by.
    np.testing.assert_allclose(after, least, rtol=1e-10)
    np.testing.assert_allclose(state.learning_rate, 1, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"reject_steps": True}, {"momentum": 0.3}])
def test_full_batches_of_least_squares_never_raise_the_loss(options):
    predict, params, x, y, layers, least = linear_problem()
    likelihood = tkfac.Normal()
    optimizer = tkfac.adaptive_tkfac(layers, likelihood, initial_damping=30.0, **options)
    step = step_by_hand(predict, likelihood, layers, optimizer)
    state, losses = optimizer.init(params), []
    for _ in range(25):
        params, state, loss = step(params, state, x, y)
        losses.append(float(loss))
    assert np.all(np.diff(losses) <= 1e-12)
    assert losses[-1] < least + 0.1 * (losses[0] - least)
    assert int(state.rejected_steps) == 0


@pytest.mark.parametrize(
    ("curvature_of_loss", "change"),
    # The likelihood says a Fisher of 1. With a loss as curved as that the ratio is 1; one that is half as curved
    # falls further than is foretold; one of 2.2 falls by a tenth of that; one of 1.5 by the half.
    [(1.0, 0.9), (0.5, 0.9), (2.2, 1 / 0.9), (1.5, 1.0)],
)
def test_the_damping_follows_the_ratio(curvature_of_loss, change):
    class Curved:
        def nll(self, outputs, targets):
            return curvature_of_loss / 2 * jnp.sum((outputs - targets) ** 2, axis=-1)

        def sample(self, key, outputs):
            return outputs + jax.random.normal(key, outputs.shape)

        def num_fisher_vectors(self, outputs):
            return outputs.shape[-1]

        def fisher_vector(self, outputs, index):
            return jnp.zeros_like(outputs).at[:, index].set(1)

    predict, params, x, y, layers, _ = linear_problem()
    optimizer = tkfac.adaptive_tkfac(
        layers, Curved(), initial_damping=1e-6, damping_interval=3, min_damping=1e-9
    )
    step = step_by_hand(predict, Curved(), layers, optimizer)
    state, dampings = optimizer.init(params), []
    for t in range(6):
        # Other targets at each step, so that there is always something to reduce.
        params, state, _ = step(params, state, x, y + t)
        dampings.append(float(state.damping) / 1e-6)
    np.testing.assert_allclose(dampings[:2], 1, rtol=1e-6)
    np.testing.assert_allclose(dampings[2:5], change**3, rtol=1e-6)
    np.testing.assert_allclose(dampings[5], change**6, rtol=1e-6)


def test_the_damping_stays_within_its_bounds():
    predict, params, x, y, layers, _ = linear_problem()
    likelihood = tkfac.Normal()
    optimizer = tkfac.adaptive_tkfac(
        layers, likelihood, initial_damping=1e-3, min_damping=9e-4, damping_interval=1
    )
    step = step_by_hand(predict, likelihood, layers, optimizer)
    state = optimizer.init(params)
    for t in range(3):
        params, state, _ = step(params, state, x, y + t)
    np.testing.assert_allclose(state.damping, 9e-4, rtol=1e-12)


def test_a_learning_rate_may_be_a_schedule_and_all_lengths_given():
    schedule = lambda step: 0.1 / (step + 1)  # noqa: E731
    trace = run(lambda layers: adaptive(layers, learning_rate=schedule, momentum=0.5), 3)
    rates = [float(state.learning_rate) for _, state, _ in trace[1:]]
    np.testing.assert_allclose(rates, [0.1, 0.05, 0.1 / 3], rtol=1e-12)
    assert float(trace[-1][1].momentum) == 0.5
    every = run(
        lambda layers: adaptive(layers, learning_rate=0.1, momentum=0.5, damping_interval=1), 1
    )
    np.testing.assert_allclose(every[1][1].damping, 0.09, rtol=1e-12)


def test_a_warm_up_gathers_statistics_and_makes_no_step():
    trace = run(lambda layers: adaptive(layers, warmup_steps=2, fisher_interval=3), 3)
    starts = [state.curvature for _, state, _ in trace]
    assert difference(trace[2][0], trace[0][0]).max() == 0
    assert int(starts[2].step) == 0
    assert [int(c.factor_updates) for c in starts] == [0, 1, 2, 3]
    assert np.abs(difference(trace[3][0], trace[2][0])).max() > 0
    assert int(starts[3].step) == 1
    assert [int(state.warmup_left) for _, state, _ in trace] == [2, 1, 0, 0]


def test_calibration_chooses_what_trying_by_hand_would():
    predict, params, x, y, layers = mlp_problem()
    chosen = run(lambda layers: adaptive(layers, initial_damping=10.0, calibrate_damping=True), 1)
    optimizer = adaptive(layers)
    step = step_by_hand(predict, CATEGORICAL, layers, optimizer)
    state = optimizer.init(params)
    candidates = 10.0 / np.sqrt(10.0) ** np.arange(12)
    losses = []
    for damping in candidates:
        end, _, _ = step(params, state._replace(damping=jnp.asarray(damping)), x, y)
        losses.append(float(CATEGORICAL.nll(predict(end, x), y).mean()))
        if len(losses) > 1 and losses[-1] >= losses[-2]:
            break
    best = int(np.argmin(losses))
    assert best > 0
    np.testing.assert_allclose(chosen[1][1].damping, candidates[best], rtol=1e-10)


def test_a_step_that_raises_the_loss_is_not_made():
    # A momentum that is far too long for what the previous step finds.
    trace = run(lambda layers: adaptive(layers, learning_rate=40.0, reject_steps=True), 2)
    assert float(np.abs(difference(trace[1][0], trace[0][0])).max()) == 0
    state = trace[2][1]
    assert int(state.rejected_steps) == 2
    np.testing.assert_allclose(state.damping, 0.1 / 0.9**10, rtol=1e-10)
    assert float(state.learning_rate) == 0


def test_a_batch_that_is_not_finite_moves_nothing():
    predict, params, x, y, layers = mlp_problem()
    optimizer = adaptive(layers)
    step = step_by_hand(predict, CATEGORICAL, layers, optimizer)
    params, state, _ = step(params, optimizer.init(params), x, y)
    after, broken, _ = step(params, state, x.at[0, 0].set(jnp.nan), y)
    np.testing.assert_array_equal(vector(after), vector(params))
    assert int(broken.skipped_steps) == 1
    assert np.isfinite(broken.damping)
    again, whole, _ = step(after, broken, x, y)
    assert np.isfinite(vector(again)).all()
    assert np.abs(difference(again, after)).max() > 0
    assert int(whole.skipped_steps) == 1


def test_a_batch_without_a_loss_is_rejected_and_says_nothing_about_the_damping():
    predict, params, x, y, layers = mlp_problem()
    optimizer = adaptive(
        layers, learning_rate=0.1, momentum=0.5, damping_interval=1, reject_steps=True
    )
    step = step_by_hand(predict, CATEGORICAL, layers, optimizer)
    params, state, _ = step(params, optimizer.init(params), x, y)
    after, broken, _ = step(params, state, x.at[0, 0].set(jnp.nan), y)
    np.testing.assert_array_equal(vector(after), vector(params))
    assert int(broken.rejected_steps) == 1
    np.testing.assert_array_equal(broken.damping, state.damping)
    np.testing.assert_array_equal(broken.ratio, state.ratio)


class WithScale(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(4, param_dtype=jnp.float64)(x))
        x = x * self.param("scale", nn.initializers.ones, (4,), jnp.float64)
        return nn.Dense(3, param_dtype=jnp.float64)(x)


def test_parameters_of_no_layer_take_the_fallbacks_step_and_no_l2():
    _, _, x, y, _ = mlp_problem()
    model = WithScale()
    params = model.init(jax.random.key(0), x)["params"]

    def predict(params, x):
        return model.apply({"params": params}, x)

    layers = tkfac.find_layers(predict, params, x)
    optimizer = adaptive(layers, fallback=optax.sgd(0.1), l2=0.5)
    step = step_by_hand(predict, CATEGORICAL, layers, optimizer)
    gradient = jax.grad(lambda p: CATEGORICAL.nll(predict(p, x), y).mean())(params)
    after, _, _ = step(params, optimizer.init(params), x, y)
    np.testing.assert_allclose(
        after["scale"], params["scale"] - 0.1 * gradient["scale"], rtol=1e-10
    )


def test_layers_that_are_frozen_stay():
    """The optimizer then sees masked parameters; `outputs_fn` puts the frozen ones back."""
    predict, params, x, y, layers = mlp_problem()
    labels = {
        name: dict.fromkeys(leaves, "frozen" if name == "Dense_1" else "trained")
        for name, leaves in params.items()
    }
    optimizer = optax.partition(
        {"trained": adaptive(layers, l2=0.1), "frozen": optax.set_to_zero()}, labels
    )
    outputs_fn = lambda params: predict(params, x)  # noqa: E731

    @jax.jit
    def step(params, state):
        loss_fn = lambda params: CATEGORICAL.nll(outputs_fn(params), y).mean()  # noqa: E731
        updates, _ = optimizer.update(
            jax.grad(loss_fn)(params),
            state,
            params,
            statistics=None,
            outputs_fn=lambda own: outputs_fn(own | {"Dense_1": params["Dense_1"]}),
            targets=y,
        )
        after = optax.apply_updates(params, updates)
        return after, loss_fn(params), loss_fn(after)

    after, loss, lower = step(params, optimizer.init(params))
    np.testing.assert_array_equal(after["Dense_1"]["kernel"], params["Dense_1"]["kernel"])
    assert float(lower) < float(loss)


def test_no_new_statistics_and_inverses_on_demand():
    predict, params, x, y, layers = mlp_problem()
    optimizer = adaptive(layers)
    fisher = tkfac.exact_fisher(predict, CATEGORICAL, layers)

    @functools.partial(jax.jit, static_argnames="refresh")
    def step(params, state, statistics, refresh):
        outputs_fn = lambda params: predict(params, x)  # noqa: E731
        return optimizer.update(
            jax.grad(lambda p: CATEGORICAL.nll(outputs_fn(p), y).mean())(params),
            state,
            params,
            statistics=statistics,
            outputs_fn=outputs_fn,
            targets=y,
            refresh_inverses=refresh,
        )

    state = optimizer.init(params)
    _, first = step(params, state, fisher(params, x), True)
    _, kept = step(params, first, None, False)
    assert int(kept.curvature.factor_updates) == 1
    for old, new in zip(
        jax.tree.leaves(first.curvature.inverses),
        jax.tree.leaves(kept.curvature.inverses),
        strict=True,
    ):
        np.testing.assert_array_equal(old, new)


def test_a_state_that_was_written_goes_on_bit_by_bit():
    predict, params, x, y, layers = mlp_problem()
    optimizer = adaptive(layers, fisher_interval=2, inverse_interval=3)
    step = step_by_hand(predict, CATEGORICAL, layers, optimizer)
    state = optimizer.init(params)
    for _ in range(2):
        params, state, _ = step(params, state, x, y)
    written = flax.serialization.to_bytes((params, state))
    read = flax.serialization.from_bytes((params, state), written)
    for _ in range(3):
        params, state, _ = step(params, state, x, y)
        read = step(*read[:2], x, y)
    jax.tree.map(np.testing.assert_array_equal, read[:2], (params, state))


class Poisson:
    """A likelihood of a user's own, of which only loss and samples are known."""

    def nll(self, outputs, targets):
        return jnp.sum(jnp.exp(outputs) - targets * outputs, axis=-1)

    def sample(self, key, outputs):
        return jax.random.poisson(key, jnp.exp(outputs)).astype(outputs.dtype)


@pytest.mark.parametrize(
    "likelihood",
    [tkfac.Bernoulli(), tkfac.Normal(2.0), Poisson(), tkfac.Categorical()],
    ids=lambda likelihood: type(likelihood).__name__,
)
@pytest.mark.parametrize("rule", [tkfac.trace_restricted, tkfac.independent])
def test_every_likelihood_and_both_rules_reduce_the_loss(likelihood, rule):
    predict, params, x, y, layers = mlp_problem()
    targets = y if isinstance(likelihood, tkfac.Categorical) else jax.nn.one_hot(y, 3)
    damping = tkfac.factored_damping if rule is tkfac.independent else tkfac.normal_damping
    optimizer = tkfac.adaptive_tkfac(
        layers, likelihood, initial_damping=0.1, damping_rule=damping, damping_interval=1
    )
    step = tkfac.make_train_step(
        predict,
        likelihood,
        optimizer,
        layers=layers,
        fisher_interval=1,
        inverse_interval=1,
        rule=rule,
        estimator="sampled",
    )
    state, losses = optimizer.init(params), []
    for t in range(8):
        params, state, metrics = step(params, state, x, targets=targets, key=jax.random.key(t))
        losses.append(float(metrics["loss"]))
    assert np.all(np.diff(losses) < 0)
    # The model is exact but for third derivatives.
    assert 0.5 < float(state.ratio) < 1.5


def test_make_train_step_equals_the_step_by_hand():
    predict, params, x, y, layers = mlp_problem()
    options = {
        "damping_interval": 2,
        "fisher_interval": 2,
        "inverse_interval": 4,
        "warmup_steps": 2,
    }
    optimizer = adaptive(layers, **options)
    by_hand = step_by_hand(
        predict,
        CATEGORICAL,
        layers,
        optimizer,
        model_outputs_fn=lambda params: predict(params, x[:4]),
    )
    step = tkfac.make_train_step(
        predict,
        CATEGORICAL,
        optimizer,
        layers=layers,
        fisher_interval=2,
        inverse_interval=4,
        estimator="exact",
        model_args=lambda x: (x[:4],),
    )
    expected, expected_state = params, optimizer.init(params)
    received, state = fresh(params), fresh(expected_state)
    for _ in range(8):
        expected, expected_state, _ = by_hand(expected, expected_state, x, y)
        received, state, _ = step(received, state, x, targets=y)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9),
        (received, state),
        (expected, expected_state),
    )


def test_hyperparameters_may_be_injected():
    """All numbers are then arrays of the state, those of steps too."""
    options = {"warmup_steps": 1, "damping_interval": 2, "l2": 0.3}
    expected = run(lambda layers: adaptive(layers, **options), 3)
    injected = optax.inject_hyperparams(tkfac.adaptive_tkfac)
    trace = run(lambda layers: injected(layers, CATEGORICAL, initial_damping=0.1, **options), 3)
    received = trace[-1][1].inner_state
    np.testing.assert_allclose(vector(trace[-1][0]), vector(expected[-1][0]), rtol=1e-10)
    np.testing.assert_allclose(received.damping, expected[-1][1].damping, rtol=1e-12)
    assert int(received.curvature.step) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"initial_damping": 0.0}, "initial_damping=0.0; expected a positive number"),
        ({"min_damping": -1.0}, "min_damping=-1.0; expected a positive number"),
        ({"max_damping": 0.0}, "max_damping=0.0; expected a positive number"),
        ({"min_damping": 1.0}, r"min_damping, initial_damping, max_damping are \(1.0, 0.1, "),
        ({"damping_decay": 1.0}, r"damping_decay=1.0; expected a number in \(0, 1\)"),
        ({"damping_interval": 0}, "damping_interval=0; expected a whole number of steps"),
        ({"l2": -1.0}, "l2=-1.0; expected a number of at least 0"),
        ({"momentum": 1.0}, r"momentum=1.0; expected a number in \[0, 1\)"),
        ({"warmup_steps": -1}, "warmup_steps=-1; expected a whole number of at least 0"),
        ({"warmup_steps": 2.0}, r"warmup_steps=2\.0; expected a whole number of at least 0"),
        (
            {"learning_rate": 0.1, "momentum": 0.9, "damping_interval": None},
            "nothing is left to adapt",
        ),
        ({"fisher_interval": 0}, "fisher_interval=0"),
    ],
)
def test_wrong_options(options, message, unchecked):
    *_, layers = mlp_problem()
    with pytest.raises(ValueError, match=message):
        adaptive(layers, **options)


def test_arguments_of_update_that_are_missing():
    predict, params, x, y, layers = mlp_problem()
    optimizer = adaptive(layers)
    state = optimizer.init(params)
    outputs_fn = lambda params: predict(params, x)  # noqa: E731
    with pytest.raises(ValueError, match=r"update\(\) needs the parameters"):
        optimizer.update(params, state)
    with pytest.raises(TypeError, match="'outputs_fn', the model's outputs on the batch"):
        optimizer.update(params, state, params, statistics=None)
    with pytest.raises(TypeError, match="needs the keyword argument 'statistics'"):
        optimizer.update(params, state, params, outputs_fn=outputs_fn, targets=y)
