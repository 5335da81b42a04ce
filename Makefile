# make demo   the whole pipeline on a small embedded corpus, set-up included
# make test   lint, types and tests, set-up included
# make help   the other targets

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
OPS := .cache/.built

.PHONY: help setup demo test test-slow lint clean

help:
	@echo 'make setup      install into $(VENV) and compile DeepSpeed'"'"'s CPU operator, once'
	@echo 'make demo       prepare, train, kill, resume, evaluate, generate, plot: under 8 minutes'
	@echo 'make test       lint, types and tests: under 20 minutes on 2 cores'
	@echo 'make test-slow  the tests that take longer'
	@echo 'make lint       formatting, lint and types alone'
	@echo 'make clean      remove what set-up and the demo made'
	@echo 'PYTHON=python3.12 make ... chooses the interpreter (3.11 or newer)'

setup: $(INSTALLED) $(OPS)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'Python 3.11 or newer is needed; name one: PYTHON=python3.12 make setup'; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(OPS): $(INSTALLED)
	$(BIN)/python -m pretrain.training.engine
	@touch $@

demo: setup
	$(BIN)/python tools/demo.py

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest

test-slow: setup
	$(BIN)/pytest -m slow --timeout 3600

clean:
	rm -rf $(VENV) .cache runs/demo data/stdlib data/stdlib_val
