# Everything from a fresh clone: `make demo` and `make test` make their own environment in .venv.
# PYTHON=/path/to/python takes another than the newest there is.
PYTHON ?= $(shell .ci/python)
BIN := .venv/bin

.PHONY: demo test suite all-tests lint format docs notebooks clean

demo: .venv/installed
	$(BIN)/paramlens demo

test: .venv/dev
	$(MAKE) --jobs 2 lint suite

suite: .venv/dev
	$(BIN)/pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

all-tests: .venv/dev lint
	$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -m ''

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

docs: .venv/dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

notebooks: .venv/dev
	$(BIN)/pytest tests/test_notebooks.py -k runs -m '' --overwrite

clean:
	rm -rf .venv build dist site

.venv/bin/python:
	@test -n '$(PYTHON)' || { echo 'No Python 3.11 or newer that can make an environment was found: install one (with its venv module), or give PYTHON=/path/to/python' >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	touch $@

.venv/dev: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@
