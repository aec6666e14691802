PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0  # the version of the tests; the package accepts a range
BIN = $(VENV)/bin

LOWEST = langchain-core==1.2.20 langchain==1.0.* langchain-classic==1.0.* langchain-tests==1.1.5 \
	langgraph==1.0.* langgraph-checkpoint==3.0.* langgraph-prebuilt==1.0.8 langgraph-sdk==0.2.* \
	llama-index-core==0.13.* 'llama-index-workflows<2'

CLIENTS = litellm==1.110.2 nvidia-haystack==3.0.0 dspy==3.4.1

.PHONY: setup test test-lowest test-clients lint demo bench docs release

setup: $(VENV)/.all  ## create the virtual environment with everything

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(TORCH)

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml
	$(BIN)/pip install -e '.[local]'
	touch $@

$(VENV)/.all: $(VENV)/bin/python pyproject.toml
	$(BIN)/pip install -e '.[dev]'
	touch $@

demo: $(VENV)/.demo  ## rerank the passages of the package with mini
	$(BIN)/mistral-rerank demo

test: setup  ## run all tests, one process per core
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

$(VENV)/lowest: pyproject.toml $(VENV)/.all
	$(BIN)/pip install --quiet --no-deps --upgrade --target $@ $(LOWEST)
	touch $@

test-lowest: $(VENV)/lowest  ## test the adapters in the oldest supported frameworks (OpenInference needs a newer LlamaIndex)
	PYTHONPATH=$(VENV)/lowest $(BIN)/python -m pytest tests/adapters -k "not llama_index_shows"

$(VENV)/clients: $(VENV)/.all
	$(BIN)/pip install --quiet --upgrade --target $@ $(CLIENTS) requests-mock
	$(BIN)/pip download --quiet --no-deps --no-binary :all: --dest $@ $(filter nvidia-haystack%,$(CLIENTS))
	tar -xzf $@/nvidia_haystack-*.tar.gz -C $@

test-clients: $(VENV)/clients  ## test LiteLLM and Haystack against the server, and the code for other frameworks (0.5 GB, not in CI)
	PYTHONPATH=$(VENV)/clients $(BIN)/python -m pytest tests/server/test_frameworks.py tests/test_other_frameworks.py

lint: setup  ## check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: setup  ## print the tables of the docs that need no data
	$(BIN)/python benchmarks/full_size.py
	$(BIN)/python benchmarks/local.py

docs: setup  ## build the docs site into site/; a broken link or anchor is an error
	PYTHONPATH=docs $(BIN)/python -m zensical build --clean --strict

release: setup  ## build the wheel and the source distribution of a clean checkout into dist/, and check both
	test -z "$$(git status --porcelain)"
	rm -rf dist
	$(BIN)/pip install --quiet build twine
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
