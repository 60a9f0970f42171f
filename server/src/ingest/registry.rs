//! The nodes that are, or were, connected: whose stream is current, what was accepted, what is durable.
//!
//! What must hold: at most one stream of a node accepts frames. What is accepted is counted per node and epoch, not per stream,
//! so that a stream that takes over neither repeats nor skips a frame. Frames reach archive and correlator in the order in which
//! they are accepted, since [`Progress`] is locked from the one to the other.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use foldhash::fast::RandomState;
use prometheus::Counter;
use tapio_wire::service::SourceOff;
use tokio::sync::{Notify, watch};

use super::rate::Rate;
use super::refusal::Refusal;
use crate::archive::books::NODES_MAX;
use crate::archive::{Acknowledged, Books, Durable, lock_books};

/// Sources that are off, of one node, and bytes of each of their texts.
const SOURCES_OFF_MAX: usize = 16;
const OFF_TEXT_BYTES_MAX: usize = 512;

/// One node.
pub(super) struct Node {
    pub id: u64,
    pub name: Arc<str>,
    /// Held from a frame's sequence check until its delivery. `None` until a stream was current.
    pub progress: tokio::sync::Mutex<Option<Progress>>,
    /// How fast it may ship, over all its streams.
    pub rate: Option<Arc<Rate>>,
    /// The newest epoch of a stream, and its last durable frame.
    pub durable: watch::Sender<DurableTo>,
    current: Mutex<Current>,
}

/// What was accepted of a node.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Progress {
    pub epoch: u64,
    pub accepted: u64,
    /// What the next frame reports to the archive.
    pub resumed: Option<Acknowledged>,
}

/// What is durable of a node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct DurableTo {
    pub epoch: u64,
    pub seq: u64,
}

/// State of the current stream of a node.
#[derive(Default)]
struct Current {
    newest_epoch: u64,
    stream: Option<(u64, Arc<Notify>)>,
    /// What the collector of that stream says it does not watch.
    off: Vec<SourceOff>,
}

impl Durable for Node {
    fn durable(&self, epoch: u64, seq: u64) {
        self.durable.send_if_modified(|durable| {
            let newer = epoch == durable.epoch && seq > durable.seq;
            if newer {
                durable.seq = seq;
            }
            newer
        });
    }
}

/// Knows every node's current stream, and what of it is accepted and durable.
pub(super) struct Registry {
    nodes: Mutex<HashMap<u64, Arc<Node>, RandomState>>,
    streams: AtomicU64,
    /// Nodes that have a stream, and how many may have one.
    connected: Arc<AtomicUsize>,
    streams_max: usize,
    /// Bytes a second for each node, and where the waiting is counted.
    rate: (u64, Counter),
}

/// A stream's entry in the registry, given up when it is dropped.
pub(super) struct Registration {
    pub node: Arc<Node>,
    pub epoch: u64,
    /// The last frame that was durable when it was taken.
    pub durable_seq: u64,
    /// Notified when a later stream takes over.
    pub taken_over: Arc<Notify>,
    /// True if it cancelled an earlier stream of its node.
    pub took_over: bool,
    pub stream: u64,
    connected: Arc<AtomicUsize>,
}

impl Registry {
    pub fn new(streams_max: usize, rate: (u64, Counter)) -> Self {
        let (nodes, streams, connected) = (Mutex::default(), AtomicU64::new(0), Arc::default());
        Self { nodes, streams, connected, streams_max, rate }
    }

