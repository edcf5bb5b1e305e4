# Everything a newcomer and CI need. Python 3.11 or newer; nothing else has to be installed.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
DEMO := out/demo
PEERS := .venv-peers
PEERS_STAMP := $(PEERS)/installed

.PHONY: help install demo test check fix bench chaos corruption fuzz clean

help:  ## show this
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

install: $(STAMP)  ## create .venv and install everything from constraints.txt

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

demo: install  ## pictures to captions, report, shards, checkpoint and new pictures, offline, in minutes
	PATH="$(abspath $(BIN)):$$PATH" sh jobs/demo/run.sh

test: install  ## run the tests
	$(BIN)/python -m pytest -q --durations=10 --numprocesses 2 --dist loadfile

check: install  ## lint, types, layers, module sizes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layering.py tests/test_contract.py

fix: install  ## format, and mend what the linter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# MosaicML Streaming wants older packages than ours: an environment of its own lies over .venv, for benchmarks alone.
$(PEERS_STAMP): benchmarks/peers.txt $(STAMP)
	$(PYTHON) -m venv --clear $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --no-deps --requirement benchmarks/peers.txt
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$($(PEERS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
	touch $(PEERS_STAMP)

bench: install $(PEERS_STAMP)  ## ratios against what one would use instead, measured side by side
	$(BIN)/python -m benchmarks.build_plan
	$(BIN)/python -m benchmarks.prepare_images
	$(BIN)/python -m benchmarks.run_pipeline
	$(BIN)/python -m benchmarks.read_shards
	$(BIN)/python -m benchmarks.count_nouns
	$(BIN)/python -m benchmarks.train_steps

chaos: install  ## kill workers, nodes and drivers at random, on a local disk and on an S3 server; compare every byte
	$(BIN)/python -m tests.chaos --storage local --kills 30
	$(BIN)/python -m tests.chaos --storage s3 --kills 30

corruption: install  ## damage a dataset in a thousand ways; each must be found, and none read in silence
	$(BIN)/python -m tests.corruption

fuzz: install  ## tag a hundred thousand hostile captions with the compiled engine and with NLTK; none may differ
	$(BIN)/python -m tests.fuzz

clean:  ## delete what the demo made
	rm -rf $(DEMO)
