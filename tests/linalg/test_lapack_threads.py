import argparse
import json
import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from benchmarks import threads as benchmark
from tkfac_jax.linalg import cholesky, condition_numbers, lapack_threads

SCRIPT = """
import json, pathlib
import jax
import jax.numpy as jnp
import scipy.linalg.cython_lapack
import threadpoolctl
from tkfac_jax import cholesky_inverse
from tkfac_jax.linalg import lapack_threads

def openblas():
    controller = threadpoolctl.ThreadpoolController().select(internal_api="openblas")
    libraries = controller.lib_controllers
    of_scipy = [library.filepath for library in lapack_threads._libraries_of_scipy(libraries)]
    return {library.filepath: library.num_threads for library in libraries}, of_scipy

before, of_scipy = openblas()
jax.jit(cholesky_inverse).lower(jnp.eye(2)[None])
after, _ = openblas()
print(json.dumps([before, after, of_scipy]))
"""


@pytest.fixture
def without_cache():
    lapack_threads._limit_once.cache_clear()
    yield
    lapack_threads._limit_once.cache_clear()


@pytest.mark.parametrize("variables", [{}, {"OPENBLAS_NUM_THREADS": "2"}], ids=["none", "one"])
def test_the_first_inverse_leaves_lapack_one_thread_or_what_its_variable_says(variables):
    kept = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=kept | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    before, after, of_scipy = json.loads(done.stdout)
    if not of_scipy:
        pytest.skip("SciPy has no OpenBLAS here")
    for path, number in after.items():
        # On one core OpenBLAS has one thread, whatever it is told.
        assert before[path] > 1 or os.cpu_count() == 1
        # NumPy's own copy keeps its threads.
        limited = path in of_scipy and not variables
        assert number == (1 if limited else before[path])


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["site/numpy.libs/libscipy_openblas64_-1.so", "site/scipy.libs/libscipy_openblas-2.so"], [1]),
        (["site/numpy/.dylibs/libopenblas.dylib", "site/scipy/.dylibs/libopenblas.dylib"], [1]),
        (["env/lib/libopenblasp-r0.3.30.so", "site/opencv_python.libs/libopenblas.so"], [0]),
        (["site/numpy.libs/libscipy_openblas64_-1.so"], []),
        ([], []),
    ],
    ids=["wheels", "wheels of macOS", "shared", "MKL", "none"],
)  # fmt: skip
def test_only_the_library_that_jax_uses_is_limited(paths, expected):
    libraries = [SimpleNamespace(filepath=path) for path in paths]
    received = lapack_threads._libraries_of_scipy(libraries)
    assert received == [libraries[i] for i in expected]


@pytest.fixture
def libraries(monkeypatch, without_cache):
    """One copy of OpenBLAS, whose calls are written down, in an environment without variables."""
    for name in lapack_threads.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    calls = []
    library = SimpleNamespace(filepath="/lib/libopenblas.so", set_num_threads=calls.append)
    library.clear_controlling_thread = lambda: calls.append("cleared")
    monkeypatch.setattr(lapack_threads, "_loaded_libraries", lambda: [library])
    return calls


def test_the_limit_is_set_once(libraries):
    lapack_threads.limit_lapack_threads()
    lapack_threads.limit_lapack_threads()
    assert libraries == [1, "cleared"]


@pytest.mark.parametrize("name", lapack_threads.VARIABLES)
def test_variables_of_openblas_switch_the_limit_off(libraries, monkeypatch, name):
    monkeypatch.setenv(name, "3")
    lapack_threads.limit_lapack_threads()
    assert libraries == []


def test_nothing_is_limited_where_the_cpu_is_not_the_backend(libraries, monkeypatch):
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    lapack_threads.limit_lapack_threads()
    assert libraries == []


def test_a_library_that_cannot_be_limited_is_said_so(libraries, monkeypatch):
    def fail():
        raise FileNotFoundError

    monkeypatch.setattr(lapack_threads, "_loaded_libraries", fail)
    with pytest.warns(UserWarning, match="Set OPENBLAS_NUM_THREADS=1 before Python starts"):
        lapack_threads.limit_lapack_threads()


def test_a_process_without_openblas_goes_on_silently(libraries, monkeypatch):
    monkeypatch.setattr(lapack_threads, "_loaded_libraries", list)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lapack_threads.limit_lapack_threads()


@pytest.mark.parametrize(
    ("module", "traced"),
    [
        (cholesky, cholesky.cholesky_inverse),
        (condition_numbers, condition_numbers._eigenvalues),
    ],
    ids=["inverses", "eigenvalues"],
)
def test_what_calls_lapack_limits_its_threads(monkeypatch, module, traced):
    calls = []
    monkeypatch.setattr(module, "limit_lapack_threads", lambda: calls.append(None))
    jax.eval_shape(traced, jax.ShapeDtypeStruct((3, 2, 2), jnp.float32))
    assert calls


@pytest.mark.benchmark
def test_the_threads_command(tmp_path, monkeypatch, capsys):
    few = {name: benchmark.SETTINGS[name] for name in list(benchmark.SETTINGS)[:2]}
    monkeypatch.setattr(benchmark, "SETTINGS", few)
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    arguments = ["--widths", "6", "--batch-size", "8", "--turns", "2", "--steps", "2"]
    monkeypatch.setattr(sys, "argv", ["threads", *arguments, "--out-dir", str(tmp_path)])
    benchmark.main()
    results = json.loads((tmp_path / "threads.json").read_text())
    assert [run["setting"] for run in results["runs"]] == list(few)
    for run in results["runs"]:
        numbers = {load: len(steps) for load, steps in run["step_ms"].items()}
        assert numbers == dict.fromkeys(benchmark.LOADS, 4)
    assert capsys.readouterr().out.startswith("| setting")


def test_a_setting_has_its_own_variables_only(monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=1")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    started = []
    monkeypatch.setattr(
        benchmark.subprocess, "Popen", lambda *args, env, **kwargs: started.append(env)
    )
    options = argparse.Namespace(batch_size=8, widths=[6])
    for variables in benchmark.SETTINGS.values():
        benchmark.Worker(variables, options)
    for variables, env in zip(benchmark.SETTINGS.values(), started, strict=True):
        names = {n for n in env if n.endswith("_NUM_THREADS") or n == "GLIBC_TUNABLES"}
        assert {name: env[name] for name in names} == variables


@pytest.mark.benchmark
def test_the_benchmark_has_the_factors_of_the_autoencoder():
    model = benchmark.Autoencoder((784, 1000, 30))
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 784)))["params"]
    kernels = [params[f"Dense_{i}"]["kernel"].shape for i in range(4)]
    assert kernels == [(784, 1000), (1000, 30), (30, 1000), (1000, 784)]
