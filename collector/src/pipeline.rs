//! The machine of the collector: every thread and every queue, in one place.
//!
//! ```text
//!  thread ebpf ──┬─┐ lethal: ArrayQueue<Body>                            tokio
//!       requests ▼ │
//!  thread evidence ┤ bulk:   ArrayQueue<Body> ──► thread pack ──► outbox ──► ship ══ gRPC ══► server
//!  thread shm  ────┤                                    │           ▲          │
//!  thread k8s  ────┤                                    │           └── acks ◄─┘     health: HTTP
//!  task conntrack ─┤                                    │                      │
//!  task epochs ────┤                                    │                      │
//!  task systemd ───┴◄──────── pool of bodies ◄──────────┘
//! ```
//!
//! While a source brings little, it packs its bodies itself, under the packer's lock, and the thread sleeps.
//!
//! Shutdown runs from left to right: sources detach and drain, the packer drains and closes the epoch, the shipper waits for
//! the last ack. Each step ends when the one before it has, and all together within [`DRAIN_TIMEOUT`].

mod outboxes;
mod shutdown;
mod sources;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::sync::Parker;
use tapio_probes::Controls;
use tapio_wire::node_id;
use tapio_wire::program::tls::{ClientFiles, TlsError, Watched};
use tapio_wire::program::token::{TokenError, TokenFile};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle as TaskHandle;

use self::outboxes::Outboxes;
use self::sources::{Sources, Start};
use crate::base::metrics::Metrics;
use crate::base::status::{Alive, Running};
use crate::budget::governor::Governor;
use crate::budget::memory::Budget;
use crate::intake::source_context::SourceContext;
use crate::outbox::Outbox;
use crate::outbox::pack::{NodeDescription, PackState, Packer};
use crate::outbox::queue::Queues;
use crate::outbox::spool::SpoolError;
use crate::outbox::{metrics as outbox_metrics, spool_thread};
use crate::serve::health::{self, Health};
use crate::serve::process;
use crate::settings::config::{Config, ConfigError};
use crate::settings::live::Live;
use crate::ship::Shipper;
use crate::ship::endpoints::{Endpoints, SystemResolver};
use crate::ship::latency::Latencies;
use crate::ship::state::{ShipState, register_tls};
use crate::source::ebpf::EbpfError;
use crate::source::kube::AccessError;
use crate::source::shm::ShmError;
use crate::source::systemd::SystemdError;

/// How often files are looked at that may change.
const FILES_INTERVAL: Duration = Duration::from_secs(5);

