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

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::sync::Parker;
use tapio_probes::Controls;
use tapio_wire::event::Source;
use tapio_wire::node_id;
use tapio_wire::tls::{TlsError, Watched};
use tapio_wire::token::{TokenError, TokenFile};
use tokio::sync::watch;

use crate::base::clock::realtime_ns;
use crate::base::status::{Alive, Running, SourceState, Status};
use crate::budget::governor::Governor;
use crate::intake::Intake;
use crate::intake::identity::Identity;
use crate::intake::identity::exclusion::Exclusion;
use crate::intake::shared::Shared;
use crate::outbox::Outbox;
use crate::outbox::pack::{NodeDescription, PackState, Packer};
use crate::outbox::queue::Queues;
use crate::outbox::spool::{Spool, SpoolError};
use crate::outbox::spool_thread;
use crate::serve::health;
use crate::serve::metrics::{Metrics, Observed};
use crate::settings::config::{Config, ConfigError};
use crate::settings::live::Live;
use crate::ship::endpoints::{Endpoints, SystemResolver};
use crate::ship::{ShipState, Shipper};
use crate::source::conntrack::ConntrackPoll;
use crate::source::ebpf::{EbpfError, EbpfSource};
use crate::source::kube::{AccessError, KubeSource, KubeState};
use crate::source::probe_report;
use crate::source::shm::{ShmError, ShmSource};
use crate::source::stop::Stop;
use crate::source::systemd::{SystemdError, SystemdSource};
use crate::source::{ended_epochs, evidence};

use crate::budget::memory::{Budget, load_config};

/// How long a shutdown may take before what is left is given up.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(20);
/// The same where the server refuses this collector, so that no frame will be acknowledged however long it waits.
const DRAIN_TIMEOUT_REFUSED: Duration = Duration::from_secs(1);
/// How often files are looked at that may change.
const FILES_INTERVAL: Duration = Duration::from_secs(5);
/// The same where a spool takes what is left, and how long that may take: together within 25 s.
const DRAIN_TIMEOUT_SPOOL: Duration = Duration::from_secs(10);
const FLUSH_TIMEOUT: Duration = Duration::from_secs(8);

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
    stop: Arc<Stop>,
    stop_shm: Arc<Stop>,
    stop_tasks: watch::Sender<bool>,
    sources: Vec<JoinHandle<()>>,
    /// Sources that wait for others' answers rather than for rings.
    tasks: Vec<tokio::task::JoinHandle<()>>,
    sources_ended: Arc<AtomicBool>,
    packer: JoinHandle<()>,
    outbox: Arc<Outbox>,
    queues: Arc<Queues>,
    shipper: tokio::task::JoinHandle<()>,
    ship: Arc<ShipState>,
    give_up: watch::Sender<bool>,
    spool_bytes: Arc<AtomicU64>,
    /// What may change while it runs.
    pub live: Arc<Live>,
    /// The same of the probes, where they run.
    pub controls: Option<Arc<Controls>>,
    health: Option<(tokio::task::JoinHandle<()>, watch::Sender<bool>)>,
    running: Running,
}

