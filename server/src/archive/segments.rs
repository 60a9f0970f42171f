//! The files of the archive: `NNNNNNNNNNNNNNNNNNNN.segment`, and `.segment.new` until its first sync.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

const SUFFIX: &str = ".segment";
const NEW_SUFFIX: &str = ".segment.new";
const DIGITS: usize = 20;

/// A segment that is no longer written to.
#[derive(Clone, Debug)]
pub struct ClosedSegment {
    pub number: u64,
    pub path: PathBuf,
    pub bytes: u64,
    /// When it was closed, in the archive's own time; see [`super::ages`].
    pub closed_at: Duration,
    /// Events in the segment; `None` when an earlier run closed it.
    pub events: Option<u64>,
}

/// Where segment `number` lies.
pub fn segment_path(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("{number:0DIGITS$}{SUFFIX}"))
}

/// Where segment `number` lies until it may be found by a recovery.
pub fn new_segment_path(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("{number:0DIGITS$}{NEW_SUFFIX}"))
}

/// The number of the segment that a file of this name is.
pub fn number_of(name: &OsStr) -> Option<u64> {
    let digits = name.to_str()?.strip_suffix(SUFFIX).filter(|digits| digits.len() == DIGITS)?;
    digits.parse().ok()
}

/// Every segment, oldest first; when they were closed is left open. Leftovers of an interrupted creation are removed.
pub fn list(dir: &Path) -> io::Result<VecDeque<ClosedSegment>> {
    let mut segments = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        if name.ends_with(NEW_SUFFIX) {
            fs::remove_file(entry.path())?;
            continue;
        }
        let Some(number) = number_of(OsStr::new(name)) else {
            continue;
        };
        let metadata = entry.metadata()?;
        if !metadata.is_file() {
            continue;
        }
        segments.push(ClosedSegment {
            number,
            path: entry.path(),
            bytes: metadata.len(),
            closed_at: Duration::ZERO,
            events: None,
        });
    }
    segments.sort_by_key(|segment| segment.number);
    Ok(segments.into())
}
