//! Which anchors a clue makes be looked at again.
//!
//! What enters: a clue that was noted, and the plan of the steps that it may be. What leaves: anchors. What must hold: evidence that
//! comes after its anchor makes that be looked at again, so the order of arrival does not matter; no more than [`REVISITED_MAX`].

use std::sync::Arc;

use super::clue_store::Noted;
use super::compose;
use super::joins::Joins;
use super::matching;
use super::pattern::PatternSet;
use super::plan::{Plan, Touch, Touches};
use super::worker::Worker;
use crate::correlate::clue::ClueKind;

/// Anchors that one late clue makes be looked at again.
const REVISITED_MAX: usize = 64;

impl Worker {
    /// The anchors whose explanation may change by a clue, in the order of time: itself, and those that it may be a step of.
    pub(super) fn anchors_touched(&self, patterns: &PatternSet, noted: &Arc<Noted>, plan: &Plan) -> Vec<Arc<Noted>> {
        let mut touched: Vec<Arc<Noted>> = Vec::new();
        if !plan.anchors.is_empty() {
            touched.push(Arc::clone(noted));
        }
        for around in &plan.around {
            for key in &*self.memory.joins.keys(&noted.clue, around.scope) {
                let Some(history) = self.memory.clues.history(key) else { continue };
                let may_touch = |touches: &Touches, other: &Arc<Noted>| {
                    let is_anchor = |touch: &&Touch| other.mask.contains(touch.anchor);
                    !Arc::ptr_eq(noted, other)
                        && touches.all.iter().filter(is_anchor).any(|touch| {
                            let pattern = &patterns.patterns()[touch.pattern];
                            matching::may_touch(pattern, touch, &noted.clue, &other.clue)
                        })
                };
                let of_process = history.of_process(noted.clue.pid, &around.of_process.anchors);
                touched.extend(of_process.filter(|other| may_touch(&around.of_process, other)).cloned());
                let of_any = history.may_be_one_of(&around.of_any.anchors);
                touched.extend(of_any.filter(|other| may_touch(&around.of_any, other)).cloned());
            }
        }
        // What Kubernetes says of a death, and what was observed at it, belong to its certificate.
        let of_deaths = [ClueKind::ContainerState, ClueKind::Observation, ClueKind::CgroupUse, ClueKind::LogLines];
        if of_deaths.contains(&noted.clue.kind()) {
            let history = self.memory.clues.history(&Joins::entity_key(&noted.clue.entity));
            let deaths = history.into_iter().flat_map(|history| history.of_kind(ClueKind::Exit)).filter(|other| {
                other.clue.is_lead()
                    && matching::time_by(&other.clue, &noted.clue).abs_diff(other.clue.boottime_ns)
                        <= compose::LABEL_REACH_NS
            });
            touched.extend(deaths.cloned());
        }
        touched.sort_by_key(|noted| (noted.clue.realtime_ns, noted.clue.evidence));
        touched.dedup_by(|a, b| Arc::ptr_eq(a, b));
        let surplus = touched.len().saturating_sub(REVISITED_MAX);
        touched.drain(..surplus);
        touched
    }
}
