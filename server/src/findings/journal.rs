//! The journal of findings: what was found outlives the server and the archive's retention.
//!
//! What enters: every publication and withdrawal of the store. What leaves: `findings.jsonl` beside the segments, one change a
//! line, and at the next start the findings. What must hold: nobody waits for the disk (the finder hands over and goes on). There
//! are at most two files of [`FILE_BYTES_MAX`]; a torn or foreign line costs itself. When the queue had no room for a change, or
//! it could not be written, the store's findings are rewritten. They replace what was written before: what was withdrawn
//! meanwhile must not come back.
//!
//! ```text
//! {"published":{…}}                         the finding as the query service has it; the last line of an id counts
//! {"withdrawn":{"id":"…","successor":"…"}}   another one explains it better, or nothing does
//! {"anew":{"snapshot":7,"part":1}}           the store's findings follow; of what stands before only an earlier part counts
//! ```

use std::collections::{HashMap, VecDeque};
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tapio_wire::service::Finding;

pub use super::journal_metrics::JournalMetrics;
use super::regular_file;
use super::store::{Change, FindingStore, WATCH_BACKLOG};
use crate::cluster::is_sound;
use crate::vitals::{Pulse, Sign};

/// A journal that is longer becomes `findings.jsonl.1`, and the one before that goes.
pub const FILE_BYTES_MAX: u64 = 16 << 20;
/// Changes that may wait for the disk.
const QUEUE_CHANGES: usize = 1024;
/// No more of a file is read.
const READ_BYTES_MAX: u64 = 8 * FILE_BYTES_MAX;
/// A line that is longer is no finding.
const LINE_BYTES_MAX: u64 = 4 << 20;
/// How often a change that was missed is looked for while nothing else happens.
const MISSED_INTERVAL: Duration = Duration::from_secs(5);
/// Changes within it after a write are written together. A finding that grows changes often, and every write syncs the disk that
/// the archive writes to.
const WRITE_PAUSE: Duration = Duration::from_millis(100);
/// Pause after the store was rewritten.
const ANEW_PAUSE: Duration = Duration::from_secs(1);

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line {
    Published(Box<Finding>),
    Withdrawn { id: String, successor: Option<String> },
    Anew { snapshot: u64, part: u8 },
}

/// A line as it is written: [`Line`] of a finding that is not copied for it.
#[derive(Serialize)]
#[serde(rename_all = "snake_case")]
enum Written<'a> {
    Published(&'a Finding),
}

/// Where the journal of an archive lies, and the one before it.
pub fn paths(dir: &Path) -> [PathBuf; 2] {
    [dir.join("findings.jsonl"), dir.join("findings.jsonl.1")]
}

/// What a journal says.
#[derive(Debug, Default)]
pub struct Recorded {
    /// Findings by id.
    pub findings: HashMap<String, Finding>,
    /// Ids that lead to others.
    pub successors: HashMap<String, String>,
    /// Ids that were withdrawn and lead nowhere, the latest.
    pub withdrawn: VecDeque<String>,
    /// Lines that could not be read.
    pub unreadable: u64,
    /// Files that could not be read, and why.
    pub failed: Vec<(PathBuf, io::Error)>,
}

/// Reads the journal of a directory; an absent one says nothing.
///
/// # Errors
/// When a file is there and cannot be read.
pub fn read(dir: &Path) -> io::Result<Recorded> {
    let mut recorded = read_what_can_be(dir);
    match recorded.failed.pop() {
        None => Ok(recorded),
        Some((path, error)) => Err(io::Error::new(error.kind(), format!("{}: {error}", path.display()))),
    }
}

/// Adds findings to the journal of a directory that no server has open; durable then.
///
/// # Errors
/// When the file cannot be written.
pub fn append(dir: &Path, findings: &[Arc<Finding>]) -> io::Result<()> {
    let lines: Vec<Vec<u8>> = findings.iter().map(|finding| encode(&Written::Published(finding))).collect();
    let mut file = File::options().create(true).read(true).append(true).open(&paths(dir)[0])?;
    // A server that was killed may have left half a line, which costs itself and not the next one.
    if !ends_with_line(&mut file)? {
        file.write_all(b"\n")?;
    }
    file.write_all(&lines.concat())?;
    file.sync_all()
}

