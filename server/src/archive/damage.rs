//! Finds what an archive lacks, and says where.
//!
//! What enters: the segments, oldest first. What leaves: a [`Damage`] for each stretch whose events are gone. What must hold:
//!
//! - A segment without an index is not damaged for that: a killed server and a failed write leave such segments.
//! - The snapshot at the start of a segment counts every frame that was acknowledged before. Frames that it counts and
//!   the segments before it lack are missing. So a cut segment and a deleted one both show.
//! - Holes in the numbers alone mean nothing: a failed attempt to open a segment uses up a number.
//! - A server may write and delete meanwhile: what it does is not damage.

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io;
use std::ops::{Range, RangeInclusive};

use foldhash::fast::RandomState;
use tapio_wire::event::SOURCES;
use tapio_wire::frame::Header;

use super::books::Books;
use super::index::Index;
use super::reader::{SegmentFile, is_segment};
use super::scan::{Item, Scanner};
use super::segments::segment_path;
use super::snapshot::Note;

/// Stretches that are listed of one archive, and places of one segment.
pub(super) const DAMAGES_MAX: usize = 1000;
/// Numbers of a hole that are looked for once more.
const ABSENT_LOOKS_MAX: usize = 1000;
/// Places and epochs that a text names.
const NAMED_MAX: usize = 3;
/// Clocks of nodes differ, and a frame's events are older than the frame.
const MARGIN_NS: u64 = 300_000_000_000;

/// Where something is missing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DamagePlace {
    /// Bytes of the segment that are no records. None where it is not known which.
    Bytes(Vec<Range<u64>>),
    /// The segment's end, from this byte on.
    End(u64),
    /// The segments with these numbers.
    Absent(RangeInclusive<u64>),
}

/// How much is missing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Missing {
    pub frames: u64,
    pub events: u64,
}

/// What is missing of one epoch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lost {
    pub node: u64,
    pub name: Option<String>,
    pub epoch: u64,
    pub frames: u64,
    pub events: [u64; SOURCES],
    /// The missing frames lie among these, both included.
    pub first_seq: u64,
    pub last_seq: u64,
}

/// A stretch of the archive whose events are missing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    pub segment: u64,
    pub place: DamagePlace,
    /// `None` where nothing says how much.
    pub missing: Option<Missing>,
    pub lost: Vec<Lost>,
    /// The segment whose snapshot counts what is missing.
    pub counted_by: Option<u64>,
    /// Between these two moments the missing frames were sent, nanoseconds since 1970.
    pub after_ns: u64,
    pub before_ns: u64,
}

impl Damage {
    /// Describes damage in these byte ranges of a segment.
    pub(super) fn of_bytes(segment: u64, ranges: Vec<Range<u64>>, missing: Option<Missing>) -> Self {
        Self {
            segment,
            place: DamagePlace::Bytes(ranges),
            missing,
            lost: Vec::new(),
            counted_by: None,
            after_ns: 0,
            before_ns: u64::MAX,
        }
    }

    /// Takes what is missing out of what the books count as archived.
    pub(super) fn count_lost(&self, books: &mut Books) {
        for lost in &self.lost {
            let epochs = books.nodes.get_mut(&lost.node).map(|node| &mut node.epochs);
            match epochs.and_then(|epochs| epochs.iter_mut().find(|known| known.epoch == lost.epoch)) {
                Some(epoch) => epoch.lost.iter_mut().zip(&lost.events).for_each(|(sum, &events)| *sum += events),
                None => books.retired_lost += lost.events.iter().sum::<u64>(),
            }
        }
    }

