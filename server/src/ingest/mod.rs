//! The ingest: collectors' streams, checked frame by frame.
//!
//! What enters: gRPC streams of untrusted bytes. What leaves: frames whose bytes were checked down to the last index, once to
//! the archive and once, decoded, to the correlator; acknowledgements of what the archive has synced. What must hold: a
//! frame of a node and epoch is accepted once and in sequence; every refusal ends its stream with a reason and is counted.
//!
//! ```text
//!  hello ──► registry: one current stream per node
//!  frame ──► length, checksums, sizes ──► node, epoch, sequence ──► rows, rkyv ─┬──► archive ──► durable ──► ack
//!                                                                               └──► sink (correlator), in order
//! ```

mod metrics;
mod rate;
mod refusal;
mod registry;
mod stream;

use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tapio_wire::frame::Frame;
use tapio_wire::limits::{FRAME_BYTES_MAX, MESSAGE_BYTES_MAX};
use tapio_wire::service::ingest_server::{Ingest, IngestServer};
use tapio_wire::service::{NodeStatus, ShipRequest, ShipResponse};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status, Streaming};

pub use metrics::IngestMetrics;
pub use rate::Limits;

use crate::archive::{Appender, Archive, ArchiveState, Books};
use crate::auth::Caller;
use rate::{Pace, Rate};
use refusal::Refusal;
use registry::Registry;

/// Bytes that a collector may have unacknowledged while all is well.
pub const CREDIT_BYTES: u64 = 16 << 20;
/// What is left of that when the archive does not keep up: one frame can always travel.
pub const CREDIT_BYTES_MIN: u64 = FRAME_BYTES_MAX as u64;
/// A peer that has vanished is noticed after this and [`KEEPALIVE_TIMEOUT`].
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// How long a peer may take to answer.
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(8);
/// Flow control windows: what a peer may send before it is read. A collector has a connection of its own.
pub const STREAM_WINDOW_BYTES: u32 = 8 << 20;
/// See [`STREAM_WINDOW_BYTES`].
pub const CONNECTION_WINDOW_BYTES: u32 = 8 << 20;
const _: () = assert!(STREAM_WINDOW_BYTES as usize > MESSAGE_BYTES_MAX);
/// Bytes of an HTTP/2 frame that a client may send (SETTINGS_MAX_FRAME_SIZE, RFC 9113 6.5.2): most of ours then leave with one
/// system call.
const MAX_FRAME_SIZE: u32 = 128 << 10;
const _: () = assert!(CREDIT_BYTES_MIN < CREDIT_BYTES);

/// What a collector may have in flight while a rate limit holds it, or memory is short: it may always send one frame.
pub const CREDIT_BYTES_HELD: u64 = 256 << 10;
/// Streams beyond a quarter more than there may be, until they have said who they are.
const STREAMS_EXTRA: usize = 16;
/// How long a stream that was asked to move on may take.
pub const MOVE_ON_GRACE: Duration = Duration::from_secs(30);
const _: () = assert!(CREDIT_BYTES_HELD < CREDIT_BYTES_MIN);

/// Responses that wait for a peer to read them.
const RESPONSES_MAX: usize = 2;

/// Takes the frames that were accepted, in the order of their node.
pub trait FrameSink: Send + Sync + 'static {
    /// Takes a frame; the stream waits until this is done.
    fn deliver(&self, node: &Arc<str>, frame: Arc<Frame>) -> impl Future<Output = ()> + Send;
}

impl<S: FrameSink> FrameSink for Arc<S> {
    fn deliver(&self, node: &Arc<str>, frame: Arc<Frame>) -> impl Future<Output = ()> + Send {
        S::deliver(self, node, frame)
    }
}

/// How much the ingest takes, from how many.
#[derive(Clone, Copy, Debug)]
pub struct IngestConfig {
    pub limits: Limits,
    /// Events in a frame that collectors are asked for; larger frames are taken all the same.
    pub frame_events: u32,
    /// Streams of collectors.
    pub streams_max: usize,
    /// A stream is asked to move on after this, give or take a tenth; 0 for never.
    pub connection_age: Duration,
    /// How long it may then take.
    pub move_on_grace: Duration,
    /// Bytes that all collectors together are invited to have in flight.
    pub in_flight_bytes: u64,
}

impl Default for IngestConfig {
    fn default() -> Self {
        Self {
            limits: Limits::default(),
            frame_events: 0,
            streams_max: 1000,
            connection_age: Duration::ZERO,
            move_on_grace: MOVE_ON_GRACE,
            in_flight_bytes: u64::MAX,
        }
    }
}

/// What all streams share.
struct IngestContext<S> {
    config: IngestConfig,
    events_rate: Option<Arc<Rate>>,
    /// Resident memory is close to its limit.
    is_memory_short: AtomicBool,
    sink: S,
    appender: Appender,
    books: Arc<Mutex<Books>>,
    archive_state: watch::Receiver<ArchiveState>,
    registry: Registry,
    metrics: Arc<IngestMetrics>,
    draining: watch::Sender<bool>,
    open: watch::Sender<usize>,
}

