"""The exact Fisher blocks of small models, and how far the Kronecker approximations are from them.

The blocks are made by brute force, from plain derivatives with respect to the parameters: no layer is
tagged, so that they are an independent truth for the statistics. Their memory is that of dense matrices
with one row per parameter of a layer. Under `jax_enable_x64` they are summed in float64; the derivatives
themselves have the model's own dtype.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tkfac_jax.curvature.factors import KroneckerFactors, kronecker_factors
from tkfac_jax.fisher.estimators import Batch, exact_estimate
from tkfac_jax.fisher.fisher_functions import HIGHEST, Likelihoods, Sharings, exact_fisher
from tkfac_jax.fisher.joint_likelihood import as_likelihood
from tkfac_jax.fisher.layer_statistics import Rule, trace_restricted
from tkfac_jax.layers.parameter_tree import parameter_name
from tkfac_jax.layers.spec import Layers, LayerSpec, visible_layers
from tkfac_jax.linalg.factor_structure import dense as dense_matrix

Gradients = dict[str, Array]


class ApproximationError(NamedTuple):
    """How far an approximation of a layer's block is from the exact one.

    Attributes:
      absolute: `||F - approximation||_F`, in units of curvature.
      relative: the same divided by `||F||_F`; 0 where both are 0.
      trace_exact: the trace of `F`.
      trace_approximation: the trace of the approximation.
    """

    absolute: Float[Array, "*batch"]
    relative: Float[Array, "*batch"]
    trace_exact: Float[Array, "*batch"]
    trace_approximation: Float[Array, "*batch"]


def fisher_blocks(
    predict: Callable[..., Any],
    likelihood: Likelihoods,
    layers: Layers,
    params: Any,
    *args: Any,
    has_aux: bool = False,
    position_mask: Any = None,
    example_weights: Array | None = None,
    **kwargs: Any,
) -> dict[str, Float[Array, "..."]]:
    """The exact Fisher block of every layer on a batch.

    `F = mean_n E_y[w w^T]`, where `w` is the gradient of example n's own loss, its target y drawn from the model,
    with respect to the parameters of one layer. The expectation is taken in closed form, and all
    correlations between locations and between the uses of a layer are in it. Where examples meet in the
    model (batch statistics), `w` goes through the whole batch.

    Args:
      predict: the model, `predict(params, *args, **kwargs) -> outputs`.
      likelihood: what the outputs mean, or a mapping; see `sampled_fisher`. It needs a closed form.
      layers: the layers, as from `find_layers`.
      params: the parameters; layers hidden behind `optax.MaskedNode` are left out.
      *args: further arguments of `predict`, such as the inputs.
      has_aux: `predict` returns `(outputs, aux)`; `aux` is dropped.
      position_mask: False where a position of an example is padding; see `sampled_fisher`.
      example_weights: what each example's loss is multiplied by, `(batch,)`.
      **kwargs: further keyword arguments of `predict`.

    Returns:
      By layer `(*spec.batch, d_in * d_out, d_in * d_out)`, symmetric positive semidefinite. The order is that
      of the kernel as a matrix, row by row with the bias last, so that the matching approximation is
      `kron(Phi, Psi)`.

    Raises:
      ValueError: the likelihood has no closed form, or the parameters do not match the layers.

    Source: Gao et al. 2021, Eqs. (4.2) and (4.10).

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, tkfac_jax as tkfac
      >>> from tkfac_jax import analysis
      >>> model = nn.Dense(1)
      >>> x = jnp.array([[2.0], [0.0]])
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> predict = lambda params, x: model.apply({"params": params}, x)
      >>> layers = tkfac.find_layers(predict, params, x)
      >>> blocks = analysis.fisher_blocks(predict, tkfac.Normal(), layers, params, x)
      >>> blocks["."].tolist()  # the mean of a a^T over a = (2, 1) and (0, 1)
      [[2.0, 1.0], [1.0, 1.0]]
    """
    exact = exact_estimate(as_likelihood(likelihood))(Batch(position_mask, example_weights))
    outputs, gradients_of = _example_gradients(predict, layers, params, has_aux, args, kwargs)

    def second_moments(derivative: Any) -> Gradients:
        return {
            name: jnp.einsum("n...i,n...j->...ij", w, w, precision=HIGHEST)
            for name, w in gradients_of(derivative).items()
        }

    return exact(outputs, second_moments)


def dense(
    factors: KroneckerFactors, spec: LayerSpec | None = None
) -> Float[Array, "*batch size size"]:
    """The block that Kronecker factors stand for: `delta kron(Phi, Psi)`.

    Args:
      factors: the undamped factors of one layer, such as `kronecker_factors` returns. (Damped ones have
        delta's share in them: for these, set their `delta` to 1.)
      spec: the layer, for factors that are not stored whole; None: both are.

    Returns:
      The block `(*batch, d_in * d_out, d_in * d_out)`, in the order of `fisher_blocks`.

    Raises:
      ValueError: a factor is not a matrix and `spec` is not given, or the factors are not those of `spec`.

    Source: Gao et al. 2021, Eq. (4.3).
    """
    phi, psi = (_factor_matrix(factors, which, spec) for which in ("phi", "psi"))
    # Products of single numbers, not a matrix product that an accelerator would round.
    pairs = phi[..., :, None, :, None] * psi[..., None, :, None, :]
    size = phi.shape[-1] * psi.shape[-1]
    block = pairs.reshape(*factors.delta.shape, size, size)
    return factors.delta[..., None, None] * block


def approximation_error(
    exact: Float[Array, "..."], approximation: Float[Array, "..."]
) -> ApproximationError:
    """How far an approximation is from the exact block, in the Frobenius norm.

    Args:
      exact: the exact block `(*batch, size, size)`.
      approximation: its approximation, likewise.

    Returns:
      Errors and traces, one for each matrix of the batch.

    Raises:
      ValueError: the shapes differ.
    """
    if exact.shape != approximation.shape:
        msg = (
            f"the exact block has shape {exact.shape}, its approximation {approximation.shape}. "
            "Take both from the same layer, in the order of fisher_blocks."
        )
        raise ValueError(msg)
    absolute = jnp.linalg.norm(exact - approximation, axis=(-2, -1))
    norm = jnp.linalg.norm(exact, axis=(-2, -1))
    return ApproximationError(
        absolute,
        jnp.where(absolute == 0, 0, absolute / norm),
        jnp.trace(exact, axis1=-2, axis2=-1),
        jnp.trace(approximation, axis1=-2, axis2=-1),
    )


def approximation_errors(
    predict: Callable[..., Any],
    likelihood: Likelihoods,
    layers: Layers,
    params: Any,
    *args: Any,
    rule: Rule = trace_restricted,
    sharing: Sharings = "expand",
    has_aux: bool = False,
    position_mask: Any = None,
    example_weights: Array | None = None,
    **kwargs: Any,
) -> dict[str, ApproximationError]:
    """How far TKFAC (or KFAC) is from the exact Fisher of every layer on a batch.

    The approximation is that of one batch, undamped and not averaged, with the expectation over targets in
    closed form on both sides.

    Args:
      predict: the model; see `fisher_blocks`.
      likelihood: what the outputs mean.
      layers: the layers.
      params: the parameters.
      *args: further arguments of `predict`.
      rule: `trace_restricted` (TKFAC) or `independent` (KFAC).
      sharing: see `sampled_fisher`.
      has_aux: `predict` returns `(outputs, aux)`.
      position_mask: False where a position of an example is padding.
      example_weights: what each example's loss is multiplied by, `(batch,)`.
      **kwargs: further keyword arguments of `predict`.

    Returns:
      By layer the errors and traces. Under the trace-restricted rule both traces are equal where each
      example is one location of the layer and meets no other example in the model.

    Raises:
      ValueError: see `fisher_blocks` and `exact_fisher`.

    Source: Gao et al. 2021, section 4.3.
    """
    batch = {"position_mask": position_mask, "example_weights": example_weights}
    exact = fisher_blocks(
        predict, likelihood, layers, params, *args, has_aux=has_aux, **batch, **kwargs
    )
    fisher = exact_fisher(predict, likelihood, layers, sharing=sharing, rule=rule, has_aux=has_aux)
    statistics = fisher(params, *args, **batch, **kwargs)
    return {
        name: approximation_error(block, dense(kronecker_factors(statistics[name]), layers[name]))
        for name, block in exact.items()
    }


def theorem_bound(
    predict: Callable[..., Any],
    likelihood: Likelihoods,
    layers: Layers,
    params: Any,
    *args: Any,
    has_aux: bool = False,
    **kwargs: Any,
) -> dict[str, Float[Array, "..."]]:
    """The bound on TKFAC's absolute error `||F - F_TKFAC||_F` for dense layers.

    `2 (N - 1) / N max_{i<j} sqrt(tr(L_i) tr(L_j) tr(G_i) tr(G_j))` over the N examples of a batch. The theorem takes
    each example's own Fisher block to be `L_i (x) G_i`: every example is one location of the layer and meets
    no other example in the model, and the layer's factors are stored whole.

    Args:
      predict: the model; see `fisher_blocks`.
      likelihood: what the outputs mean.
      layers: the layers.
      params: the parameters.
      *args: further arguments of `predict`.
      has_aux: `predict` returns `(outputs, aux)`.
      **kwargs: further keyword arguments of `predict`.

    Returns:
      The bound of each layer of kind `"dense"`, `spec.batch`, in units of curvature; other layers are left out.

    Raises:
      ValueError: see `fisher_blocks`.

    Source: Gao et al. 2021, Theorem 4.4.
    """
    exact = exact_estimate(as_likelihood(likelihood))(Batch())
    outputs, gradients_of = _example_gradients(predict, layers, params, has_aux, args, kwargs)

    def traces(derivative: Any) -> Gradients:
        return {
            name: jnp.sum(w * w, -1)
            for name, w in gradients_of(derivative).items()
            if layers[name].kind == "dense"
        }

    def bound(shares: Float[Array, "examples *batch"]) -> Float[Array, "*batch"]:
        """Takes `tr(L_i) tr(G_i) / N`, the exact trace of each example's block by the number of examples."""
        if len(shares) == 1:
            return jnp.zeros_like(shares[0])
        largest = jnp.sort(shares, axis=0)[-2:]
        return 2 * (len(shares) - 1) * jnp.sqrt(largest[0]) * jnp.sqrt(largest[1])

    return {name: bound(shares) for name, shares in exact(outputs, traces).items()}


def _example_gradients(
    predict: Callable[..., Any], layers: Layers, params: Any, has_aux: bool, args: Any, kwargs: Any
) -> tuple[Any, Callable[[Any], Gradients]]:
    """Linearises a model in the parameters of its layers.

    Returns:
      The outputs; and the map from derivatives with respect to them to every example's own gradient of each
      layer, `(examples, *batch, d_in * d_out)`.
    """
    active = {name: layers[name] for name in visible_layers(layers, params, "params")}
    flat, treedef = jax.tree_util.tree_flatten_with_path(params)
    leaves = {parameter_name(path): leaf for path, leaf in flat}
    wanted = {name for spec in active.values() for name in (spec.kernel, spec.bias)}

    def outputs_of(chosen: dict[str, Array]) -> Any:
        replaced = [chosen.get(name, leaf) for name, leaf in leaves.items()]
        predicted = predict(jax.tree.unflatten(treedef, replaced), *args, **kwargs)
        return predicted[0] if has_aux else predicted

    outputs, pull_back = jax.vjp(
        outputs_of, {name: leaf for name, leaf in leaves.items() if name in wanted}
    )
    examples = jnp.arange(jax.tree.leaves(outputs)[0].shape[0])

    def gradients_of(derivative: Any) -> Gradients:
        def of_example(n: Array) -> Gradients:
            def only_n(leaf: Array) -> Array:
                return jnp.where((examples == n).reshape(-1, *(1,) * (leaf.ndim - 1)), leaf, 0)

            (gradient,) = pull_back(jax.tree.map(only_n, derivative))
            return {name: _as_vector(spec, gradient) for name, spec in active.items()}

        return jax.vmap(of_example)(examples)

    return outputs, gradients_of


def _as_vector(spec: LayerSpec, gradient: dict[str, Array]) -> Float[Array, "*batch size"]:
    """A layer's gradient as a matrix, the bias beneath the kernel, row by row."""
    stack = len(spec.stack)
    matrix = spec.layout.kernel_to_matrix(gradient[spec.kernel], stack)
    if spec.bias is not None:
        rows = spec.layout.bias_to_matrix(gradient[spec.bias], stack)
        matrix = jnp.concatenate([matrix, rows], -2)
    # The widest float that is switched on.
    dtype = jnp.promote_types(spec.dtype, jnp.result_type(float))
    return matrix.astype(dtype).reshape(*spec.batch, -1)


def _factor_matrix(
    factors: KroneckerFactors, which: str, spec: LayerSpec | None
) -> Float[Array, "*batch size size"]:
    factor, batch = getattr(factors, which), factors.delta.shape
    if spec is None:
        if factor.ndim != len(batch) + 2 or factor.shape[-1] != factor.shape[-2]:
            msg = (
                f"{which} has shape {factor.shape}, which is not one square matrix for each delta of shape "
                f"{batch}; give the layer's spec, dense(factors, layers[name]), if it is stored otherwise."
            )
            raise ValueError(msg)
        return factor
    structure = getattr(spec, which)
    expected = (*spec.batch, *structure.shape)
    if factor.shape != expected or batch != spec.batch:
        msg = (
            f"layer '{spec.name}': {which} has shape {factor.shape} and delta {batch}; expected {expected} and "
            f"{spec.batch}. Give the factors of this layer."
        )
        raise ValueError(msg)
    return dense_matrix(structure, factor)
