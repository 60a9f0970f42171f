//! What was fetched of remote archives, on this disk: whole segments, and sparse ones with the parts that requests wanted.
//!
//! What must hold: it keeps within its bound, what was used longest ago goes first, and a reader keeps what it reads: it has
//! links of its own ([`View`]).

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use super::RemoteError;
use super::listing::Label;
use super::names::SegmentName;
use crate::archive::segments::segment_path;

/// What is on its way; a whole one has its name only when its checksum was right.
pub(super) const PART_SUFFIX: &str = ".part";
/// A file of a segment's length of which only parts are here.
pub(super) const SPARSE_SUFFIX: &str = ".sparse";
const VIEWS: &str = "views";
/// Views that this process has made, for names.
static TURNS: AtomicU64 = AtomicU64::new(0);

fn local(path: &Path) -> impl Fn(io::Error) -> RemoteError + use<> {
    let path = path.to_owned();
    move |source| RemoteError::Local { path: path.clone(), source }
}

/// A folder with just the wanted segments of one archive; it goes with this value.
#[derive(Debug)]
pub struct View {
    pub label: Label,
    pub dir: PathBuf,
    is_kept: bool,
}

impl View {
    /// Makes an empty one.
    pub(super) fn new(cache: &Path, label: Label) -> Result<Self, RemoteError> {
        let turn = TURNS.fetch_add(1, Ordering::Relaxed);
        let dir = cache.join(VIEWS).join(format!("{}-{turn}-{}", std::process::id(), label.life));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).map_err(local(&dir))?;
        Ok(Self { label, dir, is_kept: false })
    }

    /// Adds a segment that is in the cache; returns where it stands in the view.
    pub(super) fn link(&self, number: u64, cached: &Path) -> Result<PathBuf, RemoteError> {
        let link = segment_path(&self.dir, number);
        fs::hard_link(cached, &link).map_err(local(&link))?;
        Ok(link)
    }

    /// Leaves the folder where it is.
    pub fn keep(mut self) -> PathBuf {
        self.is_kept = true;
        self.dir.clone()
    }
}

impl Drop for View {
    fn drop(&mut self) {
        if !self.is_kept {
            // Best effort: they are links into the cache.
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}

/// Where an archive's segments are kept; made where it is not there.
pub(super) fn folder(cache: &Path, label: &Label) -> Result<PathBuf, RemoteError> {
    let folder = cache.join(&label.cluster).join(&label.server).join(&label.life);
    fs::create_dir_all(&folder).map_err(local(&folder))?;
    Ok(folder)
}

/// Removes the views of a process that was killed.
pub(super) fn remove_views(cache: &Path) {
    // Best effort: they are links, and most of the time there are none.
    let _ = fs::remove_dir_all(cache.join(VIEWS));
}

/// Bytes that the cache takes on this disk.
pub(super) fn held(cache: &Path) -> Result<u64, RemoteError> {
    Ok(segments(cache)?.into_iter().map(|(_, bytes, ..)| bytes).sum())
}

/// Removes what was used longest ago, and is not among `wanted`, until the others take at most `allowed`.
pub(super) fn make_room(cache: &Path, allowed: u64, wanted: &HashSet<String>) -> Result<(), RemoteError> {
    let mut others = segments(cache)?;
    others.retain(|(.., name)| !wanted.contains(name));
    others.sort();
    let mut held: u64 = others.iter().map(|(_, bytes, ..)| bytes).sum();
    for (_, bytes, path, _) in others {
        if held <= allowed {
            break;
        }
        fs::remove_file(&path).map_err(|source| RemoteError::Local { path, source })?;
        held -= bytes;
    }
    Ok(())
}

/// When each was used, the bytes that it takes, where it is, and the segment's name.
type Cached = (SystemTime, u64, PathBuf, String);

fn segments(cache: &Path) -> Result<Vec<Cached>, RemoteError> {
    let mut found = Vec::new();
    let walked = walk(cache, 3, &mut |path, metadata| {
        let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let name = [PART_SUFFIX, SPARSE_SUFFIX].iter().find_map(|suffix| file.strip_suffix(suffix)).unwrap_or(&file);
        if SegmentName::parse(name).is_some() {
            let used = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
            let bytes = metadata.len().min(metadata.blocks() * 512);
            found.push((used, bytes, path.to_owned(), name.to_owned()));
        }
    });
    walked.map_err(local(cache))?;
    Ok(found)
}

fn walk(dir: &Path, depth: u32, each: &mut dyn FnMut(&Path, &fs::Metadata)) -> io::Result<()> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let entry = entry?;
        let metadata = entry.metadata()?;
        if metadata.is_dir() && depth > 0 {
            walk(&entry.path(), depth - 1, each)?;
        } else if metadata.is_file() {
            each(&entry.path(), &metadata);
        }
    }
    Ok(())
}
