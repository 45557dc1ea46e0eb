# `make help` lists the targets. Everything runs in .venv, which the first target that needs it creates.

PYTHON ?= python3

BIN     := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
RUNTIME := .venv/.installed
TESTS   := .venv/.installed-test
DOCS    := .venv/.installed-docs

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-slow lint docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(TESTS) ## create .venv and install the package with all extras and tools (again when the pins change)

$(RUNTIME): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "worldmodel needs Python 3.11 or newer, but '$(PYTHON)' is older or missing." \
	       "Name another one, e.g.: make $(or $(MAKECMDGOALS),setup) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(INSTALL) -e .
	@touch $@

$(TESTS): $(RUNTIME)
	$(INSTALL) -e ".[test,dev]"
	@touch $@

$(DOCS): $(RUNTIME)
	$(INSTALL) -e ".[docs]"
	@touch $@

demo: $(RUNTIME) ## write videos, train AdaSSL-V and BYOL on them, forecast, report (minutes on two CPU cores)
	$(BIN)/worldmodel videos moving-mnist --out data/moving_mnist
	$(BIN)/worldmodel train --config demo --resume
	$(BIN)/worldmodel train --config demo_byol --resume
	$(BIN)/worldmodel evaluate --run runs/demo_byol
	$(BIN)/worldmodel evaluate --run runs/demo --compare runs/demo_byol

# Most tests use one core, and some wait: three workers for two cores. The tests of a file run in one process, which
# creates their shared fixtures once. Files start in the order of tests/conftest.py, the longest first. Programs that
# tests start import compiled modules, even where the environment prevents Python from writing them.
test: export PYTHONDONTWRITEBYTECODE :=
test: $(TESTS) ## run the fast tests on two cores, and list the 20 slowest
	$(BIN)/python -m pytest -q -m "not slow" --durations=20 --numprocesses 3 --dist loadfile --no-loadscope-reorder

test-slow: $(TESTS) ## run the slow tests
	$(BIN)/python -m pytest -q -m slow --durations=20

lint: $(TESTS) ## check style (ruff) and types (mypy)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(DOCS) ## build the documentation into site/
	$(BIN)/mkdocs build --strict

clean: ## remove .venv, caches and build outputs; data/ and runs/ remain
	rm -rf .venv build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
