//! The finder: one thread that turns clues into findings, started and ended here.
//!
//! What enters: how it is sized, and what it works with. What leaves: the bus to it, and its end. What must hold: it deals with
//! every clue that it was given before it ends. The thread's work is in `worker.rs`.

use std::sync::Arc;
use std::thread::{self, JoinHandle};

use super::finder_metrics::FinderMetrics;
use super::from_log::FromLog;
use super::pattern::PatternSet;
use super::store::FindingStore;
use super::worker::Worker;
use crate::cluster::ClusterLosses;
use crate::correlate::batch::Batch;
use crate::correlate::{BusClosed, InProcessBus, LogUpdate, LossView, Message, Topology};

/// Messages of the log that may wait for the finder.
const BUS_MESSAGES: usize = 64;

/// How the finder is sized.
#[derive(Clone, Debug)]
pub struct FinderConfig {
    /// Clues that may wait for the finder; shards wait when there are more.
    pub bus_clues: usize,
    /// Recent clues remembered, over all entities.
    pub history_clues: usize,
    /// Findings in a chain of cause and effect.
    pub correlation_depth_max: usize,
}

impl Default for FinderConfig {
    fn default() -> Self {
        Self { bus_clues: 16_384, history_clues: 65_536, correlation_depth_max: 10 }
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
        topology: Arc<Topology>,
        losses: Arc<dyn LossView>,
        store: Arc<FindingStore>,
    ) -> Result<Self, StartError> {
        Self::spawn(config, patterns, topology, losses, store, None)
    }

    /// Starts a finder that is driven by the log of several servers alone ([`crate::cluster`]). It has its own descriptions, of
    /// at most `entities_max` entities, and `losses` is what the log says of them.
    ///
    /// # Errors
    /// [`StartError`] when its thread cannot be started.
    pub fn start_from_log(
        config: &FinderConfig,
        patterns: Arc<PatternSet>,
        entities_max: usize,
        losses: Arc<ClusterLosses>,
        store: Arc<FindingStore>,
    ) -> Result<Self, StartError> {
        let view: Arc<dyn LossView> = Arc::<ClusterLosses>::clone(&losses);
        let topology = Arc::new(Topology::new(entities_max));
        // What waits are messages of a thousand clues, and not clues.
        let config = FinderConfig { bus_clues: config.bus_clues.min(BUS_MESSAGES), ..config.clone() };
        let log = FromLog::new(losses, entities_max, config.history_clues);
        Self::spawn(&config, patterns, topology, view, store, Some(log))
    }

    fn spawn(
        config: &FinderConfig,
        patterns: Arc<PatternSet>,
        topology: Arc<Topology>,
        losses: Arc<dyn LossView>,
        store: Arc<FindingStore>,
        log: Option<FromLog>,
    ) -> Result<Self, StartError> {
        let (bus, receiver) = InProcessBus::bounded(config.bus_clues);
        let metrics = FinderMetrics::new()?;
        let mut worker = Worker::new(config, patterns, topology, losses, store, metrics.clone(), log);
        let join = thread::Builder::new().name("finder".into()).spawn(move || worker.run(&receiver))?;
        Ok(Self { bus, metrics, join: Some(join) })
    }

    /// The bus to publish on.
    pub fn bus(&self) -> InProcessBus {
        self.bus.clone()
    }

    /// Sends a finder that is driven by the log what a server wrote into it, and when the log took it, nanoseconds since 1970.
    ///
    /// # Errors
    /// [`BusClosed`] when the finder has stopped.
    pub fn send(&self, batch: Batch, at_ns: u64) -> Result<(), BusClosed> {
        self.bus.send(Message::FromLog(LogUpdate::Batch(Box::new(batch), at_ns)))
    }

    /// What it exports.
    pub fn metrics(&self) -> &FinderMetrics {
        &self.metrics
    }

    /// Deals with the clues it has and ends the thread; stop the correlator first. Dropping does the same.
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
