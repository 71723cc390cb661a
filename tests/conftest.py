"""Configuration of all tests: float64 for the oracles, and four devices for what is mapped."""

import jax
import jaxtyping
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 4)
# The tests compile many small programs and run each once.
jax.config.update("jax_disable_most_optimizations", True)


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
