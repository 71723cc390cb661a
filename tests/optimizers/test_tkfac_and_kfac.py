import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from networks import convnet_problem, mlp_problem
from small_network import SmallOracle, small_problem, to_matrices

import tkfac_jax as tkfac
from tkfac_jax.fisher.layer_statistics import zero_slots
from tkfac_jax.linalg.factor_structure import dense

KINDS = {"Conv_0": "conv", "Dense_0": "dense"}
DAMPINGS = {
    "normal": (
        0.03,
        lambda factors: {name: oracles.normal_damping(f, 0.03) for name, f in factors.items()},
    ),
    "trace": (
        tkfac.trace_damping(0.5, 0.03),
        lambda factors: oracles.trace_damping(factors, KINDS, 0.5, 0.03),
    ),
}


@pytest.mark.parametrize("damping", DAMPINGS)
def test_ten_steps_equal_algorithm_1(damping):
    predict, params, x, y, layers = small_problem()
    package_damping, oracle_damping = DAMPINGS[damping]
    optimizer = tkfac.tkfac(
        0.1,
        layers,
        momentum=0.9,
        damping=package_damping,
        decay=0.95,
        fisher_interval=2,
        inverse_interval=3,
    )
    fisher = tkfac.empirical_fisher(predict, tkfac.Categorical(), layers)

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: tkfac.Categorical().nll(predict(p, x), y).mean())(params)
        updates, state = optimizer.update(
            grads, state, params, statistics=lambda: fisher(params, x, targets=y)
        )
        return optax.apply_updates(params, updates), state

    received, state = params, jax.jit(optimizer.init)(params)
    for _ in range(10):
        received, state = step(received, state)

    oracle = SmallOracle(x, y)
    expected = oracles.algorithm_1(
        to_matrices(params),
        oracle.gradients,
        oracle.statistics,
        oracle_damping,
        steps=10,
        alpha=0.1,
        tau=0.9,
        epsilon=0.95,
        t_fim=2,
        t_inv=3,
    )
    for name, matrix in to_matrices(received).items():
        moved = np.abs(matrix - to_matrices(params)[name]).max()
        assert moved > 0.01
        np.testing.assert_allclose(matrix, expected[name], rtol=1e-9, atol=1e-11)
    assert int(optax.tree.get(state, "factor_updates")) == 5


@functools.cache
def small_statistics():
    predict, params, x, y, layers = small_problem()
    fisher = tkfac.empirical_fisher(predict, tkfac.Categorical(), layers)
    return jax.jit(lambda t: fisher(jax.tree.map(lambda p: p + 0.1 * t, params), x, targets=y))


def statistics_at(t=0.0):
    """New statistics of the small problem at parameters that are moved by t."""
    return dict(small_statistics()(t))


def small_update(transform):
    """The state of a transformation of the small problem, and one update of it as a program."""
    _, params, *_ = small_problem()

    @functools.partial(jax.jit, static_argnames="refresh_inverses")
    def update(state, statistics, **options):
        return transform.update(params, state, statistics=statistics, **options)

    return jax.jit(transform.init)(params), update


def test_moments_are_averaged_before_they_are_damped():
    *_, layers = small_problem()
    transform = tkfac.scale_by_tkfac(
        layers, damping=lambda step: 0.1 / (step + 1), decay=0.7, averaging="moments"
    )
    state, update = small_update(transform)
    both = [jax.tree.map(np.asarray, statistics_at(t)) for t in (0.0, 3.0)]
    for statistics in both:
        _, state = update(state, statistics)
    for name in layers:
        mean = [0.7 * a + 0.3 * b for a, b in zip(both[0][name], both[1][name], strict=True)]
        phi, psi, delta = oracles.normalised(mean)
        np.testing.assert_allclose(state.factors[name].phi, phi, rtol=1e-10)
        np.testing.assert_allclose(state.factors[name].delta, delta, rtol=1e-10)
        # The inverses were made at step 1, with the damping of that step.
        damped_phi, damped_psi = oracles.normal_damping((phi, psi, delta), 0.05)
        np.testing.assert_allclose(
            state.inverses[name].phi_matrix(), np.linalg.inv(damped_phi), rtol=1e-8
        )
        np.testing.assert_allclose(state.inverses[name].psi, np.linalg.inv(damped_psi), rtol=1e-8)


