//! What operators do to a remote archive: legal holds, erasure, and the audit of it.
//!
//! What enters: whom to erase, or a hold. What leaves: segments, manifests and tables without them, and an audit record. What must
//! hold: nothing that a hold keeps is changed; one program at a time works. A new object is whole before a manifest names it, and
//! the old one goes after that: a run that was interrupted is repeated.
//!
//! ```text
//! <prefix>/holds/<id>.json                    legal holds
//! <prefix>/audit/<moment>-<random>.json       what was erased, when, by whom
//! <prefix>/locks/maintenance/<term>.json      who works on it
//! ```

use std::fs::{self, File};
use std::path::{Path as FilePath, PathBuf};
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;

use futures::TryStreamExt;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutPayload};
use serde_json::Value;
use tapio_wire::program::clock::now_ns;
use tokio::runtime::Runtime;

use super::config::RemoteSection;
use super::lease::Lease;
use super::listing::{self, Label, Listed, Segments};
use super::manifest::Manifest;
use super::past::{Asked, Kept, Past};
use super::ranges::TailHint;
use super::store::Store;
use super::tables::TableStore;
use super::{RemoteError, fetch, names, put};
use crate::archive::erase::{Erased, Erasure, rewrite};
use crate::archive::holds::{FOLDER as HOLDS, Hold};
use crate::archive::reader::Reader;
use crate::parquet::Exporter;

const AUDIT: &str = "audit";
const FINDINGS: &str = "findings";

/// A remote archive to change. Its calls block.
pub struct Keeping {
    store: Store,
    section: RemoteSection,
    runtime: Runtime,
}

/// What an erasure came to.
#[derive(Clone, Debug, Default)]
pub struct ErasureReport {
    pub segments: u64,
    pub rewritten: u64,
    pub erased: Erased,
    /// Segments whose tables were written again, and files of findings that were deleted.
    pub tables: u64,
    pub findings_files: u64,
}

impl Keeping {
    /// Opens one, by the URL of `archive.remote.url` itself.
    ///
    /// # Errors
    /// When the section cannot be used, or its folder is not there.
    pub fn open(section: &RemoteSection) -> Result<Self, RemoteError> {
        let store = Store::open(section)?;
        store.check_folder()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(2).build();
        Ok(Self { store, section: section.clone(), runtime: runtime.map_err(RemoteError::Thread)? })
    }

    /// The legal holds.
    ///
    /// # Errors
    /// [`RemoteError`].
    pub fn holds(&self) -> Result<Vec<Hold>, RemoteError> {
        let folder = self.store.root.clone().join(HOLDS);
        let failed = |source| RemoteError::Object { name: folder.to_string(), source };
        self.runtime.block_on(async {
            let objects: Vec<_> = self.store.objects.list(Some(&folder)).try_collect().await.map_err(failed)?;
            let mut holds = Vec::new();
            for object in objects {
                let file = object.location.filename().unwrap_or_default().to_owned();
                let Some(id) = Hold::id_of(&file) else { continue };
                match self.store.objects.get(&object.location).await {
                    Ok(found) => holds.push(Hold::parse(id, &found.bytes().await.map_err(failed)?)),
                    Err(object_store::Error::NotFound { .. }) => {}
                    Err(error) => return Err(failed(error)),
                }
            }
            holds.sort_by(|a, b| a.id.cmp(&b.id));
            Ok(holds)
        })
    }

    /// Adds a legal hold.
    ///
    /// # Errors
    /// [`RemoteError`]; an id is taken once.
    pub fn add_hold(&self, hold: &Hold) -> Result<(), RemoteError> {
        let path = self.store.root.clone().join(HOLDS).join(Hold::file(&hold.id));
        match self.runtime.block_on(put::create(&self.store, &path, PutPayload::from(hold.to_json())))? {
            true => Ok(()),
            false => Err(RemoteError::Usage(format!("{path} is there already"))),
        }
    }

    /// Removes a legal hold. False where none has the id.
    ///
    /// # Errors
    /// [`RemoteError`].
    pub fn remove_hold(&self, id: &str) -> Result<bool, RemoteError> {
        let path = self.store.root.clone().join(HOLDS).join(Hold::file(id));
        let failed = |source| RemoteError::Object { name: path.to_string(), source };
        self.runtime.block_on(async {
            // Stores do not say whether there was something to delete.
            match self.store.objects.head(&path).await {
                Ok(_) => self.store.objects.delete(&path).await.map(|()| true).map_err(failed),
                Err(object_store::Error::NotFound { .. }) => Ok(false),
                Err(error) => Err(failed(error)),
            }
        })
    }

