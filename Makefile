PYTHON ?= python3
BIN := .venv/bin

.PHONY: install test lint types slow test-oldest demo docs clean

install: .venv/.installed

.venv/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

lint: install
	$(BIN)/ruff check labelpenet tests benchmarks
	$(BIN)/ruff format --check labelpenet tests benchmarks

types: install
	$(BIN)/mypy

# One file's tests stay together: what they share is made once.
test: lint types
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

slow: install
	$(BIN)/python -m pytest -m slow

# The tests with the oldest versions that pyproject.toml allows, in an environment of their own.
test-oldest:
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check uv
	.venv-oldest/bin/uv pip install --quiet --python .venv-oldest/bin/python --resolution lowest-direct -e '.[dev]'
	.venv-oldest/bin/python -m pytest

demo: install
	$(BIN)/labelpenet demo --out demo

# The documents with the API reference, in site/.
docs: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	$(BIN)/python -m mkdocs build --strict --quiet

clean:
	rm -rf demo site .pytest_cache .ruff_cache .mypy_cache
