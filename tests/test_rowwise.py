"""Steps from the rows of a batch are those of the gradient, and are taken only where they are what is asked for."""

import dataclasses
import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from networks import as_float64, fresh, spec

import tkfac_jax as tkfac
from tkfac_jax import rowwise
from tkfac_jax.matrices import Layout
from tkfac_jax.rowwise import precondition_rows
from tkfac_jax.steps import StepFunctions, StepOptions

KEYS = [jax.random.key(t) for t in range(4)]
WIDTH = 9
BATCH, INPUTS, CLASSES = 4, 11, 3


@pytest.fixture(autouse=True)
def every_saving(monkeypatch):
    """Small layers, too, make their steps from rows."""
    monkeypatch.setattr(rowwise, "SMALLEST_SAVING", 1)


def positive_definite(seed, size):
    root = np.random.default_rng(seed).normal(size=(size, size))
    return root @ root.T + np.eye(size)


@pytest.mark.parametrize("rows", [1, 4, 6, 8])
@pytest.mark.parametrize("sizes", [(5, 7), (7, 5)])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("largest_joined", [0, 2**16])
def test_it_is_a_dense_solve_with_the_kronecker_product(
    rows, sizes, has_bias, transposed, largest_joined, monkeypatch
):
    """Rows that are fewer than neither, one or both of the sizes."""
    monkeypatch.setattr("tkfac_jax.inverses.LARGEST_JOINED", largest_joined)
    d_in, d_out = sizes
    rng = np.random.default_rng(0)
    inputs, gradients = rng.normal(size=(rows, d_in)), rng.normal(size=(rows, d_out))
    whole = np.concatenate([inputs, np.ones((rows, 1))], 1) if has_bias else inputs
    phi, psi = positive_definite(1, d_in + has_bias), positive_definite(2, d_out)
    flat = np.linalg.solve(np.kron(phi, psi), (whole.T @ gradients).reshape(-1))
    expected = flat.reshape(-1, d_out)

    layer = spec(d_in + has_bias, d_out, has_bias=has_bias)
    if transposed:
        axes = ((1,), (0,), *(((0,), 1) if has_bias else ((), 0)))
        layout = Layout((d_out, d_in), (), *axes)
        layer = dataclasses.replace(layer, layout=layout, kernel_shape=(d_out, d_in))
    inverses = tkfac.KroneckerInverses.from_factors(
        layer, jnp.asarray(np.linalg.inv(phi)), jnp.asarray(np.linalg.inv(psi))
    )
    kernel, bias = precondition_rows(layer, inverses, jnp.asarray(inputs), jnp.asarray(gradients))
    np.testing.assert_allclose(
        kernel.T if transposed else kernel, expected[:d_in], rtol=1e-10, atol=1e-12
    )
    if has_bias:
        np.testing.assert_allclose(bias, expected[-1], rtol=1e-10, atol=1e-12)
    else:
        assert bias is None


class Net(nn.Module):
    """Dense layers: the second without bias and used twice, the last of few outputs."""

    dtype: jnp.dtype = jnp.float64

    @nn.compact
    def __call__(self, x):
        options = {"dtype": self.dtype, "param_dtype": self.dtype}
        x = nn.tanh(nn.Dense(WIDTH, **options)(x))
        twice = nn.Dense(WIDTH, use_bias=False, **options)
        x = nn.tanh(twice(nn.tanh(twice(x))))
        x = nn.LayerNorm(**options)(x)
        return nn.Dense(CLASSES, **options)(x)


@functools.cache
def problem(batch=BATCH, model=None, shape=(INPUTS,)):
    model = Net() if model is None else model

    @jax.jit
    def make():
        x = jax.random.normal(jax.random.key(1), (batch, *shape), jnp.float64)
        y = jax.random.randint(jax.random.key(2), (batch, *shape[:-1]), 0, CLASSES)
        params = as_float64(model.init(jax.random.key(3), x)["params"])
        return params, x, y

    params, x, y = make()
    predict = lambda params, x: model.apply({"params": params}, x)  # noqa: E731
    return predict, params, x, y, tkfac.find_layers(predict, params, x)


