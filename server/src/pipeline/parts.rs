//! Parts of the server that are a few lines each.

use std::sync::Arc;
use std::time::{Duration, Instant};

use prometheus::{IntGauge, Registry};
use tapio_wire::limits::FRAME_EVENTS_MAX;
use tapio_wire::program::tls::{ServerFiles, Watched};
use tapio_wire::service::StatusResponse;
use tokio::sync::watch;

use super::correlation::Correlation;
use super::{PipelineError, ToShards, revision};
use crate::api;
use crate::archive::offsite::Offsite;
use crate::archive::{Archive, ArchiveState, lock_books};
use crate::auth::Auth;
use crate::budget::{Budget, MemoryWatch};
use crate::cluster::{Cluster, Leadership};
use crate::config::Config;
use crate::correlate::Correlator;
use crate::deliver::{
    Alertmanager, Chat, DeliverMetrics, Deliverer, Keeper, KubernetesEvents, MarksAt, Otlp, Sink, Source, Webhook,
};
use crate::findings::FindingStore;
use crate::http;
use crate::ingest::{IngestConfig, IngestService, Limits, MOVE_ON_GRACE};
use crate::query::{EventSource, Peers, StatusSource};
use crate::remote::{History, Names, RemoteMetrics, TableWriter, Uploader};
use crate::web::{self, LateStatus, Pages};

/// How often the resident memory is looked at.
const MEMORY_INTERVAL: Duration = Duration::from_secs(1);

/// Answers how the server stands.
pub(super) struct Status {
    pub archive: Arc<Archive>,
    pub correlator: Arc<Correlator>,
    pub store: Arc<FindingStore>,
    pub ingest: IngestService<ToShards>,
    pub deliverer: Arc<Deliverer>,
    pub remote: RemoteMetrics,
    pub started: Instant,
}

/// What HTTP serves besides its own: the API and the page, or that both are off, or the way to where they are.
pub(super) fn routes(
    config: &Config,
    core: &Correlation,
    events: &EventSource,
    peers: Option<&Arc<Peers>>,
    auth: &Arc<Auth>,
    status: &LateStatus,
    tls: Option<Arc<Watched<ServerFiles>>>,
) -> http::Routes {
    let off = || api::router_off().merge(web::router_off());
    if !config.serves_api() && !config.serves_api_over_tls() {
        return http::Routes { clear: off(), over_tls: off(), tls };
    }
    let (store, peers) = (Arc::clone(&core.store), peers.cloned());
    let silences = Arc::clone(&core.silences);
    let api = api::router(Arc::clone(&store), events.clone(), peers.clone(), Arc::clone(&silences), Arc::clone(auth));
    let (patterns, status) = (Arc::clone(&core.patterns), Arc::clone(status));
    let pages = Pages { store, events: events.clone(), peers, patterns, status, silences };
    let over_tls = api.merge(web::router(pages, Arc::clone(auth)));
    let clear = match (config.serves_api(), config.serves_api_over_tls()) {
        (true, _) => over_tls.clone(),
        (false, true) => api::router_off().merge(web::router_to_tls()),
        (false, false) => off(),
    };
    http::Routes { clear, over_tls, tls }
}

impl StatusSource for Status {
    fn status(&self) -> StatusResponse {
        let (mut nodes, unexplained_events) = {
            let books = lock_books(self.archive.books());
            (books.status(|node| self.ingest.is_connected(node)), books.unexplained_total())
        };
        self.ingest.add_connected(&mut nodes);
        let not_ready_reason = match &*self.archive.state().borrow() {
            ArchiveState::Ready if self.correlator.has_failed() => http::CORRELATION_FAILED.into(),
            ArchiveState::Ready => String::new(),
            ArchiveState::NotReady(reason) => reason.clone(),
        };
        StatusResponse {
            revision: revision().into(),
            uptime_ns: self.started.elapsed().as_nanos() as u64,
            nodes,
            archive: Some(self.archive.stats().into()),
            events_correlated: self.correlator.events_correlated(),
            findings: self.store.len() as u64,
            unexplained_events,
            shards: self.correlator.status(),
            ready: not_ready_reason.is_empty(),
            not_ready_reason,
            kinds: self.archive.metrics().kind_counts(),
            servers: Vec::new(),
            incomplete: Vec::new(),
            elsewhere: [self.archive.metrics().elsewhere_counts(), self.remote.elsewhere_counts()].concat(),
            deliveries: self.deliverer.status(),
        }
    }
}

/// Asks the other servers, where there are some.
pub(super) fn start_peers(
    config: &Config,
    cluster: Option<&Arc<Cluster>>,
) -> Result<Option<Arc<Peers>>, PipelineError> {
    let Some(cluster) = cluster else { return Ok(None) };
    let tls = config.cluster.peer_tls.clone().map(Watched::load).transpose()?;
    let token_without_tls = config.cluster.token_without_tls;
    Ok(Some(Arc::new(Peers::new(Arc::clone(cluster), tls.map(Arc::new), token_without_tls))))
}

/// Uploads closed segments, where that is configured.
pub(super) fn start_uploader(
    config: &Config,
    archive: &Archive,
    offsite: Option<Arc<Offsite>>,
    metrics: &RemoteMetrics,
) -> Result<Option<Uploader>, PipelineError> {
    let (Some(remote), Some(offsite)) = (&config.archive.remote, offsite) else { return Ok(None) };
    Ok(Some(Uploader::start(remote, &names(config), archive, offsite, metrics.clone())?))
}

