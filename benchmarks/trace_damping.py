"""Why TKFAC_new is behind at first: ResNet20 on CIFAR-10 with one thing about its damping changed at a time.

    python -m benchmarks.trace_damping --data-dir DIR [--steps 390] [--seeds 0] [--out-dir results/trace_damping]

Trace damping as Table 2 of the paper has it (learning rate 1e-3, nu 1e-2) against other learning rates, other floors,
dense layers without the factor beta of Eq. (5.17), and two other readings of Eq. (5.16):

* root: what is added to the factors is `sqrt(d) / d_in` and `sqrt(d) / d_out`, the means of the diagonals of what it is
  added to, where the paper has `d / d_in` and `d / d_out`;
* per location: the trace of a convolution is the mean over its locations, not the sum of Eq. (4.13).

A damping decides two things, how far each layer goes and in which direction. To tell which one matters, two more
variants take the directions of one damping and, for each layer, the lengths of the other.

Normal damping is the mark. The learning rate is constant; everything else is as in `benchmarks.cifar`. The table says
how large the traces are at the end. The official binary files are read from DIR, or downloaded
there. Runs that are stopped go on where they were when the command is given again.
"""

import os

# LAPACK's threads would compete with XLA's.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import tkfac_jax as tkfac
from benchmarks.cifar import BATCH_SIZE, INTERVAL, MOMENTUM, NETWORKS, cifar_problem, load_cifar
from benchmarks.figures import mean_and_deviation, table
from benchmarks.runner import Method, Run, environment, race
from benchmarks.series import write_results

RATE, DAMPING, FLOOR = 1e-3, 1e-3, 1e-2
EVALUATION_EXAMPLES = 5000


class Reading(NamedTuple):
    """A damping of convolutions that follows their traces, otherwise than `tkfac_jax.trace_damping` reads Eq. (5.16).

    Attributes:
      root: what is added is the mean of the diagonal that it is added to.
      expand: dense layers are expanded by beta.
      locations: by layer, by what its trace is divided; layers that are not in it by 1.
      floor: nu.
      dense_damping: lambda of the dense layers.
    """

    root: bool = False
    expand: bool = True
    locations: Mapping[str, int] = {}
    floor: float = FLOOR
    dense_damping: float = DAMPING

    def damp(self, factors: Any, layers: Any, step: Any) -> dict[str, tkfac.KroneckerFactors]:
        """The damped factors."""
        del step
        traces = {
            name: layer.delta / self.locations.get(name, 1) for name, layer in factors.items()
        }
        kept = {name: jnp.maximum(trace, self.floor) for name, trace in traces.items()}
        # A layer of trace 0 does not count.
        ratios = [jnp.where(traces[name] > 0, kept[name] / traces[name], 1) for name in factors]
        beta = jnp.stack(ratios).max()
        damped = {}
        for name, layer in factors.items():
            if layers[name].kind == "conv":
                trace = kept[name]
                added = jnp.sqrt(trace) if self.root else trace
                shifts = added / layers[name].d_in, added / layers[name].d_out
            else:
                trace = traces[name] * (beta if self.expand else 1)
                shifts = (jnp.sqrt(self.dense_damping),) * 2
            damped[name] = tkfac.KroneckerFactors(
                jnp.sqrt(trace) * layer.phi + shifts[0] * jnp.eye(len(layer.phi)),
                jnp.sqrt(trace) * layer.psi + shifts[1] * jnp.eye(len(layer.psi)),
                layer.delta,
            )
        return damped


