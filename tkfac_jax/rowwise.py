"""Steps of dense layers from the rows of a batch: `Phi^-1 (sum a g^T) Psi^-1`, without the sum between.

The gradient of a dense layer is a sum of products of input rows `a` and gradient rows `g`. A batch that has fewer
rows than the layer has inputs or outputs is cheaper to multiply by an inverse than that sum is. So
the backward pass multiplies the rows (`RowSteps.tagger`), beside giving the gradient; the optimizer takes the step
that comes out where the gradient and the inverses that it has at hand are the very ones that went in
(`RowStep.stands_for`), and the compiler drops whatever is not used then: the gradient's product, or the step.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float

from tkfac_jax.calls import LayerCall
from tkfac_jax.capture import Tagger, attach
from tkfac_jax.inverses import KroneckerInverses
from tkfac_jax.layers import Layers, LayerSpec, named_leaves
from tkfac_jax.matrices import Contraction
from tkfac_jax.meshes import is_explicit, vary
from tkfac_jax.storage import inverses_in_shape

# Multiplications below which another way to make a step is not worth compiling.
SMALLEST_SAVING = 2**22


KernelAndBias = tuple[Array, Array | None]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Cost:
    """Multiplications, which a compiled program takes as given.

    Attributes:
      saving: those that a step from rows saves over preconditioning the gradient, if nobody else wants the gradient.
      product: those of the gradient's own product.
    """

    saving: int
    product: int


class RowStep(NamedTuple):
    """The step of one layer, made from rows.

    Attributes:
      gradient: the gradients of kernel and bias that it stands for, the very arrays; None on the way from one program
        to another.
      inverses: the inverses that the rows were multiplied by, likewise.
      step: the preconditioned gradients of kernel and bias.
      cost: what it saves.
    """

    gradient: KernelAndBias | None
    inverses: KroneckerInverses | None
    step: KernelAndBias
    cost: Cost

    def stands_for(
        self,
        gradient: KernelAndBias,
        inverses: KroneckerInverses,
        gradient_is_used: bool,
    ) -> bool:
        """Whether this is what preconditioning a gradient would give, at fewer operations."""
        if self.gradient is None or self.inverses is None:
            return False
        same = all(
            one is other
            for one, other in zip(
                (*self.gradient, *self.inverses), (*gradient, *inverses), strict=True
            )
        )
        saving = self.cost.saving - (self.cost.product if gradient_is_used else 0)
        return same and saving >= SMALLEST_SAVING


class RowSteps:
    """Gathers steps from the rows of one pull-back.

    Attributes:
      layers: the layers.
      inverses: by layer, the inverses of those layers that may gain by it.
    """

    def __init__(self, layers: Layers, inverses: Mapping[str, KroneckerInverses], params: Any):
        """Takes the inverses as they stand in the optimizer's state, and the parameters."""
        self.layers = layers
        self.inverses = {
            name: inverse
            for name, inverse in inverses.items()
            if name in layers and _may_gain(layers[name]) and not is_explicit((inverse, params))
        }
        self._rows: dict[str, list[int]] = {}
        self._left_out: set[str] = set()
        self._pulls_back = False

    def zero_slots(self, axes: frozenset[str]) -> dict[str, KernelAndBias]:
        """By layer, where its step goes; the slots vary over some mesh axes."""
        return vary({name: _zeros(self.layers[name]) for name in self.inverses}, axes)

    def tagger(self, slots: Mapping[str, KernelAndBias]) -> Tagger:
        """Tags those calls of layers for which rows may be cheaper."""

        def tag_output(spec: LayerSpec, layer: LayerCall, entry: Any, output: Array) -> Array:
            del entry
            if spec.name not in self.inverses:
                return output
            form, rows = layer.form, output.size // spec.d_out
            few = isinstance(form, Contraction) and rows < max(spec.d_in, spec.d_out)
            if not (layer.exact and few):
                self._left_out.add(spec.name)
                return output
            self._rows.setdefault(spec.name, []).append(rows)

            def step_of(
                inputs: Array, gradients: Array, inverses: KroneckerInverses
            ) -> KernelAndBias:
                if self._pulls_back:
                    gradients = self._noted_if_mapped(spec.name, gradients)
                else:
                    # A derivative inside the model: the rows of the loss do not come by here.
                    self._left_out.add(spec.name)
                matrices: Any = form.rows(inputs, gradients)
                flat = (matrix.reshape(-1, matrix.shape[-1]) for matrix in matrices)
                return precondition_rows(spec, inverses, *flat)

            return attach(output, layer, self.inverses[spec.name], slots[spec.name], step_of)

        return tag_output

    def pulls_back(self) -> None:
        """From now on, what is pulled back is the loss."""
        self._pulls_back = True

    def _noted_if_mapped(self, name: str, gradients: Array) -> Array:
        """The gradients; leaves a layer out whose call `jax.vmap` maps, so that each example would make a step."""

        @custom_vmap
        def same(gradients: Array) -> Array:
            return gradients

        @same.def_vmap
        def rule(size: int, is_mapped: list[bool], gradients: Array) -> tuple[Array, bool]:
            del size
            self._left_out.add(name)
            return gradients, is_mapped[0]

        return same(gradients)

    def steps(self, gradient: Any, pulled_back: Mapping[str, KernelAndBias]) -> dict[str, RowStep]:
        """By layer, what the slots have received, where that saves enough.

        Args:
          gradient: the tree of gradients of the same pull-back.
          pulled_back: by layer, what has come back for the slots.
        """
        leaves = named_leaves(gradient)
        found = {}
        for name, rows in self._rows.items():
            spec = self.layers[name]
            saving = spec.d_in * spec.d_out * (spec.d_in + spec.d_out)
            saving -= sum(_multiplications(spec, number) for number in rows)
            # Left out is also a layer one of whose calls was.
            if name in self._left_out or saving < SMALLEST_SAVING:
                continue
            kernel, bias = leaves[spec.kernel], None if spec.bias is None else leaves[spec.bias]
            step, bias_step = pulled_back[name]
            found[name] = RowStep(
                (kernel, bias),
                self.inverses[name],
                (
                    step.astype(kernel.dtype),
                    None if bias is None or bias_step is None else bias_step.astype(bias.dtype),
                ),
                Cost(saving, spec.d_in * spec.d_out * sum(rows)),
            )
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


def _zeros(spec: LayerSpec) -> KernelAndBias:
    bias = None if spec.bias_shape is None else jnp.zeros(spec.bias_shape, spec.dtype)
    return jnp.zeros(spec.kernel_shape, spec.dtype), bias
