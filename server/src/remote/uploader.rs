//! Uploads closed segments, oldest first, on a thread of its own.
//!
//! What enters: what [`Offsite`] says is closed. What leaves: objects and manifests, and word that a segment is safe. What must
//! hold: a segment is safe when its manifest is there. What failed is tried again, later each time, for as long as it takes. At
//! the end it is tried until the grace is over, and what is then on this disk alone is logged.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use object_store::PutPayload;
use object_store::path::Path;
use tapio_wire::program::backoff::Backoff;
use tapio_wire::program::units::{human_bytes, human_duration};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};
use tracing::{error, info, warn};

use super::accounting::Accounting;
use super::config::RemoteSection;
use super::listing::{self, Label};
use super::manifest::Manifest;
use super::metrics::RemoteMetrics;
use super::store::Store;
use super::{RemoteError, life, names, put};
use crate::archive::Archive;
use crate::archive::offsite::{Offsite, Waiting};
use crate::vitals::{Pulse, Sign};

const PAUSE_FIRST: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(60);
/// Pause between attempts while the server ends.
const PAUSE_ENDING: Duration = Duration::from_millis(500);
/// How often the gauges are set while nothing happens.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// What the cluster and this server are called where the section does not say it.
#[derive(Clone, Debug)]
pub struct Names {
    pub cluster: String,
    pub server: String,
}

/// Uploads closed segments until it is stopped.
pub struct Uploader {
    thread: Option<JoinHandle<()>>,
    stop: watch::Sender<Option<Instant>>,
    sign: Sign,
}

impl Uploader {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the section cannot be used. Whether the store can be reached shows later.
    pub fn start(
        section: &RemoteSection,
        names: &Names,
        archive: &Archive,
        offsite: Arc<Offsite>,
        metrics: RemoteMetrics,
    ) -> Result<Self, RemoteError> {
        let store = Store::open(section)?;
        let (stop, stopped) = watch::channel(None);
        let pulse = Pulse::default();
        let sign = pulse.sign();
        let cluster = section.cluster.clone().unwrap_or_else(|| names.cluster.clone());
        let accounting = Accounting {
            store: store.clone(),
            books: Arc::clone(archive.books()),
            dir: archive.dir().to_owned(),
            cluster: cluster.clone(),
            metrics: metrics.clone(),
            read: HashMap::new(),
        };
        let work = Work {
            store,
            dir: archive.dir().to_owned(),
            cluster,
            server: section.server.clone().unwrap_or_else(|| names.server.clone()),
            offsite,
            metrics,
            stop: stopped,
            life: None,
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(2).build();
        let runtime = runtime.map_err(RemoteError::Thread)?;
        let thread = std::thread::Builder::new().name("upload".to_owned()).spawn(move || {
            let _pulse = pulse;
            runtime.block_on(work.run(accounting));
            runtime.shutdown_background();
        });
        Ok(Self { thread: Some(thread.map_err(RemoteError::Thread)?), stop, sign })
    }

    /// Whether its thread lives.
    pub fn sign(&self) -> Sign {
        self.sign.clone()
    }

    /// Uploads what is closed by now within `grace`, and ends. Blocking.
    pub fn stop(mut self, grace: Duration) {
        self.end(grace);
    }

    fn end(&mut self, grace: Duration) {
        self.stop.send_replace(Some(Instant::now() + grace));
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            warn!("the thread that uploads had panicked");
        }
    }
}

impl Drop for Uploader {
    fn drop(&mut self) {
        self.end(Duration::ZERO);
    }
}

/// An archive directory's name in the store, and what is there of it.
struct Life {
    name: String,
    folder: Path,
    /// Objects by number: the last part of the path, and the size.
    known: BTreeMap<u64, (String, u64)>,
}

struct Work {
    store: Store,
    dir: PathBuf,
    cluster: String,
    server: String,
    offsite: Arc<Offsite>,
    metrics: RemoteMetrics,
    stop: watch::Receiver<Option<Instant>>,
    life: Option<Life>,
}

impl Work {
    async fn run(mut self, accounting: Accounting) {
        let mut stop = self.stop.clone();
        let over = async move {
            let deadline = match stop.wait_for(Option::is_some).await {
                Ok(deadline) => deadline.unwrap_or_else(Instant::now),
                Err(_) => Instant::now(),
            };
            sleep_until(deadline).await;
        };
        let (offsite, metrics) = (Arc::clone(&self.offsite), self.metrics.clone());
        tokio::select! {
            () = self.upload_all() => {}
            () = over => {}
            () = show(&offsite, &metrics) => {}
            () = accounting.run() => {}
        }
        let left = offsite.backlog();
        if left.segments > 0 {
            let bytes = human_bytes(left.bytes);
            warn!(
                segments = left.segments,
                bytes, "segments not uploaded: only this disk has them until the next start"
            );
        }
    }

    /// Uploads segments as they close. Ends when a stop is asked for and no segment waits.
    async fn upload_all(&mut self) {
        let mut backoff = Backoff::new(PAUSE_FIRST, PAUSE_MAX);
        let mut changes = self.offsite.changes();
        loop {
            let pause = match self.pass().await {
                Ok(()) => {
                    if backoff.failures() > 0 {
                        info!(url = self.store.url, "uploads work again");
                    }
                    backoff.reset();
                    None
                }
                Err(error) => {
                    self.metrics.failures.inc();
                    let pause = backoff.pause();
                    let again = human_duration(pause.as_nanos() as u64);
                    warn!(%error, again, "cannot upload segments: they stay on this disk, up to archive.max_bytes");
                    Some(pause)
                }
            };
            let is_ending = self.stop.borrow().is_some();
            match pause {
                None if is_ending && self.offsite.backlog().segments == 0 => return,
                Some(_) if is_ending => sleep(PAUSE_ENDING).await,
                Some(pause) => tokio::select! {
                    () = sleep(pause) => {}
                    _ = self.stop.wait_for(Option::is_some) => {}
                },
                None => tokio::select! {
                    _ = changes.changed() => {}
                    _ = self.stop.wait_for(Option::is_some) => {}
                },
            }
        }
    }