class Swapped(NamedTuple):
    """The directions of one damping's steps, each layer's as long as another damping would make it.

    Lengths are those expected of a gradient whose covariance is the layer's own Fisher block, `F`: of a step
    `D^-1 g` it is the root of `tr(D^-1 F D^-1)`.

    Attributes:
      directions: a damping.
      lengths: another one.
    """

    directions: Any
    lengths: Any

    def damp(self, factors: Any, layers: Any, step: Any) -> dict[str, tkfac.KroneckerFactors]:
        """The damped factors."""
        found = self.directions.damp(factors, layers, step)
        others = self.lengths.damp(factors, layers, step)
        damped = {}
        for name, layer in factors.items():
            own, wanted = (squared_length(layer, each[name]) for each in (found, others))
            # Without a gradient, as before the first statistics, any length is as good.
            known = (own > 0) & (wanted > 0)
            # Both factors grow by the fourth root of this: steps become shorter by the square of that.
            ratio = jnp.where(known, own, 1) / jnp.where(known, wanted, 1)
            phi, psi = (factor * ratio**0.25 for factor in found[name][:2])
            damped[name] = tkfac.KroneckerFactors(phi, psi, layer.delta)
        return damped


def squared_length(factors: tkfac.KroneckerFactors, damped: tkfac.KroneckerFactors) -> jax.Array:
    """`tr(D^-1 F D^-1)`, where `F` is `delta Phi (x) Psi` and `D` the product of the damped factors."""
    length = factors.delta
    for factor, shifted in zip(factors[:2], damped[:2], strict=True):
        inverse = jnp.linalg.inv(shifted)
        length = length * jnp.sum(inverse * (factor @ inverse))
    return length


def locations_of(layers: tkfac.Layers) -> dict[str, int]:
    """The number of output locations of each convolution of a ResNet on images of 32 x 32 pixels."""
    widths = sorted({spec.d_out for spec in layers.values() if spec.kind == "conv"})
    return {
        name: (32 >> widths.index(spec.d_out)) ** 2
        for name, spec in layers.items()
        if spec.kind == "conv"
    }


def variant(
    name: str, settings: str, damping: Any, rate: float = RATE, rule: Any = tkfac.trace_restricted
) -> Method:
    """TKFAC, or another rule, as in `benchmarks.cifar` but for a damping, or a function from the layers to one."""

    def build(layers: tkfac.Layers) -> Any:
        own: Any = damping(layers) if callable(damping) else damping
        return tkfac.tkfac(
            rate,
            layers,
            momentum=MOMENTUM,
            damping=own,
            rule=rule,
            fallback=optax.adam(RATE, b1=MOMENTUM),
        )

    return Method(name, settings, build, INTERVAL)


def variants() -> list[Method]:
    """Normal damping, trace damping as the paper has it, with one thing changed, and mixtures of both."""

    def method(name: str, rate: float, damping: Any) -> Method:
        return variant(name, f"lr {rate:g}", damping, rate)

    paper, normal = tkfac.trace_damping(FLOOR, DAMPING), tkfac.normal_damping(DAMPING)
    return [
        method("normal damping", RATE, normal),
        method("Eq. (5.16), nu 0.01", RATE, paper),
        *(method("Eq. (5.16), nu 0.01", rate, paper) for rate in (3e-3, 1e-2, 3e-2, 1e-1)),
        *(
            method(f"Eq. (5.16), nu {floor:g}", RATE, tkfac.trace_damping(floor, DAMPING))
            for floor in (1e-4, 10.0)
        ),
        method("without beta, nu 10", RATE, Reading(expand=False, floor=10.0)),
        *(method("root, nu 0.01", rate, Reading(root=True)) for rate in (RATE, 3e-3)),
        method(
            "per location, nu 0.01",
            RATE,
            lambda layers: Reading(locations=locations_of(layers)),
        ),
        method("(5.16), normal's lengths", RATE, Swapped(paper, normal)),
        method("normal, (5.16)'s lengths", RATE, Swapped(normal, paper)),
    ]


def traces_of(run: Run) -> dict[str, float] | None:
    """Smallest and largest average trace of a convolution, and that of the dense layer; None if the rule has none."""
    plan = run.method.build(run.layers).plan
    if plan.rule is not tkfac.trace_restricted:
        return None
    factors = optax.tree.get(run.trees[1], "factors")
    traces = {name: float(factor.delta) for name, factor in factors.items()}
    convs = [traces[name] for name, spec in run.layers.items() if spec.kind == "conv"]
    dense = [traces[name] for name, spec in run.layers.items() if spec.kind == "dense"]
    return {"smallest": min(convs), "largest": max(convs), "dense": max(dense)}


