//! The deaths that one pattern explains in one scope, and how they make up findings.
//!
//! What enters: anchors, each with the deaths that it counts. What leaves: groups of deaths, a finding each. What must hold: the groups
//! follow from the anchors, whatever the order of their arrival. At most [`ALIKE_MAX`] or [`COUNTING_MAX`] anchors are kept. Of
//! older ones it is remembered how many there were and which was the first.

use std::collections::HashSet;
use std::sync::Arc;

use foldhash::fast::RandomState;

use super::clue_store::Noted;
use super::deaths::{finding_id, is_before};
use super::moment::Moment;
use super::pattern::Pattern;
use crate::correlate::clue::EvidenceId;

/// Anchors kept that each stand for one death.
const ALIKE_MAX: usize = 16;
/// Anchors kept that each count several deaths.
const COUNTING_MAX: usize = 16;

/// A death that a pattern explains, and the deaths that it counts for that; none where it stands for itself.
pub struct Anchor {
    pub noted: Arc<Noted>,
    pub deaths: Vec<Arc<Noted>>,
}

impl Anchor {
    fn evidence(&self) -> EvidenceId {
        self.noted.clue.evidence
    }

    fn moment(&self) -> Moment {
        Moment::of(&self.noted.clue)
    }

    /// Whether it counts this death beside itself.
    pub fn counts(&self, death: EvidenceId) -> bool {
        self.others().any(|other| other == death)
    }

    fn others(&self) -> impl Iterator<Item = EvidenceId> {
        let own = self.evidence();
        self.deaths.iter().map(|death| death.clue.evidence).filter(move |death| *death != own)
    }
}

/// Deaths that are one finding.
pub struct Group {
    first: EvidenceId,
    pub first_realtime_ns: u64,
    /// The death that the finding describes.
    pub last: Arc<Noted>,
    pub count: u32,
    /// The finding is named after the group, and not after one death.
    pub is_several: bool,
    pub members: Vec<EvidenceId>,
}

impl Group {
    /// What is remembered of the finding of a group.
    pub fn published(group: &Self, id: Arc<str>) -> Published {
        Published {
            id,
            first: group.first,
            last: group.last.clue.evidence,
            count: group.count,
            is_several: group.is_several,
        }
    }
}

/// The finding of a group as it was published last.
pub struct Published {
    pub id: Arc<str>,
    pub first: EvidenceId,
    pub last: EvidenceId,
    count: u32,
    is_several: bool,
}

impl Published {
    /// Whether the group's finding has the same id.
    pub fn has_the_name_of(&self, group: &Group) -> bool {
        self.is_several == group.is_several && self.first == group.first
    }

    /// Whether nothing has changed.
    pub fn says(&self, group: &Group) -> bool {
        self.has_the_name_of(group) && self.count == group.count && self.last == group.last.clue.evidence
    }
}

/// What is remembered of anchors that had to make room.
struct Evicted {
    first: EvidenceId,
    first_realtime_ns: u64,
    last: Arc<Noted>,
    /// Deaths that no anchor counts any more.
    count: u32,
    /// What the last of them counted.
    tail: Vec<EvidenceId>,
}

/// The deaths that one pattern explains in one scope.
pub struct Series {
    pattern_id: String,
    pub priority: u32,
    window_ns: u64,
    counts_several: bool,
    /// Anchors by time.
    anchors: Vec<Anchor>,
    evicted: Option<Evicted>,
    pub published: Vec<Published>,
}

impl Series {
    /// One without any death.
    pub fn new(pattern: &Pattern) -> Self {
        Self {
            pattern_id: pattern.id.clone(),
            priority: pattern.priority,
            window_ns: pattern.window_ns,
            counts_several: pattern.gathers(),
            anchors: Vec::new(),
            evicted: None,
            published: Vec::new(),
        }
    }

    /// Whether it has no death and no finding.
    pub fn is_empty(&self) -> bool {
        self.anchors.is_empty() && self.published.is_empty()
    }

    /// Returns the anchors, by time.
    pub fn anchors(&self) -> &[Anchor] {
        &self.anchors
    }

