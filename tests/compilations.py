"""The programs that are compiled while something runs."""

import contextlib

import jax


@contextlib.contextmanager
def counted_compilations():
    """A list that gains an entry for each program that is compiled, or found in the cache on disk, in the context."""
    found = []

    def listener(event, duration, **facts):
        if event.endswith("backend_compile_duration"):
            found.append((duration, facts))

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        yield found
    finally:
        jax.monitoring.clear_event_listeners()
