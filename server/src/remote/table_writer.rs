//! Writes the tables of closed segments beside them, while the server runs: `archive.remote.parquet`.
//!
//! What enters: segments of this disk as they close, and the store of findings. What leaves: files of tables in the remote
//! archive. What must hold: it has a thread of its own, and neither the archive nor the uploads wait for it. A segment that cannot
//! be exported holds up neither the others nor the findings. A segment that retention deletes first is counted: its events are in
//! the remote archive, and `tapio-server archive export` makes its tables.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use tapio_wire::program::backoff::Backoff;
use tapio_wire::program::units::human_duration;
use tracing::{info, warn};

use super::RemoteError;
use super::config::RemoteSection;
use super::metrics::RemoteMetrics;
use super::tables::{Mark, TableStore};
use super::uploader::Names;
use crate::archive::index::Index;
use crate::archive::reader::{Reader, SegmentFile};
use crate::findings::FindingStore;
use crate::parquet::{Exported, Exporter, SegmentId, Written, below};
use crate::vitals::{Pulse, Sign};

/// Directory in the archive's directory, for files until they are uploaded.
const WORK: &str = "parquet-work";
/// How often segments are looked for.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
const PAUSE_FIRST: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(60);

/// Writes tables until it is stopped.
pub struct TableWriter {
    stop: SyncSender<()>,
    /// Closed when the thread ends; nothing is ever sent. The thread holds the other end.
    ended: Receiver<()>,
    sign: Sign,
}

impl TableWriter {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn start(
        section: &RemoteSection,
        names: &Names,
        dir: &Path,
        store: Arc<FindingStore>,
        metrics: RemoteMetrics,
    ) -> Result<Self, RemoteError> {
        let (stop, stopped) = sync_channel(1);
        let (end, ended) = sync_channel(0);
        let pulse = Pulse::default();
        let sign = pulse.sign();
        let cluster = section.cluster.clone().unwrap_or_else(|| names.cluster.clone());
        let server = section.server.clone().unwrap_or_else(|| names.server.clone());
        let work = Work {
            exporter: Exporter::new(&cluster, &server),
            section: section.clone(),
            cluster,
            server,
            dir: dir.to_owned(),
            store,
            metrics,
            to: None,
            done: BTreeSet::new(),
            seen: BTreeSet::new(),
            findings_at: Instant::now(),
            published_ns: 0,
        };
        let thread = std::thread::Builder::new().name("parquet".to_owned()).spawn(move || {
            let (_pulse, _end) = (pulse, end);
            work.run(&stopped);
        });
        thread.map_err(RemoteError::Thread)?;
        Ok(Self { stop, ended, sign })
    }

    /// Whether its thread lives.
    pub fn sign(&self) -> Sign {
        self.sign.clone()
    }
}

impl TableWriter {
    /// Writes what is closed by now within `grace`, and ends. Blocking.
    pub fn stop(self, grace: Duration) {
        let _ = self.stop.try_send(());
        if self.ended.recv_timeout(grace) == Err(RecvTimeoutError::Timeout) {
            warn!("last tables not written in time: `tapio-server archive export` makes them");
        }
    }
}

struct Work {
    exporter: Exporter,
    section: RemoteSection,
    cluster: String,
    server: String,
    dir: PathBuf,
    store: Arc<FindingStore>,
    metrics: RemoteMetrics,
    to: Option<TableStore>,
    /// Segments of this disk whose tables are there, and those that were closed when they were looked for last.
    done: BTreeSet<u64>,
    seen: BTreeSet<u64>,
    findings_at: Instant,
    published_ns: u64,
}

