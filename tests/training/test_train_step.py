import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from networks import convnet_problem, mlp_problem

import tkfac_jax as tkfac
from tkfac_jax.training import step_counter, step_functions

KEYS = [jax.random.key(t) for t in range(8)]


def copy(tree):
    return jax.tree.map(jnp.copy, tree)


def init(optimizer, params):
    """The state, made by one program."""
    return jax.jit(optimizer.init)(params)


@pytest.mark.parametrize("estimator", ["sampled", "empirical"])
@pytest.mark.parametrize(("fisher_interval", "inverse_interval"), [(1, 1), (2, 4), (2, 3)])
def test_it_equals_the_step_written_by_hand(estimator, fisher_interval, inverse_interval):
    predict, params, x, y, layers = mlp_problem()
    likelihood = tkfac.Categorical()
    optimizer = tkfac.tkfac(
        0.05,
        layers,
        damping=0.1,
        fisher_interval=fisher_interval,
        inverse_interval=inverse_interval,
    )
    if estimator == "sampled":
        sampled = tkfac.sampled_fisher(predict, likelihood, layers)
        fisher = lambda params, key: sampled(params, x, key=key)  # noqa: E731
    else:
        empirical = tkfac.empirical_fisher(predict, likelihood, layers)
        fisher = lambda params, key: empirical(params, x, targets=y)  # noqa: E731

    @jax.jit
    def by_hand(params, state, key):
        loss, grads = jax.value_and_grad(lambda p: likelihood.nll(predict(p, x), y).mean())(params)
        updates, state = optimizer.update(
            grads, state, params, statistics=lambda: fisher(params, key)
        )
        return optax.apply_updates(params, updates), state, loss

    step = tkfac.make_train_step(
        predict,
        likelihood,
        optimizer,
        estimator=estimator,
        fisher_interval=fisher_interval,
        inverse_interval=inverse_interval,
    )
    expected, expected_state = params, init(optimizer, params)
    received, state = copy(params), copy(expected_state)
    for key in KEYS:
        expected, expected_state, loss = by_hand(expected, expected_state, key)
        received, state, metrics = step(received, state, x, targets=y, key=key)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-9)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10),
        (received, state),
        (expected, expected_state),
    )


@pytest.mark.parametrize(
    ("apart", "interval", "inverse_interval"),
    [(False, 2, 4), (True, 2, 4), (False, 5, 5), (False, 6, 12)],
)
def test_each_kind_of_step_is_a_program_that_is_traced_once(apart, interval, inverse_interval):
    """Those with statistics share the program of the statistics alone, or the half that traces the model."""
    predict, params, x, y, layers = mlp_problem()
    traces = []

    def counted(params, x):
        traces.append(1)
        return predict(params, x)

    optimizer = tkfac.tkfac(0.05, layers)
    step = tkfac.make_train_step(
        counted,
        tkfac.Categorical(),
        optimizer,
        fisher_interval=interval,
        inverse_interval=inverse_interval,
        statistics_apart=apart,
    )
    params, state = copy(params), init(optimizer, params)
    # Statistics and inverses at 0; plain at 1; statistics at `interval`; then nothing new.
    shared = not apart and interval < 5 and jax.default_backend() == "cpu"
    new = dict.fromkeys(range(2 * interval + 1), 0) | {0: 2 if apart else 1, 1: 1}
    new[interval] = 0 if shared or inverse_interval == interval else 1
    for t in range(2 * interval + 1):
        params, state, _ = step(params, state, x, targets=y, key=KEYS[0])
        assert len(traces) == sum(list(new.values())[: t + 1])


@pytest.mark.parametrize("estimator", ["sampled", "empirical", "exact"])
def test_statistics_of_a_program_of_their_own_are_the_same(estimator):
    predict, params, x, y, layers = mlp_problem()
    optimizer = tkfac.tkfac(0.05, layers)
    weights = jnp.arange(1.0, 1.0 + len(x))
    ends = []
    for apart in (False, True):
        step = tkfac.make_train_step(
            predict,
            tkfac.Categorical(),
            optimizer,
            fisher_interval=2,
            inverse_interval=4,
            estimator=estimator,
            statistics_apart=apart,
        )
        received, state = copy(params), init(optimizer, params)
        for key in KEYS[:5]:
            received, state, metrics = step(
                received, state, x, targets=y, key=key, example_weights=weights
            )
        ends.append((received, state, metrics))
    assert int(optax.tree.get(ends[1][1], "factor_updates")) == 3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), *ends)


