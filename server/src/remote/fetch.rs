//! Segments of a remote archive, brought to this disk for a reader.
//!
//! What enters: a URL and what time is wanted. What leaves: for each archive in it a folder with the segments of that time.
//! What must hold: each segment has the checksum that its manifest names. What was fetched is not fetched again, and an
//! interrupted fetch goes on where it stopped. The cache keeps within its bound.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path as FilePath, PathBuf};
use std::time::SystemTime;

use futures::TryStreamExt;
use object_store::{GetOptions, GetRange, ObjectStore};

use super::RemoteError;
use super::cache::{self, PART_SUFFIX, View};
use super::config::RemoteSection;
use super::listing::{self, Label, Listed, Segments};
use super::manifest::sha256;
use super::store::Store;

/// What the cache may hold unless it is said.
pub const CACHE_BYTES_DEFAULT: u64 = 8 << 30;
/// Clocks differ, and descriptions and losses count from before the wanted time.
const MARGIN_NS: u64 = 660_000_000_000;

/// What to fetch, and where to.
#[derive(Clone, Debug)]
pub struct Fetch {
    pub section: RemoteSection,
    pub since_ns: u64,
    pub until_ns: u64,
    /// The folder that fetched segments are kept in.
    pub cache: PathBuf,
    pub cache_bytes: u64,
}

/// What was fetched.
#[derive(Debug, Default)]
pub struct Fetched {
    pub views: Vec<View>,
    /// Segments in all views together.
    pub segments: u64,
    pub bytes: u64,
    /// Bytes that came from the store, part of `bytes`.
    pub fetched_bytes: u64,
}

impl Fetch {
    /// Fetches. `total` hears how many bytes are wanted, `progress` how many more are there. Blocking.
    ///
    /// # Errors
    /// [`RemoteError`]; what was fetched by then stays in the cache.
    pub fn run(&self, total: &mut dyn FnMut(u64), progress: &mut dyn FnMut(u64)) -> Result<Fetched, RemoteError> {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(RemoteError::Thread)?;
        runtime.block_on(self.fetch(total, progress))
    }

    async fn fetch(&self, total: &mut dyn FnMut(u64), progress: &mut dyn FnMut(u64)) -> Result<Fetched, RemoteError> {
        let store = Store::open(&self.section)?;
        store.check_folder()?;
        let listed = listing::list(&store, &store.root).await?;
        if listed.is_empty() {
            return Err(RemoteError::Empty { url: store.url });
        }
        let times = (self.since_ns.saturating_sub(MARGIN_NS), self.until_ns.saturating_add(MARGIN_NS));
        let wanted: Vec<(Label, Segments)> =
            listed.into_iter().map(|(label, segments)| (label, listing::of_time(segments, times))).collect();
        let needed = wanted.iter().flat_map(|(_, segments)| segments.values()).map(|listed| listed.bytes).sum();
        if needed > self.cache_bytes {
            return Err(RemoteError::Cache { needed, allowed: self.cache_bytes });
        }
        total(needed);
        let names = wanted.iter().flat_map(|(_, segments)| segments.values()).map(|listed| listed.name.file());
        cache::make_room(&self.cache, self.cache_bytes.saturating_sub(needed), &names.collect())?;
        let mut fetched = Fetched { bytes: needed, ..Fetched::default() };
        for (label, segments) in wanted.into_iter().filter(|(_, segments)| !segments.is_empty()) {
            let folder = cache::folder(&self.cache, &label)?;
            let view = View::new(&self.cache, label)?;
            for (number, listed) in &segments {
                let path = folder.join(listed.name.file());
                fetched.fetched_bytes += ensure(&store, listed, &path, progress).await?;
                view.link(*number, &path)?;
            }
            fetched.segments += segments.len() as u64;
            fetched.views.push(view);
        }
        Ok(fetched)
    }
}

/// Brings a segment to its place in the cache. Returns how many bytes came from the store.
pub(super) async fn ensure(
    store: &Store,
    listed: &Listed,
    path: &FilePath,
    progress: &mut dyn FnMut(u64),
) -> Result<u64, RemoteError> {
    let local = |source| RemoteError::Local { path: path.to_owned(), source };
    // A whole one has this name only when its checksum was right.
    if fs::metadata(path).is_ok_and(|metadata| metadata.len() == listed.bytes) {
        // So that it is not the first to go.
        let _ = File::open(path).and_then(|file| file.set_modified(SystemTime::now()));
        progress(listed.bytes);
        return Ok(0);
    }
    let manifest = listing::manifest(store, &listed.path, listed.name.number).await?;
    let damaged = |problem: String| RemoteError::Damaged { name: listed.path.to_string(), problem };
    if manifest.object != listed.name.file() || manifest.bytes != listed.bytes {
        let (bytes, object) = (manifest.bytes, &manifest.object);
        return Err(damaged(format!("it has {} bytes, and its manifest names {object} of {bytes}", listed.bytes)));
    }
    let part = path.with_extension(format!("segment{PART_SUFFIX}"));
    let mut fetched = 0;
    // What an interrupted fetch left may be of a damaged disk: then it is fetched once more from the start.
    for attempt in 0..2 {
        let mut out = OpenOptions::new().create(true).append(true).open(&part).map_err(local)?;
        let mut there = out.metadata().map_err(local)?.len();
        if attempt > 0 || there > listed.bytes {
            out.set_len(0).map_err(local)?;
            there = 0;
        } else {
            progress(there);
        }
        let before = there;
        if there < listed.bytes {
            fetched += append(store, listed, &mut out, there, progress).await?;
        }
        drop(out);
        let file = File::open(&part).map_err(local)?;
        if sha256(&file).map_err(local)? == manifest.sha256 {
            file.sync_data().map_err(local)?;
            fs::rename(&part, path).map_err(local)?;
            return Ok(fetched);
        }
        if before == 0 {
            break;
        }
    }
    fs::remove_file(&part).map_err(local)?;
    Err(damaged("its bytes have another checksum".to_owned()))
}

/// Appends what is missing of a segment.
async fn append(
    store: &Store,
    listed: &Listed,
    out: &mut File,
    from: u64,
    progress: &mut dyn FnMut(u64),
) -> Result<u64, RemoteError> {
    let failed = |source| RemoteError::Object { name: listed.path.to_string(), source };
    let options = GetOptions { range: Some(GetRange::Bounded(from..listed.bytes)), ..GetOptions::default() };
    let found = store.objects.get_opts(&listed.path, options).await.map_err(failed)?;
    let mut stream = found.into_stream();
    let mut fetched = 0;
    while let Some(bytes) = stream.try_next().await.map_err(failed)? {
        out.write_all(&bytes)
            .map_err(|source| RemoteError::Local { path: PathBuf::from(listed.name.file()), source })?;
        fetched += bytes.len() as u64;
        progress(bytes.len() as u64);
    }
    Ok(fetched)
}
