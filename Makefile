PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
NEWEST := .venv-newest
PEERS := .venv-peers
INSTALLED := $(VENV)/installed

# Threads of the LAPACK library would compete with XLA's own.
export OPENBLAS_NUM_THREADS ?= 1

# What `make peers` installs kfac-jax from, a URL or a directory: its last release, 0.0.8, runs only with JAX 0.8.3.
KFAC_JAX ?= git+https://github.com/google-deepmind/kfac-jax

# What runs on the oldest and the newest releases: the tests that meet the most of the APIs of JAX, Flax and Optax.
RELEASE_TESTS := \
  tests/curvature/test_precondition.py \
  tests/layers/test_composed_layers.py::test_attention \
  tests/layers/test_register.py \
  tests/optimizers/test_adaptive.py::test_make_train_step_equals_the_step_by_hand \
  tests/optimizers/test_objective.py \
  tests/optimizers/test_plan.py::test_every_optimizer_tells_what_it_was_built_with \
  'tests/optimizers/test_plan.py::test_micro_batches_are_averaged_over_the_axis_of_the_optimizer[True]' \
  'tests/optimizers/test_plan.py::test_what_drops_the_plan_is_told_it_or_the_arguments[chain]' \
  'tests/training/test_distributed.py::test_jit_over_a_mesh[AxisType.Explicit-sharded]' \
  'tests/training/test_distributed.py::test_make_train_step_over_a_mesh[apart]' \
  'tests/training/test_distributed.py::test_pmap[False]' \
  'tests/training/test_distributed.py::test_shard_map[True-True]' \
  tests/training/test_train_state.py

# The newest Python from 3.12 on that runs, on PATH or among pyenv's. One of pyenv's shims may exist and yet not run.
NEWEST_PYTHON ?= $(shell \
  IFS=:; for folder in $$PATH "$$(pyenv root 2>&-)"/versions/*/bin "$$HOME"/.pyenv/versions/*/bin; do \
    for python in "$$folder"/python3.[0-9] "$$folder"/python3.[0-9][0-9]; do \
      "$$python" -c 'import ensurepip, sys, venv; v = sys.version_info; \
        v >= (3, 12) and v.releaselevel == "final" and print(*v[:3], sys.executable)' 2>&-; \
    done; \
  done | sort -k1,1n -k2,2n -k3,3n | tail -n 1 | cut -d ' ' -f 4)

.PHONY: demo test test-oldest test-newest peers lint clean

# Trains a small network on scikit-learn's digits with six optimizers.
demo: $(INSTALLED)
	$(VENV)/bin/python -m benchmarks.digits

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest --numprocesses=2 --dist=worksteal

# A selection of the tests on the oldest releases that pyproject.toml admits.
test-oldest: $(OLDEST)/installed
	$(OLDEST)/bin/python -m pytest --numprocesses=2 --dist=worksteal $(RELEASE_TESTS)

# The same on the newest releases, which want a newer Python than 3.11.
test-newest:
	@if test -e $(NEWEST)/installed || test -n '$(NEWEST_PYTHON)'; then \
	  $(MAKE) --no-print-directory run-newest; \
	else \
	  echo 'test-newest is skipped: there is no Python 3.12 or newer; NEWEST_PYTHON=... names one'; \
	fi

.PHONY: run-newest
run-newest: $(NEWEST)/installed
	$(NEWEST)/bin/python -m pytest --numprocesses=2 --dist=worksteal $(RELEASE_TESTS)

# The environments of the two above.
.PHONY: environments
environments: $(OLDEST)/installed
	@if test -n '$(NEWEST_PYTHON)'; then $(MAKE) --no-print-directory $(NEWEST)/installed; fi

# An environment in which the benchmarks have kfac-jax to compare with: $(PEERS)/bin/python -m benchmarks...
peers: $(PEERS)/installed

$(PEERS)/installed: pyproject.toml
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --upgrade pip
	$(PEERS)/bin/python -m pip install --quiet --editable '.[test]' '$(KFAC_JAX)'
	touch $@

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --editable '.[dev]'
	touch $@

$(OLDEST)/installed: pyproject.toml constraints/oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip
	$(OLDEST)/bin/python -m pip install --quiet --constraint constraints/oldest.txt --editable '.[test]'
	touch $@

$(NEWEST)/installed: pyproject.toml
	$(NEWEST_PYTHON) -m venv --clear $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --upgrade pip
	$(NEWEST)/bin/python -m pip install --quiet --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) $(NEWEST) $(PEERS) results .pytest_cache .ruff_cache
