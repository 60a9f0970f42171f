//! Findings, for readers and watchers.
//!
//! What enters: findings, new and changed. What leaves: lists, single findings, and every change to those who watch. What must
//! hold: at most `findings_max`. Of the node that has most, the findings that ended first are evicted first, and what goes on
//! last. A finding that was taken over by another is still found by its old id, and watchers are notified. `published_ns` rises
//! with every publication, so a watcher knows what it has missed.

mod by_node;
mod formers;
mod states;
mod table;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use tapio_wire::service::Finding;
use tokio::sync::broadcast;

use super::restored::{death_key, says_less};
use table::Table;

/// Changes that a watcher may be behind before it has to catch up by listing.
pub(super) const WATCH_BACKLOG: usize = 1024;

/// Where a list goes on.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    pub ended_ns: u64,
    pub id: String,
}

/// Why a finding could not be shown.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum LookupError {
    #[error("no finding has the id {0}")]
    NotFound(String),
    #[error("{count} findings have ids that begin with {prefix}: give more of it")]
    Ambiguous { prefix: String, count: usize },
}

/// What the store sends its journal.
pub enum Change {
    Published(Arc<Finding>),
    Withdrawn { id: String, successor: Option<String> },
}

/// Keeps findings for lists, look-ups and watchers.
pub struct FindingStore {
    inner: RwLock<Table>,
    findings_max: usize,
    changes: broadcast::Sender<Arc<Finding>>,
    journal: OnceLock<SyncSender<Change>>,
    /// The journal missed a change.
    journal_missed: AtomicBool,
    is_replaying: AtomicBool,
    /// The cluster that its findings are of.
    cluster: OnceLock<String>,
    /// Other servers that no log joins with this one.
    unjoined: RwLock<Vec<String>>,
}

impl FindingStore {
    /// An empty store of at most `findings_max` findings.
    pub fn new(findings_max: usize) -> Self {
        let findings_max = findings_max.max(1);
        Self {
            inner: RwLock::new(Table::new(findings_max)),
            findings_max,
            changes: broadcast::Sender::new(WATCH_BACKLOG),
            journal: OnceLock::new(),
            journal_missed: AtomicBool::new(false),
            is_replaying: AtomicBool::new(false),
            cluster: OnceLock::new(),
            unjoined: RwLock::default(),
        }
    }

    /// Names the cluster of all findings from now on.
    pub fn set_cluster(&self, name: &str) {
        // The first one stays.
        let _ = self.cluster.set(name.to_owned());
    }

    /// The cluster that its findings are of; empty where none was named.
    pub fn cluster(&self) -> &str {
        self.cluster.get().map_or("", String::as_str)
    }

    /// Names other servers whose nodes' events this one does not see; findings from now on state them as missing. Whether they are
    /// others than before.
    pub fn set_unjoined(&self, servers: Vec<String>) -> bool {
        let mut known = self.unjoined.write().unwrap_or_else(PoisonError::into_inner);
        *known != servers && {
            *known = servers;
            true
        }
    }

