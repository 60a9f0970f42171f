#!/usr/bin/env bash
# Starts a one-node Kubernetes, real in every part: etcd, API server, controller manager, scheduler, containerd, kubelet,
# kube-proxy. Cluster DNS is dns.py, storage what volumes.sh offers; runc.sh leaves out capabilities that this machine lacks.
# All of it lives in the network namespace "kube", so nothing of it can leave this machine; what talks to it from the host
# enters that namespace first:
#   nsenter --net=/run/netns/kube kubectl --kubeconfig ${TAPIO_KUBE:-/tmp/kube}/admin.conf get pods -A
# Images of one's own: image.py NAME:TAG '["/entry"]' FILE=/path | ctr -a $TAPIO_KUBE/run/containerd.sock -n k8s.io images import -
# Needs root and build.sh first. down.sh ends it.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
KUBE=${TAPIO_KUBE:-/tmp/kube}
BIN=$KUBE/bin
ADDRESS=192.168.77.1
# On by default in later versions: volumes that live with their pod, and the containers of kubectl debug.
FEATURES=--feature-gates=GenericEphemeralVolume=true,EphemeralContainers=true
mkdir -p "$KUBE"/{pki,log,etcd,containerd,run,cni,kubelet,manifests,volumes}

IN="nsenter --net=/run/netns/kube"
kubectl_() { $IN kubectl --kubeconfig "$KUBE/admin.conf" "$@"; }
# Starts a program inside the namespace and writes its id down.
start() { local name=$1; shift; setsid $IN "$@" > "$KUBE/log/$name.log" 2>&1 < /dev/null & echo $! > "$KUBE/run/$name.pid"; }
await() {
  local what=$1 seconds=$2; shift 2
  for _ in $(seq $((seconds * 5))); do "$@" >/dev/null 2>&1 && return 0; sleep 0.2; done
  echo "up.sh: $what did not come up within $seconds s; see $KUBE/log" >&2; exit 1
}

