//! What the writer deletes, and when.
//!
//! What must hold:
//!
//! - Nothing is deleted for its size or age while writes fail: room is made after the first commit of a new segment, and by
//!   housekeeping between commits. So while a new segment has no commit yet, the archive may exceed `max_bytes` by a segment.
//! - Only a start deletes before it writes, and only what exceeds `max_bytes` by itself: somebody lowered that.
//! - A poisoned segment counts with what is durable in it, and the rest of its file is given back, later where not at once.
//! - A segment that is to be uploaded waits for that beyond its age. For its size it is deleted all the same, and counted.
//! - A segment that a legal hold keeps stays beyond its age and beyond `max_bytes`; the next ones go instead.
//! - A segment that holds nothing but a snapshot goes as soon as the next segment has that snapshot.

use std::io;
use std::time::Duration;

use tokio::time::Instant;
use tracing::{error, info, warn};

use super::disk::Disk;
use super::index::Index;
use super::segments::{ClosedSegment, segment_path};
use super::writer::{Active, Running};

/// How often ages are looked at.
const HOUSEKEEPING_INTERVAL: Duration = Duration::from_secs(30);
/// Returns how often ages are checked if segments are kept for `max_age`.
pub(super) fn housekeeping_interval(max_age: Duration) -> Duration {
    HOUSEKEEPING_INTERVAL.min(max_age / 4)
}

/// Poisoned segments that are kept open until their rest can be given back. Of more, the oldest are left as they are.
const UNTRIMMED_MAX: usize = 8;

/// A poisoned segment whose rest could not be given back yet.
pub(super) struct Untrimmed<F> {
    file: F,
    number: u64,
    durable_bytes: u64,
}

impl<D: Disk> Running<D> {
    /// Gives the active segment up: what is durable in it stays, and the rest is given back.
    pub(super) async fn poison(&mut self, error: &io::Error) {
        let Some(active) = self.active.take() else {
            error!(%error, "no segment can be created");
            return;
        };
        error!(segment = active.number, %error, "segment poisoned: its batch goes to a new one");
        self.writer.metrics.poisoned.inc();
        let (number, durable_bytes) = (active.number, active.offset);
        if durable_bytes == active.first_offset {
            self.writer.superfluous = Some(number);
        }
        // What is cut off was never acknowledged, and is in memory still.
        let trimmed = self.disk.truncate(&active.file, durable_bytes).await;
        let events = active.index.events();
        let file = self.retire(active, events).await;
        match trimmed {
            Ok(()) => self.close(number, file).await,
            Err(error) => {
                warn!(segment = number, %error, "cannot truncate a poisoned segment: retrying");
                self.untrimmed.push_back(Untrimmed { file, number, durable_bytes });
                if self.untrimmed.len() > UNTRIMMED_MAX
                    && let Some(oldest) = self.untrimmed.pop_front()
                {
                    self.close(oldest.number, oldest.file).await;
                }
            }
        }
    }

    /// Lists the segment among the closed ones. Its file is still open.
    pub(super) async fn retire(&mut self, active: Active<D::File>, events: u64) -> D::File {
        self.writer.closed.push_back(ClosedSegment {
            events: Some(events),
            number: active.number,
            path: segment_path(&self.writer.dir, active.number),
            bytes: active.offset,
            closed_at: self.writer.ages.now(),
        });
        self.update_gauges();
        active.file
    }

    pub(super) async fn close(&self, number: u64, file: D::File) {
        if let Err(error) = self.disk.close(file).await {
            warn!(segment = number, %error, "cannot close a segment");
        }
        // Nothing is written to it from here on.
        let closed = self.writer.closed.iter().find(|segment| segment.number == number);
        if let (Some(offsite), Some(segment)) = (&self.writer.offsite, closed) {
            offsite.closed(segment, false);
        }
    }

    /// What is due after a commit: the disk works.
    pub(super) async fn after_commit(&mut self) {
        if self.active.as_ref().is_some_and(|active| active.is_new) {
            self.make_room().await;
        }
        if let Some(active) = &mut self.active {
            active.is_new = false;
        }
        self.trim().await;
    }

    /// Gives back the rests of poisoned segments.
    pub(super) async fn trim(&mut self) {
        while let Some(Untrimmed { file, number, durable_bytes }) = self.untrimmed.pop_front() {
            if self.disk.truncate(&file, durable_bytes).await.is_err() {
                self.untrimmed.push_front(Untrimmed { file, number, durable_bytes });
                return;
            }
            info!(segment = number, "truncated a poisoned segment");
            self.close(number, file).await;
        }
    }

