from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from networks import convnet_problem, mlp_problem

import tkfac_jax as tkfac
from tkfac_jax.layers.kernel_uses import NORM


def init(model, *args):
    return jax.jit(model.init)(jax.random.key(0), *args)["params"]


def test_dense_layers_are_found_with_their_dimensions():
    _, params, _, _, layers = mlp_problem()
    assert list(layers) == ["Dense_0", "Dense_1", "Dense_2"]
    assert [(s.d_in, s.d_out, s.has_bias, s.kind) for s in layers.values()] == [
        (5, 5, True, "dense"),
        (5, 4, False, "dense"),
        (5, 3, True, "dense"),
    ]
    assert layers["Dense_1"].bias is None
    assert layers["Dense_0"].dtype == "float64"
    assert not layers.fallback
    assert set(jax.tree.leaves(layers.labels(params))) == {"tkfac"}


def test_nothing_is_computed():
    model = nn.Dense(3)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 2)))["params"]
    inputs = jax.ShapeDtypeStruct((7, 2), jnp.float32)

    def predict(params, x):
        return model.apply({"params": params}, x)

    assert list(tkfac.find_layers(predict, params, inputs)) == ["."]


def test_conv_geometry_and_fallback_reasons():
    _, params, *_, layers = convnet_problem()
    spec = layers["Conv_0"]
    assert (spec.kind, spec.d_in, spec.d_out) == ("conv", 3 * 3 * 2 + 1, 4)
    assert spec.geometry.window == (3, 3)
    assert spec.geometry.strides == (2, 2)
    assert dict(layers.fallback) == {
        "BatchNorm_0/bias": NORM,
        "BatchNorm_0/scale": NORM,
    }
    labels = layers.labels(params)
    assert labels["BatchNorm_0"] == {"bias": "fallback", "scale": "fallback"}
    assert labels["Conv_0"] == {"bias": "tkfac", "kernel": "tkfac"}


def test_several_models_nested_modules_and_dropout():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dropout(0.5, deterministic=False)(nn.relu(nn.Dense(4)(x)))

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Block(name="second")(Block(name="first")(x))

    encoder, decoder = Outer(), nn.Dense(2)
    x = jnp.ones((3, 5))
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    params = {
        "encoder": jax.jit(encoder.init)(rngs, x)["params"],
        "decoder": init(decoder, jnp.ones((3, 4))),
    }

    def predict(params, x, key, flag=None):
        hidden = encoder.apply({"params": params["encoder"]}, x, rngs={"dropout": key})
        return decoder.apply({"params": params["decoder"]}, hidden) if flag else hidden

    layers = tkfac.find_layers(predict, params, x, jax.random.key(0), flag=True)
    assert list(layers) == ["decoder", "encoder/first/Dense_0", "encoder/second/Dense_0"]
    with pytest.warns(UserWarning, match="kernel 'decoder/kernel' of shape"):
        without = tkfac.find_layers(predict, params, x, jax.random.key(0), flag=False)
    assert "decoder/bias" in without.fallback


def test_a_jitted_function_is_looked_into():
    model = nn.Dense(3)
    x = jnp.ones((2, 4))
    params = init(model, x)
    predict = jax.jit(lambda params, x: model.apply({"params": params}, x))
    predict(params, x)
    layers = tkfac.find_layers(predict, params, x)
    fisher = tkfac.sampled_fisher(predict, tkfac.Normal(), layers)
    assert float(jax.jit(fisher)(params, x, key=jax.random.key(0))["."].trace) > 0


