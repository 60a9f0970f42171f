//! States and their ends: a pod that cannot start is a finding until it starts.
//!
//! What enters: clues that end the state of a pattern, and the findings of such patterns. What leaves: the anchor of the finding
//! that a clue may end, and whether everything that a finding reports has ended. What must hold: an end counts for the container,
//! disk or task that it names, or for the whole entity where it or the finding names none. The order of arrival does not matter.
//! A state that is reported repeatedly is over when its node sends other events and reports it no more, and when its node is
//! deleted.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;

use tapio_wire::event::EntityId;

use super::clue_store::Noted;
use super::field::{Field, Value};
use super::matching::Match;
use super::moment::Moment;
use super::pattern::{Pattern, PatternSet};
use super::schema::Scope;
use crate::correlate::clue::{Clue, ClueDetail, ClueKind};
use crate::correlate::{Generations, NodeClock};

/// Pods and other entities, and their troubles, of which it is remembered how a state of theirs ended, or that it goes on.
const SUBJECTS_MAX: usize = 32_768;
/// Containers and troubles of one subject.
const PARTS_MAX: usize = 32;

/// The number of a pattern's anchor, and whose state it is.
type Key = (usize, EntityId);

/// One state of a subject: of this trouble, where it has one.
type State = (Key, Option<String>);

fn key_of(pattern: &Pattern, clue: &Clue) -> Key {
    (pattern.anchor_step().number, subject_of(pattern, clue))
}

/// What a clue is about, beyond its subject: one of its troubles, one of its containers, or neither.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Part {
    trouble: Option<String>,
    container: Option<Arc<str>>,
}

impl Part {
    fn of(clue: &Clue) -> Self {
        Self { trouble: trouble_of(clue), container: container_of(clue).map(Arc::from) }
    }

    /// Whether a clue about this one may be about the other: what either of them does not name is the whole.
    fn concerns(&self, other: &Self) -> bool {
        fn agree<T: PartialEq>(a: Option<&T>, b: Option<&T>) -> bool {
            a.is_none() || b.is_none() || a == b
        }
        agree(self.trouble.as_ref(), other.trouble.as_ref()) && agree(self.container.as_ref(), other.container.as_ref())
    }
}

/// What a clue is about, and the clue.
type End = (Part, Arc<Noted>);

/// The finding that reports a state.
#[derive(Clone)]
pub struct Open {
    /// Last clue, and the last one of each container of whom this is about.
    pub anchor: Arc<Noted>,
    /// Which trouble of the subject it is.
    trouble: Option<String>,
    members: Vec<Arc<Noted>>,
    pub id: String,
    /// Nanoseconds since 1970.
    pub started_ns: u64,
}

/// Tracks states that go on, and ends their findings.
pub struct Endings {
    /// The latest end of each container and trouble; one of the whole names neither.
    ends: Generations<Key, Vec<End>>,
    /// The findings of a subject, one for each of its troubles.
    anchors: Generations<Key, Vec<Open>>,
    /// States that are reported again and again: when, by the clock of their node.
    heard: HashMap<u64, HashMap<State, u64>>,
    /// The node that reports each of them: what concerns all nodes is reported by another one after an election.
    heard_from: HashMap<State, u64>,
    /// When such a state was found not to be reported any more.
    quiet: Generations<State, Moment>,
}

impl Default for Endings {
    fn default() -> Self {
        Self {
            ends: Generations::new(SUBJECTS_MAX),
            anchors: Generations::new(SUBJECTS_MAX),
            heard: HashMap::new(),
            heard_from: HashMap::new(),
            quiet: Generations::new(SUBJECTS_MAX),
        }
    }
}

/// Returns the subject of a state: the entity where a pattern looks at one entity only, otherwise the pod if there is
/// one.
pub fn subject_of(pattern: &Pattern, clue: &Clue) -> EntityId {
    match clue.entity.pod_id() {
        pod if pod != 0 && pattern.scope != Scope::Entity => pod,
        _ => clue.entity.id,
    }
}

/// When the state of a clue began, nanoseconds since 1970. A trouble is reported some time after it began, as a node's condition is.
pub fn began_ns(clue: &Clue) -> u64 {
    match &clue.detail {
        ClueDetail::Fact(fact) if matches!(fact.kind, ClueKind::Trouble | ClueKind::NodeCondition) => {
            clue.realtime_ns.saturating_sub(fact.number("lasted"))
        }
        _ => clue.realtime_ns,
    }
}

/// The container that a clue names.
pub fn container_of(clue: &Clue) -> Option<&str> {
    match Field::Container.get(clue) {
        Some(Value::Text(name)) => Some(name),
        _ => None,
    }
}

