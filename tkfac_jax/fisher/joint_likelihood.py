"""Several likelihoods as one: the losses of a model with several outputs."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tkfac_jax.fisher.likelihoods import Likelihood
from tkfac_jax.linalg.meshes import vary, varying_axes


class Joint:
    """Several likelihoods of one model, by name: independent given the outputs, so that their losses add up."""

    def __init__(self, likelihoods: Mapping[str, Any]):
        """Takes the likelihoods by the names that outputs and targets have, too."""
        self._likelihoods = dict(likelihoods)

    def nll(self, outputs: Any, targets: Any, mask: Any = None) -> Array:
        """The sum of the losses, `(batch,)`."""
        return self._sum("nll", outputs, targets, mask)

    def fisher_nll(self, outputs: Any, targets: Any, mask: Any = None) -> Array:
        """The loss whose derivatives make the Fisher; see `Likelihood`."""
        return self._sum("fisher_nll", outputs, targets, mask)

    def sample(self, key: Any, outputs: Any) -> Any:
        """Targets for each of the outputs, drawn independently."""
        self._check("outputs", outputs)
        keys = jax.random.split(key, len(self._likelihoods))
        return {
            name: likelihood.sample(own, outputs[name])
            for own, (name, likelihood) in zip(keys, self._likelihoods.items(), strict=True)
        }

    def num_fisher_vectors(self, outputs: Any) -> int:
        """The vectors of all likelihoods, one after the other."""
        self._check("outputs", outputs)
        return sum(own.num_fisher_vectors(outputs[n]) for n, own in self._likelihoods.items())

    def fisher_vector(self, outputs: Any, index: Array, mask: Any = None) -> Any:
        """One of the vectors: zero on the outputs of all likelihoods but its own."""
        first, vectors = 0, dict(outputs)
        for name, likelihood in self._likelihoods.items():
            count = likelihood.num_fisher_vectors(outputs[name])
            own = (index >= first) & (index < first + count)
            vector = likelihood.fisher_vector(
                outputs[name], jnp.clip(index - first, 0, count - 1), **_mask_of(mask, name)
            )
            vectors[name] = jnp.where(own, vector, 0)
            first += count
        return vectors

    def members(self) -> dict[str, Any]:
        """The likelihoods themselves, by the names of their outputs."""
        return self._likelihoods

    def _sum(self, method: str, outputs: Any, targets: Any, mask: Any) -> Array:
        self._check("outputs", outputs)
        self._check("targets", targets)
        losses = [
            getattr(likelihood, method, likelihood.nll)(
                outputs[name], targets[name], **_mask_of(mask, name)
            )
            for name, likelihood in self._likelihoods.items()
        ]
        return jnp.sum(jnp.stack(losses), axis=0)

    def _check(self, what: str, tree: Any) -> None:
        names = sorted(self._likelihoods)
        if not isinstance(tree, Mapping) or sorted(tree) != names:
            received = sorted(tree) if isinstance(tree, Mapping) else type(tree).__name__
            msg = f"the likelihoods are a mapping with the keys {names}; the {what} are {received}."
            raise ValueError(msg)


def _mask_of(mask: Any, name: str) -> dict[str, Any]:
    if isinstance(mask, Mapping):
        mask = mask.get(name)
    return {} if mask is None else {"mask": mask}


def as_likelihood(likelihood: Any) -> Any:
    """A mapping of likelihoods as one likelihood; any other likelihood as it is.

    Raises:
      ValueError: it, or one of a mapping, lacks `nll` or `sample`; or a mapping is empty.
    """
    members = likelihood if isinstance(likelihood, Mapping) else {"": likelihood}
    if not members:
        msg = "the mapping of likelihoods is empty; expected one for each output of the model."
        raise ValueError(msg)
    for name, one in members.items():
        if not isinstance(one, Likelihood):
            where = f" under {name!r}" if name else ""
            msg = (
                f"the likelihood{where} is {one!r}; expected an object with nll(outputs, targets) and "
                "sample(key, outputs)."
            )
            raise ValueError(msg)
    return Joint(likelihood) if isinstance(likelihood, Mapping) else likelihood


def check_closed_form(likelihood: Any) -> None:
    """Refuses a likelihood that does not say what its Fisher is.

    Raises:
      ValueError: it, or one of several, lacks `num_fisher_vectors` or `fisher_vector`.
    """
    for one in likelihood.members().values() if isinstance(likelihood, Joint) else [likelihood]:
        if not (hasattr(one, "fisher_vector") and hasattr(one, "num_fisher_vectors")):
            msg = (
                f"{type(one).__name__} has no closed form: the exact Fisher needs its methods "
                "num_fisher_vectors(outputs) and fisher_vector(outputs, index). Take the sampled Fisher."
            )
            raise ValueError(msg)


def fisher_scale(likelihood: Any, outputs: Any) -> float | None:
    """By which number `fisher_nll` is a multiple of `nll`, without a mask; None: that is not known.

    Args:
      likelihood: the likelihood, as `as_likelihood` returns it.
      outputs: the outputs.
    """
    if isinstance(likelihood, Joint):
        scales = {fisher_scale(one, outputs[name]) for name, one in likelihood.members().items()}
        return scales.pop() if len(scales) == 1 else None
    if not hasattr(likelihood, "fisher_nll"):
        return 1.0
    # A subclass with a loss of its own inherits a number that does not belong to it.
    methods = ("nll", "fisher_nll", "fisher_scale")
    homes = {
        next((cls for cls in type(likelihood).__mro__ if name in vars(cls)), None)
        for name in methods
    }
    return likelihood.fisher_scale(outputs) if len(homes) == 1 and None not in homes else None


def fisher_product(
    likelihood: Any, outputs: Any, tangents: Any, targets: Any, mask: Any = None
) -> Any:
    """The Fisher of each example's outputs times a tangent of them.

    It is what the likelihood says, `fisher_product` or else `fisher_vector`; and for one that says neither the
    Hessian of `nll` at the data's targets, which is the same wherever the outputs are natural parameters.

    Args:
      likelihood: the likelihood, as `as_likelihood` returns it.
      outputs: the outputs.
      tangents: of the structure of the outputs.
      targets: the data's targets.
      mask: False where a position is padding.

    Returns:
      The products, of the structure of the outputs.
    """
    if isinstance(likelihood, Joint):
        return {
            name: fisher_product(
                one, outputs[name], tangents[name], targets[name], _mask_of(mask, name).get("mask")
            )
            for name, one in likelihood.members().items()
        }
    options = {} if mask is None else {"mask": mask}
    if hasattr(likelihood, "fisher_product"):
        return likelihood.fisher_product(outputs, tangents, **options)
    if hasattr(likelihood, "fisher_vector") and hasattr(likelihood, "num_fisher_vectors"):
        return _product_of_vectors(likelihood, outputs, tangents, options)
    gradient = jax.grad(lambda outputs: likelihood.nll(outputs, targets, **options).sum())
    return jax.jvp(gradient, (outputs,), (tangents,))[1]


def _product_of_vectors(
    likelihood: Any, outputs: Any, tangents: Any, options: dict[str, Any]
) -> Any:
    """The sum of the vectors' outer products times a tangent, one vector at a time."""

    def add(total: Any, index: Array) -> tuple[Any, None]:
        vector = likelihood.fisher_vector(outputs, index, **options)
        products = jax.tree.map(lambda v, t: (v * t).sum(range(1, v.ndim)), vector, tangents)
        length = jnp.stack(jax.tree.leaves(products)).sum(0)
        return jax.tree.map(
            lambda total, v: total + v * length.reshape(-1, *(1,) * (v.ndim - 1)), total, vector
        ), None

    zeros = jax.tree.map(
        lambda out, t: vary(jnp.zeros_like(out), varying_axes((out, t))), outputs, tangents
    )
    return jax.lax.scan(add, zeros, jnp.arange(likelihood.num_fisher_vectors(outputs)))[0]
