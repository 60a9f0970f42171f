//! What a store holds, bounded.
//!
//! What must hold: every finding has one place in the order, and counts for its node; beyond the bound the oldest of the node that
//! has most is evicted first.

use std::borrow::Borrow;
use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::hash::Hash;
use std::sync::Arc;

use tapio_wire::program::clock;
use tapio_wire::service::{Evidence, Finding};

use super::Position;
use super::by_node::ByNode;
use super::formers::Formers;
use crate::correlate::Generations;
use crate::correlate::clue::EvidenceId;
use crate::findings::restored::{DeathKey, death_key, entity_of, subjects};

/// Findings by id and in order, with what led to them.
pub(super) struct Table {
    /// Findings out of the journal that this run has not found again, and the deaths that they explain.
    pub restored: HashSet<String>,
    /// Each with the number of these findings.
    pub restored_deaths: HashMap<DeathKey, usize>,
    /// How many of these findings are about which entity.
    pub restored_about: HashMap<u64, usize>,
    /// Those of several deaths.
    pub formers: Formers,
    /// What the replay found of such deaths under other ids, by id: it comes when what is restored goes for it.
    pub held_back: HashMap<String, Finding>,
    /// What is replayed has everything from this time on, nanoseconds since 1970: what it does not find again does not stand.
    pub replayed_from_ns: Option<u64>,
    /// From this time on, nanoseconds since 1970, what is replayed has all of a frame or nothing.
    pub whole_from_ns: u64,
    /// Findings of an earlier run that this one has found, with less than that.
    pub found_less: HashSet<String>,
    /// States of an earlier run that go on: the pattern and the pod, or another entity, and the findings.
    pub restored_states: HashMap<(String, u64), Vec<String>>,
    pub findings: HashMap<String, Arc<Finding>>,
    pub order: BTreeSet<Position>,
    /// Which of them is evicted first.
    pub by_node: ByNode,
    /// Ids of findings that another took over, and in which order.
    pub aliases: Generations<String, String>,
    pub alias_order: VecDeque<String>,
    /// The latest findings that were withdrawn, for watchers that are behind.
    pub withdrawn: VecDeque<Arc<Finding>>,
    pub published_ns: u64,
    pub evicted: u64,
    /// What the log says the time is, nanoseconds since 1970; this machine's clock where there is no log.
    pub now_ns: Option<u64>,
    /// True if this server feeds itself: the log has not confirmed what is found now.
    pub is_alone: bool,
    /// Findings that the log has not confirmed, and whether they were new.
    pub unconfirmed: HashMap<String, bool>,
    /// Findings of several deaths as the log knew them, before this server counted more deaths alone; by id.
    pub confirmed: HashMap<String, Arc<Finding>>,
}

impl Table {
    /// An empty one of at most `findings_max` findings.
    pub fn new(findings_max: usize) -> Self {
        Self {
            restored: HashSet::new(),
            restored_deaths: HashMap::new(),
            restored_about: HashMap::new(),
            formers: Formers::default(),
            held_back: HashMap::new(),
            replayed_from_ns: None,
            whole_from_ns: 0,
            found_less: HashSet::new(),
            restored_states: HashMap::new(),
            findings: HashMap::new(),
            order: BTreeSet::new(),
            by_node: ByNode::default(),
            aliases: Generations::new(findings_max),
            alias_order: VecDeque::new(),
            withdrawn: VecDeque::new(),
            published_ns: 0,
            evicted: 0,
            now_ns: None,
            is_alone: false,
            unconfirmed: HashMap::new(),
            confirmed: HashMap::new(),
        }
    }

    /// The finding that took over the only one whose id began like this.
    pub fn current_of_prefix(&self, prefix: &str) -> Option<Arc<Finding>> {
        let mut replaced = self.alias_order.iter().filter(|id| !prefix.is_empty() && id.starts_with(prefix));
        let first = self.current(replaced.next()?)?;
        let is_it = |id: &String| self.current(id).is_some_and(|finding| finding.id == first.id);
        replaced.all(is_it).then(|| Arc::clone(first))
    }

    pub fn current<'a>(&'a self, mut id: &'a str) -> Option<&'a Arc<Finding>> {
        // A finding was taken over at most a few times; the bound ends a circle.
        for _ in 0..8 {
            if let Some(finding) = self.findings.get(id) {
                return Some(finding);
            }
            id = self.aliases.get(&id.to_owned())?;
        }
        None
    }

