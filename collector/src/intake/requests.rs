//! Requests for evidence that fades: what a cgroup and a signal's sender were like when something lethal arrived.
//!
//! In: lethal events of the kernel's source. Out: requests in a bounded channel, which `source/evidence.rs` answers.
//! What must hold: the sender never waits, allocates or reads a file. A request that finds no room is dropped before it
//! becomes an event, and counted in a metric.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam::channel::{Receiver, Sender, bounded};
use tapio_wire::event::{Detail, EntityId, Event, Role};
use tapio_wire::wait_status::{Ending, ending};

use crate::base::metrics::{Metrics, raise};
use crate::intake::identity::Identity;

const SIGBUS: u32 = 7;

/// Requests that wait for the thread.
pub(crate) const REQUESTS_MAX: usize = 128;
/// The longest cgroup path that a request carries: containers within containers have some 400 bytes.
const PATH_BYTES_MAX: usize = 512;

/// Counters, for metrics. What is dropped here never became an event.
#[derive(Default)]
pub struct EvidenceCounts {
    pub(crate) full: AtomicU64,
    pub(crate) rate: AtomicU64,
    pub(crate) path: AtomicU64,
    pub(crate) coalesced: AtomicU64,
    pub(crate) readings: AtomicU64,
    pub(crate) reading_us: AtomicU64,
}

impl EvidenceCounts {
    /// Requests that were dropped, by reason.
    pub fn dropped(&self) -> [(&'static str, u64); 3] {
        let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
        [("full", get(&self.full)), ("rate", get(&self.rate)), ("path", get(&self.path))]
    }

    /// Registers its metrics.
    ///
    /// # Errors
    /// When two metrics have the same name.
    pub fn register(self: &Arc<Self>, metrics: &mut Metrics) -> Result<(), prometheus::Error> {
        let readings = metrics
            .counter("tapio_collector_evidence_readings_total", "Cgroups and senders read because of a lethal event")?;
        let reading_us = metrics.counter(
            "tapio_collector_evidence_reading_microseconds_total",
            "Time spent on reading evidence from cgroups and senders",
        )?;
        let coalesced = metrics.counter(
            "tapio_collector_evidence_coalesced_total",
            "Requests answered by a recent reading of the same cgroup",
        )?;
        let dropped = metrics.counters(
            "tapio_collector_evidence_dropped_total",
            "Requests for evidence dropped before they became events, by reason",
            &["reason"],
        )?;
        let counts = Arc::clone(self);
        metrics.on_scrape(move || {
            let (count, us) = counts.readings();
            raise(&readings, count);
            raise(&reading_us, us);
            raise(&coalesced, counts.coalesced());
            for (reason, count) in counts.dropped() {
                raise(&dropped.with_label_values(&[reason]), count);
            }
        });
        Ok(())
    }

    /// Requests that a reading just before has answered.
    pub fn coalesced(&self) -> u64 {
        self.coalesced.load(Ordering::Relaxed)
    }

    /// Readings, and the microseconds that they took together.
    pub fn readings(&self) -> (u64, u64) {
        (self.readings.load(Ordering::Relaxed), self.reading_us.load(Ordering::Relaxed))
    }
}

/// What is to be read. Of a fixed size, so that asking allocates nothing.
pub struct Request {
    pub(crate) entity: EntityId,
    pub(crate) cgroup_id: u64,
    pub(crate) pid: u32,
    /// 0 when nobody sent a signal.
    pub(crate) sender_pid: u32,
    /// 0 where it is not known.
    pub(crate) sender_start_time_ns: u64,
    pub(crate) sender_entity: EntityId,
    /// Levels above the subject's memory cgroup of the one whose limit was full; [`None`] where none was.
    pub(crate) full_height: Option<u32>,
    /// True for a container's first process that did not end with code 0.
    pub(crate) is_end: bool,
    /// Nothing but the log is to be read: it ended by itself.
    pub(crate) is_log_only: bool,
    /// True after a bus error, as of memory that a file system had no room for.
    pub(crate) is_bus_error: bool,
    path_bytes: u16,
    path: [u8; PATH_BYTES_MAX],
}

impl Request {
    /// The path of the cgroup, empty where it is not known.
    pub fn path(&self) -> &str {
        let bytes = self.path.get(..usize::from(self.path_bytes)).unwrap_or_default();
        std::str::from_utf8(bytes).unwrap_or_default()
    }
}

/// Where the kernel's source asks.
pub struct Evidence {
    requests: Sender<Request>,
    with_log: bool,
    counts: Arc<EvidenceCounts>,
}

impl Evidence {
    /// Asks for what fades with this event, when it is one of those. `cgroup_id` is as in its record.
    pub fn ask(&self, event: &Event, cgroup_id: u64, sender_start_time_ns: u64, identity: &Identity) {
        let is_end = match &event.body {
            Detail::Exit(exit) => self.with_log && exit.status != 0 && exit.role == Role::First as u8,
            _ => false,
        };
        let is_log_only = matches!(&event.body, Detail::Exit(exit) if matches!(ending(exit.status), Ending::Exited(_)));
        let (sender_pid, sender_entity) = match &event.body {
            Detail::Exit(_) if is_end => (0, 0),
            Detail::Oom(_) | Detail::SignalDelivered { .. } => (0, 0),
            Detail::Exit(exit) if matches!(ending(exit.status), Ending::Killed(_)) => (0, 0),
            Detail::Signal(signal) if signal.from_kernel && signal.signal == SIGBUS => (0, 0),
            Detail::Signal(signal) if !signal.from_kernel && signal.sender_pid != event.pid && signal.result == 0 => {
                (signal.sender_pid, signal.sender_entity)
            }
            _ => return,
        };
        let full_height = match &event.body {
            Detail::Oom(oom) if oom.limit_bytes > 0 => Some(oom.limit_height),
            _ => None,
        };
        let is_bus_error = match &event.body {
            Detail::Signal(signal) => signal.signal == SIGBUS,
            Detail::SignalDelivered { signal, .. } => *signal == SIGBUS,
            Detail::Exit(exit) => ending(exit.status) == Ending::Killed(SIGBUS),
            _ => false,
        };
        let path = identity.path(cgroup_id).unwrap_or_default();
        if path.len() > PATH_BYTES_MAX {
            self.counts.path.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let mut request = Request {
            entity: event.entity,
            cgroup_id,
            pid: event.pid,
            sender_pid,
            sender_start_time_ns,
            sender_entity,
            full_height,
            is_end,
            is_log_only,
            is_bus_error,
            path_bytes: path.len() as u16,
            path: [0; PATH_BYTES_MAX],
        };
        request.path[..path.len()].copy_from_slice(path.as_bytes());
        if self.requests.try_send(request).is_err() {
            self.counts.full.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Who asks, what it asks for, and the counters of both sides. `with_log`: whether the ends of containers are asked for too.
pub fn channel(with_log: bool) -> (Evidence, Receiver<Request>, Arc<EvidenceCounts>) {
    let (sender, requests) = bounded(REQUESTS_MAX);
    let counts = Arc::<EvidenceCounts>::default();
    (Evidence { requests: sender, with_log, counts: Arc::clone(&counts) }, requests, counts)
}
