//! When events were lost on a node, by the ledgers in its frames.
//!
//! What enters: every frame's ledger, in the order of its sequence. What leaves: how many events were lost between two
//! moments. What must hold: bounded memory; a loss is never forgotten while it is recent, only its place in time gets coarser.
//!
//! A frame's ledger counts from the start of its epoch, so the difference to the frame before was lost between the two.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use rkyv::{Archive, Deserialize, Serialize};
use tapio_wire::frame::{Frame, Header};
use tapio_wire::ledger::{Ledger, Reason, Stage};

use super::generations::Generations;

const NODES_MAX: usize = 20_000;
const INTERVALS_MAX: usize = 128;

/// What was lost between two moments.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lost {
    /// Events that the ledger counts as lost.
    pub events: u64,
    /// Events that were certainly bulk, part of `events`: sampled, limited, or shed for what is lethal.
    pub bulk: u64,
    /// More may be missing than was counted: a collector died, or frames are missing.
    pub open_interval: bool,
}

impl Lost {
    /// Whether anything is or may be missing.
    pub fn any(&self) -> bool {
        self.events > 0 || self.open_interval
    }

    /// Whether anything of the lethal lane may be missing.
    pub fn any_lethal(&self) -> bool {
        self.events > self.bulk || self.open_interval
    }

    /// Both together.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            events: self.events.saturating_add(other.events),
            bulk: self.bulk.saturating_add(other.bulk),
            open_interval: self.open_interval || other.open_interval,
        }
    }
}

/// A view of what was lost.
pub trait LossView: Send + Sync {
    /// What was lost on a node between two moments of its `CLOCK_BOOTTIME`.
    fn lost(&self, node: u64, from_ns: u64, to_ns: u64) -> Lost;
}

/// What was lost on a node between two moments of its `CLOCK_BOOTTIME`.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interval {
    pub from_ns: u64,
    pub to_ns: u64,
    pub lost: Lost,
}

impl Interval {
    fn overlaps(&self, from_ns: u64, to_ns: u64) -> bool {
        self.from_ns < to_ns && self.to_ns > from_ns
    }
}

/// Intervals of one node, the oldest first; beyond [`INTERVALS_MAX`] the oldest are merged into one.
#[derive(Clone, Default)]
pub struct Intervals(VecDeque<Interval>);

impl Intervals {
    /// Takes one in.
    pub fn push(&mut self, interval: Interval) {
        if self.0.len() == INTERVALS_MAX
            && let Some(oldest) = self.0.pop_front()
            && let Some(next) = self.0.front_mut()
        {
            next.from_ns = next.from_ns.min(oldest.from_ns);
            next.lost = next.lost.and(oldest.lost);
        }
        self.0.push_back(interval);
    }

    /// What was lost between two moments.
    pub fn lost(&self, from_ns: u64, to_ns: u64) -> Lost {
        let of_it = self.0.iter().filter(|interval| interval.overlaps(from_ns, to_ns));
        of_it.fold(Lost::default(), |sum, interval| sum.and(interval.lost))
    }

    /// Forgets all of them: the node's clock started again.
    pub fn clear(&mut self) {
        self.0.clear();
    }
}

struct NodeLosses {
    epoch: u64,
    seq: u64,
    boottime_ns: u64,
    dropped: Dropped,
    is_final: bool,
    intervals: Intervals,
}

/// The losses of all nodes.
pub struct LossBook {
    nodes: Mutex<Generations<u64, NodeLosses>>,
    is_replaying: AtomicBool,
}

impl Default for LossBook {
    fn default() -> Self {
        Self { nodes: Mutex::new(Generations::new(NODES_MAX)), is_replaying: AtomicBool::new(false) }
    }
}

impl LossBook {
    /// Whether frames come out of the archive: then the first one of a node is not the first that this server had of it.
    pub fn set_replaying(&self, is_replaying: bool) {
        self.is_replaying.store(is_replaying, Ordering::Relaxed);
    }

    /// Takes a frame's ledger in; returns what it says was lost since the frame before.
    pub fn observe(&self, frame: &Frame) -> Option<Interval> {
        self.record(frame.header(), Dropped::of(frame.ledger()))
    }

