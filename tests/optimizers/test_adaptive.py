import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from flax import nnx
from networks import fresh, mlp_problem

import tkfac_jax as tkfac
from tkfac_jax.layers.parameter_tree import named_leaves
from tkfac_jax.optimizers.adaptive_state import DampingPolicy

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


def dense_model(params, l2=0.0):
    """Gauss-Newton matrix and gradient of the small network in NumPy."""
    _, _, x, y, _ = mlp_problem()
    x, own = np.asarray(x), {n: np.asarray(leaf) for n, leaf in named_leaves(params).items()}
    jacobian = oracles.jacobian(lambda own: oracles.mlp(own, x), own)
    logits = oracles.mlp(own, x)
    fishers = [oracles.example_fisher("categorical", row[None]) for row in logits]
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    gradient = np.einsum("bci,bc->i", jacobian, p - np.eye(3)[np.asarray(y)]) / len(x)
    return oracles.gauss_newton(jacobian, fishers, np.ones(len(x))), gradient + l2 * vector(params)


def preconditioned(gradient, state, damping, params):
    """Damped factors, whose averages are those of the state, inverted and multiplied with in NumPy."""
    shapes = {name: leaf.shape for name, leaf in named_leaves(params).items()}
    ends = np.cumsum([np.prod(shape) for shape in shapes.values()])
    own = dict(zip(shapes, np.split(gradient, ends[:-1]), strict=True))
    steps = {}
    for name, factors in state.curvature.factors.items():
        whole = np.asarray(factors.phi), np.asarray(factors.psi), float(factors.delta)
        phi, psi = oracles.normal_damping(whole, damping)
        matrix = own[f"{name}/kernel"].reshape(shapes[f"{name}/kernel"])
        if f"{name}/bias" in own:
            matrix = np.concatenate([matrix, own[f"{name}/bias"][None]])
        step = np.linalg.inv(phi) @ matrix @ np.linalg.inv(psi)
        rows = shapes[f"{name}/kernel"][0]
        steps[f"{name}/kernel"], steps[f"{name}/bias"] = step[:rows], step[rows:]
    return np.concatenate([steps[name].ravel() for name in shapes])


@pytest.mark.parametrize(
    ("options", "l2"),
    [({}, 0.0), ({"l2": 0.3}, 0.3), ({"learning_rate": 0.2}, 0.0), ({"momentum": 0.5}, 0.0)],
    ids=["both", "l2", "learning rate given", "momentum given"],
)
def test_lengths_are_those_of_the_dense_model(options, l2):
    """Both lengths of the second step minimise the model, computed with dense matrices in NumPy."""
    damping = 0.1
    trace = run(lambda layers: adaptive(layers, damping_interval=None, **options), 2)
    (start, _, _), (first, _, _), (second, state, _) = trace
    # There is no previous step at first.
    assert float(trace[1][1].momentum) == options.get("momentum", 0)
    matrix, gradient = dense_model(first, l2)
    natural = preconditioned(gradient, state, damping + l2, first)
    directions = np.stack([-natural, difference(first, start)], axis=1)
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
    # The damping is constant, so that nothing is compared.
    assert float(state.damping) == damping
    assert np.isnan(state.ratio)


def test_the_ratio_is_that_of_the_dense_model():
    predict, _, x, y, _ = mlp_problem()
    trace = run(lambda layers: adaptive(layers, damping_interval=1), 1)
    (start, _, _), (end, state, before) = trace
    matrix, gradient = dense_model(start)
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


@pytest.mark.parametrize(("ratio", "bound"), [(1.0, 9.5e-4), (0.1, 1.05e-3), (0.5, 1e-3)])
def test_the_damping_stays_within_its_bounds(ratio, bound):
    policy = DampingPolicy(2, 0.9, 9.5e-4, 1.05e-3)
    damping = policy.next(jnp.asarray(1e-3), jnp.asarray(ratio))
    np.testing.assert_allclose(damping, bound, rtol=1e-12)


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
    options = {"initial_damping": 10.0, "calibrate_damping": True}
    trace = run(lambda layers: adaptive(layers, warmup_steps=2, fisher_interval=3, **options), 3)
    starts = [state.curvature for _, state, _ in trace]
    assert difference(trace[2][0], trace[0][0]).max() == 0
    assert int(starts[2].step) == 0
    assert [int(c.factor_updates) for c in starts] == [0, 1, 2, 3]
    assert np.abs(difference(trace[3][0], trace[2][0])).max() > 0
    assert int(starts[3].step) == 1
    assert [int(state.warmup_left) for _, state, _ in trace] == [2, 1, 0, 0]
    # The inverses and the damping are those of the beginning.
    jax.tree.map(np.testing.assert_array_equal, starts[2].inverses, starts[0].inverses)
    assert float(trace[2][1].damping) == 10.0
    assert float(trace[3][1].damping) < 10.0


