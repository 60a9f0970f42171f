//! The machine of the server: every thread and every queue, in one place.
//!
//! ```text
//!  tokio io threads                            thread archive
//!  ingest stream ──► bounded queue of bytes ──► write + fdatasync ──► durable ──► ack, back on the stream
//!       │
//!       └──► Arc<Frame>, permits bound them ──► threads correlate-0..n, pinned ──► bounded bus ──► thread finder
//!                                                                                                  │
//!  query service ◄──────────────────────────── FindingStore ◄──────────────────────────────────────┘
//!  segments ──► thread upload: archive.remote        ├──► thread journal: findings.jsonl
//!                                                   └──► threads deliver-<sink>, while this server leads
//!  http: /healthz /readyz /metrics
//! ```
//!
//! Start: ports and HTTP (alive, not ready), then the archive's lock, recovery and replay into the shards, then streams. Shutdown
//! goes the way of an event: streams end once what is durable was acknowledged, the archive syncs, the shards drain, the finder
//! ends.
//!
//! `/healthz` and `/readyz` name a thread that ends before its time (a panic), and the server is to be restarted
//! ([`crate::vitals`]). Such names are `archive`, `correlate` (any shard), `finder`, `journal`, `upload`, `deliver-<sink>`, and the task
//! `grpc`, which accepts. The threads `io` run tasks, of which a panic ends one stream or one request; blocking ones of tokio end
//! with the request that asked for them.

mod replay;

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use prometheus::{IntGauge, Registry};
use tapio_wire::frame::Frame;
use tapio_wire::limits::FRAME_EVENTS_MAX;
use tapio_wire::program::tls::{TlsError, Watched};
use tapio_wire::service::StatusResponse;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tonic::transport::Server;
use tonic_health::ServingStatus;

use crate::api;
use crate::archive::offsite::Offsite;
use crate::archive::{Archive, ArchiveError, ArchiveState, lock_books};
use crate::auth::{Auth, AuthError, GateLayer};
use crate::budget::{Budget, MemoryWatch};
use crate::cluster::{self, Cluster, ClusterLosses, Leadership};
use crate::config::Config;
use crate::correlate::{ClueBus, CorrelateConfig, Correlator, InProcessBus, LossBook, LossView, NodeRef, Topology};
use crate::deliver::{DeliverMetrics, Deliverer, MarksAt, Sink, Source, Webhook, WebhookError};
use crate::findings::journal::{self, Journal, JournalMetrics};
use crate::findings::{Finder, FinderConfig, FindingStore, PatternError, PatternSet};
use crate::http;
use crate::ingest::{self, FrameSink, IngestConfig, IngestMetrics, IngestService, Limits, MOVE_ON_GRACE};
use crate::metrics::{Metrics, Sizes};
use crate::query::{self, EventSource, Peers, StatusSource};
use crate::remote::{History, Names, RemoteError, RemoteMetrics, Uploader};
use crate::tls::{self, AcceptMetrics, TlsMetrics};
use replay::{healer, open_archive, replay_window};

use crate::vitals::{Pulse, Sign, Vitals};

const INGEST_SERVICE: &str = "tapio.v1.Ingest";
const QUERY_SERVICE: &str = "tapio.v1.Query";
/// Connections beyond a quarter more than there may be streams: operators' tools, and collectors that are changing over.
const CONNECTIONS_EXTRA: usize = 256;
/// How often the resident memory is looked at.
const MEMORY_INTERVAL: Duration = Duration::from_secs(1);
/// How often the finder is asked whether it is there.
const FINDER_INTERVAL: Duration = Duration::from_secs(5);
/// How long streams may take to hear what is durable before they are cut.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);
/// How long what is closed may take to be uploaded at the end; with the drain it fits in a pod's grace of 30 s.
const UPLOAD_GRACE: Duration = Duration::from_secs(15);

