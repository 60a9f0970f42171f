//! The writer: one thread, one active segment, group commits.
//!
//! What enters: frames from the queue, in the order in which streams were given room. What leaves: their bytes in a segment,
//! and, after the sync, their place in the books and word to their streams. What must hold:
//!
//! - Nothing is reported durable before `fdatasync` returned without error for the bytes of its whole batch.
//! - A segment whose write or sync failed is poisoned: closed, never written to or synced again. The batch is still in memory and
//!   is written again to a new segment; the copies are recognised by their sequence.
//! - A segment gets its name after its header and snapshot were synced, so that a recovery never meets a half-made one.
//! - A batch that cannot be written is kept, and the queue behind it is bounded: streams feel it as lack of room.

use std::collections::VecDeque;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tapio_wire::program::backoff;
use tapio_wire::segment::{SegmentRecordKind, record_bytes, segment_header};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep};
use tracing::{error, info, warn};

use super::ages::Ages;
use super::disk::{Disk, DiskKind, write_all};
use super::elsewhere::FirstContact;
use super::holds::Held;
use super::index::IndexBuilder;
use super::metrics::ArchiveMetrics;
use super::offsite::Offsite;
use super::records::Records;
use super::retention::{Untrimmed, housekeeping_interval};
use super::segments::{ClosedSegment, new_segment_path, segment_path};
use super::{Append, ArchiveState, Books, Queued, SEGMENT_BYTES_MIN, lock_books, snapshot};

const BACKOFF_FIRST: Duration = Duration::from_millis(20);
const BACKOFF_MAX: Duration = Duration::from_secs(2);
/// The part of the commit interval that a frame which arrives alone waits for others.
const GATHER_SHARE: u32 = 10;

/// What the writer works on and with.
pub(super) struct Writer {
    pub dir: PathBuf,
    pub segment_bytes: u64,
    pub max_bytes: u64,
    pub max_age: Duration,
    pub commit_interval: Duration,
    /// A batch is closed when it has this many bytes; one frame more may be in it.
    pub commit_bytes: usize,
    pub queue: mpsc::Receiver<Queued>,
    pub stop: watch::Receiver<bool>,
    pub state: watch::Sender<ArchiveState>,
    pub books: Arc<Mutex<Books>>,
    pub metrics: Arc<ArchiveMetrics>,
    pub closed: VecDeque<ClosedSegment>,
    pub ages: Ages,
    pub first_contact: FirstContact,
    pub next_number: u64,
    /// Set where closed segments are uploaded.
    pub offsite: Option<Arc<Offsite>>,
    /// A closed segment that the first new snapshot makes superfluous.
    pub superfluous: Option<u64>,
    /// Legal holds of this directory.
    pub held: Held,
}

/// The segment that is written to.
pub(super) struct Active<F> {
    pub file: F,
    pub number: u64,
    /// Where the next record goes.
    pub offset: u64,
    /// Bytes reserved.
    pub capacity: u64,
    /// Where the first batch goes.
    pub first_offset: u64,
    /// When it was opened, in the archive's own time.
    pub opened: Duration,
    /// True until its first commit.
    pub is_new: bool,
    /// Index of what is durable in the segment.
    pub index: IndexBuilder,
}

/// The writer at work.
pub(super) struct Running<D: Disk> {
    pub disk: D,
    pub writer: Writer,
    pub active: Option<Active<D::File>>,
    /// Poisoned segments whose rest is still to be truncated.
    pub untrimmed: VecDeque<Untrimmed<D::File>>,
    /// When ages are looked at next, whatever arrives.
    pub housekeeping: Instant,
    records: Records,
    /// When the last commit started.
    committed: Option<Instant>,
}

impl Writer {
    /// After how long an open segment is closed.
    pub fn close_after(&self) -> Duration {
        self.offsite.as_ref().map_or(self.max_age, |offsite| self.max_age.min(offsite.every()))
    }

    /// Runs until it is asked to stop and the queue is empty. `started` is called when the first segment was tried.
    pub async fn run<D: Disk>(self, disk: D, started: impl FnOnce(DiskKind)) {
        let kind = disk.kind();
        self.metrics.uring.set(i64::from(kind == DiskKind::Uring));
        let mut running = Running {
            disk,
            housekeeping: Instant::now() + housekeeping_interval(self.close_after()),
            writer: self,
            active: None,
            untrimmed: VecDeque::new(),
            records: Records::default(),
            committed: None,
        };
        if let Some(offsite) = &running.writer.offsite {
            running.writer.closed.iter().for_each(|segment| offsite.closed(segment, true));
        }
        running.keep_to_size().await;
        let first = running.open_segment(0).await;
        match first {
            Ok(()) => running.set_ready(),
            Err(error) => running.set_not_ready(&error),
        }
        started(kind);
        running.serve().await;
        running.close_active().await;
        running.trim().await;
        running.writer.ages.save(&running.writer.closed);
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.metrics.ready.set(0);
        self.state.send_replace(ArchiveState::NotReady("the archive is closed".to_owned()));
    }
}

