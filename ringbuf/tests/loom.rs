//! The protocol of positions and wakeups under every interleaving that the memory model allows, on a ring of few slots.
//!
//! The functions are those that `Reader`, `Writer` and `SharedWriter` call; the ring around them holds one number a
//! slot instead of bytes, as loom cannot see into mapped memory. Loom reports a slot that is written while another
//! thread reads or writes it (A, B, C, L, P). It reports a reader that sleeps for ever (W) as a deadlock.
//!
//! Run with `RUSTFLAGS="--cfg loom" cargo test -p tapio-ringbuf --test loom`.
#![cfg(loom)]

use loom::cell::UnsafeCell;
use loom::sync::{Arc, Notify};
use loom::thread;
use tapio_ringbuf::producers::Producers;
use tapio_ringbuf::protocol::{add, observe, observe_header, publish, publish_header, request_wakeup, take_wakeup};
use tapio_ringbuf::sync::{AtomicU32, AtomicU64, Ordering};

/// Explores every interleaving of up to three preemptions: one more finds nothing that these do not, and takes a minute.
fn check(model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(model);
}

struct Ring<const SLOTS: usize> {
    producer: AtomicU64,
    consumer: AtomicU64,
    emitted: AtomicU64,
    dropped: AtomicU64,
    need_wakeup: AtomicU32,
    eventfd: Notify,
    slots: [UnsafeCell<u64>; SLOTS],
}

// SAFETY: loom checks what this claims: slots are accessed by the side to which the positions give them.
unsafe impl<const SLOTS: usize> Sync for Ring<SLOTS> {}

impl<const SLOTS: usize> Ring<SLOTS> {
    fn new() -> Arc<Self> {
        Arc::new(Self::empty())
    }

    fn empty() -> Self {
        Self {
            producer: AtomicU64::new(0),
            consumer: AtomicU64::new(0),
            emitted: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
            need_wakeup: AtomicU32::new(0),
            eventfd: Notify::new(),
            slots: std::array::from_fn(|_| UnsafeCell::new(u64::MAX)),
        }
    }

    /// Writes `number` at `position` unless the ring is full.
    fn write(&self, position: u64, number: u64) -> bool {
        if position - observe(&self.consumer) >= SLOTS as u64 {
            return false;
        }
        self.slots[position as usize % SLOTS].with_mut(|slot| {
            // SAFETY: the slot is the writer's; loom fails the model if the reader is still at it.
            unsafe { *slot = number }
        });
        publish(&self.producer, position + 1);
        if take_wakeup(&self.need_wakeup) {
            self.eventfd.notify();
        }
        true
    }

    /// Reads all from `position` on, and publishes the position behind it once.
    fn drain(&self, position: u64, mut each: impl FnMut(u64)) -> u64 {
        let end = observe(&self.producer);
        for index in position..end {
            // SAFETY: the slot is the reader's; loom fails the model if the writer is at it.
            each(self.slots[index as usize % SLOTS].with(|slot| unsafe { *slot }));
        }
        if end != position {
            publish(&self.consumer, end);
        }
        end
    }
}

#[test]
fn a_reader_that_asked_is_woken_and_reads() {
    check(|| {
        const RECORDS: u64 = 2;
        let ring = Ring::<2>::new();
        let writer = Arc::clone(&ring);
        let writer = thread::spawn(move || {
            for number in 0..RECORDS {
                assert!(writer.write(number, number));
            }
        });
        let mut position = 0;
        let mut next = 0;
        while position < RECORDS {
            request_wakeup(&ring.need_wakeup, true);
            if observe(&ring.producer) == position {
                ring.eventfd.wait();
            }
            request_wakeup(&ring.need_wakeup, false);
            position = ring.drain(position, |number| {
                assert_eq!(number, next);
                next += 1;
            });
        }
        writer.join().unwrap();
    });
}

#[test]
fn a_slot_is_reused_only_after_it_was_read() {
    check(|| {
        const RECORDS: u64 = 3;
        let ring = Ring::<1>::new();
        let writer = Arc::clone(&ring);
        let writer = thread::spawn(move || {
            let (mut position, mut dropped) = (0, 0);
            for number in 0..RECORDS {
                writer.emitted.store(number + 1, Ordering::Relaxed);
                if writer.write(position, number) {
                    position += 1;
                } else {
                    dropped += 1;
                    publish(&writer.dropped, dropped);
                }
            }
        });
        let mut position = 0;
        let mut next = 0;
        let mut drain = |position| {
            ring.drain(position, |number| {
                assert!(number >= next && number < RECORDS);
                next = number + 1;
            })
        };
        for _ in 0..2 {
            position = drain(position);
            // D: drops that are seen were seen attempted, and so were the records that were read.
            let dropped = observe(&ring.dropped);
            assert!(ring.emitted.load(Ordering::Relaxed) >= dropped + position);
        }
        writer.join().unwrap();
        position = drain(position);
        assert_eq!(position + ring.dropped.load(Ordering::Relaxed), RECORDS);
    });
}

const BUSY: u32 = 1 << 31;
const DISCARDED: u32 = 1 << 30;

/// A ring of many producers; a record takes one slot, and its header is a word beside.
struct ManyRing<const SLOTS: usize> {
    ring: Ring<SLOTS>,
    producers: Producers,
    headers: [AtomicU32; SLOTS],
}

