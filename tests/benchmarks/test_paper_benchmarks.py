"""The benchmarks of the paper's figures on its approximation, its damping and its assumption."""

import itertools
import json
import math
import sys
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from mnist_files import make_mnist

import tkfac_jax as tkfac
from benchmarks import correlation, damping, fisher_error, series
from benchmarks.networks import ResNet

pytestmark = pytest.mark.benchmark


def make_cifar(folder, examples=16):
    """Files in the official binary format: a byte for the label, then red, green and blue, row by row."""
    rng = np.random.default_rng(0)
    (folder / "cifar-10-batches-bin").mkdir(parents=True)
    for file in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5"):
        rows = rng.integers(0, 256, (examples, 1 + 3072), np.uint8)
        rows[:, 0] %= 10
        (folder / "cifar-10-batches-bin" / f"{file}.bin").write_bytes(rows.tobytes())


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the main function of a module with arguments; returns what it printed."""

    def run(module, **options):
        arguments = [module.__name__]
        for name, value in options.items():
            values = value if isinstance(value, list) else [value]
            arguments += [f"--{name.replace('_', '-')}", *map(str, values)]
        monkeypatch.setattr(sys, "argv", arguments)
        module.main()
        return capsys.readouterr().out

    return run


def test_columns_are_rounded_and_say_what_is_missing(tmp_path):
    curve = [
        {"step": 0, "seconds": 1.0, "loss": 1.23456},
        {"step": 123456, "seconds": 2.0, "loss": math.nan, "ratio": 0.000123456},
    ]
    received = series.columns(curve, 3)
    assert received == {"step": [0, 123456], "loss": [1.23, None], "ratio": [None, 0.000123]}
    results = {"text": "a", "curves": {"0": received, "1": {}}, "list": [1, 2], "none": {}}
    series.write_json(results, tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text()) == results


def test_pixels_are_means_of_four():
    image = np.random.default_rng(0).random((1, 28, 28))
    received = fisher_error.halve(image.reshape(1, -1)).reshape(14, 14)
    np.testing.assert_allclose(received[3, 5], image[0, 6:8, 10:12].mean())


ACTIVATIONS = {
    "relu": (lambda s: np.maximum(s, 0), lambda s: (s > 0).astype(float)),
    "tanh": (np.tanh, lambda s: 1 - np.tanh(s) ** 2),
}


def oracle_comparison(kernels, images, activation):
    """Blocks, errors, bound and traces of every layer, example by example and class by class.

    The Fisher of an example's logits is `sum_y p_y (p - e_y)(p - e_y)^T`, pulled back layer by layer.
    """
    function, slope = ACTIVATIONS[activation]
    per_layer = [[] for _ in kernels]
    for x in np.asarray(images, np.float64):
        inputs, pre = [x], []
        for kernel in kernels:
            pre.append(inputs[-1] @ kernel)
            inputs.append(function(pre[-1]))
        logits = pre[-1]
        p = np.exp(logits - logits.max())
        p /= p.sum()
        gradients = p[None] - np.eye(len(p))
        for i in reversed(range(len(kernels))):
            gamma = (gradients.T * p) @ gradients
            per_layer[i].append((np.outer(inputs[i], inputs[i]), gamma))
            if i:
                gradients = gradients @ kernels[i].T * slope(pre[i - 1])
    return [oracle_layer(pairs) for pairs in per_layer]


def oracle_layer(pairs):
    """Eqs. (4.2) and (4.9), KFAC, and Theorem 4.4, of the pairs `Lambda, Gamma` of the examples."""
    n = len(pairs)
    exact = sum(np.kron(a, g) for a, g in pairs) / n
    trace = sum(np.trace(a) * np.trace(g) for a, g in pairs) / n
    phi = sum(np.trace(g) * a for a, g in pairs) / n / trace
    psi = sum(np.trace(a) * g for a, g in pairs) / n / trace
    approximations = {
        "TKFAC": trace * np.kron(phi, psi),
        "KFAC": np.kron(sum(a for a, _ in pairs) / n, sum(g for _, g in pairs) / n),
    }
    bound = max(
        math.sqrt(np.trace(a) * np.trace(b) * np.trace(g) * np.trace(h))
        for (a, g), (b, h) in itertools.combinations(pairs, 2)
    )
    figures = {"norm": np.sqrt((exact**2).sum()), "trace": np.trace(exact)}
    figures["bound"] = 2 * (n - 1) / n * bound
    for rule, block in approximations.items():
        figures[f"error_{rule}"] = np.sqrt(((exact - block) ** 2).sum())
        figures[f"trace_{rule}"] = np.trace(block)
    return figures


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_what_is_compared_is_what_the_paper_defines(activation, tmp_path, monkeypatch):
    make_mnist(tmp_path, examples=20)
    # One image of 196 pixels makes the first layer's block the largest by far.
    monkeypatch.setattr(fisher_error, "halve", lambda images: images[:, 300:306])
    problem, images = fisher_error.fisher_problem(tmp_path, 3, activation, 6, hidden=(4, 3, 4))
    assert len(np.unique(images, axis=0)) == 6
    names = ["Dense_0", "Dense_1", "Dense_2", "Dense_3"]
    kernels = [np.asarray(problem.params[name]["kernel"], np.float64) for name in names]
    received = problem.evaluate(problem.params, {})
    for name, expected in zip(names, oracle_comparison(kernels, images, activation), strict=True):
        assert set(expected) == set(fisher_error.QUANTITIES)
        for quantity, value in expected.items():
            # The network is one of float32.
            np.testing.assert_allclose(
                received[f"{name} {quantity}"], value, rtol=2e-5, atol=1e-7, err_msg=quantity
            )


def test_a_layer_without_signal_has_ratios_of_zero():
    received = fisher_error.ratio(np.array([0.0, 3.0]), np.array([0.0, 2.0]))
    np.testing.assert_array_equal(received, [0, 1.5])


def test_what_is_counted():
    def curve(**figures):
        return {
            f"{layer} {quantity}": [figures.get(quantity, 1.0) * by]
            for layer, by in (("A", 1.0), ("B", 2.0))
            for quantity in fisher_error.QUANTITIES
        }

    curves = [curve(bound=3.0, error_TKFAC=2.0, error_KFAC=2.5), curve(bound=1.0, error_TKFAC=1.5)]
    curves[0]["A error_KFAC"] = [1.5]
    assert fisher_error.summarise(curves) == {
        "comparisons": 4,
        "bound_violations": 2,
        "TKFAC_nearer": 1,
        "sums": 2,
        "TKFAC_sum_smaller": 1,
    }


def test_the_fisher_error_command_and_its_resumption(tmp_path, monkeypatch, command):
    make_mnist(tmp_path, examples=500)
    monkeypatch.setattr(fisher_error, "BATCH_SIZE", 100)
    monkeypatch.setattr(fisher_error, "halve", lambda images: images[:, 300:306])
    options = {"data_dir": tmp_path, "examples": 10, "activation": "tanh", "width": 4}
    command(fisher_error, **options, seeds=4, epochs=1, out_dir=tmp_path / "parts")
    printed = command(fisher_error, **options, seeds=[0, 4], epochs=2, out_dir=tmp_path / "parts")
    command(fisher_error, **options, seeds=4, epochs=2, out_dir=tmp_path / "whole")
    results, whole = (
        json.loads((tmp_path / place / "fisher_error.json").read_text())
        for place in ("parts", "whole")
    )
    assert results["curves"]["4"] == whole["curves"]["4"]
    assert list(results["curves"]) == ["0", "4"]
    assert results["curves"]["0"]["step"] == [0, 5, 10]
    assert results["curves"]["0"] != results["curves"]["4"]
    assert results["hidden"] == [4] * 4
    assert results["summary"]["comparisons"] == 2 * 3 * 5
    assert results["summary"]["bound_violations"] == 0
    assert "violated in 0 of 30 comparisons" in printed
    assert "| Dense_4" in printed
    for picture in ("fisher_error.png", "fisher_blocks.png"):
        assert (tmp_path / "parts" / picture).stat().st_size > 10_000


def test_images_of_cifar_are_read_as_published(tmp_path):
    make_cifar(tmp_path, examples=2)
    raw = (tmp_path / "cifar-10-batches-bin" / "data_batch_2.bin").read_bytes()
    images, labels = damping.read_cifar(tmp_path)
    assert images.shape == (10, 32, 32, 3)
    assert labels[3] == raw[3073]
    # The second image of the file: its green pixel in row 2, column 5.
    assert images[3, 2, 5, 1] == raw[3073 + 1 + 1024 + 2 * 32 + 5]


# New statistics at every step: one program less to compile.
SMALL = {"depth": 8, "width": 2, "batch_size": 8, "interval": 1}


def test_the_damping_command_and_its_resumption(tmp_path, monkeypatch, command):
    make_cifar(tmp_path)
    options = {"data_dir": tmp_path, "turn": 2} | SMALL
    printed = command(damping, **options, steps=4, out_dir=tmp_path / "whole")
    curves = json.loads((tmp_path / "whole" / "damping.json").read_text())["curves"]["0"]
    assert list(curves) == list(damping.dampings())
    assert "| trace damping, no floor |" in printed
    assert (tmp_path / "whole" / "damping-seed-0.png").stat().st_size > 10_000
    # One of them, in two parts; each run compiles for seconds.
    chosen = {"normal damping": damping.dampings()["normal damping"]}
    monkeypatch.setattr(damping, "dampings", lambda: chosen)
    # Ten steps are an epoch.
    for length in ({"steps": 2}, {"epochs": 0.4}):
        command(damping, **options, **length, out_dir=tmp_path / "parts")
    parts = json.loads((tmp_path / "parts" / "damping.json").read_text())["curves"]["0"]
    assert parts == {"normal damping": curves["normal damping"]}

    width = {"Conv_0": (9 * 3, 2), "ResidualBlock_1/Conv_1": (9 * 4, 4), "Dense_0": (8 + 1, 10)}
    for layer, (d_in, d_out) in width.items():
        # Rounded to four digits when written.
        normal = {f: curves["normal damping"][f"{layer} {f}"] for f in damping.FIGURES}
        assert normal["phi_ratio"][0] is None
        for t, phi, psi in list(zip(*normal.values(), strict=True))[1:]:
            np.testing.assert_allclose(phi, math.sqrt(damping.DAMPING) / (t / d_in), rtol=1e-3)
            np.testing.assert_allclose(psi, math.sqrt(damping.DAMPING) / (t / d_out), rtol=1e-3)
        for name, floor in (
            ("trace damping", damping.FLOOR),
            ("trace damping, no floor", damping.NO_FLOOR),
        ):
            if "Conv" in layer:
                trace, ratio = (curves[name][f"{layer} {f}"][-1] for f in ("trace", "phi_ratio"))
                np.testing.assert_allclose(ratio, max(floor, trace) / trace, rtol=1e-3)


class Strided(nn.Module):
    """A convolution as the residual network has them, and one more layer."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(3, (3, 3), strides=2, padding=1, use_bias=False, name="conv")(x)
        return nn.Dense(4, name="last")(jnp.tanh(x).reshape(len(x), -1))


