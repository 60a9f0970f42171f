//! What this server has to say to the others.
//!
//! What enters: clues from the shards, frames as they go to the shards and as the shards are done with them. What leaves: entries
//! in the order in which they hold. What must hold: nobody waits here. What finds no room is left out; then the frames that it
//! came from are not published as covered, so that the archive sends them once more. A stretch is published as covered after
//! everything that its frames led to.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use foldhash::fast::RandomState;
use tapio_wire::event::EntityId;
use tokio::sync::Notify;

use super::coverage::Coverage;
use crate::correlate::batch::{Covered, Entry, Point};
use crate::correlate::clue::{Clue, EvidenceId};
use crate::correlate::{
    BusClosed, ClueBus, Dropped, EntityInfo, FrameBegun, Generations, NodeClock, NodeRef, is_global,
};

/// Entities that clues named, as many as are remembered: their later descriptions are published too.
const NAMED_MAX: usize = 65_536;
/// Entities described lately that no clue has named.
const DESCRIBED_MAX: usize = 4096;
/// How long a node's frames may wait until they are published as covered, where nothing else is published about it.
const COVER_INTERVAL: Duration = Duration::from_secs(5);
/// Time without frames after which a node is forgotten.
const IDLE_MAX: Duration = Duration::from_secs(600);

/// Entries that are worth a message; fewer wait while others are on their way.
pub const ENTRIES_TOGETHER: usize = 1024;

/// Queues what this server has yet to write into the log, by frame.
pub struct Outgoing {
    inner: Mutex<Inner>,
    filled: Notify,
    passed: Condvar,
    entries_max: usize,
}

struct Inner {
    entries: VecDeque<Entry>,
    named: Generations<(u64, EntityId), ()>,
    /// What was described lately and no clue named: a clue of an earlier frame may still be on its way.
    described: Generations<(u64, EntityId), Arc<EntityInfo>>,
    /// Epochs of each node that are not published to their end, the latest last.
    nodes: HashMap<u64, Vec<Epoch>, RandomState>,
    /// What is in the log already, while frames come out of the archive.
    known: Option<Coverage>,
    left_out: u64,
    /// By node and epoch: the last of the frames that only the archive can publish as covered, and it may not be durable there yet.
    owed: HashMap<(u64, u64), u64, RandomState>,
    /// What was taken is not handed on yet.
    is_passing: bool,
    /// Whoever has something to say waits for room: it comes out of the archive.
    waits: bool,
    /// Nobody takes anything any more.
    is_closed: bool,
}

/// A frame on its way through the shards.
struct Pending {
    point: Point,
    is_final: bool,
    is_done: bool,
    /// True if it led to an entry, so that other servers wait for its end.
    led_to_entry: bool,
    /// An entry that it led to was left out.
    is_incomplete: bool,
}

/// The frames of one epoch of a node.
struct Epoch {
    node: NodeRef,
    epoch: u64,
    /// The last frame that went to the shards.
    last_seq: u64,
    /// The log says from where on this server has its frames.
    is_announced: bool,
    pending: VecDeque<Pending>,
    /// The first frame since, and the last one that is done.
    done: Option<(Point, Point, bool)>,
    published: Instant,
    /// One of its done frames led to an entry.
    is_urgent: bool,
}

impl Epoch {
    fn new(node: NodeRef, epoch: u64) -> Self {
        Self {
            node,
            epoch,
            last_seq: 0,
            is_announced: false,
            pending: VecDeque::new(),
            done: None,
            published: Instant::now(),
            is_urgent: false,
        }
    }

