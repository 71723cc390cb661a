"""Refusing options of optimizers that are wrong."""

from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from tkfac_jax.curvature.damping import TraceDamping
from tkfac_jax.fisher.layer_statistics import independent
from tkfac_jax.layers.spec import Layers


def check_options(layers: Any, decay: Any, averaging: Any = "moments") -> None:
    """Refuses options of the factors that are wrong."""
    check_layers(layers)
    check_number("decay", decay, lambda value: 0 <= value < 1, "a number in [0, 1) or a function")
    if averaging not in ("factors", "moments"):
        msg = f'averaging={averaging!r}; expected "factors" or "moments".'
        raise ValueError(msg)


def check_rule(rule: Any) -> None:
    """Refuses what is no rule of statistics."""
    if not callable(rule):
        msg = f"rule={rule!r}; expected tkfac_jax.trace_restricted or tkfac_jax.independent."
        raise ValueError(msg)


def check_damping(damping: Any, rule: Any) -> None:
    """Refuses the paper's trace damping for KFAC's rule, whose coefficient is no trace."""
    if isinstance(damping, TraceDamping) and rule is independent:
        msg = "trace damping is defined for TKFAC; give kfac a number or factored_damping(...)."
        raise ValueError(msg)


def check_layers(layers: Any) -> None:
    """Refuses what is not what `find_layers` returned."""
    if not isinstance(layers, Layers):
        msg = f"layers is {type(layers).__name__}; expected what find_layers(predict, params, ...) returned."
        raise ValueError(msg)


def check_devices(axis_name: Any, mesh: Any, shard_state: bool) -> None:
    """Refuses options of several devices that do not go together."""
    if axis_name is not None and mesh is not None:
        msg = (
            f"axis_name={axis_name!r} and a mesh are given; expected one of them: axis_name under jax.pmap and "
            "jax.shard_map, mesh under jax.jit."
        )
        raise ValueError(msg)
    if mesh is not None and not isinstance(mesh, Mesh):
        msg = f"mesh is {type(mesh).__name__}; expected a jax.sharding.Mesh, as of jax.make_mesh(...)."
        raise ValueError(msg)
    if shard_state and mesh is None:
        msg = "shard_state=True needs the mesh over which the state is divided: give mesh=..."
        raise ValueError(msg)


def check_number(name: str, value: Any, allowed: Callable[[Any], bool], expected: str) -> None:
    """Checks numbers only: a traced scalar or a function has no value yet."""
    if isinstance(value, int | float) and not allowed(value):
        msg = f"{name}={value}; expected {expected}."
        raise ValueError(msg)


def is_zero(value: Any) -> bool:
    """Whether an option is the number 0; a traced scalar or a function has no value yet."""
    return isinstance(value, int | float) and value == 0
