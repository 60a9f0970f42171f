//! Windows of other archives, brought back beside a server's own segments: for requests about the past.
//!
//! What enters: segments of an archive, and a time. What leaves: a folder `restored/<name>` with those of that time. What must hold: it
//! appears whole or not at all. The books do not count it: other servers acknowledged these events. Retention leaves it; whoever
//! restored it deletes the folder.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use super::erase::{Erasure, rewrite};
use super::index::Index;
use super::reader::SegmentFile;
use super::segments::segment_path;

/// The folder's name in an archive's directory.
pub const FOLDER: &str = "restored";
const PARTIAL: &str = ".partial";

/// What was brought back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    pub segments: u64,
    pub bytes: u64,
    pub frames: u64,
    pub events: u64,
}

/// The restored windows of an archive's directory.
pub fn dirs(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(dir.join(FOLDER)) else { return Vec::new() };
    let mut found: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    found.retain(|path| path.is_dir() && path.extension().is_none_or(|end| end != &PARTIAL[1..]));
    found.sort();
    found
}

/// Copies the segments with events between two moments to `restored/<name>` of an archive's directory. `None` where there are none.
///
/// # Errors
/// When a file cannot be read or written; nothing is left then but a folder that the next attempt replaces.
pub fn restore(
    segments: &[SegmentFile],
    (since_ns, until_ns): (u64, u64),
    dir: &Path,
    name: &str,
) -> io::Result<Option<Restored>> {
    let folder = dir.join(FOLDER);
    let (partial, place) = (folder.join(format!("{name}{PARTIAL}")), folder.join(name));
    if place.exists() {
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, format!("{} is there already", place.display())));
    }
    match fs::remove_dir_all(&partial) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    fs::create_dir_all(&partial)?;
    let mut restored = Restored::default();
    for segment in segments {
        let file = match File::open(&segment.path) {
            Ok(file) => file,
            // Retention was faster.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        let to = segment_path(&partial, segment.number);
        match Index::read(&file, segment.number)? {
            Some(index) if index.first_ns > until_ns || index.last_ns < since_ns => continue,
            Some(_) => {
                fs::copy(&segment.path, &to)?;
                File::open(&to)?.sync_all()?;
            }
            // A server may be writing it: what is whole of it, with an index.
            None => drop(rewrite(&file, segment.number, &Erasure::default(), &to)?),
        }
        let Some(index) = Index::read(&File::open(&to)?, segment.number)? else {
            fs::remove_file(&to)?;
            continue;
        };
        if index.first_ns > until_ns || index.last_ns < since_ns {
            fs::remove_file(&to)?;
            continue;
        }
        restored.segments += 1;
        restored.bytes += fs::metadata(&to)?.len();
        restored.frames += index.frames;
        restored.events += index.events;
    }
    if restored.segments == 0 {
        fs::remove_dir_all(&partial)?;
        return Ok(None);
    }
    File::open(&partial)?.sync_all()?;
    fs::rename(&partial, &place)?;
    File::open(&folder)?.sync_all()?;
    Ok(Some(restored))
}
