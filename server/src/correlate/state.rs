//! What a shard remembers of its entities.
//!
//! What enters: every event of an entity, by kind. What leaves: at most one burst a kind and refresh interval. What must hold:
//! constant time an event, and [`ENTITY_BYTES_MAX`] bytes an entity. One that was short of memory or CPU takes
//! [`BURSTS_BYTES_MAX`] more. There are never more than the configured number of entities, and every entity that had to make room
//! is counted. Entities that were quiet for the window expire by a time wheel. Each stands in the slot of the tick at which it
//! has to be looked at again, and only there.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::BuildHasher;
use std::time::Duration;

use foldhash::fast::RandomState;
use tapio_wire::event::{ArchivedBody, ArchivedDetail, ArchivedHistogram, EntityId, Measure};

use super::clue::{About, Burst, ClueKind};
use super::generations::Generations;

/// Bytes that an entity takes in the table, its fingerprint included, and what it takes besides once it was counted by itself.
const ENTITY_BYTES_MAX: usize = 16;
const BURSTS_BYTES_MAX: usize = 64;

const BURSTS: usize = 3;
const SLOTS: usize = 64;
/// Ticks after which a quiet entity expires.
const WINDOW_TICKS: u32 = 32;
/// Entities looked at to find one that may be evicted.
const EVICTION_TRIES: usize = 8;
/// Bursts by what their events have in common that one shard remembers: a hostile entity cannot make it more. Half of them fill a
/// table of 32,768 places to the 7/8 at which it would grow.
const KEYED_MAX: usize = 57_344;
/// A burst that goes on is reported again this often.
const BURST_REFRESH_MS: u32 = 10_000;

const _: () = assert!((WINDOW_TICKS as usize) < SLOTS - 1);
const _: () = assert!(size_of::<(Fingerprint, EntityState)>() <= ENTITY_BYTES_MAX);
const _: () = assert!(size_of::<[BurstState; BURSTS]>() <= BURSTS_BYTES_MAX);

/// An entity and its node.
pub type Key = (u64, EntityId);

/// What distinguishes entities in a table: the seeded hash of their [`Key`]. Ids are hashes of 64 bits themselves; two of a
/// million entities are taken for one in 3 of 100 million tables, and then their bursts are counted together.
type Fingerprint = u64;

/// When events of a kind are a burst: this many, or stalls of this length together, within its window.
struct Threshold {
    kind: ClueKind,
    count: u32,
    stall_us: u32,
    window_ms: u32,
}

const fn threshold(kind: ClueKind, count: u32, stall_us: u32, window_ms: u32) -> Threshold {
    Threshold { kind, count, stall_us, window_ms }
}

/// Kinds that are counted by entity alone, and are frequent: they have their place in its state.
const PLAIN: [Threshold; BURSTS] = [
    threshold(ClueKind::ReclaimBurst, 8, 10_000, 1000),
    threshold(ClueKind::DirectReclaimBurst, 8, 10_000, 1000),
    threshold(ClueKind::RunQueueBurst, 20, 500_000, 1000),
];

// Those that are counted by what their events have in common too. Clients back off: a few refusals are enough.
const REFUSED: Threshold = threshold(ClueKind::RefusedBurst, 3, u32::MAX, 10_000);
const RETRANSMIT: Threshold = threshold(ClueKind::RetransmitBurst, 10, u32::MAX, 1000);
/// The kernel asks again after 1, 2 and 4 seconds.
const SYN_RETRANSMIT: Threshold = threshold(ClueKind::SynRetransmitBurst, 3, u32::MAX, 30_000);
const SYSCALL_ERROR: Threshold = threshold(ClueKind::SyscallErrorBurst, 100, u32::MAX, 1000);
/// An error that means that something is exhausted or broken counts the first time.
const SYSCALL_EXHAUSTED: Threshold = threshold(ClueKind::SyscallErrorBurst, 1, u32::MAX, 1000);
const SLOW_IO: Threshold = threshold(ClueKind::SlowIoBurst, 10, 1_000_000, 1000);
const IO_ERROR: Threshold = threshold(ClueKind::IoErrorBurst, 1, u32::MAX, 1000);
const PACKET_DROP: Threshold = threshold(ClueKind::PacketDropBurst, 100, u32::MAX, 1000);
const DNS_FAILURE: Threshold = threshold(ClueKind::DnsFailureBurst, 3, u32::MAX, 10_000);
const SLOW_SHARE: Threshold = threshold(ClueKind::SlowShare, 1, u32::MAX, 1000);

