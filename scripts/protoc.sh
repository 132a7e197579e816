#!/usr/bin/env bash
# Generate proto/pdserve/v1/*_pb2*.py(i) where a schema is newer than what was last generated.
set -euo pipefail
cd "$(dirname "$0")/../proto"

stamp=.generated
current() {
  local file
  [[ -e $stamp && -z $(find pdserve -name '*.proto' -newer $stamp) ]] || return 1
  for file in pdserve/v1/*.proto; do [[ -e ${file%.proto}_pb2.py ]] || return 1; done
  for file in pdserve/v1/*_pb2.py; do [[ -e ${file%_pb2.py}.proto ]] || return 1; done
}
if current; then exit 0; fi

new=$(mktemp -d)
trap 'rm -rf "$new"' EXIT
touch "$new/stamp" # before reading: a schema saved meanwhile is newer
../.venv/bin/python -m grpc_tools.protoc -I . --python_out="$new" --pyi_out="$new" \
  --grpc_python_out="$new" pdserve/v1/*.proto
for old in pdserve/v1/*_pb2*; do [[ -e $new/$old ]] || rm -f "$old"; done
cp "$new"/pdserve/v1/* pdserve/v1/
touch -r "$new/stamp" $stamp