def test_products_add_up_to_the_gradient_of_the_kernel():
    """And each is an entry of a patch times one of the gradient, by explicit patches."""
    model, likelihood, key = Strided(), tkfac.Categorical(), jax.random.key(5)
    x = jax.random.normal(jax.random.key(0), (3, 6, 6, 2))
    params = model.init(jax.random.key(1), x)["params"]
    taps = itertools.product(range(3), range(3), range(2), range(3))
    entries = [correlation.Entry(*tap) for tap in taps]

    def predict(params, model_state, x):
        return model.apply({"params": params}, x), model_state

    compute = correlation.products_of(predict, likelihood, {"conv": entries})
    received = np.asarray(compute(params, {}, x, key)["conv"])
    assert received.shape == (3, 9, 54)
    targets = likelihood.sample(key, model.apply({"params": params}, x))

    def own_loss(params, n):
        return likelihood.nll(model.apply({"params": params}, x[n : n + 1]), targets[n : n + 1])[0]

    for n in range(3):
        gradient = jax.grad(own_loss)(params, n)["conv"]["kernel"]
        np.testing.assert_allclose(received[n].sum(0), gradient.ravel(), rtol=1e-4, atol=1e-6)
        patches = oracles.patches(x[n], (3, 3), (2, 2), 1, (1, 1))
        assert np.linalg.matrix_rank(received[n, 4].reshape(18, 3)) == 1
        for i in range(9):
            # The gradient's entry, from the largest entry of the patch.
            largest = np.argmax(np.abs(patches[i]))
            u = received[n, i].reshape(18, 3)[largest] / patches[i, largest]
            expected = np.outer(patches[i], u).ravel()
            np.testing.assert_allclose(received[n, i], expected, rtol=1e-4, atol=1e-6)