/// Which of an entity's troubles a clue is about. An entity may have several full disks, hanging tasks and conditions at once.
pub fn trouble_of(clue: &Clue) -> Option<String> {
    let ClueDetail::Fact(fact) = &clue.detail else { return None };
    if fact.kind == ClueKind::ObjectState && fact.text("object_kind") == "Pod" {
        return Some(fact.text("state").to_owned());
    }
    if fact.kind != ClueKind::Trouble {
        return None;
    }
    match fact.text("what") {
        what @ ("disk-full" | "inodes-full" | "disk-filling" | "inodes-filling") => {
            Some(format!("{what} {}", fact.text("place")))
        }
        "blocked" | "unkillable" => Some(format!("task {}", clue.pid)),
        _ => None,
    }
}

/// The part of an entity that a clue is about, where it names one.
pub fn part_of(clue: &Clue) -> Option<Cow<'_, str>> {
    trouble_of(clue).map(Cow::Owned).or_else(|| container_of(clue).map(Cow::Borrowed))
}

/// What has ended a finding's state.
pub struct Ended {
    /// Nanoseconds since 1970.
    pub at_ns: u64,
    pub by: Vec<Arc<Noted>>,
}

/// The pods, or other entities, whose state a finding reports, and their containers where they are named; each with the last clue
/// that reported it.
pub fn members(pattern: &Pattern, found: &Match) -> Vec<Arc<Noted>> {
    let mut members: Vec<Arc<Noted>> = Vec::new();
    for noted in found.steps[pattern.anchor].iter().rev() {
        let (subject, part) = (subject_of(pattern, &noted.clue), Part::of(&noted.clue));
        let is_known =
            |known: &Arc<Noted>| subject_of(pattern, &known.clue) == subject && Part::of(&known.clue) == part;
        if !members.iter().any(is_known) {
            members.push(Arc::clone(noted));
        }
    }
    members
}

impl Endings {
    /// Notes a clue for each pattern whose state it ends. Returns the anchors that are to be looked at again.
    pub fn note(&mut self, patterns: &PatternSet, noted: &Arc<Noted>) -> Vec<Arc<Noted>> {
        let mut touched = Vec::new();
        for pattern in patterns.of_steps(&noted.mask).filter(|pattern| pattern.is_ended_by(&noted.mask)) {
            let (key, part) = (key_of(pattern, &noted.clue), Part::of(&noted.clue));
            let of_it = self.anchors.get(&key).into_iter().flatten();
            let open: Vec<&Open> = of_it
                .filter(|open| open.trouble.is_none() || part.trouble.is_none() || open.trouble == part.trouble)
                .collect();
            let going: Vec<Arc<Noted>> =
                open.iter().filter(|open| self.goes_on(pattern, open)).map(|open| Arc::clone(&open.anchor)).collect();
            // All have ended: another end later is none of these states.
            if going.is_empty() && !open.is_empty() {
                continue;
            }
            touched.extend(going);
            let ends = self.ends.entry(key, Vec::new);
            match ends.iter().position(|(known, _)| *known == part) {
                Some(known) if Moment::of(&ends[known].1.clue).is_before(Moment::of(&noted.clue)) => {
                    ends[known].1 = Arc::clone(noted);
                }
                None if ends.len() < PARTS_MAX => ends.push((part, Arc::clone(noted))),
                _ => {}
            }
        }
        touched
    }

    /// Notes which clues a finding of a state rests on. Its last clue is looked at again when one of them ends.
    ///
    /// Returns the other findings of the same state that did not end, and when the first of all of them was, nanoseconds
    /// since 1970. This finding replaces them: the clues that they rested on are forgotten.
    pub fn watch(
        &mut self,
        pattern: &Pattern,
        anchor: &Arc<Noted>,
        id: &str,
        members: &[Arc<Noted>],
    ) -> (Vec<Open>, Option<u64>) {
        let mut first_ns = members.iter().map(|member| began_ns(&member.clue)).min();
        let mut replaced: Vec<Open> = Vec::new();
        for member in members {
            let trouble = trouble_of(&member.clue);
            let open = self.open(&key_of(pattern, &member.clue), trouble.as_deref()).cloned();
            if let Some(open) = open.filter(|open| open.id == id || self.goes_on(pattern, open)) {
                first_ns = first_ns.min(Some(open.started_ns));
                if open.id != id && !replaced.iter().any(|known| known.id == open.id) {
                    replaced.push(open);
                }
            }
        }
        for member in members {
            let (key, trouble) = (key_of(pattern, &member.clue), trouble_of(&member.clue));
            let is_of = |other: &&Arc<Noted>| key_of(pattern, &other.clue) == key && trouble_of(&other.clue) == trouble;
            let (anchor, members) = (Arc::clone(anchor), members.iter().filter(is_of).cloned().collect());
            let started_ns = first_ns.unwrap_or(0);
            let open = Open { anchor, trouble: trouble.clone(), members, id: id.to_owned(), started_ns };
            let of_subject = self.anchors.entry(key, Vec::new);
            of_subject.retain(|known| known.trouble != trouble);
            if of_subject.len() == PARTS_MAX {
                of_subject.remove(0);
            }
            of_subject.push(open);
            if pattern.quiet_ns.is_some() && self.ended(pattern, std::slice::from_ref(member)).is_none() {
                self.hear((key, trouble), &member.clue);
            }
        }
        (replaced, first_ns)
    }

