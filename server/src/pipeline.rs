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
//!           └─► thread parquet: its tables ◄─────────┤
//!                                                   └──► threads deliver-<sink>, while this server leads
//!  http: /healthz /readyz /metrics, the API, the page
//! ```
//!
//! Start: ports and HTTP (alive, not ready), then the archive's lock, recovery and replay into the shards, then streams. Shutdown
//! goes the way of an event: streams end once what is durable was acknowledged, the archive syncs, the shards drain, the finder
//! ends.
//!
//! `/healthz` and `/readyz` name a thread that ends before its time (a panic); then the server must be restarted
//! ([`crate::vitals`]). Such names are `archive`, `correlate` (any shard), `finder`, `journal`, `upload`, `parquet`,
//! `deliver-<sink>`, `log-findings`, `log-silences`, and the task `grpc`, which accepts. The threads `io` run tasks: a panic ends one stream or
//! one request. A blocking task of tokio that panics ends the request that asked for it.

mod correlation;
mod grpc;
mod neighbours;
mod parts;
mod replay;

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use prometheus::Registry;
use tapio_wire::frame::Frame;
use tapio_wire::program::tls::{TlsError, Watched};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::archive::offsite::Offsite;
use crate::archive::{Archive, ArchiveError, ArchiveState};
use crate::auth::{Auth, AuthError};
use crate::budget::Budget;
use crate::config::Config;
use crate::correlate::{Correlator, NodeRef};
use crate::deliver::{Deliverer, SinkConfigError};
use crate::findings::PatternError;
use crate::http;
use crate::ingest::{FrameSink, IngestMetrics, IngestService};
use crate::metrics::{Metrics, Sizes};
use crate::query::{self, EventSource, StatusSource};
use crate::remote::{RemoteError, RemoteMetrics, TableWriter, Uploader};
use crate::tls::{AcceptMetrics, TlsMetrics};
use crate::vitals::Vitals;
use crate::web::LateStatus;
use correlation::Correlation;
use grpc::Grpc;
use parts::{
    Status, history, ingest_config, routes, start_deliverer, start_peers, start_table_writer, start_uploader,
    watch_memory,
};
use replay::{open_archive, replay_window};

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
    Sink(#[from] SinkConfigError),
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
            tracing::debug!(%error, "frame archived but not correlated");
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
    core: Correlation,
    deliverer: Arc<Deliverer>,
    uploads: Uploads,
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
        let (grpc_listener, grpc_address) = listen(config.grpc_address(), "server.address or server.port").await?;
        let (http_listener, http_address) = listen(config.http_address(), "metrics.prometheus_port").await?;
        let tls = match config.server.tls_enabled {
            true => Some(Arc::new(Watched::load(config.server.tls.clone())?)),
            false => None,
        };
        let registry = Registry::new();
        let auth = Arc::new(Auth::open(&config.server.auth, &registry).await?);
        warn_of_access(config, &auth, grpc_address, http_address);
        let budget = Budget::of(&config.resources);
        let (end, ended) = watch::channel(false);
        let vitals = Arc::new(Vitals::default());
        let core = Correlation::start(config, &budget, grpc_address, &registry)?;
        core.watch(&vitals, &ended);
        neighbours::watch(&config.cluster, grpc_address.port(), &core.store, &vitals, ended.clone());
        let (readiness, is_ready) = watch::channel(ArchiveState::NotReady("the archive is being opened".into()));
        let metrics = Arc::new(OnceLock::new());
        let peers = start_peers(config, core.cluster.as_ref())?;
        let remote = RemoteMetrics::register(&registry)?;
        let events = EventSource::new(&config.archive.dir).of_cluster(&config.cluster.name);
        let events = events.with_history(history(config, &remote));
        let late_status = LateStatus::default();
        let http = tokio::spawn(http::serve(
            http_listener,
            Arc::clone(&metrics),
            is_ready,
            Arc::clone(&core.correlator),
            Arc::clone(&vitals),
            config.metrics.prometheus_enabled,
            routes(config, &core, &events, peers.as_ref(), &auth, &late_status, tls.clone()),
            ended.clone(),
        ));

        let (archive, uploads) = recover(config, &budget, &core, &remote, &vitals).await?;
        archive.metrics().register(&registry)?;
        let ingest_metrics = Arc::new(IngestMetrics::register(&registry)?);
        let sink = ToShards { correlator: Arc::clone(&core.correlator), is_enabled: config.correlation.enabled };
        let ingest = IngestService::with(&archive, sink, ingest_metrics, ingest_config(config, &budget));
        watch_memory(config.resources.max_memory_mb, ingest.clone(), &registry, ended.clone())?;
        let deliverer = Arc::new(start_deliverer(config, &core, &registry)?);
        deliverer.watch(&vitals);
        let status: Arc<dyn StatusSource> = Arc::new(Status {
            archive: Arc::clone(&archive),
            correlator: Arc::clone(&core.correlator),
            store: Arc::clone(&core.store),
            ingest: ingest.clone(),
            deliverer: Arc::clone(&deliverer),
            remote,
            started,
        });
        if late_status.set(Arc::clone(&status)).is_err() {
            unreachable!("the status is set here and nowhere else");
        }
        let grpc = Grpc {
            listener: grpc_listener,
            tls,
            auth,
            streams_max: config.server.max_concurrent_streams,
            metrics: (TlsMetrics::register(&registry)?, AcceptMetrics::register(&registry)?),
        };
        let sizes = Sizes { store: Arc::clone(&core.store), topology: Arc::clone(core.correlator.topology()) };
        if metrics.set(Metrics::new(registry, Arc::clone(archive.books()), sizes)?).is_err() {
            unreachable!("the metrics are set here and nowhere else");
        }
        let query =
            query::service_with_events(Arc::clone(&core.store), status, events, peers, Arc::clone(&core.silences));
        let silences = query::silences_service(Arc::clone(&core.store), Arc::clone(&core.silences));
        let grpc = grpc.serve(&ingest, (query, silences), archive.state(), readiness, &vitals, ended)?;
        tracing::info!(%grpc_address, %http_address, patterns = core.patterns.patterns().len(), "serving");
        Ok(Self { ingest, grpc, http, end, archive, core, deliverer, uploads, vitals, grpc_address, http_address })
    }

    /// The names of threads and tasks that ended, though nobody asked them to.
    pub fn ended(&self) -> Vec<String> {
        self.vitals.ended()
    }

    /// Answers nobody any more and says nothing, as if it were killed: for tests.
    #[doc(hidden)]
    pub fn abandon(self) {
        if let Some(cluster) = &self.core.cluster {
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
            tracing::warn!("cutting streams that did not end in time");
        }
        self.end.send_replace(true);
        let mut grpc = self.grpc;
        // Watchers of findings hold their connections as long as they like.
        match tokio::time::timeout(Duration::from_millis(500), &mut grpc).await {
            Ok(ended) => ended??,
            Err(_) => grpc.abort(),
        }
        self.http.abort();
        let (archive, deliverer, (uploader, table_writer)) = (self.archive, self.deliverer, self.uploads);
        let Correlation { correlator, mut finder, journal, cluster, shared_silences, .. } = self.core;
        tokio::task::spawn_blocking(move || {
            archive.shutdown();
            // The last segment is closed: it is uploaded while the rest ends.
            let uploads = uploader.map(|uploader| std::thread::spawn(move || uploader.stop(UPLOAD_GRACE)));
            if let Err(error) = correlator.drained_blocking() {
                tracing::debug!(%error, "the shards had already stopped");
            }
            correlator.stop();
            // Before another server may lead.
            deliverer.stop();
            drop(shared_silences);
            if let Some(cluster) = cluster {
                cluster.stop();
            }
            finder.stop();
            drop(journal);
            // The last findings are in the store by now.
            if let Some(writer) = table_writer {
                writer.stop(UPLOAD_GRACE);
            }
            if let Some(uploads) = uploads {
                let _ = uploads.join();
            }
        })
        .await?;
        Ok(())
    }
}

