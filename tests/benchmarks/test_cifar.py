import functools
import hashlib
import json
import shutil
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from networks import Small, mlp_problem

import tkfac_jax as tkfac
from benchmarks import cifar, cifar_data, factored_damping, runner, trace_damping
from benchmarks.cifar_data import FORMATS
from benchmarks.figures import mean_and_deviation, mean_curve

pytestmark = pytest.mark.benchmark


def write_records(path, images, *labels):
    """Official records: a byte for each kind of label, then the planes of red, green and blue."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for record in zip(images, *labels, strict=True):
            image, *numbers = record
            file.write(bytes(numbers))
            for channel in range(3):
                file.write(image[:, :, channel].tobytes())


def make_cifar(folder, dataset="cifar10", examples=16):
    """A synthetic set with so many records in each file; a bright class can be told from a dark one."""
    form, rng = FORMATS[dataset], np.random.default_rng(0)
    made = {"train": [], "test": []}
    for split, names in form.files.items():
        for name in names:
            labels = rng.integers(0, 2, examples)
            images = rng.integers(0, 56, (examples, 32, 32, 3)) + 150 * labels[:, None, None, None]
            images = images.astype(np.uint8)
            coarse = [rng.integers(20, 250, examples)] * (form.label_bytes - 1)
            write_records(folder / form.folder / name, images, *coarse, labels)
            made[split].append((images, labels))
    return {
        split: tuple(map(np.concatenate, zip(*parts, strict=True))) for split, parts in made.items()
    }


@pytest.mark.parametrize("dataset", FORMATS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_splits_are_read_as_written(tmp_path, dataset, split):
    images, labels = make_cifar(tmp_path, dataset, examples=3)[split]
    received_images, received_labels = cifar_data.load_split(tmp_path, dataset, split)
    assert len(labels) == (15 if (dataset, split) == ("cifar10", "train") else 3)
    np.testing.assert_array_equal(received_images, images)
    np.testing.assert_array_equal(received_labels, labels)
    assert received_images.dtype == np.uint8
    assert received_labels.dtype == np.int32


def test_the_bytes_of_a_record(tmp_path):
    """By hand: label 7, then red 1, green 2 and blue 3, whose second pixel of the first row is 9."""
    planes = bytes([1]) * 1024 + bytes([2]) * 1024 + bytes([3, 9]) + bytes([3]) * 1022
    (tmp_path / "x.bin").write_bytes(bytes([7]) + planes)
    images, labels = cifar_data.read_records(tmp_path / "x.bin", FORMATS["cifar10"])
    assert labels.tolist() == [7]
    assert images[0, 0, 1].tolist() == [1, 2, 9]
    assert images[0, 1, 0].tolist() == [1, 2, 3]


def test_broken_and_missing_files(tmp_path):
    make_cifar(tmp_path, examples=2)
    path = tmp_path / "cifar-10-batches-bin" / "data_batch_3.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(
        ValueError, match=r"data_batch_3.bin holds 6145 bytes; expected records of 3073"
    ):
        cifar_data.load_split(tmp_path, "cifar10", "train")
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="holds 0 bytes"):
        cifar_data.load_split(tmp_path, "cifar10", "train")
    path.write_bytes(bytes([10]) + whole[1:])
    with pytest.raises(ValueError, match="has the label 10; expected less than 10"):
        cifar_data.load_split(tmp_path, "cifar10", "train")
    path.unlink()
    with pytest.raises(ValueError, match=r"data_batch_3.bin is missing"):
        cifar_data.load_split(tmp_path, "cifar10", "train")


@pytest.mark.parametrize("dataset", FORMATS)
def test_an_absent_folder_is_taken_from_the_official_archive(
    tmp_path, monkeypatch, capsys, dataset
):
    form = FORMATS[dataset]
    images, labels = make_cifar(tmp_path / "made", dataset, examples=2)["test"]
    archive = tmp_path / form.archive
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "made" / form.folder, form.folder)
    checksum = f"md5:{hashlib.md5(archive.read_bytes()).hexdigest()}"
    # An archive of the right checksum is already there, so that nothing is fetched.
    monkeypatch.setitem(cifar_data.FORMATS, dataset, form._replace(checksum=checksum))
    received_images, received_labels = cifar_data.load_split(tmp_path, dataset, "test")
    np.testing.assert_array_equal(received_images, images)
    np.testing.assert_array_equal(received_labels, labels)
    assert f"{form.folder} is not in {tmp_path}: downloading it from" in capsys.readouterr().out


def test_the_archive_is_asked_for_with_its_checksum(tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr(
        cifar_data.pooch, "retrieve", lambda url, **options: asked.update(url=url, **options)
    )
    cifar_data.find_folder(tmp_path, FORMATS["cifar100"])
    assert asked["url"] == "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz"
    assert asked["known_hash"] == "md5:03b5dce01913d631647c71ecec9e9cb8"
    assert asked["path"] == tmp_path


def test_channel_statistics():
    images = np.random.default_rng(1).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    images[..., 1] //= 4
    mean, deviation = cifar_data.channel_statistics(images)
    np.testing.assert_allclose(mean, images.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(deviation, images.std((0, 1, 2)), rtol=1e-6)


def test_augmented_images_are_shifted_and_mirrored_only():
    images = np.random.default_rng(2).integers(1, 256, (200, 6, 5, 3), dtype=np.uint8)
    received = cifar_data.crop_and_flip(images, np.random.default_rng(3), pad=2)
    assert received.dtype == np.uint8
    found = set()
    for before, after in zip(images, received, strict=True):
        padded = np.zeros((10, 9, 3), np.uint8)
        padded[2:8, 2:7] = before
        matches = [
            (top, left, mirrored)
            for top in range(5)
            for left in range(5)
            for mirrored in (False, True)
            if np.array_equal(
                padded[top : top + 6, left : left + 5][:, :: -1 if mirrored else 1], after
            )
        ]
        assert len(matches) == 1
        found.update(matches)
    # Of the 50 equally likely ones, 49 are expected among 200 images.
    assert len(found) > 40


def test_augmentation_is_a_function_of_the_generator():
    images = np.random.default_rng(2).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    one, same, other = (
        cifar_data.crop_and_flip(images, np.random.default_rng(seed)) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A small data set, and a small network by the name of ResNet20."""
    make_cifar(tmp_path / "data")
    monkeypatch.setattr(cifar, "BATCH_SIZE", 16)
    monkeypatch.setattr(cifar, "INTERVAL", 3)
    monkeypatch.setattr(cifar, "EVALUATION_BATCH", 7)
    monkeypatch.setitem(cifar.NETWORKS, "resnet20", Small)
    return tmp_path