fn ends_with_line(file: &mut File) -> io::Result<bool> {
    if file.seek(SeekFrom::End(0))? == 0 {
        return Ok(true);
    }
    let mut last = [0];
    file.seek(SeekFrom::End(-1))?;
    file.read_exact(&mut last)?;
    Ok(last == *b"\n")
}

/// Reads what can be read of the journal of a directory.
pub fn read_what_can_be(dir: &Path) -> Recorded {
    let mut recorded = Recorded::default();
    let mut snapshot = None;
    for path in paths(dir).into_iter().rev() {
        if let Err(error) = recorded.read_file(&path, &mut snapshot)
            && error.kind() != io::ErrorKind::NotFound
        {
            recorded.failed.push((path, error));
        }
    }
    recorded
}

impl Recorded {
    fn read_file(&mut self, path: &Path, snapshot: &mut Option<u64>) -> io::Result<()> {
        // Both files together are no larger than this by far.
        let file = regular_file::open(path, File::options().read(true))?.take(READ_BYTES_MAX);
        let mut reader = BufReader::new(file);
        let mut line = Vec::new();
        loop {
            line.clear();
            if (&mut reader).take(LINE_BYTES_MAX).read_until(b'\n', &mut line)? == 0 {
                return Ok(());
            }
            match serde_json::from_slice(&line) {
                Ok(Line::Published(finding)) if !is_sound(&finding) => self.unreadable += 1,
                Ok(Line::Published(finding)) => {
                    self.successors.remove(&finding.id);
                    self.findings.insert(finding.id.clone(), *finding);
                }
                Ok(Line::Withdrawn { id, successor }) => {
                    self.findings.remove(&id);
                    match successor {
                        Some(successor) => drop(self.successors.insert(id, successor)),
                        None => {
                            if self.withdrawn.len() == WATCH_BACKLOG {
                                self.withdrawn.pop_front();
                            }
                            self.withdrawn.push_back(id);
                        }
                    }
                }
                // The first part in its older file may have been replaced before the second was, or the other way round.
                Ok(Line::Anew { snapshot: begun, part }) => {
                    if part == 1 || *snapshot != Some(begun) {
                        let (unreadable, failed) = (self.unreadable, std::mem::take(&mut self.failed));
                        *self = Recorded { unreadable, failed, ..Recorded::default() };
                    }
                    *snapshot = Some(begun);
                }
                Err(_) if line.iter().all(u8::is_ascii_whitespace) => {}
                Err(_) => self.unreadable += 1,
            }
        }
    }

    /// Puts what was found into a store.
    pub fn restore(self, store: &FindingStore) {
        for finding in self.findings.into_values() {
            store.restore(finding);
        }
        for (id, successor) in self.successors {
            store.restore_alias(id, successor);
        }
        for id in self.withdrawn.into_iter().filter(|id| store.current(id).is_none()) {
            store.restore_withdrawn(id);
        }
    }
}

/// Writes the journal on a thread of its own, until it is dropped.
pub struct Journal {
    stop: SyncSender<Change>,
    thread: Option<JoinHandle<()>>,
    sign: Sign,
}

/// A withdrawal of nothing asks the thread to end.
fn stop() -> Change {
    Change::Withdrawn { id: String::new(), successor: None }
}

impl Journal {
    /// Starts to write what `store` publishes from now on to `dir`, which exists.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn start(dir: &Path, store: &Arc<FindingStore>, metrics: JournalMetrics) -> io::Result<Self> {
        let (sender, changes) = sync_channel(QUEUE_CHANGES);
        let mut writer = Writer {
            paths: paths(dir),
            file: None,
            has_saved: false,
            metrics,
            pause_until: Instant::now(),
            is_behind: false,
            is_failing: false,
        };
        let source = Arc::clone(store);
        let pulse = Pulse::default();
        let sign = pulse.sign();
        let thread = thread::Builder::new().name("journal".into()).spawn(move || {
            let _pulse = pulse;
            writer.run(&changes, &source);
        })?;
        store.set_journal(sender.clone());
        Ok(Self { stop: sender, thread: Some(thread), sign })
    }

    /// Whether its thread lives.
    pub fn sign(&self) -> Sign {
        self.sign.clone()
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        // An error means that the thread is gone, which is what is wanted.
        let _ = self.stop.send(stop());
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the journal of findings has failed");
        }
    }
}

