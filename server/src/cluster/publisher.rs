//! Writes what this server has to say into the log.
//!
//! What enters: entries. What leaves: messages, each at least once and in order; while the log takes none, the same entries to this
//! server's own finder at once. What must hold: memory is bounded, and what found no room is asked for from the archive when the log
//! is back.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use async_nats::jetstream::message::PublishMessage;
use bytes::Bytes;
use tokio::sync::watch;

use super::batch::{Batch, Entry};
use super::config::ClusterSection;
use super::link::Link;
use super::log::{Log, LogError, MESSAGE_BYTES_MAX, Names, SERVER_HEADER};
use super::outgoing::Outgoing;
use crate::correlate::signal::Detail;
use crate::correlate::{FromLog, InProcessBus, Message, is_global};

/// How long the log may take no message before this server goes on alone.
const ALONE_AFTER: Duration = Duration::from_secs(2);
/// How far the reader may be behind what this server published.
const BEHIND_MAX: Duration = Duration::from_secs(5);
/// A server that has nothing to say says so this often.
const ALIVE_INTERVAL: Duration = Duration::from_secs(2);
const TICK: Duration = Duration::from_millis(250);
/// Messages that wait for the log.
const WAITING_BYTES_MAX: usize = 64 << 20;
/// Messages on their way at once.
const FLIGHT_MAX: usize = 64;
/// Messages that the log has taken and the reader has not read: what this server must know if it goes on alone.
const UNREAD_BYTES_MAX: usize = 32 << 20;
/// What NATS adds to a message.
const HEADER_BYTES: usize = 1024;
/// Entries of one message, at first; one that comes out too large is parted.
const ENTRIES_MAX: usize = 1024;
const RETRY_MAX: Duration = Duration::from_secs(1);
/// How long the last words of a server that ends may take.
const LAST_WORDS: Duration = Duration::from_secs(2);

struct Waiting {
    number: u64,
    subject: String,
    payload: Bytes,
}

/// What came of sending: the place in the log of the last message, and of the first one that was new to it.
struct Landed {
    last: u64,
    first_new: Option<u64>,
}

/// Nobody is left waiting when the publisher ends, also by a panic.
struct Closing(Arc<Outgoing>, Arc<Link>);

impl Drop for Closing {
    fn drop(&mut self) {
        // Before the look: whoever begins to heal later sees it.
        self.1.is_closed.store(true, Ordering::SeqCst);
        self.0.close();
        if let Some(healing) = self.1.healing() {
            healing.close();
        }
    }
}

type Flight = Pin<Box<dyn Future<Output = (Option<Log>, Result<Landed, String>, usize)> + Send>>;

/// Writes this server's entries into the log.
pub struct Publisher {
    config: ClusterSection,
    keep: Duration,
    names: Names,
    /// Where other servers reach this one.
    address: String,
    /// Tells this run's messages from another's.
    run: u64,
    outgoing: Arc<Outgoing>,
    finder: InProcessBus,
    link: Arc<Link>,
    waiting: VecDeque<Waiting>,
    waiting_bytes: usize,
    /// What the log has taken and the reader has not read, by the place in the log that it is at or before.
    unread: VecDeque<(u64, Bytes)>,
    unread_bytes: usize,
    /// What NATS takes.
    message_bytes_max: usize,
    number: u64,
    said: Instant,
    /// When the log last took a message, or one began to wait.
    moved: Instant,
    /// Since when the reader has not read a message of this server, and which.
    behind: Option<(Instant, u64)>,
    /// When the reader last got on while it is on its way to the log's end, and how far.
    reading: (Instant, u64),
    /// Alone: the last message that must be in the log before this server reads it again.
    alone_until: Option<u64>,
    has_overflowed: bool,
    /// What found no room before it came here.
    left_out: u64,
    needs_healing: bool,
}

fn now_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_nanos() as u64)
}

