//! Which finding explains which death.
//!
//! What enters: for each death, the pattern that explains it best by now, or none. What leaves: findings to publish and to
//! withdraw, and deaths to look at again. What must hold: a death belongs to one finding, and what is published follows from the
//! explanations alone, not from the order in which they came. Deaths that follow each other within a pattern's window are one
//! finding. A series keeps its first death, however long it goes on.

use std::sync::Arc;

use super::clue_store::Noted;
use super::moment::Moment;
use super::pattern::Pattern;
use super::series::{Anchor, Former, Group, Series};
use crate::correlate::Generations;
use crate::correlate::clue::EvidenceId;

/// Deaths remembered.
const DEATHS_MAX: usize = 65_536;
/// Series remembered.
const SERIES_MAX: usize = 16_384;
/// Deaths that are looked at again when the explanation of one death changes.
const REFUSED_MAX: usize = 16;

/// Stands for the pattern in the id of a death that is a finding by itself.
pub const ALONE: &str = "death";

/// The deaths that one pattern explains in one scope.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SeriesKey {
    /// The pattern's place in its set.
    pub pattern: usize,
    scope: u64,
}

/// What a pattern's explanation of a death is part of.
pub enum Explanation {
    /// The death stands by itself.
    Alone,
    /// Deaths of one workload that the pattern explains alike are one finding.
    Alike { workload: u64 },
    /// The pattern counts several deaths of a scope, of which this is the last.
    Counted { scope: u64, deaths: Vec<Arc<Noted>> },
}

impl Explanation {
    fn scope(&self, death: &Noted) -> u64 {
        match self {
            Self::Alone => tapio_wire::mix(tapio_wire::fnv1a(&[death.clue.evidence.to_string().as_bytes()])),
            Self::Alike { workload } => *workload,
            Self::Counted { scope, .. } => *scope,
        }
    }
}

/// The best explanation of a death.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Best {
    series: SeriesKey,
    priority: u32,
}

/// Series that count a death.
#[derive(Clone, Copy)]
struct Counter {
    series: SeriesKey,
    priority: u32,
    /// Anchors of the series that count it.
    anchors: u32,
}

/// A finding to publish.
pub struct Publication {
    pub id: String,
    /// The pattern's place in its set.
    pub pattern: usize,
    /// The death that the finding describes.
    pub last: Arc<Noted>,
    pub count: u32,
    /// When the first of them was, nanoseconds since 1970.
    pub started_realtime_ns: Option<u64>,
    /// The deaths, as far as they are remembered.
    pub members: Vec<Arc<Noted>>,
    scope: u64,
}

impl Publication {
    /// The ids that the pattern's findings of these deaths have where others of them are not known, or came later.
    pub fn other_ids(&self, pattern: &Pattern) -> Vec<String> {
        let ids_of = |death: &Arc<Noted>| {
            let (entity, evidence) = (death.clue.entity.id, death.clue.evidence);
            [finding_id(ALONE, entity, evidence), finding_id(&pattern.id, self.scope, evidence)]
        };
        self.members.iter().flat_map(ids_of).filter(|id| *id != self.id).collect()
    }
}

/// A finding that no longer stands, and the one that took its place.
#[derive(Debug, PartialEq, Eq)]
pub struct Withdrawn {
    pub id: String,
    pub successor: Option<String>,
}

/// What follows from a death's explanation.
#[derive(Default)]
pub struct Settled {
    pub publish: Vec<Publication>,
    pub withdrawn: Vec<Withdrawn>,
    /// Deaths whose explanation rests on this one's.
    pub revisit: Vec<Arc<Noted>>,
}

impl Settled {
    /// Takes in what became of a publication that goes on with another finding.
    pub fn replace(&mut self, publication: &Publication, former: &Former, with: Self) {
        for withdrawn in &mut self.withdrawn {
            if withdrawn.successor.as_ref() == Some(&publication.id) {
                withdrawn.successor = Some(former.id.to_string());
            }
        }
        self.publish.extend(with.publish);
        self.withdrawn.extend(with.withdrawn);
    }
}

