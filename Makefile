# make demo   the whole pipeline on a small embedded corpus, set-up included
# make test   lint, types and tests, set-up included
# make help   the other targets

PYTHON ?= python3
# A package index for torch only; empty: the same as for the other packages. Where it is not given, that
# of the last time: an update must not replace torch's CPU build with the CUDA build.
TORCH_INDEX ?= $(shell cat $(VENV)/.torch_index 2>/dev/null)
# Worker processes of `make test` and `make test-slow`: one more than cores, since tests also wait.
WORKERS ?= 3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
OPS := .cache/.built
TYPES := .cache/mypy.log
PYTEST := $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# Set up again if the index differs from the last time.
ifneq ($(TORCH_INDEX),$(shell cat $(VENV)/.torch_index 2>/dev/null))
$(INSTALLED): always
endif

.PHONY: help setup demo test test-slow lint style clean system always

help:
	@echo 'make setup      install into $(VENV) and compile DeepSpeed'"'"'s CPU operator, once'
	@echo 'make demo       prepare, train, kill, resume, evaluate, generate, plot: under 8 minutes'
	@echo 'make test       lint, types and tests: some ten minutes on 2 cores'
	@echo 'make test-slow  the slow tests: some 35 minutes on 2 cores'
	@echo 'make lint       formatting, lint and types only'
	@echo 'make system     install Slurm and Chromium for tests, with apt-get as root; make test does it too'
	@echo 'make clean      remove what set-up and the demo created'
	@echo
	@echo 'PYTHON=python3.12   the interpreter, 3.11 or newer'
	@echo 'TORCH_INDEX=https://download.pytorch.org/whl/cpu   torch without CUDA: 3.2 GB instead of 6.4'

setup: $(INSTALLED) $(OPS)

$(INSTALLED): pyproject.toml constraints.txt
	@tools/set_up $(PYTHON) $(VENV) $(TORCH_INDEX)
	@touch $@

$(OPS): $(INSTALLED)
	@$(BIN)/python -m pretrain.training.engine
	@touch $@

demo: setup
	$(BIN)/python tools/demo.py

lint: style
	$(BIN)/mypy

style: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

system:
	@tools/system_packages

# mypy takes half a minute of one core, while the workers of pytest import and wait.
test: system style
	@echo '$(BIN)/mypy runs beside the tests; what it finds is printed after them'
	@$(BIN)/mypy > $(TYPES) 2>&1 & mypy=$$!; \
	$(PYTEST); tests=$$?; \
	wait $$mypy; types=$$?; \
	echo '$(BIN)/mypy'; cat $(TYPES); \
	test $$tests = 0 && test $$types = 0

test-slow: system setup
	$(PYTEST) -m slow --timeout 3600

clean:
	rm -rf $(VENV) .cache runs/demo data/stdlib data/stdlib_val
