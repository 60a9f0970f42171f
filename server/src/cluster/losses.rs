//! What may be missing, as the log says.
//!
//! What enters: what servers report of the frames that they have worked through, and when each of them reported last. What
//! leaves: how much of a node's events is or may be missing between two moments, and which servers are silent. What must hold:
//! the clock is the log's. A server that is silent makes absence unknown for every node, since what Kubernetes says of a node's
//! pods may have gone to any server.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::coverage::Coverage;
use crate::correlate::batch::Covered;
use crate::correlate::{Interval, LossView, Lost};

/// Silence, by the log's clock, after which a server counts as silent.
pub const SILENT_AFTER: Duration = Duration::from_secs(15);
/// A silent server is given up after this where all its nodes ship to others by now: what is missing of them is known by their frames.
const GONE_AFTER: Duration = Duration::from_secs(180);
/// A silent server is given up after this in any case: nothing of it is in the log any more.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(3600);
/// Time for which a server that no other waits for any more is remembered: answers lack its archive.
const REMEMBERED_FOR: Duration = Duration::from_secs(24 * 3600);
/// At most this many of them are remembered.
const GONE_MAX: usize = 64;
/// For so long after a server announced its end, its messages do not count as a sign of life: they were sent late.
const LEAVING_FOR: Duration = Duration::from_secs(5);
/// Nodes remembered of a server.
const NODES_MAX: usize = 1024;
/// Time for which a server counts as silent after an unreadable message.
const UNREAD_FOR: Duration = Duration::from_secs(60);
/// How long after a missing message no stretch of frames counts: what its frames led to may have been in that message.
pub const RECHECKED_FOR: Duration = Duration::from_secs(10);
/// How long deleted messages are named. Afterwards the stretches that did not count say what is missing.
const DELETED_FOR: Duration = Duration::from_secs(20);
/// Stands for whoever wrote messages that are deleted.
pub const DELETED: &str = "deleted messages of the servers' log";
/// Stands for servers that this one knows nothing of.
const ALL_OTHERS: &str = "all other servers";

/// Answers what may be missing, from what the log says.
#[derive(Default)]
pub struct ClusterLosses {
    inner: Mutex<Inner>,
}

/// What is known of a server.
#[derive(Clone, Debug)]
struct Heard {
    /// When it said anything last, nanoseconds since 1970 by the log's clock.
    at_ns: u64,
    address: String,
    /// Nodes whose frames it has archived since it was heard first.
    nodes: BTreeSet<String>,
}

impl Heard {
    /// Whether it is at the address where the other one was.
    fn took_over(&self, other: &Self) -> bool {
        self.address == other.address && !self.address.is_empty() && self.at_ns > other.at_ns
    }
}

/// Another server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Other {
    pub server: String,
    /// Where its gRPC listens; empty where it did not say so.
    pub address: String,
    /// When it said anything last, nanoseconds since 1970 by the log's clock.
    pub heard_ns: u64,
    pub is_silent: bool,
    /// The nodes that shipped to it last.
    pub nodes: Vec<String>,
}

#[derive(Default)]
struct Inner {
    coverage: Coverage,
    heard: BTreeMap<String, Heard>,
    /// Servers that were given up and had not announced their end.
    gone: BTreeMap<String, Heard>,
    /// Servers that announced their end a moment ago, and when.
    left: BTreeMap<String, u64>,
    /// Servers whose messages could not be read, and when the last one came.
    unread: BTreeMap<String, u64>,
    /// When the first message after a missing one was written, and the last one that was read.
    missed_ns: Option<u64>,
    now_ns: u64,
    silent: Vec<String>,
    /// While this server feeds itself: its own name.
    alone: Option<String>,
}

impl ClusterLosses {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets everything: the log is read again.
    pub fn clear(&self) {
        let mut inner = self.lock();
        // What is given up is not heard of again by reading.
        *inner = Inner { gone: std::mem::take(&mut inner.gone), ..Inner::default() };
    }