/// What writes to the remote archive: segments, and their tables.
type Uploads = (Option<Uploader>, Option<TableWriter>);

/// Opens the archive and replays its last minutes. Uploads closed segments, where that is configured.
async fn recover(
    config: &Config,
    budget: &Budget,
    core: &Correlation,
    remote: &RemoteMetrics,
    vitals: &Vitals,
) -> Result<(Arc<Archive>, Uploads), PipelineError> {
    // What is in the log already is not published again.
    if let Some(cluster) = &core.cluster {
        cluster.settle().await;
    }
    // With a log, what is found again is found by reading it, which is a replay of its own.
    let is_fed = core.cluster.as_ref().is_none_or(|cluster| cluster.link().is_alone());
    if is_fed {
        core.store.set_replaying(true);
    }
    core.losses.set_replaying(true);
    let window = replay_window(config, &core.patterns);
    let offsite = config.archive.remote.as_ref().map(|remote| Arc::new(Offsite::new(remote.every)));
    let (correlator, finder, cluster) = (Arc::clone(&core.correlator), core.finder.bus(), core.cluster.clone());
    let archive = open_archive(config, budget, window, correlator, finder, cluster, offsite.clone()).await?;
    let uploader = start_uploader(config, &archive, offsite, remote)?;
    if let Some(uploader) = &uploader {
        vitals.watch("upload", uploader.sign());
    }
    let table_writer = start_table_writer(config, &core.store, remote)?;
    if let Some(writer) = &table_writer {
        vitals.watch("parquet", writer.sign());
    }
    core.losses.set_replaying(false);
    // It can only fail when the finder has stopped.
    let _ = core.finder.bus().end_replay();
    vitals.watch("archive", archive.sign());
    Ok((archive, (uploader, table_writer)))
}

fn warn_of_access(config: &Config, auth: &Auth, grpc_address: SocketAddr, http_address: SocketAddr) {
    let has_tls = config.server.tls_enabled;
    if auth.wants_token() && !has_tls {
        tracing::warn!("server.auth without server.tls_enabled: tokens travel in the clear");
    }
    if config.metrics.api == Some(true) && (auth.wants_token() || has_tls) && !http_address.ip().is_loopback() {
        tracing::warn!("metrics.api: true beside a guarded gRPC port: findings and the token may travel in the clear");
    }
    if !auth.wants_token() && config.server.tls.client_ca.is_none() && !grpc_address.ip().is_loopback() {
        tracing::warn!(
            "server.auth asks for no token: whoever reaches {grpc_address} may read findings and ship events; set \
             server.auth.token_review or server.auth.token_file"
        );
    }
}

/// Opens a port, and says which one it has become.
async fn listen(address: SocketAddr, key: &'static str) -> Result<(TcpListener, SocketAddr), PipelineError> {
    let opened = TcpListener::bind(address).await.and_then(|listener| {
        let bound = listener.local_addr()?;
        Ok((listener, bound))
    });
    opened.map_err(|error| PipelineError::Listen { address, error, key })
}
