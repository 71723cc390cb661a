import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from networks import as_float64, convnet_problem, mlp_problem, spec

import tkfac_jax as tkfac
from tkfac_jax.curvature.factors import kronecker_factors
from tkfac_jax.fisher import layer_statistics
from tkfac_jax.layers.row_forms import Contraction

RULES = {
    "tkfac": (tkfac.trace_restricted, oracles.trace_restricted),
    "kfac": (tkfac.independent, oracles.independent),
}
# Sums of a few hundred float64 products.
ROUNDING = {"rtol": 1e-10, "atol": 1e-12}


def assert_statistics(received, expected):
    for array, reference in zip(received, expected, strict=True):
        np.testing.assert_allclose(array, reference, **ROUNDING)


def per_example_matrices(loss, params, inputs, targets):
    """Per-example gradients of Dense layers as matrices, bias last: from jax.grad alone."""
    grads = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0, 0)))(params, inputs, targets)

    def matrices(gradient):
        rows = [gradient["kernel"]]
        if "bias" in gradient:
            rows.append(gradient["bias"][:, None, :])
        return np.concatenate(rows, axis=1)

    return {name: matrices(gradient) for name, gradient in grads.items()}


@pytest.mark.parametrize("batch", [1, 6])
def test_dense_statistics_equal_those_of_per_example_gradients(batch):
    predict, params, inputs, targets, layers = mlp_problem(batch)
    likelihood = tkfac.Categorical()

    def loss(params, x, y):
        return -jax.nn.log_softmax(predict(params, x[None])[0])[y]

    fisher = tkfac.empirical_fisher(predict, likelihood, layers)
    statistics = jax.jit(fisher)(params, inputs, targets=targets)
    assert list(statistics) == list(layers)
    matrices = per_example_matrices(loss, params, inputs, targets)
    for name in layers:
        # The gradient of one example is a g^T, so that W W^T = tr(G) L and W^T W = tr(L) G.
        w = matrices[name]
        expected = (
            np.mean([m @ m.T for m in w], axis=0),
            np.mean([m.T @ m for m in w], axis=0),
            np.mean([np.sum(m * m) for m in w]),
        )
        assert_statistics(statistics[name], expected)


CONVOLUTIONS = [
    {"strides": (1, 1), "padding": "SAME", "kernel_dilation": (1, 1)},
    {"strides": (2, 1), "padding": "VALID", "kernel_dilation": (1, 1)},
    {"strides": (1, 2), "padding": "CIRCULAR", "kernel_dilation": (1, 1)},
    {"strides": (1, 1), "padding": ((1, 0), (2, 1)), "kernel_dilation": (2, 1)},
    {"strides": (2, 2), "padding": "SAME", "kernel_dilation": (2, 2)},
]


WINDOW, CHANNELS, FEATURES = (3, 2), 2, 3


