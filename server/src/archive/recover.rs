//! What a start does before anything is written: the books are rebuilt, damage is set aside, torn tails are cut.
//!
//! What enters: a directory that this process has locked. What leaves: the books as of the last durable frame, the segments
//! that exist, and, through [`Recovered::replay`], the frames of the last analysis window. What must hold:
//!
//! - Only the newest segment whose snapshot is sound, and those after it, are read for the books.
//! - A frame counts as durable when it is on the disk: each of these segments is synced and dropped from the page cache before it
//!   is read. A killed server leaves written pages unsynced, and a failed sync leaves pages that look clean.
//! - Damage before a segment's last commit mark hits frames that were acknowledged: the rest is kept, and the gap counted.
//!   From damage behind the last mark on, the segment is cut: that batch was never acknowledged, and a sequence with a hole
//!   must not be reported as durable.
//! - A segment that was cut, emptied or deleted is noticed without reading the others ([`damage::gaps`]). What the snapshots
//!   count and no segment has is no longer archived: the books count it as lost, so the ledger does not close.
//! - Nothing is appended to an old segment: the writer always starts a new one. So bytes whose state on the disk this process did
//!   not establish are never mixed with its own; the cost is one preallocation.

use std::collections::{HashMap, VecDeque};
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use foldhash::fast::RandomState;
use rustix::fs::{Advice, fadvise};
use rustix::io::Errno;
use tapio_wire::frame::Header;
use tracing::{info, warn};

use super::ArchiveError;
use super::books::{Books, Recorded};
use super::damage::{self, Damage};
use super::reader::SegmentFile;
use super::scan::{Item, Scanner, Tail};
use super::segments::{self, ClosedSegment};
use super::snapshot::Note;

/// Damaged places that are kept for people to look at.
const QUARANTINE_FILES_MAX: usize = 64;
/// Bytes kept of each.
const QUARANTINE_BYTES_MAX: u64 = 8 << 20;
/// Damaged places of one segment that are listed one by one; the rest counts as one.
const DAMAGES_MAX: usize = 4096;

/// What a recovery found.
pub struct Recovered {
    pub books: Books,
    /// Oldest first.
    pub segments: VecDeque<ClosedSegment>,
    /// The number for the next segment.
    pub next_number: u64,
    /// The newest segment, when nothing is in it that the next snapshot does not have.
    pub empty_newest: Option<u64>,
    dir: PathBuf,
    surveys: HashMap<u64, Survey, RandomState>,
    /// Damaged places that the books have not counted yet.
    damaged: u64,
    /// When a segment was written to last, by the wall clock of then.
    written_at: SystemTime,
}

/// What one scan of a segment finds.
#[derive(Clone, Debug, Default)]
struct Survey {
    frames: u64,
    newest_ns: u64,
    /// Records from here on do not count.
    end: u64,
    damages: Vec<Range<u64>>,
    tail_damaged: bool,
    base: Option<Box<Books>>,
}

/// Rebuilds the books from `dir`.
pub fn recover(dir: &Path) -> Result<Recovered, ArchiveError> {
    let refused = |source: io::Error| ArchiveError::Directory { dir: dir.to_owned(), source };
    let segments = segments::list(dir).map_err(refused)?;
    // Before anything is cut.
    let newest = segments.back().and_then(|newest| fs::metadata(&newest.path).and_then(|file| file.modified()).ok());
    let mut recovered = Recovered {
        books: Books::default(),
        next_number: segments.back().map_or(1, |newest| newest.number + 1),
        segments,
        empty_newest: None,
        dir: dir.to_owned(),
        surveys: HashMap::default(),
        damaged: 0,
        written_at: newest.unwrap_or(UNIX_EPOCH),
    };
    // Before anything is cut, too.
    let gaps = gaps(&recovered.segments);
    let mut base_number = None;
    let mut first = recovered.segments.len();
    while first > 0 {
        first -= 1;
        let mut survey = recovered.survey(first)?;
        let base = survey.base.take();
        recovered.surveys.insert(recovered.segments[first].number, survey);
        if let Some(base) = base {
            recovered.books = *base;
            base_number = Some(recovered.segments[first].number);
            break;
        }
        warn!(
            segment = %recovered.segments[first].path.display(),
            "no valid snapshot: going one segment further back"
        );
    }
    for index in first..recovered.segments.len() {
        recovered.apply(index)?;
    }
    for gap in &gaps {
        // What is missing behind the base was never counted.
        if base_number.is_some() && gap.counted_by.is_some() && gap.counted_by <= base_number {
            gap.count_lost(&mut recovered.books);
        }
        recovered.damaged += u64::from(set_gap_aside(dir, gap));
    }
    recovered.count_damage();
    if let Some(newest) = recovered.segments.back() {
        let survey = &recovered.surveys[&newest.number];
        let is_short = gaps.iter().any(|gap| gap.segment == newest.number);
        let empty = survey.frames == 0 && survey.damages.is_empty() && !survey.tail_damaged && !is_short;
        recovered.empty_newest = empty.then_some(newest.number);
    }
    let totals = recovered.books.totals();
    info!(
        segments = recovered.segments.len(),
        read = recovered.segments.len() - first,
        frames = totals.frames,
        events = totals.events,
        duplicates = totals.duplicates,
        quarantined = totals.quarantined,
        "archive recovered"
    );
    Ok(recovered)
}

