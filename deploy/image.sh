#!/usr/bin/env bash
# Builds an image with the content that the Dockerfile's stage has, without an engine: the programs as they were built here, with the
# libraries that they are linked with, by perf/lab/kube/image.py. For a node without a registry, like the lab's:
#   deploy/image.sh server docker.io/library/tapio-server:0.1.0 [BIN_DIR] > server.tar
#   ctr -n k8s.io images import server.tar
# Without what only a debugger reads. What is in the Dockerfile and not here: labels, and distroless' certificates and time zones,
# which the programs do not read. The user is set by the pods.
set -euo pipefail
stage=${1:?server or collector} name=${2:?NAME:TAG}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bin=${3:-${CARGO_TARGET_DIR:-$root/target}/release}
case $stage in
  server) programs=(tapio-server tapioctl) ;;
  collector) programs=(tapio-collector) ;;
  *) echo "no stage $stage: server or collector" >&2; exit 2 ;;
esac
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
files=()
for program in "${programs[@]}"; do
  [ -x "$bin/$program" ] || { echo "$bin/$program is missing: make build" >&2; exit 1; }
  strip --strip-debug -o "$work/$program" "$bin/$program"
  files+=("$work/$program=/usr/bin/$program")
done
# ldd prints "name => /path (address)" and, for the loader, "/path (address)".
while read -r library; do
  files+=("$library=$library")
done < <(for program in "${programs[@]}"; do ldd "$bin/$program"; done | grep -oE '/[^ ]+\.so[^ ]*' | sort -u)
python3 "$root/perf/lab/kube/image.py" "$name" "[\"/usr/bin/${programs[0]}\"]" "${files[@]}"
