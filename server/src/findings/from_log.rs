//! A finder that is driven by the log of several servers.
//!
//! What enters: batches in the order of the log. What leaves: the same findings on every server that reads the same log. What
//! must hold: nothing but the log decides, its order and its times; what came twice counts once. When the log is read again, what
//! is known of findings stays until the log says otherwise.

use std::sync::Arc;

use super::clue_store::Noted;
use super::doubts::{self, Doubts};
use super::growing::PAUSE_NS;
use super::pattern::PatternSet;
use super::worker::{Memory, Worker};
use crate::cluster::ClusterLosses;
use crate::correlate::batch::{Batch, Entry};
use crate::correlate::clue::{Clue, ClueDetail, EvidenceId};
use crate::correlate::{EntityInfo, Generations, LogUpdate, Topology};

/// Clues of frames that are not covered yet: one that comes again is not counted again.
const SEEN_MAX: usize = 262_144;
/// Stands for a loss among the kinds of clue.
const LOST: u8 = u8::MAX;
/// How often, and for how long after the log was read, it is looked whether what an earlier run found stands.
const RECHECK_NS: u64 = 5_000_000_000;
const RECHECKS_NS: u64 = 180_000_000_000;
/// Nodes remembered.
const NODES_MAX: usize = 20_000;
/// Maximum number of the latest anchors without doubt: they are looked at again when more may be missing.
const REVISITED_MAX: usize = 1024;

/// What a finder that reads the log has besides its memory.
pub struct FromLog {
    pub losses: Arc<ClusterLosses>,
    /// Whether each has come, which it has once it is looked up.
    seen: Generations<(EvidenceId, u8), bool>,
    /// The entity of the clue before, as that had it, and as it is known: a death has several clues.
    entity: Option<(Arc<EntityInfo>, Arc<EntityInfo>)>,
    /// When each node booted, nanoseconds since 1970 by its clock.
    booted: Generations<u64, u64>,
    /// Anchors whose findings must be looked at again when it is known what was missing.
    pub doubts: Doubts,
    /// When it is looked next whether what an earlier run found stands, and until when, nanoseconds since 1970.
    rechecks: Option<(u64, u64)>,
    /// Messages written before this moment were lost, nanoseconds since 1970. Servers may send again what happened before it.
    lacked_until_ns: u64,
    /// The archive was replayed after the start.
    pub has_replayed: bool,
    entities_max: usize,
}

impl FromLog {
    /// Has read nothing yet.
    pub fn new(losses: Arc<ClusterLosses>, entities_max: usize, history_clues: usize) -> Self {
        Self {
            losses,
            seen: Generations::new(SEEN_MAX),
            entity: None,
            booted: Generations::new(NODES_MAX),
            doubts: Doubts::new(history_clues),
            rechecks: None,
            lacked_until_ns: 0,
            has_replayed: false,
            entities_max,
        }
    }
}

impl Worker {
    /// Takes in what the reader of the log sends.
    pub fn take_from_log(&mut self, update: LogUpdate) {
        match update {
            LogUpdate::Batch(batch, at_ns) => self.take_batch(*batch, at_ns),
            LogUpdate::Facts(batch) => self.take_facts(*batch),
            LogUpdate::Kept(finding) => self.take_kept(*finding),
            LogUpdate::Rebuild { begins_ns, is_cut } => self.rebuild(begins_ns, is_cut),
            LogUpdate::CaughtUp { confirms } => {
                // Until the archives have sent again what it lacks, it is a replay.
                if confirms {
                    self.confirm();
                }
            }
            LogUpdate::Confirmed => self.confirm(),
            LogUpdate::Unread(server, at_ns) => {
                let is_new = self.log.as_ref().is_some_and(|log| log.losses.unread(&server, at_ns));
                self.lacks_until(at_ns);
                if is_new {
                    self.revisit_all();
                }
            }
            LogUpdate::Missed(at_ns) => {
                if let Some(log) = &self.log {
                    log.losses.missed(at_ns);
                }
                self.lacks_until(at_ns);
            }
            LogUpdate::Alone(server) => {
                self.store.set_alone(true);
                let Some(log) = &self.log else { return };
                log.losses.alone(&server);
                if log.has_replayed && self.store.is_replaying() {
                    // The log cannot be read to its end, so nothing else ends this replay.
                    self.end_replay();
                }
                self.revisit_all();
            }
        }
    }

    fn confirm(&mut self) {
        self.store.withdraw_unconfirmed();
        self.withdraw_disproved();
        let log_ns = self.log_ns;
        if let Some(log) = &mut self.log {
            log.rechecks = Some((log_ns + RECHECK_NS, log_ns + RECHECKS_NS));
            if log_ns > 0 {
                log.lacked_until_ns = log_ns.min(log.lacked_until_ns);
            }
        }
        self.end_replay();
    }

