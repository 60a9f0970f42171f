#!/usr/bin/env bash
# Makes images of the built programs, as deploy/image.sh lays them out, for the node that up.sh started.
#   images.sh BIN_DIR TAG      docker.io/local/tapio-server:TAG and docker.io/local/tapio-collector:TAG
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
KUBE=${TAPIO_KUBE:-/tmp/kube}
bin=${1:?the folder with the programs} tag=${2:?the tag}
for stage in server collector; do
  "$HERE/../../../deploy/image.sh" "$stage" "docker.io/local/tapio-$stage:$tag" "$bin" |
    ctr -a "$KUBE/run/containerd.sock" -n k8s.io images import - >/dev/null
done
