//! What the finder's thread does: notes clues, explains deaths and states, publishes findings.
//!
//! What enters: clues from the bus. What leaves: findings in the store. What must hold: nothing polls, a clue is dealt with when
//! it comes. Evidence that arrives after its anchor makes the anchor be looked at again, so order does not matter.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, RecvTimeoutError};

use tapio_wire::event::EntityKind;

use super::absorb::{Absorber, Action};
use super::clue_store::{ClueStore, Noted};
use super::compose::{self, Context};
use super::deaths::{Deaths, Explanation, Publication, Withdrawn};
use super::endings::{self, Endings};
use super::finder::FinderConfig;
use super::finder_metrics::FinderMetrics;
use super::from_log::FromLog;
use super::growing::Growing;
use super::joins::{HistoryKey, Joins, Keys};
use super::matching::{self, Match, Outcome};
use super::pattern::{Pattern, PatternSet};
use super::plan::Plans;
use super::schema::Scope;
use super::step_mask::StepMask;
use super::store::FindingStore;
use crate::correlate::clue::{Clue, ClueDetail};
use crate::correlate::{Generations, LossView, Message, Topology};

/// Nodes whose clocks are remembered.
const NODES_MAX: usize = 20_000;
/// A clock that goes back by more than this, with a new epoch, started again at 0: the node rebooted.
const REBOOT_NS: u64 = 60_000_000_000;

/// Anchors that one conclusion makes be looked at again.
const REVISITED_MAX: usize = 64;

/// How often it is looked whether a finding that waits is due.
const DUE_INTERVAL: Duration = Duration::from_millis(100);

/// The latest epoch and time seen of a node.
#[derive(Clone, Copy, Default)]
struct Clock {
    epoch: u64,
    latest_ns: u64,
}

/// What it remembers of the clues that it took.
pub(super) struct Memory {
    pub topology: Arc<Topology>,
    pub clues: ClueStore,
    pub joins: Joins,
    pub deaths: Deaths,
    pub endings: Endings,
    absorber: Absorber,
    pub growing: Growing,
    clocks: Generations<u64, Clock>,
    /// Report times by node: its first report, by its clock, and how long it had gone on at its last report.
    pub quiet_nodes: Generations<u64, (u64, u64)>,
}

impl Memory {
    pub fn new(config: &FinderConfig, topology: Arc<Topology>) -> Self {
        Self {
            clues: ClueStore::new(config.history_clues),
            joins: Joins::new(Arc::clone(&topology)),
            deaths: Deaths::default(),
            endings: Endings::default(),
            absorber: Absorber::new(config.correlation_depth_max),
            growing: Growing::default(),
            clocks: Generations::new(NODES_MAX),
            quiet_nodes: Generations::new(NODES_MAX),
            topology,
        }
    }
}

pub(super) struct Worker {
    pub config: FinderConfig,
    pub patterns: Arc<PatternSet>,
    pub losses: Arc<dyn LossView>,
    pub store: Arc<FindingStore>,
    pub memory: Memory,
    pub plans: Plans,
    /// What the log says the time is, nanoseconds since 1970, where it is driven by it.
    pub log_ns: u64,
    /// The histories of the clue that is dealt with; its memory is used again.
    keys: Vec<HistoryKey>,
    pub metrics: FinderMetrics,
    /// State of a finder that follows the log.
    pub log: Option<FromLog>,
}

/// The histories of an anchor by scope.
type Surroundings = [Option<Keys>; Scope::ALL.len()];

impl Worker {
    /// Makes a worker that knows nothing yet. It follows the log where `log` is given.
    pub(super) fn new(
        config: &FinderConfig,
        patterns: Arc<PatternSet>,
        topology: Arc<Topology>,
        losses: Arc<dyn LossView>,
        store: Arc<FindingStore>,
        metrics: FinderMetrics,
        log: Option<FromLog>,
    ) -> Self {
        Self {
            config: config.clone(),
            memory: Memory::new(config, topology),
            plans: Plans::default(),
            log_ns: 0,
            keys: Vec::new(),
            patterns,
            losses,
            store,
            metrics,
            log,
        }
    }

