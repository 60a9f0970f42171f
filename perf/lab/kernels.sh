#!/usr/bin/env bash
# Runs the probes' live tests on other Linux kernels: Debian's 5.10, 6.1, 6.12 and newest, each in a small qemu machine.
#   make test-kernels, or: kernels.sh [-k "5.10 6.1"] [-j MACHINES_AT_ONCE] [-t "6.12"]
# Every program of tapio-probes must attach that its row says this kernel has, and the tests of probes/tests/live*.rs cause the
# real thing (execs, exits, signals, cgroups, OOM kills by a cgroup v2 limit, ...) and check their records.
#
# On the kernels of -t, deaths of every kind are caused as well (tapio-perf truth), on a host with cgroup v2 alone.
#
# Kernels are downloaded once by apt-get from the mirror that this machine is configured for, unpacked into
# ${TAPIO_KERNELS:-~/.cache/tapio/kernels} and never installed. Ends with 0 when all passed, 1 when not; when qemu or the
# kernels cannot be had it says SKIP and ends with 0, or with 1 where TAPIO_REQUIRE=all.
set -euo pipefail
cd "$(dirname "$0")/../.."
WANT="5.10 6.1 6.12 newest"; AT_ONCE=2; LIMIT_S=900; TRUTH="6.12"; TRUTH_LIMIT_S=1200
while getopts "k:j:t:" option; do
  case $option in k) WANT=$OPTARG ;; j) AT_ONCE=$OPTARG ;; t) TRUTH=$OPTARG ;; *) exit 2 ;; esac
done
CACHE=${TAPIO_KERNELS:-${XDG_CACHE_HOME:-$HOME/.cache}/tapio/kernels}
CLANG=${CLANG:-clang}
TARGET=x86_64-unknown-linux-gnu

skip() {
  echo "SKIP test-kernels: $*"
  [ "${TAPIO_REQUIRE:-}" = all ] && exit 1
  exit 0
}
[ "$(uname -m)" = x86_64 ] || skip "needs an x86-64 machine"
for tool in qemu-system-x86_64 cpio busybox dpkg-deb; do
  command -v "$tool" >/dev/null || skip "needs $tool: deploy/local/install.sh kernels"
done
BUSYBOX=$(command -v busybox)
file_is_static() { ! ldd "$1" >/dev/null 2>&1; }
file_is_static "$BUSYBOX" || skip "needs a static busybox: deploy/local/install.sh kernels"

# --- kernels -------------------------------------------------------------------------------------------------------------

apt_options() {
  echo "-o Dir::Etc::sourcelist=$CACHE/apt/sources.list -o Dir::Etc::sourceparts=/dev/null" \
    "-o Dir::State::Lists=$CACHE/apt/lists -o Dir::Cache=$CACHE/apt/cache"
}
update_lists() {
  [ -f "$CACHE/apt/updated" ] && return
  local mirror keyring=/usr/share/keyrings/debian-archive-keyring.gpg suite
  # What apt uses, not what lies in its folder, where files may be switched off; the mirror's other suites lie beside the one that
  # is configured.
  mirror=$(apt-cache policy | awk '$3 ~ /^[a-z]+\/main$/ && $2 !~ /security/ {print $2; exit}' || true)
  [ -n "$mirror" ] && [ -f "$keyring" ] || skip "needs Debian's package sources"
  mkdir -p "$CACHE"/apt/{lists/partial,cache/archives/partial}
  for suite in bullseye bookworm trixie sid; do
    echo "deb [signed-by=$keyring] $mirror $suite main"
  done >"$CACHE/apt/sources.list"
  # shellcheck disable=SC2046 # options are words
  apt-get $(apt_options) update -qq || skip "cannot reach $mirror"
  touch "$CACHE/apt/updated"
}
package_of() { # the newest cloud kernel of a series
  local series
  if [ "$1" = newest ]; then series='.'; else series="-${1//./\\.}(\.[0-9]|-)"; fi
  # shellcheck disable=SC2046
  apt-cache $(apt_options) search -n '^linux-(image|binary)-[0-9].*cloud-amd64$' | awk '{print $1}' | grep -v unsigned \
    | grep -E -- "$series" | sort -V -t- -k3 | tail -1
}
kernel_of() { find "$CACHE/$1" -name 'vmlinuz*' 2>/dev/null | head -1; }
fetch() {
  [ -z "$(kernel_of "$1")" ] || return 0
  update_lists
  local package name folder
  package=$(package_of "$1") || true
  [ -n "$package" ] || skip "found no package of Linux $1"
  folder=$(mktemp -d "$CACHE/fetch.XXXXXX")
  # Newer Debian releases keep the files of a signed image in a package of their own.
  for name in "$package" "${package/linux-image-/linux-binary-}"; do
    # shellcheck disable=SC2046
    (cd "$folder" && apt-get $(apt_options) download -qq "$name" 2>/dev/null \
      && dpkg-deb -x "$name"_*.deb "$CACHE/$1") || continue
    [ -z "$(kernel_of "$1")" ] || break
  done
  rm -rf "$folder"
  [ -n "$(kernel_of "$1")" ] || skip "cannot download Linux $1 ($package)"
}
mkdir -p "$CACHE"
for kernel in $WANT $TRUTH; do fetch "$kernel"; done