@functools.cache
def conv_problem(which, batch, use_bias):
    """A convolution under a fixed head: predict, params, inputs, targets, layers, and what explicit patches give."""
    geometry = CONVOLUTIONS[which]
    model = nn.Conv(FEATURES, WINDOW, use_bias=use_bias, dtype=jnp.float64, **geometry)

    @jax.jit
    def make():
        x = jax.random.normal(jax.random.key(0), (batch, 6, 5, CHANNELS), jnp.float64)
        output, variables = model.init_with_output(jax.random.key(1), x)
        size = int(np.prod(output.shape[1:]))
        head = jax.random.normal(jax.random.key(2), (size, 4), jnp.float64)
        y = jax.random.normal(jax.random.key(3), (batch, 4), jnp.float64)
        return x, as_float64(variables["params"]), head, y

    x, params, head, y = make()

    def predict(params, x):
        hidden = jnp.tanh(model.apply({"params": params}, x))
        return hidden.reshape(len(hidden), -1) @ head

    def example_loss(conv_output, y):
        return 0.5 * jnp.sum((jnp.tanh(conv_output).reshape(-1) @ head - y) ** 2)

    @jax.jit
    def derivatives(params):
        u = jax.vmap(jax.grad(example_loss))(model.apply({"params": params}, x), y)
        return u, jax.grad(lambda p: 0.5 * jnp.sum((predict(p, x) - y) ** 2))(params)["kernel"]

    u, gradient = (np.asarray(array) for array in derivatives(params))
    a = np.stack([oracles.patches(image, WINDOW, *geometry.values()) for image in np.asarray(x)])
    a = oracles.with_one(a) if use_bias else a
    explicit = a, u.reshape(batch, -1, FEATURES), gradient
    return predict, params, x, y, tkfac.find_layers(predict, params, x), explicit


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("which", range(len(CONVOLUTIONS)), ids=map(str, CONVOLUTIONS))
def test_conv_statistics_equal_those_of_explicit_patches(which, batch, use_bias, rule, monkeypatch):
    predict, params, x, y, layers, (a, u, gradient) = conv_problem(which, batch, use_bias)
    # Three examples at a time: seven do not divide evenly.
    monkeypatch.setattr(layer_statistics, "CHUNK_BYTES", 3 * u.shape[1] * layers["."].d_in * 8)
    package_rule, oracle = RULES[rule]
    fisher = tkfac.empirical_fisher(predict, tkfac.Normal(), layers, rule=package_rule)
    statistics = jax.jit(fisher)(params, x, targets=y)["."]
    assert_statistics(statistics, oracle(a, u))
    # The oracle's patches are the right ones: with them, sum_i a_i u_i^T is the kernel's gradient.
    explicit = np.einsum("nli,nlo->io", a, u)[: gradient.size // FEATURES]
    np.testing.assert_allclose(explicit, gradient.reshape(-1, FEATURES), **ROUNDING)


def test_patches_of_the_batch_are_never_materialised():
    """The largest array of the statistics of a convolution is a chunk's patches, not the batch's."""
    model = nn.Conv(4, (3, 3), use_bias=False)
    batch = 256
    x = jax.ShapeDtypeStruct((batch, 32, 32, 8), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]

    def predict(params, x):
        return model.apply({"params": params}, x).mean((1, 2))

    layers = tkfac.find_layers(predict, params, x)
    fisher = tkfac.empirical_fisher(predict, tkfac.Normal(), layers)
    y = jax.ShapeDtypeStruct((batch, 4), jnp.float32)
    all_patches = batch * 32 * 32 * 72 * 4
    # A GPU's convolutions want memory of their own.
    if jax.default_backend() == "cpu":
        compiled = jax.jit(fisher).lower(params, x, targets=y).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < all_patches / 2
    jaxpr = jax.make_jaxpr(lambda params, x, y: fisher(params, x, targets=y))(params, x, y).jaxpr
    largest = _largest_array(jaxpr)
    assert largest < all_patches / 2


def _largest_array(jaxpr):
    sizes = [var.aval.size * var.aval.dtype.itemsize for eqn in jaxpr.eqns for var in eqn.outvars]
    inner = [
        _largest_array(value.jaxpr)
        for eqn in jaxpr.eqns
        for value in eqn.params.values()
        if hasattr(value, "jaxpr")
    ]
    return max(sizes + inner)


@functools.cache
def dense_problem(shape, d_out=3, use_bias=True):
    """One Dense layer: predict, params, inputs, targets, layers."""
    model = nn.Dense(d_out, use_bias=use_bias, dtype=jnp.float64)

    @jax.jit
    def make():
        x = jax.random.normal(jax.random.key(0), shape, jnp.float64)
        y = jax.random.normal(jax.random.key(1), (*shape[:-1], d_out), jnp.float64)
        return x, y, as_float64(model.init(jax.random.key(2), x)["params"])

    x, y, params = make()

    def predict(params, x):
        return model.apply({"params": params}, x)

    return predict, params, x, y, tkfac.find_layers(predict, params, x)


@pytest.mark.parametrize("shape", [(6, 4), (6, 3, 4), (6, 2, 3, 4)])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_axes_between_batch_and_features(shape, rule, sharing):
    predict, params, x, y, layers = dense_problem(shape)
    package_rule, oracle = RULES[rule]
    fisher = tkfac.empirical_fisher(
        predict, tkfac.Normal(), layers, rule=package_rule, sharing=sharing
    )
    a = oracles.with_one(np.asarray(x).reshape(6, -1, 4))
    u = (np.asarray(x) @ params["kernel"] + params["bias"] - y).reshape(6, -1, 3)
    if sharing == "reduce":
        a, u = a.mean(1, keepdims=True), u.sum(1, keepdims=True)
    assert_statistics(jax.jit(fisher)(params, x, targets=y)["."], oracle(a, u))


def test_a_layer_applied_twice_adds_its_uses_up():
    once, params, x, y, _ = dense_problem((5, 3), use_bias=False)

    def predict(params, x):
        return once(params, jnp.tanh(once(params, x)))

    layers = tkfac.find_layers(predict, params, x)
    fisher = tkfac.empirical_fisher(predict, tkfac.Normal(), layers)
    received = jax.jit(fisher)(params, x, targets=y)["."]
    x, y, kernel = (np.asarray(array) for array in (x, y, params["kernel"]))
    hidden = np.tanh(x @ kernel)
    g_second = hidden @ kernel - y
    g_first = (g_second @ kernel.T) * (1 - hidden**2)
    uses = [
        oracles.trace_restricted(a[:, None], g[:, None])
        for a, g in ((x, g_first), (hidden, g_second))
    ]
    assert_statistics(received, [first + second for first, second in zip(*uses, strict=True)])


@pytest.mark.parametrize("rule", RULES)
def test_statistics_of_half_batches_average_to_those_of_the_batch(rule):
    predict, params, inputs, targets, layers = mlp_problem(8)
    fisher = tkfac.empirical_fisher(predict, tkfac.Categorical(), layers, rule=RULES[rule][0])
    fisher = jax.jit(fisher)
    whole = fisher(params, inputs, targets=targets)
    inputs, targets = np.asarray(inputs), np.asarray(targets)
    halves = [
        fisher(params, inputs[part], targets=targets[part]) for part in (slice(4), slice(4, 8))
    ]
    mean = jax.tree.map(lambda a, b: (np.asarray(a) + b) / 2, *halves)
    for name in layers:
        assert_statistics(whole[name], mean[name])


def factors_of_rows(a, g, rule):
    """The factors of a layer with these inputs and gradients, `(batch, locations, d)`."""
    layer = spec(a.shape[-1], g.shape[-1])
    a, g = jnp.asarray(a), jnp.asarray(g)
    form = Contraction.last_axis(3)
    sums = layer_statistics.accumulate(
        layer, form, layer_statistics.Options(rule), a, g, layer_statistics.Counting()
    )
    return kronecker_factors(jax.tree.map(lambda s: s / len(a), sums))


def test_the_trace_of_the_block_is_exact():
    """tr(delta Phi (x) Psi) = tr(F), the property that gives TKFAC its name."""
    rng = np.random.default_rng(0)
    a, g = rng.normal(size=(6, 3, 4)), rng.normal(size=(6, 3, 2))
    factors = factors_of_rows(a, g, tkfac.trace_restricted)
    block = factors.delta * np.kron(factors.phi, factors.psi)
    np.testing.assert_allclose(np.trace(block), np.trace(oracles.fisher_block(a, g)), rtol=1e-12)


def test_one_example_gives_the_block_exactly():
    rng = np.random.default_rng(1)
    a, g = rng.normal(size=(1, 1, 4)), rng.normal(size=(1, 1, 3))
    factors = factors_of_rows(a, g, tkfac.trace_restricted)
    block = factors.delta * np.kron(factors.phi, factors.psi)
    np.testing.assert_allclose(block, oracles.fisher_block(a, g), rtol=1e-12, atol=1e-14)


def test_all_pairs_of_inputs_and_gradients_give_the_block_of_kfac():
    """Where inputs and gradients are independent, TKFAC, KFAC and the block are one."""
    rng = np.random.default_rng(2)
    pairs = list(itertools.product(rng.normal(size=(3, 4)), rng.normal(size=(5, 2))))
    a, g = (np.stack(side)[:, None] for side in zip(*pairs, strict=True))
    blocks = []
    for rule in (tkfac.trace_restricted, tkfac.independent):
        factors = factors_of_rows(a, g, rule)
        blocks.append(factors.delta * np.kron(factors.phi, factors.psi))
    expected = oracles.fisher_block(a, g)
    for block in blocks:
        np.testing.assert_allclose(block, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    ("likelihood", "name"),
    [
        (tkfac.Categorical(), "categorical"),
        (tkfac.Bernoulli(), "bernoulli"),
        (tkfac.Normal(0.5), 0.5),
    ],
    ids=str,
)
def test_sampled_fisher_converges_to_the_closed_form(likelihood, name):
    predict, params, x, _, layers = dense_problem((4, 2), use_bias=False)
    outputs = np.asarray(x) @ params["kernel"]
    fishers = [oracles.output_fisher(name, row) for row in outputs]
    inputs = np.asarray(x)
    expected = (
        np.mean(
            [np.trace(f) * np.outer(a, a) for a, f in zip(inputs, fishers, strict=True)], axis=0
        ),
        np.mean([a @ a * f for a, f in zip(inputs, fishers, strict=True)], axis=0),
        np.mean([a @ a * np.trace(f) for a, f in zip(inputs, fishers, strict=True)]),
    )
    errors = []
    for samples in (100, 10_000):
        fisher = tkfac.sampled_fisher(predict, likelihood, layers, num_samples=samples)
        received = jax.jit(fisher)(params, x, key=jax.random.key(2))["."]
        errors.append(
            max(np.abs(r - e).max() / expected[2] for r, e in zip(received, expected, strict=True))
        )
    # The relative deviation of one draw is about 1, so that 10,000 leave 1/100; five of them.
    assert errors[1] < 0.05
    assert errors[1] < errors[0]


@pytest.mark.parametrize(
    "likelihood", [tkfac.Categorical(average_positions=True), tkfac.Bernoulli(True)], ids=str
)
def test_averaged_positions_give_the_fisher_of_one_position(likelihood):
    """T copies of a position: the mean loss has the gradient, and the Fisher, of one of them."""
    predict, params, one, _, layers = dense_problem((5, 1, 2), use_bias=False)
    sample = jax.jit(lambda: type(likelihood)().sample(jax.random.key(2), predict(params, one)))
    one, target = np.asarray(one), np.asarray(sample())
    fisher = jax.jit(tkfac.empirical_fisher(predict, likelihood, layers))
    expected = fisher(params, one, targets=target)["."]
    four = fisher(params, np.repeat(one, 4, 1), targets=np.repeat(target, 4, 1))["."]
    assert_statistics(four, expected)


class Poisson:
    """A likelihood of a user's own, with nothing but nll and sample."""

    def nll(self, outputs, targets):
        return (jnp.exp(outputs) - targets * outputs).sum(-1)

    def sample(self, key, outputs):
        return jax.random.poisson(key, jnp.exp(outputs), outputs.shape).astype(outputs.dtype)


def test_a_likelihood_of_ones_own():
    predict, params, inputs, _, layers = mlp_problem()
    fisher = tkfac.sampled_fisher(predict, Poisson(), layers, num_samples=3)
    statistics = jax.jit(fisher)(params, inputs, key=jax.random.key(0))
    assert all(float(s.trace) > 0 for s in statistics.values())


@pytest.mark.parametrize("estimator", ["sampled", "empirical"])
def test_value_grad_and_statistics_equal_those_computed_apart(estimator):
    predict, params, inputs, targets, layers = mlp_problem()
    likelihood = tkfac.Categorical()
    key = jax.random.key(7)
    f = tkfac.value_and_grad_with_fisher(predict, likelihood, layers, estimator=estimator)
    (loss, outputs), gradient, statistics = jax.jit(f)(params, inputs, targets=targets, key=key)

    def loss_fn(params):
        outputs = predict(params, inputs)
        return likelihood.nll(outputs, targets).mean(), outputs

    (expected_loss, expected_outputs), expected_gradient = jax.jit(
        jax.value_and_grad(loss_fn, has_aux=True)
    )(params)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-12)
    np.testing.assert_allclose(outputs, expected_outputs, rtol=1e-12)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-9), gradient, expected_gradient
    )
    if estimator == "sampled":
        fisher = tkfac.sampled_fisher(predict, likelihood, layers)
        expected = jax.jit(fisher)(params, inputs, key=key)
    else:
        fisher = tkfac.empirical_fisher(predict, likelihood, layers)
        expected = jax.jit(fisher)(params, inputs, targets=targets)
    for name in layers:
        assert_statistics(statistics[name], expected[name])