/// Writes tables of closed segments and of findings, where that is configured.
pub(super) fn start_table_writer(
    config: &Config,
    store: &Arc<FindingStore>,
    metrics: &RemoteMetrics,
) -> Result<Option<TableWriter>, PipelineError> {
    let Some(remote) = config.archive.remote.as_ref().filter(|remote| remote.parquet) else { return Ok(None) };
    let (names, store) = (names(config), Arc::clone(store));
    Ok(Some(TableWriter::start(remote, &names, &config.archive.dir, store, metrics.clone())?))
}

/// Reads segments that this disk does not have, where there is a remote archive.
pub(super) fn history(config: &Config, metrics: &RemoteMetrics) -> Option<History> {
    let remote = config.archive.remote.as_ref()?;
    History::new(remote, &names(config), &config.archive.dir, metrics)
}

fn names(config: &Config) -> Names {
    Names { cluster: config.cluster.name.clone(), server: config.cluster.server_name() }
}

/// Delivers findings to the sinks that are configured. The archive's lock is held, and what it says was found again.
pub(super) fn start_deliverer(
    config: &Config,
    core: &Correlation,
    registry: &Registry,
) -> Result<Deliverer, PipelineError> {
    let metrics = DeliverMetrics::register(registry)?;
    let (store, cluster) = (&core.store, core.cluster.as_deref());
    let server = config.cluster.server_name();
    let (leadership, link, marks) = match cluster {
        Some(cluster) => {
            let marks = MarksAt::Log(Box::new(config.cluster.clone()));
            (Arc::clone(cluster.leadership()), Some(Arc::clone(cluster.link())), marks)
        }
        None => (Arc::new(Leadership::sole(&server)), None, MarksAt::Folder(config.archive.dir.clone())),
    };
    let mut sinks: Vec<Box<dyn Sink>> = Vec::new();
    if let Some(webhook) = &config.deliver.webhook {
        sinks.push(Box::new(Webhook::new(webhook, &config.cluster.name, &server)?));
    }
    for (name, chat) in &config.deliver.chats {
        sinks.push(Box::new(Chat::new(name, chat)?));
    }
    if let Some(alertmanager) = &config.deliver.alertmanager {
        sinks.push(Box::new(Alertmanager::new(alertmanager, &config.cluster.name)?));
    }
    if let Some(section) = &config.deliver.kubernetes_events {
        sinks.push(Box::new(KubernetesEvents::new(section, &server)));
    }
    if let Some(otlp) = &config.deliver.otlp {
        sinks.push(Box::new(Otlp::new(otlp, &config.cluster.name, &server)?));
    }
    let source = Source { store: Arc::clone(store), leadership, link, silences: Arc::clone(&core.silences) };
    let deliverer = Deliverer::start(&source, sinks, &marks, &metrics).map_err(PipelineError::Deliver)?;
    let Some(link) = &source.link else { return Ok(deliverer) };
    let keeper = Keeper::start(&config.cluster, store, &source.leadership, link).map_err(PipelineError::Deliver)?;
    Ok(deliverer.with_keeper(keeper))
}

pub(super) fn ingest_config(config: &Config, budget: &Budget) -> IngestConfig {
    let server = &config.server;
    let frame_events = match u32::try_from(server.max_batch_size) {
        Ok(events) if server.max_batch_size < FRAME_EVENTS_MAX => events,
        // What the wire forbids anyway need not be asked for.
        _ => 0,
    };
    IngestConfig {
        limits: Limits {
            events_per_second: server.max_events_per_sec,
            stream_bytes_per_second: server.max_stream_bytes_per_sec,
            node_bytes_per_second: server.max_node_bytes_per_sec,
        },
        frame_events,
        streams_max: server.max_concurrent_streams as usize,
        connection_age: server.max_connection_age,
        move_on_grace: MOVE_ON_GRACE,
        in_flight_bytes: budget.in_flight_bytes,
    }
}

/// Looks at the resident memory from time to time, until the end.
pub(super) fn watch_memory(
    max_memory_mb: u64,
    ingest: IngestService<ToShards>,
    registry: &Registry,
    mut ended: watch::Receiver<bool>,
) -> Result<(), prometheus::Error> {
    let short = IntGauge::new(
        "tapio_server_memory_short",
        "1 while resident memory is close to resources.max_memory_mb and the server reduces collectors' credit.",
    )?;
    registry.register(Box::new(short.clone()))?;
    let mut memory = MemoryWatch::new(max_memory_mb);
    tokio::spawn(async move {
        let mut interval = tokio::time::interval(MEMORY_INTERVAL);
        loop {
            tokio::select! {
                _ = ended.wait_for(|end| *end) => return,
                _ = interval.tick() => {}
            }
            let resident = tapio_wire::program::process::resident_bytes();
            let is_short = memory.look(resident);
            if is_short != (short.get() == 1) {
                tracing::warn!(is_short, resident, max_memory_mb, "memory pressure changed");
            }
            short.set(i64::from(is_short));
            ingest.set_memory_short(is_short);
        }
    });
    Ok(())
}
