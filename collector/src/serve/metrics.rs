//! The collector's metrics, brought up to date when they are read.
//!
//! The hot path moves plain counters; a scrape copies them here. Labels have few values, all known beforehand.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use prometheus::{CounterVec, Encoder, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder};
use tapio_wire::event::{Kind, Lane, Source};
use tapio_wire::tls::{ClientFiles, Watched};

use crate::budget::governor::Governed;
use crate::intake::requests::EvidenceCounts;
use crate::intake::shared::{IdentityCounts, KindCounts};
use crate::outbox::Outbox;
use crate::outbox::epochs::EndedEpochs;
use crate::outbox::pack::PackCounts;
use crate::outbox::queue::Queues;
use crate::settings::live::Live;
use crate::ship::ShipState;
use crate::ship::latency::Latencies;
use crate::source::ebpf::MissedRuns;
use crate::source::kube::KubeState;
use crate::source::systemd::SystemdCounts;

/// Where the numbers are.
#[derive(Clone)]
pub struct Observed {
    pub outbox: Arc<Outbox>,
    pub queues: Arc<Queues>,
    pub kinds: Arc<KindCounts>,
    pub identities: Arc<IdentityCounts>,
    pub kube: Arc<KubeState>,
    pub pack: Arc<PackCounts>,
    pub ship: Arc<ShipState>,
    pub latencies: Arc<Latencies>,
    pub missed: Arc<MissedRuns>,
    pub systemd: Arc<SystemdCounts>,
    pub evidence: Arc<EvidenceCounts>,
    pub tls: Option<Arc<Watched<ClientFiles>>>,
    pub spool_bytes: Arc<AtomicU64>,
    pub ended: Arc<EndedEpochs>,
    pub governed: Arc<Governed>,
    pub live: Arc<Live>,
}

/// Holds every metric of the collector and reads its counters on each scrape.
pub struct Metrics {
    registry: Registry,
    /// One scrape at a time brings the counters up to date.
    updating: Mutex<()>,
    observed: Observed,
    emitted: IntCounterVec,
    shipped: IntCounterVec,
    dropped: IntCounterVec,
    held: IntGaugeVec,
    decoded: IntCounterVec,
    missed: IntCounterVec,
    systemd_skipped: IntCounterVec,
    systemd_coalesced: IntCounter,
    systemd_reconnects: IntCounter,
    systemd_units: IntGauge,
    evidence_readings: IntCounter,
    evidence_us: IntCounter,
    evidence_coalesced: IntCounter,
    evidence_dropped: IntCounterVec,
    identity: IntCounterVec,
    watches: IntCounterVec,
    leader: IntGauge,
    lethal_dropped: IntCounter,
    queue_batches: IntGaugeVec,
    outbox_bytes: IntGauge,
    outbox_frames: IntGauge,
    frames: IntCounter,
    raw_bytes: IntCounter,
    wire_bytes: IntCounter,
    connected: IntGauge,
    streams: IntCounter,
    failures: IntCounterVec,
    moves: IntCounter,
    governor: IntGaugeVec,
    governor_sampling: IntGauge,
    governor_decisions: IntCounterVec,
    start_cpu_ms: IntGauge,
    cluster_cpu_ms: IntCounter,
    probe_run: CounterVec,
    spool_bytes: IntGauge,
    epochs_ended: IntCounterVec,
    config_stale: IntGauge,
    config_reloads: IntCounter,
    tls_stale: IntGauge,
    tls_expires: IntGauge,
    tls_changes: IntCounter,
    ack_latency: IntGaugeVec,
    cpu_ms: IntCounter,
    rss_bytes: IntGauge,
}

