//! The spool: frames on disk that the outbox has no memory for, and that outlive the process.
//!
//! What enters: stamped frames, in sequence. What leaves: the same, in sequence, also after a restart. What must hold:
//! a frame is synced before [`Spool::append`] returns. The files together never exceed the bound. A torn tail is cut
//! when the spool is opened. A damaged frame is lost alone, and a reader learns where the next whole one is. A segment
//! (`tapio_wire::segment`) holds frames of one epoch and is deleted when all of them are acknowledged. Where that epoch
//! has ended meanwhile, they are read back as frames of the next one (`spool/endings.rs`).

mod endings;
mod marks;
mod notes;
mod reading;
mod records;
mod segment;

use std::collections::VecDeque;
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use tapio_wire::event::SOURCES;
use tapio_wire::frame::Header;
use tapio_wire::ledger::Ledger;
use tapio_wire::limits::FRAME_BYTES_MAX;
use tapio_wire::segment::{SEGMENT_HEADER_BYTES, SegmentRecordKind, append_record, record_bytes, segment_header};

use self::endings::Ending;
use self::marks::Mark;
use self::segment::{Segment, scan};
use crate::outbox::shift::Shift;

/// Bytes of frames that are written to the spool, or read from it, at once.
pub const SPOOL_BATCH_BYTES: usize = 4 << 20;
const SEGMENT_BYTES_MAX: u64 = 32 << 20;
const SUFFIX: &str = "spool";
/// Room for what is remembered beside frames: see `spool/marks.rs`.
const NOTES_BYTES: usize = 4096;

/// Why there can be no spool.
#[derive(Debug, thiserror::Error)]
#[error("cannot use {path}: {error}; name a folder that this process may write to")]
pub struct SpoolError {
    path: PathBuf,
    error: io::Error,
}

/// What an earlier run left of an epoch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Left {
    pub node: u64,
    pub epoch: u64,
    /// The first is behind the last where only `closings` are left.
    pub first_seq: u64,
    pub last_seq: u64,
    /// Events in the frames before the first, by source: they were acknowledged.
    pub acked_events: [u64; SOURCES],
    /// Header and counters of the last frame.
    pub end: Option<(Header, Ledger)>,
    /// The closing frames of epochs that ended before this one, oldest first.
    pub closings: Vec<Bytes>,
}

/// Where a frame is.
#[derive(Clone, Copy)]
struct FramePosition {
    segment: u64,
    offset: u64,
    /// The first frame that may stand there, by the epoch that it bears.
    seq: u64,
}

/// Writes frames to disk and reads them back in order.
pub struct Spool {
    dir: PathBuf,
    /// The folder, locked: two collectors would delete each other's segments.
    lock: File,
    max_bytes: u64,
    segment_bytes: u64,
    segments: VecDeque<Segment>,
    /// The last segment, while it is written to.
    open: Option<File>,
    next_number: u64,
    /// Where the next frame to read is.
    cursor: Option<FramePosition>,
    /// Epochs that have ended, oldest first.
    endings: Vec<Ending>,
}

impl Drop for Spool {
    /// Closing would not do where a child that is just being started still holds a copy of the descriptor. It fails only for a
    /// descriptor that is none.
    fn drop(&mut self) {
        let _ = self.lock.unlock();
    }
}

