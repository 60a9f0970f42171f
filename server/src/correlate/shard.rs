//! One shard: a thread, its queue, and the state of its entities.
//!
//! What enters: routed frames. What leaves: signals. What must hold: a shard shares no state with another; it sleeps while
//! its queue is empty and is woken once a frame at most, never once an event; it leaves only when its queue is drained.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam::queue::ArrayQueue;
use prometheus::{IntCounter, IntGauge};
use tokio::sync::Semaphore;

use super::bus::{BusClosed, SignalBus};
use super::resolve;
use super::route::RoutedFrame;
use super::signal::SignalKinds;
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
}

/// The state of one shard and the work on it; [`run`] gives it a thread.
pub struct Shard {
    index: usize,
    table: EntityTable,
    topology: Arc<Topology>,
    wanted: SignalKinds,
    started: Instant,
}

impl Shard {
    /// A shard without entities.
    pub fn new(
        index: usize,
        entities_max: usize,
        window: Duration,
        topology: Arc<Topology>,
        wanted: SignalKinds,
    ) -> Self {
        Self {
            index,
            table: EntityTable::new(entities_max, window),
            topology,
            wanted,
            started: Instant::now(),
        }
    }

    /// The entities it remembers.
    pub fn table(&self) -> &EntityTable {
        &self.table
    }

    /// Works through this shard's events of a frame and tells how many they were.
    ///
    /// # Errors
    /// [`BusClosed`] when a signal could not be published any more.
    pub fn process(
        &mut self,
        routed: &RoutedFrame,
        bus: &dyn SignalBus,
    ) -> Result<usize, BusClosed> {
        self.table.advance(self.started.elapsed());
        let Self {
            table,
            topology,
            wanted,
            ..
        } = self;
        let (node, frame) = (routed.node(), routed.frame());
        let is_lethal = frame.header().lethal_events > 0;
        let events = &frame.body().events;
        let mut result = Ok(());
        routed.for_each(self.index, |index| {
            let Some(event) = events.get(index as usize) else {
                return;
            };
            let key = (node.id, event.entity.to_native());
            if let Some(burst) = table.count(key, event.time_ns.to_native(), &event.body)
                && wanted.contains(burst.kind)
            {
                let signal = resolve::burst(node, frame, index, event, topology, burst);
                result = result.and(bus.publish(signal));
            }
            if is_lethal
                && let Some(signal) = resolve::lethal(node, frame, index, event, topology, *wanted)
            {
                result = result.and(bus.publish(signal));
            }
        });
        result.map(|()| routed.events_of(self.index))
    }
}

/// What a shard's thread shares with the correlator.
pub(super) struct Shared {
    pub queue: ArrayQueue<Arc<RoutedFrame>>,
    pub stopping: AtomicBool,
    pub gauges: ShardGauges,
    pub events: AtomicU64,
}

/// Closes the permits when its shard ends before its time, so that nobody waits for it for ever.
struct Guard<'a> {
    permits: &'a Semaphore,
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.permits.close();
        }
    }
}

/// The thread of a shard.
pub(super) fn run(
    mut shard: Shard,
    shared: &Shared,
    bus: &dyn SignalBus,
    permits: &Semaphore,
    core: Option<core_affinity::CoreId>,
) {
    let _guard = Guard { permits };
    if let Some(core) = core.filter(|&core| core_affinity::set_for_current(core)) {
        shared.gauges.core.set(core.id as i64);
    }
    loop {
        let Some(routed) = shared.queue.pop() else {
            // Acquire: pairs with the Release in `Correlator::stop`; a queue seen empty after it stays empty.
            if shared.stopping.load(Ordering::Acquire) && shared.queue.is_empty() {
                return;
            }
            // An unpark between the pop and here makes this return at once.
            thread::park();
            continue;
        };
        match shard.process(&routed, bus) {
            Ok(events) => {
                shared.events.fetch_add(events as u64, Ordering::Relaxed);
                shared.gauges.events.inc_by(events as u64);
            }
            Err(BusClosed) => {
                tracing::error!("the finder has stopped; correlation stops with it");
                permits.close();
            }
        }
        let table = shard.table();
        shared.gauges.entities.set(table.len() as i64);
        let evicted = &shared.gauges.evicted;
        evicted.inc_by(table.evicted().saturating_sub(evicted.get()));
        shared.gauges.queue_frames.set(shared.queue.len() as i64);
    }
}