if ip netns list | grep -qw kube && kubectl_ get node node1 2>/dev/null | grep -q ' Ready'; then exit 0; fi
# What is left of a node that did not get so far, or was killed.
ls "$KUBE"/run/*.pid >/dev/null 2>&1 && "$HERE/down.sh"

mount --make-rshared / || true
ip netns list | grep -qw kube || ip netns add kube
$IN ip link set lo up
if ! $IN ip link show node0 >/dev/null 2>&1; then
  $IN ip link add node0 type bridge
  $IN ip addr add $ADDRESS/24 dev node0
  $IN ip link set node0 up
  $IN ip route add default dev node0
fi
$IN sysctl -qw net.ipv4.ip_forward=1
$IN sysctl -qw net.bridge.bridge-nf-call-iptables=1 2>/dev/null || true

cd "$KUBE/pki"
[ -f sa.key ] || { openssl genrsa -out sa.key 2048; openssl rsa -in sa.key -pubout -out sa.pub; } 2>/dev/null
cat > tokens.csv <<END
admintoken,admin,admin,system:masters
managertoken,system:kube-controller-manager,manager,system:masters
schedulertoken,system:kube-scheduler,scheduler,system:masters
kubelettoken,system:node:node1,node1,system:nodes
proxytoken,system:kube-proxy,proxy,system:masters
END
kubeconfig() {
  cat > "$KUBE/$1.conf" <<END
apiVersion: v1
kind: Config
clusters: [{name: lab, cluster: {server: "https://$ADDRESS:6443", insecure-skip-tls-verify: true}}]
users: [{name: $1, user: {token: $2}}]
contexts: [{name: lab, context: {cluster: lab, user: $1}}]
current-context: lab
END
}
kubeconfig admin admintoken
kubeconfig manager managertoken
kubeconfig scheduler schedulertoken
kubeconfig kubelet kubelettoken
kubeconfig proxy proxytoken

start etcd etcd --data-dir "$KUBE/etcd" --listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379 \
  --listen-peer-urls http://127.0.0.1:2380
start apiserver "$BIN/kube-apiserver" --etcd-servers=http://127.0.0.1:2379 --service-cluster-ip-range=10.96.0.0/16 \
  --service-account-key-file="$KUBE/pki/sa.pub" --service-account-signing-key-file="$KUBE/pki/sa.key" \
  --service-account-issuer=https://kubernetes.default.svc --secure-port=6443 --bind-address=0.0.0.0 \
  --advertise-address=$ADDRESS --cert-dir="$KUBE/pki" --token-auth-file="$KUBE/pki/tokens.csv" \
  --authorization-mode=Node,RBAC --allow-privileged=true --enable-admission-plugins=NodeRestriction,ResourceQuota \
  --event-ttl=1h --kubelet-preferred-address-types=InternalIP $FEATURES
is_healthy() { $IN curl -sk "https://$ADDRESS:6443/healthz" -H 'Authorization: Bearer admintoken' | grep -q ok; }
await "the API server" 60 is_healthy
# Pods verify the API server by its own certificate.
cp apiserver.crt ca.crt
start controller-manager "$BIN/kube-controller-manager" --kubeconfig="$KUBE/manager.conf" \
  --service-account-private-key-file="$KUBE/pki/sa.key" --root-ca-file="$KUBE/pki/ca.crt" \
  --use-service-account-credentials=false --cluster-cidr=10.88.0.0/16 --allocate-node-cidrs=true --leader-elect=false \
  --port=0 --secure-port=10257 '--controllers=*' $FEATURES
start scheduler "$BIN/kube-scheduler" --kubeconfig="$KUBE/scheduler.conf" --leader-elect=false --port=0 $FEATURES
start dns python3 "$HERE/dns.py" $ADDRESS https://$ADDRESS:6443 admintoken

cat > "$KUBE/containerd.toml" <<END
version = 2
root = "$KUBE/containerd/root"
state = "$KUBE/containerd/state"
[grpc]
  address = "$KUBE/run/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "docker.io/local/pause:1"
  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "$KUBE/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "${SNAPSHOTTER:-overlayfs}"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        BinaryName = "$HERE/runc.sh"
END
cat > "$KUBE/cni/10-bridge.conf" <<END
{"cniVersion":"0.4.0","name":"kube","type":"bridge","bridge":"cni0","isGateway":true,"ipMasq":true,"hairpinMode":true,
 "ipam":{"type":"host-local","ranges":[[{"subnet":"10.88.0.0/24"}]],"routes":[{"dst":"0.0.0.0/0"}]}}
END
start containerd containerd -c "$KUBE/containerd.toml"
cat > "$KUBE/kubelet.yaml" <<END
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
cgroupDriver: cgroupfs
failSwapOn: false
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
clusterDomain: cluster.local
clusterDNS: ["$ADDRESS"]
resolvConf: /etc/resolv.conf
podCIDR: 10.88.0.0/24
evictionHard: {"memory.available": "100Mi"}
# Images cannot be fetched again: a full disk must not make kubelet remove them.
imageGCHighThresholdPercent: 100
cgroupsPerQOS: true
# This kubelet may forget to say that a pod is gone until it looks again: a minute later by default.
syncFrequency: 5s
# A runtime that hangs is reported when the first request to it has timed out: after two minutes by default.
runtimeRequestTimeout: 30s
enforceNodeAllocatable: ["pods"]
END
await containerd 30 ctr -a "$KUBE/run/containerd.sock" version

# Three images: what holds a pod's namespaces, and a static busybox for everything else, by two tags for rollouts.
cat > "$KUBE/run/pause.c" <<'END'
#include <signal.h>
#include <unistd.h>
static void end(int signal) { (void)signal; _exit(0); }
int main(void) { signal(SIGTERM, end); signal(SIGINT, end); for (;;) pause(); }
END
gcc -O2 -static -o "$KUBE/run/pause" "$KUBE/run/pause.c"
import() { python3 "$HERE/image.py" "$@" | ctr -a "$KUBE/run/containerd.sock" -n k8s.io images import - >/dev/null; }
import docker.io/local/pause:1 '["/pause"]' "$KUBE/run/pause=/pause"
for tag in 1 2; do
  import "docker.io/local/busybox:$tag" '["/bin/busybox"]' /bin/busybox=/bin/busybox /bin/busybox=/bin/sh
done

await "the default service account" 30 kubectl_ get serviceaccount default
start kubelet "$BIN/kubelet" --config="$KUBE/kubelet.yaml" --kubeconfig="$KUBE/kubelet.conf" --container-runtime=remote \
  --container-runtime-endpoint="unix://$KUBE/run/containerd.sock" --hostname-override=node1 --node-ip=$ADDRESS \
  --root-dir="$KUBE/kubelet" --cert-dir="$KUBE/kubelet/pki" --v=2 $FEATURES
start proxy "$BIN/kube-proxy" --kubeconfig="$KUBE/proxy.conf" --proxy-mode=iptables --cluster-cidr=10.88.0.0/16 \
  --hostname-override=node1 --conntrack-max-per-core=0
is_ready() { kubectl_ get node node1 | grep -q ' Ready'; }
await "the node" 90 is_ready
"$HERE/volumes.sh"