def test_evaluation_is_of_whole_images_at_rest(small):
    data = cifar.load_cifar(small / "data", "cifar10")
    model = Small(10, 1.0)
    problem = cifar.cifar_problem(data, model, 0, evaluation_examples=20)
    method = cifar.trials(2, "resnet20", 100)["SGDM"][0]
    run = runner.Run(problem, method, 0)
    run.advance(3)
    params, _, batch_stats = run.trees
    mean, deviation = (f(data.train[0], axis=(0, 1, 2)) for f in (np.mean, np.std))
    for split, count in (("train", 20), ("test", 16)):
        images, labels = (array[:count] for array in getattr(data, split))
        logits = model.apply(
            {"params": params, "batch_stats": batch_stats},
            jnp.asarray((images - mean) / deviation, jnp.float32),
            train=False,
        )
        losses = -jax.nn.log_softmax(logits)[np.arange(count), labels]
        # Single precision.
        np.testing.assert_allclose(run.curve[-1][f"{split}_loss"], losses.mean(), rtol=1e-4)
        accuracy = (logits.argmax(-1) == labels).mean()
        np.testing.assert_allclose(run.curve[-1][f"{split}_accuracy"], accuracy, rtol=1e-6)


def test_every_batch_is_augmented_anew_and_by_seed_and_step_alone(small):
    """Of a set whose images are all the same one, batches differ by their augmentation only."""
    data = cifar.load_cifar(small / "data", "cifar10")
    images, labels = data.train
    data = data._replace(train=(np.broadcast_to(images[:1], images.shape), labels))
    problem = cifar.cifar_problem(data, Small(10, 1.0), 0)
    problem = problem._replace(evaluate=lambda *_: {"train_loss": 0.0})

    def batches(seed, *turns):
        seen = []

        def record(trees, inputs, targets, key):
            seen.append(inputs)
            return trees

        method = runner.Method(
            "none", "", lambda _: optax.identity(), make_step=lambda *_: record, programs=0
        )
        run = runner.Run(problem, method, seed)
        for turn in turns:
            run.advance(turn)
        return np.stack(seen)

    received = batches(0, 7)
    np.testing.assert_array_equal(received, batches(0, 2, 5))
    assert len(np.unique(received, axis=0)) == 7
    assert not np.array_equal(received, batches(1, 7))
    # Neither all as they were nor all alike.
    assert len(np.unique(received[0], axis=0)) > 8


