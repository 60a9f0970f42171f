//! What the publisher, the reader and the rest of the server know of one another.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, watch};

use super::connections::Connections;
use super::outgoing::Outgoing;

/// How long it is said that two servers have one name, after both said something.
const NAMESAKES_FOR: Duration = Duration::from_secs(60);

/// State that the publisher, the reader and the server share.
pub struct Link {
    /// True while this server feeds its finder itself, because the log is unreachable.
    alone: watch::Sender<bool>,
    /// The reader has come to the log's end since it began.
    caught_up: watch::Sender<bool>,
    /// The last of this server's messages that the log took, and the last message that was read: places in the log.
    pub published_seq: AtomicU64,
    pub read_seq: AtomicU64,
    /// The reader has a message that the finder has no room for yet: it is the finder that is slow, and not the log.
    pub is_held: AtomicBool,
    pub messages_read: AtomicU64,
    pub messages_published: AtomicU64,
    /// Messages that could not be read: of another version, or damaged.
    pub unreadable: AtomicU64,
    /// Messages that found no room while the log was away.
    pub overflowed: AtomicU64,
    pub rebuilds: AtomicU64,
    /// How often the log had deleted messages that were not read yet.
    pub fell_behind: AtomicU64,
    /// By how much the full log is shorter than what a restarted server reads; nanoseconds.
    pub short_ns: AtomicU64,
    /// How often the reader found that the log had lost messages, or was another one.
    pub losses_seen: AtomicU64,
    /// Nothing more is published.
    pub frozen: AtomicBool,
    /// The reader is to start again, and how often it was asked to: what it read before that does not count.
    pub rebuild: Notify,
    pub generation: AtomicU64,
    /// The reader is connected.
    pub is_reading: AtomicBool,
    /// Messages that wait to be written, and the entries in them.
    pub waiting: AtomicU64,
    pub waiting_entries: AtomicU64,
    /// A message was written or read.
    pub moved: Notify,
    /// The publisher has ended: nobody takes entries any more.
    pub is_closed: AtomicBool,
    healing: Mutex<Healing>,
    /// The log lacks nothing that the archive has.
    is_whole: watch::Sender<bool>,
    pub heal: Notify,
    /// The archive could not be read when it was gone through last.
    pub cannot_heal: AtomicBool,
    troubles: Mutex<Troubles>,
    /// Names that two servers have at once, and when that was seen last.
    namesakes: Mutex<BTreeMap<String, Instant>>,
    /// What is logged of this server's connections to NATS.
    pub(super) connections: Arc<Connections>,
}

/// The log lacks what the archive has.
#[derive(Default)]
struct Healing {
    /// True if healing was requested and has not begun.
    is_wanted: bool,
    /// True if it will be requested when more of the log was read.
    is_expected: bool,
    /// Start: from the first request until all of it was read.
    since: Option<Instant>,
    /// Entries out of the archive, while it is gone through.
    entries: Option<Arc<Outgoing>>,
}

/// Why the log cannot be written, and why it cannot be read.
#[derive(Default)]
struct Troubles {
    writing: Option<String>,
    reading: Option<String>,
}

impl Default for Link {
    fn default() -> Self {
        Self {
            alone: watch::Sender::new(false),
            caught_up: watch::Sender::new(false),
            published_seq: AtomicU64::new(0),
            read_seq: AtomicU64::new(0),
            is_held: AtomicBool::new(false),
            messages_read: AtomicU64::new(0),
            messages_published: AtomicU64::new(0),
            unreadable: AtomicU64::new(0),
            overflowed: AtomicU64::new(0),
            rebuilds: AtomicU64::new(0),
            fell_behind: AtomicU64::new(0),
            short_ns: AtomicU64::new(0),
            losses_seen: AtomicU64::new(0),
            frozen: AtomicBool::new(false),
            rebuild: Notify::new(),
            generation: AtomicU64::new(0),
            is_reading: AtomicBool::new(false),
            waiting: AtomicU64::new(0),
            waiting_entries: AtomicU64::new(0),
            moved: Notify::new(),
            is_closed: AtomicBool::new(false),
            healing: Mutex::default(),
            is_whole: watch::Sender::new(true),
            heal: Notify::new(),
            cannot_heal: AtomicBool::new(false),
            troubles: Mutex::default(),
            namesakes: Mutex::default(),
            connections: Arc::default(),
        }
    }
}

