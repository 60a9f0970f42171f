//! Root causes and what they brought about.
//!
//! What enters: every finding that is to be published, with the rings its anchor belongs to. What leaves: what to publish and
//! what to withdraw instead. What must hold: a finding that another explains is not listed by itself, it is told with its root;
//! a root that falls gives its consequences back; a chain is no longer than `depth_max`; everything is bounded.

use std::collections::VecDeque;

use tapio_wire::service::{Consequence, Finding};

use super::joins::RingKey;
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

struct Entry {
    finding: Finding,
    parent: Option<String>,
    children: Vec<String>,
}

/// What to do about findings.
pub enum Action {
    Publish(Box<Finding>),
    /// The second explains the first.
    Withdraw(String, String),
}

/// Folds the findings of consequences into the finding of their cause.
pub struct Absorber {
    entries: Generations<String, Entry>,
    by_key: Generations<RingKey, VecDeque<String>>,
    depth_max: usize,
}

impl Absorber {
    /// Chains of at most `depth_max` findings, at least 1.
    pub fn new(depth_max: usize) -> Self {
        Self { entries: Generations::new(ENTRIES_MAX), by_key: Generations::new(KEYS_MAX), depth_max: depth_max.max(1) }
    }

    /// A finding is to be published; its anchor belongs to the rings `keys`.
    pub fn offer(
        &mut self,
        patterns: &PatternSet,
        pattern: &Pattern,
        finding: Finding,
        keys: &[RingKey],
    ) -> Vec<Action> {
        let id = finding.id.clone();
        let mut actions = Vec::new();
        let entry = Entry { finding: finding.clone(), parent: None, children: Vec::new() };
        let known = self.entries.entry(id.clone(), || entry);
        known.finding = finding;
        for &key in keys {
            let list = self.by_key.entry(key, VecDeque::new);
            if !list.contains(&id) {
                if list.len() == FINDINGS_OF_KEY_MAX {
                    list.pop_front();
                }
                list.push_back(id.clone());
            }
        }
        if self.parent(&id).is_none()
            && let Some(root) = self.find_root(patterns, pattern, &id, keys)
        {
            self.adopt(&root, &id, &mut actions);
        }
        for (consequence, scope) in &pattern.absorbs {
            for key in keys.iter().filter(|key| key.1 == *scope) {
                for other in self.by_key.get(key).cloned().unwrap_or_default() {
                    let fits = self.entries.get(&other).is_some_and(|entry| {
                        entry.finding.pattern == *consequence && entry.parent.is_none() && other != id
                    });
                    if fits && self.may_cause(&id, &other, pattern.window_ns) {
                        self.adopt(&id, &other, &mut actions);
                    }
                }
            }
        }
        actions.extend(self.told(&self.top(&id)).map(Box::new).map(Action::Publish));
        actions
    }

    /// A finding is taken back: what it had absorbed stands by itself again, or goes to its successor.
    pub fn remove(&mut self, id: &str, successor: Option<&str>) -> Vec<Action> {
        let mut actions = Vec::new();
        let Some(entry) = self.entries.remove(&id.to_owned()) else {
            return actions;
        };
        if let Some(parent) = &entry.parent
            && let Some(known) = self.entries.get_mut(parent)
        {
            known.children.retain(|child| child != id);
            actions.extend(self.told(&self.top(parent)).map(Box::new).map(Action::Publish));
        }
        let successor = successor.filter(|successor| self.entries.get(&(*successor).to_owned()).is_some());
        for child in entry.children {
            if let Some(known) = self.entries.get_mut(&child) {
                known.parent = None;
            }
            match successor {
                Some(successor) if self.has_room(successor, &child) => self.adopt(successor, &child, &mut actions),
                _ => actions.extend(self.told(&child).map(Box::new).map(Action::Publish)),
            }
        }
        if let Some(successor) = successor {
            actions.extend(self.told(&self.top(successor)).map(Box::new).map(Action::Publish));
        }
        actions
    }

