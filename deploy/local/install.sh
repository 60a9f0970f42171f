#!/usr/bin/env bash
# Installs what building and testing Tapio needs and this machine lacks: a C compiler for Rust's linker, clang and libbpf's
# headers for the probes, systemd and a bus for the tests that start one of their own; with the word "kernels" also what
# perf/lab/kernels.sh needs, with "nats" also a NATS server, with "alerts" an Alertmanager, with "s3" an S3 server (moto), with
# "azure" a server of Azure's blobs (Azurite) and with "sql" two SQL engines (DuckDB, DataFusion) under target/tools, with "mcp" an
# assistant's client there, with "chromium" the browser that tests the page, and axe-core there too. On Debian and Ubuntu by apt-get
# (with sudo where this is not root); elsewhere it says
# what to install.
set -euo pipefail
missing=()
command -v cc >/dev/null || missing+=(build-essential)
command -v clang >/dev/null || missing+=(clang)
[ -e /usr/include/bpf/bpf_helpers.h ] || missing+=(libbpf-dev)
[ -x /lib/systemd/systemd ] || missing+=(systemd)
command -v dbus-daemon >/dev/null || missing+=(dbus)
command -v nsenter >/dev/null || missing+=(util-linux)
command -v pgrep >/dev/null || missing+=(procps)
# Of the tests: namespaces and drops, a full table of connections, failing disks, a page's publisher.
PATH=$PATH:/usr/sbin:/sbin
command -v mkfs.ext4 >/dev/null || missing+=(e2fsprogs)
{ command -v losetup && command -v mount && command -v fsfreeze; } >/dev/null || missing+=(mount util-linux)
command -v ip >/dev/null || missing+=(iproute2)
command -v nft >/dev/null || missing+=(nftables)
command -v conntrack >/dev/null || missing+=(conntrack)
command -v strace >/dev/null || missing+=(strace)
command -v python3 >/dev/null || missing+=(python3)
# The log that several servers share, for the tests of it.
if [ "${1:-}" = nats ]; then
  command -v nats-server >/dev/null || missing+=(nats-server)
fi
if [ "${1:-}" = alerts ]; then
  command -v prometheus-alertmanager >/dev/null || missing+=(prometheus-alertmanager)
fi
if [ "${1:-}" = kernels ]; then
  command -v qemu-system-x86_64 >/dev/null || missing+=(qemu-system-x86)
  command -v cpio >/dev/null || missing+=(cpio)
  # A dynamic busybox does not run in an initial ram disk of its own.
  { command -v busybox >/dev/null && ! ldd "$(command -v busybox)" >/dev/null 2>&1; } || missing+=(busybox-static)
fi
if ! command -v cargo >/dev/null; then
  echo "Rust is missing: install rustup's stable toolchain (1.95 or newer) and run this again." >&2
  exit 1
fi
# What tests need of PyPI, in virtual environments that are recreated when the pins change: the object store, a real S3 protocol;
# real SQL engines, with what DuckDB needs for S3; and the client of the Model Context Protocol.
declare -A pins=(
  [s3]="moto[s3]==5.2.5 flask==3.1.3 flask-cors==6.0.5"
  [mcp]="mcp==2.3.0"
  [sql]="duckdb==1.5.5 duckdb-extension-httpfs==1.5.5 datafusion==55.0.0 pyarrow==26.0.1 pytz==2026.6"
)
declare -A folder=([s3]=moto [sql]=sql [mcp]=mcp)
wanted=${1:-}
install_tools() {
  local top tools
  [ -n "$wanted" ] && [ -n "${pins[$wanted]:-}" ] || return 0
  top=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
  tools=${CARGO_TARGET_DIR:-$top/target}/tools/${folder[$wanted]}
  [ "$(cat "$tools/installed.txt" 2>/dev/null)" = "${pins[$wanted]}" ] && return
  rm -rf "$tools"
  python3 -m venv "$tools"
  # shellcheck disable=SC2086 # Several words.
  "$tools/bin/pip" install -q --disable-pip-version-check ${pins[$wanted]}
  echo "${pins[$wanted]}" > "$tools/installed.txt"
}
if [ -n "$wanted" ] && [ -n "${pins[$wanted]:-}" ]; then
  # Debian's python3 comes without.
  python3 -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
fi
# A package of npm, of one version, in a folder of its own.
install_npm() { # for what, package, version, folder
  local top tools pin=$2@$3
  [ "$wanted" = "$1" ] || return 0
  top=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
  tools=${CARGO_TARGET_DIR:-$top/target}/tools/$4
  [ "$(cat "$tools/installed.txt" 2>/dev/null)" = "$pin" ] && return
  rm -rf "$tools"
  mkdir -p "$tools"
  npm install --silent --prefix "$tools" --ignore-scripts --no-audit --no-fund "$pin"
  echo "$pin" > "$tools/installed.txt"
}
# A server of Azure's blobs.
install_azure() { install_npm azure azurite 3.37.0 azurite; }
if [ "$wanted" = azure ]; then
  command -v npm >/dev/null || missing+=(npm)
fi
# What finds a page's faults for those who do not see it, or use no mouse: a file for the browser.
install_axe() { install_npm chromium axe-core 4.14.1 axe; }
if [ "$wanted" = chromium ]; then
  command -v chromium >/dev/null || missing+=(chromium fonts-dejavu-core)
  command -v npm >/dev/null || missing+=(npm)
fi
if [ ${#missing[@]} -eq 0 ]; then
  install_tools
  install_azure
  install_axe
  exit 0
fi
echo "Installing ${missing[*]}"
if ! command -v apt-get >/dev/null; then
  echo "No apt-get here. Install what corresponds to: ${missing[*]}" >&2
  exit 1
fi
run=()
if [ "$(id -u)" -ne 0 ]; then
  command -v sudo >/dev/null || { echo "Not root and no sudo. As root: apt-get install -y ${missing[*]}" >&2; exit 1; }
  run=(sudo)
fi
"${run[@]}" apt-get update -qq
"${run[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
# Debian's package starts one for everybody on this machine; the tests start their own.
for service in nats-server prometheus-alertmanager; do
  if [[ " ${missing[*]} " = *" $service "* ]] && [ -d /run/systemd/system ]; then
    "${run[@]}" systemctl disable --now --quiet "$service.service" || true
  fi
done
install_tools
install_azure
install_axe
