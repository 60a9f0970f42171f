//! The outbox: frames from the packer until the server has acknowledged them.
//!
//! What enters: sealed frames. What leaves: stamped frames, lethal ones first, in sequence, again after a reconnect
//! while they are not acknowledged. What must hold: its bytes stay within the limit, since the packer asks
//! [`Outbox::open_lanes`] first. A frame gets its `seq` when it is first sent, so that `seq` has no gaps. A bulk frame
//! can be evicted for a lethal one only before it has a `seq`, and is then counted.
//!
//! With a spool the middle of the sequence may be on disk (`crate::outbox::spool`), moved by a thread of its own (`outbox/spooling.rs`):
//!
//! ```text
//!  acknowledged │ sent: stamped, in memory │ on disk │ being written │ without a seq: lethal, bulk, last
//!               └──► stream                └─ loaded ◄┘   └─ written ◄┘  └─ stamped in this order when memory runs short
//! ```
//!
//! What must hold then: a frame leaves memory only after it is synced. While anything is on disk every frame goes
//! there, so that the sequence has no gaps. The disk begins at the oldest frame that is not acknowledged, so that a
//! server can go on from there after this process has died.
//!
//! A frame that can never be delivered ends the epoch (`outbox/ending.rs`): the frames behind it are those of the next one.

mod ending;
pub mod epochs;
pub mod frame_times;
pub mod links;
pub mod metrics;
pub mod pack;
pub mod queue;
pub mod shift;
pub mod spool;
pub mod spool_thread;
mod spooling;
mod state;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use crossbeam::sync::Unparker;
use tapio_wire::event::{Lane, SOURCES, Source};
use tapio_wire::frame::{SealedFrame, Stamp};
use tapio_wire::ledger::{Ledger, Reason, Stage};
use tokio::sync::Notify;

use crate::base::books::Books;
use crate::base::clock::{boottime_ns, realtime_ns};
use crate::outbox::epochs::EndedEpochs;
use crate::outbox::frame_times::FrameTimes;
use crate::outbox::links::Links;
use crate::outbox::queue::{OpenLanes, Queues};
use crate::outbox::shift::relative;
use crate::outbox::spool::Left;

use self::ending::Closing;
use self::state::{OutboxState, Sent, Unsent};

/// The share of the limit that bulk frames may use; the rest is the lethal lane's.
const BULK_SHARE: f64 = 0.75;
/// What a frame occupies beside its bytes: the room for its ledger, its times, its place in the queue.
const FRAME_OVERHEAD_BYTES: usize = 1536;

/// The times of an acknowledged frame.
pub struct Acknowledged {
    pub times: FrameTimes,
    pub sent_ns: u64,
}

/// Keeps frames until the server acknowledges them.
pub struct Outbox {
    state: Mutex<OutboxState>,
    books: Arc<Books>,
    queues: Arc<Queues>,
    node: u64,
    epoch: AtomicU64,
    limit_bytes: usize,
    /// Wakes the spool's thread, where there is one.
    spool: Option<Unparker>,
    /// True if it holds an earlier epoch's frames.
    is_replay: bool,
    /// True if it holds only the closing frame of an epoch that has ended.
    is_closing: bool,
    /// The next epoch that there is already: one that follows on this one must be older.
    epoch_limit: u64,
    generation: Arc<AtomicU64>,
    ended: Arc<EndedEpochs>,
    /// Wakes the shipper.
    pub changed: Notify,
}

impl Outbox {
    /// An empty outbox for one epoch.
    pub fn new(node: u64, epoch: u64, limit_bytes: usize, links: &Links) -> Self {
        let state = OutboxState { next_seq: 1, ..OutboxState::default() };
        Self {
            state: Mutex::new(state),
            books: Arc::clone(&links.books),
            queues: Arc::clone(&links.queues),
            node,
            epoch: AtomicU64::new(epoch),
            limit_bytes,
            spool: None,
            is_replay: false,
            is_closing: false,
            epoch_limit: u64::MAX,
            generation: Arc::clone(&links.generation),
            ended: Arc::clone(&links.ended),
            changed: Notify::new(),
        }
    }