    /// Other servers may still send again what happened before this moment, nanoseconds since 1970, because the log lost it.
    pub(super) fn sent_again_ns(&self) -> u64 {
        self.log.as_ref().map_or(0, |log| log.lacked_until_ns)
    }

    /// Withdraws what an earlier run found by evidence that the log has, and this run did not.
    fn withdraw_disproved(&self) {
        let Some(losses) = self.log.as_ref().map(|log| &log.losses).filter(|losses| losses.silent().is_empty()) else {
            return;
        };
        let is_in_log = |evidence: EvidenceId| losses.has(evidence.node, evidence.epoch, evidence.seq);
        self.store.withdraw_disproved(&is_in_log);
    }

    /// Looks again, for some time, at what an earlier run found: other servers may take longer to send again what the log lacks.
    fn recheck(&mut self) {
        let log_ns = self.log_ns;
        let Some((next_ns, until_ns)) = self.log.as_ref().and_then(|log| log.rechecks) else { return };
        if log_ns >= next_ns {
            self.withdraw_disproved();
            // Who is silent may have what others lack.
            let is_silent = self.log.as_ref().is_some_and(|log| !log.losses.silent().is_empty());
            let until_ns = if is_silent { log_ns + RECHECKS_NS } else { until_ns };
            let next = (log_ns < until_ns).then_some((log_ns + RECHECK_NS, until_ns));
            if let Some(log) = &mut self.log {
                log.rechecks = next;
            }
        }
    }

    fn rebuild(&mut self, begins_ns: u64, is_cut: bool) {
        let Some(log) = &mut self.log else { return };
        // Servers send again what happened before a new log began.
        (log.rechecks, log.lacked_until_ns) = (None, begins_ns);
        log.losses.clear();
        log.seen = Generations::new(SEEN_MAX);
        log.entity = None;
        self.log_ns = 0;
        log.doubts = Doubts::new(self.config.history_clues);
        self.memory = Memory::new(&self.config, Arc::new(Topology::new(log.entities_max)));
        self.store.set_alone(false);
        // What a pattern looks at may lie as long before the death.
        self.store.restart(begins_ns, self.patterns.window_max().as_nanos() as u64, is_cut);
        self.store.set_replaying(true);
    }

    /// The log may lack something up to this moment: what is known of findings that may rest on it stands.
    fn lacks_until(&mut self, at_ns: u64) {
        if let Some(log) = &mut self.log {
            log.lacked_until_ns = at_ns.max(log.lacked_until_ns);
        }
        self.store.replayed_only_from(at_ns.saturating_add(self.patterns.window_max().as_nanos() as u64));
    }

    fn take_batch(&mut self, batch: Batch, at_ns: u64) {
        let Some(losses) = self.log.as_ref().map(|log| Arc::clone(&log.losses)) else { return };
        self.store.set_now(at_ns);
        // The log's clock may be set. Far back, what waits would wait until the old time is reached again.
        if at_ns.saturating_add(PAUSE_NS) < self.log_ns {
            self.publish_due(u64::MAX);
            self.log_ns = at_ns;
        }
        self.log_ns = at_ns.max(self.log_ns);
        self.publish_due(self.log_ns);
        self.recheck();
        let mut is_unsure_otherwise = losses.heard(&batch.server, &batch.address, at_ns);
        let mut changed: Option<(u64, u64)> = None;
        let mut note = |from_ns: u64, to_ns: u64| {
            let (known_from, known_to) = changed.unwrap_or((from_ns, to_ns));
            changed = Some((known_from.min(from_ns), known_to.max(to_ns)));
        };
        for entry in batch.entries {
            match entry {
                Entry::Described(entity) => {
                    self.forget_entity();
                    self.memory.topology.learn_info(&entity);
                }
                Entry::Clue(clue) => self.take_clue(*clue, &losses),
                Entry::Clock(clock) => {
                    self.note_offset(clock.node.id, clock.realtime_ns, clock.boottime_ns);
                    self.end_quiet(&clock);
                }
                Entry::Lost { node, epoch, seq, interval } => {
                    let lost = EvidenceId { node, epoch, seq, index: u32::MAX };
                    if !losses.has(node, epoch, seq) && self.is_first(lost, LOST) {
                        losses.count(node, interval);
                        let offset_ns = self.offset_of(node);
                        note(interval.from_ns.saturating_add(offset_ns), interval.to_ns.saturating_add(offset_ns));
                    }
                }
                Entry::Covered(covered) => {
                    let node = covered.node.id;
                    self.note_offset(node, covered.to.realtime_ns, covered.to.boottime_ns);
                    if let Some((from_ns, to_ns)) = losses.cover(&batch.server, &covered) {
                        let offset_ns = self.offset_of(node);
                        note(from_ns.saturating_add(offset_ns), to_ns.saturating_add(offset_ns));
                    }
                }
                Entry::Leaving => is_unsure_otherwise |= losses.left(&batch.server, at_ns),
            }
            self.rename();
        }
        if is_unsure_otherwise {
            self.revisit_all();
        } else if let Some((from_ns, to_ns)) = changed {
            // Whoever's finding rests on the node's evidence, on any node.
            let reach_ns = self.patterns.window_max().as_nanos() as u64;
            let (from_ns, to_ns) = (from_ns.saturating_sub(reach_ns), to_ns.saturating_add(reach_ns));
            self.revisit(|clue| (from_ns..=to_ns).contains(&clue.realtime_ns));
        }
    }

