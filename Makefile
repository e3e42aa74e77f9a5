PYTHON ?= python3
BIN := .venv/bin

.PHONY: install test lint types slow demo clean

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

test: lint types
	$(BIN)/python -m pytest

slow: install
	$(BIN)/python -m pytest -m slow

demo: install
	$(BIN)/labelpenet demo --out demo

clean:
	rm -rf demo .pytest_cache .ruff_cache .mypy_cache