    /// Moves to the spool what it has no memory for; `unparker` wakes who does that.
    pub fn with_spool(mut self, unparker: Unparker) -> Self {
        self.spool = Some(unparker);
        self
    }

    /// What an earlier run left in the spool: nothing is added, and it is done when all of it is acknowledged. `epoch_limit` is the
    /// epoch that comes after it.
    pub fn replay(left: &Left, epoch_limit: u64, limit_bytes: usize, links: &Links, unparker: Unparker) -> Self {
        let mut outbox = Self::new(left.node, left.epoch, limit_bytes, links).with_spool(unparker);
        outbox.is_replay = true;
        outbox.epoch_limit = epoch_limit;
        let state = outbox.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        state.next_seq = left.last_seq + 1;
        state.acked_seq = left.first_seq - 1;
        state.acked_events = left.acked_events;
        state.on_disk = (left.first_seq <= left.last_seq).then_some((left.first_seq, left.last_seq));
        state.end = left.end.map(Box::new);
        state.closings = left.closings.iter().filter_map(Closing::of).collect();
        state.spooled_seq = left.last_seq;
        state.is_finished = true;
        outbox
    }

    fn state(&self) -> MutexGuard<'_, OutboxState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The node's id.
    pub fn node(&self) -> u64 {
        self.node
    }

