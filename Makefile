PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/installed

# Threads of the LAPACK library would compete with XLA's own.
export OPENBLAS_NUM_THREADS ?= 1

.PHONY: demo test lint clean

# Trains a small network on scikit-learn's digits with five optimizers.
demo: $(INSTALLED)
	$(VENV)/bin/python -m benchmarks.digits

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest --numprocesses=2

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --editable '.[dev]'
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) results .pytest_cache .ruff_cache
