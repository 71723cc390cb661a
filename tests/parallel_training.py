"""Five training steps of a small network, on one device and in every way to divide the batch among several.

Run as a program, `python parallel_training.py PROCESS PROCESSES PORT FILE`, it is one of several processes that
train together over a mesh of all their devices, and writes what it ends with.
"""

import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import tkfac_jax as tkfac
from tkfac_jax.layers import spec
from tkfac_jax.linalg.meshes import is_checked

STEPS = 5
AXIS = "data"
LIKELIHOOD = tkfac.Categorical()
# Whatever else the adaptive optimizer computes from losses, or counts.
CAUTIOUS = {"calibrate_damping": True, "reject_steps": True, "warmup_steps": 1}


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Conv(3, (2, 2), param_dtype=jnp.float64)(x)).reshape(len(x), -1)
        x = nn.tanh(nn.Dense(5, param_dtype=jnp.float64)(x))
        # The last layer is the fallback's.
        x = x * self.param("scale", nn.initializers.ones, (5,), jnp.float64)
        return nn.Dense(3, use_bias=False, param_dtype=jnp.float64)(x)


def problem():
    """predict, params, inputs, targets, layers."""
    model = Network()
    inputs = jax.random.normal(jax.random.key(0), (8, 3, 3, 2), jnp.float64)
    targets = jax.random.randint(jax.random.key(1), (8,), 0, 3)
    params = model.init(jax.random.key(2), inputs)["params"]

    def predict(params, inputs):
        return model.apply({"params": params}, inputs)

    layers = tkfac.find_layers(predict, params, inputs)
    return predict, params, inputs, targets, layers


def optimizer_for(layers, adaptive=False, **options):
    options |= {"fisher_interval": 2, "inverse_interval": 3}
    if adaptive == "tkfacw":
        return tkfac.tkfacw(0.1, layers, **options)
    options |= CAUTIOUS if adaptive == "cautious" else {}
    if adaptive:
        return tkfac.adaptive_tkfac(
            layers, LIKELIHOOD, initial_damping=0.05, damping_interval=2, l2=0.01, **options
        )
    return tkfac.tkfac(0.1, layers, damping=0.05, **options)


def step_of(predict, layers, optimizer, axis_name=None):
    """A training step of a user's own, whose conditionals decide about statistics and inverses."""
    fisher = tkfac.exact_fisher(predict, LIKELIHOOD, layers, axis_name=axis_name)

    def step(params, state, inputs, targets):
        def loss_fn(params):
            return LIKELIHOOD.nll(predict(params, inputs), targets).mean()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        if axis_name is not None:
            loss, grads = mean_of_gradients(loss, grads, axis_name)
        updates, state = optimizer.update(
            grads,
            state,
            params,
            statistics=lambda: fisher(params, inputs),
            # What only the adaptive optimizer looks at.
            outputs_fn=lambda params: predict(params, inputs),
            targets=targets,
        )
        return optax.apply_updates(params, updates), state, loss

    return step


def mean_of_gradients(loss, grads, axis_name):
    """The mean over devices. Where shard_map checks replication, JAX has summed the gradient of params already."""
    loss = jax.lax.pmean(loss, axis_name)
    if is_checked(axis_name):
        return loss, jax.tree.map(lambda g: g / jax.lax.axis_size(axis_name), grads)
    return loss, jax.lax.pmean(grads, axis_name)


def train(step, params, state, inputs, targets):
    for _ in range(STEPS):
        params, state, loss = step(params, state, inputs, targets)
    return params, state, loss


def on_one_device(adaptive=False):
    predict, params, inputs, targets, layers = problem()
    optimizer = optimizer_for(layers, adaptive)
    step = jax.jit(step_of(predict, layers, optimizer))
    return train(step, params, optimizer.init(params), inputs, targets)


def under_pmap(devices, adaptive=False):
    predict, params, inputs, targets, layers = problem()
    optimizer = optimizer_for(layers, adaptive, axis_name=AXIS)
    step = jax.pmap(
        step_of(predict, layers, optimizer, AXIS),
        axis_name=AXIS,
        in_axes=(None, None, 0, 0),
        out_axes=None,
        devices=jax.devices()[:devices],
    )
    divided = jax.tree.map(lambda a: a.reshape(devices, -1, *a.shape[1:]), (inputs, targets))
    return train(step, params, optimizer.init(params), *divided)


def under_shard_map(devices, check_vma, adaptive=False):
    predict, params, inputs, targets, layers = problem()
    optimizer = optimizer_for(layers, adaptive, axis_name=AXIS)
    mesh = jax.make_mesh((devices,), (AXIS,), axis_types=(AxisType.Auto,))
    whole, divided = PartitionSpec(), PartitionSpec(AXIS)
    step = jax.jit(
        jax.shard_map(
            step_of(predict, layers, optimizer, AXIS),
            mesh=mesh,
            in_specs=(whole, whole, divided, divided),
            out_specs=whole,
            check_vma=check_vma,
        )
    )
    return train(step, params, optimizer.init(params), inputs, targets)


def under_jit(over, adaptive=False, **options):
    predict, params, inputs, targets, layers = problem()
    optimizer = optimizer_for(layers, adaptive, **options)
    whole = NamedSharding(over, PartitionSpec())
    shardings = whole
    if options:
        shapes = jax.eval_shape(optimizer.init, params)
        shardings = tkfac.state_shardings(shapes, over)
        if not options["shard_state"]:
            shardings = jax.tree.map(lambda _: whole, shardings)
    state = jax.jit(optimizer.init, out_shardings=shardings)(params)
    params = jax.tree.map(lambda leaf: global_array(leaf, whole), params)
    divided = NamedSharding(over, PartitionSpec(AXIS))
    step = jax.jit(step_of(predict, layers, optimizer))
    return train(step, params, state, global_array(inputs, divided), global_array(targets, divided))


def global_array(array, sharding):
    """An array that every process has whole, divided over a mesh of all processes."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def main():
    process, processes, port, file = sys.argv[1:]
    # As conftest.py has it.
    spec.LARGEST_JOINED = 40
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", int(processes), int(process))
    assert jax.device_count() == 2 * int(processes)
    mesh = jax.make_mesh((jax.device_count(),), (AXIS,), axis_types=(AxisType.Auto,))
    results = under_jit(mesh, mesh=mesh, shard_state=False)
    arrays = [np.asarray(leaf.addressable_data(0)) for leaf in jax.tree.leaves(results)]
    np.savez(file, *arrays)


if __name__ == "__main__":
    main()