    /// Whether what is missing may be of this time.
    pub fn may_be_of(&self, since_ns: u64, until_ns: u64) -> bool {
        self.after_ns.saturating_sub(MARGIN_NS) <= until_ns && self.before_ns.saturating_add(MARGIN_NS) >= since_ns
    }
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            DamagePlace::Bytes(ranges) if ranges.is_empty() => write!(f, "segment {} is damaged", self.segment)?,
            DamagePlace::Bytes(ranges) => {
                write!(f, "segment {} is damaged", self.segment)?;
                for (index, range) in ranges.iter().take(NAMED_MAX).enumerate() {
                    let word = if index == 0 { " from byte" } else { ", from" };
                    write!(f, "{word} {} to {}", range.start, range.end)?;
                }
                if ranges.len() > NAMED_MAX {
                    write!(f, " and at {} more places", ranges.len() - NAMED_MAX)?;
                }
            }
            DamagePlace::End(from) => {
                write!(f, "segment {} is cut off or unreadable from byte {from} on", self.segment)?
            }
            DamagePlace::Absent(numbers) if numbers.start() == numbers.end() => {
                write!(f, "segment {} is absent", numbers.start())?;
            }
            DamagePlace::Absent(numbers) => write!(f, "segments {} to {} are absent", numbers.start(), numbers.end())?,
        }
        match self.missing {
            Some(missing) => write!(f, ": {} events in {} frames are missing", missing.events, missing.frames)?,
            None => write!(f, ": how many events are missing is not known")?,
        }
        if let Some(next) = self.counted_by.filter(|_| self.missing.is_some()) {
            write!(f, ", by the snapshot of segment {next}")?;
        }
        for lost in self.lost.iter().take(NAMED_MAX) {
            let name = lost.name.clone().unwrap_or_else(|| format!("{:016x}", lost.node));
            let (epoch, first, last) = (lost.epoch, lost.first_seq, lost.last_seq);
            write!(f, "; node {name}, epoch {epoch:x}: {} frames, among seq {first} to {last}", lost.frames)?;
        }
        if self.lost.len() > NAMED_MAX {
            write!(f, "; and of {} more epochs", self.lost.len() - NAMED_MAX)?;
        }
        Ok(())
    }
}

/// What a segment begins with.
enum First {
    Snapshot(Box<Books>),
    /// Something sound comes later, or the segment was deleted meanwhile.
    Other,
    /// No record at all: a segment gets its name when its snapshot is synced, so this one had one.
    Nothing,
}