    async fn pass(&mut self) -> Result<(), RemoteError> {
        self.store.check_folder()?;
        let mut life = match self.life.take() {
            Some(life) => life,
            None => self.look().await?,
        };
        let outcome = self.upload_waiting(&mut life).await;
        self.life = Some(life);
        outcome
    }

    async fn upload_waiting(&self, life: &mut Life) -> Result<(), RemoteError> {
        while let Some(waiting) = self.offsite.oldest() {
            if !self.upload(life, &waiting).await? {
                continue;
            }
            self.offsite.uploaded(waiting.number);
        }
        Ok(())
    }

    /// What the store has of this directory.
    async fn look(&self) -> Result<Life, RemoteError> {
        let local = |source| RemoteError::Local { path: self.dir.clone(), source };
        let name = life::of(&self.dir).map_err(local)?;
        let folder = names::folder(&self.store.root, &self.cluster, &self.server, &name);
        let listed = listing::list(&self.store, &folder).await?;
        let label = Label { cluster: self.cluster.clone(), server: self.server.clone(), life: name.clone() };
        let segments = listed.get(&label).into_iter().flatten();
        let known: BTreeMap<_, _> =
            segments.map(|(&number, listed)| (number, (listed.name.file(), listed.bytes))).collect();
        info!(url = self.store.url, life = name, segments = known.len(), "connected to the remote archive");
        Ok(Life { name, folder, known })
    }

    /// Uploads one. False when it is to be tried again under the name of another life.
    async fn upload(&self, life: &mut Life, waiting: &Waiting) -> Result<bool, RemoteError> {
        let local = |source| RemoteError::Local { path: waiting.path.clone(), source };
        let file = match File::open(&waiting.path) {
            Ok(file) => file,
            // Retention was faster, and has counted it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(true),
            Err(error) => return Err(local(error)),
        };
        let known = life.known.get(&waiting.number);
        let bytes = file.metadata().map_err(local)?.len();
        if waiting.is_old && known.is_some_and(|(_, known)| *known == bytes) {
            return Ok(true);
        }
        // What is uploaded must not be gone after a power cut.
        file.sync_all().map_err(local)?;
        let manifest = Manifest::of(&file, waiting.number, &self.cluster, &self.server, &life.name).map_err(local)?;
        let Some(manifest) = manifest else { return Ok(true) };
        let found = match known {
            Some((object, _)) if *object == manifest.object => return Ok(true),
            Some((object, _)) => self.unless_erased(life, &manifest, object).await?,
            None => self.put(life, &file, &manifest).await?,
        };
        if let Some(found) = found {
            let name = names::manifest_file(waiting.number);
            let server = format!("{}/{}", self.server, life.name);
            let error = RemoteError::Collision { server, name, found };
            self.metrics.collisions.inc();
            error!(%error, "the remote archive has other contents under this name: continuing under a new name, nothing overwritten");
            life.name = life::renew(&self.dir).map_err(local)?;
            life.folder = names::folder(&self.store.root, &self.cluster, &self.server, &life.name);
            life.known.clear();
            return Ok(false);
        }
        life.known.insert(waiting.number, (manifest.object, manifest.bytes));
        self.metrics.segments.inc();
        self.metrics.bytes.inc_by(manifest.bytes);
        Ok(true)
    }

    /// What stands in the way; `None` where it is the segment without what somebody had erased from it.
    async fn unless_erased(
        &self,
        life: &Life,
        manifest: &Manifest,
        known: &str,
    ) -> Result<Option<String>, RemoteError> {
        let object = life.folder.clone().join(known);
        let there = listing::manifest(&self.store, &object, manifest.segment).await?;
        if there.erased_events > 0 {
            let segment = manifest.segment;
            warn!(segment, "the remote archive has this segment without erased events, and this disk has it with them");
        }
        Ok((there.erased_events == 0).then_some(there.object))
    }

    /// Puts the segment, then its manifest. Returns what stands in the way, if something else does.
    async fn put(&self, life: &Life, file: &File, manifest: &Manifest) -> Result<Option<String>, RemoteError> {
        let object = life.folder.clone().join(manifest.object.as_str());
        put::segment(&self.store, &object, file, manifest.bytes).await?;
        let path = life.folder.clone().join(names::manifest_file(manifest.segment));
        match put::create(&self.store, &path, PutPayload::from(manifest.to_json())).await? {
            true => Ok(None),
            false => {
                let there = listing::manifest(&self.store, &object, manifest.segment).await?;
                Ok((there.sha256 != manifest.sha256 && there.erased_events == 0).then_some(there.object))
            }
        }
    }
}

/// Sets the gauges, for ever.
async fn show(offsite: &Offsite, metrics: &RemoteMetrics) {
    loop {
        let backlog = offsite.backlog();
        metrics.waiting.set(backlog.segments as i64);
        metrics.waiting_bytes.set(backlog.bytes as i64);
        metrics.oldest_seconds.set(backlog.oldest.as_secs() as i64);
        sleep(LOOK_INTERVAL).await;
    }
}