impl Publisher {
    /// Publishes what comes out of `outgoing`; `finder` is fed while the log is away.
    pub fn new(
        config: &ClusterSection,
        keep: Duration,
        address: String,
        outgoing: Arc<Outgoing>,
        finder: InProcessBus,
        link: Arc<Link>,
    ) -> Self {
        Self {
            names: Names::new(config),
            address,
            config: config.clone(),
            keep,
            run: now_ns(),
            outgoing,
            finder,
            link,
            waiting: VecDeque::new(),
            waiting_bytes: 0,
            unread: VecDeque::new(),
            unread_bytes: 0,
            message_bytes_max: MESSAGE_BYTES_MAX - HEADER_BYTES,
            number: 0,
            said: Instant::now(),
            moved: Instant::now(),
            behind: None,
            reading: (Instant::now(), 0),
            alone_until: None,
            has_overflowed: false,
            left_out: 0,
            needs_healing: false,
        }
    }

    /// Publishes until `ended`, and then what is left.
    pub async fn run(mut self, mut ended: watch::Receiver<bool>) {
        let mut log: Option<Log> = None;
        let mut flight: Option<Flight> = None;
        let mut failures = 0_u32;
        let mut retry_at = Instant::now();
        let mut ends_at: Option<Instant> = None;
        let outgoing = Arc::clone(&self.outgoing);
        let _closing = Closing(Arc::clone(&outgoing), Arc::clone(&self.link));
        let mut tick = tokio::time::interval(TICK);
        loop {
            if self.link.frozen.load(Ordering::Acquire) {
                let _ = ended.wait_for(|is| *is).await;
                return;
            }
            self.gather();
            if ends_at.is_none() && *ended.borrow() {
                ends_at = Some(Instant::now() + LAST_WORDS);
                self.outgoing.flush();
                self.gather();
                self.say(vec![Entry::Leaving]);
            }
            if ends_at.is_some_and(|at| self.waiting.is_empty() || Instant::now() >= at) {
                return;
            }
            if flight.is_none() && !self.waiting.is_empty() && Instant::now() >= retry_at {
                flight = Some(self.take_off(log.take()));
            }
            tokio::select! {
                (connection, outcome, count) = async { match &mut flight { Some(flight) => flight.await, None => std::future::pending().await } } => {
                    flight = None;
                    log = connection;
                    if let Some(log) = &log {
                        self.message_bytes_max = MESSAGE_BYTES_MAX.min(log.max_payload()) - HEADER_BYTES;
                    }
                    match outcome {
                        Ok(landed) => {
                            failures = 0;
                            self.landed(count, &landed);
                        }
                        Err(error) => {
                            failures += 1;
                            retry_at = Instant::now() + RETRY_MAX.min(Duration::from_millis(50 << failures.min(5)));
                            if self.link.set_trouble(Some(error.clone())) {
                                tracing::warn!(error, "the log of the servers takes no message");
                            }
                        }
                    }
                }
                () = outgoing.filled() => {}
                _ = tick.tick() => {}
                _ = ended.changed(), if ends_at.is_none() => {}
            }
            self.look();
        }
    }

    /// Takes up what there is to say.
    fn gather(&mut self) {
        let entries = self.outgoing.take();
        if !entries.is_empty() || self.said.elapsed() >= ALIVE_INTERVAL {
            self.say(entries);
        }
        self.outgoing.passed();
        let left_out = self.outgoing.left_out();
        self.needs_healing |= left_out > self.left_out;
        self.left_out = left_out;
        if let Some(healing) = self.link.healing() {
            let entries = healing.take();
            if !entries.is_empty() {
                self.say(entries);
            }
            healing.passed();
        }
    }