def chosen(monkeypatch):
    """The names of the layers whose steps are made from rows, as they are chosen."""
    names = []
    original = rowwise.LayerRows.stand_for

    def noted(rows, gradient, inverses, gradient_is_used):
        found = original(rows, gradient, inverses, gradient_is_used)
        if found:
            names.append(rows.gradient[0].shape)
        return found

    monkeypatch.setattr(rowwise.LayerRows, "stand_for", noted)
    return names


def check_uses(names, number):
    """So many uses of rows, counted with programs in halves; elsewhere than on CPUs there are fewer programs."""
    if jax.default_backend() == "cpu":
        assert len(names) == number
    assert bool(names) == bool(number)


def by_hand(optimizer, predict, layers, x, y, estimator, intervals, **extra):
    """A step without `make_train_step`: no rows."""
    likelihood = tkfac.Categorical()
    with_fisher = tkfac.value_and_grad_with_fisher(predict, likelihood, layers, estimator=estimator)

    @functools.partial(jax.jit, static_argnums=(3, 4))
    def step(params, state, key, new_statistics, refresh):
        _, grads, statistics = with_fisher(params, x, targets=y, key=key)
        updates, state = optimizer.update(
            grads,
            state,
            params,
            statistics=statistics if new_statistics else None,
            refresh_inverses=refresh,
            outputs_fn=lambda params: predict(params, x),
            targets=y,
            **extra,
        )
        return optax.apply_updates(params, updates), state

    return lambda t, params, state, key: step(
        params, state, key, t % intervals[0] == 0, t % intervals[1] == 0
    )


class LastNorm(NamedTuple):
    """The state of `watched`."""

    norm: jax.Array


def watched():
    """The identity, which remembers the norm of what went through."""

    def update(updates, state, params=None, **extra):
        del state, params, extra
        return updates, LastNorm(optax.tree.norm(updates))

    return optax.GradientTransformationExtraArgs(
        lambda params: LastNorm(jnp.zeros((), jnp.float64)), update
    )


OPTIMIZERS = {
    "plain": lambda layers: tkfac.tkfac(0.05, layers, damping=0.1),
    "moments": lambda layers: tkfac.tkfac(0.05, layers, damping=0.1, averaging="moments"),
    "norm constraint": lambda layers: tkfac.tkfac(0.1, layers, damping=0.1, norm_constraint=1e-2),
    "adaptive": lambda layers: tkfac.adaptive_tkfac(
        layers, tkfac.Categorical(), initial_damping=0.1, damping_interval=None
    ),
    "l2": lambda layers: tkfac.adaptive_tkfac(
        layers, tkfac.Categorical(), initial_damping=0.1, damping_interval=None, l2=0.1
    ),
    "clipped": lambda layers: optax.chain(
        optax.clip_by_global_norm(0.1),
        tkfac.scale_by_tkfac(layers, damping=0.1),
        optax.scale(-0.05),
    ),
    "watched": lambda layers: optax.chain(
        watched(), tkfac.scale_by_tkfac(layers, damping=0.1), optax.scale(-0.05)
    ),
}
# A gradient that something has changed is not that of the rows; and one that is used besides costs its product.
FROM_ROWS = {
    "plain": 3,
    "moments": 3,
    "norm constraint": 1,
    "adaptive": 1,
    "l2": 0,
    "clipped": 0,
    # Beside the steps, the program computes the gradients.
    "watched": 3,
}


@pytest.mark.parametrize(
    ("kind", "estimator"), [*((kind, "sampled") for kind in OPTIMIZERS), ("plain", "exact")]
)
def test_training_steps_are_those_without_rows(kind, estimator, monkeypatch):
    predict, params, x, y, layers = problem()
    optimizer, intervals = OPTIMIZERS[kind](layers), (2, 4)
    expected_step = by_hand(optimizer, predict, layers, x, y, estimator, intervals)
    step = tkfac.make_train_step(
        predict,
        tkfac.Categorical(),
        optimizer,
        layers=layers,
        fisher_interval=2,
        inverse_interval=4,
        estimator=estimator,
    )
    names = chosen(monkeypatch)
    state = jax.jit(optimizer.init)(params)
    expected, received = (params, state), fresh((params, state))
    for t, key in enumerate(KEYS):
        expected = expected_step(t, *expected, key)
        received = step(*received, x, targets=y, key=key)[:2]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10), received, expected
    )
    # In the plain program, and in those of new statistics and new inverses, whose first halves look whether the other
    # ones will need the gradients, and if so, whether the rows.
    times = {"adaptive": 3, "norm constraint": 7, "watched": 7}.get(kind, 5)
    check_uses(names, times * FROM_ROWS[kind])