    /// Puts an audit record.
    ///
    /// # Errors
    /// [`RemoteError`].
    pub fn audit(&self, record: &Value) -> Result<(), RemoteError> {
        let now = now_ns();
        let path = self.store.root.clone().join(AUDIT).join(format!("{}-{:08x}.json", names::moment(now), now as u32));
        let payload = PutPayload::from(format!("{record}\n").into_bytes());
        self.runtime.block_on(put::create(&self.store, &path, payload)).map(drop)
    }

    /// Erases. `entities` reads the ids of whom to erase out of all descriptions; `work` is a folder for one segment at a time.
    ///
    /// # Errors
    /// [`RemoteError`]; what was rewritten by then stays so, and a repeated run goes on.
    pub fn erase(
        &self,
        erasure: &Erasure,
        by: &str,
        work: &FilePath,
        is_dry: bool,
        entities: &mut dyn FnMut(&Reader) -> Result<Erasure, RemoteError>,
    ) -> Result<ErasureReport, RemoteError> {
        let mut lease = self.runtime.block_on(Lease::take(&self.store, by, "erase"))?;
        let outcome = self.erase_held(erasure, work, is_dry, entities, &mut lease);
        // Another may work after a failure too: what is there is whole.
        let released = self.runtime.block_on(lease.release(&self.store));
        outcome.and_then(|report| released.map(|()| report))
    }

    fn erase_held(
        &self,
        erasure: &Erasure,
        work: &FilePath,
        is_dry: bool,
        entities: &mut dyn FnMut(&Reader) -> Result<Erasure, RemoteError>,
        lease: &mut Lease,
    ) -> Result<ErasureReport, RemoteError> {
        erasable(&self.holds()?, erasure)?;
        let listed = self.runtime.block_on(listing::list(&self.store, &self.store.root))?;
        let depth = self.store.root.parts().count() + 4;
        let is_below = |segments: &Segments| segments.values().any(|listed| listed.path.parts().count() != depth);
        if listed.is_empty() || listed.values().any(is_below) {
            return Err(RemoteError::Empty { url: self.store.url.clone() });
        }
        let erasure = self.described(work, entities)?;
        let mut report = ErasureReport::default();
        let tables = TableStore::open(&self.section)?;
        for (label, segments) in &listed {
            let mut exporter = Exporter::new(&label.cluster, &label.server);
            for listed in segments.values().filter(|listed| listed.name.first_ns <= erasure.until_ns) {
                self.runtime.block_on(lease.keep(&self.store))?;
                // One may have been added since.
                let holds = self.holds()?;
                erasable(&holds, &erasure)?;
                let mut one = One { keeping: self, label, listed, work, report: &mut report, holds: &holds };
                one.erase(&erasure, &tables, &mut exporter, is_dry)?;
            }
            if !is_dry {
                report.findings_files += self.delete_findings(&label.cluster)?;
            }
        }
        Ok(report)
    }

    /// Whom to erase, by the descriptions in all indexes.
    fn described(
        &self,
        work: &FilePath,
        entities: &mut dyn FnMut(&Reader) -> Result<Erasure, RemoteError>,
    ) -> Result<Erasure, RemoteError> {
        let kept = Kept {
            cache: work.join("indexes"),
            cache_bytes: u64::MAX,
            turn: Mutex::default(),
            hint: TailHint::default(),
            is_clean: AtomicBool::new(false),
        };
        let asked = Asked { since_ns: 0, until_ns: u64::MAX, is_named: true, besides: None };
        let past = Past::look(&self.section, Arc::new(kept), &asked)?;
        let Some(past) = past else { return Err(RemoteError::Empty { url: self.store.url.clone() }) };
        if let Some(unread) = past.unread() {
            return Err(RemoteError::Usage(format!("not everything can be read, so nothing is erased: {unread}")));
        }
        let past = Arc::new(past);
        entities(&Reader::over([]).with_sparse(past.parts(), Arc::<Past>::clone(&past)))
    }

    /// Deletes the tables of findings: they name what was erased, and an export makes them again.
    fn delete_findings(&self, cluster: &str) -> Result<u64, RemoteError> {
        let folder = self.store.root.clone().join(FINDINGS).join(format!("cluster={cluster}"));
        let failed = |source| RemoteError::Object { name: folder.to_string(), source };
        self.runtime.block_on(async {
            let objects: Vec<_> = self.store.objects.list(Some(&folder)).try_collect().await.map_err(failed)?;
            let mut deleted = 0;
            for object in objects {
                // The file without rows stays: every table can be read then.
                if object.location.filename().is_some_and(|file| !file.starts_with("schema-")) {
                    self.store.objects.delete(&object.location).await.map_err(failed)?;
                    deleted += 1;
                }
            }
            Ok(deleted)
        })
    }
}

