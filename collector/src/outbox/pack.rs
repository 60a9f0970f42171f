//! The packer: bodies become sealed frames.
//!
//! What enters: bodies from the queues, lethal ones first. What leaves: sealed frames in the outbox. What must hold:
//! while the outbox has no room for a lane, its bodies stay in their queue, and the other lane's pass by. An event that
//! fits no frame is counted as `dropped{queue, malformed}` and harms no other.
//!
//! At a high rate a thread of its own packs. At a low rate waking it costs more than the packing: then the source that
//! brings a body packs it too ([`Packer::pack_here`]). One thread packs at a time, in the order of the queues.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam::sync::Parker;
use tapio_wire::compress::Compression;
use tapio_wire::event::{Body, Entity, EntityKind, Lane};
use tapio_wire::frame::Encoder;
use tapio_wire::ledger::{Reason, Stage};

use crate::base::books::Books;
use crate::base::metrics::{Metrics, doubling, raise};
use crate::outbox::Outbox;
use crate::outbox::frame_times::FrameTimes;
use crate::outbox::queue::Queues;

/// How often the counters are stated when nothing happens.
const STATEMENT_INTERVAL: Duration = Duration::from_secs(1);
/// Bodies that a source packs: those of its own two lanes. More than that come from a busy source, and the thread packs
/// them.
const BODIES_HERE_MAX: usize = 2;
/// How often the node is described: well within the shortest window that a server replays.
const DESCRIPTION_INTERVAL: Duration = Duration::from_secs(60);

/// Bytes of frames as sent.
pub struct FrameSizes(pub prometheus::Histogram);

impl Default for FrameSizes {
    fn default() -> Self {
        Self(doubling("tapio_collector_frame_bytes", "Size of a frame as sent, in bytes", 256.0, 15))
    }
}

/// Counters of the packer.
#[derive(Default)]
pub struct PackCounts {
    pub frames: AtomicU64,
    pub raw_bytes: AtomicU64,
    pub wire_bytes: AtomicU64,
    pub sizes: FrameSizes,
}

impl PackCounts {
    /// Registers its metrics.
    ///
    /// # Errors
    /// When two metrics have the same name.
    pub fn register(self: &Arc<Self>, metrics: &mut Metrics) -> Result<(), prometheus::Error> {
        metrics.register(self.sizes.0.clone())?;
        let frames = metrics.counter("tapio_collector_frames_total", "Frames that the packer has sealed")?;
        let raw_bytes =
            metrics.counter("tapio_collector_frame_raw_bytes_total", "Bytes of frame bodies before compression")?;
        let wire_bytes = metrics.counter("tapio_collector_frame_wire_bytes_total", "Bytes of frames as sent")?;
        let counts = Arc::clone(self);
        metrics.on_scrape(move || {
            raise(&frames, counts.frames.load(Ordering::Relaxed));
            raise(&raw_bytes, counts.raw_bytes.load(Ordering::Relaxed));
            raise(&wire_bytes, counts.wire_bytes.load(Ordering::Relaxed));
        });
        Ok(())
    }
}

/// Seals bodies of events into frames.
pub struct Packer {
    pub queues: Arc<Queues>,
    pub outbox: Arc<Outbox>,
    pub compression: Compression,
    pub counts: Arc<PackCounts>,
    pub books: Arc<Books>,
    /// Set when every source has ended: what is in the queues then is the last.
    pub sources_ended: Arc<AtomicBool>,
    /// Whoever packs holds this.
    pub state: Mutex<PackState>,
}

/// What it takes to pack.
pub struct PackState {
    encoder: Encoder,
    /// When the counters were stated last.
    stated: Instant,
    /// Describes the node itself, on each new stream and from time to time, so that a replay of the archive knows its
    /// name.
    node: NodeDescription,
}

impl PackState {
    /// Nothing was packed yet.
    pub fn new(node: NodeDescription) -> Mutex<Self> {
        Mutex::new(Self { encoder: Encoder::default(), stated: Instant::now(), node })
    }
}