/// `errno` values of [`SYSCALL_EXHAUSTED`]: EIO, EAGAIN, ENOMEM, ENFILE, EMFILE, ENOSPC, EROFS, EDQUOT.
const EXHAUSTED: [u32; 8] = [5, 11, 12, 23, 24, 28, 30, 122];
/// Slots of a histogram from which on an operation is slow: about a second for I/O and DNS, 131 ms for a CPU.
const SLOW_SLOT: usize = 20;
const SLOW_RUN_QUEUE_SLOT: usize = 17;
/// A share of slow operations is reported from one of this many on.
const SLOW_SHARE_PARTS: u64 = 1000;

/// Where a bulk event counts: by which rule, how many it stands for, its stall, what it has in common with others.
struct Contribution {
    rule: &'static Threshold,
    count: u32,
    stall_us: u32,
    about: About,
}

fn us(ns: u64) -> u32 {
    u32::try_from(ns / 1000).unwrap_or(u32::MAX)
}

fn clipped(count: u64) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

/// What counts by entity alone: its burst, how many, and its stall.
#[inline]
fn plain(detail: &ArchivedDetail) -> Option<(usize, u32, u32)> {
    match detail {
        ArchivedDetail::Reclaim { stall_ns, memcg, .. } => Some((usize::from(!*memcg), 1, us(stall_ns.to_native()))),
        ArchivedDetail::RunQueue { wait_ns } => Some((2, 1, us(wait_ns.to_native()))),
        _ => None,
    }
}

/// What counts by what its events have in common.
#[inline]
fn keyed(detail: &ArchivedDetail, body: &ArchivedBody) -> Option<Contribution> {
    let one = |rule, about| Some(Contribution { rule, count: 1, stall_us: 0, about });
    match detail {
        ArchivedDetail::Tcp(tcp) => {
            let peer = || About::Peer { address: tcp.destination, port: tcp.destination_port.to_native() };
            match tcp.change {
                2 => one(&REFUSED, peer()),
                5 => one(&RETRANSMIT, peer()),
                6 => one(&SYN_RETRANSMIT, peer()),
                _ => None,
            }
        }
        ArchivedDetail::SyscallError { count, syscall, errno } => {
            let errno = errno.to_native();
            let rule = if EXHAUSTED.contains(&errno) { &SYSCALL_EXHAUSTED } else { &SYSCALL_ERROR };
            let about = About::Errno { errno, syscall: syscall.to_native() };
            Some(Contribution { rule, count: clipped(count.to_native()), stall_us: 0, about })
        }
        ArchivedDetail::BlockIo { latency_ns, device, error, .. } => {
            let errno = error.to_native().unsigned_abs();
            let about = About::Device { device: device.to_native(), errno };
            let rule = if errno == 0 { &SLOW_IO } else { &IO_ERROR };
            Some(Contribution { rule, count: 1, stall_us: us(latency_ns.to_native()), about })
        }
        ArchivedDetail::PacketDrop { count, reason, interface } => {
            let reason = body.name(reason.to_native()).map_or(0, name_hash);
            let about = About::Drop { reason, interface: interface.to_native() };
            Some(Contribution { rule: &PACKET_DROP, count: clipped(count.to_native()), stall_us: 0, about })
        }
        // Found after all, only slowly, or asked for what does not exist (NXDOMAIN): no failure of the service.
        ArchivedDetail::Dns { rcode, .. } if !matches!(*rcode, 0 | 3) => {
            one(&DNS_FAILURE, About::Dns { rcode: *rcode })
        }
        ArchivedDetail::Histogram(histogram) => slow_share(histogram),
        _ => None,
    }
}

/// Distinguishes names that have another index in each frame.
fn name_hash(name: &str) -> u32 {
    let hash = tapio_wire::fnv1a(&[name.as_bytes()]);
    (hash ^ (hash >> 32)) as u32
}

fn slow_share(histogram: &ArchivedHistogram) -> Option<Contribution> {
    let measure = histogram.measure.get();
    let slot = if measure == Measure::RunQueueLatency { SLOW_RUN_QUEUE_SLOT } else { SLOW_SLOT };
    let count = |from: usize| histogram.counts.iter().skip(from).map(|count| u64::from(count.to_native())).sum::<u64>();
    let (total, slow) = (count(0), count(slot));
    if slow == 0 || slow.saturating_mul(SLOW_SHARE_PARTS) < total {
        return None;
    }
    let about = About::Share { measure, device: histogram.device.to_native(), total };
    Some(Contribution { rule: &SLOW_SHARE, count: clipped(slow), stall_us: us(histogram.max_ns.to_native()), about })
}

/// Times are milliseconds of the node's clock; they wrap, so only differences are used.
#[derive(Clone, Copy, Default)]
struct BurstState {
    window_start_ms: u32,
    reported_ms: u32,
    count: u32,
    stall_us: u32,
    is_on: bool,
}

