//! What one node sends, as the stream that gRPC draws from.
//!
//! In: packed frames, a schedule, acknowledgements. Out: a hello, then frames, each stamped when it is drawn. What must hold: a frame's
//! latency counts from its intended time, whenever it could leave. What is in flight stays within the server's credit. The last
//! frame is final and leaves when all others were acknowledged.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tapio_wire::event::{Body, Lane};
use tapio_wire::frame::{Encoder, REPLAY_BASE_NS, ReplayFrame, SealedFrame, Stamp};
use tapio_wire::ledger::Ledger;
use tapio_wire::service::{Hello, ShipRequest, ship_request};
use tokio::time::{Instant, Sleep};
use tokio_stream::Stream;

use super::body::Bodies;
use crate::error::Error;
use crate::latency::Latencies;

/// When nodes send.
#[derive(Clone, Copy, Debug)]
pub(super) struct Schedule {
    pub start: Instant,
    /// From when on latencies count.
    pub measured_from: Instant,
    pub end: Instant,
    /// Between two frames of a node; none: as fast as the window allows.
    pub interval: Option<Duration>,
    /// Between two deaths on a node; none: nobody dies.
    pub death_interval: Option<Duration>,
    /// Frames after which a node has sent all, deaths aside.
    pub frames_max: u64,
    pub nodes: usize,
}

impl Schedule {
    /// When frame `number` of a node is due. Nodes send evenly one after another.
    fn due(&self, interval: Duration, node: usize, number: u64) -> Instant {
        let at = number as f64 + node as f64 / self.nodes as f64;
        self.start + interval.mul_f64(at)
    }
}

/// What all feeds send from.
pub(super) struct Supply {
    /// Frames by node: the same for all, or each node's own.
    pub frames: Vec<Vec<ReplayFrame>>,
    pub bodies: Bodies,
    pub encoder: Mutex<Encoder>,
    pub epoch: u64,
    /// When the clock of the simulated nodes was at [`REPLAY_BASE_NS`].
    pub booted: Instant,
    /// Whether nodes describe their containers at the start.
    pub introduces: bool,
}

impl Supply {
    fn frame(&self, node: usize, number: u64) -> &ReplayFrame {
        let own = &self.frames[node % self.frames.len()];
        // Nodes that share frames do not send the same one at a time.
        &own[(node + number as usize) % own.len()]
    }

    fn seal(&self, body: &Body, lane: Lane) -> Result<SealedFrame, Error> {
        let sealed = lock(&self.encoder).seal(body, lane, tapio_wire::compress::Compression::Rows);
        sealed.map_err(|error| Error::Invalid(format!("a frame cannot be packed: {error}")))
    }
}

/// A frame that is not acknowledged.
struct InFlight {
    seq: u64,
    bytes: u64,
    events: u64,
    /// When it was meant to leave.
    due: Instant,
}

/// How long frames took, of all streams of a thread.
#[derive(Default)]
pub(super) struct Timings {
    /// From intended time to acknowledgement, and to the moment at which a frame left.
    pub latency: Latencies,
    pub lag: Latencies,
}

/// What the two halves of a stream share.
#[derive(Default)]
pub(super) struct Flow {
    pub schedule: Option<Schedule>,
    pub credit_bytes: u64,
    /// Where the feed waits for the other half.
    waker: Option<Waker>,
    in_flight: VecDeque<InFlight>,
    in_flight_bytes: u64,
    pub acked_frames: u64,
    pub acked_events: u64,
    pub bytes: u64,
    pub emitted: u64,
    pub deaths: u64,
    final_seq: Option<u64>,
    pub is_done: bool,
    pub failed: Option<Error>,
}

impl Flow {
    /// Takes an acknowledgement. Returns frames and events that it is for.
    pub fn acknowledge(&mut self, durable_seq: u64, credit_bytes: u64, timings: &Mutex<Timings>) -> (u64, u64) {
        let now = Instant::now();
        self.credit_bytes = credit_bytes;
        let (mut frames, mut events) = (0, 0);
        while let Some(frame) = self.in_flight.pop_front_if(|frame| frame.seq <= durable_seq) {
            self.in_flight_bytes -= frame.bytes;
            (frames, events) = (frames + 1, events + frame.events);
            if self.schedule.is_some_and(|schedule| frame.due >= schedule.measured_from) && frame.events > 0 {
                lock(timings).latency.record((now - frame.due).as_micros() as u64, 1);
            }
        }
        self.acked_frames += frames;
        self.acked_events += events;
        self.is_done |= self.final_seq.is_some_and(|seq| seq <= durable_seq);
        self.wake();
        (frames, events)
    }