@pytest.mark.parametrize(
    ("drop", "expected"),
    [
        (cifar.SECOND_ORDER_DROP, {0: 1, 39: 1, 40: 0.1, 79: 0.1, 80: 0.01, 199: 1e-4}),
        (cifar.FIRST_ORDER_DROP, {0: 1, 59: 1, 60: 0.1, 119: 0.1, 120: 0.01, 199: 1e-3}),
    ],
)
def test_rates_drop_as_in_the_paper(drop, expected):
    rate = cifar.schedule(0.3, drop, 2000)
    for epoch, factor in expected.items():
        np.testing.assert_allclose(rate(10 * epoch), 0.3 * factor, rtol=1e-5)
        np.testing.assert_allclose(rate(10 * epoch + 9), 0.3 * factor, rtol=1e-5)
    assert cifar.schedule(0.3, drop, None) == 0.3


@pytest.mark.parametrize(
    ("name", "drop", "expected"),
    [("SGDM", None, 60), ("Adam", 40, 40), ("TKFAC_nor", None, 40), ("TKFAC_nor", 60, 60)],
)
def test_when_rates_drop(name, drop, expected, monkeypatch):
    """Those of the parameters that are left to the fallback, too."""
    schedule, drops = cifar.schedule, []
    monkeypatch.setattr(
        cifar,
        "schedule",
        lambda rate, drop, steps: drops.append(drop) or schedule(rate, drop, steps),
    )
    layers, _ = conv_and_dense(1.0, 1.0)
    method = cifar.make_method(name, cifar.RESNET_SETTINGS[name], (1e-3, 1e-8), 100, drop)
    method.build(layers)
    assert set(drops) == {expected}


@pytest.mark.parametrize(("rate", "expected"), [(None, 1e-3), (3e-3, 3e-3), (0.0, 0.0)])
def test_rate_of_batch_norms_adam(rate, expected, monkeypatch):
    fallbacks, adam = [], cifar.adam
    monkeypatch.setattr(
        cifar, "adam", lambda setting, *rest: fallbacks.append(setting) or adam(setting, *rest)
    )
    layers, _ = conv_and_dense(1.0, 1.0)
    for name, methods in cifar.trials(2, "resnet20", 100, None, rate).items():
        for method in methods:
            if name in ("KFAC", "TKFAC_nor", "TKFAC_new"):
                method.build(layers)
    assert set(fallbacks) == {(expected, 1e-8)}


def test_a_rate_for_all_methods_leaves_their_other_numbers_and_batch_norms_adam(monkeypatch):
    fallbacks, adam = [], cifar.adam
    monkeypatch.setattr(
        cifar, "adam", lambda setting, *rest: fallbacks.append(setting) or adam(setting, *rest)
    )
    layers, _ = conv_and_dense(1.0, 1.0)
    found = cifar.trials(2, "vgg16", 100, rate=3e-3)
    assert {name: methods[0].settings for name, methods in found.items()} == {
        "SGDM": "lr 0.003",
        "Adam": "lr 0.003, epsilon 1e-08",
        "KFAC": "lr 0.003, damping 0.001",
        "TKFAC_nor": "lr 0.003, damping 0.001",
        "TKFAC_new": "lr 0.003, damping 0.001, floor 1",
    }
    found["KFAC"][0].build(layers)
    # Table 2's of Adam.
    assert fallbacks == [(3e-4, 1e-8)]


@pytest.mark.parametrize("experiment", cifar.TABLE_2)
def test_every_method_has_five_trials_on_the_grids_and_table_2_comes_first(experiment):
    settings = cifar.TABLE_2[experiment]
    for name, methods in cifar.trials(*experiment, 100).items():
        assert len({method.slug for method in methods}) == len(methods) == 5
        tried = cifar.neighbours(name, settings[name])
        assert tried[0] == settings[name]
        for setting in tried[1:]:
            changed = [
                what
                for what, new, old in zip(cifar.NUMBERS[name], setting, tried[0], strict=True)
                if new != old
            ]
            assert len(changed) == 1
            assert setting[cifar.NUMBERS[name].index(changed[0])] in cifar.GRIDS[changed[0]]


