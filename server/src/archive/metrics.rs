//! The archive's metrics. They are the counters that [`super::ArchiveStats`] reads, whether they are registered or not.

use prometheus::{Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry};
use tapio_wire::event::{Kind, SOURCES, Source};
use tapio_wire::service::{ElsewhereCount, KindCount};

use super::elsewhere;

/// Counters of the archive; [`super::ArchiveStats`] reads them too.
#[derive(Debug)]
pub struct ArchiveMetrics {
    pub(super) commit_seconds: Histogram,
    pub(super) index_seconds: Histogram,
    pub(super) index_bytes: IntCounter,
    pub(super) written_bytes: IntCounter,
    pub(super) frames: IntCounter,
    pub(super) lethal_events: IntCounter,
    pub(super) bulk_events: IntCounter,
    events: IntCounterVec,
    /// Counters in the order of the kinds' numbers.
    pub(super) kinds: Vec<IntCounter>,
    kind_events: IntCounterVec,
    /// Counters in the order of the kinds of elsewhere, and of the sources.
    elsewhere: [[IntCounter; SOURCES]; 2],
    elsewhere_events: IntCounterVec,
    pub(super) duplicates: IntCounter,
    pub(super) quarantined: IntCounter,
    pub(super) poisoned: IntCounter,
    pub(super) failures: IntCounter,
    pub(super) deleted: IntCounter,
    pub(super) unuploaded_segments: IntCounter,
    pub(super) unuploaded_events: IntCounter,
    pub(super) segments: IntGauge,
    pub(super) bytes: IntGauge,
    pub(super) backlog_bytes: IntGauge,
    pub(super) uring: IntGauge,
    pub(super) ready: IntGauge,
}

impl ArchiveMetrics {
    pub(super) fn new() -> Result<Self, prometheus::Error> {
        let counter = |name: &str, help: &str| IntCounter::new(format!("tapio_server_archive_{name}"), help);
        let gauge = |name: &str, help: &str| IntGauge::new(format!("tapio_server_archive_{name}"), help);
        let events = IntCounterVec::new(
            Opts::new("tapio_server_archive_events_total", "Events that the archive made durable."),
            &["lane"],
        )?;
        let kind_events = IntCounterVec::new(
            Opts::new("tapio_server_archive_kind_events_total", "Events that the archive made durable, by kind."),
            &["kind"],
        )?;
        let elsewhere_events = IntCounterVec::new(
            Opts::new(
                "tapio_server_archive_elsewhere_events_total",
                "Events that nodes report as acknowledged and that this archive lacks. empty_archive: the archive was empty shortly before, because the server is new or lost its disk.",
            ),
            &["source", "kind"],
        )?;
        let elsewhere = elsewhere::ElsewhereKind::ALL
            .map(|kind| Source::ALL.map(|source| elsewhere_events.with_label_values(&[source.name(), kind.name()])));
        Ok(Self {
            elsewhere,
            elsewhere_events,
            kinds: Kind::ALL.iter().map(|kind| kind_events.with_label_values(&[kind.name()])).collect(),
            kind_events,
            commit_seconds: Histogram::with_opts(
                HistogramOpts::new(
                    "tapio_server_archive_commit_seconds",
                    "Time from the start of a group commit to the end of its sync.",
                )
                .buckets(prometheus::exponential_buckets(0.000_125, 2.0, 16)?),
            )?,
            index_seconds: Histogram::with_opts(
                HistogramOpts::new("tapio_server_archive_index_seconds", "Time to build and write a segment's index.")
                    .buckets(prometheus::exponential_buckets(0.000_25, 4.0, 8)?),
            )?,
            index_bytes: counter("index_bytes_total", "Bytes of indexes written to segments.")?,
            written_bytes: counter("written_bytes_total", "Bytes written to segments.")?,
            frames: counter("frames_total", "Frames that the archive made durable.")?,
            lethal_events: events.with_label_values(&["lethal"]),
            bulk_events: events.with_label_values(&["bulk"]),
            events,
            duplicates: counter("duplicates_total", "Frames dropped because the archive already had them.")?,
            quarantined: counter("quarantined_total", "Damaged byte ranges that recovery copied into quarantine.")?,
            poisoned: counter("poisoned_segments_total", "Segments abandoned because a write or sync failed.")?,
            failures: counter("failures_total", "Failed attempts to create, write or sync a segment.")?,
            deleted: counter("deleted_segments_total", "Segments deleted by size or age.")?,
            unuploaded_segments: counter(
                "unuploaded_segments_total",
                "Segments that retention deleted by size before their upload to archive.remote.",
            )?,
            unuploaded_events: counter(
                "unuploaded_events_total",
                "Events in segments that retention deleted by size before their upload, where their number is known.",
            )?,
            segments: gauge("segments", "Segments on disk.")?,
            bytes: gauge("bytes", "Bytes of all segments on disk.")?,
            backlog_bytes: gauge("backlog_bytes", "Bytes of frames that wait for a group commit.")?,
            uring: IntGauge::new(
                "tapio_archive_uring",
                "1 when the archive uses io_uring, 0 when it uses plain writes.",
            )?,
            ready: gauge("ready", "1 while the archive can make frames durable.")?,
        })
    }

    /// Events that the archive made durable since the start, by kind.
    pub fn kind_counts(&self) -> Vec<KindCount> {
        let counted = Kind::ALL.iter().zip(&self.kinds).filter(|(_, counter)| counter.get() > 0);
        counted.map(|(kind, counter)| KindCount { kind: kind.name().to_owned(), events: counter.get() }).collect()
    }

    /// Counts events that are elsewhere, by source. What a node claims cannot make a counter go round.
    pub(super) fn count_elsewhere(&self, kind: elsewhere::ElsewhereKind, events: &[u64; SOURCES]) {
        for (counter, &events) in self.elsewhere[kind as usize].iter().zip(events) {
            counter.inc_by(events.min(u64::MAX - counter.get()));
        }
    }

    /// Events that are elsewhere, reported since the start.
    pub fn elsewhere_counts(&self) -> Vec<ElsewhereCount> {
        elsewhere::counts(|kind, source| self.elsewhere[kind as usize][source as usize].get())
    }

    /// Makes them visible.
    pub fn register(&self, registry: &Registry) -> Result<(), prometheus::Error> {
        registry.register(Box::new(self.commit_seconds.clone()))?;
        registry.register(Box::new(self.index_seconds.clone()))?;
        registry.register(Box::new(self.events.clone()))?;
        registry.register(Box::new(self.kind_events.clone()))?;
        registry.register(Box::new(self.elsewhere_events.clone()))?;
        for counter in [
            &self.written_bytes,
            &self.index_bytes,
            &self.frames,
            &self.duplicates,
            &self.quarantined,
            &self.poisoned,
            &self.failures,
            &self.deleted,
            &self.unuploaded_segments,
            &self.unuploaded_events,
        ] {
            registry.register(Box::new(counter.clone()))?;
        }
        for gauge in [&self.segments, &self.bytes, &self.backlog_bytes, &self.uring, &self.ready] {
            registry.register(Box::new(gauge.clone()))?;
        }
        Ok(())
    }
}