# --- the programs, linked statically --------------------------------------------------------------------------------------

ROOT=$(mktemp -d); trap 'rm -rf "$ROOT"' EXIT
TREE=$ROOT/tree
mkdir -p "$TREE"/{bin,tests,proc,sys,dev,tmp,run,etc}
export RUSTFLAGS="-C target-feature=+crt-static"
built() { "$@" --quiet --locked -p tapio-probes --target $TARGET --message-format=json 2>"$ROOT/cargo" || { cat "$ROOT/cargo"; exit 1; }; }
built cargo build --example verdicts >"$ROOT/built"
built cargo test --tests --no-run >>"$ROOT/built"
executables() { # of test or example targets
  grep -o '"reason":"compiler-artifact".*' "$ROOT/built" | grep "\"kind\":\[\"$1\"\]" \
    | sed -n 's/.*"name":"\([^"]*\)".*"executable":"\([^"]*\)".*/\1 \2/p'
}
while read -r name path; do
  case $name in probes) cp "$path" "$TREE/tests/$name" ;; esac
done < <(executables test)
while read -r name path; do
  [ "$name" != verdicts ] || cp "$path" "$TREE/bin/verdicts"
done < <(executables example)
[ -x "$TREE/bin/verdicts" ] && [ -n "$(ls "$TREE/tests")" ] || { echo "the live tests were not built"; exit 1; }
"$CLANG" -static -O1 -Wall -Werror -pthread -o "$TREE/tests/victim" probes/tests/lab/victim.c
# What both machines do first.
cat >"$TREE/prepare" <<'PREPARE'
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
mount -t tracefs none /sys/kernel/tracing; mount -t bpf none /sys/fs/bpf; mount -t tmpfs none /tmp
mount -t cgroup2 none /sys/fs/cgroup
for controller in memory pids cpu io; do echo +$controller >/sys/fs/cgroup/cgroup.subtree_control; done
ip link set lo up
echo "@@begin $(uname -r)"
PREPARE
cp "$BUSYBOX" "$TREE/bin/busybox"
cat >"$TREE/init" <<'INIT'
#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
. /prepare
failed=0
verdicts || failed=1
for test in /tests/probes; do
  echo "-- ${test##*/}"
  $test --test-threads=1 live 2>&1 || failed=1
done
echo "@@rc $failed"
poweroff -f
INIT
chmod +x "$TREE/init"
ln -s busybox "$TREE/bin/sh"
(cd "$TREE" && find . | cpio -o -H newc 2>/dev/null | gzip -1) >"$ROOT/initrd"

# --- the whole of Tapio, and what its scenarios call: dynamically linked, with their libraries --------------------------------