def test_there_is_one_forward_pass():
    predict, params, inputs, targets, layers = mlp_problem()
    calls = []

    def counted(params, inputs):
        calls.append(1)
        return predict(params, inputs)

    f = tkfac.value_and_grad_with_fisher(counted, tkfac.Categorical(), layers, num_samples=3)
    jax.eval_shape(f, params, inputs, targets=targets, key=jax.random.key(0))
    assert len(calls) == 1


@jax.custom_vjp
def watched(outputs):
    """The identity, which counts how often it is pulled back through."""
    return outputs


PULLED_BACK = []


def pull_back_watched(_, cotangent):
    PULLED_BACK.append(1)
    return (cotangent,)


watched.defvjp(lambda outputs: (outputs, None), pull_back_watched)


class Halved(tkfac.Categorical):
    """A loss of its own, whose inherited scale does not belong to it."""

    def nll(self, outputs, targets, mask=None):
        return super().nll(outputs, targets, mask) / 2


class Scaled(Poisson):
    """A likelihood of a user's own that says what its Fisher's loss is a multiple by."""

    def fisher_nll(self, outputs, targets):
        return 3 * self.nll(outputs, targets)


PASSES = {
    "categorical": (tkfac.Categorical(), {}, 1),
    "averaged": (tkfac.Bernoulli(average_positions=True), {}, 1),
    "normal": (tkfac.Normal(0.3, average_positions=True), {}, 1),
    "nothing but nll": (Poisson(), {}, 1),
    "no scale": (Scaled(), {}, 2),
    "a loss of its own": (Halved(), {}, 2),
    "weights": (tkfac.Categorical(), {"example_weights": jnp.arange(8.0)}, 2),
    "heads": ({"a": tkfac.Categorical(), "b": tkfac.Bernoulli()}, {}, 1),
    "heads of other scales": (
        {"a": tkfac.Categorical(), "b": tkfac.Bernoulli(average_positions=True)},
        {},
        2,
    ),
}


