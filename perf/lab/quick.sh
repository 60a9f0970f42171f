#!/usr/bin/env bash
# What a change needs before it is committed: `make quick`. Formatting, lints and unit tests of the workspace, of which cargo builds
# only what changed, and the integration tests of the crates that differ from the upstream branch (or TAPIO_BASE, or HEAD), without
# the slowest. `make test` runs all.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
began=$SECONDS
trap 'echo "make quick ended with $? after $((SECONDS - began)) s"' EXIT
CRATES=(collector perf probes ringbuf server wire)
# More than 10 s each.
SLOW=(end_to_end:: endpoints:: spool:: storm:: tls:: truth::)

base=${TAPIO_BASE:-$(git merge-base HEAD '@{upstream}' 2>/dev/null || echo HEAD)}
files=$(git diff --name-only "$base"; git ls-files --others --exclude-standard)
changed=()
for crate in "${CRATES[@]}"; do
  # The first: what every crate is built by.
  if grep -qE "^(Cargo\.(toml|lock)\$|$crate/)" <<<"$files"; then changed+=("$crate"); fi
done
echo "Changed since $(git rev-parse --short "$base"): ${changed[*]:-no crate}"

# The whole workspace, as `make test` does: with fewer crates their dependencies would have other features, and be built again.
cargo fmt --check
cargo clippy --workspace --all-targets --locked -- -D warnings
cargo test --locked --workspace --lib
targets=() skipped=()
for crate in "${changed[@]}"; do
  case $crate in
    wire) targets+=(--test fields --test frames) ;;
    # Its tests drive the programs, which are built with their crates' tests. A skipped name is any part of a test's, so perf's
    # tests run by themselves.
    perf)
      for name in "${SLOW[@]}"; do skipped+=(--skip "$name"); done
      cargo test --locked --workspace --test perf --test server --test collector --no-run
      cargo test --locked --workspace --test perf -- "${skipped[@]}"
      ;;
    *) targets+=(--test "$crate") ;;
  esac
done
[ ${#targets[@]} -eq 0 ] || cargo test --locked --workspace "${targets[@]}"
