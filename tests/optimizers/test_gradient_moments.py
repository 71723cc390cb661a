import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tkfac_jax.optimizers.gradient_moments import nesterov_momentum, scale_by_adam_without_epsilon

TRANSFORMATIONS = {
    "momentum": (lambda: nesterov_momentum(0.9), lambda: optax.trace(0.9, nesterov=True)),
    "Adam": (
        lambda: scale_by_adam_without_epsilon(0.8, 0.95),
        lambda: optax.scale_by_adam(0.8, 0.95, eps=0.0),
    ),
}
PARAMS = {"a": jnp.zeros((3, 2)), "b": jnp.zeros(4)}


def gradients(step):
    random = np.random.default_rng(step)
    return jax.tree.map(lambda p: jnp.asarray(random.normal(size=p.shape)), PARAMS)


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_they_are_those_of_optax(name):
    ours, theirs = (make() for make in TRANSFORMATIONS[name])
    state, other = ours.init(PARAMS), theirs.init(PARAMS)
    for step in range(4):
        received, state = ours.update(gradients(step), state)
        expected, other = theirs.update(gradients(step), other)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), received, expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_what_is_not_finite_does_not_enter(name, bad):
    ours = TRANSFORMATIONS[name][0]()
    _, state = ours.update(gradients(0), ours.init(PARAMS))
    given = gradients(1)
    received, after = ours.update(given | {"a": given["a"].at[1, 1].set(bad)}, state)
    good, expected = ours.update(given, state)
    np.testing.assert_array_equal(received["b"], good["b"])
    for field in after._fields:
        kept, new = getattr(after, field), getattr(expected, field)
        np.testing.assert_array_equal(kept["a"], getattr(state, field)["a"])
        np.testing.assert_array_equal(kept["b"], new["b"])
    if name == "Adam":
        assert not received["a"].any()
    else:
        # What preconditions and counts must see it.
        assert not np.isfinite(received["a"]).all()


def test_no_step_where_there_was_no_gradient():
    ours = scale_by_adam_without_epsilon()
    given = {"a": jnp.zeros((3, 2)).at[0].set(1e-30), "b": jnp.zeros(4)}
    received, _ = ours.update(given, ours.init(PARAMS))
    np.testing.assert_array_equal(received["b"], 0)
    np.testing.assert_allclose(received["a"][0], 1, rtol=1e-6)


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_low_precision_is_averaged_in_float32(name):
    ours = TRANSFORMATIONS[name][0]()
    given = jax.tree.map(lambda g: g.astype(jnp.bfloat16), gradients(0))
    received, state = ours.update(given, ours.init(given))
    assert {leaf.dtype for leaf in jax.tree.leaves(received)} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_what_overflows_in_an_average_does_not_enter_either(name):
    ours = TRANSFORMATIONS[name][0]()
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), PARAMS)
    given = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), gradients(0))
    _, state = ours.update(given, ours.init(params))
    _, after = ours.update(jax.tree.map(lambda leaf: jnp.full_like(leaf, 3e38), given), state)
    jax.tree.map(np.testing.assert_array_equal, after, state)