fn open(segment: &SegmentFile) -> io::Result<Option<File>> {
    match File::open(&segment.path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn first(segment: &SegmentFile) -> io::Result<First> {
    let Some(file) = open(segment)? else { return Ok(First::Other) };
    Ok(match Scanner::new(&file, segment.number)?.next_item()? {
        Some(Item::Note(Note::Books(books))) => First::Snapshot(books),
        Some(Item::Tail { .. }) | None => First::Nothing,
        Some(_) => First::Other,
    })
}

pub(super) fn snapshot(segment: &SegmentFile) -> io::Result<Option<Box<Books>>> {
    Ok(match first(segment)? {
        First::Snapshot(books) => Some(books),
        First::Other | First::Nothing => None,
    })
}

/// Frames by the segment's index; `None` without one.
fn indexed_frames(segment: &SegmentFile) -> io::Result<Option<u64>> {
    let Some(file) = open(segment)? else { return Ok(None) };
    Ok(Index::read(&file, segment.number)?.map(|index| index.frames))
}

/// Finds segments that were cut, emptied or deleted. `segments` are all of a directory, oldest first.
///
/// Of a segment with an index only that is read: damage within it is found by the reader of its records.
pub fn gaps(segments: &[SegmentFile]) -> io::Result<Vec<Damage>> {
    let mut found = Vec::new();
    let mut at = 0;
    while at < segments.len() && found.len() < DAMAGES_MAX {
        if !is_suspect(segments, at)? {
            at += 1;
            continue;
        }
        let mut from = None;
        for index in (0..=at).rev() {
            if let Some(books) = snapshot(&segments[index])? {
                from = Some((index, books));
                break;
            }
        }
        let mut to = None;
        for (index, segment) in segments.iter().enumerate().skip(at + 1) {
            if let Some(books) = snapshot(segment)? {
                to = Some((index, books));
                break;
            }
        }
        let end = to.as_ref().map_or(segments.len(), |(index, _)| *index);
        if let Some(damage) = compared(segments, at, from, to)?
            && is_still_so(&segments[at..segments.len().min(end + 1)], &damage)
        {
            found.push(damage);
        }
        at = end;
    }
    Ok(found)
}

/// Whether something may be missing between the start of this segment and the start of the next one.
fn is_suspect(segments: &[SegmentFile], at: usize) -> io::Result<bool> {
    let segment = &segments[at];
    let Some(next) = segments.get(at + 1) else {
        return Ok(matches!(first(segment)?, First::Nothing));
    };
    let Some(file) = open(segment)? else { return Ok(false) };
    Ok(next.number > segment.number + 1 || Index::read(&file, segment.number)?.is_none())
}

type Snapshot = Option<(usize, Box<Books>)>;

fn compared(segments: &[SegmentFile], suspect: usize, from: Snapshot, to: Snapshot) -> io::Result<Option<Damage>> {
    let number = segments[suspect].number;
    let unknown = Damage { place: DamagePlace::End(0), ..Damage::of_bytes(number, Vec::new(), None) };
    let (Some((from, before)), Some((to, after))) = (from, to) else {
        return Ok(Some(unknown));
    };
    let span = &segments[from..to];
    let mut indexed = Some(0);
    for segment in span {
        indexed = indexed.zip(indexed_frames(segment)?).map(|(sum, frames): (u64, u64)| sum + frames);
    }
    let expected = after.totals.frames.saturating_sub(before.totals.frames);
    if indexed.is_some_and(|frames| frames >= expected) {
        return Ok(None);
    }
    let mut count = Count { before: &before, after: &after, found: HashMap::default(), counted: Missing::default() };
    let mut cut = None;
    let mut is_empty = false;
    for segment in span {
        let Some(file) = open(segment)? else { return Ok(None) };
        let is_indexed = Index::read(&file, segment.number)?.is_some();
        let mut scanner = Scanner::new(&file, segment.number)?;
        let mut records = 0;
        while let Some(item) = scanner.next_item()? {
            match item {
                Item::Frame { header, .. } => count.frame(&header),
                Item::Tail { from, .. } if !is_indexed && cut.is_none() => cut = Some((segment.number, from)),
                _ => {}
            }
            records += 1;
        }
        // The tail is an item.
        is_empty |= records <= 1;
    }
    let (missing, lost) = count.missing();
    if missing == Missing::default() {
        return Ok(is_empty.then_some(unknown));
    }
    let hole = span.iter().zip(&segments[from + 1..=to]).find(|(one, next)| next.number > one.number + 1);
    let (segment, place) = match (cut, hole) {
        (Some((number, byte)), _) => (number, DamagePlace::End(byte)),
        (None, Some((one, next))) => (one.number, DamagePlace::Absent(one.number + 1..=next.number - 1)),
        (None, None) => (number, DamagePlace::Bytes(Vec::new())),
    };
    let sent = |books: &Books, lost: &Lost| books.epoch(lost.node, lost.epoch).map_or(0, |epoch| epoch.realtime_ns);
    Ok(Some(Damage {
        segment,
        place,
        missing: Some(missing),
        counted_by: Some(segments[to].number),
        after_ns: lost.iter().map(|lost| sent(&before, lost)).min().unwrap_or(0),
        before_ns: lost.iter().map(|lost| sent(&after, lost)).max().unwrap_or(u64::MAX),
        lost,
    }))
}

/// Whether retention did not delete these segments meanwhile, and a list did not leave out one that was just made.
fn is_still_so(span: &[SegmentFile], damage: &Damage) -> bool {
    let is_new = |number| span[0].path.parent().is_some_and(|dir| segment_path(dir, number).exists());
    span.iter().all(|segment| segment.path.exists())
        && match &damage.place {
            DamagePlace::Absent(numbers) => !numbers.clone().take(ABSENT_LOOKS_MAX).any(is_new),
            DamagePlace::Bytes(_) | DamagePlace::End(_) => true,
        }
}

/// Counts the frames between two snapshots.
struct Count<'a> {
    before: &'a Books,
    after: &'a Books,
    found: HashMap<(u64, u64), Found, RandomState>,
    counted: Missing,
}

#[derive(Default)]
struct Found {
    last_seq: u64,
    frames: u64,
    events: [u64; SOURCES],
    /// Sequences that were skipped: the first and the last of them.
    skipped: Option<(u64, u64)>,
}

impl Found {
    fn skip(&mut self, first: u64, last: u64) {
        if first <= last {
            self.skipped = Some((self.skipped.map_or(first, |(known, _)| known), last));
        }
    }
}

impl Count<'_> {
    fn frame(&mut self, header: &Header) {
        // Frames behind it were never acknowledged: their segment's write failed, and they went to the next one.
        if self.after.epoch(header.node, header.epoch).is_some_and(|epoch| header.seq > epoch.durable_seq) {
            return;
        }
        let before = self.before.durable_seq(header.node, header.epoch);
        let key = (header.node, header.epoch);
        let found = self.found.entry(key).or_insert_with(|| Found { last_seq: before, ..Found::default() });
        if header.seq <= found.last_seq {
            return;
        }
        found.skip(found.last_seq + 1, header.seq - 1);
        found.last_seq = header.seq;
        found.frames += 1;
        for (sum, &count) in found.events.iter_mut().zip(&header.source_events) {
            *sum += u64::from(count);
        }
        self.counted.frames += 1;
        self.counted.events += u64::from(header.events());
    }

    fn missing(mut self) -> (Missing, Vec<Lost>) {
        let mut lost = Vec::new();
        for (node, known) in self.after.nodes() {
            for after in &known.epochs {
                let before = self.before.epoch(node, after.epoch);
                let found = self.found.entry((node, after.epoch)).or_insert_with(|| Found {
                    last_seq: before.map_or(0, |before| before.durable_seq),
                    ..Found::default()
                });
                let was = before.map_or(0, |before| before.frames);
                let frames = after.frames.saturating_sub(was).saturating_sub(found.frames);
                if frames == 0 {
                    continue;
                }
                found.skip(found.last_seq + 1, after.durable_seq);
                let (first_seq, last_seq) = found.skipped.unwrap_or((0, after.durable_seq));
                let mut events = after.archived;
                for (source, events) in events.iter_mut().enumerate() {
                    let was = before.map_or(0, |before| before.archived[source]);
                    *events = events.saturating_sub(was).saturating_sub(found.events[source]);
                }
                let name = known.name.as_deref().map(str::to_owned);
                lost.push(Lost { node, name, epoch: after.epoch, frames, events, first_seq, last_seq });
            }
        }
        lost.sort_by_key(|lost| (lost.node, lost.epoch));
        // Epochs that made room for newer ones are in the totals alone.
        let (before, after) = (&self.before.totals, &self.after.totals);
        let total = Missing {
            frames: after.frames.saturating_sub(before.frames).saturating_sub(self.counted.frames),
            events: after.events.saturating_sub(before.events).saturating_sub(self.counted.events),
        };
        let frames: u64 = lost.iter().map(|lost| lost.frames).sum();
        let events: u64 = lost.iter().flat_map(|lost| &lost.events).sum();
        (Missing { frames: frames.max(total.frames), events: events.max(total.events) }, lost)
    }
}

