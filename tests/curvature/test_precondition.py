import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from networks import convnet_problem, mlp_problem, spec

import tkfac_jax as tkfac
from tkfac_jax.curvature.precondition import precondition, precondition_kernel
from tkfac_jax.layers.kernel_matrix import Layout


def positive_definite(seed, size):
    root = np.random.default_rng(seed).normal(size=(size, size))
    return root @ root.T + np.eye(size)


def conv_or_dense_spec(shape, has_bias):
    *rows, _ = range(len(shape))
    bias = ((len(rows),), 1) if has_bias else ((), 0)
    layout = Layout(shape, (), tuple(rows), (len(rows),), *bias)
    d_in = int(np.prod(shape[:-1])) + has_bias
    return dataclasses.replace(spec(d_in, shape[-1], has_bias=has_bias), layout=layout)


@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 2, 3)])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("largest_joined", [0, 2**16])
def test_preconditioning_is_a_dense_solve_with_the_kronecker_product(
    shape, has_bias, largest_joined, monkeypatch
):
    monkeypatch.setattr("tkfac_jax.layers.spec.LARGEST_JOINED", largest_joined)
    rng = np.random.default_rng(0)
    kernel, bias = rng.normal(size=shape), rng.normal(size=shape[-1])
    d_in = int(np.prod(shape[:-1])) + has_bias
    phi, psi = positive_definite(1, d_in), positive_definite(2, shape[-1])
    matrix = kernel.reshape(-1, shape[-1])
    if has_bias:
        matrix = np.concatenate([matrix, bias[None]])
    # Rows of the matrix one after the other, so that phi is the outer factor.
    expected = np.linalg.solve(np.kron(phi, psi), matrix.reshape(-1)).reshape(matrix.shape)

    layer = conv_or_dense_spec(shape, has_bias)
    inverses = tkfac.KroneckerInverses.from_factors(
        layer, jnp.asarray(np.linalg.inv(phi)), jnp.asarray(np.linalg.inv(psi))
    )
    kernel_step, bias_step, finite = precondition_kernel(
        layer, inverses, jnp.asarray(kernel), jnp.asarray(bias) if has_bias else None
    )
    assert finite
    rows = matrix[:-1] if has_bias else matrix
    np.testing.assert_allclose(
        kernel_step.reshape(rows.shape), expected[: len(rows)], rtol=1e-10, atol=1e-13
    )
    if has_bias:
        np.testing.assert_allclose(bias_step, expected[-1], rtol=1e-10, atol=1e-13)
    else:
        assert bias_step is None


def identity_inverses(layers, scale=1.0):
    return {
        name: tkfac.KroneckerInverses.from_factors(
            s, scale * jnp.eye(s.d_in, dtype=s.dtype), jnp.eye(s.d_out, dtype=s.dtype)
        )
        for name, s in layers.items()
    }


def test_other_leaves_pass_through_unchanged():
    _, params, *_, layers = convnet_problem()
    hidden = {**params, "BatchNorm_0": optax.MaskedNode()}
    for tree in (params, hidden):
        received, good = precondition(tree, identity_inverses(layers, 2.0), layers)
        assert all(good.values())
        assert jax.tree.structure(received) == jax.tree.structure(tree)
        assert received["BatchNorm_0"] is tree["BatchNorm_0"] or all(
            received["BatchNorm_0"][k] is tree["BatchNorm_0"][k] for k in ("bias", "scale")
        )
        np.testing.assert_allclose(received["Conv_0"]["kernel"], 2 * params["Conv_0"]["kernel"])


