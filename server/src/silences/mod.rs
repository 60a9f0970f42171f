//! Silences and acknowledgements: of which findings nobody is notified, until when, why, and who wanted it so.
//!
//! What enters: what people ask for, here and at other servers. What leaves: marks on findings, which stay in every list. What must
//! hold: a silence that was confirmed survives restarts, and with several servers each knows it. A silence is never changed but
//! ended, so what several servers know of it is merged by taking the end. Silences are bounded in number, length and time.
//!
//! ```text
//! one server       silences.json beside the archive, written before it counts
//! several servers  a key-value bucket of the log (shared.rs), and silences.json for a start without the log
//! ```

mod kept;
mod rules;
mod shared;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use foldhash::fast::RandomState;
use prometheus::{IntGaugeVec, Opts, Registry};
use tapio_wire::program::clock::now_ns;
use tapio_wire::program::glob;
use tapio_wire::service::{AcknowledgeRequest, AddSilenceRequest, Finding, Silence};
use tokio::sync::mpsc;

use kept::File;
pub use rules::{REASON_CHARS_MAX, is_active, summary};
pub use shared::SharedSilences;
use shared::Wish;

/// Silences that hold at a time, and as many acknowledgements.
const ACTIVE_MAX: usize = 256;
/// All that are known, also those that are over.
const KNOWN_MAX: usize = 4096;
/// How long one is kept that is over: as long as a finding of its time could still be news.
const KEPT_NS: u64 = 8 * 24 * 3600 * 1_000_000_000;

/// Why nothing was silenced.
#[derive(Debug, thiserror::Error)]
pub enum SilenceError {
    #[error("{0}")]
    Wrong(String),
    #[error("no silence or acknowledgement has the id {0}")]
    NotFound(String),
    #[error("{ACTIVE_MAX} hold already: end some first")]
    Full,
    #[error("it could not be kept, so it does not hold: {0}")]
    NotKept(String),
}

/// Silences and acknowledgements that this server knows.
pub struct Silences {
    known: RwLock<Known>,
    /// Writing is one at a time.
    writing: tokio::sync::Mutex<()>,
    file: Option<File>,
    /// To the thread that writes the servers' log, where there is one.
    log: RwLock<Option<mpsc::Sender<Wish>>>,
}

#[derive(Default)]
struct Known {
    by_id: BTreeMap<String, Silence>,
    /// The latest acknowledgement of each finding.
    acknowledged: HashMap<String, String, RandomState>,
    /// Counts changes.
    version: u64,
}

impl Known {
    /// Takes several in.
    fn take_all(&mut self, silences: impl IntoIterator<Item = Silence>) {
        for silence in silences {
            self.take(silence);
        }
    }

    /// Takes one in. Whether it says anything new.
    fn take(&mut self, silence: Silence) -> bool {
        if let Some(known) = self.by_id.get_mut(&silence.id) {
            let is_end = silence.ended_ns > 0 && (known.ended_ns == 0 || silence.ended_ns < known.ended_ns);
            if is_end {
                (known.ended_ns, known.ended_by) = (silence.ended_ns, silence.ended_by);
                self.version += 1;
            }
            return is_end;
        }
        if self.by_id.len() >= KNOWN_MAX {
            let first_over = self.by_id.values().min_by_key(|known| rules::end_ns(known)).map(|known| known.id.clone());
            first_over.into_iter().for_each(|id| self.forget(&id));
        }
        if !silence.finding.is_empty() {
            let latest = self.acknowledged.get(&silence.finding).and_then(|id| self.by_id.get(id));
            if latest.is_none_or(|latest| latest.since_ns <= silence.since_ns) {
                self.acknowledged.insert(silence.finding.clone(), silence.id.clone());
            }
        }
        self.by_id.insert(silence.id.clone(), silence);
        self.version += 1;
        true
    }

    fn forget(&mut self, id: &str) {
        let Some(silence) = self.by_id.remove(id) else { return };
        if self.acknowledged.get(&silence.finding).is_some_and(|latest| latest == id) {
            self.acknowledged.remove(&silence.finding);
        }
        self.version += 1;
    }

    /// Forgets what is over for long. Whether there was any.
    fn forget_old(&mut self, now_ns: u64) -> bool {
        // Also one that was ended early stays until its time is over: a server that was away may still have it as active.
        let over_ns = |silence: &Silence| rules::end_ns(silence).max(silence.until_ns);
        let is_old = |silence: &&Silence| over_ns(silence).saturating_add(KEPT_NS) < now_ns;
        let old: Vec<String> = self.by_id.values().filter(is_old).map(|silence| silence.id.clone()).collect();
        old.iter().for_each(|id| self.forget(id));
        !old.is_empty()
    }

