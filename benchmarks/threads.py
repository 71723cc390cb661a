"""Measures what threads of LAPACK, and small pages, cost a step with new inverses on the CPU.

    python -m benchmarks.threads [--turns 5] [--steps 3] [--out-dir benchmarks/results]

The network has the widths of the autoencoder (factors of 784, 785, 1000, 1001, 500, 501, 250, 251, 30 and 31 rows),
the images are noise: nothing is downloaded. Every step takes new statistics and new inverses. Each setting runs
in a process of its own, with no other variables `*_NUM_THREADS` and `GLIBC_TUNABLES` than those of the setting. The
processes take turns of a few steps: on the machine as it is, while another process keeps one core busy, and while
others keep all cores busy. The default of OpenBLAS, a thread for each core, is set by its variable, because that
switches the library's limit off. "Large pages": with the library's limit, and memory that the allocator of Linux's C
library asks for in large pages, if the system grants them, so that a step does not wait for thousands of small ones.
"""

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import threadpoolctl
from tqdm import tqdm

import tkfac_jax as tkfac
from benchmarks.figures import table
from benchmarks.runner import environment
from benchmarks.series import write_results

WIDTHS = (784, 1000, 500, 250, 30)
BATCH_SIZE = 500
SETTINGS = {
    "limit of the library": {},
    "default of OpenBLAS": {"OPENBLAS_NUM_THREADS": str(os.cpu_count())},
    "OPENBLAS_NUM_THREADS=1": {"OPENBLAS_NUM_THREADS": "1"},
    "large pages": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
}
# Other processes that do nothing but count.
LOADS = {"no load": 0, "one core busy": 1, "all cores busy": os.cpu_count() or 1}


class Autoencoder(nn.Module):
    """Dense layers with ReLU, from the first of the widths to the last and back."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of the pixels."""
        for width in (*self.widths[1:], *self.widths[-2:0:-1]):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.widths[0])(x)


class Training:
    """A training in which every step takes new statistics and new inverses."""

    def __init__(self, widths: tuple[int, ...], batch_size: int):
        """Makes the network, and a first step that compiles."""
        model = Autoencoder(widths)
        noise = np.random.default_rng(0).random((batch_size, widths[0]), np.float32)
        self.images = jnp.asarray(noise)
        self.params = jax.jit(model.init)(jax.random.key(1), self.images)["params"]

        def predict(params: Any, images: Any) -> Any:
            return model.apply({"params": params}, images)

        layers = tkfac.find_layers(predict, self.params, self.images)
        optimizer = tkfac.tkfac(1e-3, layers, damping=0.1)
        self.opt_state = jax.jit(optimizer.init)(self.params)
        self.train_step = tkfac.make_train_step(
            predict,
            tkfac.Bernoulli(),
            optimizer,
            layers=layers,
            fisher_interval=1,
            inverse_interval=1,
        )
        self.step()

    def step(self) -> float:
        """Makes a step; its milliseconds."""
        started = time.perf_counter()
        self.params, self.opt_state, metrics = self.train_step(
            self.params, self.opt_state, self.images, targets=self.images, key=jax.random.key(2)
        )
        jax.block_until_ready((self.params, self.opt_state, metrics))
        return 1e3 * (time.perf_counter() - started)


def work(training: Training) -> None:
    """Makes as many steps as each line of the input says, and answers with their milliseconds."""
    threads = {
        Path(library["filepath"]).parent.name: library["num_threads"]
        for library in threadpoolctl.threadpool_info()
        if library["internal_api"] == "openblas"
    }
    print(json.dumps(threads), flush=True)
    for line in sys.stdin:
        # What the process before has left behind, such as threads that still spin, meets the first step.
        training.step()
        print(json.dumps([training.step() for _ in range(int(line))]), flush=True)


class Worker:
    """The process of one setting."""

    def __init__(self, variables: dict[str, str], options: argparse.Namespace):
        """Starts it; `ready` waits until it has compiled."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.endswith("_NUM_THREADS") and name != "GLIBC_TUNABLES"
        }
        command = [sys.executable, "-m", "benchmarks.threads", "--worker"]
        command += ["--batch-size", str(options.batch_size), "--widths", *map(str, options.widths)]
        self.process = subprocess.Popen(
            command,
            env=kept | variables,
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ready(self) -> dict[str, int]:
        """The threads of each copy of OpenBLAS after the first step, by the folder it lies in."""
        return self._answer()

    def steps(self, number: int) -> list[float]:
        """Lets it make some steps; the milliseconds of each."""
        stream = cast(IO[str], self.process.stdin)
        stream.write(f"{number}\n")
        stream.flush()
        return self._answer()

    def end(self) -> None:
        """Ends it."""
        self.process.kill()
        self.process.communicate()

    def _answer(self) -> Any:
        line = cast(IO[str], self.process.stdout).readline()
        if not line:
            msg = f"a process of the benchmark ended with status {self.process.wait()}; its message is above."
            raise RuntimeError(msg)
        return json.loads(line)


@contextlib.contextmanager
def busy_processes(number: int) -> Iterator[None]:
    """Keeps so many cores busy meanwhile."""
    # Until this process is gone, should it be killed.
    counting = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"
    command = [sys.executable, "-c", counting]
    processes = [subprocess.Popen(command) for _ in range(number)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The milliseconds of all steps of all settings, in turns."""
    workers = {name: Worker(variables, options) for name, variables in SETTINGS.items()}
    try:
        records = [
            {"setting": name, "threads": worker.ready(), "step_ms": {load: [] for load in LOADS}}
            for name, worker in workers.items()
        ]
        for _ in tqdm(range(options.turns), desc="threads", unit="turn"):
            for load, number in LOADS.items():
                with busy_processes(number):
                    for record in records:
                        steps = workers[record["setting"]].steps(options.steps)
                        record["step_ms"][load] += steps
    finally:
        for worker in workers.values():
            worker.end()
    for record in records:
        record["median_step_ms"] = {
            load: float(np.median(steps)) for load, steps in record["step_ms"].items()
        }
    return records


def results_table(records: Sequence[dict[str, Any]]) -> str:
    """The median time of a step under each load, also as a multiple of that with the library's limit."""
    head = ["setting"]
    for load in LOADS:
        head += [f"ms, {load}", "ratio"]
    rows = [head]
    for record in records:
        row = [record["setting"]]
        for load, milliseconds in record["median_step_ms"].items():
            ratio = milliseconds / records[0]["median_step_ms"][load]
            row += [f"{milliseconds:.0f}", f"{ratio:.2f}"]
        rows.append(row)
    return table(rows)


def main() -> None:
    """Runs the benchmark, or one of its processes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--turns", type=int, default=5, help="turns of each setting and load")
    parser.add_argument("--steps", type=int, default=3, help="steps of a turn")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="of the encoder")
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE)
    parser.add_argument("--out-dir", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(Training(tuple(options.widths), options.batch_size))
        return

    load_before = os.getloadavg()[0]
    records = measure(options)
    print(results_table(records))
    options.out_dir.mkdir(parents=True, exist_ok=True)
    facts = {"python": platform.python_version(), "load_average_before": load_before}
    results = {
        "environment": environment() | facts,
        "widths": options.widths,
        "batch_size": options.batch_size,
        "runs": records,
    }
    write_results(results, options.out_dir / "threads.json")


if __name__ == "__main__":
    main()
