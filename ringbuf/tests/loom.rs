//! The protocol of positions and wakeups under every interleaving that the memory model allows, on a ring of few slots.
//!
//! The functions are those that `Reader` and `Writer` call; the ring around them holds one number a slot instead of bytes, as
//! loom cannot see into mapped memory. Loom reports a slot that is written while it is read (A, B), and a reader that sleeps
//! for ever (W) as a deadlock.
//!
//! Run with `RUSTFLAGS="--cfg loom" cargo test -p tapio-ringbuf --test loom --release`.
#![cfg(loom)]

use loom::cell::UnsafeCell;
use loom::sync::{Arc, Notify};
use loom::thread;
use tapio_ringbuf::protocol::{observe, publish, request_wakeup, take_wakeup};
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
        Arc::new(Self {
            producer: AtomicU64::new(0),
            consumer: AtomicU64::new(0),
            emitted: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
            need_wakeup: AtomicU32::new(0),
            eventfd: Notify::new(),
            slots: std::array::from_fn(|_| UnsafeCell::new(u64::MAX)),
        })
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
fn a_reader_that_asked_is_woken_and_reads_what_was_written() {
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
fn a_slot_is_reused_only_after_it_was_read_and_every_record_is_consumed_or_dropped() {
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
