import jax
import jax.numpy as jnp
import numpy as np
import pytest
from damped_factors import layers_of
from jax.sharding import AxisType

import tkfac_jax as tkfac
from tkfac_jax.curvature.inverses import invert_factors
from tkfac_jax.linalg.divided_stacks import Devices, Piece, Stack, deal, map_matrices


def test_one_device_inverts_each_size_in_one_stack():
    assert deal({5: 2, 3: 7}, 1) == [[Piece(5, 0, 2)], [Piece(3, 0, 7)]]


def test_nearly_equal_sizes_are_one_stack():
    assert deal({30: 1, 31: 2, 1000: 3, 1001: 1, 994: 1, 993: 1}, 1) == [
        [Piece(1001, 0, 1), Piece(1000, 0, 3), Piece(994, 0, 1)],
        [Piece(993, 0, 1)],
        [Piece(31, 0, 2), Piece(30, 0, 1)],
    ]
    # What fills up a round is counted with them.
    assert deal({31: 2, 30: 1, 9: 2}, 4) == [
        [Piece(31, 0, 2), Piece(30, 0, 1), Piece(9, 0, 1)],
        [Piece(9, 1, 2)],
    ]


def test_matrices_are_dealt_out_in_rounds_the_largest_first():
    # Two rounds of size 9, the second filled with a 7; one of 7, filled with both of size 2.
    assert deal({2: 2, 9: 7, 7: 3}, 4) == [
        [Piece(9, 0, 7), Piece(7, 0, 1)],
        [Piece(7, 1, 3), Piece(2, 0, 2)],
    ]
    assert deal({4: 1}, 8) == [[Piece(4, 0, 1)]]


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
def test_every_matrix_is_dealt_once_and_no_device_has_more_rounds_than_needed(devices):
    counts = {100: 3, 90: 1, 64: 12, 10: 5, 9: 1}
    stacks = deal(counts, devices)
    dealt = {size: [] for size in counts}
    for pieces in stacks:
        assert [p.size for p in pieces] == sorted((p.size for p in pieces), reverse=True)
        for piece in pieces:
            dealt[piece.size] += range(piece.start, piece.stop)
    assert {size: sorted(members) for size, members in dealt.items()} == {
        size: list(range(count)) for size, count in counts.items()
    }
    rounds = sum(-(-sum(p.stop - p.start for p in pieces) // devices) for pieces in stacks)
    assert rounds == -(-sum(counts.values()) // devices)


def on_devices(how, count, function, tree):
    """Calls a function of the devices and a tree that all of them hold."""
    if how == "mesh":
        mesh = jax.make_mesh((count,), ("d",), axis_types=(AxisType.Auto,))
        return jax.jit(lambda tree: function(Devices(mesh=mesh), tree))(tree)
    mapped = jax.pmap(
        lambda tree: function(Devices(axis_name="d"), tree),
        axis_name="d",
        devices=jax.devices()[:count],
    )(jax.tree.map(lambda leaf: jnp.stack([leaf] * count), tree))
    return jax.tree.map(lambda leaf: leaf[-1], mapped)


@pytest.mark.parametrize("how", ["mesh", "pmap"])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize(
    "inverse",
    [tkfac.cholesky_inverse, tkfac.newton_schulz_inverse(max_iterations=30, tolerance=1e-5)],
    ids=["cholesky", "newton_schulz"],
)
def test_divided_inverses_are_the_inverses(how, count, inverse):
    sizes = [(5, 3), (5, 5), (2, 3), (4, 4), (4, 6)]
    layers, factors, old = layers_of(sizes, [True, False, True, False, True])
    # One that fails, and one at the scale of rounding, next to what it is filled up with.
    factors["layer_1"] = factors["layer_1"]._replace(psi=jnp.full((5, 5), jnp.nan))
    factors["layer_2"] = factors["layer_2"]._replace(phi=1e-12 * factors["layer_2"].phi)
    received, failures = on_devices(
        how,
        count,
        lambda devices, factors: invert_factors(factors, old, layers, inverse, devices),
        factors,
    )
    assert {name: int(number) for name, number in failures.items()} == {
        name: int(name == "layer_1") for name in layers
    }
    for name, inverse in received.items():
        np.testing.assert_allclose(
            inverse.phi_matrix(), np.linalg.inv(factors[name].phi), rtol=1e-8
        )
        psi = 7 * np.eye(5) if name == "layer_1" else np.linalg.inv(factors[name].psi)
        np.testing.assert_allclose(inverse.psi, psi, rtol=1e-8)


@pytest.mark.parametrize("how", ["mesh", "pmap"])
def test_each_device_is_given_its_share_only(how):
    count, shapes = 4, []

    def watched(stack):
        shapes.append(stack.matrices.shape)
        return stack.matrices, jnp.ones(len(stack.matrices), bool)

    # In parts, of which the last one is divided: a matrix of it fills up the round of the larger ones.
    matrices = np.random.default_rng(0).normal(size=(9, 6, 6))
    groups = {
        6: [Stack(jnp.asarray(matrices[:4])), Stack(jnp.asarray(matrices[4:]))],
        3: [Stack(jnp.asarray(matrices[:2, :3, :3])), Stack(jnp.asarray(matrices[2:5, :3, :3]))],
    }
    received = on_devices(
        how, count, lambda devices, groups: map_matrices(watched, groups, devices), groups
    )
    # Nine of size 6 and three of size 3 are three rounds of four devices; two of size 3 are left.
    assert set(shapes) == {(3, 6, 6), (1, 3, 3)}
    for size, (stack, _) in received.items():
        given = [part.matrices for part in groups[size]]
        np.testing.assert_array_equal(stack, jnp.concatenate(given))
