"""What a step costs: time by kind of step, compilation, memory and the share of the machine's peak, side by side.

    python -m benchmarks.speed [--networks autoencoder resnet20 ...] [--repeats 7] [--out-dir benchmarks/results]

In the environment that `make peers` makes, kfac-jax is measured as well, on the networks that `--peers` names. Inputs
are noise: nothing is downloaded, and no time depends on them. All methods take turns, two steps of each kind in each
turn, of which the second is timed; the times are medians over the turns. A step is either plain, or takes new
statistics, or new statistics and new inverses; what a step costs on average at intervals of the two follows from
these. "Quarter": statistics over the first quarter of each batch. "Apart": statistics from a program of their own, as
`make_train_step` takes them where layers are convolutions and the interval is at least 10. "One program": without the
halves in which it makes such steps on a CPU where the interval is below 5. Averages follow what it does.
kfac-jax decides inside its program, so that its averages are measured over whole cycles, likewise the second of two.
The machine's peak is the rate of a product of large matrices at the highest precision, float32. An accelerator makes
the products of model and gradient at JAX's default precision, which is faster there; that rate is told as well.
Seconds of compilation, tracing included, are medians of three unless that takes long, in turns as well: the first
programs of a process compile faster than later ones. On a GPU only the first time includes the search for the
fastest program of each product. `--lock FILE`, the same for several of these processes at once: they compile side by
side, and each is timed alone.
"""

import os

# LAPACK's threads would compete with XLA's.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import functools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import tkfac_jax as tkfac
from benchmarks.autoencoder import BATCH_SIZE, PIXELS, Autoencoder
from benchmarks.figures import table
from benchmarks.gpt import GPT, VOCABULARY
from benchmarks.networks import VGG16, ResNet, predict_with_batch_stats
from benchmarks.operations import count_operations
from benchmarks.peers import has_kfac_jax, kfac_jax_constant
from benchmarks.runner import Method, Problem, environment
from benchmarks.series import write_results
from benchmarks.turns import Turns
from tkfac_jax.training.step_functions import (
    OFTEN,
    Kind,
    StepFunctions,
    StepOptions,
    takes_statistics_apart,
)

PLAIN, STATISTICS, INVERSES = KINDS = ("plain", "new statistics", "new inverses")
# New statistics from a program of their own, as of make_train_step(statistics_apart=True).
APART = {STATISTICS: "new statistics, apart", INVERSES: "new inverses, apart"}
# Steps that are not made in halves, as those of make_train_step whose statistics are some steps apart.
WHOLE = {INVERSES: "new inverses, one program"}
# Statistics over the first quarter of each batch, as of make_train_step(statistics_args=...).
QUARTER = "TKFAC, quarter"
INTERVALS = ((1, 1), (1, 5), (10, 10), (100, 100))
# So small that no method leaves its initial parameters.
RATE = 1e-8
DAMPING = 0.1
PEAK_SIZE, ACCELERATOR_PEAK_SIZE = 2048, 8192
# A program is compiled so often, unless that takes longer than so many seconds.
COMPILATIONS, COMPILING_S = 3, 10
# A peer whose steps take longer is measured over one cycle only.
SLOW_MS = 10_000


class Layer(nn.Module):
    """A dense layer with its nonlinearity."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        """What the next layer is given; nothing besides, as `nn.scan` asks."""
        return nn.relu(nn.Dense(self.width)(x)), None


class Perceptron(nn.Module):
    """Many dense layers of one width, one by one or stacked by `nn.scan`."""

    depth: int
    width: int
    stacked: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits, as many as the width."""
        between = self.depth - 1
        if self.stacked:
            stack = nn.scan(
                Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=between
            )
            x, _ = stack(self.width)(x)
        else:
            for _ in range(between):
                x, _ = Layer(self.width)(x)
        return nn.Dense(self.width)(x)


def autoencoder(batch_size: int = BATCH_SIZE) -> Problem:
    """The MNIST autoencoder on noise."""
    pixels = np.random.default_rng(0).random((batch_size, PIXELS), np.float32)
    return _without_state(Autoencoder(), tkfac.Bernoulli(), pixels, pixels)


