//! One shard: a thread, its queue, and the state of its entities.
//!
//! What enters: routed frames. What leaves: clues. What must hold: a shard shares no state with another. It sleeps while its
//! queue is empty and is woken once a frame at most, never once an event. It leaves only when its queue is drained.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering, fence};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam::queue::ArrayQueue;
use prometheus::{Histogram, IntCounter, IntGauge};
use rustix::thread::{CpuSet, sched_setaffinity};

use super::bus::{BusClosed, ClueBus, NodeClock};
use super::clue::{Clue, ClueKinds};
use super::generations::Generations;
use super::permits::Permits;
use super::resolve;
use super::route::RoutedFrame;
use super::state::EntityTable;
use super::topology::Topology;

/// What the outside sees of a shard.
pub struct ShardGauges {
    pub events: IntCounter,
    pub evicted: IntCounter,
    pub entities: IntGauge,
    pub queue_frames: IntGauge,
    /// The core it is pinned to, -1 when it is not.
    pub core: IntGauge,
    /// All shards'.
    pub frame_seconds: Histogram,
}

/// The state of one shard and the work on it; [`run`] gives it a thread.
pub struct Shard {
    index: usize,
    table: EntityTable,
    topology: Arc<Topology>,
    wanted: ClueKinds,
    interest: Option<Interest>,
    started: Instant,
    /// When it was last reported that a node goes on, by the node's clock since boot.
    clocks: Generations<u64, u64>,
}

/// How often it is reported that a node goes on.
const CLOCK_INTERVAL_NS: u64 = 30_000_000_000;
/// Nodes whose clocks are remembered.
const CLOCKS_MAX: usize = 16_384;

/// Returns whether any pattern can use a clue; one that none can use is not published.
pub type Interest = Arc<dyn Fn(&Clue) -> bool + Send + Sync>;

impl Shard {
    /// A shard without entities.
    pub fn new(
        index: usize,
        entities_max: usize,
        window: Duration,
        topology: Arc<Topology>,
        wanted: ClueKinds,
        interest: Option<Interest>,
    ) -> Self {
        Self {
            index,
            table: EntityTable::new(entities_max, window),
            topology,
            wanted,
            interest,
            started: Instant::now(),
            clocks: Generations::new(CLOCKS_MAX),
        }
    }

    /// The entities it remembers.
    pub fn table(&self) -> &EntityTable {
        &self.table
    }

    /// Works through this shard's events of a frame and returns how many they were.
    ///
    /// # Errors
    /// [`BusClosed`] when a clue could not be published any more.
    pub fn process(&mut self, routed: &RoutedFrame, bus: &dyn ClueBus) -> Result<usize, BusClosed> {
        self.table.advance(self.started.elapsed());
        let Self { table, topology, wanted, interest, .. } = self;
        let (node, frame) = (routed.node(), routed.frame());
        let is_lethal = frame.header().lethal_events > 0;
        let events = &frame.body().events;
        let mut result = Ok(());
        routed.for_each(self.index, |index| {
            let Some(event) = events.get(index as usize) else {
                return;
            };
            let key = (node.id, event.entity.to_native());
            if let Some(burst) = table.count(key, event.time_ns.to_native(), &event.body, frame.body())
                && wanted.contains(burst.kind)
            {
                let clue = resolve::burst(node, frame, index, event, topology, burst);
                result = result.and(publish(bus, interest, clue));
            }
            if is_lethal && let Some(clue) = resolve::lethal(node, frame, index, event, topology, *wanted) {
                result = result.and(publish(bus, interest, clue));
            }
        });
        let header = frame.header();
        let reported_ns = self.clocks.entry(node.id, || 0);
        if header.boottime_ns.abs_diff(*reported_ns) >= CLOCK_INTERVAL_NS {
            *reported_ns = header.boottime_ns;
            let (epoch, boottime_ns, realtime_ns) = (header.epoch, header.boottime_ns, header.realtime_ns);
            bus.clock(NodeClock { node: node.clone(), epoch, boottime_ns, realtime_ns });
        }
        result.map(|()| routed.events_of(self.index))
    }
}

