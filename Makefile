# `make help` lists the targets. VENV=path takes another virtual environment than .venv, made if it is not there.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
ACCELERATE := $(BIN)/accelerate launch --config_file recipes/accelerate/cpu.yaml
# What the pip install is made from: it is done again when one of these changes.
INSTALLED := $(VENV)/.installed-trl-dt2it

export HF_HUB_DISABLE_TELEMETRY ?= 1
export TOKENIZERS_PARALLELISM ?= false

.DEFAULT_GOAL := help

.PHONY: help
help:  ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 18

$(INSTALLED): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

.PHONY: install
install: $(INSTALLED)  ## Make the virtual environment and install the package into it

.PHONY: demo
demo: train-digits  ## From nothing to a trained reward model: install, train on real handwriting, evaluate, score

.PHONY: train-digits
train-digits: install  ## Train a small reward model on handwritten digits (a few minutes on 2 cores)
	$(ACCELERATE) recipes/train_reward_model.py --config recipes/configs/digits.yaml

.PHONY: test
test: install  ## Run the tests (under 15 minutes on 2 cores)
	$(BIN)/python -m pytest

.PHONY: check
check: install  ## Lint, formatting, types and spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/typos

.PHONY: format
format: install  ## Put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: docs
docs: install  ## Build the documentation into site/
	$(BIN)/python -m pip install --quiet --disable-pip-version-check '.[docs]'
	$(BIN)/mkdocs build --strict

.PHONY: bench
bench: install  ## Measure; each benchmark prints a table and writes JSON into benchmarks/results
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

.PHONY: clean
clean:  ## Remove what the other targets made, but for the virtual environment
	rm -rf outputs site build dist .pytest_cache .mypy_cache .ruff_cache
