#!/usr/bin/env bash
# Resolve pyproject.toml into requirements/{cpu,gpu,dev}.txt with uv.
# Existing pins are kept where they still fit; UPGRADE=1 takes the newest of everything.
set -euo pipefail
cd "$(dirname "$0")/.."

uv=${UV:-uv}
command -v "$uv" >/dev/null || { echo "lock: needs uv (pip install uv), or UV=/path/to/uv" >&2; exit 1; }

# lock NAME HEADER [uv arguments...]: write requirements/NAME.txt.
lock() {
  local name=$1 header=$2 out=requirements/$1.txt pins
  shift 2
  pins=$(mktemp)
  if [[ -f $out && -z ${UPGRADE:-} ]]; then cp "$out" "$pins"; fi
  "$uv" pip compile pyproject.toml "$@" --quiet --no-header --no-annotate \
    --python-version 3.11 --python-platform x86_64-manylinux_2_28 --output-file "$pins"
  { printf '# Made by scripts/lock.sh. Install with pip install --no-deps -r.\n%s' "$header"; cat "$pins"; } >"$out"
  rm -f "$pins"
}

lock cpu "\
# Without torch (see torch-cpu.txt), torchvision, torchaudio, torchcodec and triton: the CUDA builds a
# resolver picks break transformers beside a CPU torch ('operator torchvision::nms does not exist').
" requirements/cpu.in --extra cpu --excludes requirements/cpu.excludes
lock gpu "# Linux x86_64; torch in its CUDA build.
" --extra gpu
lock dev "# What a checkout needs on top of cpu.txt, at the same versions where the two overlap.
" --extra dev --extra cpu --constraints requirements/cpu.txt requirements/cpu.in --excludes requirements/cpu.excludes

# dev.txt keeps only what cpu.txt does not already hold.
added=$(grep -vxFf <(grep '==' requirements/cpu.txt) requirements/dev.txt)
echo "$added" >requirements/dev.txt
grep -c '==' requirements/{cpu,gpu,dev}.txt