def test_locations_are_rows():
    """A sequence of two positions, in a layer of eleven inputs."""
    predict, params, x, y, layers = problem(3, nn.Dense(CLASSES, dtype=jnp.float64), (2, INPUTS))
    optimizer = tkfac.tkfac(0.05, layers, damping=0.1)
    expected_step = by_hand(optimizer, predict, layers, x, y, "empirical", (1, 4))
    step = tkfac.make_train_step(
        predict,
        tkfac.Categorical(),
        optimizer,
        layers=layers,
        fisher_interval=1,
        inverse_interval=4,
        estimator="empirical",
    )
    state = jax.jit(optimizer.init)(params)
    expected, received = (params, state), fresh((params, state))
    for t, key in enumerate(KEYS):
        expected = expected_step(t, *expected, key)
        received = step(*received, x, targets=y)[:2]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10), received, expected
    )


def operations(program, *args):
    return program.lower(*args).compile().cost_analysis()["flops"]


@pytest.mark.parametrize(
    "intervals", [(1, 1), (1, 2), (2, 2)], ids=["new inverses", "new statistics", "plain"]
)
@pytest.mark.parametrize(("batch", "saves"), [(8, True), (512, False)])
def test_the_gradient_is_not_computed_where_nobody_wants_it(batch, saves, intervals, monkeypatch):
    """Counted by XLA; with a large batch the programs are the same with rows as without."""
    width = 64
    model = nn.Dense(width, use_bias=False, dtype=jnp.float32)
    x = jnp.ones((batch, width), jnp.float32)
    params = model.init(jax.random.key(0), x)["params"]
    predict = lambda params, x: model.apply({"params": params}, x)  # noqa: E731
    layers = tkfac.find_layers(predict, params, x)
    optimizer = tkfac.tkfac(0.05, layers, momentum=0.0)
    counts = []
    original = jax.jit

    def noted(function, **options):
        compiled = original(function, **options)

        def call(*args):
            counts[-1] += operations(compiled, *args)
            return compiled(*args)

        return call

    state = jax.jit(optimizer.init)(params)
    for smallest in (1, 10**12):
        counts.append(0)
        monkeypatch.setattr(rowwise, "SMALLEST_SAVING", smallest)
        step = tkfac.make_train_step(
            predict,
            tkfac.Normal(),
            optimizer,
            layers=layers,
            fisher_interval=intervals[0],
            inverse_interval=intervals[1],
            estimator="empirical",
        )
        args = fresh((params, state))
        with monkeypatch.context() as patched:
            patched.setattr("tkfac_jax.training.jax.jit", noted)
            # The second step, unless it is of the kind of the first.
            for _ in range(1 if intervals == (1, 1) else 2):
                counts[-1] = 0
                args = fresh(step(*args, x, targets=x)[:2])
    with_rows, without = counts
    products = 2 * (2 * width**3)
    if saves:
        # Both inverses times the rows, and no product of the gradient.
        saved = products - 2 * (2 * batch * width**2)
        assert without - with_rows == pytest.approx(saved, rel=0.1)
    else:
        assert with_rows == without


def assert_same_with_and_without(
    monkeypatch,
    predict,
    params,
    x,
    y,
    *,
    from_rows,
    likelihood=None,
    make=None,
    layers=None,
    batches=None,
    programs=3,
    options=None,
    **data,
):
    """Three steps with rows and without, the first with new inverses; and how many layers use their rows.

    That is looked at in both halves of the first step, and in the others, which are one program.
    """
    layers = layers or tkfac.find_layers(predict, params, x)
    optimizer = (make or OPTIMIZERS["plain"])(layers)
    names, ends = chosen(monkeypatch), []
    for rows in (True, False):
        step = tkfac.make_train_step(
            predict,
            likelihood or tkfac.Categorical(),
            optimizer,
            layers=layers,
            inverse_interval=4,
            estimator="empirical",
            steps_from_rows=rows,
            **{"fisher_interval": 4} | (options or {}),
        )
        received = fresh((params, jax.jit(optimizer.init)(params)))
        for inputs in batches or [x] * 3:
            received = step(*received, inputs, targets=y, **data)[:2]
        ends.append(received)
    check_uses(names, programs * from_rows)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10), *ends)
    moved = jax.tree.map(lambda end, start: bool(jnp.any(end != start)), ends[0][0], params)
    assert all(jax.tree.leaves(moved))
    return ends[0]


