//! Messages on their way to NATS.
//!
//! What enters: messages, in order. What leaves: how many of the first ones the log took, and where. What must hold: a message that
//! closes is sent when all others were taken. A new connection is used when it has been checked that the log still has what it took
//! by the old one. What was sent while a connection broke does not count as taken.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use async_nats::HeaderMap;
use async_nats::header::NATS_MESSAGE_ID;
use async_nats::jetstream::message::PublishMessage;
use bytes::Bytes;

use super::config::ClusterSection;
use super::connections::Connections;
use super::log::{self, GROUND_HEADER, Ground, Log, LogError, SERVER_HEADER, Taken};

/// How long NATS has for another look, where a log seems to have lost its end.
const NEW_LEADER_PAUSE: Duration = Duration::from_secs(1);

/// A message on its way.
pub(super) struct Sent {
    pub subject: String,
    /// Id by which NATS recognises a repeated message.
    pub id: String,
    pub payload: Bytes,
    pub closes: bool,
}

/// What came of sending: the last message in the log, and the place of the first one that was new to it.
pub(super) struct Landed {
    pub last: Taken,
    pub first_new: Option<u64>,
}

/// A connection, and which log it led to when it was made.
pub(super) struct Connection {
    log: Log,
    created_ns: i128,
}

impl Connection {
    /// What NATS takes in one message.
    pub fn max_payload(&self) -> usize {
        self.log.max_payload()
    }
}

/// Why a message was not taken.
pub(super) enum Failed {
    /// The log lacks what it took before, or is another one.
    Lost,
    Error(String),
}

/// The connection, the number of taken messages with their outcome, and why the next one was not taken.
pub(super) type Flown = (Option<Connection>, Option<(usize, Landed)>, Result<(), Failed>);
pub(super) type Flight = Pin<Box<dyn Future<Output = Flown> + Send>>;

/// Sends messages off by this connection, or by a new one. `taken` is what the log took last.
pub(super) fn take_off(
    config: ClusterSection,
    keep: Duration,
    connections: Arc<Connections>,
    connection: Option<Connection>,
    taken: Option<Taken>,
    messages: Vec<Sent>,
) -> Flight {
    Box::pin(async move {
        let connection = match connection.filter(|known| !known.log.has_broken()) {
            Some(connection) => connection,
            None => match connect(&config, keep, &connections, taken.as_ref()).await {
                Ok((connection, true)) => connection,
                Ok((connection, false)) => return (Some(connection), None, Err(Failed::Lost)),
                Err(error) => return (None, None, Err(Failed::Error(error.to_string()))),
            },
        };
        let (landed, outcome) = send(&connection, taken.map_or(0, |taken| taken.seq), messages).await;
        if connection.log.has_broken() {
            let error = outcome.err().unwrap_or_else(|| "the connection to NATS broke".into());
            return (None, None, Err(Failed::Error(error)));
        }
        match outcome {
            Ok(()) => (Some(connection), landed, Ok(())),
            // What it was connected to may not be what it is now.
            Err(error) => (None, landed, Err(Failed::Error(error))),
        }
    })
}

/// Connects. False where the log is not the one that took what was taken, or has lost it.
async fn connect(
    config: &ClusterSection,
    keep: Duration,
    connections: &Arc<Connections>,
    taken: Option<&Taken>,
) -> Result<(Connection, bool), LogError> {
    let log = Log::connect(config, keep, connections).await?;
    let mut stream = log.ensure().await?;
    if taken.is_some_and(|taken| taken.seq > stream.cached_info().state.last_sequence) {
        // A new leader of the stream may be behind for a moment, and NATS does not say when it no longer is.
        tokio::time::sleep(NEW_LEADER_PAUSE).await;
        stream = log.ensure().await?;
    }
    let info = stream.cached_info();
    let (created_ns, state) = (info.created.unix_timestamp_nanos(), &info.state);
    let has_it = match taken {
        None => true,
        Some(taken) if taken.created_ns != created_ns || taken.seq > state.last_sequence => false,
        Some(taken) => {
            let is_it = |headers: &HeaderMap| headers.get(NATS_MESSAGE_ID).is_some_and(|id| id.as_str() == taken.id);
            // Deleted since, it was there.
            log::message_at(&stream, taken.seq).await?.is_none_or(|message| is_it(&message.headers))
        }
    };
    Ok((Connection { log, created_ns }, has_it))
}

/// Sends messages off, those that close when all others were taken. Returns how many of the first ones were taken, and where; also
/// when a later one was not.
async fn send(
    connection: &Connection,
    taken_seq: u64,
    messages: Vec<Sent>,
) -> (Option<(usize, Landed)>, Result<(), String>) {
    let Connection { log, created_ns } = connection;
    let (closing, others): (Vec<Sent>, Vec<Sent>) = messages.into_iter().partition(|message| message.closes);
    let mut landed: Option<(usize, Landed)> = None;
    for part in [others, closing] {
        if log.has_broken() {
            return (landed, Err("the connection to NATS broke".into()));
        }
        // A log that has lost its end takes messages at places where others were.
        let taken_seq = landed.as_ref().map_or(taken_seq, |(_, landed)| landed.last.seq.max(taken_seq));
        let ground = Ground { created_ns: *created_ns, seq: taken_seq }.header();
        let mut acks = Vec::with_capacity(part.len());
        for Sent { subject, id, payload, .. } in part {
            let message = PublishMessage::build().payload(payload).message_id(&id);
            let message = message.header(SERVER_HEADER, log.names.server()).header(GROUND_HEADER, ground.as_str());
            match log.context.send_publish(subject, message).await {
                Ok(ack) => acks.push((id, ack)),
                Err(error) => return (landed, Err(error.to_string())),
            }
        }
        for (id, ack) in acks {
            let ack = match ack.await {
                Ok(ack) => ack,
                Err(error) => return (landed, Err(error.to_string())),
            };
            let taken = Taken { created_ns: *created_ns, seq: ack.sequence, id };
            let (count, so_far) = landed.get_or_insert_with(|| (0, Landed { last: taken.clone(), first_new: None }));
            *count += 1;
            if taken.seq > so_far.last.seq {
                so_far.last = taken;
            }
            if !ack.duplicate {
                so_far.first_new.get_or_insert(ack.sequence);
            }
        }
    }
    (landed, Ok(()))
}