impl Link {
    /// Whether this server feeds its finder itself.
    pub fn is_alone(&self) -> bool {
        *self.alone.borrow()
    }

    pub(super) fn set_alone(&self, is_alone: bool) {
        self.alone.send_replace(is_alone);
    }

    /// Whether the finder has read the log to its end.
    pub fn is_caught_up(&self) -> bool {
        *self.caught_up.borrow()
    }

    pub(super) fn set_caught_up(&self, is_caught_up: bool) {
        self.caught_up.send_replace(is_caught_up);
    }

    /// Waits until the log was read to its end, or this server goes on alone.
    pub async fn settled(&self) {
        let (mut caught_up, mut alone) = (self.caught_up.subscribe(), self.alone.subscribe());
        tokio::select! {
            _ = caught_up.wait_for(|is| *is) => {}
            _ = alone.wait_for(|is| *is) => {}
        }
    }

    /// Waits until the log was read to its end.
    pub async fn read_through(&self) {
        // The sender is in `self`.
        let _ = self.caught_up.subscribe().wait_for(|is| *is).await;
    }

    /// Asks for what the archive has and the log lacks.
    pub(super) fn ask_for_healing(&self) {
        {
            let mut healing = self.lock_healing();
            (healing.is_wanted, healing.is_expected) = (true, false);
            healing.since.get_or_insert_with(Instant::now);
            self.is_whole.send_replace(false);
        }
        self.heal.notify_one();
    }

    /// The log lacks what the archive has; which part of it shows when more was read, and then it is asked for.
    pub(super) fn expect_healing(&self) {
        let mut healing = self.lock_healing();
        healing.is_expected = true;
        healing.since.get_or_insert_with(Instant::now);
        self.is_whole.send_replace(false);
    }

    /// Waits until all that waits now is in the log and was read. False when the server ends before.
    pub async fn read_what_was_written(&self, ended: &mut watch::Receiver<bool>) -> bool {
        let is_read = || {
            let published = self.published_seq.load(Ordering::Acquire);
            let is_written = self.waiting.load(Ordering::Acquire) == 0 && !self.is_alone();
            is_written && self.is_caught_up() && self.read_seq.load(Ordering::Acquire) >= published
        };
        while !is_read() {
            tokio::select! {
                // What moves between the look and here is remembered.
                () = self.moved.notified() => {}
                _ = ended.wait_for(|is| *is) => return false,
            }
        }
        true
    }

    /// Waits until the log lacks nothing that the archive has.
    pub async fn healed(&self) {
        // The sender is in `self`.
        let _ = self.is_whole.subscribe().wait_for(|is| *is).await;
    }

    /// Whether what this server found stands: it is confirmed by a log that was read to its end and lacks nothing.
    pub fn is_confirmed(&self) -> bool {
        !self.is_alone() && self.is_caught_up() && !self.is_healing()
    }

    /// Waits until what this server found stands; it may be in doubt again by then.
    pub async fn confirmed(&self) {
        self.in_company().await;
        self.read_through().await;
        self.healed().await;
    }

    /// Waits until this server goes on alone no more.
    pub async fn in_company(&self) {
        // The sender is in `self`.
        let _ = self.alone.subscribe().wait_for(|is| !*is).await;
    }

    fn lock_healing(&self) -> MutexGuard<'_, Healing> {
        self.healing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the archive is to be gone through, or what came of it is not read yet.
    pub fn is_healing(&self) -> bool {
        self.lock_healing().since.is_some()
    }

    /// Returns how long healing has been running; [`None`] while the log lacks nothing.
    pub fn healing_for(&self) -> Option<Duration> {
        self.lock_healing().since.map(|since| since.elapsed())
    }

