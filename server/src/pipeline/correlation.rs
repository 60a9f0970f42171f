//! What explains: shards, finder, findings, and the servers' log.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use prometheus::Registry;
use tokio::sync::watch;

use super::PipelineError;
use super::replay::{healer, replay_window};
use crate::budget::Budget;
use crate::cluster::{self, Cluster, ClusterLosses};
use crate::config::Config;
use crate::correlate::{ClueBus, CorrelateConfig, Correlator, InProcessBus, LossBook, LossView, Topology};
use crate::findings::journal::{self, Journal, JournalMetrics};
use crate::findings::{Finder, FinderConfig, FindingStore, PatternSet};
use crate::silences::{SharedSilences, Silences};
use crate::vitals::{Pulse, Sign, Vitals};

/// How often the finder is asked whether it is there.
const FINDER_INTERVAL: Duration = Duration::from_secs(5);

/// Everything between a frame and a finding.
pub(super) struct Correlation {
    pub patterns: Arc<PatternSet>,
    pub losses: Arc<LossBook>,
    pub store: Arc<FindingStore>,
    pub silences: Arc<Silences>,
    /// Shares them with other servers, where there are some.
    pub shared_silences: Option<SharedSilences>,
    pub journal: Journal,
    pub finder: Finder,
    pub cluster: Option<Arc<Cluster>>,
    pub correlator: Arc<Correlator>,
}

impl Correlation {
    /// Starts the shards and the finder; with a log, the threads that read and write it. Other servers reach this one at `address`.
    pub fn start(
        config: &Config,
        budget: &Budget,
        address: SocketAddr,
        registry: &Registry,
    ) -> Result<Self, PipelineError> {
        let patterns = load_patterns(config)?;
        let losses = Arc::new(LossBook::default());
        let entities_max = config.correlation.max_entities.min(budget.entities_max);
        if entities_max < config.correlation.max_entities {
            tracing::info!(entities_max, "resources.max_memory_mb has no room for correlation.max_entities");
        }
        let store = Arc::new(FindingStore::new(budget.findings_max));
        store.set_cluster(&config.cluster.name);
        let finder_config = FinderConfig {
            bus_clues: config.correlation.buffer_size,
            correlation_depth_max: config.correlation.max_correlation_depth as usize,
            ..FinderConfig::default()
        };
        let correlate_config = CorrelateConfig {
            shards: Some(config.correlation.shards.unwrap_or(budget.shards)),
            window: config.correlation.analysis_window,
            entities_max,
            frames_in_flight: budget.frames_in_flight,
            wanted: patterns.kinds(),
            interest: Some({
                let patterns = Arc::clone(&patterns);
                Arc::new(move |clue| patterns.wants(clue))
            }),
        };
        let topology = Arc::new(Topology::new(entities_max));
        let view: Arc<dyn LossView> = Arc::clone(&losses) as Arc<dyn LossView>;
        // Before the log says anything: what an earlier run found must not come after it.
        let journal = start_journal(config, &store, JournalMetrics::register(registry)?)?;
        let (finder, cluster) = if config.cluster.is_on() && config.correlation.enabled {
            let losses = Arc::new(ClusterLosses::default());
            let (patterns, store) = (Arc::clone(&patterns), Arc::clone(&store));
            let keep = 2 * replay_window(config, &patterns);
            let finder = Finder::start_from_log(&finder_config, patterns, entities_max, Arc::clone(&losses), store)?;
            let healer = healer(config, &correlate_config, keep);
            let entries_max = config.correlation.buffer_size;
            let address = config.cluster.address(address);
            let cluster = Cluster::start(&config.cluster, keep, &address, entries_max, &finder.bus(), losses, healer);
            let cluster = cluster.map_err(PipelineError::Log)?;
            cluster.register(registry)?;
            (finder, Some(Arc::new(cluster)))
        } else {
            let (patterns, topology, store) = (Arc::clone(&patterns), Arc::clone(&topology), Arc::clone(&store));
            cluster::register_idle(registry)?;
            (Finder::start(&finder_config, patterns, topology, view, store)?, None)
        };
        finder.metrics().register(registry)?;
        let bus: Arc<dyn ClueBus> = match &cluster {
            Some(cluster) => cluster.bus(),
            None => Arc::new(finder.bus()),
        };
        let correlator = Arc::new(Correlator::start(&correlate_config, topology, Arc::clone(&losses), bus)?);
        correlator.register(registry)?;
        let silences = Arc::new(Silences::open(&config.archive.dir));
        silences.register(registry)?;
        let shared = cluster.as_ref().map(|_| SharedSilences::start(&config.cluster, &silences)).transpose();
        let shared_silences = shared.map_err(PipelineError::Log)?;
        Ok(Self { patterns, losses, store, silences, shared_silences, journal, finder, cluster, correlator })
    }

