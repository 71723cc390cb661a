"""Transformations change nothing: the same network, written out, has the same statistics."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from flax import nnx
from networks import fresh

import tkfac_jax as tkfac

F64 = {"dtype": jnp.float64, "param_dtype": jnp.float64}
# Sums of a few dozen float64 products, in two orders.
ROUNDING = {"rtol": 1e-9, "atol": 1e-11}
DEPTH = 3


class Block(nn.Module):
    """A residual layer."""

    @nn.compact
    def __call__(self, x):
        return x + jnp.tanh(nn.Dense(4, name="dense", **F64)(x))


class Body(nn.Module):
    """A residual layer as the body of a scan."""

    wrap: bool = False

    @nn.compact
    def __call__(self, x, _):
        block = nn.remat(Block) if self.wrap else Block
        return block(name="block")(x), None


STACK = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
SHARED = {"variable_broadcast": "params", "split_rngs": {"params": False}}
CHAINS = {
    "remat": nn.remat(Block),
    "remat with a policy": nn.remat(Block, policy=jax.checkpoint_policies.dots_saveable),
    "jit": nn.jit(Block),
    "jit of remat": nn.jit(nn.remat(Block)),
    "vmap over the batch": nn.vmap(
        Block, variable_axes={"params": None}, split_rngs={"params": False}
    ),
}
STACKS = {
    "scan": lambda: nn.scan(Body, length=DEPTH, **STACK)(name="stack"),
    "scan of remat": lambda: nn.scan(nn.remat(Body), length=DEPTH, **STACK)(name="stack"),
    "remat of scan": lambda: nn.remat(nn.scan(Body, length=DEPTH, **STACK))(name="stack"),
    "scan with remat inside": lambda: nn.scan(Body, length=DEPTH, **STACK)(True, name="stack"),
    "jit of scan": lambda: nn.jit(nn.scan(Body, length=DEPTH, **STACK))(name="stack"),
}

OVER_TIME = {
    "scan": lambda: nn.scan(Body, length=DEPTH, **SHARED)(name="block"),
    "remat of scan": lambda: nn.remat(nn.scan(Body, length=DEPTH, **SHARED))(name="block"),
}
OVER_TIME = {f"{how} over time": make for how, make in OVER_TIME.items()}


class Net(nn.Module):
    """Three residual layers, in one of many ways, and a last layer."""

    how: str

    @nn.compact
    def __call__(self, x):
        if self.how == "written out":
            for i in range(DEPTH):
                x = Block(name=f"block_{i}")(x)
        elif self.how in CHAINS:
            for i in range(DEPTH):
                x = CHAINS[self.how](name=f"block_{i}")(x)
        elif self.how in STACKS:
            x, _ = STACKS[self.how]()(x, None)
        elif self.how in OVER_TIME:
            x, _ = OVER_TIME[self.how]()(x, None)
        elif self.how == "remat_scan":
            x = nn.remat_scan(Block, lengths=(DEPTH, 1))(name="stack")(x)
        elif self.how == "shared":
            block = Block(name="block")
            for _ in range(DEPTH):
                x = block(x)
        return nn.Dense(2, name="last", **F64)(x)


@functools.cache
def data():
    keys = jax.random.split(jax.random.key(0))
    return tuple(
        jax.random.normal(key, (5, width), jnp.float64)
        for key, width in zip(keys, (4, 2), strict=True)
    )


@functools.cache
def _parameters():
    x, _ = data()
    params = jax.jit(Net("written out").init)(jax.random.key(3), x)["params"]
    return jax.tree.map(lambda p: p + 0.1 * np.cos(np.arange(p.size)).reshape(p.shape), params)


def parameters():
    """The parameters of three layers and the last one, biases not zero."""
    return fresh(_parameters())


def statistics_of(predict, params, **options):
    x, y = data()
    layers = tkfac.find_layers(predict, params, x)
    assert not layers.fallback
    fisher = tkfac.empirical_fisher(predict, tkfac.Normal(), layers, **options)
    received = fisher(params, x, targets=y)
    jitted = jax.jit(fisher)(params, x, targets=y)
    jax.tree.map(functools.partial(np.testing.assert_allclose, **ROUNDING), received, jitted)
    return layers, received


@functools.cache
def written_out(rule="tkfac"):
    """The statistics of the network written out."""
    return statistics_of(linen("written out"), parameters(), rule=RULES[rule])[1]


def linen(how):
    return lambda params, x: Net(how).apply({"params": params}, x)


def assert_equal(received, expected):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **ROUNDING), received, expected)


RULES = {"tkfac": tkfac.trace_restricted, "kfac": tkfac.independent}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("how", CHAINS)
def test_linen_chain(how, rule):
    params = parameters()
    expected = written_out(rule)
    _, received = statistics_of(linen(how), params, rule=RULES[rule])
    assert_equal(received, expected)


def layer_of(stack, i):
    return jax.tree.map(lambda array: array[i], stack)


def stacked(params):
    blocks = [params[f"block_{i}"] for i in range(DEPTH)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)


@pytest.mark.parametrize("how", [*STACKS, "remat_scan"])
def test_linen_stack_has_factors_of_its_own_for_each_layer(how):
    params = parameters()
    expected = written_out()
    stack = stacked(params)
    inner = {"block": stack}
    if how == "remat_scan":
        inner = jax.tree.map(lambda leaf: leaf[:, None], stack)
    layers, received = statistics_of(linen(how), {"stack": inner, "last": params["last"]})
    (name,) = (name for name in layers if name != "last")
    batch = (DEPTH, 1) if how == "remat_scan" else (DEPTH,)
    assert layers[name].batch == batch
    assert f"dense x {' x '.join(map(str, batch))}" in str(layers)
    for i in range(DEPTH):
        flat = jax.tree.map(lambda s: s.reshape(DEPTH, *s.shape[len(batch) :]), received[name])
        assert_equal(layer_of(flat, i), expected[f"block_{i}/dense"])


@pytest.mark.parametrize("how", OVER_TIME)
def test_linen_scan_over_time_adds_its_uses_up(how):
    params = parameters()
    shared = {"block": params["block_0"], "last": params["last"]}
    _, expected = statistics_of(linen("shared"), shared)
    scanned = {"block": {"block": params["block_0"]}, "last": params["last"]}
    _, received = statistics_of(linen(how), scanned)
    assert_equal(received["block/block/dense"], expected["block/dense"])


class Layer(nnx.Module):
    """A residual layer of NNX."""

    def __init__(self, rngs):
        self.dense = nnx.Linear(4, 4, rngs=rngs, **F64)

    def __call__(self, x):
        return x + jnp.tanh(self.dense(x))


class Deep(nnx.Module):
    """Three residual layers of NNX, apart or stacked, and a last layer."""

    def __init__(self, how, rngs):
        self.how = how
        if how.startswith("stack"):
            make = nnx.split_rngs(splits=DEPTH)(nnx.vmap(Layer))
            self.stack = make(rngs)
        else:
            self.blocks = nnx.List([Layer(rngs) for _ in range(DEPTH)])
        self.last = nnx.Linear(4, 2, rngs=rngs, **F64)

    def __call__(self, x):
        if self.how.startswith("stack"):
            run = nnx.remat(call) if self.how == "stack, remat" else call
            x = nnx.scan(run, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.stack, x)
        else:
            run = NNX_CHAINS[self.how]
            for block in self.blocks:
                x = run(block, x)
        return self.last(x)


def call(block, x):
    return block(x)


NNX_CHAINS = {
    "plain": call,
    "remat": nnx.remat(call),
    "jit": nnx.jit(call),
    "jit of remat": nnx.jit(nnx.remat(call)),
    "vmap over the batch": nnx.vmap(call, in_axes=(None, 0)),
}


def nnx_problem(how, params):
    graphdef, state, rest = nnx.split(Deep(how, nnx.Rngs(0)), nnx.Param, ...)
    blocks = [{"dense": params[f"block_{i}"]["dense"]} for i in range(DEPTH)]
    inner = (
        {"stack": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}
        if how.startswith("stack")
        else {"blocks": dict(enumerate(blocks))}
    )
    values = {**inner, "last": params["last"]}
    leaves, treedef = jax.tree.flatten(state)
    ordered = jax.tree.leaves(values)
    assert [leaf.shape for leaf in leaves] == [leaf.shape for leaf in ordered]
    return (
        lambda params, x: nnx.merge(graphdef, params, rest)(x),
        jax.tree.unflatten(treedef, ordered),
    )


@pytest.mark.parametrize("how", NNX_CHAINS)
def test_nnx_chain(how):
    params = parameters()
    expected = written_out()
    _, received = statistics_of(*nnx_problem(how, params))
    for i in range(DEPTH):
        assert_equal(received[f"blocks/{i}/dense"], expected[f"block_{i}/dense"])


@pytest.mark.parametrize("how", ["stack", "stack, remat"])
def test_nnx_stack_has_factors_of_its_own_for_each_layer(how):
    params = parameters()
    expected = written_out()
    layers, received = statistics_of(*nnx_problem(how, params))
    assert layers["stack/dense"].batch == (DEPTH,)
    for i in range(DEPTH):
        assert_equal(layer_of(received["stack/dense"], i), expected[f"block_{i}/dense"])


@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_layers_side_by_side_have_factors_of_their_own(framework):
    """A mapped ensemble on one input: each member's statistics are its own."""
    x, y = map(np.asarray, data())
    kernels = jax.random.normal(jax.random.key(7), (DEPTH, 4, 2), jnp.float64)
    biases = jax.random.normal(jax.random.key(8), (DEPTH, 2), jnp.float64)
    if framework == "linen":
        many = nn.vmap(nn.Dense, in_axes=None, axis_size=DEPTH, **STACK)(2, **F64)
        params = {"kernel": kernels, "bias": biases}

        def members(params, x):
            return many.apply({"params": params}, x)

    else:

        @nnx.split_rngs(splits=DEPTH)
        @nnx.vmap
        def make(rngs):
            return nnx.Linear(4, 2, rngs=rngs, **F64)

        graphdef, params, rest = nnx.split(make(nnx.Rngs(0)), nnx.Param, ...)
        params = jax.tree.unflatten(jax.tree.structure(params), [biases, kernels])
        run = nnx.vmap(lambda member, x: member(x), in_axes=(0, None))

        def members(params, x):
            return run(nnx.merge(graphdef, params, rest), x)

    layers, received = statistics_of(lambda p, x: jnp.tanh(members(p, x)).sum(0), params)
    assert layers["."].batch == (DEPTH,)
    a = np.concatenate([x, np.ones((len(x), 1))], 1)
    outputs = np.tanh(np.einsum("ni,kio->kno", a, np.concatenate([kernels, biases[:, None]], 1)))
    g = (outputs.sum(0) - y) * (1 - outputs**2)
    for k in range(DEPTH):
        expected = oracles.trace_restricted(a[:, None], g[k][:, None])
        for array, reference in zip(layer_of(received["."], k), expected, strict=True):
            np.testing.assert_allclose(array, reference, **ROUNDING)


