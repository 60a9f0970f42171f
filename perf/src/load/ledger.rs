//! The ledger check: what the generator emitted against what the server says became of it.
//!
//! In: the generator's own count for each node, and the server's status. Out: for each node, what is unexplained. What must
//! hold: the generator's count is compared, not what the collector says was emitted, so that neither can hide a loss.

use std::collections::BTreeMap;

use serde::Serialize;
use tapio_wire::service::{NodeStatus, StatusResponse};

/// The source that memfd rings are counted under.
pub const SOURCE: &str = "shm";

/// One node's account.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct NodeLedger {
    pub node: String,
    /// Events emitted, by the generator's count.
    pub emitted: u64,
    pub archived: u64,
    pub dropped: u64,
    /// Losses by `stage/reason`.
    pub losses: BTreeMap<String, u64>,
    /// Still in rings, queues and outbox.
    pub held: u64,
    /// `emitted − archived − dropped − held`.
    pub unexplained: i64,
    /// What the server itself cannot explain, of all sources of this node.
    pub server_unexplained: i64,
}

impl NodeLedger {
    /// The account of `node`, over all runs of its collector and all servers whose parts are in `status`.
    pub fn new(node: &str, emitted: u64, status: &StatusResponse) -> Self {
        let mut ledger = Self { node: node.to_owned(), emitted, ..Self::default() };
        // Each server that it shipped to has a part.
        for status in status.nodes.iter().filter(|status| status.node == node) {
            ledger.add(status);
        }
        ledger.unexplained = emitted as i64 - ledger.archived as i64 - ledger.dropped as i64 - ledger.held as i64;
        ledger
    }

    fn add(&mut self, status: &NodeStatus) {
        for source in status.epochs.iter().flat_map(|epoch| &epoch.sources) {
            self.server_unexplained += source.unexplained;
            if source.source != SOURCE {
                continue;
            }
            self.archived += source.archived;
            self.held += source.held;
            for loss in &source.dropped {
                self.dropped += loss.events;
                let name = format!("{}/{}", loss.stage, loss.reason);
                *self.losses.entry(name).or_default() += loss.events;
            }
        }
    }

    /// Whether everything that was emitted is archived or declared lost.
    pub fn closes(&self) -> bool {
        self.unexplained == 0 && self.held == 0 && self.server_unexplained == 0
    }

    /// Whether the server has accounted for everything, held events aside.
    pub fn is_settled(&self) -> bool {
        self.archived + self.dropped >= self.emitted
    }
}

impl std::fmt::Display for NodeLedger {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{}: emitted {} = archived {} + dropped {} + held {}, unexplained {}",
            self.node, self.emitted, self.archived, self.dropped, self.held, self.unexplained
        )?;
        if self.server_unexplained != 0 {
            write!(f, " (by the server's count {})", self.server_unexplained)?;
        }
        for (name, events) in &self.losses {
            write!(f, ", {name} {events}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::NodeLedger;
    use tapio_wire::service::{EpochStatus, LossCount, NodeStatus, SourceLedger, StatusResponse};

    fn source(source: &str, archived: u64, held: u64, dropped: u64) -> SourceLedger {
        SourceLedger {
            source: source.into(),
            archived,
            held,
            dropped: vec![LossCount { stage: "ring".into(), reason: "full".into(), events: dropped }],
            ..SourceLedger::default()
        }
    }

    fn status(epochs: Vec<Vec<SourceLedger>>) -> StatusResponse {
        let epochs = epochs.into_iter().map(|sources| EpochStatus { sources, ..EpochStatus::default() }).collect();
        let node = NodeStatus { node: "n".into(), epochs, ..NodeStatus::default() };
        StatusResponse { nodes: vec![node], ..StatusResponse::default() }
    }

    #[test]
    fn it_closes_over_all_epochs_and_counts_one_source() {
        let status =
            status(vec![vec![source("shm", 50, 0, 5), source("collector", 9, 0, 0)], vec![source("shm", 40, 0, 5)]]);
        let ledger = NodeLedger::new("n", 100, &status);
        assert!(ledger.closes() && ledger.is_settled(), "{ledger}");
        assert_eq!(ledger.losses["ring/full"], 10);
    }

    #[test]
    fn what_is_missing_twice_held_or_unknown_does_not_close() {
        let exact = status(vec![vec![source("shm", 90, 0, 10)]]);
        assert_eq!(NodeLedger::new("n", 101, &exact).unexplained, 1);
        assert_eq!(NodeLedger::new("n", 99, &exact).unexplained, -1);
        assert_eq!(NodeLedger::new("other", 7, &exact).unexplained, 7);
        for emitted in [99, 101] {
            assert!(!NodeLedger::new("n", emitted, &exact).closes());
        }
        let held = NodeLedger::new("n", 100, &status(vec![vec![source("shm", 80, 10, 10)]]));
        assert_eq!(held.unexplained, 0);
        assert!(!held.closes() && !held.is_settled());
    }

    #[test]
    fn it_closes_over_all_servers_with_a_part() {
        let mut parts = status(vec![vec![source("shm", 60, 0, 1)]]);
        parts.nodes.extend(status(vec![vec![source("shm", 39, 0, 0)]]).nodes);
        let ledger = NodeLedger::new("n", 100, &parts);
        assert!(ledger.closes() && ledger.archived == 99, "{ledger}");
        parts.nodes.pop();
        assert!(!NodeLedger::new("n", 100, &parts).closes());
    }

    #[test]
    fn what_the_server_cannot_explain_is_not_overlooked() {
        let mut odd = source("collector", 1, 0, 0);
        odd.unexplained = 1;
        let status = status(vec![vec![source("shm", 100, 0, 0), odd]]);
        assert!(!NodeLedger::new("n", 100, &status).closes());
    }
}
