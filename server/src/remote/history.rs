//! What a server's own disk no longer has, or never had, out of the remote archive: for requests about the past.
//!
//! What enters: the time that a request asks for. What leaves: the [`Past`] of that time, of every server of the cluster. What
//! must hold: a request about what is on this disk costs the store nothing. What is fetched is bounded.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use prometheus::IntCounter;
use tracing::info;

use super::config::RemoteSection;
use super::metrics::RemoteMetrics;
use super::past::{Asked, Kept, Past};
use super::ranges::TailHint;
use super::uploader::Names;
use super::{RemoteError, life};
use crate::archive::index::{Index, times_ns};
use crate::archive::reader::Reader;
use crate::archive::scan::{Item, Scanner};

/// Directory of the cache in the archive's directory.
const CACHE: &str = "remote-cache";

/// Reads segments that this disk does not have.
pub struct History {
    section: RemoteSection,
    dir: PathBuf,
    read_bytes: IntCounter,
    kept: Arc<Kept>,
}

impl History {
    /// Beside an archive's directory. `None` when the section forbids a cache.
    pub fn new(
        section: &RemoteSection,
        names: &Names,
        dir: impl Into<PathBuf>,
        metrics: &RemoteMetrics,
    ) -> Option<Self> {
        let cluster = section.cluster.as_ref().unwrap_or(&names.cluster);
        let url = format!("{}/{cluster}", section.url.trim_end_matches('/'));
        let section = RemoteSection { url, ..section.clone() };
        if section.cache_bytes == 0 {
            return None;
        }
        let dir = dir.into();
        let kept = Kept {
            cache: dir.join(CACHE),
            cache_bytes: section.cache_bytes,
            turn: Mutex::default(),
            hint: TailHint::default(),
            is_clean: AtomicBool::new(false),
        };
        Some(Self { section, dir, read_bytes: metrics.read_bytes.clone(), kept: Arc::new(kept) })
    }

    /// What is wanted and not on this disk; `None` when all of it is. `is_named` says that a pod or the like is wanted. Blocking.
    ///
    /// # Errors
    /// [`RemoteError`]: what this disk has can still be read.
    pub fn before(&self, since_ns: u64, until_ns: u64, is_named: bool) -> Result<Option<Arc<Past>>, RemoteError> {
        // Whoever names no beginning wants what there is here.
        if since_ns == 0 {
            return Ok(None);
        }
        let local = |source| RemoteError::Local { path: self.dir.clone(), source };
        let first = first(&Reader::new(&self.dir)).map_err(local)?;
        if first.is_some_and(|(_, first_ns)| first_ns <= since_ns) {
            return Ok(None);
        }
        let own = life::of(&self.dir).map_err(local)?;
        // What is here is not fetched.
        let besides = first.map(|(number, _)| (own, number));
        let asked = Asked { since_ns, until_ns, is_named, besides };
        Ok(Past::look(&self.section, Arc::clone(&self.kept), &asked)?.map(Arc::new))
    }

    /// Counts what a request has read by now.
    pub fn count(&self, past: &Past) {
        let read = past.read();
        self.read_bytes.inc_by(read.read_bytes);
        let (segments, bytes, read_bytes) = (read.segments, read.archive_bytes, read.read_bytes);
        info!(segments, bytes, read_bytes, "read archive.remote for a request about the past");
    }
}

/// The oldest segment with a frame: its number, and when its first event was.
fn first(reader: &Reader) -> io::Result<Option<(u64, u64)>> {
    for segment in reader.segments().map_err(io::Error::other)? {
        let file = match File::open(&segment.path) {
            Ok(file) => file,
            // Retention was faster.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        if let Some(index) = Index::read(&file, segment.number)? {
            return Ok(Some((segment.number, index.first_ns)));
        }
        let mut scanner = Scanner::new(&file, segment.number)?;
        while let Some(item) = scanner.next_item()? {
            if let Item::Frame { header, .. } = item {
                return Ok(Some((segment.number, times_ns(&header).0)));
            }
        }
    }
    Ok(None)
}
