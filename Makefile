# `make help` lists the targets. Everything runs in .venv, which the first target that needs it creates.

PYTHON  ?= python3

BIN    := .venv/bin
STAMP  := .venv/.installed
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no \
          --dynamo_backend no

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-slow lint clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv and install everything (again when the pins change)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "worldmodel needs Python 3.11 or newer and '$(PYTHON)' is not that." \
	       "Name another one, e.g.: make $(or $(MAKECMDGOALS),setup) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch -e ".[test,dev]"
	@touch $@

demo: $(STAMP) ## write videos, train AdaSSL-V and BYOL on them, forecast, report (minutes on two CPU cores)
	$(BIN)/python scripts/make_moving_mnist.py --out data/moving_mnist
	$(LAUNCH) scripts/train.py --config configs/demo.yaml --resume
	$(LAUNCH) scripts/train.py --config configs/demo_byol.yaml --resume
	$(BIN)/python scripts/evaluate.py --run runs/demo_byol
	$(BIN)/python scripts/evaluate.py --run runs/demo --compare runs/demo_byol

# Most tests use one core; files stay together, as what they share is made once in a process.
test: $(STAMP) ## run the fast tests, on two cores
	$(BIN)/python -m pytest -q -m "not slow" --numprocesses 2 --dist loadfile

test-slow: $(STAMP) ## run the slow tests
	$(BIN)/python -m pytest -q -m slow

lint: $(STAMP) ## check style (ruff) and types (mypy)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean: ## remove .venv, caches and build outputs; data/ and runs/ stay
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
