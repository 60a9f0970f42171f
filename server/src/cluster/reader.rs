//! Reads the log and drives the finder by it.
//!
//! What enters: messages of all servers. What leaves: batches to the finder, in the order of the log. What must hold: after a break
//! it goes on where it was; where the log does not have that any more, or is another one, everything is read anew, and what the
//! log lacks is asked for from the archive.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use async_nats::jetstream::stream::Stream;
use futures::StreamExt;
use tokio::sync::watch;

use super::batch::Batch;
use super::config::ClusterSection;
use super::link::Link;
use super::log::{self, Log};
use crate::correlate::{BusClosed, FromLog, InProcessBus, Message};

const RETRY_MIN: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(2);
/// How often it is looked whether the log is still the same one.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);

/// Why reading ended.
enum End {
    /// The server ends.
    Ended,
    Broken(String),
}

impl From<BusClosed> for End {
    fn from(_: BusClosed) -> Self {
        Self::Ended
    }
}

/// Where in which log it is.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Position {
    /// When the log was made.
    created_ns: i128,
    seq: u64,
}

/// See the module.
pub struct Reader {
    config: ClusterSection,
    keep: Duration,
    finder: InProcessBus,
    link: Arc<Link>,
    position: Option<Position>,
}

impl Reader {
    /// Drives `finder`.
    pub fn new(config: &ClusterSection, keep: Duration, finder: InProcessBus, link: Arc<Link>) -> Self {
        Self { config: config.clone(), keep, finder, link, position: None }
    }

    /// Reads until `ended`.
    pub async fn run(mut self, mut ended: watch::Receiver<bool>) {
        let mut retry = RETRY_MIN;
        loop {
            let before = self.position;
            let outcome = tokio::select! {
                outcome = self.read() => outcome,
                _ = ended.wait_for(|is| *is) => return,
            };
            match outcome {
                Err(End::Broken(error)) => {
                    if self.position != before {
                        retry = RETRY_MIN;
                    }
                    tracing::debug!(error, "the log cannot be read");
                }
                Ok(()) | Err(End::Ended) => return,
            }
            tokio::select! {
                () = tokio::time::sleep(retry) => retry = RETRY_MAX.min(retry * 2),
                _ = ended.wait_for(|is| *is) => return,
            }
        }
    }

    async fn read(&mut self) -> Result<(), End> {
        let broken = |error: &dyn std::fmt::Display| End::Broken(error.to_string());
        let log = Log::connect(&self.config, self.keep).await.map_err(|error| broken(&error))?;
        let stream = log.ensure().await.map_err(|error| broken(&error))?;
        loop {
            self.read_on(&log, &stream).await?;
            // Asked to begin anew.
            self.position = None;
        }
    }

    /// Reads until something breaks, or it is to begin anew.
    async fn read_on(&mut self, log: &Log, stream: &Stream) -> Result<(), End> {
        let broken = |error: &dyn std::fmt::Display| End::Broken(error.to_string());
        let info = stream.get_info().await.map_err(|error| broken(&error))?;
        let created_ns = info.created.unix_timestamp_nanos();
        let goes_on = self.position.filter(|at| {
            at.created_ns == created_ns && info.state.first_sequence <= at.seq + 1 && at.seq <= info.state.last_sequence
        });
        if goes_on.is_none() {
            // Before anything is asked for: what is known is of the log that was.
            self.link.set_caught_up(false);
            // A log that was read before and is not there any more lacks what it had.
            if self.position.is_some_and(|at| at.created_ns != created_ns || at.seq > info.state.last_sequence) {
                tracing::warn!("the log of the servers was lost: what the archive has of it is told again");
                self.link.ask_for_healing();
            }
            self.link.rebuilds.fetch_add(1, Ordering::Relaxed);
            self.finder.send(Message::FromLog(FromLog::Rebuild))?;
            self.read_facts(log).await?;
        }
        let mut position = goes_on.unwrap_or(Position { created_ns, seq: info.state.first_sequence.saturating_sub(1) });
        let target = info.state.last_sequence;
        let mut messages = log::read_from(stream, position.seq + 1).await.map_err(|error| broken(&error))?;
        self.position = Some(position);
        self.reached(position.seq, target)?;
        let mut look = tokio::time::interval(LOOK_INTERVAL);
        look.tick().await;
        loop {
            let message = tokio::select! {
                message = messages.next() => message,
                () = self.link.rebuild.notified() => return Ok(()),
                _ = look.tick() => {
                    let info = stream.get_info().await.map_err(|error| broken(&error))?;
                    if info.created.unix_timestamp_nanos() != created_ns || info.state.last_sequence < position.seq {
                        return Err(broken(&"it is another log"));
                    }
                    continue;
                }
            };
            let message = message.ok_or_else(|| broken(&"the consumer ended"))?.map_err(|error| broken(&error))?;
            let told = message.info().map_err(|error| broken(&error))?;
            let (seq, at_ns) = (told.stream_sequence, told.published.unix_timestamp_nanos() as u64);
            if seq > position.seq + 1 {
                // What was between was deleted before this server came to it.
                tracing::warn!(missed = seq - position.seq - 1, "this server fell behind the log, and reads it anew");
                self.position = None;
                return Ok(());
            }
            if seq <= position.seq {
                continue;
            }
            match Batch::decode(&message.payload) {
                Ok(batch) => self.finder.send(Message::FromLog(FromLog::Batch(Box::new(batch), at_ns)))?,
                Err(error) => {
                    if self.link.unreadable.fetch_add(1, Ordering::Relaxed) == 0 {
                        tracing::error!(%error, seq, "a message of another server cannot be read, and is left out");
                    }
                }
            }
            position.seq = seq;
            self.position = Some(position);
            self.link.messages_read.fetch_add(1, Ordering::Relaxed);
            self.reached(seq, target)?;
        }
    }

    fn reached(&self, seq: u64, target: u64) -> Result<(), BusClosed> {
        if seq >= target && !self.link.is_caught_up() {
            self.finder.send(Message::FromLog(FromLog::CaughtUp))?;
            // Whoever hears of it may rely on the finder's being there too.
            self.finder.barrier()?;
            self.link.set_caught_up(true);
        }
        self.link.read_seq.store(seq, Ordering::Release);
        Ok(())
    }

    /// What there is, by the last word on each.
    async fn read_facts(&self, log: &Log) -> Result<(), End> {
        let broken = |error: &dyn std::fmt::Display| End::Broken(error.to_string());
        let facts = log.facts().await.map_err(|error| broken(&error))?;
        let info = facts.get_info().await.map_err(|error| broken(&error))?;
        if info.state.messages == 0 {
            return Ok(());
        }
        let mut messages = log::read_from(&facts, 0).await.map_err(|error| broken(&error))?;
        while let Some(message) = messages.next().await {
            let message = message.map_err(|error| broken(&error))?;
            let seq = message.info().map_err(|error| broken(&error))?.stream_sequence;
            if let Ok(batch) = Batch::decode(&message.payload) {
                self.finder.send(Message::FromLog(FromLog::Facts(Box::new(batch))))?;
            }
            if seq >= info.state.last_sequence {
                break;
            }
        }
        Ok(())
    }
}
