#!/usr/bin/env bash
# Ends what up.sh started, by the ids that it wrote down, and takes away its cgroups, mounts and namespaces.
# `down.sh --wipe` removes the cluster's data as well; the built programs stay.
KUBE=${TAPIO_KUBE:-/tmp/kube}
RUN=$KUBE/run
CTR="ctr -a $RUN/containerd.sock -n k8s.io"

stop() {
  for name in "$@"; do
    [ -f "$RUN/$name.pid" ] || continue
    pid=$(cat "$RUN/$name.pid"); rm -f "$RUN/$name.pid"
    kill "$pid" 2>/dev/null || continue
    for _ in $(seq 50); do kill -0 "$pid" 2>/dev/null || continue 2; sleep 0.1; done
    kill -9 "$pid" 2>/dev/null
  done
}

# Kubelet first: it would start again what ends.
stop proxy kubelet scheduler controller-manager dns
if [ -S "$RUN/containerd.sock" ]; then
  $CTR tasks ls -q 2>/dev/null | while read -r task; do
    $CTR tasks kill -s SIGKILL "$task"; $CTR tasks delete -f "$task"
  done >/dev/null 2>&1
fi
pgrep -f "containerd-shim-runc-v2 .*-address $RUN/containerd.sock" | while read -r shim; do kill "$shim" 2>/dev/null; done
stop apiserver etcd containerd
awk -v below="$KUBE/" 'index($2, below) == 1 {print $2}' /proc/mounts | sort -r | while read -r mount; do umount -l "$mount"; done
find /sys/fs/cgroup -depth -type d -path '*/kubepods*' -exec rmdir {} + 2>/dev/null
ip netns list | awk '/^cni-/ {print $1}' | while read -r netns; do ip netns del "$netns"; done
ip netns del kube 2>/dev/null
[ "${1:-}" = --wipe ] && rm -rf "$KUBE"/{etcd,containerd,kubelet,cni,log,run,pki,manifests,volumes} "$KUBE"/*.conf "$KUBE"/*.yaml "$KUBE"/*.toml
exit 0
