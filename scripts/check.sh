#!/usr/bin/env bash
# The unit and the property tests, each on a core of its own. With arguments it is pytest over both.
set -uo pipefail
cd "$(dirname "$0")/.."
run() { .venv/bin/python -m pytest -q -m "not gpu and not slow" "$@"; }
if (($#)); then run tests/unit tests/property "$@"; exit; fi

said=$(mktemp)
run tests/property >"$said" 2>&1 &
other=$!
trap 'kill "$other" 2>/dev/null; rm -f "$said"' EXIT
trap 'exit 130' INT TERM

run tests/unit
failed=$?
wait "$other" || failed=$?
echo "Properties:"
cat "$said"
exit "$failed"