@pytest.mark.parametrize("jitted", [False, True])
def test_a_model_of_one_example_that_is_mapped(jitted, monkeypatch):
    """Each example would make a step of its own."""
    predict, params, x, y, _ = problem()

    def mapped(params, x):
        one = lambda x: predict(params, x[None])[0]  # noqa: E731
        return jax.vmap(jax.jit(one) if jitted else one)(x)

    assert_same_with_and_without(monkeypatch, mapped, params, x, y, from_rows=0)


def repeated(x, call):
    return jax.lax.scan(lambda x, _: (call(x), None), x, None, length=3)[0]


@pytest.mark.parametrize(
    "inside",
    [
        repeated,
        lambda x, call: repeated(call(x), call),
        lambda x, call: jax.lax.cond(x[0, 0] > -10, call, jnp.zeros_like, x),
        lambda x, call: jax.checkpoint(call)(x),
        lambda x, call: jax.jit(call)(jax.jit(call)(x)),
    ],
    ids=["scan", "directly and in a scan", "cond", "checkpoint", "jit"],
)
def test_layers_whose_calls_are_in_another_function(inside, monkeypatch):
    """Functions that close over the parameters: how often they are run is not looked after."""
    model = nn.Dense(INPUTS, dtype=jnp.float64, param_dtype=jnp.float64)
    x = jax.random.normal(jax.random.key(1), (2, INPUTS), jnp.float64)
    params = model.init(jax.random.key(0), x)["params"]
    predict = lambda params, x: inside(x, lambda x: nn.tanh(model.apply({"params": params}, x)))  # noqa: E731
    assert_same_with_and_without(
        monkeypatch, predict, params, x, jnp.ones_like(x), from_rows=0, likelihood=tkfac.Normal()
    )


def test_a_model_that_prints(monkeypatch):
    """What it prints is for the eye: rows are kept as without."""
    predict, params, x, y, _ = problem()

    def printing(params, x):
        outputs = predict(params, x)
        jax.debug.print("{}", outputs.sum())
        return outputs

    assert_same_with_and_without(monkeypatch, printing, params, x, y, from_rows=FROM_ROWS["plain"])


def test_one_of_the_layers_is_called_in_another_function(monkeypatch):
    """The rows of the others are taken all the same."""
    predict, params, x, y, _ = problem()

    def more(params, x):
        again = lambda y: nn.Dense(CLASSES).apply({"params": params["again"]}, y)  # noqa: E731
        return jax.checkpoint(again)(predict(params["net"], x))

    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(CLASSES, CLASSES)))
    params = {"net": params, "again": {"kernel": kernel, "bias": jnp.ones(CLASSES)}}
    assert_same_with_and_without(monkeypatch, more, params, x, y, from_rows=FROM_ROWS["plain"])


def test_new_inverses_of_a_share_of_the_layers(monkeypatch):
    """All inverses at first, none in one of four steps, then share after share: the first half tries three kinds."""
    predict, params, x, y, _ = problem()
    assert_same_with_and_without(
        monkeypatch,
        predict,
        params,
        x,
        y,
        from_rows=FROM_ROWS["plain"],
        batches=[x] * 5,
        programs=6,
        options={"fisher_interval": 1, "spread_inverses": True},
    )


def test_inputs_that_are_whole_numbers(monkeypatch):
    """As the pixels of images are, which the layer itself makes floating-point numbers."""
    predict, params, _, y, _ = problem()
    x = jax.random.randint(jax.random.key(1), (BATCH, INPUTS), 0, 4, jnp.uint8)
    assert_same_with_and_without(monkeypatch, predict, params, x, y, from_rows=FROM_ROWS["plain"])


def first_half(predict, optimizer, layers, params, x, y, intervals=(1, 1)):
    """What the first half of a step hands on, abstractly."""
    options = StepOptions(*intervals)
    functions = StepFunctions.build(
        predict, tkfac.Categorical(), optimizer, layers, options, estimator="empirical"
    )
    data = dict.fromkeys(("key", "position_mask", "example_weights")) | {"targets": y}
    state = jax.eval_shape(optimizer.init, params)
    return jax.eval_shape(functions.before(in_halves=True), params, state, (x,), data)


