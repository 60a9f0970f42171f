//! Messages on their way to NATS.
//!
//! What enters: messages, in order. What leaves: how many of the first ones the log took, and where. What must hold: a message that
//! closes is sent when all others were taken.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::message::PublishMessage;
use bytes::Bytes;

use super::config::ClusterSection;
use super::connections::Connections;
use super::log::{Log, LogError, SERVER_HEADER};

/// A message on its way.
pub(super) struct Sent {
    pub subject: String,
    /// Id by which NATS recognises a repeated message.
    pub id: String,
    pub payload: Bytes,
    pub closes: bool,
}

/// What came of sending: the place in the log of the last message, and of the first one that was new to it.
pub(super) struct Landed {
    pub last: u64,
    pub first_new: Option<u64>,
}

/// The connection, the number of taken messages with their outcome, and why the next one was not taken.
pub(super) type Flown = (Option<Log>, Option<(usize, Landed)>, Result<(), String>);
pub(super) type Flight = Pin<Box<dyn Future<Output = Flown> + Send>>;

/// Sends messages off by this connection, or by a new one.
pub(super) fn take_off(
    config: ClusterSection,
    keep: Duration,
    connections: Arc<Connections>,
    log: Option<Log>,
    messages: Vec<Sent>,
) -> Flight {
    Box::pin(async move {
        let log = match log {
            Some(log) => log,
            None => match connect(&config, keep, &connections).await {
                Ok(log) => log,
                Err(error) => return (None, None, Err(error.to_string())),
            },
        };
        match send(&log, messages).await {
            (landed, Ok(())) => (Some(log), landed, Ok(())),
            // What it was connected to may not be what it is now.
            (landed, Err(error)) => (None, landed, Err(error)),
        }
    })
}

async fn connect(config: &ClusterSection, keep: Duration, connections: &Arc<Connections>) -> Result<Log, LogError> {
    let log = Log::connect(config, keep, connections).await?;
    log.ensure().await?;
    Ok(log)
}

/// Sends messages off, those that close when all others were taken. Returns how many of the first ones were taken, and where; also
/// when a later one was not.
async fn send(log: &Log, messages: Vec<Sent>) -> (Option<(usize, Landed)>, Result<(), String>) {
    let (closing, others): (Vec<Sent>, Vec<Sent>) = messages.into_iter().partition(|message| message.closes);
    let mut landed: Option<(usize, Landed)> = None;
    for part in [others, closing] {
        let mut acks = Vec::with_capacity(part.len());
        for Sent { subject, id, payload, .. } in part {
            let message = PublishMessage::build().payload(payload).message_id(id);
            let message = message.header(SERVER_HEADER, log.names.server());
            match log.context.send_publish(subject, message).await {
                Ok(ack) => acks.push(ack),
                Err(error) => return (landed, Err(error.to_string())),
            }
        }
        for ack in acks {
            let ack = match ack.await {
                Ok(ack) => ack,
                Err(error) => return (landed, Err(error.to_string())),
            };
            let (count, so_far) = landed.get_or_insert((0, Landed { last: 0, first_new: None }));
            *count += 1;
            so_far.last = so_far.last.max(ack.sequence);
            if !ack.duplicate {
                so_far.first_new.get_or_insert(ack.sequence);
            }
        }
    }
    (landed, Ok(()))
}