impl Work {
    fn run(mut self, stopped: &Receiver<()>) {
        let mut backoff = Backoff::new(PAUSE_FIRST, PAUSE_MAX);
        loop {
            let pause = match self.pass(false) {
                Ok(()) => {
                    backoff.reset();
                    LOOK_INTERVAL
                }
                Err(error) => {
                    self.metrics.parquet_failures.inc();
                    let pause = backoff.pause();
                    let again = human_duration(pause.as_nanos() as u64);
                    warn!(%error, again, "cannot write tables; segments are still uploaded");
                    pause
                }
            };
            match stopped.recv_timeout(pause) {
                Err(RecvTimeoutError::Timeout) => {}
                Ok(()) | Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        if let Err(error) = self.pass(true) {
            warn!(%error, "last tables not written: `tapio-server archive export` makes them");
        }
    }

    fn pass(&mut self, is_last: bool) -> Result<(), RemoteError> {
        // What a pass left that failed, or a run that was killed.
        let _ = fs::remove_dir_all(self.dir.join(WORK));
        let to = match self.to.take() {
            Some(to) => to,
            None => self.open()?,
        };
        let outcome = self.write(&to, is_last);
        self.to = Some(to);
        outcome
    }

    fn open(&self) -> Result<TableStore, RemoteError> {
        let (to, work) = (TableStore::open(&self.section)?, self.dir.join(WORK));
        let files = self.exporter.empty(&work)?;
        to.put(&work, &files)?;
        remove(&work, &files)?;
        Ok(to)
    }

    fn write(&mut self, to: &TableStore, is_last: bool) -> Result<(), RemoteError> {
        let (dir, work) = (self.dir.clone(), self.dir.join(WORK));
        let local = |source| RemoteError::Local { path: dir.clone(), source };
        let segments = Reader::new(&self.dir).segments().map_err(|error| local(io::Error::other(error)))?;
        let newest = segments.last().map(|segment| segment.number);
        let numbers: BTreeSet<u64> = segments.iter().map(|segment| segment.number).collect();
        let missed = self.seen.difference(&numbers).filter(|number| !self.done.contains(number)).count();
        self.missed(missed as u64);
        self.done.retain(|number| numbers.contains(number));
        let mut closed = Vec::new();
        for segment in segments {
            let is_open = Some(segment.number) == newest && !is_closed(&segment).map_err(local)?;
            if !is_open && !self.done.contains(&segment.number) {
                closed.push(segment);
            }
        }
        self.seen = closed.iter().map(|segment| segment.number).collect();
        let mut outcome = Ok(());
        for segment in closed {
            let Err(error) = self.segment(to, &segment, &work) else {
                self.done.insert(segment.number);
                continue;
            };
            // They would take room on a disk that may be full.
            let _ = fs::remove_dir_all(&work);
            // The others would fail at the destination, too.
            let is_destination = matches!(error, RemoteError::Object { .. });
            self.failed(&mut outcome, error);
            if is_destination {
                break;
            }
        }
        if (is_last || self.findings_at.elapsed() >= self.section.every)
            && let Err(error) = self.findings(to, &work)
        {
            self.failed(&mut outcome, error);
        }
        outcome
    }

    /// Keeps the first error of a pass for [`Work::run`], which counts it, and counts the others here.
    fn failed(&self, outcome: &mut Result<(), RemoteError>, error: RemoteError) {
        if outcome.is_ok() {
            *outcome = Err(error);
        } else {
            self.metrics.parquet_failures.inc();
            warn!(%error, "cannot write tables of this segment or of findings");
        }
    }

    fn missed(&self, segments: u64) {
        if segments > 0 {
            self.metrics.parquet_missed.inc_by(segments);
            warn!(segments, "deleted before their tables were written: `tapio-server archive export` makes them");
        }
    }

    fn segment(&mut self, to: &TableStore, segment: &SegmentFile, work: &Path) -> Result<(), RemoteError> {
        let local = |source| RemoteError::Local { path: segment.path.clone(), source };
        let file = match File::open(&segment.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.missed(1);
                return Ok(());
            }
            Err(error) => return Err(local(error)),
        };
        let Some(id) = SegmentId::of(&file, segment.number).map_err(local)? else { return Ok(()) };
        let bytes = file.metadata().map_err(local)?.len();
        let before = to.mark(&self.cluster, &id)?;
        if before.as_ref().is_some_and(|mark| mark.is_closed && mark.segment_bytes == bytes) {
            return Ok(());
        }
        let exported = self.exporter.segment(segment, &id, work, &mut |_| {})?;
        to.put(work, &exported.files)?;
        remove(work, &exported.files)?;
        to.put_mark(&self.cluster, &Mark::of(&id, &self.server, bytes, true, &exported), before.as_ref())?;
        let Exported { files, events, damaged, took, .. } = exported;
        if damaged > 0 {
            let segment = segment.number;
            warn!(
                segment,
                events = damaged,
                "acknowledged events are missing: the table ledger counts them as damaged"
            );
        }
        self.metrics.parquet_segments.inc();
        self.metrics.parquet_events.inc_by(events);
        self.metrics.parquet_bytes.inc_by(files.iter().map(|file| file.bytes).sum());
        self.metrics.parquet_seconds.inc_by(took.as_secs_f64());
        Ok(())
    }

    /// Findings that are new or have changed.
    fn findings(&mut self, to: &TableStore, work: &Path) -> Result<(), RemoteError> {
        let found = self.store.changed_after(self.published_ns);
        if let Some(last) = found.last() {
            let published_ns = last.published_ns;
            let name = format!("findings-{}-{published_ns:020}", self.server);
            let files = self.exporter.findings(&found, &name, work)?;
            to.put(work, &files)?;
            remove(work, &files)?;
            self.published_ns = published_ns;
            info!(findings = found.len(), "findings written as tables");
        }
        self.findings_at = Instant::now();
        Ok(())
    }
}

fn is_closed(segment: &SegmentFile) -> io::Result<bool> {
    match File::open(&segment.path) {
        Ok(file) => Ok(Index::read(&file, segment.number)?.is_some()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn remove(work: &Path, files: &[Written]) -> Result<(), RemoteError> {
    for written in files {
        let path = below(work, written);
        fs::remove_file(&path).map_err(|source| RemoteError::Local { path, source })?;
    }
    Ok(())
}
