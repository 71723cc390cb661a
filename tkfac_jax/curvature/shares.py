"""Shares of the layers, whose inverses are refreshed one share at a time."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from jaxtyping import Array

from tkfac_jax.layers.spec import LayerSpec


class Share(NamedTuple):
    """One share of the layers, whose inverses are refreshed while those of the others stay.

    Attributes:
      number: which one, from 0 to `of - 1`; may be traced.
      of: how many shares there are. If they are more than layers, some are empty.
    """

    number: int | Array
    of: int


def shares(layers: Mapping[str, LayerSpec], of: int) -> list[list[str]]:
    """Divides layers into shares of about equal cost of their inverses; more shares than layers leave some empty."""
    plan: list[list[str]] = [[] for _ in range(of)]
    loads = [0] * len(plan)
    cost = {name: _cost_of_inverses(spec) for name, spec in layers.items()}
    for name in sorted(cost, key=lambda name: -cost[name]):
        lightest = loads.index(min(loads))
        plan[lightest].append(name)
        loads[lightest] += cost[name]
    return plan


def _cost_of_inverses(spec: LayerSpec) -> int:
    """The cost of a layer's inverses, in a common unit."""
    return math.prod(spec.batch) * sum(
        structure.size
        if structure.kind == "diagonal"
        else structure.num_blocks * structure.block**3
        for structure in (spec.phi, spec.psi)
    )