@pytest.mark.parametrize(
    ("convolution", "interval", "wanted", "expected"),
    [
        (True, 10, None, True),
        (True, 9, None, False),
        (False, 10, None, False),
        (True, 10, False, False),
        (False, 1, True, True),
    ],
)
def test_when_statistics_have_a_program_of_their_own(
    convolution, interval, wanted, expected, monkeypatch
):
    """By default where convolutions are rarely looked at."""
    predict, params, *args, y, layers = convnet_problem() if convolution else mlp_problem()
    optimizer = tkfac.tkfac(0.05, layers)
    built = []
    alone = step_functions.StepFunctions._statistics
    monkeypatch.setattr(
        step_functions.StepFunctions, "_statistics", lambda *args: built.append(1) or alone(*args)
    )
    step = tkfac.make_train_step(
        predict,
        tkfac.Categorical(),
        optimizer,
        fisher_interval=interval,
        inverse_interval=interval,
        statistics_apart=wanted,
        has_aux=convolution,
    )
    state = init(optimizer, params)
    _, state, _ = step(copy(params), state, *args, targets=y, key=KEYS[0])
    assert bool(built) == expected
    assert int(optax.tree.get(state, "factor_updates")) == 1


def test_convolutions_and_batch_norm_with_statistics_of_a_program_of_their_own():
    """The statistics see the averages of BatchNorm from before the step; new ones come from the gradient's pass."""
    predict, params, batch_stats, x, y, layers = convnet_problem(dtype=jnp.float64)
    optimizer = tkfac.tkfac(0.05, layers)
    ends = []
    for apart in (False, None):
        step = tkfac.make_train_step(
            predict,
            tkfac.Categorical(),
            optimizer,
            fisher_interval=step_functions.SELDOM,
            inverse_interval=step_functions.SELDOM,
            statistics_apart=apart,
            has_aux=True,
        )
        received, state, statistics = copy(params), init(optimizer, params), batch_stats
        for t in range(step_functions.SELDOM + 1):
            received, state, metrics = step(
                received, state, statistics, x, targets=y, key=KEYS[t % len(KEYS)]
            )
            statistics = metrics["aux"]
        ends.append((received, state, statistics))
    assert int(optax.tree.get(ends[1][1], "factor_updates")) == 2
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10), *ends)


def test_statistics_of_a_program_of_their_own_under_pmap():
    predict, params, x, y, layers = mlp_problem()
    optimizer = tkfac.tkfac(0.05, layers)
    start = jax.tree.map(lambda leaf: leaf[None], (params, init(optimizer, params)))
    ends = []
    for apart in (False, True):
        step = tkfac.make_train_step(
            predict,
            tkfac.Categorical(),
            optimizer,
            fisher_interval=2,
            inverse_interval=2,
            axis_name="devices",
            statistics_apart=apart,
        )
        received, state = copy(start)
        for key in KEYS[:3]:
            received, state, _ = step(received, state, x[None], targets=y[None], key=key[None])
        ends.append((received, state))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), *ends)


@pytest.mark.parametrize("estimator", ["sampled", "empirical", "exact"])
@pytest.mark.parametrize("apart", [False, True])
def test_statistics_of_the_first_examples(estimator, apart):
    """They are those of a smaller batch, whose weights have the mean of the whole batch's."""
    predict, params, x, y, layers = mlp_problem()
    weights, first = jnp.arange(1.0, 1.0 + len(x)), 3
    likelihood, optimizer = tkfac.Categorical(), tkfac.tkfac(0.05, layers, damping=0.1)
    fisher_of = {
        "sampled": lambda p, **options: tkfac.sampled_fisher(predict, likelihood, layers)(
            p, x[:first], key=KEYS[0], **options
        ),
        "empirical": lambda p, **options: tkfac.empirical_fisher(predict, likelihood, layers)(
            p, x[:first], targets=y[:first], **options
        ),
        "exact": lambda p, **options: tkfac.exact_fisher(predict, likelihood, layers)(
            p, x[:first], **options
        ),
    }[estimator]
    own = weights[:first] * weights.mean() / weights[:first].mean()

    @jax.jit
    def by_hand(params, state):
        grads = jax.grad(lambda p: (likelihood.nll(predict(p, x), y) * weights).mean())(params)
        statistics = fisher_of(params, example_weights=own)
        updates, state = optimizer.update(grads, state, params, statistics=statistics)
        return optax.apply_updates(params, updates), state

    step = tkfac.make_train_step(
        predict,
        likelihood,
        optimizer,
        fisher_interval=1,
        inverse_interval=1,
        estimator=estimator,
        statistics_apart=apart,
        statistics_args=lambda x: (x[:first],),
    )
    expected = params, init(optimizer, params)
    received = copy(expected)
    for _ in range(3):
        expected = by_hand(*expected)
        received = step(*received, x, targets=y, key=KEYS[0], example_weights=weights)[:2]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10), received, expected
    )