if [ -n "$TRUTH" ]; then
  (unset RUSTFLAGS && cargo build --quiet --locked --workspace --bins)
  WHOLE=$ROOT/whole
  mkdir -p "$WHOLE"/{bin,usr,lib64,proc,sys,dev,tmp,run,etc,mnt}
  ln -s ../bin "$WHOLE/usr/bin"
  programs=()
  for name in tapio-perf tapio-server tapio-collector; do
    strip -o "$WHOLE/bin/$name" "${CARGO_TARGET_DIR:-target}/debug/$name"
    programs+=("$WHOLE/bin/$name")
  done
  # The shell of the scenarios is copied under other names, which a busybox would take for its own programs.
  for name in dash unshare nsenter mount setpriv; do
    cp -L "$(command -v $name)" "$WHOLE/bin/$name"; programs+=("$WHOLE/bin/$name")
  done
  ln -s dash "$WHOLE/bin/sh"
  cp "$BUSYBOX" "$WHOLE/bin/busybox"
  cp "$TREE/prepare" "$WHOLE/prepare"
  ldd "${programs[@]}" | grep -o '/[^ ]*\.so[^ ]*' | sort -u | while read -r library; do
    mkdir -p "$WHOLE$(dirname "$library")" && cp -L "$library" "$WHOLE$library"
  done
  cat >"$WHOLE/init" <<'INIT'
#!/bin/busybox sh
for name in $(/bin/busybox --list); do [ -e "/bin/$name" ] || /bin/busybox ln -s busybox "/bin/$name"; done
export PATH=/bin
. /prepare
tapio-perf truth 2>&1
echo "@@rc $?"
poweroff -f
INIT
  chmod +x "$WHOLE/init"
  (cd "$WHOLE" && find . | cpio -o -H newc 2>/dev/null | gzip -1) >"$ROOT/initrd.truth"
fi

# --- the machines ---------------------------------------------------------------------------------------------------------

# Without KVM: /dev/kvm may be there and yet hang its guests, where this machine is a guest itself.
# A machine that never got as far as its init proves nothing: an emulated CPU may trip over code that its kernel has just patched.
boot() { # kernel, initrd, limit
  local started=$SECONDS out=$ROOT/out.$2.$1 attempt
  for attempt in 1 2 3; do
    [ "$attempt" = 1 ] || { echo "Linux $1 did not reach its init, attempt $attempt:"; tail -n 3 "$out"; } >&2
    timeout "$3" qemu-system-x86_64 -M q35 -cpu qemu64 -smp 2 -m 1536 -nographic -no-reboot -net none \
      -kernel "$(kernel_of "$1")" -initrd "$ROOT/$2" -append "console=ttyS0 quiet panic=-1" </dev/null 2>&1 \
      | tr -d '\r' >"$out" || true
    ! grep -q '@@begin' "$out" || break
  done
  echo $((SECONDS - started)) >"$ROOT/seconds.$2.$1"
}
running=0
turn() {
  if [ "$running" -ge "$AT_ONCE" ]; then wait -n; running=$((running - 1)); fi
  running=$((running + 1))
}
for kernel in $TRUTH; do turn; boot "$kernel" initrd.truth "$TRUTH_LIMIT_S" & done
for kernel in $WANT; do turn; boot "$kernel" initrd "$LIMIT_S" & done
wait
failed=0
show() { # initrd, kernel, what to show of a success
  local out=$ROOT/out.$1.$2 rc
  rc=$(sed -n 's/.*@@rc \([0-9]*\).*/\1/p' "$out" | tail -1)
  echo "== Linux $(sed -n 's/.*@@begin //p' "$out" | tail -1)"
  if [ "$rc" = 0 ]; then
    grep -E "$3" "$out" || true
  else
    cat "$out"; failed=1
  fi
  echo "== $2: rc ${rc:-none} after $(cat "$ROOT/seconds.$1.$2") s"
}
for kernel in $WANT; do show initrd "$kernel" 'programs are missing|^-- |^test result|SKIP'; done
for kernel in $TRUTH; do show initrd.truth "$kernel" ' not caused$|^(possible|silent)'; done
exit $failed
