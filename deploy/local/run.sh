#!/usr/bin/env bash
# Starts a server and a collector on this machine and shows findings as they come, until Ctrl-C.
#   run.sh BIN_DIR      binaries; the archive is kept in TAPIO_DIR (default: ~/.local/state/tapio)
# The collector needs root for eBPF: sudo is used where this is not root. Without either it runs all the same and says
# which sources are off and why.
set -euo pipefail
bin=${1:?the folder with the binaries}
state=${TAPIO_DIR:-${XDG_STATE_HOME:-$HOME/.local/state}/tapio}
mkdir -p "$state/archive"
port=${TAPIO_PORT:-9090} http=${TAPIO_HTTP_PORT:-9091} health=${TAPIO_HEALTH_PORT:-8081}
cat > "$state/server.yaml" <<YAML
server: {address: 127.0.0.1, port: $port}
metrics: {prometheus_port: $http}
archive: {dir: "$state/archive"}
logging: {level: warn, format: text, audit: false}
YAML
# Kubernetes where there are credentials: a pod's service account, or a kubeconfig, named by its path since sudo has another home.
sources='ebpf, shm, systemd' kubernetes='enabled: false'
kubeconfig=${KUBECONFIG:-$HOME/.kube/config}
if [ -r /var/run/secrets/kubernetes.io/serviceaccount/token ]; then
  sources+=', k8s' kubernetes='in_cluster: true'
elif [ -r "$kubeconfig" ]; then
  sources+=', k8s' kubernetes="in_cluster: false, kubeconfig: \"$kubeconfig\""
fi
cat > "$state/collector.yaml" <<YAML
collector: {enabled_collectors: [$sources]}
grpc: {server_endpoints: ["127.0.0.1:$port"]}
collectors: {shm: {socket: "$state/collector.sock"}, k8s: {$kubernetes}}
health: {address: 127.0.0.1, port: $health}
logging: {level: warn, format: text}
YAML
run=()
if [ "$(id -u)" -ne 0 ]; then
  if command -v sudo >/dev/null && { sudo -n true 2>/dev/null || { [ -t 0 ] && sudo -v; }; }; then
    run=(sudo)
  else
    echo "Neither root nor sudo: kernel events will be missing. Run as root to see what happens in the kernel."
  fi
fi
for taken in "$port TAPIO_PORT" "$http TAPIO_HTTP_PORT" "$health TAPIO_HEALTH_PORT"; do
  if (exec 3<>"/dev/tcp/127.0.0.1/${taken% *}") 2>/dev/null; then
    echo "Port ${taken% *} is in use. Choose another with ${taken#* }=PORT make run" >&2
    exit 1
  fi
done
server='' collector='' watch=''
# The collector may be root's, by sudo, where this script may not signal it: a line through this pipe ends it.
stop="$state/stop.$$"
mkfifo "$stop"
exec 9<>"$stop"
finish() {
  trap '' INT TERM
  trap - EXIT
  [ -z "$watch" ] || kill "$watch" 2>/dev/null || true
  if [ -n "$collector" ]; then
    echo stop >&9
    wait "$collector" 2>/dev/null || true
  fi
  if [ -n "$server" ]; then
    kill -TERM "$server" 2>/dev/null || true
    wait "$server" 2>/dev/null || true
  fi
  rm -f "$stop"
  exit "${1:-0}"
}
trap 'finish 0' INT TERM
trap 'finish 1' EXIT
# In a session of its own, so that Ctrl-C in the terminal reaches this script and not the server: the ends come in order.
setsid "$bin/tapio-server" --config "$state/server.yaml" & server=$!
await() { # what, pid, port, path
  for _ in $(seq 300); do
    kill -0 "$2" 2>/dev/null || { echo "The $1 ended; its message is above." >&2; return 1; }
    code=$( { exec 3<>"/dev/tcp/127.0.0.1/$3" && printf 'GET %s HTTP/1.0\r\n\r\n' "$4" >&3 && head -1 <&3 | cut -d' ' -f2; } 2>/dev/null || true)
    [ "$code" = 200 ] && return 0
    sleep 0.1
  done
  echo "The $1 did not become ready within 30 s." >&2
  return 1
}
await server "$server" "$http" /readyz
# shellcheck disable=SC2016 # expanded by the inner shell
"${run[@]}" setsid --wait sh -c '
  exec 3<&0
  "$@" & child=$!
  (read -r _ <&3; kill -TERM "$child" 2>/dev/null) & listener=$!
  wait "$child"; code=$?
  kill "$listener" 2>/dev/null
  exit "$code"' sh "$bin/tapio-collector" --config "$state/collector.yaml" --allow-missing-sources <"$stop" & collector=$!
await collector "$collector" "$health" /healthz
echo "Open http://127.0.0.1:$http/ in a browser: what is found appears there, and here below."
echo "Tapio watches this machine. Archive: $state/archive. Try in another terminal, as root: $bin/tapio-perf inject oom"
echo "Explain a finding: $bin/tapioctl --server 127.0.0.1:$port finding ID. Stop with Ctrl-C."
"$bin/tapioctl" --server "127.0.0.1:$port" findings --watch & watch=$!
wait -n "$server" "$collector" "$watch" || true
for part in "server $server" "collector $collector" "watch $watch"; do
  kill -0 "${part#* }" 2>/dev/null || echo "The ${part% *} ended; its message is above." >&2
done
finish 1