def test_buffers_are_donated():
    predict, params, x, y, layers = mlp_problem()
    optimizer = tkfac.tkfac(0.05, layers)
    step = tkfac.make_train_step(
        predict,
        tkfac.Categorical(),
        optimizer,
        fisher_interval=2,
        inverse_interval=2,
    )
    params, state = copy(params), init(optimizer, params)
    with pytest.raises(ValueError, match="key") as caught:
        step(params, state, x, targets=y)
    assert "that it returned" not in "".join(getattr(caught.value, "__notes__", []))
    new_params, new_state, _ = step(params, state, x, targets=y, key=KEYS[0])
    assert params["Dense_0"]["kernel"].is_deleted()
    assert optax.tree.get(state, "factors")["Dense_0"].phi.is_deleted()
    for args in ((params, new_state), (new_params, state)):
        with pytest.raises((RuntimeError, ValueError), match="deleted") as caught:
            step(*args, x, targets=y, key=KEYS[1])
        assert "give the next step those that it returned" in "".join(caught.value.__notes__)


def test_the_counter_follows_the_state():
    """A step function continues where a state is, also one that it has not made itself."""
    predict, params, x, y, layers = mlp_problem()
    optimizer = tkfac.tkfac(0.05, layers)

    def new_step():
        return tkfac.make_train_step(
            predict,
            tkfac.Categorical(),
            optimizer,
            fisher_interval=4,
            inverse_interval=4,
        )

    step = new_step()
    received, state = copy(params), init(optimizer, params)
    for t in range(6):
        received, state, _ = step(received, state, x, targets=y, key=KEYS[t])
    saved = copy((received, state))
    for t in range(6, 8):
        received, state, _ = step(received, state, x, targets=y, key=KEYS[t])
    assert int(optax.tree.get(state, "factor_updates")) == 2

    for resumed_step in (step, new_step()):
        resumed, resumed_state = copy(saved)
        for t in range(6, 8):
            resumed, resumed_state, _ = resumed_step(
                resumed, resumed_state, x, targets=y, key=KEYS[t]
            )
        jax.tree.map(np.testing.assert_array_equal, (resumed, resumed_state), (received, state))


def test_the_state_is_searched_for_once(monkeypatch):
    predict, params, x, y, layers = mlp_problem()
    optimizer, searches = tkfac.tkfac(0.05, layers), []
    search = step_counter.find_state
    monkeypatch.setattr(
        step_counter, "find_state", lambda state: searches.append(state) or search(state)
    )
    step = tkfac.make_train_step(
        predict,
        tkfac.Categorical(),
        optimizer,
        fisher_interval=2,
        inverse_interval=2,
    )
    state = (copy(params), init(optimizer, params))
    for key in KEYS[:4]:
        state = step(*state, x, targets=y, key=key)[:2]
    assert len(searches) == 1


@jax.tree_util.register_pytree_node_class
class Unnamed:
    """A node whose parts have no names."""

    def __init__(self, *parts):
        self.parts = parts

    def tree_flatten(self):
        return self.parts, None

    @classmethod
    def tree_unflatten(cls, _, parts):
        return cls(*parts)


def test_the_counter_finds_a_state_to_which_no_names_lead():
    predict, params, x, y, layers = mlp_problem()
    optimizer = tkfac.tkfac(0.05, layers, damping=0.1, fisher_interval=2, inverse_interval=2)

    def update(grads, state, params, **extra):
        updates, inner = optimizer.update(grads, state.parts[1], params, **extra)
        return updates, Unnamed(state.parts[0] + 1, inner)

    wrapped = optax.GradientTransformationExtraArgs(
        lambda params: Unnamed(jnp.zeros(()), optimizer.init(params)), update
    )
    ends = []
    for made in (optimizer, wrapped):
        step = tkfac.make_train_step(
            predict,
            tkfac.Categorical(),
            made,
            plan=optimizer.plan,
            estimator="empirical",
        )
        state = (copy(params), init(made, params))
        for _ in range(4):
            state = step(*state, x, targets=y)[:2]
        ends.append(state[0])
        assert int(optax.tree.get(state[1], "factor_updates")) == 2
    jax.tree.map(np.testing.assert_array_equal, *ends)


