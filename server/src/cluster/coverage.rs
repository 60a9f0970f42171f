//! Which frames the log speaks for.
//!
//! What enters: the stretches of frames that servers have worked through, in the order of the log. What leaves: whether a frame
//! is among them, and where a node's frames are missing. What must hold: memory is bounded; what one server lacks and another has
//! is not missing, whichever of them reports first.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::correlate::batch::{Covered, Point};
use crate::correlate::{Generations, Interval, Intervals, Lost};

/// Nodes remembered.
const NODES_MAX: usize = 20_000;
/// Nodes of one server that are named.
const NODES_NAMED_MAX: usize = 100;
/// Stretches of one node: more are forgotten, and count as missing.
const STRETCHES_MAX: usize = 16;

#[derive(Clone, Debug)]
struct Stretch {
    epoch: u64,
    from: Point,
    to: Point,
    is_final: bool,
    /// Who reported its first and its last frame.
    from_server: String,
    to_server: String,
}

#[derive(Clone)]
struct Node {
    name: Arc<str>,
    /// Stretches by epoch and sequence; no two touch.
    stretches: VecDeque<Stretch>,
    counted: Intervals,
}

/// Tracks which frames of each node and epoch are in the log.
#[derive(Clone)]
pub struct Coverage {
    nodes: Generations<u64, Node>,
}

impl Default for Coverage {
    fn default() -> Self {
        Self { nodes: Generations::new(NODES_MAX) }
    }
}

impl Coverage {
    /// Whether everything about a frame is in the log.
    pub fn has(&self, node: u64, epoch: u64, seq: u64) -> bool {
        let of_it = self.nodes.get(&node).into_iter().flat_map(|node| &node.stretches);
        of_it.filter(|known| known.epoch == epoch).any(|known| (known.from.seq..=known.to.seq).contains(&seq))
    }

    /// Takes in what a server counted as lost between two frames.
    pub fn count(&mut self, node: u64, interval: Interval) {
        // Which frames are missing is known by their numbers.
        let lost = Lost { open_interval: false, ..interval.lost };
        self.nodes.entry(node, Node::default).counted.push(Interval { lost, ..interval });
    }

    /// Takes a stretch in. Returns the moments of the node between which more or less is missing than before.
    pub fn take(&mut self, server: &str, covered: &Covered) -> Option<(u64, u64)> {
        let node = self.nodes.entry(covered.node.id, Node::default);
        node.name = Arc::clone(&covered.node.name);
        let missing_before = node.missing();
        node.enter(Stretch {
            epoch: covered.epoch,
            from: covered.from,
            to: covered.to,
            is_final: covered.is_final,
            from_server: server.into(),
            to_server: server.into(),
        });
        let missing = node.missing();
        let gone = missing_before.iter().filter(|gap| !missing.contains(gap));
        let new = missing.iter().filter(|gap| !missing_before.contains(gap));
        let changed: Vec<_> = gone.chain(new).collect();
        Some((changed.iter().map(|gap| gap.0).min()?, changed.iter().map(|gap| gap.1).max()?))
    }

    /// What was lost on a node between two moments of its `CLOCK_BOOTTIME`, as far as the log says.
    pub fn lost(&self, node: u64, from_ns: u64, to_ns: u64) -> Lost {
        let Some(node) = self.nodes.get(&node) else { return Lost::default() };
        let is_missing = node.missing().iter().any(|gap| gap.0 < to_ns && gap.1 > from_ns);
        node.counted.lost(from_ns, to_ns).and(Lost { open_interval: is_missing, ..Lost::default() })
    }

    /// The nodes whose last frames this server reported, in the order of their names; [`NODES_NAMED_MAX`] at the most.
    pub fn nodes_of(&self, server: &str) -> Vec<String> {
        let is_its = |node: &&Node| node.stretches.back().is_some_and(|last| last.to_server == server);
        let mut names: Vec<String> = self.nodes.values().filter(is_its).map(|node| node.name.to_string()).collect();
        names.sort_unstable();
        names.truncate(NODES_NAMED_MAX);
        names
    }
}

impl Default for Node {
    fn default() -> Self {
        Self { name: "".into(), stretches: VecDeque::new(), counted: Intervals::default() }
    }
}

impl Node {
    fn enter(&mut self, new: Stretch) {
        if self.stretches.back().is_some_and(|last| last.epoch < new.epoch && new.to.boottime_ns < last.to.boottime_ns)
        {
            // Another boot: its clock started again.
            self.stretches.clear();
            self.counted.clear();
        }
        let place = self.stretches.partition_point(|known| (known.epoch, known.from.seq) < (new.epoch, new.from.seq));
        self.stretches.insert(place, new);
        let mut at = place;
        if place > 0 && self.touch(place - 1) {
            at -= 1;
        }
        while self.touch(at) {
            self.join(at);
        }
        if self.stretches.len() > STRETCHES_MAX {
            self.stretches.pop_front();
        }
    }

    /// Whether a stretch and the next one leave no frame out between them.
    fn touch(&self, at: usize) -> bool {
        let (Some(first), Some(next)) = (self.stretches.get(at), self.stretches.get(at + 1)) else { return false };
        first.epoch == next.epoch && next.from.seq <= first.to.seq.saturating_add(1)
    }

