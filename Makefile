# The commands a developer runs. PYTHON is the environment that `pip install -e ".[dev]"` went into.
PYTHON ?= .venv/bin/python

.PHONY: help check test test-all test-gpu examples bench build clean

help:            ## list these commands
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*##/:/'

check:           ## lint, formatting, types
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

test:            ## the tests that take seconds
	$(PYTHON) -m pytest

test-all:        ## the slow ones too
	$(PYTHON) -m pytest -m "not gpu"

test-gpu:        ## the ones that need CUDA
	$(PYTHON) -m pytest -m gpu

examples:        ## run the quickstart
	$(PYTHON) examples/quickstart.py

bench:           ## measure a training step on this machine
	$(PYTHON) benchmarks/host_memory.py
	$(PYTHON) benchmarks/frozen_depth.py

build:           ## wheel and source archive
	$(PYTHON) -m build

clean:           ## remove what the above left
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
