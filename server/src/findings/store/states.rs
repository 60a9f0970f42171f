//! What an earlier run found: deaths, and states that go on.

use tapio_wire::service::Finding;

use super::FindingStore;
use crate::correlate::clue::EvidenceId;
use crate::findings::restored::{is_of_part, subjects};

impl FindingStore {
    /// Whether an earlier run found something about one of these entities that this run has not found again.
    pub fn has_restored_about(&self, mut entities: impl Iterator<Item = u64>) -> bool {
        let inner = self.read();
        !inner.restored_about.is_empty() && entities.any(|entity| inner.restored_about.contains_key(&entity))
    }

    /// Those of these ids that an earlier run's findings of this pattern have, of at most `count` deaths and not found again.
    pub fn restored_among(&self, ids: Vec<String>, pattern: &str, count: u32) -> Vec<String> {
        let inner = self.read();
        let says_no_more = |id: &String| {
            let finding = inner.findings.get(id).filter(|_| inner.restored.contains(id));
            finding.is_some_and(|finding| finding.pattern == pattern && finding.count <= count)
        };
        ids.into_iter().filter(says_no_more).collect()
    }

    /// Withdraws what an earlier run found by evidence that this run has seen, and has not found by it.
    pub fn withdraw_disproved(&self, is_seen: &dyn Fn(EvidenceId) -> bool) {
        let disproved = self.read().disproved(is_seen);
        for (id, successor) in disproved {
            self.withdraw(&id, successor.as_deref());
        }
    }

    /// The findings of an earlier run of this pattern that report a state of this entity, and of nobody else's any more, and that
    /// a clue ends. A clue that names a container ends what was reported of that container.
    pub fn end_restored(&self, pattern: &str, subject: u64, part: Option<&str>, at_ns: u64) -> Vec<Finding> {
        let key = (pattern.to_owned(), subject);
        if !self.read().restored_states.contains_key(&key) {
            return Vec::new();
        }
        let mut inner = self.write();
        let ids = inner.restored_states.get(&key).cloned().unwrap_or_default();
        let mut ended = Vec::new();
        for id in ids {
            let Some(finding) = inner.findings.get(&id).filter(|_| inner.restored.contains(&id)).cloned() else {
                continue;
            };
            let pieces = || finding.evidence.iter().filter_map(|piece| piece.entity.as_ref());
            let is_other = part.is_some_and(|part| {
                let mut of_troubles = finding.evidence.iter().filter(|piece| piece.kind == "trouble").peekable();
                if of_troubles.peek().is_some() {
                    return !of_troubles.any(|piece| is_of_part(piece, part));
                }
                let mut named =
                    pieces().map(|entity| entity.container.as_str()).filter(|name| !name.is_empty()).peekable();
                named.peek().is_some() && !named.any(|name| name == part)
            });
            if is_other || at_ns < finding.ended_ns {
                continue;
            }
            if let Some(left) = inner.restored_states.get_mut(&key) {
                left.retain(|known| *known != id);
            }
            let is_left = |subject| {
                let left = inner.restored_states.get(&(finding.pattern.clone(), subject));
                left.is_some_and(|left| left.contains(&id))
            };
            if !subjects(&finding).into_iter().any(is_left) {
                ended.push((*finding).clone());
            }
        }
        ended
    }

    /// The findings of an earlier run of this pattern that report a state on this node that goes on; each is handed out once.
    pub fn restored_on(&self, pattern: &str, node: &str) -> Vec<Finding> {
        let mut inner = self.write();
        let of_pattern: Vec<_> = inner.restored_states.keys().filter(|(of, _)| of == pattern).cloned().collect();
        let mut found: Vec<Finding> = Vec::new();
        for key in of_pattern {
            let ids = inner.restored_states.get(&key).cloned().unwrap_or_default();
            let (here, elsewhere): (Vec<String>, Vec<String>) = ids.into_iter().partition(|id| {
                let finding = inner.findings.get(id).filter(|_| inner.restored.contains(id));
                finding.is_some_and(|finding| finding.entity.as_ref().is_some_and(|entity| entity.node == node))
            });
            found.extend(here.iter().filter_map(|id| inner.findings.get(id)).map(|finding| (**finding).clone()));
            inner.restored_states.insert(key, elsewhere);
        }
        found.sort_by(|a, b| a.id.cmp(&b.id));
        found.dedup_by(|a, b| a.id == b.id);
        found
    }

    /// The findings of an earlier run that report the same state as the finding `id` does now; each is handed out once.
    pub fn replace_restored(&self, pattern: &str, subject: u64, id: &str) -> Vec<Finding> {
        let key = (pattern.to_owned(), subject);
        if !self.read().restored_states.contains_key(&key) {
            return Vec::new();
        }
        let mut inner = self.write();
        let ids = inner.restored_states.remove(&key).unwrap_or_default();
        let others = ids.iter().filter(|known| *known != id && inner.restored.contains(*known));
        others.filter_map(|known| inner.findings.get(known)).map(|finding| (**finding).clone()).collect()
    }
}
