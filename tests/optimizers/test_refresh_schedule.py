"""New inverses a few layers at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import mlp_problem, spec

import tkfac_jax as tkfac
from tkfac_jax.curvature.inverses import shares
from tkfac_jax.curvature.state import find_state
from tkfac_jax.optimizers.refresh_schedule import first_step_of, num_shares, share_at


@pytest.mark.parametrize(("interval", "layers"), [(1, 3), (2, 3), (3, 3), (7, 3), (20, 8), (8, 20)])
def test_every_share_has_one_step_of_the_interval(interval, layers):
    of = num_shares(layers, interval)
    assert of == min(interval, layers)
    for start in (0, 5 * interval):
        due = [
            share_at(step, interval, of)
            for step in range(start, start + interval)
            if step % interval == first_step_of(share_at(step, interval, of), interval, of)
        ]
        assert due == list(range(of))


def test_shares_cost_about_the_same():
    sizes = [40, 30, 30, 20, 20, 20, 10]
    layers = {f"layer_{i}": spec(size, size) for i, size in enumerate(sizes)}
    plan = shares(layers, 3)
    assert sorted(name for share in plan for name in share) == sorted(layers)
    # The largest has a share of its own; the others are as even as they can be.
    costs = sorted(sum(layers[name].d_in ** 3 for name in share) for share in plan)
    assert costs == [30**3 + 20**3 + 10**3, 30**3 + 2 * 20**3, 40**3]


def test_each_layer_is_refreshed_at_its_own_step_with_the_factors_of_that_step():
    predict, params, x, y, layers = mlp_problem()
    f = tkfac.value_and_grad_with_fisher(
        predict, tkfac.Categorical(), layers, estimator="empirical"
    )
    optimizer = tkfac.scale_by_tkfac(layers, damping=0.1, inverse_interval=4, spread_inverses=True)

    @jax.jit
    def update(state, x):
        _, gradient, statistics = f(params, x, targets=y)
        return optimizer.update(gradient, state, statistics=statistics)[1]

    state, history = optimizer.init(params), []
    for step in range(9):
        before, state = state, update(state, x * (1 + 0.1 * step))
        history.append({name: int(at) for name, at in state.refreshed.items()})
        for name in layers:
            if history[-1][name] == step:
                np.testing.assert_allclose(
                    state.inverses[name].psi, np.linalg.inv(state.factors[name].psi), rtol=1e-8
                )
            else:
                np.testing.assert_array_equal(state.inverses[name].psi, before.inverses[name].psi)
    assert history[0] == dict.fromkeys(layers, 0)
    # Three layers have the steps 0, 2 and 3 of four: that is 4, 6 and 7 of the second interval.
    assert sorted(history[7].values()) == [4, 6, 7]
    assert sorted(history[8].values()) == [6, 7, 8]


def test_the_train_step_spreads_as_the_optimizer_does():
    predict, params, x, y, layers = mlp_problem()
    intervals = {"fisher_interval": 2, "inverse_interval": 5}
    spreading = tkfac.tkfac(0.05, layers, damping=0.1, spread_inverses=True, **intervals)
    fisher = tkfac.empirical_fisher(predict, tkfac.Categorical(), layers)

    @jax.jit
    def by_hand(params, state):
        gradient = jax.grad(lambda p: tkfac.Categorical().nll(predict(p, x), y).mean())(params)
        updates, state = spreading.update(
            gradient, state, params, statistics=lambda: fisher(params, x, targets=y)
        )
        return jax.tree.map(jnp.add, params, updates), state

    plain = tkfac.tkfac(0.05, layers, damping=0.1)
    step = tkfac.make_train_step(
        predict,
        tkfac.Categorical(),
        plain,
        estimator="empirical",
        spread_inverses=True,
        **intervals,
    )
    expected, expected_state = params, spreading.init(params)
    received, state = jax.tree.map(jnp.copy, (params, plain.init(params)))
    for _ in range(12):
        expected, expected_state = by_hand(expected, expected_state)
        received, state, _ = step(received, state, x, targets=y)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10),
        (received, find_state(state)),
        (expected, find_state(expected_state)),
    )


def test_a_share_can_be_chosen_by_the_caller():
    _, params, _, _, layers = mlp_problem()
    optimizer = tkfac.scale_by_tkfac(layers)
    state = optimizer.init(params)._replace(step=jnp.asarray(9))
    for number, names in enumerate(shares(layers, 2)):
        _, new = jax.jit(
            lambda state, number: optimizer.update(
                params, state, statistics=None, refresh_inverses=tkfac.Share(number, 2)
            )
        )(state, number)
        assert [name for name, at in new.refreshed.items() if at == 9] == sorted(names)


def test_more_shares_than_layers_leave_some_empty():
    _, params, _, _, layers = mlp_problem()
    optimizer = tkfac.scale_by_tkfac(layers)
    state = optimizer.init(params)._replace(step=jnp.asarray(9))

    @jax.jit
    def refreshed(state, number):
        share = tkfac.Share(number, 5)
        return optimizer.update(params, state, statistics=None, refresh_inverses=share)[1].refreshed

    counts = [sum(int(at) == 9 for at in refreshed(state, i).values()) for i in range(5)]
    assert counts == [1, 1, 1, 0, 0]
    with pytest.raises(ValueError, match=r"Share\(number=5, of=5\); expected a number from 0 to 4"):
        optimizer.update(params, state, statistics=None, refresh_inverses=tkfac.Share(5, 5))


def test_an_interval_that_is_not_known_beforehand_is_refused(unchecked):
    *_, layers = mlp_problem()
    with pytest.raises(ValueError, match="spread_inverses needs an inverse_interval that is"):
        tkfac.scale_by_tkfac(layers, inverse_interval=jnp.asarray(3), spread_inverses=True)
