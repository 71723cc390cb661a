"""Steps of dense layers from the rows of a batch: `Phi^-1 (sum a g^T) Psi^-1`, without the sum between.

The gradient of a dense layer is a sum of products of input rows `a` and gradient rows `g`. A batch that has fewer
rows than the layer has inputs or outputs is cheaper to multiply by an inverse than that sum is. So
the backward pass keeps the rows (`KeptRows.tagger`), beside giving the gradient; the optimizer multiplies them by its
inverses where the gradient at hand is the very one that they stand for (`LayerRows.stand_for`), and the compiler drops
whatever is not used then: the gradient's product, or the rows.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tkfac_jax.calls import LayerCall
from tkfac_jax.capture import Tagger, attach
from tkfac_jax.dependence import direct_calls, used_elsewhere
from tkfac_jax.inverses import KroneckerInverses
from tkfac_jax.layers import Layers, LayerSpec, named_leaves, visible_layers
from tkfac_jax.matrices import Contraction
from tkfac_jax.meshes import is_explicit, vary
from tkfac_jax.storage import inverses_in_shape

# Multiplications below which another way to make a step is not worth compiling.
SMALLEST_SAVING = 2**22


KernelAndBias = tuple[Array, Array | None]
# The input rows and the gradient rows of a call, `(rows, d_in)` and `(rows, d_out)`, or their shapes.
Rows = tuple[Any, Any]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Fixed:
    """What a compiled program takes as given.

    Attributes:
      saving: multiplications that a step from rows saves over preconditioning the gradient, if nobody else wants the
        gradient.
      product: those of the gradient's own product.
      axis_name: mapped axis over which gradients are averaged, and so steps.
    """

    saving: int
    product: int
    axis_name: str | None


class LayerRows(NamedTuple):
    """The rows of a batch in one layer.

    Attributes:
      gradient: the gradients of kernel and bias that they stand for, the very arrays; None on the way from one program
        to another.
      calls: the rows of each call of the layer.
      fixed: what a step from them saves, and how it is averaged.
    """

    gradient: KernelAndBias | None
    calls: list[Rows]
    fixed: Fixed

    def stand_for(
        self, gradient: KernelAndBias, inverses: KroneckerInverses, gradient_is_used: bool
    ) -> bool:
        """Whether a step from them is what preconditioning a gradient would give, at fewer operations."""
        if self.gradient is None or is_explicit(inverses):
            return False
        same = all(one is other for one, other in zip(self.gradient, gradient, strict=True))
        saving = self.fixed.saving - (self.fixed.product if gradient_is_used else 0)
        return same and saving >= SMALLEST_SAVING

    def step(self, spec: LayerSpec, inverses: KroneckerInverses) -> KernelAndBias:
        """The preconditioned gradients of kernel and bias."""
        steps = [precondition_rows(spec, inverses, *rows) for rows in self.calls]
        kernel, bias = jax.tree.map(lambda *parts: sum(parts[1:], parts[0]), *steps)
        if self.fixed.axis_name is not None:
            kernel, bias = jax.lax.pmean((kernel, bias), self.fixed.axis_name)
        return kernel, bias


class KeptRows:
    """Keeps the rows of one pull-back."""

    def __init__(self, layers: Layers, outputs: Callable[[Any], Any], params: Any):
        """Looks which layers may gain by it.

        Args:
          layers: the layers.
          outputs: the outputs as a function of the parameters.
          params: the parameters.
        """
        self.layers = layers
        visible = [layers[name] for name in visible_layers(layers, params, "params")]
        able = [spec for spec in visible if _may_gain(spec)]
        self._shapes: dict[str, list[Rows]] = {}
        if not able or is_explicit(params):
            return
        calls, alone = direct_calls(outputs, params, able, _shapes_of_rows)
        gaining = [
            spec
            for spec in able
            if spec.name in calls and _saving(spec, calls[spec.name]) >= SMALLEST_SAVING
        ]
        # What else a kernel does for the outputs is in its gradient, and in no rows.
        doubtful = [spec for spec in gaining if spec.name not in alone]
        others = used_elsewhere(outputs, params, doubtful)
        self._shapes = {spec.name: calls[spec.name] for spec in gaining if spec.name not in others}

    def zero_slots(self, axes: frozenset[str]) -> dict[str, list[Rows]]:
        """By layer, where the rows of its calls go; the slots vary over some mesh axes."""
        zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), self._shapes)
        return vary(zeros, axes)

    def tagger(self, slots: Mapping[str, list[Rows]]) -> Tagger:
        """Tags the calls whose rows are kept."""
        numbers = Counter()

        def tag_output(spec: LayerSpec, layer: LayerCall, entry: Any, output: Array) -> Array:
            del entry
            if spec.name not in slots:
                return output
            form: Any = layer.form
            number = numbers[spec.name]
            numbers[spec.name] += 1
            input_shape, gradient_shape = self._shapes[spec.name][number]

            def rows(inputs: Array, gradients: Array, given: None) -> Rows:
                del given
                inputs, gradients = _rows(spec, form, inputs, gradients)
                return inputs.astype(input_shape.dtype), gradients.astype(gradient_shape.dtype)

            return attach(output, layer, None, slots[spec.name][number], rows)

        return tag_output

    def of_layers(
        self, gradient: Any, pulled_back: Mapping[str, list[Rows]], axis_name: str | None
    ) -> dict[str, LayerRows]:
        """By layer, the rows that the slots have received.

        Args:
          gradient: the tree of gradients of the same pull-back.
          pulled_back: by layer, what has come back for the slots.
          axis_name: mapped axis over which the gradients are averaged.
        """
        leaves = named_leaves(gradient)
        found = {}
        for name, calls in pulled_back.items():
            spec = self.layers[name]
            number = sum(len(inputs) for inputs, _ in calls)
            fixed = Fixed(_saving(spec, calls), spec.d_in * spec.d_out * number, axis_name)
            bias = None if spec.bias is None else leaves[spec.bias]
            found[name] = LayerRows((leaves[spec.kernel], bias), calls, fixed)
        return found


def precondition_rows(
    spec: LayerSpec,
    inverses: KroneckerInverses,
    inputs: Float[Array, "rows d_in"],
    gradients: Float[Array, "rows d_out"],
) -> KernelAndBias:
    """The natural gradient of a dense layer whose gradient is `inputs^T gradients`.

    Each inverse multiplies the rows or their product, whichever is smaller.

    Args:
      spec: the layer; its factors are stored whole.
      inverses: the inverses of its damped factors, as they stand in the state.
      inputs: input rows, without the homogeneous coordinate of a bias.
      gradients: derivatives of the loss with respect to the output rows.

    Returns:
      The preconditioned gradients of kernel and bias, in their shapes and the dtype of the layer's statistics.

    Source: Gao et al. 2021, Algorithm 1.
    """
    inverses = inverses_in_shape(spec, inverses)
    dtype = jnp.promote_types(inverses.psi.dtype, spec.dtype)
    phi, psi = inverses.phi.astype(dtype), inverses.psi.astype(dtype)
    inputs, gradients = inputs.astype(dtype), gradients.astype(dtype)
    psi_first, phi_first = _on_rows(spec, len(inputs))
    columns = gradients @ psi if psi_first else gradients
    last = None
    if inverses.bias is None:
        if spec.has_bias:
            inputs = jnp.concatenate([inputs, jnp.ones_like(inputs[:, :1])], axis=-1)
        matrix = (inputs @ phi.mT).mT @ columns if phi_first else phi @ (inputs.mT @ columns)
        if spec.has_bias:
            matrix, last = matrix[:-1], matrix[-1:]
    else:
        coupling, corner = (
            inverses.bias[:-1].astype(dtype),
            inverses.bias[-1].astype(dtype),
        )
        # The bias's row of the whole inverse, times [a, 1].
        last = ((inputs @ coupling + corner) @ columns)[None]
        if phi_first:
            matrix = (inputs @ phi.mT + coupling).mT @ columns
        else:
            total = columns.sum(0)
            matrix = phi @ (inputs.mT @ columns) + coupling[:, None] * total
    if not psi_first:
        matrix, last = matrix @ psi, None if last is None else last @ psi
    layout = spec.layout
    matrix, last = jax.tree.map(lambda array: array.astype(spec.dtype), (matrix, last))
    kernel = layout.matrix_to_kernel(matrix, spec.kernel_shape)
    return kernel, None if last is None else layout.matrix_to_bias(last, spec.bias_shape or ())


def _on_rows(spec: LayerSpec, rows: int) -> tuple[bool, bool]:
    """Whether the inverse of psi, and that of phi, has less to multiply if it multiplies the rows."""
    return rows < spec.d_in, rows < spec.d_out


def _multiplications(spec: LayerSpec, rows: int) -> int:
    """Of both inverses; the product of the rows is to be made in any case."""
    return min(rows, spec.d_out) * spec.d_in**2 + min(rows, spec.d_in) * spec.d_out**2


def _may_gain(spec: LayerSpec) -> bool:
    """Whether some batch is so small that rows save something: of one row, that is."""
    whole = spec.phi.kind == "full" and spec.psi.kind == "full" and not spec.batch
    saving = spec.d_in * spec.d_out * (spec.d_in + spec.d_out) - _multiplications(spec, 1)
    return (
        spec.kind == "dense"
        and whole
        and spec.layout.bias_rows <= 1
        # What reaches a layer through a transformation may be many calls at once.
        and not spec.routed
        and not spec.named
        and saving >= SMALLEST_SAVING
    )


def _rows(spec: LayerSpec, form: Contraction, inputs: Array, gradients: Array) -> Rows:
    """The rows of a call, as two matrices."""
    if not jnp.issubdtype(inputs.dtype, jnp.floating):
        inputs = inputs.astype(spec.dtype)
    one, other = form.rows(inputs, gradients)
    return one.reshape(-1, one.shape[-1]), other.reshape(-1, other.shape[-1])


def _shapes_of_rows(spec: LayerSpec, layer: LayerCall) -> Rows | None:
    """The shapes of a call's rows; None if they are not known, or too many."""
    if not (layer.exact and isinstance(layer.form, Contraction)):
        return None
    if layer.output.size // spec.d_out >= max(spec.d_in, spec.d_out):
        return None
    inputs: Any = layer.inputs
    inputs = inputs() if callable(inputs) else inputs
    one, other = _rows(spec, layer.form, inputs, layer.output)
    return jax.ShapeDtypeStruct(one.shape, one.dtype), jax.ShapeDtypeStruct(
        other.shape, other.dtype
    )


def _saving(spec: LayerSpec, calls: list[Rows]) -> int:
    """Multiplications that steps from the rows of calls save."""
    whole = spec.d_in * spec.d_out * (spec.d_in + spec.d_out)
    return whole - sum(_multiplications(spec, inputs.shape[0]) for inputs, _ in calls)