def test_calibration_chooses_what_trying_by_hand_would():
    predict, params, x, y, layers = mlp_problem()
    step = step_by_hand(predict, CATEGORICAL, layers, adaptive(layers))
    start = jax.jit(adaptive(layers, initial_damping=10.0).init)(params)
    candidates, losses = 10.0 / np.sqrt(10.0) ** np.arange(12), []
    for damping in candidates:
        end, _, _ = step(params, start._replace(damping=jnp.asarray(damping)), x, y)
        losses.append(float(CATEGORICAL.nll(predict(end, x), y).mean()))
        if len(losses) > 1 and losses[-1] >= losses[-2]:
            break
    best = candidates[np.argmin(losses)]
    assert best < 0.5

    @jax.jit
    def calibrated(state, smallest):
        options = {"min_damping": smallest, "calibrate_damping": True}
        own = step_by_hand(predict, CATEGORICAL, layers, adaptive(layers, **options))
        return own(params, state, x, y)[1]

    after = calibrated(start, 1e-8)
    np.testing.assert_allclose(after.damping, best, rtol=1e-10)
    np.testing.assert_allclose(calibrated(start, 0.5).damping, 1.0, rtol=1e-10)
    # Only at the first step.
    later = calibrated(after._replace(damping=jnp.asarray(10.0)), 1e-8)
    np.testing.assert_allclose(later.damping, 10.0)


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


@functools.cache
def scaled_problem():
    """predict, params and layers of a network with a parameter of the fallback."""
    _, _, x, *_ = mlp_problem()
    model = WithScale()
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]

    def predict(params, x):
        return model.apply({"params": params}, x)

    return predict, params, tkfac.find_layers(predict, params, x)


def test_a_step_that_is_not_made_leaves_the_fallback_where_it_was():
    """In the warm-up and when rejected; with numbers that are not finite its averages take no notice."""
    predict, params, layers = scaled_problem()
    _, _, x, y, _ = mlp_problem()
    optimizer = adaptive(layers, learning_rate=40.0, reject_steps=True, warmup_steps=1)
    step = step_by_hand(predict, CATEGORICAL, layers, optimizer)
    first = optimizer.init(params)
    warm, warmed, _ = step(params, first, x, y)
    same, rejected, _ = step(warm, warmed, x, y)
    assert (int(warmed.rejected_steps), int(rejected.rejected_steps)) == (0, 1)
    assert float(warmed.damping) == 0.1 < float(rejected.damping)
    for after, state in ((warm, warmed), (same, rejected)):
        np.testing.assert_array_equal(vector(after), vector(params))
        jax.tree.map(np.testing.assert_array_equal, state.fallback, first.fallback)
    broken, state, _ = step(same, rejected, x.at[0, 0].set(jnp.nan), y)
    np.testing.assert_array_equal(vector(broken), vector(params))
    for name in ("mu", "nu"):
        received = optax.tree.get(state.fallback, name)["scale"]
        np.testing.assert_array_equal(received, 0)


def test_parameters_of_no_layer_take_the_fallbacks_step_and_no_l2():
    predict, params, layers = scaled_problem()
    _, _, x, y, _ = mlp_problem()
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


class Poisson:
    """A likelihood of a user's own, of which only loss and samples are known."""

    def nll(self, outputs, targets):
        return jnp.sum(jnp.exp(outputs) - targets * outputs, axis=-1)

    def sample(self, key, outputs):
        return jax.random.poisson(key, jnp.exp(outputs)).astype(outputs.dtype)


@pytest.mark.parametrize(
    ("likelihood", "rule"),
    [
        (tkfac.Bernoulli(), tkfac.independent),
        (tkfac.Normal(2.0), tkfac.trace_restricted),
        (Poisson(), tkfac.trace_restricted),
        (tkfac.Categorical(), tkfac.independent),
    ],
    ids=["Bernoulli, KFAC", "Normal", "Poisson", "Categorical, KFAC"],
)
def test_every_likelihood_and_both_rules_reduce_the_loss(likelihood, rule):
    predict, params, x, y, layers = mlp_problem()
    targets = y if isinstance(likelihood, tkfac.Categorical) else jax.nn.one_hot(y, 3)
    damping = tkfac.factored_damping if rule is tkfac.independent else tkfac.normal_damping
    optimizer = tkfac.adaptive_tkfac(
        layers, likelihood, initial_damping=0.1, damping_rule=damping, damping_interval=1, rule=rule
    )
    step = tkfac.make_train_step(predict, likelihood, optimizer, estimator="sampled")
    state, losses = optimizer.init(params), []
    for t in range(8):
        params, state, metrics = step(params, state, x, targets=targets, key=jax.random.key(t))
        losses.append(float(metrics["loss"]))
    assert np.all(np.diff(losses) < 0)
    # The model is exact but for third derivatives.
    assert 0.5 < float(state.ratio) < 1.5


