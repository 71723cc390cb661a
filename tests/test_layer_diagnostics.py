import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compilations import counted_compilations
from networks import as_float64, spec
from networks import mlp_problem as make_mlp_problem

import tkfac_jax as tkfac
from tkfac_jax.curvature.factors import kronecker_factors
from tkfac_jax.layer_diagnostics import LayerDiagnostics, diagnostics, diagnostics_table

DAMPING = 0.03


mlp_problem = functools.cache(make_mlp_problem)


def statistics_of(layers, predict, params, x):
    return jax.jit(tkfac.exact_fisher(predict, tkfac.Categorical(), layers))(params, x)


def one_update(layers, params, statistics, **options):
    """The state after one update with new inverses."""
    optimizer = tkfac.scale_by_tkfac(layers, damping=DAMPING, **options)

    @jax.jit
    def run(params, statistics):
        return optimizer.update(params, optimizer.init(params), statistics=statistics)[1]

    return run(params, statistics)


@functools.cache
def mlp_state():
    predict, params, x, _, layers = mlp_problem()
    return one_update(layers, params, statistics_of(layers, predict, params, x)), layers


@functools.cache
def initial_state():
    _, params, _, _, layers = mlp_problem()
    return tkfac.scale_by_tkfac(layers, damping=DAMPING).init(params), layers


def stacked_problem():
    """A scanned stack of Dense layers, a grouped convolution and a Dense layer."""

    class Cell(nn.Module):
        @nn.compact
        def __call__(self, carry, _):
            return jnp.tanh(nn.Dense(4, dtype=jnp.float64, name="dense")(carry)), None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            scanned = nn.scan(
                Cell, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )
            x, _ = scanned(name="stack")(x, None)
            x = nn.Conv(4, (2,), feature_group_count=2, dtype=jnp.float64, name="conv")(x)
            return nn.Dense(3, dtype=jnp.float64, name="last")(x.reshape(len(x), -1))

    x = jax.random.normal(jax.random.key(0), (5, 3, 4), jnp.float64)
    model = Net()
    params = as_float64(jax.jit(model.init)(jax.random.key(1), x)["params"])

    def predict(params, x):
        return model.apply({"params": params}, x)

    return predict, params, x, tkfac.find_layers(predict, params, x)


@pytest.mark.parametrize("averaging", ["factors", "moments"])
@pytest.mark.parametrize("large", ["full", "diagonal", "blocks"])
def test_condition_numbers_are_those_of_the_damped_factors(large, averaging):
    predict, params, x, _, whole = mlp_problem()
    layers = whole
    if large != "full":
        layers = tkfac.find_layers(predict, params, x, max_factor_size=3, large_factors=large)
    statistics = statistics_of(layers, predict, params, x)
    state = one_update(layers, params, statistics, averaging=averaging)
    full = jax.tree.map(
        kronecker_factors,
        statistics_of(whole, predict, params, x),
        is_leaf=lambda leaf: isinstance(leaf, tkfac.LayerStatistics),
    )
    received = jax.jit(lambda state: diagnostics(state, layers))(state)
    assert list(received) == list(layers)
    for name, layer in layers.items():
        for which in ("phi", "psi"):
            structure = getattr(layer, which)
            matrix = np.sqrt(full[name].delta) * np.asarray(getattr(full[name], which))
            if structure.kind == "diagonal":
                matrix = np.diag(np.diag(matrix))
            places = np.arange(structure.size) // structure.block
            kept = np.where(places[:, None] == places, matrix, 0)
            expected = np.linalg.cond(kept + np.sqrt(DAMPING) * np.eye(structure.size))
            condition = getattr(received[name], f"{which}_condition")
            np.testing.assert_allclose(condition, expected, rtol=1e-9)


def test_a_training_that_asks_again_and_again_compiles_one_program():
    state, layers = mlp_state()
    later = state._replace(step=state.step + 1)
    with counted_compilations() as compiled:
        first = diagnostics(state, layers, damping=tkfac.normal_damping(0.0625))
    assert len(compiled) == 1
    with counted_compilations() as compiled:
        second = diagnostics(later, layers, damping=tkfac.normal_damping(0.0625))
    assert not compiled
    assert [layer.age + 1 for layer in first.values()] == [layer.age for layer in second.values()]


