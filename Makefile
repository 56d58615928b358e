# Everything a fresh machine needs is made here: `make quickstart` and `make test` want Python >= 3.10 and nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart test lint clean

quickstart: $(VENV)/.quickstart  ## prune, export and validate the bundled model, then say where the report is
	$(BIN)/vitprune-deploy build profiles/quickstart.yaml --out out/quickstart

test: $(VENV)/.test lint  ## lint, type check, unit tests, end-to-end tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not e2e' --numprocesses 2 --dist loadfile
	$(BIN)/python -m pytest -m e2e  # these measure, and have the machine to themselves

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "vitprune needs Python 3.10 or newer, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.quickstart: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[prune,cpu]'
	touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[prune,cpu,dev]'
	touch $@ $(VENV)/.quickstart

clean:
	rm -rf $(VENV) out build *.egg-info
