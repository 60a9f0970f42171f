//! The recent clues of every entity, pod and node.
//!
//! What enters: clues that some step may want. What leaves: the ring in which a pattern looks for its evidence. What must
//! hold: a ring has at most [`RING_MAX`] clues, and all rings together at most `clues_max`; of what there is most the oldest go
//! first, and are counted; a node that says much pushes out its own, not what others said.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;

use foldhash::fast::RandomState;

use super::joins::RingKey;
use super::pattern::StepMask;
use super::ring::{RING_MAX, Ring};
use super::schema::Scope;
use crate::correlate::clue::Clue;

/// A clue and the steps that it may be.
pub struct Noted {
    pub clue: Clue,
    pub mask: StepMask,
    /// In the order of arrival.
    pub serial: u64,
}

/// Every place taken in a ring, by the node that the clue is about, the oldest first; some are free by now.
#[derive(Default)]
struct Places {
    of_node: HashMap<u64, VecDeque<(RingKey, u64)>, RandomState>,
    /// How many each node has, and the node.
    by_count: BTreeSet<(usize, u64)>,
    len: usize,
}

impl Places {
    /// Takes a place for a clue about a node. With more than `places_max`, gives up the oldest one of the node that has most.
    fn take(&mut self, node: u64, key: RingKey, serial: u64, places_max: usize) -> Option<(RingKey, u64)> {
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

    fn free_oldest(&mut self) -> Option<(RingKey, u64)> {
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

/// Keeps recent clues in one ring for each entity, pod, workload, service and node.
pub struct History {
    rings: HashMap<RingKey, Ring, RandomState>,
    places: Places,
    clues_max: usize,
    serial: u64,
    evicted: u64,
}

impl History {
    /// An empty history of at most `clues_max` places.
    pub fn new(clues_max: usize) -> Self {
        Self {
            rings: HashMap::default(),
            places: Places::default(),
            clues_max: clues_max.max(1),
            serial: 0,
            evicted: 0,
        }
    }

    /// Notes a clue in these rings.
    pub fn note(&mut self, clue: Clue, mask: StepMask, keys: &[RingKey]) -> Arc<Noted> {
        self.serial += 1;
        let serial = self.serial;
        let noted = Arc::new(Noted { clue, mask, serial });
        for &key in keys {
            self.insert(key, &noted);
        }
        noted
    }

    /// Puts a clue whose entity was described anew in the place of what was noted; its rings may be others now.
    pub fn replace(
        &mut self,
        old: &Arc<Noted>,
        old_keys: &[RingKey],
        clue: Clue,
        mask: StepMask,
        keys: &[RingKey],
    ) -> Arc<Noted> {
        let noted = Arc::new(Noted { clue, mask, serial: old.serial });
        for key in old_keys.iter().filter(|key| !keys.contains(key)) {
            if let Some(ring) = self.rings.get_mut(key) {
                ring.remove(old);
                if ring.is_empty() {
                    self.rings.remove(key);
                }
            }
        }
        for &key in keys {
            if !self.rings.get_mut(&key).is_some_and(|ring| ring.replace(old, &noted)) {
                self.insert(key, &noted);
            }
        }
        noted
    }

    fn insert(&mut self, key: RingKey, noted: &Arc<Noted>) {
        let ring = self.rings.entry(key).or_default();
        if ring.len() == RING_MAX {
            ring.make_room();
            self.evicted += 1;
        }
        ring.insert(Arc::clone(noted));
        let freed = self.places.take(noted.clue.entity.node.id, key, noted.serial, self.clues_max);
        if let Some((key, serial)) = freed {
            self.evict(&key, serial);
        }
    }

    /// A ring, if anything is in it.
    pub fn ring(&self, key: &RingKey) -> Option<&Ring> {
        self.rings.get(key)
    }

    /// Every clue that is remembered, in no order: each is in the ring of its own entity.
    pub fn every_one(&self) -> impl Iterator<Item = Arc<Noted>> + '_ {
        self.rings.iter().filter(|(key, _)| key.1 == Scope::Entity).flat_map(|(_, ring)| ring.iter().cloned())
    }

    /// The entities that something is remembered of, with their nodes.
    pub fn entities(&self) -> Vec<(u64, u64)> {
        let keys = self.rings.keys().filter(|key| key.1 == Scope::Entity);
        keys.map(|&(node, _, entity)| (node, entity)).collect()
    }

    /// Forgets a node: it was started anew, and its clock with it.
    pub fn forget_node(&mut self, node: u64) {
        self.rings.retain(|&(of, _, _), _| of != node);
    }

    /// Clues that had to make room so far.
    pub fn evicted(&self) -> u64 {
        self.evicted
    }

    fn evict(&mut self, key: &RingKey, serial: u64) {
        let Some(ring) = self.rings.get_mut(key) else {
            return;
        };
        // It may have made room for another one already.
        if ring.remove_serial(serial) {
            self.evicted += 1;
        }
        if ring.is_empty() {
            self.rings.remove(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tapio_wire::event::Role;

    use crate::correlate::clue::{Detail, EvidenceId, Exec, NsPid};
    use crate::correlate::{EntityInfo, NodeRef};

    fn clue(node: &NodeRef, entity: u64) -> Clue {
        Clue {
            entity: Arc::new(EntityInfo::unknown(node, entity)),
            pid: 1,
            boottime_ns: 0,
            realtime_ns: 0,
            evidence: EvidenceId { node: node.id, epoch: 1, seq: 1, index: 0 },
            detail: Detail::Exec(Exec {
                comm: "x".into(),
                parent_pid: 0,
                ns: NsPid { pid: 1, level: 0 },
                role: Role::Unknown,
            }),
        }
    }

    #[test]
    fn all_rings_together_and_each_of_them_keep_their_bound() {
        let node = NodeRef::named("n");
        let mut history = History::new(1000);
        for turn in 0..10_000 {
            // Every other clue is of one entity.
            let entity = if turn % 2 == 0 { 7 } else { 100 + turn };
            history.note(clue(&node, entity), StepMask::default(), &[(node.id, Scope::Entity, entity)]);
            let ring = history.ring(&(node.id, Scope::Entity, entity));
            assert!(ring.is_some_and(|ring| !ring.is_empty() && ring.len() <= RING_MAX));
        }
        let held: usize = history.rings.values().map(Ring::len).sum();
        assert!(held <= 1000 && history.places.len <= 1000, "{held}");
        assert_eq!(history.evicted() + held as u64, 10_000);
        history.forget_node(node.id);
        assert!(history.rings.is_empty());
    }

    #[test]
    fn a_node_that_says_much_pushes_out_its_own() {
        let (loud, calm) = (NodeRef::named("loud"), NodeRef::named("calm"));
        let mut history = History::new(1000);
        for entity in 0..100 {
            history.note(clue(&calm, entity), StepMask::default(), &[(calm.id, Scope::Entity, entity)]);
        }
        for entity in 0..50_000 {
            history.note(clue(&loud, entity), StepMask::default(), &[(loud.id, Scope::Entity, entity)]);
        }
        let held = |node: u64| history.rings.keys().filter(|key| key.0 == node).count();
        assert_eq!((held(calm.id), held(loud.id)), (100, 900));
    }
}
