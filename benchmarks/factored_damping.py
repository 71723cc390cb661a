"""Why KFAC is ahead of TKFAC_nor with equal settings: ResNet20 on CIFAR-10, rule and damping crossed.

    python -m benchmarks.factored_damping --data-dir DIR [--steps 390] [--seeds 0] [--out-dir results/factored_damping]

KFAC and TKFAC_nor of the paper differ in two things at once. The rule of the statistics: expectations of the two
factors by themselves, or weighted by each other's traces. And how one lambda is divided between the two factors of a
layer: KFAC's factored damping gives each a part in proportion to the mean of its diagonal; normal damping, Eq. (5.15),
gives both the root of lambda, which for a convolution with nine inputs to an output is nine times as much beside the
diagonal of Phi as beside that of Psi. Here each rule is trained with each damping, and with smaller lambdas.

Learning rate 1e-3, constant; everything else is as in `benchmarks.cifar`. The official binary files are read from DIR,
or downloaded there. Runs that are stopped go on where they were when the command is given again.
"""

import os

# LAPACK's threads would compete with XLA's.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import functools
from collections.abc import Callable
from typing import Any

import optax

import tkfac_jax as tkfac
from benchmarks.cifar import INTERVAL, MOMENTUM
from benchmarks.runner import Method
from benchmarks.trace_damping import RATE, compare

DAMPINGS = (1e-3, 3e-4, 1e-4)


def variants() -> list[Method]:
    """Both rules with both dampings."""

    def method(name: str, rule: Any, damping: Callable[[float], Any], value: float) -> Method:
        def build(layers: tkfac.Layers) -> Any:
            return tkfac.tkfac(
                RATE,
                layers,
                momentum=MOMENTUM,
                damping=damping(value),
                fallback=optax.adam(RATE, b1=MOMENTUM),
            )

        return Method(name, f"damping {value:g}", build, INTERVAL, rule)

    trace_restricted = functools.partial(method, rule=tkfac.trace_restricted)
    independent = functools.partial(method, rule=tkfac.independent)
    normal, factored = tkfac.normal_damping, tkfac.factored_damping
    return [
        *(trace_restricted("TKFAC, normal", damping=normal, value=value) for value in DAMPINGS),
        *(trace_restricted("TKFAC, factored", damping=factored, value=value) for value in DAMPINGS),
        *(independent("KFAC, factored", damping=factored, value=value) for value in DAMPINGS),
        *(independent("KFAC, normal", damping=normal, value=value) for value in DAMPINGS[:1]),
    ]


def main() -> None:
    """Runs the benchmark."""
    compare("factored_damping", __doc__ or "", variants)


if __name__ == "__main__":
    main()