/// Refuses what a legal hold keeps.
pub fn erasable(holds: &[Hold], erasure: &Erasure) -> Result<(), RemoteError> {
    let is_kept = |hold: &&Hold| hold.keeps(erasure.since_ns, erasure.until_ns, Some(&erasure.namespace));
    match holds.iter().find(is_kept) {
        None => Ok(()),
        Some(Hold { id, reason, by, .. }) => {
            Err(RemoteError::Held { id: id.clone(), reason: reason.clone(), by: by.clone() })
        }
    }
}

/// One segment on its way.
struct One<'a> {
    keeping: &'a Keeping,
    label: &'a Label,
    listed: &'a Listed,
    work: &'a FilePath,
    report: &'a mut ErasureReport,
    holds: &'a [Hold],
}

impl One<'_> {
    fn erase(
        &mut self,
        erasure: &Erasure,
        tables: &TableStore,
        exporter: &mut Exporter,
        is_dry: bool,
    ) -> Result<(), RemoteError> {
        let number = self.listed.name.number;
        let (old, new) = (self.work.join(self.listed.name.file()), self.work.join("rewritten.segment"));
        let local = |path: &PathBuf| {
            let path = path.clone();
            move |source| RemoteError::Local { path: path.clone(), source }
        };
        let store = &self.keeping.store;
        self.keeping.runtime.block_on(fetch::ensure(store, self.listed, &old, &mut |_| {}))?;
        let file = File::open(&old).map_err(local(&old))?;
        let erased = rewrite(&file, number, erasure, &new).map_err(local(&new))?;
        self.report.segments += 1;
        self.report.erased.add(&erased);
        if erased.replaces(self.holds).map_err(|hold| RemoteError::unread(number, hold))? {
            self.report.rewritten += 1;
            if !is_dry {
                // Tables first: a run that is interrupted here finds the old segment, and begins again.
                if self.rewrite_tables((&file, &new), tables, exporter)? {
                    self.report.tables += 1;
                }
                self.swap(&new, erased)?;
            }
        }
        if !is_dry {
            self.delete_others()?;
        }
        fs::remove_file(&new).map_err(local(&new))?;
        fs::remove_file(&old).map_err(local(&old))
    }

    fn folder(&self) -> Path {
        let Label { cluster, server, life } = self.label;
        names::folder(&self.keeping.store.root, cluster, server, life)
    }

    /// Puts the new segment, and then the manifest that names it.
    fn swap(&self, new: &FilePath, erased: Erased) -> Result<(), RemoteError> {
        let Label { cluster, server, life } = self.label;
        let (store, number) = (&self.keeping.store, self.listed.name.number);
        let local = |source| RemoteError::Local { path: new.to_owned(), source };
        let file = File::open(new).map_err(local)?;
        let Some(manifest) = Manifest::of(&file, number, cluster, server, life).map_err(local)? else { return Ok(()) };
        let manifest = Manifest { erased_events: (erased.before + erased.events).max(1), ..manifest };
        let object = self.folder().join(manifest.object.as_str());
        let path = self.folder().join(names::manifest_file(number));
        self.keeping.runtime.block_on(async {
            put::segment(store, &object, &file, manifest.bytes).await?;
            let put = store.objects.put(&path, PutPayload::from(manifest.to_json())).await;
            put.map(drop).map_err(|source| RemoteError::Object { name: path.to_string(), source })
        })
    }

    /// Deletes objects of this number that its manifest does not name: the one before, also of a run that was interrupted.
    fn delete_others(&self) -> Result<(), RemoteError> {
        let (store, number, folder) = (&self.keeping.store, self.listed.name.number, self.folder());
        let failed = |source| RemoteError::Object { name: folder.to_string(), source };
        self.keeping.runtime.block_on(async {
            let named = listing::manifest(store, &self.listed.path, number).await?.object;
            let objects: Vec<_> = store.objects.list(Some(&folder)).try_collect().await.map_err(failed)?;
            for object in objects {
                let file = object.location.filename().unwrap_or_default();
                let is_of_number = names::SegmentName::parse(file).is_some_and(|name| name.number == number);
                if is_of_number && file != named {
                    store.objects.delete(&object.location).await.map_err(failed)?;
                }
            }
            Ok(())
        })
    }

    /// Writes the segment's tables again, where it has some.
    fn rewrite_tables(
        &self,
        (old, new): (&File, &FilePath),
        tables: &TableStore,
        exporter: &mut Exporter,
    ) -> Result<bool, RemoteError> {
        let (cluster, server) = (&self.label.cluster, &self.label.server);
        let (number, names) = (self.listed.name.number, (cluster.as_str(), server.as_str()));
        super::erased_tables::rewrite((old, new), number, names, tables, exporter, self.work)
    }
}