def updates_of(predict, params, jit=jax.jit):
    x, y = data()
    layers = tkfac.find_layers(predict, params, x)
    fisher = tkfac.empirical_fisher(predict, tkfac.Normal(), layers)
    optimizer = tkfac.scale_by_tkfac(layers, damping=0.1)

    @jit
    def updates(params):
        grads = jax.grad(lambda p: jnp.sum((predict(p, x) - y) ** 2))(params)
        statistics = fisher(params, x, targets=y)
        state = optimizer.init(params)
        return optimizer.update(grads, state, params, statistics=statistics)[0]

    return updates(params)


@functools.cache
def updates_written_out():
    """Those of the network written out, operation by operation."""
    return updates_of(linen("written out"), parameters(), jit=lambda fun: fun)


@pytest.mark.parametrize("how", ["scan", "remat"])
def test_a_transformed_network_trains(how):
    """Factors, inverses and preconditioning of stacked layers are those of each layer by itself."""
    params, expected = parameters(), updates_written_out()
    if how == "remat":
        assert_equal(updates_of(linen("remat"), params), expected)
        return
    received = updates_of(
        linen("scan"), {"stack": {"block": stacked(params)}, "last": params["last"]}
    )
    assert_equal(received["stack"]["block"], stacked(expected))
    assert_equal(received["last"], expected["last"])