    /// Makes one of two that touch.
    fn join(&mut self, at: usize) {
        let Some(next) = self.stretches.remove(at + 1) else { return };
        let Some(first) = self.stretches.get_mut(at) else { return };
        // Each server counts between frames that it saw itself; what was lost between the two is counted here.
        let is_empty = next.to.seq < next.from.seq;
        if next.from.seq == first.to.seq + 1 && next.from_server != first.to_server && !is_empty {
            let lost = next.from.dropped.since(first.to.dropped);
            if lost.any() {
                let (from_ns, to_ns) = (first.to.boottime_ns, next.from.boottime_ns.max(first.to.boottime_ns + 1));
                self.counted.push(Interval { from_ns, to_ns, lost });
            }
        }
        if next.to.seq > first.to.seq {
            first.to = next.to;
            first.to_server = next.to_server;
        }
        first.is_final |= next.is_final;
    }

    /// Between which moments frames are missing. A gap reaches to the end of the frame after it: nobody knows when that was begun.
    fn missing(&self) -> Vec<(u64, u64)> {
        let mut missing = Vec::new();
        if let Some(first) = self.stretches.front().filter(|first| first.from.seq != 1) {
            missing.push((0, first.from.boottime_ns));
        }
        for (before, after) in self.stretches.iter().zip(self.stretches.iter().skip(1)) {
            if before.epoch == after.epoch || !before.is_final || after.from.seq != 1 {
                missing.push((before.to.boottime_ns, after.from.boottime_ns.max(before.to.boottime_ns + 1)));
            }
        }
        missing
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::correlate::{Dropped, NodeRef};

    fn point(seq: u64, events: u64) -> Point {
        Point { seq, boottime_ns: seq * 100, realtime_ns: seq * 100, dropped: Dropped { events, bulk: 0 } }
    }

    fn covered(epoch: u64, from: Point, to: Point, is_final: bool) -> Covered {
        Covered { node: NodeRef::named("n"), epoch, from, to, is_final }
    }

    fn node() -> u64 {
        NodeRef::named("n").id
    }

    #[test]
    fn what_one_server_lacks_is_missing_until_another_has_it() {
        let mut coverage = Coverage::default();
        assert_eq!(coverage.take("b", &covered(7, point(11, 0), point(20, 0), false)), Some((0, 1100)), "a new gap");
        assert!(coverage.lost(node(), 500, 900).open_interval, "frames 1 to 10 went elsewhere");
        assert!(!coverage.has(node(), 7, 10) && coverage.has(node(), 7, 11));
        // The other server is behind, and reports in two parts.
        assert_eq!(coverage.take("a", &covered(7, point(1, 0), point(4, 0), false)), Some((0, 1100)));
        assert!(!coverage.lost(node(), 100, 300).open_interval);
        assert!(coverage.lost(node(), 500, 900).open_interval);
        coverage.take("a", &covered(7, point(5, 0), point(10, 0), false));
        assert_eq!(coverage.lost(node(), 0, 5000), Lost::default());
    }

    #[test]
    fn losses_between_the_frames_of_two_servers_are_counted() {
        let mut coverage = Coverage::default();
        coverage.take("a", &covered(7, point(1, 0), point(10, 3), false));
        coverage.take("b", &covered(7, point(11, 8), point(20, 8), false));
        assert_eq!(coverage.lost(node(), 1050, 1060).events, 5);
        // The same server's own counts are reported separately.
        coverage.take("b", &covered(7, point(21, 9), point(30, 9), false));
        assert_eq!(coverage.lost(node(), 0, 5000).events, 5);
    }

    #[test]
    fn what_went_elsewhere_is_missing_before_any_frame_is_covered() {
        let mut coverage = Coverage::default();
        coverage.take("a", &covered(7, point(1, 0), point(9, 3), false));
        coverage.take("b", &Covered::from_here(NodeRef::named("n"), 7, point(11, 8)));
        assert!(coverage.lost(node(), 950, 1050).open_interval && !coverage.has(node(), 7, 11));
        assert_eq!(coverage.nodes_of("b"), ["n"]);
        coverage.take("a", &covered(7, point(10, 3), point(10, 3), false));
        assert_eq!(coverage.lost(node(), 0, 5000), Lost::default());
        assert!(!coverage.has(node(), 7, 11));
        coverage.take("b", &covered(7, point(11, 8), point(12, 8), false));
        assert_eq!(coverage.lost(node(), 0, 5000).events, 5, "counted once");
    }

    #[test]
    fn a_run_without_its_last_frame_leaves_a_gap() {
        let mut coverage = Coverage::default();
        coverage.take("a", &covered(7, point(1, 0), point(10, 0), false));
        coverage.take(
            "b",
            &covered(8, Point { boottime_ns: 3000, ..point(1, 0) }, Point { boottime_ns: 4000, ..point(5, 0) }, false),
        );
        assert!(coverage.lost(node(), 2000, 2500).open_interval);
        // Its last frame had gone to another server.
        assert_eq!(coverage.take("c", &covered(7, point(11, 0), point(12, 0), true)), Some((1000, 3000)));
        assert_eq!(coverage.lost(node(), 0, 5000), Lost::default());
    }

    #[test]
    fn stretches_are_bounded_and_what_is_forgotten_counts_as_missing() {
        let mut coverage = Coverage::default();
        for number in 0..100 {
            coverage.take("a", &covered(7, point(1 + 3 * number, 0), point(2 + 3 * number, 0), false));
        }
        assert!(coverage.nodes.get(&node()).is_some_and(|node| node.stretches.len() == STRETCHES_MAX));
        assert!(coverage.lost(node(), 0, 10).open_interval);
    }
}