impl<D: Disk> Running<D> {
    async fn serve(&mut self) {
        let mut batch = Vec::new();
        loop {
            if self.active.is_none() && !self.write_until_done(&mut batch).await {
                return;
            }
            if !self.gather(&mut batch).await {
                return;
            }
            self.housekeep().await;
            if batch.is_empty() {
                continue;
            }
            self.committed = Some(Instant::now());
            if !self.write_until_done(&mut batch).await {
                warn!(frames = batch.len(), "stopped with unwritten frames: their collectors keep them");
                return;
            }
        }
    }

    /// Collects a batch. False when there is none and never will be; an empty batch when it is time for housekeeping.
    async fn gather(&mut self, batch: &mut Vec<Queued>) -> bool {
        let queue = &mut self.writer.queue;
        let first = tokio::select! {
            biased;
            queued = queue.recv() => queued,
            _ = self.writer.stop.wait_for(|&stop| stop), if !queue.is_closed() => {
                queue.close();
                queue.recv().await
            }
            () = tokio::time::sleep_until(self.housekeeping) => return true,
        };
        let Some(first) = first else { return false };
        let mut bytes = first.append.bytes.len();
        batch.push(first);
        // One wakeup a commit, not one a frame: what arrives until then waits in the queue, which bounds it. A frame that is alone
        // seldom stays so, since a collector sends those of both lanes at once: it is not synced before the other could arrive.
        let interval = self.writer.commit_interval;
        let gathered = self.writer.queue.is_empty().then(|| Instant::now() + interval / GATHER_SHARE);
        if let Some(due) = gathered.max(self.committed.map(|last| last + interval)) {
            tokio::select! {
                () = tokio::time::sleep_until(due) => {}
                _ = self.writer.stop.wait_for(|&stop| stop) => {}
            }
        }
        while bytes < self.writer.commit_bytes
            && let Ok(next) = self.writer.queue.try_recv()
        {
            bytes += next.append.bytes.len();
            batch.push(next);
        }
        true
    }

    /// Commits the batch, however many attempts it takes. False when it was asked to stop and still cannot.
    async fn write_until_done(&mut self, batch: &mut Vec<Queued>) -> bool {
        let started = Instant::now();
        let mut pauses = 0;
        let mut attempts = 0;
        loop {
            attempts += 1;
            let Err(error) = self.write(batch).await else {
                break;
            };
            self.writer.metrics.failures.inc();
            self.poison(&error).await;
            let full = error.kind() == io::ErrorKind::StorageFull;
            if attempts == 1 && !full {
                continue;
            }
            self.set_not_ready(&error);
            if *self.writer.stop.borrow() {
                return false;
            }
            tokio::select! {
                () = sleep(backoff::doubled(BACKOFF_FIRST, pauses, BACKOFF_MAX)) => pauses += 1,
                _ = self.writer.stop.wait_for(|&stop| stop) => {}
            }
        }
        self.set_ready();
        if !batch.is_empty() {
            self.writer.metrics.commit_seconds.observe(started.elapsed().as_secs_f64());
            self.after_commit().await;
            self.report(batch);
        }
        true
    }

    /// One attempt: a segment with room, the batch, the sync, the mark.
    async fn write(&mut self, batch: &mut [Queued]) -> io::Result<()> {
        let bytes: usize = batch.iter().map(|queued| record_bytes(queued.append.bytes.len())).sum();
        if let Some(active) = &self.active
            && active.offset + bytes as u64 > active.capacity
            && active.offset > active.first_offset
        {
            self.close_active().await;
        }
        if self.active.is_none() {
            self.open_segment(bytes as u64).await?;
        }
        if batch.is_empty() {
            return Ok(());
        }
        let Some(active) = self.active.as_mut() else {
            return Err(io::Error::other("no active segment"));
        };
        let records = &mut self.records;
        records.begin(active.number, active.offset);
        let placed = build(records, batch, &self.writer.books);
        let written = records.bytes();
        write_all(&self.disk, &active.file, records.take_pieces(), active.offset).await?;
        self.disk.sync_data(&active.file).await?;
        active.offset += written;
        for (queued, offset) in placed {
            let append = &batch[queued].append;
            active.index.add(offset, append.bytes.len(), &append.header, append.summary.as_deref());
        }
        records.begin(active.number, active.offset);
        records.push(SegmentRecordKind::Snapshot, &[]);
        let mark = records.bytes();
        // The mark only helps a recovery. When it fails the next batch takes its place, and meets the same error.
        if write_all(&self.disk, &active.file, records.take_pieces(), active.offset).await.is_ok() {
            active.offset += mark;
        }
        self.writer.metrics.written_bytes.inc_by(written + mark);
        Ok(())
    }

