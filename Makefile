# `make` lists the targets. Everything runs from .venv, which `make setup` builds from requirements.lock.

SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
DEPLOYMENT ?= examples/tiny-llama.yaml
# Whether tests that need a Kubernetes cluster run, too; where nobody can be asked they do.
CLUSTER ?= $(filter true,$(CI))
BIN := .venv/bin
READY := .venv/.ready

.PHONY: help setup serve test cluster cluster-down lint types contracts format generated proto lock bench hooks clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## build .venv from requirements.lock, again only when it or pyproject.toml changed

$(READY): requirements.lock pyproject.toml tools/setup.sh
	@tools/setup.sh $(PYTHON)
	@touch $@

serve: $(READY) ## serve the tiny Llama of examples/ in the foreground (another: DEPLOYMENT=file.yaml)
	@exec $(BIN)/arriero up $(DEPLOYMENT)

test: lint types contracts ## everything that this machine can check (CLUSTER=1: on a Kubernetes cluster, too)
	$(BIN)/pytest $(if $(CLUSTER),--cluster)

cluster: $(READY) ## a real two-node Kubernetes cluster on this machine (root)
	tools/cluster/packages.sh
	$(BIN)/python tools/cluster/build.py
	@$(BIN)/python -m tests.cluster up

cluster-down: $(READY) ## end it
	$(BIN)/python -m tests.cluster down

lint: $(READY) ## style, of the code and of the wire
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/buf lint
	tools/breaking.sh

types: $(READY) ## mypy, strict
	$(BIN)/mypy

contracts: $(READY) ## imports point down only
	$(BIN)/lint-imports --no-logo

format: $(READY) ## rewrite what a formatter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

generated: $(READY) ## write whatever is generated from the schemas and the chart (needs helm: make cluster)
	$(BIN)/python tools/crd.py
	$(BIN)/python tools/config_docs.py
	$(BIN)/python tools/dashboard.py
	$(BIN)/python tools/chart_docs.py
	$(BIN)/python -m tools.manifests

proto: $(READY) ## generate the Python code of proto/
	$(BIN)/python tools/proto.py

lock: $(READY) ## resolve pyproject.toml into requirements.lock (UPGRADE=1: to the newest versions)
	$(BIN)/uv pip compile pyproject.toml --universal --python-version 3.11 --extra worker --extra router --extra operator --extra dev --extra plot \
		--generate-hashes --no-emit-index-url --custom-compile-command 'make lock' --quiet \
		$(if $(UPGRADE),--upgrade) --output-file requirements.lock

bench: $(READY) ## the benchmarks of the engine, against its peers (needs a compiler for llama.cpp)
	$(BIN)/uv pip install --python $(BIN)/python --editable '.[bench]'
	$(BIN)/python benchmarks/scheduler.py
	$(BIN)/python benchmarks/engine_cpu.py

hooks: $(READY) ## check style before each commit
	$(BIN)/pre-commit install

clean: ## remove what was built
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
