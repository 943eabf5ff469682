# This needs Python 3.11 or newer (fmedge on a device 3.10); everything is installed into .venv and nothing outside this folder changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Exactly this version first: it is the one that fmedge is tested with, and on machines without a GPU its CPU build is
# taken where one is offered.
TORCH := torch==2.13.0
# A worker for each core, as far as memory goes; each takes the tests that another has left.
PYTEST := $(BIN)/pytest --numprocesses auto --maxprocesses 8 --dist worksteal

.PHONY: quickstart test test-fast test-all test-gpu lint clean

quickstart: $(VENV)/.quickstart  ## Train, export and run a small model on this machine.
	$(BIN)/python examples/quickstart.py

test: $(VENV)/.dev lint  ## Everything that CI runs.
	$(PYTEST) -m "not slow"

test-fast: $(VENV)/.dev lint  ## The tests that take seconds.
	$(PYTEST) -m "not slow and not medium"

test-all: $(VENV)/.dev lint  ## Also what takes an hour: every architecture that transformers has.
	$(PYTEST)

test-gpu: $(VENV)/.dev  ## The tests that need an NVIDIA GPU and onnxruntime-gpu.
	$(BIN)/pytest -m gpu --run-gpu

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/vermin --quiet --no-tips --violations --target=3.10- fmedge converters runtimes
	$(BIN)/lint-imports

$(VENV)/.dev: pyproject.toml | $(VENV)/.torch
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $(VENV)/.dev $(VENV)/.quickstart

$(VENV)/.quickstart: pyproject.toml | $(VENV)/.torch
	$(BIN)/pip install --quiet --editable ".[cpu,export,train]"
	touch $@

$(VENV)/.torch:
	$(PYTHON) -c "import sys; sys.exit(0 if sys.version_info >= (3, 11) else 'exporting and the tests need Python 3.11 or newer')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH)
	touch $@

clean:  ## Remove the environment and what the quickstart made.
	rm -rf $(VENV) out
