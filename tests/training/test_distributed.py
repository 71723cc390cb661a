"""One answer: five training steps on one device, and divided among several in every way that JAX knows."""

import functools
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import parallel_training as training
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from networks import mlp_problem

import tkfac_jax as tkfac
from tkfac_jax.fisher import layer_statistics

DEVICES = 4


@functools.cache
def expected(adaptive=False):
    return jax.device_get(training.on_one_device(adaptive))


def assert_same(received, expected):
    """Sums over devices are added in another order: equal to rounding, which five steps carry on."""
    paths, _ = jax.tree_util.tree_flatten_with_path(expected)
    for (path, e), r in zip(paths, jax.tree.leaves(received), strict=True):
        np.testing.assert_allclose(
            np.asarray(r), e, rtol=1e-9, atol=1e-11, err_msg=jax.tree_util.keystr(path)
        )


def mesh_of(kind, devices=DEVICES):
    return jax.make_mesh((devices,), (training.AXIS,), axis_types=(kind,))


@pytest.mark.parametrize("adaptive", [False, True, "tkfacw"])
def test_pmap(adaptive):
    assert_same(training.under_pmap(DEVICES, adaptive), expected(adaptive))


@pytest.mark.parametrize(
    ("check_vma", "adaptive"), [(True, True), (True, False), (False, False), (True, "tkfacw")]
)
def test_shard_map(check_vma, adaptive):
    assert_same(training.under_shard_map(DEVICES, check_vma, adaptive), expected(adaptive))


def test_trials_and_rejections_under_shard_map():
    assert_same(training.under_shard_map(DEVICES, True, "cautious"), expected("cautious"))
    _, state, _ = expected("cautious")
    # What is compared has happened.
    assert float(state.damping) < 0.05
    assert int(state.curvature.step) == training.STEPS - 1


