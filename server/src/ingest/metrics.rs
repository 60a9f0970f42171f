//! The ingest's metrics.

use prometheus::{Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry};
use tapio_wire::event::{Lane, SOURCES, Source};
use tapio_wire::frame::Header;

use super::rate::Waited;

/// Counters and histograms of the streams.
#[derive(Debug)]
pub struct IngestMetrics {
    pub(super) frames: IntCounter,
    pub(super) bytes: IntCounter,
    pub(super) duplicates: IntCounter,
    pub(super) takeovers: IntCounter,
    pub(super) acks: IntCounter,
    pub(super) streams: IntGauge,
    pub(super) accept_seconds: Histogram,
    pub(super) moved_on: IntCounter,
    pub(super) waited: Waited,
    refused: IntCounterVec,
    events: IntCounterVec,
    lethal_events: [IntCounter; SOURCES],
    bulk_events: [IntCounter; SOURCES],
}

impl IngestMetrics {
    /// Creates them and makes them visible.
    pub fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let counter = |name: &str, help: &str| {
            let counter = IntCounter::new(format!("tapio_server_ingest_{name}"), help)?;
            registry.register(Box::new(counter.clone()))?;
            Ok::<_, prometheus::Error>(counter)
        };
        let counters = |name: &str, help: &str, labels: &[&str]| {
            let opts = Opts::new(format!("tapio_server_ingest_{name}"), help);
            let counters = IntCounterVec::new(opts, labels)?;
            registry.register(Box::new(counters.clone()))?;
            Ok::<_, prometheus::Error>(counters)
        };
        let streams = IntGauge::new("tapio_server_ingest_streams", "Open streams of collectors.")?;
        registry.register(Box::new(streams.clone()))?;
        let accept_seconds = Histogram::with_opts(
            HistogramOpts::new(
                "tapio_server_ingest_accept_seconds",
                "Time from a frame's arrival until it is in the archive's queue: checks, decoding, waiting for space.",
            )
            .buckets(prometheus::exponential_buckets(0.000_031_25, 2.0, 16)?),
        )?;
        registry.register(Box::new(accept_seconds.clone()))?;
        let events = counters("events_total", "Events in accepted frames.", &["source", "lane"])?;
        let of_lane = |lane: Lane| Source::ALL.map(|source| events.with_label_values(&[source.name(), lane.name()]));
        Ok(Self {
            frames: counter("frames_total", "Frames accepted.")?,
            bytes: counter("bytes_total", "Bytes of accepted frames.")?,
            duplicates: counter("duplicates_total", "Frames that the server had already accepted.")?,
            takeovers: counter("takeovers_total", "Streams cancelled because their node opened another.")?,
            moved_on: counter("moved_on_total", "Streams that the server asked to reconnect because of their age.")?,
            waited: Waited::register(registry)?,
            acks: counter("acks_total", "Acknowledgements sent.")?,
            refused: counters("refused_total", "Streams that the server refused, by reason.", &["reason"])?,
            lethal_events: of_lane(Lane::Lethal),
            bulk_events: of_lane(Lane::Bulk),
            events,
            streams,
            accept_seconds,
        })
    }

    /// Frames that the server had already accepted.
    pub fn duplicates(&self) -> u64 {
        self.duplicates.get()
    }

    /// Streams refused for `reason`.
    pub fn refused(&self, reason: &str) -> u64 {
        self.refused.with_label_values(&[reason]).get()
    }

    /// Events accepted, of one source and lane.
    pub fn events(&self, source: Source, lane: Lane) -> u64 {
        self.events.with_label_values(&[source.name(), lane.name()]).get()
    }

    pub(super) fn count_refusal(&self, reason: &str) {
        self.refused.with_label_values(&[reason]).inc();
    }

    pub(super) fn count_accepted(&self, header: &Header, bytes: usize) {
        self.frames.inc();
        self.bytes.inc_by(bytes as u64);
        let counters = if header.lethal_events > 0 { &self.lethal_events } else { &self.bulk_events };
        for (counter, &count) in counters.iter().zip(&header.source_events) {
            if count > 0 {
                counter.inc_by(u64::from(count));
            }
        }
    }
}
