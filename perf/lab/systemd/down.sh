#!/usr/bin/env bash
# down.sh PID CGROUP: ends the systemd that up.sh started, with every process of its pid namespace, and removes its cgroups.
set -uo pipefail
pid=$1
cgroup=$2
case $cgroup in
  */tapio-lab-systemd-*) ;;
  *) echo "$cgroup was not made by up.sh" >&2; exit 1 ;;
esac
# A pid that was given to another process since is not in that cgroup.
if grep -qs "/${cgroup##*/}" "/proc/$pid/cgroup"; then
  kill -9 "$pid" 2>/dev/null
fi
for _ in $(seq 100); do
  [ -d "$cgroup" ] || exit 0
  find "$cgroup" -depth -type d -exec rmdir {} + 2>/dev/null
  [ -d "$cgroup" ] || exit 0
  sleep 0.05
done
echo "$cgroup is still in use" >&2
exit 1
