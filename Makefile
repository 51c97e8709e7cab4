# `make demo` and `make test` set up by themselves on a fresh machine; `make help` lists the rest.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.modelstore
PYTEST := $(BIN)/python -m pytest

ENGINES := .venv-engines

.PHONY: help setup demo test test-fast engines test-engines lint format docs bench clean

help:  ## list what can be made
	@sed -n 's/^\([a-z-]*\):.*##/make \1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 18

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[all,dev]'
	touch $@

setup: $(STAMP)  ## make .venv with everything in it

demo: $(STAMP)  ## save, read, slice, export and mend a real model
	$(BIN)/modelstore demo

test: $(STAMP)  ## run all tests
	$(PYTEST) -n 2 --dist loadfile --no-loadscope-reorder

test-fast: $(STAMP)  ## run the tests that take no time
	$(PYTEST) -n 2 --dist loadfile --no-loadscope-reorder -m 'not slow'

$(ENGINES)/.installed: tests/engines/install.py constraints.txt pyproject.toml
	test -x $(ENGINES)/bin/python || $(PYTHON) -m venv $(ENGINES)
	$(ENGINES)/bin/python -m pip install --quiet --upgrade pip packaging
	$(ENGINES)/bin/python tests/engines/install.py
	touch $@

engines: $(ENGINES)/.installed  ## make .venv-engines with vLLM, PEFT and diffusers

test-engines: $(ENGINES)/.installed  ## load exports in those
	$(ENGINES)/bin/python -m pytest tests/engines

lint: $(STAMP)  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)  ## build the site of the pages, build/docs/index.html; a broken link is an error
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	$(BIN)/sphinx-build -q -W --keep-going -b html docs build/docs

bench: $(STAMP)  ## measure against other tools (installs them)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[bench]'
	$(BIN)/python benchmarks/run.py

clean:  ## remove everything that was made
	rm -rf .venv .venv-engines .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
