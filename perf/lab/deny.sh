#!/usr/bin/env bash
# Checks crates, licences and sources against deny.toml: `make deny`, a part of `make check`. A missing cargo-deny is built once, pinned,
# under target/tools, which takes minutes: so `make test` leaves this out. The advisories need a database that not everybody can fetch.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
VERSION=0.20.2
tools=${CARGO_TARGET_DIR:-target}/tools
deny=$(command -v cargo-deny || true)
if [ -z "$deny" ]; then
  deny=$tools/bin/cargo-deny
  if ! "$deny" --version 2>/dev/null | grep -qxF "cargo-deny $VERSION"; then
    echo "Building cargo-deny $VERSION under $tools: some minutes, once"
    cargo install --quiet --locked --root "$tools" --target-dir "$tools/build" --version "$VERSION" cargo-deny
    rm -rf "$tools/build"
  fi
fi
# As a subcommand the program expects its name first.
"$deny" deny --locked check bans licenses sources