impl<const SLOTS: usize> ManyRing<SLOTS> {
    fn new() -> Arc<Self> {
        let headers = std::array::from_fn(|_| AtomicU32::new(0));
        Arc::new(Self { ring: Ring::empty(), producers: Producers::default(), headers })
    }

    /// Writes `number`, or gives its range up, unless the ring is full. False: dropped.
    fn write(&self, number: u64, give_up: bool) -> bool {
        let Self { ring, producers, headers } = self;
        let busy = |position| headers[position as usize % SLOTS].store(BUSY, Ordering::Relaxed);
        let Some(range) = producers.take(1, SLOTS as u64, &ring.consumer, &ring.producer, busy) else {
            ring.emitted.fetch_add(1, Ordering::Relaxed);
            add(&ring.dropped, 1);
            return false;
        };
        let slot = range.position as usize % SLOTS;
        ring.slots[slot].with_mut(|slot| {
            // SAFETY: the range is this producer's; loom fails the model if anybody else is at it.
            unsafe { *slot = number }
        });
        if !give_up {
            ring.emitted.fetch_add(1, Ordering::Relaxed);
        }
        publish_header(&headers[slot], if give_up { DISCARDED } else { 0 });
        producers.give_back(&range);
        if take_wakeup(&ring.need_wakeup) {
            ring.eventfd.notify();
        }
        true
    }

    /// Reads from `position` on, up to a busy record, and publishes the position behind once.
    fn drain(&self, position: u64, mut each: impl FnMut(u64)) -> u64 {
        let end = observe(&self.ring.producer);
        let mut at = position;
        while at < end {
            let slot = at as usize % SLOTS;
            let header = observe_header(&self.headers[slot]);
            if header & BUSY != 0 {
                break;
            }
            if header & DISCARDED == 0 {
                // SAFETY: committed and not yet passed; loom fails the model if a producer is at it.
                each(self.ring.slots[slot].with(|slot| unsafe { *slot }));
            }
            at += 1;
        }
        if at != position {
            publish(&self.ring.consumer, at);
        }
        at
    }
}

#[test]
fn two_producers_records_are_consumed_dropped_or_discarded() {
    for give_up in [false, true] {
        check(move || {
            let many = ManyRing::<1>::new();
            let producers = [0, 1].map(|number| {
                let many = Arc::clone(&many);
                thread::spawn(move || many.write(number, give_up && number == 1))
            });
            let mut seen = Vec::new();
            let position = many.drain(0, |number| seen.push(number));
            // D and C: what is seen dropped or committed was seen attempted.
            let dropped = observe(&many.ring.dropped);
            assert!(many.ring.emitted.load(Ordering::Relaxed) >= dropped + seen.len() as u64);
            let written = producers.map(|producer| producer.join().unwrap());
            many.drain(position, |number| seen.push(number));
            seen.sort_unstable();
            let committed = [(0, written[0]), (1, written[1] && !give_up)];
            let committed: Vec<u64> = committed.into_iter().filter(|(_, is)| *is).map(|(number, _)| number).collect();
            assert_eq!(seen, committed);
            let dropped = observe(&many.ring.dropped);
            assert_eq!(many.ring.emitted.load(Ordering::Relaxed), dropped + seen.len() as u64);
        });
    }
}

#[test]
fn producers_keep_their_order_and_reuse_only_read_space() {
    check(|| {
        let many = ManyRing::<1>::new();
        let other = Arc::clone(&many);
        let other = thread::spawn(move || [10, 11].map(|number| other.write(number, false)));
        let reader = Arc::clone(&many);
        let reader = thread::spawn(move || {
            let mut seen = Vec::new();
            let position = reader.drain(0, |number| seen.push(number));
            (position, seen)
        });
        let written = many.write(20, false);
        let others = other.join().unwrap();
        let (position, mut seen) = reader.join().unwrap();
        many.drain(position, |number| seen.push(number));
        let count = others.into_iter().chain([written]).filter(|is| *is).count();
        assert_eq!(seen.len(), count);
        let own: Vec<_> = seen.iter().filter(|number| **number < 20).collect();
        assert!(own.is_sorted(), "{seen:?}");
    });
}

#[test]
fn a_waiting_reader_is_woken_by_commit_or_discard() {
    for give_up in [false, true] {
        check(move || {
            let many = ManyRing::<1>::new();
            let producer = Arc::clone(&many);
            let producer = thread::spawn(move || assert!(producer.write(7, give_up)));
            let mut position = 0;
            while position == 0 {
                request_wakeup(&many.ring.need_wakeup, true);
                if observe(&many.ring.producer) == 0 {
                    many.ring.eventfd.wait();
                }
                request_wakeup(&many.ring.need_wakeup, false);
                position = many.drain(0, |number| assert_eq!((number, give_up), (7, false)));
                if position == 0 {
                    // Stopped at a busy record.
                    thread::yield_now();
                }
            }
            producer.join().unwrap();
        });
    }
}

#[test]
fn a_lying_reader_cannot_make_two_producers_share_bytes() {
    check(|| {
        let many = ManyRing::<1>::new();
        let producers = [0, 1].map(|number| {
            let many = Arc::clone(&many);
            thread::spawn(move || many.write(number, false))
        });
        // Whatever is being written, it claims to have read it.
        publish(&many.ring.consumer, observe(&many.ring.producer));
        publish(&many.ring.consumer, 1);
        for producer in producers {
            producer.join().unwrap();
        }
    });
}