def trained(predict, likelihood, layers, params, *data, steps=4, **options):
    """Parameters and lengths after some steps of make_train_step with the empirical Fisher."""
    optimizer = tkfac.adaptive_tkfac(layers, likelihood, initial_damping=0.1, damping_interval=1)
    step = tkfac.make_train_step(
        predict,
        likelihood,
        optimizer,
        fisher_interval=1,
        inverse_interval=1,
        estimator="empirical",
    )
    params, state = fresh(params), jax.jit(optimizer.init)(params)
    x, targets = data
    for _ in range(steps):
        params, state, _ = step(params, state, x, targets=targets, **options)
    return params, (state.learning_rate, state.momentum, state.damping, state.ratio)


def assert_close(received, expected):
    """Equal but for the order of sums, over a few steps."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10), received, expected
    )


def test_what_is_masked_or_weighs_nothing_is_not_there():
    """Half of the examples count twice and the others not at all; one of three positions is padding."""
    predict, params, *_ = mlp_problem()
    x = jax.random.normal(jax.random.key(4), (6, 3, 4), jnp.float64)
    y = jax.random.randint(jax.random.key(5), (6, 3), 0, 3)
    layers = tkfac.find_layers(predict, params, x)
    arguments = predict, CATEGORICAL, layers, params
    expected = trained(*arguments, x[:3, :2], y[:3, :2])
    mask = jnp.ones((6, 3), bool).at[:, 2].set(False)
    weights = jnp.asarray([2.0, 2, 2, 0, 0, 0])
    received = trained(*arguments, x, y, position_mask=mask, example_weights=weights)
    assert_close(received, expected)


class OnlyLosses:
    """A Bernoulli distribution of a user's own, whose Fisher is the Hessian of its loss."""

    def __init__(self):
        self.nll, self.sample = tkfac.Bernoulli().nll, tkfac.Bernoulli().sample


def test_two_likelihoods_are_one_of_all_outputs():
    predict, params, x, y, layers = mlp_problem()
    targets = jax.nn.one_hot(y, 3)
    apart = lambda outputs: {"a": outputs[:, :1], "b": outputs[:, 1:]}  # noqa: E731
    expected = trained(predict, tkfac.Bernoulli(), layers, params, x, targets)
    received = trained(
        lambda params, x: apart(predict(params, x)),
        {"a": tkfac.Bernoulli(), "b": OnlyLosses()},
        layers,
        params,
        x,
        apart(targets),
    )
    assert_close(received, expected)


def test_low_precision_in_a_loop_of_the_program():
    """The types of the state stay, as a loop wants it, with all options; the parameters keep their dtype."""
    dtype = jnp.bfloat16
    model = nn.Sequential(
        [nn.Dense(4, param_dtype=dtype), nn.LayerNorm(param_dtype=dtype), nn.Dense(3, dtype=dtype)]
    )
    x, y = jax.random.normal(jax.random.key(0), (8, 3), dtype), jnp.arange(8) % 3
    params = jax.jit(model.init)(jax.random.key(1), x)["params"]
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)

    def predict(params, x):
        return model.apply({"params": params}, x)

    layers = tkfac.find_layers(predict, params, x)
    optimizer = adaptive(
        layers,
        l2=1e-3,
        reject_steps=True,
        calibrate_damping=True,
        warmup_steps=1,
        fisher_interval=2,
        inverse_interval=3,
        spread_inverses=True,
    )
    step = step_by_hand(predict, CATEGORICAL, layers, optimizer)

    @jax.jit
    def loop(params):
        def one(carry, _):
            *carry, loss = step(*carry, x, y)
            return tuple(carry), loss

        return jax.lax.scan(one, (params, optimizer.init(params)), length=8)

    (after, state), losses = loop(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(after)} == {jnp.dtype(dtype)}
    assert state.damping.dtype == jnp.float32
    assert int(state.skipped_steps) == 0
    assert losses[-1] < 0.6 * losses[0]


class Hidden(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(5, param_dtype=jnp.float64, name="hidden")(x))
        return nn.Dense(3, param_dtype=jnp.float64, name="head")(x)


