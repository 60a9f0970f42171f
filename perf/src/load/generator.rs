//! The generator: writes prepared records into rings, open loop.
//!
//! With a rate, the n-th event of a node has an intended time that does not depend on how the pipeline fares. The time
//! is in the record, and latency counts from it. An event that finds its ring full is dropped and counted. Without a
//! rate, events are written as fast as rings have room, and nothing is dropped.
//!
//! One thread serves all nodes, so that most of the machine is left to what is measured. The thread owns the writers.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tapio_ringbuf::Writer;

use super::pool::Pool;
use super::profile::{POOL_RECORDS, Profile};
use crate::clock::boottime_ns;
use crate::error::{Context, Error};
use crate::interrupt;

/// Events that are stamped and written together.
const BATCH: usize = 256;
/// How long the generator sleeps when nothing is due, or no ring has room.
const TICK: Duration = Duration::from_micros(500);

/// What a collector needs to read a node's ring; outlives a collector.
pub struct RingHandle {
    name: String,
    memfd: OwnedFd,
    eventfd: OwnedFd,
}

/// A ring that a collector reads; dropping it takes the ring back.
pub type Publication = tapio_ringbuf::handover::Publication;

impl RingHandle {
    /// Hands the ring to the collector that listens on `socket`.
    pub fn publish(&self, socket: &Path) -> Result<Publication, Error> {
        tapio_ringbuf::handover::publish(socket, &self.name, self.memfd.as_fd(), self.eventfd.as_fd())
            .map_err(|error| Error::Ring(error.to_string()))
    }
}

/// A simulated node.
pub struct Node {
    writer: Writer,
    introductions: Pool,
    pool: Pool,
    /// The next record: introductions first, then the pool round and round.
    next: usize,
    /// Events whose intended time has come, whether they were written or dropped.
    offered: u64,
}

impl Node {
    /// A node with a ring of `ring_bytes` and `entities` containers.
    pub fn new(name: &str, seed: u64, entities: usize, ring_bytes: usize) -> Result<(Self, RingHandle), Error> {
        Self::with_clues(name, seed, entities, ring_bytes, 0.0)
    }

    /// Makes a generator in whose events the share `clues`, from 0 up to 1, are deaths.
    pub fn with_clues(
        name: &str,
        seed: u64,
        entities: usize,
        ring_bytes: usize,
        clues: f64,
    ) -> Result<(Self, RingHandle), Error> {
        let (writer, memfd, eventfd) =
            Writer::create(ring_bytes, name).map_err(|error| Error::Ring(error.to_string()))?;
        let mut profile = Profile::new(seed, entities);
        let mut introductions = profile.introductions();
        if clues > 0.0 {
            Profile::introduce_senders(&mut introductions);
        }
        let node = Self { writer, introductions, pool: profile.pool(POOL_RECORDS, clues), next: 0, offered: 0 };
        let name = name.to_owned();
        Ok((node, RingHandle { name, memfd, eventfd }))
    }

    /// Events produced, dropped ones included.
    pub fn emitted(&self) -> u64 {
        self.writer.emitted()
    }

    /// Events that found the ring full.
    pub fn dropped(&self) -> u64 {
        self.writer.dropped()
    }

    /// Events that were due.
    pub fn offered(&self) -> u64 {
        self.offered
    }

    /// Whether the collector has read everything.
    pub fn is_consumed(&self) -> bool {
        self.writer.consumed() + self.writer.dropped() >= self.writer.emitted()
    }

    /// Writes up to `count` events, the n-th with the time `time(n)`, in at most [`BATCH`]; returns how many were tried and how
    /// many of these fitted.
    fn write(&mut self, count: u64, time: impl Fn(u64) -> u64) -> (u64, u64) {
        let (pool, first) = match self.next.checked_sub(self.introductions.len()) {
            None => (&mut self.introductions, self.next),
            Some(played) => (&mut self.pool, played % POOL_RECORDS),
        };
        let tried = count.min((pool.len() - first).min(BATCH) as u64) as usize;
        for n in 0..tried {
            pool.stamp(first + n, time(n as u64));
        }
        let pool = &*pool;
        let written = self.writer.write_batch((first..first + tried).map(|index| pool.record(index)));
        if pool.are_urgent(first..first + written) {
            self.writer.wake_reader();
        }
        (tried as u64, written as u64)
    }

    /// Goes on to the event after the next `events`.
    fn advance(&mut self, events: u64) {
        self.offered += events;
        self.next += events as usize;
        let all = self.introductions.len() + POOL_RECORDS;
        if self.next >= all {
            self.next = self.introductions.len() + (self.next - all) % POOL_RECORDS;
            self.pool.renew();
        }
    }
}