    /// Facts go by themselves, so that the last word on each can be kept; all else goes together.
    fn say(&mut self, entries: Vec<Entry>) {
        self.said = Instant::now();
        let mut others = Vec::with_capacity(entries.len().min(ENTRIES_MAX));
        let mut has_facts = false;
        for entry in entries {
            let fact = match &entry {
                Entry::Described(entity) if entity.kind.is_some_and(is_global) => Some((entity.node.id, entity.id)),
                Entry::Signal(signal) => match &signal.detail {
                    Detail::Fact(fact) => fact.endpoints.as_ref().map(|told| (0, told.id())),
                    _ => None,
                },
                _ => None,
            };
            match fact {
                Some((node, id)) => {
                    has_facts = true;
                    self.enqueue(self.names.fact(node, id), vec![entry]);
                }
                None => others.push(entry),
            }
        }
        // Nothing to say is said too.
        if others.is_empty() && !has_facts {
            self.enqueue(self.names.batch(), Vec::new());
        }
        while !others.is_empty() {
            let rest = others.split_off(others.len().min(ENTRIES_MAX));
            self.enqueue(self.names.batch(), std::mem::replace(&mut others, rest));
        }
    }

    fn enqueue(&mut self, subject: String, entries: Vec<Entry>) {
        let batch = Batch { server: self.names.server().to_owned(), address: self.address.clone(), entries };
        let payload = match batch.encode() {
            Ok(payload) => payload,
            Err(error) => {
                tracing::error!(%error, "a message to the other servers cannot be written");
                return;
            }
        };
        if payload.len() > self.message_bytes_max && batch.entries.len() > 1 {
            let mut first = batch.entries;
            let second = first.split_off(first.len() / 2);
            self.enqueue(subject.clone(), first);
            self.enqueue(subject, second);
            return;
        }
        if payload.len() > self.message_bytes_max {
            tracing::error!(
                bytes = payload.len(),
                "an entry is larger than NATS takes, and is left out: raise max_payload"
            );
            self.link.overflowed.fetch_add(1, Ordering::Relaxed);
        } else if self.waiting_bytes + payload.len() > WAITING_BYTES_MAX || self.has_overflowed {
            self.has_overflowed = true;
            self.link.overflowed.fetch_add(1, Ordering::Relaxed);
        } else {
            if self.waiting.is_empty() {
                self.moved = Instant::now();
            }
            self.number += 1;
            self.waiting_bytes += payload.len();
            self.waiting.push_back(Waiting { number: self.number, subject, payload: payload.into() });
            self.link.waiting.store(self.waiting.len() as u64, Ordering::Release);
        }
        if self.link.is_alone() {
            self.tell_finder(batch);
        }
    }

    fn tell_finder(&self, batch: Batch) {
        // Without a finder the server ends.
        let _ = self.finder.send(Message::FromLog(FromLog::Batch(Box::new(batch), now_ns())));
    }

    /// Sends the first ones off; connects before where that is needed.
    fn take_off(&self, log: Option<Log>) -> Flight {
        let id = |waiting: &Waiting| format!("{}-{:x}-{}", self.names.server(), self.run, waiting.number);
        let messages: Vec<(String, String, Bytes)> = self
            .waiting
            .iter()
            .take(FLIGHT_MAX)
            .map(|waiting| (waiting.subject.clone(), id(waiting), waiting.payload.clone()))
            .collect();
        let (config, keep) = (self.config.clone(), self.keep);
        Box::pin(async move {
            let log = match log {
                Some(log) => log,
                None => match connect(&config, keep).await {
                    Ok(log) => log,
                    Err(error) => return (None, Err(error.to_string()), 0),
                },
            };
            let count = messages.len();
            match send(&log, messages).await {
                Ok(seq) => (Some(log), Ok(seq), count),
                // What it was connected to may not be what it is now.
                Err(error) => (None, Err(error), 0),
            }
        })
    }