    /// Whether that was asked for since it was asked last.
    pub fn take_healing(&self) -> bool {
        std::mem::take(&mut self.lock_healing().is_wanted)
    }

    /// Entries that are not in the log yet: of this queue, of the archive's where it is gone through, and in messages.
    pub fn entries_waiting(&self, outgoing: &Outgoing) -> u64 {
        let healing = self.healing().map_or(0, |healing| healing.len());
        (outgoing.len() + healing) as u64 + self.waiting_entries.load(Ordering::Relaxed)
    }

    /// Entries out of the archive, while it is gone through.
    pub fn healing(&self) -> Option<Arc<Outgoing>> {
        self.lock_healing().entries.clone()
    }

    /// Begins or ends going through the archive.
    pub fn set_healing(&self, entries: Option<Arc<Outgoing>>) {
        self.lock_healing().entries = entries;
    }

    /// What the log lacked was read out of it. False where healing was asked for again meanwhile.
    pub fn end_healing(&self) -> bool {
        let mut healing = self.lock_healing();
        if healing.is_wanted || healing.is_expected {
            return false;
        }
        healing.since = None;
        self.is_whole.send_replace(true);
        true
    }

    /// Two servers have this name.
    pub(super) fn note_namesake(&self, name: &str) {
        let mut namesakes = self.namesakes.lock().unwrap_or_else(PoisonError::into_inner);
        if namesakes.insert(name.to_owned(), Instant::now()).is_none() {
            tracing::error!(name, "two servers have this name: give each another cluster.server");
        }
    }

    /// Names that two servers had at once within the last minute.
    pub fn namesakes(&self) -> Vec<String> {
        let mut namesakes = self.namesakes.lock().unwrap_or_else(PoisonError::into_inner);
        namesakes.retain(|_, at| at.elapsed() < NAMESAKES_FOR);
        namesakes.keys().cloned().collect()
    }

    /// Takes in by how much the full log is shorter than what a restarted server reads.
    pub(super) fn set_short(&self, short: Duration) {
        let was_ns = self.short_ns.swap(short.as_nanos() as u64, Ordering::Relaxed);
        if was_ns == 0 && !short.is_zero() {
            tracing::warn!(
                ?short,
                "the servers' log is full and does not reach back as far as patterns look: raise cluster.max_bytes and NATS's room"
            );
        }
    }

    fn lock_troubles(&self) -> MutexGuard<'_, Troubles> {
        self.troubles.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why the log cannot be used; [`None`] while it can.
    pub fn trouble(&self) -> Option<String> {
        let troubles = self.lock_troubles();
        troubles.writing.clone().or_else(|| troubles.reading.clone())
    }

    /// Sets the trouble of writing. Returns true if it changed.
    pub(super) fn set_trouble(&self, trouble: Option<String>) -> bool {
        let mut troubles = self.lock_troubles();
        let is_new = troubles.writing != trouble;
        troubles.writing = trouble;
        is_new
    }

    /// Sets the trouble of reading. Returns true if it changed.
    pub(super) fn set_read_trouble(&self, trouble: Option<String>) -> bool {
        let mut troubles = self.lock_troubles();
        let is_new = troubles.reading != trouble;
        troubles.reading = trouble;
        is_new
    }

    /// Why this server may not know all that happened, and what NATS said; [`None`] when it knows.
    pub fn doubt(&self) -> Option<String> {
        let doubt = match (self.is_alone(), self.is_caught_up()) {
            (true, _) => "the servers' log is away: it knows what its own collectors say, and not of every server",
            (false, false) => "it has not read the servers' log to its end yet, and may not know of every server",
            (false, true) if self.is_healing() => "what the servers' log had lost is being sent again from the archive",
            (false, true) => return None,
        };
        Some(match self.trouble() {
            Some(trouble) => format!("{doubt}; {trouble}"),
            None => doubt.to_owned(),
        })
    }
}
