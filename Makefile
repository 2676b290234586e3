# Every target sets up what it needs; `make` alone lists them.
PYTHON ?= python3
# pip takes the CPU build where one is on offer; anything pip understands may stand here, such as
# TORCH="torch==2.13.0 --index-url URL".
TORCH ?= torch==2.13.0
ARGS ?=

BIN := .venv/bin
READY := .venv/.ready
TOOLS := .venv/.tools
# Byte-compiling all of torch and transformers takes longer than installing them.
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help venv weights demo test lint format check

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(TOOLS) ## create .venv with torch, ttspec and the development tools

$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) $(TORCH)
	$(PIP) --editable .
	touch $@

$(TOOLS): $(READY)
	$(PIP) --editable '.[dev]'
	touch $@

weights: $(READY) ## fetch and convert the built-in target, once
	$(BIN)/python -c 'from ttspec.models.source import resolve; resolve("smollm2-135m", notify=print)'

demo: $(READY) ## show what drafting, copying and learning do, on the built-in pair (options: ARGS="--tokens 2500")
	$(BIN)/ttspec demo $(ARGS)

# Tests start processes of their own: without bytecode each would compile torch's sources again.
test: venv weights ## run the tests (options: ARGS="-k words")
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest $(ARGS)

lint: venv ## check format, style, types and import floors
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: venv ## rewrite the code in the house format
	$(BIN)/ruff check --fix --quiet || true
	$(BIN)/ruff format

check: lint test ## all of lint, and the tests