def test_batch_norm_state_comes_back_as_aux():
    predict, params, batch_stats, x, y, layers = convnet_problem()
    optimizer = tkfac.tkfac(0.01, layers)
    step = tkfac.make_train_step(
        predict,
        tkfac.Categorical(),
        optimizer,
        fisher_interval=2,
        inverse_interval=2,
        has_aux=True,
    )
    expected = jax.jit(predict)(params, batch_stats, x)[1]
    params, state = copy(params), init(optimizer, params)
    _, _, metrics = step(params, state, batch_stats, x, targets=y, key=KEYS[0])
    assert set(metrics) == {"loss", "aux", "skipped_statistics", "failed_inversions"}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), metrics["aux"], expected)


def test_under_pmap_loss_gradient_and_statistics_are_averaged():
    predict, params, x, y, layers = mlp_problem()
    optimizer = tkfac.tkfac(0.05, layers)

    def make(axis_name):
        return tkfac.make_train_step(
            predict,
            tkfac.Categorical(),
            optimizer,
            fisher_interval=2,
            inverse_interval=2,
            estimator="empirical",
            axis_name=axis_name,
        )

    devices = 2
    plain, mapped = make(None), make("data")
    expected, expected_state = copy(params), init(optimizer, params)
    received, state = (
        jax.tree.map(lambda leaf: jnp.stack([leaf] * devices), tree)
        for tree in (params, init(optimizer, params))
    )
    for _ in range(4):
        expected, expected_state, one = plain(expected, expected_state, x, targets=y)
        received, state, two = mapped(
            received, state, x.reshape(devices, -1, x.shape[-1]), targets=y.reshape(devices, -1)
        )
        np.testing.assert_allclose(two["loss"], one["loss"], rtol=1e-9)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[1], b, rtol=1e-8, atol=1e-10), received, expected
    )


def test_messages(unchecked):
    predict, params, x, y, layers = mlp_problem()

    def make(optimizer, **options):
        intervals = {"fisher_interval": 1, "inverse_interval": 1} | options
        return tkfac.make_train_step(
            predict, tkfac.Categorical(), optimizer, layers=layers, **intervals
        )

    optimizer = tkfac.tkfac(0.05, layers)
    with pytest.raises(ValueError, match="fisher_interval=0; expected a whole number"):
        make(optimizer, fisher_interval=0)
    with pytest.raises(ValueError, match=r"inverse_interval=1\.5; expected a whole number"):
        make(optimizer, inverse_interval=1.5)
    for estimator in ("true", None):
        with pytest.raises(
            ValueError,
            match=rf"estimator=.?{estimator}.?; expected .sampled., .empirical. or .exact.",
        ):
            make(optimizer, estimator=estimator)
    with pytest.raises(ValueError, match="needs a key: pass key="):
        make(optimizer)(params, init(optimizer, params), x, targets=y)
    more = make(optimizer, statistics_args=lambda x: (jnp.concatenate([x, x]),))
    with pytest.raises(ValueError, match=r"outputs are of 12 examples and the targets of 6"):
        more(params, init(optimizer, params), x, targets=y, key=KEYS[0])
    accumulating = tkfac.multi_steps(optimizer, 2, layers=layers)
    with pytest.raises(ValueError, match="give make_train_step the optimizer itself"):
        make(accumulating)(params, accumulating.init(params), x, targets=y, key=KEYS[0])
    adam = optax.adam(1e-3)
    with pytest.raises(ValueError, match="holds 0 TkfacState; expected exactly one"):
        make(adam)(params, adam.init(params), x, targets=y, key=KEYS[0])


def test_under_pmap_the_adaptive_optimizer_averages_over_the_axis_of_the_step():
    """Also if the optimizer itself is not told of it: else the devices would each take lengths of their own."""
    predict, params, x, y, layers = mlp_problem()
    optimizer = tkfac.adaptive_tkfac(layers, tkfac.Categorical(), initial_damping=0.1)

    def make(axis_name):
        return tkfac.make_train_step(
            predict,
            tkfac.Categorical(),
            optimizer,
            fisher_interval=1,
            inverse_interval=1,
            estimator="empirical",
            axis_name=axis_name,
        )

    plain, mapped = make(None), make("data")
    expected, expected_state = copy(params), init(optimizer, params)
    received, state = (
        jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), tree) for tree in (params, expected_state)
    )
    for _ in range(3):
        expected, expected_state, _ = plain(expected, expected_state, x, targets=y)
        received, state, _ = mapped(
            received, state, x.reshape(2, -1, x.shape[-1]), targets=y.reshape(2, -1)
        )
    for device in range(2):
        jax.tree.map(
            lambda a, b, device=device: np.testing.assert_allclose(
                a[device], b, rtol=1e-7, atol=1e-9
            ),
            received,
            expected,
        )
