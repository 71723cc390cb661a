"""Configuration of all tests: float64 for the oracles, and four devices for what is mapped."""

import gc
import os
import subprocess
import sys
import tempfile

import jax
import jaxlib
import jaxtyping
import pytest

jax.config.update("jax_enable_x64", True)
# GPUs and TPUs would round the inputs of products.
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_num_cpu_devices", 4)
# The tests compile many small programs and run each once.
jax.config.update("jax_disable_most_optimizations", True)

# Tracing makes many objects that live for long: the collector would look through all of them again and again.
gc.freeze()
gc.set_threshold(50_000, 20, 10)

# Older emitters of code, and one piece of it per program: with both, programs compile in half the time.
XLA_FLAGS = ("--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1")


def pytest_configure(config):
    """Settings that the workers and the processes that tests start take over."""
    if hasattr(config, "workerinput"):
        return
    keep_programs(config)
    if "XLA_FLAGS" not in os.environ:
        pass_flags(config)


def keep_programs(config):
    """What takes long to compile is compiled once: resumed commands make their programs again, as do other tests."""
    folder = tempfile.TemporaryDirectory(prefix="tkfac_jax-programs-")
    config.add_cleanup(folder.cleanup)
    for name, value in (
        ("jax_compilation_cache_dir", folder.name),
        ("jax_persistent_cache_min_compile_time_secs", 0.3),
    ):
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


def pass_flags(config):
    """Passes XLA the flags of the above that it knows."""
    cache, key = getattr(config, "cache", None), f"xla_flags/{jaxlib.__version__}"
    known = cache and cache.get(key, None)
    if known is None:
        known = known_flags()
        if cache:
            cache.set(key, known)
    os.environ["XLA_FLAGS"] = " ".join(known)


def known_flags():
    """Those that this release of XLA knows: a process with one that it does not know ends."""
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    probes = {
        flag: subprocess.Popen(
            command,
            env=os.environ | {"XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for flag in XLA_FLAGS
    }
    return [flag for flag, probe in probes.items() if probe.wait() == 0]


@pytest.fixture(autouse=True)
def kernels_of_more_entries_are_large(monkeypatch):
    """The tests' layers are small; of most networks some keep their bias apart now, and some do not."""
    monkeypatch.setattr("tkfac_jax.layers.spec.LARGEST_JOINED", 40)


@pytest.fixture
def set_constant(monkeypatch):
    """Sets a constant of the package for a test; the program that optimizers share was made with another."""
    # Not above, where the package would be imported without the checks of its types.
    from tkfac_jax.curvature.state import _initial_curvature

    def set_to(name, value):
        _initial_curvature.clear_cache()
        monkeypatch.setattr(name, value)

    yield set_to
    _initial_curvature.clear_cache()


@pytest.fixture(params=["own", "accelerator"])
def platform(request, monkeypatch):
    """What is computed on this platform, and what is on platforms of which the package knows nothing."""
    if request.param != "own":
        monkeypatch.setattr(
            "jax.lax.platform_dependent", lambda *args, default, **_: default(*args)
        )
    return request.param


@pytest.fixture
def keys():
    """An endless supply of fixed keys."""

    def generate():
        key = jax.random.key(0)
        while True:
            key, new = jax.random.split(key)
            yield new

    return generate()


@pytest.fixture
def unchecked():
    """Switches the run-time type checks off, so that wrong arguments meet the package's own messages."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
