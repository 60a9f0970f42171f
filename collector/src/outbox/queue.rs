//! The queues between sources and the packer, one for each lane.
//!
//! What enters: bodies of one lane. What leaves: the same, lethal ones first. What must hold: nothing is dropped here.
//! A source looks for room before it reads its ring, and without room leaves the records there. The ring is the buffer,
//! and its own counters show when it overflows.

use std::sync::Arc;

use crossbeam::queue::ArrayQueue;
use crossbeam::sync::{Parker, Unparker};
use tapio_wire::event::{Body, Lane};

use crate::base::metrics::Metrics;

/// What the packer may bring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenLanes {
    /// Frames of both lanes.
    Both,
    /// Lethal frames only.
    Lethal,
    /// Nothing: what is not yet packed waits in the queues, and behind them in the rings.
    None,
}

/// Both lanes and the pool of empty bodies.
pub struct Queues {
    lethal: ArrayQueue<Body>,
    bulk: ArrayQueue<Body>,
    pool: ArrayQueue<Body>,
    packer: Unparker,
}

impl Queues {
    /// Queues of `batches` bodies each, and the parker on which the packer waits for them.
    pub fn new(batches: usize) -> (Self, Parker) {
        let parker = Parker::new();
        let queues = Self {
            lethal: ArrayQueue::new(batches.max(64)),
            bulk: ArrayQueue::new(batches),
            // A body keeps the room that it once needed: no more of them than bulk can have on their way.
            pool: ArrayQueue::new(batches + 2),
            packer: parker.unparker().clone(),
        };
        (queues, parker)
    }

    /// Whether a body of this lane would find room. Only the sources push, and each looks before it pushes; with several
    /// sources a push may still fail, and is then tried again.
    pub fn has_room(&self, lane: Lane) -> bool {
        match lane {
            Lane::Lethal => !self.lethal.is_full(),
            Lane::Bulk => !self.bulk.is_full(),
        }
    }

    /// Queues a body for the packer without waking it: see [`Queues::wake_packer`].
    ///
    /// # Errors
    /// The body, when there is no room.
    pub fn push(&self, lane: Lane, body: Body) -> Result<(), Body> {
        match lane {
            Lane::Lethal => self.lethal.push(body),
            Lane::Bulk => self.bulk.push(body),
        }
    }

    /// The next body of an open lane, lethal ones first.
    pub fn pop(&self, open: OpenLanes) -> Option<(Lane, Body)> {
        if open == OpenLanes::None {
            return None;
        }
        match self.lethal.pop() {
            Some(body) => Some((Lane::Lethal, body)),
            None if open == OpenLanes::Both => self.bulk.pop().map(|body| (Lane::Bulk, body)),
            None => None,
        }
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.lethal.is_empty() && self.bulk.is_empty()
    }

    /// Batches that wait, by lane.
    pub fn depth(&self, lane: Lane) -> usize {
        match lane {
            Lane::Lethal => self.lethal.len(),
            Lane::Bulk => self.bulk.len(),
        }
    }

    /// Registers its metrics.
    ///
    /// # Errors
    /// When two metrics have the same name.
    pub fn register(self: &Arc<Self>, metrics: &mut Metrics) -> Result<(), prometheus::Error> {
        let depth = metrics.gauges("tapio_collector_queue_batches", "Batches that wait for the packer", &["lane"])?;
        let queues = Arc::clone(self);
        metrics.on_scrape(move || {
            for lane in [Lane::Lethal, Lane::Bulk] {
                depth.with_label_values(&[lane.name()]).set(queues.depth(lane) as i64);
            }
        });
        Ok(())
    }

    /// Wakes the packer: something that it waits for has changed.
    pub fn wake_packer(&self) {
        self.packer.unpark();
    }

    /// An empty body, out of the pool when it has one.
    pub fn empty_body(&self) -> Body {
        self.pool.pop().unwrap_or_default()
    }

    /// Gives a body's memory back.
    pub fn recycle(&self, mut body: Body) {
        body.clear();
        // A full pool means that enough are idle: this one's memory goes back to the allocator.
        let _ = self.pool.push(body);
    }
}
