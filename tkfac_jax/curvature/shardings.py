"""How an optimizer's state is divided over a mesh."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tkfac_jax.curvature.state import TkfacState
from tkfac_jax.linalg.meshes import spec_of_shape


def state_shardings(opt_state: Any, mesh: Mesh) -> Any:
    """How an optimizer's state is divided over a mesh: the factors and inverses of a `TkfacState`.

    Each factor and inverse is divided along one of its axes over all axes of the mesh. Small ones are whole on every
    device, as is everything else in the state. Arrays of which no axis divides evenly are whole, too,
    unless the optimizer was built with this `mesh` and `shard_state=True`, which fills them up with zeros.

    Args:
      opt_state: the state, or its shapes: `jax.eval_shape(optimizer.init, params)`.
      mesh: the mesh.

    Returns:
      A tree of the structure of `opt_state` of `jax.sharding.NamedSharding`, for `in_shardings` and
      `out_shardings` of `jax.jit`, for `jax.device_put`, and for restoring checkpoints.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, optax, tkfac_jax as tkfac
      >>> model = nn.Dense(64)
      >>> x = jnp.ones((2, 63))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> layers = tkfac.find_layers(lambda params, x: model.apply({"params": params}, x), params, x)
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> optimizer = tkfac.tkfac(0.1, layers, mesh=mesh, shard_state=True)
      >>> shardings = tkfac.state_shardings(jax.eval_shape(optimizer.init, params), mesh)
      >>> state = jax.jit(optimizer.init, out_shardings=shardings)(params)
      >>> phi = optax.tree.get(state, "factors")["."].phi
      >>> mesh.size * phi.addressable_shards[0].data.size == phi.size
      True
    """

    def of(leaf: Any) -> Any:
        if not isinstance(leaf, TkfacState):
            return NamedSharding(mesh, PartitionSpec())
        whole = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), leaf)
        factors, inverses = jax.tree.map(
            lambda array: NamedSharding(mesh, spec_of_shape(array.shape, mesh)),
            (leaf.factors, leaf.inverses),
        )
        return whole._replace(factors=factors, inverses=inverses)

    return jax.tree.map(of, opt_state, is_leaf=lambda leaf: isinstance(leaf, TkfacState))