def test_every_matrix_of_a_layer_has_its_own_numbers():
    predict, params, x, layers = stacked_problem()
    statistics = statistics_of(layers, predict, params, x)
    state = one_update(layers, params, statistics)
    received = jax.jit(lambda state: diagnostics(state, layers, damping=DAMPING))(state)
    assert {name: layer.trace.shape for name, layer in received.items()} == {
        "stack/dense": (3,),
        "conv": (2,),
        "last": (),
    }
    for name, layer in received.items():
        phi, psi, delta = kronecker_factors(statistics[name])
        np.testing.assert_allclose(layer.trace, delta, rtol=1e-12)
        root = np.sqrt(np.asarray(delta))[..., None, None]
        for factor, ratio, condition, size in (
            (phi, layer.phi_ratio, layer.phi_condition, layers[name].d_in),
            (psi, layer.psi_ratio, layer.psi_condition, layers[name].d_out),
        ):
            expected = np.linalg.cond(root * factor + np.sqrt(DAMPING) * np.eye(size))
            np.testing.assert_allclose(condition, expected, rtol=1e-9)
            np.testing.assert_allclose(ratio, np.sqrt(DAMPING) * size / delta, rtol=1e-9)


FLOOR = 0.5


def normal_shift(layer, kind):
    return np.sqrt(DAMPING), np.sqrt(DAMPING)


def trace_shift(layer, kind):
    """Eq. (5.16) for convolutions, whose trace here is below the floor."""
    if kind == "conv":
        return FLOOR / len(layer.phi), FLOOR / len(layer.psi)
    return normal_shift(layer, kind)


def factored_shift(layer, kind):
    pi = np.sqrt(np.mean(np.diag(layer.phi)) / np.mean(np.diag(layer.psi)))
    return pi * np.sqrt(DAMPING), np.sqrt(DAMPING) / pi


def relative_shift(layer, kind):
    """A share of the mean eigenvalue `delta / d` in units of it; the ratio is the share."""
    return tuple(0.3 * layer.delta * np.trace(m) / len(m) for m in (layer.phi, layer.psi))


DAMPINGS = {
    "relative": (tkfac.relative_damping(0.3), relative_shift),
    "number": (DAMPING, normal_shift),
    "schedule": (lambda step: DAMPING + 0 * step, normal_shift),
    "trace": (tkfac.trace_damping(FLOOR, DAMPING), trace_shift),
    "factored": (tkfac.factored_damping(DAMPING), factored_shift),
}


def random_factors(seed, d_in, d_out, delta):
    """Factors of trace 1; for KFAC, whose delta is 1, of any trace."""
    roots = [np.random.default_rng(seed + size).normal(size=(size, size)) for size in (d_in, d_out)]
    phi, psi = (root @ root.T / (1 if delta == 1 else np.sum(root**2)) for root in roots)
    return tkfac.KroneckerFactors(jnp.asarray(phi), jnp.asarray(psi), jnp.asarray(delta))


def stored(layer, factors):
    """Whole factors, as the layer stores them."""

    def store(structure, matrix):
        if structure.kind == "full":
            return matrix
        if structure.kind == "diagonal":
            return jnp.diagonal(matrix)
        n, size = structure.num_blocks, structure.block
        padded = jnp.zeros((n * size, n * size)).at[: len(matrix), : len(matrix)].set(matrix)
        return jnp.stack([padded[i : i + size, i : i + size] for i in range(0, n * size, size)])

    return tkfac.KroneckerFactors(
        store(layer.phi, factors.phi), store(layer.psi, factors.psi), factors.delta
    )


@pytest.mark.parametrize("averaging", ["factors", "moments"])
@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("large", ["full", "diagonal", "blocks"])
def test_ratios_are_those_of_figure_3(damping, averaging, large):
    """The added damping over the mean diagonal of `delta Phi`; blocks have padding that must not count."""
    layers = {
        "first": spec(7, 5, name="first", kind="conv", large=(3, large)),
        "second": spec(5, 4, name="second", large=(3, large)),
    }
    given, shift = DAMPINGS[damping]
    deltas = (1.0, 1.0) if damping == "factored" else (0.2, 3.0)
    whole = {
        name: random_factors(i, layer.d_in, layer.d_out, delta)
        for i, ((name, layer), delta) in enumerate(zip(layers.items(), deltas, strict=True))
    }
    factors = {name: stored(layers[name], layer) for name, layer in whole.items()}
    inverses = {
        name: tkfac.KroneckerInverses(factor.phi, factor.psi, None)
        for name, factor in factors.items()
    }
    zero = jnp.zeros((), jnp.int32)
    if averaging == "factors":
        damper = tkfac.normal_damping(given) if damping in ("number", "schedule") else given
        factors = damper.damp(factors, layers, zero)
    ages = dict.fromkeys(layers, zero)
    faults = dict.fromkeys(layers, tkfac.LayerFaults(zero, zero, zero))
    state = tkfac.TkfacState(zero, factors, inverses, zero, zero, zero, ages, zero, faults)
    received = jax.jit(
        lambda state: diagnostics(state, layers, damping=given, averaging=averaging)
    )(state)
    for name, (phi, psi, delta) in whole.items():
        phi_shift, psi_shift = shift(whole[name], layers[name].kind)
        np.testing.assert_allclose(
            received[name].phi_ratio, phi_shift / (delta * np.trace(phi) / len(phi)), rtol=1e-9
        )
        np.testing.assert_allclose(
            received[name].psi_ratio, psi_shift / (delta * np.trace(psi) / len(psi)), rtol=1e-9
        )


