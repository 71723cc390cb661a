"""Benchmarks of tkfac_jax; each module is a command, `python -m benchmarks.NAME`."""
