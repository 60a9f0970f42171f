#!/usr/bin/env bash
# Makes images of the built programs for the node that up.sh started, as the Dockerfile lays them out: the programs in /usr/bin,
# and of the system only the libraries that they are linked with.
#   images.sh BIN_DIR TAG      docker.io/local/tapio-server:TAG and docker.io/local/tapio-collector:TAG
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
KUBE=${TAPIO_KUBE:-/tmp/kube}
bin=${1:?the folder with the programs} tag=${2:?the tag}
work=$(mktemp -d "$KUBE/images.XXXXXX")
trap 'rm -rf "$work"' EXIT

# Of a program: itself, without what only a debugger reads, and its libraries where the linker looks for them.
files_of() {
  strip --strip-debug -o "$work/$1" "$bin/$1"
  echo "$work/$1=/usr/bin/$1"
  ldd "$bin/$1" | awk '$2 == "=>" {print $3 "=" $3} $1 ~ /^\// {print $1 "=" $1}'
}
import() {
  local name=$1 entry=$2; shift 2
  python3 "$HERE/image.py" "$name" "[\"$entry\"]" "$@" |
    ctr -a "$KUBE/run/containerd.sock" -n k8s.io images import - >/dev/null
}
mapfile -t server < <({ files_of tapio-server; files_of tapioctl; } | sort -u)
mapfile -t collector < <(files_of tapio-collector | sort -u)
import "docker.io/local/tapio-server:$tag" /usr/bin/tapio-server "${server[@]}"
import "docker.io/local/tapio-collector:$tag" /usr/bin/tapio-collector "${collector[@]}"