impl BurstState {
    #[inline]
    fn add(&mut self, rule: &Threshold, now_ms: u32, count: u32, stall_us: u32) -> Option<Burst> {
        let mut age_ms = now_ms.wrapping_sub(self.window_start_ms);
        if age_ms > u32::MAX / 2 {
            // Rings of other CPUs are read later: such an event counts in the window that is open.
            age_ms = 0;
        }
        if age_ms >= rule.window_ms || self.count == 0 {
            // It ends only after a window with less than half of what began it, or after silence.
            let calm = self.count < rule.count.div_ceil(2) && self.stall_us < rule.stall_us / 2;
            if calm || age_ms >= 2 * rule.window_ms {
                self.is_on = false;
            }
            self.window_start_ms = now_ms;
            self.count = 0;
            self.stall_us = 0;
            age_ms = 0;
        }
        self.count = self.count.saturating_add(count);
        self.stall_us = self.stall_us.saturating_add(stall_us);
        if self.count < rule.count && self.stall_us < rule.stall_us {
            return None;
        }
        if self.is_on && now_ms.wrapping_sub(self.reported_ms) < BURST_REFRESH_MS {
            return None;
        }
        self.is_on = true;
        self.reported_ms = now_ms;
        Some(Burst {
            kind: rule.kind,
            about: About::Nothing,
            peer: None,
            peer_backends: None,
            drop_reason: None,
            count: self.count,
            stall_us: self.stall_us,
            span_ms: age_ms,
        })
    }
}

/// Most entities are never short of anything: what is counted of those that are stands elsewhere, so that the table which every
/// event looks into stays small.
#[derive(Clone, Copy)]
struct EntityState {
    seen_tick: u32,
    /// Position in [`Plain`], or [`NOWHERE`].
    place: u32,
}

const NOWHERE: u32 = u32::MAX;

/// What is counted by entity alone.
#[derive(Default)]
struct Plain {
    bursts: Vec<[BurstState; BURSTS]>,
    free: Vec<u32>,
}

impl Plain {
    #[inline]
    fn of(&mut self, state: &mut EntityState) -> Option<&mut [BurstState; BURSTS]> {
        if state.place == NOWHERE {
            state.place = self.free.pop().unwrap_or_else(|| {
                self.bursts.push(Default::default());
                (self.bursts.len() - 1) as u32
            });
        }
        self.bursts.get_mut(state.place as usize)
    }

    /// Takes the place of an entity that is forgotten back.
    fn release(&mut self, state: EntityState) {
        if let Some(bursts) = self.bursts.get_mut(state.place as usize) {
            *bursts = Default::default();
            self.free.push(state.place);
        }
    }
}

/// The entities of one shard.
pub struct EntityTable {
    hasher: RandomState,
    entities: HashMap<Fingerprint, EntityState, RandomState>,
    plain: Plain,
    keyed: Generations<(Fingerprint, ClueKind, u64), BurstState>,
    wheel: Vec<Vec<Fingerprint>>,
    tick: u32,
    tick_length: Duration,
    entities_max: usize,
    evicted: u64,
}

impl EntityTable {
    /// An empty table of at most `entities_max` entities, each forgotten when it was quiet for `window`.
    pub fn new(entities_max: usize, window: Duration) -> Self {
        Self {
            hasher: RandomState::default(),
            entities: HashMap::default(),
            plain: Plain::default(),
            keyed: Generations::new(KEYED_MAX.min(entities_max.max(2))),
            wheel: vec![Vec::new(); SLOTS],
            tick: 0,
            tick_length: (window / WINDOW_TICKS).max(Duration::from_millis(1)),
            entities_max: entities_max.max(1),
            evicted: 0,
        }
    }

    /// Entities now.
    pub fn len(&self) -> usize {
        self.entities.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.entities.is_empty()
    }

    /// Entities that had to make room so far; those that expired are not among them.
    pub fn evicted(&self) -> u64 {
        self.evicted
    }

    /// Moves the wheel to `elapsed` since the table was made.
    pub fn advance(&mut self, elapsed: Duration) {
        let target = u32::try_from(elapsed.as_nanos() / self.tick_length.as_nanos()).unwrap_or(u32::MAX);
        let steps = target.saturating_sub(self.tick).min(SLOTS as u32);
        self.tick = self.tick.max(target);
        for step in (0..steps).rev() {
            let slot = (self.tick - step) as usize % SLOTS;
            for key in std::mem::take(&mut self.wheel[slot]) {
                match self.entities.get(&key).map(|state| state.seen_tick) {
                    Some(seen) if seen.saturating_add(WINDOW_TICKS) < self.tick => self.forget(&key),
                    Some(seen) => self.place(key, seen),
                    None => {}
                }
            }
        }
    }

