# Developer commands. PYTHON is the interpreter of the environment with `pip install -e ".[dev]"`.
PYTHON ?= .venv/bin/python

.PHONY: help check test test-all test-gpu examples docs gpu bench readme mutations fuzz build clean

help:            ## list these commands
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*##/:/'

check:           ## check lint, formatting and types
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

test:            ## run the fast tests
	$(PYTHON) -m pytest -n 2 --dist loadfile

test-all:        ## run the slow tests, too
	$(PYTHON) -m pytest -n 2 --dist loadfile -m "not gpu"

test-gpu:        ## run the tests that need CUDA
	$(PYTHON) -m pytest -m gpu

examples:        ## run the quickstart
	$(PYTHON) examples/quickstart.py

docs:            ## build the documentation into build/docs (needs `pip install -e ".[docs]"`)
	$(PYTHON) -m sphinx -W --keep-going -n -b html docs build/docs

gpu:             ## measure everything that needs CUDA, in at most nine minutes; writes gpu/gpu.md and gpu/gpu.json
	$(PYTHON) benchmarks/gpu.py

bench:           ## install the other libraries and run all benchmarks (an hour; two idle cores)
	$(PYTHON) -m pip install -e ".[bench]"
	$(PYTHON) benchmarks/limits.py
	$(PYTHON) benchmarks/compare.py --job head64 --json head64.json
	$(PYTHON) benchmarks/compare.py --job head224 --peer-epochs 2 --json head224.json
	$(PYTHON) benchmarks/compare.py --job full64 --repetitions 3 --json full64.json
	$(PYTHON) benchmarks/scaling.py --plot scaling.png
	$(PYTHON) benchmarks/search.py
	$(PYTHON) benchmarks/memory.py
	$(PYTHON) benchmarks/overhead.py

readme:          ## print the table of accuracy and seconds in README (half an hour, two idle cores; CIFAR10=its folder)
	$(PYTHON) benchmarks/quality.py --out readme.json --data cifar10=$(CIFAR10) --seeds 1 --methods \
		fine_tune:300,fine_tune:60,solve,pytorch_best,fastai_best,sklearn_best,keras_best,old
	$(PYTHON) benchmarks/quality.py --out readme.json --data cifar10=$(CIFAR10) --seeds 3 --methods \
		fine_tune:60,solve,pytorch_best,sklearn_best
	$(PYTHON) benchmarks/quality.py --table readme.json

mutations:       ## break what each guarantee depends on and check that a test fails (45 minutes)
	$(PYTHON) tests/run_mutations.py

fuzz:            ## mutate checkpoint and feature files for three minutes
	$(PYTHON) fuzz/fuzz_files.py --minutes 3

build:           ## build wheel and source archive
	$(PYTHON) -m build

clean:           ## remove build and cache folders
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
