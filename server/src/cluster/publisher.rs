//! Writes what this server has to say into the log.
//!
//! What enters: entries. What leaves: messages, each at least once; while the log takes none, the same entries to this server's
//! own finder at once. What must hold: memory is bounded, and what found no room is requested from the archive when the log is
//! back. How far frames reach is sent when all that they led to was taken. Messages that are on their way together may come in
//! another order, when a connection breaks or one of them is refused. What comes after its frame's end counts as known.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tapio_wire::program::clock::now_ns;
use tokio::sync::watch;

use super::config::ClusterSection;
use super::flight::{self, Connection, Failed, Flight, Landed, Sent};
use super::link::Link;
use super::log::{MESSAGE_BYTES_MAX, Names, Taken};
use super::namesakes::message_id;
use super::outgoing::{ENTRIES_TOGETHER, Outgoing};
use crate::correlate::batch::{Batch, Entry};
use crate::correlate::clue::ClueDetail;
use crate::correlate::{InProcessBus, LogUpdate, Message, is_global};

/// How long the log may take no message before this server goes on alone.
const ALONE_AFTER: Duration = Duration::from_secs(2);
/// How far the reader may be behind what this server published.
const BEHIND_MAX: Duration = Duration::from_secs(5);
/// A server that has nothing to say says so this often.
const ALIVE_INTERVAL: Duration = Duration::from_secs(2);
const TICK: Duration = Duration::from_millis(250);
/// Size of the queue of messages, within bounds: these bytes for each entry that may wait for a message.
const WAITING_BYTES_PER_ENTRY: usize = 640;
const WAITING_BYTES_MIN: usize = 1 << 20;
const WAITING_BYTES_MAX: usize = 64 << 20;
/// Messages on their way at once, and their bytes: of a slow log it is to be seen soon that it takes some.
const FLIGHT_MAX: usize = 128;
const FLIGHT_BYTES_MAX: usize = 1 << 20;
/// Messages that the log has taken and the reader has not read: what this server must know if it goes on alone.
const UNREAD_BYTES_MAX: usize = 32 << 20;
/// What NATS adds to a message.
const HEADER_BYTES: usize = 1024;
/// Entries of one message, at first; one that comes out too large is parted.
const ENTRIES_MAX: usize = ENTRIES_TOGETHER;
const RETRY_MAX: Duration = Duration::from_secs(1);
/// How long a server that ends waits for its last messages.
const LAST_MESSAGES_TIMEOUT: Duration = Duration::from_secs(2);