    /// A replay begins, which has everything from this moment on.
    pub fn begin_replay(&mut self, from_ns: u64, is_cut: bool) {
        self.replayed_from_ns = Some(from_ns);
        self.whole_from_ns = if is_cut { from_ns } else { 0 };
        self.found_less.clear();
        self.restored.clear();
        self.restored_deaths.clear();
        self.restored_about.clear();
        self.formers.clear();
        self.restored_states.clear();
        self.held_back.clear();
    }

    /// The replay does not have everything of before this moment.
    pub fn replayed_only_from(&mut self, from_ns: u64) {
        self.whole_from_ns = from_ns.max(self.whole_from_ns);
        if let Some(known_ns) = &mut self.replayed_from_ns {
            *known_ns = from_ns.max(*known_ns);
        }
    }

    /// Remembers a finding of several deaths as the log knows it, before this server counts more deaths alone.
    pub fn confirm(&mut self, finding: Arc<Finding>) {
        if finding.count > 1 && !finding.ongoing && finding.resolved_ns == 0 {
            self.confirmed.insert(finding.id.clone(), finding);
        }
    }

    /// Findings that this server changed while it was alone, as the log knew them before, sorted by id.
    pub fn confirmed_and_added_to(&self) -> Vec<Arc<Finding>> {
        let is_added_to = |of: &&Arc<Finding>| self.findings.get(&of.id).is_some_and(|known| known != *of);
        let mut confirmed: Vec<_> = self.confirmed.values().filter(is_added_to).cloned().collect();
        confirmed.sort_by(|a, b| a.id.cmp(&b.id));
        confirmed
    }

    /// Whether the replay has all that a finding can rest on.
    pub fn is_replayed(&self, finding: &Finding) -> bool {
        self.replayed_from_ns.is_some_and(|from_ns| finding.started_ns >= from_ns)
    }

    /// The findings of an earlier run that the replay would have found again if they stood, with the findings that explain the
    /// same deaths now.
    pub fn not_found_again(&self) -> Vec<(String, Option<String>)> {
        let known = |id: &String| self.findings.get(id);
        let mut gone: Vec<&Arc<Finding>> = self
            .restored
            .iter()
            .filter_map(known)
            .filter(|finding| !finding.ongoing && !finding.withdrawn && self.is_replayed(finding))
            .collect();
        gone.sort_by(|a, b| a.id.cmp(&b.id));
        if gone.is_empty() {
            return Vec::new();
        }
        let by_death = self.found_by_death();
        let successor = |finding: &Finding| Some(by_death.get(&death_key(finding)?)?.id.clone());
        gone.into_iter().map(|finding| (finding.id.clone(), successor(finding))).collect()
    }

    /// What this run has found, by the death that it is about.
    fn found_by_death(&self) -> HashMap<DeathKey, &Finding> {
        let found = self.findings.values().map(|finding| &**finding);
        let found = found.filter(|finding| !self.restored.contains(&finding.id)).chain(self.held_back.values());
        found.filter_map(|finding| Some((death_key(finding)?, finding))).collect()
    }

    /// The findings of an earlier run, made without the others' evidence, whose own evidence this run has seen and that it has not
    /// found. Each comes with the finding that explains the same death now. One of several deaths stands unless that has as many:
    /// not all of them are in its evidence.
    pub fn disproved(&self, is_seen: &dyn Fn(EvidenceId) -> bool) -> Vec<(String, Option<String>)> {
        let is_seen = |piece: &Evidence| EvidenceId::parse(&piece.id).is_some_and(is_seen);
        let known = |id: &String| self.findings.get(id).filter(|finding| !self.found_less.contains(&finding.id));
        let mut gone: Vec<&Arc<Finding>> = self
            .restored
            .iter()
            .filter_map(known)
            .filter(|finding| !finding.ongoing && !finding.withdrawn && finding.started_ns >= self.whole_from_ns)
            .filter(|finding| finding.possible || !finding.missing_servers.is_empty())
            .filter(|finding| !finding.evidence.is_empty() && finding.evidence.iter().all(is_seen))
            .collect();
        gone.sort_by(|a, b| a.id.cmp(&b.id));
        let by_death = if gone.is_empty() { HashMap::new() } else { self.found_by_death() };
        let with_successor = gone.into_iter().filter_map(|finding| {
            let successor = death_key(finding).and_then(|death| by_death.get(&death));
            let stands = finding.count > 1 && successor.is_none_or(|successor| successor.count < finding.count);
            (!stands).then(|| (finding.id.clone(), successor.map(|successor| successor.id.clone())))
        });
        with_successor.collect()
    }

