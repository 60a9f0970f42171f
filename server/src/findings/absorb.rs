//! Root causes and their consequences.
//!
//! What enters: every finding that is to be published, with the histories its anchor belongs to. What leaves: what to publish and
//! what to withdraw instead. What must hold: a finding that another explains is not listed by itself, it is published with its
//! root. When a root is withdrawn, its consequences stand by themselves again. So does a state that outlives its root, and a finding
//! that has come to say what its root does not explain. A chain is no longer than `depth_max`; everything is bounded.

use std::collections::VecDeque;

use tapio_wire::service::{Consequence, Finding};

use super::joins::HistoryKey;
use super::pattern::{Pattern, PatternSet};
use crate::correlate::Generations;

/// Findings remembered.
const ENTRIES_MAX: usize = 8_192;
/// Findings remembered by what they hang together with.
const KEYS_MAX: usize = 32_768;
const FINDINGS_OF_KEY_MAX: usize = 32;
/// Consequences of one finding.
const CONSEQUENCES_MAX: usize = 64;
/// How much later than its consequence a root may be noticed.
const ROOT_LATE_NS: u64 = 60_000_000_000;

/// A finding's id as a number: [`finding_id`](super::deaths::finding_id) writes one.
type Id = u64;

fn number_of(id: &str) -> Id {
    u64::from_str_radix(id, 16).unwrap_or(0)
}

struct Entry {
    finding: Finding,
    /// The number of its pattern's anchor.
    anchor: usize,
    parent: Option<Id>,
    children: Vec<Id>,
}

/// What to do about findings.
pub enum Action {
    Publish(Box<Finding>),
    /// The second explains the first.
    Withdraw(String, String),
}

/// Folds the findings of consequences into the finding of their cause.
pub struct Absorber {
    entries: Generations<Id, Entry>,
    by_key: Generations<HistoryKey, VecDeque<Id>>,
    depth_max: usize,
}

impl Absorber {
    /// Chains of at most `depth_max` findings, at least 1.
    pub fn new(depth_max: usize) -> Self {
        Self { entries: Generations::new(ENTRIES_MAX), by_key: Generations::new(KEYS_MAX), depth_max: depth_max.max(1) }
    }

    /// A finding is to be published; its anchor belongs to the histories `keys`.
    pub fn offer(
        &mut self,
        patterns: &PatternSet,
        pattern: &Pattern,
        finding: Finding,
        keys: &[HistoryKey],
    ) -> Vec<Action> {
        let id = number_of(&finding.id);
        let mut actions = Vec::new();
        let entry = || Entry { finding: Finding::default(), anchor: 0, parent: None, children: Vec::new() };
        let known = self.entries.entry(id, entry);
        let is_otherwise = known.finding.pattern != finding.pattern;
        known.finding = finding;
        known.anchor = pattern.anchor_step().number;
        for &key in keys {
            let list = self.by_key.entry(key, VecDeque::new);
            if !list.contains(&id) {
                if list.len() == FINDINGS_OF_KEY_MAX {
                    list.pop_front();
                }
                list.push_back(id);
            }
        }
        // What goes on after its root was over has another reason by now; so may have what is explained in another way than before.
        let is_free = |root: &Id| self.outlives(*root, id) || is_otherwise && !self.absorbs(patterns, *root, pattern);
        if let Some(root) = self.parent(id).filter(is_free) {
            if let Some(entry) = self.entries.get_mut(&root) {
                entry.children.retain(|child| *child != id);
            }
            if let Some(entry) = self.entries.get_mut(&id) {
                entry.parent = None;
            }
            actions.extend(self.with_consequences(self.top(root)).map(Box::new).map(Action::Publish));
        }
        if self.parent(id).is_none()
            && let Some(root) = self.find_root(patterns, pattern, id, keys)
        {
            self.adopt(root, id, &mut actions);
        }
        for (consequence, scope) in &pattern.absorbs {
            for key in keys.iter().filter(|key| key.1 == *scope) {
                let fits = |other: &Id| {
                    self.entries.get(other).is_some_and(|entry| {
                        pattern.consequences.contains(entry.anchor)
                            && entry.finding.pattern == *consequence
                            && entry.parent.is_none()
                            && *other != id
                    })
                };
                let list = self.by_key.get(key).into_iter().flatten();
                let fitting: Vec<Id> = list.copied().filter(fits).collect();
                for other in fitting {
                    if self.may_cause(id, other, pattern.window_ns) {
                        self.adopt(id, other, &mut actions);
                    }
                }
            }
        }
        actions.extend(self.with_consequences(self.top(id)).map(Box::new).map(Action::Publish));
        actions
    }

    /// A finding is withdrawn: what it had absorbed stands by itself again, or goes to its successor.
    pub fn remove(&mut self, id: &str, successor: Option<&str>) -> Vec<Action> {
        let mut actions = Vec::new();
        let id = number_of(id);
        let Some(entry) = self.entries.remove(&id) else {
            return actions;
        };
        if let Some(parent) = entry.parent
            && let Some(known) = self.entries.get_mut(&parent)
        {
            known.children.retain(|child| *child != id);
            actions.extend(self.with_consequences(self.top(parent)).map(Box::new).map(Action::Publish));
        }
        let successor = successor.map(number_of).filter(|successor| self.entries.get(successor).is_some());
        for child in entry.children {
            if let Some(known) = self.entries.get_mut(&child) {
                known.parent = None;
            }
            match successor {
                Some(successor) if self.has_room(successor, child) => self.adopt(successor, child, &mut actions),
                _ => actions.extend(self.with_consequences(child).map(Box::new).map(Action::Publish)),
            }
        }
        if let Some(successor) = successor {
            actions.extend(self.with_consequences(self.top(successor)).map(Box::new).map(Action::Publish));
        }
        actions
    }