    /// Deals with messages until it is asked to end, or nobody can send any more.
    pub(super) fn run(&mut self, receiver: &Receiver<Message>) {
        while let Some(message) = self.next(receiver) {
            match message {
                Message::Clue(clue) => {
                    let began = Instant::now();
                    self.take(*clue);
                    self.metrics.clue_seconds.observe(began.elapsed().as_secs_f64());
                    self.metrics.queue_clues.set(receiver.len() as i64);
                }
                Message::Clock(clock) => self.end_quiet(&clock),
                Message::Replayed => self.replayed(),
                Message::Renamed => {}
                Message::FromLog(update) => {
                    let began = Instant::now();
                    self.take_from_log(update);
                    self.metrics.clue_seconds.observe(began.elapsed().as_secs_f64());
                    self.metrics.queue_clues.set(receiver.len() as i64);
                }
                Message::Barrier(done) => {
                    self.rename();
                    if self.log.is_none() {
                        self.publish_due(u64::MAX);
                    }
                    // Whoever asked may have given up.
                    let _ = done.send(());
                    continue;
                }
                Message::Stop => {
                    if self.log.is_none() {
                        self.publish_due(u64::MAX);
                    }
                    return;
                }
            }
            self.rename();
        }
    }

    /// Waits for a message. Publishes meanwhile what is due, unless the log says when that is.
    fn next(&mut self, receiver: &Receiver<Message>) -> Option<Message> {
        while self.log.is_none() && self.memory.growing.waits() {
            self.publish_due(self.now_ns());
            match receiver.recv_timeout(DUE_INTERVAL) {
                Ok(message) => return Some(message),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return None,
            }
        }
        receiver.recv().ok()
    }

    pub(super) fn take(&mut self, mut clue: Clue) {
        self.metrics.clues.inc();
        let patterns = Arc::clone(&self.patterns);
        // What a fact or burst is about may be completed by what is known; of the others it is settled what they may be.
        let settled = match &clue.detail {
            ClueDetail::Fact(_) | ClueDetail::Burst(_) => None,
            _ => Some(patterns.mask(&clue)),
        };
        let is_wanted = match settled {
            Some(mask) => patterns.wants_with(clue.kind(), || mask),
            None => patterns.wants(&clue),
        };
        if !is_wanted {
            return;
        }
        self.watch_clock(clue.evidence.node, clue.evidence.epoch, clue.boottime_ns);
        self.memory.joins.take(&mut clue);
        let mask = settled.unwrap_or_else(|| patterns.mask(&clue));
        let plan = self.plans.of(&patterns, &mask);
        let mut keys = std::mem::take(&mut self.keys);
        self.keys_into(&patterns, &clue, &mask, &mut keys);
        self.memory.joins.note_lacks(&patterns, &clue, &mask);
        let noted = self.memory.clues.note(clue, mask, &keys);
        self.keys = keys;
        for anchor in self.anchors_touched(&patterns, &noted, &plan) {
            self.conclude(&patterns, &anchor);
        }
        if plan.ends {
            for anchor in self.memory.endings.note(&patterns, &noted) {
                self.conclude(&patterns, &anchor);
            }
            self.end_restored(&patterns, &noted);
            self.end_of_deleted(&patterns, &noted.clue);
        }
        self.rejoin();
        let evicted = self.memory.clues.evicted();
        self.metrics.forgotten.inc_by(evicted.saturating_sub(self.metrics.forgotten.get()));
    }

    pub(super) fn keys(&self, patterns: &PatternSet, clue: &Clue, mask: &StepMask) -> Vec<HistoryKey> {
        let mut keys = Vec::new();
        self.keys_into(patterns, clue, mask, &mut keys);
        keys
    }

    fn keys_into(&self, patterns: &PatternSet, clue: &Clue, mask: &StepMask, keys: &mut Vec<HistoryKey>) {
        keys.clear();
        for scope in patterns.scopes(mask) {
            keys.extend_from_slice(&self.memory.joins.keys(clue, scope));
        }
    }

