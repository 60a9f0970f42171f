//! One stream: a hello, then frames in, acknowledgements out.
//!
//! What must hold: a frame is accepted only after its bytes were checked down to the archive in it. Once it is in the archive's
//! queue it is delivered, whatever becomes of the stream. An acknowledgement only ever repeats what the archive reported durable.
//! Reading and acknowledging share one task, and neither waits for the other: a peer that does not read its acknowledgements
//! cannot hold its node's lock.

use std::error::Error as _;
use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tapio_wire::frame::{Frame, Header, VERSION, VERSION_OLDEST};
use tapio_wire::ledger::Ledger;
use tapio_wire::limits::{SEQUENCE_AHEAD_MAX, is_node_name};
use tapio_wire::program::backoff;
use tapio_wire::service::{Ack, Hello, ShipRequest, ShipResponse, Welcome, ship_request, ship_response};
use tokio::sync::{Notify, mpsc};
use tokio::time::timeout;
use tonic::{Status, Streaming};
use tracing::{debug, info, warn};

use super::rate::{Pace, Rate};
use super::refusal::Refusal;
use super::registry::{DurableTo, Progress, Registration};
use super::{FrameSink, IngestContext};
use crate::archive::index::Summary;
use crate::archive::{Acknowledged, Append, Durable};
use crate::auth::Caller;

/// How long a stream may take to say who it is.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a peer may take to read why its stream ends.
const FAREWELL_TIMEOUT: Duration = Duration::from_secs(5);

pub(super) type Responses = mpsc::Sender<Result<ShipResponse, Status>>;

/// Why no more frames are read.
enum End {
    /// The peer has sent all it wanted to.
    Finished,
    /// The server shuts down.
    Draining,
    /// The stream was asked to reconnect and did not.
    Aged,
    TakenOver,
    Refused(Refusal),
    /// gRPC itself failed: the connection, or a message that is no protobuf.
    Broken(Status),
    ArchiveClosed,
}

