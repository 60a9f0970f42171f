//! Patterns, checked and ready to be matched.
//!
//! What must hold: every step, field and place of a pattern in a [`PatternSet`] exists; all steps fit into a [`StepMask`].

use std::cmp::Ordering;
use std::time::Duration;

use tapio_wire::program::yaml::TextPosition;

use super::field::{Field, Value};
use super::load::{OwnPattern, PatternError};
use super::schema::{Scalar, Scope, Severity};
use super::step_mask::{STEPS_MAX, StepMask};
use super::template::Template;
use crate::correlate::clue::{About, Burst, Clue, ClueDetail, ClueKind, ClueKinds};

/// Steps of one pattern.
pub const PATTERN_STEPS_MAX: usize = 10;

/// A condition on a field.
#[derive(Clone, Debug, PartialEq)]
pub struct Condition {
    pub field: Field,
    pub one_of: Vec<Scalar>,
    pub not: Vec<Scalar>,
    /// The text begins with one of these; none for any.
    pub starts: Vec<String>,
    /// Words of which the value must contain one; none for any.
    pub contains: Vec<String>,
    pub range: std::ops::RangeInclusive<u64>,
    /// Whether a clue without the field passes: it does when only `not` is asked.
    pub allows_missing: bool,
}

impl Condition {
    fn holds(&self, clue: &Clue) -> bool {
        let Some(value) = self.field.get(clue) else { return self.allows_missing };
        let is = |scalar: &Scalar| match (scalar, value) {
            (Scalar::Number(a), Value::Number(b)) => *a == b,
            (Scalar::Flag(a), Value::Flag(b)) => *a == b,
            (Scalar::Text(a), Value::Text(b)) => a == b,
            _ => false,
        };
        let in_range = match value {
            Value::Number(number) => self.range.contains(&number),
            _ => true,
        };
        let has = match value {
            Value::Text(text) => {
                (self.starts.is_empty() || self.starts.iter().any(|start| text.starts_with(&**start)))
                    && (self.contains.is_empty() || self.contains.iter().any(|part| text.contains(&**part)))
            }
            _ => true,
        };
        in_range && has && (self.one_of.is_empty() || self.one_of.iter().any(is)) && !self.not.iter().any(is)
    }
}

/// A field that must equal another step's.
#[derive(Debug)]
pub struct Same {
    pub field: Field,
    pub other: usize,
    pub other_field: Field,
    /// The other is the step itself: all that are counted have the field in common.
    pub is_own: bool,
}

/// One step.
#[derive(Debug)]
pub struct Step {
    pub name: String,
    pub kind: ClueKind,
    /// Number among the steps of all patterns.
    pub number: usize,
    pub conditions: Vec<Condition>,
    pub same: Vec<Same>,
    pub within_ns: Option<u64>,
    pub after_at_least_ns: u64,
    pub apart_ns: u64,
    pub after: Option<usize>,
    pub before: Option<usize>,
    pub unless: Option<usize>,
    pub slack_ns: u64,
    pub count_min: u32,
    /// All of its clues are gathered, not only the nearest.
    pub is_counted: bool,
    /// Counted are different values of this field.
    pub distinct: Option<Field>,
    /// Each counted clue, and not only the last one, is after this step.
    pub each_after: Option<usize>,
    pub optional: bool,
    pub may_be_lost: bool,
    pub may_be_anchor: bool,
    pub absent: bool,
    /// Taken off the confidence when it was not found.
    pub minus: f64,
}

/// One pattern.
#[derive(Debug)]
pub struct Pattern {
    pub id: String,
    pub title: Template,
    pub summary: Template,
    pub verdict: Template,
    pub severity: Severity,
    pub priority: u32,
    pub window_ns: u64,
    pub scope: Scope,
    pub steps: Vec<Step>,
    pub anchor: usize,
    pub confidence: f64,
    pub confidence_loss: f64,
    pub advice: Vec<Template>,
    /// Steps of which one must be found.
    pub one_of: Vec<usize>,
    /// The steps that must be there, the anchor and those that may be lost aside.
    pub required: StepMask,
    /// Patterns whose findings are consequences, and by what they hang together.
    pub absorbs: Vec<(String, Scope)>,
    /// The patterns, by their places in the set, whose findings this one's are consequences of, and by what they hang together.
    pub absorbed_by: Vec<(usize, Scope)>,
    /// The anchors of those, and of the patterns that it absorbs.
    pub roots: StepMask,
    pub consequences: StepMask,
    pub fold: bool,
    /// What ends the state that it reports; none when it reports a moment.
    pub ends: Vec<Step>,
    /// A finding is also over when it was not reported for this long.
    pub quiet_ns: Option<u64>,
}

