//! The spool: frames on disk that the outbox has no memory for, and that outlive the process.
//!
//! What enters: stamped frames, in sequence. What leaves: the same, in sequence, also after a restart. What must hold: a frame is
//! synced before [`Spool::append`] returns; the files together never exceed the bound; a torn tail is cut when the spool is
//! opened, and what does not follow in sequence is not taken for a part of its epoch. A segment (`tapio_wire::segment`) holds
//! frames of one epoch and is deleted when all of them are acknowledged.

use std::collections::VecDeque;
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use crossbeam::sync::Parker;
use tapio_wire::event::{SOURCES, Source};
use tapio_wire::frame::Header;
use tapio_wire::limits::FRAME_BYTES_MAX;
use tapio_wire::segment::{
    Found, RECORD_HEADER_BYTES, RecordKind, SEGMENT_HEADER_BYTES, append_record, find_record, parse_segment_header,
    record_bytes, segment_header,
};

use crate::outbox::{Outbox, SPOOL_BATCH_BYTES};

/// The least that a spool may be bounded to: some segments of at least one frame each.
pub const MAX_BYTES_MIN: u64 = 32 << 20;
const SEGMENT_BYTES_MAX: u64 = 32 << 20;
const SUFFIX: &str = "spool";

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
    pub first_seq: u64,
    pub last_seq: u64,
    /// Events in the frames before the first, by source: they were acknowledged.
    pub acked_events: [u64; SOURCES],
}

struct Segment {
    number: u64,
    node: u64,
    epoch: u64,
    first_seq: u64,
    last_seq: u64,
    bytes: u64,
    acked_events: [u64; SOURCES],
}

/// See the module.
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
    /// Where the next frame to read is: segment and offset.
    cursor: Option<(u64, u64)>,
}

impl Drop for Spool {
    /// Closing would not do where a child that is just being started still holds a copy of the descriptor. It fails only for a
    /// descriptor that is none.
    fn drop(&mut self) {
        let _ = self.lock.unlock();
    }
}

