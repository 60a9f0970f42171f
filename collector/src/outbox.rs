//! The outbox: frames from the packer until the server has acknowledged them.
//!
//! What enters: sealed frames. What leaves: stamped frames, lethal ones first, in sequence, again after a reconnect while they
//! are not acknowledged. What must hold: its bytes stay within the limit, since the packer asks [`Outbox::room`] first; a
//! frame gets its `seq` when it is first sent, so that `seq` has no gaps; a bulk frame can be evicted for a lethal one only
//! before it has a `seq`, and is then counted.
//!
//! With a spool the middle of the sequence may be on disk (`crate::spool`), moved by a thread of its own (`outbox/spooling.rs`):
//!
//! ```text
//!  acknowledged │ sent: stamped, in memory │ on disk │ being written │ without a seq: lethal, bulk, last
//!               └──► stream                └─ loaded ◄┘   └─ written ◄┘  └─ stamped in this order when memory runs short
//! ```
//!
//! What must hold then: a frame leaves memory only after it is synced; while anything is on disk every frame goes there, so
//! that the sequence has no gaps; what is on disk begins at the oldest frame that is not acknowledged, so that a server can go
//! on from there after this process has died.

mod spooling;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use crossbeam::sync::Unparker;
use tapio_wire::event::{Lane, SOURCES, Source};
use tapio_wire::frame::{SealedFrame, Stamp};
use tapio_wire::ledger::{Ledger, Reason, Stage};
use tokio::sync::Notify;

use crate::books::Books;
use crate::latency::{FrameTimes, boottime_ns, realtime_ns};
use crate::queue::Queues;
use crate::shared::Shared;
use crate::spool::Left;

pub use self::spooling::SPOOL_BATCH_BYTES;

/// The share of the limit that bulk frames may use; the rest is the lethal lane's.
const BULK_SHARE: f64 = 0.75;
/// What a frame occupies beside its bytes: the room for its ledger, its times, its place in the queue.
const FRAME_OVERHEAD_BYTES: usize = 1536;

/// What the packer may bring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Room {
    /// Frames of both lanes.
    Both,
    /// Lethal frames only.
    Lethal,
    /// Nothing: what is not yet packed waits in the queues, and behind them in the rings.
    None,
}

struct Unsent {
    frame: SealedFrame,
    times: FrameTimes,
}

struct Sent {
    seq: u64,
    source_events: [u32; SOURCES],
    bytes: Bytes,
    times: FrameTimes,
    /// `CLOCK_BOOTTIME` when it was first sent.
    sent_ns: u64,
}

#[derive(Default)]
struct State {
    unsent_lethal: VecDeque<Unsent>,
    unsent_bulk: VecDeque<Unsent>,
    /// The epoch's last frame, which goes when all others have gone.
    unsent_last: Option<Unsent>,
    /// Sent and not acknowledged, in sequence; the first `resent` of them went out on the present stream.
    sent: VecDeque<Sent>,
    resent: usize,
    /// First and last `seq` of what is on disk and not in memory.
    on_disk: Option<(u64, u64)>,
    /// Stamped, and being written.
    spooling: VecDeque<Sent>,
    /// The last `seq` that was ever written.
    spooled_seq: u64,
    /// The last `seq` that was taken to be written; what is stamped meanwhile is not among it.
    taken_seq: u64,
    /// The spool had no room, or the disk failed, a moment ago.
    is_spool_full: bool,
    /// Everything is to go to the spool, since the process ends.
    is_flushing: bool,
    is_streaming: bool,
    /// What a server said is durable, though it was not loaded from the spool yet.
    durable_seq: u64,
    bytes: usize,
    in_flight_bytes: usize,
    next_seq: u64,
    shipped: [u64; SOURCES],
    acked_seq: u64,
    acked_events: [u64; SOURCES],
    last_stated: Ledger,
    is_finished: bool,
    /// The packer was refused room, and wants to know when there is some.
    is_packer_waiting: bool,
}

impl State {
    /// Bytes of the frame that would be stamped next.
    fn next_len(&self) -> Option<usize> {
        let next = self.unsent_lethal.front().or(self.unsent_bulk.front()).or(self.unsent_last.as_ref());
        next.map(|unsent| unsent.frame.len())
    }

