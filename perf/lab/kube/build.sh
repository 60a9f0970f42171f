#!/usr/bin/env bash
# Builds the programs of a real Kubernetes node (1.20: API server, controller manager, scheduler, kubelet, kube-proxy) from
# Debian's source package, and installs what they run on. Minutes the first time, nothing afterwards.
# Result: $TAPIO_KUBE/bin. Needs root and a Debian that has the source package.
set -euo pipefail
KUBE=${TAPIO_KUBE:-/tmp/kube}
PROGRAMS="kube-apiserver kube-controller-manager kube-scheduler kubelet kube-proxy"
TOOLS="etcd containerd runc ctr iptables conntrack kubectl openssl gcc python3 nsenter ip"

is_built() { for program in $PROGRAMS; do [ -x "$KUBE/bin/$program" ] || return 1; done; }
has_tools() { for tool in $TOOLS; do command -v "$tool" >/dev/null || return 1; done; [ -x /bin/busybox ] && [ -x /usr/lib/cni/bridge ]; }
is_built && has_tools && exit 0

if ! has_tools; then
  apt-get install -y -qq etcd-server containerd runc iptables iproute2 containernetworking-plugins busybox-static \
    gcc libc6-dev socat conntrack ethtool openssl python3 >/dev/null
  command -v kubectl >/dev/null || apt-get install -y -qq kubernetes-client >/dev/null
fi
is_built && exit 0

mkdir -p "$KUBE"/{src,bin,apt/lists/partial,apt/cache/archives/partial}
# The source package comes from the mirror that this machine uses already, through lists of its own.
mirror=$(apt-cache policy | awk '$3 == "bookworm/main" {print $2; exit}' || true)
[ -n "$mirror" ] || { echo "build.sh: apt knows no mirror of Debian bookworm (apt-get update, on Debian 12)" >&2; exit 1; }
echo "deb-src [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror bookworm main" > "$KUBE/apt/sources.list"
APT="-o Dir::Etc::sourcelist=$KUBE/apt/sources.list -o Dir::Etc::sourceparts=/dev/null
     -o Dir::State::Lists=$KUBE/apt/lists -o Dir::Cache=$KUBE/apt/cache"
# shellcheck disable=SC2086 # a list of options
apt-get $APT update -qq
apt-get install -y -qq golang-1.19-go rsync jq make >/dev/null
cd "$KUBE/src"
# shellcheck disable=SC2086
apt-get $APT source -qq --download-only kubernetes
tar xzf kubernetes_1.20*.orig.tar.gz --strip-components=1
export PATH=/usr/lib/go-1.19/bin:$PATH GOFLAGS=-mod=vendor GO111MODULE=on GOCACHE=$KUBE/gocache GOPATH=$KUBE/gopath
export KUBE_GIT_VERSION=v1.20.2 KUBE_GIT_TREE_STATE=clean KUBE_GIT_MAJOR=1 KUBE_GIT_MINOR=20
export KUBE_GIT_COMMIT=faecb196815e248d3ecfb03c680a4507229c2a56
make WHAT="$(for program in $PROGRAMS; do printf 'cmd/%s ' "$program"; done)" > "$KUBE/build.log" 2>&1 ||
  { tail -n 20 "$KUBE/build.log" >&2; exit 1; }
for program in $PROGRAMS; do cp "_output/local/go/bin/$program" "$KUBE/bin/"; done
