//! What correlation exports.

use prometheus::{Histogram, HistogramOpts, IntCounterVec, IntGaugeVec, Opts, Registry};

use super::shard::ShardGauges;

/// Series by shard.
pub(super) struct Metrics {
    events: IntCounterVec,
    evicted: IntCounterVec,
    entities: IntGaugeVec,
    queue_frames: IntGaugeVec,
    core: IntGaugeVec,
    frame_seconds: Histogram,
}

impl Metrics {
    pub(super) fn new() -> Result<Self, prometheus::Error> {
        let counter = |name: &str, help: &str| IntCounterVec::new(Opts::new(name, help), &["shard"]);
        let gauge = |name: &str, help: &str| IntGaugeVec::new(Opts::new(name, help), &["shard"]);
        Ok(Self {
            events: counter("tapio_server_correlate_events_total", "Events that a correlation shard has processed.")?,
            evicted: counter(
                "tapio_server_correlate_evicted_entities_total",
                "Entities evicted early because a shard's table was full.",
            )?,
            entities: gauge("tapio_server_correlate_entities", "Entities in a correlation shard's table.")?,
            queue_frames: gauge("tapio_server_correlate_queue_frames", "Frames that wait for a correlation shard.")?,
            core: gauge(
                "tapio_server_correlate_core",
                "Number of the core that a correlation shard is pinned to, -1 when it is not pinned.",
            )?,
            frame_seconds: Histogram::with_opts(
                HistogramOpts::new(
                    "tapio_server_correlate_frame_seconds",
                    "Time from a frame's delivery to correlation until a shard has processed its part.",
                )
                .buckets(prometheus::exponential_buckets(0.000_031_25, 2.0, 16)?),
            )?,
        })
    }

    pub(super) fn shard(&self, shard: usize) -> ShardGauges {
        let label = shard.to_string();
        let gauges = ShardGauges {
            events: self.events.with_label_values(&[&label]),
            evicted: self.evicted.with_label_values(&[&label]),
            entities: self.entities.with_label_values(&[&label]),
            queue_frames: self.queue_frames.with_label_values(&[&label]),
            core: self.core.with_label_values(&[&label]),
            frame_seconds: self.frame_seconds.clone(),
        };
        gauges.core.set(-1);
        gauges
    }

    pub(super) fn register(&self, registry: &Registry) -> Result<(), prometheus::Error> {
        registry.register(Box::new(self.events.clone()))?;
        registry.register(Box::new(self.evicted.clone()))?;
        registry.register(Box::new(self.entities.clone()))?;
        registry.register(Box::new(self.queue_frames.clone()))?;
        registry.register(Box::new(self.frame_seconds.clone()))?;
        registry.register(Box::new(self.core.clone()))
    }
}
