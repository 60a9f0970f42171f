//! A finder that is driven by the log of several servers.
//!
//! What enters: batches in the order of the log. What leaves: the same findings on every server that reads the same log. What must
//! hold: nothing but the log decides, its order and its times; what came twice counts once; when the log is read anew, what is
//! known of findings stays until the log says otherwise.

use std::sync::Arc;

use super::finder::{Memory, Worker};
use super::history::Noted;
use super::pattern::PatternSet;
use crate::cluster::{Batch, ClusterLosses, Entry};
use crate::correlate::signal::{Detail, EvidenceId, Signal};
use crate::correlate::{FromLog as Told, Generations, Topology};

/// Signals of frames that are not covered yet: one that comes again is not counted again.
const SEEN_MAX: usize = 262_144;
/// Anchors that are looked at again when it is known that less, or more, may be missing.
const REVISITED_MAX: usize = 1024;

/// What a finder that reads the log has besides its memory.
pub struct FromLog {
    pub losses: Arc<ClusterLosses>,
    seen: Generations<(EvidenceId, u8), ()>,
    entities_max: usize,
}

impl FromLog {
    /// Has read nothing yet.
    pub fn new(losses: Arc<ClusterLosses>, entities_max: usize) -> Self {
        Self { losses, seen: Generations::new(SEEN_MAX), entities_max }
    }
}

impl Worker {
    /// Takes in what the reader of the log tells.
    pub fn take_from_log(&mut self, told: Told) {
        match told {
            Told::Batch(batch, at_ns) => self.take_batch(*batch, at_ns),
            Told::Facts(batch) => self.take_facts(*batch),
            Told::Rebuild => self.rebuild(),
            Told::CaughtUp => {
                self.store.set_replaying(false);
                self.store.withdraw_unconfirmed();
            }
            Told::Alone(server) => {
                self.store.set_alone(true);
                if let Some(log) = &self.log {
                    log.losses.alone(&server);
                }
                self.revisit(|_| true);
            }
        }
    }

    fn rebuild(&mut self) {
        let Some(log) = &mut self.log else { return };
        log.losses.clear();
        log.seen = Generations::new(SEEN_MAX);
        self.memory = Memory::new(&self.config, Arc::new(Topology::new(log.entities_max)));
        self.store.set_alone(false);
        self.store.restart();
        self.store.set_replaying(true);
    }

    fn take_batch(&mut self, batch: Batch, at_ns: u64) {
        let Some(losses) = self.log.as_ref().map(|log| Arc::clone(&log.losses)) else { return };
        self.store.set_now(at_ns);
        let mut is_unsure_otherwise = losses.heard(&batch.server, &batch.address, at_ns);
        for entry in batch.entries {
            match entry {
                Entry::Described(entity) => self.memory.topology.learn_info(&entity),
                Entry::Signal(signal) => self.take_signal(*signal, &losses),
                Entry::Clock(clock) => self.end_quiet(&clock),
                Entry::Lost { node, interval } => losses.count(node, interval),
                Entry::Covered(covered) => {
                    if let Some((from_ns, to_ns)) = losses.cover(&batch.server, &covered) {
                        let reach_ns = self.patterns.window_max().as_nanos() as u64;
                        let (from_ns, to_ns) = (from_ns.saturating_sub(reach_ns), to_ns.saturating_add(reach_ns));
                        let node = covered.node.id;
                        self.revisit(|signal| {
                            signal.evidence.node == node && (from_ns..=to_ns).contains(&signal.boottime_ns)
                        });
                    }
                }
                Entry::Leaving => is_unsure_otherwise |= losses.left(&batch.server, at_ns),
            }
            self.rename();
        }
        if is_unsure_otherwise {
            self.revisit(|_| true);
        }
    }

    fn take_signal(&mut self, mut signal: Signal, losses: &ClusterLosses) {
        let EvidenceId { node, epoch, seq, .. } = signal.evidence;
        let Some(log) = &mut self.log else { return };
        let key = (signal.evidence, signal.kind() as u8);
        if losses.has(node, epoch, seq) || log.seen.get(&key).is_some() {
            return;
        }
        log.seen.insert(key, ());
        let topology = &self.memory.topology;
        topology.learn_info(&signal.entity);
        signal.entity = topology.get(signal.entity.node.id, signal.entity.id).unwrap_or(signal.entity);
        self.take(signal);
    }

    /// What there is: descriptions, and where Services are reached. Of what happened nothing is taken in.
    fn take_facts(&mut self, batch: Batch) {
        for entry in batch.entries {
            match entry {
                Entry::Described(entity) => self.memory.topology.learn_info(&entity),
                Entry::Signal(mut signal) => {
                    if matches!(&signal.detail, Detail::Fact(fact) if fact.endpoints.is_some()) {
                        self.memory.joins.take(&mut signal);
                    }
                }
                _ => {}
            }
        }
        self.rename();
    }

    /// Looks again at the latest anchors that `concerns` names.
    fn revisit(&mut self, concerns: impl Fn(&Signal) -> bool) {
        let patterns = Arc::clone(&self.patterns);
        for anchor in latest(&patterns, self.memory.history.every_one(), concerns) {
            self.conclude(&patterns, &anchor);
        }
    }
}

fn latest(
    patterns: &PatternSet,
    noted: impl Iterator<Item = Arc<Noted>>,
    concerns: impl Fn(&Signal) -> bool,
) -> Vec<Arc<Noted>> {
    let is_anchor = |noted: &Arc<Noted>| {
        patterns.patterns().iter().any(|pattern| noted.mask.contains(pattern.anchor_step().number))
    };
    let mut anchors: Vec<Arc<Noted>> = noted.filter(|noted| concerns(&noted.signal) && is_anchor(noted)).collect();
    anchors.sort_by_key(|noted| (noted.signal.realtime_ns, noted.signal.evidence, noted.signal.kind() as u8));
    let surplus = anchors.len().saturating_sub(REVISITED_MAX);
    anchors.drain(..surplus);
    anchors
}
