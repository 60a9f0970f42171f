//! The journal of findings: what was found outlives the server and the archive's retention.
//!
//! What enters: every publication and withdrawal of the store. What leaves: `findings.jsonl` beside the segments, one change a
//! line, and at the next start the findings. What must hold: nobody waits for the disk (the finder hands over and goes on); at
//! most two files of [`FILE_BYTES_MAX`]; a torn or foreign line costs itself; a change that the queue had no room for is made
//! good by writing the store's findings again.
//!
//! ```text
//! {"published":{…}}                         the finding as the query service has it; the last line of an id counts
//! {"withdrawn":{"id":"…","successor":"…"}}   another one explains it better, or nothing does
//! ```

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use prometheus::{Histogram, HistogramOpts, IntCounter, IntCounterVec, Opts, Registry};
use serde::{Deserialize, Serialize};
use tapio_wire::service::Finding;

use super::store::{Change, FindingStore};

/// A journal that is longer becomes `findings.jsonl.1`, and the one before that goes.
pub const FILE_BYTES_MAX: u64 = 16 << 20;
/// Changes that may wait for the disk.
const QUEUE_CHANGES: usize = 1024;
/// A line that is longer is no finding.
const LINE_BYTES_MAX: u64 = 4 << 20;
/// How often a change that was missed is looked for while nothing else happens.
const MISSED_INTERVAL: Duration = Duration::from_secs(5);

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line {
    Published(Box<Finding>),
    Withdrawn { id: String, successor: Option<String> },
}

/// Where the journal of an archive lies, and the one before it.
pub fn paths(dir: &Path) -> [PathBuf; 2] {
    [dir.join("findings.jsonl"), dir.join("findings.jsonl.1")]
}

/// What a journal tells.
#[derive(Debug, Default)]
pub struct Recorded {
    /// By id.
    pub findings: HashMap<String, Finding>,
    /// Ids that lead to others.
    pub successors: HashMap<String, String>,
    /// Lines that could not be read.
    pub unreadable: u64,
}

/// Reads the journal of a directory; an absent one tells nothing.
///
/// # Errors
/// When a file is there and cannot be read.
pub fn read(dir: &Path) -> io::Result<Recorded> {
    let mut recorded = Recorded::default();
    for path in paths(dir).iter().rev() {
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        let mut reader = BufReader::new(file);
        let mut line = Vec::new();
        loop {
            line.clear();
            if (&mut reader).take(LINE_BYTES_MAX).read_until(b'\n', &mut line)? == 0 {
                break;
            }
            match serde_json::from_slice(&line) {
                Ok(Line::Published(finding)) => {
                    recorded.successors.remove(&finding.id);
                    recorded.findings.insert(finding.id.clone(), *finding);
                }
                Ok(Line::Withdrawn { id, successor }) => {
                    recorded.findings.remove(&id);
                    if let Some(successor) = successor {
                        recorded.successors.insert(id, successor);
                    }
                }
                Err(_) if line.iter().all(u8::is_ascii_whitespace) => {}
                Err(_) => recorded.unreadable += 1,
            }
        }
    }
    Ok(recorded)
}

impl Recorded {
    /// Puts what was found into a store.
    pub fn restore(self, store: &FindingStore) {
        for finding in self.findings.into_values() {
            store.restore(finding);
        }
        for (id, successor) in self.successors {
            store.restore_alias(id, successor);
        }
    }
}

/// What the journal exports.
#[derive(Clone)]
pub struct JournalMetrics {
    published: IntCounterVec,
    latency_seconds: Histogram,
    failures: IntCounter,
}