@pytest.mark.parametrize(
    ("kind", "kept"), [("plain", 3), ("norm constraint", 3), ("clipped", 0), ("watched", 3)]
)
def test_rows_that_the_update_does_not_use_are_not_handed_on(kind, kept):
    """Nor are gradients where rows stand for them."""
    predict, params, x, y, layers = problem()
    optimizer = OPTIMIZERS[kind](layers)
    found = first_half(predict, optimizer, layers, params, x, y)
    assert len(found.rows) == kept
    assert (found.gradient["Dense_0"]["kernel"] is None) == (kind == "plain")


def test_the_first_half_hands_on_what_any_kind_of_step_uses():
    """This optimizer looks at the gradient itself in steps without new inverses."""
    predict, params, x, y, layers = problem()
    inner = tkfac.tkfac(0.1, layers)

    def update(gradient, state, params=None, *, refresh_inverses, **extra):
        updates, state = inner.update(
            gradient, state, params, refresh_inverses=refresh_inverses, **extra
        )
        return updates if refresh_inverses else jax.tree.map(jnp.add, updates, gradient), state

    optimizer = optax.GradientTransformationExtraArgs(inner.init, update)
    for intervals, needed in [((1, 1), False), ((1, 2), True), ((4, 2), False)]:
        found = first_half(predict, optimizer, layers, params, x, y, intervals)
        assert len(found.rows) == 3
        assert (found.gradient["Dense_0"]["kernel"] is not None) == needed


def test_a_derivative_inside_the_model(monkeypatch):
    """Its pull-back is not that of the loss, so that no rows come by."""
    net_predict, params, x, *_ = problem()

    def energy(params, x):
        return jnp.sin(net_predict(params, x)).sum()

    force = lambda params, x: jax.grad(lambda x: energy(params, x))(x)  # noqa: E731
    # find_layers refuses it by name, but layers may come from elsewhere.
    assert_same_with_and_without(
        monkeypatch,
        force,
        params,
        x,
        jnp.ones_like(x),
        from_rows=0,
        likelihood=tkfac.Normal(),
        layers=tkfac.find_layers(net_predict, params, x),
    )


def test_a_layer_that_is_marked_by_hand(monkeypatch):
    """What stands between its rows and its output is not known."""
    _, _, x, *_ = problem()
    params = {"w": jnp.linspace(-1, 1, INPUTS * 9).reshape(INPUTS, 9)}

    def predict(params, x):
        return tkfac.tag(0.1 * (x @ params["w"]), x, name="w", kernel=params["w"])

    assert_same_with_and_without(
        monkeypatch,
        predict,
        params,
        x,
        jnp.ones((BATCH, 9)),
        from_rows=0,
        likelihood=tkfac.Normal(),
    )


class Contractions(nn.Module):
    """Layers whose kernels have several axes of inputs or of outputs."""

    @nn.compact
    def __call__(self, x):
        options = {"dtype": jnp.float64, "param_dtype": jnp.float64}
        heads = nn.DenseGeneral((3, 4), **options)(x)
        heads = nn.tanh(nn.Einsum((3, 4, 2, 5), "bij,ijkl->blk", **options)(heads))
        return nn.DenseGeneral(CLASSES, axis=(-2, -1), **options)(heads)


def test_kernels_of_several_axes(monkeypatch):
    predict, params, x, y, _ = problem(2, Contractions())
    assert_same_with_and_without(monkeypatch, predict, params, x, y, from_rows=3)


def test_nnx(monkeypatch):
    options = {"rngs": nnx.Rngs(0), "param_dtype": jnp.float64}
    first, second = nnx.Linear(INPUTS, 9, **options), nnx.Linear(9, 9, **options)
    graph, params = nnx.split(nnx.List([first, second]))

    def predict(params, x):
        one, two = nnx.merge(graph, params)
        return two(nnx.tanh(two(nnx.tanh(one(x)))))

    _, _, x, y, _ = problem()
    assert_same_with_and_without(monkeypatch, predict, params, x, y, from_rows=2)


