import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import tkfac_jax as tkfac

LIKELIHOOD = tkfac.Categorical()
# New statistics and new inverses on both sides of the checkpoint.
INTERVALS = {"fisher_interval": 2, "inverse_interval": 4}
SAVED, END = 3, 9


def assert_same(received, expected):
    """Bit for bit, and of the same structure; the keys of random numbers as their words."""
    assert jax.tree.structure(received) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(received), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(values(a), values(b))


def values(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.array(leaf)


def placed(tree):
    """Copies on a device that is decided, as those that Orbax restores: no program is compiled twice."""
    return jax.tree.map(lambda leaf: jax.device_put(jnp.array(leaf), jax.devices()[0]), tree)


def abstract(tree):
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)


class Net(nn.Module):
    """Factors stored whole (with and without bias) and as a diagonal; all that are inverted are 8 x 8."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.tanh(nn.Embed(6, 8)(tokens))
        x = nn.LayerNorm()(nn.Dense(8, use_bias=False)(x))
        # A name with a dot, which some file formats read as a path.
        return nn.Dense(8, name="head.dense")(x[..., :7])


def data(step):
    random = np.random.default_rng(step)
    tokens, targets = random.integers(0, 6, (4, 3)), random.integers(0, 8, (4, 3))
    return jnp.asarray(tokens), jnp.asarray(targets), jax.random.fold_in(jax.random.key(1), step)


class Run:
    """A run that is saved in its middle: its first tree, and `advance(tree, step)`."""

    def __init__(self, first, advance):
        self.first = first
        self.advance = advance

    def between(self, tree, start, end):
        for step in range(start, end):
            tree = self.advance(tree, *data(step))
        return tree


def linen_problem(**options):
    model = Net()
    tokens, _, key = data(0)

    def predict(params, tokens):
        return model.apply({"params": params}, tokens)

    params = jax.jit(model.init)(key, tokens)["params"]
    layers = tkfac.find_layers(predict, params, tokens, on_unsupported="ignore")
    assert {spec.phi.kind for spec in layers.values()} == {"full", "diagonal"}
    return predict, params, layers, tkfac.tkfac(0.05, layers, damping=0.1, **INTERVALS, **options)


def run_of_make_train_step():
    # The smaller dtypes are those that a file format could get wrong.
    predict, params, layers, optimizer = linen_problem(factor_dtype=jnp.bfloat16)
    step = tkfac.make_train_step(
        predict, LIKELIHOOD, optimizer, layers=layers, estimator="empirical", **INTERVALS
    )

    def advance(tree, tokens, targets, key):
        return step(*tree, tokens, targets=targets)[:2]

    return Run((params, jax.jit(optimizer.init)(params)), advance)


def run_of_the_adaptive_optimizer():
    """Its damping, its previous step and its warm-up are saved too."""
    predict, params, layers, _ = linen_problem()
    optimizer = tkfac.adaptive_tkfac(
        layers, LIKELIHOOD, initial_damping=0.1, damping_interval=2, warmup_steps=1, l2=0.01
    )
    step = tkfac.make_train_step(
        predict, LIKELIHOOD, optimizer, layers=layers, estimator="empirical", **INTERVALS
    )

    def advance(tree, tokens, targets, key):
        return step(*tree, tokens, targets=targets)[:2]

    return Run((params, jax.jit(optimizer.init)(params)), advance)


def run_of_own_step():
    predict, params, layers, optimizer = linen_problem()
    fisher = tkfac.sampled_fisher(predict, LIKELIHOOD, layers)

    @jax.jit
    def create(params):
        state = tkfac.TrainState.create(apply_fn=predict, params=params, tx=optimizer)
        return state.replace(step=jnp.zeros((), jnp.int32))

    @jax.jit
    def advance(state, tokens, targets, key):
        def loss(params):
            return LIKELIHOOD.nll(predict(params, tokens), targets).mean()

        return state.apply_gradients(
            grads=jax.grad(loss)(state.params),
            statistics=lambda: fisher(state.params, tokens, key=key),
        )

    return Run(create(params), advance)


def orbax_checkpointer(directory, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory / "checkpoint", tree)

    def restore(template):
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(directory / "checkpoint", abstract(template))

    return restore


def orbax_manager_in_the_background(directory, tree):
    """The following steps are made, and may overwrite the buffers, before the files are written."""
    manager = ocp.CheckpointManager(directory)
    manager.save(SAVED, args=ocp.args.StandardSave(tree))

    def restore(template):
        with manager:
            manager.wait_until_finished()
            arguments = ocp.args.StandardRestore(abstract(template))
            return manager.restore(manager.latest_step(), args=arguments)

    return restore


def flax_bytes(directory, tree):
    written = flax.serialization.to_bytes(tree)
    return lambda template: flax.serialization.from_bytes(template, written)


def flax_state_dict(directory, tree):
    state_dict = jax.device_get(placed(flax.serialization.to_state_dict(tree)))
    return lambda template: flax.serialization.from_state_dict(template, state_dict)


def run_of_tkfacw():
    """Its momentum, its Adam and the radii of its balls are saved too."""
    predict, params, layers, _ = linen_problem()
    optimizer = tkfac.tkfacw(0.05, layers, **INTERVALS)
    step = tkfac.make_train_step(predict, LIKELIHOOD, optimizer)

    def advance(tree, tokens, targets, key):
        return step(*tree, tokens, targets=targets, key=key)[:2]

    return Run((params, jax.jit(optimizer.init)(params)), advance)


RUNS = [run_of_tkfacw, run_of_make_train_step, run_of_the_adaptive_optimizer, run_of_own_step]


@pytest.fixture(scope="module", params=RUNS)
def run(request):
    """The run, and its tree at the step at which it is saved."""
    run = request.param()
    return run, jax.device_get(run.between(placed(run.first), 0, SAVED))


@pytest.mark.parametrize(
    "store", [orbax_checkpointer, orbax_manager_in_the_background, flax_bytes, flax_state_dict]
)
def test_a_run_goes_on_bit_for_bit(run, store, tmp_path):
    run, saved = run
    tree = placed(saved)
    restore = store(tmp_path, tree)
    expected = run.between(tree, SAVED, END)
    restored = restore(run.first)
    assert_same(restored, saved)
    assert_same(run.between(placed(restored), SAVED, END), expected)
    assert int(optax.tree.get(expected, "factor_updates")) == 5


class Layout:
    """Where a run lives: on one device (`devices` 0), or on a mesh over which its state may be divided."""

    def __init__(self, devices, divided=False):
        self.mesh, self.options = None, {}
        if devices:
            over = jax.devices()[:devices]
            self.mesh = jax.make_mesh((devices,), ("data",), (AxisType.Auto,), devices=over)
            self.options = {"mesh": self.mesh, "shard_state": divided}
        self.divided = divided

    def sharding(self, *axes):
        if self.mesh is None:
            return jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return NamedSharding(self.mesh, PartitionSpec(*axes))

    def shardings(self, opt_state):
        if self.divided:
            return tkfac.state_shardings(opt_state, self.mesh)
        return jax.tree.map(lambda _: self.sharding(), opt_state)


ONE = Layout(0)
WHOLE_ON_4, DIVIDED_BY_4, DIVIDED_BY_2 = Layout(4), Layout(4, True), Layout(2, True)


@pytest.fixture(scope="module")
def small_run():
    """One layer, so that the program of each layout is compiled quickly; in float64, to compare them."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 8)))
    targets = jnp.argmax(x, axis=-1)
    model = nn.Dense(8, param_dtype=jnp.float64)

    def predict(params, x):
        return model.apply({"params": params}, x)

    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    layers = tkfac.find_layers(predict, params, x)
    value_and_grad = tkfac.value_and_grad_with_fisher(
        predict, LIKELIHOOD, layers, estimator="empirical"
    )

    @functools.cache
    def on(layout):
        """The shapes of params and state with their shardings, the first of them, and `between`."""
        # At the checkpoint the inverses are those of an earlier step: the next one uses them.
        optimizer = tkfac.tkfac(0.5, layers, damping=0.1, inverse_interval=2, **layout.options)
        shapes = jax.eval_shape(optimizer.init, params)
        shardings = jax.tree.map(lambda _: layout.sharding(), params), layout.shardings(shapes)
        data = jax.device_put((x, targets), layout.sharding("data"))

        @functools.partial(jax.jit, out_shardings=shardings)
        def first():
            return params, optimizer.init(params)

        @functools.partial(jax.jit, out_shardings=shardings)
        def step(tree, x, targets):
            params, opt_state = tree
            _, grads, statistics = value_and_grad(params, x, targets=targets)
            updates, opt_state = optimizer.update(grads, opt_state, params, statistics=statistics)
            return optax.apply_updates(params, updates), opt_state

        def between(tree, start, end):
            for _ in range(start, end):
                tree = step(tree, *data)
            return tree

        template = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            (params, shapes),
            shardings,
        )
        return template, first, between

    return on