/// Remembers which finding explains which death.
pub struct Deaths {
    best: Generations<EvidenceId, Best>,
    counters: Generations<EvidenceId, Vec<Counter>>,
    series: Generations<SeriesKey, Series>,
    /// The finding that a death belongs to.
    shown: Generations<EvidenceId, Arc<str>>,
    /// Deaths that a pattern would explain if this one were not explained better.
    refused: Generations<EvidenceId, Vec<Arc<Noted>>>,
}

impl Default for Deaths {
    fn default() -> Self {
        Self {
            best: Generations::new(DEATHS_MAX),
            counters: Generations::new(DEATHS_MAX),
            series: Generations::new(SERIES_MAX),
            shown: Generations::new(DEATHS_MAX),
            refused: Generations::new(DEATHS_MAX),
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
    /// Whether enough of the deaths that a pattern counts are not explained better elsewhere. Where they are not, `anchor` is looked
    /// at again when that changes.
    pub fn are_enough(&mut self, pattern: &Pattern, anchor: &Arc<Noted>, deaths: &[Arc<Noted>]) -> bool {
        let evidence = anchor.clue.evidence;
        // Of the anchor itself it is known by now that nothing better explains it.
        let is_better = |death: &&Arc<Noted>| {
            death.clue.evidence != evidence && self.is_explained_above(death.clue.evidence, pattern.priority)
        };
        let better: Vec<EvidenceId> = deaths.iter().filter(is_better).map(|death| death.clue.evidence).collect();
        if deaths.len() - better.len() >= pattern.anchors_min() {
            return true;
        }
        for death in better {
            let refused = self.refused.entry(death, Vec::new);
            refused.retain(|other| other.clue.evidence != evidence);
            if refused.len() == REFUSED_MAX {
                refused.remove(0);
            }
            refused.push(Arc::clone(anchor));
        }
        false
    }

    /// The place of the pattern that explains a death best so far.
    pub fn explained_by(&self, death: EvidenceId) -> Option<usize> {
        self.best.get(&death).map(|best| best.series.pattern)
    }

    /// What a death counts so far, where its pattern counts several.
    pub fn counted_by(&self, death: EvidenceId) -> &[Arc<Noted>] {
        let series = self.best.get(&death).and_then(|best| self.series.get(&best.series));
        series.and_then(|series| series.anchor(death)).map_or(&[], |anchor| &anchor.deaths)
    }

    fn is_explained_above(&self, death: EvidenceId, priority: u32) -> bool {
        self.best.get(&death).is_some_and(|best| best.priority > priority)
    }

    /// Takes in what explains a death best: a pattern with its place, or nothing.
    pub fn settle(&mut self, death: &Arc<Noted>, best: Option<(usize, &Pattern, Explanation)>) -> Settled {
        let evidence = death.clue.evidence;
        let mut settled = Settled::default();
        let mut changed: Vec<SeriesKey> = Vec::new();
        let new = best.as_ref().map(|(place, pattern, explanation)| Best {
            series: SeriesKey { pattern: *place, scope: explanation.scope(death) },
            priority: pattern.priority,
        });
        let old = self.best.get(&evidence).copied();
        if let Some(old) = old
            && new.is_none_or(|new| new.series != old.series)
        {
            self.leave(old.series, evidence, &mut changed);
        }
        if let Some((new, (_, pattern, explanation))) = new.zip(best) {
            let is_known = old.is_some_and(|old| old.series == new.series);
            self.join(new, pattern, death, explanation, is_known, &mut changed);
        } else {
            self.best.remove(&evidence);
        }
        if old.map(|old| old.priority) != new.map(|new| new.priority) {
            settled.revisit = self.dependent(evidence);
            // Whether it counts for them, and whether they hide it, may be otherwise now.
            changed.extend(self.counters.get(&evidence).into_iter().flatten().map(|counter| counter.series));
        }
        changed.sort_unstable();
        changed.dedup();
        let is_elsewhere = |counter: &Counter| new.is_none_or(|new| counter.priority > new.priority);
        if !self.counters.get(&evidence).into_iter().flatten().any(is_elsewhere) {
            self.shown.remove(&evidence);
        }
        let own = new.map(|new| new.series);
        let mut gone: Vec<(String, EvidenceId, EvidenceId)> = Vec::new();
        for key in changed {
            self.regroup(key, (Some(key) == own).then_some(evidence), &mut settled.publish, &mut gone);
        }
        self.withdraw(gone, &mut settled);
        settled
    }

    fn withdraw(&self, gone: Vec<(String, EvidenceId, EvidenceId)>, settled: &mut Settled) {
        for (id, first, last) in gone {
            // A death may have gone to a finding that took the name over.
            if settled.publish.iter().any(|publication| publication.id == id) {
                continue;
            }
            let of_death = |evidence| self.shown.get(&evidence).filter(|other| ***other != *id);
            let successor = of_death(last).or_else(|| of_death(first)).map(|id| id.to_string());
            settled.withdrawn.push(Withdrawn { id, successor });
        }
    }

    /// Lets the deaths of a publication go on with a finding of an earlier run, whose last death this was. What happened before
    /// `sent_again_ns`, nanoseconds since 1970, may still come again. [`None`] where they are no part of it.
    pub fn adopt(
        &mut self,
        publication: &Publication,
        former: &Former,
        (last, sent_again_ns): (EvidenceId, u64),
    ) -> Option<Settled> {
        let key = SeriesKey { pattern: publication.pattern, scope: publication.scope };
        let mut series = self.series.remove(&key)?;
        let priority = series.priority;
        let is_hidden = |death: EvidenceId| {
            let mut counters = self.counters.get(&death).into_iter().flatten();
            counters.any(|counter| counter.priority > priority)
        };
        let is_adopted =
            series.adopt(former, (last, sent_again_ns), is_hidden, |death| self.is_explained_above(death, priority));
        self.series.insert(key, series);
        if !is_adopted {
            return None;
        }
        let mut settled = Settled::default();
        let mut gone = Vec::new();
        self.regroup(key, Some(publication.last.clue.evidence), &mut settled.publish, &mut gone);
        self.withdraw(gone, &mut settled);
        // Parts of it that were forgotten.
        for withdrawn in settled.withdrawn.iter_mut().filter(|withdrawn| withdrawn.id != *former.id) {
            withdrawn.successor.get_or_insert_with(|| former.id.to_string());
        }
        Some(settled)
    }

    /// A death as it was noted, or one that counts it, where a pattern at such a place explains it.
    pub fn with_or_counting(&self, death: EvidenceId, is_meant: impl Fn(usize) -> bool) -> Option<Arc<Noted>> {
        let best = self.best.get(&death);
        let own = best.and_then(|best| self.series.get(&best.series)?.anchor(death)).map(|anchor| &anchor.noted);
        let is_it = |of: &&Arc<Noted>| self.explained_by(of.clue.evidence).is_some_and(&is_meant);
        own.into_iter().chain(self.counting(death)).find(is_it).cloned()
    }

    /// The anchors that count a death beside themselves.
    pub fn counting(&self, death: EvidenceId) -> impl Iterator<Item = &Arc<Noted>> {
        let counters = self.counters.get(&death).into_iter().flatten();
        let series = counters.filter_map(|counter| self.series.get(&counter.series));
        let anchors = series.flat_map(Series::anchors).filter(move |anchor| anchor.counts(death));
        anchors.map(|anchor| &anchor.noted)
    }

    /// The deaths whose explanation may be another now that this one's is.
    fn dependent(&mut self, evidence: EvidenceId) -> Vec<Arc<Noted>> {
        let mut dependent = self.refused.remove(&evidence).unwrap_or_default();
        dependent.extend(self.counting(evidence).cloned());
        dependent.retain(|other| other.clue.evidence != evidence);
        dependent.sort_by_key(|other| (other.clue.realtime_ns, other.clue.evidence));
        dependent.dedup_by_key(|other| other.clue.evidence);
        dependent
    }

    fn join(
        &mut self,
        best: Best,
        pattern: &Pattern,
        death: &Arc<Noted>,
        explanation: Explanation,
        is_known: bool,
        changed: &mut Vec<SeriesKey>,
    ) {
        let evidence = death.clue.evidence;
        *self.best.entry(evidence, || best) = best;
        changed.push(best.series);
        let deaths = match explanation {
            Explanation::Counted { deaths, .. } => deaths,
            Explanation::Alone | Explanation::Alike { .. } => Vec::new(),
        };
        let series = self.series.entry(best.series, || Series::new(pattern));
        let (before, after) = series.put(Anchor { noted: Arc::clone(death), deaths }, is_known);
        for other in before {
            self.uncount(best.series, other, changed);
        }
        for other in after {
            let counters = self.counters.entry(other, Vec::new);
            match counters.iter_mut().find(|counter| counter.series == best.series) {
                Some(counter) => counter.anchors += 1,
                None => counters.push(Counter { series: best.series, priority: best.priority, anchors: 1 }),
            }
            changed.extend(self.best.get(&other).map(|best| best.series));
        }
    }

    fn leave(&mut self, key: SeriesKey, evidence: EvidenceId, changed: &mut Vec<SeriesKey>) {
        let Some(series) = self.series.get_mut(&key) else { return };
        changed.push(key);
        for other in series.take_out(evidence) {
            self.uncount(key, other, changed);
        }
    }

    /// An anchor of the series counts this death no longer.
    fn uncount(&mut self, key: SeriesKey, death: EvidenceId, changed: &mut Vec<SeriesKey>) {
        if let Some(counters) = self.counters.get_mut(&death) {
            if let Some(counter) = counters.iter_mut().find(|counter| counter.series == key) {
                counter.anchors -= 1;
            }
            counters.retain(|counter| counter.anchors > 0);
            if counters.is_empty() {
                self.counters.remove(&death);
            }
        }
        changed.extend(self.best.get(&death).map(|best| best.series));
    }

    /// Works out the findings of a series again, and what became of those before. The finding of `touched` is published anyway.
    fn regroup(
        &mut self,
        key: SeriesKey,
        touched: Option<EvidenceId>,
        publish: &mut Vec<Publication>,
        gone: &mut Vec<(String, EvidenceId, EvidenceId)>,
    ) {
        let Some(mut series) = self.series.remove(&key) else { return };
        let priority = series.priority;
        let is_hidden = |death: EvidenceId| {
            let mut counters = self.counters.get(&death).into_iter().flatten();
            counters.any(|counter| counter.priority > priority)
        };
        series.make_room(is_hidden);
        let groups = series.groups(is_hidden, |death| self.is_explained_above(death, priority));
        let before = std::mem::take(&mut series.published);
        for group in groups {
            let id: Arc<str> = match (&group.former, before.iter().find(|known| known.has_the_name_of(&group))) {
                (Some(former), _) => Arc::clone(&former.id),
                (None, Some(known)) => Arc::clone(&known.id),
                (None, None) => series.name(key.scope, &group).into(),
            };
            let members = group.members.iter().map(|death| death.clue.evidence);
            for death in members.chain([group.first, group.last.clue.evidence]) {
                let shown = self.shown.entry(death, || Arc::clone(&id));
                *shown = Arc::clone(&id);
            }
            let is_new = !before.iter().any(|known| *known.id == *id && known.says(&group));
            let is_member = |death: EvidenceId| group.members.iter().any(|member| member.clue.evidence == death);
            let is_touched = touched.is_some_and(is_member);
            series.published.push(Group::published(&group, Arc::clone(&id)));
            if is_new || is_touched {
                publish.push(Publication {
                    id: id.to_string(),
                    pattern: key.pattern,
                    last: group.last,
                    count: group.count,
                    started_realtime_ns: group.is_several.then_some(group.first_realtime_ns),
                    members: group.members,
                    scope: key.scope,
                });
            }
        }
        for known in before {
            if !series.published.iter().any(|group| group.id == known.id) {
                let ends = [known.first, known.last];
                for end in ends {
                    if self.shown.get(&end).is_some_and(|id| *id == known.id) {
                        self.shown.remove(&end);
                    }
                }
                gone.push((known.id.to_string(), known.first, known.last));
            }
        }
        if !series.is_empty() {
            self.series.insert(key, series);
        }
    }
}

/// Orders deaths of different nodes: by time, then by evidence.
pub(super) fn is_before(one: &Noted, other: &Noted) -> bool {
    let (at, others) = (Moment::of(&one.clue), Moment::of(&other.clue));
    at.is_before(others) || !others.is_before(at) && one.clue.evidence < other.clue.evidence
}

#[cfg(test)]
pub(super) mod tests;
