# Everything runs in .venv in this checkout; `make` alone lists what there is.
PYTHON ?= python3
BIN := .venv/bin

PEERS := bench/peers/.venv
BENCH ?= --works spark
KERNELS := $(wildcard src/fulgurite/kernels/*.[ch])

.PHONY: help demo test lint bench clean
help:
	@echo "make demo   install, start the server, send the hosted API's request, save output.png"
	@echo "make test   install, run the tests"
	@echo "make lint   install, check style and types"
	@echo "make bench  install into an environment of its own, measure ours beside diffusers and OpenVINO;"
	@echo "            BENCH='--works sdxl-1024 --rounds 1' measures something else, BENCH=--help says what there is"
	@echo "make clean  remove what the others made"

# Installed once, and again only when the lock, the package's own description or what it compiles changes.
.venv/installed: requirements.lock pyproject.toml $(KERNELS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Fulgurite needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: .venv/installed
	@$(BIN)/python examples/demo.py

# Two processes: most tests keep one core busy. Those of a group, which share what takes long to start, are in one.
test: .venv/installed
	$(BIN)/python -m pytest --numprocesses 2 --dist loadgroup

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The peers are no part of what the package needs: they have an environment of their own.
$(PEERS)/installed: requirements.lock pyproject.toml $(KERNELS) bench/peers/requirements.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -r bench/peers/requirements.txt
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

bench: $(PEERS)/installed
	$(PEERS)/bin/python bench/compare.py $(BENCH)

clean:
	rm -rf .venv $(PEERS) .pytest_cache .mypy_cache .ruff_cache .hypothesis build src/*.egg-info src/fulgurite/kernels/*.so output*.png
	find . -name __pycache__ -prune -exec rm -rf {} +
