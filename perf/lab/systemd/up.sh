#!/usr/bin/env bash
# A real systemd to test against: PID 1 of pid, mount, uts, ipc and cgroup namespaces of its own, with its own system bus.
# It cannot touch this machine's files: /tmp, /var/tmp, /run and /etc/systemd/system are file systems in its memory. Its
# cgroups are all below one of their own, so that any number of them can run side by side.
#
#   up.sh [STATE [OWNER]]   prints PID=<its pid here> BUS=<address of its bus> CGROUP=<its cgroup>
#
# STATE is a folder for its log. With OWNER, it ends when the process with that pid does. `down.sh PID CGROUP` ends it.
# Beside it runs:  nsenter -t $PID -m -p -- systemctl list-units
set -euo pipefail
state=${1:-$(mktemp -d)}
owner=${2:-}
mkdir -p "$state"
[ "$(id -u)" -eq 0 ] || { echo "needs root" >&2; exit 1; }
systemd=/lib/systemd/systemd
[ -x $systemd ] && command -v dbus-daemon >/dev/null && command -v nsenter >/dev/null \
  || { echo "needs the packages systemd, dbus and util-linux" >&2; exit 1; }

root=/sys/fs/cgroup
[ -e $root/cgroup.controllers ] || root=/sys/fs/cgroup/unified
[ -e $root/cgroup.procs ] || { echo "needs a mounted cgroup v2 hierarchy" >&2; exit 1; }

cat > "$state/init" <<'INIT'
set -e
# Its own cgroup becomes the root of what it sees.
echo $$ > "$TAPIO_LAB_ROOT/cgroup.procs"
exec unshare --cgroup bash -ec '
  mount --make-rprivate /
  for directory in /tmp /var/tmp /run /etc/systemd/system; do mount -t tmpfs -o mode=755 tmpfs $directory; done
  chmod 1777 /tmp /var/tmp
  mkdir -p /run/lock
  mount -t proc proc /proc
  umount -R -l /sys/fs/cgroup 2>/dev/null || true
  mount -t cgroup2 none /sys/fs/cgroup
  # Otherwise it takes itself for the machine and loads modules, starts udev and mounts what fstab names.
  export container=tapio-lab
  unset TAPIO_LAB_ROOT
  exec /lib/systemd/systemd --system --log-target=console --show-status=0 --unit=basic.target
'
INIT

cgroup=$root/tapio-lab-systemd-$$
mkdir "$cgroup"
TAPIO_LAB_ROOT=$cgroup setsid unshare --pid --fork --kill-child --mount --uts --ipc bash "$state/init" \
  > "$state/log" 2>&1 < /dev/null &
outside=$!
fail() {
  echo "$1; its log:" >&2
  tail -n 20 "$state/log" >&2
  kill -9 $outside 2>/dev/null || true
  wait $outside 2>/dev/null || true
  find "$cgroup" -depth -type d -exec rmdir {} + 2>/dev/null || true
  exit 1
}
for _ in $(seq 200); do
  kill -0 $outside 2>/dev/null || fail "systemd has ended"
  pid=$(pgrep -P $outside | head -n 1 || true)
  bus=unix:path=/proc/$pid/root/run/dbus/system_bus_socket
  if [ -n "$pid" ] && busctl --address="$bus" get-property org.freedesktop.systemd1 /org/freedesktop/systemd1 \
    org.freedesktop.systemd1.Manager Version > /dev/null 2>&1; then
    if [ -n "$owner" ]; then
      down=$(dirname "$(readlink -f "$0")")/down.sh
      setsid bash -c "tail --pid=$owner -f /dev/null; exec '$down' $pid '$cgroup'" > /dev/null 2>&1 < /dev/null &
    fi
    echo "PID=$pid BUS=$bus CGROUP=$cgroup"
    exit 0
  fi
  sleep 0.1
done
fail "systemd's bus did not come up in 20 s"