    /// A server said something, and where it can be reached. True when another set of servers is silent than before.
    pub fn heard(&self, server: &str, address: &str, at_ns: u64) -> bool {
        let mut inner = self.lock();
        if inner.left.contains_key(server) {
            let is_leaving = inner.look(at_ns);
            if inner.left.contains_key(server) {
                return is_leaving;
            }
        }
        let new = || Heard { at_ns, address: String::new(), nodes: BTreeSet::new() };
        let known = inner.heard.entry(server.to_owned()).or_insert_with(new);
        known.at_ns = at_ns.max(known.at_ns);
        if !address.is_empty() && known.address != address {
            known.address = address.to_owned();
        }
        inner.gone.remove(server);
        inner.look(at_ns)
    }

    /// Every server but this one.
    pub fn others(&self, own: &str) -> Vec<Other> {
        let inner = self.lock();
        let others = inner.heard.iter().filter(|(server, _)| *server != own);
        let is_taken = |heard: &Heard| inner.heard.values().any(|other| other.took_over(heard));
        others
            .map(|(server, heard)| Other {
                server: server.clone(),
                address: if is_taken(heard) { String::new() } else { heard.address.clone() },
                heard_ns: heard.at_ns,
                is_silent: inner.silent.contains(server),
                nodes: inner.coverage.nodes_of(server),
            })
            .collect()
    }

    /// Servers that were given up and had not announced their end. Their archives are in no answer.
    pub fn gone(&self) -> Vec<Other> {
        let of = |(server, heard): (&String, &Heard)| Other {
            server: server.clone(),
            address: String::new(),
            heard_ns: heard.at_ns,
            is_silent: true,
            nodes: heard.nodes.iter().cloned().collect(),
        };
        self.lock().gone.iter().map(of).collect()
    }

    /// A message of a server could not be read. True when another set of servers is silent than before.
    pub fn unread(&self, server: &str, at_ns: u64) -> bool {
        let mut inner = self.lock();
        inner.unread.insert(server.to_owned(), at_ns);
        inner.look(at_ns)
    }

    /// Servers whose messages could not be read lately.
    pub fn unread_servers(&self) -> Vec<String> {
        self.lock().unread.keys().filter(|server| *server != DELETED).cloned().collect()
    }

    /// A message of before this moment is missing.
    pub fn missed(&self, at_ns: u64) {
        let mut inner = self.lock();
        (inner.missed_ns, inner.now_ns) = (Some(at_ns), at_ns);
    }

    /// A server ends in an orderly way: nothing of it is missing.
    pub fn left(&self, server: &str, at_ns: u64) -> bool {
        let mut inner = self.lock();
        inner.heard.remove(server);
        inner.left.insert(server.to_owned(), at_ns);
        inner.look(at_ns)
    }

    /// Notes that this server feeds itself from now on and receives nothing from others.
    pub fn alone(&self, server: &str) {
        let mut inner = self.lock();
        inner.alone = Some(server.to_owned());
        let others: Vec<String> = inner.heard.keys().filter(|other| *other != server).cloned().collect();
        inner.silent = if others.is_empty() { vec![ALL_OTHERS.to_owned()] } else { others };
    }

    /// The servers whose evidence may be missing, by name.
    pub fn silent(&self) -> Vec<String> {
        self.lock().silent.clone()
    }

    /// How many servers have been silent for [`SILENT_AFTER`] and had not announced their end; none while this server hears nobody.
    pub fn unheard(&self) -> usize {
        let inner = self.lock();
        let is_unheard = |server: &&String| inner.heard.contains_key(*server) && !inner.unread.contains_key(*server);
        if inner.alone.is_some() { 0 } else { inner.silent.iter().filter(is_unheard).count() }
    }

