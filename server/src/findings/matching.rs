//! Does a pattern explain this anchor?
//!
//! What enters: a pattern, an anchor, the history around it. What leaves: the evidence bound to each step. What must hold: the
//! search goes from the anchor backwards, then forwards, the nearest clue first. It looks at no more than [`CANDIDATES_MAX`]
//! clues, so a hostile entity costs bounded time.

use std::sync::Arc;

use super::clue_history::{ClueHistory, HISTORY_MAX};
use super::clue_store::Noted;
use super::field::{Field, Value};
use super::pattern::{PATTERN_STEPS_MAX, Pattern, Same, Step};
use super::plan::Touch;
use crate::correlate::clue::Clue;

/// Clues looked at in one search.
pub const CANDIDATES_MAX: u32 = 8192;

/// What a pattern found.
pub struct Match {
    /// Clues by step, the earliest first; empty where an optional step was not found.
    pub steps: Vec<Vec<Arc<Noted>>>,
    /// Evidence that is required was not found where events were lost.
    pub is_presumed: bool,
}

/// The outcome of a search.
pub enum Outcome {
    Found(Match),
    NotFound,
    /// The search exceeded its limit.
    Exhausted,
}

#[derive(Clone, Copy)]
struct Search<'a> {
    pattern: &'a Pattern,
    history: &'a ClueHistory,
    bound: [Option<&'a Arc<Noted>>; PATTERN_STEPS_MAX],
    budget: u32,
    /// Steps that may be lost count as found.
    presumes: bool,
}

/// When a clue was, by the clock of another one's node.
pub fn time_by(clock: &Clue, clue: &Clue) -> u64 {
    if clock.evidence.node == clue.evidence.node {
        return clue.boottime_ns;
    }
    if clue.realtime_ns >= clock.realtime_ns {
        clock.boottime_ns.saturating_add(clue.realtime_ns - clock.realtime_ns)
    } else {
        clock.boottime_ns.saturating_sub(clock.realtime_ns - clue.realtime_ns)
    }
}

/// Whether a clue that may be a step can change how an anchor is explained.
pub fn may_touch(pattern: &Pattern, touch: &Touch, clue: &Clue, anchor: &Clue) -> bool {
    let is_of_node = clue.evidence.node == anchor.evidence.node;
    let reach = if is_of_node { &touch.reach_on_node } else { &touch.reach };
    let at = time_by(anchor, clue);
    let (from, to) = (at.saturating_sub(reach.before_ns), at.saturating_add(reach.after_ns));
    let mut with_anchor = pattern.steps[touch.step].same.iter().filter(|same| same.other == pattern.anchor);
    (from..=to).contains(&anchor.boottime_ns) && with_anchor.all(|same| is_same(same, clue, anchor))
}

/// Whether a field is the same as another step's.
fn is_same(same: &Same, clue: &Clue, other: &Clue) -> bool {
    if is_of_node(same.field) && clue.evidence.node != other.evidence.node {
        return false;
    }
    match (same.field.get(clue), same.other_field.get(other)) {
        // A container's image, and those of its workload: what had it before as well was not changed by a rollout.
        (Some(Value::Text(images)), Some(Value::Text(image))) if same.other_field == Field::Image => match same.field {
            Field::Images => has_image(images, image) && !is_among(Field::ImagesBefore, clue, image),
            Field::ImagesBefore => has_image(images, image) && !is_among(Field::Images, clue, image),
            _ => images == image,
        },
        (Some(value), Some(other)) => value == other,
        // A name that one of them has not, or not yet, is no difference among those that are counted; between two steps it ties
        // nothing together.
        _ => same.is_own,
    }
}

/// Whether a field's values mean something on their node alone: another node has the same numbers for something else.
fn is_of_node(field: Field) -> bool {
    use Field::{AllocatorPid, Device, Interface, ParentPid, Pid, SenderPid};
    matches!(field, Pid | ParentPid | AllocatorPid | SenderPid | Device | Interface)
}

