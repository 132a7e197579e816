# `make` alone lists the targets. All of them work from a fresh checkout.
PY := .venv/bin/python
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup proto demo test check gpu lint format bench lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile

setup: ## create .venv with everything for CPUs (does nothing when nothing changed)
	@scripts/setup.sh

proto: setup ## generate the protobuf modules where a schema changed

demo: setup ## start a cluster on this machine and send it requests
	@.venv/bin/pdserve demo $(ARGS)

test: lint ## lint, types, import contracts, then the whole test suite without GPUs
	@scripts/test.sh $(ARGS)

check: lint ## the same, with the unit and property tests only (under two minutes)
	@scripts/check.sh $(ARGS)

gpu: ## what needs a GPU: tests/gpu, and tests/handoff over caches there (PYTHON: where vLLM for GPUs is)
	@scripts/test_gpu.sh $(ARGS)

lint: setup ## ruff, mypy, import contracts, schema lint
	@.venv/bin/ruff check --quiet
	@.venv/bin/ruff format --check --quiet
	@$(PY) -m mypy --no-error-summary
	@out=$$(.venv/bin/lint-imports --no-logo) || { echo "$$out"; exit 1; }
	@.venv/bin/buf lint proto

format: setup ## rewrite the code to the house style
	@.venv/bin/ruff check --quiet --fix --exit-zero
	@.venv/bin/ruff format

bench: setup ## measure start-up, memory, TTFT and TPOT of a cluster on this machine
	@$(PY) bench/cluster_cpu.py $(ARGS)

lock: ## resolve the requirements again (needs uv; UPGRADE=1 takes the newest)
	@scripts/lock.sh

clean: ## remove what was generated, built or cached; .venv stays
	@rm -rf build dist *.egg-info .*_cache .hypothesis proto/.generated
	@rm -f proto/pdserve/v1/*_pb2*
	@find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
