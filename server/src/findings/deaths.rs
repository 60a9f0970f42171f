//! Which finding explains which death.
//!
//! What enters: for each death, the best explanation found by now. What leaves: what to publish and what to withdraw. What must
//! hold: a death is explained by one finding; a better explanation replaces a weaker one. A pattern that takes several deaths
//! together absorbs the weaker single ones, and goes on with its finding as long as deaths keep joining it.

use std::collections::VecDeque;
use std::sync::Arc;

use super::clue_store::Noted;
use super::moment::Moment;
use super::pattern::Pattern;
use crate::correlate::Generations;
use crate::correlate::clue::{Clue, EvidenceId};

/// Deaths remembered.
const DEATHS_MAX: usize = 65_536;
/// Findings remembered that take several deaths together.
const GROUPS_MAX: usize = 8_192;

/// Orders deaths: by time, then by evidence.
#[derive(Clone, Copy, PartialEq, Eq)]
struct DeathOrder {
    at: Moment,
    evidence: EvidenceId,
}

impl DeathOrder {
    fn of(noted: &Noted) -> Self {
        Self { at: Moment::of(&noted.clue), evidence: noted.clue.evidence }
    }

    fn is_before(&self, other: &Self) -> bool {
        self.at.is_before(other.at) || !other.at.is_before(self.at) && self.evidence < other.evidence
    }
}

#[derive(Clone)]
struct Explained {
    id: Arc<str>,
    priority: u32,
    in_group: bool,
}

struct Group {
    first: DeathOrder,
    first_realtime_ns: u64,
    last: DeathOrder,
    absorbed: u32,
}

/// What a death's explanation leads to.
pub enum Decision {
    /// Publish it under this id.
    Publish { id: String, count: u32, started_realtime_ns: Option<u64> },
    /// A better or later one stands already.
    Keep,
}

/// A finding that no longer stands, and the one that took its place.
pub struct Withdrawn {
    pub id: String,
    pub successor: Option<String>,
}

/// Deaths of one workload that are remembered to be taken together.
const FOLD_MAX: usize = 32;

/// Remembers which finding explains which death.
pub struct Deaths {
    /// By the number of a pattern's anchor, and the workload.
    folds: Generations<(usize, u64), VecDeque<Arc<Noted>>>,
    explained: Generations<EvidenceId, Explained>,
    groups: Generations<String, Group>,
}

impl Default for Deaths {
    fn default() -> Self {
        Self {
            folds: Generations::new(GROUPS_MAX),
            explained: Generations::new(DEATHS_MAX),
            groups: Generations::new(GROUPS_MAX),
        }
    }
}

/// A finding's id: a hash of its evidence, so that a replay gives the same.
pub fn finding_id(group: &str, entity: u64, evidence: EvidenceId) -> String {
    let text = format!("{group}\0{entity:x}\0{evidence}");
    let fnv = tapio_wire::fnv1a(&[text.as_bytes()]);
    // FNV's upper bits differ little for texts that differ at the end; people type prefixes, so they are mixed.
    format!("{:016x}", tapio_wire::mix(fnv))
}

impl Deaths {
    /// Nothing explains a death any more: its finding is to be withdrawn, unless it stands for others too.
    pub fn unexplained(&mut self, death: &Noted) -> Option<Withdrawn> {
        let evidence = death.clue.evidence;
        if self.explained.get(&evidence)?.in_group {
            return None;
        }
        let explained = self.explained.remove(&evidence)?;
        Some(Withdrawn { id: explained.id.to_string(), successor: None })
    }

    /// A pattern explains one death by itself.
    pub fn single(&mut self, pattern: &Pattern, death: &Noted) -> Decision {
        let evidence = death.clue.evidence;
        if let Some(known) = self.explained.get(&evidence)
            && known.in_group
            && known.priority > pattern.priority
        {
            return Decision::Keep;
        }
        let id = finding_id("death", death.clue.entity.id, evidence);
        let explained = Explained { id: id.as_str().into(), priority: pattern.priority, in_group: false };
        self.explained.insert(evidence, explained);
        Decision::Publish { id, count: 1, started_realtime_ns: None }
    }