impl Recovered {
    /// Looks through a segment, sets its damage aside and cuts its tail.
    fn survey(&mut self, index: usize) -> Result<Survey, ArchiveError> {
        let segment = &mut self.segments[index];
        let failed = |source: io::Error| ArchiveError::Segment { path: segment.path.clone(), source };
        let file = File::options().read(true).write(true).open(&segment.path).map_err(failed)?;
        if let Err(error) = file.sync_data() {
            warn!(segment = %segment.path.display(), %error, "sync failed: only what is on the disk counts");
        }
        // Advice may be refused; the checksums still hold, and the sync above has reported failed pages.
        let _ = fadvise(&file, 0, None, Advice::DontNeed);
        let survey = match survey(&file, segment.number) {
            Ok(survey) => survey,
            Err(error) if error.raw_os_error() == Some(Errno::IO.raw_os_error()) => {
                warn!(segment = %segment.path.display(), %error, "unreadable segment skipped");
                self.damaged += 1;
                return Ok(Survey::default());
            }
            Err(error) => return Err(failed(error)),
        };
        let tail = survey.tail_damaged.then_some(survey.end..segment.bytes);
        for range in survey.damages.iter().cloned().chain(tail) {
            if quarantine(&self.dir, &file, segment.number, &range) {
                self.damaged += 1;
            }
        }
        if survey.end < segment.bytes {
            file.set_len(survey.end).map_err(failed)?;
            segment.bytes = survey.end;
        }
        Ok(survey)
    }

    fn count_damage(&mut self) {
        self.books.count_quarantined(std::mem::take(&mut self.damaged));
    }

    /// Counts a segment's frames in the books.
    fn apply(&mut self, index: usize) -> Result<(), ArchiveError> {
        let path = self.segments[index].path.clone();
        let books = &mut self.books;
        let counted = self.surveys[&self.segments[index].number].end;
        each_frame(&self.segments[index], counted, &mut |item| match item {
            Item::Frame { header, bytes } => {
                if let Recorded::New { missing } = books.record(&header, bytes)
                    && missing > 0
                {
                    warn!(
                        segment = %path.display(),
                        node = header.node,
                        epoch = header.epoch,
                        seq = header.seq,
                        missing,
                        "frames are missing before this one"
                    );
                }
            }
            Item::Note(Note::Name { node, name }) => books.learn_name(node, &name),
            Item::Note(Note::Resumed { node, epoch, acknowledged }) => {
                books.resume(node, epoch, &acknowledged);
            }
            Item::Note(_) | Item::Damaged(_) | Item::Tail { .. } => {}
        })
    }

    /// Hands over the frames whose realtime is within `window` of the newest frame's, oldest segment first, each once.
    ///
    /// A poisoned segment may hold frames that a crash kept from being written again to the next one, whose snapshot does not
    /// count them. They were not acknowledged: their collector sends them again, and then they are handed over.
    pub fn replay(&mut self, window: Duration, each: &mut dyn FnMut(&Header, &[u8])) -> Result<(), ArchiveError> {
        if window.is_zero() {
            return Ok(());
        }
        let window_ns = u64::try_from(window.as_nanos()).unwrap_or(u64::MAX);
        // A node whose clock is ahead must not push the others out of the window. Nor must a clock of this machine that is behind,
        // as before it was set after a boot, let everything in: it is later than the last write.
        let now_ns = SystemTime::now()
            .max(self.written_at)
            .duration_since(UNIX_EPOCH)
            .map_or(u64::MAX, |since| u64::try_from(since.as_nanos()).unwrap_or(u64::MAX));
        let mut newest_ns = 0;
        let mut first = self.segments.len();
        while first > 0 {
            let number = self.segments[first - 1].number;
            if !self.surveys.contains_key(&number) {
                let survey = self.survey(first - 1)?;
                self.surveys.insert(number, survey);
            }
            let survey = &self.surveys[&number];
            newest_ns = newest_ns.max(survey.newest_ns.min(now_ns));
            if survey.frames > 0 && survey.newest_ns < newest_ns.saturating_sub(window_ns) {
                break;
            }
            first -= 1;
        }
        self.count_damage();
        let oldest_ns = newest_ns.saturating_sub(window_ns);
        let mut last_seq: HashMap<(u64, u64), u64, RandomState> = HashMap::default();
        for segment in self.segments.range(first..) {
            let end = self.surveys[&segment.number].end;
            each_frame(segment, end, &mut |item| {
                if let Item::Frame { header, bytes } = item
                    && header.realtime_ns >= oldest_ns
                    && self.books.counts(header.node, header.epoch, header.seq)
                {
                    let last = last_seq.entry((header.node, header.epoch)).or_default();
                    if header.seq > *last {
                        *last = header.seq;
                        each(&header, bytes);
                    }
                }
            })?;
        }
        Ok(())
    }
}

