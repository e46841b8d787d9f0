# What CI runs and what people type; `make help` lists it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A chosen torch build, for example `make setup TORCH_INDEX=URL` with the index of a CUDA or CPU build.
TORCH_INDEX ?=
STAMP := $(VENV)/.installed
PROTO_VENV ?= .venv-protos
SEEDS ?= 2000
BENCHMARKS := optimizer transport exchange training network scaling stragglers memory recovery durability gpu
FAULTS ?= 1000
# Seconds between two faults, on average.
EVERY ?= 1
# The oldest grpcio-tools whose stubs the supported runtimes accept.
GRPCIO_TOOLS := 1.76.0

.DEFAULT_GOAL := help
.PHONY: help setup train test simulate chaos e2e-compose check lint types imports protos protos-check format bench bench-check bench-baseline clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(STAMP)  ## Make the virtual environment and install everything

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifneq ($(TORCH_INDEX),)
	$(BIN)/python -m pip install --quiet -c constraints.txt --index-url $(TORCH_INDEX) torch
endif
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[worker,plot,hf,dev]'
	@touch $@

train: setup  ## Train the default GPT on this host: 1 coordinator, 2 shards, 2 workers
	$(BIN)/windlass train

test: setup  ## Run all tests
	$(BIN)/python -m pytest -q

# `make simulate SEEDS=1000000` for a night; what fails is printed with its seed.
simulate: setup  ## Run whole clusters on a simulated machine, 2,000 seeds unless SEEDS says otherwise; a tenth more without standbys, and rough ones
	PYTHONPATH=. $(BIN)/python -m tests.simulation --seeds $(SEEDS)
	PYTHONPATH=. $(BIN)/python -m tests.simulation --seeds $$(( $(SEEDS) / 10 )) --standbys 0
	PYTHONPATH=. $(BIN)/python -m tests.simulation --seeds $$(( $(SEEDS) / 10 )) --rough

# Some 45 minutes for 1,000 faults; the report goes to runs/bench/chaos.json too.
chaos: setup  ## Strike processes of a real run at random, 1,000 faults unless FAULTS says otherwise; compare the result
	PYTHONPATH=. $(BIN)/python benchmarks/bench_chaos.py --faults $(FAULTS) --every $(EVERY)

# As root: it kills the containers' processes from outside. The variables of compose.yaml, such as TORCH_INDEX, count.
e2e-compose: setup  ## Build the images, train in containers, kill some, see that nothing is left; needs Docker
	WINDLASS_DOCKER=1 $(BIN)/python -m pytest -q tests/e2e/test_compose.py

check: setup lint types imports protos-check  ## Everything that reads the code: ruff, mypy, import-linter, stub drift

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

imports: setup
	$(BIN)/lint-imports --no-cache

$(PROTO_VENV)/.installed:
	$(PYTHON) -m venv $(PROTO_VENV)
	$(PROTO_VENV)/bin/python -m pip install --quiet grpcio-tools==$(GRPCIO_TOOLS) setuptools
	@touch $@

protos: $(PROTO_VENV)/.installed  ## Make the stubs from protos/ps/v1/*.proto
	PYTHON=$(PROTO_VENV)/bin/python protos/generate.sh

protos-check: $(PROTO_VENV)/.installed
	@fresh=$$(mktemp -d) && PYTHON=$(PROTO_VENV)/bin/python protos/generate.sh "$$fresh" && \
	for stub in protos/ps/v1/*_pb2*; do \
		cmp "$$stub" "$$fresh/$$stub" || { echo "$$stub differs from its .proto: run make protos"; exit 1; }; \
	done && rm -r "$$fresh"

format: setup  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# One that misses a bound does not keep the next ones from running.
bench: setup  ## Run the benchmarks; each prints a table and writes JSON
	@missed=; for name in $(BENCHMARKS); do \
		echo "bench_$$name"; PYTHONPATH=. $(BIN)/python benchmarks/bench_$$name.py || missed="$$missed $$name"; \
	done; test -z "$$missed" || { echo "a bound is missed, or it failed:$$missed"; exit 1; }

bench-check: setup  ## Run short benchmarks; fail when a ratio has fallen below 0.8 of its committed figure
	PYTHONPATH=. $(BIN)/python benchmarks/regressions.py

bench-baseline: setup  ## Make what short benchmarks measure now the committed figures
	PYTHONPATH=. $(BIN)/python benchmarks/regressions.py --write

clean:  ## Remove what the targets made, but no run
	rm -rf $(VENV) $(PROTO_VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