def unfilled(tree, template):
    """The arrays without the zeros that make them divisible."""
    return jax.tree.map(lambda a, b: np.asarray(a)[tuple(map(slice, b.shape))], tree, template)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (DIVIDED_BY_4, DIVIDED_BY_2),
        (DIVIDED_BY_2, DIVIDED_BY_4),
        (DIVIDED_BY_4, ONE),
        (ONE, DIVIDED_BY_2),
        (WHOLE_ON_4, ONE),
    ],
    ids=["4 to 2", "2 to 4", "4 to 1", "1 to 2", "4, each with all of it, to 1"],
)
def test_a_run_goes_on_with_another_number_of_devices(
    small_run, before, after, tmp_path, set_constant
):
    set_constant("tkfac_jax.linalg.meshes.SMALLEST_DIVIDED", 8)
    plain, first, between = small_run(ONE)
    expected = between(first(), 0, END)
    _, first, between = small_run(before)
    tree = between(first(), 0, SAVED)
    template, _, between = small_run(after)
    # Rows are filled up with zeros to a multiple of the devices: 9 to 12 for 4 of them, and to 10 for 2.
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(SAVED, args=ocp.args.StandardSave(tree))
        manager.wait_until_finished()
        restored = manager.restore(SAVED, args=ocp.args.StandardRestore(template, strict=False))
    assert jax.tree.map(lambda leaf: leaf.sharding, restored) == jax.tree.map(
        lambda leaf: leaf.sharding, template
    )
    assert_same(unfilled(restored, plain), unfilled(tree, plain))
    # The sums over a batch have another order on other devices: rounding of float64, a few steps on.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12),
        unfilled(between(restored, SAVED, END), plain),
        jax.device_get(expected),
    )


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(7, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.head = nnx.Linear(8, 8, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(nnx.relu(self.norm(self.hidden(x)))))


def nnx_run(seed):
    """A model and its optimizer."""
    model = NnxNet(nnx.Rngs(seed))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def predict(params, rest, x):
        return nnx.merge(graphdef, params, rest, copy=True)(x)

    layers = tkfac.find_layers(
        predict, params, rest, jnp.ones((16, 7), jnp.float32), on_unsupported="ignore"
    )
    transformation = tkfac.tkfac(0.05, layers, damping=0.1, **INTERVALS)
    fisher = tkfac.empirical_fisher(predict, LIKELIHOOD, layers)
    make = nnx.jit(lambda model: nnx.Optimizer(model, transformation, wrt=nnx.Param))
    return model, make(model), fisher


def test_an_nnx_optimizer_and_its_model(tmp_path):
    """Their states are saved; the state of a run that has just begun is the template."""
    model, optimizer, fisher = nnx_run(0)
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(16, 7)), jnp.float32)
    y = jnp.asarray(random.integers(0, 8, 16))

    @nnx.jit
    def step(model, optimizer, x, y):
        params, rest = jax.tree.map(lambda leaf: leaf, nnx.split(model, nnx.Param, ...)[1:])
        grads = nnx.grad(lambda model: LIKELIHOOD.nll(model(x), y).mean())(model)
        optimizer.update(model, grads, statistics=lambda: fisher(params, rest, x, targets=y))

    for _ in range(SAVED):
        step(model, optimizer, x, y)
    state = nnx.state((model, optimizer))
    restore = orbax_checkpointer(tmp_path, state)
    saved = jax.tree.map(values, state)
    for _ in range(SAVED, END):
        step(model, optimizer, x, y)
    expected = jax.tree.map(values, nnx.state((model, optimizer)))

    other = nnx_run(1)[:2]
    restored = restore(nnx.state(other))
    assert_same(jax.tree.map(values, restored), saved)
    nnx.update(other, restored)
    for _ in range(SAVED, END):
        step(*other, x, y)
    assert_same(jax.tree.map(values, nnx.state(other)), expected)


def test_a_run_that_is_killed_goes_on_from_its_last_checkpoint(tmp_path):
    """Twenty times, at random moments, also while a checkpoint is written."""
    script = Path(__file__).parents[1] / "killed_run.py"
    paths = [script.parents[1], *filter(None, [os.environ.get("PYTHONPATH")])]
    # One thread: a process that forks must not have more.
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    subprocess.run(
        [sys.executable, script, tmp_path, "--kills", "20"],
        env=environment | {"PYTHONPATH": os.pathsep.join(map(str, paths))},
        check=True,
        timeout=300,
    )
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["last_steps"]) == 20
    assert report["last_steps"] == sorted(report["last_steps"])
    assert len(set(report["last_steps"])) >= 3
    assert report["killed_while_saving"] >= 1
    with np.load(tmp_path / "killed.npz") as killed, np.load(tmp_path / "undisturbed.npz") as other:
        assert set(killed) == set(other)
        assert any("factors" in name for name in killed)
        for name in other:
            np.testing.assert_array_equal(killed[name], other[name], err_msg=name)