    /// Enters a durable batch into the books, then notifies the streams.
    fn report(&mut self, batch: &mut Vec<Queued>) {
        let metrics = &self.writer.metrics;
        let mut bytes = 0;
        {
            let mut books = lock_books(&self.writer.books);
            for queued in &*batch {
                let Append { bytes: frame, header, node_name, resumed, .. } = &queued.append;
                bytes += frame.len();
                if let Some(acknowledged) = resumed {
                    let kind = self.writer.first_contact.kind(books.epoch(header.node, header.epoch).is_some());
                    let more = books.resume(header.node, header.epoch, acknowledged);
                    metrics.count_elsewhere(kind, &more);
                }
                if books.record(header, frame) == super::Recorded::Duplicate {
                    metrics.duplicates.inc();
                    continue;
                }
                if let Some(name) = node_name
                    && books.name(header.node) != Some(name)
                {
                    books.learn_name(header.node, name);
                }
                if let Some(summary) = &queued.append.summary {
                    for (counter, &count) in metrics.kinds.iter().zip(&summary.kinds).filter(|(_, count)| **count > 0) {
                        counter.inc_by(u64::from(count));
                    }
                }
                metrics.frames.inc();
                metrics.lethal_events.inc_by(u64::from(header.lethal_events));
                metrics.bulk_events.inc_by(u64::from(header.bulk_events));
            }
        }
        metrics.backlog_bytes.sub(bytes as i64);
        for (index, queued) in batch.iter().enumerate() {
            let append = &queued.append;
            // Of consecutive frames of a stream the last one speaks for all.
            let superseded = batch.get(index + 1).is_some_and(|next| {
                Arc::ptr_eq(&next.append.on_durable, &append.on_durable)
                    && next.append.header.epoch == append.header.epoch
                    && next.append.header.seq >= append.header.seq
            });
            if !superseded {
                append.on_durable.durable(append.header.epoch, append.header.seq);
            }
        }
        batch.clear();
    }

    /// Opens the next segment, in which a batch of `wanted` bytes is to fit.
    async fn open_segment(&mut self, wanted: u64) -> io::Result<()> {
        let writer = &mut self.writer;
        let number = writer.next_number;
        // A number is used once, whatever becomes of the attempt.
        writer.next_number += 1;
        let mut content = Vec::new();
        snapshot::encode_books(&lock_books(&writer.books), &mut content);
        self.records.begin(number, 0);
        self.records.push_raw(&segment_header(number));
        self.records.push_shared(SegmentRecordKind::Snapshot, content.into());
        let first_offset = self.records.bytes();
        let mut capacity = first_offset + writer.segment_bytes;
        let new = new_segment_path(&self.writer.dir, number);
        let path = segment_path(&self.writer.dir, number);
        let mut created = self.disk.create(&new, capacity).await;
        if let Err(error) = &created
            && error.kind() == io::ErrorKind::StorageFull
            && self.is_too_large(capacity)
        {
            // Room is made once a commit has shown that the disk works: a small segment is enough for one.
            let _ = self.disk.unlink(&new).await;
            capacity = first_offset + wanted.max(SEGMENT_BYTES_MIN);
            created = self.disk.create(&new, capacity).await;
        }
        let file = match created {
            Ok(file) => file,
            Err(error) => {
                // It may or may not exist.
                let _ = self.disk.unlink(&new).await;
                return Err(error);
            }
        };
        let mut result = write_all(&self.disk, &file, self.records.take_pieces(), 0).await;
        if result.is_ok() {
            result = self.disk.sync_data(&file).await;
        }
        if result.is_ok() {
            result = self.disk.rename(&new, &path).await;
        }
        if result.is_ok() {
            result = self.disk.sync_dir(&self.writer.dir).await;
        }
        if let Err(error) = result {
            // Best effort: recovery removes what bears the new name, and an empty segment does no harm.
            let _ = self.disk.close(file).await;
            let _ = self.disk.unlink(&new).await;
            let _ = self.disk.unlink(&path).await;
            return Err(error);
        }
        self.active = Some(Active {
            file,
            number,
            offset: first_offset,
            capacity,
            first_offset,
            opened: self.writer.ages.now(),
            is_new: true,
            index: IndexBuilder::default(),
        });
        self.delete_superfluous().await;
        self.update_gauges();
        Ok(())
    }

