"""Whether the tests notice: changes the package in one place after the other, and runs tests until one fails.

    python tests/mutations.py [--only NAME ...] [--from NAME] [--whole] [--root .]

A mutation is a piece of code that stands once in the package, and what takes its place. The tests of its own module
run first, and with `--whole` all tests of the package for those that these let pass. Ends with the number that were
caught; the package is as it was before, whatever happens. Git must find nothing changed in it when it starts.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple


class Mutation(NamedTuple):
    """A change that some test should notice: `before` stands once in the package; `tests` are names of test files."""

    name: str
    before: str
    after: str
    tests: tuple[str, ...]


MUTATIONS = (
    Mutation(
        "trace-restricted moments swapped",
        "return RowWeights(gradients, inputs, inputs * gradients)",
        "return RowWeights(inputs, gradients, inputs * gradients)",
        ("statistics", "layer_statistics", "fisher_functions"),
    ),
    Mutation(
        "the bias's 1 missing in the squared norm",
        "(structure.size - rows.shape[-1])",
        "0",
        ("statistics", "layer_statistics", "fisher_functions"),
    ),
    Mutation(
        "patches of a flipped kernel in their order",
        "            taps.reverse()",
        "            pass",
        ("coverage",),
    ),
    Mutation(
        "low and high padding of circular convolutions swapped",
        "pads = [((span - 1) // 2, span // 2) for span in spans]",
        "pads = [(span // 2, (span - 1) // 2) for span in spans]",
        ("coverage",),
    ),
    Mutation(
        "KFAC's gradients not divided by locations",
        "return RowWeights(counted, present / locations, counted / locations)",
        "return RowWeights(counted, present, counted / locations)",
        ("statistics", "layer_statistics", "fisher_functions"),
    ),
    Mutation(
        "the mask of padding swapped",
        "flat = self.mask.reshape(batch, -1)",
        "flat = ~self.mask.reshape(batch, -1)",
        ("estimators", "statistics", "layer_statistics", "fisher_functions"),
    ),
    Mutation(
        "the rest of a chunked batch forgotten",
        "return jax.tree.map(jnp.add, statistics_from(0, rest), sums) if rest else sums",
        "return sums",
        ("statistics", "layer_statistics", "fisher_functions"),
    ),
    Mutation(
        "a sum over examples in place of the mean",
        "return jax.tree.map(lambda leaf: leaf / examples.astype(leaf.dtype), sums)",
        "return sums",
        ("estimators",),
    ),
    Mutation(
        "weights of examples squared",
        "weights = 1 if batch.weights is None else jnp.sqrt(batch.weights)",
        "weights = 1 if batch.weights is None else batch.weights",
        ("estimators",),
    ),
    Mutation(
        "devices draw the same targets",
        "key if axis_name is None else jax.random.fold_in(key, jax.lax.axis_index(axis_name))",
        "key",
        ("estimators", "distributed"),
    ),
    Mutation(
        "normal damping of lambda in place of its root",
        "shift = jnp.broadcast_to(_root(damping, delta.dtype), delta.shape)",
        "shift = jnp.broadcast_to(jnp.asarray(damping, delta.dtype), delta.shape)",
        ("damping",),
    ),
    Mutation(
        "d_in and d_out swapped in trace damping",
        "shifts = delta / spec.d_in, delta / spec.d_out",
        "shifts = delta / spec.d_out, delta / spec.d_in",
        ("damping",),
    ),
    Mutation(
        "pi swapped in factored damping",
        "jnp.sqrt(layer.delta), pi * shift, shift / pi)",
        "jnp.sqrt(layer.delta), shift / pi, pi * shift)",
        ("damping",),
    ),
    Mutation(
        "beta not bounded",
        "return jnp.minimum(beta, jnp.sqrt(jnp.finfo(beta.dtype).max))",
        "return beta",
        ("damping",),
    ),
    Mutation(
        "weights of old and new average swapped",
        "return weight * old + (1 - weight) * new.astype(old.dtype)",
        "return (1 - weight) * old + weight * new.astype(old.dtype)",
        ("factors",),
    ),
    Mutation(
        "the first update does not replace",
        "return jnp.where(updates == 0, 0.0, jnp.asarray(decay, dtype=float))",
        "return jnp.asarray(decay, dtype=float)",
        ("factors", "transform", "tkfac_and_kfac", "preconditioner"),
    ),
    Mutation(
        "statistics that are not finite are taken",
        "kept = jax.tree.map(lambda new, old: jnp.where(accepted, new, old), new, factors)",
        "kept = new",
        ("faults",),
    ),
    Mutation(
        "skipped statistics counted the other way",
        "state.skipped_statistics + (~accepted).astype(jnp.int32)",
        "state.skipped_statistics + accepted.astype(jnp.int32)",
        ("faults", "transform", "tkfac_and_kfac", "preconditioner"),
    ),
    Mutation(
        "an inverse that failed takes the old one's place",
        "return jnp.where(flags, new.astype(old.dtype), old)",
        "return new.astype(old.dtype)",
        ("inverses", "faults"),
    ),
    Mutation(
        "no retry with more damping",
        "own + extra[:, None, None]",
        "own",
        ("inverses", "inversion"),
    ),
    Mutation(
        "the sign of an inverse's block by halves",
        "root = _product(-matrices[..., half:, :half], upper_factor.mT)",
        "root = _product(matrices[..., half:, :half], upper_factor.mT)",
        ("inverses", "cholesky"),
    ),
    Mutation(
        "matrices filled up with 0",
        "rest = diagonal[:, None] * (jnp.arange(size) >= own)",
        "rest = 0 * diagonal[:, None] * (jnp.arange(size) >= own)",
        ("division", "divided_stacks"),
    ),
    Mutation(
        "Psi^-1 is not applied",
        "parts = (times_psi(multiply(spec.phi, phi, whole)),)",
        "parts = (multiply(spec.phi, phi, whole),)",
        ("precondition",),
    ),
    Mutation(
        "the coupling of the bias dropped",
        "times_psi(phi @ matrix + coupling.mT * last),",
        "times_psi(phi @ matrix),",
        ("precondition",),
    ),
    Mutation(
        "the norm constraint without a root",
        "jnp.sqrt(bound / jnp.where(positive, product, 1))",
        "(bound / jnp.where(positive, product, 1))",
        ("precondition", "transform", "tkfac_and_kfac", "preconditioner"),
    ),
    Mutation(
        "inverses refreshed a step late",
        "return True if isinstance(interval, int) and interval == 1 else step % interval == 0",
        "return True if isinstance(interval, int) and interval == 1 else step % interval == 1",
        ("transform", "tkfac_and_kfac", "preconditioner"),
    ),
    Mutation(
        "a share that is due a step too early",
        "return (number * interval + of - 1) // of",
        "return number * interval // of",
        ("spread", "refresh_schedule"),
    ),
    Mutation(
        "the host's counter counts a warm-up's steps",
        "            self.warmup_left -= 1\n        else:\n            self._number += 1",
        "            self.warmup_left -= 1\n        self._number += 1",
        ("adaptive", "training", "step_counter", "train_step"),
    ),
    Mutation(
        "micro-batches averaged with the wrong number",
        "return mean + (new.astype(mean.dtype) - mean) / (number + 1).astype(mean.dtype)",
        "return mean + (new.astype(mean.dtype) - mean) / (number + 2).astype(mean.dtype)",
        ("accumulation",),
    ),
    Mutation(
        "the adaptive damping raised where the model was good",
        "jnp.where(ratio > GOOD_RATIO, factor,",
        "jnp.where(ratio > GOOD_RATIO, 1 / factor,",
        ("adaptive",),
    ),
    Mutation(
        "the damped model without its damping",
        "return Quadratic(undamped.matrix + damping * squares, slope), undamped",
        "return Quadratic(undamped.matrix, slope), undamped",
        ("objective", "adaptive"),
    ),
    Mutation(
        "two free lengths with the cosine's sign swapped",
        "jnp.where(independent, (cosine * t - s) / below / units[0], _lowest(first, slope)),",
        "jnp.where(independent, (-cosine * t - s) / below / units[0], _lowest(first, slope)),",
        ("quadratic", "quadratic_model"),
    ),
    Mutation(
        "a bias that two kernels share is taken",
        "if bias is not None and kernels_of[bias] > 1:",
        "if bias is not None and kernels_of[bias] > 2:",
        ("discovery",),
    ),
    Mutation(
        "a kernel that a transformation changes is taken",
        "reasons[spec.kernel] = CHANGED",
        "pass",
        ("transformations", "discovery", "kernel_values"),
    ),
    Mutation(
        "functions that were traced before are not traced again for named layers",
        "retrace=any(spec.named for spec in layers.values())",
        "retrace=False",
        ("calls", "register", "transformations", "kernel_values"),
    ),
    Mutation(
        "the Gauss-Newton matrix summed over examples",
        "(i, j): inner_product(tangents[i], products[j]) / examples",
        "(i, j): inner_product(tangents[i], products[j])",
        ("quadratic", "quadratic_model"),
    ),
    Mutation(
        "the age of inverses off by one",
        "state.step - state.refreshed[name],",
        "state.step - state.refreshed[name] + 1,",
        ("diagnostics", "layer_diagnostics"),
    ),
    Mutation(
        "state divided although it is to be whole",
        "axis = divided_axis(array.shape, mesh.size) if divided else None",
        "axis = divided_axis(array.shape, mesh.size)",
        ("distributed",),
    ),
    Mutation(
        "a direction's length without the least norm of the weights",
        "own = jnp.maximum(kernel, jnp.asarray(floor, kernel.dtype))",
        "own = kernel",
        ("layer_lengths",),
    ),
    Mutation(
        "a ball smaller than its first weights",
        "return jnp.maximum(start, jnp.asarray(radius",
        "return jnp.minimum(start, jnp.asarray(radius",
        ("layer_lengths",),
    ),
    Mutation(
        "the balls of all layers grow",
        "output_growth if matrix.makes_outputs else 0.0",
        "output_growth",
        ("layer_lengths",),
    ),
    Mutation(
        "momentum without Nesterov's step ahead",
        "plus_gradient(gradient, momentum).astype(gradient.dtype)",
        "momentum.astype(gradient.dtype)",
        ("gradient_moments",),
    ),
    Mutation(
        "Adam's squares with their bias",
        "squares = squares / (1 - b2**exponent)",
        "squares = squares / 1",
        ("gradient_moments",),
    ),
    Mutation(
        "relative damping that does not know the size of a factor",
        "/ structure.size\n    return add_to_diagonal(structure, own, shift)",
        "\n    return add_to_diagonal(structure, own, shift)",
        ("damping",),
    ),
    Mutation(
        "the gradient of one backward pass at the statistics' scale",
        "lambda leaf: leaf / scale, both.gradient",
        "lambda leaf: leaf, both.gradient",
        ("layer_statistics",),
    ),
    Mutation(
        "the first and not the last layer makes the outputs",
        "found.update(alike[-1:])",
        "found.update(alike[:1])",
        ("discovery",),
    ),
)


def main() -> None:
    """Runs the mutations."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these mutations alone")
    parser.add_argument("--from", dest="first", metavar="NAME", help="those from this one on")
    parser.add_argument("--whole", action="store_true", help="all tests for those that survive")
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1])
    options = parser.parse_args()
    root = options.root.resolve()
    changed = subprocess.run(
        ["git", "status", "--porcelain", "tkfac_jax"],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    if changed:
        sys.exit(f"the package has changes that are not committed:\n{changed}")
    names = [m.name for m in MUTATIONS]
    later = MUTATIONS[names.index(options.first) :] if options.first else MUTATIONS
    chosen = [m for m in later if options.only is None or m.name in options.only]
    survivors = [m.name for m in chosen if not is_caught(root, m, options.whole)]
    print(
        f"{len(chosen) - len(survivors)} of {len(chosen)} caught; survivors: {survivors or 'none'}"
    )
    sys.exit(bool(survivors))


def is_caught(root: Path, mutation: Mutation, whole: bool) -> bool:
    """Whether a test fails under a mutation."""
    holders = [
        path for path in (root / "tkfac_jax").rglob("*.py") if mutation.before in path.read_text()
    ]
    assert len(holders) == 1, f"{mutation.name}: stands in {holders}, expected one file"
    (path,) = holders
    original = path.read_text()
    assert original.count(mutation.before) == 1, f"{mutation.name}: stands there more than once"
    own = [
        str(test) for name in mutation.tests for test in (root / "tests").rglob(f"test_{name}.py")
    ]
    started = time.perf_counter()
    try:
        path.write_text(original.replace(mutation.before, mutation.after))
        by = "its own tests" if fails(root, own) else ""
        if not by and whole:
            by = "another test" if fails(root, ["tests"]) else ""
    finally:
        path.write_text(original)
    verdict = f"caught by {by}" if by else "SURVIVES"
    print(f"{verdict:28} {time.perf_counter() - started:5.0f} s  {mutation.name}", flush=True)
    return bool(by)


def fails(root: Path, tests: list[str]) -> bool:
    """Whether one of the tests fails; they end at the first that does."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        "-n",
        "2",
        *tests,
    ]
    ended = subprocess.run(
        command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    # Several workers that end early are interrupted.
    assert ended.returncode == 0 or " failed" in ended.stdout, ended.stdout[-2000:]
    return ended.returncode != 0


if __name__ == "__main__":
    main()