def test_the_optimizer_of_nnx_takes_statistics():
    x, y = data()
    model = Deep("remat", nnx.Rngs(0))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def predict(params, x):
        return nnx.merge(graphdef, params, rest)(x)

    layers = tkfac.find_layers(predict, params, x)
    fisher = tkfac.empirical_fisher(predict, tkfac.Normal(), layers)
    optimizer = tkfac.tkfac(0.1, layers, damping=0.1)

    plain_state = jax.jit(optimizer.init)(params)
    # The state of a model shares its Variables, which the wrapped optimizer overwrites.
    plain = jax.tree.map(lambda leaf: leaf, params)
    wrapped = nnx.Optimizer(model, optimizer, wrt=nnx.Param)

    def loss_of(model):
        return jnp.mean((model(x) - y) ** 2)

    @nnx.jit
    def step(model, wrapped):
        grads = nnx.grad(loss_of)(model)
        statistics = fisher(nnx.state(model, nnx.Param), x, targets=y)
        wrapped.update(model, grads, statistics=statistics)

    @jax.jit
    def plain_step(plain, plain_state):
        grads = jax.grad(lambda p: jnp.mean((predict(p, x) - y) ** 2))(plain)
        updates, plain_state = optimizer.update(
            grads, plain_state, plain, statistics=fisher(plain, x, targets=y)
        )
        return optax.apply_updates(plain, updates), plain_state

    for _ in range(3):
        step(model, wrapped)
        plain, plain_state = plain_step(plain, plain_state)
    assert_equal(jax.tree.leaves(nnx.state(model, nnx.Param)), jax.tree.leaves(plain))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_cast_of_all_parameters_keeps_float32_statistics(dtype):
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), parameters())
    x, y = (array.astype(jnp.float32) for array in data())

    def predict(params, x):
        half = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        hidden = x.astype(dtype)
        for i in range(DEPTH):
            block = half[f"block_{i}"]["dense"]
            hidden = hidden + jnp.tanh(nn.Dense(4).apply({"params": block}, hidden))
        return nn.Dense(2).apply({"params": half["last"]}, hidden).astype(jnp.float32)

    layers = tkfac.find_layers(predict, params, x)
    assert len(layers) == DEPTH + 1
    assert {spec.dtype for spec in layers.values()} == {"float32"}
    fisher = tkfac.empirical_fisher(predict, tkfac.Normal(), layers)
    received = jax.jit(fisher)(params, x, targets=y)
    assert {leaf.dtype for leaf in jax.tree.leaves(received)} == {jnp.dtype("float32")}
    expected = written_out()
    for name, own in received.items():
        # bfloat16 has 8 bits.
        np.testing.assert_allclose(own.trace, expected[name].trace, rtol=0.1)
        # They have not been through the dtype of the cast on their way either.
        assert not np.array_equal(own.input_moment, own.input_moment.astype(dtype))
