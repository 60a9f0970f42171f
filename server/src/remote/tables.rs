//! Where exported tables go: a folder, or an object store.
//!
//! What enters: files of one segment's tables, in a folder of this machine. What leaves: the same files below the destination, and
//! then a mark that says which they are. What must hold: a mark is put last, so what has one is whole.
//!
//! ```text
//! <prefix>/<table>/cluster=…/date=…/hour=…/<segment>.parquet
//! <prefix>/exported/cluster=…/<segment>.json                      the mark
//! ```

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path as FilePath;

use bytes::Bytes;
use futures::TryStreamExt;
use object_store::path::Path;
use object_store::{MultipartUpload, ObjectStore, ObjectStoreExt, PutPayload};
use serde::{Deserialize, Serialize};

use super::RemoteError;
use super::config::RemoteSection;
use super::store::Store;
use crate::parquet::{Exported, SCHEMA_VERSION, SegmentId, Written, below};

const FORMAT: u32 = 1;
const PART_BYTES: u64 = 8 << 20;
const MARKS: &str = "exported";

/// What was exported of a segment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    pub format: u32,
    pub schema: u32,
    pub segment: String,
    pub server: String,
    /// Size of the segment's file at the export.
    pub segment_bytes: u64,
    /// Whether an index ended it: an open segment grows, and is exported again.
    pub is_closed: bool,
    pub events: u64,
    pub damaged_events: u64,
    pub files: Vec<Written>,
}

impl Mark {
    /// Makes the mark of an export.
    pub fn of(id: &SegmentId, server: &str, segment_bytes: u64, is_closed: bool, exported: &Exported) -> Self {
        Self {
            format: FORMAT,
            schema: SCHEMA_VERSION,
            segment: id.as_str().to_owned(),
            server: server.to_owned(),
            segment_bytes,
            is_closed,
            events: exported.events,
            damaged_events: exported.damaged,
            files: exported.files.clone(),
        }
    }
}

/// A destination of tables. Its calls block.
pub struct TableStore {
    store: Store,
    runtime: tokio::runtime::Runtime,
}

impl TableStore {
    /// Opens one, which is not connected to yet.
    ///
    /// # Errors
    /// When the section cannot be used, or its folder is not there.
    pub fn open(section: &RemoteSection) -> Result<Self, RemoteError> {
        let store = Store::open(section)?;
        store.check_folder()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(2).build();
        Ok(Self { store, runtime: runtime.map_err(RemoteError::Thread)? })
    }

    /// The segments of a cluster that have a mark.
    ///
    /// # Errors
    /// [`RemoteError`].
    pub fn marked(&self, cluster: &str) -> Result<BTreeMap<String, ()>, RemoteError> {
        let failed = |source| RemoteError::Object { name: self.store.url.clone(), source };
        let folder = self.folder(cluster);
        self.runtime.block_on(async {
            let mut objects = self.store.objects.list(Some(&folder));
            let mut marked = BTreeMap::new();
            while let Some(object) = objects.try_next().await.map_err(failed)? {
                if let Some(segment) = object.location.filename().and_then(|file| file.strip_suffix(".json")) {
                    marked.insert(segment.to_owned(), ());
                }
            }
            Ok(marked)
        })
    }

    /// A segment's mark; `None` where there is none, or one of another version.
    ///
    /// # Errors
    /// [`RemoteError`].
    pub fn mark(&self, cluster: &str, id: &SegmentId) -> Result<Option<Mark>, RemoteError> {
        let path = self.folder(cluster).join(format!("{}.json", id.as_str()));
        let failed = |source| RemoteError::Object { name: path.to_string(), source };
        self.runtime.block_on(async {
            let bytes = match self.store.objects.get(&path).await {
                Ok(found) => found.bytes().await.map_err(failed)?,
                Err(object_store::Error::NotFound { .. }) => return Ok(None),
                Err(error) => return Err(failed(error)),
            };
            let mark = serde_json::from_slice(&bytes).ok();
            Ok(mark.filter(|mark: &Mark| mark.format == FORMAT && mark.schema == SCHEMA_VERSION))
        })
    }

    /// Puts the files that lie below `dir`.
    ///
    /// # Errors
    /// [`RemoteError`]; files that were put by then stay, without a mark.
    pub fn put(&self, dir: &FilePath, files: &[Written]) -> Result<(), RemoteError> {
        self.runtime.block_on(async {
            for written in files {
                self.put_file(&below(dir, written), written).await?;
            }
            Ok(())
        })
    }

    /// Puts a mark. Files that the mark `before` lists and this one lacks are deleted first: an open segment that grew may have
    /// put its last rows into another hour.
    ///
    /// # Errors
    /// [`RemoteError`].
    pub fn put_mark(&self, cluster: &str, mark: &Mark, before: Option<&Mark>) -> Result<(), RemoteError> {
        let path = self.folder(cluster).join(format!("{}.json", mark.segment));
        let payload = PutPayload::from(serde_json::to_vec_pretty(mark).unwrap_or_default());
        let file = format!("/{}.parquet", mark.segment);
        let is_listed = |path: &str| mark.files.iter().any(|written| written.path == path);
        let listed_before = before.map_or(&[][..], |mark| mark.files.as_slice());
        // A mark comes from outside: it can name files of its own segment alone.
        let stale = listed_before.iter().filter(|written| written.path.ends_with(&file) && !is_listed(&written.path));
        self.runtime.block_on(async {
            for written in stale {
                let path = self.path(written);
                match self.store.objects.delete(&path).await {
                    Ok(()) | Err(object_store::Error::NotFound { .. }) => {}
                    Err(source) => return Err(RemoteError::Object { name: path.to_string(), source }),
                }
            }
            let put = self.store.objects.put(&path, payload).await;
            put.map(drop).map_err(|source| RemoteError::Object { name: path.to_string(), source })
        })
    }

    fn path(&self, written: &Written) -> Path {
        written.path.split('/').fold(self.store.root.clone(), |path, part| path.join(part))
    }

    fn folder(&self, cluster: &str) -> Path {
        self.store.root.clone().join(MARKS).join(format!("cluster={cluster}"))
    }

    async fn put_file(&self, from: &FilePath, written: &Written) -> Result<(), RemoteError> {
        let path = self.path(written);
        let failed = |source| RemoteError::Object { name: path.to_string(), source };
        let local = |source| RemoteError::Local { path: from.to_owned(), source };
        let file = File::open(from).map_err(local)?;
        let read = |at: u64, length: u64| {
            let mut bytes = vec![0; length as usize];
            file.read_exact_at(&mut bytes, at).map(|()| Bytes::from(bytes)).map_err(local)
        };
        if written.bytes <= PART_BYTES {
            self.store.objects.put(&path, read(0, written.bytes)?.into()).await.map_err(failed)?;
            return Ok(());
        }
        let mut upload = self.store.objects.put_multipart(&path).await.map_err(failed)?;
        let parts = async {
            let mut at = 0;
            while at < written.bytes {
                let length = (written.bytes - at).min(PART_BYTES);
                upload.put_part(read(at, length)?.into()).await.map_err(failed)?;
                at += length;
            }
            upload.complete().await.map(drop).map_err(failed)
        };
        let outcome = parts.await;
        if outcome.is_err() {
            // Parts of an upload that is not ended cost money and are listed nowhere. Best effort: the store may be gone.
            let _ = upload.abort().await;
        }
        outcome
    }
}