def test_neighbours_of_table_2():
    assert cifar.neighbours("Adam", (3e-4, 1e-8)) == [
        (3e-4, 1e-8),
        (1e-4, 1e-8),
        (1e-3, 1e-8),
        (3e-3, 1e-8),
        (1e-2, 1e-8),
    ]
    assert cifar.neighbours("TKFAC_new", (1e-3, 1e-3, 1.0)) == [
        (1e-3, 1e-3, 1.0),
        (1e-4, 1e-3, 1.0),
        (3e-4, 1e-3, 1.0),
        (3e-3, 1e-3, 1.0),
        (1e-2, 1e-3, 1.0),
    ]
    assert cifar.neighbours("TKFAC_nor", (1e-3, 1e-2)) == [
        (1e-3, 1e-2),
        (3e-4, 1e-2),
        (3e-3, 1e-2),
        (1e-3, 3e-3),
        (1e-3, 3e-2),
    ]


def command(monkeypatch, folder, out, *more):
    arguments = ["--data-dir", str(folder / "data"), "--out-dir", str(out), *more]
    monkeypatch.setattr(sys, "argv", ["cifar", *arguments])
    cifar.main()
    (written,) = out.glob("*.json")
    return json.loads(written.read_text())


def test_the_command_trains_all_methods(small, monkeypatch, capsys):
    results = command(monkeypatch, small, small / "out", "--epochs", "4")
    assert [run["method"] for run in results["runs"]] == list(cifar.NUMBERS)
    for run in results["runs"]:
        assert [point["step"] for point in run["curve"]] == [0, 5, 10, 15, 20]
        assert np.isfinite(run["curve"][-1]["train_loss"])
    ends = {run["method"]: run["curve"][-1]["train_loss"] for run in results["runs"]}
    assert len(set(ends.values())) == 5
    (picture,) = (small / "out").glob("*.png")
    assert picture.stat().st_size > 10_000
    assert "| TKFAC_new | lr 0.001, damping 0.001, floor 0.01 |" in capsys.readouterr().out


def test_runs_of_the_same_experiment_are_kept(small, monkeypatch):
    out, runs = small / "sittings", []
    run_seed = cifar.run_seed

    def noted(problem, methods, seed, *rest):
        runs.append(([method.name for method in methods], seed))
        return run_seed(problem, methods, seed, *rest)

    monkeypatch.setattr(cifar, "run_seed", noted)
    first = command(monkeypatch, small, out, "--epochs", "1", "--methods", "Adam")
    both = ["--methods", "SGDM", "Adam", "--seeds", "0", "1"]
    second = command(monkeypatch, small, out, "--epochs", "1", *both)
    assert runs == [(["Adam"], 0), (["SGDM"], 0), (["SGDM", "Adam"], 1)]
    found = [(run["method"], run["seed"]) for run in second["runs"]]
    assert found == [("SGDM", 0), ("Adam", 0), ("SGDM", 1), ("Adam", 1)]
    assert first["runs"] == [second["runs"][1]]
    # Another schedule and another rate of BatchNorm's Adam have a file of their own.
    others = ["--epochs", "1", "--methods", "SGDM", "--drop", "40", "--fallback-rate", "3e-3"]
    other = command(monkeypatch, small, small / "other", *others, "--rate", "0.1")
    assert [run["settings"] for run in other["runs"]] == ["lr 0.1"]
    assert (other["drop"], other["fallback_rate"]) == (40, 3e-3)
    title = "cifar10-resnet20-width-1-part-2-drop-40-fallback-rate-0.003"
    assert (small / "other" / f"{title}.json").exists()
    # Other numbers of steps are another experiment, whose file this is not.
    with pytest.raises(
        SystemExit, match="another experiment, by its epochs: give another --out-dir"
    ):
        command(monkeypatch, small, out, "--epochs", "2", "--methods", "Adam")
    (path,) = out.glob("*.json")
    assert json.loads(path.read_text()) == second


