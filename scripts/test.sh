#!/usr/bin/env bash
# The whole test suite without GPUs, as two halves at once: what starts real engines and Ray clusters
# waits half of its time, and the rest keeps one core busy meanwhile. With arguments it is pytest.
set -uo pipefail
cd "$(dirname "$0")/.."
run() { .venv/bin/python -m pytest -q -m "not gpu" "$@"; }
if (($#)); then run "$@"; exit; fi

starting=(tests/cluster tests/engines tests/hosts)
said=$(mktemp)
run tests "${starting[@]/#/--ignore=}" >"$said" 2>&1 &
other=$!
trap 'kill "$other" 2>/dev/null; rm -f "$said"' EXIT
trap 'exit 130' INT TERM

run "${starting[@]}"
failed=$?
wait "$other" || failed=$?
echo "The other half:"
cat "$said"
exit "$failed"