/// Changes that are written together; of a finding that was published again only the last revision.
#[derive(Default)]
struct Gathered {
    changes: Vec<Option<Change>>,
    published: HashMap<String, usize>,
    is_ended: bool,
}

impl Gathered {
    fn add(&mut self, change: Change, metrics: &JournalMetrics) {
        match &change {
            Change::Withdrawn { id, .. } if id.is_empty() => {
                self.is_ended = true;
                return;
            }
            Change::Withdrawn { .. } => {}
            Change::Published(finding) => {
                metrics.count(finding);
                if let Some(before) = self.published.insert(finding.id.clone(), self.changes.len()) {
                    self.changes[before] = None;
                }
            }
        }
        self.changes.push(Some(change));
    }

    fn lines(self) -> Vec<Vec<u8>> {
        let line = |change| match change {
            Change::Withdrawn { id, successor } => encode(&Line::Withdrawn { id, successor }),
            Change::Published(finding) => encode(&Written::Published(&finding)),
        };
        self.changes.into_iter().flatten().map(line).collect()
    }
}

struct Writer {
    paths: [PathBuf; 2],
    file: Option<File>,
    /// What cannot be read was moved aside.
    has_saved: bool,
    metrics: JournalMetrics,
    /// Time before which nothing more is written.
    pause_until: Instant,
    /// What is on the disk lacks changes: the store is to be rewritten.
    is_behind: bool,
    is_failing: bool,
}

