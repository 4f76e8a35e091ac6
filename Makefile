# make demo: set everything up in .venv and run the H3S quick start.  make test: the same set-up, then the tests.
# PYTHON=/path/to/python3.x chooses the interpreter; JOBS=n the number of test processes.
.DEFAULT_GOAL := help
.PHONY: help setup demo demo-again alh3 test test-full lint docs clean distclean

BIN := .venv/bin
JOBS ?= $(shell n=$$(env -u OMP_NUM_THREADS nproc 2> /dev/null || echo 2); [ $$n -gt 4 ] && echo 4 || echo $$n)
COVERAGE ?= 85
PYTEST_ARGS ?=
SOAK_MINUTES ?= 120
# compiled modules are kept, or every process that a test starts compiles the package anew: a second each
PYTEST := env -u PYTHONPATH -u PYTHONDONTWRITEBYTECODE OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p no:cacheprovider -n $(JOBS) --dist loadgroup $(PYTEST_ARGS)

help:
	@echo "make demo       set up .venv and run the H3S quick start in demo/"
	@echo "make demo-again the quick start anew, the old demo/ removed"
	@echo "make alh3       set up .venv and run AlH3 from nothing with Quantum ESPRESSO in alh3/: hours; goes on where it was"
	@echo "make test       set up .venv and run the tests"
	@echo "make test-full  all tests, lowest and newest versions, $(SOAK_MINUTES) minutes of faults (SOAK_MINUTES=n), known vulnerabilities: hours"
	@echo "make setup | lint | docs | clean | distclean"

setup:
	@.ci/setup

demo: setup
	@.ci/demo

demo-again: setup
	@rm -rf demo
	@.ci/demo

alh3: setup
	@.ci/alh3

test: setup
	@$(PYTEST) -m "not full"

test-full: setup
	@JOBS=$(JOBS) COVERAGE=$(COVERAGE) SOAK_MINUTES=$(SOAK_MINUTES) PYTEST_ARGS="$(PYTEST_ARGS)" .ci/full

lint: setup
	@$(BIN)/ruff check magus_anharmonic tests inputs
	@$(BIN)/ruff format --check magus_anharmonic tests inputs

docs: setup
	@$(BIN)/python docs/make_keys.py
	@$(BIN)/python docs/make_columns.py
	@$(BIN)/python docs/make_api.py
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict --config-file .ci/mkdocs.yml
	@echo "build/docs/index.html"

clean:
	rm -rf dist build .coverage .coverage.* .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find magus_anharmonic tests inputs docs -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv demo