impl Pipeline {
    /// Starts everything that the configuration asks for. With `allow_missing`, a source that cannot run is reported and left
    /// out; otherwise it is an error.
    ///
    /// # Errors
    /// See [`StartError`].
    pub async fn start(config: &Config, allow_missing: bool) -> Result<Self, StartError> {
        let budget = Budget::of(config);
        let node_name = config.node_name();
        let listener = match config.health.enabled {
            true => {
                let address = SocketAddr::new(config.health.address, config.health.port);
                let bound = health::bind(address).await;
                Some(bound.map_err(|error| StartError::Health { address, error })?)
            }
            false => None,
        };
        let tls = match config.grpc.tls_enabled {
            true => Some(Arc::new(Watched::load(config.grpc.tls.clone())?)),
            false => None,
        };
        if let Some(tls) = &tls {
            let tls = Arc::clone(tls);
            tokio::spawn(async move {
                let mut interval = tokio::time::interval(FILES_INTERVAL);
                loop {
                    interval.tick().await;
                    tls.refresh();
                }
            });
        }
        let token = config.grpc.token_file.clone().map(TokenFile::load).transpose()?;
        let (queues, parker) = Queues::new(budget.queue_batches);
        let mut shared = Shared::for_config(config, queues);
        let queues = Arc::clone(&shared.queues);
        let mut epoch = realtime_ns();
        let (spool, left, spool_parker) = match &config.grpc.spool {
            Some(section) => {
                let (mut spool, left) = Spool::open(&section.dir, section.max_bytes)?;
                for foreign in left.iter().filter(|left| left.node != node_id(&node_name)) {
                    tracing::warn!(epoch = foreign.epoch, "the spool holds frames of another node: deleted");
                    spool.acknowledged(foreign.epoch, u64::MAX, foreign.acked_events);
                }
                (Some(spool), left, Some(Parker::new()))
            }
            None => (None, Vec::new(), None),
        };
        epoch = left.iter().map(|left| left.epoch + 1).fold(epoch, u64::max);
        let mut outbox = Outbox::new(node_id(&node_name), epoch, budget.outbox_bytes, &shared.links());
        let mut replays = Vec::new();
        if let Some(parker) = &spool_parker {
            outbox = outbox.with_spool(parker.unparker().clone());
            for (index, own) in left.iter().enumerate().filter(|(_, left)| left.node == node_id(&node_name)) {
                let next = left.get(index + 1).map_or(epoch, |next| next.epoch);
                let unparker = parker.unparker().clone();
                replays.push(Arc::new(Outbox::replay(own, next, budget.outbox_bytes, &shared.links(), unparker)));
            }
        }
        let outbox = Arc::new(outbox);
        let spool_bytes = Arc::<AtomicU64>::default();
        let mut parts = Vec::new();
        if let (Some(spool), Some(parker)) = (spool, spool_parker) {
            let outboxes = replays.iter().chain([&outbox]).map(Arc::clone).collect();
            let bytes = Arc::clone(&spool_bytes);
            let alive = Alive::default();
            let guard = alive.begin();
            spawn("spool", move || {
                let _alive = guard;
                spool_thread::run(spool, outboxes, &parker, &bytes);
            })?;
            parts.push(("spool", alive));
        }

        let sources_ended = Arc::new(AtomicBool::new(false));
        let pack = Arc::default();
        let packer = Arc::new(Packer {
            queues: Arc::clone(&queues),
            outbox: Arc::clone(&outbox),
            compression: config.grpc.compression,
            counts: Arc::clone(&pack),
            books: Arc::clone(&shared.books),
            sources_ended: Arc::clone(&sources_ended),
            state: PackState::new(NodeDescription::new(node_name.clone(), Arc::clone(&shared.generation))),
        });
        shared.packer = Some(Arc::clone(&packer));

        let (stop, stop_shm) = (Arc::new(Stop::new()?), Arc::new(Stop::new()?));
        let mut missed = Arc::default();
        let mut evidence_counts = Arc::default();
        let (mut controls, mut run_times) = (None, None);
        let mut sources = Vec::new();
        let mut states = Vec::new();
        if config.runs("ebpf") {
            let (linger, flush_interval) = (config.collectors.ebpf.linger, config.collectors.ebpf.flush_interval);
            match EbpfSource::load(&load_config(config), linger, flush_interval, Arc::clone(&stop)) {
                Ok(source) => {
                    let status = probe_report::report(&source.verdicts());
                    missed = source.missed_runs();
                    (controls, run_times) = (source.controls(), source.run_times());
                    let exclusion = controls.clone().filter(|_| shared.directory.excludes()).map(Exclusion::new);
                    let intake = Intake::new(
                        shared.clone(),
                        Source::Ebpf,
                        Identity::of_this_machine(Arc::clone(&shared.directory)).with_exclusion(exclusion),
                    );
                    let (asking, reading) = match config.collector.evidence {
                        true => {
                            let (asking, reading) = evidence::channel(evidence::Options {
                                with_arguments: config.collector.evidence_arguments,
                                watch_interval: config.collector.watch_interval,
                                node: node_id(&node_name),
                                log_lines: config.collector.log_lines,
                                log_dir: config.collector.log_dir.clone(),
                                directory: Arc::clone(&shared.directory),
                            });
                            evidence_counts = reading.counts();
                            (Some(asking), Some(reading))
                        }
                        false => (None, None),
                    };
                    let intake = intake.with_evidence(asking);
                    let alive = Alive::default();
                    let guard = alive.begin();
                    sources.push(spawn("ebpf", move || {
                        let _alive = guard;
                        if let Err(error) = source.run(intake) {
                            tracing::error!(%error, "the ebpf source ended");
                        }
                    })?);
                    states.push(SourceState { source: "ebpf", off: None, alive, status });
                    if let Some(reading) = reading {
                        let intake = Intake::new(
                            shared.clone(),
                            Source::Collector,
                            Identity::with_directory(Vec::new(), Arc::clone(&shared.directory)),
                        );
                        // It ends when nobody can ask it any more.
                        let alive = Alive::default();
                        let guard = alive.begin();
                        sources.push(spawn("evidence", move || {
                            let _alive = guard;
                            reading.run(intake);
                        })?);
                        states.push(SourceState { source: "evidence", off: None, alive, status: Status::default() });
                    }
                }
                Err(error) if allow_missing => {
                    tracing::warn!(%error, "the ebpf source is off");
                    states.push(off("ebpf", error.to_string()));
                }
                Err(error) => return Err(error.into()),
            }
        }
        if config.runs("shm") {
            match ShmSource::listen(&config.collectors.shm, Arc::clone(&stop_shm)) {
                Ok(source) => {
                    let intake = Intake::new(shared.clone(), Source::Shm, Identity::new(Vec::new()));
                    let alive = Alive::default();
                    let guard = alive.begin();
                    sources.push(spawn("shm", move || {
                        let _alive = guard;
                        if let Err(error) = source.run(intake) {
                            tracing::error!(%error, "the shm source ended");
                        }
                    })?);
                    states.push(SourceState { source: "shm", off: None, alive, status: Status::default() });
                }
                Err(error) if allow_missing => {
                    tracing::warn!(%error, "the shm source is off");
                    states.push(off("shm", error.to_string()));
                }
                Err(error) => return Err(error.into()),
            }
        }
        let (stop_tasks, tasks_stopped) = watch::channel(false);
        let mut tasks = Vec::new();
        let mut systemd = Arc::default();
        if config.runs("systemd") {
            match SystemdSource::connect(&config.collectors.systemd, node_id(&node_name)).await {
                Ok(source) => {
                    systemd = source.counts();
                    let intake = Intake::new(shared.clone(), Source::Systemd, Identity::new(Vec::new()));
                    let (alive, status) = (Alive::default(), source.status());
                    let (guard, stopped) = (alive.begin(), tasks_stopped.clone());
                    tasks.push(tokio::spawn(async move {
                        let _alive = guard;
                        source.run(intake, stopped).await;
                    }));
                    states.push(SourceState { source: "systemd", off: None, alive, status });
                }
                Err(error) if allow_missing => {
                    tracing::warn!(%error, "the systemd source is off");
                    states.push(off("systemd", error.to_string()));
                }
                Err(error) => return Err(error.into()),
            }
        }
        let cluster_cpu_ns = Arc::clone(&shared.governed.cluster_cpu_ns);
        let kube = Arc::new(KubeState { cluster_cpu_ns, ..KubeState::default() });
        if config.runs("k8s") {
            let directory = Arc::clone(&shared.directory);
            match KubeSource::open(&config.collectors.k8s, &node_name, directory, Arc::clone(&kube)).await {
                Ok(source) => {
                    let intake = Intake::new(shared.clone(), Source::Kube, Identity::new(Vec::new()));
                    let (alive, status) = (Alive::default(), source.status());
                    let guard = alive.begin();
                    let (runtime, stopped) = (tokio::runtime::Handle::current(), tasks_stopped.clone());
                    sources.push(spawn("k8s", move || {
                        let _alive = guard;
                        // Timers and sockets are driven by the thread that runs the runtime, which goes on until this one ends.
                        runtime.block_on(source.run(intake, stopped));
                    })?);
                    states.push(SourceState { source: "k8s", off: None, alive, status });
                }
                Err(error) if allow_missing => {
                    tracing::warn!(%error, "the k8s source is off");
                    states.push(off("k8s", error.to_string()));
                }
                Err(error) => return Err(error.into()),
            }
        }
        if sources.is_empty() && tasks.is_empty() && !allow_missing {
            return Err(StartError::NoSource);
        }
        if !config.collector.conntrack_interval.is_zero() {
            let poll = ConntrackPoll::new(config.collector.conntrack_interval, node_id(&node_name));
            let intake = Intake::new(shared.clone(), Source::Collector, Identity::new(Vec::new()));
            let (alive, status) = (Alive::default(), poll.status());
            let (guard, stopped) = (alive.begin(), tasks_stopped.clone());
            tasks.push(tokio::spawn(async move {
                let _alive = guard;
                poll.run(intake, stopped).await;
            }));
            states.push(SourceState { source: "conntrack", off: None, alive, status });
        }

        let intake = Intake::new(shared.clone(), Source::Collector, Identity::new(Vec::new()));
        tasks.push(tokio::spawn(ended_epochs::run(
            Arc::clone(&shared.ended),
            node_id(&node_name),
            intake,
            tasks_stopped.clone(),
        )));

        let governor = Governor::new(Arc::clone(&shared.governed), controls.clone(), run_times);
        parts.push(("governor", watched(governor.run()).0));

        let packing = Alive::default();
        let guard = packing.begin();
        let packer = spawn("pack", move || {
            let _alive = guard;
            packer.run(&parker);
        })?;

        let names = config.grpc.server_endpoints.iter().filter_map(|endpoint| endpoint.parse().ok());
        let endpoints = Endpoints::new(names.collect(), Box::new(SystemResolver), node_id(&node_name));
        let (state, latencies) = (Arc::new(ShipState::default()), Arc::default());
        let shipper = Shipper {
            endpoints: tokio::sync::Mutex::new(endpoints),
            tls: tls.clone(),
            token,
            resolve_interval: config.grpc.resolve_interval,
            replays,
            node_name: node_name.clone(),
            outbox: Arc::clone(&outbox),
            latencies: Arc::clone(&latencies),
            state: Arc::clone(&state),
            generation: Arc::clone(&shared.generation),
            reconnect: config.grpc.reconnect_enabled,
            batch_asked: Arc::clone(&shared.batch_asked),
            sources: states.clone(),
        };
        let (give_up, given_up) = watch::channel(false);
        let (shipping, shipper) = watched(shipper.run(given_up));
        parts.push(("ship", shipping));

        let ship = Arc::clone(&state);
        let observed = Observed {
            outbox: Arc::clone(&outbox),
            queues: Arc::clone(&queues),
            kinds: Arc::clone(&shared.kinds),
            identities: Arc::clone(&shared.identities),
            kube,
            pack,
            ship: state,
            latencies,
            missed,
            systemd,
            evidence: evidence_counts,
            tls,
            spool_bytes: Arc::clone(&spool_bytes),
            ended: Arc::clone(&shared.ended),
            governed: Arc::clone(&shared.governed),
            live: Arc::clone(&shared.live),
        };
        let running = Running::of(&states, parts, &packing);
        let health = match listener {
            Some(listener) => {
                let (end, ended) = watch::channel(false);
                let metrics = Metrics::new(observed.clone())?;
                let enabled = config.health.metrics_enabled;
                let serving = health::serve(
                    listener,
                    metrics,
                    observed,
                    states,
                    packing,
                    running.clone(),
                    tasks_stopped,
                    enabled,
                    ended,
                );
                Some((tokio::spawn(serving), end))
            }
            None => None,
        };
        tracing::info!(node = node_name, epoch, outbox_bytes = budget.outbox_bytes, "collecting");
        Ok(Self {
            stop,
            stop_shm,
            stop_tasks,
            sources,
            tasks,
            sources_ended,
            packer,
            outbox,
            queues,
            shipper,
            ship,
            give_up,
            spool_bytes,
            live: shared.live,
            controls,
            health,
            running,
        })
    }