    /// Takes up what is done from the first pending frame on. Returns stretches that end before a frame that is incomplete.
    fn advance(&mut self) -> Vec<Covered> {
        let mut cut = Vec::new();
        while let Some(frame) = self.pending.front().filter(|frame| frame.is_done) {
            let (point, is_final, is_incomplete) = (frame.point, frame.is_final, frame.is_incomplete);
            let is_urgent = frame.led_to_entry || is_final;
            self.pending.pop_front();
            let follows = self.done.is_none_or(|(_, last, _)| last.seq.checked_add(1) == Some(point.seq));
            if is_incomplete || !follows {
                cut.extend(self.take());
            }
            if !is_incomplete {
                let from = self.done.map_or(point, |(from, ..)| from);
                self.done = Some((from, point, is_final));
                self.is_urgent |= is_urgent;
            }
        }
        cut
    }

    fn take(&mut self) -> Option<Covered> {
        let (from, to, is_final) = self.done.take()?;
        self.published = Instant::now();
        self.is_urgent = false;
        Some(Covered { node: self.node.clone(), epoch: self.epoch, from, to, is_final })
    }
}

impl Outgoing {
    /// Holds at most `entries_max` entries.
    pub fn new(entries_max: usize) -> Self {
        Self {
            inner: Mutex::new(Inner {
                entries: VecDeque::new(),
                named: Generations::new(NAMED_MAX),
                described: Generations::new(DESCRIBED_MAX),
                nodes: HashMap::default(),
                known: None,
                left_out: 0,
                owed: HashMap::default(),
                is_passing: false,
                waits: false,
                is_closed: false,
            }),
            filled: Notify::new(),
            passed: Condvar::new(),
            entries_max: entries_max.max(1),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Frames come out of the archive: what is in the log already is not published again, and whoever has an entry waits for
    /// room.
    pub fn begin_replay(&self, known: Coverage) {
        let mut inner = self.lock();
        inner.known = Some(known);
        inner.waits = true;
    }

    /// Frames come from collectors from now on.
    pub fn end_replay(&self) {
        let mut inner = self.lock();
        inner.known = None;
        inner.waits = false;
    }

    /// Locks the queue when it has space for what one frame or clue may add, and waits for that.
    fn lock_with_room(&self) -> MutexGuard<'_, Inner> {
        let mut inner = self.lock();
        while inner.waits && !inner.is_closed && inner.entries.len() >= self.entries_max {
            self.filled.notify_one();
            inner = self.passed.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
        inner
    }

    /// Waits until there is something to publish.
    pub async fn filled(&self) {
        self.filled.notified().await;
    }

    /// Everything that is to be published now, in order: first entries, then how far they reach.
    pub fn take(&self) -> Vec<Entry> {
        let mut inner = self.lock();
        let mut entries: Vec<Entry> = inner.entries.drain(..).collect();
        inner.is_passing = true;
        let now = Instant::now();
        let mut covered: Vec<Covered> = Vec::new();
        inner.nodes.retain(|_, epochs| {
            let last = epochs.len() - 1;
            let mut index = 0;
            epochs.retain_mut(|epoch| {
                let is_past = index < last;
                index += 1;
                if is_past || epoch.is_urgent || now.duration_since(epoch.published) >= COVER_INTERVAL {
                    covered.extend(epoch.take());
                }
                let is_idle = is_past || now.duration_since(epoch.published) >= IDLE_MAX;
                !epoch.pending.is_empty() || epoch.done.is_some() || !is_idle
            });
            !epochs.is_empty()
        });
        covered.sort_unstable_by_key(|covered| (covered.node.id, covered.epoch));
        entries.extend(covered.into_iter().map(Entry::Covered));
        entries
    }

    /// The log that took entries has lost them: none of the frames so far is published as covered, but by what comes out of the
    /// archive.
    pub fn forget_covered(&self) {
        let mut inner = self.lock();
        let Inner { entries, nodes, known, owed, .. } = &mut *inner;
        entries.retain(|entry| !matches!(entry, Entry::Covered(covered) if !covered.is_empty()));
        if let Some(known) = known {
            *known = Coverage::default();
        }
        for (node, epochs) in nodes {
            for epoch in epochs {
                (epoch.done, epoch.is_urgent, epoch.is_announced) = (None, false, false);
                epoch.pending.iter_mut().for_each(|frame| frame.is_incomplete = true);
                owed.insert((*node, epoch.epoch), epoch.last_seq);
            }
        }
    }

    /// Whether the log still lacks frames that the archive must publish.
    pub fn owes(&self, known: &Coverage) -> bool {
        let owed = &mut self.lock().owed;
        owed.retain(|(node, epoch), seq| !known.has(*node, *epoch, *seq));
        !owed.is_empty()
    }

    /// Frames that did not become durable come again from their collectors.
    pub fn forget_owed(&self) {
        self.lock().owed.clear();
    }

    /// No frame comes any more: what is done is published as covered at once.
    pub fn flush(&self) {
        for epoch in self.lock().nodes.values_mut().flatten() {
            epoch.is_urgent = true;
        }
        self.filled.notify_one();
    }

    /// What was taken was handed on.
    pub fn passed(&self) {
        let was_passing = std::mem::take(&mut self.lock().is_passing);
        if was_passing {
            self.passed.notify_all();
        }
    }

    /// Waits until everything was taken and handed on. The publisher must be running.
    pub fn wait_passed(&self) {
        let mut inner = self.lock();
        while !inner.is_closed && (!inner.entries.is_empty() || inner.is_passing) {
            self.filled.notify_one();
            inner = self.passed.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Nobody takes anything any more: nobody waits either.
    pub fn close(&self) {
        self.lock().is_closed = true;
        self.passed.notify_all();
    }

    /// Entries that found no room so far.
    pub fn left_out(&self) -> u64 {
        self.lock().left_out
    }

    /// Returns how many may wait for one message: few enough to leave space for others.
    pub fn together(&self) -> usize {
        ENTRIES_TOGETHER.min(self.entries_max / 2).max(1)
    }

    /// How many entries may wait.
    pub fn entries_max(&self) -> usize {
        self.entries_max
    }

    /// Entries that wait.
    pub fn len(&self) -> usize {
        self.lock().entries.len()
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Inner {
    fn is_known(&self, node: u64, epoch: u64, seq: u64) -> bool {
        self.known.as_ref().is_some_and(|known| known.has(node, epoch, seq))
    }

    /// Whether there was room; without, the frame that it is about counts as incomplete.
    fn push(&mut self, entries_max: usize, about: Option<(u64, u64, u64)>, entry: Entry) -> bool {
        if self.entries.len() < entries_max {
            self.entries.push_back(entry);
            return true;
        }
        self.left_out += 1;
        let Some((node, epoch, seq)) = about else { return false };
        if let Some(frame) = self.frame((node, epoch, seq)) {
            frame.is_incomplete = true;
            let last = self.owed.entry((node, epoch)).or_insert(seq);
            *last = seq.max(*last);
        }
        false
    }

    fn frame(&mut self, (node, epoch, seq): (u64, u64, u64)) -> Option<&mut Pending> {
        let epoch = self.nodes.get_mut(&node)?.iter_mut().find(|known| known.epoch == epoch)?;
        epoch.pending.iter_mut().find(|frame| frame.point.seq == seq)
    }

    /// Other servers must learn at once when this frame is complete.
    fn mark_urgent(&mut self, about: (u64, u64, u64)) {
        if let Some(frame) = self.frame(about) {
            frame.led_to_entry = true;
        }
    }
}

impl ClueBus for Outgoing {
    fn publish(&self, clue: Clue) -> Result<(), BusClosed> {
        let mut inner = self.lock_with_room();
        let EvidenceId { node, epoch, seq, .. } = clue.evidence;
        if inner.is_known(node, epoch, seq) {
            return Ok(());
        }
        let key = (if clue.entity.kind.is_some_and(is_global) { 0 } else { clue.entity.node.id }, clue.entity.id);
        inner.named.insert(key, ());
        inner.mark_urgent((node, epoch, seq));
        let described = inner.described.remove(&key).filter(|described| *described != clue.entity);
        inner.push(self.entries_max, Some((node, epoch, seq)), Entry::Clue(Box::new(clue)));
        if let Some(described) = described {
            inner.push(self.entries_max, Some((node, epoch, seq)), Entry::Described(described));
        }
        // Whoever takes them takes all that wait: one wakeup is enough for as many as a message has.
        let together = self.together();
        let is_news = inner.entries.len() % together == 1 % together;
        drop(inner);
        if is_news {
            self.filled.notify_one();
        }
        Ok(())
    }

    fn clock(&self, clock: NodeClock) {
        // The next one comes soon.
        self.lock().push(self.entries_max, None, Entry::Clock(clock));
        self.filled.notify_one();
    }

    fn follows_frames(&self) -> bool {
        true
    }

    fn began(&self, begun: &FrameBegun<'_>) {
        let header = begun.frame.header();
        let mut inner = self.lock_with_room();
        if inner.is_known(header.node, header.epoch, header.seq) {
            return;
        }
        let dropped = Dropped::of(begun.frame.ledger());
        let Inner { nodes, entries, .. } = &mut *inner;
        let epochs = nodes.entry(header.node).or_default();
        if epochs.iter().all(|known| known.epoch != header.epoch) {
            epochs.push(Epoch::new(begun.node.clone(), header.epoch));
        }
        if let Some(epoch) = epochs.iter_mut().find(|known| known.epoch == header.epoch) {
            epoch.node = begun.node.clone();
            epoch.last_seq = header.seq;
            let (seq, boottime_ns, realtime_ns) = (header.seq, header.boottime_ns, header.realtime_ns);
            let point = Point { seq, boottime_ns, realtime_ns, dropped };
            if !std::mem::replace(&mut epoch.is_announced, true) {
                // Before anything of it: what went elsewhere before is missing until somebody has it.
                let here = Covered::from_here(begun.node.clone(), header.epoch, point);
                entries.push_back(Entry::Covered(here));
            }
            epoch.pending.push_back(Pending {
                point,
                is_final: header.is_final,
                is_done: false,
                led_to_entry: false,
                is_incomplete: false,
            });
        }
        let about = (header.node, header.epoch, header.seq);
        let mut is_queued = false;
        for entity in &begun.described {
            let is_global = entity.kind.is_some_and(is_global);
            if is_global || inner.named.get(&(entity.node.id, entity.id)).is_some() {
                is_queued |= inner.push(self.entries_max, Some(about), Entry::Described(Arc::clone(entity)));
            } else {
                inner.described.insert((entity.node.id, entity.id), Arc::clone(entity));
            }
        }
        if let Some(interval) = begun.lost.filter(|interval| interval.lost.events > 0) {
            is_queued |= inner.push(
                self.entries_max,
                Some(about),
                Entry::Lost { node: header.node, epoch: header.epoch, seq: header.seq, interval },
            );
            inner.mark_urgent(about);
        }
        drop(inner);
        if is_queued {
            self.filled.notify_one();
        }
    }

    fn done(&self, node: u64, epoch: u64, seq: u64) {
        let mut inner = self.lock();
        let Some(epochs) = inner.nodes.get_mut(&node) else { return };
        let Some(known) = epochs.iter_mut().find(|known| known.epoch == epoch) else { return };
        let Some(frame) = known.pending.iter_mut().find(|frame| frame.point.seq == seq) else { return };
        frame.is_done = true;
        let cut = known.advance();
        let is_urgent = known.is_urgent;
        // There is no more of them than there are frames, so they always find room.
        inner.entries.extend(cut.into_iter().map(Entry::Covered));
        drop(inner);
        if is_urgent {
            self.filled.notify_one();
        }
    }
}
