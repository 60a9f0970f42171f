//! The archive: what was received, durably, and the books about it.
//!
//! What enters: checked frames with the stream that waits for them. What leaves: reports that they are durable, the books, and at
//! start the frames of the last analysis window. What must hold: nothing is reported durable that is not synced, and what was
//! reported survives a crash. No fault of the disk needs a person to recover from once the disk works again.
//!
//! One thread owns the files ([`writer`]). The queue to it is bounded in frames and bytes, so a slow disk shows as lack of room
//! to the streams and as flat memory. A directory belongs to one server at a time ([`lock`]).
//!
//! ```text
//!  streams ──reserve──► queue ──► writer thread: batch ──► segment ──► fdatasync ──► mark ──► books ──► streams
//! ```

mod ages;
pub mod books;
pub mod copy;
pub mod damage;
pub mod disk;
pub mod elsewhere;
pub mod erase;
pub mod holds;
pub mod index;
pub mod lock;
mod merge;
mod metrics;
pub mod offsite;
pub mod plain;
pub mod reader;
mod records;
mod recover;
pub mod restored;
mod retention;
pub(crate) mod scan;
pub(crate) mod segments;
mod selection;
pub(crate) mod snapshot;
pub(crate) mod sparse;
mod uring;
pub mod verify;
mod writer;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use tapio_wire::frame::Header;
use tapio_wire::service;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tracing::{info, warn};

pub use books::{Acknowledged, Balance, Books, EpochState, Recorded};
pub use disk::{Disk, DiskKind};
pub use metrics::ArchiveMetrics;
pub use plain::PlainDisk;

use crate::vitals::{Pulse, Sign};
use writer::Writer;

/// Frames that wait for the writer at most.
pub const QUEUE_FRAMES_MAX: usize = 1024;
/// Bytes that wait for the writer, and in its batch, at most.
pub const QUEUE_BYTES_MAX: usize = 64 << 20;
const _: () = assert!(QUEUE_BYTES_MAX >= tapio_wire::limits::FRAME_BYTES_MAX);

/// What one commit writes at most, and one frame more, unless it is configured.
pub const COMMIT_BYTES_DEFAULT: usize = 4 << 20;

/// The smallest segment: a directory that may hold little is still cut into some.
const SEGMENT_BYTES_MIN: u64 = 64 << 10;

/// Which [`Disk`] to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize, serde::Serialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DiskChoice {
    /// io_uring where the kernel and the container allow it, else plain.
    #[default]
    Auto,
    /// io_uring, or no start.
    Uring,
    /// `pwrite` and `fdatasync`.
    Plain,
}

/// Where and how to archive.
#[derive(Clone)]
pub struct ArchiveConfig {
    pub dir: PathBuf,
    pub max_bytes: u64,
    pub max_age: Duration,
    pub commit_interval: Duration,
    /// A commit takes what waits up to this many bytes, and one frame more.
    pub commit_bytes: usize,
    pub disk: DiskChoice,
    pub segment_bytes: u64,
    /// Frames that wait for the writer; [`QUEUE_BYTES_MAX`] at the most, and room for one frame at least.
    pub queue_bytes: usize,
    /// Set where closed segments are uploaded: retention waits for that.
    pub offsite: Option<Arc<offsite::Offsite>>,
}

impl ArchiveConfig {
    /// The defaults, for a directory.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self {
            dir: dir.into(),
            max_bytes: 1 << 30,
            max_age: Duration::from_secs(24 * 60 * 60),
            commit_interval: Duration::from_millis(5),
            commit_bytes: COMMIT_BYTES_DEFAULT,
            disk: DiskChoice::Auto,
            segment_bytes: 64 << 20,
            queue_bytes: QUEUE_BYTES_MAX,
            offsite: None,
        }
    }
}