def test_kfac_is_the_baseline_with_its_own_damping():
    """One step of kfac is (A + pi sqrt(lambda) I)^-1 W (G + sqrt(lambda)/pi I)^-1."""
    predict, params, x, y, layers = small_problem()
    optimizer = tkfac.kfac(0.1, layers, damping=0.04)
    fisher = tkfac.empirical_fisher(predict, tkfac.Categorical(), layers, rule=tkfac.independent)

    @jax.jit
    def first_update(params):
        statistics = fisher(params, x, targets=y)
        grads = jax.grad(lambda p: tkfac.Categorical().nll(predict(p, x), y).mean())(params)
        return optimizer.update(grads, optimizer.init(params), params, statistics=statistics)[0]

    updates = first_update(params)
    oracle = SmallOracle(x, y)
    backward = oracle.backward(to_matrices(params))
    for name, gradient in oracle.gradients(to_matrices(params)).items():
        a, g, _ = oracles.independent(*backward[name])
        pi = np.sqrt(np.trace(a) / len(a) / (np.trace(g) / len(g)))
        expected = -0.1 * np.linalg.solve(a + pi * 0.2 * np.eye(len(a)), gradient)
        expected = expected @ np.linalg.inv(g + 0.2 / pi * np.eye(len(g)))
        np.testing.assert_allclose(to_matrices(updates)[name], expected, rtol=1e-9, atol=1e-12)


def test_before_the_first_statistics_the_damping_alone_is_inverted():
    _, params, _, _, layers = small_problem()
    transform = tkfac.scale_by_tkfac(layers, damping=0.01)
    updates, _ = transform.update(params, transform.init(params), statistics=None)
    jax.tree.map(lambda u, p: np.testing.assert_allclose(u, p / 0.01, rtol=1e-10), updates, params)


def test_intervals_and_the_three_forms_of_statistics():
    _, params, _, _, layers = small_problem()
    transform = tkfac.scale_by_tkfac(layers, fisher_interval=3, inverse_interval=2)
    evaluated = []
    state, update_with = small_update(transform)

    @jax.jit
    def update(state):
        def statistics():
            jax.debug.callback(lambda: evaluated.append(1))
            return jax.tree.map(lambda s: s * (1 + state.step), statistics_at())

        return transform.update(params, state, statistics=statistics)[1]

    for step in range(7):
        before = state
        state = update(state)
        jax.effects_barrier()
        assert len(evaluated) == step // 3 + 1
        changed = not np.array_equal(before.inverses["Conv_0"].phi, state.inverses["Conv_0"].phi)
        # The factors change at 0, 3 and 6, and the inverses are made at 0, 2, 4 and 6.
        assert changed == (step in (0, 4, 6))
    given = update_with(state, statistics_at(1.0))[1]
    assert int(given.factor_updates) == int(state.factor_updates) + 1
    none = update_with(state, None)[1]
    assert none.factor_updates == state.factor_updates


def test_refresh_can_be_decided_by_the_caller():
    *_, layers = small_problem()
    state, update = small_update(tkfac.scale_by_tkfac(layers, inverse_interval=1000))
    kept = update(state, statistics_at(), refresh_inverses=False)[1]
    np.testing.assert_array_equal(kept.inverses["Dense_0"].psi, state.inverses["Dense_0"].psi)
    fresh = update(kept, None, refresh_inverses=True)[1]
    expected = np.linalg.inv(kept.factors["Dense_0"].psi)
    np.testing.assert_allclose(fresh.inverses["Dense_0"].psi, expected, rtol=1e-8)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("averaging", ["factors", "moments"])
@pytest.mark.parametrize("trace", ["its own", 0.0, jnp.inf])
def test_statistics_that_are_not_finite_are_skipped_and_counted(bad, averaging, trace):
    """Also where a trace of 0 or infinity would make a factor finite."""
    *_, layers = small_problem()
    state, update = small_update(tkfac.scale_by_tkfac(layers, averaging=averaging))
    _, before = update(state, statistics_at())
    broken = statistics_at()
    moment = np.array(broken["Dense_0"].output_moment)
    moment[0, 1] = bad
    broken["Dense_0"] = broken["Dense_0"]._replace(output_moment=jnp.asarray(moment))
    if trace != "its own":
        broken["Dense_0"] = broken["Dense_0"]._replace(
            trace=jnp.full_like(broken["Dense_0"].trace, trace)
        )
    updates, after = update(before, broken)
    assert int(after.skipped_statistics) == 1
    assert int(after.factor_updates) == 1
    assert int(after.step) == 2
    jax.tree.map(np.testing.assert_array_equal, after.factors, before.factors)
    for leaf in jax.tree.leaves((updates, after)):
        assert np.isfinite(leaf).all()
    assert int(after.failed_inversions) == 0


