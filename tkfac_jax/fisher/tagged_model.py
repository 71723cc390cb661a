"""A model whose layers are tagged, so that derivatives of its outputs can be pulled back to statistics."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tkfac_jax.fisher.estimators import Batch, Estimate
from tkfac_jax.fisher.layer_statistics import Counting, Options, Statistics, zero_slots
from tkfac_jax.fisher.tagging import tagging
from tkfac_jax.layers.discovery import unjitted
from tkfac_jax.layers.spec import Layers, visible_layers
from tkfac_jax.linalg.meshes import mean_over, vary, varying_axes


class TaggedModel(NamedTuple):
    """A model whose registered layers are tagged, so that a pull-back yields their statistics."""

    predict: Callable[..., Any]
    layers: Layers
    options: Options
    has_aux: bool

    @classmethod
    def build(
        cls, predict: Callable[..., Any], layers: Layers, options: Options, has_aux: bool
    ) -> "TaggedModel":
        """Checks the options."""
        _check_options(options, layers)
        return cls(unjitted(predict), layers, options, has_aux)

    def statistics(
        self,
        estimate: Estimate,
        batch: Batch,
        axis_name: str | None,
        params: Any,
        args: Any,
        kwargs: Any,
        targets: Any = None,
    ) -> Statistics:
        """The statistics by an estimate."""
        axes = varying_axes((params, args, kwargs, batch, targets))
        wanted = Wanted(statistics=self.zero_slots(axes))
        distinct = _distinct(params)
        outputs, pull_back, _ = self.linearize(wanted, distinct, batch, args, kwargs)
        statistics = estimate(outputs, lambda cotangent: pull_back(cotangent).statistics)
        return mean_over(statistics, axis_name)

    def zero_slots(self, axes: frozenset[str]) -> Statistics:
        """Where the statistics go; the slots vary over some mesh axes."""
        return vary(zero_slots(self.layers, self.options.rule), axes)

    def linearize(
        self,
        wanted: "Wanted",
        params: Any,
        batch: Batch,
        args: Any,
        kwargs: Any,
    ) -> tuple[Any, Callable[[Any], "Wanted"], Any]:
        """Outputs, the map from derivatives of the outputs to what is wanted, summed over examples, and aux.

        The sums are those of the device's own examples if what is wanted varies over the mesh axes over which the
        examples vary: differentiation then does not add them up over devices.
        """
        visible_layers(self.layers, params, "params")

        def outputs_of(wanted: Wanted) -> tuple[Any, Any]:
            own = params if wanted.gradient is None else wanted.gradient
            return self._call(own, wanted.statistics, batch, args, kwargs)

        outputs, pull_back, aux = jax.vjp(outputs_of, wanted, has_aux=True)
        return outputs, lambda cotangent: pull_back(cotangent)[0], aux

    def _call(
        self, params: Any, slots: Statistics | None, batch: Batch, args: Any, kwargs: Any
    ) -> tuple[Any, Any]:
        """What the model predicts and aux; its layers are tagged if there are slots for their statistics."""
        if slots is None:
            predicted = self.predict(params, *args, **kwargs)
            return predicted if self.has_aux else (predicted, None)
        counting = Counting(batch.location_mask, batch.weights)
        with tagging(self.layers, params, slots, self.options, counting) as tagged:
            predicted = self.predict(tagged.params, *args, **kwargs)
        for name in self.layers:
            if name not in tagged.names:
                msg = (
                    f"layer '{name}' was not applied to its kernel, so it has no statistics. Pass the same "
                    "predict and params as to find_layers, and call it as it was called there."
                )
                raise ValueError(msg)
        return predicted if self.has_aux else (predicted, None)


class Wanted(NamedTuple):
    """What derivatives of the outputs are pulled back to; before that, what is differentiated for it.

    Attributes:
      gradient: the parameters, and then their gradient; None: not wanted.
      statistics: slots, and then the statistics; None: not wanted.
    """

    gradient: Any = None
    statistics: Statistics | None = None


def _distinct(params: Any) -> Any:
    """Copies leaves that are one object in two places: layers are told apart by identity."""
    seen: set[int] = set()

    def copy_if_seen(leaf: Any) -> Any:
        if id(leaf) in seen:
            return jnp.array(leaf, copy=True)
        seen.add(id(leaf))
        return leaf

    return jax.tree.map(copy_if_seen, params)


def _check_options(options: Options, layers: Layers) -> None:
    sharing = options.sharing
    of_layers = {".": sharing} if isinstance(sharing, str) else sharing
    if not isinstance(of_layers, Mapping) or any(
        value not in ("expand", "reduce") for value in of_layers.values()
    ):
        msg = f'sharing={sharing!r}; expected "expand" or "reduce", or one of them for each layer.'
        raise ValueError(msg)
    unknown = [] if isinstance(sharing, str) else [name for name in of_layers if name not in layers]
    if unknown:
        msg = f"sharing names {unknown}; the layers are {sorted(layers)}."
        raise ValueError(msg)
    if not callable(options.rule):
        msg = (
            f"rule={options.rule!r}; expected tkfac_jax.trace_restricted or tkfac_jax.independent."
        )
        raise ValueError(msg)