/// Why the archive cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    #[error(
        "the archive directory {} cannot be used: {source}. It must exist or be creatable, and be writable by this user; \
         set archive.dir or mount a volume there",
        dir.display()
    )]
    Directory { dir: PathBuf, source: io::Error },
    #[error(
        "the archive directory {} belongs to another server (process {holder}): stop it, or give this one a directory of \
         its own with archive.dir",
        dir.display()
    )]
    Locked { dir: PathBuf, holder: String },
    #[error("the segment {} cannot be read: {source}", path.display())]
    Segment { path: PathBuf, source: io::Error },
    #[error("io_uring cannot be used: {source}. Set archive.disk to auto or plain")]
    Uring { source: io::Error },
    #[error("the archive's thread cannot be started: {source}")]
    Thread { source: io::Error },
    #[error("the archive's metrics cannot be created: {source}")]
    Metrics { source: prometheus::Error },
}

/// Hears when frames are durable. Called on the archive's thread: it must not block.
pub trait Durable: Send + Sync {
    /// Every frame of `epoch` up to `seq` that was appended with this receiver is durable.
    fn durable(&self, epoch: u64, seq: u64);
}

/// A frame for the archive. `header` was [`Header::check`]ed on these very bytes.
pub struct Append {
    pub bytes: Bytes,
    pub header: Header,
    /// What the node is called, where known.
    pub node_name: Option<Arc<str>>,
    /// Set on the first frame behind frames that were acknowledged elsewhere: the sequence goes on from there.
    pub resumed: Option<Acknowledged>,
    pub on_durable: Arc<dyn Durable>,
    /// What the segment's index shall know of it. Without one the index leaves open what is in the frame's block.
    pub summary: Option<Box<index::Summary>>,
}

struct Queued {
    append: Append,
    _room: OwnedSemaphorePermit,
}

/// Whether frames can be made durable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ArchiveState {
    Ready,
    /// Not now, and why.
    NotReady(String),
}

/// The archive is closed, or its thread has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the archive is closed")]
pub struct Closed;

/// Appends frames.
#[derive(Clone)]
pub struct Appender {
    queue: mpsc::Sender<Queued>,
    room: Arc<Semaphore>,
    queue_bytes: usize,
    metrics: Arc<ArchiveMetrics>,
}

/// A reservation in the queue for one frame.
pub struct Reservation {
    slot: mpsc::OwnedPermit<Queued>,
    bytes: OwnedSemaphorePermit,
    metrics: Arc<ArchiveMetrics>,
}

impl Appender {
    /// Waits for room for a frame of `bytes` bytes. Nothing happens when the future is dropped.
    pub async fn reserve(&self, bytes: usize) -> Result<Reservation, Closed> {
        let wanted = bytes.min(self.queue_bytes) as u32;
        let room = Arc::clone(&self.room).acquire_many_owned(wanted).await.map_err(|_| Closed)?;
        let slot = self.queue.clone().reserve_owned().await.map_err(|_| Closed)?;
        Ok(Reservation { slot, bytes: room, metrics: Arc::clone(&self.metrics) })
    }

    /// Waits for room, then appends.
    pub async fn append(&self, append: Append) -> Result<(), Closed> {
        let room = self.reserve(append.bytes.len()).await?;
        room.append(append);
        Ok(())
    }

    /// Bytes that wait for the writer.
    pub fn backlog_bytes(&self) -> u64 {
        (self.queue_bytes - self.room.available_permits().min(self.queue_bytes)) as u64
    }

    /// Bytes that may wait for it.
    pub fn queue_bytes(&self) -> u64 {
        self.queue_bytes as u64
    }
}

impl Reservation {
    /// Appends the frame that the room was reserved for.
    pub fn append(self, append: Append) {
        self.metrics.backlog_bytes.add(append.bytes.len() as i64);
        self.slot.send(Queued { append, _room: self.bytes });
    }
}

/// Counts for status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ArchiveStats {
    pub disk: DiskKind,
    /// Segments on disk now.
    pub segments: u64,
    pub bytes: u64,
    /// Over the archive's whole life.
    pub totals: books::Totals,
    /// Since the start.
    pub commits: u64,
    pub poisoned: u64,
    pub backlog_bytes: u64,
    pub written_bytes: u64,
}

impl From<ArchiveStats> for service::ArchiveStatus {
    fn from(stats: ArchiveStats) -> Self {
        Self {
            disk: stats.disk.name().to_owned(),
            segments: stats.segments,
            bytes: stats.bytes,
            frames: stats.totals.frames,
            events: stats.totals.events,
            duplicates: stats.totals.duplicates,
            quarantined: stats.totals.quarantined,
            lethal_events: stats.totals.lethal_events,
            written_bytes: stats.written_bytes,
        }
    }
}

