# `make help` lists the targets. VENV=path takes another virtual environment than .venv, made if it is not there.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
ACCELERATE := $(BIN)/accelerate launch --config_file recipes/accelerate/cpu.yaml
# Says from which checkout, and from which dependencies, the package was installed last.
STAMP := $(VENV)/.installed-trl-dt2it
STATE := $(CURDIR) $(shell cksum pyproject.toml)

export HF_HUB_DISABLE_TELEMETRY ?= 1
export TOKENIZERS_PARALLELISM ?= false

.DEFAULT_GOAL := help

.PHONY: help
help:  ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 18

# $(call pip_install,EXTRAS): unless it is done, with these extras or with all of dev's.
define pip_install
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@case "$$(cat $(STAMP) 2>/dev/null)" in "$(STATE) [dev]"|"$(STATE) $(1)") ;; *) \
		echo "Installing into $(VENV); the first time takes some minutes."; \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.$(1)' \
		&& echo "$(STATE) $(1)" > $(STAMP);; esac
endef

.PHONY: install
install:  ## Make the virtual environment and install the package into it, where that is not done
	$(call pip_install,)

.PHONY: install-dev
install-dev:  ## The same with what the tests and checks need
	$(call pip_install,[dev])

.PHONY: demo
demo: install  ## The whole pipeline on real handwriting, from biased and noisy preferences to a report (under 10 minutes on 2 cores)
	$(ACCELERATE) recipes/dt2it.py --config recipes/configs/dt2it_digits.yaml

.PHONY: train-digits
train-digits: install  ## Train a small reward model on handwritten digits (a few minutes on 2 cores)
	$(ACCELERATE) recipes/train_reward_model.py --config recipes/configs/digits.yaml

.PHONY: test
test: install-dev  ## Run the tests (under 15 minutes on 2 cores)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

.PHONY: test-oldest test-newest
test-oldest:  ## Run the tests with the lower bounds of all dependencies, in .venv-oldest
	tools/test_versions.sh oldest
test-newest:  ## Run the tests with the newest releases of all dependencies, in .venv-newest
	tools/test_versions.sh newest

.PHONY: check
check: install-dev  ## Lint, formatting, types, layers and spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/typos

.PHONY: format
format: install-dev  ## Put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: docs
docs: install-dev  ## Build the documentation into site/
	$(BIN)/mkdocs build --strict

.PHONY: screenshots
screenshots: install-dev  ## Make the screenshots of docs/images from the report of `make demo` and the site (needs Chromium)
	$(BIN)/python tools/screenshots.py report
	$(MAKE) docs  # which shows pictures of the report
	$(BIN)/python tools/screenshots.py site

BENCHMARKS := digits_seeds demo_seeds shared_prefix_exactness launches shared_prefix group_pairs group_quality input_pipeline token_packing step_profile data_throughput decontamination t2i_digits style_bias style_audit_coverage blind_audit cluster_intervals debias_training distill_digits best_of_n reward_uncertainty curation_quality curation_in_run curation_scale callback_kills rounds_kills scoring_throughput scoring_workers score_dataset_kills

.PHONY: bench
bench: install-dev  ## Measure; each benchmark prints a table and writes it into benchmarks/results (about two hours)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	@for name in $(BENCHMARKS); do echo "== $$name"; $(BIN)/python benchmarks/$$name.py || exit 1; done

.PHONY: bench-peers
bench-peers: install-dev  ## Measure against other trainers, which are installed into WORKDIR (15 GB)
	@test -n "$(WORKDIR)" || { echo "Say where to install the other trainers: make bench-peers WORKDIR=path"; exit 1; }
	$(BIN)/python benchmarks/peers/run_peers.py $(WORKDIR)

.PHONY: bench-vllm
bench-vllm: install-dev  ## Compare rewards with a real vLLM server, which is installed into WORKDIR (8 GB)
	@test -n "$(WORKDIR)" || { echo "Say where to install vLLM: make bench-vllm WORKDIR=path"; exit 1; }
	$(BIN)/python benchmarks/vllm_parity.py $(WORKDIR)

.PHONY: clean
clean:  ## Remove what the other targets made, but for the virtual environment
	rm -rf outputs site build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