class NnxHidden(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(4, 5, rngs=rngs, param_dtype=jnp.float64)
        self.head = nnx.Linear(5, 3, rngs=rngs, param_dtype=jnp.float64)

    def __call__(self, x):
        return self.head(nnx.tanh(self.hidden(x)))


def test_train_states_of_linen_and_of_nnx_make_the_same_steps():
    _, _, x, y, _ = mlp_problem()
    model = NnxHidden(nnx.Rngs(0))
    graph, variables = nnx.split(model, nnx.Param)

    def of_nnx(params, x):
        return nnx.merge(graph, params)(x)

    def of_linen(params, x):
        return Hidden().apply({"params": params}, x)

    options = {"damping_interval": 1, "l2": 0.01}
    layers = tkfac.find_layers(of_nnx, variables, x)
    optimizer = nnx.Optimizer(model, adaptive(layers, **options), wrt=nnx.Param)
    fisher = tkfac.exact_fisher(of_nnx, CATEGORICAL, layers)

    @nnx.jit
    def nnx_step(model, optimizer):
        params = jax.tree.map(lambda leaf: leaf, nnx.state(model, nnx.Param))
        grads = nnx.grad(lambda model: CATEGORICAL.nll(model(x), y).mean())(model)
        optimizer.update(
            model,
            grads,
            statistics=lambda: fisher(params, x),
            outputs_fn=lambda params: of_nnx(params, x),
            targets=y,
        )

    params = jax.tree.map(jnp.copy, nnx.to_pure_dict(variables))
    own = tkfac.find_layers(of_linen, params, x)
    own_fisher = tkfac.exact_fisher(of_linen, CATEGORICAL, own)
    state = tkfac.TrainState.create(apply_fn=of_linen, params=params, tx=adaptive(own, **options))

    @jax.jit
    def linen_step(state):
        outputs_fn = lambda params: of_linen(params, x)  # noqa: E731
        loss_fn = lambda params: CATEGORICAL.nll(outputs_fn(params), y).mean()  # noqa: E731
        return state.apply_gradients(
            grads=jax.grad(loss_fn)(state.params),
            statistics=lambda: own_fisher(state.params, x),
            outputs_fn=outputs_fn,
            targets=y,
        )

    for _ in range(4):
        nnx_step(model, optimizer)
        state = linen_step(state)
    assert_close(nnx.to_pure_dict(nnx.state(model, nnx.Param)), state.params)
    assert float(state.opt_state.ratio) > 0.5


def test_make_train_step_equals_the_step_by_hand():
    predict, params, x, y, layers = mlp_problem()
    options = {
        "damping_interval": 2,
        "fisher_interval": 2,
        "inverse_interval": 4,
        "warmup_steps": 2,
        "spread_inverses": True,
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
        fisher_interval=2,
        inverse_interval=4,
        spread_inverses=True,
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


@pytest.mark.parametrize("adapt", [None, True, False])
def test_the_damping_is_judged_when_the_program_says_so(adapt):
    """And then no conditional is in it."""
    predict, params, x, y, layers = mlp_problem()
    optimizer = adaptive(layers, damping_interval=3)
    step = step_by_hand(predict, CATEGORICAL, layers, optimizer, adapt_damping=adapt)
    state = optimizer.init(params)
    assert int(state.damping_interval) == 3
    conditionals = str(jax.make_jaxpr(step)(params, state, x, y)).count(" cond[")
    always = step_by_hand(predict, CATEGORICAL, layers, adaptive(layers, damping_interval=None))
    others = str(jax.make_jaxpr(always)(params, state, x, y)).count(" cond[")
    assert conditionals - others == (adapt is None)
    ratios = []
    for _ in range(3):
        params, state, _ = step(params, state, x, y)
        ratios.append(float(state.ratio))
    taken = {None: [False, False, True], True: [True] * 3, False: [False] * 3}[adapt]
    assert [np.isfinite(ratio) for ratio in ratios] == taken
    if not any(taken):
        assert float(state.damping) == 0.1


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
        ({"decay": 1.5}, r"decay=1.5; expected a number in \[0, 1\)"),
        ({"likelihood": dict}, "expected an object with nll"),
        ({"shard_state": True}, "needs the mesh"),
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
    with pytest.raises(TypeError, match="and 'targets', those of the batch"):
        optimizer.update(params, state, params, statistics=None, outputs_fn=outputs_fn)
    with pytest.raises(TypeError, match="needs the keyword argument 'statistics'"):
        optimizer.update(params, state, params, outputs_fn=outputs_fn, targets=y)