    pub fn restored(&mut self, finding: &Finding) {
        // An earlier version of it, if there is one.
        if let Some(known) = self.findings.get(&finding.id).cloned() {
            self.not_restored(&known);
        }
        self.restored.insert(finding.id.clone());
        *self.restored_about.entry(entity_of(finding)).or_default() += 1;
        self.formers.add(finding);
        if let Some(death) = death_key(finding) {
            *self.restored_deaths.entry(death).or_default() += 1;
        }
        if finding.ongoing {
            for subject in subjects(finding) {
                let ids = self.restored_states.entry((finding.pattern.clone(), subject)).or_default();
                if !ids.contains(&finding.id) {
                    ids.push(finding.id.clone());
                }
            }
        }
    }

    /// A finding of an earlier run is gone: it explains its death no more.
    pub fn not_restored(&mut self, finding: &Finding) {
        if !self.restored.remove(&finding.id) {
            return;
        }
        self.found_less.remove(&finding.id);
        self.formers.remove(finding);
        count_down(&mut self.restored_about, &entity_of(finding));
        if let Some(death) = death_key(finding) {
            count_down(&mut self.restored_deaths, &death);
        }
    }

    /// Keeps what a replay found of a death that is explained already.
    pub fn hold_back(&mut self, finding: Finding, findings_max: usize) {
        if self.held_back.len() < findings_max || self.held_back.contains_key(&finding.id) {
            self.held_back.insert(finding.id.clone(), finding);
        }
    }

    /// Forgets findings beyond the bound: the oldest of the node that has most, so that one node's many do not push out what is
    /// known of others.
    pub fn make_room(&mut self, findings_max: usize) {
        while self.findings.len() > findings_max
            && let Some(oldest) = self.by_node.oldest_of_the_most().cloned()
        {
            if let Some(finding) = self.remove(&oldest.id) {
                self.not_restored(&finding);
            }
            self.unconfirmed.remove(&oldest.id);
            self.confirmed.remove(&oldest.id);
            self.evicted += 1;
        }
    }

    pub fn insert(&mut self, finding: Arc<Finding>) {
        self.order.insert(position(&finding));
        if let Some(known) = self.findings.insert(finding.id.clone(), Arc::clone(&finding)) {
            self.displaced(&known);
        }
        self.by_node.insert(&finding);
    }

    pub fn remove(&mut self, id: &str) -> Option<Arc<Finding>> {
        let finding = self.findings.remove(id)?;
        self.displaced(&finding);
        Some(finding)
    }

    /// Removes the traces of a finding that left the store, or that another one of its id replaced.
    fn displaced(&mut self, finding: &Finding) {
        let place = position(finding);
        if self.findings.get(&finding.id).is_none_or(|known| position(known) != place) {
            self.order.remove(&place);
        }
        self.by_node.remove(finding);
    }

    pub fn alias(&mut self, id: String, successor: String, aliases_max: usize) {
        if self.aliases.get(&id).is_none() {
            self.alias_order.push_back(id.clone());
        }
        self.aliases.insert(id, successor);
        if self.alias_order.len() > aliases_max {
            self.alias_order.pop_front();
        }
    }

    pub fn next_published_ns(&mut self) -> u64 {
        let now_ns = self.now_ns.unwrap_or_else(clock::now_ns);
        self.published_ns = now_ns.max(self.published_ns + 1);
        self.published_ns
    }
}

fn count_down<K: Borrow<Q> + Hash + Eq, Q: Hash + Eq + ?Sized>(counts: &mut HashMap<K, usize>, key: &Q) {
    if let Some(count) = counts.get_mut(key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(key);
        }
    }
}

pub(super) fn position(finding: &Finding) -> Position {
    Position { ended_ns: finding.ended_ns, id: finding.id.clone() }
}