def test_seeds_are_added_as_they_end_and_beside_those_of_other_commands(small, monkeypatch):
    out, seen = small / "side by side", []
    run_seed = cifar.run_seed

    def while_another_command_ends(problem, methods, seed, *rest):
        if seed == 1:
            (path,) = out.glob("*.json")
            results = json.loads(path.read_text())
            seen.extend(run["seed"] for run in results["runs"])
            results["runs"].append(results["runs"][0] | {"seed": 7})
            path.write_text(json.dumps(results))
        return run_seed(problem, methods, seed, *rest)

    monkeypatch.setattr(cifar, "run_seed", while_another_command_ends)
    arguments = ["--epochs", "1", "--methods", "SGDM", "--seeds", "0", "1"]
    results = command(monkeypatch, small, out, *arguments)
    assert seen == [0]
    assert [run["seed"] for run in results["runs"]] == [0, 1, 7]


def test_commands_that_end_at_the_same_moment_all_add_their_runs(tmp_path, monkeypatch):
    path, experiment, write = tmp_path / "results.json", {"epochs": 1}, cifar.write_results

    def slowly(results, path):
        time.sleep(0.05)
        write(results, path)

    monkeypatch.setattr(cifar, "write_results", slowly)

    def add(seed):
        run = {"method": "SGDM", "settings": "lr 1", "seed": seed, "curve": []}
        cifar.add_results(path, experiment, {}, [run])

    with ThreadPoolExecutor(4) as commands:
        list(commands.map(add, range(4)))
    found = json.loads(path.read_text())
    assert [run["seed"] for run in found["runs"]] == [0, 1, 2, 3]


def test_stopped_commands_go_on_to_the_same_result(small, monkeypatch, capsys):
    options = ["--methods", "Adam", "--seeds", "0", "1", "--tune", "--tuning-epochs", "1"]
    options += ["--epochs", "2", "--turn", "4", "--dataset", "cifar10"]
    two = lambda *args: {"Adam": trials(*args)["Adam"][:2]}  # noqa: E731
    trials = cifar.trials
    monkeypatch.setattr(cifar, "trials", two)
    whole = command(monkeypatch, small, small / "whole", *options)
    printed = capsys.readouterr().out
    assert "±" in printed
    assert len(whole["tuning"]["Adam"]) == 2

    advance = runner.Run.advance
    calls = []

    def stopping(run, steps):
        # Within the first trial and within the run of the second seed.
        calls.append(run)
        if len(calls) in (2, 10):
            raise KeyboardInterrupt
        advance(run, steps)

    monkeypatch.setattr(runner.Run, "advance", stopping)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            command(monkeypatch, small, small / "parts", *options)
    parts = command(monkeypatch, small, small / "parts", *options)
    # Two trials of two turns and two runs of three, and the two calls that were stopped.
    assert len(calls) == 2 * 2 + 2 * 3 + 2
    assert parts["tuning"] == whole["tuning"]
    for received, expected in zip(parts["runs"], whole["runs"], strict=True):
        assert received["seed"] == expected["seed"]
        for one, other in zip(received["curve"], expected["curve"], strict=True):
            assert one | {"seconds": 0} == other | {"seconds": 0}
    first, second = (run["curve"][-1]["train_loss"] for run in whole["runs"])
    assert first != second
    left = [path.name for path in (small / "parts").rglob("tuning*/*")]
    assert len(left) == 2
    assert all(name.endswith(".json") for name in left)

    # What the results file holds is enough.
    calls.clear()
    for folder in (small / "parts").glob("*/"):
        shutil.rmtree(folder)
    assert command(monkeypatch, small, small / "parts", *options)["tuning"] == whole["tuning"]
    assert not calls


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--part", "1"], "Table 2 has no settings of part 1 for resnet20"),
        (
            ["--part", "1", "--network", "vgg16", "--methods", "TKFAC_new"],
            "part 1 of the paper is without TKFAC_new",
        ),
        (["--drop", "0"], "--drop takes a number of epochs of at least 1"),
        (
            ["--part", "1", "--network", "vgg16", "--drop", "60"],
            "part 1 has constant rates",
        ),
        (["--rate", "0.5"], "argument --rate: invalid choice: 0.5"),
        (["--fallback-rate", "-1"], "--fallback-rate -1 is negative"),
        (["--examples", "127"], "--examples 127 is less than a batch of 128"),
    ],
)
def test_wrong_options_are_refused(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["cifar", "--data-dir", "x", *arguments])
    with pytest.raises(SystemExit):
        cifar.parse_options()
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "depth", "widest"), [("resnet20", 19, 32), ("resnet32", 31, 32), ("vgg16", 13, 256)]
)
def test_networks_have_the_classes_and_the_width_asked_for(name, depth, widest):
    init = functools.partial(cifar.NETWORKS[name](100, 0.5).init, train=False)
    params = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    assert params["Dense_0"]["bias"].shape == (100,)
    kernels = [leaf.shape for leaf in jax.tree.leaves(params) if leaf.ndim == 4]
    assert len(kernels) == depth
    assert max(shape[-1] for shape in kernels) == widest


