//! What the journal of findings exports: how many there are, how late they were, and whether it can be written.

use prometheus::{Histogram, HistogramOpts, IntCounter, IntCounterVec, Opts, Registry};
use tapio_wire::service::Finding;

/// What the journal exports.
#[derive(Clone)]
pub struct JournalMetrics {
    published: IntCounterVec,
    latency_seconds: Histogram,
    pub(super) failures: IntCounter,
}

impl JournalMetrics {
    /// Registers them.
    ///
    /// # Errors
    /// When one of the names is taken.
    pub fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let metrics = Self {
            published: IntCounterVec::new(
                Opts::new("tapio_server_findings_total", "Findings, each counted once, by pattern and severity."),
                &["pattern", "severity"],
            )?,
            latency_seconds: Histogram::with_opts(
                HistogramOpts::new(
                    "tapio_server_kernel_to_finding_seconds",
                    "Time from a new finding's last event (node's clock) to its publication (server's clock).",
                )
                .buckets(prometheus::exponential_buckets(0.000_5, 2.0, 16)?),
            )?,
            failures: IntCounter::new(
                "tapio_server_findings_journal_failures_total",
                "Failed attempts to write the journal of findings.",
            )?,
        };
        registry.register(Box::new(metrics.published.clone()))?;
        registry.register(Box::new(metrics.latency_seconds.clone()))?;
        registry.register(Box::new(metrics.failures.clone()))?;
        Ok(metrics)
    }

    pub(super) fn count(&self, finding: &Finding) {
        if finding.revision > 1 {
            return;
        }
        self.published.with_label_values(&[&finding.pattern, &finding.severity]).inc();
        // One that a replay found again was no news.
        let late_ns = finding.published_ns.saturating_sub(finding.ended_ns);
        if late_ns < 60_000_000_000 {
            self.latency_seconds.observe(late_ns as f64 / 1e9);
        }
    }
}