@pytest.mark.parametrize(
    ("module", "x", "reason"),
    [
        (
            partial(nn.ConvLocal, 4, (3,)),
            jnp.ones((1, 5, 2)),
            "a kernel of its own at every location",
        ),
        (
            partial(nn.Conv, 4, (3, 3), mask=jnp.ones((3, 3, 2, 4))),
            jnp.ones((1, 5, 5, 2)),
            "a masked kernel",
        ),
        (
            partial(nn.ConvTranspose, 4, (3, 3), padding="CIRCULAR"),
            jnp.ones((1, 5, 5, 2)),
            "a transposed convolution with padding 'CIRCULAR' is not supported",
        ),
        (
            partial(nn.Einsum, (3, 5), "bi,oj->bo", use_bias=False),
            jnp.ones((2, 3)),
            "it sums over an axis of the kernel alone",
        ),
        (
            partial(nn.Einsum, (3, 4), "bi,jk->bijk", use_bias=False),
            jnp.ones((2, 3)),
            "it sums over no axis",
        ),
        (
            partial(nn.Dense, 4, dot_general=jax.lax.dot_general),
            jnp.ones((2, 3)),
            "its own dot_general",
        ),
    ],
)
def test_unsupported_layers_are_left_by_name(module, x, reason):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = module(name="odd")(x)
            return nn.Dense(2, name="last")(y.astype(jnp.float32))

    net = Net()
    params = init(net, x)

    def predict(params, x):
        return net.apply({"params": params}, x)

    with pytest.warns(UserWarning, match=reason):
        layers = tkfac.find_layers(predict, params, x)
    assert list(layers) == ["last"]
    assert any(reason in text for text in layers.fallback.values())
    with pytest.raises(ValueError, match=reason):
        tkfac.find_layers(predict, params, x, on_unsupported="error")
    assert tkfac.find_layers(predict, params, x, on_unsupported="ignore") == layers


class Doubled(nn.Dense):
    """Overrides what a Dense layer computes."""

    @nn.compact
    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


class Renamed(nn.Dense):
    """Changes nothing that matters."""


def test_subclasses_count_only_if_they_compute_the_same():
    x = jnp.ones((2, 3))

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Renamed(2)(Doubled(4)(x))

    net = Net()
    params = init(net, x)
    with pytest.warns(UserWarning, match="Doubled overrides Dense.__call__"):
        layers = tkfac.find_layers(lambda p, x: net.apply({"params": p}, x), params, x)
    assert list(layers) == ["Renamed_0"]


class Cell(nn.Module):
    """One layer of a stack that nn.scan runs through."""

    @nn.compact
    def __call__(self, carry, _):
        return nn.Dense(3)(carry), None