def perceptron(
    depth: int, width: int = 64, batch_size: int = 64, *, stacked: bool = False
) -> Problem:
    """A deep network of equal layers: what compilation costs."""
    noise = np.random.default_rng(0).random((batch_size, width), np.float32)
    model = Perceptron(depth, width, stacked)
    return _without_state(model, tkfac.Normal(), noise, noise)


def transformer(batch_size: int = 32, context: int = 128) -> Problem:
    """A GPT of four blocks of width 256 on random tokens."""
    tokens = np.random.default_rng(0).integers(VOCABULARY, size=(batch_size, context + 1))
    likelihood = tkfac.Categorical(average_positions=True)
    inputs, targets = tokens[:, :-1].astype(np.int32), tokens[:, 1:].astype(np.int32)
    return _without_state(GPT(256, 4, context), likelihood, inputs, targets)


def on_images(model: nn.Module, batch_size: int = 128) -> Problem:
    """A network with BatchNorm on noise of the size of CIFAR's images."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((batch_size, 32, 32, 3), np.float32)
    labels = rng.integers(10, size=batch_size).astype(np.int32)
    variables = jax.jit(lambda x: model.init(jax.random.key(0), x, train=False))(images[:1])
    return Problem(
        predict_with_batch_stats(model),
        tkfac.Categorical(),
        variables["params"],
        variables["batch_stats"],
        images,
        labels,
        batch_size,
        _nothing,
    )


def _without_state(model: nn.Module, likelihood: Any, inputs: Any, targets: Any) -> Problem:
    params = jax.jit(model.init)(jax.random.key(0), inputs[:1])["params"]

    def predict(params: Any, model_state: Any, x: Any) -> tuple[Any, Any]:
        return model.apply({"params": params}, x), model_state

    return Problem(predict, likelihood, params, {}, inputs, targets, len(inputs), _nothing)


def _nothing(params: Any, model_state: Any) -> dict[str, float]:
    del params, model_state
    return {}


NETWORKS: dict[str, Callable[[], Problem]] = {
    "autoencoder": autoencoder,
    "resnet20": lambda: on_images(ResNet(20)),
    "vgg16": lambda: on_images(VGG16()),
    "transformer": transformer,
    "mlp10": lambda: perceptron(10),
    "mlp100": lambda: perceptron(100),
    "scan10": lambda: perceptron(10, stacked=True),
    "scan100": lambda: perceptron(100, stacked=True),
}


def methods() -> list[Method]:
    """The methods that are compared; the first one is what ratios are to."""
    return [
        Method("SGD-momentum", "", lambda _: optax.sgd(RATE, momentum=0.9)),
        Method("Adam", "", lambda _: optax.adam(RATE)),
        Method("AdamW", "", lambda _: optax.adamw(RATE)),
        Method("Muon", "", lambda _: optax.contrib.muon(RATE)),
        Method("tkfacw", "", lambda layers: tkfac.tkfacw(RATE, layers), 1),
        Method(
            "KFAC",
            "",
            lambda layers: tkfac.kfac(RATE, layers, damping=DAMPING),
            1,
        ),
        Method("TKFAC", "", lambda layers: tkfac.tkfac(RATE, layers, damping=DAMPING), 1),
        Method(
            QUARTER,
            "",
            lambda layers: tkfac.tkfac(RATE, layers, damping=DAMPING),
            1,
            statistics_args=lambda model_state, inputs: (model_state, inputs[: len(inputs) // 4]),
        ),
    ]


class Contender:
    """A method on a problem: a compiled program for each kind of step, and the state that they share."""

    def __init__(self, problem: Problem, method: Method):
        """Compiles the programs, and says how long that took."""
        self.problem, self.name = problem, method.name
        self.layers = problem.find_layers()
        self.optimizer = method.build(self.layers)
        params = jax.tree.map(jnp.array, problem.params)
        self.trees = (params, jax.jit(self.optimizer.init)(params))
        self.batch = jax.tree.map(jnp.asarray, (problem.inputs, problem.targets))
        self.programs: dict[str, Callable[..., Any]] = {}
        self.facts: dict[str, dict[str, Any]] = {}
        self.compilers: dict[str, Callable[[], float]] = {}
        for kind in _kinds(method, self.layers):
            made = self._program(kind, method)
            self.programs[kind], self.facts[kind], self.compilers[kind] = made
            # The first run of a program is slower. Of statistics of zeros there would be no inverses.
            self.run(kind)

    def run(self, kind: str) -> float:
        """Makes a step; its milliseconds."""
        started = time.perf_counter()
        self.trees = self.programs[kind](*self.trees, *self.batch)
        jax.block_until_ready(self.trees)
        return 1e3 * (time.perf_counter() - started)

    def measure(self) -> None:
        """Makes two steps of each kind, and writes down the time of the second: most steps follow one of their kind."""
        for kind, facts in self.facts.items():
            self.run(kind)
            facts["ms"].append(self.run(kind))

    def compile_again(self) -> None:
        """Compiles the programs once more, but for those that take long, and writes the seconds down."""
        for kind, facts in self.facts.items():
            if sum(facts["compilations"]) < COMPILING_S:
                facts["compilations"].append(self.compilers[kind]())

    def measure_process(self) -> None:
        """By how much the process grows during a step of each kind, where the system tells."""
        for kind, facts in self.facts.items():
            facts["process_mb"] = growth_during(lambda kind=kind: self.run(kind))

    def record(self) -> dict[str, Any]:
        """What was measured, and what follows for a step on average."""
        kinds = {}
        for kind in (*KINDS, *APART.values(), *WHOLE.values()):
            if kind in self.facts:
                facts = self.facts[kind]
                kinds[kind] = facts | {
                    "compile_seconds": float(np.median(facts["compilations"])),
                    "median_ms": float(np.median(facts["ms"])),
                }
        medians = {kind: facts["median_ms"] for kind, facts in kinds.items()}
        averages = {
            _pair(*pair): average(medians, *pair, instead=_instead(self.layers, pair[0]))
            for pair in INTERVALS
        }
        return {"method": self.name, "kinds": kinds, "average_ms": averages}

    def _program(
        self, kind: str, method: Method
    ) -> tuple[Callable[..., Any], dict[str, Any], Callable[[], float]]:
        """A compiled step of a kind, what is known of it before it runs, and what compiles it again, in seconds."""
        problem = self.problem
        if method.interval is None:
            return _compiled(self._first_order_step, *self.trees, *self.batch, donated=(0, 1))
        apart = kind in APART.values()
        functions = StepFunctions.build(
            problem.predict,
            problem.likelihood,
            self.optimizer,
            self.layers,
            StepOptions(
                inverse_interval=1,
                apart=apart,
                has_aux=True,
                statistics_args=method.statistics_args,
            ),
            rule=self.optimizer.plan.rule,
        )
        refresh = "all" if kind in (INVERSES, APART[INVERSES], WHOLE[INVERSES]) else "none"
        in_halves = _on_cpu() and kind not in WHOLE.values()
        before = None if kind == PLAIN else functions.before(in_halves=in_halves)
        key = jax.random.key(1)

        def with_data(function: Callable[..., Any]) -> Callable[..., Any]:
            """The function of the batch; its first two results are what a step changes."""

            def called(params: Any, opt_state: Any, inputs: Any, targets: Any, *given: Any) -> Any:
                data = {
                    "targets": targets,
                    "key": key,
                    "position_mask": None,
                    "example_weights": None,
                }
                args = (problem.model_state, inputs)
                return function(params, opt_state, args, data, *given)

            return called

        step = with_data(functools.partial(functions.step, Kind(kind != PLAIN, refresh)))
        arguments = (*self.trees, *self.batch)
        if before is None:
            return _compiled(lambda *args: step(*args)[:2], *arguments, donated=(0, 1))
        gather = with_data(before)
        first, facts, compile_first = _compiled(gather, *arguments)
        second, more, compile_second = _compiled(
            lambda *args: step(*args)[:2],
            *arguments,
            jax.eval_shape(gather, *arguments),
            donated=(0, 1),
        )
        for name in ("temporary_mb", "peak_mb"):
            facts[name] = max(facts[name], more[name])
        facts["gflop"] += more["gflop"]
        facts["compilations"] = [sum(facts["compilations"] + more["compilations"])]

        def in_two(*args: Any) -> Any:
            return second(*args, first(*args))

        return in_two, facts, lambda: compile_first() + compile_second()

    def _first_order_step(self, params: Any, opt_state: Any, inputs: Any, targets: Any) -> Any:
        problem = self.problem

        def loss_fn(params: Any) -> Any:
            outputs, _ = problem.predict(params, problem.model_state, inputs)
            return problem.likelihood.nll(outputs, targets).mean()

        gradient = jax.grad(loss_fn)(params)
        updates, opt_state = self.optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state


def _kinds(method: Method, layers: tkfac.Layers) -> tuple[str, ...]:
    """The kinds of a method's steps, in the order in which their programs first run."""
    if method.interval is None:
        return (PLAIN,)
    kinds = (INVERSES, PLAIN, STATISTICS)
    if method.statistics_args:
        return kinds
    return (*kinds, *_instead(layers, max(pair[0] for pair in INTERVALS)).values())


