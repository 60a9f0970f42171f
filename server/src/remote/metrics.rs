//! The uploads' metrics.

use prometheus::{IntCounter, IntGauge, Registry};

/// Counters and gauges of uploads.
#[derive(Clone, Debug)]
pub struct RemoteMetrics {
    pub(super) segments: IntCounter,
    pub(super) bytes: IntCounter,
    pub(super) failures: IntCounter,
    pub(super) collisions: IntCounter,
    pub(super) waiting: IntGauge,
    pub(super) waiting_bytes: IntGauge,
    pub(super) oldest_seconds: IntGauge,
}

impl RemoteMetrics {
    /// Makes and registers them; without a remote archive they stay 0.
    ///
    /// # Errors
    /// When the registry has such names.
    pub fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let counter = |name: &str, help: &str| IntCounter::new(format!("tapio_server_remote_{name}"), help);
        let gauge = |name: &str, help: &str| IntGauge::new(format!("tapio_server_remote_{name}"), help);
        let metrics = Self {
            segments: counter("uploaded_segments_total", "Segments uploaded to archive.remote, with their manifests.")?,
            bytes: counter("uploaded_bytes_total", "Bytes of segments uploaded to archive.remote.")?,
            failures: counter("failures_total", "Failed attempts to list archive.remote or to upload a segment.")?,
            collisions: counter(
                "collisions_total",
                "Segments whose number had other contents in archive.remote: another server has this one's name, or the \
                 disk was set back. Nothing was overwritten; uploads went on beside it.",
            )?,
            waiting: gauge("waiting_segments", "Closed segments that are not uploaded yet.")?,
            waiting_bytes: gauge("waiting_bytes", "Bytes of closed segments that are not uploaded yet.")?,
            oldest_seconds: gauge(
                "oldest_waiting_seconds",
                "How long the oldest closed segment has been waiting for its upload.",
            )?,
        };
        for counter in [&metrics.segments, &metrics.bytes, &metrics.failures, &metrics.collisions] {
            registry.register(Box::new(counter.clone()))?;
        }
        for gauge in [&metrics.waiting, &metrics.waiting_bytes, &metrics.oldest_seconds] {
            registry.register(Box::new(gauge.clone()))?;
        }
        Ok(metrics)
    }
}