def test_failed_inversions_are_counted_and_leave_the_old_inverse():
    *_, layers = small_problem()
    transform = tkfac.scale_by_tkfac(layers, inverse=lambda stack: jnp.full_like(stack, jnp.nan))
    start, update = small_update(transform)
    before, _ = update(start, None, refresh_inverses=False)
    updates, state = update(start, statistics_at())
    assert int(state.failed_inversions) == 4
    jax.tree.map(np.testing.assert_array_equal, state.inverses, start.inverses)
    jax.tree.map(np.testing.assert_array_equal, updates, before)


@pytest.mark.parametrize("large", ["full", "blocks", "diagonal"])
def test_init_inverts_the_damping(large):
    predict, params, x, _, _ = small_problem()
    limit = None if large == "full" else 2
    layers = tkfac.find_layers(
        predict,
        params,
        x,
        max_factor_size=limit,
        large_factors="blocks" if limit is None else large,
    )

    def never(stack):
        raise AssertionError(stack.shape)

    state = jax.jit(tkfac.scale_by_tkfac(layers, damping=0.3, inverse=never).init)(params)
    for name, spec in layers.items():
        inverses = state.inverses[name]
        for which in ("phi", "psi"):
            structure = getattr(spec, which)
            assert structure.kind == large
            factor = dense(structure, getattr(state.factors[name], which))
            inverse = inverses.phi_matrix() if which == "phi" else inverses.psi
            np.testing.assert_allclose(dense(structure, inverse), np.linalg.inv(factor), rtol=1e-12)


def test_without_damping_init_gives_identities():
    _, params, _, _, layers = small_problem()
    state = jax.jit(tkfac.scale_by_tkfac(layers, damping=lambda _: 0.0).init)(params)
    for inverses in state.inverses.values():
        for matrix in (inverses.phi_matrix(), inverses.psi):
            np.testing.assert_array_equal(matrix, np.eye(len(matrix)))


def training_problem():
    predict, params, batch_stats, x, y, layers = convnet_problem()

    def loss_fn(params):
        return tkfac.Categorical().nll(predict(params, batch_stats, x)[0], y).mean()

    def make_step(optimizer, rule=tkfac.trace_restricted):
        fisher = tkfac.sampled_fisher(predict, tkfac.Categorical(), layers, rule=rule, has_aux=True)

        def step(params, state, key):
            loss, grads = jax.value_and_grad(loss_fn)(params)
            updates, state = optimizer.update(
                grads,
                state,
                params,
                statistics=lambda: fisher(params, batch_stats, x, key=key),
                value=loss,
                grad=grads,
            )
            return optax.apply_updates(params, updates), state, loss

        return step

    return params, layers, make_step


OPTIMIZERS = {
    "tkfac": lambda layers: tkfac.tkfac(0.01, layers, fisher_interval=3, inverse_interval=3),
    "kfac": lambda layers: tkfac.kfac(0.01, layers, fisher_interval=3),
    "trace damping": lambda layers: tkfac.tkfac(
        0.01, layers, damping=tkfac.trace_damping(1e-2, 1e-2)
    ),
    "weight decay": lambda layers: tkfac.tkfac(
        0.01, layers, weight_decay=1e-3, norm_constraint=1.0
    ),
    "moments": lambda layers: tkfac.tkfac(0.01, layers, averaging="moments", momentum=0.0),
    "schedules": lambda layers: tkfac.tkfac(
        optax.cosine_decay_schedule(0.01, 20),
        layers,
        damping=optax.exponential_decay(1.0, 10, 0.5),
        decay=lambda n: jnp.minimum(0.95, 1 - 1 / (n + 1)),
    ),
    "chain": lambda layers: optax.chain(
        optax.clip_by_global_norm(1.0),
        tkfac.scale_by_tkfac(layers),
        optax.scale(-0.01),
        optax.ema(0.9),
    ),
    "inject": lambda layers: optax.inject_hyperparams(tkfac.tkfac)(
        learning_rate=optax.linear_schedule(0.01, 0.0, 20),
        layers=layers,
        damping=1e-2,
        fisher_interval=2,
    ),
    "inject kfac": lambda layers: optax.inject_hyperparams(tkfac.kfac)(
        learning_rate=0.01, layers=layers, damping=1e-2
    ),
    "apply_if_finite": lambda layers: optax.apply_if_finite(tkfac.tkfac(0.01, layers), 3),
    "masked": lambda layers: optax.chain(
        optax.masked(
            tkfac.scale_by_tkfac(layers),
            lambda params: {name: name == "Conv_0" for name in params},
        ),
        optax.scale(-0.01),
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_compile_once_keep_structure_and_train(name):
    params, layers, make_step = training_problem()
    optimizer = OPTIMIZERS[name](layers)
    rule = tkfac.independent if "kfac" in name.split() else tkfac.trace_restricted
    traces = []

    def counted(params, state, key):
        traces.append(1)
        return make_step(optimizer, rule)(params, state, key)

    step = jax.jit(counted, donate_argnums=(0, 1))
    state = jax.jit(optimizer.init)(params)
    described = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), (params, state))
    losses = []
    for t in range(8):
        params, state, loss = step(params, state, jax.random.key(t))
        losses.append(float(loss))
    assert len(traces) == 1
    assert described == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), (params, state)
    )
    assert losses[-1] < losses[0]
    assert all(np.isfinite(losses))
    assert int(np.max(optax.tree.get_all_with_path(state, "step")[0][1])) == 8
    assert "Conv_0" in optax.tree.get(state, "factors")