/// How long before a clue, and how long after it, an anchor may be that it belongs to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reach {
    pub before_ns: u64,
    pub after_ns: u64,
}

impl Pattern {
    /// Returns the anchor.
    pub fn anchor_step(&self) -> &Step {
        &self.steps[self.anchor]
    }

    /// How far a clue that is this step may be from the anchors that it affects; `None` where the step is the anchor.
    pub fn reach_of(&self, index: usize, disorder_ns: u64) -> Option<Reach> {
        let step = self.steps.get(index)?;
        // Steps follow one another, but for their slack and, where nodes differ, their clocks: a step before the anchor can
        // be little after it, and the other way round. Of anchors that are counted the later take the earlier with them. What
        // is counted after an anchor may begin before it.
        let (before_ns, after_ns) = match index.cmp(&self.anchor) {
            Ordering::Less => (disorder_ns, self.window_ns),
            Ordering::Equal if !step.is_counted => return None,
            Ordering::Equal => (0, self.window_ns),
            Ordering::Greater if step.is_counted => (self.window_ns, self.window_ns),
            Ordering::Greater => (self.window_ns, disorder_ns),
        };
        Some(Reach { before_ns: before_ns.min(self.window_ns), after_ns: after_ns.min(self.window_ns) })
    }

    /// Whether it takes several anchors together.
    pub fn gathers(&self) -> bool {
        self.anchor_step().is_counted
    }

    /// How many anchors it takes at least; where it counts different values of a field, one may have them all.
    pub fn anchors_min(&self) -> usize {
        let step = self.anchor_step();
        if step.distinct.is_some() { 1 } else { step.count_min.max(1) as usize }
    }

    /// Whether it reports a state, which has an end, and not a moment.
    pub fn is_state(&self) -> bool {
        !self.ends.is_empty()
    }

    /// Whether a clue that may be these steps ends its state.
    pub fn is_ended_by(&self, mask: &StepMask) -> bool {
        self.ends.iter().any(|end| mask.contains(end.number))
    }

    /// Whether every step that must be there, the anchor aside, is among these, or may have been lost.
    pub fn may_be_in(&self, present: &StepMask) -> bool {
        present.contains_all(&self.required)
    }

    /// Whether a step that may have been lost, and else must be there, is not among these.
    pub fn lacks_what_may_be_lost(&self, present: &StepMask) -> bool {
        self.steps.iter().any(|step| step.may_be_lost && !present.contains(step.number))
    }

    /// Whether it can match where evidence was lost.
    pub fn may_presume(&self) -> bool {
        self.steps.iter().any(|step| step.may_be_lost)
    }
}

/// What the steps of one kind of clue ask for. Many ask the same, which is looked at once.
#[derive(Debug, Default)]
struct Rules {
    steps: StepMask,
    /// Conditions with the steps that ask for them; the most common one comes first.
    asked: Vec<(Condition, StepMask)>,
}

impl Rules {
    fn add(&mut self, step: &Step) {
        self.steps.insert(step.number);
        for condition in &step.conditions {
            let known = self.asked.iter().position(|(known, _)| known == condition);
            let place = known.unwrap_or_else(|| {
                self.asked.push((condition.clone(), StepMask::default()));
                self.asked.len() - 1
            });
            self.asked[place].1.insert(step.number);
        }
    }

    /// The steps whose conditions all hold.
    fn admitted(&self, clue: &Clue) -> StepMask {
        let mut admitted = self.steps;
        for (condition, steps) in &self.asked {
            if admitted.intersects(steps) && !condition.holds(clue) {
                admitted.remove_all(steps);
            }
        }
        admitted
    }
}

/// All patterns, the highest priority first.
#[derive(Debug)]
pub struct PatternSet {
    pub(super) own: Vec<OwnPattern>,
    patterns: Vec<Pattern>,
    kinds: ClueKinds,
    by_kind: Vec<Rules>,
    /// The anchors of all patterns.
    anchors: StepMask,
    /// The steps of each scope, in the order of [`Scope::ALL`].
    by_scope: [StepMask; Scope::ALL.len()],
    /// Pattern of each step and the step's place in it (`usize::MAX` of an end), by the step's number.
    by_step: Vec<(usize, usize)>,
}