/// Whether a list of images, with commas between them, has this one.
fn has_image(images: &str, image: &str) -> bool {
    images.split(',').any(|one| one == image)
}

fn is_among(images: Field, clue: &Clue, image: &str) -> bool {
    matches!(images.get(clue), Some(Value::Text(images)) if has_image(images, image))
}

/// Looks for the evidence of a pattern around an anchor.
pub fn explain(pattern: &Pattern, anchor: &Arc<Noted>, history: &ClueHistory, presumes: bool) -> Outcome {
    if !presumes && pattern.lacks_what_may_be_lost(history.present()) {
        return Outcome::NotFound;
    }
    let bound = [None; PATTERN_STEPS_MAX];
    let mut search = Search { pattern, history, bound, budget: CANDIDATES_MAX, presumes };
    search.bound[pattern.anchor] = Some(anchor);
    if search.bind(0)
        && let Some(steps) = search.gather()
    {
        let lacks = |(step, found): (&Step, &Vec<_>)| step.may_be_lost && found.is_empty();
        let is_presumed = pattern.steps.iter().zip(&steps).any(lacks);
        return Outcome::Found(Match { steps, is_presumed });
    }
    if search.budget == 0 { Outcome::Exhausted } else { Outcome::NotFound }
}

/// How far clocks of different nodes may be apart for an order between them still to be believed.
pub const SKEW_NS: u64 = 2_000_000_000;

impl<'a> Search<'a> {
    /// When a clue was, by the clock of the anchor's node since its boot. Clocks of the same node are compared exactly.
    fn time(&self, noted: &Noted) -> u64 {
        match self.bound[self.pattern.anchor] {
            Some(anchor) => time_by(&anchor.clue, &noted.clue),
            None => noted.clue.boottime_ns,
        }
    }

    fn skew(&self, noted: &Noted) -> u64 {
        let is_other = |anchor: &Arc<Noted>| anchor.clue.evidence.node != noted.clue.evidence.node;
        if self.bound[self.pattern.anchor].is_some_and(is_other) { SKEW_NS } else { 0 }
    }

    /// Binds the steps from the `turn`th on: those before the anchor backwards, then those after it.
    fn bind(&mut self, turn: usize) -> bool {
        let anchor = self.pattern.anchor;
        let index = match turn {
            turn if turn < anchor => anchor - 1 - turn,
            turn if turn + 1 < self.pattern.steps.len() => turn + 1,
            _ => return self.has_one() && !self.is_contradicted(),
        };
        let step = &self.pattern.steps[index];
        if step.absent {
            return self.bind(turn + 1);
        }
        for candidate in self.candidates(index) {
            self.bound[index] = Some(candidate);
            if self.bind(turn + 1) {
                return true;
            }
            self.bound[index] = None;
            if self.budget == 0 {
                return false;
            }
        }
        (step.optional || step.may_be_lost && self.presumes) && self.bind(turn + 1)
    }

    /// Whether one of those is found of which one must be.
    fn has_one(&self) -> bool {
        let one_of = &self.pattern.one_of;
        one_of.is_empty() || one_of.iter().any(|&index| self.bound[index].is_some())
    }