    /// Takes in a moment of a node. False for one that is past: of frames that waited in a spool.
    pub(super) fn watch_clock(&mut self, node: u64, epoch: u64, boottime_ns: u64) -> bool {
        let clock = self.memory.clocks.entry(node, Clock::default);
        if epoch > clock.epoch {
            if boottime_ns.saturating_add(REBOOT_NS) < clock.latest_ns {
                self.memory.clues.forget_node(node);
                clock.latest_ns = 0;
            }
            clock.epoch = epoch;
        }
        let is_latest = boottime_ns >= clock.latest_ns;
        clock.latest_ns = clock.latest_ns.max(boottime_ns);
        self.metrics.nodes.set(self.memory.clocks.len() as i64);
        is_latest
    }

    /// Finds the best explanation of an anchor, and of those whose explanation rests on it.
    pub(super) fn conclude(&mut self, patterns: &PatternSet, anchor: &Arc<Noted>) {
        self.conclude_from(patterns, anchor, false);
    }

    /// The same, where no new clue is the reason. What is forgotten by now must not make another explanation look better.
    pub(super) fn conclude_again(&mut self, patterns: &PatternSet, anchor: &Arc<Noted>) {
        self.conclude_from(patterns, anchor, true);
    }

    fn conclude_from(&mut self, patterns: &PatternSet, anchor: &Arc<Noted>, is_again: bool) {
        let mut waiting = VecDeque::from([Arc::clone(anchor)]);
        let mut looked_at = 0;
        while let Some(anchor) = waiting.pop_front() {
            for other in self.explain_best(patterns, &anchor, is_again) {
                let is_waiting = |known: &Arc<Noted>| known.clue.evidence == other.clue.evidence;
                if looked_at < REVISITED_MAX && !waiting.iter().any(is_waiting) {
                    looked_at += 1;
                    waiting.extend(self.memory.clues.current(&other));
                }
            }
        }
    }

    /// Explains an anchor: of its patterns by the one with the highest priority. Returns the anchors to look at again.
    fn explain_best(&mut self, patterns: &PatternSet, anchor: &Arc<Noted>, is_again: bool) -> Vec<Arc<Noted>> {
        let mut around = Surroundings::default();
        let evidence = anchor.clue.evidence;
        // An explanation that rests on what is forgotten by now.
        let held = self.memory.deaths.explained_by(evidence);
        let held = held.filter(|&place| self.has_forgotten(&patterns.patterns()[place], anchor));
        let plan = self.plans.of(patterns, &anchor.mask);
        let mut best = None;
        for &place in &plan.anchors {
            let pattern = &patterns.patterns()[place];
            let Some((scope, found)) = self.explain(pattern, anchor, &mut around) else { continue };
            // Deaths of a pod without a workload are taken together as well: its containers' restarts are new containers.
            let workload = match (self.memory.joins.workload(&anchor.clue.entity), anchor.clue.entity.kind) {
                (0, Some(EntityKind::Container)) => anchor.clue.entity.pod_id(),
                (workload, _) => workload,
            };
            let explanation = match (pattern.gathers(), pattern.fold && workload != 0) {
                (true, _) => {
                    let mut deaths = found.steps[pattern.anchor].clone();
                    let before = if held == Some(place) { self.memory.deaths.counted_by(evidence) } else { &[] };
                    let is_new = |old: &&Arc<Noted>| deaths.iter().all(|new| new.clue.evidence != old.clue.evidence);
                    let forgotten: Vec<Arc<Noted>> = before.iter().filter(is_new).cloned().collect();
                    deaths.extend(forgotten);
                    Explanation::Counted { scope, deaths }
                }
                (false, true) => Explanation::Alike { workload },
                (false, false) => Explanation::Alone,
            };
            if let Explanation::Counted { deaths, .. } = &explanation
                && !self.memory.deaths.are_enough(pattern, anchor, deaths)
            {
                continue;
            }
            best = Some((place, pattern, explanation, found));
            break;
        }
        if let Some(held) = held {
            let priority = |place: usize| patterns.patterns()[place].priority;
            let found = best.as_ref().map(|(place, ..)| *place);
            if found.is_none_or(|found| priority(found) < priority(held) || is_again && found != held) {
                return Vec::new();
            }
        }
        let (best, found) = match best {
            Some((place, pattern, explanation, found)) => (Some((place, pattern, explanation)), Some((place, found))),
            None => (None, None),
        };
        let settled = self.memory.deaths.settle(anchor, best);
        let settled = self.go_on_with_formers(patterns, settled);
        for publication in settled.publish {
            let pattern = &patterns.patterns()[publication.pattern];
            let is_of_anchor = publication.last.clue.evidence == anchor.clue.evidence;
            // What holds for all of them is published with the last one.
            let found_of_last = match &found {
                Some((place, found)) if is_of_anchor && *place == publication.pattern => Some(found),
                _ => None,
            };
            let explained;
            let found = match found_of_last {
                Some(found) => found,
                None => {
                    let last = self.memory.clues.current(&publication.last);
                    let found = last.and_then(|last| self.explain(pattern, &last, &mut Surroundings::default()));
                    let Some((_, found)) = found else { continue };
                    explained = found;
                    &explained
                }
            };
            let (id, count) = (publication.id.clone(), publication.count);
            if self.is_published(pattern, found, &id, count) {
                self.publish(patterns, pattern, found, id, count, publication.started_realtime_ns);
                self.replace_restored(pattern, &publication);
            }
        }
        // Only now there is what takes their place.
        self.withdraw(settled.withdrawn);
        settled.revisit
    }