    /// Nothing that was stamped waits for an acknowledgement.
    fn is_all_acknowledged(&self) -> bool {
        self.sent.is_empty() && self.on_disk.is_none() && self.spooling.is_empty()
    }

    /// Frames that were never sent.
    fn unsent(&self) -> usize {
        self.unsent_lethal.len() + self.unsent_bulk.len() + usize::from(self.unsent_last.is_some())
    }
}

/// What an acknowledged frame tells about time.
pub struct Acknowledged {
    pub times: FrameTimes,
    pub sent_ns: u64,
}

/// See the module.
pub struct Outbox {
    state: Mutex<State>,
    books: Arc<Books>,
    queues: Arc<Queues>,
    node: u64,
    epoch: AtomicU64,
    limit_bytes: usize,
    /// Wakes the spool's thread, where there is one.
    spool: Option<Unparker>,
    /// It holds an earlier epoch's frames.
    is_replay: bool,
    generation: Arc<AtomicU64>,
    /// Wakes the shipper.
    pub changed: Notify,
}

impl Outbox {
    /// An empty outbox for one epoch.
    pub fn new(node: u64, epoch: u64, limit_bytes: usize, shared: &Shared) -> Self {
        let state = State { next_seq: 1, ..State::default() };
        Self {
            state: Mutex::new(state),
            books: Arc::clone(&shared.books),
            queues: Arc::clone(&shared.queues),
            node,
            epoch: AtomicU64::new(epoch),
            limit_bytes,
            spool: None,
            is_replay: false,
            generation: Arc::clone(&shared.generation),
            changed: Notify::new(),
        }
    }

    /// Moves to the spool what it has no memory for; `unparker` wakes who does that.
    pub fn with_spool(mut self, unparker: Unparker) -> Self {
        self.spool = Some(unparker);
        self
    }

