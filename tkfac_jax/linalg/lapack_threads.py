"""One thread for LAPACK inside XLA's programs on CPUs.

On CPUs, Cholesky factors, triangular solves and eigenvalues inside a compiled program are calls of SciPy's LAPACK,
most often OpenBLAS. Its threads wait for each other by spinning, on the cores on which XLA's threads
want to work: steps with new inverses can then take many times as long, more so while another process
keeps a core busy. OpenBLAS reads its environment variables when it is loaded, which is earlier than this package can
set them; the number of threads can be changed afterwards, too.
"""

import functools
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

# What OpenBLAS reads.
VARIABLES = (
    "OPENBLAS_NUM_THREADS",
    "OPENBLAS_DEFAULT_NUM_THREADS",
    "GOTO_NUM_THREADS",
    "OMP_NUM_THREADS",
)


def limit_lapack_threads() -> None:
    """Limits the OpenBLAS that JAX uses on CPUs to one thread, unless its environment variables are set.

    Happens once in a process, at the first call; later changes by others stay. `cholesky_inverse` and `diagnostics`
    call it while they are traced. Nothing happens where the CPU is not JAX's default backend, or where SciPy
    has another LAPACK (MKL, Accelerate).

    The limit holds for the whole process: SciPy's own linear algebra then has one thread as well. NumPy's does not
    change where it brings an OpenBLAS of its own, as in the wheels on PyPI. To choose the number of threads
    yourself, set `OPENBLAS_NUM_THREADS` before Python starts: then nothing is changed. An OpenBLAS built for OpenMP
    has a limit for each calling thread, out of reach from here: set `OMP_NUM_THREADS=1`.

    Example:
      >>> import tkfac_jax as tkfac
      >>> tkfac.limit_lapack_threads()  # for an `inverse=` of your own that calls LAPACK
    """
    if not any(map(os.environ.get, VARIABLES)) and jax.default_backend() == "cpu":
        _limit_once()


@functools.cache
def _limit_once() -> None:
    # A slow inverse is better than none, whatever libraries there are.
    try:
        for library in _libraries_of_scipy(_loaded_libraries()):
            library.set_num_threads(1)
            # From version 3.8 of threadpoolctl, the thread that has set a number keeps others from doing so.
            getattr(library, "clear_controlling_thread", lambda: None)()
    except Exception as error:
        warnings.warn(
            f"the threads of LAPACK could not be limited ({error!r}); steps with new inverses may be slow. "
            "Set OPENBLAS_NUM_THREADS=1 before Python starts.",
            stacklevel=2,
        )


def _loaded_libraries() -> list[Any]:
    """Controllers of all loaded copies of OpenBLAS, that of JAX among them."""
    # Importing it sets an environment variable, KMP_DUPLICATE_LIB_OK: not before it is needed.
    import scipy.linalg.cython_lapack  # noqa: F401 - loads the library, as JAX does when it compiles
    import threadpoolctl

    with warnings.catch_warnings():
        # It warns of other libraries, which are not the concern here.
        warnings.simplefilter("ignore")
        controller = threadpoolctl.ThreadpoolController()
        return controller.select(internal_api="openblas").lib_controllers


def _libraries_of_scipy(libraries: Iterable[Any]) -> list[Any]:
    """The copy in SciPy's wheel; without one, what no wheel has for itself and several packages share."""
    owners = [(_owner(Path(library.filepath)), library) for library in libraries]
    own = [library for owner, library in owners if owner == "scipy"]
    return own or [library for owner, library in owners if owner is None]


def _owner(path: Path) -> str | None:
    """The package whose wheel holds a library; None if it is installed for all."""
    folder = path.parent
    if folder.name == ".dylibs":
        return folder.parent.name
    return folder.name.removesuffix(".libs") if folder.name.endswith(".libs") else None
