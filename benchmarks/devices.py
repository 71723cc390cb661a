"""Inverses and state divided among 1, 2, 4 and 8 devices of one host.

    python -m benchmarks.devices [--devices 1 2 4 8] [--repeats 7] [--out-dir benchmarks/results]

The factors are those of the MNIST autoencoder (784-1000-500-250-30 and back), of random numbers. For each number
of devices a process of its own says how many matrices a device inverts at most, how many bytes of factors and
inverses it holds (whole, and divided with `shard_state=True`), and how long new inverses take. A process runs
on as many cores as it has devices; where there are fewer (on Linux; elsewhere always all cores), devices share
them, and times need not fall, while counts and bytes do.
"""

import os

# LAPACK's threads would compete with XLA's.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tqdm import tqdm

import tkfac_jax as tkfac
from benchmarks.figures import table
from benchmarks.runner import environment
from benchmarks.series import write_results
from tkfac_jax.linalg.divided_stacks import deal

WIDTHS = (784, 1000, 500, 250, 30)


class Autoencoder(nn.Module):
    """Dense layers, from the first of the widths to the last and back."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """An output like the input."""
        for width in (*self.widths[1:], *self.widths[-2::-1]):
            x = nn.Dense(width)(x)
        return x


def measure(devices: int, widths: tuple[int, ...], repeats: int) -> dict[str, Any]:
    """The figures for one number of devices, in a process that has so many."""
    model = Autoencoder(widths)
    x = jnp.ones((1, widths[0]), jnp.float32)
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]

    def predict(params: Any, x: Any) -> Any:
        return model.apply({"params": params}, x)

    layers = tkfac.find_layers(predict, params, x)
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    params = jax.device_put(params, everywhere)
    record: dict[str, Any] = {"devices": devices, "cores": cores(), **_rounds(layers, devices)}
    for name, divided in (("whole", False), ("divided", True)):
        optimizer = tkfac.scale_by_tkfac(layers, mesh=mesh, shard_state=divided)
        state = jax.jit(optimizer.init)(params)
        record[f"bytes_{name}"] = _bytes_on_first(state)

        @jax.jit
        def new_inverses(state: Any, optimizer: Any = optimizer) -> Any:
            _, state = optimizer.update(params, state, statistics=None, refresh_inverses=True)
            # Of the update the compiler leaves what these need.
            return state.inverses

        jax.block_until_ready(new_inverses(state))
        milliseconds = []
        for _ in range(repeats):
            started = time.perf_counter()
            jax.block_until_ready(new_inverses(state))
            milliseconds.append(1e3 * (time.perf_counter() - started))
        record[f"ms_{name}"] = float(np.median(milliseconds))
    return record


def cores() -> int:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def limit_cores(number: int) -> None:
    """Keeps this process to so many of its cores, where the system can."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:number])


def _rounds(layers: tkfac.Layers, devices: int) -> dict[str, Any]:
    """The rounds in which matrices are dealt out, and their cost against that of one device."""
    counts: dict[int, int] = {}
    for spec in layers.values():
        for size in (spec.d_in, spec.d_out):
            counts[size] = counts.get(size, 0) + 1

    def rounds(devices: int) -> list[int]:
        stacks = deal(counts, devices)
        numbers = [-(-sum(p.stop - p.start for p in pieces) // devices) for pieces in stacks]
        return [p[0].size for p, number in zip(stacks, numbers, strict=True) for _ in range(number)]

    own, single = rounds(devices), rounds(1)
    return {
        "matrices": sum(counts.values()),
        "matrices_per_device": len(own),
        "cost": sum(size**3 for size in own) / sum(size**3 for size in single),
    }


def _bytes_on_first(state: Any) -> int:
    """Bytes of factors and inverses on the first device."""
    arrays = jax.tree.leaves([optax.tree.get(state, name) for name in ("factors", "inverses")])
    return sum(array.addressable_shards[0].data.nbytes for array in arrays)


def results_table(records: Sequence[dict[str, Any]]) -> str:
    """The figures of all numbers of devices."""
    rows = [
        (
            "devices",
            "cores",
            "matrices a device inverts",
            "cubes of sizes, share",
            "ms",
            "ratio",
            "MB a device, whole",
            "MB a device, divided",
            "ms, divided",
            "ratio",
        )
    ]
    for record in records:
        rows.append(
            (
                str(record["devices"]),
                str(record["cores"]),
                f"{record['matrices_per_device']} of {record['matrices']}",
                f"{record['cost']:.2f}",
                f"{record['ms_whole']:.0f}",
                f"{record['ms_whole'] / records[0]['ms_whole']:.2f}",
                f"{record['bytes_whole'] / 1e6:.1f}",
                f"{record['bytes_divided'] / 1e6:.1f}",
                f"{record['ms_divided']:.0f}",
                f"{record['ms_divided'] / records[0]['ms_divided']:.2f}",
            )
        )
    return table(rows)


def main() -> None:
    """Runs the benchmark, or one of its processes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--devices", type=int, nargs="+", default=(1, 2, 4, 8))
    parser.add_argument("--repeats", type=int, default=7, help="updates of each kind, the median")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="of the encoder")
    parser.add_argument("--out-dir", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        limit_cores(options.worker)
        jax.config.update("jax_num_cpu_devices", options.worker)
        print(json.dumps(measure(options.worker, tuple(options.widths), options.repeats)))
        return

    records = []
    for devices in tqdm(options.devices, desc="devices", unit="process"):
        command = [sys.executable, "-m", "benchmarks.devices", "--worker", str(devices)]
        command += ["--repeats", str(options.repeats), "--widths", *map(str, options.widths)]
        done = subprocess.run(
            command, cwd=Path(__file__).parents[1], check=True, capture_output=True, text=True
        )
        records.append(json.loads(done.stdout))
    print(results_table(records))
    options.out_dir.mkdir(parents=True, exist_ok=True)
    results = {"environment": environment(), "widths": options.widths, "runs": records}
    write_results(results, options.out_dir / "devices.json")


if __name__ == "__main__":
    main()
