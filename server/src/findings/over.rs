//! Ends states that nobody reports any more.
//!
//! What enters: clocks of nodes, and that a node is deleted. What leaves: findings that have ended. What must hold: nothing ends by what
//! is past, of a replay or a spool. What is reported again afterwards goes on.

use std::sync::Arc;

use tapio_wire::service::Finding;

use super::compose;
use super::endings::Open;
use super::moment::Moment;
use super::pattern::PatternSet;
use super::worker::Worker;
use crate::correlate::NodeClock;
use crate::correlate::clue::{Clue, ClueDetail, ClueKind};

impl Worker {
    /// A node goes on: ends the states that it does not report any more.
    pub(super) fn end_quiet(&mut self, clock: &NodeClock) {
        // What is replayed, or waited in a spool, is the past: whether a state goes on is reported afterwards. The log is in
        // order.
        if self.store.is_replaying() && self.log.is_none()
            || !self.watch_clock(clock.node.id, clock.epoch, clock.boottime_ns)
        {
            return;
        }
        let patterns = Arc::clone(&self.patterns);
        let over = self.memory.endings.quiet(&patterns, clock);
        self.end_all(&patterns, over, clock.realtime_ns);
        if self.store.is_replaying() {
            return;
        }
        // Of an earlier run's states it is not known when they were last reported: they have as long, from this run's begin on.
        let quiet = self.memory.quiet_nodes.entry(clock.node.id, || (clock.boottime_ns, 0));
        if clock.boottime_ns < quiet.0 {
            // It was started anew.
            quiet.0 = clock.boottime_ns;
        }
        let (before_ns, heard_ns) = (quiet.1, clock.boottime_ns - quiet.0);
        quiet.1 = heard_ns;
        for pattern in patterns.patterns() {
            if pattern.quiet_ns.is_some_and(|quiet_ns| before_ns <= quiet_ns && heard_ns > quiet_ns) {
                for finding in self.store.restored_on(&pattern.id, &clock.node.name) {
                    self.end_as_it_stands(&finding, clock.realtime_ns);
                }
            }
        }
    }

    /// Kubernetes says that a node is deleted: ends the states that nobody else reports.
    pub(super) fn end_of_deleted(&mut self, patterns: &PatternSet, clue: &Clue) {
        let ClueDetail::Fact(fact) = &clue.detail else { return };
        if fact.kind != ClueKind::NodeCondition || fact.text("reason") != "NodeDeleted" {
            return;
        }
        let over = self.memory.endings.of_deleted(clue.entity.id, Moment::of(clue));
        self.end_all(patterns, over, clue.realtime_ns);
        if self.store.is_replaying() && self.log.is_none() {
            return;
        }
        for pattern in patterns.patterns().iter().filter(|pattern| pattern.quiet_ns.is_some()) {
            for finding in self.store.restored_on(&pattern.id, &clue.entity.name) {
                self.end_as_it_stands(&finding, clue.realtime_ns);
            }
        }
    }

    /// These states are over.
    fn end_all(&mut self, patterns: &PatternSet, over: Vec<Open>, at_ns: u64) {
        for open in over {
            self.conclude(patterns, &open.anchor);
            // What it rested on may be forgotten; then the finding is ended as it stands.
            if let Some(finding) = self.store.get(&open.id).ok().filter(|finding| finding.ongoing) {
                self.end_as_it_stands(&finding, at_ns);
            }
        }
    }

    fn end_as_it_stands(&self, finding: &Finding, at_ns: u64) {
        let mut finding = finding.clone();
        compose::end_quietly(&mut finding, at_ns);
        self.store.publish(finding);
    }
}
