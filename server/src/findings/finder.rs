//! The finder: one thread that turns signals into findings.
//!
//! What enters: signals from the bus. What leaves: findings in the store. What must hold: nothing polls, a signal is dealt with
//! when it comes; evidence that arrives after its anchor makes the anchor be looked at again, so order does not matter.

use std::sync::Arc;
use std::thread::{self, JoinHandle};

use crossbeam::channel::Receiver;
use prometheus::{IntCounter, IntCounterVec, IntGauge, Opts, Registry};
use tapio_wire::service::Finding;

use super::compose::{self, Context};
use super::deaths::{Deaths, Decision, Withdrawn, finding_id};
use super::history::{History, Noted};
use super::matching::{self, Match, Outcome};
use super::pattern::{Pattern, PatternSet, StepMask};
use super::schema::Scope;
use super::store::FindingStore;
use crate::correlate::signal::{Signal, SignalKind};
use crate::correlate::{Generations, InProcessBus, LossView, Message};

/// Anchors that one late signal makes be looked at again.
const REVISITED_MAX: usize = 64;
/// Nodes whose clocks are remembered.
const NODES_MAX: usize = 20_000;
/// A clock that goes back by more than this, with a new epoch, was started anew.
const REBOOT_NS: u64 = 60_000_000_000;

/// How the finder is sized.
#[derive(Clone, Debug)]
pub struct FinderConfig {
    /// Signals that may wait for the finder; shards wait when there are more.
    pub bus_signals: usize,
    /// Recent signals remembered, over all entities.
    pub history_signals: usize,
}

impl Default for FinderConfig {
    fn default() -> Self {
        Self { bus_signals: 16_384, history_signals: 65_536 }
    }
}