    /// The clues that may be a step, the nearest to its bound neighbour first.
    fn candidates(&mut self, index: usize) -> Vec<&'a Arc<Noted>> {
        let step = &self.pattern.steps[index];
        let mut found = Vec::new();
        if !self.history.present().contains(step.number) {
            return found;
        }
        let looked_at = self.history.len().min(self.budget as usize);
        self.budget -= looked_at as u32;
        for noted in self.history.may_be(step.number, looked_at) {
            let is_free = !self.is_bound(noted) || step.may_be_anchor && self.is_anchor(noted);
            if is_free && self.in_time(index, noted) && self.agrees(step, noted) {
                found.push(noted);
            }
        }
        if index < self.pattern.anchor {
            found.sort_by_key(|noted| std::cmp::Reverse((self.time(noted), noted.clue.evidence)));
        } else {
            found.sort_by_key(|noted| (self.time(noted), noted.clue.evidence));
        }
        // Another one says more.
        if step.may_be_anchor {
            found.sort_by_key(|noted| self.is_anchor(noted));
        }
        found
    }

    fn is_anchor(&self, noted: &Arc<Noted>) -> bool {
        self.bound[self.pattern.anchor].is_some_and(|anchor| Arc::ptr_eq(anchor, noted))
    }

    fn is_bound(&self, noted: &Arc<Noted>) -> bool {
        let mut bound = self.bound.iter().flatten();
        bound.any(|bound| Arc::ptr_eq(bound, noted))
    }

    fn in_time(&self, index: usize, noted: &Noted) -> bool {
        let (steps, anchor) = (&self.pattern.steps, self.pattern.anchor);
        let at = self.time(noted);
        let anchor_at = self.bound[anchor].map_or(at, |noted| self.time(noted));
        if at.abs_diff(anchor_at) > self.pattern.window_ns {
            return false;
        }
        let (before, after, later) = if index < anchor {
            let next = (index + 1..=anchor).find(|&next| self.bound[next].is_some());
            let next = next.unwrap_or(anchor);
            (at, self.bound[next].map_or(anchor_at, |noted| self.time(noted)), &steps[next])
        } else {
            let previous = (0..index).rev().find_map(|previous| self.bound[previous]);
            (previous.map_or(anchor_at, |noted| self.time(noted)), at, &steps[index])
        };
        let gap = after.saturating_sub(before);
        before <= after.saturating_add(later.slack_ns).saturating_add(self.skew(noted))
            && later.within_ns.is_none_or(|within| gap <= within)
            && gap >= later.after_at_least_ns
    }

    /// Whether the fields that must be the same are, as far as the other steps are bound.
    fn agrees(&self, step: &Step, noted: &Noted) -> bool {
        step.same.iter().all(|same| match self.bound[same.other] {
            Some(other) => is_same(same, &noted.clue, &other.clue),
            None => true,
        })
    }

    /// Whether a step agrees with another clue in the place of the anchor.
    fn agrees_beside(&self, step: &Step, noted: &Noted, anchor: &Noted) -> bool {
        step.same.iter().all(|same| match self.bound[same.other] {
            _ if same.other == self.pattern.anchor => is_same(same, &noted.clue, &anchor.clue),
            Some(other) => is_same(same, &noted.clue, &other.clue),
            None => true,
        })
    }

    /// Whether what holds for the anchor holds for another clue that is counted with it.
    fn is_like_anchor(&self, noted: &Noted) -> bool {
        let Some(before) = self.pattern.anchor_step().each_after else { return self.holds_for(noted) };
        let mut search = *self;
        search.bound[before] = self.nearest_before(before, noted);
        search.bound[before].is_some() && search.holds_for(noted)
    }

    /// The last clue before this one that may be a step, and agrees with this one in the place of the anchor.
    fn nearest_before(&self, index: usize, noted: &Noted) -> Option<&'a Arc<Noted>> {
        let (at, step) = (self.time(noted), &self.pattern.steps[index]);
        let latest = at.saturating_add(self.pattern.anchor_step().slack_ns).saturating_add(self.skew(noted));
        let earliest = at.saturating_sub(self.pattern.window_ns);
        let with_anchor = step.same.iter().filter(|same| same.other == self.pattern.anchor);
        let agrees = |other: &Noted| with_anchor.clone().all(|same| is_same(same, &other.clue, &noted.clue));
        let fits = |other: &&Arc<Noted>| (earliest..=latest).contains(&self.time(other)) && agrees(other);
        self.history.may_be(step.number, HISTORY_MAX).filter(fits).max_by_key(|other| self.time(other))
    }

    fn holds_for(&self, noted: &Noted) -> bool {
        let bound = self.pattern.steps.iter().zip(&self.bound);
        let mut others = bound.enumerate().filter(|(index, _)| *index != self.pattern.anchor);
        others.all(|(_, (step, bound))| bound.is_none_or(|bound| self.agrees_beside(step, bound, noted)))
            && !self.is_contradicted_for(noted)
    }

    fn is_contradicted(&self) -> bool {
        self.bound[self.pattern.anchor].is_none_or(|anchor| self.is_contradicted_for(anchor))
    }

    /// Whether something is there that must not be beside an anchor.
    fn is_contradicted_for(&self, for_anchor: &Noted) -> bool {
        let anchor = self.pattern.anchor;
        let anchor_at = self.time(for_anchor);
        let steps = self.pattern.steps.iter().enumerate();
        steps.filter(|(_, step)| step.absent && self.history.present().contains(step.number)).any(|(index, step)| {
            let reach = step.within_ns.unwrap_or(self.pattern.window_ns);
            let (from, to) = if index < anchor {
                let after = step.after.and_then(|other| self.bound[other]).map_or(0, |noted| self.time(noted));
                let first = step.before.and_then(|other| self.bound[other..anchor].iter().flatten().next());
                let before = first.map_or(anchor_at, |noted| self.time(noted).min(anchor_at));
                let excuse = step.unless.and_then(|other| self.bound[other]);
                if excuse.is_some_and(|noted| self.time(noted).abs_diff(before) <= step.slack_ns) {
                    return false;
                }
                (anchor_at.saturating_sub(reach).max(after), before.saturating_add(step.slack_ns))
            } else {
                (anchor_at.saturating_sub(step.slack_ns), anchor_at.saturating_add(reach))
            };
            let next = (index + 1..self.bound.len()).find(|&next| step.apart_ns > 0 && self.bound[next].is_some());
            let next_at = next.and_then(|next| match self.bound[next] {
                _ if next == anchor => Some(anchor_at),
                bound => bound.map(|noted| self.time(noted)),
            });
            let is_apart = |at: u64| next_at.is_none_or(|next_at| at.abs_diff(next_at) >= step.apart_ns);
            self.history.may_be(step.number, HISTORY_MAX).any(|noted| {
                let at = self.time(noted);
                (from..=to).contains(&at)
                    && is_apart(at)
                    && !self.is_bound(noted)
                    && !std::ptr::eq(&**noted, for_anchor)
                    && self.agrees_beside(step, noted, for_anchor)
            })
        })
    }

    /// All clues of the steps that are counted, and the bound one of each other; `None` when one was found too rarely.
    fn gather(&self) -> Option<Vec<Vec<Arc<Noted>>>> {
        let mut all = Vec::with_capacity(self.pattern.steps.len());
        for (index, (step, bound)) in self.pattern.steps.iter().zip(&self.bound).enumerate() {
            let mut of_step: Vec<_> = bound.iter().map(|&noted| Arc::clone(noted)).collect();
            if let Some(last) = bound
                && step.is_counted
            {
                let earliest = self.time(last).saturating_sub(self.pattern.window_ns);
                let others = self.history.may_be(step.number, HISTORY_MAX).filter(|noted| {
                    !Arc::ptr_eq(noted, last)
                        && self.time(noted) >= earliest
                        && (self.time(noted), noted.clue.evidence) < (self.time(last), last.clue.evidence)
                        && self.agrees(step, noted)
                        && (index != self.pattern.anchor || self.is_like_anchor(noted))
                });
                of_step.extend(others.cloned());
                of_step.sort_by_key(|noted| (self.time(noted), noted.clue.evidence));
                if count(step, &of_step) < step.count_min as usize && !step.optional {
                    return None;
                }
            }
            all.push(of_step);
        }
        Some(all)
    }
}

/// How often a step was found: different values of a field where that is asked for.
pub fn count(step: &Step, found: &[Arc<Noted>]) -> usize {
    let Some(field) = step.distinct else {
        return found.len();
    };
    let mut values = Vec::new();
    for noted in found {
        if let Some(value) = field.get(&noted.clue)
            && !values.contains(&value)
        {
            values.push(value);
        }
    }
    // What has no such name yet is somebody all the same.
    values.len().max(usize::from(!found.is_empty()))
}