    /// Takes in that a stretch of frames was worked through; see [`Coverage::take`]. Soon after a missing message it does not
    /// count: then its frames are published again from the archive.
    pub fn cover(&self, server: &str, covered: &Covered) -> Option<(u64, u64)> {
        let mut inner = self.lock();
        if inner.missed_ns.is_some_and(|missed_ns| is_rechecked(missed_ns, inner.now_ns)) {
            return None;
        }
        if let Some(heard) = inner.heard.get_mut(server)
            && heard.nodes.len() < NODES_MAX
            && !heard.nodes.contains(&*covered.node.name)
        {
            heard.nodes.insert(covered.node.name.to_string());
        }
        inner.coverage.take(server, covered)
    }

    /// Takes in what a server counted as lost.
    pub fn count(&self, node: u64, interval: Interval) {
        self.lock().coverage.count(node, interval);
    }

    /// Whether everything about a frame came before.
    pub fn has(&self, node: u64, epoch: u64, seq: u64) -> bool {
        self.lock().coverage.has(node, epoch, seq)
    }

    /// Which frames the log speaks for.
    pub fn coverage(&self) -> Coverage {
        self.lock().coverage.clone()
    }
}

/// Whether what was written at a moment is not relied on, since a message that was written just before is missing. The log's clock
/// may be set.
pub fn is_rechecked(missed_ns: u64, at_ns: u64) -> bool {
    Duration::from_nanos(at_ns.abs_diff(missed_ns)) < RECHECKED_FOR
}

impl Inner {
    fn look(&mut self, at_ns: u64) -> bool {
        self.now_ns = at_ns;
        if self.alone.is_some() {
            return false;
        }
        let age = |heard_ns: u64| Duration::from_nanos(at_ns.saturating_sub(heard_ns));
        let coverage = &self.coverage;
        let has_silent = self.heard.values().any(|heard| age(heard.at_ns) >= SILENT_AFTER);
        let all: Vec<Heard> = if has_silent { self.heard.values().cloned().collect() } else { Vec::new() };
        let gone = &mut self.gone;
        self.heard.retain(|server, heard| {
            let age = age(heard.at_ns);
            // It came back under another name. What is missing of its nodes is known by their frames.
            if age >= SILENT_AFTER && all.iter().any(|other| other.took_over(heard)) {
                return false;
            }
            let is_kept = age < GONE_AFTER || age < FORGOTTEN_AFTER && !coverage.nodes_of(server).is_empty();
            if !is_kept && !heard.nodes.is_empty() {
                gone.insert(server.clone(), heard.clone());
            }
            is_kept
        });
        self.left.retain(|_, left_ns| age(*left_ns) < LEAVING_FOR);
        gone.retain(|_, heard| age(heard.at_ns) < REMEMBERED_FOR);
        while gone.len() > GONE_MAX {
            let oldest = gone.iter().min_by_key(|(_, heard)| heard.at_ns).map(|(server, _)| server.clone());
            oldest.map(|server| gone.remove(&server));
        }
        self.unread.retain(|server, unread_ns| {
            let named_for = if server == DELETED { DELETED_FOR } else { UNREAD_FOR };
            age(*unread_ns) < named_for
        });
        let quiet = self.heard.iter().filter(|(_, heard)| age(heard.at_ns) >= SILENT_AFTER).map(|(server, _)| server);
        let silent: BTreeSet<&String> = quiet.chain(self.unread.keys()).collect();
        let silent: Vec<String> = silent.into_iter().cloned().collect();
        let is_new = silent != self.silent;
        self.silent = silent;
        is_new
    }
}

