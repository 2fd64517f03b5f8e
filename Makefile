# Every target does its own set-up: a fresh machine needs Python 3.11 with venv, make and the package registries.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
SOURCES := $(shell find protos -name '*.proto')
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.DEFAULT_GOAL := help
.PHONY: help install demo headline arm64 test check lint types protos bench clean

help: ## Say what can be made
	@echo "make demo                 the whole thing on one machine: plan, 3 agents, 5 sealed rounds, ONNX answers"
	@echo "make demo DATA=PATH       the same on your data: a folder with train.* and test.*, or one file"
	@echo "                          (CSV, JSONL or Parquet; columns by TEXT=... and LABEL=...)"
	@echo "make headline             federated beside centralised and local-only training, on public data, where they are:"
	@echo "                          DATA_ROOT=PATH (README.md of examples/headline); CASES=\"banking77 mnist\"; ROWS=400; CHOOSE=1; QUICK=1"
	@echo "make test                 all tests"
	@echo "make check                what CI runs: ruff, mypy, buf, import-linter, tests"
	@echo "make protos LANG=cpp      stubs for another language in gen/ (LANG=list names them)"
	@echo "make arm64                the demo with one agent on emulated 64-bit ARM (root, debootstrap, qemu-user-static)"
	@echo "make bench                seconds, bytes and memory of a round, beside bare gRPC"
	@echo "make install              the development environment in $(VENV)"
	@echo "make clean                remove $(VENV), gen, demo-run and headline-run"

$(STAMP): pyproject.toml constraints.txt hatch_build.py $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Fedloom needs Python 3.11 or later; choose one with PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

install: $(STAMP)

demo: $(STAMP)
	@$(BIN)/python -m examples.demo $(if $(DATA),--data $(DATA)) $(if $(TEXT),--text $(TEXT)) $(if $(LABEL),--label $(LABEL))

headline: $(STAMP)
	@$(BIN)/python -m examples.headline $(if $(DATA_ROOT),--data-root $(DATA_ROOT)) $(if $(CASES),--cases $(CASES)) $(if $(ROWS),--rows $(ROWS)) $(if $(CHOOSE),--choose) $(if $(QUICK),--quick)

arm64: $(STAMP)
	deploy/arm64/prove.sh

test: $(STAMP)
	$(BIN)/python -m pytest -n 4 --dist worksteal

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code
	$(BIN)/lint-imports

types: $(STAMP)
	$(BIN)/mypy

check: lint types test

# LANG is also the locale's variable: only a LANG given to make counts.
protos: $(STAMP)
ifeq ($(origin LANG),command line)
	@$(BIN)/python protos/generate.py $(if $(filter list,$(LANG)),--list,$(LANG))
else
	@$(BIN)/python protos/generate.py --list
endif

bench: $(STAMP)
	$(BIN)/python benchmarks/round_overhead.py

clean:
	rm -rf $(VENV) gen demo-run headline-run
