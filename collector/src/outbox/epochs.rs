//! Epochs that ended while the process went on: each is logged once, counted, and emitted as an event.
//!
//! What enters: an [`EndedEpoch`] from the outbox whose frames were lost. What leaves: an error in the log, counts for metrics, and the
//! ends that `source/ended_epochs.rs` writes as events. What must hold: the queue of events is bounded, and an end that finds no room
//! in it is still logged and counted.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::Notify;

use crate::base::metrics::{Metrics, raise};

/// Ends that wait to be emitted as events.
const WAITING_MAX: usize = 64;

/// Why an epoch was ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// A frame in memory does not match its checksum any more.
    Damaged,
    /// Servers refused a frame again and again, though its checksums are right here.
    Refused,
    /// The spool lost frames: a file is gone, or cannot be read, or is damaged.
    Spool,
}

impl Cause {
    /// Every cause, in the order of their numbers.
    pub const ALL: [Self; 3] = [Self::Damaged, Self::Refused, Self::Spool];

    /// The label of the metric.
    pub fn label(self) -> &'static str {
        match self {
            Self::Damaged => "damaged",
            Self::Refused => "refused",
            Self::Spool => "spool",
        }
    }

    /// Text of the reason in a `Gap`.
    pub fn text(self) -> &'static str {
        match self {
            Self::Damaged => "a frame was damaged in memory",
            Self::Refused => "servers refused a frame",
            Self::Spool => "the spool lost frames",
        }
    }
}

/// One end.
#[derive(Clone, Debug)]
pub struct EndedEpoch {
    pub cause: Cause,
    /// What exactly was wrong.
    pub detail: String,
    pub epoch: u64,
    /// The one that goes on; `None` where nothing was left that could.
    pub next_epoch: Option<u64>,
    /// The lost frames.
    pub first_seq: u64,
    pub last_seq: u64,
    /// The events in them.
    pub events: u64,
    /// Start and end of their stamps, `CLOCK_BOOTTIME`.
    pub from_ns: u64,
    pub until_ns: u64,
}

/// The epochs that ended: their counts, and those that have no event yet.
#[derive(Default)]
pub struct EndedEpochs {
    counts: [AtomicU64; Cause::ALL.len()],
    waiting: Mutex<VecDeque<EndedEpoch>>,
    changed: Notify,
}

impl EndedEpochs {
    /// Logs and counts an end, and queues it as an event.
    pub fn record(&self, ended: EndedEpoch) {
        tracing::error!(
            reason = ended.cause.label(),
            detail = ended.detail,
            epoch = ended.epoch,
            next_epoch = ended.next_epoch,
            first_seq = ended.first_seq,
            last_seq = ended.last_seq,
            events = ended.events,
            "frames cannot be delivered: their epoch ends and their events are counted as lost (outbox/malformed)"
        );
        self.counts[ended.cause as usize].fetch_add(1, Ordering::Relaxed);
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.len() < WAITING_MAX {
            waiting.push_back(ended);
        }
        drop(waiting);
        self.changed.notify_one();
    }

    /// Waits until an end is recorded.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Registers its metrics.
    ///
    /// # Errors
    /// When two metrics have the same name.
    pub fn register(self: &Arc<Self>, metrics: &mut Metrics) -> Result<(), prometheus::Error> {
        let help = "Epochs ended early because frames could not be delivered, by reason";
        let ended = metrics.counters("tapio_collector_epochs_ended_total", help, &["reason"])?;
        // A first increase is only seen of what was 0 before.
        for (reason, _) in self.get() {
            ended.with_label_values(&[reason]);
        }
        let epochs = Arc::clone(self);
        metrics.on_scrape(move || {
            for (reason, count) in epochs.get() {
                raise(&ended.with_label_values(&[reason]), count);
            }
        });
        Ok(())
    }

    /// Each cause and how often it ended an epoch.
    pub fn get(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        Cause::ALL.into_iter().map(|cause| (cause.label(), self.counts[cause as usize].load(Ordering::Relaxed)))
    }

    /// The oldest end that has no event yet.
    pub fn next(&self) -> Option<EndedEpoch> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }
}