@pytest.mark.parametrize("name", ["tkfac", "chain", "inject", "apply_if_finite"])
def test_a_scan_of_steps_equals_the_loop(name):
    params, layers, make_step = training_problem()
    optimizer = OPTIMIZERS[name](layers)
    step = make_step(optimizer)
    keys = jax.random.split(jax.random.key(0), 5)

    def body(carry, key):
        params, state, loss = step(*carry, key)
        return (params, state), loss

    start = jax.jit(optimizer.init)(params)
    (scanned, _), losses = jax.jit(lambda carry: jax.lax.scan(body, carry, keys))((params, start))
    looped, state = params, start
    compiled = jax.jit(step)
    for key, expected in zip(keys, losses, strict=True):
        looped, state, loss = compiled(looped, state, key)
        # float32, and two programs that round differently.
        np.testing.assert_allclose(loss, expected, rtol=1e-3)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-3), scanned, looped
    )


def first_update(optimizer, grads, params):
    """The update without statistics from the state of init, as one program."""

    @jax.jit
    def run(grads, params):
        return optimizer.update(grads, optimizer.init(params), params, statistics=None)[0]

    return run(grads, params)


def test_other_parameters_go_through_the_fallback():
    params, layers, _ = training_problem()
    optimizer = tkfac.tkfac(0.5, layers, fallback=optax.sgd(1e-3))
    updates = first_update(optimizer, jax.tree.map(jnp.ones_like, params), params)
    np.testing.assert_allclose(updates["BatchNorm_0"]["scale"], -1e-3, rtol=1e-6)


def test_masked_layers_have_no_state_and_keep_their_gradient():
    params, layers, _ = training_problem()
    transform = optax.masked(
        tkfac.scale_by_tkfac(layers, damping=0.25),
        {name: name != "Dense_0" for name in params},
    )
    state = jax.eval_shape(transform.init, params)
    assert list(optax.tree.get(state, "factors")) == ["Conv_0"]
    updates = first_update(transform, params, params)
    np.testing.assert_array_equal(updates["Dense_0"]["kernel"], params["Dense_0"]["kernel"])
    np.testing.assert_allclose(
        updates["Conv_0"]["kernel"], params["Conv_0"]["kernel"] / 0.25, rtol=1e-5
    )


def test_weight_decay_is_decoupled_and_maskable():
    _, params, _, _, layers = small_problem()
    zero = jax.tree.map(jnp.zeros_like, params)
    for mask, biases_decay in (
        (None, True),
        (lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree), False),
    ):
        optimizer = tkfac.tkfac(0.5, layers, weight_decay=0.1, mask=mask, momentum=0.0)
        updates = first_update(optimizer, zero, params)
        np.testing.assert_allclose(
            updates["Conv_0"]["kernel"], -0.5 * 0.1 * params["Conv_0"]["kernel"], rtol=1e-12
        )
        expected = -0.5 * 0.1 * params["Conv_0"]["bias"] * biases_decay
        np.testing.assert_allclose(updates["Conv_0"]["bias"], expected, rtol=1e-12)


def test_hyperparameters_can_be_changed_while_training():
    params, layers, make_step = training_problem()
    optimizer = optax.inject_hyperparams(tkfac.tkfac)(
        learning_rate=0.01, layers=layers, damping=1e-2
    )
    state = jax.jit(optimizer.init)(params)
    step = jax.jit(make_step(optimizer))
    state.hyperparams["learning_rate"] = jnp.zeros(())
    moved, _, _ = step(params, state, jax.random.key(0))
    np.testing.assert_array_equal(moved["Conv_0"]["kernel"], params["Conv_0"]["kernel"])
    state.hyperparams["learning_rate"] = jnp.asarray(0.01)
    moved, _, _ = step(params, state, jax.random.key(0))
    assert not np.array_equal(moved["Conv_0"]["kernel"], params["Conv_0"]["kernel"])


