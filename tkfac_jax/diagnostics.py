"""What an optimizer's state says about every layer: its trace, its damping, its inverses.

The counts of the whole state need no function: `optax.tree.get(opt_state, "skipped_statistics")`, and likewise
`"failed_inversions"` and `"factor_updates"`.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tkfac_jax.curvature import Averaging, LayerFaults, TkfacState, find_state
from tkfac_jax.damping import (
    Damping,
    DampingArgument,
    FactoredDamping,
    Value,
    normal_damping,
)
from tkfac_jax.factors import KroneckerFactors
from tkfac_jax.layers import LayerSpec
from tkfac_jax.storage import factors_in_shape, inverses_in_shape
from tkfac_jax.structures import Structure
from tkfac_jax.threads import limit_lapack_threads


class LayerDiagnostics(NamedTuple):
    """What the state says about one layer. A stack of layers, or groups, have one number each.

    Attributes:
      trace: delta, the averaged trace of the layer's Fisher block, in units of curvature.
      phi_ratio: what the damping adds to the input factor, divided by the mean of the diagonal of `delta Phi`; None if
        the damping is not known.
      psi_ratio: likewise of the output factor.
      phi_condition: largest over smallest eigenvalue of the damped input factor whose inverse is in use; inf
        if the inverse is not positive definite.
      psi_condition: likewise of the output factor.
      age: updates made since the layer's inverses were last computed, the one that computed them counted.
      faults: how often the layer's statistics, inversions and steps went wrong.
    """

    trace: Float[Array, "*batch"]
    phi_ratio: Float[Array, "*batch"] | None
    psi_ratio: Float[Array, "*batch"] | None
    phi_condition: Float[Array, "*batch"]
    psi_condition: Float[Array, "*batch"]
    age: Int[Array, ""]
    faults: LayerFaults


def diagnostics(
    state: Any,
    layers: Mapping[str, LayerSpec],
    *,
    damping: Value | Damping | None = None,
    averaging: Averaging = "factors",
) -> dict[str, LayerDiagnostics]:
    """Traces, damping ratios, condition numbers and ages of the inverses, layer by layer.

    The ratios are those of Figure 3: under normal damping `sqrt(lambda) / (tr(delta Phi) / d_in)`. Times `sqrt(delta)`
    (below its floor, trace damping has the root of the floor there)
    they compare what is added to a factor with the diagonal of `sqrt(delta) Phi`, to which it is added:
    above 1, the damping outweighs the curvature. They are inf where the layer has no signal.

    The state does not hold the damping, so without `damping` there are no ratios. With it, they are those of
    the state's step and delta: under a schedule, averages and inverses have seen other values, too.
    `averaging="factors"` keeps no undamped factors; their traces are taken to be 1, as Eq. (4.9) says. Under
    factored damping, which is KFAC's, they are what the damped factors have beyond the damping.

    Every condition number takes the eigenvalues of an inverse: as costly as new inverses, and accurate
    while it is well below one over the rounding error of the inverses' dtype.

    Args:
      state: a `TkfacState`, or an optimizer state with exactly one in it. On several devices, one device's.
      layers: the layers that the optimizer was built with.
      damping: the optimizer's damping, as given to `scale_by_tkfac`; for `kfac`, `factored_damping(...)`.
      averaging: the optimizer's averaging, `"factors"` or `"moments"`.

    Returns:
      By layer its `LayerDiagnostics`, arrays only: it can be called inside `jax.jit`. Outside, it is compiled at the
      first call. `table` prints them.

    Raises:
      ValueError: there is not exactly one `TkfacState`, it is not that of the layers, or an option is wrong.

    Source: Gao et al. 2021, section 5, Figure 3.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, tkfac_jax as tkfac
      >>> from tkfac_jax.diagnostics import diagnostics, table
      >>> model = nn.Dense(2, use_bias=False)
      >>> x = jnp.ones((5, 3), jnp.float32)
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> predict = lambda params, x: model.apply({"params": params}, x)
      >>> layers = tkfac.find_layers(predict, params, x)
      >>> statistics = tkfac.exact_fisher(predict, tkfac.Normal(), layers)(params, x)
      >>> optimizer = tkfac.scale_by_tkfac(layers, damping=0.04)
      >>> _, state = optimizer.update(params, optimizer.init(params), statistics=statistics)
      >>> print(table(diagnostics(state, layers, damping=0.04)))
      layer  trace  phi_ratio  psi_ratio  phi_condition  psi_condition  age
      ---------------------------------------------------------------------
      .          6        0.1     0.0667           13.2              1    1
    """
    if averaging not in ("factors", "moments"):
        msg = (
            f'averaging={averaging!r}; expected "factors" or "moments", as the optimizer was given.'
        )
        raise ValueError(msg)
    state = find_state(state)
    active = _active_layers(state, layers)
    if damping is not None and not isinstance(damping, Damping):
        damping = normal_damping(damping)
        if not callable(damping.value):
            # As an array, so that another number is not another program.
            damping = normal_damping(jnp.asarray(damping.value))
    argument = None if damping is None else DampingArgument(damping)
    return _report(state, argument, tuple(active.items()), averaging)


# One program: called one by one, its operations would be compiled for each size of factor, some of them at each call.
@functools.partial(jax.jit, static_argnames=("items", "averaging"))
def _report(
    state: TkfacState,
    argument: DampingArgument | None,
    items: tuple[tuple[str, LayerSpec], ...],
    averaging: Averaging,
) -> dict[str, LayerDiagnostics]:
    """What `diagnostics` returns, from its arguments once they are checked."""
    layers = dict(items)
    factors = {name: factors_in_shape(layers[name], own) for name, own in state.factors.items()}
    state = state._replace(factors=factors)
    ratios: dict[str, tuple[Array | None, Array | None]] = dict.fromkeys(layers, (None, None))
    if argument is not None:
        ratios |= _ratios(state, layers, argument.damping, averaging)
    inverses = {name: inverses_in_shape(layers[name], own) for name, own in state.inverses.items()}
    return {
        name: LayerDiagnostics(
            state.factors[name].delta,
            *ratios[name],
            _condition(spec.phi, inverses[name].phi_matrix(), spec.batch),
            _condition(spec.psi, inverses[name].psi, spec.batch),
            state.step - state.refreshed[name],
            state.faults[name],
        )
        for name, spec in layers.items()
    }


def table(report: Mapping[str, LayerDiagnostics]) -> str:
    """The diagnostics as a table, with the layers named that want attention.

    A layer of several matrices shows its smallest and largest number. Named beneath are layers without
    signal, layers with numbers that are not finite, and layers whose statistics, inversions or steps have failed,
    with how often.

    Args:
      report: what `diagnostics` returned, outside of `jax.jit`.

    Returns:
      The text.
    """
    rows = [["layer", *LayerDiagnostics._fields[:-1]]]
    rows += [[name, *map(_cell, layer[:-1])] for name, layer in report.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        )
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    notes = {
        "no signal: ": [name for name, layer in report.items() if np.any(layer.trace == 0)],
        "not finite: ": [
            f"{name} ({', '.join(bad)})"
            for name, layer in report.items()
            if (bad := _not_finite(layer))
        ],
        **{
            f"failed {kind}: ": [
                f"{name} ({failed})"
                for name, layer in report.items()
                if (failed := int(getattr(layer.faults, kind)))
            ]
            for kind in LayerFaults._fields
        },
    }
    lines += [note + ", ".join(names) for note, names in notes.items() if names]
    return "\n".join(lines)


def _cell(values: Array | None) -> str:
    if values is None:
        return ""
    smallest, largest = f"{np.min(values):.3g}", f"{np.max(values):.3g}"
    return smallest if smallest == largest else f"{smallest} to {largest}"


def _not_finite(layer: LayerDiagnostics) -> list[str]:
    """The fields with numbers that are not finite; without signal, ratios cannot be."""
    silent = np.asarray(layer.trace == 0)
    return [
        field
        for field, values in zip(LayerDiagnostics._fields[:-1], layer[:-1], strict=True)
        if values is not None
        and not np.all(np.isfinite(values) | (silent & field.endswith("_ratio")))
    ]


def _active_layers(state: TkfacState, layers: Mapping[str, LayerSpec]) -> dict[str, LayerSpec]:
    """The layers that the state knows; without hidden ones."""
    for name, factors in state.factors.items():
        if name not in layers:
            msg = (
                f"the state holds the layer '{name}'; the layers are {sorted(layers)}. Give diagnostics the "
                "layers that the optimizer was built with."
            )
            raise ValueError(msg)
        spec = layers[name]
        expected = (
            (*spec.batch, *spec.phi.shape),
            (*spec.batch, *spec.psi.shape),
            spec.batch,
        )
        received = tuple(jnp.shape(array) for array in factors)
        if not all(map(_may_be_filled, received, expected)):
            msg = (
                f"layer '{name}': the state's factors have shapes {received}; expected {expected}. Give the layers "
                "that the optimizer was built with, and of a state with an axis of devices one device's: "
                "jax.tree.map(lambda leaf: leaf[0], state)."
            )
            raise ValueError(msg)
    return {name: layers[name] for name in state.factors}


def _may_be_filled(received: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Whether an array has its own shape or, divided over a mesh, one that is filled up along one axis."""
    if len(received) != len(expected):
        return False
    more = [have - want for have, want in zip(received, expected, strict=True)]
    return min(more, default=0) >= 0 and sum(extra > 0 for extra in more) <= 1