def test_correlations_by_definition():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(50, 4, 3)) @ rng.normal(size=(3, 3))
    values[:, 1] += 2 * values[:, 0] + 5
    values[:, 3, 0] = 0.7
    received = correlation.absolute_correlations(values)
    for i, j in itertools.product(range(4), range(4)):
        each = []
        for k in range(3):
            if 3 in (i, j) and k == 0:
                continue
            a, b = values[:, i, k], values[:, j, k]
            covariance = np.mean(a * b) - a.mean() * b.mean()
            each.append(abs(covariance / math.sqrt(a.var() * b.var())))
        np.testing.assert_allclose(received[i, j], np.mean(each), rtol=1e-5)


def test_ratio_of_traces_and_correlations_by_chance():
    rng = np.random.default_rng(0)
    alone = rng.normal(size=(4000, 9, 2))
    together = np.repeat(rng.normal(size=(4000, 1, 2)), 9, axis=1)
    apart, same = correlation.correlations(alone, 0), correlation.correlations(together, 0)
    # 9 locations that say the same: the square of a sum of 9 for the sum of 9 squares.
    np.testing.assert_allclose(same.trace_ratio, 9)
    np.testing.assert_allclose(apart.trace_ratio, 1, atol=0.1)
    np.testing.assert_allclose(same.absolute, 1, rtol=1e-5)
    # The mean absolute value of a normal number of variance 1 / 4000.
    chance = math.sqrt(2 / math.pi / 4000)
    for received in (same.by_chance, apart.by_chance, correlation.beside_diagonal(apart.absolute)):
        np.testing.assert_allclose(received, chance, rtol=0.3)


