//! What the finder exports.

use prometheus::{Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry};

/// What the finder exports.
#[derive(Clone)]
pub struct FinderMetrics {
    pub(super) clues: IntCounter,
    pub(super) findings: IntCounterVec,
    pub(super) forgotten: IntCounter,
    pub(super) exhausted: IntCounter,
    pub(super) unresolved: IntCounter,
    pub(super) nodes: IntGauge,
    pub(super) queue_clues: IntGauge,
    pub(super) clue_seconds: Histogram,
}

impl FinderMetrics {
    pub(super) fn new() -> Result<Self, prometheus::Error> {
        Ok(Self {
            clues: IntCounter::new("tapio_server_finder_clues_total", "Clues that the finder has dealt with.")?,
            findings: IntCounterVec::new(
                Opts::new(
                    "tapio_server_findings_published_total",
                    "Findings published, changed ones again, by pattern.",
                ),
                &["pattern"],
            )?,
            forgotten: IntCounter::new(
                "tapio_server_finder_forgotten_clues_total",
                "Clues that were forgotten because newer ones needed their place.",
            )?,
            exhausted: IntCounter::new(
                "tapio_server_finder_exhausted_searches_total",
                "Searches for evidence given up because there was too much to look at.",
            )?,
            unresolved: IntCounter::new(
                "tapio_server_finder_unresolved_doubts_total",
                "Deaths and states whose findings stay possible: before it was known what was missing, their clues were forgotten.",
            )?,
            nodes: IntGauge::new("tapio_server_finder_nodes", "Nodes whose clues the finder has dealt with lately.")?,
            queue_clues: IntGauge::new("tapio_server_finder_queue_clues", "Clues that wait for the finder.")?,
            clue_seconds: Histogram::with_opts(
                HistogramOpts::new(
                    "tapio_server_finder_clue_seconds",
                    "Time that the finder took for a clue: remembering it, and looking at the findings that it touches.",
                )
                .buckets(prometheus::exponential_buckets(0.000_001, 4.0, 12)?),
            )?,
        })
    }

    /// Registers them.
    ///
    /// # Errors
    /// When one of the names is taken.
    pub fn register(&self, registry: &Registry) -> Result<(), prometheus::Error> {
        registry.register(Box::new(self.clues.clone()))?;
        registry.register(Box::new(self.findings.clone()))?;
        registry.register(Box::new(self.forgotten.clone()))?;
        registry.register(Box::new(self.exhausted.clone()))?;
        registry.register(Box::new(self.unresolved.clone()))?;
        registry.register(Box::new(self.queue_clues.clone()))?;
        registry.register(Box::new(self.clue_seconds.clone()))?;
        registry.register(Box::new(self.nodes.clone()))
    }
}
