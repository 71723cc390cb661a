import jax.numpy as jnp
import numpy as np
import pytest

from tkfac_jax.curvature.factors import (
    KroneckerFactors,
    average_factors,
    average_moments,
    decay_at,
    kronecker_factors,
)
from tkfac_jax.fisher.layer_statistics import LayerStatistics


def moments(seed, scale=1.0):
    """Statistics of random rows, as the trace-restricted rule gives them."""
    rng = np.random.default_rng(seed)
    a, g = rng.normal(size=(7, 4)), scale * rng.normal(size=(7, 3))
    a2, g2 = (a * a).sum(1), (g * g).sum(1)
    return LayerStatistics(
        *(jnp.asarray(m) for m in ((a * g2[:, None]).T @ a, (g * a2[:, None]).T @ g, a2 @ g2))
    )


def test_factors_have_trace_one_and_carry_the_trace_in_delta():
    statistics = moments(0)
    phi, psi, delta = kronecker_factors(statistics)
    np.testing.assert_allclose([np.trace(phi), np.trace(psi)], 1, rtol=1e-12)
    assert float(delta) == float(statistics.trace)
    np.testing.assert_allclose(delta * phi, statistics.input_moment, rtol=1e-12)


def test_a_dead_layer_has_zero_factors():
    zero = LayerStatistics(jnp.zeros((4, 4)), jnp.zeros((3, 3)), jnp.zeros(()))
    for array in kronecker_factors(zero):
        np.testing.assert_array_equal(array, 0)


def test_averages_of_factors():
    old, new = ({"a": KroneckerFactors(*moments(seed))} for seed in (0, 1))
    received = average_factors(old, new, jnp.asarray(0.9))["a"]
    for r, o, n in zip(received, old["a"], new["a"], strict=True):
        np.testing.assert_allclose(r, 0.9 * o + 0.1 * n, rtol=1e-12)


def test_averages_of_moments_keep_the_trace_identity():
    """Averaging moments is linear: it gives the factors of the averaged statistics."""
    first, second = moments(0), moments(1, scale=5.0)
    received = average_moments(
        {"a": kronecker_factors(first)}, {"a": kronecker_factors(second)}, jnp.asarray(0.7)
    )["a"]
    mean = LayerStatistics(*(0.7 * o + 0.3 * n for o, n in zip(first, second, strict=True)))
    for r, e in zip(received, kronecker_factors(mean), strict=True):
        np.testing.assert_allclose(r, e, rtol=1e-12)
    np.testing.assert_allclose(np.trace(received.phi), 1, rtol=1e-12)


@pytest.mark.parametrize(
    ("decay", "updates", "expected"),
    [
        (0.95, 0, 0.0),
        (0.95, 3, 0.95),
        (lambda n: jnp.minimum(0.95, 1 - 1 / (n + 1)), 0, 0.0),
        (lambda n: jnp.minimum(0.95, 1 - 1 / (n + 1)), 3, 0.75),
        (lambda n: 0.5, 0, 0.5),
    ],
)
def test_decay(decay, updates, expected):
    assert float(decay_at(decay, jnp.asarray(updates))) == pytest.approx(expected)
