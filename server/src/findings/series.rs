//! The deaths that one pattern explains in one scope, and how they make up findings.
//!
//! What enters: anchors, each with the deaths that it counts. What leaves: groups of deaths, a finding each. What must hold: the groups
//! follow from the anchors, whatever the order of their arrival, as far as they are remembered. At most [`ALIKE_MAX`] or
//! [`COUNTING_MAX`] anchors are kept. Of older ones it is remembered how many there were, and which were the first and the last.

mod older;

use std::collections::HashSet;
use std::sync::Arc;

use foldhash::fast::RandomState;

use super::clue_store::Noted;
use super::deaths::{ALONE, finding_id, is_before};
use super::pattern::Pattern;
use crate::correlate::clue::EvidenceId;
pub use older::Former;
use older::{Evicted, Late, Span, started};

/// Anchors kept that each stand for one death.
const ALIKE_MAX: usize = 16;
/// Anchors kept that each count several deaths.
const COUNTING_MAX: usize = 16;

/// How far the clocks of nodes and of NATS may be apart.
const CLOCKS_APART_NS: u64 = 1_000_000_000;

/// Groups of deaths kept whose anchors had to make room; of what is older still, the findings stand as they are.
const SPANS_MAX: usize = 8;

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
    /// The finding of an earlier run that it goes on with.
    pub former: Option<Former>,
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