impl LossView for ClusterLosses {
    fn lost(&self, node: u64, from_ns: u64, to_ns: u64) -> Lost {
        let inner = self.lock();
        let is_unsure = !inner.silent.is_empty();
        inner.coverage.lost(node, from_ns, to_ns).and(Lost { open_interval: is_unsure, ..Lost::default() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::correlate::batch::Point;
    use crate::correlate::{Dropped, NodeRef};

    const S: u64 = 1_000_000_000;

    #[test]
    fn frames_after_a_missing_message_count_when_they_come_again() {
        let point =
            |seq| Point { seq, boottime_ns: seq * S, realtime_ns: seq * S, dropped: Dropped { events: 0, bulk: 0 } };
        let covered = |from, to| Covered {
            node: NodeRef::named("n"),
            epoch: 1,
            from: point(from),
            to: point(to),
            is_final: false,
        };
        let (losses, node) = (ClusterLosses::default(), NodeRef::named("n").id);
        losses.heard("a", "", 100 * S);
        losses.cover("a", &covered(1, 4));
        losses.missed(101 * S);
        losses.unread(DELETED, 101 * S);
        assert_eq!((losses.silent(), losses.unread_servers()), (vec![DELETED.to_owned()], Vec::new()));
        losses.heard("a", "", 102 * S);
        assert_eq!(losses.cover("a", &covered(5, 6)), None);
        assert!(losses.has(node, 1, 4) && !losses.has(node, 1, 5));
        // Also once nobody is in doubt any more.
        losses.heard("a", "", 110 * S);
        losses.cover("a", &covered(7, 8));
        assert!(!losses.has(node, 1, 7));
        losses.heard("a", "", 121 * S);
        losses.cover("a", &covered(9, 9));
        assert!(losses.silent().is_empty() && losses.lost(node, 5 * S, 6 * S).open_interval);
        losses.cover("a", &covered(5, 8));
        assert!(losses.has(node, 1, 6) && !losses.lost(node, 0, 9 * S).any());
    }

    #[test]
    fn a_silent_server_makes_absence_unknown_until_heard_again() {
        let losses = ClusterLosses::default();
        assert!(!losses.heard("a", "", 100 * S) && !losses.heard("b", "", 101 * S));
        assert!(!losses.lost(7, 0, 10).any());
        assert!(losses.heard("a", "", 120 * S), "b says nothing");
        assert_eq!(losses.silent(), ["b"]);
        assert!(losses.lost(7, 0, 10).open_interval);
        assert!(losses.heard("b", "", 121 * S));
        assert!(!losses.lost(7, 0, 10).any());
        losses.heard("a", "", 200 * S);
        assert!(losses.left("b", 201 * S), "it said that it ends");
        // A message that had waited is no sign of life.
        assert!(!losses.heard("b", "", 202 * S) && losses.others("a").is_empty());
        losses.heard("c", "", 202 * S);
        let point = Point { seq: 1, boottime_ns: S, realtime_ns: S, dropped: Dropped { events: 0, bulk: 0 } };
        let node = NodeRef::named("n");
        losses.cover("c", &Covered { node, epoch: 1, from: point, to: point, is_final: false });
        let node = NodeRef::named("n");
        losses.cover("a", &Covered { node, epoch: 2, from: point, to: point, is_final: false });
        losses.heard("a", "", 230 * S);
        assert_eq!(losses.silent(), ["c"]);
        // The same server, killed and named otherwise.
        losses.heard("d", "10.0.0.4:9090", 231 * S);
        losses.heard("e", "10.0.0.4:9090", 232 * S);
        let addresses: Vec<_> = losses.others("a").into_iter().map(|other| (other.server, other.address)).collect();
        let of = |server: &str, address: &str| (server.to_owned(), address.to_owned());
        assert_eq!(addresses, [of("c", ""), of("d", ""), of("e", "10.0.0.4:9090")], "nobody is asked twice");
        losses.heard("e", "10.0.0.4:9090", 250 * S);
        assert!(losses.others("a").iter().all(|other| other.server != "d") && losses.silent() == ["a", "c"]);
        losses.left("e", 251 * S);
        losses.heard("a", "", 400 * S);
        assert!(losses.silent().is_empty(), "no node had shipped to it last");
        // What it archived is missing still.
        assert_eq!(
            losses.gone().iter().map(|other| (&*other.server, other.heard_ns)).collect::<Vec<_>>(),
            [("c", 202 * S)]
        );
        assert_eq!(losses.gone()[0].nodes, ["n"]);
        losses.clear();
        assert_eq!(losses.gone().len(), 1, "reading the log again tells nothing of it");
        losses.heard("c", "", 401 * S);
        assert!(losses.gone().is_empty() && losses.silent().is_empty());
    }
}
