import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from networks import mlp_problem

import tkfac_jax as tkfac
from tkfac_jax.layers.parameter_matrices import parameter_matrices
from tkfac_jax.optimizers.gradient_moments import nesterov_momentum, scale_by_adam_without_epsilon


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.tanh(nn.Dense(4)(nn.LayerNorm()(x))), None


class Various(nn.Module):
    """A grouped convolution, heads, a stack of layers with norms in it, and a parameter that no layer claims."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3,), feature_group_count=2)(x)
        x = x + self.param("positions", nn.initializers.normal(1.0), (5, 4))
        x = nn.DenseGeneral((2, 2))(x).reshape(*x.shape[:-1], 4)
        stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = stack(name="blocks")(x)
        return nn.Dense(2, kernel_init=nn.initializers.zeros)(x)


def various():
    model, x = Various(), jax.random.normal(jax.random.key(0), (2, 5, 4))
    params = model.init(jax.random.key(1), x)["params"]
    predict = lambda params, x: model.apply({"params": params}, x)  # noqa: E731
    return params, tkfac.find_layers(predict, params, x, on_unsupported="ignore")


PARAMS, LAYERS = various()
UPDATES = jax.tree.map(
    lambda p: jnp.asarray(np.random.default_rng(p.size).normal(size=p.shape), p.dtype), PARAMS
)


def matrices_of(tree):
    """By hand, the matrices of the network: kernels, and the biases that belong to them or None."""
    tree = jax.tree.map(np.asarray, tree)
    conv, heads, last = tree["Conv_0"], tree["DenseGeneral_0"], tree["Dense_0"]
    found = {
        # The output channels of a group stand side by side.
        "group 0": (conv["kernel"][..., :2], conv["bias"][:2]),
        "group 1": (conv["kernel"][..., 2:], conv["bias"][2:]),
        "heads": (heads["kernel"].reshape(4, 4), heads["bias"].reshape(4)),
        "last": (last["kernel"], last["bias"]),
        "positions": (tree["positions"], None),
    }
    stack = tree["blocks"]["Dense_0"]
    return found | {f"block {i}": (stack["kernel"][i], stack["bias"][i]) for i in range(3)}


def test_the_last_layer_makes_the_outputs():
    assert [name for name, spec in LAYERS.items() if spec.makes_outputs] == ["Dense_0"]


def norm(*arrays):
    return np.sqrt(sum(np.sum(np.square(a)) for a in arrays if a is not None))


def test_the_layers_are_those_that_the_tests_take_apart():
    assert {name: spec.batch for name, spec in LAYERS.items()} == {
        "Conv_0": (2,),
        "Dense_0": (),
        "DenseGeneral_0": (),
        "blocks/Dense_0": (3,),
    }
    matrices = parameter_matrices(LAYERS, PARAMS, "params")
    assert set(matrices) == {*LAYERS, "positions"}
    leaves = {"positions": PARAMS["positions"]}
    np.testing.assert_array_equal(matrices["positions"].rows_of(leaves)[0], PARAMS["positions"])


def test_updates_get_the_lengths_of_the_weights():
    transformation = tkfac.scale_by_layer_norm_ratio(LAYERS, floor=0.1)
    received, _ = transformation.update(UPDATES, transformation.init(PARAMS), PARAMS)
    weights, steps, found = map(matrices_of, (PARAMS, UPDATES, received))
    for name, (kernel, bias) in weights.items():
        length = max(norm(kernel), 0.1 * kernel.shape[-1] ** 0.5)
        whole = norm(*steps[name])
        expected = steps[name][0] * length / whole
        np.testing.assert_allclose(found[name][0], expected, rtol=1e-6, err_msg=name)
        if bias is not None:
            expected = steps[name][1] * max(length, norm(bias)) / whole
            np.testing.assert_allclose(found[name][1], expected, rtol=1e-6)
    # A stack of scales is no matrix.
    norms = received["blocks"]["LayerNorm_0"]
    assert norms["scale"].ndim == 2
    jax.tree.map(np.testing.assert_array_equal, norms, UPDATES["blocks"]["LayerNorm_0"])


def test_a_bias_larger_than_its_kernel_moves_by_its_own_norm():
    params = PARAMS | {"Dense_0": PARAMS["Dense_0"] | {"bias": jnp.full(2, 100.0)}}
    transformation = tkfac.scale_by_layer_norm_ratio(LAYERS)
    received, _ = transformation.update(UPDATES, transformation.init(params), params)
    step, given = received["Dense_0"], UPDATES["Dense_0"]
    whole = norm(given["kernel"], given["bias"])
    bias, kernel = (given[name] / whole for name in ("bias", "kernel"))
    np.testing.assert_allclose(step["bias"], bias * 100 * 2**0.5, rtol=1e-6)
    np.testing.assert_allclose(step["kernel"], kernel * 0.1 * 2**0.5, rtol=1e-6)


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf, -np.inf])
def test_what_has_no_direction_makes_no_step(bad):
    layer = UPDATES["Dense_0"]
    kernel = layer["kernel"].at[0, 0].set(bad) if bad else jnp.zeros_like(layer["kernel"])
    given = UPDATES | {
        "Dense_0": {"kernel": kernel, "bias": layer["bias"] if bad else 0 * layer["bias"]}
    }
    transformation = tkfac.scale_by_layer_norm_ratio(LAYERS)
    received, _ = transformation.update(given, transformation.init(PARAMS), PARAMS)
    expected, _ = transformation.update(UPDATES, transformation.init(PARAMS), PARAMS)
    assert not any(leaf.any() for leaf in jax.tree.leaves(received["Dense_0"]))
    rest = [{k: v for k, v in tree.items() if k != "Dense_0"} for tree in (received, expected)]
    jax.tree.map(np.testing.assert_array_equal, *rest)


def test_weights_stay_in_their_balls():
    transformation = tkfac.keep_in_norm_ball(LAYERS, radius=0.5, output_growth=0.25)
    state = transformation.init(PARAMS)
    # Steps so small that all stay inside, but for one layer, and so large that none does.
    inward = jax.tree.map(lambda p: -0.3 * p, PARAMS) | {"Dense_0": UPDATES["Dense_0"]}
    for given in (inward, jax.tree.map(lambda u: 3 * u, UPDATES)):
        received, after = transformation.update(given, state, PARAMS)
        weights, steps, found = (
            {name: joined(*both) for name, both in matrices_of(tree).items()}
            for tree in (PARAMS, given, received)
        )
        changes = []
        for name, matrix in weights.items():
            radius = max(norm(matrix), 0.5 * matrix.shape[-1] ** 0.5)
            end = matrix + steps[name]
            if name == "last" and norm(end) > radius:
                # It makes the outputs.
                radius += (
                    0.25 * max(np.sum(steps[name] * matrix), 0) / norm(matrix)
                    if norm(matrix)
                    else norm(steps[name]) * 0.25
                )
                np.testing.assert_allclose(after.radius["Dense_0"], radius, rtol=1e-6)
            expected = end * min(1, radius / norm(end)) - matrix
            np.testing.assert_allclose(found[name], expected, rtol=2e-5, atol=1e-6)
            if norm(end) < radius:
                np.testing.assert_array_equal(found[name], steps[name])
            if norm(matrix):
                changes.append(norm(expected) / norm(matrix))
        np.testing.assert_allclose(after.relative_change, max(changes), rtol=1e-5)
        for name in ("Conv_0", "DenseGeneral_0", "positions", "blocks/Dense_0"):
            np.testing.assert_array_equal(after.radius[name], state.radius[name])
        norms = received["blocks"]["LayerNorm_0"]
        jax.tree.map(np.testing.assert_array_equal, norms, given["blocks"]["LayerNorm_0"])


def joined(kernel, bias):
    rows = kernel.reshape(-1, kernel.shape[-1])
    return rows if bias is None else np.concatenate([rows, bias[None]])


def test_an_infinite_radius_is_no_ball():
    transformation = tkfac.keep_in_norm_ball(LAYERS, radius=jnp.inf)
    received, _ = transformation.update(UPDATES, transformation.init(PARAMS), PARAMS)
    jax.tree.map(np.testing.assert_array_equal, received, UPDATES)


@pytest.mark.parametrize("make", [tkfac.scale_by_layer_norm_ratio, tkfac.keep_in_norm_ball])
def test_hidden_parameters_pass_through(make):
    hidden = {"Conv_0": optax.MaskedNode(), "positions": optax.MaskedNode()}
    transformation = make(LAYERS)
    received, _ = transformation.update(
        UPDATES | hidden, transformation.init(PARAMS | hidden), PARAMS | hidden
    )
    expected, _ = transformation.update(UPDATES, transformation.init(PARAMS), PARAMS)
    assert received["Conv_0"] == received["positions"] == optax.MaskedNode()
    for name in ("DenseGeneral_0", "Dense_0", "blocks"):
        jax.tree.map(np.testing.assert_array_equal, received[name], expected[name])


def test_low_precision_is_measured_in_float32():
    """In bfloat16 the squares of 4,096 ones would not add up."""
    _, _, _, _, layers = mlp_problem()
    params = {"table": jnp.ones((64, 64), jnp.bfloat16)}
    updates = {"table": jnp.full((64, 64), 0.5, jnp.bfloat16)}
    transformation = tkfac.scale_by_layer_norm_ratio(tkfac.Layers(()))
    received, _ = transformation.update(updates, transformation.init(params), params)
    assert received["table"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(received["table"].astype(float), 1.0)
    del layers


@pytest.mark.parametrize("make", [tkfac.scale_by_layer_norm_ratio, tkfac.keep_in_norm_ball])
def test_messages(make, unchecked):
    with pytest.raises(ValueError, match="expected what find_layers"):
        make({"Dense_0": 1})
    with pytest.raises(ValueError, match="expected a number of at least 0"):
        make(LAYERS, -1.0)
    transformation = make(LAYERS)
    state = transformation.init(PARAMS)
    with pytest.raises(ValueError, match="needs the parameters"):
        transformation.update(UPDATES, state)
    with pytest.raises(ValueError, match="'Dense_0': params should hold"):
        transformation.update(UPDATES, state, PARAMS | {"Dense_0": {}})
    with pytest.raises(ValueError, match="do not hold the same parameters"):
        transformation.update(UPDATES, state, PARAMS | {"positions": jnp.ones(3)})


def test_no_dtype_and_no_rank_is_promoted_in_silence():
    """With 64 bits enabled, as here, float32 stays float32."""
    params, updates = (
        jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree) for tree in (PARAMS, UPDATES)
    )
    transformation = optax.chain(
        nesterov_momentum(0.9),
        scale_by_adam_without_epsilon(),
        tkfac.scale_by_layer_norm_ratio(LAYERS),
        optax.scale(-0.1),
        tkfac.keep_in_norm_ball(LAYERS),
    )
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        state = transformation.init(params)
        received, after = transformation.update(updates, state, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(received)} == {jnp.dtype(jnp.float32)}
    kinds = [[leaf.dtype for leaf in jax.tree.leaves(tree)] for tree in (state, after)]
    assert kinds[0] == kinds[1]


def test_weights_whose_norm_overflows_keep_their_radius():
    params, updates = (
        jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree) for tree in (PARAMS, UPDATES)
    )
    transformation = tkfac.keep_in_norm_ball(LAYERS, output_growth=0.0)
    state = transformation.init(params)
    huge = jax.tree.map(lambda leaf: leaf * 1e20, params)
    received, after = transformation.update(updates, state, huge)
    jax.tree.map(np.testing.assert_array_equal, after.radius, state.radius)
    assert np.isfinite(after.relative_change)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(received))