def test_mean_and_deviation():
    assert mean_and_deviation([2.0], ".1f") == "2.0"
    # The sample's deviation: the root of (1 + 1) / (2 - 1).
    assert mean_and_deviation([2.0, 4.0], ".3f") == "3.000 ± 1.414"


def test_runs_with_other_settings_are_no_seeds_of_the_same():
    def run(settings, seed, accuracy):
        end = {"test_accuracy": accuracy, "train_loss": 1.0}
        return {
            "method": "Adam",
            "settings": settings,
            "seed": seed,
            "median_step_ms": 2.0,
            "curve": [end],
        }

    runs = [run("lr 1", 0, 0.5), run("lr 2", 0, 0.8), run("lr 1", 1, 0.6), run("lr 2", 1, 0.8)]
    rows = cifar.results_table(runs).splitlines()[2:]
    cells = [[cell.strip() for cell in row.split("|")[1:4]] for row in rows]
    assert cells == [["Adam", "lr 1", "55.00 ± 7.07"], ["Adam", "lr 2", "80.00 ± 0.00"]]


def test_mean_curve_takes_the_steps_that_all_have():
    curves = [
        [{"step": 0, "loss": 1.0}, {"step": 5, "loss": 2.0}],
        [{"step": 0, "loss": 2.0}, {"step": 4, "loss": 9.0}, {"step": 5, "loss": 4.0}],
    ]
    assert mean_curve(curves) == [{"step": 0.0, "loss": 1.5}, {"step": 5.0, "loss": 3.0}]


def positive_definite(seed, size):
    root = np.random.default_rng(seed).normal(size=(size, size))
    matrix = root @ root.T
    return jnp.asarray(matrix / np.trace(matrix))


def conv_and_dense(*traces):
    """The layers of a small network, and factors of theirs with traces."""
    model = nn.Sequential(
        [nn.Conv(2, (3, 3), use_bias=False), lambda x: x.reshape(len(x), -1), nn.Dense(3)]
    )
    x = jnp.ones((2, 4, 4, 1), jnp.float32)
    params = model.init(jax.random.key(0), x)["params"]
    layers = tkfac.find_layers(lambda p, x: model.apply({"params": p}, x), params, x)
    factors = {
        name: tkfac.KroneckerFactors(
            positive_definite(0, spec.d_in), positive_definite(1, spec.d_out), jnp.asarray(delta)
        )
        for (name, spec), delta in zip(layers.items(), traces, strict=True)
    }
    return layers, factors


def test_readings_of_trace_damping():
    """The plain one is the library's; the others by their formulas."""
    layers, factors = conv_and_dense(0.004, 5.0)
    step = jnp.zeros((), jnp.int32)
    expected = tkfac.trace_damping(0.01, 1e-3).damp(factors, layers, step)
    received = trace_damping.Reading().damp(factors, layers, step)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), received, expected)

    conv, dense = factors
    phi, eye = factors[conv].phi, np.eye(9)
    rooted = trace_damping.Reading(root=True, expand=False).damp(factors, layers, step)
    np.testing.assert_allclose(rooted[conv].phi, 0.1 * phi + 0.1 / 9 * eye, rtol=1e-6)
    np.testing.assert_allclose(
        rooted[dense].psi, np.sqrt(5) * factors[dense].psi + np.sqrt(1e-3) * np.eye(3), rtol=1e-6
    )
    each = trace_damping.Reading(locations={conv: 16}, floor=1e-6).damp(factors, layers, step)
    np.testing.assert_allclose(
        each[conv].phi, np.sqrt(0.004 / 16) * phi + 0.004 / 16 / 9 * eye, rtol=1e-6
    )


