"""What an optimizer's state says about every layer: its trace, its damping, its inverses.

The counts of the whole state need no function: `optax.tree.get(opt_state, "skipped_statistics")`, and likewise
`"failed_inversions"` and `"factor_updates"`.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tkfac_jax.curvature.damping import Damping, Value, normal_damping
from tkfac_jax.curvature.damping_argument import DampingArgument
from tkfac_jax.curvature.damping_ratios import damping_ratios
from tkfac_jax.curvature.state import Averaging, LayerFaults, TkfacState, find_state
from tkfac_jax.curvature.storage import check_shapes, factors_in_shape, inverses_in_shape
from tkfac_jax.layers.spec import LayerSpec
from tkfac_jax.linalg.condition_numbers import condition_number


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
      first call. `diagnostics_table` shows them.

    Raises:
      ValueError: there is not exactly one `TkfacState`, it is not that of the layers, or an option is wrong.

    Source: Gao et al. 2021, section 5, Figure 3.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, tkfac_jax as tkfac
      >>> model = nn.Dense(2, use_bias=False)
      >>> x = jnp.ones((5, 3), jnp.float32)
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> predict = lambda params, x: model.apply({"params": params}, x)
      >>> layers = tkfac.find_layers(predict, params, x)
      >>> statistics = tkfac.exact_fisher(predict, tkfac.Normal(), layers)(params, x)
      >>> optimizer = tkfac.scale_by_tkfac(layers, damping=0.04)
      >>> _, state = optimizer.update(params, optimizer.init(params), statistics=statistics)
      >>> print(tkfac.diagnostics_table(tkfac.diagnostics(state, layers, damping=0.04)))
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
        ratios |= damping_ratios(state, layers, argument.damping, averaging)
    inverses = {name: inverses_in_shape(layers[name], own) for name, own in state.inverses.items()}
    return {
        name: LayerDiagnostics(
            state.factors[name].delta,
            *ratios[name],
            condition_number(spec.phi, inverses[name].phi_matrix(), spec.batch),
            condition_number(spec.psi, inverses[name].psi, spec.batch),
            state.step - state.refreshed[name],
            state.faults[name],
        )
        for name, spec in layers.items()
    }


def diagnostics_table(report: Mapping[str, LayerDiagnostics]) -> str:
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
    for name in state.factors:
        if name not in layers:
            msg = (
                f"the state holds the layer '{name}'; the layers are {sorted(layers)}. Give diagnostics the "
                "layers that the optimizer was built with."
            )
            raise ValueError(msg)
    active = {name: layers[name] for name in state.factors}
    check_shapes(state.factors, state.inverses, active)
    return active