impl PatternSet {
    pub(super) fn assemble(mut patterns: Vec<Pattern>) -> Result<Self, PatternError> {
        patterns.sort_by(|a, b| b.priority.cmp(&a.priority).then_with(|| a.id.cmp(&b.id)));
        let (mut number, mut kinds, mut by_step) = (0, Vec::new(), Vec::new());
        let mut anchors = StepMask::default();
        let mut by_scope = [StepMask::default(); Scope::ALL.len()];
        let mut by_kind: Vec<Rules> = ClueKind::ALL.iter().map(|_| Rules::default()).collect();
        for (index, pattern) in patterns.iter_mut().enumerate() {
            if number + pattern.steps.len() + pattern.ends.len() > STEPS_MAX {
                return Err(PatternError {
                    file: format!("{}.yaml", pattern.id),
                    place: TextPosition::default(),
                    reason: format!("all patterns together have more than {STEPS_MAX} steps"),
                });
            }
            for (place, step) in pattern.steps.iter_mut().enumerate() {
                step.number = number;
                kinds.push(step.kind);
                by_kind[step.kind as usize].add(step);
                by_scope[pattern.scope as usize].insert(number);
                by_step.push((index, place));
                if place == pattern.anchor {
                    anchors.insert(number);
                }
                if place != pattern.anchor && !(step.optional || step.absent || step.may_be_lost) {
                    pattern.required.insert(number);
                }
                number += 1;
            }
            for end in &mut pattern.ends {
                end.number = number;
                kinds.push(end.kind);
                by_kind[end.kind as usize].add(end);
                by_step.push((index, usize::MAX));
                number += 1;
            }
        }
        for rules in &mut by_kind {
            rules.asked.sort_by_key(|(_, steps)| std::cmp::Reverse(steps.numbers().count()));
        }
        Self::join(&mut patterns);
        // Death certificates, and who hangs together with whom, need these, whether a pattern asks for them or not.
        kinds.extend(ALWAYS);
        let kinds = kinds.into_iter().collect();
        Ok(Self { own: Vec::new(), patterns, kinds, by_kind, anchors, by_scope, by_step })
    }

    /// Sets for each pattern which ones absorb it.
    fn join(patterns: &mut [Pattern]) {
        let of = |pattern: &Pattern| (pattern.id.clone(), pattern.anchor_step().number, pattern.absorbs.clone());
        let all: Vec<_> = patterns.iter().map(of).collect();
        for pattern in patterns {
            for (index, (id, anchor, absorbs)) in all.iter().enumerate() {
                if let Some((_, scope)) = absorbs.iter().find(|(absorbed, _)| *absorbed == pattern.id) {
                    pattern.absorbed_by.push((index, *scope));
                    pattern.roots.insert(*anchor);
                }
                if pattern.absorbs.iter().any(|(absorbed, _)| absorbed == id) {
                    pattern.consequences.insert(*anchor);
                }
            }
        }
    }

    /// The patterns, the highest priority first.
    pub fn patterns(&self) -> &[Pattern] {
        &self.patterns
    }

    /// The patterns that have one of these steps, or end by it, the highest priority first.
    pub fn of_steps(&self, mask: &StepMask) -> impl Iterator<Item = &Pattern> {
        let mut last = None;
        mask.numbers().filter_map(move |number| {
            let &(index, _) = self.by_step.get(number)?;
            let is_new = last != Some(index);
            last = Some(index);
            is_new.then(|| &self.patterns[index])
        })
    }

    /// Whether a clue that may be these steps is the anchor of a pattern.
    pub fn has_anchor(&self, mask: &StepMask) -> bool {
        mask.intersects(&self.anchors)
    }

    /// Lists these steps by the place of the pattern in the set and the step's place in the pattern, without ends.
    pub fn places(&self, mask: &StepMask) -> impl Iterator<Item = (usize, usize)> {
        let places = mask.numbers().filter_map(|number| self.by_step.get(number).copied());
        places.filter(|&(pattern, step)| step < self.patterns[pattern].steps.len())
    }

    /// The clues that are wanted.
    pub fn kinds(&self) -> ClueKinds {
        self.kinds
    }

    /// Whether a pattern, or a death certificate, can use a clue.
    pub fn wants(&self, clue: &Clue) -> bool {
        if let ClueDetail::Burst(Burst { about: About::Peer { .. }, .. }) = &clue.detail {
            // Who is at the other end is found out later.
            return !self.by_kind[clue.kind() as usize].steps.is_empty();
        }
        self.wants_with(clue.kind(), || self.mask(clue))
    }