/// When events are due.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Pace {
    /// Writes as soon as there is room.
    #[default]
    Max,
    /// Events a second, all nodes together.
    PerSecond(f64),
}

impl std::str::FromStr for Pace {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "max" {
            return Ok(Self::Max);
        }
        match text.replace('_', "").parse::<f64>() {
            Ok(rate) if rate > 0.0 && rate <= 1e9 => Ok(Self::PerSecond(rate)),
            _ => Err(format!("{text:?} is no rate: write events per second (at most 1e9), or max")),
        }
    }
}

/// The intended times of one node's events, nanoseconds after the start, as fixed point with 32 binary places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Schedule {
    step: u128,
    phase: u128,
}

impl Schedule {
    /// Makes the pace of node `index` of `nodes` that share `rate`; nodes take turns, they do not write at the same
    /// moment.
    fn new(rate: f64, index: usize, nodes: usize) -> Self {
        let step = (nodes as f64 * 1e9 / rate * (1u64 << 32) as f64) as u128;
        let step = step.max(1);
        Self { step, phase: step * index as u128 / nodes as u128 }
    }

    /// When event `n` is due.
    #[inline]
    fn intended_ns(self, n: u64) -> u64 {
        ((self.phase + u128::from(n) * self.step) >> 32) as u64
    }

    /// How many events are due before `elapsed_ns`.
    fn due(self, elapsed_ns: u64) -> u64 {
        let elapsed = u128::from(elapsed_ns) << 32;
        match elapsed.checked_sub(self.phase) {
            Some(rest) => rest.div_ceil(self.step) as u64,
            None => 0,
        }
    }
}

/// A generator that runs.
pub struct Generator {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Vec<Node>>>,
}

impl Generator {
    /// Starts to write, for `duration` unless stopped before.
    pub fn start(mut nodes: Vec<Node>, pace: Pace, duration: Duration) -> Result<Self, Error> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::Builder::new()
            .name("generator".into())
            .spawn(move || {
                let is_over = || stopped.load(Ordering::Relaxed) || interrupt::came();
                match pace {
                    Pace::Max => write_at_most(&mut nodes, duration, is_over),
                    Pace::PerSecond(rate) => write_at_rate(&mut nodes, rate, duration, is_over),
                }
                nodes
            })
            .context(|| "start the generator's thread".into())?;
        Ok(Self { stop, thread: Some(thread) })
    }

    /// Whether it has come to its end.
    pub fn is_finished(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Stops it early.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Waits for its end; gives the nodes back.
    pub fn join(mut self) -> Result<Vec<Node>, Error> {
        let thread = self.thread.take().ok_or_else(|| Error::Invalid("the generator has ended".into()))?;
        thread.join().map_err(|_| Error::Invalid("the generator's thread panicked".into()))
    }
}

