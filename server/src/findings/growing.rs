//! Limits how often a growing finding is published: at once while it is small, seldom later.
//!
//! What enters: how many deaths a finding stands for, whenever one joins it. What leaves: whether it is published now, and what waited,
//! once it is due. What must hold: the last revision has everything that joined the finding. The caller's clock decides, which is the
//! log's where there is one. The tables are bounded.

use std::collections::BTreeMap;
use std::sync::Arc;

use tapio_wire::program::clock::now_ns;

use super::clue_store::Noted;
use super::matching::Match;
use super::pattern::Pattern;
use super::worker::Worker;
use crate::correlate::Generations;

/// A finding of fewer deaths is published with each of them.
const SMALL: u32 = 4;
/// Pause since its last revision after which a larger finding is published; it is also published when it has doubled.
pub(super) const PAUSE_NS: u64 = 2_000_000_000;
/// Findings remembered, and those of them that may wait.
const FINDINGS_MAX: usize = 8_192;

struct Published {
    count: u32,
    at_ns: u64,
    waits: bool,
}

/// Remembers how many deaths the published revisions had.
pub struct Growing {
    published: Generations<String, Published>,
    /// Findings by when they are due, with the last death of each.
    waiting: BTreeMap<(u64, String), Arc<Noted>>,
}

impl Default for Growing {
    fn default() -> Self {
        Self { published: Generations::new(FINDINGS_MAX), waiting: BTreeMap::new() }
    }
}

impl Growing {
    /// Whether a finding of `count` deaths, of which `last` is the last, is published now; otherwise it waits.
    pub fn is_published(&mut self, id: &str, count: u32, last: &Arc<Noted>, now_ns: u64) -> bool {
        if count < SMALL {
            return true;
        }
        let new = || Published { count: 0, at_ns: 0, waits: false };
        let published = self.published.entry(id.to_owned(), new);
        let due_ns = published.at_ns.saturating_add(PAUSE_NS);
        let key = (due_ns, id.to_owned());
        // A clock that was set back is no reason to wait.
        let is_early = now_ns < due_ns && now_ns >= published.at_ns;
        let grew = count > published.count && count / 2 < published.count;
        if is_early && grew && (published.waits || self.waiting.len() < FINDINGS_MAX) {
            published.waits = true;
            self.waiting.insert(key, Arc::clone(last));
            return false;
        }
        if published.waits {
            self.waiting.remove(&key);
        }
        *published = Published { count, at_ns: now_ns, waits: false };
        true
    }

    /// Takes the last deaths of the findings that are due, in the order in which they are.
    pub fn due(&mut self, now_ns: u64) -> Vec<Arc<Noted>> {
        let mut due = Vec::new();
        while let Some(entry) = self.waiting.first_entry().filter(|entry| entry.key().0 <= now_ns) {
            let ((_, id), last) = entry.remove_entry();
            self.published.remove(&id);
            due.push(last);
        }
        due
    }

    /// Whether something waits.
    pub fn waits(&self) -> bool {
        !self.waiting.is_empty()
    }
}

impl Worker {
    /// Nanoseconds since 1970.
    pub(super) fn now_ns(&self) -> u64 {
        match &self.log {
            Some(_) => self.log_ns,
            None => now_ns(),
        }
    }

    /// Publishes what has grown and waited.
    pub(super) fn publish_due(&mut self, now_ns: u64) {
        if !self.memory.growing.waits() {
            return;
        }
        let patterns = Arc::clone(&self.patterns);
        for last in self.memory.growing.due(now_ns) {
            self.conclude(&patterns, &last);
        }
    }

    /// Whether a finding is published now. A large one waits a little for more deaths, so that a storm is not published death by
    /// death.
    pub(super) fn is_published(&mut self, pattern: &Pattern, found: &Match, id: &str, count: u32) -> bool {
        let now_ns = self.now_ns();
        let last = found.steps[pattern.anchor].last();
        let growing = &mut self.memory.growing;
        pattern.is_state() || last.is_none_or(|last| growing.is_published(id, count, last, now_ns))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::findings::deaths::tests::death;

    #[test]
    fn what_grows_is_published_seldom_and_finally_complete() {
        let mut growing = Growing::default();
        let mut published = Vec::new();
        let mut last = 0;
        // A death each millisecond.
        for count in 1..=5_000_u32 {
            let now_ns = 10_000_000_000 + u64::from(count) * 1_000_000;
            for due in growing.due(now_ns) {
                assert!(growing.is_published("f", last, &due, now_ns), "what is due is published");
                published.push(last);
            }
            if growing.is_published("f", count, &death(count.into(), count.into()), now_ns) {
                published.push(count);
            }
            last = count;
        }
        assert_eq!(published[..6], [1, 2, 3, 4, 8, 16], "a small one is published with each death");
        assert!(published.len() < 24, "{published:?}");
        assert!(growing.waits());
        let due = growing.due(u64::MAX);
        assert_eq!(due.len(), 1);
        assert_eq!(due[0].clue.evidence.seq, 5_000, "the last death");
        assert!(growing.is_published("f", 5_000, &due[0], 20_000_000_000) && !growing.waits());
    }

    #[test]
    fn a_changed_finding_of_equal_count_is_published_at_once() {
        let mut growing = Growing::default();
        assert!(growing.is_published("f", 100, &death(1, 1), 5_000_000_000));
        assert!(!growing.is_published("f", 101, &death(2, 2), 5_000_000_001));
        assert!(growing.is_published("f", 100, &death(1, 1), 5_000_000_002));
        assert!(!growing.waits());
    }
}
