//! Whose explanation a clue may change, by the steps that it may be.
//!
//! What enters: a set of steps. What leaves: the patterns of which it is the anchor, and where the anchors are of which it may be
//! another step. What must hold: it follows from the patterns alone, so it is worked out once for each set. The clue could not
//! change the explanation of an anchor that is left out.

use std::sync::Arc;

use super::field::Field;
use super::matching::SKEW_NS;
use super::pattern::{Pattern, PatternSet, Reach, Step};
use super::schema::Scope;
use super::step_mask::StepMask;
use crate::correlate::Generations;
use crate::correlate::clue::ClueKind;

/// Sets of steps whose plans are kept: clues of one kind differ in few ways.
const PLANS_MAX: usize = 4096;

/// One step that the clue may be, beside an anchor.
#[derive(Debug)]
pub struct Touch {
    /// The pattern's place in the set, and the step's in the pattern.
    pub pattern: usize,
    pub step: usize,
    /// The number of the pattern's anchor.
    pub anchor: usize,
    pub reach: Reach,
    /// Where the anchor is of the same node as the clue.
    pub reach_on_node: Reach,
}

/// Steps, and their anchors together.
#[derive(Debug, Default)]
pub struct Touches {
    pub anchors: StepMask,
    pub all: Vec<Touch>,
}

/// What there is to look for in the histories of one scope.
#[derive(Debug)]
pub struct Around {
    pub scope: Scope,
    /// Anchors of the same process.
    pub of_process: Touches,
    pub of_any: Touches,
}

/// What a clue that may be certain steps may change.
#[derive(Debug)]
pub struct Plan {
    /// The patterns of which it is the anchor, by their places in the set: the highest priority first.
    pub anchors: Vec<usize>,
    pub around: Vec<Around>,
    /// True if the clue ends the states of a pattern.
    pub ends: bool,
}

impl Plan {
    fn new(patterns: &PatternSet, mask: &StepMask) -> Self {
        let mut plan = Self { anchors: Vec::new(), around: Vec::new(), ends: false };
        plan.ends = patterns.of_steps(mask).any(|pattern| pattern.is_ended_by(mask));
        for (place, index) in patterns.places(mask) {
            let pattern = &patterns.patterns()[place];
            if index == pattern.anchor {
                plan.anchors.push(place);
            }
            let reach_by = |is_on_node| pattern.reach_of(index, disorder_ns(pattern, index, is_on_node));
            let Some((reach, reach_on_node)) = reach_by(false).zip(reach_by(true)) else { continue };
            let known = plan.around.iter().position(|around| around.scope == pattern.scope);
            let around = known.unwrap_or_else(|| {
                let (of_process, of_any) = (Touches::default(), Touches::default());
                plan.around.push(Around { scope: pattern.scope, of_process, of_any });
                plan.around.len() - 1
            });
            let around = &mut plan.around[around];
            let is_of_process = pattern.steps[index].same.iter().any(|same| {
                same.other == pattern.anchor
                    && !same.is_own
                    && (same.field, same.other_field) == (Field::Pid, Field::Pid)
            });
            let touches = if is_of_process { &mut around.of_process } else { &mut around.of_any };
            let anchor = pattern.anchor_step().number;
            touches.anchors.insert(anchor);
            touches.all.push(Touch { pattern: place, step: index, anchor, reach, reach_on_node });
        }
        plan
    }
}

/// Computes by how much a step and the anchor may come in the wrong order. It is the slack of each step between them,
/// and how far the clocks of nodes may be apart. `is_on_node`: the clue is of the anchor's node.
fn disorder_ns(pattern: &Pattern, index: usize, is_on_node: bool) -> u64 {
    let (steps, anchor) = (&pattern.steps, pattern.anchor);
    if steps[index].absent {
        // Compared with the anchor alone.
        return steps[index].slack_ns;
    }
    let (compared, later) = if index < anchor {
        (index..anchor, index + 1..anchor + 1)
    } else {
        (anchor + 1..index + 1, anchor + 1..index + 1)
    };
    let slack_ns = steps[later].iter().fold(0_u64, |sum, step| sum.saturating_add(step.slack_ns));
    let may_be_elsewhere = |place: &usize| match is_on_node {
        true => *place != index && !is_of_the_node(pattern, &steps[*place]),
        false => true,
    };
    let clocks = compared.filter(may_be_elsewhere).count() as u64;
    slack_ns.saturating_add(SKEW_NS.saturating_mul(clocks))
}

/// Whether a step comes from the node of the anchor in any case: a pod is on one node, and what its kernel says comes from there.
fn is_of_the_node(pattern: &Pattern, step: &Step) -> bool {
    let is_kernels =
        matches!(step.kind, ClueKind::Exec | ClueKind::Exit | ClueKind::Oom | ClueKind::Kill | ClueKind::Delivered);
    !matches!(pattern.scope, Scope::Workload | Scope::Service) && (is_kernels || step.kind.is_burst())
}

/// Plans by the steps that a clue may be.
pub struct Plans {
    known: Generations<StepMask, Arc<Plan>>,
}

impl Default for Plans {
    fn default() -> Self {
        Self { known: Generations::new(PLANS_MAX) }
    }
}

impl Plans {
    /// The plan of a clue that may be these steps.
    pub fn of(&mut self, patterns: &PatternSet, mask: &StepMask) -> Arc<Plan> {
        Arc::clone(self.known.entry(*mask, || Arc::new(Plan::new(patterns, mask))))
    }
}