impl JournalMetrics {
    /// Registers them.
    ///
    /// # Errors
    /// When one of the names is taken.
    pub fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let metrics = Self {
            published: IntCounterVec::new(
                Opts::new("tapio_server_findings_total", "Findings, each once, by pattern and severity."),
                &["pattern", "severity"],
            )?,
            latency_seconds: Histogram::with_opts(
                HistogramOpts::new(
                    "tapio_server_kernel_to_finding_seconds",
                    "From the last event of a new finding, by the node's clock, to its publication, by the server's.",
                )
                .buckets(prometheus::exponential_buckets(0.000_5, 2.0, 16)?),
            )?,
            failures: IntCounter::new(
                "tapio_server_findings_journal_failures_total",
                "Failed attempts to write the journal of findings.",
            )?,
        };
        registry.register(Box::new(metrics.published.clone()))?;
        registry.register(Box::new(metrics.latency_seconds.clone()))?;
        registry.register(Box::new(metrics.failures.clone()))?;
        Ok(metrics)
    }

    fn count(&self, finding: &Finding) {
        if finding.revision > 1 {
            return;
        }
        self.published.with_label_values(&[&finding.pattern, &finding.severity]).inc();
        // One that a replay found anew was no news.
        let late_ns = finding.published_ns.saturating_sub(finding.ended_ns);
        if late_ns < 60_000_000_000 {
            self.latency_seconds.observe(late_ns as f64 / 1e9);
        }
    }
}

/// Writes the journal on a thread of its own, until it is dropped.
pub struct Journal {
    stop: SyncSender<Change>,
    thread: Option<JoinHandle<()>>,
}

/// A withdrawal of nothing tells the thread to end.
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
        let mut writer = Writer { paths: paths(dir), file: None, metrics, is_failing: false };
        let source = Arc::clone(store);
        let thread = thread::Builder::new().name("journal".into()).spawn(move || writer.run(&changes, &source))?;
        store.set_journal(sender.clone());
        Ok(Self { stop: sender, thread: Some(thread) })
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

struct Writer {
    paths: [PathBuf; 2],
    file: Option<File>,
    metrics: JournalMetrics,
    is_failing: bool,
}

impl Writer {
    fn run(&mut self, changes: &Receiver<Change>, store: &FindingStore) {
        let mut lines = Vec::new();
        let mut is_ended = false;
        while !is_ended {
            let first = match changes.recv_timeout(MISSED_INTERVAL) {
                Ok(change) => Some(change),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => return,
            };
            lines.clear();
            for change in first.into_iter().chain(changes.try_iter().take(QUEUE_CHANGES)) {
                let line = match change {
                    Change::Withdrawn { id, .. } if id.is_empty() => {
                        is_ended = true;
                        break;
                    }
                    Change::Withdrawn { id, successor } => encode(&Line::Withdrawn { id, successor }),
                    Change::Published(finding) => {
                        self.metrics.count(&finding);
                        encode(&Line::Published(Box::new((*finding).clone())))
                    }
                };
                lines.extend_from_slice(&line);
            }
            let missed = store.take_journal_missed();
            if missed || (self.is_failing && !lines.is_empty()) {
                lines.clear();
                for finding in store.published_after(0) {
                    lines.extend_from_slice(&encode(&Line::Published(Box::new((*finding).clone()))));
                }
            }
            if !lines.is_empty() {
                self.write(&lines);
            }
        }
    }

    fn write(&mut self, lines: &[u8]) {
        let result = self.try_write(lines);
        match &result {
            Ok(()) if self.is_failing => tracing::info!("the journal of findings is written again"),
            Ok(()) => {}
            Err(error) => {
                self.file = None;
                self.metrics.failures.inc();
                if !self.is_failing {
                    tracing::warn!(path = %self.paths[0].display(), %error, "the journal of findings cannot be written: \
                        a restart forgets what is found meanwhile");
                }
            }
        }
        self.is_failing = result.is_err();
    }

    fn try_write(&mut self, lines: &[u8]) -> io::Result<()> {
        let mut file = match self.file.take() {
            Some(file) => file,
            None => open(&self.paths[0])?,
        };
        if file.seek(SeekFrom::End(0))? + lines.len() as u64 > FILE_BYTES_MAX {
            fs::rename(&self.paths[0], &self.paths[1])?;
            file = open(&self.paths[0])?;
        }
        file.write_all(lines)?;
        file.sync_data()?;
        self.file = Some(file);
        Ok(())
    }
}

fn encode(line: &Line) -> Vec<u8> {
    // Strings, numbers and lists: nothing that JSON cannot hold.
    let mut bytes = serde_json::to_vec(line).unwrap_or_default();
    bytes.push(b'\n');
    bytes
}

