import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from mnist_files import make_mnist
from networks import Small
from test_cifar import make_cifar

from benchmarks import autoencoder, cifar, defaults, digits, gpt, runner

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