def _ratios(
    state: TkfacState, active: Mapping[str, LayerSpec], damping: Damping, averaging: Averaging
) -> dict[str, tuple[Array | None, Array | None]]:
    """The damping ratios of all layers."""
    # Diagonals are enough, and have no padding.
    layers = {
        name: dataclasses.replace(
            spec, phi=_diagonal_structure(spec.phi), psi=_diagonal_structure(spec.psi)
        )
        for name, spec in active.items()
    }
    factors = {name: _diagonals(spec, state.factors[name]) for name, spec in active.items()}
    halves = {
        name: KroneckerFactors(factor.phi / 2, factor.psi / 2, factor.delta)
        for name, factor in factors.items()
    }
    # A damping is a multiple of the factor and one of the identity; the second, which depends on the
    # ratio of the two factors at most, is what is left as both vanish. That ratio is the same before and
    # after factored damping, so that the damped averages do as well.
    whole = damping.damp(factors, layers, state.step)
    half = damping.damp(halves, layers, state.step)

    def ratio(name: str, which: str) -> Array:
        diagonal, delta = getattr(factors[name], which), factors[name].delta
        added = jnp.mean(2 * getattr(half[name], which) - getattr(whole[name], which), -1)
        if averaging == "moments":
            mean = delta * diagonal.mean(-1)
        elif isinstance(damping, FactoredDamping):
            mean = jnp.sqrt(delta) * jnp.maximum(diagonal.mean(-1) - added, 0)
        else:
            mean = delta / diagonal.shape[-1]
        return added / mean

    return {name: (ratio(name, "phi"), ratio(name, "psi")) for name in active}