fn publish(bus: &dyn ClueBus, interest: &Option<Interest>, clue: Clue) -> Result<(), BusClosed> {
    match interest {
        Some(interest) if !interest(&clue) => Ok(()),
        _ => bus.publish(clue),
    }
}

/// What a shard's thread shares with the correlator.
pub(super) struct ShardInbox {
    pub queue: ArrayQueue<Arc<RoutedFrame>>,
    pub stopping: AtomicBool,
    pub gauges: ShardGauges,
    pub events: AtomicU64,
    /// How deep the shard sleeps: [`AWAKE`], [`NAPPING`] or [`ASLEEP`].
    pub depth: AtomicU8,
}

/// State of a shard that will look at its queue before it rests.
pub(super) const AWAKE: u8 = 0;
/// State of a shard that will look again within [`NAP`]; only what is urgent wakes it.
const NAPPING: u8 = 1;
/// Every frame must wake it.
const ASLEEP: u8 = 2;
/// While frames keep coming, a shard looks for them this often rather than being woken for each: a wakeup costs more than
/// the work on a small frame.
const NAP: Duration = Duration::from_millis(5);

impl ShardInbox {
    /// Rests the shard's thread: first a nap, then until it is woken.
    ///
    /// The fences pair with the one in [`ShardInbox::wants_wakeup`]: either the pusher sees how deep this sleeps, or this sees the
    /// frame. An unpark between the look and the park makes the park return at once.
    fn rest(&self) {
        self.depth.store(NAPPING, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        if self.queue.is_empty() && !self.stopping.load(Ordering::Acquire) {
            thread::park_timeout(NAP);
        }
        if self.queue.is_empty() && !self.stopping.load(Ordering::Acquire) {
            self.depth.store(ASLEEP, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            if self.queue.is_empty() && !self.stopping.load(Ordering::Acquire) {
                thread::park();
            }
        }
        self.depth.store(AWAKE, Ordering::Relaxed);
    }

    /// After a push: whether the shard's thread must be woken for it.
    pub fn wants_wakeup(&self, is_urgent: bool) -> bool {
        fence(Ordering::SeqCst);
        match self.depth.load(Ordering::Relaxed) {
            AWAKE => false,
            NAPPING => is_urgent || self.queue.len() > self.queue.capacity() / 4,
            _ => true,
        }
    }
}

/// Closes the permits when its shard ends before its time, so that nobody waits for it for ever.
struct Guard<'a> {
    permits: &'a Permits,
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.permits.close();
        }
    }
}

/// Pins the calling thread to a core. False where that is not allowed.
fn stay_on(core: usize) -> bool {
    let mut one = CpuSet::new();
    one.set(core);
    sched_setaffinity(None, &one).is_ok()
}

/// The thread of a shard.
pub(super) fn run(mut shard: Shard, inbox: &ShardInbox, bus: &dyn ClueBus, permits: &Permits, core: Option<usize>) {
    let _guard = Guard { permits };
    if let Some(core) = core.filter(|&core| stay_on(core)) {
        inbox.gauges.core.set(core as i64);
    }
    loop {
        let Some(routed) = inbox.queue.pop() else {
            // Acquire: pairs with the Release in `Correlator::stop`; a queue seen empty after it stays empty.
            if inbox.stopping.load(Ordering::Acquire) && inbox.queue.is_empty() {
                return;
            }
            inbox.rest();
            continue;
        };
        match shard.process(&routed, bus) {
            Ok(events) => {
                inbox.events.fetch_add(events as u64, Ordering::Relaxed);
                inbox.gauges.events.inc_by(events as u64);
            }
            Err(BusClosed) => {
                tracing::error!("the finder has stopped; correlation stops with it");
                permits.close();
            }
        }
        inbox.gauges.frame_seconds.observe(routed.age().as_secs_f64());
        let table = shard.table();
        inbox.gauges.entities.set(table.len() as i64);
        let evicted = &inbox.gauges.evicted;
        evicted.inc_by(table.evicted().saturating_sub(evicted.get()));
        inbox.gauges.queue_frames.set(inbox.queue.len() as i64);
    }
}
