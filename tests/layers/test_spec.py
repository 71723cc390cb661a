import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from networks import convnet_problem, mlp_problem

import tkfac_jax as tkfac
from tkfac_jax.layers.kernel_uses import NORM


def test_table_shows_layers_memory_and_fallback():
    *_, layers = convnet_problem()
    lines = str(layers).splitlines()
    assert lines[0].split() == ["layer", "kind", "d_in", "d_out", "MB"]
    # Two factors and two inverses in float32: 2 * (19^2 + 4^2) * 4 bytes.
    assert lines[2].split() == ["Conv_0", "conv", "19", "4", "0.003"]
    assert lines[3].split() == ["Dense_0", "dense", "37", "3", "0.011"]
    assert lines[4].split() == ["total", "0.014"]
    assert f"  BatchNorm_0/scale: {NORM}" in lines
    assert repr(layers) == str(layers)


def test_layers_are_hashable_equal_and_immutable():
    predict, params, x, _, one = mlp_problem()
    two = tkfac.find_layers(predict, params, x)
    assert one is not two
    assert one == two
    assert hash(one) == hash(two)
    assert one != "layers"
    with pytest.raises(TypeError):
        one["Dense_0"] = None
    with pytest.raises(TypeError):
        one.fallback["x"] = "y"


def test_parameters_of_another_model_are_refused():
    predict, params, x, _, layers = mlp_problem()
    other = {**params, "Dense_0": {"kernel": jnp.ones((9, 5)), "bias": params["Dense_0"]["bias"]}}
    for call in (
        lambda p: tkfac.scale_by_tkfac(layers).init(p),
        lambda p: tkfac.sampled_fisher(predict, tkfac.Categorical(), layers)(
            p, x, key=jax.random.key(0)
        ),
    ):
        with pytest.raises(
            ValueError,
            match=r"layer 'Dense_0': params should hold 'Dense_0/kernel' of shape \(4, 5\); found \(9, 5\)",
        ):
            call(other)
        with pytest.raises(ValueError, match=r"'Dense_0/kernel' of shape \(4, 5\); found nothing"):
            call({"Dense_1": params["Dense_1"]})
    half = {**params, "Dense_0": {**params["Dense_0"], "bias": optax.MaskedNode()}}
    with pytest.raises(ValueError, match="layer 'Dense_0': mask its kernel and its bias together"):
        tkfac.scale_by_tkfac(layers).init(half)


def test_memory_is_that_of_the_state(set_constant):
    set_constant("tkfac_jax.layers.spec.LARGEST_JOINED", 20)
    predict, params, x, *_ = mlp_problem()
    layers = tkfac.find_layers(predict, params, x)
    state = tkfac.scale_by_tkfac(layers).init(params)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves((state.factors, state.inverses)))
    scalars = sum(factors.delta.nbytes for factors in state.factors.values())
    counted = sum(spec.num_bytes for spec in layers.values())
    # Where the bias's row of an inverse is kept apart, it is kept once, not as row and column.
    duplicate = sum(
        np.dtype(s.dtype).itemsize * (s.d_in - 1)
        for name, s in layers.items()
        if state.inverses[name].bias is not None
    )
    assert duplicate > 0
    assert held - scalars == counted - duplicate