/// Appends frames durably and answers what is durable.
pub struct Archive {
    appender: Appender,
    books: Arc<Mutex<Books>>,
    state: watch::Receiver<ArchiveState>,
    metrics: Arc<ArchiveMetrics>,
    dir: PathBuf,
    disk: DiskKind,
    stop: watch::Sender<bool>,
    /// The lock is released after the thread has ended: until then it may still write.
    thread: Mutex<Option<(JoinHandle<()>, lock::DirectoryLock)>>,
    sign: Sign,
}

/// Reports to `open` which disk the thread uses, or why it has none.
type Started = std::sync::mpsc::SyncSender<Result<DiskKind, io::Error>>;

impl Archive {
    /// Takes the directory, recovers it, replays the frames of the last `replay_window` to `replay`, oldest first, and starts
    /// the writer. Blocking.
    pub fn open(
        config: ArchiveConfig,
        replay_window: Duration,
        replay: &mut dyn FnMut(&Header, &[u8]),
    ) -> Result<Self, ArchiveError> {
        let choice = config.disk;
        Self::start(&config, replay_window, replay, move |writer, started| {
            run_chosen(choice, writer, &started);
        })
    }

    /// Like [`Archive::open`], on a given disk.
    pub fn open_on<D: Disk + Send>(
        config: ArchiveConfig,
        disk: D,
        replay_window: Duration,
        replay: &mut dyn FnMut(&Header, &[u8]),
    ) -> Result<Self, ArchiveError> {
        Self::start(&config, replay_window, replay, move |writer, started| {
            run_plainly(disk, writer, &started);
        })
    }

    fn start(
        config: &ArchiveConfig,
        replay_window: Duration,
        replay: &mut dyn FnMut(&Header, &[u8]),
        body: impl FnOnce(Writer, Started) + Send + 'static,
    ) -> Result<Self, ArchiveError> {
        let lock = lock::DirectoryLock::take(&config.dir)?;
        let metrics = ArchiveMetrics::new().map_err(|source| ArchiveError::Metrics { source })?;
        let metrics = Arc::new(metrics);
        let mut recovered = recover::recover(&config.dir)?;
        recovered.replay(replay_window, replay)?;
        let ages = ages::Ages::load(&config.dir, config.max_age, &mut recovered.segments);
        let totals = recovered.books.totals();
        metrics.frames.inc_by(totals.frames);
        metrics.lethal_events.inc_by(totals.lethal_events);
        metrics.bulk_events.inc_by(totals.events.saturating_sub(totals.lethal_events));
        metrics.duplicates.inc_by(totals.duplicates);
        metrics.quarantined.inc_by(totals.quarantined);

        let books = Arc::new(Mutex::new(recovered.books));
        let (sender, queue) = mpsc::channel(QUEUE_FRAMES_MAX);
        let queue_bytes = config.queue_bytes.clamp(tapio_wire::limits::FRAME_BYTES_MAX, QUEUE_BYTES_MAX);
        let (stop, stopped) = watch::channel(false);
        let (state_sender, state) = watch::channel(ArchiveState::NotReady("the archive is being opened".to_owned()));
        let writer = Writer {
            dir: config.dir.clone(),
            segment_bytes: config.segment_bytes.min(config.max_bytes / 4).max(SEGMENT_BYTES_MIN),
            max_bytes: config.max_bytes,
            max_age: config.max_age,
            commit_interval: config.commit_interval,
            commit_bytes: config.commit_bytes.clamp(1, queue_bytes),
            queue,
            stop: stopped,
            state: state_sender,
            books: Arc::clone(&books),
            metrics: Arc::clone(&metrics),
            closed: recovered.segments,
            ages,
            first_contact: elsewhere::FirstContact::new(totals.frames, elsewhere::FIRST_CONTACT),
            next_number: recovered.next_number,
            offsite: config.offsite.clone(),
            superfluous: recovered.empty_newest,
            held: holds::Held::default(),
        };
        let (started_sender, started) = std::sync::mpsc::sync_channel(1);
        let pulse = Pulse::default();
        let sign = pulse.sign();
        let thread = std::thread::Builder::new()
            .name("archive".to_owned())
            .spawn(move || {
                let _pulse = pulse;
                body(writer, started_sender);
            })
            .map_err(|source| ArchiveError::Thread { source })?;
        let disk = match started.recv() {
            Ok(Ok(disk)) => disk,
            Ok(Err(source)) => return Err(ArchiveError::Uring { source }),
            Err(_) => {
                return Err(ArchiveError::Thread { source: io::Error::other("it ended before it was ready") });
            }
        };
        info!(dir = %config.dir.display(), disk = disk.name(), "archive open");
        Ok(Self {
            appender: Appender {
                queue: sender,
                room: Arc::new(Semaphore::new(queue_bytes)),
                queue_bytes,
                metrics: Arc::clone(&metrics),
            },
            books,
            state,
            metrics,
            dir: config.dir.clone(),
            disk,
            stop,
            thread: Mutex::new(Some((thread, lock))),
            sign,
        })
    }

