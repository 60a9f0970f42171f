#!/usr/bin/env bash
# runc for hosts that lack capabilities themselves: takes out of a container's what nobody here can give, and goes on as runc.
# runc would refuse the container. On a host that has them all this changes nothing.
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
specification='' previous=''
for argument in "$@"; do
  case "$previous" in
    --bundle | -b) specification="$argument/config.json" ;;
    --process | -p) specification="$argument" ;;
  esac
  previous=$argument
done
[ -z "$specification" ] || python3 "$HERE/capabilities.py" "$specification"
exec runc "$@"
