//! When events were lost on a node, by the ledgers in its frames.
//!
//! What enters: every frame's ledger, in the order of its sequence. What leaves: how many events were lost between two
//! moments. What must hold: bounded memory; a loss is never forgotten while it is recent, only its place in time gets coarser.
//!
//! A frame's ledger counts from the start of its epoch, so the difference to the frame before was lost between the two.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use tapio_wire::frame::{Frame, Header};
use tapio_wire::ledger::{Ledger, Reason, Stage};

use super::generations::Generations;

const NODES_MAX: usize = 20_000;
const INTERVALS_MAX: usize = 128;

/// What was lost between two moments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lost {
    /// Events that the ledger counts as lost.
    pub events: u64,
    /// Of those, the ones that were certainly bulk: sampled, limited, or shed for what is lethal.
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

/// Tells what was lost.
pub trait LossView: Send + Sync {
    /// What was lost on a node between two moments of its `CLOCK_BOOTTIME`.
    fn lost(&self, node: u64, from_ns: u64, to_ns: u64) -> Lost;
}

#[derive(Clone, Copy)]
struct Interval {
    from_ns: u64,
    to_ns: u64,
    lost: Lost,
}

struct NodeLosses {
    epoch: u64,
    seq: u64,
    boottime_ns: u64,
    dropped: Dropped,
    is_final: bool,
    intervals: VecDeque<Interval>,
}

/// The losses of all nodes.
pub struct LossBook {
    nodes: Mutex<Generations<u64, NodeLosses>>,
}

impl Default for LossBook {
    fn default() -> Self {
        Self { nodes: Mutex::new(Generations::new(NODES_MAX)) }
    }
}

impl LossBook {
    /// Takes a frame's ledger in.
    pub fn observe(&self, frame: &Frame) {
        self.record(frame.header(), dropped(frame.ledger()));
    }

    fn record(&self, header: &Header, dropped: Dropped) {
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
                intervals: VecDeque::new(),
            }
        });
        let of_all = Lost { events: dropped.events, bulk: dropped.bulk, open_interval: false };
        let first = if header.seq == 1 { of_all } else { Lost::default() };
        let lost = if is_new {
            // What a stream lost before it was joined in its middle is not known to be recent.
            Lost { open_interval: false, ..first }
        } else if header.epoch == node.epoch {
            if header.seq <= node.seq {
                return;
            }
            Lost {
                events: dropped.events.saturating_sub(node.dropped.events),
                bulk: dropped.bulk.saturating_sub(node.dropped.bulk),
                open_interval: header.seq != node.seq + 1,
            }
        } else if header.epoch < node.epoch {
            return;
        } else {
            if header.boottime_ns < node.boottime_ns {
                // Another boot: its clock starts anew.
                node.intervals.clear();
                node.boottime_ns = 0;
            }
            Lost { open_interval: !node.is_final || header.seq != 1, ..first }
        };
        if lost.any() {
            node.push(Interval {
                from_ns: node.boottime_ns.min(header.boottime_ns.saturating_sub(1)),
                to_ns: header.boottime_ns,
                lost,
            });
        }
        node.epoch = header.epoch;
        node.seq = header.seq;
        node.boottime_ns = header.boottime_ns;
        node.dropped = dropped;
        node.is_final = header.is_final;
    }
}

impl LossView for LossBook {
    fn lost(&self, node: u64, from_ns: u64, to_ns: u64) -> Lost {
        let nodes = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        let mut sum = Lost::default();
        for interval in nodes.get(&node).iter().flat_map(|node| &node.intervals) {
            if interval.from_ns < to_ns && interval.to_ns > from_ns {
                sum = sum.and(interval.lost);
            }
        }
        sum
    }
}

impl NodeLosses {
    fn push(&mut self, interval: Interval) {
        if self.intervals.len() == INTERVALS_MAX
            && let Some(oldest) = self.intervals.pop_front()
            && let Some(next) = self.intervals.front_mut()
        {
            next.from_ns = oldest.from_ns;
            next.lost = next.lost.and(oldest.lost);
        }
        self.intervals.push_back(interval);
    }
}

/// What a ledger counts as lost so far.
#[derive(Clone, Copy, Default)]
struct Dropped {
    events: u64,
    bulk: u64,
}

/// Everything lost that may have been about anything on the node.
fn dropped(ledger: &Ledger) -> Dropped {
    let mut sum = Dropped::default();
    for (stage, reason, count) in ledger.accounts.iter().flat_map(|account| account.losses()) {
        // What the operator leaves out, and what one cgroup brought about beyond its share: the collector tells of which.
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
        let Dropped { events, bulk } = dropped(&ledger);
        assert_eq!((events, bulk), (12, 7), "a damaged frame may be of any lane");
    }
}
