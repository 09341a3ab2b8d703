# Everything runs in .venv in this checkout; `make` alone lists what there is.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test lint clean
help:
	@echo "make demo   install, start the server, send the hosted API's request, save output.png"
	@echo "make test   install, run the tests"
	@echo "make lint   install, check style and types"
	@echo "make clean  remove what the others made"

# Installed once, and again only when the lock or the package's own description changes.
.venv/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Fulgurite needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: .venv/installed
	@$(BIN)/python examples/demo.py

test: .venv/installed
	$(BIN)/python -m pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build src/*.egg-info output*.png
	find . -name __pycache__ -prune -exec rm -rf {} +
