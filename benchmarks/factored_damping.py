"""Why KFAC is ahead of TKFAC_nor with equal settings: a network on CIFAR-10, rule and damping crossed.

    python -m benchmarks.factored_damping --data-dir DIR [--steps 390] [--seeds 0] [--out-dir results/factored_damping]
      [--network vgg16 --width 0.25] [--settings "damping 0.001"]

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

import tkfac_jax as tkfac
from benchmarks.cifar import NETWORKS
from benchmarks.runner import Method
from benchmarks.trace_damping import compare, variant

DAMPINGS = (1e-3, 3e-4, 1e-4)


def variants() -> list[Method]:
    """Both rules with both dampings."""
    tkfac_rule, kfac_rule = tkfac.trace_restricted, tkfac.independent
    normal, factored = tkfac.normal_damping, tkfac.factored_damping
    return [
        variant(name, f"damping {value:g}", damping(value), rule=rule)
        for name, rule, damping, values in (
            ("TKFAC, normal", tkfac_rule, normal, DAMPINGS),
            ("TKFAC, factored", tkfac_rule, factored, DAMPINGS),
            ("KFAC, factored", kfac_rule, factored, DAMPINGS),
            ("KFAC, normal", kfac_rule, normal, DAMPINGS[:1]),
        )
        for value in values
    ]


def main() -> None:
    """Runs the benchmark."""
    compare("factored_damping", __doc__ or "", variants, list(NETWORKS))


if __name__ == "__main__":
    main()