impl Spool {
    /// Opens the folder, cuts what is torn, and tells what was left in it, oldest epoch first.
    ///
    /// # Errors
    /// When the folder cannot be written to or read.
    pub fn open(dir: &Path, max_bytes: u64) -> Result<(Self, Vec<Left>), SpoolError> {
        let failed = |error| SpoolError { path: dir.into(), error };
        // What processes are called and what they were given is nobody else's business.
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
        };
        spool.recover().map_err(failed)?;
        let mut left: Vec<Left> = Vec::new();
        for segment in &spool.segments {
            match left.last_mut().filter(|left| left.epoch == segment.epoch) {
                Some(left) => left.last_seq = segment.last_seq,
                None => left.push(Left {
                    node: segment.node,
                    epoch: segment.epoch,
                    first_seq: segment.first_seq,
                    last_seq: segment.last_seq,
                    acked_events: segment.acked_events,
                }),
            }
        }
        Ok((spool, left))
    }

    fn recover(&mut self) -> io::Result<()> {
        let mut numbers = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let path = entry?.path();
            let stem = path.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.parse::<u64>().ok());
            if let Some(number) = stem.filter(|_| path.extension().is_some_and(|extension| extension == SUFFIX)) {
                numbers.push(number);
            }
        }
        numbers.sort_unstable();
        for number in numbers {
            self.next_number = number + 1;
            match scan(number, &fs::read(self.path(number))?) {
                Some(segment) if self.follows(&segment) => {
                    let file = OpenOptions::new().write(true).open(self.path(number))?;
                    if file.metadata()?.len() > segment.bytes {
                        tracing::warn!(number, bytes = segment.bytes, "a torn tail of the spool is cut");
                        file.set_len(segment.bytes)?;
                        file.sync_data()?;
                    }
                    self.segments.push_back(segment);
                }
                found => {
                    let epoch = found.map(|segment| segment.epoch);
                    tracing::warn!(
                        number,
                        epoch,
                        "a segment of the spool is empty, damaged or out of sequence: deleted"
                    );
                    fs::remove_file(self.path(number))?;
                }
            }
        }
        Ok(())
    }

    fn follows(&self, segment: &Segment) -> bool {
        match self.segments.back() {
            Some(last) if last.epoch == segment.epoch => segment.first_seq == last.last_seq + 1,
            Some(last) => segment.epoch > last.epoch,
            None => true,
        }
    }

    fn path(&self, number: u64) -> PathBuf {
        self.dir.join(format!("{number:012}.{SUFFIX}"))
    }

    /// Bytes of all files.
    pub fn bytes(&self) -> u64 {
        self.segments.iter().map(|segment| segment.bytes).sum()
    }

    /// Bytes of frames that still fit.
    pub fn room_bytes(&self) -> usize {
        // A batch may begin a segment or two.
        (self.max_bytes.saturating_sub(self.bytes()) as usize).saturating_sub(4 * SEGMENT_HEADER_BYTES)
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
                let path = self.dir.join(format!("{:012}.{SUFFIX}", last.number));
                let _ = OpenOptions::new().write(true).open(path).and_then(|file| file.set_len(bytes));
            }
        }
        written
    }

    fn write(&mut self, frames: &[Bytes]) -> io::Result<()> {
        let mut out = Vec::new();
        for frame in frames {
            let (header, ledger) = Header::check(frame).map_err(io::Error::other)?;
            let fits = self.segments.back().is_some_and(|last| {
                last.epoch == header.epoch && last.bytes + record_bytes(frame.len()) as u64 <= self.segment_bytes
            });
            if !fits || self.open.is_none() {
                self.put(&mut out)?;
                let number = self.next_number;
                self.next_number += 1;
                let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(self.path(number))?;
                out.extend_from_slice(&segment_header(number));
                let shipped = |source: Source| {
                    let events = u64::from(header.source_events[source as usize]);
                    ledger.account(source).shipped.saturating_sub(events)
                };
                self.segments.push_back(Segment {
                    number,
                    node: header.node,
                    epoch: header.epoch,
                    first_seq: header.seq,
                    last_seq: header.seq,
                    bytes: SEGMENT_HEADER_BYTES as u64,
                    acked_events: Source::ALL.map(shipped),
                });
                self.open = Some(file);
                File::open(&self.dir)?.sync_all()?;
            }
            let Some(last) = self.segments.back_mut() else { continue };
            append_record(&mut out, last.number, last.bytes, RecordKind::Frame, frame);
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

    /// Frames of an epoch from `from_seq` on, up to `max_bytes` or one.
    ///
    /// # Errors
    /// What the disk says, or that it has lost what was written.
    pub fn read(&mut self, epoch: u64, from_seq: u64, max_bytes: usize) -> io::Result<Vec<Bytes>> {
        let mut frames: Vec<Bytes> = Vec::new();
        let (mut wanted, mut bytes) = (from_seq, 0);
        while let Some(segment) =
            self.segments.iter().find(|s| s.epoch == epoch && s.first_seq <= wanted && wanted <= s.last_seq)
        {
            let lost = || io::Error::new(io::ErrorKind::InvalidData, "the spool has changed on the disk");
            let file = File::open(self.path(segment.number))?;
            let (wanted_before, cursor) = (wanted, self.cursor);
            let mut offset = match cursor {
                Some((number, offset)) if number == segment.number && wanted != segment.first_seq => offset,
                _ => SEGMENT_HEADER_BYTES as u64,
            };
            while offset < segment.bytes {
                if bytes >= max_bytes && !frames.is_empty() {
                    return Ok(frames);
                }
                let mut head = [0; RECORD_HEADER_BYTES];
                file.read_exact_at(&mut head, offset)?;
                let length = u32::from_le_bytes([head[24], head[25], head[26], head[27]]) as usize;
                if length > FRAME_BYTES_MAX {
                    return Err(lost());
                }
                let mut record = vec![0; RECORD_HEADER_BYTES + length];
                file.read_exact_at(&mut record, offset)?;
                let Found::Record { size, .. } = find_record(&record, segment.number, offset) else {
                    return Err(lost());
                };
                let frame = Bytes::from(record).slice(RECORD_HEADER_BYTES..);
                let (header, _) = Header::check(&frame).map_err(|_| lost())?;
                if header.seq > wanted {
                    break;
                }
                offset += size as u64;
                self.cursor = Some((segment.number, offset));
                if header.seq == wanted {
                    wanted += 1;
                    bytes += frame.len();
                    frames.push(frame);
                }
            }
            if wanted == wanted_before {
                // The cursor was ahead: once more from the segment's start, where the frame must be.
                if self.cursor.take().is_none() || cursor.is_none() {
                    return Err(lost());
                }
            }
        }
        Ok(frames)
    }

    /// Deletes the segments of an epoch whose frames are all acknowledged.
    pub fn acknowledged(&mut self, epoch: u64, seq: u64) {
        while let Some(first) = self.segments.iter().position(|s| s.epoch == epoch && s.last_seq <= seq) {
            if first + 1 == self.segments.len() {
                self.open = None;
            }
            if let Some(segment) = self.segments.remove(first)
                && let Err(error) = fs::remove_file(self.path(segment.number))
            {
                tracing::warn!(%error, number = segment.number, "a segment of the spool cannot be deleted");
            }
        }
    }
}

/// How often the thread looks when nobody wakes it.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// How long reading may fail before what is on disk is given up.
const READ_FAILURE_MAX: Duration = Duration::from_secs(30);

/// Moves frames between outboxes and disk for as long as the process lives. `bytes` tells how much is on disk.
pub fn run(mut spool: Spool, outboxes: Vec<Arc<Outbox>>, parker: &Parker, bytes: &AtomicU64) {
    let mut failing_since: Option<Instant> = None;
    loop {
        let mut has_moved = false;
        for outbox in &outboxes {
            spool.acknowledged(outbox.epoch(), outbox.acknowledged().0);
            let frames = outbox.take_for_spool(spool.room_bytes());
            if !frames.is_empty() {
                let written = if spool.has_room(&frames) {
                    spool.append(&frames)
                } else {
                    Err(io::ErrorKind::StorageFull.into())
                };
                if let Err(error) = &written
                    && error.kind() != io::ErrorKind::StorageFull
                {
                    tracing::error!(%error, "the spool cannot be written");
                }
                outbox.spooled(written.is_ok());
                has_moved |= written.is_ok();
            }
            if let Some(from_seq) = outbox.wants_loaded() {
                match spool.read(outbox.epoch(), from_seq, SPOOL_BATCH_BYTES) {
                    Ok(frames) => {
                        failing_since = None;
                        has_moved |= !frames.is_empty();
                        outbox.loaded(frames);
                    }
                    // A shortage of descriptors or memory passes; frames that are given up do not come back.
                    Err(error)
                        if error.kind() != io::ErrorKind::InvalidData
                            && failing_since.is_none_or(|since| since.elapsed() < READ_FAILURE_MAX) =>
                    {
                        if failing_since.is_none() {
                            tracing::warn!(%error, "the spool cannot be read; it is tried again");
                        }
                        failing_since.get_or_insert_with(Instant::now);
                    }
                    Err(error) => {
                        failing_since = None;
                        tracing::error!(%error, epoch = outbox.epoch(), from_seq, "spooled frames are lost");
                        outbox.lost_spool();
                    }
                }
            }
        }
        bytes.store(spool.bytes(), Ordering::Relaxed);
        if !has_moved {
            parker.park_timeout(LOOK_INTERVAL);
        }
    }
}

/// Reads what a segment holds, up to the first thing that is no whole record in sequence.
fn scan(number: u64, bytes: &[u8]) -> Option<Segment> {
    if parse_segment_header(bytes)? != number {
        return None;
    }
    let mut offset = SEGMENT_HEADER_BYTES;
    let mut segment: Option<Segment> = None;
    while let Some(rest) = bytes.get(offset..)
        && let Found::Record { kind: RecordKind::Frame, bytes: frame, size } = find_record(rest, number, offset as u64)
        && let Ok((header, ledger)) = Header::check(frame)
        && offset + size <= bytes.len()
    {
        let segment = segment.get_or_insert_with(|| Segment {
            number,
            node: header.node,
            epoch: header.epoch,
            first_seq: header.seq,
            last_seq: header.seq - 1,
            bytes: 0,
            acked_events: Source::ALL.map(|source| {
                let events = u64::from(header.source_events[source as usize]);
                ledger.account(source).shipped.saturating_sub(events)
            }),
        });
        if header.seq != segment.last_seq + 1 || header.epoch != segment.epoch {
            break;
        }
        offset += size;
        segment.last_seq = header.seq;
        segment.bytes = offset as u64;
    }
    segment
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use tapio_wire::compress::Compression;
    use tapio_wire::event::{Body, Detail, Event, Lane};
    use tapio_wire::frame::{Encoder, Stamp};
    use tapio_wire::ledger::Ledger;

    use super::*;

    fn frame(epoch: u64, seq: u64, events: usize) -> Bytes {
        let event =
            Event { time_ns: 1, entity: 1, pid: 1, source: Source::Shm, body: Detail::RunQueue { wait_ns: seq } };
        let body = Body { events: vec![event; events], ..Body::default() };
        let sealed = Encoder::default().seal(&body, Lane::Bulk, Compression::None).expect("within the limits");
        let mut ledger = Ledger::default();
        ledger.account_mut(Source::Shm).shipped = seq * events as u64;
        sealed.stamp(&Stamp { node: 7, epoch, seq, boottime_ns: 1, realtime_ns: 1, is_final: false }, &ledger)
    }

    fn seqs(frames: &[Bytes]) -> Vec<u64> {
        frames.iter().map(|frame| Header::check(frame).expect("whole").0.seq).collect()
    }

    #[test]
    fn what_was_appended_is_read_in_order_and_found_after_a_restart() {
        let dir = tempfile::tempdir().expect("a folder");
        let (mut spool, left) = Spool::open(dir.path(), MAX_BYTES_MIN).expect("opened");
        assert!(left.is_empty());
        spool.append(&(5..=8).map(|seq| frame(1, seq, 10)).collect::<Vec<_>>()).expect("written");
        spool.append(&[frame(1, 9, 10)]).expect("written");
        spool.append(&[frame(2, 1, 10)]).expect("written");
        assert_eq!(seqs(&spool.read(1, 5, 1).expect("read")), [5]);
        assert_eq!(seqs(&spool.read(1, 6, usize::MAX).expect("read")), [6, 7, 8, 9]);
        assert_eq!(seqs(&spool.read(1, 7, usize::MAX).expect("read")), [7, 8, 9], "also where it was read before");
        assert!(spool.read(1, 10, usize::MAX).expect("read").is_empty());
        drop(spool);
        let (mut spool, left) = Spool::open(dir.path(), MAX_BYTES_MIN).expect("opened");
        let epochs: Vec<_> = left.iter().map(|left| (left.epoch, left.first_seq, left.last_seq)).collect();
        assert_eq!(epochs, [(1, 5, 9), (2, 1, 1)]);
        assert_eq!(left[0].acked_events[Source::Shm as usize], 40);
        spool.acknowledged(1, 9);
        assert_eq!(seqs(&spool.read(2, 1, usize::MAX).expect("read")), [1]);
        spool.acknowledged(2, 1);
        assert_eq!((spool.bytes(), fs::read_dir(dir.path()).expect("a folder").count()), (0, 0));
    }

    #[test]
    fn a_tail_torn_at_any_byte_is_cut_to_the_last_whole_frame() {
        let dir = tempfile::tempdir().expect("a folder");
        let (mut spool, _) = Spool::open(dir.path(), MAX_BYTES_MIN).expect("opened");
        spool.append(&[frame(1, 1, 2), frame(1, 2, 2)]).expect("written");
        let path = spool.path(1);
        let whole = fs::read(&path).expect("read");
        drop(spool);
        let second = SEGMENT_HEADER_BYTES + record_bytes(frame(1, 1, 2).len());
        for cut in second..whole.len() {
            fs::write(&path, &whole[..cut]).expect("written");
            let (_spool, left) = Spool::open(dir.path(), MAX_BYTES_MIN).expect("opened");
            assert_eq!((left[0].first_seq, left[0].last_seq), (1, 1), "cut at {cut}");
            assert_eq!(fs::metadata(&path).expect("there").len(), second as u64);
        }
    }

    #[test]
    fn a_folder_is_one_collectors_and_nobody_elses_to_read() {
        let dir = tempfile::tempdir().expect("a folder");
        let dir = dir.path().join("spool");
        let (mut spool, _) = Spool::open(&dir, MAX_BYTES_MIN).expect("opened");
        spool.append(&[frame(1, 1, 2)]).expect("written");
        let mode = |path: &Path| fs::metadata(path).expect("there").permissions().mode() & 0o777;
        assert_eq!((mode(&dir), mode(&spool.path(1))), (0o700, 0o600));
        let error = Spool::open(&dir, MAX_BYTES_MIN).err().expect("it is in use").to_string();
        assert!(error.contains("another collector"), "{error}");
        drop(spool);
        Spool::open(&dir, MAX_BYTES_MIN).expect("opened");
    }

    #[test]
    fn a_write_larger_than_a_batch_is_whole() {
        let dir = tempfile::tempdir().expect("a folder");
        let (mut spool, _) = Spool::open(dir.path(), MAX_BYTES_MIN).expect("opened");
        let frames: Vec<Bytes> = (1..=20).map(|seq| frame(1, seq, 10_000)).collect();
        assert!(frames.iter().map(Bytes::len).sum::<usize>() > 2 * SPOOL_BATCH_BYTES);
        spool.append(&frames).expect("written");
        drop(spool);
        let (mut spool, left) = Spool::open(dir.path(), MAX_BYTES_MIN).expect("opened");
        assert_eq!((left[0].first_seq, left[0].last_seq), (1, 20));
        assert_eq!(seqs(&spool.read(1, 1, usize::MAX).expect("read")), (1..=20).collect::<Vec<_>>());
    }

    #[test]
    fn the_bound_holds_and_is_made_of_whole_segments() {
        let dir = tempfile::tempdir().expect("a folder");
        let (mut spool, _) = Spool::open(dir.path(), MAX_BYTES_MIN).expect("opened");
        let mut seq = 1;
        while spool.has_room(&[frame(1, seq, 10_000)]) {
            spool.append(&[frame(1, seq, 10_000)]).expect("written");
            seq += 1;
        }
        let on_disk = || {
            let entries = fs::read_dir(dir.path()).expect("a folder");
            entries.map(|entry| entry.expect("an entry").metadata().expect("its size").len()).sum::<u64>()
        };
        assert!(on_disk() == spool.bytes() && on_disk() <= MAX_BYTES_MIN && on_disk() > MAX_BYTES_MIN * 9 / 10);
        spool.acknowledged(1, seq / 2);
        assert!(on_disk() < MAX_BYTES_MIN * 3 / 4 && spool.has_room(&[frame(1, seq, 10_000)]));
    }
}
