"""The state before the first statistics."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import counted_compilations
from networks import spec

import tkfac_jax as tkfac
from tkfac_jax.curvature.damping import NormalDamping, Value
from tkfac_jax.curvature.damping_argument import DampingArgument
from tkfac_jax.layers.spec import Layers


def layers_of(sizes):
    """Layers without bias, and parameters of theirs."""
    specs = [
        dataclasses.replace(spec(*size, name=f"layer_{i}"), kernel=f"layer_{i}/kernel")
        for i, size in enumerate(sizes)
    ]
    return Layers(tuple(specs)), {s.name: {"kernel": np.zeros(s.kernel_shape)} for s in specs}


def first_inverse(damping):
    layers, params = layers_of([(3, 2)])
    return tkfac.scale_by_tkfac(layers, damping=damping).init(params).inverses["layer_0"].phi


class Shifted(NamedTuple):
    """A damping that equals `NormalDamping(value)` as a tuple, and is another."""

    value: Value

    def damp(self, factors, layers, step):
        return tkfac.normal_damping(4 * self.value).damp(factors, layers, step)


@dataclasses.dataclass
class Mutable:
    """A damping that is no tree and cannot be hashed."""

    value: Value

    def damp(self, factors, layers, step):
        return tkfac.normal_damping(self.value).damp(factors, layers, step)


def test_a_process_compiles_one_program_for_the_factors_of_all_sizes():
    layers, params = layers_of([(3 + 2 * i, 4 + 2 * i) for i in range(6)])
    jax.clear_caches()
    with counted_compilations() as compiled:
        state = tkfac.scale_by_tkfac(layers).init(params)
    assert len({factor.shape for factor in jax.tree.leaves(state.factors) if factor.ndim}) == 12
    # Factors and inverses; the counters; and what puts numbers on a device.
    assert 1 <= len(compiled) <= 4


@pytest.mark.parametrize(
    ("damping", "expected"),
    [
        (0.25, 2.0),
        (lambda step: 0.04 + step, 5.0),
        (jnp.asarray(0.16), 2.5),
        (Shifted(0.25), 1.0),
        (tkfac.factored_damping(0.25), 2.0),
        (Mutable(0.04), 5.0),
        (Mutable(jnp.asarray(0.04)), 5.0),
        (NormalDamping(0.0), 1.0),
    ],
    ids=[
        "number", "schedule", "array", "another of the same tuple", "factored", "not hashable",
        "array in no tree", "none",
    ],
)  # fmt: skip
def test_the_first_inverses_are_those_of_the_damping(damping, expected):
    np.testing.assert_allclose(first_inverse(damping), expected * np.eye(3), rtol=1e-12)


def test_a_traced_damping():
    received = jax.vmap(first_inverse)(jnp.asarray([0.25, 0.04]))
    np.testing.assert_allclose(received, np.stack([2 * np.eye(3), 5 * np.eye(3)]), rtol=1e-12)


def test_dampings_as_arguments_have_one_structure_if_they_are_of_one_kind_and_of_equal_numbers():
    def structure(damping):
        return jax.tree.structure(DampingArgument(damping))

    assert structure(tkfac.normal_damping(0.25)) == structure(tkfac.normal_damping(0.25))
    assert hash(structure(tkfac.normal_damping(0.25))) == hash(
        structure(tkfac.normal_damping(0.25))
    )
    assert structure(tkfac.normal_damping(0.25)) != structure(tkfac.normal_damping(0.5))
    assert structure(tkfac.normal_damping(0.25)) != structure(Shifted(0.25))
    assert structure(Mutable(0.25)) != structure(Mutable(0.25))
    received = DampingArgument(tkfac.trace_damping(jnp.asarray(1e-3), 0.5))
    assert jax.tree.leaves(received) == [jnp.asarray(1e-3)]
    other = DampingArgument(tkfac.trace_damping(jnp.asarray(2e-3), 0.5))
    assert jax.tree.structure(received) == jax.tree.structure(other)
    assert jax.tree.map(lambda leaf: 2 * leaf, received).damping == other.damping


def test_init_and_diagnostics_compile_nothing_at_a_second_call():
    """Also by another optimizer of the same options, and with another number as damping."""
    layers, params = layers_of([(5, 3), (4, 2)])
    state = tkfac.scale_by_tkfac(layers, damping=0.3).init(params)
    tkfac.diagnostics(state, layers, damping=0.3)
    with counted_compilations() as compiled:
        tkfac.scale_by_tkfac(layers, damping=0.3).init(params)
        tkfac.diagnostics(state, layers, damping=0.4)
    assert not compiled


@pytest.mark.parametrize("damping", [-1.0, 0.0])
def test_diagnostics_refuse_a_damping_that_is_not_positive(damping):
    layers, params = layers_of([(3, 2)])
    state = tkfac.scale_by_tkfac(layers).init(params)
    with pytest.raises(ValueError, match="expected a positive number"):
        tkfac.diagnostics(state, layers, damping=damping)