    fn active(&self, now_ns: u64) -> impl Iterator<Item = &Silence> {
        self.by_id.values().filter(move |silence| is_active(silence, now_ns))
    }
}

/// Whether a silence is about a finding; acknowledgements are looked up by the finding.
fn names(silence: &Silence, finding: &Finding) -> bool {
    let (namespace, workload) = match &finding.entity {
        Some(entity) => (entity.namespace.as_str(), entity.workload.as_str()),
        None => ("", ""),
    };
    let agrees = |wanted: &str, name: &str| wanted.is_empty() || glob::matches(wanted, name);
    silence.finding.is_empty()
        && agrees(&silence.pattern, &finding.pattern)
        && agrees(&silence.namespace, namespace)
        && agrees(&silence.workload, workload)
}

impl Silences {
    /// None, kept nowhere.
    pub fn in_memory() -> Self {
        Self { known: RwLock::default(), writing: tokio::sync::Mutex::default(), file: None, log: RwLock::default() }
    }

    /// Those of earlier runs, kept in this folder. What cannot be read is logged, and moved aside.
    pub fn open(dir: &Path) -> Self {
        let file = File::of(dir);
        let silences = Self { file: Some(file), ..Self::in_memory() };
        let read = silences.file.as_ref().map(File::read).unwrap_or_default();
        let mut known = silences.known.write().unwrap_or_else(PoisonError::into_inner);
        known.take_all(read);
        known.forget_old(now_ns());
        drop(known);
        silences
    }

    fn read(&self) -> RwLockReadGuard<'_, Known> {
        self.known.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Silences nobody is notified of what it names from now on.
    ///
    /// # Errors
    /// See [`SilenceError`].
    pub async fn add(self: &Arc<Self>, request: AddSilenceRequest, by: &str) -> Result<Silence, SilenceError> {
        let silence = rules::silence(request, by, now_ns()).map_err(SilenceError::Wrong)?;
        self.keep_new(silence).await
    }

    /// Says that somebody deals with a finding, whose whole id is in the request.
    ///
    /// # Errors
    /// See [`SilenceError`].
    pub async fn acknowledge(self: &Arc<Self>, request: AcknowledgeRequest, by: &str) -> Result<Silence, SilenceError> {
        let silence = rules::acknowledgement(request, by, now_ns()).map_err(SilenceError::Wrong)?;
        self.keep_new(silence).await
    }

    /// Ends one before its time. One that is over is returned as it is.
    ///
    /// # Errors
    /// See [`SilenceError`].
    pub async fn end(self: &Arc<Self>, id: &str, by: &str) -> Result<Silence, SilenceError> {
        let found = {
            let known = self.read();
            let mut found = known.by_id.values().filter(|silence| !id.is_empty() && silence.id.starts_with(id));
            match (found.next(), found.next()) {
                (Some(silence), None) => silence.clone(),
                (Some(_), Some(_)) => {
                    return Err(SilenceError::Wrong(format!("several have ids that begin with {id}: give more of it")));
                }
                (None, _) => return Err(SilenceError::NotFound(id.to_owned())),
            }
        };
        if !is_active(&found, now_ns()) {
            return Ok(found);
        }
        self.keep(Silence { ended_ns: now_ns(), ended_by: by.to_owned(), ..found }).await
    }

    async fn keep_new(self: &Arc<Self>, silence: Silence) -> Result<Silence, SilenceError> {
        let is_same_kind = |known: &&Silence| known.finding.is_empty() == silence.finding.is_empty();
        if self.read().active(now_ns()).filter(is_same_kind).count() >= ACTIVE_MAX {
            return Err(SilenceError::Full);
        }
        self.keep(silence).await
    }

    /// Makes one durable, and lets it count then.
    async fn keep(self: &Arc<Self>, silence: Silence) -> Result<Silence, SilenceError> {
        let _writing = self.writing.lock().await;
        let log = self.log.read().unwrap_or_else(PoisonError::into_inner).clone();
        let is_shared = log.is_some();
        if let Some(log) = log {
            shared::write(&log, silence.clone()).await.map_err(SilenceError::NotKept)?;
            self.take_in(silence.clone());
        }
        let (this, with) = (Arc::clone(self), silence.clone());
        let saved = tokio::task::spawn_blocking(move || this.save(Some(&with))).await;
        match saved.map_err(|error| error.to_string()).and_then(|saved| saved.map_err(|error| error.to_string())) {
            Ok(()) => {}
            // The log has it.
            Err(error) if is_shared => {
                tracing::warn!(error, "cannot write silences.json: they are in the servers' log")
            }
            Err(error) => return Err(SilenceError::NotKept(error)),
        }
        self.take_in(silence.clone());
        tracing::info!(target: "audit", silence = silence.id, by = silence.by, ended_by = silence.ended_by,
            until = crate::render::rfc3339(silence.until_ns), reason = silence.reason, "{}", summary(&silence));
        Ok(silence)
    }