def test_without_the_damping_there_are_no_ratios():
    state, layers = initial_state()
    for layer in diagnostics(state, layers).values():
        assert (layer.phi_ratio, layer.psi_ratio) == (None, None)


def test_before_the_first_statistics_there_is_no_signal():
    state, layers = initial_state()
    report = diagnostics(state, layers, damping=DAMPING)
    for layer in report.values():
        assert [float(value) for value in layer[:-1]] == [0, np.inf, np.inf, 1, 1, 0]
    assert diagnostics_table(report).endswith("no signal: Dense_0, Dense_1, Dense_2")


def test_the_age_counts_updates_since_the_last_inverses():
    """Also of a layer whose inverse fails, beside one whose inverse does not."""
    predict, params, x, _, layers = mlp_problem()
    statistics = statistics_of(layers, predict, params, x)
    optimizer = tkfac.scale_by_tkfac(layers, decay=0.0)
    update = jax.jit(optimizer.update, static_argnames="refresh_inverses")
    broken = dict(statistics)
    negative = broken["Dense_1"].output_moment - 1e3 * jnp.eye(4)
    broken["Dense_1"] = broken["Dense_1"]._replace(output_moment=negative)
    run = jax.jit(lambda state: diagnostics(state, layers))
    state, ages = optimizer.init(params), []
    for given, refresh in [
        (statistics, True),
        (statistics, False),
        (broken, False),
        (broken, True),
        (statistics, True),
    ]:
        _, state = update(params, state, statistics=given, refresh_inverses=refresh)
        report = run(state)
        ages.append([int(report[name].age) for name in layers])
        if len(ages) == 4:
            assert int(optax.tree.get(state, "failed_inversions")) == 1
            assert diagnostics_table(report).endswith("failed inversions: Dense_1 (1)")
            assert [int(n) for n in report["Dense_1"].faults] == [0, 1, 0]
    assert ages == [[1, 1, 1], [2, 2, 2], [3, 3, 3], [1, 4, 1], [1, 1, 1]]


