#!/usr/bin/env bash
# Builds the control plane that tests/cluster runs: kube-apiserver, kube-controller-manager and kube-scheduler 1.20.2
# and etcd. Prints the directory of the binaries as its last line.
#
# Kubernetes is built from Debian's source package (which holds all that it needs) with Debian's Go; etcd is Debian's.
# Everything lies in ${XDG_CACHE_HOME:-~/.cache}/stillhouse/kubernetes-1.20.2; nothing is installed on the system, and
# what is there is not built again. Needs apt, and no root.
# Usage: scripts/build_kubernetes.sh
set -euo pipefail
umask 022

version=1.20.2
release=bookworm
cache="${XDG_CACHE_HOME:-$HOME/.cache}/stillhouse/kubernetes-$version"
programs=(kube-apiserver kube-controller-manager kube-scheduler)

if [ -e "$cache/complete" ]; then
  echo "$cache/bin"
  exit 0
fi
command -v apt-get dpkg >/dev/null || { echo "needs apt: the sources come from Debian" >&2; exit 1; }
work="$cache/work"
rm -rf "$work"
mkdir -p "$cache/bin" "$work"/{apt/lists/partial,apt/archives/partial,packages,source}

# An apt of its own, so that neither the system's lists nor its packages change.
keys=/usr/share/keyrings/debian-archive-keyring.gpg
cat >"$work/apt/sources.list" <<END
deb [signed-by=$keys] http://deb.debian.org/debian $release main
deb-src [signed-by=$keys] http://deb.debian.org/debian $release main
END
cat >"$work/apt/apt.conf" <<END
Dir::Etc::sourcelist "$work/apt/sources.list";
Dir::Etc::sourceparts "-";
Dir::State::lists "$work/apt/lists";
Dir::Cache "$work/apt";
APT::Sandbox::User "$(id -un)";
Debug::NoLocking "1";
END
export APT_CONFIG="$work/apt/apt.conf"
echo "fetching the sources of Kubernetes, Go and etcd from Debian" >&2
(
  cd "$work/packages"
  apt-get update --quiet --quiet
  apt-get source --quiet --quiet --download-only kubernetes
  apt-get download --quiet --quiet golang-1.19-go golang-1.19-src etcd-server
  for package in ./*.deb; do
    dpkg-deb --extract "$package" "$work/packages"
  done
) >&2
install -m 755 "$work/packages/usr/bin/etcd" "$cache/bin/etcd"

# The source takes its place in a GOPATH: this Go would ask the network for modules otherwise.
tree="$work/source/src/k8s.io/kubernetes"
mkdir -p "$tree"
tar --extract --gzip --strip-components=1 --directory "$tree" --file "$work"/packages/kubernetes_*"$version".orig.tar.gz
export GOROOT="$work/packages/usr/lib/go-1.19" GOPATH="$work/source" GOCACHE="$work/go-cache" GO111MODULE=off
export CGO_ENABLED=0 GOFLAGS=-trimpath
go="$GOROOT/bin/go"
cd "$tree"

# Of the generated code only the OpenAPI definitions are not in the package.
echo "generating the OpenAPI definitions" >&2
"$go" build -o "$work/openapi-gen" ./vendor/k8s.io/kube-openapi/cmd/openapi-gen
inputs=$(
  # Vendored packages are links into staging; the names that Go knows them by are those below vendor.
  { grep --recursive --files-with-matches --include='*.go' '+k8s:openapi-gen=' pkg
    cd staging/src && grep --recursive --files-with-matches --include='*.go' '+k8s:openapi-gen=' k8s.io |
      grep --invert-match -e '^k8s.io/code-generator/' -e '^k8s.io/sample-apiserver/' | sed 's,^,vendor/,'; } |
    xargs --max-args=1 dirname | LC_ALL=C sort --unique | sed 's,^,k8s.io/kubernetes/,' | paste --serial --delimiters=,
)
"$work/openapi-gen" --logtostderr --input-dirs "$inputs" --output-package k8s.io/kubernetes/pkg/generated/openapi \
  --output-base "$GOPATH/src" --output-file-base zz_generated.openapi \
  --go-header-file vendor/k8s.io/code-generator/hack/boilerplate.go.txt --report-filename "$work/violations" >&2

named=""
for package in client-go/pkg/version component-base/version; do
  named+=" -X k8s.io/kubernetes/vendor/k8s.io/$package.gitVersion=v$version"
  named+=" -X k8s.io/kubernetes/vendor/k8s.io/$package.gitMajor=1"
  named+=" -X k8s.io/kubernetes/vendor/k8s.io/$package.gitMinor=20"
done
for program in "${programs[@]}"; do
  echo "building $program" >&2
  "$go" build -ldflags "-s -w$named" -o "$cache/bin/$program" "./cmd/$program"
done
chmod -R u+w "$work" # Go's cache is read-only in places
rm -rf "$work"
touch "$cache/complete"
echo "$cache/bin"