    /// The names of threads and tasks that ended, though nobody asked them to.
    pub fn ended(&self) -> Vec<&'static str> {
        self.running.ended()
    }

    /// Drains and ends. True when everything was acknowledged.
    pub async fn shutdown(self) -> bool {
        let has_spool = self.outbox.has_spool();
        let limit = match (self.ship.is_refused(), has_spool) {
            (true, _) => DRAIN_TIMEOUT_REFUSED,
            (false, true) => DRAIN_TIMEOUT_SPOOL,
            (false, false) => DRAIN_TIMEOUT,
        };
        let deadline = tokio::time::Instant::now() + limit;
        self.stop_tasks.send_replace(true);
        self.stop.set();
        self.stop_shm.set();
        let (sources, tasks, packer) = (self.sources, self.tasks, self.packer);
        let runtime = tokio::runtime::Handle::current();
        let (sources_ended, queues) = (self.sources_ended, self.queues);
        let drained = tokio::task::spawn_blocking(move || {
            for source in sources {
                join(source);
            }
            for task in tasks {
                if runtime.block_on(task).is_err_and(|error| error.is_panic()) {
                    tracing::error!("a source panicked");
                }
            }
            sources_ended.store(true, Ordering::Release);
            queues.wake_packer();
            join(packer);
        });
        let mut shipper = self.shipper;
        let finished = tokio::time::timeout_at(deadline, async {
            let drained = drained.await;
            let shipped = (&mut shipper).await;
            drained.is_ok() && shipped.is_ok()
        });
        let mut is_clean = finished.await.unwrap_or(false) && self.outbox.is_done();
        if is_clean && has_spool {
            // The spool's thread was woken by the last acknowledgement and deletes what is left.
            let end = tokio::time::Instant::now() + Duration::from_secs(1);
            while self.spool_bytes.load(Ordering::Relaxed) > 0 && tokio::time::Instant::now() < end {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
        if !is_clean && has_spool {
            self.give_up.send_replace(true);
            self.outbox.flush();
            let end = tokio::time::Instant::now() + FLUSH_TIMEOUT;
            while !self.outbox.is_spooled() && tokio::time::Instant::now() < end {
                // The spool's thread tells of each batch that it has written.
                let _ = tokio::time::timeout(Duration::from_millis(50), self.outbox.changed.notified()).await;
            }
            is_clean = self.outbox.is_spooled();
            if is_clean {
                tracing::info!("what no server has acknowledged is in the spool, and is sent after the next start");
            }
        }
        if !is_clean {
            let (bytes, frames) = self.outbox.usage();
            tracing::warn!(bytes, frames, "not everything could be handed to a server before the end");
            self.give_up.send_replace(true);
        }
        if let Some((serving, end)) = self.health {
            end.send_replace(true);
            if tokio::time::timeout(Duration::from_secs(1), serving).await.is_err() {
                tracing::debug!("a health client kept its connection");
            }
        }
        is_clean
    }
}

fn off(source: &'static str, reason: String) -> SourceState {
    SourceState { source, off: Some(reason), alive: Alive::default(), status: Status::default() }
}

/// Spawns a task; the first of what is returned tells whether it runs, or has returned rather than panicked.
fn watched(task: impl Future<Output = ()> + Send + 'static) -> (Alive, tokio::task::JoinHandle<()>) {
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

fn join(thread: JoinHandle<()>) {
    if thread.join().is_err() {
        tracing::error!("a thread panicked");
    }
}
