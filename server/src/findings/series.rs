//! The deaths that one pattern explains in one scope, and how they make up findings.
//!
//! What enters: anchors, each with the deaths that it counts. What leaves: groups of deaths, a finding each. What must hold: the groups
//! follow from the anchors, whatever the order of their arrival, as far as they are remembered. At most [`ALIKE_MAX`] or
//! [`COUNTING_MAX`] anchors are kept. Of older ones it is remembered how many there were, and which were the first and the last.

use std::collections::HashSet;
use std::sync::Arc;

use foldhash::fast::RandomState;

use super::clue_store::Noted;
use super::deaths::{ALONE, finding_id, is_before};
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
    pub first: EvidenceId,
    pub first_realtime_ns: u64,
    /// The death that the finding describes.
    pub last: Arc<Noted>,
    pub count: u32,
    /// The finding is named after the group, and not after one death.
    pub is_several: bool,
    pub members: Vec<Arc<Noted>>,
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

/// Groups of deaths kept that are older than the anchors; of what is older still, the findings stand as they are.
const SPANS_MAX: usize = 8;

/// Deaths that follow each other within the window.
struct Span {
    first: Arc<Noted>,
    last: Arc<Noted>,
    count: u32,
    /// Those of them that are anchors still.
    members: Vec<Arc<Noted>>,
}

impl Span {
    fn of(death: &Arc<Noted>) -> Self {
        Self { first: Arc::clone(death), last: Arc::clone(death), count: 1, members: Vec::new() }
    }

    fn place(&self) -> (u64, EvidenceId) {
        (self.first.clue.realtime_ns, self.first.clue.evidence)
    }

    /// Whether two of them are one, by this window.
    fn touches(&self, other: &Self, window_ns: u64) -> bool {
        let is_near = |last: &Noted, first: &Noted| {
            is_before(first, last) || Moment::of(&last.clue).apart(Moment::of(&first.clue)) <= window_ns
        };
        is_near(&self.last, &other.first) && is_near(&other.last, &self.first)
    }

    fn join(&mut self, other: Self) {
        if is_before(&other.first, &self.first) {
            self.first = other.first;
        }
        if is_before(&self.last, &other.last) {
            self.last = other.last;
        }
        self.count += other.count;
        self.members.extend(other.members);
    }

    /// Adds it to spans of which no two touch.
    fn add_to(mut self, spans: &mut Vec<Self>, window_ns: u64) {
        while let Some(at) = spans.iter().position(|other| self.touches(other, window_ns)) {
            let mut other = spans.swap_remove(at);
            other.join(self);
            self = other;
        }
        spans.push(self);
    }
}

/// What is remembered of anchors that count several deaths, and had to make room.
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
    /// Deaths that had to make room, where each stands for itself.
    spans: Vec<Span>,
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
            spans: Vec::new(),
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
    /// that it counts now and did not before. `is_known` where it belonged to this series before.
    pub fn put(&mut self, anchor: Anchor, is_known: bool) -> (Vec<EvidenceId>, Vec<EvidenceId>) {
        let is_counted = match self.counts_several {
            true => self.evicted.as_ref().is_some_and(|evicted| !is_before(&evicted.last, &anchor.noted)),
            false => is_known && !self.spans.is_empty() && self.anchor(anchor.evidence()).is_none(),
        };
        if is_counted {
            return (Vec::new(), Vec::new());
        }
        let new: Vec<EvidenceId> = anchor.others().collect();
        let known = self.anchors.iter().position(|known| known.evidence() == anchor.evidence());
        let old = known.map(|known| self.anchors.remove(known).others().collect::<Vec<_>>()).unwrap_or_default();
        self.anchors.push(anchor);
        self.sort();
        if self.counts_several && self.anchors.len() > COUNTING_MAX {
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
        let last = Arc::clone(&old.noted);
        let (first, first_realtime_ns) = (first.clue.evidence, first.clue.realtime_ns);
        let new = Evicted { first, first_realtime_ns, last: Arc::clone(&last), count, tail };
        self.evicted = Some(match self.evicted.take() {
            None => new,
            Some(known) if known.tail.iter().any(|death| new.tail.contains(death)) => {
                Evicted { last, count: known.count + count, tail: new.tail, ..known }
            }
            Some(known) => {
                // Nothing is known of it any more that could change it.
                self.published.retain(|published| published.first != known.first);
                new
            }
        });
    }

    /// Makes room where each death stands for itself: of the oldest anchors only their time is kept. What another series shows is
    /// not counted here.
    pub fn make_room(&mut self, is_hidden: impl Fn(EvidenceId) -> bool) {
        while !self.counts_several && self.anchors.len() > ALIKE_MAX {
            let death = self.anchors.remove(0).noted;
            if !is_hidden(death.clue.evidence) {
                Span::of(&death).add_to(&mut self.spans, self.window_ns);
            }
        }
        if self.spans.len() > SPANS_MAX {
            self.spans.sort_by_key(Span::place);
            let oldest = self.spans.remove(0).first.clue.evidence;
            // Nothing is known of it any more that could change it.
            self.published.retain(|published| published.first != oldest);
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
        let older = self.spans.iter().map(|span| Span {
            first: Arc::clone(&span.first),
            last: Arc::clone(&span.last),
            count: span.count,
            members: Vec::new(),
        });
        let mut spans: Vec<Span> = older.collect();
        for anchor in anchors {
            let members = vec![Arc::clone(&anchor.noted)];
            Span { members, ..Span::of(&anchor.noted) }.add_to(&mut spans, self.window_ns);
        }
        spans.sort_by_key(Span::place);
        let group = |span: Span| Group {
            first: span.first.clue.evidence,
            first_realtime_ns: span.first.clue.realtime_ns,
            is_several: span.count > 1,
            last: span.last,
            count: span.count,
            members: span.members,
        };
        spans.into_iter().map(group).collect()
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
        // The last that had to make room, where no anchor goes on with them.
        let is_over = |evicted: &&Evicted| {
            let goes_on = |of: &Counted<'a>| evicted.tail.iter().any(|death| of.all.contains(death));
            evicted.count > 0 && !is_left_out(evicted.last.clue.evidence) && !found.iter().any(goes_on)
        };
        let over = self.evicted.as_ref().filter(is_over).map(|evicted| Group {
            first: evicted.first,
            first_realtime_ns: evicted.first_realtime_ns,
            last: Arc::clone(&evicted.last),
            count: evicted.count,
            is_several: true,
            members: Vec::new(),
        });
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
                members: of.counted.into_iter().cloned().collect(),
            }
        };
        over.into_iter().chain(found.into_iter().map(group)).collect()
    }

    /// The id of a group's finding.
    pub fn name(&self, scope: u64, group: &Group) -> String {
        match group.is_several {
            true => finding_id(&self.pattern_id, scope, group.first),
            false => finding_id(ALONE, group.last.clue.entity.id, group.last.clue.evidence),
        }
    }
}