    /// Whether clues had to make room that the pattern may have looked at for this anchor.
    fn has_forgotten(&self, pattern: &Pattern, anchor: &Noted) -> bool {
        let from_ns = anchor.clue.realtime_ns.saturating_sub(pattern.window_ns);
        let keys = self.memory.joins.keys(&anchor.clue, pattern.scope);
        let mut histories = keys.iter().filter_map(|key| self.memory.clues.history(key));
        histories.any(|history| history.forgotten_ns() > 0 && history.forgotten_ns() >= from_ns)
    }

    /// `around` holds what was looked up of the anchor's histories before.
    fn explain(&self, pattern: &Pattern, anchor: &Arc<Noted>, around: &mut Surroundings) -> Option<(u64, Match)> {
        let keys =
            around[pattern.scope as usize].get_or_insert_with(|| self.memory.joins.keys(&anchor.clue, pattern.scope));
        for key in &**keys {
            let Some(history) = self.memory.clues.history(key) else { continue };
            // Most patterns lack something that nothing in the history may be.
            if !pattern.may_be_in(history.present()) {
                continue;
            }
            let mut outcome = matching::explain(pattern, anchor, history, false);
            if matches!(outcome, Outcome::NotFound) && pattern.may_presume() {
                let at = anchor.clue.boottime_ns;
                let (from, to) = (at.saturating_sub(pattern.window_ns), at.saturating_add(1));
                if self.losses.lost(anchor.clue.evidence.node, from, to).any() {
                    outcome = matching::explain(pattern, anchor, history, true);
                }
            }
            match outcome {
                Outcome::Found(found) => return Some((key.2, found)),
                Outcome::NotFound => {}
                Outcome::Exhausted => self.metrics.exhausted.inc(),
            }
        }
        None
    }

    /// Withdraws what an earlier run found of some of these deaths by the same pattern. Another pattern may have had a cause that
    /// is forgotten by now.
    fn replace_restored(&mut self, pattern: &Pattern, publication: &Publication) {
        if self.store.has_restored_about(publication.members.iter().map(|death| death.clue.entity.id)) {
            let ids = self.store.restored_among(publication.other_ids(pattern), &pattern.id, publication.count);
            let successor = Some(publication.id.clone());
            self.withdraw(ids.into_iter().map(|id| Withdrawn { id, successor: successor.clone() }));
        }
    }