    /// Looks at ages when it is time to. It is called after a commit, or after a segment was opened, that succeeded.
    pub(super) async fn housekeep(&mut self) {
        if self.housekeeping > Instant::now() {
            return;
        }
        let close_after = self.writer.close_after();
        self.housekeeping = Instant::now() + housekeeping_interval(close_after);
        let now = self.writer.ages.now();
        let is_old = |active: &Active<D::File>| {
            active.offset > active.first_offset && now.saturating_sub(active.opened) > close_after
        };
        if self.active.as_ref().is_some_and(is_old) {
            self.close_active().await;
        }
        self.make_room().await;
        self.writer.ages.save_if_due(&self.writer.closed);
    }

    /// Deletes what exceeds `max_bytes` without a new segment. The newest one stays: it has the newest snapshot.
    pub(super) async fn keep_to_size(&mut self) {
        self.delete_oldest(0, 1, Duration::MAX).await;
    }

    /// Deletes what exceeds `max_bytes` with the active segment, and what is too old.
    async fn make_room(&mut self) {
        if let Some(active) = &self.active {
            self.delete_oldest(active.capacity.max(active.offset), 0, self.writer.max_age).await;
        }
    }

    /// Deletes the oldest closed segments, all but `kept` and those that a legal hold keeps, until the others and `reserved` bytes fit and none is too old.
    async fn delete_oldest(&mut self, reserved: u64, kept: usize, max_age: Duration) {
        let now = self.writer.ages.now();
        let (mut has_deleted, mut held) = (false, 0);
        self.writer.held.refresh(&self.writer.dir);
        while self.writer.closed.len() > kept + held
            && let Some(oldest) = self.writer.closed.get(held)
        {
            let is_young = now.saturating_sub(oldest.closed_at) <= max_age;
            let is_kept = is_young || self.is_waiting(oldest.number);
            if is_kept && !self.is_too_large(reserved) {
                break;
            }
            let oldest = oldest.clone();
            if self.writer.held.keeps(&oldest) {
                held += 1;
                continue;
            }
            if !self.delete(&oldest).await {
                break;
            }
            self.writer.closed.remove(held);
            has_deleted = true;
        }
        if has_deleted {
            if let Err(error) = self.disk.sync_dir(&self.writer.dir).await {
                warn!(%error, "deletions may not be durable: a start after a crash repeats them");
            }
            self.update_gauges();
        }
    }

    /// Whether a segment is to be uploaded and is not yet.
    fn is_waiting(&self, number: u64) -> bool {
        self.writer.offsite.as_ref().is_some_and(|offsite| offsite.is_waiting(number))
    }

    /// Counts what is deleted though it was not uploaded. `events` were in it, where that is known.
    fn count_unuploaded(&self, segment: u64, events: Option<u64>) {
        if self.writer.offsite.as_ref().is_some_and(|offsite| offsite.deleted(segment)) && events != Some(0) {
            self.writer.metrics.unuploaded_segments.inc();
            self.writer.metrics.unuploaded_events.inc_by(events.unwrap_or(0));
            error!(segment, events, "segment deleted before its upload: archive.max_bytes is reached");
        }
    }

    /// Whether `reserved` bytes more do not fit.
    pub(super) fn is_too_large(&self, reserved: u64) -> bool {
        let closed: u64 = self.writer.closed.iter().map(|segment| segment.bytes).sum();
        closed.saturating_add(reserved) > self.writer.max_bytes
    }

    /// Deletes the segment that the newest snapshot has made superfluous.
    pub(super) async fn delete_superfluous(&mut self) {
        let Some(number) = self.writer.superfluous.take() else { return };
        let Some(index) = self.writer.closed.iter().position(|segment| segment.number == number) else { return };
        let segment = ClosedSegment { events: Some(0), ..self.writer.closed[index].clone() };
        if self.delete(&segment).await {
            self.writer.closed.remove(index);
        }
    }

    /// Deletes a segment. False when it is still there.
    async fn delete(&mut self, segment: &ClosedSegment) -> bool {
        let events = match self.is_waiting(segment.number) {
            true => segment.events.or_else(|| indexed_events(segment)),
            false => None,
        };
        match self.disk.unlink(&segment.path).await {
            Ok(()) => {
                self.writer.metrics.deleted.inc();
                info!(segment = segment.number, "segment deleted");
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                warn!(segment = segment.number, "segment was already deleted");
            }
            Err(error) => {
                warn!(segment = segment.number, %error, "cannot delete a segment: retrying");
                return false;
            }
        }
        self.count_unuploaded(segment.number, events);
        // An open descriptor would keep its bytes.
        if let Some(index) = self.untrimmed.iter().position(|untrimmed| untrimmed.number == segment.number)
            && let Some(untrimmed) = self.untrimmed.remove(index)
        {
            self.close(untrimmed.number, untrimmed.file).await;
        }
        true
    }
}

/// Events of a segment that an earlier run closed, by its index.
fn indexed_events(segment: &ClosedSegment) -> Option<u64> {
    let file = std::fs::File::open(&segment.path).ok()?;
    Index::read(&file, segment.number).ok()?.map(|index| index.events)
}