def results_table(records: Sequence[Mapping[str, Any]]) -> str:
    """What each variant reached over its seeds, and its traces with the first seed."""
    head = ("damping", "settings", "training loss", "test accuracy (%)")
    rows: list[tuple[str, ...]] = [(*head, "traces of convolutions", "trace of the dense layer")]
    for key in dict.fromkeys((record["method"], record["settings"]) for record in records):
        runs = [record for record in records if (record["method"], record["settings"]) == key]
        ends, traces = [run["curve"][-1] for run in runs], runs[0]["traces"]
        spread = f"{traces['smallest']:.2g} to {traces['largest']:.2g}" if traces else "-"
        rows.append(
            (
                *key,
                mean_and_deviation([end["train_loss"] for end in ends], ".3f"),
                mean_and_deviation([100 * end["test_accuracy"] for end in ends], ".1f"),
                spread,
                f"{traces['dense']:.2g}" if traces else "-",
            )
        )
    return table(rows)


def compare(
    what: str,
    description: str,
    variants: Callable[[], Sequence[Method]],
    networks: Sequence[str] = ("resnet20",),
) -> None:
    """The command that trains a network with each variant and compares them; `what` names its results."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--data-dir", type=Path, required=True, help="directory of CIFAR's folders")
    parser.add_argument("--steps", type=int, default=390, help="of each run; 390 are an epoch")
    parser.add_argument("--turn", type=int, help="steps between evaluations; all if not given")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of networks and batches")
    parser.add_argument("--network", choices=networks, default=networks[0])
    parser.add_argument("--width", type=float, default=1.0, help="channels, as a multiple")
    every = variants()
    parser.add_argument(
        "--names",
        nargs="+",
        choices=list(dict.fromkeys(method.name for method in every)),
        help="of the variants to train; all by default",
    )
    parser.add_argument(
        "--settings",
        nargs="+",
        choices=list(dict.fromkeys(method.settings for method in every)),
        help="likewise",
    )
    parser.add_argument(
        "--examples", type=int, help="at most so many examples of each split, for a quick try"
    )
    parser.add_argument("--out-dir", type=Path, default=Path("results") / what)
    options = parser.parse_args()

    data = load_cifar(options.data_dir, "cifar10").first(options.examples, options.examples)
    model = NETWORKS[options.network](data.classes, options.width)
    chosen = [
        method
        for method in every
        if method.name in (options.names or [method.name])
        and method.settings in (options.settings or [method.settings])
    ]
    if not chosen:
        parser.error(f"no variant of {options.names} has one of the settings {options.settings}.")
    records = []
    for seed in options.seeds:
        problem = cifar_problem(data, model, seed, evaluation_examples=EVALUATION_EXAMPLES)
        folder = (
            options.out_dir / f"checkpoints-{options.network}-width-{options.width:g}-seed-{seed}"
        )
        folder.mkdir(parents=True, exist_ok=True)
        # One after the other: what differs is what they learn, not the time that it takes.
        for method in chosen:
            run = Run(problem, method, seed, folder)
            race(
                [run],
                options.steps,
                options.turn or options.steps,
                f"{method.name}, {method.settings}",
            )
            records.append(run.record() | {"seed": seed, "traces": traces_of(run)})
    print(results_table(records))
    results = {
        "environment": environment(),
        "batch_size": BATCH_SIZE,
        "interval": INTERVAL,
        "steps": options.steps,
        "network": options.network,
        "width": options.width,
        "runs": records,
    }
    path = options.out_dir / f"{what}.json"
    write_results(results, path)
    print(f"The results are in {path}.")


def main() -> None:
    """Runs the benchmark."""
    compare("trace_damping", __doc__ or "", variants)


if __name__ == "__main__":
    main()