/// When the node was described last.
pub struct NodeDescription {
    name: String,
    generation: Arc<AtomicU64>,
    described: Option<(u64, Instant)>,
}

impl NodeDescription {
    /// Makes a node that is not described yet. `generation` counts the streams.
    pub fn new(name: String, generation: Arc<AtomicU64>) -> Self {
        Self { name, generation, described: None }
    }

    fn add_when_due(&mut self, body: &mut Body) {
        let generation = self.generation.load(Ordering::Relaxed);
        let is_fresh =
            self.described.is_some_and(|(known, at)| known == generation && at.elapsed() < DESCRIPTION_INTERVAL);
        if !is_fresh {
            self.described = Some((generation, Instant::now()));
            body.entities.push(Entity::named(EntityKind::Node, tapio_wire::node_id(&self.name), self.name.clone()));
        }
    }
}

impl Packer {
    /// Packs until the sources have ended and the queues are empty, then closes the epoch.
    pub fn run(&self, parker: &Parker) {
        loop {
            let has_ended = self.sources_ended.load(Ordering::Acquire);
            let mut state = self.state();
            while self.pack_next(&mut state) {
                self.outbox.wake_shipper();
            }
            if has_ended && self.queues.is_empty() {
                // An empty frame carries the closing counters.
                self.outbox.finish_with(|| self.seal(&mut state.encoder, Lane::Bulk, &Body::default()));
                return;
            }
            if state.stated.elapsed() >= STATEMENT_INTERVAL {
                if self.outbox.is_statement_due() {
                    self.pack(&mut state.encoder, Lane::Bulk, Body::default());
                    self.outbox.wake_shipper();
                }
                state.stated = Instant::now();
            }
            let until_statement = STATEMENT_INTERVAL.saturating_sub(state.stated.elapsed());
            drop(state);
            parker.park_timeout(until_statement);
        }
    }

    /// Packs the queued bodies on the caller's thread, unless another thread packs or there are more than
    /// [`BODIES_HERE_MAX`]. Returns false if the packer's thread must be woken.
    pub fn pack_here(&self) -> bool {
        let waiting = self.queues.depth(Lane::Lethal) + self.queues.depth(Lane::Bulk);
        if waiting > BODIES_HERE_MAX {
            return false;
        }
        let Ok(mut state) = self.state.try_lock() else { return false };
        // The shipper is woken once: it sends what comes together with one waking, and does not want the outbox meanwhile.
        let packed = (0..BODIES_HERE_MAX).take_while(|_| self.pack_next(&mut state)).count();
        drop(state);
        if packed > 0 {
            self.outbox.wake_shipper();
        }
        self.queues.is_empty()
    }

    fn state(&self) -> MutexGuard<'_, PackState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there was a body that there is room for.
    fn pack_next(&self, state: &mut PackState) -> bool {
        let Some((lane, mut body)) = self.queues.pop(self.outbox.open_lanes()) else { return false };
        state.node.add_when_due(&mut body);
        self.pack(&mut state.encoder, lane, body);
        state.stated = Instant::now();
        true
    }

    fn pack(&self, encoder: &mut Encoder, lane: Lane, mut body: Body) {
        match encoder.seal(&body, lane, self.compression) {
            Ok(frame) => {
                self.count(&frame);
                self.outbox.push(frame, FrameTimes::of(&body));
                self.queues.recycle(body);
            }
            Err(error) if body.events.len() > 1 || body.entities.len() > 1 => {
                // Only a batch with an uncommon amount of descriptions gets here.
                tracing::debug!(%error, events = body.events.len(), "batch split to fit a frame");
                let events = body.events.split_off(body.events.len() / 2);
                let entities = body.entities.split_off(body.entities.len() / 2);
                let second = Body { names: body.names.clone(), entities, events };
                self.pack(encoder, lane, body);
                self.pack(encoder, lane, second);
            }
            Err(error) => {
                // The bounds of records and texts leave no room for this; whatever gets past them costs itself alone.
                let kind = body.events.first().map_or("none", |event| event.kind().name());
                tracing::error!(%error, kind, names = body.names.len(), "event dropped: it fits no frame");
                for event in &body.events {
                    self.books.source(event.source).drop_events(Stage::Queue, Reason::Malformed, 1);
                }
            }
        }
    }

