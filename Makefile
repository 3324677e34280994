# Two commands on a fresh machine: `make quickstart` and `make test`. Each makes .venv first where it is missing.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help quickstart test lint bench clean

help:
	@echo "make quickstart   pretrain MAE, MFF and MoCo v3 on synthetic micrographs, compare with scratch (minutes on a laptop)"
	@echo "make test         the test suite"
	@echo "make lint         format, lint and type checks"
	@echo "make bench        images per second beside transformers' Trainer, on this machine"

.venv: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

quickstart: .venv
	$(BIN)/emssl study --config quickstart

test: .venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests

bench: .venv
	$(BIN)/emssl bench --json bench.json

lint: .venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf .venv build dist *.egg-info runs/quickstart
