//! Queries: how long an operator waits for an answer out of an archive.
//!
//! In: how large an archive. Out: the time to the first byte of each answer and to its end, cold and warm. What must hold: archive and
//! server are real, and the questions are asked by `tapioctl`, over gRPC. Cold means that the kernel has none of the archive's
//! bytes in memory, as when somebody asks for the first time in days.

mod report;

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::{Advice, fadvise};

use crate::error::{Context, Error};
use crate::host::Host;
use crate::ingest::{self, Cores, FrameRate, IngestOptions};
use crate::interrupt;
use crate::processes::{Server, ServerOptions, bin_dir, binary};

pub use report::{QueryReport, QueryTimes, Waited};

/// Events in a frame of the archive that is built: what a busy node sends.
const FRAME_EVENTS: usize = 1_000;
/// Containers of a node, and deaths of them while the archive is built.
const ENTITIES: usize = 100;
const SIGNALS_PER_SECOND: f64 = 20.0;
/// How long the building may take.
const BUILD_LIMIT: Duration = Duration::from_secs(3600);
const REPEATS_MAX: usize = 1_000;

/// What to run.
#[derive(Clone, Debug)]
pub struct QueryOptions {
    /// Events of the archive, about.
    pub events: u64,
    pub nodes: usize,
    /// Warm answers of each question; the median is reported.
    pub repeats: usize,
    pub server_cores: Option<Cores>,
    pub bin_dir: Option<PathBuf>,
}

impl QueryOptions {
    fn check(&self) -> Result<(), Error> {
        if !(1..=REPEATS_MAX).contains(&self.repeats) {
            return Err(Error::Invalid(format!("--repeats must be from 1 to {REPEATS_MAX}")));
        }
        if self.events < self.nodes as u64 * FRAME_EVENTS as u64 {
            return Err(Error::Invalid(format!(
                "--events must be at least {FRAME_EVENTS} for each node, since frames of the archive have as many"
            )));
        }
        Ok(())
    }
}

/// Runs it.
///
/// # Errors
/// When options make no sense, a program is missing or fails, or the archive's ledger does not close.
pub fn run(options: &QueryOptions) -> Result<QueryReport, Error> {
    options.check()?;
    let tapioctl = binary("tapioctl", &bin_dir(options.bin_dir.as_deref())?)?;
    let folder = tempfile::Builder::new().prefix("tapio-perf-query-").tempdir();
    let folder = folder.context(|| "make a temporary folder".into())?;
    let archive = folder.path().join("archive");
    let built = ingest::run(&IngestOptions {
        nodes: options.nodes,
        frame_rate: FrameRate::Max,
        events_per_frame: FRAME_EVENTS,
        duration: BUILD_LIMIT,
        frames_max: Some(options.events / options.nodes as u64 / FRAME_EVENTS as u64),
        signals: SIGNALS_PER_SECOND,
        entities: ENTITIES,
        server_cores: options.server_cores.clone(),
        server_config: String::new(),
        archive_dir: Some(archive.clone()),
        bin_dir: options.bin_dir.clone(),
        ..IngestOptions::default()
    })?;
    if !built.ledger_closes {
        return Err(Error::Invalid("the ledger of the archive that was built does not close".into()));
    }
    forget(&archive)?;
    let (server, restart) = start(options, &archive)?;
    let pod = ingest::pod_name(0, 0);
    let mut questions = Vec::new();
    for (name, arguments) in questions_about(&pod) {
        let ask = || {
            interrupt::check()?;
            ask(&tapioctl, &server.address(), &arguments)
        };
        forget(&archive)?;
        let (cold, bytes) = ask()?;
        let warm = (0..options.repeats).map(|_| ask().map(|(waited, _)| waited)).collect::<Result<Vec<_>, _>>()?;
        let command = format!("tapioctl {}", arguments.join(" "));
        questions.push(QueryTimes {
            name: name.into(),
            command,
            answer_bytes: bytes,
            cold,
            warm: Waited::median(&warm),
        });
    }
    Ok(QueryReport {
        nodes: options.nodes,
        events: built.events_archived,
        archive_bytes: segments(&archive)?.iter().map(|(_, bytes)| bytes).sum(),
        restart_ms: restart.as_millis() as u64,
        repeats: options.repeats,
        server_rss_bytes: server.usage().map_or(0, |usage| usage.rss_peak_bytes),
        questions,
        host: Host::read(),
        revision: built.revision,
    })
}

/// What is asked.
fn questions_about(pod: &str) -> Vec<(&'static str, Vec<String>)> {
    let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
    vec![
        ("events --pod", words(&format!("events --pod {pod} --newest --limit 1000 -o json"))),
        ("events --pod, first", words(&format!("events --pod {pod} --limit 1000 -o json"))),
        ("why pod", words(&format!("why pod/{pod}"))),
        ("events --since", words("events --since 1h --limit 1000 -o json")),
        ("events --kind", words("events --kind exit --limit 1000 -o json")),
    ]
}

/// A server on the archive, and how long it took until it was ready.
fn start(options: &QueryOptions, archive: &Path) -> Result<(Server, Duration), Error> {
    let began = Instant::now();
    let start = || {
        Server::start(&ServerOptions {
            bin_dir: options.bin_dir.clone(),
            archive_dir: Some(archive.to_owned()),
            ..ServerOptions::default()
        })
    };
    let server = match &options.server_cores {
        Some(cores) => cores.within(start)?,
        None => start()?,
    };
    Ok((server, began.elapsed()))
}

/// Asks once: how long it took, and how many bytes came.
fn ask(tapioctl: &Path, address: &str, arguments: &[String]) -> Result<(Waited, u64), Error> {
    let began = Instant::now();
    let what = || format!("run {}", tapioctl.display());
    let mut child = Command::new(tapioctl)
        .args(["--server", address])
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context(what)?;
    let (mut out, mut buffer) = (child.stdout.take(), vec![0; 1 << 16]);
    let (mut first, mut bytes) = (None, 0);
    while let Some(out) = &mut out {
        let read = out.read(&mut buffer).context(what)?;
        if read == 0 {
            break;
        }
        first.get_or_insert_with(|| began.elapsed());
        bytes += read as u64;
    }
    let output = child.wait_with_output().context(what)?;
    let total = began.elapsed();
    if !output.status.success() || bytes == 0 {
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        let message = format!("tapioctl {} answered nothing: {said}", arguments.join(" "));
        return Err(Error::Server { address: address.to_owned(), message });
    }
    let us = |time: Duration| time.as_micros() as u64;
    Ok((Waited { first_us: us(first.unwrap_or(total)), total_us: us(total) }, bytes))
}

/// The files of an archive, and their bytes on disk.
fn segments(archive: &Path) -> Result<Vec<(PathBuf, u64)>, Error> {
    use std::os::unix::fs::MetadataExt;
    let what = || format!("read the folder {}", archive.display());
    let mut files = Vec::new();
    for entry in fs::read_dir(archive).context(what)? {
        let entry = entry.context(what)?;
        let metadata = entry.metadata().context(what)?;
        if metadata.is_file() {
            files.push((entry.path(), metadata.blocks() * 512));
        }
    }
    Ok(files)
}

/// Lets the kernel forget what it has of the archive in memory.
fn forget(archive: &Path) -> Result<(), Error> {
    for (path, _) in segments(archive)? {
        let what = || format!("forget {}", path.display());
        let file = File::open(&path).context(what)?;
        // What is not written yet would stay.
        file.sync_all().context(what)?;
        fadvise(&file, 0, None, Advice::DontNeed).context(what)?;
    }
    Ok(())
}