def test_low_precision_parameters_keep_their_dtype():
    model = nn.Dense(3, param_dtype=jnp.bfloat16)
    x = jnp.ones((4, 2), jnp.bfloat16)
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]

    def predict(params, x):
        return model.apply({"params": params}, x)

    layers = tkfac.find_layers(predict, params, x)
    optimizer = tkfac.tkfac(0.1, layers, momentum=0.0)
    fisher = tkfac.sampled_fisher(predict, tkfac.Normal(), layers)

    @jax.jit
    def run(params):
        statistics = fisher(params, x, key=jax.random.key(0))
        return optimizer.update(params, optimizer.init(params), params, statistics=statistics)

    updates, state = run(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype("bfloat16")}
    assert optax.tree.get(state, "factors")["."].phi.dtype == jnp.float32


_, PARAMS, _, _, LAYERS = mlp_problem()


def test_statistics_must_not_be_forgotten():
    optimizer = tkfac.tkfac(0.1, LAYERS)
    state = jax.jit(optimizer.init)(PARAMS)
    with pytest.raises(
        TypeError, match=r"update\(\) needs the keyword argument 'statistics': a function such as"
    ):
        optimizer.update(PARAMS, state, PARAMS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fisher_interval": 0}, "fisher_interval=0; expected a whole number of steps, at least 1"),
        ({"inverse_interval": -3}, "inverse_interval=-3; expected a whole number"),
        ({"fisher_interval": 2.5}, "fisher_interval=2.5; expected a whole number"),
        ({"decay": 1.5}, r"decay=1.5; expected a number in \[0, 1\) or a function"),
        ({"decay": -0.1}, r"decay=-0.1; expected a number in \[0, 1\)"),
        (
            {"damping": -1.0},
            "damping=-1.0; expected a positive number, a schedule or a traced scalar",
        ),
        ({"averaging": "mean"}, 'averaging=\'mean\'; expected "factors" or "moments"'),
        ({"norm_constraint": 0.0}, "norm_constraint=0.0; expected a positive number"),
        ({"momentum": 1.0}, r"momentum=1.0; expected a number in \[0, 1\)"),
        ({"weight_decay": -1e-4}, "weight_decay=-0.0001; expected a number of at least 0"),
        (
            {"layers": PARAMS},
            r"layers is dict; expected what find_layers\(predict, params, ...\) returned",
        ),
    ],
)
def test_wrong_options(options, message, unchecked):
    with pytest.raises(ValueError, match=message):
        tkfac.tkfac(**{"learning_rate": 0.1, "layers": LAYERS} | options)


def test_trace_damping_is_not_for_kfac():
    with pytest.raises(ValueError, match="trace damping is defined for TKFAC"):
        tkfac.kfac(0.1, LAYERS, damping=tkfac.trace_damping(1e-2, 1e-2))


def test_wrong_gradients_and_statistics(unchecked):
    transform = tkfac.scale_by_tkfac(LAYERS)
    state = jax.jit(transform.init)(PARAMS)
    with pytest.raises(ValueError, match="layer 'Dense_2': updates should hold 'Dense_2/kernel'"):
        transform.update(
            {k: v for k, v in PARAMS.items() if k != "Dense_2"}, state, statistics=None
        )
    leaves_hidden = jax.tree.map(lambda _: optax.MaskedNode(), PARAMS["Dense_2"])
    for hidden in (optax.MaskedNode(), leaves_hidden):
        with pytest.raises(
            ValueError, match=r"updates hold the layers \['Dense_0', 'Dense_1'\], the state"
        ):
            transform.update({**PARAMS, "Dense_2": hidden}, state, statistics=None)
    statistics = zero_slots(LAYERS)
    with pytest.raises(
        ValueError, match=r"statistics are for \['Dense_0'\]; expected a dictionary for the layers"
    ):
        transform.update(PARAMS, state, statistics={"Dense_0": statistics["Dense_0"]})
    with pytest.raises(ValueError, match="statistics are for int; expected a dictionary"):
        transform.update(PARAMS, state, statistics=3)
    statistics["Dense_0"] = statistics["Dense_1"]
    with pytest.raises(
        ValueError, match=r"statistics of layer 'Dense_0' have shapes \(\(5, 5\), \(4, 4\), \(\)\)"
    ):
        transform.update(PARAMS, state, statistics=statistics)
