//! Correlation, step one: hot, sharded, constant time an event.
//!
//! What enters: checked frames, in the order of each node's stream. What leaves: [`clue::Clue`]s on a [`ClueBus`]. What must
//! hold: one thread a core and nothing shared between shards. At most `frames_in_flight` frames are anywhere between
//! [`Correlator::deliver`] and the shards, and of these at most a quarter of one node. Whoever delivers more waits, so that a
//! node that floods holds back itself. Memory is bounded by entities; no clue is dropped.
//!
//! ```text
//! deliver ── permit ── topology, losses ── route: entity → shard ──► queue ──► shard 0 ──► bus ──► finder
//!                                                              └───► queue ──► shard 1 ──┘
//! ```

pub mod batch;
mod bus;
pub mod clue;
mod curve;
mod facts;
mod field_name;
mod generations;
mod limit_level;
mod loss;
mod metrics;
mod permits;
mod resolve;
mod route;
pub mod shard;
pub mod state;
mod topology;

use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, JoinHandle, Thread};
use std::time::Duration;

use crossbeam::queue::ArrayQueue;
use rustix::thread::{CpuSet, sched_getaffinity};
use tapio_wire::frame::Frame;
use tapio_wire::service::ShardStatus;

pub use bus::{BusClosed, ClueBus, FrameBegun, InProcessBus, NodeClock};
pub(crate) use bus::{LogUpdate, Message};
pub use curve::{Shape as CurveShape, Summary as CurveSummary, summary as curve_summary};
pub use field_name::FieldName;
pub use generations::Generations;
pub use loss::{Dropped, Interval, Intervals, LossBook, LossView, Lost};
pub use route::RoutedFrame;
pub use shard::Interest;
pub(crate) use topology::is_global;
pub use topology::{EntityInfo, NodeRef, Topology};

use clue::ClueKinds;
use metrics::Metrics;
use permits::{Permit, Permits};
use shard::{Shard, ShardInbox};

/// How correlation is sized.
#[derive(Clone)]
pub struct CorrelateConfig {
    /// Threads; `None` for one on every core that this process may use.
    pub shards: Option<usize>,
    /// Time without events after which an entity is forgotten.
    pub window: Duration,
    /// Entities remembered by all shards together, and descriptions kept.
    pub entities_max: usize,
    /// Frames between delivery and the last shard's work on them.
    pub frames_in_flight: usize,
    /// The clues that are wanted; others are not made.
    pub wanted: ClueKinds,
    /// Clues that are published; `None` for all.
    pub interest: Option<Interest>,
}

impl Default for CorrelateConfig {
    fn default() -> Self {
        Self {
            shards: None,
            window: Duration::from_secs(300),
            entities_max: 200_000,
            frames_in_flight: 256,
            wanted: ClueKinds::all(),
            interest: None,
        }
    }
}

