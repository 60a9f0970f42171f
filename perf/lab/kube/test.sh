#!/usr/bin/env bash
# Runs the tests that need a real Kubernetes node. With KUBECONFIG set, that cluster is used: this machine must be one of its
# nodes, TAPIO_TEST_NODE its name there, and TAPIO_TEST_IMAGE / TAPIO_TEST_IMAGE_NEXT two images with a busybox on it.
# Otherwise a node is built, started, and taken away again unless it ran before.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$HERE/../../.."
export TAPIO_KUBE_TEST=1
enter=()
if [ -z "${KUBECONFIG:-}" ]; then
  KUBE=${TAPIO_KUBE:-/tmp/kube}
  "$HERE/build.sh"
  ip netns list | grep -qw kube || trap '"$HERE/down.sh" --wipe' EXIT
  "$HERE/up.sh"
  export KUBECONFIG=$KUBE/admin.conf TAPIO_TEST_NODE=node1
  export TAPIO_TEST_IMAGE=docker.io/local/busybox:1 TAPIO_TEST_IMAGE_NEXT=docker.io/local/busybox:2
  # The API server listens inside the node's network namespace: so must whoever talks to it.
  enter=(nsenter --net=/run/netns/kube)
fi
cargo build --locked -p tapio-server -p tapio-collector --bins
cargo test --locked -p tapio-perf --test kube --no-run
"${enter[@]}" cargo test --locked --offline -p tapio-perf --test kube -- --nocapture --test-threads=1
