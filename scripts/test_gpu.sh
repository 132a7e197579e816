#!/usr/bin/env bash
# The tests for a machine with a GPU: what needs one, then the handoff's own cases over KV caches on
# it, over gRPC and, where two GPUs are, over NCCL. PYTHON is one with PyTorch and vLLM for CUDA.
set -uo pipefail
cd "$(dirname "$0")/.."
run() { "${PYTHON:-.venv/bin/python}" -m pytest -q "$@" || failed=1; }

failed=0
run -m gpu tests/gpu "$@"
run tests/handoff --device cuda "$@"
if (($(nvidia-smi --list-gpus | wc -l) > 1)); then
  run tests/handoff --device cuda --transport nccl "$@"
fi
exit "$failed"
