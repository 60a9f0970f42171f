# Tapio. Two commands do everything: `make run` and `make test`.

TARGET := $(if $(CARGO_TARGET_DIR),$(CARGO_TARGET_DIR),target)
RELEASE := $(TARGET)/release

.PHONY: run test quick tidy truth truth-docs test-kernels test-kube screenshots build install check lint deny check-deploy docs book bench clean help

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/'

run: build ## install what is missing, build, start server and collector here, show findings as they come
	@deploy/local/run.sh $(RELEASE)

build: install ## the release binaries
	cargo build --release --locked --workspace --bins

install: ## what building needs and this machine lacks
	@deploy/local/install.sh

check: lint deny ## formatting, lints, and what crates may be used

lint: install ## formatting and lints
	cargo fmt --check
	cargo clippy --workspace --all-targets --locked -- -D warnings

deny: install ## crates, licences and sources against deny.toml; builds cargo-deny first where it is missing
	@perf/lab/deny.sh

tidy: ## counts long sentences, files and functions and modules that use each other; fails when there are more than before
	@perf/lab/tidy.sh

check-deploy: ## what can be proven of deploy/ without a cluster: kustomize, schemas, linters, alerts
	@deploy/check.sh

# The end-to-end tests drive the real binaries, which `cargo test` builds before any test runs: a `cargo build` before it would
# build them with other features, and so twice. TAPIO_REQUIRE=all turns a test that would skip into a failure.
test: lint check-deploy tidy ## install what is missing, lint, run every test
	@deploy/local/install.sh nats || echo "The tests of several servers need nats-server: they skip, or fail with TAPIO_REQUIRE=all."
	@deploy/local/install.sh alerts || echo "The tests of alerts need Alertmanager: they skip, or fail with TAPIO_REQUIRE=all."
	@deploy/local/install.sh s3 || echo "The tests of the remote archive on S3 need moto: they skip, or fail with TAPIO_REQUIRE=all."
	@deploy/local/install.sh azure || echo "The test of the remote archive on Azure needs Azurite: it skips, or fails with TAPIO_REQUIRE=all."
	@deploy/local/install.sh sql || echo "The tests of SQL need DuckDB and DataFusion: they skip, or fail with TAPIO_REQUIRE=all."
	@deploy/local/install.sh mcp || echo "The test with an assistant's client needs mcp from PyPI: it skips, or fails with TAPIO_REQUIRE=all."
	@deploy/local/install.sh chromium || echo "The test of the page in a browser needs Chromium: it skips, or fails with TAPIO_REQUIRE=all."
	RUSTFLAGS="--cfg loom" cargo test --locked -p tapio-ringbuf --test loom --target-dir $(TARGET)/loom
	cargo test --locked --workspace --config 'target."cfg(unix)".runner = "perf/lab/test-runner.sh"'

quick: ## after a change: formatting, lints, all unit tests, and the quick tests of the crates that were changed
	@perf/lab/quick.sh

# Where qemu or the kernels cannot be had the script says so and skips, unless TAPIO_REQUIRE=all.
test-kernels: install ## the probes' live tests on Linux 5.10, 6.1, 6.12 and the newest, in qemu
	@deploy/local/install.sh kernels || true
	perf/lab/kernels.sh

test-kube: install ## tests on a real Kubernetes node: that of KUBECONFIG, or one that is built and started here
	perf/lab/kube/test.sh

screenshots: install ## the page with real findings, driven in Chromium; screenshots are left in target/screenshots
	@deploy/local/install.sh chromium
	TAPIO_REQUIRE=all TAPIO_SHOTS=screenshots cargo test --locked -p tapio-server --test server -- web_browser
	@ls $(TARGET)/screenshots/*.png

# The same test compares them in `make test`.
docs: install ## rewrite what docs/configuration.md and docs/metrics.md take from the programs
	cargo build --locked --workspace --bins
	TAPIO_UPDATE_DOCS=1 cargo test --locked --workspace --test perf reference::

book: ## these documents as a book in target/book/html; installs mdbook into target/tools once, then needs no network
	@docs/book.sh

truth: install ## cause deaths of every kind; fails when one is explained wrongly with certainty, or worse than docs/truth.md says
	cargo build --locked --workspace --bins
	$(TARGET)/debug/tapio-perf truth --page docs/truth.md

truth-docs: install ## the same, and rewrite the table of docs/truth.md
	cargo build --locked --workspace --bins
	TAPIO_UPDATE_DOCS=1 $(TARGET)/debug/tapio-perf truth --page docs/truth.md

bench: install ## benches and loads, as in docs/measurements.md
	cargo bench --locked --workspace --benches
	cargo build --release --locked --workspace --bins
	$(RELEASE)/tapio-perf load --nodes 4 --rate max --duration 20s --profile mixed
	$(RELEASE)/tapio-perf load --nodes 4 --rate 165000 --duration 20s --profile mixed

clean: ## everything that was built
	cargo clean
