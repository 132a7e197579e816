#!/usr/bin/env bash
# The whole test suite without GPUs, as two halves at once: what starts real engines and Ray clusters
# waits half of its time, and the rest keeps one core busy meanwhile. What offers load by the clock comes
# after them, alone. With arguments it is pytest.
set -uo pipefail
cd "$(dirname "$0")/.."
run() { .venv/bin/python -m pytest -q -m "$@"; }
if (($#)); then run "not gpu" "$@"; exit; fi

starting=(tests/cluster tests/engines tests/hosts)
said=$(mktemp)
run "not gpu and not paced" tests "${starting[@]/#/--ignore=}" >"$said" 2>&1 &
other=$!
trap 'kill "$other" 2>/dev/null; rm -f "$said"' EXIT
trap 'exit 130' INT TERM

run "not gpu and not paced" "${starting[@]}"
failed=$?
wait "$other" || failed=$?
echo "The other half:"
cat "$said"
echo "Load by the clock:"
run "paced and not gpu" tests || failed=$?
exit "$failed"