struct Waiting {
    number: u64,
    entries: u64,
    subject: String,
    payload: Bytes,
    /// True if the entry says how far frames reach, or that the server ends: what belongs before it must not come after
    /// it.
    closes: bool,
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

/// Writes this server's entries into the log.
pub struct Publisher {
    config: ClusterSection,
    keep: Duration,
    names: Names,
    /// Where other servers reach this one.
    address: String,
    /// Distinguishes this run's messages from another's.
    run: u64,
    outgoing: Arc<Outgoing>,
    finder: InProcessBus,
    link: Arc<Link>,
    waiting: VecDeque<Waiting>,
    waiting_bytes: usize,
    waiting_bytes_max: usize,
    /// What the log has taken and the reader has not read, by the place in the log that it is at or before.
    unread: VecDeque<(u64, Bytes)>,
    unread_bytes: usize,
    /// What NATS takes.
    message_bytes_max: usize,
    number: u64,
    /// What the log took last.
    taken: Option<Taken>,
    /// How often the reader had found that the log lost something, when that was last looked at.
    losses: u64,
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
        let waiting_bytes = outgoing.entries_max().saturating_mul(WAITING_BYTES_PER_ENTRY);
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
            waiting_bytes_max: waiting_bytes.clamp(WAITING_BYTES_MIN, WAITING_BYTES_MAX),
            unread: VecDeque::new(),
            unread_bytes: 0,
            message_bytes_max: MESSAGE_BYTES_MAX - HEADER_BYTES,
            number: 0,
            taken: None,
            losses: 0,
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
        let mut connection: Option<Connection> = None;
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
            if !self.may_wait(flight.is_some()) {
                self.gather();
            }
            if ends_at.is_none() && *ended.borrow() {
                ends_at = Some(Instant::now() + LAST_MESSAGES_TIMEOUT);
                self.outgoing.flush();
                self.gather();
                self.say(vec![Entry::Leaving]);
            }
            if ends_at.is_some_and(|at| self.waiting.is_empty() || Instant::now() >= at) {
                return;
            }
            if flight.is_none() && !self.waiting.is_empty() && Instant::now() >= retry_at {
                flight = Some(self.take_off(connection.take()));
            }
            tokio::select! {
                (connected, landed, outcome) = async { match &mut flight { Some(flight) => flight.await, None => std::future::pending().await } } => {
                    flight = None;
                    connection = connected;
                    if let Some(connection) = &connection {
                        self.message_bytes_max = MESSAGE_BYTES_MAX.min(connection.max_payload()) - HEADER_BYTES;
                    }
                    if let Some((count, landed)) = landed {
                        self.landed(count, landed);
                    }
                    match outcome {
                        Ok(()) => {
                            failures = 0;
                            if self.link.set_trouble(None) {
                                tracing::info!("publishing to the servers' log");
                            }
                        }
                        Err(Failed::Lost) => self.forget_log(),
                        Err(Failed::Error(error)) => {
                            failures += 1;
                            retry_at = Instant::now() + RETRY_MAX.min(Duration::from_millis(50 << failures.min(5)));
                            if self.link.set_trouble(Some(error.clone())) {
                                tracing::warn!(error, "cannot publish to the servers' log");
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

    /// Whether few entries wait, and go together with more as soon as what is on its way has landed: each message costs every server.
    fn may_wait(&self, is_in_flight: bool) -> bool {
        let is_alone = self.link.is_alone() || self.link.healing().is_some();
        is_in_flight
            && !is_alone
            && self.outgoing.len() < self.outgoing.together()
            && self.said.elapsed() < ALIVE_INTERVAL
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
        // What comes out of the archive waits for room there: here it would be left out, and be gone through once more.
        let has_room = self.waiting_bytes <= self.waiting_bytes_max / 2;
        if let Some(healing) = self.link.healing().filter(|_| has_room) {
            let entries = healing.take();
            if !entries.is_empty() {
                self.say(entries);
            }
            healing.passed();
        }
    }

    /// Facts go in messages of their own, so that the last message of each can be kept; all else goes together.
    fn say(&mut self, entries: Vec<Entry>) {
        self.said = Instant::now();
        let mut others = Vec::with_capacity(entries.len().min(ENTRIES_MAX));
        let mut closing = Vec::new();
        let mut has_facts = false;
        for entry in entries {
            let fact = match &entry {
                Entry::Described(entity) if entity.kind.is_some_and(is_global) => Some((entity.node.id, entity.id)),
                Entry::Clue(clue) => match &clue.detail {
                    ClueDetail::Fact(fact) => fact.endpoints.as_ref().map(|endpoints| (0, endpoints.id())),
                    _ => None,
                },
                _ => None,
            };
            match fact {
                Some((node, id)) => {
                    has_facts = true;
                    self.enqueue(self.names.fact(node, id), vec![entry], false);
                }
                None if entry.closes() => closing.push(entry),
                None => others.push(entry),
            }
        }
        // Nothing to say is said too.
        if others.is_empty() && closing.is_empty() && !has_facts {
            self.enqueue(self.names.batch(), Vec::new(), false);
        }
        for (mut entries, closes) in [(others, false), (closing, true)] {
            while !entries.is_empty() {
                let rest = entries.split_off(entries.len().min(ENTRIES_MAX));
                self.enqueue(self.names.batch(), std::mem::replace(&mut entries, rest), closes);
            }
        }
    }

    fn enqueue(&mut self, subject: String, entries: Vec<Entry>, closes: bool) {
        let batch = Batch { server: self.names.server().to_owned(), address: self.address.clone(), entries };
        let payload = match batch.encode() {
            Ok(payload) => payload,
            Err(error) => {
                tracing::error!(%error, "cannot encode a message to the other servers");
                return;
            }
        };
        if payload.len() > self.message_bytes_max && batch.entries.len() > 1 {
            let mut first = batch.entries;
            let second = first.split_off(first.len() / 2);
            self.enqueue(subject.clone(), first, closes);
            self.enqueue(subject, second, closes);
            return;
        }
        if payload.len() > self.message_bytes_max {
            tracing::error!(bytes = payload.len(), "entry dropped: larger than NATS accepts; raise max_payload");
            self.link.overflowed.fetch_add(1, Ordering::Relaxed);
        } else if self.waiting_bytes + payload.len() > self.waiting_bytes_max || self.has_overflowed {
            self.has_overflowed = true;
            self.link.overflowed.fetch_add(1, Ordering::Relaxed);
        } else {
            if self.waiting.is_empty() {
                self.moved = Instant::now();
            }
            self.number += 1;
            self.waiting_bytes += payload.len();
            let (payload, entries) = (Bytes::from(payload), batch.entries.len() as u64);
            self.waiting.push_back(Waiting { number: self.number, entries, subject, payload, closes });
            self.link.waiting.store(self.waiting.len() as u64, Ordering::Release);
            self.link.waiting_entries.fetch_add(entries, Ordering::Relaxed);
        }
        if self.link.is_alone() {
            self.feed_finder(batch);
        }
    }

    fn feed_finder(&self, batch: Batch) {
        // Without a finder the server ends.
        let _ = self.finder.send(Message::FromLog(LogUpdate::Batch(Box::new(batch), now_ns())));
    }

    /// What the log took is gone from it, or it is another log: no frame counts as published whose clues may be missing there.
    fn forget_log(&mut self) {
        tracing::warn!("the servers' log has lost messages of this server: republishing them from the archive");
        self.taken = None;
        self.forget_covered();
        let says_reach = |payload: &Bytes| {
            let entries = Batch::decode(payload).map_or(Vec::new(), |batch| batch.entries);
            entries.iter().any(|entry| matches!(entry, Entry::Covered(_)))
        };
        let mut dropped = (0, 0);
        self.waiting.retain(|waiting| {
            let keeps = !waiting.closes || !says_reach(&waiting.payload);
            if !keeps {
                dropped = (dropped.0 + waiting.payload.len(), dropped.1 + waiting.entries);
            }
            keeps
        });
        self.waiting_bytes -= dropped.0;
        self.link.waiting_entries.fetch_sub(dropped.1, Ordering::Relaxed);
        self.link.waiting.store(self.waiting.len() as u64, Ordering::Release);
        (self.unread, self.unread_bytes) = (VecDeque::new(), 0);
        self.link.published_seq.store(0, Ordering::Release);
        self.link.read_seq.store(0, Ordering::Release);
        self.needs_healing = true;
        self.link.expect_healing();
        // What is known of the log that was must not be taken for what this one has.
        if !self.link.is_alone() {
            self.start_reading_again();
        }
    }

    /// Of frames whose entries may be gone none is published as covered, but by what comes out of the archive.
    fn forget_covered(&self) {
        for known in [Some(Arc::clone(&self.outgoing)), self.link.healing()].into_iter().flatten() {
            known.forget_covered();
        }
    }

    fn start_reading_again(&mut self) {
        self.behind = None;
        self.reading = (Instant::now(), 0);
        self.link.generation.fetch_add(1, Ordering::AcqRel);
        self.link.set_caught_up(false);
        self.link.rebuild.notify_one();
    }

    /// Sends the first ones off; connects before where that is needed.
    fn take_off(&mut self, connection: Option<Connection>) -> Flight {
        let losses = self.link.losses_seen.load(Ordering::Acquire);
        // A new connection looks whether the log has what it took.
        let connection = connection.filter(|_| losses == self.losses);
        self.losses = losses;
        let id = |waiting: &Waiting| message_id(self.names.server(), self.run, waiting.number);
        let mut bytes = 0;
        let fits = |waiting: &&Waiting| {
            let is_first = bytes == 0;
            bytes += waiting.payload.len();
            is_first || bytes <= FLIGHT_BYTES_MAX
        };
        let count = self.waiting.iter().take(FLIGHT_MAX).take_while(fits).count();
        // What closes goes last; it is in the order of the rest otherwise.
        self.waiting.make_contiguous()[..count].sort_by_key(|waiting| waiting.closes);
        let sent = |waiting: &Waiting| Sent {
            subject: waiting.subject.clone(),
            id: id(waiting),
            payload: waiting.payload.clone(),
            closes: waiting.closes,
        };
        let messages: Vec<Sent> = self.waiting.iter().take(count).map(sent).collect();
        let (config, keep, connections) = (self.config.clone(), self.keep, Arc::clone(&self.link.connections));
        flight::take_off(config, keep, connections, connection, self.taken.clone(), messages)
    }

    fn landed(&mut self, count: usize, landed: Landed) {
        let last_seq = landed.last.seq;
        self.taken = Some(landed.last);
        let mut last = 0;
        for waiting in self.waiting.drain(..count) {
            self.waiting_bytes -= waiting.payload.len();
            self.link.waiting_entries.fetch_sub(waiting.entries, Ordering::Relaxed);
            last = waiting.number.max(last);
            self.unread_bytes += waiting.payload.len();
            self.unread.push_back((last_seq, waiting.payload));
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
        let before = link.published_seq.swap(last_seq, Ordering::AcqRel);
        let has_lost = landed.first_new.is_some_and(|seq| seq <= before);
        if link.is_alone() {
            // What was said until the log was back.
            let until = *self.alone_until.get_or_insert(self.number);
            if last >= until && link.is_reading.load(Ordering::Acquire) {
                self.alone_until = None;
                self.start_reading_again();
                self.link.set_alone(false);
                tracing::info!("the servers' log is back: findings are computed again from all servers' evidence");
            }
        }
        self.link.moved.notify_one();
        if has_lost {
            self.forget_log();
            // The connection was made to the log that was.
            self.losses = u64::MAX;
        }
        if (self.has_overflowed || self.needs_healing) && self.waiting.is_empty() && !self.link.is_alone() {
            if std::mem::take(&mut self.has_overflowed) {
                self.forget_covered();
            }
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
        if self.link.is_held.load(Ordering::Acquire) {
            // The log is there: the finder has more to do than it can. Alone it would have the same to do, and twice afterwards.
            (self.behind, self.reading.0) = (None, Instant::now());
        } else if !self.link.is_caught_up() {
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
        tracing::warn!(
            is_stuck,
            is_unread,
            "the servers' log is unreachable: continuing with this server's own collectors"
        );
        self.alone_until = None;
        self.link.set_alone(true);
        let alone = LogUpdate::Alone(self.names.server().to_owned());
        let _ = self.finder.send(Message::FromLog(alone));
        let unread = self.unread.iter().map(|(_, payload)| payload);
        for payload in unread.chain(self.waiting.iter().map(|waiting| &waiting.payload)) {
            if let Ok(batch) = Batch::decode(payload) {
                self.feed_finder(batch);
            }
        }
    }
}

#[cfg(test)]
mod tests;
