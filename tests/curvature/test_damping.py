import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from networks import spec

import tkfac_jax as tkfac
from tkfac_jax.curvature.factors import KroneckerFactors
from tkfac_jax.linalg.factor_structure import dense

KINDS = {"conv_0": "conv", "conv_1": "conv", "dense": "dense"}
LAYERS = {
    name: spec(4 + i, 3, kind=kind, name=name) for i, (name, kind) in enumerate(KINDS.items())
}
STEP = jnp.asarray(3)


def factors(deltas, dtype=jnp.float64):
    made = {}
    for i, (name, delta) in enumerate(zip(LAYERS, deltas, strict=True)):
        rng = np.random.default_rng(i)
        sides = []
        for size in (4 + i, 3):
            root = rng.normal(size=(size, size))
            sides.append(jnp.asarray(root @ root.T / np.sum(root * root), dtype))
        made[name] = KroneckerFactors(*sides, jnp.asarray(delta, dtype))
    return made


def numpy_form(made):
    return {n: (np.asarray(f.phi), np.asarray(f.psi), float(f.delta)) for n, f in made.items()}


def assert_damped(received, expected):
    for name, (phi, psi) in expected.items():
        np.testing.assert_allclose(received[name].phi, phi, rtol=1e-12)
        np.testing.assert_allclose(received[name].psi, psi, rtol=1e-12)


@pytest.mark.parametrize(
    "value",
    [0.03, lambda step: 0.01 * step, jnp.asarray(0.03)],
    ids=["number", "schedule", "array"],
)
def test_normal_damping(value):
    made = factors([0.5, 2.0, 1e-3])
    received = jax.jit(lambda f: tkfac.normal_damping(value).damp(f, LAYERS, STEP))(made)
    assert_damped(
        received, {n: oracles.normal_damping(f, 0.03) for n, f in numpy_form(made).items()}
    )
    assert float(received["dense"].delta) == 1e-3


@pytest.mark.parametrize("deltas", [[0.5, 2.0, 7.0], [1e-4, 2.0, 7.0], [1e-9, 1e-3, 1e-5]], ids=str)
@pytest.mark.parametrize("floor", [0.01, lambda step: step / 300], ids=["number", "schedule"])
def test_trace_damping(deltas, floor):
    made = factors(deltas)
    received = tkfac.trace_damping(floor, 0.03).damp(made, LAYERS, STEP)
    assert_damped(received, oracles.trace_damping(numpy_form(made), KINDS, 0.01, 0.03))


@pytest.mark.parametrize(
    ("delta", "floor"),
    # The smallest numbers are 0 to a CPU that flushes them; of the last the ratio to the floor overflows.
    [(0.0, 0.01), (1e-45, 0.01), (1e-38, 0.01), (1.2e-38, 10.0)],
)
def test_trace_damping_stays_finite_for_dead_layers(delta, floor):
    made = factors([delta, 0.3, 2.0], jnp.float32)
    received = tkfac.trace_damping(floor, 0.03).damp(made, LAYERS, STEP)
    for leaf in jax.tree.leaves(received):
        assert bool(jnp.isfinite(leaf).all())
    if delta == 0:
        alive = tkfac.trace_damping(0.01, 0.03).damp(
            factors([1.0, 0.3, 2.0], jnp.float32), LAYERS, STEP
        )
        np.testing.assert_array_equal(received["dense"].phi, alive["dense"].phi)


def test_factored_damping_is_that_of_kfac():
    """With phi = A, psi = G and delta = 1 it is A + pi sqrt(lambda) I, G + sqrt(lambda) / pi I."""
    made = {n: f._replace(phi=5 * f.phi, delta=jnp.ones(())) for n, f in factors([1, 1, 1]).items()}
    received = tkfac.factored_damping(0.09).damp(made, LAYERS, STEP)
    for name, (a, g, _) in made.items():
        pi = np.sqrt((np.trace(a) / len(a)) / (np.trace(g) / len(g)))
        np.testing.assert_allclose(received[name].phi, a + pi * 0.3 * np.eye(len(a)), rtol=1e-12)
        np.testing.assert_allclose(received[name].psi, g + 0.3 / pi * np.eye(len(g)), rtol=1e-12)


