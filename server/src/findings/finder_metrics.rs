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
            clues: IntCounter::new("tapio_server_finder_clues_total", "Clues that the finder has processed.")?,
            findings: IntCounterVec::new(
                Opts::new("tapio_server_findings_published_total", "Versions of findings published, by pattern."),
                &["pattern"],
            )?,
            forgotten: IntCounter::new(
                "tapio_server_finder_forgotten_clues_total",
                "Clues evicted early because newer ones needed their space.",
            )?,
            exhausted: IntCounter::new(
                "tapio_server_finder_exhausted_searches_total",
                "Searches for evidence that the finder abandoned because they exceeded their limit.",
            )?,
            unresolved: IntCounter::new(
                "tapio_server_finder_unresolved_doubts_total",
                "Deaths and states whose findings stay possible: their clues were evicted before the missing evidence was known.",
            )?,
            nodes: IntGauge::new("tapio_server_finder_nodes", "Nodes whose clues the finder has processed recently.")?,
            queue_clues: IntGauge::new("tapio_server_finder_queue_clues", "Clues that wait for the finder.")?,
            clue_seconds: Histogram::with_opts(
                HistogramOpts::new(
                    "tapio_server_finder_clue_seconds",
                    "Time that the finder spends on a clue: storing it and evaluating the findings that it affects.",
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