/// Why the server cannot start, or ended badly.
#[derive(Debug, thiserror::Error)]
pub enum PipelineError {
    #[error("cannot listen on {address}: {error}; set {key} to a free address and port")]
    Listen { address: SocketAddr, error: std::io::Error, key: &'static str },
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    #[error(transparent)]
    Patterns(#[from] PatternError),
    #[error(transparent)]
    Finder(#[from] crate::findings::StartError),
    #[error(transparent)]
    Correlate(#[from] crate::correlate::StartError),
    #[error("server.tls: {0}")]
    Tls(#[from] TlsError),
    #[error(transparent)]
    Auth(#[from] AuthError),
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    #[error("gRPC ended: {0}")]
    Grpc(#[from] tonic::transport::Error),
    #[error("the journal of findings cannot be started: {0}")]
    Journal(std::io::Error),
    #[error(transparent)]
    Webhook(#[from] WebhookError),
    #[error("a thread that delivers findings cannot be started: {0}")]
    Deliver(std::io::Error),
    #[error("archive.remote: {0}")]
    Remote(#[from] RemoteError),
    #[error("a thread for the servers' log cannot be started: {0}")]
    Log(std::io::Error),
    #[error("gRPC reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
    #[error("a task failed: {0}")]
    Task(#[from] tokio::task::JoinError),
}

/// Hands accepted frames to the shards.
struct ToShards {
    correlator: Arc<Correlator>,
    is_enabled: bool,
}

impl FrameSink for ToShards {
    async fn deliver(&self, node: &Arc<str>, frame: Arc<Frame>) {
        if !self.is_enabled {
            return;
        }
        let node = NodeRef { id: frame.header().node, name: Arc::clone(node) };
        if let Err(error) = self.correlator.deliver(node, frame).await {
            tracing::debug!(%error, "a frame is archived and not correlated");
        }
    }
}

struct Status {
    archive: Arc<Archive>,
    correlator: Arc<Correlator>,
    store: Arc<FindingStore>,
    ingest: IngestService<ToShards>,
    deliverer: Arc<Deliverer>,
    remote: RemoteMetrics,
    started: Instant,
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

/// What this build is called.
pub fn revision() -> &'static str {
    option_env!("TAPIO_REVISION").unwrap_or(env!("CARGO_PKG_VERSION"))
}

/// The running server.
pub struct Pipeline {
    ingest: IngestService<ToShards>,
    grpc: JoinHandle<Result<(), tonic::transport::Error>>,
    http: JoinHandle<()>,
    end: watch::Sender<bool>,
    archive: Arc<Archive>,
    correlator: Arc<Correlator>,
    finder: Finder,
    cluster: Option<Arc<Cluster>>,
    journal: Journal,
    deliverer: Arc<Deliverer>,
    uploader: Option<Uploader>,
    vitals: Arc<Vitals>,
    /// Where gRPC and HTTP listen.
    pub grpc_address: SocketAddr,
    pub http_address: SocketAddr,
}

impl Pipeline {
    /// Opens the archive, replays its last minutes and serves.
    ///
    /// # Errors
    /// See [`PipelineError`].
    pub async fn start(config: &Config) -> Result<Self, PipelineError> {
        let started = Instant::now();
        let grpc_listener = listen(config.grpc_address(), "server.address or server.port").await?;
        let http_listener = listen(config.http_address(), "metrics.prometheus_port").await?;
        let bound = |listener: &TcpListener, wanted| listener.local_addr().unwrap_or(wanted);
        let grpc_address = bound(&grpc_listener, config.grpc_address());
        let http_address = bound(&http_listener, config.http_address());

        let tls = match config.server.tls_enabled {
            true => Some(Arc::new(Watched::load(config.server.tls.clone())?)),
            false => None,
        };
        let registry = Registry::new();
        let auth = Arc::new(Auth::open(&config.server.auth, &registry).await?);
        if auth.wants_token() && tls.is_none() {
            tracing::warn!("server.auth without server.tls_enabled: tokens travel in the clear");
        }
        if config.metrics.api == Some(true) && (auth.wants_token() || tls.is_some()) && !http_address.ip().is_loopback()
        {
            tracing::warn!("metrics.api beside a guarded gRPC port: findings and the token travel in the clear");
        }

        let patterns = Arc::new(PatternSet::load(config.correlation.patterns.as_deref())?);
        let losses = Arc::new(LossBook::default());
        let budget = Budget::of(&config.resources);
        let entities_max = config.correlation.max_entities.min(budget.entities_max);
        if entities_max < config.correlation.max_entities {
            tracing::info!(entities_max, "resources.max_memory_mb has no room for correlation.max_entities");
        }
        let store = Arc::new(FindingStore::new(budget.findings_max));
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
        let journal = start_journal(config, &store, JournalMetrics::register(&registry)?)?;
        let (finder, cluster) = if config.cluster.is_on() && config.correlation.enabled {
            let losses = Arc::new(ClusterLosses::default());
            let (patterns, store) = (Arc::clone(&patterns), Arc::clone(&store));
            let keep = 2 * replay_window(config, &patterns);
            let finder = Finder::start_from_log(&finder_config, patterns, entities_max, Arc::clone(&losses), store)?;
            let healer = healer(config, &correlate_config, keep);
            let entries_max = config.correlation.buffer_size;
            let address = config.cluster.address(grpc_address);
            let cluster = Cluster::start(&config.cluster, keep, &address, entries_max, &finder.bus(), losses, healer);
            let cluster = cluster.map_err(PipelineError::Log)?;
            cluster.register(&registry)?;
            (finder, Some(Arc::new(cluster)))
        } else {
            let (patterns, topology, store) = (Arc::clone(&patterns), Arc::clone(&topology), Arc::clone(&store));
            cluster::register_idle(&registry)?;
            (Finder::start(&finder_config, patterns, topology, view, store)?, None)
        };
        finder.metrics().register(&registry)?;
        let bus: Arc<dyn ClueBus> = match &cluster {
            Some(cluster) => cluster.bus(),
            None => Arc::new(finder.bus()),
        };
        let correlator = Arc::new(Correlator::start(&correlate_config, topology, Arc::clone(&losses), bus)?);
        correlator.register(&registry)?;

        let (end, ended) = watch::channel(false);
        let opening = ArchiveState::NotReady("the archive is being opened".into());
        let (readiness, is_ready) = watch::channel(opening);
        let metrics = Arc::new(OnceLock::new());
        let vitals = Arc::new(Vitals::default());
        vitals.watch("finder", watch_finder(finder.bus(), ended.clone()));
        if let Some(cluster) = &cluster {
            cluster.watch(&vitals);
        }
        let peers = match &cluster {
            Some(cluster) => {
                let tls = config.cluster.peer_tls.clone().map(Watched::load).transpose()?;
                let token_without_tls = config.cluster.token_without_tls;
                Some(Arc::new(Peers::new(Arc::clone(cluster), tls.map(Arc::new), token_without_tls)))
            }
            None => None,
        };
        let remote = RemoteMetrics::register(&registry)?;
        let events = EventSource::new(&config.archive.dir).with_history(history(config, &remote));
        let http = tokio::spawn(http::serve(
            http_listener,
            Arc::clone(&metrics),
            is_ready,
            Arc::clone(&correlator),
            Arc::clone(&vitals),
            config.metrics.prometheus_enabled,
            if config.serves_api() {
                api::router(Arc::clone(&store), events.clone(), peers.clone(), Arc::clone(&auth))
            } else {
                api::router_off()
            },
            ended.clone(),
        ));

        vitals.watch("journal", journal.sign());
        // What is in the log already is not published again.
        let is_in_log = match &cluster {
            Some(cluster) => cluster.settle().await,
            None => false,
        };
        // With a log, what is found again is found by reading it.
        let is_fed = cluster.as_ref().is_none_or(|cluster| cluster.link().is_alone());
        store.set_replaying(is_fed || !is_in_log);
        losses.set_replaying(true);
        let window = replay_window(config, &patterns);
        let offsite = config.archive.remote.as_ref().map(|remote| Arc::new(Offsite::new(remote.every)));
        let archive = open_archive(
            config,
            &budget,
            window,
            Arc::clone(&correlator),
            finder.bus(),
            cluster.clone(),
            offsite.clone(),
        )
        .await?;
        let uploader = start_uploader(config, &archive, offsite, &remote)?;
        if let Some(uploader) = &uploader {
            vitals.watch("upload", uploader.sign());
        }
        losses.set_replaying(false);
        if is_fed {
            store.set_replaying(false);
        }
        vitals.watch("archive", archive.sign());
        archive.metrics().register(&registry)?;
        let tls_metrics = TlsMetrics::register(&registry)?;
        let accepts = AcceptMetrics::register(&registry)?;
        let ingest_metrics = Arc::new(IngestMetrics::register(&registry)?);
        let sink = ToShards { correlator: Arc::clone(&correlator), is_enabled: config.correlation.enabled };
        let ingest = IngestService::with(&archive, sink, ingest_metrics, ingest_config(config, &budget));
        watch_memory(config.resources.max_memory_mb, ingest.clone(), &registry, ended.clone())?;
        let deliverer = Arc::new(start_deliverer(config, &store, cluster.as_deref(), &registry)?);
        deliverer.watch(&vitals);
        let status = Arc::new(Status {
            archive: Arc::clone(&archive),
            correlator: Arc::clone(&correlator),
            store: Arc::clone(&store),
            ingest: ingest.clone(),
            deliverer: Arc::clone(&deliverer),
            remote,
            started,
        });

        let sizes = Sizes { store: Arc::clone(&store), topology: Arc::clone(correlator.topology()) };
        if metrics.set(Metrics::new(registry, Arc::clone(archive.books()), sizes)?).is_err() {
            unreachable!("the metrics are set here and nowhere else");
        }
        let (health_reporter, health) = tonic_health::server::health_reporter();
        let reflection = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(tapio_wire::service::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .build_v1()?;
        let mut archive_state = archive.state();
        tokio::spawn(async move {
            // Ends with the archive, which drops the sender.
            loop {
                let state = archive_state.borrow_and_update().clone();
                let serving = match state {
                    ArchiveState::Ready => ServingStatus::Serving,
                    ArchiveState::NotReady(_) => ServingStatus::NotServing,
                };
                // "" speaks for the whole server; collectors and operators' tools may ask for their own service.
                for service in ["", INGEST_SERVICE] {
                    health_reporter.set_service_status(service, serving).await;
                }
                health_reporter.set_service_status(QUERY_SERVICE, ServingStatus::Serving).await;
                readiness.send_replace(state);
                if archive_state.changed().await.is_err() {
                    return;
                }
            }
        });
        let grpc = ingest::settings(Server::builder(), config.server.max_concurrent_streams)
            .layer(GateLayer(auth))
            .add_service(ingest.server())
            .add_service(query::service_with_events(store, status, events, peers))
            .add_service(health)
            .add_service(reflection);
        let connections_max = config.server.max_concurrent_streams as usize * 5 / 4 + CONNECTIONS_EXTRA;
        let mut grpc_ended = ended.clone();
        let grpc_end = async move {
            // An error means that the other side is gone, which is an end too.
            let _ = grpc_ended.wait_for(|end| *end).await;
        };
        let pulse = Pulse::default();
        vitals.watch("grpc", pulse.sign());
        let grpc = match tls {
            Some(tls) => {
                let incoming = tls::incoming(grpc_listener, tls, tls_metrics, accepts, connections_max, ended);
                let served = grpc.serve_with_incoming_shutdown(incoming, grpc_end);
                tokio::spawn(with_pulse(pulse, served))
            }
            None => {
                let incoming = tls::incoming_plain(grpc_listener, accepts, connections_max, ended);
                let served = grpc.serve_with_incoming_shutdown(incoming, grpc_end);
                tokio::spawn(with_pulse(pulse, served))
            }
        };
        tracing::info!(%grpc_address, %http_address, patterns = patterns.patterns().len(), "serving");
        Ok(Self {
            ingest,
            grpc,
            http,
            end,
            archive,
            correlator,
            finder,
            cluster,
            journal,
            deliverer,
            uploader,
            vitals,
            grpc_address,
            http_address,
        })
    }

    /// The names of threads and tasks that ended, though nobody asked them to.
    pub fn ended(&self) -> Vec<String> {
        self.vitals.ended()
    }

    /// Answers nobody any more and says nothing, as if it were killed: for tests.
    #[doc(hidden)]
    pub fn abandon(self) {
        if let Some(cluster) = &self.cluster {
            cluster.freeze();
        }
        self.grpc.abort();
    }

    /// Drains and ends.
    ///
    /// # Errors
    /// When a part had failed before.
    pub async fn shutdown(self) -> Result<(), PipelineError> {
        if tokio::time::timeout(DRAIN_TIMEOUT, self.ingest.drain()).await.is_err() {
            tracing::warn!("some streams did not end in time and are cut");
        }
        self.end.send_replace(true);
        let mut grpc = self.grpc;
        // Watchers of findings hold their connections as long as they like.
        match tokio::time::timeout(Duration::from_millis(500), &mut grpc).await {
            Ok(ended) => ended??,
            Err(_) => grpc.abort(),
        }
        self.http.abort();
        let (archive, correlator, mut finder, journal) = (self.archive, self.correlator, self.finder, self.journal);
        let (cluster, deliverer, uploader) = (self.cluster, self.deliverer, self.uploader);
        tokio::task::spawn_blocking(move || {
            archive.shutdown();
            // The last segment is closed: it is uploaded while the rest ends.
            let uploads = uploader.map(|uploader| std::thread::spawn(move || uploader.stop(UPLOAD_GRACE)));
            if let Err(error) = correlator.drained_blocking() {
                tracing::debug!(%error, "the shards had stopped before");
            }
            correlator.stop();
            // Before another server may lead.
            deliverer.stop();
            if let Some(cluster) = cluster {
                cluster.stop();
            }
            finder.stop();
            drop(journal);
            if let Some(uploads) = uploads {
                let _ = uploads.join();
            }
        })
        .await?;
        Ok(())
    }
}

async fn with_pulse<T>(pulse: Pulse, work: impl Future<Output = T>) -> T {
    let outcome = work.await;
    drop(pulse);
    outcome
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
                tracing::error!("the finder has ended: nothing is found until the server is started anew");
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

async fn listen(address: SocketAddr, key: &'static str) -> Result<TcpListener, PipelineError> {
    TcpListener::bind(address).await.map_err(|error| PipelineError::Listen { address, error, key })
}

/// Findings of earlier runs come back, and those of this one are written down. The file is opened with the first finding, when
/// the archive's lock is held.
fn start_journal(
    config: &Config,
    store: &Arc<FindingStore>,
    metrics: JournalMetrics,
) -> Result<Journal, PipelineError> {
    match journal::read(&config.archive.dir) {
        Ok(recorded) => {
            tracing::info!(findings = recorded.findings.len(), unreadable = recorded.unreadable, "findings restored");
            recorded.restore(store);
        }
        Err(error) => tracing::warn!(%error, "the findings of earlier runs cannot be read"),
    }
    Journal::start(&config.archive.dir, store, metrics).map_err(PipelineError::Journal)
}

/// Uploads closed segments, where that is configured.
fn start_uploader(
    config: &Config,
    archive: &Archive,
    offsite: Option<Arc<Offsite>>,
    metrics: &RemoteMetrics,
) -> Result<Option<Uploader>, PipelineError> {
    let (Some(remote), Some(offsite)) = (&config.archive.remote, offsite) else { return Ok(None) };
    Ok(Some(Uploader::start(remote, &names(config), archive, offsite, metrics.clone())?))
}

/// Reads segments that this disk does not have, where there is a remote archive.
fn history(config: &Config, metrics: &RemoteMetrics) -> Option<History> {
    let remote = config.archive.remote.as_ref()?;
    History::new(remote, &names(config), &config.archive.dir, metrics)
}

fn names(config: &Config) -> Names {
    Names { cluster: config.cluster.name.clone(), server: config.cluster.server_name() }
}

/// Delivers findings to the sinks that are configured. The archive's lock is held, and what it says was found again.
fn start_deliverer(
    config: &Config,
    store: &Arc<FindingStore>,
    cluster: Option<&Cluster>,
    registry: &Registry,
) -> Result<Deliverer, PipelineError> {
    let metrics = DeliverMetrics::register(registry)?;
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
    let source = Source { store: Arc::clone(store), leadership, link };
    Deliverer::start(&source, sinks, &marks, &metrics).map_err(PipelineError::Deliver)
}

fn ingest_config(config: &Config, budget: &Budget) -> IngestConfig {
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
fn watch_memory(
    max_memory_mb: u64,
    ingest: IngestService<ToShards>,
    registry: &Registry,
    mut ended: watch::Receiver<bool>,
) -> Result<(), prometheus::Error> {
    let short = IntGauge::new(
        "tapio_server_memory_short",
        "1 while resident memory is close to resources.max_memory_mb and collectors are given little credit.",
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
                tracing::warn!(is_short, resident, max_memory_mb, "memory is short, or is not any more");
            }
            short.set(i64::from(is_short));
            ingest.set_memory_short(is_short);
        }
    });
    Ok(())
}
