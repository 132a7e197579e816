#!/usr/bin/env bash
# Create .venv and install pdserve with exactly what the lock files name, for CPUs.
# Does nothing when nothing changed; goes on where an interrupted run stopped.
#   PYTHON=python3.12   the interpreter for a new .venv (3.11 or later)
#   TORCH_INDEX=URL     where PyTorch's CPU builds are, when pip's own sources have none
set -euo pipefail
cd "$(dirname "$0")/.."

key() { # names the state that a finished setup reaches
  { cat requirements/*.txt pyproject.toml setup.py scripts/setup.sh; grep '^version' .venv/pyvenv.cfg; pwd; } 2>/dev/null |
    sha256sum | cut -c1-64
}
done_already() { [[ -x .venv/bin/python && -e .venv/.pdserve-setup-$(key) ]]; }

if done_already; then exec scripts/protoc.sh; fi
if command -v flock >/dev/null; then
  exec 9<scripts/setup.sh # two setups at once would trip over each other
  flock 9
  if done_already; then exec scripts/protoc.sh; fi
fi

logs=$(mktemp -d)
stop() { for job in $(jobs -p); do kill -- "-$job" 2>/dev/null || true; done; rm -rf "$logs"; }
trap stop EXIT
trap 'echo; echo "setup: interrupted; run it again to go on" >&2; exit 130' INT TERM

fail() { printf '\nsetup: %s\n' "$1" >&2; exit 1; }
step() { step_no=$((${step_no:-0} + 1)); began=$SECONDS; printf '[%d/5] %s\n' "$step_no" "$1"; }
ok() { printf '      done in %d s\n' $((SECONDS - began)); }
pip() { .venv/bin/python -m pip "$@" --disable-pip-version-check --no-input --progress-bar off; }

find_python() {
  local found
  for found in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
    "$found" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))' 2>/dev/null &&
      echo "$found" && return
  done
  return 1
}

make_venv() {
  if .venv/bin/python -m pip --version >/dev/null 2>&1; then return; fi
  local python
  python=$(find_python) || fail "needs Python 3.11 to 3.14; name it with PYTHON=/path/to/python"
  "$python" -m venv --clear .venv >"$logs/venv" 2>&1 ||
    { cat "$logs/venv" >&2; fail "'$python -m venv' failed; on Debian or Ubuntu: apt-get install python3-venv"; }
}

install_torch() { # only a local version (+cpu) is sure to be the CPU build
  local torch
  torch=$(grep -o '^torch==[0-9.]*' requirements/torch-cpu.txt)+cpu
  pip install --no-compile --no-deps "$torch" ||
    pip install --no-compile --no-deps --retries 2 "$torch" \
      --index-url "${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}"
}

install_locked() { # one shard of the lock files: every $2-th line from $1
  cat requirements/{cpu,dev}.txt | grep '==' | awk -v i="$1" -v n="$2" 'NR % n == i' >"$logs/shard$1"
  pip install --no-compile --no-deps -r "$logs/shard$1"
}

install_all() { # downloads wait for the network, unpacking for a core: run them side by side
  local shards=3 i pids=() names=(torch) bad=0 total last=$SECONDS n
  local noise='^(Collecting|Requirement already|Looking in|WARNING: Location|  )'
  # An install cut short leaves metadata without a RECORD, which pip would take for installed.
  for i in .venv/lib/python3*/site-packages/*.dist-info; do
    if [[ -d $i && ! -s $i/RECORD ]]; then rm -rf "$i"; fi
  done
  set -m # a process group for each, so that all of it can be stopped
  install_torch >"$logs/torch.log" 2>&1 </dev/null & pids+=($!)
  for ((i = 0; i < shards; i++)); do
    install_locked "$i" "$shards" >"$logs/lock$i.log" 2>&1 </dev/null & pids+=($!); names+=("lock$i")
  done
  set +m
  total=$(cat requirements/{cpu,dev,torch-cpu}.txt | grep -c '==')
  while [[ -n $(jobs -rp) ]]; do
    sleep 1
    n=$(cat "$logs"/*.log | grep -cE '^(Collecting|Requirement already)' || true)
    if [[ -t 1 ]]; then printf '      %d of %d packages found\r' "$n" "$total"
    elif ((SECONDS - last >= 30)); then last=$SECONDS; echo "      $n of $total packages found"; fi
  done
  for i in "${!pids[@]}"; do
    wait "${pids[$i]}" || { bad=1; grep -vE "$noise" "$logs/${names[$i]}.log" >&2 || true; }
  done
  ((bad == 0)) || fail "pip could not install everything; the lines above say why. What is there is kept: run it again to go on"
}

# Byte code of what the cluster's processes import: an engine is three that import all of vLLM, and
# without it each would compile all of that, at every start where Python may not write it down.
write_bytecode() {
  env -u PYTHONDONTWRITEBYTECODE .venv/bin/python -W ignore - >"$logs/bytecode" 2>&1 <<'END'
import cluster.cli.up, cluster.control.actors, cluster.control.controller, router.server
import cluster.engine.cpu_worker, cluster.engine.vllm, cluster.kv.connector, cluster.kv.worker_extension
import ray._private.workers.default_worker, ray.dashboard.agent, ray.scripts.scripts
import vllm.model_executor.models.llama, vllm.v1.attention.backends.cpu_attn, vllm.v1.engine.core
END
}

step "Python environment in .venv"; make_venv; ok
goal=$(key) # now, so that a file edited meanwhile is installed next time
step "Packages (about 1 GB the first time)"; install_all; ok
step "Protobuf modules"; rm -f proto/.generated; scripts/protoc.sh; ok
step "pdserve itself"
pip install --no-compile --no-deps --no-build-isolation --editable . >"$logs/self" 2>&1 ||
  { cat "$logs/self" >&2; fail "pdserve did not install"; }
ok
step "Byte code of what engines import"
write_bytecode || { tail -1 "$logs/bytecode" >&2; echo "setup: engines will not start: pdserve doctor says more" >&2; }
ok
rm -f .venv/.pdserve-setup-*
touch ".venv/.pdserve-setup-$goal"
echo "Set up in $SECONDS s."
