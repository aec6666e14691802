PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0  # what the tests run with; the package itself takes a range
BIN = $(VENV)/bin

.PHONY: setup test lint demo bench

setup: $(VENV)/.all  ## a virtual environment with everything

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(TORCH)

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml
	$(BIN)/pip install -e '.[local,eval]'
	touch $@

$(VENV)/.all: $(VENV)/bin/python pyproject.toml
	$(BIN)/pip install -e '.[dev]'
	touch $@

demo: $(VENV)/.demo  ## rerank real passages with mini
	$(BIN)/python examples/plain_rerank.py

test: setup  ## all tests
	$(BIN)/python -m pytest

lint: setup  ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: setup  ## the tables of the docs that need no data of their own
	$(BIN)/python benchmarks/full_size.py