impl Spool {
    /// Opens the folder and cuts what is torn. Returns what was left in it, oldest epoch first.
    ///
    /// # Errors
    /// When the folder cannot be written to or read.
    pub fn open(dir: &Path, max_bytes: u64) -> Result<(Self, Vec<Left>), SpoolError> {
        let failed = |error| SpoolError { path: dir.into(), error };
        // Names and arguments of processes are private.
        DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed)?;
        let lock = File::open(dir).map_err(failed)?;
        lock.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => failed(io::Error::other("another collector uses it")),
            TryLockError::Error(error) => failed(error),
        })?;
        let mut spool = Self {
            dir: dir.into(),
            lock,
            max_bytes,
            segment_bytes: (max_bytes / 4).clamp(FRAME_BYTES_MAX as u64 + 4096, SEGMENT_BYTES_MAX),
            segments: VecDeque::new(),
            open: None,
            next_number: 1,
            cursor: None,
            endings: Vec::new(),
        };
        spool.recover().map_err(failed)?;
        let left = spool.left();
        Ok((spool, left))
    }

    fn left(&self) -> Vec<Left> {
        let mut left: Vec<Left> = Vec::new();
        for segment in &self.segments {
            let end = segment.end.as_deref().copied();
            match left.last_mut().filter(|left| left.epoch == segment.epoch) {
                Some(left) => (left.last_seq, left.end) = (segment.last_seq, end),
                None => left.push(Left {
                    node: segment.node,
                    epoch: segment.epoch,
                    first_seq: segment.first_seq,
                    last_seq: segment.last_seq,
                    acked_events: segment.acked_events,
                    end,
                    closings: Vec::new(),
                }),
            }
        }
        for left in &mut left {
            let mut shifts = self.endings.iter().filter_map(|ending| ending.shift.as_ref());
            let begun = shifts.any(|shift| shift.epoch == left.epoch).then(Mark::default);
            // Without either, an older version spooled it, which wrote no mark: nothing before it is missing.
            if let Some(mark) = Mark::read(&self.dir, left.epoch).or(begun) {
                left.first_seq = mark.seq.min(left.last_seq) + 1;
                left.acked_events = mark.events;
            }
        }
        for ending in &self.endings {
            let Some(closing) = &ending.closing else { continue };
            // What goes on behind it, or nothing.
            let index = left.partition_point(|left| left.epoch <= ending.epoch);
            if index == left.len() {
                left.push(Left {
                    node: ending.node,
                    epoch: ending.epoch + 1,
                    first_seq: 1,
                    last_seq: 0,
                    acked_events: [0; SOURCES],
                    end: None,
                    closings: Vec::new(),
                });
            }
            left[index].closings.push(closing.clone());
        }
        left
    }

    fn recover(&mut self) -> io::Result<()> {
        let (mut files, mut marked) = (Vec::new(), Vec::new());
        for entry in fs::read_dir(&self.dir)? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == notes::UNFINISHED) {
                notes::delete(&path);
                continue;
            }
            if let Some(epoch) = marks::parse_name(&path) {
                marked.push(epoch);
                continue;
            }
            let stem = path.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.parse::<u64>().ok());
            if let Some(number) = stem.filter(|_| path.extension().is_some_and(|extension| extension == SUFFIX)) {
                files.push((number, None));
            } else if let Some((number, epoch)) = endings::parse_name(&path) {
                files.push((number, Some((epoch, path))));
            }
        }
        files.sort_unstable();
        for (number, ended) in files {
            self.next_number = number + 1;
            if let Some((epoch, path)) = ended {
                match Ending::read(&path, (number, epoch)) {
                    Some(ending) => self.apply(ending),
                    None => notes::delete(&path),
                }
                continue;
            }
            match scan(number, &File::open(self.path(number))?)? {
                Some(segment) if self.follows(&segment) => {
                    let file = OpenOptions::new().write(true).open(self.path(number))?;
                    if file.metadata()?.len() > segment.bytes {
                        tracing::warn!(number, bytes = segment.bytes, "cut a torn tail of the spool");
                        file.set_len(segment.bytes)?;
                        file.sync_data()?;
                    }
                    self.segments.push_back(segment);
                }
                found => {
                    let epoch = found.map(|segment| segment.epoch);
                    tracing::warn!(number, epoch, "deleted a spool segment without new frames");
                    fs::remove_file(self.path(number))?;
                }
            }
        }
        for epoch in marked {
            if !self.segments.iter().any(|segment| segment.epoch == epoch) {
                marks::delete(&self.dir, epoch);
            }
        }
        Ok(())
    }

    fn follows(&self, segment: &Segment) -> bool {
        match self.segments.back() {
            // Between them a segment may be missing: the reader finds out.
            Some(last) if last.epoch == segment.epoch => segment.first_seq > last.last_seq,
            Some(last) => segment.epoch > last.epoch,
            None => true,
        }
    }

    fn path(&self, number: u64) -> PathBuf {
        segment_path(&self.dir, number)
    }

    /// Bytes of all files.
    pub fn bytes(&self) -> u64 {
        let endings: u64 = self.endings.iter().map(|ending| ending.bytes).sum();
        endings + self.segments.iter().map(|segment| segment.bytes).sum::<u64>()
    }

    /// Bytes of frames that still fit.
    pub fn room_bytes(&self) -> usize {
        // A batch may begin a segment or two.
        let kept_free = NOTES_BYTES + 4 * SEGMENT_HEADER_BYTES;
        (self.max_bytes.saturating_sub(self.bytes()) as usize).saturating_sub(kept_free)
    }

    /// Whether these frames still fit.
    pub fn has_room(&self, frames: &[Bytes]) -> bool {
        frames.iter().map(|frame| record_bytes(frame.len())).sum::<usize>() <= self.room_bytes()
    }

    /// Writes frames that follow the last ones in sequence, or begin an epoch, and syncs them.
    ///
    /// # Errors
    /// What the disk says. Nothing of them is in the spool then.
    pub fn append(&mut self, frames: &[Bytes]) -> io::Result<()> {
        let (segments, before) = (self.segments.len(), self.segments.back().map(|last| (last.bytes, last.last_seq)));
        let written = self.write(frames);
        if written.is_err() {
            // A segment whose sync failed is never written to again; what was whole before stays.
            self.open = None;
            for segment in self.segments.drain(segments..).collect::<Vec<_>>() {
                let _ = fs::remove_file(self.path(segment.number));
            }
            if let (Some(last), Some((bytes, last_seq))) = (self.segments.back_mut(), before) {
                (last.bytes, last.last_seq) = (bytes, last_seq);
                let path = segment_path(&self.dir, last.number);
                let _ = OpenOptions::new().write(true).open(path).and_then(|file| file.set_len(bytes));
            }
        }
        written
    }

    fn write(&mut self, frames: &[Bytes]) -> io::Result<()> {
        let mut out = Vec::new();
        if let Some(file) = &self.open
            && file.metadata()?.nlink() == 0
        {
            tracing::warn!("the active spool segment was deleted by another process");
            self.open = None;
        }
        for frame in frames {
            let (header, ledger) = match Header::check(frame) {
                Ok(checked) => checked,
                Err(error) => {
                    // It leaves a hole, which costs this frame when it is read; refusing it would keep all others from the disk.
                    tracing::error!(%error, "frame not spooled: it was damaged in memory");
                    continue;
                }
            };
            let fits = self.segments.back().is_some_and(|last| {
                last.written_epoch == header.epoch
                    && last.shift.is_none()
                    && last.bytes + record_bytes(frame.len()) as u64 <= self.segment_bytes
            });
            if !fits || self.open.is_none() {
                self.put(&mut out)?;
                let number = self.next_number;
                self.next_number += 1;
                let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(self.path(number))?;
                out.extend_from_slice(&segment_header(number));
                let segment = Segment::beginning_with(number, &header, &ledger);
                if !self.segments.iter().any(|known| known.epoch == header.epoch) {
                    let mark = Mark { seq: header.seq - 1, events: segment.acked_events };
                    mark.write(&self.dir, header.node, header.epoch)?;
                }
                self.segments.push_back(segment);
                self.open = Some(file);
                File::open(&self.dir)?.sync_all()?;
            }
            let Some(last) = self.segments.back_mut() else { continue };
            append_record(&mut out, last.number, last.bytes, SegmentRecordKind::Frame, frame);
            last.bytes += record_bytes(frame.len()) as u64;
            last.last_seq = header.seq;
            if out.len() >= SPOOL_BATCH_BYTES {
                // What is in flight may be as large as the outbox, of which there is no second one's memory.
                self.put(&mut out)?;
            }
        }
        self.put(&mut out)
    }

    /// Writes what was gathered to the end of the open segment, and syncs it.
    fn put(&self, out: &mut Vec<u8>) -> io::Result<()> {
        if let (Some(file), Some(last), false) = (&self.open, self.segments.back(), out.is_empty()) {
            file.write_all_at(out, last.bytes - out.len() as u64)?;
            file.sync_data()?;
            out.clear();
        }
        Ok(())
    }

    /// An epoch has ended: what is left of it goes on by `shift`, if there is one, and `closing` is to be sent before that.
    ///
    /// # Errors
    /// What the disk says. The end holds all the same, until this process ends.
    pub fn end_epoch(&mut self, epoch: u64, shift: Option<Shift>, closing: Option<Bytes>, node: u64) -> io::Result<()> {
        let mut ending = Ending { number: self.next_number, epoch, node, shift, closing, bytes: 0 };
        self.next_number += 1;
        let written = ending.write(&self.dir);
        self.apply(ending);
        written
    }

    fn apply(&mut self, ending: Ending) {
        if let Some(shift) = &ending.shift {
            let (dir, last) = (&self.dir, self.segments.back().map(|last| last.number));
            self.segments.retain_mut(|segment| {
                let is_kept = segment.epoch != ending.epoch || segment.shift(shift);
                if !is_kept {
                    notes::delete(&segment_path(dir, segment.number));
                }
                is_kept
            });
            if self.segments.back().map(|last| last.number) != last {
                self.open = None;
            }
            marks::delete(&self.dir, ending.epoch);
        }
        self.endings.push(ending);
    }

    /// Deletes what is remembered of ended epochs, but of those whose closing frame is `pending` or that frames here need.
    pub fn forget_endings(&mut self, pending: &[u64]) {
        let Self { endings, segments, dir, .. } = self;
        endings.retain(|ending| {
            let is_needed = pending.contains(&ending.epoch)
                || segments.iter().any(|segment| {
                    segment.number < ending.number
                        && segment.written_epoch <= ending.epoch
                        && segment.epoch > ending.epoch
                });
            if !is_needed {
                ending.delete(dir);
            }
            is_needed
        });
    }

    /// Deletes the segments of an epoch whose frames are all acknowledged: those up to `seq`, with so many events by source.
    pub fn acknowledged(&mut self, epoch: u64, seq: u64, events: [u64; SOURCES]) {
        let Some(node) = self.segments.iter().find(|s| s.epoch == epoch && s.last_seq <= seq).map(|s| s.node) else {
            return;
        };
        let goes_on = self.segments.iter().any(|s| s.epoch == epoch && s.last_seq > seq);
        if goes_on && let Err(error) = (Mark { seq, events }).write(&self.dir, node, epoch) {
            tracing::warn!(%error, epoch, "cannot note acknowledgements in the spool");
        }
        let last = self.segments.back().map(|last| last.number);
        let dir = &self.dir;
        self.segments.retain(|segment| {
            let is_kept = segment.epoch != epoch || segment.last_seq > seq;
            if !is_kept {
                notes::delete(&segment_path(dir, segment.number));
            }
            is_kept
        });
        if self.segments.back().map(|last| last.number) != last {
            self.open = None;
        }
        if !goes_on {
            marks::delete(&self.dir, epoch);
        }
    }
}

fn segment_path(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("{number:012}.{SUFFIX}"))
}

#[cfg(test)]
mod tests;