    fn landed(&mut self, count: usize, landed: &Landed) {
        let mut last = 0;
        for waiting in self.waiting.drain(..count) {
            self.waiting_bytes -= waiting.payload.len();
            last = waiting.number;
            self.unread_bytes += waiting.payload.len();
            self.unread.push_back((landed.last, waiting.payload));
        }
        let read_seq = self.link.read_seq.load(Ordering::Acquire);
        while self.unread.front().is_some_and(|(seq, _)| *seq <= read_seq) || self.unread_bytes > UNREAD_BYTES_MAX {
            let Some((_, payload)) = self.unread.pop_front() else { break };
            self.unread_bytes -= payload.len();
        }
        let link = &self.link;
        link.waiting.store(self.waiting.len() as u64, Ordering::Release);
        self.moved = Instant::now();
        link.messages_published.fetch_add(count as u64, Ordering::Relaxed);
        let before = link.published_seq.swap(landed.last, Ordering::AcqRel);
        if landed.first_new.is_some_and(|seq| seq <= before) {
            tracing::warn!("the log of the servers has lost its end: what the archive has of it is told again");
            self.needs_healing = true;
        }
        if link.set_trouble(None) {
            tracing::info!("the log of the servers takes messages");
        }
        if link.is_alone() {
            // What was said until the log was back.
            let until = *self.alone_until.get_or_insert(self.number);
            if last >= until && link.is_reading.load(Ordering::Acquire) {
                self.alone_until = None;
                self.behind = None;
                self.reading = (Instant::now(), 0);
                link.generation.fetch_add(1, Ordering::AcqRel);
                link.set_caught_up(false);
                link.set_alone(false);
                link.rebuild.notify_one();
                tracing::info!("the log is back: what was found alone is found again by what all servers say");
            }
        }
        self.link.moved.notify_one();
        if (self.has_overflowed || self.needs_healing) && self.waiting.is_empty() && !self.link.is_alone() {
            self.has_overflowed = false;
            self.needs_healing = false;
            self.link.ask_for_healing();
        }
    }

    /// Whether the log still works, and this server goes on alone when it does not.
    fn look(&mut self) {
        if self.link.is_alone() {
            return;
        }
        let is_stuck = !self.waiting.is_empty() && self.moved.elapsed() >= ALONE_AFTER;
        let (published, read) =
            (self.link.published_seq.load(Ordering::Acquire), self.link.read_seq.load(Ordering::Acquire));
        if !self.link.is_caught_up() {
            self.behind = None;
            let got_on = self.link.messages_read.load(Ordering::Relaxed);
            if got_on != self.reading.1 {
                self.reading = (Instant::now(), got_on);
            }
        } else {
            self.reading.0 = Instant::now();
            match self.behind {
                Some((_, seq)) if read >= seq => self.behind = None,
                None if read < published => self.behind = Some((Instant::now(), published)),
                _ => {}
            }
        }
        let is_unread = self.behind.is_some_and(|(since, _)| since.elapsed() >= BEHIND_MAX)
            || self.reading.0.elapsed() >= BEHIND_MAX;
        if !is_stuck && !is_unread {
            return;
        }
        tracing::warn!(is_stuck, is_unread, "the log is away: this server goes on with what its own collectors say");
        self.alone_until = None;
        self.link.set_alone(true);
        let alone = FromLog::Alone(self.names.server().to_owned());
        let _ = self.finder.send(Message::FromLog(alone));
        let unread = self.unread.iter().map(|(_, payload)| payload);
        for payload in unread.chain(self.waiting.iter().map(|waiting| &waiting.payload)) {
            if let Ok(batch) = Batch::decode(payload) {
                self.tell_finder(batch);
            }
        }
    }
}

async fn connect(config: &ClusterSection, keep: Duration) -> Result<Log, LogError> {
    let log = Log::connect(config, keep).await?;
    log.ensure().await?;
    Ok(log)
}

async fn send(log: &Log, messages: Vec<(String, String, Bytes)>) -> Result<Landed, String> {
    let mut acks = Vec::with_capacity(messages.len());
    for (subject, id, payload) in messages {
        let message = PublishMessage::build().payload(payload).message_id(id).header(SERVER_HEADER, log.names.server());
        acks.push(log.context.send_publish(subject, message).await.map_err(|error| error.to_string())?);
    }
    let mut landed = Landed { last: 0, first_new: None };
    for ack in acks {
        let ack = ack.await.map_err(|error| error.to_string())?;
        landed.last = landed.last.max(ack.sequence);
        if !ack.duplicate {
            landed.first_new.get_or_insert(ack.sequence);
        }
    }
    Ok(landed)
}