/// Why correlation could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("a thread for correlation could not be started: {0}")]
    Thread(#[from] std::io::Error),
    #[error("a metric of correlation is declared wrongly: {0}")]
    Metric(#[from] prometheus::Error),
}

/// Correlation has stopped, or one of its threads has failed: frames are not taken any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("correlation has stopped: no frame is taken any more")]
pub struct Stopped;

struct Handle {
    inbox: Arc<ShardInbox>,
    thread: Thread,
    join: Mutex<Option<JoinHandle<()>>>,
}

/// The shards and the way to them.
pub struct Correlator {
    shards: Vec<Handle>,
    permits: Arc<Permits>,
    topology: Arc<Topology>,
    losses: Arc<LossBook>,
    bus: Arc<dyn ClueBus>,
    metrics: Metrics,
}

impl Correlator {
    /// Starts the shards. Descriptions are entered in `topology`, losses in `losses`; clues go to `bus`.
    ///
    /// # Errors
    /// [`StartError`] when a thread cannot be started.
    pub fn start(
        config: &CorrelateConfig,
        topology: Arc<Topology>,
        losses: Arc<LossBook>,
        bus: Arc<dyn ClueBus>,
    ) -> Result<Self, StartError> {
        let allowed = sched_getaffinity(None).unwrap_or_else(|_| CpuSet::new());
        let cores: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|&core| allowed.is_set(core)).collect();
        let parallel = thread::available_parallelism().map_or(1, usize::from);
        let shards = config.shards.unwrap_or(parallel).max(1);
        // With a CPU quota below the cores, pinning would crowd every quota-limited program onto the first cores.
        let pin = parallel >= cores.len();
        let metrics = Metrics::new()?;
        let mut started = Self {
            shards: Vec::with_capacity(shards),
            permits: Arc::new(Permits::new(config.frames_in_flight)),
            topology,
            losses,
            bus: Arc::clone(&bus),
            metrics,
        };
        for index in 0..shards {
            let core = if pin { cores.get(index).copied() } else { None };
            started.start_shard(index, shards, core, config, &bus)?;
        }
        Ok(started)
    }

    fn start_shard(
        &mut self,
        index: usize,
        shards: usize,
        core: Option<usize>,
        config: &CorrelateConfig,
        bus: &Arc<dyn ClueBus>,
    ) -> Result<(), StartError> {
        let shard = Shard::new(
            index,
            config.entities_max.div_ceil(shards),
            config.window,
            Arc::clone(&self.topology),
            config.wanted,
            config.interest.clone(),
        );
        let inbox = Arc::new(ShardInbox {
            queue: ArrayQueue::new(self.permits.frames()),
            stopping: AtomicBool::new(false),
            gauges: self.metrics.shard(index),
            events: AtomicU64::new(0),
            depth: AtomicU8::new(shard::AWAKE),
        });
        let join = {
            let (inbox, bus) = (Arc::clone(&inbox), Arc::clone(bus));
            let permits = Arc::clone(&self.permits);
            thread::Builder::new()
                .name(format!("correlate-{index}"))
                .spawn(move || shard::run(shard, &inbox, &*bus, &permits, core))?
        };
        self.shards.push(Handle { inbox, thread: join.thread().clone(), join: Mutex::new(Some(join)) });
        Ok(())
    }

    /// Hands a frame to the shards; waits while too many are in flight. Frames of one node must come one after another.
    ///
    /// # Errors
    /// [`Stopped`] when correlation has stopped.
    pub async fn deliver(&self, node: NodeRef, frame: Arc<Frame>) -> Result<(), Stopped> {
        let permit = self.permits.acquire(node.id).await?;
        self.dispatch(node, frame, permit);
        Ok(())
    }

    /// [`Correlator::deliver`] for a thread that may block: replay at start.
    ///
    /// # Errors
    /// [`Stopped`] when correlation has stopped.
    pub fn deliver_blocking(&self, node: NodeRef, frame: Arc<Frame>) -> Result<(), Stopped> {
        block_on(self.deliver(node, frame))
    }

    /// Waits until the shards have worked through every frame that was delivered before.
    ///
    /// # Errors
    /// [`Stopped`] when correlation has stopped.
    pub async fn drained(&self) -> Result<(), Stopped> {
        self.permits.all_free().await
    }

    /// [`Correlator::drained`] for a thread that may block.
    ///
    /// # Errors
    /// [`Stopped`] when correlation has stopped.
    pub fn drained_blocking(&self) -> Result<(), Stopped> {
        block_on(self.drained())
    }

    fn dispatch(&self, node: NodeRef, frame: Arc<Frame>, permit: Permit) {
        let described = self.topology.learn(&node, &frame.body().entities);
        if self.topology.has_renamed() {
            self.bus.renamed();
        }
        let lost = self.losses.observe(&frame);
        let is_followed = self.bus.follows_frames();
        if is_followed {
            let described = described.into_iter().filter_map(|id| self.topology.get(node.id, id)).collect();
            self.bus.began(&FrameBegun { node: &node, frame: &frame, described, lost });
        }
        let is_urgent = frame.header().is_urgent;
        let mut routed = RoutedFrame::new(node, frame, self.shards.len(), Some(permit));
        if is_followed {
            routed = routed.reporting(Arc::clone(&self.bus));
        }
        let routed = Arc::new(routed);
        for (index, shard) in self.shards.iter().enumerate() {
            if routed.events_of(index) == 0 {
                continue;
            }
            let pushed = shard.inbox.queue.push(Arc::clone(&routed));
            debug_assert!(pushed.is_ok(), "permits bound the queue");
            if shard.inbox.wants_wakeup(is_urgent) {
                shard.thread.unpark();
            }
        }
    }

    /// Whether a shard or the finder has ended before its time: no frame is correlated any more.
    pub fn has_failed(&self) -> bool {
        self.permits.is_closed()
    }

    /// Events that the shards have worked through.
    pub fn events_correlated(&self) -> u64 {
        let events = |shard: &Handle| shard.inbox.events.load(Ordering::Relaxed);
        self.shards.iter().map(events).sum()
    }

    /// The shards, for the query service.
    pub fn status(&self) -> Vec<ShardStatus> {
        let status = |(index, shard): (usize, &Handle)| {
            let gauges = &shard.inbox.gauges;
            ShardStatus {
                shard: index as u32,
                core: gauges.core.get() as i32,
                events: shard.inbox.events.load(Ordering::Relaxed),
                entities: gauges.entities.get() as u64,
                evicted: gauges.evicted.get(),
            }
        };
        self.shards.iter().enumerate().map(status).collect()
    }

    /// The descriptions of entities.
    pub fn topology(&self) -> &Arc<Topology> {
        &self.topology
    }

    /// Registers its metrics.
    ///
    /// # Errors
    /// When one of the names is taken.
    pub fn register(&self, registry: &prometheus::Registry) -> Result<(), prometheus::Error> {
        self.metrics.register(registry)
    }

    /// Takes no more frames, works through those it has and ends the threads. Dropping does the same.
    pub fn stop(&self) {
        self.permits.close();
        for shard in &self.shards {
            // Release: pairs with the Acquire in `shard::run`; whoever sees it also sees every frame pushed before.
            shard.inbox.stopping.store(true, Ordering::Release);
            shard.thread.unpark();
        }
        for shard in &self.shards {
            let join = shard.join.lock().unwrap_or_else(PoisonError::into_inner).take();
            if join.is_some_and(|join| join.join().is_err()) {
                tracing::error!("a correlation shard has failed");
            }
        }
    }
}

impl Drop for Correlator {
    fn drop(&mut self) {
        self.stop();
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Waits for a future that needs no runtime. The thread may be one of a tokio runtime: there tokio's primitives stop after a budget
/// of polls, and wake whoever waits by the runtime's scheduler, which is parked here. So they are polled without a budget.
fn block_on<F: Future>(future: F) -> F::Output {
    let mut future = pin!(tokio::task::coop::unconstrained(future));
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    loop {
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(output) => return output,
            Poll::Pending => thread::park(),
        }
    }
}