    /// Watches its threads until `ended`.
    pub fn watch(&self, vitals: &Vitals, ended: &watch::Receiver<bool>) {
        vitals.watch("finder", watch_finder(self.finder.bus(), ended.clone()));
        vitals.watch("journal", self.journal.sign());
        if let Some(shared) = &self.shared_silences {
            vitals.watch("log-silences", shared.sign());
        }
        if let Some(cluster) = &self.cluster {
            cluster.watch(vitals);
        }
    }
}

fn load_patterns(config: &Config) -> Result<Arc<PatternSet>, PipelineError> {
    let patterns = Arc::new(PatternSet::load(config.correlation.patterns.as_deref())?);
    if let Some(directory) = config.correlation.patterns.as_ref().filter(|_| patterns.own().is_empty()) {
        tracing::warn!(?directory, "correlation.patterns has no pattern: a file that ends in .yaml or .yml");
    }
    for own in patterns.own().iter().filter(|own| own.is_built_in) {
        tracing::info!(file = own.file, pattern = own.id, "replaces the built-in pattern");
    }
    Ok(patterns)
}

/// Asks the finder from time to time whether it is there: it answers when it has dealt with what it was given before. Without a
/// finder nothing is found, and a quiet cluster gives the shards no occasion to notice.
fn watch_finder(finder: InProcessBus, mut ended: watch::Receiver<bool>) -> Sign {
    let pulse = Pulse::default();
    let sign = pulse.sign();
    tokio::spawn(async move {
        loop {
            let asked = finder.clone();
            let answer = tokio::task::spawn_blocking(move || asked.barrier().is_ok());
            let is_there = tokio::select! {
                _ = ended.wait_for(|end| *end) => break,
                answer = answer => answer.unwrap_or(true),
            };
            if !is_there {
                tracing::error!("the finder has ended: no findings until the server restarts");
                drop(pulse);
                return;
            }
            tokio::select! {
                _ = ended.wait_for(|end| *end) => break,
                () = tokio::time::sleep(FINDER_INTERVAL) => {}
            }
        }
        // The server ends, and it is not the finder that has failed.
        std::future::pending::<()>().await;
        drop(pulse);
    });
    sign
}

/// Findings of earlier runs come back, and those of this one are written down. The file is opened with the first finding, when
/// the archive's lock is held.
fn start_journal(
    config: &Config,
    store: &Arc<FindingStore>,
    metrics: JournalMetrics,
) -> Result<Journal, PipelineError> {
    let recorded = journal::read_what_can_be(&config.archive.dir);
    for (path, error) in &recorded.failed {
        tracing::warn!(path = %path.display(), %error, "cannot read the findings of earlier runs");
    }
    if recorded.unreadable > 0 {
        let [path, _] = journal::paths(&config.archive.dir);
        tracing::warn!(lines = recorded.unreadable, path = %path.display(), "the journal of findings has lines that cannot be read");
    }
    tracing::info!(findings = recorded.findings.len(), "findings restored");
    recorded.restore(store);
    Journal::start(&config.archive.dir, store, metrics).map_err(PipelineError::Journal)
}
