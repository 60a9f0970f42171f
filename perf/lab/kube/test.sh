#!/usr/bin/env bash
# Runs the tests that need a real Kubernetes node. With KUBECONFIG set, that cluster is used: this machine must be one of its
# nodes, and these name what the tests need there:
#   TAPIO_TEST_NODE                                            its name
#   TAPIO_TEST_IMAGE, TAPIO_TEST_IMAGE_NEXT                    two images with a busybox
#   TAPIO_TEST_SERVER_IMAGE, TAPIO_TEST_COLLECTOR_IMAGE        Tapio of this checkout; without them only kube, kube_truth and kube_states are tested
#   TAPIO_TEST_NATS_IMAGE                                      NATS 2.9 or newer
#   TAPIO_TEST_SERVER_IMAGE_NEXT, TAPIO_TEST_COLLECTOR_IMAGE_NEXT  the same, built with --features tapio-wire/next-version
# Otherwise a node is built, started, and taken away again unless it ran before. TAPIO_KUBE_TESTS names other tests than all.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$HERE/../../.."
began=$SECONDS
export TAPIO_KUBE_TEST=1
KUBE=${TAPIO_KUBE:-/tmp/kube}
tests=${TAPIO_KUBE_TESTS:-kube kube_truth kube_states kube_rollout kube_cluster kube_capabilities kube_production}
enter=() node_is_ours=''

finish() {
  local status=$?
  trap - EXIT
  if [ "$status" -ne 0 ] && [ -d "$KUBE/log" ] && [ -n "$node_is_ours" ]; then
    echo "The node's logs, of which the last lines of kubelet's follow, were in $KUBE/log:" >&2
    grep -v '^I' "$KUBE/log/kubelet.log" | tail -n 10 >&2 || true
  fi
  [ -z "$node_is_ours" ] || "$HERE/down.sh" --wipe
  local seconds=$((SECONDS - began))
  echo "make test-kube ended with $status after $((seconds / 60)) min $((seconds % 60)) s"
  exit "$status"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# The whole workspace, so that nothing is built a second time with other features of a dependency.
build() { cargo build --locked --workspace --bins "$@"; }
if [ -z "${KUBECONFIG:-}" ]; then
  "$HERE/build.sh"
  deploy/local/install.sh nats
  ip netns list | grep -qw kube || node_is_ours=1
  "$HERE/up.sh"
  echo "The node is ready after $((SECONDS - began)) s"
  export KUBECONFIG=$KUBE/admin.conf TAPIO_TEST_NODE=node1
  export TAPIO_TEST_IMAGE=docker.io/local/busybox:1 TAPIO_TEST_IMAGE_NEXT=docker.io/local/busybox:2
  # The API server listens inside the node's network namespace: so must whoever talks to it.
  enter=(nsenter --net=/run/netns/kube)
  bin=${CARGO_TARGET_DIR:-target}/debug
  # Only a rollout needs it, and it takes as long as the other build.
  if [[ $tests == *kube_rollout* ]]; then
    build --features tapio-wire/next-version
    "$HERE/images.sh" "$bin" next
  fi
  build
  "$HERE/images.sh" "$bin" 1
  "$HERE/images.sh" nats
  "$HERE/volumes.sh"
  export TAPIO_TEST_NATS_IMAGE=docker.io/local/nats:1
  export TAPIO_TEST_SERVER_IMAGE=docker.io/local/tapio-server:1 TAPIO_TEST_SERVER_IMAGE_NEXT=docker.io/local/tapio-server:next
  export TAPIO_TEST_COLLECTOR_IMAGE=docker.io/local/tapio-collector:1
  export TAPIO_TEST_COLLECTOR_IMAGE_NEXT=docker.io/local/tapio-collector:next
  export TAPIO_TEST_VOLUMES=$KUBE/volumes TAPIO_TEST_RUN=$KUBE/run
else
  build
  if [ -z "${TAPIO_TEST_SERVER_IMAGE:-}" ]; then
    echo "SKIP kube_rollout, kube_cluster, kube_capabilities and kube_production: TAPIO_TEST_SERVER_IMAGE names no image" >&2
    tests='kube kube_truth kube_states'
  fi
fi
filters=()
# Of perf/tests/main.rs, a file's tests are below its name.
for test in $tests; do filters+=("$test::"); done
cargo test --locked --workspace --test perf --no-run
"${enter[@]}" cargo test --locked --offline --workspace --test perf -- --nocapture --test-threads=1 "${filters[@]}"