    /// The anchor of a death.
    pub fn anchor(&self, death: EvidenceId) -> Option<&Anchor> {
        self.anchors.iter().find(|anchor| anchor.evidence() == death)
    }

    /// Takes an anchor in, in the place of an earlier version of it. Returns the deaths that it no longer counts, and those
    /// that it counts now and did not before.
    pub fn put(&mut self, anchor: Anchor) -> (Vec<EvidenceId>, Vec<EvidenceId>) {
        if self.evicted.as_ref().is_some_and(|evicted| !is_before(&evicted.last, &anchor.noted)) {
            // It is counted there.
            return (Vec::new(), Vec::new());
        }
        let new: Vec<EvidenceId> = anchor.others().collect();
        let known = self.anchors.iter().position(|known| known.evidence() == anchor.evidence());
        let old = known.map(|known| self.anchors.remove(known).others().collect::<Vec<_>>()).unwrap_or_default();
        self.anchors.push(anchor);
        self.sort();
        let anchors_max = if self.counts_several { COUNTING_MAX } else { ALIKE_MAX };
        if self.anchors.len() > anchors_max {
            self.evict();
        }
        let dropped = old.iter().filter(|death| !new.contains(death)).copied().collect();
        let added = new.iter().filter(|death| !old.contains(death)).copied().collect();
        (dropped, added)
    }

    /// Takes an anchor out. Returns the deaths that it counted.
    pub fn take_out(&mut self, evidence: EvidenceId) -> Vec<EvidenceId> {
        let Some(known) = self.anchors.iter().position(|known| known.evidence() == evidence) else { return Vec::new() };
        self.anchors.remove(known).others().collect()
    }

    fn sort(&mut self) {
        let run = |anchor: &Anchor| (anchor.evidence().node, anchor.evidence().epoch);
        // Within one run of a collector the clock of day may be set.
        let is_one_run = self.anchors.windows(2).all(|pair| run(&pair[0]) == run(&pair[1]));
        self.anchors.sort_by_key(|anchor| {
            let clue = &anchor.noted.clue;
            (if is_one_run { clue.boottime_ns } else { clue.realtime_ns }, clue.evidence)
        });
    }

    /// Makes room: the oldest anchor is only counted from now on.
    fn evict(&mut self) {
        let old = self.anchors.remove(0);
        let own = [Arc::clone(&old.noted)];
        let deaths = if old.deaths.is_empty() { &own[..] } else { &old.deaths[..] };
        let is_kept = |death: &&Arc<Noted>| {
            let evidence = death.clue.evidence;
            self.anchors.iter().any(|anchor| anchor.evidence() == evidence || anchor.counts(evidence))
        };
        let count = deaths.iter().filter(|death| !is_kept(death)).count() as u32;
        let tail: Vec<EvidenceId> = deaths.iter().map(|death| death.clue.evidence).collect();
        let first = deaths.iter().min_by(|a, b| is_before(b, a).cmp(&is_before(a, b))).unwrap_or(&old.noted);
        let is_continued = self.evicted.as_ref().is_some_and(|evicted| self.continues(evicted, &old, &tail));
        match self.evicted.take().filter(|_| is_continued) {
            Some(evicted) => {
                self.evicted =
                    Some(Evicted { last: Arc::clone(&old.noted), count: evicted.count + count, tail, ..evicted });
            }
            None => {
                self.evicted = Some(Evicted {
                    first: first.clue.evidence,
                    first_realtime_ns: first.clue.realtime_ns,
                    last: Arc::clone(&old.noted),
                    count,
                    tail,
                });
            }
        }
    }

    /// Whether an anchor goes on with what was evicted; `deaths` are those that it counts.
    fn continues(&self, evicted: &Evicted, anchor: &Anchor, deaths: &[EvidenceId]) -> bool {
        match self.counts_several {
            true => evicted.tail.iter().any(|death| deaths.contains(death)),
            false => Moment::of(&evicted.last.clue).apart(anchor.moment()) <= self.window_ns,
        }
    }

