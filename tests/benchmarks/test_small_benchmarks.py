import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mnist_files import make_mnist, write_idx
from networks import Small

import tkfac_jax as tkfac
from benchmarks import autoencoder, contest, diabetes, digits, gpt, mnist, nnx_digits, physics
from benchmarks.figures import goals_table, steps_to_reach, table, tuning_table
from benchmarks.peers import has_kfac_jax, kfac_jax_adaptive
from benchmarks.runner import Run, best_of, race

pytestmark = pytest.mark.benchmark


@pytest.mark.parametrize("place", ["x.gz", "x", "mnist/x.gz", "MNIST/raw/x"])
def test_idx_files_are_found_and_read(tmp_path, place):
    array = np.arange(24).reshape(2, 3, 4)
    write_idx(tmp_path / place, array)
    np.testing.assert_array_equal(mnist.read_idx(mnist.find_file(tmp_path, "x")), array)


def test_mnist_is_scaled_and_flat(tmp_path):
    make_mnist(tmp_path)
    images = mnist.load_images(tmp_path, "test")
    assert images.shape == (50, 784)
    assert images.dtype == np.float32
    assert 0 <= images.min() < 0.1 < 0.9 < images.max() <= 1
    assert mnist.load_labels(tmp_path, "train").shape == (1000,)


def test_absent_files_are_downloaded_with_a_checksum_and_said_so(tmp_path, monkeypatch, capsys):
    asked = {}

    def retrieve(url, known_hash, fname, path):
        asked.update(url=url, known_hash=known_hash)
        return str(path / fname)

    monkeypatch.setattr(mnist.pooch, "retrieve", retrieve)
    found = mnist.find_file(tmp_path, mnist.IMAGES["train"])
    assert found == tmp_path / "mnist" / "train-images-idx3-ubyte.gz"
    assert asked["url"].endswith("/train-images-idx3-ubyte.gz")
    assert asked["known_hash"] == "md5:f68b3c2dcbeaaa9fbdd348bbdeb94873"
    assert "downloading it from" in capsys.readouterr().out


def test_broken_idx_files(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"no idx file at all")
    with pytest.raises(ValueError, match="is not an idx file of bytes"):
        mnist.read_idx(path)
    write_idx(path, np.zeros((2, 3)))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        ValueError, match=r"holds 5 bytes; its header announces an array of shape \(2, 3\)"
    ):
        mnist.read_idx(path)


def test_table_and_steps_to_reach():
    assert table([("a", "b"), ("xx", "1.5")]).splitlines() == [
        "| a  |   b |",
        "| -- | --: |",
        "| xx | 1.5 |",
    ]
    curve = [
        {"step": s, "train_loss": loss} for s, loss in ((0, 9.0), (5, 3.0), (10, 4.0), (15, 1.0))
    ]
    assert steps_to_reach({"curve": curve}, 3.0) == 5
    assert steps_to_reach({"curve": curve}, 2.0) == 15
    assert steps_to_reach({"curve": curve}, 0.5) is None


@pytest.fixture
def small_autoencoder(tmp_path, monkeypatch):
    make_mnist(tmp_path / "data")
    monkeypatch.setattr(autoencoder, "BATCH_SIZE", 250)
    return tmp_path


def test_an_interrupted_run_ends_as_an_undisturbed_one(small_autoencoder):
    problem = autoencoder.autoencoder_problem(small_autoencoder / "data", 0, (12, 5, 12))
    method = autoencoder.trials()["TKFAC"][1]
    whole = Run(problem, method, seed=0)
    race([whole], steps=30, turn=6, title="whole")
    folder = small_autoencoder / "checkpoints"
    folder.mkdir()
    first = Run(problem, method, 0, folder)
    race([first], steps=18, turn=6, title="first part")
    second = Run(problem, method, 0, folder)
    assert second.step == 18
    race([second], steps=30, turn=6, title="second part")
    for received, expected in zip(second.curve, whole.curve, strict=True):
        assert received["step"] == expected["step"]
        assert received["train_loss"] == expected["train_loss"]
    jax.tree.map(np.testing.assert_array_equal, second.trees, whole.trees)


def test_the_best_trial_is_chosen_and_trials_are_not_repeated(small_autoencoder, monkeypatch):
    problem = autoencoder.autoencoder_problem(small_autoencoder / "data", 0, (12, 5, 12))
    trials = autoencoder.trials()["Adam"]
    chosen, records = best_of(problem, trials, 4, 4, 0, small_autoencoder / "tuning")
    losses = [record["train_loss"] for record in records]
    assert chosen is trials[int(np.argmin(losses))]
    assert len(set(losses)) == 5
    monkeypatch.setattr("benchmarks.runner.Run", None)
    assert best_of(problem, trials, 4, 4, 0, small_autoencoder / "tuning") == (chosen, records)


