"""What a step costs in a training loop, which hands step after step to the device and waits for none of them.

    python -m benchmarks.loops [--networks autoencoder ...] [--intervals 1/5 ...] [--out-dir benchmarks/results]

The networks, inputs and settings are those of `benchmarks.speed`, which waits for each step and tells its kinds apart.
On an accelerator small steps take what it takes to hand out their operations, so that whole loops are what counts
there: those of `make_train_step` and of kfac-jax's `Optimizer`, whose own work on the host is a part of it. kfac-jax is
measured in the environment that `make peers` makes. A loop is a whole cycle of the intervals, or several, of at least
ten steps; the loops take turns, and what is shown are medians over the turns. Seconds until a method is ready are those
of its first two loops, compilation included; on a GPU what the compiler has found out for one method's matrix products
serves the next ones. `--lock FILE` as in `benchmarks.speed`.
"""

import os

# LAPACK's threads would compete with XLA's.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import tkfac_jax as tkfac
from benchmarks.figures import table
from benchmarks.peers import has_kfac_jax, kfac_jax_constant
from benchmarks.runner import Method, Problem, environment, make_step
from benchmarks.series import write_results
from benchmarks.speed import DAMPING, NETWORKS, RATE
from benchmarks.turns import Turns

SHORTEST_LOOP = 10
INTERVALS = ("1/5", "10/10", "100/100")

Intervals = tuple[int, int]


def tkfac_method(fisher_interval: int, inverse_interval: int) -> Method:
    """TKFAC with constant settings."""
    return Method(
        "TKFAC",
        "",
        lambda layers: tkfac.tkfac(RATE, layers, damping=DAMPING),
        fisher_interval,
        inverse_interval=inverse_interval,
    )


def kfac_jax_method(fisher_interval: int, inverse_interval: int) -> Method:
    """kfac-jax likewise."""
    return kfac_jax_constant(
        learning_rate=RATE,
        damping=DAMPING,
        fisher_interval=fisher_interval,
        inverse_interval=inverse_interval,
    )


class Loop:
    """A method on a problem, and how long its loops took."""

    def __init__(self, problem: Problem, method: Method, intervals: Intervals | None):
        """Makes two loops, which compiles all programs."""
        self.method, self.intervals = method.name, intervals
        cycle = math.lcm(*intervals or (1,))
        self.steps = cycle * math.ceil(SHORTEST_LOOP / cycle)
        # The key once: making one takes an accelerator as long as a small step.
        self.given = jax.tree.map(jnp.asarray, (problem.inputs, problem.targets, jax.random.key(0)))
        self.milliseconds: list[float] = []
        params = jax.tree.map(jnp.array, problem.params)
        started = time.perf_counter()
        if method.make_step is None:
            layers = problem.find_layers()
            optimizer = method.build(layers)
            state = jax.jit(optimizer.init)(params)
            self.step = make_step(problem, method, optimizer)
        else:
            state, self.step = {}, method.make_step(problem, None)
        self.trees = (params, state, problem.model_state)
        self._run()
        self._run()
        self.ready_seconds = time.perf_counter() - started

    def measure(self) -> None:
        """Makes a loop, and writes its time down."""
        self.milliseconds.append(self._run())

    def record(self) -> dict[str, Any]:
        """What was measured."""
        return {
            "method": self.method,
            "intervals": None if self.intervals is None else "{}/{}".format(*self.intervals),
            "steps": self.steps,
            "ready_seconds": self.ready_seconds,
            "ms": self.milliseconds,
            "median_ms": float(np.median(self.milliseconds)),
        }

    def _run(self) -> float:
        """The milliseconds of a step, on average over a loop."""
        started = time.perf_counter()
        for _ in range(self.steps):
            self.trees = self.step(self.trees, *self.given)
        jax.block_until_ready(self.trees)
        return 1e3 * (time.perf_counter() - started) / self.steps


def measure(
    title: str,
    problem: Problem,
    intervals: Sequence[Intervals],
    repeats: int,
    turns: Turns,
    *,
    peer: bool,
) -> dict[str, Any]:
    """All methods on a problem, in turns."""
    makers: list[Callable[[int, int], Method]] = [
        tkfac_method,
        *([kfac_jax_method] if peer else []),
    ]
    plans: list[tuple[Method, Intervals | None]] = [
        (Method("SGD-momentum", "", lambda _: optax.sgd(RATE, momentum=0.9)), None),
        (Method("Adam", "", lambda _: optax.adam(RATE)), None),
    ]
    plans += [(maker(*pair), pair) for pair in intervals for maker in makers]
    with tqdm(total=len(plans) + repeats, desc=title) as bar:
        loops = []
        with turns.compiling():
            for method, pair in plans:
                loops.append(Loop(problem, method, pair))
                bar.update()
        with turns.timing():
            for _ in range(repeats):
                for loop in loops:
                    loop.measure()
                bar.update()
    return {
        "environment": environment(),
        "batch_size": problem.batch_size,
        "repeats": repeats,
        "loops": [loop.record() for loop in loops],
    }


def results_table(result: Mapping[str, Any]) -> str:
    """Milliseconds of a step, as multiples of SGD-momentum's and of kfac-jax's at the same intervals."""
    records = result["loops"]
    peers = {record["intervals"]: record for record in records if record["method"] == "kfac-jax"}
    rows = [["method", "intervals", "ms a step", "/ SGD-momentum", "/ kfac-jax", "ready after, s"]]
    for record in records:
        milliseconds, peer = record["median_ms"], peers.get(record["intervals"])
        rows.append(
            [
                record["method"],
                record["intervals"] or "",
                f"{milliseconds:.3g}",
                f"{milliseconds / records[0]['median_ms']:.2f}",
                "" if peer in (None, record) else f"{milliseconds / peer['median_ms']:.2f}",
                f"{record['ready_seconds']:.0f}",
            ]
        )
    return table(rows)


def interval_pair(text: str) -> Intervals:
    """`"1/5"` as two whole numbers, both at least 1."""
    match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", text)
    if match is None:
        msg = f"{text!r}; expected two whole numbers of at least 1, such as 1/5"
        raise argparse.ArgumentTypeError(msg)
    return int(match[1]), int(match[2])


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    defaults = ["autoencoder", "resnet20", "transformer"]
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=defaults)
    parser.add_argument(
        "--intervals",
        nargs="+",
        type=interval_pair,
        default=[interval_pair(text) for text in INTERVALS],
        metavar="STATISTICS/INVERSES",
        help="steps between new statistics and between new inverses",
    )
    parser.add_argument("--repeats", type=int, default=9, help="turns of all methods")
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=list(NETWORKS),
        default=["autoencoder"],
        help="networks on which kfac-jax is measured; on a CPU a step of it on resnet20 takes a minute or more",
    )
    parser.add_argument("--out-dir", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--lock", type=Path, help="a file that processes on one accelerator share")
    options = parser.parse_args()

    options.out_dir.mkdir(parents=True, exist_ok=True)
    path = options.out_dir / f"loops-{jax.default_backend()}.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    peers = options.peers if has_kfac_jax() else []
    for name in options.networks:
        results[name] = measure(
            name,
            NETWORKS[name](),
            options.intervals,
            options.repeats,
            Turns(options.lock),
            peer=name in peers,
        )
        write_results(results, path)
        print(f"\n{name}, batch of {results[name]['batch_size']}\n")
        print(results_table(results[name]), "\n")


if __name__ == "__main__":
    main()