    /// Epoch: this run of the collector.
    pub fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Relaxed)
    }

    /// Makes this epoch newer than one that a server knows of this node: the wall clock went back between two runs. False when
    /// a frame of this epoch was sent already, and it cannot change any more.
    pub fn outdo_epoch(&self, newest: u64) -> bool {
        let state = self.state();
        let is_possible = !self.is_replay && state.next_seq == 1 && state.closings.is_empty() && newest < u64::MAX;
        if is_possible {
            self.epoch.fetch_max(newest + 1, Ordering::Relaxed);
        }
        is_possible
    }

    /// Whether it holds nothing but the closing frame of an ended epoch.
    pub fn is_closing(&self) -> bool {
        self.is_closing
    }

    /// Deletes what is left of an earlier epoch that no server takes any more. False for the present epoch.
    pub fn give_up_replay(&self) -> bool {
        if self.is_replay {
            let mut state = self.state();
            state.sent.clear();
            state.on_disk = None;
            state.acked_seq = state.spooled_seq;
            drop(state);
            self.wake_spool();
        }
        self.is_replay
    }

    /// What the packer may bring now.
    pub fn open_lanes(&self) -> OpenLanes {
        let mut state = self.state();
        let open = if (state.bytes as f64) < self.limit_bytes as f64 * BULK_SHARE {
            OpenLanes::Both
        } else if state.bytes < self.limit_bytes || !state.unsent_bulk.is_empty() {
            OpenLanes::Lethal
        } else {
            OpenLanes::None
        };
        state.is_packer_waiting = open != OpenLanes::Both;
        open
    }

    /// Takes a sealed frame whose lane [`Outbox::open_lanes`] names, without waking the shipper: see [`Outbox::wake_shipper`]. A lethal
    /// one may evict the oldest bulk frames that were never sent.
    pub fn push(&self, frame: SealedFrame, times: FrameTimes) {
        let mut state = self.state();
        state.bytes += frame.len() + FRAME_OVERHEAD_BYTES;
        if frame.lane() == Lane::Lethal {
            while state.bytes > self.limit_bytes
                && let Some(unsent) = state.unsent_bulk.pop_front()
            {
                state.bytes -= unsent.frame.len() + FRAME_OVERHEAD_BYTES;
                for source in Source::ALL {
                    let count = u64::from(unsent.frame.source_events()[source as usize]);
                    self.books.source(source).drop_events(Stage::Outbox, Reason::Full, count);
                }
                // It may have carried descriptions.
                self.generation.fetch_add(1, Ordering::Relaxed);
            }
            state.unsent_lethal.push_back(Unsent { frame, times });
        } else {
            state.unsent_bulk.push_back(Unsent { frame, times });
        }
        let is_short = self.is_short(&state);
        drop(state);
        if is_short {
            self.wake_spool();
        }
    }

    /// Wakes the shipper: there are frames that it has not seen.
    pub fn wake_shipper(&self) {
        self.changed.notify_one();
    }

    /// Whether the counters have changed since a frame last stated them.
    pub fn is_statement_due(&self) -> bool {
        let state = self.state();
        state.unsent() == 0 && self.stated(&state) != state.last_stated
    }

    /// Takes the epoch's last frame, which carries the closing counters. Nothing may be pushed after it.
    pub fn finish_with(&self, last: impl FnOnce() -> SealedFrame) {
        let frame = last();
        let mut state = self.state();
        state.bytes += frame.len() + FRAME_OVERHEAD_BYTES;
        state.unsent_last = Some(Unsent { frame, times: FrameTimes::default() });
        state.is_finished = true;
        drop(state);
        self.wake_shipper();
    }

    /// A stream of `epoch` has begun, and the server holds everything up to `durable_seq`: the rest is due again.
    pub fn restart(&self, epoch: u64, durable_seq: u64) {
        self.acknowledge(epoch, durable_seq);
        let mut state = self.state();
        state.resent = 0;
        state.in_flight_bytes = 0;
        state.is_streaming = true;
        drop(state);
        self.wake_spool();
    }

    /// The stream is over: nothing is in flight any more.
    pub fn disconnected(&self) {
        let mut state = self.state();
        state.resent = 0;
        state.in_flight_bytes = 0;
        state.is_streaming = false;
    }

    /// Bytes that were sent on the present stream and are not acknowledged.
    pub fn in_flight_bytes(&self) -> usize {
        self.state().in_flight_bytes
    }

    /// The next frame to send, if `credit_bytes` allow it; a stream with nothing in flight may always send one.
    pub fn next(&self, credit_bytes: u64) -> Option<Bytes> {
        let mut state = self.state();
        let state = &mut *state;
        let fits = |bytes: usize, in_flight: usize| in_flight == 0 || (in_flight + bytes) as u64 <= credit_bytes;
        if state.is_ending {
            return None;
        }
        if let Some(sent) = state.sent.get(state.resent) {
            if sent.seq <= state.suspect_until {
                if state.in_flight_bytes > 0 {
                    return None;
                }
                if let Err(damage) = sent.check(self.epoch()) {
                    state.damage = Some(damage);
                    return None;
                }
            }
            if !fits(sent.bytes.len(), state.in_flight_bytes) {
                return None;
            }
            state.resent += 1;
            state.in_flight_bytes += sent.bytes.len();
            return Some(sent.bytes.clone());
        }
        if state.on_disk.is_some() || !state.spooling.is_empty() {
            self.wake_spool();
            return None;
        }
        let first = state.unsent_lethal.front().or(state.unsent_bulk.front()).or(state.unsent_last.as_ref())?;
        if !fits(first.frame.len(), state.in_flight_bytes) {
            return None;
        }
        let sent = self.stamp_next(state)?;
        let bytes = sent.bytes.clone();
        state.resent += 1;
        state.in_flight_bytes += bytes.len();
        state.sent.push_back(sent);
        Some(bytes)
    }

    /// Gives the next frame its place in the sequence.
    fn stamp_next(&self, state: &mut OutboxState) -> Option<Sent> {
        let lethal = state.unsent_lethal.pop_front();
        let next = lethal.or_else(|| state.unsent_bulk.pop_front()).or_else(|| state.unsent_last.take());
        let Unsent { frame, times } = next?;
        let source_events = *frame.source_events();
        for (shipped, &count) in state.shipped.iter_mut().zip(&source_events) {
            *shipped += u64::from(count);
        }
        let ledger = self.stated(state);
        let sent_ns = boottime_ns();
        let stamp = Stamp {
            node: self.node,
            epoch: self.epoch(),
            seq: state.next_seq,
            boottime_ns: sent_ns,
            realtime_ns: realtime_ns(),
            is_final: state.is_finished && state.unsent() == 0,
        };
        let before = frame.len();
        let bytes = frame.stamp(&stamp, &ledger);
        state.bytes = state.bytes - before + bytes.len();
        state.last_stated = ledger;
        state.next_seq += 1;
        Some(Sent { seq: stamp.seq, source_events, bytes, times, sent_ns, stamped_ns: sent_ns })
    }

    /// Everything of `epoch` up to `durable_seq` is durable; returns what left, for the latency histograms.
    pub fn acknowledge(&self, epoch: u64, durable_seq: u64) -> Vec<Acknowledged> {
        let mut state = self.state();
        if epoch != self.epoch() {
            // It has ended meanwhile.
            return Vec::new();
        }
        state.durable_seq = state.durable_seq.max(durable_seq);
        let mut left = Vec::new();
        while state.sent.front().is_some_and(|sent| sent.seq <= durable_seq) {
            let Some(sent) = state.sent.pop_front() else { break };
            state.bytes -= sent.bytes.len() + FRAME_OVERHEAD_BYTES;
            (state.acked_seq, state.acked_ns) = (sent.seq, sent.stamped_ns);
            for (acked, &count) in state.acked_events.iter_mut().zip(&sent.source_events) {
                *acked += u64::from(count);
            }
            if state.resent > 0 {
                state.resent -= 1;
                state.in_flight_bytes = state.in_flight_bytes.saturating_sub(sent.bytes.len());
            }
            left.push(Acknowledged { times: sent.times, sent_ns: sent.sent_ns });
        }
        let is_packer_waiting = state.is_packer_waiting;
        drop(state);
        if !left.is_empty() {
            if is_packer_waiting {
                self.queues.wake_packer();
            }
            self.wake_spool();
        }
        left
    }

    /// The last frame that was acknowledged, and the events up to it by source.
    pub fn acknowledged(&self) -> (u64, [u64; SOURCES]) {
        let (_, seq, events) = self.standing();
        (seq, events)
    }

    /// Epoch, last acknowledged frame, and acknowledged events by source, read at one moment.
    pub fn standing(&self) -> (u64, u64, [u64; SOURCES]) {
        let state = self.state();
        (self.epoch(), state.acked_seq, state.acked_events)
    }

    /// Whether nothing is left to send or to be acknowledged.
    pub fn is_empty(&self) -> bool {
        let state = self.state();
        state.unsent() == 0 && state.is_all_acknowledged()
    }

    /// Whether the epoch's last frame was taken and acknowledged.
    pub fn is_done(&self) -> bool {
        let state = self.state();
        state.is_finished && state.unsent() == 0 && state.is_all_acknowledged()
    }

    /// Bytes and frames that wait, for metrics.
    pub fn usage(&self) -> (usize, usize) {
        let state = self.state();
        (state.bytes, state.unsent() + state.sent.len())
    }

    /// The ledger as of now, over all epochs of this process.
    pub fn ledger(&self) -> Ledger {
        let state = self.state();
        self.books.snapshot(&state.shipped)
    }

    /// The ledger of the present epoch as of now.
    fn stated(&self, state: &OutboxState) -> Ledger {
        let ledger = self.books.snapshot(&state.shipped);
        state.base.as_ref().map_or(ledger, |base| relative(&ledger, base))
    }
}

#[cfg(test)]
mod tests;
