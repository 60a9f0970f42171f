//! What may be missing near a finding's evidence.

use std::sync::Arc;

use super::compose;
use super::joins::Joins;
use super::matching::Match;
use super::worker::Worker;
use crate::correlate::clue::{ClueDetail, ClueKind};
use crate::correlate::{EntityInfo, Lost};

/// Why a gap says that events of one entity were left out, and how far from the event that says so they may be: it is reported
/// every ten seconds.
const FLOOD: &str = "flood";
const FLOOD_REACH_NS: u64 = 11_000_000_000;

impl Worker {
    /// What was lost on the nodes that the evidence comes from.
    pub(super) fn lost(&self, found: &Match) -> Lost {
        let mut nodes: Vec<u64> = found.steps.iter().flatten().map(|noted| noted.clue.evidence.node).collect();
        nodes.sort_unstable();
        nodes.dedup();
        let of_nodes = nodes.into_iter().fold(Lost::default(), |sum, node| {
            let (from_ns, to_ns) = compose::loss_window(found, node);
            sum.and(self.losses.lost(node, from_ns, to_ns))
        });
        of_nodes.and(Lost { events: self.left_out(found), ..Lost::default() })
    }

    /// Events of the evidence's own entities that were left out near it, since they flooded their node.
    fn left_out(&self, found: &Match) -> u64 {
        let mut entities: Vec<_> = found.steps.iter().flatten().map(|noted| &noted.clue.entity).collect();
        entities.sort_unstable_by_key(|entity| (entity.node.id, entity.id));
        entities.dedup_by_key(|entity| (entity.node.id, entity.id));
        let left_out = |entity: &Arc<EntityInfo>| {
            let (from_ns, to_ns) = compose::loss_window(found, entity.node.id);
            let history = self.memory.clues.history(&Joins::entity_key(entity)).into_iter().flatten();
            history
                .filter_map(|noted| match &noted.clue.detail {
                    ClueDetail::Fact(fact) if fact.kind == ClueKind::Gap && fact.text("reason") == FLOOD => {
                        let from = noted.clue.boottime_ns.saturating_sub(fact.number("lasted") + FLOOD_REACH_NS);
                        let is_near = from <= to_ns && noted.clue.boottime_ns.saturating_add(FLOOD_REACH_NS) >= from_ns;
                        is_near.then(|| fact.number("found_gone"))
                    }
                    _ => None,
                })
                .sum::<u64>()
        };
        // That it floods is no less certain for what is missing.
        if found.steps.iter().flatten().all(|noted| noted.clue.kind() == ClueKind::Gap) {
            return 0;
        }
        entities.into_iter().map(left_out).sum()
    }
}
