# make sweep | make test | make bench | make lint — each sets up what it needs in .venv first.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# the environment must be on PATH: `mlflow models serve` calls uvicorn by name
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: setup sweep test lint bench packages

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	@echo "setting up $(VENV): a minute or two, more where packages must be downloaded"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

sweep: setup  ## the whole softness sweep on the embedded story world
	$(BIN)/python pipelines/spo_sweep.py

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint  ## two workers, one thread each; the longest file first
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests/test_story_world.py tests

bench: setup  ## speed and memory beside the peers, into tests/benchmarks/RESULTS.md; nothing else should run
	$(BIN)/python -m pip install --quiet --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python tests/benchmarks/run.py

packages: setup  ## compile the pipelines; a test compares the result with what is checked in
	$(BIN)/python pipelines/spo_pipeline.py compile
	$(BIN)/python pipelines/spo_sweep.py compile
