"""The benchmark of speed: what it counts and what it computes from its measurements. No time is tested."""

import json
import mmap
import threading

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from mnist_files import make_mnist

import tkfac_jax as tkfac
from benchmarks import inverses, loops, speed, subsampling
from benchmarks.networks import ResNet
from benchmarks.operations import count_operations
from benchmarks.turns import Turns

pytestmark = pytest.mark.benchmark


@pytest.fixture(autouse=True)
def every_program_is_compiled_once(monkeypatch):
    monkeypatch.setattr(speed, "COMPILATIONS", 1)


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def test_operations_of_products():
    assert count_operations(jnp.matmul, shape(3, 4), shape(4, 5)) == 2 * 3 * 4 * 5
    batched = count_operations(jnp.matmul, shape(7, 3, 4), shape(7, 4, 5))
    assert batched == 7 * 2 * 3 * 4 * 5
    gradient = jax.value_and_grad(lambda a, b: (a @ b).sum(), argnums=(0, 1))
    assert count_operations(gradient, shape(3, 4), shape(4, 5)) == 3 * 2 * 3 * 4 * 5


@pytest.mark.parametrize("groups", [1, 2])
def test_operations_of_convolutions(groups):
    model = nn.Conv(6, (3, 3), padding="VALID", feature_group_count=groups, use_bias=False)
    x = shape(2, 8, 8, 4)
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    # Each of 2 x 6 x 6 x 6 outputs sees 3 x 3 taps of its group's channels.
    forward = 2 * (2 * 6 * 6 * 6) * (9 * 4 // groups)
    assert count_operations(model.apply, params, x) == forward


def test_operations_of_loops_and_branches():
    def step(carry, _):
        return carry @ carry, None

    square = shape(4, 4)
    once = 2 * 4**3
    assert count_operations(lambda a: jax.lax.scan(step, a, None, length=5)[0], square) == 5 * once

    def either(a):
        return jax.lax.cond(a[0, 0] > 0, lambda: a, lambda: a @ a @ a)

    assert count_operations(either, square) == 2 * once
    assert count_operations(jax.jit(jax.checkpoint(lambda a: a @ a)), square) == once


@pytest.mark.parametrize(("backend", "products"), [("cpu", 1), ("gpu", 2), ("tpu", 3)])
def test_operations_of_the_own_platform(backend, products, monkeypatch):
    def dependent(a):
        return jax.lax.platform_dependent(
            a, cpu=lambda a: a @ a, cuda=lambda a: a @ a @ a, default=lambda a: a @ a @ a @ a
        )

    monkeypatch.setattr("jax.default_backend", lambda: backend)
    assert count_operations(dependent, shape(4, 4)) == products * 2 * 4**3


def test_operations_of_a_platform_that_loops_are_those_of_the_longest():
    def product_by_product(a):
        return jax.lax.while_loop(
            lambda carry: carry[0] < 3, lambda c: (c[0] + 1, c[1] @ a), (0, a)
        )

    def dependent(a):
        return jax.lax.platform_dependent(
            a, cpu=lambda a: product_by_product(a)[1], default=lambda a: a @ a @ a @ a
        )

    assert count_operations(dependent, shape(4, 4)) == 3 * 2 * 4**3


def test_operations_that_lead_to_no_result_do_not_count():
    square = shape(4, 4)

    def unused(a):
        b = a @ a
        inner = jax.jit(lambda a: (a @ a, a @ a @ a))(a)
        return inner[0], jnp.exp(b)[:0]

    assert count_operations(lambda a: unused(a)[0], square) == 2 * 4**3


def test_operations_of_factorisations():
    size = 6
    assert count_operations(jnp.linalg.cholesky, shape(size, size)) == size**3 / 3

    def solve(a, b):
        return jax.lax.linalg.triangular_solve(a, b, left_side=True, lower=True)

    assert count_operations(solve, shape(size, size), shape(size, 2)) == size**2 * 2


@pytest.mark.parametrize(
    ("intervals", "expected", "apart"),
    [
        ((1, 1), 100, 300),
        ((1, 5), (4 * 10 + 100) / 5, (4 * 20 + 300) / 5),
        ((10, 10), (9 * 1 + 100) / 10, (9 * 1 + 300) / 10),
        ((2, 4), (2 * 1 + 10 + 100) / 4, (2 * 1 + 20 + 300) / 4),
    ],
)
def test_averages_follow_from_the_kinds(intervals, expected, apart):
    medians = {speed.PLAIN: 1.0, speed.STATISTICS: 10.0, speed.INVERSES: 100.0}
    assert speed.average(medians, *intervals) == pytest.approx(expected)
    assert speed.average({speed.PLAIN: 3.0}, *intervals) == 3
    # Statistics apart where they were measured.
    assert speed.average(medians, *intervals, instead=speed.APART) == pytest.approx(expected)
    medians |= {speed.APART[speed.STATISTICS]: 20.0, speed.APART[speed.INVERSES]: 300.0}
    assert speed.average(medians, *intervals, instead=speed.APART) == pytest.approx(apart)
    assert speed.average(medians, *intervals) == pytest.approx(expected)


@pytest.mark.parametrize(("longest", "count"), [(1e3, 3), (1e-9, 1)])
def test_compilation_is_timed_in_turns_unless_it_takes_long(longest, count, monkeypatch):
    monkeypatch.setattr(speed, "COMPILATIONS", 3)
    monkeypatch.setattr(speed, "COMPILING_S", longest)
    chosen = [method for method in speed.methods() if method.name in ("SGD-momentum", "Adam")]
    compiled = []
    again = speed.Contender.compile_again
    monkeypatch.setattr(
        speed.Contender, "compile_again", lambda self: compiled.append(self.name) or again(self)
    )
    result = speed.measure("turns", speed.perceptron(2, 4, 3), chosen, 1)
    assert compiled == ["SGD-momentum", "Adam"] * 2
    for record in result["methods"]:
        facts = record["kinds"][speed.PLAIN]
        assert len(facts["compilations"]) == count
        assert facts["compile_seconds"] == np.median(facts["compilations"]) > 0


def test_the_second_of_two_steps_is_timed():
    contender = object.__new__(speed.Contender)
    contender.facts = {speed.PLAIN: {"ms": []}, speed.INVERSES: {"ms": []}}
    made = []
    contender.run = lambda kind: made.append(kind) or float(len(made))
    contender.measure()
    assert made == [speed.PLAIN] * 2 + [speed.INVERSES] * 2
    assert contender.facts == {speed.PLAIN: {"ms": [2]}, speed.INVERSES: {"ms": [4]}}


def test_the_second_of_two_cycles_is_timed():
    peer = object.__new__(speed.Peer)
    peer.intervals, peer.ms = [(1, 3)], {(1, 3): []}
    made = []
    peer._run = lambda pair: made.append(pair) or float(len(made))
    peer.measure()
    assert peer.ms == {(1, 3): [[4, 5, 6]]}


def test_processes_with_one_lock_compile_together_and_take_times_alone(tmp_path):
    turns = Turns(tmp_path / "lock")
    entered, leave = threading.Event(), threading.Event()

    def time_alone():
        with turns.timing():
            entered.set()
            assert leave.wait(20)

    other = threading.Thread(target=time_alone)
    with turns.compiling(), turns.compiling():
        other.start()
        assert not entered.wait(0.2)
    assert entered.wait(20)
    compiled = threading.Event()

    def compile_after():
        with turns.compiling():
            compiled.set()

    third = threading.Thread(target=compile_after)
    third.start()
    assert not compiled.wait(0.2)
    leave.set()
    assert compiled.wait(20)
    other.join(20)
    third.join(20)


def test_without_a_lock_nothing_waits():
    turns = Turns()
    with turns.timing(), turns.timing(), turns.compiling():
        pass


def test_memory_that_an_action_takes():
    # Straight from the system: an array might lie where freed memory is still held.
    pages = mmap.mmap(-1, 40_000_000)
    grows = speed.growth_during(lambda: np.frombuffer(pages, np.uint8).fill(1))
    if grows is None:
        pytest.skip("this system does not tell")
    assert 35 < grows < 60


def test_the_whole_benchmark_at_small_size(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(speed.NETWORKS, "mlp100", lambda: speed.perceptron(2, 8, 16))
    small = ResNet(8, widths=(4, 4, 4))
    monkeypatch.setitem(speed.NETWORKS, "resnet20", lambda: speed.on_images(small, 4))
    monkeypatch.setattr(speed, "PEAK_SIZE", 64)

    def command(network, *more):
        arguments = ["speed", "--networks", network, "--repeats", "2", "--peers", *more]
        monkeypatch.setattr("sys.argv", [*arguments, "--out-dir", str(tmp_path / network)])
        speed.main()
        (written,) = (tmp_path / network).glob("speed-*.json")
        (result,) = json.loads(written.read_text()).values()
        return {record["method"]: record["kinds"] for record in result["methods"]}

    of_dense = command("mlp100")
    assert list(of_dense) == [method.name for method in speed.methods()]
    assert set(of_dense["TKFAC"]) == {*speed.KINDS, *speed.WHOLE.values()}
    of_quarter = of_dense[speed.QUARTER]
    assert of_quarter[speed.STATISTICS]["gflop"] < of_dense["TKFAC"][speed.STATISTICS]["gflop"]

    of_convolutions = command("resnet20", "--methods", "SGD-momentum", "TKFAC")
    assert list(of_convolutions) == ["SGD-momentum", "TKFAC"]
    assert set(of_convolutions["TKFAC"]) == {*speed.KINDS, *speed.APART.values()}
    for kinds in (of_dense["TKFAC"], of_convolutions["TKFAC"]):
        for facts in kinds.values():
            assert len(facts["ms"]) == 2
            assert min(facts["ms"]) > 0
        operations = [kinds[kind]["gflop"] for kind in speed.KINDS]
        assert operations == sorted(operations)
    for kind, apart in speed.APART.items():
        facts = of_convolutions["TKFAC"]
        assert facts[apart]["gflop"] > facts[kind]["gflop"]
    for kind, whole in speed.WHOLE.items():
        assert of_dense["TKFAC"][whole]["gflop"] == of_dense["TKFAC"][kind]["gflop"]
    shown = capsys.readouterr().out
    assert "resnet20: " in shown
    assert "| TKFAC, new statistics, apart" in shown


def test_loops_at_small_size(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(speed.NETWORKS, "mlp10", lambda: speed.perceptron(2, 8, 16))
    arguments = ["loops", "--networks", "mlp10", "--intervals", "1/3", "20/20", "--peers"]
    monkeypatch.setattr("sys.argv", [*arguments, "--repeats", "2", "--out-dir", str(tmp_path)])
    loops.main()
    (written,) = tmp_path.glob("loops-*.json")
    records = json.loads(written.read_text())["mlp10"]["loops"]
    found = [(record["method"], record["intervals"], record["steps"]) for record in records]
    assert found == [
        ("SGD-momentum", None, 10),
        ("Adam", None, 10),
        ("TKFAC", "1/3", 12),
        ("TKFAC", "20/20", 20),
    ]
    assert all(len(record["ms"]) == 2 and min(record["ms"]) > 0 for record in records)
    assert "| TKFAC        |     20/20 |" in capsys.readouterr().out


def test_loops_beside_a_peer():
    def record(method, intervals, milliseconds):
        return {
            "method": method,
            "intervals": intervals,
            "median_ms": milliseconds,
            "ready_seconds": 1.0,
        }

    table = loops.results_table(
        {
            "loops": [
                record("SGD-momentum", None, 2.0),
                record("TKFAC", "1/5", 6.0),
                record("kfac-jax", "1/5", 8.0),
                record("TKFAC", "10/10", 3.0),
            ]
        }
    )
    cells = [[cell.strip() for cell in row.split("|")[3:-1]] for row in table.splitlines()[2:]]
    assert cells == [
        ["2", "1.00", "", "1"],
        ["6", "3.00", "0.75", "1"],
        ["8", "4.00", "", "1"],
        ["3", "1.50", "", "1"],
    ]


@pytest.mark.parametrize("text", ["0/5", "5", "1/2/3", "a/b"])
def test_intervals_that_are_none_are_refused(text, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["loops", "--intervals", "1/5", text])
    with pytest.raises(SystemExit):
        loops.main()
    assert f"{text!r}; expected two whole numbers of at least 1" in capsys.readouterr().err


def test_a_program_does_not_grow_with_the_number_of_stacked_layers():
    def lines(depth, *, stacked):
        problem = speed.perceptron(depth, 6, 5, stacked=stacked)
        optimizer = tkfac.tkfac(0.1, problem.find_layers(), damping=0.1)
        state = jax.eval_shape(optimizer.init, problem.params)
        step = jax.jit(lambda grads, state: optimizer.update(grads, state, statistics=None)[0])
        return step.lower(problem.params, state).as_text().count("\n")

    assert lines(3, stacked=True) == lines(9, stacked=True)
    assert lines(3, stacked=True) < lines(3, stacked=False) < lines(9, stacked=False)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [("TKFAC", (*speed.KINDS, *speed.WHOLE.values())), (speed.QUARTER, speed.KINDS)],
)
def test_every_kind_of_step_makes_the_step_of_make_train_step(name, kinds):
    problem = speed.perceptron(2, 6, 5)
    method = next(m for m in speed.methods() if m.name == name)
    contender = speed.Contender(problem, method)

    def of_state(trees, field):
        return optax.tree.get(trees[1], field)

    for kind in kinds:
        before = jax.tree.map(jnp.array, contender.trees)
        contender.run(kind)
        counts = [int(of_state(trees, "factor_updates")) for trees in (before, contender.trees)]
        assert counts[1] - counts[0] == (kind != speed.PLAIN)
        old, new = (of_state(trees, "refreshed") for trees in (before, contender.trees))
        refreshes = kind in (speed.INVERSES, *speed.WHOLE.values())
        assert all((int(new[name]) > int(old[name])) == refreshes for name in new)


def test_a_peer_is_slow_by_its_usual_step_not_by_one_long_one():
    peer = object.__new__(speed.Peer)
    peer.intervals = [(1, 1), (1, 5), (10, 10)]
    long = 2 * speed.SLOW_MS
    peer.ms = {(1, 1): [], (1, 5): [[long] * 5], (10, 10): [[long] + [1] * 9]}
    assert peer._due() == [(1, 1), (10, 10)]


def test_statistics_over_parts_of_a_batch_at_small_size(tmp_path, monkeypatch, capsys):
    make_mnist(tmp_path, 1500)
    arguments = ["subsampling", "--data-dir", str(tmp_path), "--out-dir", str(tmp_path / "out")]
    arguments += ["--steps", "3", "--turn", "3", "--intervals", "1", "2", "--widths", "6", "4", "6"]
    monkeypatch.setattr("sys.argv", arguments)
    subsampling.main()
    results = json.loads((tmp_path / "out" / "subsampling.json").read_text())
    names = [run["method"] for run in results["runs"]]
    assert names == ["500 examples", "250 examples", "125 examples", "62 examples"]
    # The same batches and parameters; other statistics from the first step on.
    starts, ends = ([run["curve"][i]["train_loss"] for run in results["runs"]] for i in (0, -1))
    assert len(set(starts)) == 1
    assert len(set(ends)) == 4
    assert "| 125 examples" in capsys.readouterr().out


def test_inverses_at_small_size(tmp_path, monkeypatch, capsys):
    pixels, batch_size = 6, 16
    small = speed.perceptron(2, pixels, 2 * batch_size)
    small = small._replace(
        evaluate=lambda params, _: {"train_loss": float(optax.tree.norm(params))}
    )
    monkeypatch.setattr(inverses, "autoencoder_problem", lambda *_: small)
    monkeypatch.setattr("benchmarks.autoencoder.PIXELS", pixels)
    for name, value in (
        ("PIXELS", pixels),
        ("BATCH_SIZE", batch_size),
        ("BATCHES", 3),
        ("TURN", 4),
        ("SETTLED", 4),
    ):
        monkeypatch.setattr(inverses, name, value)
    arguments = ["inverses", "--widths", "12", "--intervals", "2/4", "--steps", "12"]
    places = ["--data-dir", str(tmp_path), "--out-dir", str(tmp_path)]
    monkeypatch.setattr("sys.argv", [*arguments, *places])
    inverses.main()
    (written,) = tmp_path.glob("inverses-*.json")
    results = json.loads(written.read_text())
    names = ["Cholesky", "Newton-Schulz"]
    assert [record["inverse"] for record in results["alone"]] == names
    assert [record["inverse"] for record in results["runs"]] == names
    for record in results["alone"]:
        assert record["failed_inversions"] == 0
        assert record["error"] < 1e-3
        assert min(record["ms"], record["at_once_ms"]) > 0
    for record in results["runs"]:
        assert (record["steps"], record["turn"], len(record["ms"])) == (12, 4, 3)
        assert record["first_ms"] == record["ms"][0]
        assert record["median_ms"] == np.mean(record["ms"][1:])
    losses = [record["train_loss"] for record in results["runs"]]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    shown = capsys.readouterr().out
    assert "| 2/4       | Newton-Schulz |" in shown