def test_the_autoencoder_command(small_autoencoder, monkeypatch, capsys):
    out, trials = small_autoencoder / "out", autoencoder.trials()
    assert {len(tried) for tried in trials.values()} == {5}
    # Each trial of TKFAC compiles its own programs.
    two = {name: tried[:2] for name, tried in trials.items()}
    monkeypatch.setattr(autoencoder, "trials", lambda: two)
    arguments = ["--data-dir", str(small_autoencoder / "data"), "--out-dir", str(out)]
    arguments += ["--epochs", "2", "--tuning-epochs", "1", "--methods", "Adam", "TKFAC"]
    arguments += ["--widths", "12", "5", "12", "--seeds", "0", "1"]
    monkeypatch.setattr(sys, "argv", ["autoencoder", *arguments])
    autoencoder.main()
    results = json.loads((out / "autoencoder.json").read_text())
    runs = [(run["method"], run["seed"]) for run in results["runs"]]
    assert runs == [("Adam", 0), ("TKFAC", 0), ("Adam", 1), ("TKFAC", 1)]
    ends = [run["curve"][-1]["train_loss"] for run in results["runs"]]
    assert len(set(ends)) == 4
    tried = {name: len(records) for name, records in results["tuning"].items()}
    assert tried == {"Adam": 2, "TKFAC": 2}
    assert results["widths"] == [12, 5, 12]
    assert [point["step"] for point in results["runs"][0]["curve"]] == [0, 4, 8]
    assert (out / "autoencoder.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    for first, second in zip(ends[:2], ends[2:], strict=True):
        assert f"| {(first + second) / 2:.2f} |" in " ".join(printed.split())


def test_the_digits_command(tmp_path, monkeypatch, capsys):
    # `make demo` trains the network of the benchmark.
    monkeypatch.setattr(digits, "ConvNet", lambda: Small(10, 1.0))
    monkeypatch.setattr(sys, "argv", ["digits", "--steps", "20", "--out-dir", str(tmp_path)])
    digits.main()
    results = json.loads((tmp_path / "digits.json").read_text())
    assert [run["method"] for run in results["runs"]] == [
        method.name for method in digits.methods(20)
    ]
    for run in results["runs"]:
        assert run["curve"][-1]["train_loss"] < run["curve"][0]["train_loss"]
    assert (tmp_path / "digits.png").stat().st_size > 10_000
    assert "test accuracy" in capsys.readouterr().out


def test_the_tuning_table_says_what_diverged():
    tuning = {
        "A": [{"settings": "lr 1", "steps": 3, "train_loss": loss} for loss in (0.12345, None)]
    }
    lines = tuning_table(tuning).splitlines()
    assert lines[2].endswith("0.1235 |")
    assert lines[3].endswith("diverged |")


def test_characters_become_tokens():
    np.testing.assert_array_equal(gpt.encode(" ~A\n\u00e9\u2019"), [0, 94, 33, 95, 96, 96])


def test_each_target_is_the_next_character():
    inputs, targets = gpt.read_text()
    assert inputs.shape == targets.shape == (len(inputs), gpt.CONTEXT)
    assert len(inputs) * gpt.CONTEXT > 300_000
    assert 0 <= inputs.min() < inputs.max() < gpt.VOCABULARY
    np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
    np.testing.assert_array_equal(
        inputs.ravel()[1:][gpt.CONTEXT - 1 :: gpt.CONTEXT], targets[:-1, -1]
    )


def test_the_language_model_sees_no_later_character():
    problem = gpt.gpt_problem(0, width=8, blocks=2)
    before = np.array(problem.inputs[:2])
    after = before.copy()
    after[:, 40:] = (after[:, 40:] + 1) % gpt.VOCABULARY
    expected, _ = problem.predict(problem.params, {}, before)
    received, _ = problem.predict(problem.params, {}, after)
    # Masked positions weigh exactly zero.
    np.testing.assert_array_equal(received[:, :40], expected[:, :40])
    assert not np.array_equal(received[:, 40:], expected[:, 40:])


def test_every_block_of_the_language_model_has_its_own_factors():
    layers = gpt.gpt_problem(0, width=8, blocks=3).find_layers()
    stacked = {name for name, spec in layers.items() if spec.stack == (3,)}
    attention = "blocks/MultiHeadDotProductAttention_0"
    assert stacked == {
        "blocks/Dense_0",
        "blocks/Dense_1",
        *(f"{attention}/{part}" for part in ("query", "key", "value", "out")),
    }
    assert set(layers) - stacked == {"tokens", "positions", "head"}
    assert all("LayerNorm" in name for name in layers.fallback)


@pytest.fixture
def small_gpt(monkeypatch):
    original = gpt.gpt_problem
    monkeypatch.setattr(gpt, "gpt_problem", lambda seed: original(seed, width=8, blocks=2))
    monkeypatch.setattr(gpt, "BATCH_SIZE", 8)


def test_the_gpt_command(small_gpt, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpt", "--steps", "30", "--out-dir", str(tmp_path)])
    gpt.main()
    results = json.loads((tmp_path / "gpt.json").read_text())
    assert [run["method"] for run in results["runs"]] == list(gpt.trials(30))
    assert results["tuning"] == {}
    for run in results["runs"]:
        assert [point["step"] for point in run["curve"]] == [0, 10, 20, 30]
        assert run["curve"][-1]["train_loss"] < run["curve"][0]["train_loss"]
    assert (tmp_path / "gpt.png").stat().st_size > 10_000
    assert "test loss" in capsys.readouterr().out


def test_the_nnx_digits_command(tmp_path, monkeypatch, capsys):
    trials = nnx_digits.trials()

    def command(chosen, *more):
        monkeypatch.setattr(nnx_digits, "trials", lambda: chosen)
        # TKFAC's loss rises in the first twenty steps.
        arguments = ["--steps", "60", "--out-dir", str(tmp_path), *more]
        monkeypatch.setattr(sys, "argv", ["nnx_digits", *arguments])
        nnx_digits.main()
        results = json.loads((tmp_path / "nnx_digits.json").read_text())
        for run in results["runs"]:
            assert run["curve"][-1]["train_loss"] < run["curve"][0]["train_loss"]
        return results

    tuned = command({"Adam": trials["Adam"][:2]}, "--tune")
    assert {name: len(records) for name, records in tuned["tuning"].items()} == {"Adam": 2}
    both = command({name: trials[name][:1] for name in ("Adam", "TKFAC")})
    assert both["tuning"] == {}
    assert [run["method"] for run in both["runs"]] == ["Adam", "TKFAC"]
    assert (tmp_path / "nnx_digits.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "settings |" in printed
    assert "test accuracy" in printed


def test_nnx_layers_and_running_averages():
    problem = nnx_digits.nnx_problem(0)
    layers = problem.find_layers()
    assert layers["first/depthwise"].batch == (16,)
    assert {name.rpartition("/")[2] for name in layers} == {
        "stem",
        "depthwise",
        "pointwise",
        "head",
    }
    run = Run(problem, nnx_digits.trials()["TKFAC"][0], seed=0)
    run.advance(1)
    for before, after in zip(
        jax.tree.leaves(problem.model_state), jax.tree.leaves(run.trees[2]), strict=True
    ):
        assert not np.array_equal(before, after)


@pytest.fixture
def small_contest(monkeypatch):
    """Two methods, one setting each, where kfac-jax need not be installed."""
    monkeypatch.setattr(contest, "DAMPINGS", (0.1,))
    monkeypatch.setattr(contest, "MEMORIES", (5,))
    monkeypatch.setattr(contest, "RATES", (0.01,))
    monkeypatch.setattr(contest, "has_kfac_jax", lambda: False)


def test_jets_carry_first_derivatives_and_laplacian():
    model = physics.Jets(widths=(5, 4))
    points = jax.random.normal(jax.random.key(0), (3, 3), jnp.float64)
    params = model.init(jax.random.key(1), points)["params"]
    value = lambda z: model.apply({"params": params}, z[None])[0, 0]  # noqa: E731
    rows = model.apply({"params": params}, points)
    np.testing.assert_allclose(rows[:, 1:4], jax.vmap(jax.grad(value))(points), rtol=1e-10)
    hessians = jax.vmap(jax.hessian(value))(points)
    expected = np.trace(hessians[:, :2, :2], axis1=1, axis2=2)
    np.testing.assert_allclose(rows[:, 4], expected, rtol=1e-10)


@pytest.mark.parametrize("name", physics.EQUATIONS)
def test_exact_solutions_fulfil_their_equations(name):
    """With the exact solution's own derivatives for a network all residuals and errors are 0."""
    equation = physics.EQUATIONS[name]
    inputs, targets = physics.collocation(equation, 0)
    points, inside, weights = inputs[:, :-2], inputs[:, -2], inputs[:, -1]
    step = 1e-4

    def rows_of(points):
        moved = lambda axis, by: equation.solution(points + by * np.eye(points.shape[1])[axis])  # noqa: E731
        value = equation.solution(points)
        slopes = [
            (moved(axis, step) - moved(axis, -step)) / (2 * step) for axis in range(points.shape[1])
        ]
        bends = [(moved(a, step) - 2 * value + moved(a, -step)) / step**2 for a in range(2)]
        return np.stack([value, *slopes, sum(bends)], axis=1)

    rows = rows_of(points)
    outputs = weights * np.where(inside > 0, equation.operator(rows), rows[:, 0])
    # Second differences of a step of 1e-4 are good to about 1e-6.
    np.testing.assert_allclose(outputs, targets[:, 0], atol=1e-4)


def test_the_diabetes_command(small_contest, tmp_path, monkeypatch, capsys):
    arguments = ["--seconds", "0.2", "--turn", "5", "--out-dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["diabetes", *arguments])
    diabetes.main()
    results = json.loads((tmp_path / "diabetes.json").read_text())
    assert [run["method"] for run in results["runs"]] == ["TKFAC adaptive", "L-BFGS", "Adam"]
    for run in results["runs"]:
        assert run["curve"][-1]["train_loss"] < run["curve"][0]["train_loss"]
        assert run["curve"][-1]["test_error"] > 0
    printed = capsys.readouterr().out
    assert "steps and seconds to a training loss" in printed
    assert "lowest test error" in printed


def test_the_physics_problem_is_solved(small_contest):
    problem = physics.physics_problem("poisson", 0, (16,))
    run = Run(problem, contest.trials(problem.likelihood)["TKFAC adaptive"][0], 0)
    run.advance(30)
    assert run.curve[-1]["error"] < 0.3 * run.curve[0]["error"]


def test_averages_of_parameters_are_evaluated(small_autoencoder):
    problem = autoencoder.autoencoder_problem(small_autoencoder / "data", 0, (12, 5, 12))
    method = autoencoder.trials()["Adam"][2]
    run, plain = Run(problem, method, 0, averaging=0.5), Run(problem, method, 0)
    parameters = []
    for _ in range(3):
        run.advance(1)
        plain.advance(1)
        parameters.append(jax.device_get(plain.trees[0]))
    assert run.curve[-1]["train_loss"] == plain.curve[-1]["train_loss"]
    # Weights 1, 1/2 and then 1 - averaging.
    expected = jax.tree.map(lambda a, b, c: (a + b) / 4 + c / 2, *parameters)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), run.average, expected
    )
    assert run.curve[-1]["averaged_train_loss"] != run.curve[-1]["train_loss"]


def test_goals_table():
    curve = [
        {"step": s, "seconds": s / 10, "train_loss": loss, "error": 2 * loss}
        for s, loss in ((0, 9.0), (5, 3.0), (10, 1.0))
    ]
    record = {"method": "A", "settings": "s", "median_step_ms": 12.3, "curve": curve}
    received = goals_table(
        [record], [3.0, 0.5], {"train_loss": "", "error": ", error", "none": ""}, lowest=True
    )
    assert received.splitlines()[2:] == [
        "| A        |        s |        12.3 | 5 steps, 0.5 s | not reached |      1 |",
        "| A, error |        s |        12.3 |  10 steps, 1 s | not reached |      2 |",
    ]


@pytest.fixture
def compilations():
    """The seconds of each compilation so far."""
    seconds = []

    def listen(event, duration, **_):
        if event.endswith("backend_compile_duration"):
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seconds
    jax.monitoring.clear_event_listeners()


needs_kfac_jax = pytest.mark.skipif(
    not has_kfac_jax(), reason="kfac-jax is not installed: see make peers"
)


@pytest.mark.parametrize(
    "name",
    ["TKFAC adaptive", "L-BFGS", "Adam", pytest.param("kfac-jax adaptive", marks=needs_kfac_jax)],
)
@pytest.mark.filterwarnings("ignore")
def test_no_program_is_compiled_while_time_is_taken(name, compilations):
    problem = diabetes.diabetes_problem(0)
    run = Run(problem, contest.trials(problem.likelihood)[name][0], 0)
    assert compilations
    compilations.clear()
    run.advance(23)
    assert compilations == []


def test_intervals_that_differ_have_all_their_programs_compiled(small_autoencoder, compilations):
    problem = autoencoder.autoencoder_problem(small_autoencoder / "data", 0, (12, 5, 12))
    run = Run(problem, autoencoder.trials()["TKFAC adaptive"][0], 0)
    compilations.clear()
    run.advance(23)
    assert compilations == []


@needs_kfac_jax
@pytest.mark.filterwarnings("ignore")
def test_kfac_jax_reduces_the_loss():
    problem = diabetes.diabetes_problem(0)
    run = Run(problem, kfac_jax_adaptive(initial_damping=0.1), 0)
    run.advance(10)
    assert run.loss < 0.5 * run.curve[0]["train_loss"]


def test_without_kfac_jax_its_methods_are_left_out_and_that_is_said(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert "kfac-jax adaptive" not in contest.trials(tkfac.Normal())
    assert "`make peers` makes an environment with it" in capsys.readouterr().out
