//! The load side: threads that each serve the streams of a part of the nodes.
//!
//! In: a supply of frames, and the schedule once all streams are open. Out: what was sent and acknowledged. What must hold: this side
//! takes little CPU beside the server, so a thread has one runtime, and nothing in it crosses to another.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tapio_wire::service::ingest_client::IngestClient;
use tapio_wire::service::{Hello, ShipResponse, ship_response};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tonic::Streaming;
use tonic::transport::Endpoint;

use super::cores::Cores;
use super::feed::{Feed, Flow, Schedule, Supply, Timings, lock};
use crate::error::{Context, Error};

/// How long a stream may take to open.
const OPEN_LIMIT: Duration = Duration::from_secs(20);
/// Streams that a thread opens at once: more than these would wait in the server's queue of connections.
const OPENING_MAX: usize = 64;

/// What all threads count together, so that it can be read while they work.
#[derive(Default)]
pub(super) struct Counters {
    pub open: AtomicUsize,
    pub frames: AtomicU64,
    pub events: AtomicU64,
    /// Nodes whose final frame was acknowledged.
    pub done: AtomicUsize,
}

/// What the threads are to do.
#[derive(Clone, Copy, Debug)]
pub(super) enum Phase {
    Wait,
    Send(Schedule),
    Stop,
}

/// What became of one node's stream.
pub(super) struct Sent {
    pub node: usize,
    pub flow: Flow,
}

/// What became of a thread's streams.
#[derive(Default)]
pub(super) struct Outcome {
    pub sent: Vec<Sent>,
    pub timings: Timings,
}

impl Outcome {
    /// Adds what became of other streams.
    pub fn add(&mut self, other: Self) {
        self.sent.extend(other.sent);
        self.timings.latency.add(&other.timings.latency);
        self.timings.lag.add(&other.timings.lag);
    }
}

/// A thread that serves some nodes.
pub(super) struct Streams {
    thread: JoinHandle<Result<Outcome, Error>>,
}

/// Where streams go, and with what.
#[derive(Clone)]
pub(super) struct Target {
    pub address: String,
    pub supply: Arc<Supply>,
    pub counters: Arc<Counters>,
    pub phase: watch::Receiver<Phase>,
    /// By node.
    pub names: Arc<Vec<String>>,
}

impl Streams {
    /// Starts a thread for these nodes, on these cores where they are given.
    pub fn start(target: Target, nodes: Vec<usize>, cores: Option<Cores>) -> Result<Self, Error> {
        let body = move || {
            if let Some(cores) = &cores {
                cores.enter()?;
            }
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.context(|| "start a client".into())?.block_on(serve(target, nodes))
        };
        let thread = thread::Builder::new().name("streams".into()).spawn(body);
        Ok(Self { thread: thread.context(|| "start a thread for streams".into())? })
    }

    /// Whether it has ended.
    pub fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }

    /// Waits for its end.
    pub fn join(self) -> Result<Outcome, Error> {
        self.thread.join().unwrap_or_else(|_| Err(Error::Invalid("a thread that serves streams has panicked".into())))
    }
}

/// Serves all streams of a thread until they end, or the run stops.
async fn serve(target: Target, nodes: Vec<usize>) -> Result<Outcome, Error> {
    let mut phase = target.phase.clone();
    let timings = Arc::new(Mutex::new(Timings::default()));
    let (mut flows, mut tasks) = (Vec::new(), JoinSet::new());
    let work = async {
        for part in nodes.chunks(OPENING_MAX) {
            let (open, mut opened) = mpsc::unbounded_channel();
            for &node in part {
                let flow = Arc::new(Mutex::new(Flow::default()));
                flows.push((node, Arc::clone(&flow)));
                tasks.spawn(one(target.clone(), node, flow, Arc::clone(&timings), open.clone()));
            }
            drop(open);
            // Few open at a time. A stream that fails closes its end of the channel too.
            while opened.recv().await.is_some() {}
            while let Some(ended) = tasks.try_join_next() {
                finish(&target, ended)?;
            }
        }
        while let Some(ended) = tasks.join_next().await {
            finish(&target, ended)?;
        }
        Ok::<(), Error>(())
    };
    tokio::select! {
        done = work => done?,
        // The sender goes with the run.
        _ = phase.wait_for(|phase| matches!(phase, Phase::Stop)) => {}
    }
    drop(tasks);
    let sent = flows.into_iter().map(|(node, flow)| Sent { node, flow: std::mem::take(&mut *lock(&flow)) }).collect();
    let timings = std::mem::take(&mut *lock(&timings));
    Ok(Outcome { sent, timings })
}

