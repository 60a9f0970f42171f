#!/bin/sh
# Runs one test binary for `make test`. Tests of the server wait most of the time, for disks, NATS and clocks: two cores carry
# more of them at once.
case "$1" in
*/deps/server-*) export RUST_TEST_THREADS="${RUST_TEST_THREADS:-3}" ;;
esac
exec "$@"