impl From<Refusal> for End {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

/// Serves a stream from its first message to its end.
pub(super) async fn serve<S: FrameSink>(
    context: &IngestContext<S>,
    caller: &Caller,
    mut inbound: Streaming<ShipRequest>,
    responses: Responses,
) {
    let hello = match timeout(HELLO_TIMEOUT, first_message(&mut inbound)).await {
        Ok(hello) => hello,
        Err(_) => Err(Refusal::HelloTimeout(HELLO_TIMEOUT).into()),
    };
    let registration = match hello {
        Ok(hello) => enter(context, caller, &hello).await.map(|registration| (registration, hello.version)),
        Err(end) => Err(end),
    };
    let end = match registration {
        Ok((registration, version)) => exchange(context, &registration, version, inbound, &responses).await,
        Err(end) => end,
    };
    let status = match end {
        End::Finished => return,
        End::Draining => Status::unavailable("the server is shutting down"),
        End::Aged => Status::unavailable("this stream has reached server.max_connection_age: open another one"),
        End::ArchiveClosed => Status::unavailable("the archive is closed"),
        End::TakenOver => Status::aborted("another stream of this node took over"),
        End::Refused(refusal) => {
            context.metrics.count_refusal(refusal.label());
            warn!(reason = %refusal, "stream refused");
            refusal.status()
        }
        End::Broken(status) if status.source().is_none() => {
            context.metrics.count_refusal("message");
            warn!(reason = status.message(), "stream refused");
            status
        }
        End::Broken(status) => {
            debug!(reason = status.message(), "stream broken");
            return;
        }
    };
    // A peer that has gone, or does not read, learns nothing.
    let _ = timeout(FAREWELL_TIMEOUT, responses.send(Err(status))).await;
}

async fn first_message(inbound: &mut Streaming<ShipRequest>) -> Result<Hello, End> {
    match inbound.message().await {
        Ok(Some(ShipRequest { kind: Some(ship_request::Kind::Hello(hello)) })) => Ok(hello),
        Ok(Some(_)) => Err(Refusal::NoHello.into()),
        Ok(None) => Err(End::Finished),
        Err(status) => Err(End::Broken(status)),
    }
}

async fn enter<S: FrameSink>(context: &IngestContext<S>, caller: &Caller, hello: &Hello) -> Result<Registration, End> {
    let name = hello.node.as_str();
    if !is_node_name(name) {
        return Err(Refusal::NodeName.into());
    }
    let expected = tapio_wire::node_id(name);
    if hello.node_id != expected {
        return Err(Refusal::NodeId { declared: hello.node_id, expected }.into());
    }
    if !caller.may_be(name) {
        return Err(Refusal::NotItsNode { node: name.into(), identity: caller.identity.clone() }.into());
    }
    if !(u32::from(VERSION_OLDEST)..=u32::from(VERSION)).contains(&hello.version) {
        return Err(Refusal::Version(hello.version).into());
    }
    let mut acknowledged = Acknowledged { seq: hello.acked_seq, ..Acknowledged::default() };
    for (events, &acked) in acknowledged.events.iter_mut().zip(&hello.acked_events) {
        *events = acked;
    }
    let registration = context.registry.enter(expected, name, hello.epoch, acknowledged, &context.books).await?;
    if registration.took_over {
        context.metrics.takeovers.inc();
    }
    info!(
        node = name,
        epoch = hello.epoch,
        durable_seq = registration.durable_seq,
        revision = hello.revision,
        took_over = registration.took_over,
        identity = caller.identity,
        "collector connected"
    );
    Ok(registration)
}

/// Reads and acknowledges until the stream ends. `version` is the collector's, which this server reads too.
async fn exchange<S: FrameSink>(
    context: &IngestContext<S>,
    registration: &Registration,
    version: u32,
    inbound: Streaming<ShipRequest>,
    responses: &Responses,
) -> End {
    let mut durable = registration.node.durable.subscribe();
    let mut archive_state = context.archive_state.clone();
    archive_state.mark_unchanged();
    let pace = Pace {
        stream: Rate::new(context.config.limits.stream_bytes_per_second, &context.metrics.waited.stream),
        node: registration.node.rate.clone(),
        events: context.events_rate.clone(),
    };
    let (acknowledge, leave) = (Notify::new(), Notify::new());
    let mut read = pin!(read(context, registration, &pace, inbound, &acknowledge, &leave));
    let mut age = pin!(aged(context.config.connection_age));
    let (mut move_on, mut has_left) = (false, false);
    let mut ended: Option<(End, u64)> = None;
    let mut welcome = Some(ship_response::Kind::Welcome(Welcome {
        version,
        durable_seq: registration.durable_seq,
        credit_bytes: context.credit_bytes(&pace),
        frame_events: context.config.frame_events,
        takes_watching: true,
    }));
    let mut due = true;
    loop {
        match &ended {
            Some((End::Finished | End::Draining | End::Aged, accepted)) => {
                let latest = *durable.borrow();
                if !due && (latest.seq >= *accepted || latest.epoch != registration.epoch) {
                    break;
                }
            }
            Some(_) => break,
            None => {}
        }
        tokio::select! {
            biased;
            permit = responses.reserve(), if due => {
                let Ok(permit) = permit else { break };
                due = false;
                let ack = || ack(context, registration, &pace, *durable.borrow_and_update(), move_on);
                let Some(kind) = welcome.take().or_else(ack) else { continue };
                permit.send(Ok(ShipResponse { kind: Some(kind) }));
            }
            () = responses.closed() => break,
            end = &mut read, if ended.is_none() => ended = Some(end),
            // The sender lives in the node, which `registration` holds.
            _ = durable.changed(), if !due => due = true,
            () = acknowledge.notified(), if !due => due = true,
            Ok(()) = archive_state.changed(), if !due => due = true,
            () = &mut age, if !has_left => {
                if move_on {
                    has_left = true;
                    leave.notify_one();
                } else {
                    move_on = true;
                    due = true;
                    context.metrics.moved_on.inc();
                    age.set(aged(context.config.move_on_grace));
                }
            }
        }
    }
    match ended {
        Some((end, _)) => end,
        None => {
            // The peer has gone. What was accepted is still to be delivered.
            registration.taken_over.notify_one();
            read.await.0
        }
    }
}

/// What became durable; `None` when that is of a later epoch, whose stream reports it.
fn ack<S: FrameSink>(
    context: &IngestContext<S>,
    registration: &Registration,
    pace: &Pace,
    latest: DurableTo,
    move_on: bool,
) -> Option<ship_response::Kind> {
    if latest.epoch != registration.epoch {
        return None;
    }
    context.metrics.acks.inc();
    let credit_bytes = context.credit_bytes(pace);
    Some(ship_response::Kind::Ack(Ack { durable_seq: latest.seq, credit_bytes, move_on }))
}

/// Returns when a stream has reached an age, which is a little different for each; never for 0.
async fn aged(age: Duration) {
    if age.is_zero() {
        return std::future::pending().await;
    }
    tokio::time::sleep(age.mul_f64(0.9) + backoff::up_to(age / 5)).await;
}

/// Reads frames until there are no more. Also returns the last accepted sequence.
async fn read<S: FrameSink>(
    context: &IngestContext<S>,
    registration: &Registration,
    pace: &Pace,
    mut inbound: Streaming<ShipRequest>,
    acknowledge: &Notify,
    leave: &Notify,
) -> (End, u64) {
    let mut draining = context.draining.subscribe();
    let mut accepted = registration.durable_seq;
    loop {
        let message = tokio::select! {
            biased;
            () = registration.taken_over.notified() => return (End::TakenOver, accepted),
            _ = draining.wait_for(|&draining| draining) => return (End::Draining, accepted),
            () = leave.notified() => return (End::Aged, accepted),
            message = inbound.message() => message,
        };
        let frame = match message {
            Ok(Some(message)) => match message.kind {
                Some(ship_request::Kind::Frame(frame)) => frame,
                Some(ship_request::Kind::Watching(watching)) => {
                    let texts = watching.off.iter().map(|off| off.source.len() + off.reason.len());
                    pace.charge(texts.sum::<usize>() as u64, 1);
                    registration.watches_without(watching.off);
                    continue;
                }
                Some(ship_request::Kind::Hello(_)) => {
                    return (Refusal::SecondHello.into(), accepted);
                }
                None => return (Refusal::EmptyMessage.into(), accepted),
            },
            Ok(None) => return (End::Finished, accepted),
            Err(status) => return (End::Broken(status), accepted),
        };
        let checked = match check(registration, &frame) {
            Ok(checked) => checked,
            Err(refusal) => return (refusal.into(), accepted),
        };
        let (bytes, events) = (frame.len() as u64, u64::from(checked.0.lethal_events + checked.0.bulk_events));
        if checked.0.lethal_events > 0 {
            pace.charge(bytes, events);
        } else {
            // One that waits is not accepted yet: who ends the stream meanwhile ends the wait.
            tokio::select! {
                biased;
                () = registration.taken_over.notified() => return (End::TakenOver, accepted),
                _ = draining.wait_for(|&draining| draining) => return (End::Draining, accepted),
                () = leave.notified() => return (End::Aged, accepted),
                () = pace.take(bytes, events) => {}
            }
        }
        match accept(context, registration, checked, frame).await {
            Ok(seq) => accepted = accepted.max(seq),
            Err(Rejected::Duplicate(seq)) => {
                context.metrics.duplicates.inc();
                accepted = accepted.max(seq);
                acknowledge.notify_one();
            }
            Err(Rejected::End(end)) => return (end, accepted),
        }
    }
}

enum Rejected {
    /// The frame was accepted before; the number is the last accepted one.
    Duplicate(u64),
    End(End),
}

impl<E: Into<End>> From<E> for Rejected {
    fn from(end: E) -> Self {
        Self::End(end.into())
    }
}

/// Checks a frame's header, and that it belongs to this stream.
fn check(registration: &Registration, bytes: &Bytes) -> Result<(Header, Ledger), Refusal> {
    let (header, ledger) = Header::check(bytes)?;
    if header.node != registration.node.id {
        return Err(Refusal::ForeignNode { frame: header.node, stream: registration.node.id });
    }
    if header.epoch != registration.epoch {
        return Err(Refusal::ForeignEpoch { frame: header.epoch, stream: registration.epoch });
    }
    Ok((header, ledger))
}

/// Takes one frame from its bytes to the correlator.
async fn accept<S: FrameSink>(
    context: &IngestContext<S>,
    registration: &Registration,
    (header, ledger): (Header, Ledger),
    bytes: Bytes,
) -> Result<u64, Rejected> {
    let arrived = Instant::now();
    let node = &registration.node;
    let mut progress = or_taken_over(registration, node.progress.lock()).await?;
    let Some(progress) = progress.as_mut().filter(|_| registration.is_current()) else {
        return Err(End::TakenOver.into());
    };
    check_sequence(&header, progress, node.durable.borrow().seq)?;
    let length = bytes.len();
    let frame = Frame::decode_checked(header, ledger, &bytes).map_err(Refusal::Frame)?;
    let Ok(room) = or_taken_over(registration, context.appender.reserve(length)).await? else {
        return Err(End::ArchiveClosed.into());
    };
    let on_durable: Arc<dyn Durable> = Arc::<super::registry::Node>::clone(node);
    room.append(Append {
        bytes,
        header,
        node_name: Some(Arc::clone(&node.name)),
        resumed: progress.resumed.take(),
        on_durable,
        summary: Some(Box::new(Summary::of(&frame))),
    });
    progress.accepted = header.seq;
    context.metrics.count_accepted(&header, length);
    context.metrics.accept_seconds.observe(arrived.elapsed().as_secs_f64());
    context.sink.deliver(&node.name, Arc::new(frame)).await;
    Ok(header.seq)
}

async fn or_taken_over<T>(registration: &Registration, wanted: impl Future<Output = T>) -> Result<T, End> {
    tokio::select! {
        biased;
        done = wanted => Ok(done),
        () = registration.taken_over.notified() => Err(End::TakenOver),
    }
}

fn check_sequence(header: &Header, progress: &Progress, durable: u64) -> Result<(), Rejected> {
    let (seq, accepted) = (header.seq, progress.accepted);
    if seq == 0 {
        return Err(Refusal::SequenceZero.into());
    }
    if seq <= accepted {
        return Err(Rejected::Duplicate(accepted));
    }
    if seq - accepted > 1 {
        return Err(Refusal::SequenceGap { from: accepted, to: seq }.into());
    }
    if seq > durable.saturating_add(SEQUENCE_AHEAD_MAX) {
        return Err(Refusal::SequenceAhead { seq, durable }.into());
    }
    Ok(())
}