fn finish(target: &Target, ended: Result<Result<(), Error>, tokio::task::JoinError>) -> Result<(), Error> {
    target.counters.done.fetch_add(1, Ordering::Relaxed);
    ended.unwrap_or_else(|_| Err(Error::Invalid("a task that serves a stream has panicked".into())))
}

/// One node's stream, from its hello to the acknowledgement of its last frame.
async fn one(
    target: Target,
    node: usize,
    flow: Arc<Mutex<Flow>>,
    timings: Arc<Mutex<Timings>>,
    is_open: mpsc::UnboundedSender<()>,
) -> Result<(), Error> {
    let failed = |message: String| Error::Server { address: target.address.clone(), message };
    let opened = tokio::time::timeout(OPEN_LIMIT, open(&target, node, &flow, &timings)).await;
    let mut responses = opened.unwrap_or_else(|_| Err(failed(format!("node {node}: no welcome in time"))))?;
    target.counters.open.fetch_add(1, Ordering::Relaxed);
    drop(is_open);
    let mut phase = target.phase.clone();
    let schedule = phase.wait_for(|phase| !matches!(phase, Phase::Wait)).await;
    let Ok(Phase::Send(schedule)) = schedule.map(|phase| *phase) else { return Ok(()) };
    {
        let mut flow = lock(&flow);
        flow.schedule = Some(schedule);
        flow.wake();
    }
    loop {
        let response = match responses.message().await {
            Ok(Some(response)) => response,
            Ok(None) => return Err(failed("a stream ended before its last frame was acknowledged".into())),
            Err(status) => return Err(failed(status.message().to_owned())),
        };
        let Some(ship_response::Kind::Ack(ack)) = response.kind else { continue };
        let is_done = {
            let mut flow = lock(&flow);
            let (frames, events) = flow.acknowledge(ack.durable_seq, ack.credit_bytes, &timings);
            target.counters.frames.fetch_add(frames, Ordering::Relaxed);
            target.counters.events.fetch_add(events, Ordering::Relaxed);
            if let Some(error) = flow.failed.take() {
                return Err(error);
            }
            flow.is_done
        };
        if is_done {
            return Ok(());
        }
    }
}

/// Opens a stream; returns when the server has said welcome.
async fn open(
    target: &Target,
    node: usize,
    flow: &Arc<Mutex<Flow>>,
    timings: &Arc<Mutex<Timings>>,
) -> Result<Streaming<ShipResponse>, Error> {
    let failed = |message: String| Error::Server { address: target.address.clone(), message };
    let name = &target.names[node];
    let hello = Hello {
        version: tapio_wire::frame::VERSION.into(),
        node: name.clone(),
        node_id: tapio_wire::node_id(name),
        epoch: target.supply.epoch,
        revision: env!("CARGO_PKG_VERSION").into(),
        ..Hello::default()
    };
    let feed = Feed::new(Arc::clone(&target.supply), Arc::clone(flow), Arc::clone(timings), node, hello);
    let endpoint = Endpoint::from_shared(format!("http://{}", target.address));
    let endpoint = endpoint.map_err(|error| failed(error.to_string()))?.tcp_nodelay(true);
    let channel = endpoint.connect().await.map_err(|error| {
        let cause = std::error::Error::source(&error).map(ToString::to_string);
        failed(cause.unwrap_or_else(|| error.to_string()))
    })?;
    let answer = IngestClient::new(channel).ship(feed).await;
    let mut responses = answer.map_err(|status| failed(status.message().to_owned()))?.into_inner();
    match responses.message().await {
        Ok(Some(ShipResponse { kind: Some(ship_response::Kind::Welcome(welcome)) })) => {
            lock(flow).credit_bytes = welcome.credit_bytes;
            Ok(responses)
        }
        Ok(_) => Err(failed("a stream began without a welcome".into())),
        Err(status) => Err(failed(status.message().to_owned())),
    }
}
