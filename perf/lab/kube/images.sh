#!/usr/bin/env bash
# Makes images for the node that up.sh started: of the built programs, as deploy/image.sh lays them out, and of this machine's
# nats-server, which takes the arguments that the manifests give to NATS' own image.
#   images.sh BIN_DIR TAG      docker.io/local/tapio-server:TAG and docker.io/local/tapio-collector:TAG
#   images.sh nats             docker.io/local/nats:1
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
KUBE=${TAPIO_KUBE:-/tmp/kube}
import() { ctr -a "$KUBE/run/containerd.sock" -n k8s.io images import - >/dev/null; }

if [ "${1:-}" = nats ]; then
  PATH=$PATH:/usr/sbin
  program=$(command -v nats-server) || { echo "images.sh: no nats-server: deploy/local/install.sh nats installs it" >&2; exit 1; }
  files=("$program=/usr/bin/nats-server")
  # A static program has none; ldd says so by its status.
  while read -r library; do
    files+=("$library=$library")
  done < <({ ldd "$program" || true; } | grep -oE '/[^ ]+\.so[^ ]*' | sort -u)
  python3 "$HERE/image.py" docker.io/local/nats:1 '["/usr/bin/nats-server"]' "${files[@]}" | import
  exit
fi
bin=${1:?the folder with the programs, or nats} tag=${2:?the tag}
for stage in server collector; do
  "$HERE/../../../deploy/image.sh" "$stage" "docker.io/local/tapio-$stage:$tag" "$bin" | import
done