/// Checks the checksums of every record of a segment that is not written to any more; `read` is called with how many bytes were
/// read since its last call.
pub fn of_closed(file: &File, number: u64, read: &mut dyn FnMut(u64)) -> io::Result<Option<Damage>> {
    let index = Index::read(file, number)?;
    let mut ranges = Vec::new();
    if !is_segment(file, number)? {
        ranges.push(0..tapio_wire::segment::SEGMENT_HEADER_BYTES as u64);
    }
    let mut found = Missing::default();
    let mut scanner = Scanner::new(file, number)?;
    let mut at = scanner.position();
    let mut last_mark = 0;
    while let Some(item) = scanner.next_item()? {
        match item {
            Item::Frame { header, .. } => {
                found.frames += 1;
                found.events += u64::from(header.events());
            }
            Item::Note(Note::Mark | Note::Index) => last_mark = at,
            Item::Note(_) | Item::Tail { .. } => {}
            Item::Damaged(range) => push(&mut ranges, range),
        }
        let next = scanner.position();
        read(next.saturating_sub(at));
        at = next;
    }
    ranges.retain(|range| range.start <= last_mark);
    let missing = index.map(|index| Missing {
        frames: index.frames.saturating_sub(found.frames),
        events: index.events.saturating_sub(found.events),
    });
    let is_short = missing.is_some_and(|missing| missing != Missing::default());
    Ok((is_short || !ranges.is_empty()).then(|| Damage::of_bytes(number, ranges, missing)))
}

/// Adds a place, within the bound.
pub(super) fn push(ranges: &mut Vec<Range<u64>>, range: Range<u64>) {
    if ranges.len() < DAMAGES_MAX {
        ranges.push(range);
    } else if let Some(last) = ranges.last_mut() {
        last.end = range.end;
    }
}

/// Whether a sound record stands where none was found before: a server wrote it meanwhile.
pub(super) fn is_written_by_now(file: &File, number: u64, at: u64) -> io::Result<bool> {
    let mut scanner = Scanner::within(file, number, at..u64::MAX)?;
    Ok(matches!(scanner.next_item()?, Some(Item::Frame { .. } | Item::Note(_))))
}

/// Puts the damage of a directory together. A place whose loss a gap counts is reported by the gap alone.
pub fn joined(mut gaps: Vec<Damage>, places: Vec<Damage>) -> Vec<Damage> {
    for place in places {
        let is_counted = place.missing.is_none() && gaps.iter().any(|gap| gap.segment == place.segment);
        if !is_counted && gaps.len() < DAMAGES_MAX {
            gaps.push(place);
        }
    }
    gaps.sort_by_key(|damage| damage.segment);
    gaps
}