    /// Takes in what is kept elsewhere. Whether it was new.
    fn take_in(&self, silence: Silence) -> bool {
        self.known.write().unwrap_or_else(PoisonError::into_inner).take(silence)
    }

    /// Writes all of them, and one more, into the file.
    fn save(&self, with: Option<&Silence>) -> std::io::Result<()> {
        let Some(file) = &self.file else { return Ok(()) };
        let mut all = Known::default();
        all.take_all(self.read().by_id.values().chain(with).cloned());
        file.write(all.by_id.values())
    }

    /// All that hold, and all others that are still known, the latest first.
    pub fn list(&self, all: bool) -> Vec<Silence> {
        let now_ns = now_ns();
        let known = self.read();
        let wanted = known.by_id.values().filter(|silence| all || is_active(silence, now_ns));
        let mut found: Vec<Silence> = wanted.cloned().collect();
        found.sort_by(|a, b| (b.since_ns, &b.id).cmp(&(a.since_ns, &a.id)));
        found
    }

    /// The silence that holds for a finding now. A withdrawal is never silenced: it corrects a wrong finding.
    pub fn of(&self, finding: &Finding) -> Option<Silence> {
        let now_ns = now_ns();
        let known = self.read();
        let mut active = known.active(now_ns).filter(|silence| !finding.withdrawn && names(silence, finding));
        // The one that holds longest says until when.
        let first = active.next()?;
        Some(active.fold(first, |a, b| if b.until_ns > a.until_ns { b } else { a }).clone())
    }

    /// Who deals with a finding.
    pub fn acknowledged(&self, id: &str) -> Option<Silence> {
        let known = self.read();
        let silence = known.by_id.get(known.acknowledged.get(id)?)?;
        is_active(silence, now_ns()).then(|| silence.clone())
    }

    /// Whether a finding was published while a silence held that is over by now.
    pub fn covered(&self, finding: &Finding) -> bool {
        let held = |silence: &&Silence| {
            (silence.since_ns..rules::end_ns(silence)).contains(&finding.published_ns) && names(silence, finding)
        };
        self.read().by_id.values().any(|silence| held(&silence))
    }

    /// Marks a finding with what holds for it.
    pub fn mark(&self, finding: &mut Finding) {
        if self.read().by_id.is_empty() {
            return;
        }
        (finding.silence, finding.acknowledged) = (self.of(finding), self.acknowledged(&finding.id));
    }

    /// The same of a shared one, which is copied only where there is something to say.
    pub fn marked(&self, finding: Arc<Finding>) -> Arc<Finding> {
        let is_bare = finding.silence.is_none() && finding.acknowledged.is_none();
        if is_bare && self.read().by_id.is_empty() {
            return finding;
        }
        match (self.of(&finding), self.acknowledged(&finding.id)) {
            (None, None) if is_bare => finding,
            (silence, acknowledged) => Arc::new(Finding { silence, acknowledged, ..(*finding).clone() }),
        }
    }

    /// Another value whenever other silences hold.
    pub fn state(&self) -> (u64, usize) {
        let known = self.read();
        (known.version, known.active(now_ns()).count())
    }

    /// Registers their number.
    ///
    /// # Errors
    /// When the name is taken.
    pub fn register(self: &Arc<Self>, registry: &Registry) -> Result<(), prometheus::Error> {
        let opts =
            Opts::new("tapio_server_silences", "Silences and acknowledgements of findings that hold now, by kind.");
        let gauge = IntGaugeVec::new(opts, &["kind"])?;
        registry.register(Box::new(Counted { silences: Arc::clone(self), gauge }))
    }
}

/// Counts them when the metrics are read.
struct Counted {
    silences: Arc<Silences>,
    gauge: IntGaugeVec,
}

impl prometheus::core::Collector for Counted {
    fn desc(&self) -> Vec<&prometheus::core::Desc> {
        self.gauge.desc()
    }

    fn collect(&self) -> Vec<prometheus::proto::MetricFamily> {
        let active = self.silences.list(false);
        let acknowledged = active.iter().filter(|silence| !silence.finding.is_empty()).count();
        self.gauge.with_label_values(&["acknowledgement"]).set(acknowledged as i64);
        self.gauge.with_label_values(&["silence"]).set((active.len() - acknowledged) as i64);
        self.gauge.collect()
    }
}

#[cfg(test)]
mod tests;
