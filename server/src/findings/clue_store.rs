//! The recent clues of every entity, pod and node.
//!
//! What enters: clues that some step may want. What leaves: the history in which a pattern looks for its evidence. What must
//! hold: a history has at most [`HISTORY_MAX`] clues, and all histories together at most `clues_max`. Of the largest the oldest
//! clues are evicted first, and counted; a node that says much evicts its own, not what others said.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;

use foldhash::fast::RandomState;

use super::clue_history::{ClueHistory, HISTORY_MAX};
use super::joins::{HistoryKey, Joins};
use super::schema::Scope;
use super::step_mask::StepMask;
use crate::correlate::clue::Clue;

/// A clue and the steps that it may be.
pub struct Noted {
    pub clue: Clue,
    pub mask: StepMask,
    /// Number in the order of arrival.
    pub serial: u64,
}

/// Every place taken in a history, by the node that the clue is about, the oldest first; some are free by now.
#[derive(Default)]
struct Places {
    of_node: HashMap<u64, VecDeque<(HistoryKey, u64)>, RandomState>,
    /// How many each node has, and the node.
    by_count: BTreeSet<(usize, u64)>,
    len: usize,
}

impl Places {
    /// Takes a place for a clue about a node. With more than `places_max`, gives up the oldest one of the node that has most.
    fn take(&mut self, node: u64, key: HistoryKey, serial: u64, places_max: usize) -> Option<(HistoryKey, u64)> {
        let places = self.of_node.entry(node).or_default();
        let is_full = self.len >= places_max;
        let count = places.len();
        // Mostly the node itself has most: then its count stays.
        if is_full && count > 0 && self.by_count.last().is_some_and(|most| *most <= (count + 1, node)) {
            places.push_back((key, serial));
            return places.pop_front();
        }
        self.by_count.remove(&(count, node));
        places.push_back((key, serial));
        self.by_count.insert((count + 1, node));
        self.len += 1;
        is_full.then(|| self.free_oldest()).flatten()
    }

    fn free_oldest(&mut self) -> Option<(HistoryKey, u64)> {
        let (count, node) = self.by_count.pop_last()?;
        let places = self.of_node.get_mut(&node)?;
        let oldest = places.pop_front();
        self.len -= 1;
        if count > 1 {
            self.by_count.insert((count - 1, node));
        } else {
            self.of_node.remove(&node);
        }
        oldest
    }
}

/// Keeps recent clues in one history for each entity, pod, workload, service and node.
pub struct ClueStore {
    histories: HashMap<HistoryKey, ClueHistory, RandomState>,
    places: Places,
    clues_max: usize,
    serial: u64,
    evicted: u64,
}

impl ClueStore {
    /// An empty store of at most `clues_max` places.
    pub fn new(clues_max: usize) -> Self {
        Self {
            histories: HashMap::default(),
            places: Places::default(),
            clues_max: clues_max.max(1),
            serial: 0,
            evicted: 0,
        }
    }

    /// Notes a clue in these histories.
    pub fn note(&mut self, clue: Clue, mask: StepMask, keys: &[HistoryKey]) -> Arc<Noted> {
        self.serial += 1;
        let serial = self.serial;
        let noted = Arc::new(Noted { clue, mask, serial });
        for &key in keys {
            self.insert(key, &noted);
        }
        noted
    }

    /// Puts a clue whose entity was described again in the place of what was noted; its histories may be others now.
    pub fn replace(
        &mut self,
        old: &Arc<Noted>,
        old_keys: &[HistoryKey],
        clue: Clue,
        mask: StepMask,
        keys: &[HistoryKey],
    ) -> Arc<Noted> {
        let noted = Arc::new(Noted { clue, mask, serial: old.serial });
        for key in old_keys.iter().filter(|key| !keys.contains(key)) {
            if let Some(history) = self.histories.get_mut(key) {
                history.remove(old);
                if history.is_empty() {
                    self.histories.remove(key);
                }
            }
        }
        for &key in keys {
            if !self.histories.get_mut(&key).is_some_and(|history| history.replace(old, &noted)) {
                self.insert(key, &noted);
            }
        }
        noted
    }