    /// The groups that its deaths make up, by time. Deaths that another series shows are hidden; those that have a better
    /// explanation of their own do not count.
    pub fn groups(&self, is_hidden: impl Fn(EvidenceId) -> bool, is_better: impl Fn(EvidenceId) -> bool) -> Vec<Group> {
        let visible = self.anchors.iter().filter(|anchor| !is_hidden(anchor.evidence()));
        match self.counts_several {
            true => self.groups_of_counted(visible, |death| is_hidden(death) || is_better(death)),
            false => self.groups_alike(visible),
        }
    }

    /// Deaths that follow each other within the window are one group.
    fn groups_alike<'a>(&self, anchors: impl Iterator<Item = &'a Anchor>) -> Vec<Group> {
        let mut groups: Vec<Group> = Vec::new();
        for anchor in anchors {
            let evidence = anchor.evidence();
            let is_near = |last: &Noted| Moment::of(&last.clue).apart(anchor.moment()) <= self.window_ns;
            if let Some(group) = groups.last_mut().filter(|group| is_near(&group.last)) {
                group.last = Arc::clone(&anchor.noted);
                group.count += 1;
                group.is_several = true;
                group.members.push(evidence);
                continue;
            }
            let evicted = self.evicted.as_ref().filter(|evicted| groups.is_empty() && is_near(&evicted.last));
            groups.push(Group {
                first: evicted.map_or(evidence, |evicted| evicted.first),
                first_realtime_ns: evicted.map_or(anchor.noted.clue.realtime_ns, |evicted| evicted.first_realtime_ns),
                last: Arc::clone(&anchor.noted),
                count: 1 + evicted.map_or(0, |evicted| evicted.count),
                is_several: evicted.is_some(),
                members: vec![evidence],
            });
        }
        groups
    }

    /// Anchors that count one death in common are one group.
    fn groups_of_counted<'a>(
        &self,
        anchors: impl Iterator<Item = &'a Anchor>,
        is_left_out: impl Fn(EvidenceId) -> bool,
    ) -> Vec<Group> {
        struct Counted<'a> {
            all: HashSet<EvidenceId, RandomState>,
            counted: Vec<&'a Arc<Noted>>,
            last: &'a Anchor,
        }
        let mut found: Vec<Counted<'a>> = Vec::new();
        for anchor in anchors {
            let own = anchor.evidence();
            let all: HashSet<EvidenceId, RandomState> = anchor.others().chain([own]).collect();
            let (connected, apart): (Vec<_>, Vec<_>) =
                found.into_iter().partition(|other: &Counted<'a>| !other.all.is_disjoint(&all));
            found = apart;
            let others = anchor.deaths.iter().filter(|death| {
                let evidence = death.clue.evidence;
                evidence != own && !is_left_out(evidence)
            });
            let mut counted: Vec<&Arc<Noted>> = others.chain([&anchor.noted]).collect();
            let mut together = all;
            for other in connected {
                counted.extend(other.counted);
                together.extend(other.all);
            }
            counted.sort_by_key(|death| death.clue.evidence);
            counted.dedup_by_key(|death| death.clue.evidence);
            found.push(Counted { all: together, counted, last: anchor });
        }
        let group = |of: Counted<'a>| {
            let first = of.counted.iter().min_by(|a, b| is_before(b, a).cmp(&is_before(a, b)));
            let first = first.map_or(&of.last.noted, |first| *first);
            let evicted =
                self.evicted.as_ref().filter(|evicted| evicted.tail.iter().any(|death| of.all.contains(death)));
            Group {
                first: evicted.map_or(first.clue.evidence, |evicted| evicted.first),
                first_realtime_ns: evicted.map_or(first.clue.realtime_ns, |evicted| evicted.first_realtime_ns),
                last: Arc::clone(&of.last.noted),
                count: of.counted.len() as u32 + evicted.map_or(0, |evicted| evicted.count),
                is_several: true,
                members: of.counted.iter().map(|death| death.clue.evidence).collect(),
            }
        };
        found.into_iter().map(group).collect()
    }

    /// The id of a group's finding.
    pub fn name(&self, scope: u64, group: &Group) -> String {
        match group.is_several {
            true => finding_id(&self.pattern_id, scope, group.first),
            false => finding_id("death", group.last.clue.entity.id, group.last.clue.evidence),
        }
    }
}
