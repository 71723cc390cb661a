"""Trains in processes that are killed at random moments; each goes on from the last checkpoint.

    python tests/killed_run.py DIRECTORY [--kills 20] [--seed 0]

DIRECTORY gets `killed.npz`, the end of that run, `undisturbed.npz`, that of a run that nobody disturbs, and
`report.json`. One process imports and traces everything and forks those that train. It has no device of JAX's, and so
no threads that a fork could lose; what the first process compiles is in a cache for all others.
"""

import argparse
import itertools
import json
import os
import signal
import time
import traceback
import warnings
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import scipy.linalg.cython_lapack  # noqa: F401 - JAX imports it when it lowers a program with LAPACK in it

import tkfac_jax as tkfac

STEPS_PER_CHECKPOINT = 3
# A process is killed after so many events at most (it restores, or makes a step), and up to so many seconds
# later: about the time that a checkpoint takes.
EVENTS = 8
SECONDS = 0.08
PAUSE = 0.005
# After the last kill, so that there are new statistics and inverses.
FURTHER_STEPS = 12


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(nn.tanh(nn.Dense(8)(x)))
        return nn.Dense(8, use_bias=False)(x)


def traced_programs():
    """The program that makes the first state, that of a step, and the state's shapes."""
    model = Net()
    x = np.random.default_rng(0).normal(size=(16, 7)).astype(np.float32)
    likelihood = tkfac.Categorical()

    def predict(params, x):
        return model.apply({"params": params}, x)

    params = jax.eval_shape(lambda: model.init(jax.random.key(1), x)["params"])
    layers = tkfac.find_layers(predict, params, x, on_unsupported="ignore")
    fisher = tkfac.sampled_fisher(predict, likelihood, layers)
    optimizer = tkfac.tkfac(0.05, layers, damping=0.1, fisher_interval=2, inverse_interval=5)

    def first():
        params = model.init(jax.random.key(1), x)["params"]
        return tkfac.TrainState.create(apply_fn=predict, params=params, tx=optimizer)

    def step(state):
        key, other = jax.random.split(jax.random.fold_in(jax.random.key(2), state.step))
        inputs = x + 0.1 * jax.random.normal(other, x.shape)
        targets = jnp.argmax(inputs, axis=-1)

        def loss(params):
            return likelihood.nll(predict(params, inputs), targets).mean()

        return state.apply_gradients(
            grads=jax.grad(loss)(state.params),
            statistics=lambda: fisher(state.params, inputs, key=key),
        )

    shapes = jax.eval_shape(first)
    return jax.jit(first).trace(), jax.jit(step).trace(shapes), shapes


def train(programs, directory, end, report):
    """Trains from the last checkpoint to step number `end`, or for ever; `report()` after each event."""
    first, step, shapes = programs
    step = step.lower().compile()
    options = ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.LatestN(2), cleanup_tmp_directories=True
    )
    with ocp.CheckpointManager(directory, options=options) as manager:
        report()
        latest = manager.latest_step()
        if latest is None:
            state = first.lower().compile()()
        else:
            state = manager.restore(latest, args=ocp.args.StandardRestore(shapes))
        for number in itertools.count((latest or 0) + 1):
            state = step(state)
            if number == end:
                break
            if end is None and number % STEPS_PER_CHECKPOINT == 0:
                # Written in the background, while further steps are made.
                manager.save(number, args=ocp.args.StandardSave(state))
            report()
            time.sleep(0 if end else PAUSE)
    return state


def check(condition, message):
    if not condition:
        raise SystemExit(message)


def forked(programs, directory, end=None):
    """A process that trains: its number, and a pipe with one byte for each of its events."""
    events, reports = os.pipe()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        process = os.fork()
    if process:
        os.close(reports)
        check(not caught, f"a fork could lose threads: {caught}")
        return process, events
    # Then a report fails when nobody is left to read it, and the process ends.
    os.close(events)
    status = 1
    try:
        state = train(programs, directory, end, lambda: os.write(reports, b"."))
        leaves = jax.tree_util.tree_leaves_with_path(state)
        arrays = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
        np.savez(directory.with_suffix(".npz"), **arrays)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        # Never into the code after the fork.
        os._exit(status)


def train_undisturbed(programs, directory, end):
    process, events = forked(programs, directory, end)
    while os.read(events, 1000):
        pass
    os.close(events)
    check(os.waitpid(process, 0)[1] == 0, "a process failed that nobody had killed")


def train_and_kill(programs, directory, random):
    process, events = forked(programs, directory)
    for _ in range(random.integers(1, EVENTS, endpoint=True)):
        os.read(events, 1)
    time.sleep(random.uniform(0, SECONDS))
    os.kill(process, signal.SIGKILL)
    os.close(events)
    check(os.WIFSIGNALED(os.waitpid(process, 0)[1]), "a process ended before it was killed")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    directory = arguments.directory.resolve()
    jax.config.update("jax_compilation_cache_dir", str(directory / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    programs = traced_programs()
    random = np.random.default_rng(arguments.seed)
    killed = directory / "killed"
    last_steps, killed_while_saving = [], 0
    for _ in range(arguments.kills):
        train_and_kill(programs, killed, random)
        names = [path.name for path in killed.iterdir()]
        finished = [int(name) for name in names if name.isdigit()]
        last_steps.append(max(finished, default=0))
        killed_while_saving += len(finished) < len(names)
    end = last_steps[-1] + FURTHER_STEPS
    train_undisturbed(programs, killed, end)
    train_undisturbed(programs, directory / "undisturbed", end)
    report = {"last_steps": last_steps, "killed_while_saving": killed_while_saving}
    (directory / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