    /// Other servers that no log joins with this one.
    pub fn unjoined(&self) -> Vec<String> {
        self.unjoined.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Sends every change from now on to a journal. It is never waited for: what it misses, it asks for.
    pub fn set_journal(&self, journal: SyncSender<Change>) {
        // The first one stays.
        let _ = self.journal.set(journal);
    }

    /// Whether the journal missed a change since this was asked last.
    pub fn take_journal_missed(&self) -> bool {
        self.journal_missed.swap(false, Ordering::AcqRel)
    }

    fn send_to_journal(&self, change: impl FnOnce() -> Change) {
        if let Some(journal) = self.journal.get()
            && journal.try_send(change()).is_err()
        {
            self.journal_missed.store(true, Ordering::Release);
        }
    }

    /// Takes in a finding of an earlier run, before anything is published. What a replay of the last minutes finds of it
    /// replaces it only when that says as much.
    pub fn restore(&self, finding: Finding) {
        let mut inner = self.write();
        inner.published_ns = inner.published_ns.max(finding.published_ns);
        inner.restored(&finding);
        inner.insert(Arc::new(finding));
        inner.make_room(self.findings_max);
    }

    /// Takes in the last word of other servers on what was found before the log begins. What this run has found itself stands.
    /// Returns true if the finding is new, or says something new.
    pub fn take_in(&self, finding: Finding) -> bool {
        let mut inner = self.write();
        let is_later = match inner.findings.get(&finding.id) {
            Some(known) => inner.restored.contains(&finding.id) && known.published_ns < finding.published_ns,
            None => {
                !finding.withdrawn
                    && inner.aliases.get(&finding.id).is_none()
                    && !inner.withdrawn.iter().any(|known| known.id == finding.id)
            }
        };
        if finding.withdrawn && !finding.superseded_by.is_empty() && !inner.findings.contains_key(&finding.id) {
            // Whoever was given it is to hear of its successor.
            inner.alias(finding.id, finding.superseded_by, self.findings_max);
            return false;
        }
        if !is_later {
            return false;
        }
        inner.published_ns = inner.published_ns.max(finding.published_ns);
        if finding.withdrawn {
            drop(inner);
            let successor = Some(finding.superseded_by.as_str()).filter(|id| !id.is_empty());
            self.withdraw(&finding.id, successor);
            return false;
        }
        inner.restored(&finding);
        let finding = Arc::new(finding);
        inner.insert(Arc::clone(&finding));
        inner.make_room(self.findings_max);
        self.send_to_journal(|| Change::Published(finding));
        true
    }

    /// What the log says the time is, nanoseconds since 1970: findings are published at it.
    pub fn set_now(&self, now_ns: u64) {
        self.write().now_ns = Some(now_ns);
    }

    /// Whether this server feeds itself: then what it finds is to be confirmed by the log.
    pub fn set_alone(&self, is_alone: bool) {
        self.write().is_alone = is_alone;
    }

    /// Whether this server feeds itself.
    pub fn is_alone(&self) -> bool {
        self.read().is_alone
    }

    /// Everything is found again: what is known is treated as an earlier run's, except what the log has not confirmed. The log
    /// begins at `begins_ns`, nanoseconds since 1970; from `window_ns` later on the replay has everything. Of an earlier frame it
    /// has all or nothing, unless the beginning of the log `is_cut`.
    pub fn restart(&self, begins_ns: u64, window_ns: u64, is_cut: bool) {
        let mut inner = self.write();
        inner.begin_replay(begins_ns.saturating_add(window_ns), is_cut);
        // Deaths that this server counted alone come again in the log, which keeps twice the window.
        for confirmed in inner.confirmed_and_added_to() {
            if let Some(known) = inner.findings.get(&confirmed.id)
                && known.ended_ns.saturating_sub(confirmed.ended_ns) <= window_ns
            {
                let revision = known.revision + 1;
                self.put(&mut inner, Finding { revision, ..(*confirmed).clone() });
            }
        }
        let known: Vec<Arc<Finding>> = inner.findings.values().cloned().collect();
        for finding in known.iter().filter(|finding| !finding.withdrawn) {
            if inner.unconfirmed.get(&finding.id) != Some(&true) {
                inner.restored(finding);
            }
        }
    }

    /// The replay does not have everything of before this moment.
    pub fn replayed_only_from(&self, from_ns: u64) {
        self.write().replayed_only_from(from_ns);
    }

    /// Withdraws, when the log was read to its end, what was found alone and the log does not confirm. It also withdraws what
    /// an earlier run made of the same log and this one did not.
    pub fn withdraw_unconfirmed(&self) {
        let mut inner = self.write();
        let unconfirmed = std::mem::take(&mut inner.unconfirmed);
        inner.confirmed.clear();
        let not_found_again = inner.not_found_again();
        inner.replayed_from_ns = None;
        drop(inner);
        for (id, successor) in not_found_again {
            self.withdraw(&id, successor.as_deref());
        }
        let mut new: Vec<String> = unconfirmed.into_iter().filter(|(_, is_new)| *is_new).map(|(id, _)| id).collect();
        new.sort();
        for id in new {
            self.withdraw(&id, None);
        }
    }

    /// Takes in that an earlier run withdrew a finding that nothing took over.
    pub fn restore_withdrawn(&self, id: String) {
        let mut inner = self.write();
        if inner.withdrawn.len() < WATCH_BACKLOG {
            // Before anything that is published from now on.
            let last = Finding { id, withdrawn: true, published_ns: 1, ..Finding::default() };
            inner.withdrawn.push_back(Arc::new(last));
        }
    }

    /// Takes in that an earlier run's finding was taken over by another.
    pub fn restore_alias(&self, id: String, successor: String) {
        self.write().alias(id, successor, self.findings_max);
    }

    /// While the last minutes are replayed, a death that an earlier run has explained is not explained again: the beginning of
    /// its story may lie before those minutes. [`Self::publish_parts`] forgets what was held back.
    pub fn set_replaying(&self, is_replaying: bool) {
        if is_replaying {
            self.write().held_back.clear();
        }
        self.is_replaying.store(is_replaying, Ordering::Release);
    }

    /// Whether the last minutes are replayed.
    pub fn is_replaying(&self) -> bool {
        self.is_replaying.load(Ordering::Acquire)
    }

    fn read(&self) -> RwLockReadGuard<'_, Table> {
        self.inner.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Table> {
        self.inner.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Publishes a finding, or a change to the one of the same id; `None` when it says nothing new.
    pub fn publish(&self, mut finding: Finding) -> Option<Arc<Finding>> {
        finding.cluster = self.cluster().to_owned();
        if finding.missing_servers.is_empty() {
            finding.missing_servers = self.unjoined();
        }
        let mut inner = self.write();
        finding.revision = 1;
        if !inner.is_alone {
            inner.unconfirmed.remove(&finding.id);
            inner.confirmed.remove(&finding.id);
        } else if !inner.unconfirmed.contains_key(&finding.id) {
            let known = inner.findings.get(&finding.id).cloned();
            inner.unconfirmed.insert(finding.id.clone(), known.is_none());
            known.into_iter().for_each(|known| inner.confirm(known));
        }
        if let Some(known) = inner.findings.get(&finding.id) {
            let is_earlier_runs = inner.restored.contains(&finding.id) && !inner.is_replayed(known);
            if is_earlier_runs && says_less(&finding, known) {
                inner.found_less.insert(finding.id);
                return None;
            }
            finding.revision = known.revision;
            finding.published_ns = known.published_ns;
            if finding == **known {
                // It was found again as it was.
                let known = Arc::clone(known);
                inner.not_restored(&known);
                return None;
            }
            finding.revision += 1;
        } else if self.is_replaying.load(Ordering::Acquire) && !inner.is_replayed(&finding) {
            let is_known = |death| inner.restored_deaths.contains_key(&death);
            if death_key(&finding).is_some_and(is_known) || inner.is_named_by_former(&finding) {
                inner.formers.parts.remove(&finding.id);
                inner.hold_back(finding, self.findings_max);
                return None;
            }
            if inner.is_within_former(&finding) && inner.formers.parts.len() < self.findings_max {
                inner.formers.parts.insert(finding.id.clone(), finding);
                return None;
            }
        }
        Some(self.put(&mut inner, finding))
    }

    fn put(&self, inner: &mut Table, mut finding: Finding) -> Arc<Finding> {
        if let Some(known) = inner.findings.get(&finding.id).cloned() {
            inner.not_restored(&known);
        }
        inner.held_back.remove(&finding.id);
        inner.formers.parts.remove(&finding.id);
        finding.published_ns = inner.next_published_ns();
        let finding = Arc::new(finding);
        inner.aliases.remove(&finding.id);
        inner.insert(Arc::clone(&finding));
        inner.make_room(self.findings_max);
        self.send_to_journal(|| Change::Published(Arc::clone(&finding)));
        // Nobody has to watch.
        let _ = self.changes.send(Arc::clone(&finding));
        finding
    }

    /// Takes a finding back; `successor` is what explains it better.
    pub fn withdraw(&self, id: &str, successor: Option<&str>) -> Option<Arc<Finding>> {
        let mut inner = self.write();
        let was_held = inner.held_back.remove(id).is_some() | inner.formers.parts.remove(id).is_some();
        if inner.restored.contains(id) {
            // A replay may group deaths otherwise than they were: what takes over was held back, since they are explained already.
            if let Some(held) = successor.and_then(|successor| inner.held_back.remove(successor)) {
                self.put(&mut inner, held);
            }
            let is_unknown = |successor: &str| inner.current(successor).is_none_or(|current| current.id == id);
            if self.is_replaying() && successor.is_some_and(is_unknown) {
                // Nothing is there to take over: what an earlier run found stands.
                return None;
            }
        }
        let Some(finding) = inner.remove(id) else {
            // Others may have been taken over by it.
            if let Some(successor) = successor.filter(|_| was_held) {
                inner.alias(id.to_owned(), successor.to_owned(), self.findings_max);
                self.send_to_journal(|| Change::Withdrawn { id: id.to_owned(), successor: Some(successor.to_owned()) });
            }
            return None;
        };
        inner.not_restored(&finding);
        match inner.unconfirmed.get(id) {
            // The log knew it before: found again while alone, it is not new.
            None if inner.is_alone => {
                inner.unconfirmed.insert(id.to_owned(), false);
                inner.confirm(Arc::clone(&finding));
            }
            Some(false) if inner.is_alone => {}
            _ => {
                inner.unconfirmed.remove(id);
                inner.confirmed.remove(id);
            }
        }
        if let Some(successor) = successor {
            inner.alias(id.to_owned(), successor.to_owned(), self.findings_max);
        }
        self.send_to_journal(|| Change::Withdrawn { id: id.to_owned(), successor: successor.map(str::to_owned) });
        let last = Arc::new(Finding {
            withdrawn: true,
            superseded_by: successor.unwrap_or_default().to_owned(),
            revision: finding.revision + 1,
            published_ns: inner.next_published_ns(),
            ..(*finding).clone()
        });
        if inner.withdrawn.len() == WATCH_BACKLOG {
            inner.withdrawn.pop_front();
        }
        inner.withdrawn.push_back(Arc::clone(&last));
        // Nobody has to watch.
        let _ = self.changes.send(last);
        Some(finding)
    }

    /// The finding of an id, or of a prefix that only one has.
    ///
    /// # Errors
    /// [`LookupError`] when none or several have it.
    pub fn get(&self, id: &str) -> Result<Arc<Finding>, LookupError> {
        let inner = self.read();
        if let Some(finding) = inner.current(id) {
            return Ok(Arc::clone(finding));
        }
        let matching = |finding: &&Arc<Finding>| !id.is_empty() && finding.id.starts_with(id);
        let mut found = inner.findings.values().filter(matching);
        match (found.next(), found.count()) {
            (Some(finding), 0) => Ok(Arc::clone(finding)),
            // Lists print short ids, and somebody may have kept one of a finding that another took over.
            (None, _) => inner.current_of_prefix(id).ok_or_else(|| LookupError::NotFound(id.to_owned())),
            (Some(_), more) => Err(LookupError::Ambiguous { prefix: id.to_owned(), count: more + 1 }),
        }
    }

    /// The finding of exactly this id, or that which took it over.
    pub fn current(&self, id: &str) -> Option<Arc<Finding>> {
        self.read().current(id).cloned()
    }

    /// Findings that ended at or after `since_ns`, newest first, from `after` on, at most `limit`; and where the list goes on.
    pub fn list(&self, since_ns: u64, after: Option<&Position>, limit: usize) -> (Vec<Arc<Finding>>, Option<Position>) {
        let inner = self.read();
        let from = Position { ended_ns: since_ns, id: String::new() };
        let positions: Box<dyn Iterator<Item = &Position>> = match after {
            Some(after) if *after <= from => return (Vec::new(), None),
            Some(after) => Box::new(inner.order.range(&from..after).rev()),
            None => Box::new(inner.order.range(&from..).rev()),
        };
        let mut page = Vec::new();
        let mut last = None;
        for position in positions {
            if page.len() == limit {
                return (page, last);
            }
            if let Some(finding) = inner.findings.get(&position.id) {
                page.push(Arc::clone(finding));
                last = Some(position.clone());
            }
        }
        (page, None)
    }

    /// What was published and withdrawn after a moment of the server's clock, in that order.
    pub fn changed_after(&self, published_ns: u64) -> Vec<Arc<Finding>> {
        // One look at both: what is published between two would be taken for older than what was withdrawn after it.
        let inner = self.read();
        let all = inner.findings.values().chain(&inner.withdrawn);
        let mut found: Vec<_> = all.filter(|finding| finding.published_ns > published_ns).cloned().collect();
        found.sort_by_key(|finding| finding.published_ns);
        found
    }

    /// Findings published after a moment of the server's clock, in the order of their publication.
    pub fn published_after(&self, published_ns: u64) -> Vec<Arc<Finding>> {
        let inner = self.read();
        let mut found: Vec<_> =
            inner.findings.values().filter(|finding| finding.published_ns > published_ns).cloned().collect();
        found.sort_by_key(|finding| finding.published_ns);
        found
    }

    /// Every finding, in the order of their publication, and every id that leads to another, as of one moment.
    pub fn everything(&self) -> (Vec<Arc<Finding>>, Vec<(String, String)>) {
        let inner = self.read();
        let mut findings: Vec<_> = inner.findings.values().cloned().collect();
        findings.sort_by_key(|finding| finding.published_ns);
        let replaced = inner.alias_order.iter().filter(|id| !inner.findings.contains_key(*id));
        let aliases = replaced.filter_map(|id| Some((id.clone(), inner.aliases.get(id)?.clone()))).collect();
        (findings, aliases)
    }

    /// Ids of the latest findings that were withdrawn and that nothing took over.
    pub fn withdrawn_for_good(&self) -> Vec<String> {
        let inner = self.read();
        let alone = inner.withdrawn.iter().filter(|finding| finding.superseded_by.is_empty());
        alone.map(|finding| finding.id.clone()).collect()
    }

    /// Every publication from now on, and the last one's `published_ns`.
    pub fn watch(&self) -> (broadcast::Receiver<Arc<Finding>>, u64) {
        let inner = self.read();
        (self.changes.subscribe(), inner.published_ns)
    }

    /// How many findings it holds at the most.
    pub fn findings_max(&self) -> usize {
        self.findings_max
    }

    /// Findings held.
    pub fn len(&self) -> usize {
        self.read().findings.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Findings that had to make room so far.
    pub fn evicted(&self) -> u64 {
        self.read().evicted
    }
}

#[cfg(test)]
mod tests;