    fn parent(&self, id: Id) -> Option<Id> {
        let parent = self.entries.get(&id)?.parent?;
        self.entries.get(&parent).map(|_| parent)
    }

    fn top(&self, id: Id) -> Id {
        let mut top = id;
        for _ in 0..self.depth_max {
            match self.parent(top) {
                Some(parent) => top = parent,
                None => break,
            }
        }
        top
    }

    fn find_root(&self, patterns: &PatternSet, pattern: &Pattern, id: Id, keys: &[HistoryKey]) -> Option<Id> {
        // Mostly nothing that hangs together with it may be its root.
        let is_root = |other: &Id| self.entries.get(other).is_some_and(|entry| pattern.roots.contains(entry.anchor));
        let is_of_roots = |key: &&HistoryKey| pattern.absorbed_by.iter().any(|(_, scope)| key.1 == *scope);
        let mut lists = keys.iter().filter(is_of_roots).filter_map(|key| self.by_key.get(key));
        if !lists.any(|list| list.iter().any(is_root)) {
            return None;
        }
        for &(root, scope) in &pattern.absorbed_by {
            let root = &patterns.patterns()[root];
            let lists = keys.iter().filter(|key| key.1 == scope).filter_map(|key| self.by_key.get(key));
            // The latest one that fits.
            let found = lists.flatten().rev().find(|other| {
                self.entries.get(other).is_some_and(|entry| entry.finding.pattern == root.id)
                    && self.may_cause(**other, id, root.window_ns)
            });
            if found.is_some() {
                return found.copied();
            }
        }
        None
    }

    /// Whether the pattern of a finding takes those of another for its consequences.
    fn absorbs(&self, patterns: &PatternSet, root: Id, pattern: &Pattern) -> bool {
        let is_it = |entry: &Entry| {
            let mut roots = pattern.absorbed_by.iter().map(|(place, _)| &patterns.patterns()[*place].id);
            roots.any(|known| *known == entry.finding.pattern)
        };
        self.entries.get(&root).is_some_and(is_it)
    }

    /// Whether the times fit, there is room, and no circle comes about.
    fn may_cause(&self, root: Id, id: Id, window_ns: u64) -> bool {
        let finding = |id: Id| self.entries.get(&id).map(|entry| &entry.finding);
        let (Some(cause), Some(effect)) = (finding(root), finding(id)) else {
            return false;
        };
        // A state that was there before its cause has another one, however long it lasts.
        let is_state = effect.ongoing || effect.resolved_ns > 0;
        let effect_ns = if is_state { effect.started_ns } else { effect.ended_ns };
        let is_in_time = cause.started_ns <= effect_ns.saturating_add(ROOT_LATE_NS)
            && effect.started_ns <= cause.ended_ns.saturating_add(window_ns);
        is_in_time && self.top(root) != id && self.has_room(root, id) && !self.outlives(root, id)
    }

    /// Whether a state was reported to go on after its root, a state as well, was over.
    fn outlives(&self, root: Id, id: Id) -> bool {
        let finding = |id: Id| self.entries.get(&id).map(|entry| &entry.finding);
        finding(root).zip(finding(id)).is_some_and(|(cause, effect)| {
            effect.ongoing && cause.resolved_ns > 0 && effect.ended_ns > cause.resolved_ns
        })
    }

    fn has_room(&self, root: Id, id: Id) -> bool {
        let children = self.entries.get(&root).map_or(0, |entry| entry.children.len());
        children < CONSEQUENCES_MAX && self.level(root) + self.height(id, self.depth_max) <= self.depth_max
    }

    /// Findings from the top to this one.
    fn level(&self, id: Id) -> usize {
        let mut level = 1;
        let mut at = id;
        while let Some(parent) = self.parent(at)
            && level <= self.depth_max
        {
            at = parent;
            level += 1;
        }
        level
    }

    /// Findings from this one to its last consequence.
    fn height(&self, id: Id, bound: usize) -> usize {
        if bound == 0 {
            return 1;
        }
        let children = self.entries.get(&id).map(|entry| &entry.children[..]).unwrap_or_default();
        1 + children.iter().map(|&child| self.height(child, bound - 1)).max().unwrap_or(0)
    }

    fn adopt(&mut self, root: Id, id: Id, actions: &mut Vec<Action>) {
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.parent = Some(root);
        }
        if let Some(entry) = self.entries.get_mut(&root)
            && !entry.children.contains(&id)
        {
            entry.children.push(id);
        }
        let of = |id: Id| self.entries.get(&id).map(|entry| entry.finding.id.clone());
        if let Some((id, top)) = of(id).zip(of(self.top(root))) {
            actions.push(Action::Withdraw(id, top));
        }
    }

    /// A finding with all its consequences.
    fn with_consequences(&self, id: Id) -> Option<Finding> {
        let mut finding = self.entries.get(&id)?.finding.clone();
        let mut waiting = vec![id];
        while let Some(at) = waiting.pop() {
            let children = self.entries.get(&at).map(|entry| &entry.children[..]).unwrap_or_default();
            for child in children {
                let Some(entry) = self.entries.get(child) else { continue };
                if finding.consequences.len() < CONSEQUENCES_MAX {
                    let of = &entry.finding;
                    finding.consequences.push(Consequence {
                        id: of.id.clone(),
                        pattern: of.pattern.clone(),
                        title: of.title.clone(),
                        entity: of.entity.clone(),
                        started_ns: of.started_ns,
                    });
                    waiting.push(*child);
                }
            }
        }
        finding.consequences.sort_by(|a, b| (a.started_ns, &a.id).cmp(&(b.started_ns, &b.id)));
        Some(finding)
    }
}
