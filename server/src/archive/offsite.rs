//! Which closed segments are still on this disk alone, where the archive is uploaded elsewhere too.
//!
//! What enters: from the archive's thread, what it closes and deletes; from the uploader, what is safe. What leaves: the oldest
//! segment that waits, and, before a deletion, whether it waits. What must hold: neither side waits for the other; the table is
//! as long as the archive has segments.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::segments::ClosedSegment;

/// A closed segment that is not uploaded yet.
#[derive(Clone, Debug)]
pub struct Waiting {
    pub number: u64,
    pub path: PathBuf,
    pub bytes: u64,
    /// Found at the start, and not closed by this run.
    pub is_old: bool,
    since: Instant,
}

/// How much waits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backlog {
    pub segments: u64,
    pub bytes: u64,
    /// Time that the oldest has been waiting.
    pub oldest: Duration,
}

/// Closed segments that wait for their upload.
#[derive(Default)]
struct Uploads {
    waiting: BTreeMap<u64, Waiting>,
    /// Segment that the uploader has open; no deletion disturbs it.
    uploading: Option<u64>,
}

/// What the archive's thread and the uploader know of each other.
pub struct Offsite {
    every: Duration,
    state: Mutex<Uploads>,
    changed: watch::Sender<()>,
}

impl Offsite {
    /// Nothing waits. An open segment with events is closed after `every`.
    pub fn new(every: Duration) -> Self {
        Self { every, state: Mutex::default(), changed: watch::Sender::new(()) }
    }

    /// After how long an open segment is closed.
    pub fn every(&self) -> Duration {
        self.every
    }

    fn lock(&self) -> MutexGuard<'_, Uploads> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A segment is closed: it waits from now on.
    pub(super) fn closed(&self, segment: &ClosedSegment, is_old: bool) {
        let waiting = Waiting {
            number: segment.number,
            path: segment.path.clone(),
            bytes: segment.bytes,
            is_old,
            since: Instant::now(),
        };
        self.lock().waiting.insert(segment.number, waiting);
        self.changed.send_replace(());
    }

    /// Whether a segment is on this disk alone.
    pub(super) fn is_waiting(&self, number: u64) -> bool {
        self.lock().waiting.contains_key(&number)
    }

    /// A segment was deleted. True when it was on this disk alone: nobody will upload it.
    pub(super) fn deleted(&self, number: u64) -> bool {
        let mut state = self.lock();
        let was_waiting = state.waiting.remove(&number).is_some();
        was_waiting && state.uploading != Some(number)
    }

    /// The oldest that waits. It counts as under way until [`Offsite::uploaded`] or the next call.
    pub fn oldest(&self) -> Option<Waiting> {
        let mut state = self.lock();
        let oldest = state.waiting.first_key_value().map(|(_, waiting)| waiting.clone());
        state.uploading = oldest.as_ref().map(|waiting| waiting.number);
        oldest
    }

    /// A segment is elsewhere now, or has nothing in it.
    pub fn uploaded(&self, number: u64) {
        let mut state = self.lock();
        state.waiting.remove(&number);
        state.uploading = None;
    }

    /// What waits now.
    pub fn backlog(&self) -> Backlog {
        let state = self.lock();
        let oldest = state.waiting.values().map(|waiting| waiting.since.elapsed()).max();
        Backlog {
            segments: state.waiting.len() as u64,
            bytes: state.waiting.values().map(|waiting| waiting.bytes).sum(),
            oldest: oldest.unwrap_or_default(),
        }
    }

    /// Hears of everything that begins to wait.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(number: u64) -> ClosedSegment {
        ClosedSegment { number, path: PathBuf::new(), bytes: 10, closed_at: Duration::ZERO, events: None }
    }

    #[test]
    fn deletions_before_the_upload_are_reported_and_running_uploads_survive() {
        let offsite = Offsite::new(Duration::from_secs(1));
        for number in 1..=3 {
            offsite.closed(&segment(number), false);
        }
        assert_eq!(offsite.oldest().expect("one").number, 1);
        assert!(!offsite.deleted(1), "its file is open");
        assert!(offsite.deleted(2));
        assert!(offsite.is_waiting(3));
        offsite.uploaded(1);
        assert_eq!(offsite.oldest().expect("one").number, 3);
        offsite.uploaded(3);
        assert!(offsite.oldest().is_none() && !offsite.deleted(3));
        assert_eq!(offsite.backlog(), Backlog::default());
    }
}