/// Why the collector cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("the ebpf source cannot run: {0}")]
    Ebpf(#[from] EbpfError),
    #[error("the shm source cannot run: {0}")]
    Shm(#[from] ShmError),
    #[error("the systemd source cannot run: {0}")]
    Systemd(#[from] SystemdError),
    #[error("the k8s source cannot run: {0}")]
    Kube(#[from] AccessError),
    #[error("cannot serve health on {address}: {error}; set health.port to a free port, or health.enabled to false")]
    Health { address: SocketAddr, error: std::io::Error },
    #[error("grpc.spool.dir: {0}")]
    Spool(#[from] SpoolError),
    #[error("grpc.tls: {0}")]
    Tls(#[from] TlsError),
    #[error("grpc.token_file: {0}")]
    Token(#[from] TokenError),
    #[error("cannot start a thread: {0}")]
    Thread(#[from] std::io::Error),
    #[error(transparent)]
    Ring(#[from] tapio_ringbuf::Error),
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    #[error("no source can run; enable one in collector.enabled_collectors")]
    NoSource,
}

/// The running collector.
pub struct Pipeline {
    sources: Sources,
    sources_ended: Arc<AtomicBool>,
    packer: JoinHandle<()>,
    outbox: Arc<Outbox>,
    queues: Arc<Queues>,
    shipper: TaskHandle<()>,
    ship: Arc<ShipState>,
    give_up: watch::Sender<bool>,
    spool_bytes: Arc<AtomicU64>,
    /// What may change while it runs.
    pub live: Arc<Live>,
    /// Controls of the probes, where they run.
    pub controls: Option<Arc<Controls>>,
    health: Option<(TaskHandle<()>, watch::Sender<bool>)>,
    running: Running,
}

/// The node that this collector runs on.
struct Node {
    name: String,
    id: u64,
}

/// The threads and tasks that run as long as the collector does, beside the sources and the packer.
type Parts = Vec<(&'static str, Alive)>;

impl Pipeline {
    /// Starts everything that the configuration asks for. With `allow_missing`, a source that cannot run is reported and left
    /// out; otherwise it is an error.
    ///
    /// # Errors
    /// See [`StartError`].
    pub async fn start(config: &Config, allow_missing: bool) -> Result<Self, StartError> {
        let budget = Budget::of(config);
        let name = config.node_name();
        let node = Node { id: node_id(&name), name };
        let listener = listen(config).await?;
        let tls = watch_tls(config)?;
        let token = config.grpc.token_file.clone().map(TokenFile::load).transpose()?;
        let (queues, parker) = Queues::new(budget.queue_batches);
        let mut context = SourceContext::for_config(config, queues);
        let mut parts = Parts::new();
        let outboxes = Outboxes::open(config, &node, budget.outbox_bytes, &context.links(), &mut parts)?;
        let sources_ended = Arc::new(AtomicBool::new(false));
        let packer = packer(config, &node, &context, &outboxes.present, &sources_ended);
        context.packer = Some(Arc::clone(&packer));
        let mut sources = Sources::start(&Start { config, context: &context, node: &node, allow_missing }).await?;
        let governor = Governor::new(Arc::clone(&context.governed), sources.controls.clone(), sources.run_times.take());
        parts.push(("governor", watched(governor.run()).0));
        let (packing, packer_thread) = pack(Arc::clone(&packer), parker)?;
        let (give_up, given_up) = watch::channel(false);
        let shipper = shipper(config, &node, &context, &outboxes, &sources, tls.clone(), token);
        let (ship, latencies) = (Arc::clone(&shipper.state), Arc::clone(&shipper.latencies));
        let (shipping, shipper) = watched(shipper.run(given_up));
        parts.push(("ship", shipping));
        let running = Running::of(&sources.states, parts, &packing);
        let health = match listener {
            Some(listener) => {
                let health = Health {
                    metrics: metrics(&context, &outboxes, &packer, &sources, &ship, &latencies, tls)?,
                    ship: Arc::clone(&ship),
                    governed: Arc::clone(&context.governed),
                    latencies,
                    pack: Arc::clone(&packer.counts),
                    sources: sources.states.clone(),
                    packer: packing,
                    running: running.clone(),
                    stopping: sources.tasks_stopped.clone(),
                    metrics_enabled: config.health.metrics_enabled,
                };
                let (end, ended) = watch::channel(false);
                Some((tokio::spawn(health::serve(listener, health, ended)), end))
            }
            None => None,
        };
        let Outboxes { present: outbox, epoch, spool_bytes, .. } = outboxes;
        tracing::info!(node = node.name, epoch, outbox_bytes = budget.outbox_bytes, "collecting");
        Ok(Self {
            controls: sources.controls.clone(),
            sources,
            sources_ended,
            packer: packer_thread,
            outbox,
            queues: Arc::clone(&context.queues),
            shipper,
            ship,
            give_up,
            spool_bytes,
            live: context.live,
            health,
            running,
        })
    }

    /// The names of threads and tasks that ended by themselves.
    pub fn ended(&self) -> Vec<&'static str> {
        self.running.ended()
    }
}

/// Binds the address of `/healthz`, where it is served.
async fn listen(config: &Config) -> Result<Option<TcpListener>, StartError> {
    if !config.health.enabled {
        return Ok(None);
    }
    let address = SocketAddr::new(config.health.address, config.health.port);
    health::bind(address).await.map(Some).map_err(|error| StartError::Health { address, error })
}

/// Loads the TLS files, and looks from time to time whether they have changed.
fn watch_tls(config: &Config) -> Result<Option<Arc<Watched<ClientFiles>>>, TlsError> {
    if !config.grpc.tls_enabled {
        return Ok(None);
    }
    let tls = Arc::new(Watched::load(config.grpc.tls.clone())?);
    let watched = Arc::clone(&tls);
    tokio::spawn(async move {
        let mut interval = tokio::time::interval(FILES_INTERVAL);
        loop {
            interval.tick().await;
            watched.refresh();
        }
    });
    Ok(Some(tls))
}

fn packer(
    config: &Config,
    node: &Node,
    context: &SourceContext,
    outbox: &Arc<Outbox>,
    sources_ended: &Arc<AtomicBool>,
) -> Arc<Packer> {
    Arc::new(Packer {
        queues: Arc::clone(&context.queues),
        outbox: Arc::clone(outbox),
        compression: config.grpc.compression,
        counts: Arc::default(),
        books: Arc::clone(&context.books),
        sources_ended: Arc::clone(sources_ended),
        state: PackState::new(NodeDescription::new(node.name.clone(), Arc::clone(&context.generation))),
    })
}

/// Starts the thread that packs. The first value that it returns shows whether the thread runs.
fn pack(packer: Arc<Packer>, parker: Parker) -> std::io::Result<(Alive, JoinHandle<()>)> {
    let packing = Alive::default();
    let guard = packing.begin();
    let thread = spawn("pack", move || {
        let _alive = guard;
        packer.run(&parker);
    })?;
    Ok((packing, thread))
}

fn shipper(
    config: &Config,
    node: &Node,
    context: &SourceContext,
    outboxes: &Outboxes,
    sources: &Sources,
    tls: Option<Arc<Watched<ClientFiles>>>,
    token: Option<TokenFile>,
) -> Shipper {
    let names = config.grpc.server_endpoints.iter().filter_map(|endpoint| endpoint.parse().ok());
    let endpoints = Endpoints::new(names.collect(), Box::new(SystemResolver), node.id);
    Shipper {
        endpoints: tokio::sync::Mutex::new(endpoints),
        tls,
        token,
        resolve_interval: config.grpc.resolve_interval,
        replays: outboxes.replays.clone(),
        node_name: node.name.clone(),
        outbox: Arc::clone(&outboxes.present),
        latencies: Arc::default(),
        state: Arc::default(),
        generation: Arc::clone(&context.generation),
        reconnect: config.grpc.reconnect_enabled,
        batch_asked: Arc::clone(&context.batch_asked),
        sources: sources.states.clone(),
    }
}

/// Registers the metrics of every part.
fn metrics(
    context: &SourceContext,
    outboxes: &Outboxes,
    packer: &Packer,
    sources: &Sources,
    ship: &Arc<ShipState>,
    latencies: &Arc<Latencies>,
    tls: Option<Arc<Watched<ClientFiles>>>,
) -> Result<Metrics, prometheus::Error> {
    let mut metrics = Metrics::default();
    outbox_metrics::register(&outboxes.present, &mut metrics)?;
    spool_thread::register(&outboxes.spool_bytes, &mut metrics)?;
    context.ended.register(&mut metrics)?;
    context.queues.register(&mut metrics)?;
    packer.counts.register(&mut metrics)?;
    context.kinds.register(&mut metrics)?;
    context.identities.register(&mut metrics)?;
    context.live.register(&mut metrics)?;
    context.governed.register(&mut metrics)?;
    sources.register(&mut metrics)?;
    ship.register(&mut metrics)?;
    latencies.register(&mut metrics)?;
    register_tls(tls, &mut metrics)?;
    process::register(&mut metrics)?;
    Ok(metrics)
}

/// Spawns a task; the first of what is returned shows whether it runs, or has returned rather than panicked.
fn watched(task: impl Future<Output = ()> + Send + 'static) -> (Alive, TaskHandle<()>) {
    let alive = Alive::default();
    let guard = alive.begin();
    let task = tokio::spawn(async move {
        task.await;
        guard.finished();
    });
    (alive, task)
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> std::io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name(name.into()).spawn(run)
}