    fn open(&self, key: &Key, trouble: Option<&str>) -> Option<&Open> {
        self.anchors.get(key)?.iter().find(|open| open.trouble.as_deref() == trouble)
    }

    fn hear(&mut self, state: State, clue: &Clue) {
        let node = clue.evidence.node;
        match self.heard_from.get(&state).copied() {
            Some(before) if before != node => self.forget(before, &state),
            None if self.heard_from.len() >= SUBJECTS_MAX => return,
            _ => {}
        }
        self.heard_from.insert(state.clone(), node);
        let at = self.heard.entry(node).or_default().entry(state).or_insert(clue.boottime_ns);
        *at = clue.boottime_ns.max(*at);
    }

    fn forget(&mut self, node: u64, state: &State) {
        if let Some(of_node) = self.heard.get_mut(&node) {
            of_node.remove(state);
            if of_node.is_empty() {
                self.heard.remove(&node);
            }
        }
        self.heard_from.remove(state);
    }

    /// The node is deleted at this moment: the states that it was the last to report, which are over by that. Each is handed out once.
    pub fn of_deleted(&mut self, node: u64, at: Moment) -> Vec<Open> {
        let mut states: Vec<State> =
            self.heard.get(&node).into_iter().flatten().map(|(state, _)| state.clone()).collect();
        states.sort_unstable();
        let mut over = Vec::new();
        for state in states {
            let open = self.open(&state.0, state.1.as_deref()).cloned();
            // It may have been made anew since.
            let is_later = |member: &Arc<Noted>| !at.may_end(Moment::of(&member.clue));
            if open.as_ref().is_none_or(|open| !open.members.iter().any(is_later)) {
                self.forget(node, &state);
                self.quiet.insert(state, at);
                over.extend(open);
            }
        }
        over
    }

    /// A node goes on, by its clock: states that it does not report any more, which are over by that. Each is handed out once.
    pub fn quiet(&mut self, patterns: &PatternSet, clock: &NodeClock) -> Vec<Open> {
        let (node, now_ns) = (clock.node.id, clock.boottime_ns);
        let Some(of_node) = self.heard.get_mut(&node) else { return Vec::new() };
        let quiet_ns = |number: usize| {
            let of_it = patterns.patterns().iter().find(|pattern| pattern.anchor_step().number == number);
            of_it.and_then(|pattern| pattern.quiet_ns).unwrap_or(u64::MAX)
        };
        let mut over = Vec::new();
        of_node.retain(|key, at| {
            // The node was restarted, and its clock with it.
            *at = now_ns.min(*at);
            let is_over = now_ns - *at > quiet_ns(key.0.0);
            if is_over {
                over.push(key.clone());
            }
            !is_over
        });
        over.sort_unstable();
        if of_node.is_empty() {
            self.heard.remove(&node);
        }
        for key in &over {
            self.heard_from.remove(key);
            self.quiet.insert(key.clone(), Moment::by(clock));
        }
        over.iter().filter_map(|(key, trouble)| self.open(key, trouble.as_deref())).cloned().collect()
    }

    fn goes_on(&self, pattern: &Pattern, open: &Open) -> bool {
        self.ended(pattern, &open.members).is_none()
    }

    /// How the state of all of these ended; [`None`] while one goes on.
    pub fn ended(&self, pattern: &Pattern, members: &[Arc<Noted>]) -> Option<Ended> {
        let (mut by, mut at_ns) = (Vec::with_capacity(members.len()), 0);
        for member in members {
            let (key, part) = (key_of(pattern, &member.clue), Part::of(&member.clue));
            let reported = Moment::of(&member.clue);
            let of_it = self.ends.get(&key).into_iter().flatten();
            let of_it = of_it.filter(|(of, end)| of.concerns(&part) && Moment::of(&end.clue).may_end(reported));
            match of_it.min_by_key(|(_, end)| end.clue.realtime_ns) {
                Some((_, end)) => by.push(Arc::clone(end)),
                None => {
                    let quiet = self.quiet.get(&(key, part.trouble)).filter(|quiet| quiet.may_end(reported))?;
                    at_ns = at_ns.max(quiet.realtime_ns);
                }
            }
        }
        by.sort_by_key(|end| (end.clue.realtime_ns, end.clue.evidence));
        by.dedup_by(|a, b| Arc::ptr_eq(a, b));
        let at_ns = by.last().map_or(0, |end| end.clue.realtime_ns).max(at_ns);
        (at_ns > 0).then_some(Ended { at_ns, by })
    }
}