    pub(super) async fn close_active(&mut self) {
        let Some(mut active) = self.active.take() else {
            return;
        };
        let events = active.index.events();
        self.write_index(&mut active).await;
        // The preallocated rest is truncated; should this not reach the disk, the zeros are no records.
        if let Err(error) = self.disk.truncate(&active.file, active.offset).await {
            warn!(segment = active.number, %error, "cannot truncate a closed segment");
        }
        let number = active.number;
        let file = self.retire(active, events).await;
        self.close(number, file).await;
    }

    /// Writes the index behind the last record, without a sync: without it the segment is scanned.
    async fn write_index(&mut self, active: &mut Active<D::File>) {
        let index = std::mem::take(&mut active.index);
        if index.is_empty() {
            return;
        }
        let started = Instant::now();
        let content = index.finish(active.number, active.offset);
        let records = &mut self.records;
        records.begin(active.number, active.offset);
        records.push_shared(SegmentRecordKind::Index, content.into());
        let length = records.bytes();
        let result = write_all(&self.disk, &active.file, records.take_pieces(), active.offset).await;
        match result {
            Ok(()) => {
                active.offset += length;
                self.writer.metrics.index_seconds.observe(started.elapsed().as_secs_f64());
                self.writer.metrics.index_bytes.inc_by(length);
            }
            Err(error) => {
                warn!(segment = active.number, %error, "cannot write a segment's index: queries scan the segment")
            }
        }
    }

    pub(super) fn update_gauges(&self) {
        let writer = &self.writer;
        let closed: u64 = writer.closed.iter().map(|segment| segment.bytes).sum();
        let active = self.active.as_ref().map_or(0, |active| active.capacity);
        let segments = writer.closed.len() + usize::from(self.active.is_some());
        writer.metrics.segments.set(segments as i64);
        writer.metrics.bytes.set((closed + active) as i64);
    }

    fn set_ready(&self) {
        let changed = self.writer.state.send_if_modified(|state| {
            let changed = *state != ArchiveState::Ready;
            *state = ArchiveState::Ready;
            changed
        });
        if changed {
            self.writer.metrics.ready.set(1);
            info!(disk = self.disk.kind().name(), "archive ready");
        }
    }

    fn set_not_ready(&self, error: &io::Error) {
        let reason = if error.kind() == io::ErrorKind::StorageFull {
            format!("the disk of {} is full: free space", self.writer.dir.display())
        } else {
            format!("{} cannot be written: {error}", self.writer.dir.display())
        };
        self.writer.metrics.ready.set(0);
        let state = ArchiveState::NotReady(reason);
        let changed = self.writer.state.send_if_modified(|old| {
            let changed = *old != state;
            old.clone_from(&state);
            changed
        });
        if changed && let ArchiveState::NotReady(reason) = state {
            error!(reason, "archive not ready: no frame is acknowledged until it is");
        }
    }
}

/// Adds the records of a batch, and of the names that the books do not have. Returns which frames of the batch go where.
fn build(records: &mut Records, batch: &[Queued], books: &Mutex<Books>) -> Vec<(usize, u64)> {
    let mut placed = Vec::with_capacity(batch.len());
    let books = lock_books(books);
    let mut named = None;
    let mut content = Vec::new();
    for (queued, Queued { append, .. }) in batch.iter().enumerate() {
        let header = &append.header;
        if header.seq <= books.durable_seq(header.node, header.epoch) {
            continue;
        }
        if let Some(acknowledged) = &append.resumed {
            content.clear();
            snapshot::encode_resumed(header.node, header.epoch, acknowledged, &mut content);
            records.push(SegmentRecordKind::Snapshot, &content);
        }
        placed.push((queued, records.offset()));
        records.push_shared(SegmentRecordKind::Frame, append.bytes.clone());
        if let Some(name) = &append.node_name
            && named != Some(header.node)
            && books.name(header.node) != Some(name)
        {
            named = Some(header.node);
            content.clear();
            snapshot::encode_name(header.node, name, &mut content);
            records.push(SegmentRecordKind::Snapshot, &content);
        }
    }
    placed
}
