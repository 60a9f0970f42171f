//! What a series of deaths remembers of those that had to make room, and of an earlier run's finding.

use std::collections::HashSet;
use std::sync::Arc;

use foldhash::fast::RandomState;

use super::Anchor;
use crate::correlate::clue::EvidenceId;
use crate::findings::clue_store::Noted;
use crate::findings::deaths::is_before;
use crate::findings::moment::Moment;

/// A finding of an earlier run, which this run continues. Most deaths that it counts are forgotten.
#[derive(Clone)]
pub struct Former {
    pub id: Arc<str>,
    pub count: u32,
    /// Nanoseconds since 1970.
    pub started_ns: u64,
}

/// Deaths that an earlier run's finding has counted, and that other servers may still send again because NATS lost them.
pub struct Late {
    pub started_ns: u64,
    /// No server sends deaths from this moment on again, nanoseconds since 1970: the log has them.
    pub before_ns: u64,
    /// Deaths before this one belong to another group, or the series ignores them.
    pub from: Arc<Noted>,
    pub last: Arc<Noted>,
    /// Deaths between its first and its last one that this run has read.
    pub known: HashSet<EvidenceId, RandomState>,
    /// How many deaths the earlier run has counted and this run has not read yet.
    pub unknown: u32,
}

impl Late {
    /// Reads the deaths of this anchor. Returns how many of them the earlier run has counted and this run reads for the first time.
    pub fn take(&mut self, anchor: &Anchor) -> u32 {
        if is_before(&anchor.noted, &self.from) {
            return 0;
        }
        let own = [Arc::clone(&anchor.noted)];
        let may_come_again = self.started_ns..self.before_ns;
        let is_its =
            |death: &&Arc<Noted>| may_come_again.contains(&death.clue.realtime_ns) && !is_before(&self.last, death);
        let its = anchor.deaths.iter().chain(&own).filter(is_its).map(|death| death.clue.evidence);
        let new = its.filter(|death| self.known.insert(*death)).count() as u32;
        let counted = new.min(self.unknown);
        self.unknown -= counted;
        counted
    }
}

/// Deaths that follow each other within the window.
pub struct Span {
    pub first: Arc<Noted>,
    pub last: Arc<Noted>,
    pub count: u32,
    /// Those of them that are anchors still.
    pub members: Vec<Arc<Noted>>,
    pub former: Option<Former>,
    pub late: Option<Late>,
}

impl Span {
    pub fn of(death: &Arc<Noted>) -> Self {
        let (first, last) = (Arc::clone(death), Arc::clone(death));
        Self { first, last, count: 1, members: Vec::new(), former: None, late: None }
    }

    pub fn place(&self) -> (u64, EvidenceId) {
        (self.first.clue.realtime_ns, self.first.clue.evidence)
    }

    /// Whether two of them are one, by this window.
    pub fn touches(&self, other: &Self, window_ns: u64) -> bool {
        let is_near = |last: &Noted, first: &Noted| {
            is_before(first, last) || Moment::of(&last.clue).apart(Moment::of(&first.clue)) <= window_ns
        };
        is_near(&self.last, &other.first) && is_near(&other.last, &self.first)
    }

    pub fn join(&mut self, other: Self) {
        if is_before(&other.first, &self.first) {
            self.first = other.first;
        }
        if is_before(&self.last, &other.last) {
            self.last = other.last;
        }
        self.count = self.count.saturating_add(other.count);
        self.members.extend(other.members);
        self.former = self.former.take().or(other.former);
        self.late = self.late.take().or(other.late);
    }

    /// Whether a death is one of those that an earlier run has counted.
    pub fn has_counted(&self, death: &Noted) -> bool {
        let is_in_time = |former: &Former| death.clue.realtime_ns >= former.started_ns;
        self.former.as_ref().is_some_and(is_in_time) && is_before(death, &self.first)
    }

    /// Adds it to spans of which no two touch.
    pub fn add_to(mut self, spans: &mut Vec<Self>, window_ns: u64) {
        while let Some(at) = spans.iter().position(|other| self.touches(other, window_ns)) {
            let mut other = spans.swap_remove(at);
            other.join(self);
            self = other;
        }
        spans.push(self);
    }
}

/// What is remembered of a group of anchors that count several deaths, and had to make room.
pub struct Evicted {
    pub first: EvidenceId,
    pub first_realtime_ns: u64,
    pub last: Arc<Noted>,
    /// Deaths that neither an anchor counts any more nor the last of these did.
    pub count: u32,
    /// What the last of them counted.
    pub tail: Vec<EvidenceId>,
    pub former: Option<Former>,
    pub late: Option<Late>,
}

/// When a group began, nanoseconds since 1970, if its first known death was then.
pub fn started(former: Option<&Former>, first_realtime_ns: u64) -> u64 {
    former.map_or(first_realtime_ns, |former| former.started_ns.min(first_realtime_ns))
}

impl Evicted {
    /// Counts its deaths, except those of the last anchor that are left out.
    pub fn deaths(&self, is_left_out: impl Fn(EvidenceId) -> bool) -> u32 {
        let last = self.tail.iter().filter(|death| !is_left_out(**death)).count() as u32;
        self.count.saturating_add(last)
    }

    /// Whether a death happened between the group's beginning and its last death.
    pub fn has_counted(&self, death: &Noted) -> bool {
        let started_ns = started(self.former.as_ref(), self.first_realtime_ns);
        death.clue.realtime_ns >= started_ns && !is_before(&self.last, death)
    }
}