    fn parent(&self, id: &str) -> Option<&String> {
        let parent = self.entries.get(&id.to_owned())?.parent.as_ref()?;
        self.entries.get(parent).map(|_| parent)
    }

    fn top(&self, id: &str) -> String {
        let mut top = id.to_owned();
        for _ in 0..self.depth_max {
            match self.parent(&top) {
                Some(parent) => top = parent.clone(),
                None => break,
            }
        }
        top
    }

    fn find_root(&self, patterns: &PatternSet, pattern: &Pattern, id: &str, keys: &[RingKey]) -> Option<String> {
        let roots = patterns.patterns().iter().filter(|root| root.id != pattern.id);
        for root in roots {
            let Some((_, scope)) = root.absorbs.iter().find(|(absorbed, _)| *absorbed == pattern.id) else {
                continue;
            };
            let lists = keys.iter().filter(|key| key.1 == *scope).filter_map(|key| self.by_key.get(key));
            // The latest one that fits.
            let found = lists.flatten().rev().find(|other| {
                self.entries.get(other).is_some_and(|entry| entry.finding.pattern == root.id)
                    && self.may_cause(other, id, root.window_ns)
            });
            if found.is_some() {
                return found.cloned();
            }
        }
        None
    }

    /// Whether the times fit, there is room, and no circle comes about.
    fn may_cause(&self, root: &str, id: &str, window_ns: u64) -> bool {
        let finding = |id: &str| self.entries.get(&id.to_owned()).map(|entry| &entry.finding);
        let (Some(cause), Some(effect)) = (finding(root), finding(id)) else {
            return false;
        };
        // A state that was there before its cause has another one, however long it lasts.
        let is_state = effect.ongoing || effect.resolved_ns > 0;
        let effect_ns = if is_state { effect.started_ns } else { effect.ended_ns };
        let is_in_time = cause.started_ns <= effect_ns.saturating_add(ROOT_LATE_NS)
            && effect.started_ns <= cause.ended_ns.saturating_add(window_ns);
        is_in_time && self.top(root) != id && self.has_room(root, id)
    }

    fn has_room(&self, root: &str, id: &str) -> bool {
        let children = self.entries.get(&root.to_owned()).map_or(0, |entry| entry.children.len());
        children < CONSEQUENCES_MAX && self.level(root) + self.height(id, self.depth_max) <= self.depth_max
    }

    /// Findings from the top to this one.
    fn level(&self, id: &str) -> usize {
        let mut level = 1;
        let mut at = id.to_owned();
        while let Some(parent) = self.parent(&at)
            && level <= self.depth_max
        {
            at = parent.clone();
            level += 1;
        }
        level
    }

    /// Findings from this one to its last consequence.
    fn height(&self, id: &str, bound: usize) -> usize {
        if bound == 0 {
            return 1;
        }
        let children = self.entries.get(&id.to_owned()).map(|entry| &entry.children[..]).unwrap_or_default();
        1 + children.iter().map(|child| self.height(child, bound - 1)).max().unwrap_or(0)
    }

    fn adopt(&mut self, root: &str, id: &str, actions: &mut Vec<Action>) {
        if let Some(entry) = self.entries.get_mut(&id.to_owned()) {
            entry.parent = Some(root.to_owned());
        }
        if let Some(entry) = self.entries.get_mut(&root.to_owned())
            && !entry.children.iter().any(|child| child == id)
        {
            entry.children.push(id.to_owned());
        }
        actions.push(Action::Withdraw(id.to_owned(), self.top(root)));
    }

    /// A finding with all that it brought about.
    fn told(&self, id: &str) -> Option<Finding> {
        let mut finding = self.entries.get(&id.to_owned())?.finding.clone();
        let mut waiting = vec![id.to_owned()];
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
                    waiting.push(child.clone());
                }
            }
        }
        finding.consequences.sort_by(|a, b| (a.started_ns, &a.id).cmp(&(b.started_ns, &b.id)));
        Some(finding)
    }
}