    /// Lets the feed look again.
    pub fn wake(&mut self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What comes next.
enum Next {
    Bulk(Instant),
    Death(Instant),
    Final,
    Wait(Option<Instant>),
    End,
}

/// The stream of one node's messages.
pub(super) struct Feed {
    supply: Arc<Supply>,
    flow: Arc<Mutex<Flow>>,
    timings: Arc<Mutex<Timings>>,
    node: usize,
    node_id: u64,
    hello: Option<Hello>,
    ledger: Ledger,
    seq: u64,
    /// Frames of bulk events so far.
    sent: u64,
    is_introduced: bool,
    sleep: Pin<Box<Sleep>>,
}

impl Feed {
    pub fn new(
        supply: Arc<Supply>,
        flow: Arc<Mutex<Flow>>,
        timings: Arc<Mutex<Timings>>,
        node: usize,
        hello: Hello,
    ) -> Self {
        let is_introduced = !supply.introduces;
        Self {
            supply,
            flow,
            timings,
            node,
            node_id: hello.node_id,
            hello: Some(hello),
            ledger: Ledger::default(),
            seq: 0,
            sent: 0,
            is_introduced,
            sleep: Box::pin(tokio::time::sleep(Duration::ZERO)),
        }
    }

    fn next(&self, flow: &Flow, schedule: &Schedule) -> Next {
        let now = Instant::now();
        if flow.is_done || flow.failed.is_some() {
            return Next::End;
        }
        if now >= schedule.end || self.sent >= schedule.frames_max {
            return match flow.final_seq {
                None if flow.in_flight.is_empty() => Next::Final,
                _ => Next::Wait(None),
            };
        }
        if flow.in_flight_bytes >= flow.credit_bytes && !flow.in_flight.is_empty() {
            return Next::Wait(Some(schedule.end));
        }
        let death = schedule.death_interval.map(|interval| schedule.due(interval, self.node, flow.deaths));
        let bulk =
            schedule.interval.map_or(now.max(schedule.start), |interval| schedule.due(interval, self.node, self.sent));
        match death {
            Some(death) if death <= now => Next::Death(death),
            _ if bulk <= now => Next::Bulk(bulk),
            _ => Next::Wait(Some(death.map_or(bulk, |death| death.min(bulk)).min(schedule.end))),
        }
    }

    /// The next frame and its bytes, with its events counted.
    fn frame(&mut self, flow: &mut Flow, next: &Next) -> Result<(ship_request::Kind, u64), Error> {
        let supply = Arc::clone(&self.supply);
        self.seq += 1;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let stamp = Stamp {
            node: self.node_id,
            epoch: supply.epoch,
            seq: self.seq,
            boottime_ns: REPLAY_BASE_NS + supply.booted.elapsed().as_nanos() as u64,
            realtime_ns: now.as_nanos() as u64,
            is_final: matches!(next, Next::Final),
        };
        let mut emit = |events: u64| {
            let account = self.ledger.account_mut(super::body::SOURCE);
            account.emitted += events;
            account.shipped += events;
            flow.emitted += events;
        };
        let sealed = match next {
            Next::Bulk(_) if self.is_introduced => {
                let frame = supply.frame(self.node, self.sent);
                self.sent += 1;
                emit(frame.events());
                let stamped = frame.stamp(&stamp, &self.ledger);
                let stamped = stamped.map_err(|error| Error::Invalid(format!("a frame cannot be stamped: {error}")))?;
                let length = stamped.len() as u64;
                return Ok((ship_request::Kind::Frame(stamped), length));
            }
            Next::Bulk(_) => {
                self.is_introduced = true;
                let body = Body { entities: supply.bodies.entities(self.node), ..Body::default() };
                supply.seal(&body, Lane::Bulk)?
            }
            Next::Death(_) => {
                let mut body = supply.bodies.death(flow.deaths);
                flow.deaths += 1;
                body.events.iter_mut().for_each(|event| event.time_ns += stamp.boottime_ns - 50_000);
                emit(body.events.len() as u64);
                supply.seal(&body, Lane::Lethal)?
            }
            _ => supply.seal(&Body::default(), Lane::Bulk)?,
        };
        let stamped = sealed.stamp(&stamp, &self.ledger);
        let length = stamped.len() as u64;
        Ok((ship_request::Kind::Frame(stamped), length))
    }
}

impl Stream for Feed {
    type Item = ShipRequest;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<ShipRequest>> {
        let this = &mut *self;
        if let Some(hello) = this.hello.take() {
            return Poll::Ready(Some(ShipRequest { kind: Some(ship_request::Kind::Hello(hello)) }));
        }
        let flow = Arc::clone(&this.flow);
        let mut flow = lock(&flow);
        let Some(schedule) = flow.schedule else {
            flow.waker = Some(context.waker().clone());
            return Poll::Pending;
        };
        loop {
            let next = this.next(&flow, &schedule);
            let due = match next {
                Next::End => return Poll::Ready(None),
                Next::Wait(until) => {
                    flow.waker = Some(context.waker().clone());
                    let Some(until) = until else { return Poll::Pending };
                    this.sleep.as_mut().reset(until);
                    if this.sleep.as_mut().poll(context).is_pending() {
                        return Poll::Pending;
                    }
                    continue;
                }
                Next::Bulk(due) | Next::Death(due) => due,
                Next::Final => Instant::now(),
            };
            let before = flow.emitted;
            let (kind, length) = match this.frame(&mut flow, &next) {
                Ok(frame) => frame,
                Err(error) => {
                    flow.failed = Some(error);
                    return Poll::Ready(None);
                }
            };
            let events = flow.emitted - before;
            if matches!(next, Next::Final) {
                flow.final_seq = Some(this.seq);
            } else if due >= schedule.measured_from && events > 0 {
                lock(&this.timings).lag.record(due.elapsed().as_micros() as u64, 1);
            }
            flow.bytes += length;
            flow.in_flight_bytes += length;
            flow.in_flight.push_back(InFlight { seq: this.seq, bytes: length, events, due });
            return Poll::Ready(Some(ShipRequest { kind: Some(kind) }));
        }
    }
}