def test_dtypes_are_those_of_the_gradients():
    _, params, *_, layers = convnet_problem()
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    received, _ = precondition(half, identity_inverses(layers), layers, norm_constraint=1e-3)
    assert {leaf.dtype for leaf in jax.tree.leaves(received)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("bound", [1e-3, 1e6])
def test_norm_constraint(bound):
    _, params, *_, layers = mlp_problem()
    free, _ = precondition(params, identity_inverses(layers, 3.0), layers)
    bounded, _ = precondition(params, identity_inverses(layers, 3.0), layers, norm_constraint=bound)
    product = sum(
        float(jnp.vdot(a, b))
        for a, b in zip(jax.tree.leaves(free), jax.tree.leaves(params), strict=True)
    )
    scale = min(1.0, np.sqrt(bound / product))
    assert (scale < 1) == (bound < 1)
    jax.tree.map(lambda b, f: np.testing.assert_allclose(b, scale * f, rtol=1e-12), bounded, free)


def test_norm_constraint_of_a_zero_gradient():
    _, params, *_, layers = mlp_problem()
    zero = jax.tree.map(jnp.zeros_like, params)
    received, _ = precondition(zero, identity_inverses(layers), layers, norm_constraint=0.1)
    for leaf in jax.tree.leaves(received):
        np.testing.assert_array_equal(leaf, 0)


@pytest.mark.parametrize("norm_constraint", [None, 0.1])
@pytest.mark.parametrize("bad", ["nan gradient", "overflow"])
def test_a_layer_whose_step_is_not_finite_makes_none(bad, norm_constraint):
    _, params, *_, layers = mlp_problem()
    inverses = identity_inverses(layers)
    gradient = params
    if bad == "nan gradient":
        kernel = params["Dense_1"]["kernel"].at[0, 0].set(jnp.nan)
        gradient = params | {"Dense_1": {"kernel": kernel}}
    else:
        inverses["Dense_1"] = jax.tree.map(lambda inverse: 1e200 * inverse, inverses["Dense_1"])
    received, good = precondition(gradient, inverses, layers, norm_constraint)
    assert {name: bool(flag) for name, flag in good.items()} == {
        "Dense_0": True,
        "Dense_1": False,
        "Dense_2": True,
    }
    np.testing.assert_array_equal(received["Dense_1"]["kernel"], 0)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(received))
    assert float(jnp.abs(received["Dense_0"]["kernel"]).max()) > 0


def test_a_product_that_overflows_is_a_long_step():
    _, params, *_, layers = mlp_problem()
    huge = jax.tree.map(lambda leaf: 1e200 * jnp.sign(leaf + 0.01), params)
    received, _ = precondition(huge, identity_inverses(layers), layers, norm_constraint=1.0)
    assert all(bool((leaf == 0).all()) for leaf in jax.tree.leaves(received))


def test_the_norm_constraint_needs_no_conditional():
    """XLA would write all steps out for its branches."""
    _, params, *_, layers = convnet_problem()
    constrained = lambda tree: precondition(tree, identity_inverses(layers), layers, 0.1)[0]  # noqa: E731
    assert " cond[" not in str(jax.make_jaxpr(constrained)(params))


@pytest.mark.parametrize("largest_joined", [0, 2**16])
@pytest.mark.parametrize("dtypes", [("float16", "float16"), ("float16", "float32")])
@pytest.mark.parametrize("where", ["kernel", "bias"])
def test_steps_that_overflow_in_the_dtype_of_their_gradient_are_zero(
    where, dtypes, largest_joined, monkeypatch
):
    """Also where kernel and bias have different dtypes, and only one of them is too large."""
    monkeypatch.setattr("tkfac_jax.layers.spec.LARGEST_JOINED", largest_joined)
    layer = conv_or_dense_spec((4, 3), has_bias=True)
    # The last row is the bias's.
    scale = np.array([2.0, 2, 2, 2, 1] if where == "kernel" else [1.0, 1, 1, 1, 2])
    inverses = tkfac.KroneckerInverses.from_factors(
        layer, jnp.asarray(np.diag(scale * 600)), jnp.eye(3)
    )
    kernel, bias = jnp.full((4, 3), 100, dtypes[0]), jnp.full(3, 100, dtypes[1])
    kernel_step, bias_step, finite = precondition_kernel(layer, inverses, kernel, bias)
    assert (kernel_step.dtype, bias_step.dtype) == dtypes
    # 120,000 is more than a float16 holds.
    assert bool(finite) == (dict(zip(("kernel", "bias"), dtypes, strict=True))[where] == "float32")
    np.testing.assert_array_equal(kernel_step, 60_000 if finite else 0)
    np.testing.assert_array_equal(bias_step, 120_000 if finite else 0)