    /// A way to append.
    pub fn appender(&self) -> Appender {
        self.appender.clone()
    }

    /// Directory of the archive.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The books. Lock them with [`lock_books`], shortly: each commit needs them.
    pub fn books(&self) -> &Arc<Mutex<Books>> {
        &self.books
    }

    /// Whether frames can be made durable, and every change of that.
    pub fn state(&self) -> watch::Receiver<ArchiveState> {
        self.state.clone()
    }

    /// Whether its thread lives.
    pub fn sign(&self) -> Sign {
        self.sign.clone()
    }

    /// The metrics, to be registered.
    pub fn metrics(&self) -> &Arc<ArchiveMetrics> {
        &self.metrics
    }

    /// Counts for status.
    pub fn stats(&self) -> ArchiveStats {
        let unsigned = |value: i64| u64::try_from(value).unwrap_or_default();
        ArchiveStats {
            disk: self.disk,
            segments: unsigned(self.metrics.segments.get()),
            bytes: unsigned(self.metrics.bytes.get()),
            totals: lock_books(&self.books).totals(),
            commits: self.metrics.commit_seconds.get_sample_count(),
            poisoned: self.metrics.poisoned.get(),
            backlog_bytes: self.appender.backlog_bytes(),
            written_bytes: self.metrics.written_bytes.get(),
        }
    }

    /// Writes and syncs what is queued, ends, and gives the directory back. New appends are refused. Blocking; when the disk
    /// cannot be written it tries once more and gives up, since collectors keep what was not acknowledged.
    pub fn shutdown(&self) {
        self.stop_and_join();
    }

    fn stop_and_join(&self) {
        self.stop.send_replace(true);
        self.appender.room.close();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some((thread, _lock)) = thread
            && thread.join().is_err()
        {
            warn!("the archive's thread had panicked");
        }
    }
}

impl Drop for Archive {
    fn drop(&mut self) {
        self.stop_and_join();
    }
}

/// The books, whatever became of the thread that held them last: every change to them is complete by itself.
pub fn lock_books(books: &Mutex<Books>) -> MutexGuard<'_, Books> {
    books.lock().unwrap_or_else(PoisonError::into_inner)
}

fn run_chosen(choice: DiskChoice, writer: Writer, started: &Started) {
    if choice == DiskChoice::Plain {
        return run_plainly(PlainDisk, writer, started);
    }
    match uring::start_ring() {
        Ok(ring) => ring.block_on(writer.run(uring::UringDisk, |kind| report_start(started, Ok(kind)))),
        Err(source) if choice == DiskChoice::Uring => report_start(started, Err(source)),
        Err(error) => {
            warn!(%error, "io_uring is unavailable: the archive uses plain writes");
            run_plainly(PlainDisk, writer, started);
        }
    }
}

fn run_plainly<D: Disk>(disk: D, writer: Writer, started: &Started) {
    match tokio::runtime::Builder::new_current_thread().enable_time().build() {
        Ok(runtime) => runtime.block_on(writer.run(disk, |kind| report_start(started, Ok(kind)))),
        Err(error) => report_start(started, Err(error)),
    }
}

fn report_start(started: &Started, result: Result<DiskKind, io::Error>) {
    // `open` waits for exactly this message.
    let _ = started.send(result);
}