    /// What an earlier run left in the spool: nothing is added, and it is done when all of it is acknowledged.
    pub fn replay(left: &Left, limit_bytes: usize, shared: &Shared, unparker: Unparker) -> Self {
        let mut outbox = Self::new(left.node, left.epoch, limit_bytes, shared).with_spool(unparker);
        outbox.is_replay = true;
        let state = outbox.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        state.next_seq = left.last_seq + 1;
        state.acked_seq = left.first_seq - 1;
        state.acked_events = left.acked_events;
        state.on_disk = Some((left.first_seq, left.last_seq));
        state.spooled_seq = left.last_seq;
        state.is_finished = true;
        outbox
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The node's id.
    pub fn node(&self) -> u64 {
        self.node
    }

    /// This run of the collector.
    pub fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Relaxed)
    }

    /// Makes this epoch newer than one that a server knows of this node: the wall clock went back between two runs. False when
    /// a frame of this epoch was sent already, and it cannot change any more.
    pub fn outdo_epoch(&self, newest: u64) -> bool {
        let state = self.state();
        let is_possible = state.next_seq == 1 && newest < u64::MAX;
        if is_possible {
            self.epoch.fetch_max(newest + 1, Ordering::Relaxed);
        }
        is_possible
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
    pub fn room(&self) -> Room {
        let mut state = self.state();
        let room = if (state.bytes as f64) < self.limit_bytes as f64 * BULK_SHARE {
            Room::Both
        } else if state.bytes < self.limit_bytes || !state.unsent_bulk.is_empty() {
            Room::Lethal
        } else {
            Room::None
        };
        state.is_packer_waiting = room != Room::Both;
        room
    }

    /// Takes a sealed frame for which there was [`Outbox::room`]; the shipper is not told: see [`Outbox::wake_shipper`]. A lethal
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
        state.unsent() == 0 && self.books.snapshot(&state.shipped) != state.last_stated
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

    /// A stream has begun, and the server holds everything up to `durable_seq`: the rest is due again.
    pub fn restart(&self, durable_seq: u64) {
        self.acknowledge(durable_seq);
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
        if let Some(sent) = state.sent.get(state.resent) {
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
    fn stamp_next(&self, state: &mut State) -> Option<Sent> {
        let lethal = state.unsent_lethal.pop_front();
        let next = lethal.or_else(|| state.unsent_bulk.pop_front()).or_else(|| state.unsent_last.take());
        let Unsent { frame, times } = next?;
        let source_events = *frame.source_events();
        for (shipped, &count) in state.shipped.iter_mut().zip(&source_events) {
            *shipped += u64::from(count);
        }
        let ledger = self.books.snapshot(&state.shipped);
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
        Some(Sent { seq: stamp.seq, source_events, bytes, times, sent_ns })
    }

    /// Everything up to `durable_seq` is durable; returns what left, for the latency histograms.
    pub fn acknowledge(&self, durable_seq: u64) -> Vec<Acknowledged> {
        let mut state = self.state();
        state.durable_seq = state.durable_seq.max(durable_seq);
        let mut left = Vec::new();
        while state.sent.front().is_some_and(|sent| sent.seq <= durable_seq) {
            let Some(sent) = state.sent.pop_front() else { break };
            state.bytes -= sent.bytes.len() + FRAME_OVERHEAD_BYTES;
            state.acked_seq = sent.seq;
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
        let state = self.state();
        (state.acked_seq, state.acked_events)
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

    /// The ledger as of now.
    pub fn ledger(&self) -> Ledger {
        let state = self.state();
        self.books.snapshot(&state.shipped)
    }
}

#[cfg(test)]
mod tests {
    use tapio_wire::compress::Compression;
    use tapio_wire::event::{Body, Detail, Event};
    use tapio_wire::frame::{Encoder, Header};

    use super::*;
    use crate::config::Config;

    fn frame(lane: Lane, events: usize) -> SealedFrame {
        let detail = match lane {
            Lane::Lethal => Detail::CgroupMade { path: 0 },
            Lane::Bulk => Detail::RunQueue { wait_ns: 1 },
        };
        let event = Event { time_ns: 1, entity: 1, pid: 1, source: Source::Shm, body: detail };
        let body = Body { events: vec![event; events], ..Body::default() };
        Encoder::default().seal(&body, lane, Compression::None).expect("within the limits")
    }

    fn outbox(limit: usize) -> Outbox {
        let (queues, _parker) = Queues::new(4);
        Outbox::new(7, 1, limit, &Shared::for_config(&Config::default(), queues))
    }

    fn seq(bytes: &Bytes) -> u64 {
        Header::check(bytes).expect("a whole frame").0.seq
    }

    #[test]
    fn unacknowledged_frames_are_sent_again_in_order_after_a_restart() {
        let outbox = outbox(1 << 20);
        for _ in 0..3 {
            outbox.push(frame(Lane::Bulk, 10), FrameTimes::default());
        }
        let sent: Vec<u64> = std::iter::from_fn(|| outbox.next(u64::MAX)).map(|bytes| seq(&bytes)).collect();
        assert_eq!(sent, [1, 2, 3]);
        assert_eq!(outbox.acknowledge(1).len(), 1);
        outbox.restart(2);
        let again: Vec<u64> = std::iter::from_fn(|| outbox.next(u64::MAX)).map(|bytes| seq(&bytes)).collect();
        assert_eq!(again, [3]);
        outbox.acknowledge(3);
        assert!(outbox.is_empty());
    }

    #[test]
    fn credit_bounds_what_is_in_flight_and_acks_free_it() {
        let outbox = outbox(1 << 20);
        for _ in 0..3 {
            outbox.push(frame(Lane::Bulk, 10), FrameTimes::default());
        }
        let first = outbox.next(1).expect("one is always allowed");
        assert!(outbox.next(first.len() as u64).is_none());
        outbox.acknowledge(1);
        assert!(outbox.next(1).is_some());
    }

    #[test]
    fn a_lethal_frame_evicts_unsent_bulk_and_counts_it() {
        let one = frame(Lane::Bulk, 100).len();
        let outbox = outbox(2 * (one + FRAME_OVERHEAD_BYTES) + 200);
        outbox.push(frame(Lane::Bulk, 100), FrameTimes::default());
        outbox.push(frame(Lane::Bulk, 100), FrameTimes::default());
        assert_eq!(outbox.room(), Room::Lethal);
        outbox.push(frame(Lane::Lethal, 5), FrameTimes::default());
        let ledger = outbox.ledger();
        assert_eq!(ledger.account(Source::Shm).dropped_total(), 100);
        let lanes: Vec<u32> = std::iter::from_fn(|| outbox.next(u64::MAX))
            .map(|bytes| Header::check(&bytes).expect("whole").0.lethal_events)
            .collect();
        assert_eq!(lanes, [5, 0], "the lethal frame does not wait behind bulk");
        outbox.acknowledge(2);
        assert_eq!(outbox.usage(), (0, 0));
    }

    #[test]
    fn a_full_outbox_that_can_evict_nothing_takes_nothing() {
        let one = frame(Lane::Lethal, 100).len();
        let outbox = outbox(one);
        outbox.push(frame(Lane::Lethal, 100), FrameTimes::default());
        assert_eq!(outbox.room(), Room::None);
    }

    fn with_spool(limit: usize) -> (Outbox, crossbeam::sync::Parker) {
        let parker = crossbeam::sync::Parker::new();
        (outbox(limit).with_spool(parker.unparker().clone()), parker)
    }

    #[test]
    fn what_is_stamped_while_the_spool_writes_is_not_taken_for_written() {
        let (outbox, _parker) = with_spool(1 << 20);
        outbox.push(frame(Lane::Bulk, 10), FrameTimes::default());
        outbox.next(u64::MAX).expect("sent");
        outbox.flush();
        let taken = outbox.take_for_spool(1 << 20);
        assert_eq!(taken.iter().map(seq).collect::<Vec<_>>(), [1]);
        outbox.push(frame(Lane::Lethal, 1), FrameTimes::default());
        assert_eq!(outbox.next(u64::MAX).as_ref().map(seq), Some(2), "the stream goes on meanwhile");
        outbox.spooled(true);
        let taken = outbox.take_for_spool(1 << 20);
        assert_eq!(taken.iter().map(seq).collect::<Vec<_>>(), [2]);
    }

    #[test]
    fn a_disk_that_refuses_does_not_make_bulk_unsheddable() {
        let one = frame(Lane::Bulk, 100).len() + FRAME_OVERHEAD_BYTES;
        let (outbox, _parker) = with_spool(6 * one);
        for round in 0..6 {
            outbox.push(frame(Lane::Bulk, 100), FrameTimes::default());
            // The spool's bound leaves room; the disk does not.
            let is_tried = !outbox.take_for_spool(1 << 20).is_empty();
            assert_eq!(is_tried, round >= 2, "from half of the memory on");
            if is_tried {
                outbox.spooled(false);
            }
        }
        for _ in 0..5 {
            outbox.push(frame(Lane::Lethal, 100), FrameTimes::default());
        }
        let shed = outbox.ledger().account(Source::Shm).dropped_total();
        assert_eq!(shed, 300, "all but those that were stamped for the first try");
    }

    #[test]
    fn an_epoch_older_than_the_servers_is_outdone_until_a_frame_was_sent() {
        let outbox = outbox(1 << 20);
        assert!(outbox.outdo_epoch(41));
        assert_eq!(outbox.epoch(), 42);
        outbox.push(frame(Lane::Bulk, 1), FrameTimes::default());
        outbox.next(u64::MAX);
        assert!(!outbox.outdo_epoch(50));
    }

    #[test]
    fn the_last_frame_of_a_finished_outbox_is_final_and_states_all() {
        let outbox = outbox(1 << 20);
        outbox.books.source(Source::Shm).set_emitted(20);
        outbox.push(frame(Lane::Bulk, 10), FrameTimes::default());
        outbox.finish_with(|| frame(Lane::Bulk, 10));
        let first = Header::check(&outbox.next(u64::MAX).expect("a frame")).expect("whole");
        let last = Header::check(&outbox.next(u64::MAX).expect("a frame")).expect("whole");
        assert!(!first.0.is_final && last.0.is_final);
        assert_eq!((first.1.account(Source::Shm).held(), last.1.account(Source::Shm).held()), (10, 0));
    }
}