def test_swapped_damping_has_the_directions_of_one_and_the_lengths_of_the_other():
    layers, factors = conv_and_dense(0.3, 5.0)
    step = jnp.zeros((), jnp.int32)
    directions, lengths = tkfac.trace_damping(0.01, 1e-3), tkfac.normal_damping(1e-2)
    swapped = trace_damping.Swapped(directions, lengths).damp(factors, layers, step)

    def squared_length(name, damped):
        layer = factors[name]
        block = np.kron(layer.phi, layer.psi) * layer.delta
        inverse = np.linalg.inv(np.kron(damped[name].phi, damped[name].psi))
        return np.trace(inverse @ block @ inverse)

    one, other = (damping.damp(factors, layers, step) for damping in (directions, lengths))
    for name in layers:
        assert abs(squared_length(name, one) / squared_length(name, other) - 1) > 0.1
        expected = squared_length(name, other)
        np.testing.assert_allclose(squared_length(name, swapped), expected, rtol=1e-4)
        for factor, own in zip(swapped[name][:2], one[name][:2], strict=True):
            np.testing.assert_allclose(factor / factor[0, 0], own / own[0, 0], rtol=1e-5)

    # Before the first statistics.
    unknown = jax.tree.map(jnp.zeros_like, factors)
    first = trace_damping.Swapped(directions, lengths).damp(unknown, layers, step)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(first))


def test_the_trace_damping_command_and_its_resumption(small, monkeypatch, capsys):
    variants = trace_damping.variants()
    assert len({method.slug for method in variants}) == len(variants)
    chosen = [variants[0], *variants[-3:]]

    def command(chosen, folder, steps):
        monkeypatch.setattr(trace_damping, "variants", lambda: chosen)
        options = {
            "--data-dir": small / "data",
            "--out-dir": small / folder,
            "--steps": steps,
            "--turn": 2,
        }
        arguments = [str(part) for option in options.items() for part in option]
        monkeypatch.setattr(sys, "argv", ["trace_damping", *arguments])
        trace_damping.main()
        return json.loads((small / folder / "trace_damping.json").read_text())["runs"]

    runs = command(chosen, "whole", 4)
    assert "| per location, nu 0.01 | lr 0.001 |" in " ".join(capsys.readouterr().out.split())
    for run in runs:
        assert 0 <= run["traces"]["smallest"] <= run["traces"]["largest"]
        assert run["traces"]["dense"] > 0
    assert len({run["curve"][-1]["train_loss"] for run in runs}) == len(chosen)

    # One of them, in two parts; each run compiles for seconds.
    command(chosen[-1:], "parts", 2)
    (parts,) = command(chosen[-1:], "parts", 4)
    assert parts["curve"][-1] | {"seconds": 0} == runs[-1]["curve"][-1] | {"seconds": 0}
    assert parts["traces"] == runs[-1]["traces"]


def test_the_factored_damping_command(small, monkeypatch, capsys):
    """Each variant has the rule that its name says, and the three of equal lambda differ."""
    *_, layers = mlp_problem()
    variants = factored_damping.variants()
    assert len({method.slug for method in variants}) == len(variants)
    for method in variants:
        expected = tkfac.independent if method.name.startswith("KFAC") else tkfac.trace_restricted
        assert method.build(layers).plan.rule is expected
    compared = [method for method in variants if method.settings == "damping 0.001"]
    assert len(compared) == 4
    out = small / "out"
    arguments = ["--data-dir", str(small / "data"), "--out-dir", str(out), "--steps", "2"]
    arguments += ["--settings", "damping 0.001"]
    monkeypatch.setattr(sys, "argv", ["factored_damping", *arguments])
    factored_damping.main()
    runs = json.loads((out / "factored_damping.json").read_text())["runs"]
    assert len({run["curve"][-1]["train_loss"] for run in runs}) == 4
    assert [run["traces"] is None for run in runs] == [
        method.name.startswith("KFAC") for method in compared
    ]
    assert "| KFAC, normal | damping 0.001 |" in " ".join(capsys.readouterr().out.split())

    arguments += ["--settings", "damping 0.0001", "--names", "KFAC, normal"]
    monkeypatch.setattr(sys, "argv", ["factored_damping", *arguments])
    with pytest.raises(SystemExit):
        factored_damping.main()
    assert "no variant of ['KFAC, normal']" in capsys.readouterr().err