    /// Makes a stream the current one of its node.
    pub async fn enter(
        &self,
        id: u64,
        name: &str,
        epoch: u64,
        acknowledged: Acknowledged,
        books: &Mutex<Books>,
    ) -> Result<Registration, Refusal> {
        let node = self.node(id, name)?;
        let archived_epoch = lock_books(books).newest_epoch(id).unwrap_or(0);
        // Relaxed: a number that nobody else has is all that is asked for.
        let stream = self.streams.fetch_add(1, Ordering::Relaxed);
        let taken_over = Arc::new(Notify::new());
        let earlier = {
            let mut current = lock(&node.current);
            let newest = current.newest_epoch.max(archived_epoch);
            if epoch < newest {
                return Err(Refusal::OldEpoch { epoch, newest });
            }
            // Relaxed: a count; the streams of one node are serialised by its lock.
            if current.stream.is_none() && self.connected.fetch_add(1, Ordering::Relaxed) >= self.streams_max {
                self.connected.fetch_sub(1, Ordering::Relaxed);
                return Err(Refusal::TooManyStreams(self.streams_max));
            }
            current.newest_epoch = epoch;
            current.off.clear();
            current.stream.replace((stream, Arc::clone(&taken_over)))
        };
        // The earlier stream may be waiting for room with the progress locked: it must be notified of its end first.
        if let Some((_, earlier)) = &earlier {
            earlier.notify_one();
        }
        let mut registration = Registration {
            node,
            epoch,
            durable_seq: 0,
            taken_over,
            took_over: earlier.is_some(),
            stream,
            connected: Arc::clone(&self.connected),
        };
        let node = Arc::clone(&registration.node);
        let mut progress = node.progress.lock().await;
        let mut known = match *progress {
            Some(known) if known.epoch > epoch => {
                return Err(Refusal::OldEpoch { epoch, newest: known.epoch });
            }
            Some(known) if known.epoch == epoch => known,
            _ => {
                let seq = lock_books(books).durable_seq(id, epoch);
                node.durable.send_replace(DurableTo { epoch, seq });
                Progress { epoch, accepted: seq, resumed: None }
            }
        };
        // What was acknowledged is no longer with the collector: whichever server did so, this one goes on from there.
        if acknowledged.seq > known.accepted {
            known.accepted = acknowledged.seq;
            known.resumed = Some(acknowledged);
            node.durable.send_replace(DurableTo { epoch, seq: acknowledged.seq });
        }
        *progress = Some(known);
        registration.durable_seq = node.durable.borrow().seq;
        Ok(registration)
    }

    /// Whether a node has a stream.
    pub fn is_connected(&self, id: u64) -> bool {
        let nodes = lock(&self.nodes);
        nodes.get(&id).is_some_and(|node| lock(&node.current).stream.is_some())
    }

    /// The nodes that have a stream, by name, and what they do not watch.
    pub fn connected(&self) -> Vec<(u64, Arc<str>, Vec<SourceOff>)> {
        let nodes = lock(&self.nodes);
        let connected = nodes.values().filter_map(|node| {
            let current = lock(&node.current);
            current.stream.as_ref()?;
            Some((node.id, Arc::clone(&node.name), current.off.clone()))
        });
        let mut connected: Vec<_> = connected.collect();
        connected.sort_unstable_by(|a, b| a.1.cmp(&b.1));
        connected
    }

    fn node(&self, id: u64, name: &str) -> Result<Arc<Node>, Refusal> {
        let mut nodes = lock(&self.nodes);
        if let Some(node) = nodes.get(&id) {
            return Ok(Arc::clone(node));
        }
        if nodes.len() >= NODES_MAX {
            // Only this map holds them: no stream, no frame on its way to the disk.
            nodes.retain(|_, node| Arc::strong_count(node) > 1);
            if nodes.len() >= NODES_MAX {
                return Err(Refusal::TooManyNodes);
            }
        }
        let node = Arc::new(Node {
            id,
            name: name.into(),
            rate: Rate::new(self.rate.0, &self.rate.1).map(Arc::new),
            progress: tokio::sync::Mutex::default(),
            durable: watch::Sender::new(DurableTo::default()),
            current: Mutex::default(),
        });
        nodes.insert(id, Arc::clone(&node));
        Ok(node)
    }
}

impl Registration {
    /// Keeps what the collector says it does not watch, as much of it as is worth being shown.
    pub fn watches_without(&self, mut off: Vec<SourceOff>) {
        off.truncate(SOURCES_OFF_MAX);
        off.shrink_to_fit();
        for text in off.iter_mut().flat_map(|off| [&mut off.source, &mut off.reason]) {
            text.truncate(text.floor_char_boundary(OFF_TEXT_BYTES_MAX));
            text.shrink_to_fit();
        }
        let mut current = lock(&self.node.current);
        if matches!(current.stream, Some((stream, _)) if stream == self.stream) {
            current.off = off;
        }
    }

    /// Whether this stream is still the node's current one.
    pub fn is_current(&self) -> bool {
        let current = lock(&self.node.current);
        matches!(current.stream, Some((stream, _)) if stream == self.stream)
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let mut current = lock(&self.node.current);
        if matches!(current.stream, Some((stream, _)) if stream == self.stream) {
            current.stream = None;
            self.connected.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that is done under these locks can leave them half done.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