/// The deaths that one pattern explains in one scope.
pub struct Series {
    pattern_id: String,
    pub priority: u32,
    window_ns: u64,
    counts_several: bool,
    /// The pattern counts deaths of one container only.
    is_of_one: bool,
    /// Anchors by time.
    anchors: Vec<Anchor>,
    evicted: Vec<Evicted>,
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
            is_of_one: pattern.anchor_step().same.iter().any(|same| same.is_own),
            anchors: Vec::new(),
            evicted: Vec::new(),
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
        let is_evicted = is_known && !(self.evicted.is_empty() && self.spans.is_empty());
        let is_counted = is_evicted
            || self.evicted.iter().any(|evicted| evicted.has_counted(&anchor.noted))
            || self.spans.iter().any(|span| span.has_counted(&anchor.noted));
        if is_counted && self.anchor(anchor.evidence()).is_none() {
            return (Vec::new(), Vec::new());
        }
        let is_of_one = self.is_of_one;
        for (count, late) in self.late() {
            // Two containers of a pod may crash at the same time.
            let is_its = |of: &&mut Late| !is_of_one || of.last.clue.entity.name == anchor.noted.clue.entity.name;
            *count = count.saturating_sub(late.as_mut().filter(is_its).map_or(0, |of| of.take(&anchor)));
            late.take_if(|of| of.unknown == 0);
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

    /// Each group's count of deaths, and the deaths in it that other servers may still send again.
    fn late(&mut self) -> impl Iterator<Item = (&mut u32, &mut Option<Late>)> {
        let spans = self.spans.iter_mut().map(|span| (&mut span.count, &mut span.late));
        spans.chain(self.evicted.iter_mut().map(|evicted| (&mut evicted.count, &mut evicted.late)))
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
        let is_kept =
            |death: EvidenceId| self.anchors.iter().any(|anchor| anchor.evidence() == death || anchor.counts(death));
        let tail: Vec<EvidenceId> = deaths.iter().map(|death| death.clue.evidence).collect();
        let first = deaths.iter().min_by(|a, b| is_before(b, a).cmp(&is_before(a, b))).unwrap_or(&old.noted);
        let last = Arc::clone(&old.noted);
        let (first, first_realtime_ns) = (first.clue.evidence, first.clue.realtime_ns);
        match self.evicted.iter_mut().find(|known| known.tail.iter().any(|death| tail.contains(death))) {
            Some(known) if !is_before(&last, &known.last) => {
                let is_left = |death: &&EvidenceId| !tail.contains(death) && !is_kept(**death);
                let left = known.tail.iter().filter(is_left).count() as u32;
                known.count = known.count.saturating_add(left);
                (known.last, known.tail) = (last, tail);
            }
            Some(_) => {}
            None => {
                let (count, former, late) = (0, None, None);
                self.push_evicted(Evicted { first, first_realtime_ns, last, count, tail, former, late });
            }
        }
    }

    fn push_evicted(&mut self, new: Evicted) {
        self.evicted.push(new);
        if self.evicted.len() > SPANS_MAX {
            self.evicted.sort_by_key(|evicted| (evicted.last.clue.realtime_ns, evicted.last.clue.evidence));
            let oldest = self.evicted.remove(0).first;
            // Nothing is known of it any more that could change it.
            self.published.retain(|published| published.first != oldest);
        }
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
            former: span.former.clone(),
            late: None,
        });
        let mut spans: Vec<Span> = older.collect();
        for anchor in anchors {
            let members = vec![Arc::clone(&anchor.noted)];
            Span { members, ..Span::of(&anchor.noted) }.add_to(&mut spans, self.window_ns);
        }
        spans.sort_by_key(Span::place);
        let group = |span: Span| Group {
            first: span.first.clue.evidence,
            first_realtime_ns: started(span.former.as_ref(), span.first.clue.realtime_ns),
            is_several: span.count > 1,
            last: span.last,
            count: span.count,
            members: span.members,
            former: span.former,
        };
        // Where all deaths of an earlier run's finding are explained otherwise by now, nothing is left.
        spans.into_iter().filter(|span| span.count > 0).map(group).collect()
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
        // What had to make room, where no anchor goes on with it.
        let goes_on = |evicted: &Evicted, of: &Counted<'a>| evicted.tail.iter().any(|death| of.all.contains(death));
        let is_over = |evicted: &&Evicted| {
            evicted.deaths(&is_left_out) > 0
                && !is_left_out(evicted.last.clue.evidence)
                && !found.iter().any(|of| goes_on(evicted, of))
        };
        let over = self.evicted.iter().filter(is_over).map(|evicted| Group {
            first: evicted.first,
            first_realtime_ns: started(evicted.former.as_ref(), evicted.first_realtime_ns),
            last: Arc::clone(&evicted.last),
            count: evicted.deaths(&is_left_out),
            is_several: true,
            members: Vec::new(),
            former: evicted.former.clone(),
        });
        let group = |of: &Counted<'a>| {
            let first = of.counted.iter().min_by(|a, b| is_before(b, a).cmp(&is_before(a, b)));
            let first = first.map_or(&of.last.noted, |first| *first);
            let before: Vec<&Evicted> = self.evicted.iter().filter(|evicted| goes_on(evicted, of)).collect();
            let former = before.iter().find_map(|evicted| evicted.former.as_ref());
            let own = (first.clue.realtime_ns, first.clue.evidence);
            let (first_realtime_ns, first) =
                before.iter().map(|evicted| (evicted.first_realtime_ns, evicted.first)).min().unwrap_or(own);
            Group {
                first,
                first_realtime_ns: started(former, first_realtime_ns),
                former: former.cloned(),
                last: Arc::clone(&of.last.noted),
                count: before.iter().fold(of.counted.len() as u32, |sum, evicted| {
                    let is_counted =
                        |death| is_left_out(death) || of.counted.iter().any(|of| of.clue.evidence == death);
                    sum.saturating_add(evicted.deaths(is_counted))
                }),
                is_several: true,
                members: of.counted.iter().copied().cloned().collect(),
            }
        };
        over.chain(found.iter().map(group)).collect()
    }

    /// Lets the group of a death go on with a finding of an earlier run, whose last death that was. What happened
    /// before `sent_again_ns`, nanoseconds since 1970, may still come again. Returns false where the group is no part of it.
    pub fn adopt(
        &mut self,
        former: &Former,
        (last, sent_again_ns): (EvidenceId, u64),
        is_hidden: impl Fn(EvidenceId) -> bool,
        is_better: impl Fn(EvidenceId) -> bool,
    ) -> bool {
        let groups = self.groups(&is_hidden, is_better);
        let is_last = |death: &&Arc<Noted>| death.clue.evidence == last;
        let has_it = |group: &Group| group.members.iter().find(is_last).cloned();
        let Some((group, last)) = groups.into_iter().find_map(|group| has_it(&group).map(|last| (group, last))) else {
            return false;
        };
        let (after, known): (Vec<_>, Vec<_>) = group.members.iter().partition(|death| is_before(&last, death));
        let known_count = group.count - after.len() as u32;
        let Some(earliest) = group.members.iter().reduce(|a, b| if is_before(b, a) { b } else { a }) else {
            return false;
        };
        let is_all_known = former.started_ns == group.first_realtime_ns && former.count <= known_count;
        if group.former.is_some() || is_all_known || former.started_ns > group.first_realtime_ns {
            return false;
        }
        self.forget_parts(former.started_ns, &group, &last, is_hidden);
        let evicted = self.evicted.iter().find(|evicted| evicted.first == group.first).map(|evicted| &evicted.last);
        let span = self.spans.iter().find(|span| span.first.clue.evidence == group.first).map(|span| &span.first);
        let from = evicted.or(span).unwrap_or(earliest);
        let of_anchors = self.anchors.iter().flat_map(|anchor| anchor.others().chain([anchor.evidence()]));
        let counted = self.evicted.iter().flat_map(|evicted| &evicted.tail).copied().chain(of_anchors);
        // What the earlier run knew besides.
        let count = former.count.saturating_sub(known_count);
        let late = (former.started_ns < sent_again_ns).then(|| Late {
            started_ns: former.started_ns,
            before_ns: sent_again_ns.saturating_add(CLOCKS_APART_NS),
            from: Arc::clone(from),
            last: Arc::clone(&last),
            known: known.iter().map(|death| death.clue.evidence).chain(counted).collect(),
            unknown: count,
        });
        let (former, earliest) = (Some(former.clone()), Arc::clone(earliest));
        if !self.counts_several {
            match self.spans.iter_mut().find(|span| span.first.clue.evidence == group.first) {
                Some(span) => {
                    (span.count, span.former, span.late) = (span.count.saturating_add(count), former, late);
                }
                None => self.spans.push(Span { count, former, late, ..Span::of(&earliest) }),
            }
            return true;
        }
        let Group { first, first_realtime_ns, .. } = group;
        match self.evicted.iter_mut().find(|evicted| evicted.first == first) {
            Some(evicted) => {
                (evicted.count, evicted.former, evicted.late) = (evicted.count.saturating_add(count), former, late);
            }
            None => {
                let tail = vec![earliest.clue.evidence];
                self.push_evicted(Evicted { first, first_realtime_ns, last: earliest, count, tail, former, late });
            }
        }
        true
    }

    /// Forgets other groups' deaths within the time of an earlier run's finding: that finding has counted them.
    fn forget_parts(&mut self, started_ns: u64, group: &Group, last: &Noted, is_hidden: impl Fn(EvidenceId) -> bool) {
        let is_in_time = |death: &Noted| death.clue.realtime_ns >= started_ns && !is_before(last, death);
        let is_member = |death: EvidenceId| group.members.iter().any(|of| of.clue.evidence == death);
        // Two containers of a pod may crash at the same time.
        let is_other = |death: &Noted| self.is_of_one && death.clue.entity.name != last.clue.entity.name;
        let is_part = |death: &Noted| is_in_time(death) && !is_member(death.clue.evidence) && !is_other(death);
        // Deaths that another series shows now may have to be shown by this one later.
        self.anchors.retain(|anchor| !is_part(&anchor.noted) || is_hidden(anchor.evidence()));
        self.spans.retain(|span| span.first.clue.evidence == group.first || !is_part(&span.first));
        self.evicted.retain(|evicted| {
            let goes_on = evicted.tail.iter().any(|death| is_member(*death));
            evicted.first == group.first || goes_on || !is_part(&evicted.last)
        });
    }

    /// The id of a group's finding.
    pub fn name(&self, scope: u64, group: &Group) -> String {
        match group.is_several {
            true => finding_id(&self.pattern_id, scope, group.first),
            false => finding_id(ALONE, group.last.clue.entity.id, group.last.clue.evidence),
        }
    }
}