impl<S> IngestContext<S> {
    /// What one stream may have in flight now.
    fn credit_bytes(&self, pace: &Pace) -> u64 {
        // Relaxed: a moment earlier or later is all the same.
        if self.is_memory_short.load(Ordering::Relaxed) {
            return CREDIT_BYTES_HELD;
        }
        let held = pace.credit_bytes().map_or(u64::MAX, |credit| credit.max(CREDIT_BYTES_HELD));
        if *self.archive_state.borrow() != ArchiveState::Ready {
            return CREDIT_BYTES_MIN.min(held);
        }
        let limit = self.appender.queue_bytes();
        let room = limit.saturating_sub(self.appender.backlog_bytes());
        let open = (*self.open.borrow()).max(1) as u64;
        let share = (self.config.in_flight_bytes / open).max(CREDIT_BYTES_HELD);
        (CREDIT_BYTES * room / limit).max(CREDIT_BYTES_MIN).min(share).min(held)
    }
}

/// The service `Ingest`.
pub struct IngestService<S> {
    context: Arc<IngestContext<S>>,
}

impl<S> Clone for IngestService<S> {
    fn clone(&self) -> Self {
        Self { context: Arc::clone(&self.context) }
    }
}

impl<S: FrameSink> IngestService<S> {
    /// A service that archives to `archive` and delivers to `sink`.
    pub fn new(archive: &Archive, sink: S, metrics: Arc<IngestMetrics>) -> Self {
        Self::with(archive, sink, metrics, IngestConfig::default())
    }

    /// A service with limits.
    pub fn with(archive: &Archive, sink: S, metrics: Arc<IngestMetrics>, config: IngestConfig) -> Self {
        let events_rate = Rate::new(config.limits.events_per_second, &metrics.waited.events).map(Arc::new);
        let node_rate = (config.limits.node_bytes_per_second, metrics.waited.node.clone());
        Self {
            context: Arc::new(IngestContext {
                config,
                events_rate,
                is_memory_short: AtomicBool::new(false),
                sink,
                appender: archive.appender(),
                books: Arc::clone(archive.books()),
                archive_state: archive.state(),
                registry: Registry::new(config.streams_max, node_rate),
                metrics,
                draining: watch::Sender::new(false),
                open: watch::Sender::new(0),
            }),
        }
    }

    /// Makes the service for the gRPC server; see also [`settings`].
    pub fn server(&self) -> IngestServer<Self> {
        IngestServer::new(self.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX)
    }

    /// Sets whether memory is short: then collectors are to send no more than they must.
    pub fn set_memory_short(&self, is_short: bool) {
        self.context.is_memory_short.store(is_short, Ordering::Relaxed);
    }

    /// Whether a node has a stream.
    pub fn is_connected(&self, node: u64) -> bool {
        self.context.registry.is_connected(node)
    }

    /// Adds what only streams know: the nodes that have one and sent nothing yet, and what each collector does not watch.
    pub fn add_connected(&self, nodes: &mut Vec<NodeStatus>) {
        for (node_id, name, off) in self.context.registry.connected() {
            match nodes.iter_mut().find(|known| known.node_id == node_id) {
                Some(known) => known.off = off,
                None => {
                    let node = name.to_string();
                    nodes.push(NodeStatus { node, node_id, connected: true, off, ..NodeStatus::default() });
                }
            }
        }
        nodes.sort_by(|a, b| (&a.node, a.node_id).cmp(&(&b.node, b.node_id)));
    }

    /// Reads no more frames, refuses new streams, and returns when every stream has reported what became durable and has ended.
    /// Call it before the archive is shut down, within a timeout.
    pub async fn drain(&self) {
        self.context.draining.send_replace(true);
        let mut open = self.context.open.subscribe();
        // The sender is in `self`.
        let _ = open.wait_for(|&open| open == 0).await;
    }
}

/// What this service wants of the server it runs in.
pub fn settings(server: Server, max_concurrent_streams: u32) -> Server {
    server
        .max_concurrent_streams(max_concurrent_streams)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(MAX_FRAME_SIZE)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .tcp_nodelay(true)
}

/// Counts a stream as long as it lives.
struct OpenStream<S> {
    context: Arc<IngestContext<S>>,
}

impl<S> OpenStream<S> {
    fn new(context: &Arc<IngestContext<S>>) -> Self {
        context.open.send_modify(|open| *open += 1);
        context.metrics.streams.inc();
        Self { context: Arc::clone(context) }
    }
}

impl<S> Drop for OpenStream<S> {
    fn drop(&mut self) {
        self.context.metrics.streams.dec();
        self.context.open.send_modify(|open| *open -= 1);
    }
}

#[tonic::async_trait]
impl<S: FrameSink> Ingest for IngestService<S> {
    type ShipStream = ReceiverStream<Result<ShipResponse, Status>>;

    async fn ship(&self, request: Request<Streaming<ShipRequest>>) -> Result<Response<Self::ShipStream>, Status> {
        let open = OpenStream::new(&self.context);
        if *self.context.draining.borrow() {
            return Err(Status::unavailable("the server is shutting down"));
        }
        // Those that have not said hello yet count too; a node that comes back while its old stream lingers must get in.
        let streams_max = self.context.config.streams_max;
        if *self.context.open.borrow() > streams_max + streams_max / 4 + STREAMS_EXTRA {
            let refusal = Refusal::TooManyStreams(streams_max);
            self.context.metrics.count_refusal(refusal.label());
            return Err(refusal.status());
        }
        let (responses, receiver) = mpsc::channel(RESPONSES_MAX);
        // Without a gate before it there is nobody who would know more than the hello says.
        let caller = request.extensions().get::<Arc<Caller>>().cloned().unwrap_or_default();
        tokio::spawn(async move {
            stream::serve(&open.context, &caller, request.into_inner(), responses).await;
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}