@pytest.mark.parametrize("rule", [tkfac.trace_restricted, tkfac.independent])
@pytest.mark.parametrize("name", PASSES)
def test_the_empirical_fisher_needs_the_backward_pass_of_the_gradient_alone(name, rule):
    likelihood, options, passes = PASSES[name]
    predict, params, inputs, targets, layers = mlp_problem()
    if not isinstance(likelihood, tkfac.Categorical):
        targets = jax.nn.one_hot(targets, 3)
    heads = isinstance(likelihood, dict)
    if heads:
        targets = {"a": targets.argmax(-1), "b": targets}

    def watching(params, inputs):
        outputs = watched(predict(params, inputs))
        return {"a": outputs, "b": outputs} if heads else outputs

    options = {key: value[: len(inputs)] for key, value in options.items()}
    f = tkfac.value_and_grad_with_fisher(
        watching, likelihood, layers, estimator="empirical", rule=rule
    )
    PULLED_BACK.clear()
    _, gradient, statistics = jax.jit(f)(params, inputs, targets=targets, **options)
    assert len(PULLED_BACK) == passes

    def loss(params):
        outputs, members = watching(params, inputs), likelihood if heads else {"": likelihood}
        values = sum(
            own.nll(outputs[key] if heads else outputs, targets[key] if heads else targets)
            for key, own in members.items()
        )
        return (values * options.get("example_weights", 1)).mean()

    expected = jax.jit(jax.grad(loss))(params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9), gradient, expected)
    fisher = tkfac.empirical_fisher(watching, likelihood, layers, rule=rule)
    apart = jax.jit(functools.partial(fisher, **options))(params, inputs, targets=targets)
    for layer in layers:
        assert_statistics(statistics[layer], apart[layer])