    fn forget_entity(&mut self) {
        if let Some(log) = &mut self.log {
            log.entity = None;
        }
    }

    /// Remembers when a node booted, nanoseconds since 1970.
    fn note_offset(&mut self, node: u64, realtime_ns: u64, boottime_ns: u64) {
        if let Some(log) = &mut self.log {
            log.booted.insert(node, realtime_ns.saturating_sub(boottime_ns));
        }
    }

    fn offset_of(&self, node: u64) -> u64 {
        self.log.as_ref().and_then(|log| log.booted.get(&node).copied()).unwrap_or(0)
    }

    /// Whether it comes for the first time.
    fn is_first(&mut self, evidence: EvidenceId, kind: u8) -> bool {
        let Some(log) = &mut self.log else { return false };
        !std::mem::replace(log.seen.entry((evidence, kind), || false), true)
    }

    fn take_clue(&mut self, mut clue: Clue, losses: &ClusterLosses) {
        let EvidenceId { node, epoch, seq, .. } = clue.evidence;
        if losses.has(node, epoch, seq) || !self.is_first(clue.evidence, clue.kind() as u8) {
            return;
        }
        let Some(log) = &mut self.log else { return };
        match &log.entity {
            Some((sent, known)) if Arc::ptr_eq(sent, &clue.entity) => clue.entity = Arc::clone(known),
            _ => {
                let topology = &self.memory.topology;
                topology.learn_info(&clue.entity);
                let sent = Arc::clone(&clue.entity);
                clue.entity = topology.get(sent.node.id, sent.id).unwrap_or(clue.entity);
                log.entity = Some((sent, Arc::clone(&clue.entity)));
            }
        }
        self.take(clue);
    }

    /// What there is: descriptions, and where Services are reached. Of what happened nothing is taken in.
    fn take_facts(&mut self, batch: Batch) {
        self.forget_entity();
        for entry in batch.entries {
            match entry {
                Entry::Described(entity) => self.memory.topology.learn_info(&entity),
                Entry::Clue(mut clue) => {
                    if matches!(&clue.detail, ClueDetail::Fact(fact) if fact.endpoints.is_some()) {
                        self.memory.joins.take(&mut clue);
                    }
                }
                _ => {}
            }
        }
        self.rename();
    }

    /// Looks again at all findings after another set of servers became silent.
    fn revisit_all(&mut self) {
        self.forget_doubts();
        self.revisit(|_| true);
    }

    /// Forgets doubts about what the clue store has forgotten.
    pub(super) fn forget_doubts(&mut self) {
        let Some(log) = self.log.as_mut().filter(|log| !log.doubts.is_empty()) else { return };
        let unresolved = log.doubts.keep(self.memory.clues.every_one().map(|noted| doubts::key(&noted.clue)));
        if unresolved > 0 {
            self.metrics.unresolved.inc_by(unresolved as u64);
            tracing::warn!(unresolved, "some findings stay possible: their missing evidence expired unread");
        }
    }

    /// Looks again at the latest anchors that `concerns` names, and at all of those whose findings are in doubt.
    fn revisit(&mut self, concerns: impl Fn(&Clue) -> bool) {
        let patterns = Arc::clone(&self.patterns);
        let Some(log) = &self.log else { return };
        for anchor in to_revisit(&patterns, self.memory.clues.every_one(), &log.doubts, concerns) {
            self.conclude_again(&patterns, &anchor);
        }
    }
}

fn to_revisit(
    patterns: &PatternSet,
    noted: impl Iterator<Item = Arc<Noted>>,
    doubts: &Doubts,
    concerns: impl Fn(&Clue) -> bool,
) -> Vec<Arc<Noted>> {
    let is_anchor = |noted: &Arc<Noted>| patterns.has_anchor(&noted.mask);
    let mut anchors: Vec<Arc<Noted>> = noted.filter(|noted| concerns(&noted.clue) && is_anchor(noted)).collect();
    anchors.sort_by_key(|noted| doubts::key(&noted.clue));
    let mut older = anchors.len().saturating_sub(REVISITED_MAX);
    anchors.retain(|noted| {
        let is_older = older > 0;
        older = older.saturating_sub(1);
        !is_older || doubts.has(&noted.clue)
    });
    anchors
}

#[cfg(test)]
mod restarts;