    /// Ends the states that an earlier run found: it knows their clues no more.
    fn end_restored(&self, patterns: &PatternSet, noted: &Arc<Noted>) {
        for pattern in patterns.of_steps(&noted.mask).filter(|pattern| pattern.is_ended_by(&noted.mask)) {
            let subject = endings::subject_of(pattern, &noted.clue);
            let part = endings::part_of(&noted.clue);
            let at_ns = noted.clue.realtime_ns;
            for mut finding in self.store.end_restored(&pattern.id, subject, part.as_deref(), at_ns) {
                compose::end(&mut finding, &noted.clue);
                self.store.publish(finding);
            }
        }
    }

    fn publish(
        &mut self,
        patterns: &PatternSet,
        pattern: &Pattern,
        found: &Match,
        id: String,
        count: u32,
        started_realtime_ns: Option<u64>,
    ) {
        let Some(anchor) = found.steps[pattern.anchor].last() else {
            return;
        };
        let members = if pattern.is_state() { endings::members(pattern, found) } else { Vec::new() };
        let (replaced, first_ns) = self.memory.endings.watch(pattern, anchor, &id, &members);
        let mut since_ns = first_ns.into_iter().chain(started_realtime_ns).min();
        let successor = Some(id.clone());
        let mut replaced: Vec<String> = replaced.into_iter().map(|open| open.id).collect();
        // What an earlier run found of the same state and this one has found again by other clues.
        for member in &members {
            let subject = endings::subject_of(pattern, &member.clue);
            for finding in self.store.replace_restored(&pattern.id, subject, &id) {
                since_ns = since_ns.min(Some(finding.started_ns));
                replaced.push(finding.id);
            }
        }
        let lost = self.lost(found);
        let context = Context {
            id,
            count: match (pattern.is_state(), pattern.anchor_step()) {
                (true, _) => members.len() as u32,
                (false, step) if step.distinct.is_some() => matching::count(step, &found.steps[pattern.anchor]) as u32,
                (false, _) => count,
            },
            ended: self.memory.endings.ended(pattern, &members),
            started_realtime_ns: since_ns,
            entity_history: self.memory.clues.history(&Joins::entity_key(&anchor.clue.entity)),
            lost,
        };
        let Some(mut finding) = compose::finding(pattern, found, context) else {
            return;
        };
        if let Some(log) = &mut self.log {
            finding.missing_servers = log.losses.silent();
            let is_full = log.doubts.note(&anchor.clue, lost.open_interval);
            if is_full {
                self.forget_doubts();
            }
        }
        let of_scope = |scope| self.memory.joins.keys(&anchor.clue, scope);
        let keys: Vec<HistoryKey> = Scope::ALL.into_iter().flat_map(|scope| of_scope(scope).to_vec()).collect();
        let actions = self.memory.absorber.offer(patterns, pattern, finding, &keys);
        self.act(actions);
        // Only now there is what takes their place.
        self.withdraw(replaced.into_iter().map(|id| Withdrawn { id, successor: successor.clone() }));
    }

    fn act(&self, actions: Vec<Action>) {
        // What takes over is there before what goes: the store keeps an earlier run's finding that nothing takes over.
        let (withdrawals, publications): (Vec<_>, Vec<_>) =
            actions.into_iter().partition(|action| matches!(action, Action::Withdraw(..)));
        for action in publications.into_iter().chain(withdrawals) {
            let finding = match action {
                Action::Withdraw(id, successor) => {
                    self.store.withdraw(&id, Some(&successor));
                    continue;
                }
                Action::Publish(finding) => finding,
            };
            let Some(finding) = self.store.publish(*finding) else { continue };
            let published = &self.metrics.findings;
            published.with_label_values(&[&finding.pattern]).inc();
            // A finding that is published again and again is logged seldom.
            if finding.revision.is_power_of_two() {
                tracing::info!(
                    id = finding.id,
                    pattern = finding.pattern,
                    severity = finding.severity,
                    revision = finding.revision,
                    "{}",
                    finding.title
                );
            }
        }
    }

    fn withdraw(&mut self, withdrawn: impl IntoIterator<Item = Withdrawn>) {
        for Withdrawn { id, successor } in withdrawn {
            self.store.withdraw(&id, successor.as_deref());
            let actions = self.memory.absorber.remove(&id, successor.as_deref());
            self.act(actions);
        }
    }
}