    fn record(&self, header: &Header, dropped: Dropped) -> Option<Interval> {
        let mut nodes = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        let mut is_new = false;
        let node = nodes.entry(header.node, || {
            is_new = true;
            NodeLosses {
                epoch: header.epoch,
                seq: 0,
                boottime_ns: header.first_time_ns,
                dropped: Dropped::default(),
                is_final: false,
                intervals: Intervals::default(),
            }
        });
        let first = if header.seq == 1 { dropped.since(Dropped::default()) } else { Lost::default() };
        let lost = if is_new {
            // What went elsewhere before this server joined the stream in its middle is not known here.
            let is_joined = header.seq != 1 && !self.is_replaying.load(Ordering::Relaxed);
            if is_joined {
                node.boottime_ns = 0;
            }
            Lost { open_interval: is_joined, ..first }
        } else if header.epoch == node.epoch {
            if header.seq <= node.seq {
                return None;
            }
            Lost { open_interval: header.seq != node.seq + 1, ..dropped.since(node.dropped) }
        } else if header.epoch < node.epoch {
            return None;
        } else {
            if header.boottime_ns < node.boottime_ns {
                // Another boot: its clock starts again.
                node.intervals.clear();
                node.boottime_ns = 0;
            }
            Lost { open_interval: !node.is_final || header.seq != 1, ..first }
        };
        let is_early = is_new && node.boottime_ns == 0 && header.first_time_ns != 0;
        let to_ns = if is_early { header.first_time_ns } else { header.boottime_ns };
        let interval = Interval { from_ns: node.boottime_ns.min(to_ns.saturating_sub(1)), to_ns, lost };
        if lost.any() {
            node.intervals.push(interval);
        }
        node.epoch = header.epoch;
        node.seq = header.seq;
        node.boottime_ns = header.boottime_ns;
        node.dropped = dropped;
        node.is_final = header.is_final;
        lost.any().then_some(interval)
    }
}

impl LossView for LossBook {
    fn lost(&self, node: u64, from_ns: u64, to_ns: u64) -> Lost {
        let nodes = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        nodes.get(&node).map(|node| node.intervals.lost(from_ns, to_ns)).unwrap_or_default()
    }
}

/// What a ledger counts as lost so far, whatever it was about.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Dropped {
    pub events: u64,
    /// Events that were certainly bulk, part of the lost ones.
    pub bulk: u64,
}

impl Dropped {
    /// What a frame's ledger counts, except what was left out of one entity only or by the operator's wish.
    pub fn of(ledger: &Ledger) -> Self {
        let mut sum = Self::default();
        for (stage, reason, count) in ledger.accounts.iter().flat_map(|account| account.losses()) {
            // What the operator leaves out, and what one cgroup caused beyond its share: the collector reports which one.
            if matches!((stage, reason), (Stage::Filter, Reason::Excluded) | (Stage::Ring, Reason::RateLimited)) {
                continue;
            }
            sum.events = sum.events.saturating_add(count);
            // The lethal lane is never filtered, nor shed from a queue or the outbox. A frame that was damaged may be of any lane.
            if stage == Stage::Filter || (stage == Stage::Outbox && reason == Reason::Full) {
                sum.bulk = sum.bulk.saturating_add(count);
            }
        }
        sum
    }

    /// What was lost since it was `before`.
    pub fn since(self, before: Self) -> Lost {
        Lost {
            events: self.events.saturating_sub(before.events),
            bulk: self.bulk.saturating_sub(before.bulk),
            open_interval: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use tapio_wire::event::Source;

    use super::*;

    #[test]
    fn only_what_was_shed_for_lethal_events_is_certainly_bulk() {
        let mut ledger = Ledger::default();
        let account = ledger.account_mut(Source::Ebpf);
        account.drop_events(Stage::Outbox, Reason::Full, 3);
        account.drop_events(Stage::Filter, Reason::Sampled, 4);
        account.drop_events(Stage::Outbox, Reason::Malformed, 5);
        let Dropped { events, bulk } = Dropped::of(&ledger);
        assert_eq!((events, bulk), (12, 7), "a damaged frame may be of any lane");
    }
}
