# The command surface of the repository. `make` prints this list; every target makes its own set-up and may be interrupted.

PRESET ?= laptop## laptop (CPU, minutes) or paper (GPU)
NB ?=## one notebook, by name or number: NB=03
GRID ?= smoke## section of the notebook's grid: smoke (minutes) or paper (GPUs)
DEVICES ?=## for grid and worker: 0,1 or UUIDs, or cpu,cpu; all visible GPUs by default
SCHEDULER ?=## a running Dask scheduler, such as tcp://head:8786
PYTHON ?= python3## the interpreter that makes .venv
PIP_ARGS ?=## more arguments for pip

SHELL := bash
.SHELLFLAGS := --norc -euo pipefail -c
MAKEFLAGS += --warn-undefined-variables --no-builtin-rules
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:# notebooks measure time: one at a time
.PHONY: help env doctor figures test browser lab claims reports grid worker faults clean

# An active conda environment is used as it is (`base` does not count); otherwise a private .venv is made.
CONDA_ENV := $(filter-out base,$(shell echo "$${CONDA_DEFAULT_ENV:-}"))
ifeq ($(CONDA_ENV),)
BIN := .venv/bin/
READY := .venv/.ready
else
BIN :=
READY := build/.ready-$(CONDA_ENV)
endif

ALL := $(basename $(notdir $(sort $(wildcard notebooks/*.ipynb))))
CHOSEN := $(if $(NB),$(filter $(NB) $(NB)_%,$(ALL)),$(ALL))
STAMPS := $(CHOSEN:%=build/stamps/$(PRESET)-%)
CODE := $(shell find corey kernels data/checkpoints data/samples data/published -type f -not -name '*.pyc' 2>/dev/null)

help:## this list
	@awk -F'[:?]?=?## ?' '/^[a-z]+:.*## /{split($$1, t, ":"); printf "  make %-9s %s\n", t[1], $$2}' $(MAKEFILE_LIST)
	@awk -F' [?]=|## ?' '/^[A-Z_]+ [?]=.*## /{printf "  %-14s %s\n", $$1 "=...", $$NF}' $(MAKEFILE_LIST)

env: $(READY)## set up: once, into .venv (or the active conda environment)

.venv/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else f"PYTHON: got {sys.version.split()[0]} at {sys.executable}, want 3.11 to 3.13 (make PYTHON=python3.12 ...)")'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --constraint constraints.txt $(PIP_ARGS) torch
	.venv/bin/python -m pip install --quiet --constraint constraints.txt $(PIP_ARGS) --editable '.[notebooks,longbench,batch,cuda,dev]'
	@touch $@

build/.ready-$(CONDA_ENV): environment.yml pyproject.toml
	python -c 'import corey, papermill, pandas, seaborn, transformers, lm_eval'
	@mkdir -p $(@D) && touch $@

doctor: $(READY)## what this machine has, what is broken, what to install
	@$(BIN)python -m corey.doctor

figures: $(STAMPS)## run the notebooks and draw figures/ (PRESET=, NB=)
	$(if $(CHOSEN),@echo "figures/ is up to date with PRESET=$(PRESET): $(CHOSEN)",$(error NB: got $(NB), want one of $(ALL)))

# A notebook is run again when it, its parameters or the code under it change. The ledger reads what the others measured.
build/stamps/$(PRESET)-%: notebooks/%.ipynb notebooks/grids/%.yaml $(CODE) $(READY)
	$(BIN)python -m corey.run $* --preset $(PRESET)
	@mkdir -p $(@D) && touch $@
build/stamps/$(PRESET)-09_claims: $(filter-out %-09_claims,$(STAMPS)) data/claims.yaml

test: $(READY)## the test suite
	$(BIN)python -m pytest -n 2 --dist loadfile -m 'not browser'

browser: $(READY)## JupyterLab and the report in a headless browser (installs playwright; Chromium must be there)
	$(BIN)python -m pip install --quiet --constraint constraints.txt $(PIP_ARGS) --editable '.[browser]'
	$(BIN)python -m pytest -m browser tests/test_browser.py

lab: $(READY)## JupyterLab on the notebooks, the quickstart first
	$(BIN)jupyter lab --ServerApp.root_dir=notebooks --LabApp.default_url=/lab/tree/00_quickstart.ipynb

claims: $(READY)## the verdict on every claim, from rows
	@$(BIN)python -m corey.claims

reports: figures## one HTML report: verdicts, notebooks, figures, provenance
	$(BIN)python -m corey.reports

grid: $(READY)## a notebook's parameter grid, one run a device (NB=, GRID=)
	$(if $(filter 1,$(words $(CHOSEN))),,$(error NB: got $(or $(NB),nothing), want one of $(ALL)))
	$(BIN)python -m corey.grid run $(CHOSEN) --section "$(GRID)" --devices "$(DEVICES)" --scheduler "$(SCHEDULER)"

worker: $(READY)## join this box to a scheduler, one worker a device (SCHEDULER=)
	$(BIN)python -m corey.grid worker "$(SCHEDULER)" --devices "$(DEVICES)"

faults: $(READY)## inject faults into the batch runner: rows in build/results
	$(BIN)python -m corey.faults

clean:## remove build/ (not .venv, not figures/)
	rm -rf build