    /// Counts an event of a frame, and returns a burst when it makes one.
    #[inline]
    pub fn count(&mut self, key: Key, time_ns: u64, detail: &ArchivedDetail, body: &ArchivedBody) -> Option<Burst> {
        let (key, tick) = (self.hasher.hash_one(key), self.tick);
        if self.entities.len() >= self.entities_max && !self.entities.contains_key(&key) {
            self.evict();
        }
        let state = match self.entities.entry(key) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                let slot = (tick + WINDOW_TICKS + 1) as usize % SLOTS;
                self.wheel[slot].push(key);
                entry.insert(EntityState { seen_tick: tick, place: NOWHERE })
            }
        };
        state.seen_tick = tick;
        let now_ms = (time_ns / 1_000_000) as u32;
        if let Some((burst, count, stall_us)) = plain(detail) {
            let bursts = self.plain.of(state)?;
            return bursts[burst].add(&PLAIN[burst], now_ms, count, stall_us);
        }
        let Contribution { rule, count, stall_us, about } = keyed(detail, body)?;
        let state = self.keyed.entry((key, rule.kind, about.discriminator()), BurstState::default);
        let burst = state.add(rule, now_ms, count, stall_us)?;
        Some(Burst { about, ..burst })
    }

    fn forget(&mut self, key: &Fingerprint) {
        if let Some(state) = self.entities.remove(key) {
            self.plain.release(state);
        }
    }

    fn place(&mut self, key: Fingerprint, seen_tick: u32) {
        let slot = (seen_tick + WINDOW_TICKS + 1) as usize % SLOTS;
        self.wheel[slot].push(key);
    }

    /// Evicts one of those that have to be looked at next: the least recently used, but for a few that were used since.
    fn evict(&mut self) {
        let mut tries = 0;
        for ahead in 1..=SLOTS as u32 {
            let slot = (self.tick + ahead) as usize % SLOTS;
            while let Some(key) = self.wheel[slot].pop() {
                tries += 1;
                let due = self.entities.get(&key).map(|state| state.seen_tick + WINDOW_TICKS + 1);
                match due {
                    Some(due) if due > self.tick + ahead && tries < EVICTION_TRIES => {
                        self.wheel[due as usize % SLOTS].push(key);
                    }
                    _ => {
                        self.forget(&key);
                        self.evicted += 1;
                        return;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn add(state: &mut BurstState, at_ms: u32) -> bool {
        state.add(&PLAIN[0], at_ms, 1, 100).is_some()
    }

    #[test]
    fn a_freed_place_is_used_again_and_empty() {
        let mut plain = Plain::default();
        let mut states = [EntityState { seen_tick: 0, place: NOWHERE }; 3];
        for state in &mut states {
            plain.of(state).expect("a place")[0].count = 7;
        }
        plain.release(states[1]);
        plain.release(EntityState { seen_tick: 0, place: NOWHERE });
        let mut new = EntityState { seen_tick: 1, place: NOWHERE };
        assert_eq!(plain.of(&mut new).expect("a place")[0].count, 0);
        assert_eq!((new.place, plain.bursts.len(), plain.of(&mut states[2]).expect("a place")[0].count), (1, 3, 7));
    }

    #[test]
    fn entities_of_many_nodes_have_fingerprints_of_their_own() {
        let table = EntityTable::new(1, Duration::from_secs(1));
        // Small and regular numbers are the hardest to distinguish.
        let keys = (0..1000u64).flat_map(|node| (0..1000u64).map(move |entity| (node, entity)));
        let prints: std::collections::HashSet<Fingerprint> = keys.map(|key| table.hasher.hash_one(key)).collect();
        assert_eq!(prints.len(), 1_000_000);
    }

    #[test]
    fn a_burst_is_reported_once_until_it_has_calmed_down() {
        let mut state = BurstState::default();
        let bursts = (0..500).filter(|&step| add(&mut state, 5000 + step * 10)).count();
        assert_eq!(bursts, 1, "5 s of one burst");
        let bursts = (0..8).filter(|&step| add(&mut state, 60_000 + step)).count();
        assert_eq!(bursts, 1, "a second burst after silence");
    }

    #[test]
    fn a_burst_that_goes_on_is_reported_again() {
        let mut state = BurstState::default();
        let bursts = (0..3000).filter(|&step| add(&mut state, step * 10)).count();
        assert_eq!(bursts, 3, "30 s of one burst");
    }

    #[test]
    fn events_far_apart_are_no_burst() {
        let mut state = BurstState::default();
        assert!((0..1000).all(|step| !add(&mut state, step * 500)));
    }
}
