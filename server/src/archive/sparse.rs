//! Segments of which this disk has parts: the index of each, and the blocks that a selection asked for.
//!
//! What enters: what a reader wants. What leaves: its blocks, brought by an [`Ahead`] before they are read. What must hold: what
//! could not be brought is reported by the [`Ahead`], since a hole in a file looks like damage.

use std::collections::{HashMap, HashSet};
use std::fmt::Debug;
use std::fs::File;
use std::io;
use std::sync::Arc;

use foldhash::fast::RandomState;

use super::damage::{self, DAMAGES_MAX, Damage, DamagePlace, Missing};
use super::index::Index;
use super::reader::SegmentFile;
use super::scan::{Item, Scanner};
use super::selection::Selection;

/// Numbers of a directory's sparse segments; the others are whole.
pub type Sparse = HashSet<u64, RandomState>;

/// Brings parts of sparse segments to this disk.
pub trait Ahead: Debug + Send + Sync {
    /// What nodes are called.
    fn node_names(&self) -> HashMap<u64, Arc<str>, RandomState>;

    /// Brings the blocks that may have what is wanted. Blocking.
    fn bring(&self, wanted: &Selection);
}

/// What a segment holds.
struct Held {
    missing: Missing,
    first_ns: u64,
    last_ns: u64,
}

/// Segments that are absent between others, or cut, by what snapshots count. Unlike [`damage::gaps`] it reads no frame of an indexed one.
///
/// # Errors
/// When a file cannot be read.
pub(super) fn gaps(segments: &[SegmentFile]) -> io::Result<Vec<Damage>> {
    let mut found = Vec::new();
    for (one, next) in segments.iter().zip(segments.iter().skip(1)) {
        let is_hole = next.number > one.number + 1;
        if found.len() >= DAMAGES_MAX || !(is_hole || is_unindexed(one)?) {
            continue;
        }
        // A segment whose head could not be brought was reported by whoever brings.
        let (Some(before), Some(after)) = (damage::snapshot(one)?, damage::snapshot(next)?) else { continue };
        let Some(held) = held(one)? else { continue };
        let (counted, before) = (after.totals(), before.totals());
        let frames = counted.frames.saturating_sub(before.frames).saturating_sub(held.missing.frames);
        let events = counted.events.saturating_sub(before.events).saturating_sub(held.missing.events);
        if frames > 0 {
            found.push(Damage {
                segment: one.number,
                place: match is_hole {
                    true => DamagePlace::Absent(one.number + 1..=next.number - 1),
                    false => DamagePlace::Bytes(Vec::new()),
                },
                missing: Some(Missing { frames, events }),
                lost: Vec::new(),
                counted_by: Some(next.number),
                after_ns: held.first_ns,
                before_ns: self::held(next)?.map_or(u64::MAX, |held| held.last_ns),
            });
        }
    }
    Ok(found)
}

fn is_unindexed(segment: &SegmentFile) -> io::Result<bool> {
    match File::open(&segment.path) {
        Ok(file) => Ok(Index::read(&file, segment.number)?.is_none()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn held(segment: &SegmentFile) -> io::Result<Option<Held>> {
    let file = match File::open(&segment.path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    if let Some(index) = Index::read(&file, segment.number)? {
        let missing = Missing { frames: index.frames, events: index.events };
        return Ok(Some(Held { missing, first_ns: index.first_ns, last_ns: index.last_ns }));
    }
    let mut held = Held { missing: Missing::default(), first_ns: 0, last_ns: u64::MAX };
    let mut scanner = Scanner::new(&file, segment.number)?;
    while let Some(item) = scanner.next_item()? {
        if let Item::Frame { header, .. } = item {
            held.missing.frames += 1;
            held.missing.events += u64::from(header.events());
        }
    }
    Ok(Some(held))
}