def test_factored_damping_of_a_dead_layer():
    dead = {n: jax.tree.map(jnp.zeros_like, f) for n, f in factors([1, 1, 1]).items()}
    received = tkfac.factored_damping(0.09).damp(dead, LAYERS, STEP)
    np.testing.assert_allclose(received["dense"].phi, 0.3 * np.eye(6), rtol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: tkfac.normal_damping(-1e-3),
            "damping=-0.001; expected a positive number, a schedule",
        ),
        (lambda: tkfac.normal_damping(0), "damping=0; expected a positive number"),
        (lambda: tkfac.normal_damping(float("nan")), "damping=nan; expected a positive number"),
        (
            lambda: tkfac.trace_damping(0.0, 1e-3),
            "floor of trace damping=0.0; expected a positive number",
        ),
        (lambda: tkfac.trace_damping(1e-3, -1.0), "dense_damping=-1.0; expected a positive number"),
        (lambda: tkfac.factored_damping(0.0), "damping=0.0; expected a positive number"),
    ],
)
def test_messages(make, message, unchecked):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("large", ["full", "diagonal", "blocks"])
@pytest.mark.parametrize(
    "share", [0.2, lambda step: step / 15, jnp.asarray(0.2)], ids=["number", "schedule", "array"]
)
def test_relative_damping(share, large):
    """Each factor has trace 1, and a share of its mean eigenvalue more on the diagonal, whatever its scale."""
    layers = {"first": spec(7, 5, name="first", large=(3, large))}
    received, wanted = [], []
    for scale in (1.0, 1e-12, 3e9):
        rng = np.random.default_rng(0)
        whole = [scale * (root @ root.T) for root in (rng.normal(size=(n, n)) for n in (7, 5))]
        structures = layers["first"].phi, layers["first"].psi
        stored = [in_structure(s, m) for s, m in zip(structures, whole, strict=True)]
        made = {"first": KroneckerFactors(*map(jnp.asarray, stored), jnp.asarray(scale))}
        damped = jax.jit(lambda f: tkfac.relative_damping(share).damp(f, layers, STEP))(made)
        received.append(damped["first"])
        wanted.append([m / np.trace(m) + 0.2 / len(m) * np.eye(len(m)) for m in whole])
    for factors_, matrices in zip(received, wanted, strict=True):
        for structure, factor, matrix in zip(structures, factors_[:2], matrices, strict=True):
            kept = dense(structure, jnp.ones_like(factor)) > 0
            np.testing.assert_allclose(dense(structure, factor), matrix * kept, rtol=1e-12)


def in_structure(structure, matrix):
    """What is stored of a matrix; the last block is filled up with zeros."""
    if structure.kind == "full":
        return matrix
    if structure.kind == "diagonal":
        return np.diagonal(matrix)
    n, size = structure.num_blocks, structure.block
    padded = np.zeros((n * size, n * size))
    padded[: len(matrix), : len(matrix)] = matrix
    return np.stack([padded[i : i + size, i : i + size] for i in range(0, n * size, size)])


def test_a_layer_without_signal_is_damped_as_an_identity():
    made = jax.tree.map(jnp.zeros_like, factors([0.0, 0.0, 0.0]))
    received = tkfac.relative_damping(0.5).damp(made, LAYERS, STEP)
    for name, layer in LAYERS.items():
        np.testing.assert_allclose(received[name].phi, 1.5 / layer.d_in * np.eye(layer.d_in))
        np.testing.assert_allclose(received[name].psi, 1.5 / 3 * np.eye(3))


def test_relative_damping_knows_no_power_of_two():
    made = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), factors([0.5, 2.0, 1e-3]))
    damp = jax.jit(lambda f: tkfac.relative_damping(0.2).damp(f, LAYERS, STEP))
    received = damp(jax.tree.map(lambda leaf: leaf * 2.0**-40, made))
    for name, expected in damp(made).items():
        np.testing.assert_array_equal(received[name].phi, expected.phi)
        np.testing.assert_array_equal(received[name].psi, expected.psi)


@pytest.mark.parametrize("share", [0.0, -0.1, float("nan")])
def test_a_share_is_positive(share):
    with pytest.raises(ValueError, match="share of relative damping"):
        tkfac.relative_damping(share)
