# `make demo` and `make test` need no set-up: scripts/setup makes .venv first, and is done in a moment when it is there already.

.PHONY: help demo test lint format setup clean
.NOTPARALLEL:

unexport PYTHONHOME PYTHONPATH
BIN := .venv/bin

help:
	@echo 'make demo     train a small model, then answer an encrypted prompt (options: make demo ARGS="--quick")'
	@echo 'make test     lint, type check and tests (options for pytest: make test ARGS="-k wire")'
	@echo 'make lint     ruff and mypy alone'
	@echo 'make format   let ruff rewrite what it can'
	@echo 'make setup    make or refresh .venv alone'
	@echo 'make clean    remove .venv, caches and builds; keeps runs/'

demo: setup
	@$(BIN)/polyformer demo $(ARGS)

test: lint
	@$(BIN)/python -m pytest $(ARGS)

lint: setup
	@$(BIN)/python -m ruff check
	@$(BIN)/python -m ruff format --check
	@$(BIN)/python -m mypy

format: setup
	@$(BIN)/python -m ruff check --fix
	@$(BIN)/python -m ruff format

setup:
	@sh scripts/setup

clean:
	rm -rf .venv .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