def _instead(layers: tkfac.Layers, fisher_interval: int) -> Mapping[str, str]:
    """What `make_train_step` does instead of a kind of step, where new statistics are so many steps apart."""
    if takes_statistics_apart(layers, fisher_interval):
        return APART
    return WHOLE if fisher_interval >= OFTEN else {}


def _compiled(
    function: Callable[..., Any], *args: Any, donated: tuple[int, ...] = ()
) -> tuple[Callable[..., Any], dict[str, Any], Callable[[], float]]:
    """A compiled program, what is known of it before it runs, and what compiles it again, in seconds."""
    shapes = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), args)

    def compiled() -> tuple[Any, float]:
        jax.clear_caches()
        started = time.perf_counter()
        program = jax.jit(function, donate_argnums=donated).lower(*shapes).compile()
        return program, time.perf_counter() - started

    program, seconds = compiled()
    memory: Any = program.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    facts = {
        "compilations": [seconds],
        "temporary_mb": memory.temp_size_in_bytes / 1e6,
        "peak_mb": (held + memory.temp_size_in_bytes) / 1e6,
        "gflop": count_operations(function, *shapes) / 1e9,
        "ms": [],
    }
    return program, facts, lambda: compiled()[1]


class Peer:
    """kfac-jax on a problem, an optimizer for each pair of intervals."""

    def __init__(self, problem: Problem, intervals: Sequence[tuple[int, int]]):
        """Makes the first step of each, which compiles it."""
        self.name = "kfac-jax"
        # The key once: making one takes an accelerator as long as a small step.
        self.given = jax.tree.map(jnp.asarray, (problem.inputs, problem.targets, jax.random.key(0)))
        # At intervals of 100 the two kinds of steps are those at intervals of 10.
        self.intervals = [pair for pair in intervals if pair != (100, 100)]
        self.steps, self.trees, self.ms = {}, {}, {}
        for pair in self.intervals:
            method = kfac_jax_constant(
                learning_rate=RATE,
                damping=DAMPING,
                fisher_interval=pair[0],
                inverse_interval=pair[1],
            )
            assert method.make_step is not None  # noqa: S101
            self.steps[pair] = method.make_step(problem, None)
            self.trees[pair] = (jax.tree.map(jnp.array, problem.params), {}, problem.model_state)
            self.ms[pair] = []
            self._run(pair)

    def measure(self) -> None:
        """Makes all steps of two cycles at each pair of intervals, beginning with the one after new inverses.

        Those of the second are timed. Where a step is slow, only the first time.
        """
        for pair in self._due():
            steps = 2 * math.lcm(*pair)
            self.ms[pair].append([self._run(pair) for _ in range(steps)][steps // 2 :])

    def measure_process(self) -> None:
        """By how much the process grows during a cycle."""
        self.process_mb = {
            _pair(*pair): growth_during(
                lambda pair=pair: [self._run(pair) for _ in range(math.lcm(*pair))]
            )
            for pair in self._due()
        }

    def record(self) -> dict[str, Any]:
        """What was measured."""
        averages = {
            _pair(*pair): float(np.mean(np.median(cycles, axis=0)))
            for pair, cycles in self.ms.items()
        }
        if (10, 10) in self.ms:
            places = np.median(self.ms[10, 10], axis=0)
            averages[_pair(100, 100)] = float((99 * np.median(places[:-1]) + places[-1]) / 100)
        return {
            "method": self.name,
            "kinds": {},
            "average_ms": averages,
            "process_mb": getattr(self, "process_mb", {}),
        }

    def _due(self) -> list[tuple[int, int]]:
        measured = {pair: cycles[-1] for pair, cycles in self.ms.items() if cycles}
        return [pair for pair in self.intervals if np.median(measured.get(pair, [0])) < SLOW_MS]

    def _run(self, pair: tuple[int, int]) -> float:
        started = time.perf_counter()
        self.trees[pair] = self.steps[pair](self.trees[pair], *self.given)
        jax.block_until_ready(self.trees[pair])
        return 1e3 * (time.perf_counter() - started)


def average(
    medians: Mapping[str, float],
    fisher_interval: int,
    inverse_interval: int,
    *,
    instead: Mapping[str, str] = {},
) -> float:
    """The mean time of a step at a pair of intervals, from the times of the kinds of steps."""

    def kind_at(step: int) -> str:
        if len(medians) == 1:
            return PLAIN
        kind = PLAIN if step % fisher_interval else STATISTICS
        if step % inverse_interval == 0:
            kind = INVERSES
        other = instead.get(kind, kind)
        return other if other in medians else kind

    cycle = math.lcm(fisher_interval, inverse_interval)
    return sum(medians[kind_at(step)] for step in range(cycle)) / cycle


def growth_during(action: Callable[[], Any]) -> float | None:
    """By how many MB the resident memory of this process grows while something runs on a CPU, on Linux; else None."""
    if not _on_cpu():
        return None
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = _resident("VmRSS")
    action()
    return _resident("VmHWM") - before


def _resident(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1e3


class Peak:
    """The machine's rate in a product of two large matrices."""

    def __init__(self, precision: str):
        """Compiles the product."""
        size = PEAK_SIZE if _on_cpu() else ACCELERATOR_PEAK_SIZE
        self.matrix = jax.random.normal(jax.random.key(0), (size, size))
        self.product = jax.jit(lambda a: jnp.matmul(a, a, precision=precision))
        self.gflops: list[float] = []
        jax.block_until_ready(self.product(self.matrix))

    def measure(self) -> None:
        """Makes the product, and writes the rate down."""
        started = time.perf_counter()
        jax.block_until_ready(self.product(self.matrix))
        self.gflops.append(2 * len(self.matrix) ** 3 / (time.perf_counter() - started) / 1e9)

    def rate(self) -> float:
        """The median of the rates, in GFLOP/s."""
        return float(np.median(self.gflops))


def measure(
    title: str,
    problem: Problem,
    chosen: Sequence[Method],
    repeats: int,
    peer_intervals: Sequence[tuple[int, int]] = (),
    turns: Turns | None = None,
) -> dict[str, Any]:
    """Some methods on a problem, in turns."""
    turns = turns or Turns()
    contenders: list[Contender | Peer] = []
    rounds = len(chosen) + COMPILATIONS - 1 + bool(peer_intervals) + repeats + 1
    with tqdm(total=rounds, desc=title) as bar:
        with turns.compiling():
            own: list[Contender] = []
            for method in chosen:
                own.append(Contender(problem, method))
                bar.update()
            for _ in range(COMPILATIONS - 1):
                for contender in own:
                    contender.compile_again()
                bar.update()
            contenders += own
            if peer_intervals:
                contenders.append(Peer(problem, peer_intervals))
                bar.update()
            # For CPUs the two are one.
            precisions = ("highest",) if _on_cpu() else ("highest", "default")
            peaks = {precision: Peak(precision) for precision in precisions}
        with turns.timing():
            for _ in range(repeats):
                for peak in peaks.values():
                    peak.measure()
                for contender in contenders:
                    contender.measure()
                bar.update()
            for contender in contenders:
                contender.measure_process()
            bar.update()
    return {
        "environment": environment(),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(problem.params)),
        "batch_size": problem.batch_size,
        "repeats": repeats,
        "peak_gflops": peaks["highest"].rate(),
        "peak_gflops_at_default_precision": peaks[precisions[-1]].rate(),
        "methods": [contender.record() for contender in contenders],
    }


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def _shown(milliseconds: float) -> str:
    return f"{milliseconds:.0f}" if milliseconds >= 10 else f"{milliseconds:.2f}"


def _pair(fisher_interval: int, inverse_interval: int) -> str:
    return f"{fisher_interval}/{inverse_interval}"


def times_table(result: Mapping[str, Any]) -> str:
    """Milliseconds by kind of step and on average; in brackets as multiples of the first method's plain step."""
    base = result["methods"][0]["kinds"][PLAIN]["median_ms"]
    pairs = [_pair(*pair) for pair in INTERVALS]
    rows = [["method", *KINDS, *(f"average {pair}" for pair in pairs)]]
    for record in result["methods"]:
        row = [record["method"]]
        for kind in KINDS:
            facts = record["kinds"].get(kind)
            row.append("" if facts is None else _shown(facts["median_ms"]))
        second_order = len(record["kinds"]) != 1
        for pair in pairs:
            known = record["average_ms"].get(pair)
            shown = "" if known is None else f"{_shown(known)} ({known / base:.2f})"
            row.append(shown if second_order else "")
        rows.append(row)
    return table(rows)


def peers_table(result: Mapping[str, Any]) -> str:
    """The average step of TKFAC beside that of kfac-jax, at each pair of intervals at which both were measured."""
    averages = {record["method"]: record["average_ms"] for record in result["methods"]}
    peer = averages["kfac-jax"]
    own = [name for name in ("TKFAC", QUARTER) if name in averages]
    rows = [["intervals", "kfac-jax, ms", *(f"{name}, ms (ratio)" for name in own)]]
    for pair, milliseconds in peer.items():
        shown = [
            f"{_shown(averages[name][pair])} ({averages[name][pair] / milliseconds:.3g})"
            for name in own
        ]
        rows.append([pair, _shown(milliseconds), *shown])
    return table(rows)


def programs_table(result: Mapping[str, Any]) -> str:
    """What compiling each program takes, its memory, and its share of the machine's peak."""
    base = result["methods"][0]["kinds"][PLAIN]
    rows = [
        [
            "step",
            "compile, s",
            "ratio",
            "peak memory, MB",
            "more",
            "process grows, MB",
            "GFLOP",
            "GFLOP/s",
            "share of peak",
        ]
    ]
    for record in result["methods"]:
        for kind, facts in record["kinds"].items():
            rate = facts["gflop"] / facts["median_ms"] * 1e3
            grows = facts["process_mb"]
            rows.append(
                [
                    f"{record['method']}, {kind}" if len(record["kinds"]) > 1 else record["method"],
                    f"{facts['compile_seconds']:.1f}",
                    f"{facts['compile_seconds'] / base['compile_seconds']:.2f}",
                    f"{facts['peak_mb']:.0f}",
                    f"{facts['peak_mb'] - base['peak_mb']:.0f}",
                    "" if grows is None else f"{grows:.0f}",
                    f"{facts['gflop']:.1f}",
                    f"{rate:.0f}",
                    f"{rate / result['peak_gflops']:.2f}",
                ]
            )
    return table(rows)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    names = [method.name for method in methods()]
    parser.add_argument("--methods", nargs="+", choices=names, default=names)
    parser.add_argument("--repeats", type=int, default=7, help="turns of all methods")
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=list(NETWORKS),
        default=["autoencoder"],
        help="networks on which kfac-jax is measured; on resnet20 a step of it takes a minute or more",
    )
    parser.add_argument("--out-dir", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--lock", type=Path, help="a file that processes on one accelerator share")
    options = parser.parse_args()

    options.out_dir.mkdir(parents=True, exist_ok=True)
    path = options.out_dir / f"speed-{jax.default_backend()}.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    peers = options.peers if has_kfac_jax() else []
    for name in options.networks:
        # Where a step of kfac-jax takes a minute, only the intervals that it is used with.
        intervals = INTERVALS if name == "autoencoder" else [(1, 5)]
        chosen = [method for method in methods() if method.name in options.methods]
        result = measure(
            name,
            NETWORKS[name](),
            chosen,
            options.repeats,
            intervals if name in peers else (),
            Turns(options.lock),
        )
        results[name] = result
        write_results(results, path)
        print(
            f"\n{name}: {result['parameters']:,} parameters, batch of {result['batch_size']}, "
            f"matrix products at {result['peak_gflops']:.0f} GFLOP/s in float32, "
            f"{result['peak_gflops_at_default_precision']:.0f} at JAX's default precision\n"
        )
        print(times_table(result), "\n")
        print(programs_table(result), "\n")
        if name in peers:
            print(peers_table(result), "\n")


if __name__ == "__main__":
    main()