@pytest.mark.parametrize("kind", ["plain", "norm constraint"])
def test_weights_of_examples_and_numbers_that_go_wrong(kind, monkeypatch):
    """A step that is not finite is none, whichever way it was made; the counts are the same."""
    predict, params, x, y, _ = problem()
    weights = jnp.arange(1.0, 1.0 + BATCH)
    # The first half of the first step looks twice where the gradients are needed.
    programs = 4 if kind == "norm constraint" else 3
    options = {"make": OPTIMIZERS[kind], "from_rows": FROM_ROWS[kind], "programs": programs}
    assert_same_with_and_without(
        monkeypatch, predict, params, x, y, example_weights=weights, **options
    )
    wrong = x.at[0, 0].set(jnp.nan)
    end, state = assert_same_with_and_without(
        monkeypatch, predict, params, x, y, batches=[x, wrong], **options
    )
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(end))
    assert int(optax.tree.get(state, "skipped_updates")) == len(
        tkfac.find_layers(predict, params, x)
    )


@pytest.mark.parametrize("axis_type", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_inverses_that_are_divided_over_a_mesh(axis_type, set_constant, monkeypatch):
    """They are filled up with zeros then. On a mesh with explicit axes steps are made from the gradient."""
    set_constant("tkfac_jax.meshes.SMALLEST_DIVIDED", 8)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(axis_type,))
    predict, params, x, y, _ = problem()
    with jax.set_mesh(mesh):
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        x, y, params = *jax.device_put((x, y), sharding), jax.device_put(params, whole)
        automatic = axis_type == jax.sharding.AxisType.Auto
        assert_same_with_and_without(
            monkeypatch,
            predict,
            params,
            x,
            y,
            from_rows=FROM_ROWS["plain"] if automatic else 0,
            make=lambda layers: tkfac.tkfac(0.05, layers, damping=0.1, mesh=mesh, shard_state=True),
        )


def test_only_the_state_is_divided_over_explicit_axes(set_constant, monkeypatch):
    """What stands on no mesh meets inverses that do: steps are made from the gradient."""
    set_constant("tkfac_jax.meshes.SMALLEST_DIVIDED", 8)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    predict, params, x, y, layers = problem()
    params, x, y = jax.tree.map(np.asarray, (params, x, y))
    optimizer = tkfac.tkfac(0.05, layers, damping=0.1, mesh=mesh, shard_state=True)
    names, ends = chosen(monkeypatch), []
    with jax.set_mesh(mesh):
        for rows in (True, False):
            step = tkfac.make_train_step(
                predict,
                tkfac.Categorical(),
                optimizer,
                layers=layers,
                fisher_interval=2,
                inverse_interval=2,
                estimator="empirical",
                steps_from_rows=rows,
            )
            received = params, jax.jit(optimizer.init)(params)
            for _ in range(2):
                received = step(*received, x, targets=y)[:2]
            ends.append(received)
    assert not names
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10), *ends)


@pytest.mark.parametrize(
    ("how", "where"),
    [
        ("outputs", "kernel"),
        ("outputs", "bias"),
        ("own input", "kernel"),
        ("input of another", "kernel"),
        ("aux", "kernel"),
    ],
)
def test_a_kernel_that_serves_for_something_else_makes_its_step_from_the_gradient(
    how, where, monkeypatch
):
    """Another use of kernel or bias is in the gradient, but in no rows; in aux it does no harm."""
    net_predict, params, x, y, layers = problem()
    names = chosen(monkeypatch)
    last = nn.Dense(CLASSES, dtype=jnp.float64, param_dtype=jnp.float64)

    def predict(params, x):
        other = jnp.sin(params["Dense_0"][where]).sum()
        if how == "own input":
            x = x + other
        outputs = net_predict(params, x)
        if how == "input of another":
            hidden = nn.tanh(outputs[:, :1] + jnp.arange(WIDTH)) + other
            outputs = last.apply({"params": params["Dense_2"]}, hidden)
        if how == "outputs":
            outputs = outputs + other * x[:, :1]
        return outputs, other

    optimizer = tkfac.tkfac(0.05, layers, damping=0.1)
    step = tkfac.make_train_step(
        predict,
        tkfac.Categorical(),
        optimizer,
        layers=layers,
        fisher_interval=4,
        inverse_interval=4,
        estimator="empirical",
        has_aux=True,
    )
    without_aux = lambda params, x: predict(params, x)[0]  # noqa: E731
    expected_step = by_hand(optimizer, without_aux, layers, x, y, "empirical", (4, 4))
    state = jax.jit(optimizer.init)(params)
    expected, received = (params, state), fresh((params, state))
    for t, key in enumerate(KEYS[:3]):
        expected = expected_step(t, *expected, key)
        received = step(*received, x, targets=y)[:2]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10), received, expected
    )
    # A second call of the last layer costs more than its rows save.
    fewer = {"outputs": 1, "own input": 1, "input of another": 2, "aux": 0}[how]
    check_uses(names, 3 * (FROM_ROWS["plain"] - fewer))


