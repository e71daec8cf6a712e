# make quickstart    train a small model from nothing and score it, on this machine
# make test          lint, types and tests;  make test-slow: the tests that take minutes;  make lint: the first two
# make venv          only install;  make clean: remove what was installed and cached, never runs/
#
# All of it uses .venv, which is made once and again when pyproject.toml or the pinned versions change. A .venv that is
# there already is kept, so another build of the same torch version can be installed into it first.

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PINS := requirements/constraints.txt
INSTALL := $(BIN)/python -m pip install -qq --no-input --disable-pip-version-check -c $(PINS)
# One thread a process: two processes of tests side by side are faster than one with two threads.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

FITS := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))
PYTHON ?= $(shell for python in python3.11 python3; do $$python -c '$(FITS)' 2>/dev/null && echo $$python && break; done)

.PHONY: quickstart test test-slow lint venv clean

quickstart: $(READY)
	@$(BIN)/osum-npu quickstart

test: lint
	@$(PYTEST) -m "not slow" --cov=osum_npu --cov-report=term:skip-covered

test-slow: $(READY)
	@$(PYTEST) -m slow

lint: $(READY)
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

venv: $(READY)

$(READY): pyproject.toml $(PINS)
	@"$(PYTHON)" -c '$(FITS)' 2>/dev/null || { echo "wanted Python 3.10 or newer with venv; name it: make PYTHON=/path/to/python"; exit 1; }
	@echo "installing into $(VENV), once; torch is large, so this takes minutes"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(INSTALL) torch
	@$(INSTALL) -e '.[train,eval,quickstart,dev]'
	@touch $@

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
