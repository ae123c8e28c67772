#!/usr/bin/env bash
# Installs what `make image-test` builds and runs images with: podman, runc, debootstrap (Debian's own). Needs root.
# Usage: scripts/install_image_tools.sh
set -euo pipefail

packages=(podman buildah runc catatonit debootstrap)
missing=()
for package in "${packages[@]}"; do
  dpkg-query --show --showformat '${Status}' "$package" 2>/dev/null | grep -q '^install ok installed' || missing+=("$package")
done
[ ${#missing[@]} -gt 0 ] || exit 0
export DEBIAN_FRONTEND=noninteractive
install() { RUNLEVEL=1 apt-get install --quiet --quiet --yes --no-install-recommends "${missing[@]}"; }
install || { apt-get update --quiet --quiet && install; }
