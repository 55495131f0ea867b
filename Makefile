# One command for each thing a person wants to do; every one makes the virtual environment it needs.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The CPU build of torch is pinned: an unpinned one may bring gigabytes of CUDA libraries.
TORCH ?= torch==2.13.0
ENVIRONMENTS := $(wildcard environments/*)
RECIPE ?= recipes/tiny/reverse.toml

.PHONY: help install demo test test-slow test-gpu test-agent check format bench docs clean

help:
	@echo "make demo            install, then the whole job on a tiny model: evaluate, SFT, RL, evaluate, report"
	@echo "make test            install with the test extras, run the tests"
	@echo "make check           format, lint, strict types, architecture"
	@echo "make bench NAME=...  install the peer of a benchmark and run it: $(patsubst benchmarks/%.py,%,$(wildcard benchmarks/*.py))"
	@echo "make test-gpu        the tests that need a CUDA device"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.train: $(BIN)/python pyproject.toml $(wildcard environments/*/pyproject.toml)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[train]" $(foreach e,$(ENVIRONMENTS),-e $(e))
	@touch $@

$(VENV)/.dev: $(VENV)/.train
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	@touch $@

install: $(VENV)/.train

demo: $(VENV)/.train
	$(BIN)/hone run $(RECIPE)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not slow and not gpu and not cluster and not network"

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m "slow and not gpu and not cluster and not network"

test-gpu: $(VENV)/.dev
	$(BIN)/python -m pytest -m gpu

# An agent program has its own dependencies, so it gets its own virtual environment.
$(VENV)/agent/bin/mini: $(BIN)/python
	$(PYTHON) -m venv $(VENV)/agent
	$(VENV)/agent/bin/python -m pip install --quiet "mini-swe-agent>=2.4,<3"

test-agent: $(VENV)/.dev $(VENV)/agent/bin/mini
	HONE_TEST_MINI=$(abspath $(VENV))/agent/bin/mini $(BIN)/python -m pytest -m slow tests/envs/harness

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_architecture.py

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.dev
	$(BIN)/python -m hone.config.explain docs/reference
	$(BIN)/python -m hone.envs.reference docs/reference
	$(BIN)/python -m hone.sandbox.reference docs/reference

bench: $(VENV)/.dev
	@test -n "$(NAME)" || { echo "give NAME=..., one of: $(patsubst benchmarks/%.py,%,$(wildcard benchmarks/*.py))"; exit 2; }
	@extra=$$(sed -n 's/^# extra: //p' benchmarks/$(NAME).py); \
	  if [ -n "$$extra" ]; then $(BIN)/python -m pip install --quiet -e ".[$$extra]"; fi
	$(BIN)/python benchmarks/$(NAME).py $(ARGS)

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
