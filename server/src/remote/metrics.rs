//! The uploads' metrics.

use prometheus::{Counter, IntCounter, IntGauge, Registry};
use tapio_wire::service::ElsewhereCount;

use crate::archive::elsewhere::{IN_REMOTE, NOT_IN_REMOTE};

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
    elsewhere_uploaded: IntGauge,
    elsewhere_missing: IntGauge,
    pub(super) read_bytes: IntCounter,
    pub(super) parquet_segments: IntCounter,
    pub(super) parquet_events: IntCounter,
    pub(super) parquet_bytes: IntCounter,
    pub(super) parquet_seconds: Counter,
    pub(super) parquet_failures: IntCounter,
    pub(super) parquet_missed: IntCounter,
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
                "Segments whose number has other contents in archive.remote: another server has this name, or the disk was restored. Nothing is overwritten; uploads continue under a new name.",
            )?,
            waiting: gauge("waiting_segments", "Closed segments that are not uploaded yet.")?,
            waiting_bytes: gauge("waiting_bytes", "Bytes of closed segments that are not uploaded yet.")?,
            oldest_seconds: gauge(
                "oldest_waiting_seconds",
                "Seconds that the oldest closed segment has waited for its upload.",
            )?,
            elsewhere_uploaded: gauge(
                "elsewhere_uploaded_events",
                "Events acknowledged elsewhere that archive.remote has.",
            )?,
            elsewhere_missing: gauge(
                "elsewhere_missing_events",
                "Events acknowledged elsewhere that archive.remote lacks: only another server's disk has, or had, them.",
            )?,
            read_bytes: counter("read_bytes_total", "Bytes fetched from archive.remote for requests about the past.")?,
            parquet_segments: counter(
                "parquet_segments_total",
                "Segments whose tables were written to archive.remote.",
            )?,
            parquet_events: counter("parquet_events_total", "Events in tables written to archive.remote.")?,
            parquet_bytes: counter("parquet_bytes_total", "Bytes of tables written to archive.remote.")?,
            parquet_seconds: Counter::new(
                "tapio_server_remote_parquet_seconds_total",
                "Time spent on making tables, excluding their uploads.",
            )?,
            parquet_failures: counter("parquet_failures_total", "Failed attempts to write tables to archive.remote.")?,
            parquet_missed: counter(
                "parquet_missed_segments_total",
                "Segments that retention deleted before their tables were written; tapio-server archive export writes them.",
            )?,
        };
        for counter in [
            &metrics.segments,
            &metrics.bytes,
            &metrics.failures,
            &metrics.collisions,
            &metrics.read_bytes,
            &metrics.parquet_segments,
            &metrics.parquet_events,
            &metrics.parquet_bytes,
            &metrics.parquet_failures,
            &metrics.parquet_missed,
        ] {
            registry.register(Box::new(counter.clone()))?;
        }
        registry.register(Box::new(metrics.parquet_seconds.clone()))?;
        for gauge in [
            &metrics.waiting,
            &metrics.waiting_bytes,
            &metrics.oldest_seconds,
            &metrics.elsewhere_uploaded,
            &metrics.elsewhere_missing,
        ] {
            registry.register(Box::new(gauge.clone()))?;
        }
        Ok(metrics)
    }

    pub(super) fn set_elsewhere(&self, uploaded: u64, missing: u64) {
        let gauge = |events: u64| i64::try_from(events).unwrap_or(i64::MAX);
        self.elsewhere_uploaded.set(gauge(uploaded));
        self.elsewhere_missing.set(gauge(missing));
    }

    /// What is known of events that are elsewhere, for status.
    pub fn elsewhere_counts(&self) -> Vec<ElsewhereCount> {
        let counts = [(IN_REMOTE, &self.elsewhere_uploaded), (NOT_IN_REMOTE, &self.elsewhere_missing)];
        let counts = counts.map(|(kind, gauge)| (kind, u64::try_from(gauge.get()).unwrap_or_default()));
        let known = counts.into_iter().filter(|(_, events)| *events > 0);
        known.map(|(kind, events)| ElsewhereCount { kind: kind.to_owned(), source: String::new(), events }).collect()
    }
}