    /// The deaths of a workload's replicas that a pattern explains alike, the latest last; this one is among them.
    pub fn alike(&mut self, pattern: &Pattern, workload: u64, death: &Arc<Noted>) -> Vec<Arc<Noted>> {
        let alike = self.folds.entry((pattern.anchor_step().number, workload), VecDeque::new);
        alike.retain(|other| {
            other.clue.evidence != death.clue.evidence
                && other.clue.realtime_ns.abs_diff(death.clue.realtime_ns) <= pattern.window_ns
        });
        if alike.len() == FOLD_MAX {
            alike.pop_front();
        }
        alike.push_back(Arc::clone(death));
        let mut alike: Vec<_> = alike.iter().cloned().collect();
        // Within one run of a collector the clock of day may be set.
        let run = |noted: &Arc<Noted>| (noted.clue.evidence.node, noted.clue.evidence.epoch);
        let is_one_run = alike.iter().all(|noted| run(noted) == run(death));
        let at = |clue: &Clue| if is_one_run { clue.boottime_ns } else { clue.realtime_ns };
        alike.sort_by_key(|noted| (at(&noted.clue), noted.clue.evidence));
        alike
    }

    /// A pattern takes several deaths together; the last is its anchor.
    pub fn together(&mut self, pattern: &Pattern, scope: u64, deaths: &[Arc<Noted>]) -> (Decision, Vec<Withdrawn>) {
        let (Some(first), Some(last)) = (deaths.first(), deaths.last()) else {
            return (Decision::Keep, Vec::new());
        };
        let mut group = Group {
            first: DeathOrder::of(first),
            first_realtime_ns: first.clue.realtime_ns,
            last: DeathOrder::of(last),
            absorbed: 0,
        };
        let mut earlier: Vec<Arc<str>> = Vec::new();
        let known: Vec<Option<Explained>> =
            deaths.iter().map(|death| self.explained.get(&death.clue.evidence).cloned()).collect();
        for known in known.iter().flatten() {
            if known.in_group && known.priority == pattern.priority && !earlier.contains(&known.id) {
                earlier.push(Arc::clone(&known.id));
            }
        }
        for id in &earlier {
            if let Some(known) = self.groups.remove(&id.to_string()) {
                if known.first.is_before(&group.first) {
                    group.first = known.first;
                    group.first_realtime_ns = known.first_realtime_ns;
                }
                if group.last.is_before(&known.last) {
                    group.last = known.last;
                }
                group.absorbed += known.absorbed;
            }
        }
        let id = finding_id(&pattern.id, scope, group.first.evidence);
        let shared: Arc<str> = id.as_str().into();
        let mut withdrawn: Vec<_> = earlier
            .iter()
            .filter(|&earlier| **earlier != *id)
            .map(|earlier| Withdrawn { id: earlier.to_string(), successor: Some(id.clone()) })
            .collect();
        let mut cited = 0;
        for (death, known) in deaths.iter().zip(known) {
            let evidence = death.clue.evidence;
            match known {
                Some(known) if known.in_group && known.priority == pattern.priority => {}
                Some(known) if known.priority > pattern.priority => {
                    cited += 1;
                    continue;
                }
                known => {
                    group.absorbed += 1;
                    withdrawn
                        .extend(known.map(|known| Withdrawn { id: known.id.to_string(), successor: Some(id.clone()) }));
                }
            }
            let explained = Explained { id: Arc::clone(&shared), priority: pattern.priority, in_group: true };
            let known = self.explained.entry(evidence, || explained.clone());
            *known = explained;
        }
        if group.absorbed == 0 {
            // Every one of them is explained better elsewhere.
            return (Decision::Keep, withdrawn);
        }
        // The finding describes its last death; an earlier one that is looked at again must not move it back there.
        let is_last = group.last == DeathOrder::of(last);
        let is_earlier = |withdrawn: &Withdrawn| earlier.iter().any(|earlier| **earlier == *withdrawn.id);
        let renamed = withdrawn.iter().any(is_earlier);
        let decision = if is_last || renamed {
            Decision::Publish {
                id: id.clone(),
                count: group.absorbed + cited,
                started_realtime_ns: Some(group.first_realtime_ns),
            }
        } else {
            Decision::Keep
        };
        self.groups.insert(id, group);
        (decision, withdrawn)
    }
}