def test_summary_by_distance():
    absolute = np.array(
        [[1, 0.5, 0.3, 0.1], [0.5, 1, 0.2, 0.7], [0.3, 0.2, 1, 0.4], [0.1, 0.7, 0.4, 1]]
    )
    found = correlation.Correlations(absolute, np.asarray(0.05), np.asarray(2.0))
    # Two by two locations: 0 and 3, 1 and 2 lie across.
    assert correlation.summarise(found) == {
        "distance 1": round((0.5 + 0.3 + 0.7 + 0.4) / 4, 4),
        "all pairs": round((0.5 + 0.3 + 0.1 + 0.2 + 0.7 + 0.4) / 6, 4),
        "by chance": 0.05,
        "trace ratio": 2.0,
    }
    matrix = np.arange(36).reshape(6, 6)
    np.testing.assert_array_equal(correlation.middle(matrix, 2), matrix[2:4, 2:4])
    np.testing.assert_array_equal(correlation.middle(matrix, 99), matrix)


@pytest.mark.parametrize("depth", [8, 32])
def test_the_middle_layers_exist_and_have_locations_of_three_sizes(depth):
    model = ResNet(depth, widths=(2, 4, 8))
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    found = []

    def watch(next_fun, args, kwargs, context):
        output = next_fun(*args, **kwargs)
        if "/".join(context.module.path) in correlation.middle_layers(depth):
            found.append(output.shape[1:3])
        return output

    with nn.intercept_methods(watch):
        jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), x)
    assert found == [(32, 32), (16, 16), (8, 8)]


def test_the_correlation_command_and_its_resumption(tmp_path, command):
    make_cifar(tmp_path)
    options = {"data_dir": tmp_path, "turn": 2, "examples": 20, "products": 3} | SMALL
    command(correlation, **options, steps=[0, 2], out_dir=tmp_path / "parts")
    printed = command(correlation, **options, steps=[0, 2, 4], out_dir=tmp_path / "parts")
    command(correlation, **options, epochs=[0.4, 0, 0.2], out_dir=tmp_path / "whole")
    found, whole = (
        json.loads((tmp_path / place / "correlation.json").read_text())["correlations"]["0"]
        for place in ("parts", "whole")
    )
    assert found == whole
    assert list(found) == ["0", "2", "4"]
    assert list(found["0"]) == correlation.middle_layers(8)
    assert found["0"] != found["2"] != found["4"]
    assert "| ResidualBlock_2/Conv_0 |" in printed
    for picture in ("correlation-start-seed-0.png", "correlation-seed-0.png"):
        assert (tmp_path / "parts" / picture).stat().st_size > 10_000


def test_a_step_that_was_passed_cannot_be_measured():
    run = SimpleNamespace(step=4)
    with pytest.raises(SystemExit, match="is at step 4, and step 3 was not measured"):
        correlation.advance_to(3, run, 1)


def test_results_are_json_for_every_reader(tmp_path):
    """Python reads NaN; others do not."""
    results = {"runs": [{"curve": ({"loss": float("nan"), "step": 3}, {"loss": 1.5})}], "n": None}
    series.write_results(results | {"infinite": float("inf")}, tmp_path / "results.json")

    def refuse(constant):
        raise AssertionError(constant)

    received = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    expected = {"runs": [{"curve": [{"loss": None, "step": 3}, {"loss": 1.5}]}], "n": None}
    assert received == expected | {"infinite": None}
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