def changed_net(change):
    """A network whose first kernel is changed before its layer uses it: predict, params and inputs."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            if change == "scan over the last axis":
                scanned = nn.scan(
                    Cell, variable_axes={"params": -1}, split_rngs={"params": True}, length=3
                )
                x, _ = scanned(name="first")(x, None)
            elif change == "weight norm":
                x = nn.WeightNorm(nn.Dense(3, name="first"))(x)
            elif change == "map_variables":
                halved = nn.map_variables(
                    nn.Dense,
                    "params",
                    lambda tree: jax.tree.map(lambda w: 0.5 * w, tree),
                    init=self.is_initializing(),
                )
                x = halved(3, name="first")(x)
            else:
                x = nn.Dense(3, name="first")(x)
            return nn.Dense(2, name="last")(x)

    net = Net()
    x = jnp.ones((2, 3))
    params = init(net, x)

    def predict(params, x):
        changed = dict(params)
        if change == "scale":
            changed["first"] = jax.tree.map(lambda w: 0.5 * w, params["first"])
        return net.apply({"params": changed}, x)

    return predict, params, x


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("scale", "a transformation changes it before the layer uses it"),
        ("map_variables", "a transformation changes it before the layer uses it"),
        ("weight norm", "a transformation changes it before the layer uses it"),
        ("scan over the last axis", "it is mapped along another axis than the first"),
    ],
)
def test_kernels_that_are_changed_before_use_are_refused(change, reason):
    predict, params, x = changed_net(change)
    layers = tkfac.find_layers(predict, params, x, on_unsupported="ignore")
    assert list(layers) == ["last"]
    (kernel,) = (name for name in layers.fallback if name.endswith("kernel"))
    assert reason in layers.fallback[kernel]


class Cells(nn.Module):
    """A recurrent cell that multiplies with several kernels at once."""

    @nn.compact
    def __call__(self, x):
        return nn.RNN(nn.OptimizedLSTMCell(3, param_dtype=jnp.float64))(x)


class Spectral(nn.Module):
    """A layer whose kernel is divided by its largest singular value."""

    @nn.compact
    def __call__(self, x):
        return nn.SpectralNorm(nn.Dense(3))(x, update_stats=False)


@pytest.mark.parametrize("module", [Cells, Spectral])
def test_layers_of_linen_that_change_their_kernels_are_refused(module):
    x = jnp.ones((2, 4, 3))
    variables = jax.jit(module().init)(jax.random.key(0), x)
    others = {name: value for name, value in variables.items() if name != "params"}
    last = init(nn.Dense(2), jnp.ones((2, 3)))

    def predict(params, x):
        y = module().apply({"params": params["odd"], **others}, x)
        return nn.Dense(2).apply({"params": params["last"]}, y)

    params = {"odd": variables["params"], "last": last}
    layers = tkfac.find_layers(predict, params, x, on_unsupported="ignore")
    assert list(layers) == ["last"]
    assert all(layers.fallback.values())


def own_dot_general(*args, **kwargs):
    return jax.lax.dot_general(*args, **kwargs)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (partial(nnx.Linear, 3, 3, dot_general=own_dot_general), "its own dot_general"),
        (partial(nnx.LinearGeneral, 3, 3, dot_general=own_dot_general), "its own dot_general"),
        (partial(nnx.LoRA, 3, 2, 3), "LoRA multiplies two matrices at once"),
        (partial(nnx.Conv, 3, 3, (1,), mask=jnp.ones((1, 3, 3))), "a masked kernel"),
    ],
)
def test_layers_of_nnx_that_are_left_by_name(make, reason):
    x = jnp.ones((2, 4, 3))
    graphdef, params, rest = nnx.split(
        nnx.Sequential(make(rngs=nnx.Rngs(0)), nnx.Linear(3, 2, rngs=nnx.Rngs(1))), nnx.Param, ...
    )
    layers = tkfac.find_layers(
        lambda p, x: nnx.merge(graphdef, p, rest)(x), params, x, on_unsupported="ignore"
    )
    assert list(layers) == ["layers/1"]
    assert all(reason in text for name, text in layers.fallback.items() if "bias" not in name)


def test_stacked_norms_are_not_reported_as_kernels():
    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.LayerNorm()(nn.Dense(3)(x)), None

    net = nn.scan(Normed, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)()
    x = jnp.ones((4, 3))
    params = init(net, x, None)

    def predict(params, x):
        return net.apply({"params": params}, x, None)[0]

    layers = tkfac.find_layers(predict, params, x, on_unsupported="error")
    assert dict(layers.fallback) == {
        "LayerNorm_0/bias": NORM,
        "LayerNorm_0/scale": NORM,
    }
    exact = tkfac.find_layers(predict, params, x, norms="exact", on_unsupported="error")
    assert exact["LayerNorm_0"].batch == (2,)


def test_a_function_that_refuses_further_entries_is_still_looked_into():
    model = nn.Dense(3)
    x = jnp.ones((2, 4))
    params = init(model, x)

    def predict(params, x):
        if set(params) != {"kernel", "bias"}:
            raise KeyError(set(params))
        return model.apply({"params": params}, x)

    assert list(tkfac.find_layers(predict, params, x)) == ["."]


def test_a_kernel_shared_by_two_modules_is_one_layer():
    layer = nn.Dense(3, use_bias=False)
    x = jnp.ones((2, 3))
    params = {"both": init(layer, x)}

    def predict(params, x):
        hidden = layer.apply({"params": params["both"]}, x)
        return nn.Dense(3, use_bias=False).apply({"params": params["both"]}, hidden)

    assert list(tkfac.find_layers(predict, params, x)) == ["both"]


def test_conflicting_uses_are_refused():
    x = jnp.ones((2, 3))
    params = {"kernel": jnp.ones((3, 3)), "bias": jnp.ones(3), "last": init(nn.Dense(2), x)}

    def with_and_without_bias(params, x):
        own = {"kernel": params["kernel"], "bias": params["bias"]}
        x = nn.Dense(3).apply({"params": own}, x)
        x = nn.Dense(3, use_bias=False).apply({"params": {"kernel": params["kernel"]}}, x)
        return nn.Dense(2).apply({"params": params["last"]}, x)

    with pytest.warns(UserWarning, match="several values of bias"):
        layers = tkfac.find_layers(with_and_without_bias, params, x)
    assert list(layers) == ["last"]

    def biased_by_a_constant(params, x):
        own = {"kernel": params["kernel"], "bias": 2 * params["bias"]}
        x = nn.Dense(3).apply({"params": own}, x)
        return nn.Dense(2).apply({"params": params["last"]}, x)

    with pytest.warns(UserWarning, match="the bias used with it does not stand in params"):
        tkfac.find_layers(biased_by_a_constant, params, x)


def test_a_bias_shared_by_two_kernels_is_refused():
    x = jnp.ones((2, 3))
    params = {
        "one": jnp.ones((3, 3)),
        "two": jnp.ones((3, 3)),
        "bias": jnp.ones(3),
        "last": init(nn.Dense(2), x),
    }

    def predict(params, x):
        for name in ("one", "two"):
            own = {"kernel": params[name], "bias": params["bias"]}
            x = nn.Dense(3).apply({"params": own}, x)
        return nn.Dense(2).apply({"params": params["last"]}, x)

    with pytest.warns(UserWarning, match="its bias 'bias' is used with other kernels too"):
        layers = tkfac.find_layers(predict, params, x)
    assert list(layers) == ["last"]


def test_partitioned_parameters_are_found_under_their_own_names():
    init_fn = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    model = nn.Dense(3, kernel_init=init_fn)
    x = jnp.ones((2, 4))
    params = init(model, x)
    assert isinstance(params["kernel"], nn.Partitioned)

    def predict(params, x):
        return model.apply({"params": params}, x)

    layers = tkfac.find_layers(predict, params, x)
    assert layers["."].kernel == "kernel"
    optimizer = tkfac.tkfac(0.1, layers)
    fisher = tkfac.sampled_fisher(predict, tkfac.Normal(), layers)

    @jax.jit
    def run(params):
        statistics = fisher(params, x, key=jax.random.key(0))
        return optimizer.update(params, optimizer.init(params), params, statistics=statistics)[0]

    updates = run(params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


def test_messages(unchecked):
    model = nn.Dense(3)
    x = jnp.ones((2, 4))
    params = init(model, x)
    with pytest.raises(
        ValueError, match='on_unsupported=\'raise\'; expected "warn", "error" or "ignore"'
    ):
        tkfac.find_layers(lambda p, x: x, params, x, on_unsupported="raise")
    with pytest.raises(
        ValueError, match="find_layers found no supported layer: 'bias': no supported"
    ):
        tkfac.find_layers(lambda p, x: x, params, x)
    with pytest.raises(ValueError, match="params has no leaves"):
        tkfac.find_layers(lambda p, x: x, {}, x)
    for options, message in (
        ({"norms": "all"}, 'norms=\'all\'; expected "fallback" or "exact"'),
        (
            {"large_factors": "low rank"},
            'large_factors=\'low rank\'; expected "diagonal" or "blocks"',
        ),
        (
            {"max_factor_size": 0},
            "max_factor_size=0; expected a whole number of at least 1, or None",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            tkfac.find_layers(lambda p, x: model.apply({"params": p}, x), params, x, **options)


class Heads(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.tanh(nn.Dense(3, name="hidden")(x))
        h = nn.tanh(nn.Dense(3, name="as_wide")(h))
        value = nn.Dense(1, name="value")(h).squeeze(-1)
        return {"policy": 2 * nn.Dense(3, name="policy")(h), "value": value}


class Stacked(nn.Module):
    @nn.compact
    def __call__(self, x):
        x, _ = nn.scan(OfStack, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)(
            name="stack"
        )(x)
        return x


class OfStack(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(x), None


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(4)]), {"layers_2"}),
        (Heads(), {"policy", "value"}),
        # Of a stack of layers only the last makes the outputs: it is not said of any.
        (Stacked(), set()),
        (nn.Sequential([nn.Dense(4), lambda x: x.mean(0)]), set()),
    ],
)
def test_what_makes_the_outputs_is_noted(model, expected):
    inputs = jnp.ones((5, 4))
    params = init(model, inputs)
    layers = tkfac.find_layers(lambda p, x: model.apply({"params": p}, x), params, inputs)
    assert {name for name, spec in layers.items() if spec.makes_outputs} == expected


def test_what_is_returned_beside_the_outputs_is_no_output():
    *_, layers = convnet_problem()
    made = [name for name, spec in layers.items() if spec.makes_outputs]
    assert made == ["Dense_0"]