    /// [`PatternSet::wants`] of a clue that may be these steps.
    pub fn wants_with(&self, kind: ClueKind, mask: impl FnOnce() -> StepMask) -> bool {
        ALWAYS.contains(&kind) && kind != ClueKind::Exit || !mask().is_empty()
    }

    /// How far back the pattern with the longest memory looks.
    pub fn window_max(&self) -> Duration {
        Duration::from_nanos(self.patterns.iter().map(|pattern| pattern.window_ns).max().unwrap_or(0))
    }

    /// The steps that a clue may be.
    pub fn mask(&self, clue: &Clue) -> StepMask {
        self.by_kind[clue.kind() as usize].admitted(clue)
    }

    /// The scopes in which a clue that may be these steps is noted; its entity's own always.
    pub fn scopes(&self, mask: &StepMask) -> impl Iterator<Item = Scope> + '_ {
        let mask = *mask;
        Scope::ALL.into_iter().filter(move |&scope| scope == Scope::Entity || self.is_in(&mask, scope))
    }

    /// Whether a clue that may be these steps may be evidence in a pattern of this scope.
    pub fn is_in(&self, mask: &StepMask, scope: Scope) -> bool {
        mask.intersects(&self.by_scope[scope as usize])
    }
}

/// Clues that are wanted whatever the patterns are.
const ALWAYS: [ClueKind; 8] = [
    ClueKind::Exit,
    ClueKind::Oom,
    ClueKind::Kill,
    ClueKind::ContainerState,
    ClueKind::Endpoints,
    ClueKind::Observation,
    ClueKind::CgroupUse,
    ClueKind::LogLines,
];

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tapio_wire::event::{EntityKind, Role};

    use super::*;
    use crate::correlate::clue::{EvidenceId, Exit, NsPid};
    use crate::correlate::{EntityInfo, NodeRef};

    #[test]
    fn a_clue_may_be_the_steps_whose_conditions_all_hold() {
        let patterns = PatternSet::embedded().expect("embedded patterns are valid");
        let node = NodeRef::named("n");
        let mut differ = std::collections::HashSet::new();
        for variant in 0..64_u32 {
            let kind = (variant & 1 != 0).then_some(EntityKind::Container);
            let role = if variant & 2 != 0 { Role::First } else { Role::Member };
            let clue = Clue {
                entity: Arc::new(EntityInfo { kind, ..EntityInfo::unknown(&node, 7) }),
                pid: 5,
                boottime_ns: 9,
                realtime_ns: 9,
                evidence: EvidenceId { node: node.id, epoch: 1, seq: 1, index: 0 },
                detail: ClueDetail::Exit(Exit {
                    comm: "x".into(),
                    parent_pid: 1,
                    ns: NsPid { pid: 1, level: 1 },
                    status: [0, 9, 11, 15, 1 << 8, 137 << 8, 143 << 8, 127 << 8][(variant >> 3) as usize],
                    start_time_ns: 1,
                    oom_score_adj: if variant & 4 != 0 { -999 } else { 0 },
                    role,
                }),
            };
            let all = patterns.patterns().iter().flat_map(|pattern| pattern.steps.iter().chain(&pattern.ends));
            let admits =
                |step: &&Step| step.kind == clue.kind() && step.conditions.iter().all(|rule| rule.holds(&clue));
            let slow: Vec<usize> = all.filter(admits).map(|step| step.number).collect();
            assert_eq!(patterns.mask(&clue).numbers().collect::<Vec<_>>(), slow);
            differ.insert(slow);
        }
        assert!(differ.len() > 8, "{}", differ.len());
    }

    #[test]
    fn steps_give_their_patterns_each_once_and_in_order() {
        let patterns = PatternSet::embedded().expect("embedded patterns are valid");
        let mut mask = StepMask::default();
        assert_eq!(patterns.of_steps(&mask).count(), 0);
        for number in [0, 1, 63, 64, 65, 127, 200] {
            mask.insert(number);
        }
        assert_eq!(mask.numbers().collect::<Vec<_>>(), [0, 1, 63, 64, 65, 127, 200]);
        let has_one =
            |pattern: &&Pattern| pattern.steps.iter().chain(&pattern.ends).any(|step| mask.contains(step.number));
        let slow: Vec<&str> = patterns.patterns().iter().filter(has_one).map(|pattern| &*pattern.id).collect();
        let fast: Vec<&str> = patterns.of_steps(&mask).map(|pattern| &*pattern.id).collect();
        assert_eq!(fast, slow);
    }
}