    fn seal(&self, encoder: &mut Encoder, lane: Lane, body: &Body) -> tapio_wire::frame::SealedFrame {
        let frame = encoder.seal(body, lane, self.compression).expect("an empty body fits a frame");
        self.count(&frame);
        frame
    }

    fn count(&self, frame: &tapio_wire::frame::SealedFrame) {
        self.counts.frames.fetch_add(1, Ordering::Relaxed);
        self.counts.raw_bytes.fetch_add(u64::from(frame.raw_bytes()), Ordering::Relaxed);
        self.counts.wire_bytes.fetch_add(frame.len() as u64, Ordering::Relaxed);
        self.counts.sizes.0.observe(frame.len() as f64);
    }
}

#[cfg(test)]
mod tests {
    use tapio_wire::event::{Detail, Event, Source};
    use tapio_wire::limits::RAW_BYTES_MAX;

    use super::*;
    use crate::outbox::links::Links;
    use crate::outbox::queue::Queues;

    fn body(names: Vec<String>) -> Body {
        let detail = Detail::CgroupMade { path: 0 };
        let event = Event { time_ns: 1, entity: 1, pid: 1, source: Source::Shm, body: detail };
        Body { names, events: vec![event], ..Body::default() }
    }

    fn packer(sources_ended: bool) -> (Packer, Parker, Links) {
        let (queues, parker) = Queues::new(64);
        let links = Links::new(queues);
        let packer = Packer {
            queues: Arc::clone(&links.queues),
            outbox: Arc::new(Outbox::new(7, 1, 64 << 20, &links)),
            compression: Compression::None,
            counts: Arc::default(),
            books: Arc::clone(&links.books),
            sources_ended: Arc::new(AtomicBool::new(sources_ended)),
            state: PackState::new(NodeDescription::new("node".into(), Arc::default())),
        };
        (packer, parker, links)
    }

    #[test]
    fn a_source_packs_little_and_leaves_much_to_the_thread() {
        let (packer, parker, links) = packer(false);
        let push = |count: usize| {
            for _ in 0..count {
                assert!(links.queues.push(Lane::Bulk, body(vec!["/a".into()])).is_ok());
            }
        };
        push(1);
        assert!(packer.pack_here());
        push(1);
        let state = packer.state();
        assert!(!packer.pack_here(), "somebody is at it");
        drop(state);
        push(BODIES_HERE_MAX);
        assert!(!packer.pack_here(), "too much waits");
        assert_eq!(links.queues.depth(Lane::Bulk), 1 + BODIES_HERE_MAX);
        packer.sources_ended.store(true, Ordering::Release);
        packer.run(&parker);
        let frames = std::iter::from_fn(|| packer.outbox.next(u64::MAX)).count();
        assert_eq!(frames, 1 + BODIES_HERE_MAX + 1 + 1, "all, and the closing one");
    }

    #[test]
    fn an_event_that_fits_no_frame_is_counted_alone() {
        let (packer, parker, links) = packer(true);
        let outbox = Arc::clone(&packer.outbox);
        links.books.source(Source::Shm).set_emitted(2);
        let too_long = "x".repeat(RAW_BYTES_MAX);
        assert!(links.queues.push(Lane::Lethal, body(vec![too_long])).is_ok());
        assert!(links.queues.push(Lane::Lethal, body(vec!["/a".into()])).is_ok());
        packer.run(&parker);
        while outbox.next(u64::MAX).is_some() {}
        let account = *outbox.ledger().account(Source::Shm);
        assert_eq!(account.dropped[Stage::Queue as usize][Reason::Malformed as usize], 1);
        assert_eq!((account.shipped, account.held()), (1, 0));
    }
}
