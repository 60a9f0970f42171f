//! What a server's own disk no longer has, or never had, out of the remote archive: for requests about the past.
//!
//! What enters: the time that a request asks for. What leaves: folders with the segments of that time, of every server of the
//! cluster. What must hold: a request about what is on this disk costs the store nothing. What is fetched is bounded, and one
//! request at a time fetches.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use prometheus::IntCounter;
use tracing::info;

use super::config::RemoteSection;
use super::fetch::{Fetch, Fetched};
use super::metrics::RemoteMetrics;
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
    turn: Mutex<()>,
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
        let read_bytes = metrics.read_bytes.clone();
        (section.cache_bytes > 0).then(|| Self { section, dir: dir.into(), read_bytes, turn: Mutex::default() })
    }

    /// What is wanted and not on this disk; `None` when all of it is. Blocking.
    ///
    /// # Errors
    /// [`RemoteError`]: what this disk has can still be read.
    pub fn before(&self, since_ns: u64, until_ns: u64) -> Result<Option<Fetched>, RemoteError> {
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
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let fetch = Fetch {
            section: self.section.clone(),
            since_ns,
            until_ns,
            cache: self.dir.join(CACHE),
            cache_bytes: self.section.cache_bytes,
            // What is here is not fetched.
            besides: first.map(|(number, _)| (own, number)),
        };
        let fetched = match fetch.run(&mut |_| {}, &mut |_| {}) {
            Ok(fetched) => fetched,
            Err(RemoteError::Empty { .. }) => return Ok(None),
            Err(error) => return Err(error),
        };
        self.read_bytes.inc_by(fetched.fetched_bytes);
        let (segments, bytes, read_bytes) = (fetched.segments, fetched.bytes, fetched.fetched_bytes);
        info!(segments, bytes, read_bytes, "reading archive.remote for a request about the past");
        Ok(Some(fetched))
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