    fn insert(&mut self, key: HistoryKey, noted: &Arc<Noted>) {
        let history = self.histories.entry(key).or_default();
        if history.len() == HISTORY_MAX {
            history.make_room();
            self.evicted += 1;
        }
        history.insert(Arc::clone(noted));
        let freed = self.places.take(noted.clue.entity.node.id, key, noted.serial, self.clues_max);
        if let Some((key, serial)) = freed {
            self.evict(&key, serial);
        }
    }

    /// A history, if anything is in it.
    pub fn history(&self, key: &HistoryKey) -> Option<&ClueHistory> {
        self.histories.get(key)
    }

    /// What is noted of the same clue now: its entity may have been described since. `None` when it was forgotten.
    pub fn current(&self, noted: &Arc<Noted>) -> Option<Arc<Noted>> {
        self.histories.get(&Joins::entity_key(&noted.clue.entity))?.of_serial(noted.serial).cloned()
    }

    /// Every clue that is remembered, in no order: each is in the history of its own entity.
    pub fn every_one(&self) -> impl Iterator<Item = Arc<Noted>> + '_ {
        self.histories.iter().filter(|(key, _)| key.1 == Scope::Entity).flat_map(|(_, history)| history.iter().cloned())
    }

    /// The entities that something is remembered of, with their nodes.
    pub fn entities(&self) -> Vec<(u64, u64)> {
        let keys = self.histories.keys().filter(|key| key.1 == Scope::Entity);
        keys.map(|&(node, _, entity)| (node, entity)).collect()
    }

    /// Forgets a node: it was restarted, and its clock with it.
    pub fn forget_node(&mut self, node: u64) {
        self.histories.retain(|&(of, _, _), _| of != node);
    }

    /// Clues that had to make room so far.
    pub fn evicted(&self) -> u64 {
        self.evicted
    }

    fn evict(&mut self, key: &HistoryKey, serial: u64) {
        let Some(history) = self.histories.get_mut(key) else {
            return;
        };
        // It may have made room for another one already.
        if history.remove_serial(serial) {
            self.evicted += 1;
        }
        if history.is_empty() {
            self.histories.remove(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tapio_wire::event::Role;

    use crate::correlate::clue::{ClueDetail, EvidenceId, Exec, NsPid};
    use crate::correlate::{EntityInfo, NodeRef};

    fn clue(node: &NodeRef, entity: u64) -> Clue {
        Clue {
            entity: Arc::new(EntityInfo::unknown(node, entity)),
            pid: 1,
            boottime_ns: 0,
            realtime_ns: 0,
            evidence: EvidenceId { node: node.id, epoch: 1, seq: 1, index: 0 },
            detail: ClueDetail::Exec(Exec {
                comm: "x".into(),
                parent_pid: 0,
                ns: NsPid { pid: 1, level: 0 },
                role: Role::Unknown,
            }),
        }
    }

    #[test]
    fn all_histories_together_and_each_of_them_keep_their_bound() {
        let node = NodeRef::named("n");
        let mut store = ClueStore::new(1000);
        for turn in 0..10_000 {
            // Every other clue is of one entity.
            let entity = if turn % 2 == 0 { 7 } else { 100 + turn };
            store.note(clue(&node, entity), StepMask::default(), &[(node.id, Scope::Entity, entity)]);
            let history = store.history(&(node.id, Scope::Entity, entity));
            assert!(history.is_some_and(|history| !history.is_empty() && history.len() <= HISTORY_MAX));
        }
        let held: usize = store.histories.values().map(ClueHistory::len).sum();
        assert!(held <= 1000 && store.places.len <= 1000, "{held}");
        assert_eq!(store.evicted() + held as u64, 10_000);
        store.forget_node(node.id);
        assert!(store.histories.is_empty());
    }

    #[test]
    fn a_node_that_says_much_pushes_out_its_own() {
        let (loud, calm) = (NodeRef::named("loud"), NodeRef::named("calm"));
        let mut store = ClueStore::new(1000);
        for entity in 0..100 {
            store.note(clue(&calm, entity), StepMask::default(), &[(calm.id, Scope::Entity, entity)]);
        }
        for entity in 0..50_000 {
            store.note(clue(&loud, entity), StepMask::default(), &[(loud.id, Scope::Entity, entity)]);
        }
        let held = |node: u64| store.histories.keys().filter(|key| key.0 == node).count();
        assert_eq!((held(calm.id), held(loud.id)), (100, 900));
    }
}
