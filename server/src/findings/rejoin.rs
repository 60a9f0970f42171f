//! Clues whose histories are others by now: their entity was described again, or their Service was heard of.
//!
//! What enters: entities that the topology or the joins name. What leaves: their clues, noted again, and the findings of all anchors
//! that this may change. What must hold: in which order descriptions, Services and clues come does not matter.

use std::sync::Arc;

use super::clue_store::Noted;
use super::joins::HistoryKey;
use super::pattern::PatternSet;
use super::schema::Scope;
use super::worker::Worker;
use crate::correlate::clue::Clue;

/// Clues that were noted again.
#[derive(Default)]
struct Renoted {
    all: Vec<Arc<Noted>>,
    /// Clues that are in histories where they were not before: they may be evidence for others there.
    moved: Vec<Arc<Noted>>,
}

impl Worker {
    /// Gives clues whose entity was described again its names, and publishes their findings again.
    pub(super) fn rename(&mut self) {
        if self.memory.topology.has_renamed() {
            let patterns = Arc::clone(&self.patterns);
            let mut renoted = Renoted::default();
            let mut renamed = match self.memory.topology.take_renamed() {
                Some(renamed) => renamed.into_iter().collect(),
                None => self.memory.clues.entities(),
            };
            // The order decides what makes room for what.
            renamed.sort_unstable();
            for (node, id) in renamed {
                self.memory.joins.described(node, id);
                let Some(history) = self.memory.clues.history(&(node, Scope::Entity, id)) else { continue };
                let Some(entity) = self.memory.topology.get(node, id) else { continue };
                let old: Vec<Arc<Noted>> =
                    history.iter().filter(|noted| noted.clue.entity != entity).cloned().collect();
                for old in old {
                    let clue = Clue { entity: Arc::clone(&entity), ..old.clue.clone() };
                    self.note_anew(&patterns, &old, clue, &mut renoted);
                }
            }
            self.conclude_anew(&patterns, renoted);
        }
        self.rejoin();
    }

    /// Joins clues to Services that were heard of only after them.
    pub(super) fn rejoin(&mut self) {
        let ready = self.memory.joins.take_ready();
        if ready.is_empty() {
            return;
        }
        let patterns = Arc::clone(&self.patterns);
        let mut renoted = Renoted::default();
        for (node, id) in ready {
            let Some(history) = self.memory.clues.history(&(node, Scope::Entity, id)) else { continue };
            let of_service = history.iter().filter(|noted| patterns.is_in(&noted.mask, Scope::Service));
            for old in of_service.cloned().collect::<Vec<_>>() {
                let mut clue = old.clue.clone();
                self.memory.joins.complete(&mut clue);
                self.note_anew(&patterns, &old, clue, &mut renoted);
            }
        }
        // Only what is joined to more than before can be explained in another way.
        renoted.all.clear();
        self.conclude_anew(&patterns, renoted);
    }

    fn note_anew(&mut self, patterns: &PatternSet, old: &Arc<Noted>, clue: Clue, renoted: &mut Renoted) {
        let mask = patterns.mask(&clue);
        let old_keys = self.keys(patterns, &old.clue, &old.mask);
        let keys = self.keys(patterns, &clue, &mask);
        self.memory.joins.note_lacks(patterns, &clue, &mask);
        let is_new = |key: &HistoryKey| {
            let mut known = self.memory.clues.history(key).into_iter().flat_map(|history| history.iter());
            !known.any(|noted| Arc::ptr_eq(noted, old))
        };
        let is_moved = keys.iter().any(is_new);
        let noted = self.memory.clues.replace(old, &old_keys, clue, mask, &keys);
        if is_moved {
            renoted.moved.push(Arc::clone(&noted));
        }
        renoted.all.push(noted);
    }

    fn conclude_anew(&mut self, patterns: &PatternSet, renoted: Renoted) {
        let mut anchors = renoted.all;
        for noted in &renoted.moved {
            let plan = self.plans.of(patterns, &noted.mask);
            anchors.extend(self.anchors_touched(patterns, noted, &plan));
        }
        anchors.sort_by_key(|noted| (noted.clue.realtime_ns, noted.clue.evidence));
        anchors.dedup_by(|a, b| Arc::ptr_eq(a, b));
        for anchor in anchors {
            if patterns.has_anchor(&anchor.mask) {
                self.conclude_again(patterns, &anchor);
            }
        }
    }
}