/// Why the finder could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("the finder's thread could not be started: {0}")]
    Thread(#[from] std::io::Error),
    #[error("a metric of the finder is declared wrongly: {0}")]
    Metric(#[from] prometheus::Error),
}

/// What the finder exports.
#[derive(Clone)]
pub struct FinderMetrics {
    signals: IntCounter,
    findings: IntCounterVec,
    forgotten: IntCounter,
    exhausted: IntCounter,
    nodes: IntGauge,
}

impl FinderMetrics {
    fn new() -> Result<Self, prometheus::Error> {
        Ok(Self {
            signals: IntCounter::new("tapio_server_finder_signals_total", "Signals that the finder has dealt with.")?,
            findings: IntCounterVec::new(
                Opts::new(
                    "tapio_server_findings_published_total",
                    "Findings published, changed ones again, by pattern.",
                ),
                &["pattern"],
            )?,
            forgotten: IntCounter::new(
                "tapio_server_finder_forgotten_signals_total",
                "Signals that were forgotten because newer ones needed their place.",
            )?,
            exhausted: IntCounter::new(
                "tapio_server_finder_exhausted_searches_total",
                "Searches for evidence given up because there was too much to look at.",
            )?,
            nodes: IntGauge::new("tapio_server_finder_nodes", "Nodes whose signals the finder has dealt with lately.")?,
        })
    }

    /// Registers them.
    ///
    /// # Errors
    /// When one of the names is taken.
    pub fn register(&self, registry: &Registry) -> Result<(), prometheus::Error> {
        registry.register(Box::new(self.signals.clone()))?;
        registry.register(Box::new(self.findings.clone()))?;
        registry.register(Box::new(self.forgotten.clone()))?;
        registry.register(Box::new(self.exhausted.clone()))?;
        registry.register(Box::new(self.nodes.clone()))
    }
}

/// The finder's thread, and the bus to it.
pub struct Finder {
    bus: InProcessBus,
    metrics: FinderMetrics,
    join: Option<JoinHandle<()>>,
}

impl Finder {
    /// Starts the finder.
    ///
    /// # Errors
    /// [`StartError`] when its thread cannot be started.
    pub fn start(
        config: &FinderConfig,
        patterns: Arc<PatternSet>,
        losses: Arc<dyn LossView>,
        store: Arc<FindingStore>,
    ) -> Result<Self, StartError> {
        let (bus, receiver) = InProcessBus::bounded(config.bus_signals);
        let metrics = FinderMetrics::new()?;
        let mut worker = Worker {
            history: History::new(config.history_signals),
            patterns,
            losses,
            store,
            deaths: Deaths::default(),
            clocks: Generations::new(NODES_MAX),
            metrics: metrics.clone(),
        };
        let join = thread::Builder::new().name("finder".into()).spawn(move || worker.run(&receiver))?;
        Ok(Self { bus, metrics, join: Some(join) })
    }

    /// The bus to publish on.
    pub fn bus(&self) -> InProcessBus {
        self.bus.clone()
    }

    /// What it exports.
    pub fn metrics(&self) -> &FinderMetrics {
        &self.metrics
    }

    /// Deals with the signals it has and ends the thread; stop the correlator first. Dropping does the same.
    pub fn stop(&mut self) {
        if let Some(join) = self.join.take() {
            // It can only fail when the thread is gone already.
            let _ = self.bus.send(Message::Stop);
            if join.join().is_err() {
                tracing::error!("the finder has failed");
            }
        }
    }
}

impl Drop for Finder {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The latest epoch and time seen of a node.
#[derive(Clone, Copy, Default)]
struct Clock {
    epoch: u64,
    latest_ns: u64,
}

struct Worker {
    patterns: Arc<PatternSet>,
    losses: Arc<dyn LossView>,
    store: Arc<FindingStore>,
    history: History,
    deaths: Deaths,
    clocks: Generations<u64, Clock>,
    metrics: FinderMetrics,
}

impl Worker {
    fn run(&mut self, receiver: &Receiver<Message>) {
        while let Ok(message) = receiver.recv() {
            match message {
                Message::Signal(signal) => self.take(*signal),
                Message::Barrier(done) => {
                    // Whoever asked may have given up.
                    let _ = done.send(());
                }
                Message::Stop => return,
            }
        }
    }

    fn take(&mut self, signal: Signal) {
        self.metrics.signals.inc();
        let patterns = Arc::clone(&self.patterns);
        let mask = patterns.mask(&signal);
        if !patterns.wants(&signal) {
            return;
        }
        self.watch_clock(&signal);
        let (pod_steps, node_steps) = patterns.wide_steps();
        let mut scopes = vec![Scope::Entity];
        if mask.intersects(pod_steps) {
            scopes.push(Scope::Pod);
        }
        if mask.intersects(node_steps) {
            scopes.push(Scope::Node);
        }
        let noted = self.history.note(signal, mask, &scopes);
        for anchor in self.anchors_touched(&patterns, &noted) {
            self.conclude(&patterns, &anchor);
        }
        let evicted = self.history.evicted();
        self.metrics.forgotten.inc_by(evicted.saturating_sub(self.metrics.forgotten.get()));
    }

    fn watch_clock(&mut self, signal: &Signal) {
        let (node, epoch) = (signal.evidence.node, signal.evidence.epoch);
        let clock = self.clocks.entry(node, Clock::default);
        if epoch > clock.epoch {
            if signal.boottime_ns.saturating_add(REBOOT_NS) < clock.latest_ns {
                self.history.forget_node(node);
                clock.latest_ns = 0;
            }
            clock.epoch = epoch;
        }
        clock.latest_ns = clock.latest_ns.max(signal.boottime_ns);
        self.metrics.nodes.set(self.clocks.len() as i64);
    }

    /// The anchors whose explanation may change by a signal, in the order of time: itself, and those that it may be a step of.
    fn anchors_touched(&self, patterns: &PatternSet, noted: &Arc<Noted>) -> Vec<Arc<Noted>> {
        let at = noted.signal.boottime_ns;
        let mut touched: Vec<Arc<Noted>> = Vec::new();
        for pattern in patterns.patterns() {
            let anchor = pattern.anchor_step();
            if noted.mask.contains(anchor.number) {
                touched.push(Arc::clone(noted));
            }
            let is_step = pattern.steps.iter().enumerate().any(|(index, step)| {
                noted.mask.contains(step.number) && (index != pattern.anchor || step.count_min > 1)
            });
            if !is_step {
                continue;
            }
            let key = History::key(&noted.signal, pattern.scope);
            let ring = self.history.ring(&key).into_iter().flatten();
            touched.extend(
                ring.filter(|other| {
                    other.mask.contains(anchor.number)
                        && other.signal.boottime_ns.abs_diff(at) <= pattern.window_ns
                        && !Arc::ptr_eq(other, noted)
                })
                .cloned(),
            );
        }
        touched.sort_by_key(|noted| (noted.signal.boottime_ns, noted.signal.evidence));
        touched.dedup_by(|a, b| Arc::ptr_eq(a, b));
        let surplus = touched.len().saturating_sub(REVISITED_MAX);
        touched.drain(..surplus);
        touched
    }

    fn conclude(&mut self, patterns: &PatternSet, anchor: &Arc<Noted>) {
        let is_death = anchor.signal.kind() == SignalKind::Exit;
        let mut is_explained = false;
        for pattern in patterns.patterns() {
            if !anchor.mask.contains(pattern.anchor_step().number) {
                continue;
            }
            let Some(found) = self.explain(pattern, anchor) else {
                continue;
            };
            is_explained = true;
            if !is_death {
                let evidence = anchor.signal.evidence;
                let id = finding_id(&pattern.id, anchor.signal.entity.id, evidence);
                self.publish(pattern, &found, id, 1, None);
                continue;
            }
            let (decision, withdrawn) = if pattern.absorbs() {
                let (_, _, scope) = History::key(&anchor.signal, pattern.scope);
                let deaths = &found.steps[pattern.anchor];
                self.deaths.together(pattern, scope, deaths)
            } else {
                (self.deaths.single(pattern, anchor), Vec::new())
            };
            if let Decision::Publish { id, count, started_realtime_ns } = decision {
                self.publish(pattern, &found, id, count, started_realtime_ns);
            }
            self.withdraw(withdrawn);
            break;
        }
        if is_death && !is_explained {
            let withdrawn = self.deaths.unexplained(anchor);
            self.withdraw(withdrawn);
        }
    }

    fn explain(&self, pattern: &Pattern, anchor: &Arc<Noted>) -> Option<Match> {
        let key = History::key(&anchor.signal, pattern.scope);
        match matching::explain(pattern, anchor, self.history.ring(&key)?) {
            Outcome::Found(found) => Some(found),
            Outcome::NotFound => None,
            Outcome::Exhausted => {
                self.metrics.exhausted.inc();
                None
            }
        }
    }

    fn publish(&self, pattern: &Pattern, found: &Match, id: String, count: u32, started_realtime_ns: Option<u64>) {
        let Some(anchor) = found.steps[pattern.anchor].last() else {
            return;
        };
        let (from_ns, to_ns) = compose::loss_window(found);
        let key = History::key(&anchor.signal, Scope::Entity);
        let context = Context {
            id,
            count,
            started_realtime_ns,
            entity_ring: self.history.ring(&key),
            lost: self.losses.lost(anchor.signal.evidence.node, from_ns, to_ns),
        };
        let published: Option<Arc<Finding>> =
            compose::finding(pattern, found, context).and_then(|finding| self.store.publish(finding));
        if let Some(finding) = published {
            let published = &self.metrics.findings;
            published.with_label_values(&[&finding.pattern]).inc();
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

    fn withdraw(&self, withdrawn: impl IntoIterator<Item = Withdrawn>) {
        for Withdrawn { id, successor } in withdrawn {
            self.store.withdraw(&id, successor.as_deref());
        }
    }
}

const _: () = assert!(size_of::<StepMask>() <= 64);