def test_the_state_is_found_in_an_optimizers():
    _, params, _, _, layers = mlp_problem()
    # Dense_1 is hidden: the state does not know it.
    mask = {name: name != "Dense_1" for name in params}
    plain = tkfac.tkfac(0.1, layers).init(params)
    masked = optax.masked(tkfac.scale_by_tkfac(layers), mask).init(params)
    assert list(diagnostics(plain, layers)) == list(layers)
    assert list(diagnostics(masked, layers, damping=DAMPING)) == ["Dense_0", "Dense_2"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_low_precision_is_not_computed_in(dtype):
    precise, layers = mlp_state()
    factors = {
        name: tkfac.KroneckerFactors(f.phi.astype(dtype), f.psi.astype(dtype), f.delta)
        for name, f in precise.factors.items()
    }
    inverses = jax.tree.map(lambda leaf: leaf.astype(dtype), precise.inverses)
    rounded = precise._replace(factors=factors, inverses=inverses)
    run = jax.jit(lambda state: diagnostics(state, layers, damping=tkfac.normal_damping(DAMPING)))
    for received, expected in zip(run(rounded).values(), run(precise).values(), strict=True):
        # Rounding of the stored numbers, multiplied by condition numbers of about ten.
        for a, b in zip(received[:-1], expected[:-1], strict=True):
            np.testing.assert_allclose(a, b, rtol=0.2 if dtype == "bfloat16" else 1e-5)
            assert a.dtype != jnp.bfloat16


def test_an_inverse_that_is_not_positive_definite_has_an_infinite_condition_number():
    state, layers = mlp_state()
    inverses = dict(state.inverses)
    inverses["Dense_0"] = inverses["Dense_0"]._replace(psi=jnp.diag(jnp.arange(5.0) - 1))
    inverses["Dense_2"] = inverses["Dense_2"]._replace(psi=jnp.full((3, 3), jnp.nan))
    report = diagnostics(state._replace(inverses=inverses), layers)
    assert report["Dense_0"].psi_condition == np.inf
    assert np.isnan(report["Dense_2"].psi_condition)
    assert diagnostics_table(report).endswith(
        "not finite: Dense_0 (psi_condition), Dense_2 (psi_condition)"
    )


def test_many_large_stacks_in_one_program_return():
    """Batched LAPACK calls of one program can wait for each other for ever; these must not."""
    layers = {
        str(size): dataclasses.replace(spec(size, size, name=str(size)), stack=(2,))
        for size in (200, 199, 198, 197, 60, 59)
    }
    zero = jnp.zeros((), jnp.int32)
    eye = {name: jnp.stack([2.0 * jnp.eye(layer.d_in)] * 2) for name, layer in layers.items()}
    state = tkfac.TkfacState(
        zero,
        {name: tkfac.KroneckerFactors(m, m, jnp.ones(2)) for name, m in eye.items()},
        {name: tkfac.KroneckerInverses(m, m, None) for name, m in eye.items()},
        *(zero, zero, zero),
        dict.fromkeys(layers, zero),
        zero,
        dict.fromkeys(layers, tkfac.LayerFaults(zero, zero, zero)),
    )
    received = jax.jit(lambda state: diagnostics(state, layers))(state)
    for layer in received.values():
        np.testing.assert_allclose([layer.phi_condition, layer.psi_condition], 1, rtol=1e-6)


def test_the_table():
    def layer(**fields):
        numbers = dict.fromkeys(LayerDiagnostics._fields, jnp.ones(())) | {"age": jnp.asarray(3)}
        numbers["faults"] = tkfac.LayerFaults(*map(jnp.asarray, (0, 0, 0)))
        return LayerDiagnostics(**{**numbers, **fields})

    report = {
        "a": layer(trace=jnp.array([1e-7, 20.0]), phi_ratio=None, psi_ratio=None),
        "b/c": layer(age=jnp.asarray(7), trace=jnp.zeros(()), phi_ratio=jnp.asarray(jnp.inf)),
        "d": layer(
            psi_ratio=jnp.asarray(jnp.nan),
            faults=tkfac.LayerFaults(*map(jnp.asarray, (3, 0, 1))),
        ),
    }
    assert diagnostics_table(report).splitlines() == [
        "layer        trace  phi_ratio  psi_ratio  phi_condition  psi_condition  age",
        "---------------------------------------------------------------------------",
        "a      1e-07 to 20                                    1              1    3",
        "b/c              0        inf          1              1              1    7",
        "d                1          1        nan              1              1    3",
        "no signal: b/c",
        "not finite: d (psi_ratio)",
        "failed statistics: d (3)",
        "failed updates: d (1)",
    ]
    assert diagnostics_table({}).splitlines()[0].startswith("layer  trace")


def test_wrong_arguments_are_named(unchecked):
    _, params, _, _, layers = mlp_problem()
    state, _ = initial_state()
    with pytest.raises(ValueError, match="holds 0 TkfacState; expected exactly one"):
        diagnostics(optax.adam(0.1).init(params), layers)
    with pytest.raises(ValueError, match="holds 2 TkfacState"):
        diagnostics((state, state), layers)
    with pytest.raises(ValueError, match=r'averaging=\'mean\'; expected "factors" or "moments"'):
        diagnostics(state, layers, averaging="mean")
    with pytest.raises(ValueError, match=r"damping=0; expected a positive number"):
        diagnostics(state, layers, damping=0)
    others = {"Dense_0": layers["Dense_0"]}
    with pytest.raises(
        ValueError, match=r"holds the layer 'Dense_1'; the layers are \['Dense_0'\]"
    ):
        diagnostics(state, others)
    replicated = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), state)
    with pytest.raises(ValueError, match=r"layer 'Dense_0': the state's factors have shapes"):
        diagnostics(replicated, layers)
    one = jax.tree.map(lambda leaf: leaf[0], replicated)
    assert list(diagnostics(one, layers)) == list(layers)