impl Metrics {
    /// Registers them all.
    ///
    /// # Errors
    /// When two have the same name.
    pub fn new(observed: Observed) -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        registry.register(Box::new(observed.latencies.ack_seconds.clone()))?;
        registry.register(Box::new(observed.latencies.send_seconds.clone()))?;
        registry.register(Box::new(observed.pack.sizes.0.clone()))?;
        let counters = |name: &str, help: &str, labels: &[&str]| {
            let metric = IntCounterVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(metric.clone())).map(|()| metric)
        };
        let counter = |name: &str, help: &str| {
            let metric = IntCounter::new(name, help)?;
            registry.register(Box::new(metric.clone())).map(|()| metric)
        };
        let gauges = |name: &str, help: &str, labels: &[&str]| {
            let metric = IntGaugeVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(metric.clone())).map(|()| metric)
        };
        let gauge = |name: &str, help: &str| {
            let metric = IntGauge::new(name, help)?;
            registry.register(Box::new(metric.clone())).map(|()| metric)
        };
        Ok(Self {
            emitted: counters(
                "tapio_collector_events_emitted_total",
                "Events a source brought forth, those it could not deliver included",
                &["source"],
            )?,
            shipped: counters("tapio_collector_events_shipped_total", "Events put into frames and sent", &["source"])?,
            dropped: counters(
                "tapio_collector_events_dropped_total",
                "Events lost, by where and why",
                &["source", "stage", "reason"],
            )?,
            held: gauges("tapio_collector_events_held", "Events in rings, queues and outbox", &["source"])?,
            missed: counters(
                "tapio_collector_probe_missed_runs_total",
                "Runs of a probe that the kernel skipped because it was running on that CPU already",
                &["program"],
            )?,
            systemd_skipped: counters(
                "tapio_collector_systemd_skipped_total",
                "Changes of units that the configuration leaves out; they never become events",
                &["reason"],
            )?,
            systemd_coalesced: counter(
                "tapio_collector_systemd_coalesced_total",
                "Changes that were merged into a later event of the same unit, and jobs beyond their rate",
            )?,
            systemd_reconnects: counter("tapio_collector_systemd_reconnects_total", "Attempts to reach the bus again")?,
            systemd_units: gauge("tapio_collector_systemd_units", "Units that are remembered")?,
            evidence_readings: counter(
                "tapio_collector_evidence_readings_total",
                "Cgroups and senders read because something lethal arrived",
            )?,
            evidence_us: counter("tapio_collector_evidence_reading_microseconds_total", "Time spent on reading them")?,
            evidence_coalesced: counter(
                "tapio_collector_evidence_coalesced_total",
                "Requests that a reading of the same cgroup just before has answered",
            )?,
            evidence_dropped: counters(
                "tapio_collector_evidence_dropped_total",
                "Requests for evidence that were dropped before they became events",
                &["reason"],
            )?,
            identity: counters(
                "tapio_collector_events_identity_total",
                "Kernel events by how far their subject could be told",
                &["outcome"],
            )?,
            watches: counters(
                "tapio_collector_kube_watches_total",
                "Lists read and watches ended, by how",
                &["outcome"],
            )?,
            leader: gauge("tapio_collector_kube_leader", "1 while this collector watches the cluster's objects")?,
            lethal_dropped: counter(
                "tapio_collector_lethal_ring_full_total",
                "Records of the lethal lane that found their ring full; part of what is dropped at the ring",
            )?,
            decoded: counters("tapio_collector_events_decoded_total", "Events taken in", &["source", "lane", "kind"])?,
            queue_batches: gauges("tapio_collector_queue_batches", "Batches that wait for the packer", &["lane"])?,
            outbox_bytes: gauge("tapio_collector_outbox_bytes", "Bytes of frames not acknowledged")?,
            outbox_frames: gauge("tapio_collector_outbox_frames", "Frames not acknowledged")?,
            frames: counter("tapio_collector_frames_total", "Frames packed")?,
            raw_bytes: counter("tapio_collector_frame_raw_bytes_total", "Bytes of frame bodies before compression")?,
            wire_bytes: counter("tapio_collector_frame_wire_bytes_total", "Bytes of frames as they are sent")?,
            connected: gauge("tapio_collector_connected", "1 while there is a stream to a server")?,
            streams: counter("tapio_collector_streams_total", "Streams opened")?,
            failures: counters(
                "tapio_collector_stream_failures_total",
                "Streams that broke or could not be opened, by what to look at",
                &["reason"],
            )?,
            moves: counter("tapio_collector_stream_moves_total", "Streams moved to the preferred server")?,
            governor: gauges(
                "tapio_collector_governor_cpu_millicores",
                "CPU in thousandths of a core: the budget (0 for none), what is used, the probes' part of that, and the work for the cluster, which is not part of it",
                &["what"],
            )?,
            governor_sampling: gauge(
                "tapio_collector_governor_keep_one_in",
                "Of so many bulk events one is kept, to stay within the CPU budget",
            )?,
            governor_decisions: counters(
                "tapio_collector_governor_decisions_total",
                "Decisions to keep less or more of the bulk lane",
                &["keep"],
            )?,
            start_cpu_ms: gauge(
                "tapio_collector_start_cpu_milliseconds",
                "CPU time of this process's start, which is not held against the CPU budget",
            )?,
            cluster_cpu_ms: counter(
                "tapio_collector_cluster_cpu_milliseconds_total",
                "CPU time of the elected collector's watches of the cluster, which is not held against the CPU budget",
            )?,
            probe_run: {
                let name = "tapio_collector_probe_run_seconds_total";
                let metric =
                    CounterVec::new(Opts::new(name, "Run time of a probe, measured in one second of 8"), &["program"])?;
                registry.register(Box::new(metric.clone()))?;
                metric
            },
            config_stale: gauge(
                "tapio_collector_config_stale",
                "1 while the configuration file is refused and what it said before holds",
            )?,
            config_reloads: counter("tapio_collector_config_reloads_total", "Changed configurations that were taken")?,
            spool_bytes: gauge("tapio_collector_spool_bytes", "Bytes of the spool's files")?,
            epochs_ended: {
                let help = "Epochs that ended before the process did, since frames could not be delivered, by why";
                let metric = counters("tapio_collector_epochs_ended_total", help, &["reason"])?;
                // A first increase is only seen of what was 0 before.
                for (reason, _) in observed.ended.get() {
                    metric.with_label_values(&[reason]);
                }
                metric
            },
            tls_stale: gauge("tapio_collector_tls_stale", "1 while the TLS files cannot be used and older ones are")?,
            tls_expires: gauge(
                "tapio_collector_tls_expires_timestamp_seconds",
                "When the own certificate in use expires; 0 without one",
            )?,
            tls_changes: counter("tapio_collector_tls_changes_total", "New TLS files that were taken")?,
            ack_latency: gauges(
                "tapio_collector_event_to_ack_latency_microseconds",
                "From an event to its durable acknowledgement, by quantile, since the start",
                &["quantile"],
            )?,
            cpu_ms: counter("tapio_collector_cpu_milliseconds_total", "CPU time of this process")?,
            rss_bytes: gauge("tapio_collector_resident_bytes", "Resident memory of this process")?,
            registry,
            updating: Mutex::new(()),
            observed,
        })
    }

    /// The text format, with the numbers as of now.
    pub fn render(&self) -> Vec<u8> {
        let _one = self.updating.lock().unwrap_or_else(PoisonError::into_inner);
        self.update();
        let mut text = Vec::new();
        if let Err(error) = TextEncoder::new().encode(&self.registry.gather(), &mut text) {
            tracing::error!(%error, "metrics cannot be encoded");
        }
        text
    }

    fn update(&self) {
        let raise = |counter: &IntCounter, value: u64| counter.inc_by(value.saturating_sub(counter.get()));
        let observed = &self.observed;
        let ledger = observed.outbox.ledger();
        for source in Source::ALL {
            let account = ledger.account(source);
            raise(&self.emitted.with_label_values(&[source.name()]), account.emitted);
            raise(&self.shipped.with_label_values(&[source.name()]), account.shipped);
            self.held.with_label_values(&[source.name()]).set(account.held());
            for (stage, reason, count) in account.losses() {
                raise(&self.dropped.with_label_values(&[source.name(), stage.name(), reason.name()]), count);
            }
        }
        for (source, kind) in Source::ALL.into_iter().flat_map(|source| Kind::ALL.map(|kind| (source, kind))) {
            let count = observed.kinds.get(source, kind);
            if count > 0 {
                raise(&self.decoded.with_label_values(&[source.name(), kind.lane().name(), kind.name()]), count);
            }
        }
        for (program, count) in observed.missed.get() {
            raise(&self.missed.with_label_values(&[program]), count);
        }
        for (reason, count) in observed.systemd.skipped_by_reason() {
            raise(&self.systemd_skipped.with_label_values(&[reason]), count);
        }
        raise(&self.systemd_coalesced, observed.systemd.coalesced());
        raise(&self.systemd_reconnects, observed.systemd.reconnects());
        self.systemd_units.set(observed.systemd.units() as i64);
        let (readings, reading_us) = observed.evidence.readings();
        raise(&self.evidence_readings, readings);
        raise(&self.evidence_us, reading_us);
        raise(&self.evidence_coalesced, observed.evidence.coalesced());
        for (reason, count) in observed.evidence.dropped() {
            raise(&self.evidence_dropped.with_label_values(&[reason]), count);
        }
        for (outcome, count) in observed.identities.get() {
            raise(&self.identity.with_label_values(&[outcome]), count);
        }
        for (outcome, count) in observed.kube.watches.get() {
            raise(&self.watches.with_label_values(&[outcome]), count);
        }
        self.leader.set(i64::from(observed.kube.is_leader.load(Ordering::Relaxed)));
        raise(&self.lethal_dropped, observed.missed.lethal_dropped());
        for lane in [Lane::Lethal, Lane::Bulk] {
            self.queue_batches.with_label_values(&[lane.name()]).set(observed.queues.depth(lane) as i64);
        }
        let (bytes, frames) = observed.outbox.usage();
        self.outbox_bytes.set(bytes as i64);
        self.outbox_frames.set(frames as i64);
        raise(&self.frames, observed.pack.frames.load(Ordering::Relaxed));
        raise(&self.raw_bytes, observed.pack.raw_bytes.load(Ordering::Relaxed));
        raise(&self.wire_bytes, observed.pack.wire_bytes.load(Ordering::Relaxed));
        self.connected.set(i64::from(observed.ship.is_connected.load(Ordering::Relaxed)));
        raise(&self.streams, observed.ship.streams.load(Ordering::Relaxed));
        for (reason, count) in observed.ship.failures() {
            raise(&self.failures.with_label_values(&[reason]), count);
        }
        raise(&self.moves, observed.ship.moves.load(Ordering::Relaxed));
        self.spool_bytes.set(observed.spool_bytes.load(Ordering::Relaxed) as i64);
        for (reason, count) in observed.ended.get() {
            raise(&self.epochs_ended.with_label_values(&[reason]), count);
        }
        self.config_stale.set(i64::from(observed.live.is_stale.load(Ordering::Relaxed)));
        raise(&self.config_reloads, observed.live.reloads.load(Ordering::Relaxed));
        let governed = &observed.governed;
        for (what, milli) in [
            ("budget", governed.budget_milli),
            ("used", governed.used_milli.load(Ordering::Relaxed)),
            ("probes", governed.kernel_milli.load(Ordering::Relaxed)),
            ("cluster", governed.cluster_milli.load(Ordering::Relaxed)),
        ] {
            self.governor.with_label_values(&[what]).set(milli as i64);
        }
        self.start_cpu_ms.set((governed.start_cpu_ns.load(Ordering::Relaxed) / 1_000_000) as i64);
        raise(&self.cluster_cpu_ms, governed.cluster_cpu_ns.load(Ordering::Relaxed) / 1_000_000);
        self.governor_sampling.set(i64::from(governed.sampling()));
        for (keep, count) in [("less", &governed.raised), ("more", &governed.lowered)] {
            raise(&self.governor_decisions.with_label_values(&[keep]), count.load(Ordering::Relaxed));
        }
        for (program, ns) in governed.programs.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            let counter = self.probe_run.with_label_values(&[program]);
            counter.inc_by((*ns as f64 / 1e9 - counter.get()).max(0.0));
        }
        if let Some(tls) = &observed.tls {
            self.tls_stale.set(i64::from(tls.is_stale()));
            self.tls_expires.set(tls.expires().unwrap_or(0) as i64);
            raise(&self.tls_changes, tls.changes());
        }
        for (label, quantile) in [("0.5", 0.5), ("0.99", 0.99), ("0.999", 0.999)] {
            let us = observed.latencies.event_quantile_us(quantile);
            self.ack_latency.with_label_values(&[label]).set(us as i64);
        }
        let cpu = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
        raise(&self.cpu_ms, cpu.tv_sec as u64 * 1000 + cpu.tv_nsec as u64 / 1_000_000);
        self.rss_bytes.set(resident_bytes() as i64);
    }
}

/// Resident memory of this process: the second field of `/proc/self/statm`, in pages (proc(5)).
fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: u64 = statm.split(' ').nth(1).and_then(|field| field.parse().ok()).unwrap_or(0);
    pages * rustix::param::page_size() as u64
}
