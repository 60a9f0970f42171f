//! States and their ends: a pod that cannot start is a finding until it starts.
//!
//! What enters: signals that end the state that a pattern tells of, and the findings of such patterns. What leaves: the anchor of
//! the finding that a signal may end, and whether all that a finding tells of has ended. What must hold: an end counts for the
//! container that it names, or for the whole pod where it or the finding names none; the order of arrival does not matter.

use std::sync::Arc;

use tapio_wire::event::EntityId;

use super::field::{Field, Value};
use super::history::Noted;
use super::matching::{Match, SKEW_NS};
use super::pattern::{Pattern, PatternSet};
use super::schema::Scope;
use crate::correlate::Generations;
use crate::correlate::signal::Signal;

/// Pods and other entities of which it is remembered how a state of theirs ended, or that it goes on.
const SUBJECTS_MAX: usize = 32_768;
/// Containers of a pod.
const CONTAINERS_MAX: usize = 32;

/// The number of a pattern's anchor, and whose state it is.
type Key = (usize, EntityId);

/// The container that a signal names, and the signal.
type End = (Option<Arc<str>>, Arc<Noted>);

/// The finding that tells of a state.
#[derive(Clone)]
pub struct Open {
    /// Its last signal, and the last one of each container of whom this is about.
    anchor: Arc<Noted>,
    members: Vec<Arc<Noted>>,
    pub id: String,
    /// Nanoseconds since 1970.
    pub started_ns: u64,
}

/// See the module.
pub struct Endings {
    /// The latest end of each container; the pod's own has no name.
    ends: Generations<Key, Vec<End>>,
    anchors: Generations<Key, Open>,
}

impl Default for Endings {
    fn default() -> Self {
        Self { ends: Generations::new(SUBJECTS_MAX), anchors: Generations::new(SUBJECTS_MAX) }
    }
}

/// Whose state it is: the entity's where a pattern looks at one entity only, otherwise the pod's if there is one.
pub fn subject_of(pattern: &Pattern, signal: &Signal) -> EntityId {
    match signal.entity.pod_id() {
        pod if pod != 0 && pattern.scope != Scope::Entity => pod,
        _ => signal.entity.id,
    }
}

pub fn container_of(signal: &Signal) -> Option<&str> {
    match Field::Container.get(signal) {
        Some(Value::Text(name)) => Some(name),
        _ => None,
    }
}

/// What has ended a finding's state.
pub struct Ended {
    /// Nanoseconds since 1970.
    pub at_ns: u64,
    pub by: Vec<Arc<Noted>>,
}

/// The pods, or other entities, that a finding of a state tells of, and their containers where they are named; each with the
/// last signal that told of it.
pub fn members(pattern: &Pattern, found: &Match) -> Vec<Arc<Noted>> {
    let mut members: Vec<Arc<Noted>> = Vec::new();
    for noted in found.steps[pattern.anchor].iter().rev() {
        let (subject, container) = (subject_of(pattern, &noted.signal), container_of(&noted.signal));
        let is_known = |known: &Arc<Noted>| {
            subject_of(pattern, &known.signal) == subject && container_of(&known.signal) == container
        };
        if !members.iter().any(is_known) {
            members.push(Arc::clone(noted));
        }
    }
    members
}

impl Endings {
    /// Notes a signal for each pattern whose state it ends. Returns the anchors that are to be looked at again.
    pub fn note(&mut self, patterns: &PatternSet, noted: &Arc<Noted>) -> Vec<Arc<Noted>> {
        let mut touched = Vec::new();
        for pattern in patterns.patterns().iter().filter(|pattern| pattern.is_ended_by(&noted.mask)) {
            let key = (pattern.anchor_step().number, subject_of(pattern, &noted.signal));
            let open = self.anchors.get(&key);
            // It has ended: another end later is none of this state.
            if open.is_some_and(|open| !self.goes_on(pattern, open)) {
                continue;
            }
            touched.extend(open.map(|open| Arc::clone(&open.anchor)));
            let ends = self.ends.entry(key, Vec::new);
            let container = container_of(&noted.signal);
            match ends.iter().position(|(known, _)| known.as_deref() == container) {
                Some(known) if ends[known].1.signal.realtime_ns < noted.signal.realtime_ns => {
                    ends[known].1 = Arc::clone(noted);
                }
                None if ends.len() < CONTAINERS_MAX => ends.push((container.map(Arc::from), Arc::clone(noted))),
                _ => {}
            }
        }
        touched
    }

    /// Notes that a finding of a state tells of these; its last signal is looked at again when one of them ends. Returns findings of
    /// other ids that told of the same state and did not end: what they rested on is forgotten, and this one goes on in their place; and
    /// when the first of all of it was, nanoseconds since 1970.
    pub fn watch(
        &mut self,
        pattern: &Pattern,
        anchor: &Arc<Noted>,
        id: &str,
        members: &[Arc<Noted>],
    ) -> (Vec<Open>, Option<u64>) {
        let mut first_ns = members.iter().map(|member| member.signal.realtime_ns).min();
        let mut replaced: Vec<Open> = Vec::new();
        for member in members {
            let key = (pattern.anchor_step().number, subject_of(pattern, &member.signal));
            let open = self.anchors.get(&key).cloned();
            if let Some(open) = open.filter(|open| open.id == id || self.goes_on(pattern, open)) {
                first_ns = first_ns.min(Some(open.started_ns));
                if open.id != id && !replaced.iter().any(|known| known.id == open.id) {
                    replaced.push(open);
                }
            }
        }
        for member in members {
            let key = (pattern.anchor_step().number, subject_of(pattern, &member.signal));
            let is_of = |other: &&Arc<Noted>| subject_of(pattern, &other.signal) == key.1;
            let (anchor, members) = (Arc::clone(anchor), members.iter().filter(is_of).cloned().collect());
            let open = Open { anchor, members, id: id.to_owned(), started_ns: first_ns.unwrap_or(0) };
            self.anchors.insert(key, open);
        }
        (replaced, first_ns)
    }

    fn goes_on(&self, pattern: &Pattern, open: &Open) -> bool {
        self.ended(pattern, &open.members).is_none()
    }

    /// How the state of all of these ended; [`None`] while one goes on.
    pub fn ended(&self, pattern: &Pattern, members: &[Arc<Noted>]) -> Option<Ended> {
        let mut by = Vec::with_capacity(members.len());
        for member in members {
            let key = (pattern.anchor_step().number, subject_of(pattern, &member.signal));
            let container = container_of(&member.signal);
            let of_it = self.ends.get(&key)?.iter().filter(|(of, end)| {
                let skew = if end.signal.evidence.node == member.signal.evidence.node { 0 } else { SKEW_NS };
                (of.is_none() || container.is_none() || of.as_deref() == container)
                    && end.signal.realtime_ns.saturating_add(skew) >= member.signal.realtime_ns
            });
            by.push(Arc::clone(&of_it.min_by_key(|(_, end)| end.signal.realtime_ns)?.1));
        }
        by.sort_by_key(|end| (end.signal.realtime_ns, end.signal.evidence));
        by.dedup_by(|a, b| Arc::ptr_eq(a, b));
        Some(Ended { at_ns: by.last()?.signal.realtime_ns, by })
    }
}