impl Writer {
    fn run(&mut self, changes: &Receiver<Change>, store: &FindingStore) {
        loop {
            let mut gathered = Gathered::default();
            match changes.recv_timeout(MISSED_INTERVAL) {
                Ok(change) => gathered.add(change, &self.metrics),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            while !gathered.is_ended && gathered.changes.len() < QUEUE_CHANGES {
                match changes.recv_timeout(self.pause_until.saturating_duration_since(Instant::now())) {
                    Ok(change) => gathered.add(change, &self.metrics),
                    Err(_) => break,
                }
                if self.is_behind {
                    // The store has them.
                    gathered = Gathered { is_ended: gathered.is_ended, ..Gathered::default() };
                }
            }
            // Changes that are queued from here on are written once more: that says nothing else.
            self.is_behind |= store.take_journal_missed();
            let is_ended = gathered.is_ended;
            if !self.has_saved && (self.is_behind || !gathered.changes.is_empty()) {
                self.save_unreadable();
            }
            if self.is_behind {
                let result = self.write_anew(store);
                self.note_result(&result);
                self.pause_until = Instant::now() + ANEW_PAUSE;
            } else if !gathered.changes.is_empty() {
                let result = self.append(&gathered.lines());
                self.note_result(&result);
                self.pause_until = Instant::now() + WRITE_PAUSE;
            }
            if is_ended {
                return;
            }
        }
    }

    /// Moves what an earlier run wrote and this one cannot read aside, before anything takes its place: a person may still save it.
    fn save_unreadable(&mut self) {
        self.has_saved = true;
        for path in &self.paths {
            // Nothing takes a folder's place.
            let is_bad = |error: &io::Error| error.kind() != io::ErrorKind::NotFound && !path.is_dir();
            if regular_file::open(path, File::options().read(true)).is_err_and(|error| is_bad(&error)) {
                let aside = PathBuf::from(format!("{}.unreadable", path.display()));
                let moved = fs::rename(path, &aside);
                tracing::warn!(from = %path.display(), to = %aside.display(), ?moved, "moving the journal that cannot be read aside");
            }
        }
    }

    fn note_result(&mut self, result: &io::Result<()>) {
        match result {
            Ok(()) if self.is_failing => tracing::info!("writing the journal of findings again"),
            Ok(()) => {}
            Err(error) => {
                self.file = None;
                self.metrics.failures.inc();
                if !self.is_failing {
                    tracing::warn!(path = %self.paths[0].display(), %error, "cannot write the journal of findings: a restart loses the findings made meanwhile");
                }
            }
        }
        self.is_failing = result.is_err();
        self.is_behind = result.is_err();
    }

    fn append(&mut self, lines: &[Vec<u8>]) -> io::Result<()> {
        let mut file = match self.file.take() {
            Some(file) => file,
            None => open(&self.paths[0])?,
        };
        let mut end = file.seek(SeekFrom::End(0))?;
        let mut rest = lines;
        while !rest.is_empty() {
            let (count, bytes) = fitting(rest.iter(), FILE_BYTES_MAX.saturating_sub(end));
            if count > 0 {
                let written = file.write_all(&rest[..count].concat()).and_then(|()| file.sync_data());
                if written.is_err() {
                    // Best effort: a torn line costs itself.
                    let _ = file.set_len(end);
                }
                written?;
                end += bytes;
                rest = &rest[count..];
            }
            if !rest.is_empty() {
                fs::rename(&self.paths[0], &self.paths[1])?;
                file = open(&self.paths[0])?;
                end = 0;
            }
        }
        self.file = Some(file);
        Ok(())
    }

    /// Puts the store's findings in the place of both files, the newest where they do not have room for all.
    fn write_anew(&mut self, store: &FindingStore) -> io::Result<()> {
        self.file = None;
        let (findings, aliases) = store.everything();
        let snapshot = findings.last().map_or(0, |finding| finding.published_ns);
        let published = findings.iter().map(|finding| encode(&Written::Published(finding)));
        let gone = store.withdrawn_for_good().into_iter().map(|id| encode(&Line::Withdrawn { id, successor: None }));
        let withdrawn =
            aliases.into_iter().map(|(id, successor)| encode(&Line::Withdrawn { id, successor: Some(successor) }));
        let lines: Vec<Vec<u8>> = gone.chain(withdrawn).chain(published).collect();
        let head = |part| encode(&Line::Anew { snapshot, part });
        let room = FILE_BYTES_MAX - head(1).len() as u64;
        let (newer, _) = fitting(lines.iter().rev(), room);
        let (older, newer) = lines.split_at(lines.len() - newer);
        let (kept, _) = fitting(older.iter().rev(), room);
        let older = &older[older.len() - kept..];
        let written = [(&self.paths[0], newer, head(2)), (&self.paths[1], older, head(1))];
        for (path, lines, head) in &written {
            let result = write_beside(path, head, lines);
            if result.is_err() {
                // Best effort: the next attempt truncates them.
                let _ = fs::remove_file(beside(&self.paths[0])).and_then(|()| fs::remove_file(beside(&self.paths[1])));
            }
            result?;
        }
        // In this order: from the first on nothing counts that was written before.
        for (path, ..) in &written {
            fs::rename(beside(path), path)?;
        }
        let parent = self.paths[0].parent().unwrap_or(Path::new("."));
        File::open(parent)?.sync_all()
    }
}

/// Returns how many lines fit into `room` bytes, and their size.
fn fitting<'a>(lines: impl Iterator<Item = &'a Vec<u8>>, room: u64) -> (usize, u64) {
    let mut bytes = 0;
    let fits = |line: &&Vec<u8>| {
        let fits = bytes + line.len() as u64 <= room;
        bytes += if fits { line.len() as u64 } else { 0 };
        fits
    };
    let count = lines.take_while(fits).count();
    (count, bytes)
}

/// What a file is called until it is whole.
fn beside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    name.into()
}

fn write_beside(path: &Path, head: &[u8], lines: &[Vec<u8>]) -> io::Result<()> {
    let mut file = io::BufWriter::new(File::create(beside(path))?);
    file.write_all(head)?;
    for line in lines {
        file.write_all(line)?;
    }
    file.into_inner()?.sync_data()
}

fn encode(line: &impl Serialize) -> Vec<u8> {
    // Strings, numbers and lists: nothing that JSON cannot hold.
    let mut bytes = serde_json::to_vec(line).unwrap_or_default();
    if bytes.len() as u64 >= LINE_BYTES_MAX {
        // It could not be read.
        bytes.clear();
    }
    bytes.push(b'\n');
    bytes
}

/// Opens a journal to append to it; a torn last line is ended first.
fn open(path: &Path) -> io::Result<File> {
    let mut file = regular_file::open(path, File::options().read(true).append(true).create(true))?;
    if file.seek(SeekFrom::End(0))? > 0 {
        file.seek(SeekFrom::End(-1))?;
        let mut last = [0];
        file.read_exact(&mut last)?;
        if last != *b"\n" {
            file.write_all(b"\n")?;
        }
    }
    Ok(file)
}

#[cfg(test)]
mod tests;
