from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from networks import as_float64

import tkfac_jax as tkfac

F64 = {"dtype": jnp.float64, "param_dtype": jnp.float64}
LIKELIHOOD = tkfac.Categorical()
OPTIONS = {"damping": 0.03, "fisher_interval": 2, "inverse_interval": 4}
STEPS = 9
DROPOUT_KEY = jax.random.key(7)


def assert_close(received, expected):
    """The same computations in float64, in programs that XLA fuses differently."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), received, expected
    )


# Every factor of the networks here is 8 x 8: one inversion to compile, not one for each size.
def data():
    x = np.random.default_rng(1).normal(size=(16, 7))
    return jnp.asarray(x), jnp.asarray((x[:, :3] > 0) @ np.array([1, 2, 4]))


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(8, **F64)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, **F64)(x)
        x = nn.Dropout(0.2, deterministic=not train)(nn.relu(x))
        return nn.Dense(8, use_bias=False, **F64)(x)


class LinenState(tkfac.TrainState):
    batch_stats: Any
    dropout_key: jax.Array


def linen_problem():
    model = LinenModel()
    x, _ = data()
    variables = jax.jit(model.init, static_argnums=2)(jax.random.key(3), x, False)
    params, batch_stats = variables["params"], as_float64(variables["batch_stats"])

    def predict(params, batch_stats, x, dropout_key):
        outputs, new = model.apply(
            {"params": params, "batch_stats": batch_stats},
            x,
            True,
            rngs={"dropout": dropout_key},
            mutable=["batch_stats"],
        )
        return outputs, new["batch_stats"]

    layers = tkfac.find_layers(predict, params, batch_stats, x, DROPOUT_KEY)
    fisher = tkfac.empirical_fisher(predict, LIKELIHOOD, layers, has_aux=True)
    return model, predict, params, batch_stats, layers, fisher


def value_and_grad(predict, params, model_state, x, y, *further):
    def loss_fn(params):
        outputs, new_state = predict(params, model_state, x, *further)
        return LIKELIHOOD.nll(outputs, y).mean(), new_state

    return jax.value_and_grad(loss_fn, has_aux=True)(params)


def test_a_subclass_with_batch_norm_and_dropout():
    model, predict, params, batch_stats, layers, fisher = linen_problem()
    x, y = data()
    assert set(layers) == {"Dense_0", "Dense_1"}
    optimizer = tkfac.tkfac(0.1, layers, **OPTIONS)

    @jax.jit
    def create(params, batch_stats):
        return LinenState.create(
            apply_fn=model.apply,
            params=params,
            tx=optimizer,
            batch_stats=batch_stats,
            dropout_key=DROPOUT_KEY,
        )

    @jax.jit
    def train_step(state, x, y):
        dropout_key = jax.random.fold_in(state.dropout_key, state.step)
        (loss, batch_stats), grads = value_and_grad(
            predict, state.params, state.batch_stats, x, y, dropout_key
        )
        state = state.apply_gradients(
            grads=grads,
            statistics=lambda: fisher(state.params, state.batch_stats, x, dropout_key, targets=y),
            batch_stats=batch_stats,
        )
        return state, loss

    @jax.jit
    def by_hand(step, params, opt_state, batch_stats):
        dropout_key = jax.random.fold_in(DROPOUT_KEY, step)
        (_, new_stats), grads = value_and_grad(predict, params, batch_stats, x, y, dropout_key)
        updates, opt_state = optimizer.update(
            grads,
            opt_state,
            params,
            statistics=lambda: fisher(params, batch_stats, x, dropout_key, targets=y),
        )
        return optax.apply_updates(params, updates), opt_state, new_stats

    state = create(params, batch_stats)
    expected = params, state.opt_state, batch_stats
    losses = []
    for step in range(STEPS):
        state, loss = train_step(state, x, y)
        losses.append(float(loss))
        expected = by_hand(step, *expected)
    assert_close((state.params, state.opt_state, state.batch_stats), expected)
    assert int(state.step) == STEPS
    assert state.tx is optimizer
    assert losses[-1] < 0.5 * losses[0]
    with pytest.raises(TypeError, match="needs the keyword argument 'statistics'"):
        state.apply_gradients(grads=state.params)


def recorder(records):
    """An optimizer that takes any further arguments and remembers them."""

    def update(updates, state, params=None, **extra_args):
        records.append(extra_args)
        return updates, state

    return optax.GradientTransformationExtraArgs(lambda params: (), update)


@pytest.mark.parametrize("statistics", [None, {"Dense_0": 1}, dict])
@pytest.mark.parametrize("refresh", [True, False, tkfac.Share(1, of=3), None])
def test_what_is_passed_on(statistics, refresh):
    records = []
    params = {"w": jnp.ones(3)}
    state = tkfac.TrainState.create(apply_fn=dict, params=params, tx=recorder(records))
    options = {} if refresh is None else {"refresh_inverses": refresh}
    state.apply_gradients(grads=params, statistics=statistics, **options)
    assert records == [{"refresh_inverses": refresh, "statistics": statistics}]


def test_what_the_adaptive_optimizer_wants_to_know_is_passed_on():
    records = []
    params = {"w": jnp.ones(3)}

    class WithTargets(tkfac.TrainState):
        targets: Any = None

    batch = {"outputs_fn": dict, "model_outputs_fn": list, "example_weights": 1, "position_mask": 2}
    for kind, fields in ((tkfac.TrainState, {}), (WithTargets, {"targets": 0})):
        state = kind.create(apply_fn=dict, params=params, tx=recorder(records), **fields)
        new = state.apply_gradients(grads=params, statistics=None, targets=3, **batch)
        told = {"refresh_inverses": None, "statistics": None, **batch}
        assert records.pop() == told | ({} if fields else {"targets": 3})
        assert getattr(new, "targets", None) == (3 if fields else None)


def test_fields_are_replaced():
    """The optimizer too, if it is asked for."""
    params = {"w": jnp.ones(3)}
    state = tkfac.TrainState.create(apply_fn=dict, params=params, tx=optax.sgd(0.5))
    other = optax.sgd(0.1)
    assert state.apply_gradients(grads=params, tx=other).tx is other


def test_optimizers_without_statistics():
    """One training script compares TKFAC with Optax's own optimizers."""
    params = {"w": jnp.ones(3)}
    state = tkfac.TrainState.create(apply_fn=dict, params=params, tx=optax.sgd(0.5))
    for options in ({}, {"statistics": None, "refresh_inverses": True}):
        new = state.apply_gradients(grads={"w": jnp.ones(3)}, **options)
        np.testing.assert_array_equal(new.params["w"], 0.5)