@pytest.mark.parametrize(
    ("kind", "how"), [(AxisType.Auto, "plain"), (AxisType.Explicit, "sharded")]
)
def test_the_adaptive_optimizer_over_a_mesh(kind, how, set_constant):
    set_constant("tkfac_jax.linalg.meshes.SMALLEST_DIVIDED", 8)
    mesh = mesh_of(kind)
    options = {} if how == "plain" else {"mesh": mesh, "shard_state": True}
    params, state, loss = training.under_jit(mesh, True, **options)
    wanted_params, wanted_state, wanted_loss = expected(True)
    assert_same((params, loss), (wanted_params, wanted_loss))
    for field in ("damping", "learning_rate", "momentum", "ratio", "previous"):
        assert_same(getattr(state, field), getattr(wanted_state, field))


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        (AxisType.Auto, "divided"),
        (AxisType.Auto, "sharded"),
        (AxisType.Explicit, "plain"),
        (AxisType.Explicit, "sharded"),
    ],
)
def test_jit_over_a_mesh(kind, how, set_constant):
    set_constant("tkfac_jax.linalg.meshes.SMALLEST_DIVIDED", 8)
    mesh = mesh_of(kind)
    options = {} if how == "plain" else {"mesh": mesh, "shard_state": how == "sharded"}
    params, state, loss = training.under_jit(mesh, **options)
    if how != "sharded":
        assert_same((params, state, loss), expected())
        return
    wanted_params, wanted_state, wanted_loss = expected()
    assert_same((params, loss), (wanted_params, wanted_loss))
    factors, wanted = (optax.tree.get(s, "factors") for s in (state, wanted_state))
    for name, factor in factors.items():
        rows = wanted[name].phi.shape[0]
        phi = np.asarray(factor.phi)
        np.testing.assert_allclose(phi[:rows], wanted[name].phi, rtol=1e-9, atol=1e-11)
        np.testing.assert_array_equal(phi[rows:], 0)
        # Nine rows, filled up to twelve, are three on each device.
        shard = factor.phi.addressable_shards[0].data.shape
        assert shard[0] == -(-rows // DEVICES)


def test_two_processes_of_two_devices(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    folder = os.path.dirname(training.__file__)
    environment = os.environ | {"PYTHONPATH": folder, "OPENBLAS_NUM_THREADS": "1"}
    files = [tmp_path / f"{process}.npz" for process in range(2)]
    running = [
        subprocess.Popen(
            [sys.executable, training.__file__, str(process), "2", str(port), str(file)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for process, file in enumerate(files)
    ]
    try:
        said = [process.communicate(timeout=300)[0].decode() for process in running]
    finally:
        for process in running:
            process.kill()
    for process, text, file in zip(running, said, files, strict=True):
        assert process.returncode == 0, text
        arrays = np.load(file)
        assert_same([arrays[name] for name in arrays.files], expected())


def test_statistics_that_nobody_has_averaged_are_refused():
    predict, params, x, _, layers = mlp_problem(batch=8)
    optimizer = tkfac.scale_by_tkfac(layers)
    fisher = tkfac.exact_fisher(predict, tkfac.Categorical(), layers)

    def step(params, state, x):
        return optimizer.update(params, state, statistics=fisher(params, x))

    whole, divided = PartitionSpec(), PartitionSpec(training.AXIS)
    mapped = jax.shard_map(
        step,
        mesh=mesh_of(AxisType.Auto),
        in_specs=(whole, whole, divided),
        out_specs=whole,
    )
    with pytest.raises(ValueError, match=r"vary over the mesh axes \['data'\].*axis_name"):
        mapped(params, optimizer.init(params), x)


def test_losses_that_nobody_has_averaged_are_refused():
    predict, params, x, y, layers = mlp_problem(batch=8)
    optimizer = tkfac.adaptive_tkfac(layers, tkfac.Categorical(), initial_damping=0.1)

    def step(params, state, x, y):
        return optimizer.update(
            params,
            state,
            params,
            statistics=None,
            outputs_fn=lambda params: predict(params, x),
            targets=y,
        )

    whole, divided = PartitionSpec(), PartitionSpec(training.AXIS)
    mapped = jax.shard_map(
        step,
        mesh=mesh_of(AxisType.Auto),
        in_specs=(whole, whole, divided, divided),
        out_specs=whole,
    )
    with pytest.raises(
        ValueError, match=r"the losses vary over the mesh axes \['data'\].*axis_name"
    ):
        jax.eval_shape(mapped, params, jax.eval_shape(optimizer.init, params), x, y)


@pytest.mark.parametrize("check_vma", [True, False])
def test_averages_are_taken_once(check_vma):
    """Whether the Fisher function, the optimizer or both average; loss and gradient stay a device's own."""
    predict, params, x, y, layers = mlp_problem(batch=8)
    axis = training.AXIS
    own = tkfac.value_and_grad_with_fisher(
        predict, tkfac.Categorical(), layers, estimator="empirical"
    )
    averaged = tkfac.value_and_grad_with_fisher(
        predict, tkfac.Categorical(), layers, estimator="empirical", axis_name=axis
    )
    plain, mapped = (
        tkfac.scale_by_tkfac(layers, axis_name=axis_name) for axis_name in (None, axis)
    )
    _, gradient, statistics = own(params, x, targets=y)
    wanted, _ = plain.update(gradient, plain.init(params), statistics=statistics)
    for function, optimizer in ((averaged, plain), (own, mapped), (averaged, mapped)):

        def step(params, state, x, y, function=function, optimizer=optimizer):
            _, gradient, statistics = function(params, x, targets=y)
            gradient = jax.lax.pmean(gradient, axis)
            return optimizer.update(gradient, state, statistics=statistics)[0]

        whole, divided = PartitionSpec(), PartitionSpec(axis)
        received = jax.jit(
            jax.shard_map(
                step,
                mesh=mesh_of(AxisType.Auto),
                in_specs=(whole, whole, divided, divided),
                out_specs=whole,
                check_vma=check_vma,
            )
        )(params, plain.init(params), x, y)
        assert_same(received, jax.device_get(wanted))


@pytest.mark.parametrize(
    ("how", "axes"),
    [("whole", "a"), ("whole", "ab"), ("divided", "a"), ("divided", "ab"), ("shard_map", "a")],
)
def test_the_optimizer_divides_its_inversions(how, axes):
    _, params, *_, layers = mlp_problem()
    shapes = []

    def watched(stack):
        shapes.append(stack.shape)
        return tkfac.cholesky_inverse(stack)

    sizes = {1: (4,), 2: (2, 2)}[len(axes)]
    mesh = jax.make_mesh(sizes, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
    options = {"mesh": mesh, "shard_state": how == "divided"}
    if how == "shard_map":
        options = {"axis_name": axes}
    plain = tkfac.scale_by_tkfac(layers)
    optimizer = tkfac.scale_by_tkfac(layers, inverse=watched, **options)
    statistics = jax.tree.map(
        lambda s: jnp.eye(len(s)) * 3 if s.ndim == 2 else s + 1, layer_statistics.zero_slots(layers)
    )

    def update(state, optimizer=optimizer):
        return optimizer.update(params, state, statistics=statistics)

    expected, _ = jax.jit(functools.partial(update, optimizer=plain))(plain.init(params))
    state = optimizer.init(params)
    shapes.clear()
    if how == "shard_map":
        whole = PartitionSpec()
        update = jax.shard_map(update, mesh=mesh, in_specs=whole, out_specs=whole)
    received, _ = jax.jit(update)(state)
    # Six matrices, of the nearly equal sizes 5, 5, 5, 4, 4 and of size 3, are two for each of four devices.
    assert set(shapes) == {(2, 5, 5), (1, 5, 5)}
    assert_same(received, jax.device_get(expected))


@pytest.mark.parametrize(
    ("apart", "kind"),
    [(None, AxisType.Auto), (True, AxisType.Auto), (None, AxisType.Explicit)],
    ids=["auto", "apart", "explicit"],
)
def test_make_train_step_over_a_mesh(apart, kind):
    predict, params, x, y, layers = training.problem()[:5]
    results = []
    for devices in (1, DEVICES):
        mesh = mesh_of(kind, devices)
        optimizer = training.optimizer_for(layers, mesh=mesh)
        step = tkfac.make_train_step(
            predict,
            training.LIKELIHOOD,
            optimizer,
            fisher_interval=2,
            inverse_interval=3,
            statistics_apart=apart,
        )
        with jax.set_mesh(mesh):
            whole = NamedSharding(mesh, PartitionSpec())
            p, state = jax.device_put((params, optimizer.init(params)), whole)
            p, state = jax.tree.map(jnp.copy, (p, state))
            data = jax.device_put((x, y), NamedSharding(mesh, PartitionSpec(training.AXIS)))
            for t in range(training.STEPS):
                # The targets are drawn for the whole batch, however it is divided.
                p, state, metrics = step(p, state, data[0], targets=data[1], key=jax.random.key(t))
        results.append(jax.device_get((p, state, metrics["loss"])))
    assert_same(results[1], results[0])


def test_wrong_devices_are_named(unchecked):
    *_, layers = mlp_problem()
    mesh = mesh_of(AxisType.Auto, 2)
    for options, message in (
        ({"axis_name": "data", "mesh": mesh}, "expected one of them"),
        ({"mesh": "data"}, r"mesh is str; expected a jax.sharding.Mesh"),
        ({"shard_state": True}, "needs the mesh"),
    ):
        with pytest.raises(ValueError, match=message):
            tkfac.scale_by_tkfac(layers, **options)