fn each_frame(segment: &ClosedSegment, end: u64, each: &mut dyn FnMut(Item<'_>)) -> Result<(), ArchiveError> {
    let failed = |source: io::Error| ArchiveError::Segment { path: segment.path.clone(), source };
    let file = File::open(&segment.path).map_err(failed)?;
    let mut scanner = Scanner::new(&file, segment.number).map_err(failed)?;
    while scanner.position() < end {
        match scanner.next_item().map_err(failed)? {
            Some(item) => each(item),
            None => break,
        }
    }
    Ok(())
}

fn survey(file: &File, number: u64) -> io::Result<Survey> {
    let mut survey = Survey::default();
    let mut scanner = Scanner::new(file, number)?;
    let file_bytes = scanner.file_bytes();
    let mut at = scanner.position();
    let mut is_first = true;
    let mut last_mark = 0;
    let mut tail_from = file_bytes;
    while let Some(item) = scanner.next_item()? {
        match item {
            Item::Frame { header, .. } => {
                survey.frames += 1;
                survey.newest_ns = survey.newest_ns.max(header.realtime_ns);
            }
            Item::Note(Note::Mark) => last_mark = at,
            Item::Note(Note::Books(books)) if is_first => survey.base = Some(books),
            Item::Note(_) => {}
            Item::Damaged(range) => {
                if survey.damages.len() < DAMAGES_MAX {
                    survey.damages.push(range);
                } else if let Some(last) = survey.damages.last_mut() {
                    last.end = range.end;
                }
            }
            Item::Tail { from, tail } => {
                tail_from = from;
                survey.tail_damaged = tail == Tail::Damaged;
            }
        }
        is_first = false;
        at = scanner.position();
    }
    survey.end = tail_from;
    if let Some(first) = survey.damages.iter().position(|range| range.start > last_mark) {
        survey.end = survey.damages[first].start;
        survey.tail_damaged = true;
        survey.damages.truncate(first);
    }
    Ok(survey)
}

fn gaps(segments: &VecDeque<ClosedSegment>) -> Vec<Damage> {
    let of_file =
        |closed: &ClosedSegment| SegmentFile { number: closed.number, path: closed.path.clone(), bytes: closed.bytes };
    let files: Vec<_> = segments.iter().map(of_file).collect();
    damage::gaps(&files).unwrap_or_else(|error| {
        warn!(%error, "whether segments were cut or deleted is unknown: run `tapio-server archive verify`");
        Vec::new()
    })
}

/// Logs a gap, and notes it in `quarantine/`. False when something of that segment was set aside before.
fn set_gap_aside(dir: &Path, gap: &Damage) -> bool {
    warn!(
        segment = gap.segment,
        missing_frames = gap.missing.map(|missing| missing.frames),
        missing_events = gap.missing.map(|missing| missing.events),
        "acknowledged events are missing: {gap}"
    );
    let place = dir.join("quarantine");
    let prefix = format!("{:020}-", gap.segment);
    let mut known = fs::read_dir(&place).into_iter().flatten().flatten();
    if known.any(|entry| entry.file_name().to_string_lossy().starts_with(&prefix)) {
        return false;
    }
    let note = place.join(format!("{prefix}missing"));
    // A note is a line, and there are no more than gaps: without it each start would count the gap again.
    if let Err(error) = fs::create_dir_all(&place).and_then(|()| fs::write(note, format!("{gap}\n"))) {
        warn!(segment = gap.segment, %error, "cannot write a note to quarantine: the next start counts the gap again");
    }
    true
}

/// Copies a damaged place to `quarantine/`. False when it was there before.
fn quarantine(dir: &Path, file: &File, number: u64, range: &Range<u64>) -> bool {
    let place = dir.join("quarantine");
    let path = place.join(format!("{number:020}-{}", range.start));
    if path.exists() {
        return false;
    }
    let copy = || -> io::Result<bool> {
        fs::create_dir_all(&place)?;
        if fs::read_dir(&place)?.count() >= QUARANTINE_FILES_MAX {
            return Ok(false);
        }
        let length = (range.end - range.start).min(QUARANTINE_BYTES_MAX);
        let mut bytes = vec![0; length as usize];
        file.read_exact_at(&mut bytes, range.start)?;
        let end = bytes.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
        fs::write(&path, &bytes[..end])?;
        Ok(true)
    };
    match copy() {
        Ok(kept) => warn!(segment = number, from = range.start, to = range.end, kept, "damage quarantined"),
        Err(error) => {
            warn!(segment = number, from = range.start, to = range.end, %error, "damage found; no copy kept");
        }
    }
    true
}