impl Drop for Generator {
    fn drop(&mut self) {
        self.stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn write_at_rate(nodes: &mut [Node], rate: f64, duration: Duration, is_over: impl Fn() -> bool) {
    let start = boottime_ns();
    let end_ns = duration.as_nanos() as u64;
    let count = nodes.len();
    let schedules: Vec<Schedule> = (0..count).map(|index| Schedule::new(rate, index, count)).collect();
    while !is_over() {
        let elapsed = (boottime_ns() - start).min(end_ns);
        for (node, schedule) in nodes.iter_mut().zip(&schedules) {
            let due = schedule.due(elapsed);
            while node.offered < due {
                let (first, missing) = (node.offered, due - node.offered);
                let (tried, written) = node.write(missing, |n| start + schedule.intended_ns(first + n));
                if written < tried {
                    node.writer.count_dropped(tried - written);
                }
                node.advance(tried);
            }
        }
        if elapsed == end_ns {
            return;
        }
        thread::sleep(TICK);
    }
}

fn write_at_most(nodes: &mut [Node], duration: Duration, is_over: impl Fn() -> bool) {
    let end = boottime_ns() + duration.as_nanos() as u64;
    loop {
        let mut any = false;
        for node in &mut *nodes {
            let now = boottime_ns();
            if now >= end || is_over() {
                return;
            }
            let (_, written) = node.write(BATCH as u64, |_| now);
            node.advance(written);
            any |= written > 0;
        }
        if !any {
            thread::sleep(TICK);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{BATCH, Generator, Node, POOL_RECORDS, Pace, RingHandle, Schedule};
    use crate::clock::boottime_ns;
    use std::time::Duration;
    use tapio_probes::record::Header;
    use tapio_ringbuf::{Limits, Reader};
    use zerocopy::FromBytes;

    const RING_BYTES: usize = 1 << 20;

    #[test]
    fn events_are_due_at_their_rate_whoever_asks_when() {
        for (rate, nodes) in [(1.0, 1), (3.0, 7), (1e6, 3), (123_456.7, 10)] {
            let schedules: Vec<Schedule> = (0..nodes).map(|index| Schedule::new(rate, index, nodes)).collect();
            let seconds = 100;
            let due: u64 = schedules.iter().map(|schedule| schedule.due(seconds * 1_000_000_000)).sum();
            let expected = rate * seconds as f64;
            assert!((due as f64 - expected).abs() <= 1.0, "{rate} {nodes}: {due}");
            for schedule in schedules {
                for n in [0, 1, 2, 1000] {
                    let at = schedule.intended_ns(n);
                    assert!(schedule.due(at) <= n + 1 && schedule.due(at + 1) > n);
                }
            }
        }
    }

    #[test]
    fn a_rate_is_a_positive_number_or_max() {
        assert_eq!("max".parse(), Ok(Pace::Max));
        assert_eq!("1_000_000".parse(), Ok(Pace::PerSecond(1e6)));
        assert_eq!("0.5".parse(), Ok(Pace::PerSecond(0.5)));
        for wrong in ["", "0", "-1", "fast", "nan", "inf", "2e9"] {
            assert!(wrong.parse::<Pace>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn with_a_rate_a_full_ring_is_counted_as_drops() {
        let (node, _handle) = Node::new("full", 1, 10, 4096).expect("a ring");
        let generator =
            Generator::start(vec![node], Pace::PerSecond(10_000.0), Duration::from_millis(200)).expect("it starts");
        let node = generator.join().expect("it ends").remove(0);
        assert_eq!(node.offered(), 2000);
        assert_eq!(node.emitted(), 2000);
        assert!(node.dropped() > 1900 && node.dropped() < 2000);
        assert!(!node.is_consumed());
    }

    #[test]
    fn without_a_rate_nothing_is_dropped() {
        let (node, _handle) = Node::new("max", 1, 10, RING_BYTES).expect("a ring");
        let generator = Generator::start(vec![node], Pace::Max, Duration::from_millis(50)).expect("it starts");
        let node = generator.join().expect("it ends").remove(0);
        assert_eq!(node.dropped(), 0);
        assert_eq!(node.emitted(), node.offered());
        assert!(node.emitted() > 5_000, "{}", node.emitted());
    }

    #[test]
    fn records_are_played_in_order_and_again() {
        let (mut node, _handle) = Node::new("order", 1, 3, RING_BYTES).expect("a ring");
        let (tried, _) = node.write(10, |n| n);
        assert_eq!(tried, 3, "introductions first");
        node.advance(3);
        assert_eq!(node.next, 3);
        node.advance(POOL_RECORDS as u64 - 1);
        assert_eq!(node.write(10, |n| n).0, 1, "up to the pool's end");
        node.advance(1);
        assert_eq!(node.next, 3, "the pool again, the introductions not");
        assert_eq!(node.write(1000, |n| n).0, BATCH as u64);
    }

    fn reader(handle: &RingHandle) -> Reader {
        let memfd = handle.memfd.try_clone().expect("a descriptor");
        Reader::from_memfd(memfd, Limits::default()).expect("a ring")
    }

    #[test]
    fn a_reader_sees_every_event_at_its_intended_time() {
        let (node, handle) = Node::new("times", 1, 10, RING_BYTES).expect("a ring");
        let before = boottime_ns();
        let generator =
            Generator::start(vec![node], Pace::PerSecond(50_000.0), Duration::from_millis(100)).expect("it starts");
        let node = generator.join().expect("it ends").remove(0);
        let mut times = Vec::new();
        let drained = reader(&handle).drain(usize::MAX, |record| {
            let header = Header::read_from_prefix(record).expect("a header").0;
            times.push(header.time_ns);
        });
        drained.expect("the ring is sound");
        assert_eq!((times.len(), node.emitted()), (5000, 5000));
        assert!(node.is_consumed() && times[0] >= before);
        for (n, time) in times.iter().enumerate() {
            assert!((time - times[0]).abs_diff(n as u64 * 20_000) <= 1, "event {n}");
        }
    }

    #[test]
    fn an_event_costs_little() {
        let (mut node, handle) = Node::new("cost", 1, 100, 8 << 20).expect("a ring");
        let mut reader = reader(&handle);
        let mut best = u64::MAX;
        for _ in 0..20 {
            let start = boottime_ns();
            let mut events = 0;
            while events < 50_000 {
                let (_, written) = node.write(BATCH as u64, |n| start + n);
                node.advance(written);
                events += written;
            }
            best = best.min((boottime_ns() - start) / events);
            reader.drain(usize::MAX, |_| {}).expect("the ring is sound");
        }
        // Far below what the pipeline spends on one, also without optimisation and on a busy machine.
        assert!(best < 500, "{best} ns an event");
    }
}