/// Opens a journal to append to it; a torn last line is ended first.
fn open(path: &Path) -> io::Result<File> {
    let mut file = File::options().read(true).append(true).create(true).open(path)?;
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
mod tests {
    use tapio_wire::service::{Death, EntityRef, Evidence};

    use super::*;

    fn finding(id: &str, ended_ns: u64, steps: usize) -> Finding {
        Finding {
            id: id.into(),
            pattern: "p".into(),
            severity: "high".into(),
            ended_ns,
            entity: Some(EntityRef { id: u64::MAX, node: "n".into(), ..EntityRef::default() }),
            death: Some(Death { pid: 7, signal: Some(9), ..Death::default() }),
            evidence: vec![Evidence::default(); steps],
            confidence: 0.1,
            count: 1,
            ..Finding::default()
        }
    }

    fn journal(dir: &Path, store: &Arc<FindingStore>) -> Journal {
        let metrics = JournalMetrics::register(&Registry::new()).expect("fresh names");
        Journal::start(dir, store, metrics).expect("it starts")
    }

    fn restarted(dir: &Path) -> Arc<FindingStore> {
        let store = Arc::new(FindingStore::new(100));
        read(dir).expect("readable").restore(&store);
        store
    }

    #[test]
    fn findings_and_where_they_went_survive_a_restart_and_a_torn_line() {
        let dir = tempfile::tempdir().expect("a directory");
        let store = Arc::new(FindingStore::new(100));
        let running = journal(dir.path(), &store);
        for id in ["a1", "b1", "c1"] {
            store.publish(finding(id, 5, 2));
        }
        store.publish(finding("a1", 6, 3));
        store.withdraw("b1", Some("c1"));
        drop(running);
        let path = &paths(dir.path())[0];
        let torn = fs::read(path).expect("the journal");
        File::options().append(true).open(path).expect("it opens").write_all(&torn[..20]).expect("written");
        let again = restarted(dir.path());
        assert_eq!(again.len(), 2);
        assert_eq!(*again.get("a1").expect("kept"), *store.get("a1").expect("kept"));
        assert_eq!(again.get("b1").expect("leads on").id, "c1");
        let running = journal(dir.path(), &again);
        again.publish(finding("d1", 9, 1));
        drop(running);
        let recorded = read(dir.path()).expect("readable");
        assert_eq!((recorded.findings.len(), recorded.unreadable), (3, 1));
    }

    #[test]
    fn a_replay_of_half_the_story_changes_nothing() {
        let dir = tempfile::tempdir().expect("a directory");
        let store = Arc::new(FindingStore::new(100));
        let running = journal(dir.path(), &store);
        store.publish(finding("a1", 6, 3));
        drop(running);
        let again = restarted(dir.path());
        again.set_replaying(true);
        assert!(again.publish(finding("a1", 6, 2)).is_none(), "it says less");
        assert!(again.publish(finding("weaker", 6, 1)).is_none(), "the same death under another id");
        assert!(again.publish(finding("other", 8, 1)).is_some(), "another death");
        again.set_replaying(false);
        assert_eq!(again.publish(finding("a1", 7, 3)).expect("it says more").revision, 2);
        assert!(again.publish(finding("better", 6, 1)).is_some(), "live, a better explanation may come");
    }

    #[test]
    fn the_journal_is_bounded_and_what_the_queue_missed_is_made_good() {
        let dir = tempfile::tempdir().expect("a directory");
        fs::write(&paths(dir.path())[0], vec![b'\n'; FILE_BYTES_MAX as usize - 10]).expect("written");
        let store = Arc::new(FindingStore::new(10_000));
        let running = journal(dir.path(), &store);
        for number in 0..5000 {
            store.publish(finding(&format!("f{number}"), number + 1, 1));
        }
        drop(running);
        // The last changes may have been missed when the thread ended: the next start publishes them anew.
        let running = journal(dir.path(), &store);
        drop(running);
        assert!(fs::metadata(&paths(dir.path())[1]).expect("rotated").len() <= FILE_BYTES_MAX);
        assert!(fs::metadata(&paths(dir.path())[0]).expect("the new one").len() <= FILE_BYTES_MAX);
    }
}