def test_gradients_that_overwrite_their_parameters():
    """Flax trains the scales of its 8-bit layers so."""
    overwrite = nn.fp8_ops.OVERWRITE_WITH_GRADIENT
    params = {"params": {"w": jnp.ones(3)}, overwrite: {"scale": jnp.zeros(())}}
    grads = {"params": {"w": jnp.ones(3)}, overwrite: {"scale": jnp.asarray(4.0)}}
    state = tkfac.TrainState.create(apply_fn=dict, params=params, tx=optax.sgd(0.5))
    new = state.apply_gradients(grads=grads, statistics=None)
    np.testing.assert_array_equal(new.params["params"]["w"], 0.5)
    assert float(new.params[overwrite]["scale"]) == 4.0


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(7, 8, rngs=rngs, **F64)
        self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs, **F64)
        # Float32 in Flax, whatever its dtypes.
        self.norm.mean = nnx.BatchStat(jnp.zeros(8))
        self.norm.var = nnx.BatchStat(jnp.ones(8))
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.head = nnx.Linear(8, 8, use_bias=False, rngs=rngs, **F64)

    def __call__(self, x):
        return self.head(self.dropout(nnx.relu(self.norm(self.hidden(x)))))


def nnx_problem():
    model = NnxModel(nnx.Rngs(0))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def predict(params, rest, x):
        merged = nnx.merge(graphdef, params, rest, copy=True)
        outputs = merged(x)
        return outputs, nnx.state(merged, nnx.Not(nnx.Param))

    x, _ = data()
    layers = tkfac.find_layers(predict, params, rest, x)
    fisher = tkfac.empirical_fisher(predict, LIKELIHOOD, layers, has_aux=True)
    return model, predict, layers, fisher


def unshared(state):
    """The values of a state as they are now: nnx.state shares its Variables with the model."""
    return jax.tree.map(lambda leaf: leaf, state)


def pure(state):
    return nnx.to_pure_dict(state)


def test_nnx_optimizer_with_batch_norm_and_dropout():
    model, predict, layers, fisher = nnx_problem()
    x, y = data()
    assert set(layers) == {"hidden", "head"}
    transformation = tkfac.tkfac(0.1, layers, **OPTIONS)
    _, params, rest = nnx.split(model, nnx.Param, ...)
    expected = unshared((params, jax.jit(transformation.init)(params), rest))
    optimizer = nnx.jit(lambda model: nnx.Optimizer(model, transformation, wrt=nnx.Param))(model)

    @nnx.jit
    def train_step(model, optimizer, x, y):
        _, params, rest = nnx.split(model, nnx.Param, ...)
        before = unshared((params, rest))

        def loss_fn(model):
            return LIKELIHOOD.nll(model(x), y).mean()

        loss, grads = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, grads, statistics=lambda: fisher(*before, x, targets=y))
        return loss

    @jax.jit
    def by_hand(params, opt_state, rest):
        (_, new_rest), grads = value_and_grad(predict, params, rest, x, y)
        updates, opt_state = transformation.update(
            grads, opt_state, params, statistics=lambda: fisher(params, rest, x, targets=y)
        )
        return optax.apply_updates(params, updates), opt_state, new_rest

    losses = []
    for step in range(STEPS):
        losses.append(float(train_step(model, optimizer, x, y)))
        expected = by_hand(*expected)
        # Once for each step, not again for the statistics.
        assert int(model.dropout.rngs.count[...]) == step + 1
    assert losses[-1] < 0.5 * losses[0]
    expected_params, expected_opt_state, expected_rest = expected
    _, params, rest = nnx.split(model, nnx.Param, ...)
    assert_close(pure(params), pure(expected_params))
    # In other Variables, but the same leaves.
    assert_close(jax.tree.leaves(optimizer.opt_state), jax.tree.leaves(expected_opt_state))
    keys = nnx.RngKey
    assert_close(*(pure(nnx.filter_state(s, nnx.Not(keys))) for s in (rest, expected_rest)))
