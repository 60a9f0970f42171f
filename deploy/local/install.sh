#!/usr/bin/env bash
# Installs what building and testing Tapio needs and this machine lacks: a C compiler for Rust's linker, clang and libbpf's
# headers for the probes, systemd and a bus for the tests that start one of their own; with the word "kernels" also what
# perf/lab/kernels.sh needs, with "nats" also a NATS server. On Debian and Ubuntu by apt-get (with sudo where this is not root); elsewhere it says what to
# install.
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
[ ${#missing[@]} -eq 0 ] && exit 0
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
if [[ " ${missing[*]} " = *" nats-server "* ]] && [ -d /run/systemd/system ]; then
  "${run[@]}" systemctl disable --now --quiet nats-server.service || true
fi
