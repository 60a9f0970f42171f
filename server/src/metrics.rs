//! The server's registry, and the ledger's metrics, which are brought up to date when they are read.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use prometheus::{Encoder, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder};
use tapio_wire::program::process;

use crate::archive::{Books, lock_books};
use crate::correlate::Topology;
use crate::findings::FindingStore;

/// Registers every metric of the server and reads the ledger on each scrape.
pub struct Metrics {
    registry: Registry,
    books: Arc<Mutex<Books>>,
    unexplained: IntGauge,
    dropped: IntCounterVec,
    resident_bytes: IntGauge,
    cpu_ms: IntGauge,
    build: IntGaugeVec,
    sizes: Sizes,
    findings: IntGauge,
    described: IntGauge,
    uptime: IntGauge,
    started: Instant,
}

/// What is asked for its size when the metrics are read.
pub struct Sizes {
    pub store: Arc<FindingStore>,
    pub topology: Arc<Topology>,
}

impl Metrics {
    /// Registers the ledger's metrics beside what `registry` has.
    ///
    /// # Errors
    /// When a name is taken.
    pub fn new(registry: Registry, books: Arc<Mutex<Books>>, sizes: Sizes) -> Result<Self, prometheus::Error> {
        let metrics = Self {
            unexplained: IntGauge::new(
                "tapio_ledger_unexplained_events",
                "Events of all nodes that no counter accounts for: must be 0.",
            )?,
            dropped: IntCounterVec::new(
                Opts::new(
                    "tapio_ledger_dropped_events_total",
                    "Events lost on all nodes, by stage (where) and reason (why).",
                ),
                &["source", "stage", "reason"],
            )?,
            resident_bytes: IntGauge::new("tapio_server_resident_bytes", "Resident memory of this process.")?,
            cpu_ms: IntGauge::new("tapio_server_cpu_milliseconds", "CPU time that this process has used.")?,
            build: IntGaugeVec::new(
                Opts::new(
                    "tapio_server_build_info",
                    "Always 1; the labels have the version of this build and `cluster.name`.",
                ),
                &["version", "cluster"],
            )?,
            findings: IntGauge::new("tapio_server_findings", "Findings that the server keeps and serves.")?,
            described: IntGauge::new(
                "tapio_server_described_entities",
                "Entities whose description (name, pod, workload, addresses) the server keeps.",
            )?,
            uptime: IntGauge::new("tapio_server_uptime_seconds", "Time since the server opened its archive.")?,
            started: Instant::now(),
            sizes,
            registry,
            books,
        };
        metrics.registry.register(Box::new(metrics.findings.clone()))?;
        metrics.registry.register(Box::new(metrics.described.clone()))?;
        metrics.registry.register(Box::new(metrics.uptime.clone()))?;
        metrics.registry.register(Box::new(metrics.unexplained.clone()))?;
        metrics.registry.register(Box::new(metrics.dropped.clone()))?;
        metrics.registry.register(Box::new(metrics.resident_bytes.clone()))?;
        metrics.registry.register(Box::new(metrics.cpu_ms.clone()))?;
        metrics.registry.register(Box::new(metrics.build.clone()))?;
        metrics.build.with_label_values(&[env!("CARGO_PKG_VERSION"), metrics.sizes.store.cluster()]).set(1);
        Ok(metrics)
    }

    /// The text format, with the numbers as of now.
    pub fn render(&self) -> Vec<u8> {
        let (unexplained, losses) = {
            let books = lock_books(&self.books);
            (books.unexplained_total(), books.losses())
        };
        self.unexplained.set(unexplained);
        for (source, stage, reason, count) in losses {
            let counter = self.dropped.with_label_values(&[source.name(), stage.name(), reason.name()]);
            // What a killed epoch held may turn out smaller once its successor has spoken; a counter does not go down.
            counter.inc_by(count.saturating_sub(counter.get()));
        }
        self.findings.set(self.sizes.store.len() as i64);
        self.described.set(self.sizes.topology.counts().0 as i64);
        self.uptime.set(self.started.elapsed().as_secs() as i64);
        self.resident_bytes.set(process::resident_bytes() as i64);
        self.cpu_ms.set(process::cpu_ms() as i64);
        let mut text = Vec::new();
        if let Err(error) = TextEncoder::new().encode(&self.registry.gather(), &mut text) {
            tracing::error!(%error, "metrics cannot be encoded");
        }
        text
    }
}