def test_aux_is_handed_on_and_dropped():
    predict, params, batch_stats, inputs, targets, layers = convnet_problem()
    f = tkfac.value_and_grad_with_fisher(predict, tkfac.Categorical(), layers, has_aux=True)
    (_, (outputs, aux)), gradient, statistics = jax.jit(f)(
        params, batch_stats, inputs, targets=targets, key=jax.random.key(0)
    )
    expected_outputs, expected_aux = jax.jit(predict)(params, batch_stats, inputs)
    np.testing.assert_allclose(outputs, expected_outputs, rtol=1e-5)
    assert jax.tree.structure(aux) == jax.tree.structure(expected_aux)
    assert jax.tree.structure(gradient) == jax.tree.structure(params)
    fisher = tkfac.sampled_fisher(predict, tkfac.Categorical(), layers, has_aux=True)
    apart = jax.jit(fisher)(params, batch_stats, inputs, key=jax.random.key(0))
    for name in layers:
        for received, expected in zip(statistics[name], apart[name], strict=True):
            # float32, and two programs that round differently.
            np.testing.assert_allclose(received, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_a_model_written_for_one_example_and_vmapped(rule):
    predict, params, inputs, targets, layers = mlp_problem()

    def mapped(params, inputs):
        return jax.vmap(lambda x: predict(params, x))(inputs)

    expected, received = (
        jax.jit(tkfac.empirical_fisher(f, tkfac.Categorical(), layers, rule=RULES[rule][0]))(
            params, inputs, targets=targets
        )
        for f in (predict, mapped)
    )
    for name in layers:
        assert_statistics(received[name], expected[name])


def test_statistics_under_cond():
    predict, params, inputs, targets, layers = mlp_problem()
    fisher = tkfac.empirical_fisher(predict, tkfac.Categorical(), layers)
    expected = jax.jit(fisher)(params, inputs, targets=targets)

    @jax.jit
    def conditional(flag):
        return jax.lax.cond(
            flag,
            lambda: fisher(params, inputs, targets=targets),
            lambda: layer_statistics.zero_slots(layers),
        )

    for name in layers:
        assert_statistics(conditional(True)[name], expected[name])
        assert float(conditional(False)[name].trace) == 0


@pytest.mark.parametrize("how", ["vmap", "pmap", "shard_map", "sharded jit"])
def test_statistics_of_a_divided_batch_are_those_of_the_batch(how):
    predict, params, inputs, targets, layers = mlp_problem()
    make = functools.partial(tkfac.empirical_fisher, predict, tkfac.Categorical(), layers)
    expected = jax.jit(make())(params, inputs, targets=targets)
    averaged, plain = make(axis_name="data"), make()
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    replicated, divided = jax.P(), jax.P("data")
    if how in ("vmap", "pmap"):
        transform = {"vmap": lambda *args, **kw: jax.jit(jax.vmap(*args, **kw)), "pmap": jax.pmap}
        mapped = transform[how](lambda x, y: averaged(params, x, targets=y), axis_name="data")
        both = mapped(inputs.reshape(2, 3, -1), targets.reshape(2, 3))
        received = jax.tree.map(lambda s: np.asarray(s)[1], both)
    elif how == "shard_map":
        received = jax.jit(
            jax.shard_map(
                lambda x, y: averaged(params, x, targets=y),
                mesh=mesh,
                in_specs=(divided, divided),
                out_specs=replicated,
                check_vma=False,
            )
        )(inputs, targets)
    else:
        sharding = jax.NamedSharding(mesh, divided)
        received = jax.jit(lambda x, y: plain(params, x, targets=y))(
            jax.device_put(inputs, sharding), jax.device_put(targets, sharding)
        )
    for name in layers:
        assert_statistics(received[name], expected[name])


def test_mapped_devices_draw_different_targets_from_one_key():
    predict, params, inputs, _, layers = mlp_problem(1)
    fisher = tkfac.sampled_fisher(predict, tkfac.Normal(), layers, axis_name="data")
    both = jnp.stack([inputs, inputs])
    key = jax.random.key(0)
    mean = jax.jit(jax.vmap(lambda x: fisher(params, x, key=key), axis_name="data"))(both)
    alone = jax.jit(tkfac.sampled_fisher(predict, tkfac.Normal(), layers))
    own = [alone(params, inputs, key=jax.random.fold_in(key, i)) for i in range(2)]
    assert float(own[0]["Dense_0"].trace) != float(own[1]["Dense_0"].trace)
    expected = (own[0]["Dense_0"].trace + own[1]["Dense_0"].trace) / 2
    np.testing.assert_allclose(mean["Dense_0"].trace[0], expected, rtol=1e-10)


def test_parameters_that_are_one_object_twice():
    model = nn.Dense(2, use_bias=False, dtype=jnp.float64)
    shared = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    params = {"one": {"kernel": shared}, "two": {"kernel": shared}}
    x = jnp.array([[1.0, -1.0]])

    def predict(params, x):
        return model.apply({"params": params["two"]}, model.apply({"params": params["one"]}, x))

    layers = tkfac.find_layers(predict, params, x)
    fisher = tkfac.empirical_fisher(predict, tkfac.Normal(), layers)
    received = fisher(params, x, targets=jnp.zeros((1, 2)))
    expected = jax.jit(fisher)(params, x, targets=jnp.zeros((1, 2)))
    for name in layers:
        assert_statistics(received[name], expected[name])


def test_statistics_of_low_precision_layers_are_float32():
    model = nn.Dense(3, dtype=jnp.bfloat16)
    x = jnp.ones((2, 4), jnp.float32)
    params = model.init(jax.random.key(0), x)["params"]

    def predict(params, x):
        return model.apply({"params": params}, x)

    layers = tkfac.find_layers(predict, params, x)
    fisher = tkfac.sampled_fisher(predict, tkfac.Normal(), layers)
    statistics = jax.eval_shape(fisher, params, x, key=jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(statistics)} == {jnp.dtype("float32")}


def _fishers():
    predict, params, inputs, targets, layers = mlp_problem()
    make = functools.partial(tkfac.sampled_fisher, predict, tkfac.Categorical(), layers)
    empirical = functools.partial(tkfac.empirical_fisher, predict, tkfac.Categorical(), layers)
    both = functools.partial(tkfac.value_and_grad_with_fisher, predict, tkfac.Categorical(), layers)

    class Total:
        def nll(self, outputs, targets):
            return outputs.sum()

        def sample(self, key, outputs):
            return outputs

    def inner_jit(params, x):
        return jax.jit(predict)(params, x)

    return {
        r"needs a key: pass key=jax.random.key\(...\)": lambda: make()(params, inputs),
        "pass targets=...": lambda: empirical()(params, inputs),
        "and needs a key": lambda: both()(params, inputs, targets=targets),
        "num_samples=0; expected a whole number": lambda: make(num_samples=0),
        'sharing=\'sum\'; expected "expand" or "reduce"': lambda: make(sharing="sum"),
        "rule='kfac'; expected tkfac_jax.trace_restricted": lambda: make(rule="kfac"),
        'estimator=\'true\'; expected "sampled", "empirical" or "exact"': lambda: both(
            estimator="true"
        ),
        r"nll returned shape \(\); expected one number per example": lambda: tkfac.empirical_fisher(
            predict, Total(), layers
        )(params, inputs, targets=targets),
        "layer 'Dense_0' was not applied to its kernel, so it has no statistics": lambda: (
            tkfac.empirical_fisher(inner_jit, tkfac.Categorical(), layers)(
                params, inputs, targets=targets
            )
        ),
        r"sharing names \['Dense_9'\]; the layers are": lambda: make(sharing={"Dense_9": "reduce"}),
        "Poisson has no closed form": lambda: tkfac.exact_fisher(predict, Poisson(), layers),
        "the likelihood under 'a' is 3; expected an object with nll": lambda: tkfac.sampled_fisher(
            predict, {"a": 3}, layers
        ),
        r"the likelihoods are a mapping with the keys \['a'\]; the outputs are": lambda: (
            tkfac.sampled_fisher(predict, {"a": tkfac.Normal()}, layers)(
                params, inputs, key=jax.random.key(0)
            )
        ),
    }


@pytest.mark.parametrize("message", _fishers())
def test_messages(message, unchecked):
    with pytest.raises(ValueError, match=message):
        _fishers()[message]()
