import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from mnist_files import make_mnist
from networks import Small
from test_cifar import make_cifar

from benchmarks import autoencoder, cifar, defaults, digits, gpt, one_setting, runner
from benchmarks.directions import orthogonalized, power_inverse

pytestmark = pytest.mark.benchmark


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Small data sets in one directory, and small networks in the places of the four."""
    make_mnist(tmp_path / "data")
    make_cifar(tmp_path / "data")
    original_autoencoder, original_gpt = autoencoder.autoencoder_problem, gpt.gpt_problem
    monkeypatch.setattr(
        autoencoder,
        "autoencoder_problem",
        lambda folder, seed: original_autoencoder(folder, seed, (12, 5, 12)),
    )
    monkeypatch.setattr(gpt, "gpt_problem", lambda seed: original_gpt(seed, width=8, blocks=2))
    monkeypatch.setitem(cifar.NETWORKS, "resnet20", Small)
    monkeypatch.setattr(digits, "ConvNet", lambda: Small(10, 1.0))
    for module, size in ((autoencoder, 250), (gpt, 8), (cifar, 16)):
        monkeypatch.setattr(module, "BATCH_SIZE", size)
    return tmp_path


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["defaults", *map(str, arguments)])
    defaults.main()


def test_the_command_trains_all_tasks(small, monkeypatch, capsys):
    out = small / "out"
    command(monkeypatch, "--data-dir", small / "data", "--out-dir", out, "--steps", "12")
    results = json.loads((out / "defaults.json").read_text())
    assert list(results["runs"]) == list(defaults.TASKS)
    for name, runs in results["runs"].items():
        assert [run["method"] for run in runs] == ["Adam", "TKFAC"]
        for run in runs:
            first, last = run["curve"][0], run["curve"][-1]
            assert (first["step"], last["step"]) == (0, 12)
            assert np.isfinite(last["train_loss"])
            assert last["train_loss"] != first["train_loss"]
        assert runs[0]["curve"][0]["train_loss"] == runs[1]["curve"][0]["train_loss"]
        assert runs[0]["curve"][-1]["train_loss"] != runs[1]["curve"][-1]["train_loss"]
        assert (out / f"{name}.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    for name in defaults.TASKS:
        assert f"| {name}, 12 steps" in printed
    assert "accuracy" in printed


def test_the_autoencoder_trains_on_the_mean_over_pixels(small):
    problem = defaults.autoencoder_problem(small / "data", 0)
    images = jnp.asarray(problem.inputs[:3])
    outputs, _ = problem.predict(problem.params, {}, images)
    received = problem.likelihood.nll(outputs, images)
    summed = autoencoder.autoencoder_problem(small / "data", 0).likelihood
    np.testing.assert_allclose(received, summed.nll(outputs, images) / 784, rtol=1e-5)


def test_stopped_commands_go_on_to_the_same_result(small, monkeypatch):
    task = defaults.TASKS["autoencoder"]
    monkeypatch.setitem(defaults.TASKS, "autoencoder", task._replace(turn=3))
    options = ["--data-dir", small / "data", "--tasks", "autoencoder", "--steps", "6"]
    options += ["--seeds", "1", "--out-dir"]
    command(monkeypatch, *options, small / "whole")
    advance, calls = runner.Run.advance, []

    def stopping(run, steps):
        calls.append(run)
        if len(calls) == 4:
            raise KeyboardInterrupt
        advance(run, steps)

    monkeypatch.setattr(runner.Run, "advance", stopping)
    with pytest.raises(KeyboardInterrupt):
        command(monkeypatch, *options, small / "parts")
    command(monkeypatch, *options, small / "parts")
    # Two methods of two turns, and the call that was stopped.
    assert len(calls) == 2 * 2 + 1
    whole, parts = (
        json.loads((small / name / "defaults.json").read_text())["runs"]["autoencoder"]
        for name in ("whole", "parts")
    )
    assert [(run["method"], run["seed"]) for run in whole] == [("Adam", 1), ("TKFAC", 1)]
    for received, expected in zip(parts, whole, strict=True):
        for one, other in zip(received["curve"], expected["curve"], strict=True):
            assert one | {"seconds": 0} == other | {"seconds": 0}


def test_tasks_with_data_ask_for_its_directory(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["defaults", "--tasks", "digits", "resnet20"])
    with pytest.raises(SystemExit):
        defaults.parse_options()
    assert (
        "for resnet20 give --data-dir: a directory with the files of MNIST"
        in capsys.readouterr().err
    )
    monkeypatch.setattr(sys, "argv", ["defaults", "--tasks", "digits", "gpt"])
    assert defaults.parse_options().data_dir is None


def one_setting_command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["one_setting", *map(str, arguments)])
    one_setting.main()


# One of each way in which a variant is built; what is not named here differs from these in numbers alone.
VARIANTS = (
    "tkfacw",
    "constant",
    "powers 1/2",
    "embeddings, output by Adam",
    "Muon in the ball",
)


def test_runs_of_one_setting_are_kept_and_not_made_again(small, monkeypatch, capsys):
    out = small / "runs.json"
    arguments = ("--tasks", "gpt", "--steps", 8, "--out", out, "--methods")
    one_setting_command(monkeypatch, *arguments, *VARIANTS[:2])
    first = json.loads(out.read_text())["runs"]
    made = []
    original = one_setting.Run
    monkeypatch.setattr(
        one_setting, "Run", lambda *a, **k: made.append(a[1].name) or original(*a, **k)
    )
    one_setting_command(monkeypatch, *arguments, *VARIANTS)
    assert made == list(VARIANTS[2:])
    runs = json.loads(out.read_text())["runs"]
    assert [run for run in runs if run["method"] in VARIANTS[:2]] == first
    assert {run["method"] for run in runs} == set(VARIANTS)
    losses = [run["end"]["train_loss"] for run in runs]
    assert np.isfinite(losses).all()
    assert len(set(losses)) == len(losses)
    printed = capsys.readouterr().out
    assert "| gpt, 8 |" in " ".join(printed.split())
    assert "(averaged " in printed


def test_the_picture_of_rates(small, monkeypatch, capsys):
    out = small / "runs.json"
    monkeypatch.setitem(one_setting.TASKS, "gpt", defaults.TASKS["gpt"]._replace(steps=4))
    rates = ("--rates", 0.01, 0.02, 0.04)
    one_setting_command(monkeypatch, "--tasks", "gpt", "--out", out, "--methods", "AdamW", *rates)
    picture = small / "rates.png"
    one_setting_command(monkeypatch, "--out", out, "--picture", picture)
    assert picture.stat().st_size > 5_000
    assert "losses are in" in capsys.readouterr().out


def test_every_variant_of_one_setting_differs_from_the_default():
    variants = one_setting.VARIANTS
    assert [name for name, own in variants.items() if own == variants["tkfacw"]] == ["tkfacw"]


@pytest.mark.parametrize("shape", [(6, 6), (9, 4), (2, 3, 8)])
def test_the_iteration_of_muon_makes_singular_values_of_about_one(shape):
    matrices = jnp.asarray(np.random.default_rng(0).normal(size=shape))
    values = np.linalg.svd(orthogonalized(matrices), compute_uv=False)
    # Its coefficients trade exactness for speed: they end anywhere from 0.7 to 1.2, smaller ones lower.
    assert values.min() > 0.3
    assert values.max() < 1.3
    np.testing.assert_array_equal(orthogonalized(jnp.zeros(shape)), 0)


def test_powers_of_inverses():
    root = np.random.default_rng(0).normal(size=(3, 4, 4))
    matrices = root @ root.mT + np.eye(4)
    half = power_inverse(0.5)(jnp.asarray(matrices))
    np.testing.assert_allclose(
        half @ half @ matrices, np.broadcast_to(np.eye(4), (3, 4, 4)), atol=1e-9
    )