@pytest.mark.parametrize(
    ("changed", "doubtful", "kept"),
    [
        (lambda outputs, params: outputs, [], 3),
        (lambda outputs, params: outputs + params["Dense_0"]["bias"][0], ["Dense_0"], 2),
        # Nothing of it comes back.
        (
            lambda outputs, params: jax.jit(lambda y, w: y)(outputs, params["Dense_1"]["kernel"]),
            ["Dense_1"],
            3,
        ),
        (lambda outputs, params: outputs * params["LayerNorm_0"]["scale"][:CLASSES], [], 3),
    ],
    ids=["for nothing else", "outputs", "an unused argument", "no kernel"],
)
def test_only_kernels_that_may_serve_for_something_else_are_traced_again(
    changed, doubtful, kept, monkeypatch
):
    predict, params, x, _, layers = problem()
    original, asked = rowwise.used_elsewhere, []

    def noted(fun, params, specs):
        asked.extend(spec.name for spec in specs)
        return original(fun, params, specs)

    monkeypatch.setattr(rowwise, "used_elsewhere", noted)
    found = rowwise.KeptRows(layers, lambda p: changed(predict(p, x), p), params)
    assert asked == doubtful
    assert len(found.zero_slots(frozenset())) == kept


def test_under_pmap_steps_are_averaged(monkeypatch):
    predict, params, x, y, layers = problem()
    optimizer, devices = tkfac.tkfac(0.05, layers, damping=0.1), 2
    names = chosen(monkeypatch)

    def make(axis_name):
        return tkfac.make_train_step(
            predict,
            tkfac.Categorical(),
            optimizer,
            layers=layers,
            fisher_interval=2,
            inverse_interval=4,
            estimator="empirical",
            axis_name=axis_name,
        )

    plain, mapped = make(None), make("data")
    expected = fresh((params, jax.jit(optimizer.init)(params)))
    received = jax.tree.map(lambda leaf: jnp.stack([leaf] * devices), expected)
    for _ in KEYS:
        expected = plain(*expected, x, targets=y)[:2]
        received = mapped(
            *received, x.reshape(devices, -1, INPUTS), targets=y.reshape(devices, -1)
        )[:2]
    # Without the axis, steps with new statistics are made in two halves, the first of which looks at the other.
    check_uses(names, (5 + 3) * FROM_ROWS["plain"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[1], b, rtol=1e-8, atol=1e-10), received, expected
    )


def test_a_layer_of_low_precision():
    """The rows' products are computed in float32, as the gradient's are in bfloat16: they agree to its rounding."""
    predict, params, x, y, layers = problem(model=Net(jnp.bfloat16))
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    layers = tkfac.find_layers(predict, params, x)
    optimizer = tkfac.tkfac(0.05, layers, damping=0.1)
    step = tkfac.make_train_step(
        predict,
        tkfac.Categorical(),
        optimizer,
        layers=layers,
        fisher_interval=4,
        inverse_interval=4,
        estimator="empirical",
    )
    expected_step = by_hand(optimizer, predict, layers, x, y, "empirical", (4, 4))
    state = jax.jit(optimizer.init)(params)
    expected, received = (params, state), fresh((params, state))
    for t, key in enumerate(KEYS[:2]):
        expected = expected_step(t, *expected, key)
        received = step(*received, x, targets=y)[:2]
    assert {leaf.dtype for leaf in jax.tree.leaves(received[0])} == {jnp.dtype("bfloat16")}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a.astype(jnp.float32), b.astype(jnp.float32), rtol=0.02, atol=0.02
        ),
        received[0],
        expected[0],
    )
