"""Several benchmarks at once on one accelerator: they compile side by side, and take their times one after the other.

A compiler for GPUs tries many programs for each product of matrices and takes minutes, on cores that one process does
not fill. Processes that are given the same file wait for each other, so that none is timed while another compiles.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path


class Turns:
    """What processes that lock the same file agree on: any number of them compile, or a single one takes its times."""

    def __init__(self, path: Path | None = None):
        """Without a file there is nothing to wait for."""
        self.path = path

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Together with others, while none takes its times."""
        with self._locked(shared=True):
            yield

    @contextlib.contextmanager
    def timing(self) -> Iterator[None]:
        """Alone: waits until no other process compiles or takes its times."""
        with self._locked(shared=False):
            yield

    @contextlib.contextmanager
    def _locked(self, *, shared: bool) -> Iterator[None]:
        if self.path is None:
            yield
            return
        # Not on Windows, where nothing is asked of it without a file.
        import fcntl

        with self.path.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
            yield