def _diagonal_structure(structure: Structure) -> Structure:
    return Structure("diagonal", structure.size, structure.size)


def _diagonals(spec: LayerSpec, factors: KroneckerFactors) -> KroneckerFactors:
    """The diagonals of a layer's factors, in a dtype to compute with."""
    dtype = jnp.promote_types(factors.phi.dtype, spec.dtype)
    return KroneckerFactors(
        _diagonal(spec.phi, factors.phi).astype(dtype),
        _diagonal(spec.psi, factors.psi).astype(dtype),
        factors.delta.astype(dtype),
    )


def _diagonal(structure: Structure, factor: Array) -> Float[Array, "*batch size"]:
    if structure.kind == "diagonal":
        return factor
    diagonal = jnp.diagonal(factor, axis1=-2, axis2=-1)
    if structure.kind == "full":
        return diagonal
    return diagonal.reshape(*diagonal.shape[:-2], -1)[..., : structure.size]


def _condition(
    structure: Structure, inverse: Array, batch: tuple[int, ...]
) -> Float[Array, "*batch"]:
    """Largest over smallest eigenvalue: of a matrix the same as of its inverse."""
    # LAPACK knows no dtype below float32.
    inverse = inverse.astype(jnp.promote_types(inverse.dtype, jnp.float32))
    if structure.kind == "blocks":
        inverse = _fill_padding(structure, inverse)
    eigenvalues = inverse if structure.kind == "diagonal" else _eigenvalues(inverse)
    eigenvalues = eigenvalues.reshape(*batch, -1)
    smallest, largest = eigenvalues.min(-1), eigenvalues.max(-1)
    return jnp.where(smallest <= 0, jnp.inf, largest / smallest)


def _fill_padding(structure: Structure, blocks: Float[Array, "*batch n n"]) -> Array:
    """Puts a diagonal element of a block for its padding: it lies between the block's eigenvalues."""
    rows = jnp.arange(structure.num_blocks * structure.block).reshape(structure.num_blocks, -1)
    kept = rows < structure.size
    identity = jnp.eye(structure.block, dtype=blocks.dtype)
    return jnp.where(kept[:, :, None] & kept[:, None, :], blocks, blocks[..., :1, :1] * identity)


def _eigenvalues(matrices: Float[Array, "*batch n n"]) -> Float[Array, "matrices n"]:
    """The eigenvalues of symmetric matrices, ascending."""
    limit_lapack_threads()
    flat = matrices.reshape(-1, *matrices.shape[-2:])
    # One matrix at a time on CPUs: two batched LAPACK calls in one program can wait for each other for ever.
    return jax.lax.platform_dependent(
        flat,
        cpu=lambda flat: jax.lax.map(jnp.linalg.eigvalsh, flat),
        default=jnp.linalg.eigvalsh,
    )
