//! Checks an archive from end to end, and sums it up. Read-only, beside a running server or without one.
//!
//! What enters: a segment. What leaves: what is in it and what is wrong with it. What must hold: every byte is looked at, every
//! frame is decompressed and validated, and the index is built again from the frames and compared.

use std::fs::File;
use std::io;
use std::ops::Range;

use tapio_wire::event::{PerKind, SOURCES};
use tapio_wire::frame::Frame;

use super::damage::{self, Damage, Missing};
use super::index::{Index, IndexBuilder, Summary, times_ns};
use super::reader::{SegmentFile, is_segment};
use super::scan::{Item, Scanner, Tail};
use super::snapshot::Note;

/// How often a segment that a server is writing is looked through at most.
const LOOKS_MAX: u32 = 5;

/// How a segment's index is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum IndexState {
    /// The index says what the frames say.
    Sound,
    /// There is none: the segment is being written, or its writer was killed.
    #[default]
    None,
    /// The index is sound in itself but says something else than the frames.
    Differs,
}

/// What a segment has.
#[derive(Clone, Debug, Default)]
pub struct SegmentReport {
    pub number: u64,
    pub bytes: u64,
    pub frames: u64,
    pub events: u64,
    pub lethal_events: u64,
    pub raw_bytes: u64,
    pub frame_bytes: u64,
    /// 0 when there is no frame.
    pub first_ns: u64,
    pub last_ns: u64,
    pub kinds: PerKind,
    pub sources: [u64; SOURCES],
    pub index: IndexState,
    /// Places that are no records, before the last commit: acknowledged frames were there.
    pub damages: Vec<Range<u64>>,
    /// Frames whose checksums are right and whose content is not.
    pub undecodable: u64,
    /// Bytes behind the last commit that are no whole records: never acknowledged, cut off by the next start.
    pub uncommitted_bytes: u64,
    /// True if the file is no segment of its name's number.
    pub is_foreign: bool,
    /// What its index counts and it lacks; `None` without an index.
    pub unindexed: Option<Missing>,
    /// What the next segment's snapshot counts and this one lacks, see [`damage::gaps`].
    pub gap: Option<Damage>,
}

impl SegmentReport {
    /// Whether nothing that was acknowledged is damaged.
    pub fn is_sound(&self) -> bool {
        self.damages.is_empty()
            && self.undecodable == 0
            && !self.is_foreign
            && self.index != IndexState::Differs
            && self.gap.is_none()
    }

    /// Where its bytes are damaged.
    pub fn damage(&self) -> Option<Damage> {
        let is_damaged = !self.damages.is_empty() || self.is_foreign;
        is_damaged.then(|| Damage::of_bytes(self.number, self.damages.clone(), self.unindexed))
    }
}

/// Looks through a segment; `read` is called with how many bytes were read since its last call.
///
/// A server may be writing it: what was read too early and has successors that were read later looks like damage. It is
/// looked at once more then.
pub fn verify_segment(segment: &SegmentFile, read: &mut dyn FnMut(u64)) -> io::Result<SegmentReport> {
    let file = File::open(&segment.path)?;
    for _ in 1..LOOKS_MAX {
        match look(segment, &file, read) {
            Ok(report) if !was_written_meanwhile(&file, &report)? => return Ok(report),
            Ok(_) => {}
            // It was closed, and its preallocated rest truncated.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {}
            Err(error) => return Err(error),
        }
    }
    look(segment, &file, read)
}

/// Whether a sound record stands by now where none was found before.
fn was_written_meanwhile(file: &File, report: &SegmentReport) -> io::Result<bool> {
    for range in &report.damages {
        if damage::is_written_by_now(file, report.number, range.start)? {
            return Ok(true);
        }
    }
    Ok(false)
}

fn look(segment: &SegmentFile, file: &File, read: &mut dyn FnMut(u64)) -> io::Result<SegmentReport> {
    let mut report =
        SegmentReport { number: segment.number, bytes: file.metadata()?.len(), ..SegmentReport::default() };
    if !is_segment(file, segment.number)? {
        report.is_foreign = true;
        return Ok(report);
    }
    let stored = Index::read(file, segment.number)?;
    let mut rebuilt = IndexBuilder::default();
    let mut scanner = Scanner::new(file, segment.number)?;
    let mut at = scanner.position();
    let mut last_mark = 0;
    while let Some(item) = scanner.next_item()? {
        match item {
            Item::Frame { header, bytes } => {
                let (first_ns, last_ns) = times_ns(&header);
                report.first_ns = if report.frames == 0 { first_ns } else { report.first_ns.min(first_ns) };
                report.last_ns = report.last_ns.max(last_ns);
                report.frames += 1;
                report.events += u64::from(header.events());
                report.lethal_events += u64::from(header.lethal_events);
                report.raw_bytes += u64::from(header.raw_bytes);
                report.frame_bytes += bytes.len() as u64;
                for (sum, &count) in report.sources.iter_mut().zip(&header.source_events) {
                    *sum += u64::from(count);
                }
                match Frame::decode(bytes) {
                    Ok(frame) => {
                        let summary = Summary::of(&frame);
                        for (sum, &count) in report.kinds.iter_mut().zip(&summary.kinds) {
                            *sum += u64::from(count);
                        }
                        rebuilt.add(at, bytes.len(), &header, Some(&summary));
                    }
                    Err(_) => {
                        report.undecodable += 1;
                        rebuilt.add(at, bytes.len(), &header, None);
                    }
                }
            }
            Item::Note(Note::Mark) => last_mark = at,
            Item::Note(Note::Index) => last_mark = at,
            Item::Note(_) => {}
            Item::Damaged(range) => damage::push(&mut report.damages, range),
            Item::Tail { from, tail } => {
                report.uncommitted_bytes = if tail == Tail::Clean { 0 } else { report.bytes - from };
            }
        }
        let next = scanner.position();
        read(next.saturating_sub(at));
        at = next;
    }
    // Behind the last commit nothing was acknowledged.
    let unacknowledged = report.damages.iter().filter(|range| range.start > last_mark);
    report.uncommitted_bytes += unacknowledged.map(|range| range.end - range.start).sum::<u64>();
    report.damages.retain(|range| range.start <= last_mark);
    report.unindexed = stored.as_ref().map(|index| Missing {
        frames: index.frames.saturating_sub(report.frames),
        events: index.events.saturating_sub(report.events),
    });
    report.index = match stored {
        None => IndexState::None,
        // An index that lacks what a frame's receiver did not report is compared no further.
        Some(index) if !index.kinds_whole || !report.damages.is_empty() => IndexState::Sound,
        Some(index) => {
            let content = rebuilt.finish(segment.number, index.offset);
            match Index::decode(&content, segment.number) == Some(index) {
                true => IndexState::Sound,
                false => IndexState::Differs,
            }
        }
    };
    Ok(report)
}
