# make test runs what CI runs; PYTHON picks the interpreter the environment is made with: make PYTHON=python3.12 setup
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.stamp
# Test files at a time, the tests of one file in turn: most of a test's time passes in processes that start.
JOBS         ?= 2
SIDE_BY_SIDE := --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

# Or pyright's wrapper asks the network whether a newer one exists, each time.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.PHONY: setup test test-quick lint types imports demo demo-long clean
.DEFAULT_GOAL := test

setup: $(STAMP)

# The stamp is the last step, so an installation cut short is repeated.
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

# pyright brings its program along but not node: the system's will do, else the one that PyPI has, where pyright left
# alone would download a build from nodejs.org.
types: setup
	command -v node >/dev/null || $(BIN)/python -m pip install --disable-pip-version-check 'pyright[nodejs]'
	$(BIN)/pyright

imports: setup
	$(BIN)/lint-imports

demo: setup
	$(BIN)/python demo/run.py configs/demo.yaml

demo-long: setup
	$(BIN)/python demo/run.py configs/demo-long.yaml

# Data and runs are kept: they may be hours of work.
clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
