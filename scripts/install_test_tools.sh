#!/usr/bin/env bash
# Installs what tests use beside Python, from Debian: nftables, iproute2, util-linux, faketime, prometheus (with
# promtool), prometheus-alertmanager (with amtool).
#
# Installs only what is missing, and only as root on a system with apt. Elsewhere it says what is missing and
# succeeds: tests that need a tool skip and name it.
# Usage: scripts/install_test_tools.sh
set -euo pipefail
export PATH="$PATH:/usr/sbin:/sbin"

declare -A commands=(
  [nftables]=nft [iproute2]=ip [util-linux]=unshare [faketime]=faketime [prometheus]=promtool
  [prometheus-alertmanager]=amtool
)
missing=()
for package in "${!commands[@]}"; do
  command -v "${commands[$package]}" >/dev/null || missing+=("$package")
done
if [ ${#missing[@]} -eq 0 ]; then
  exit 0
fi
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
  echo "missing: ${missing[*]}; the tests that need them will be skipped" >&2
  exit 0
fi
export DEBIAN_FRONTEND=noninteractive
patient=(-o Acquire::Retries=5 -o DPkg::Lock::Timeout=120)
install() { # no daemon is started: tests start their own
  RUNLEVEL=1 apt-get "${patient[@]}" install --quiet --quiet --yes --no-install-recommends "${missing[@]}"
}
install || { apt-get "${patient[@]}" update --quiet --quiet && install; }
