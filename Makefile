# make quickstart    train a small model from nothing and score it, on this machine
# make test          lint, types and tests;  make test-slow: the tests that take minutes;  make lint: the first two
# make coverage      the tests once more, with the lines that none of them runs
# make test-npu      the tests on an emulated Ascend NPU, with the real torch_npu, in an environment of their own
# make venv          only install;  make clean: remove what was installed and cached, never runs/
#
# All of it uses .venv, which is made once and again when pyproject.toml or the pinned versions change. A .venv that is
# there already is kept, so another build of the same torch version can be installed into it first.

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TESTED := requirements/tested.txt
PIP := -m pip install -qq --no-compile --no-input --disable-pip-version-check -c $(TESTED)
# openai-whisper asks for triton, a gigabyte that only CUDA builds of torch use. So where all versions are listed (Python
# 3.11), the list is installed as it stands; before that, pip fills what the list leaves open.
LISTED = $$($(1) -c 'import sys; print("--no-deps" if sys.version_info >= (3, 11) else "")')
install = $(1) $(PIP) torch && $(1) $(PIP) $(LISTED) -r $(TESTED) $(2) && $(1) $(PIP) $(LISTED) --no-build-isolation -e '.[train,eval,quickstart,codecs,dev]'
# One thread a process: two processes of tests side by side are faster than one with two threads.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

FITS := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))
PYTHON ?= $(shell for python in python3.11 python3; do $$python -c '$(FITS)' 2>/dev/null && echo $$python && break; done)

# Compiled modules are kept, whatever the shell says: else each of many processes compiles torch anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart test test-slow test-npu coverage lint venv clean

quickstart: $(READY)
	@$(BIN)/osum-npu quickstart

test: lint
	@$(PYTEST) -m "not slow"

# Python before 3.12 takes up to twice as long when lines are traced.
coverage: $(READY)
	@$(PYTEST) -m "not slow" --cov=osum_npu --cov-report=term:skip-covered

test-slow: $(READY)
	@$(PYTEST) -m slow

NPU_VENV := .venv-npu

test-npu: $(NPU_VENV)/.ready
	@OMP_NUM_THREADS=1 $(NPU_VENV)/bin/python tests/npu_emulator run -- pytest -q -n 2 --dist loadfile -m emulated_npu tests/npu

$(NPU_VENV)/.ready: pyproject.toml $(TESTED) requirements/npu.txt
	@test -x $(NPU_VENV)/bin/python || $(PYTHON) -m venv $(NPU_VENV)
	@$(call install,$(NPU_VENV)/bin/python,-r requirements/npu.txt)
	@touch $@

lint: $(READY)
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

venv: $(READY)

$(READY): pyproject.toml $(TESTED)
	@"$(PYTHON)" -c '$(FITS)' 2>/dev/null || { echo "wanted Python 3.10 or newer with venv; name it: make PYTHON=/path/to/python"; exit 1; }
	@echo "installing into $(VENV), once; torch is large, so this takes minutes"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(call install,$(BIN)/python)
	@touch $@

clean:
	rm -rf $(VENV) $(NPU_VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
