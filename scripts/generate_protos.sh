#!/usr/bin/env bash
# Writes the Python code of the contract: proto/stillhouse/v1/*_pb2*.py[i]. Never edit that code.
#
# The generator is old on purpose: code made by it imports under every protobuf and grpcio that
# pyproject.toml admits, code made by a new one refuses all but the newest.
# Usage: scripts/generate_protos.sh [OUT_DIR]    (default: proto)
set -euo pipefail
cd "$(dirname "$0")/.."
out="${1:-proto}"
if ! .venv-proto/bin/python -c "import grpc_tools" 2>/dev/null; then
  python3 -m venv --clear .venv-proto
  .venv-proto/bin/pip install --quiet grpcio-tools==1.71.2 setuptools==78.1.1
fi
mkdir -p "$out"
.venv-proto/bin/python -m grpc_tools.protoc --proto_path=proto --python_out="$out" --pyi_out="$out" \
  --grpc_python_out="$out" proto/stillhouse/v1/teacher.proto
