# `make test` runs the tests that CI runs. PYTHON is the interpreter of the environment: make PYTHON=python3.12 setup
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.stamp
# JOBS test files run in parallel, and the tests of one file in sequence.
JOBS         ?= 2
SIDE_BY_SIDE := --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

# Otherwise pyright's wrapper looks for a newer version on the network at every call.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.PHONY: setup test test-quick lint types imports demo demo-long r3gan-demo gpu-check clean
.DEFAULT_GOAL := test

setup: $(STAMP)

# The stamp is made last, so that an interrupted installation is repeated.
$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[demo,dev]'
	touch $@

test: setup
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

test-quick: setup
	$(BIN)/python -m pytest -m "not slow and not distributed" $(SIDE_BY_SIDE)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# pyright needs node, which its package does not contain. If the system has none, the one from PyPI is installed.
# Otherwise pyright would download a build from nodejs.org.
types: setup
	command -v node >/dev/null || $(BIN)/python -m pip install --disable-pip-version-check 'pyright[nodejs]'
	$(BIN)/pyright

imports: setup
	$(BIN)/lint-imports

demo: setup
	$(BIN)/python demo/run.py configs/demo.yaml

demo-long: setup
	$(BIN)/python demo/run.py configs/demo-long.yaml

r3gan-demo: setup
	$(BIN)/python demo/run.py configs/r3gan-demo.yaml

# Everything that a GPU should be asked, as a table, in less than eight minutes.
gpu-check: setup
	$(BIN)/python benchmarks/gpu_check.py

# Data and runs are not removed, because they may be hours of work.
clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
