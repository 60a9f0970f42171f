//! Rings under load, in turn with alternatives in the same run.
//!
//! - `full_bpf_64`: a BPF ring that the kernel filled to the brim with 64-byte records, drained in turn by this crate's
//!   `Reader` and by aya's `RingBuf` (needs CAP_BPF). Each has a map of its own, of the same size and filled by the
//!   same program: either keeps the consumer position to itself.
//! - `one_thread_64`: batches of 64-byte records written and then drained in one thread. The rings are a memfd ring,
//!   rtrb by chunk and one by one, crossbeam's `ArrayQueue`, and several producers' `SharedWriter`. The memfd ring's
//!   two halves are shown as well, and the drain of a batch of mixed lengths, 32 to 296 bytes. rtrb by chunk hands its
//!   records out in place; this crate's reader copies them first, because its peer may be hostile.
//! - `two_threads_64`: a million 64-byte records from one thread to another, in batches: the cache lines travel. Through a memfd
//!   ring, rtrb by chunk and one by one, and crossbeam's `ArrayQueue`.
//!
//! Run with `cargo bench -p tapio-ringbuf --bench full [-- one_thread]`. Prints the median and the quarters of nanoseconds a record, and the
//! ratio to this crate's.

#[allow(dead_code, reason = "shared with a test, which uses another part of it")]
#[path = "../tests/bpf/mod.rs"]
mod bpf;

use std::hint::{black_box, spin_loop};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use aya::maps::{Map, MapData, RingBuf};
use crossbeam::queue::ArrayQueue;
use rtrb::{Consumer, Producer};
use tapio_ringbuf::{Limits, Reader, SharedWriter, Writer};

type Record = [u8; 64];

const RECORD_BYTES: usize = size_of::<Record>();
const DATA_BYTES: usize = 1 << 18;
const SLOTS: usize = 2048;
const BATCH: usize = 256;
const DRAIN_ROUNDS: usize = 400;
/// Short rounds in turn: other work on the machine falls on few of them, and does not move the median.
const THROUGH_ROUNDS: usize = 1000;
const MIXED_BATCHES: usize = 64;
const THROUGH_TURNS: usize = 16;
const THREAD_ROUNDS: usize = 9;
const THREAD_RECORDS: usize = 1 << 20;
/// Batches that the writing thread writes in a round.
const BATCHES: usize = THREAD_RECORDS / BATCH;

#[inline]
fn look(sum: &mut u64, record: &[u8]) {
    if let Some(word) = record.first_chunk() {
        *sum = sum.wrapping_add(u64::from_ne_bytes(*word));
    }
}

struct Series {
    name: &'static str,
    ns: Vec<f64>,
}

impl Series {
    fn new(name: &'static str) -> Self {
        Self { name, ns: Vec::new() }
    }

    fn add(&mut self, start: Instant, records: usize) {
        self.ns.push(start.elapsed().as_nanos() as f64 / records as f64);
    }

    fn at(&mut self, part: f64) -> f64 {
        self.ns.sort_by(f64::total_cmp);
        self.ns[((self.ns.len() - 1) as f64 * part).round() as usize]
    }
}

fn print(group: &str, series: &mut [Series]) {
    let own = series[0].at(0.5);
    for one in series {
        let (median, low, high) = (one.at(0.5), one.at(0.25), one.at(0.75));
        let ratio = median / own;
        println!("{group:<16} {:<22} {median:>7.2} ns a record ({low:.2} to {high:.2}), {ratio:.2} of ours", one.name);
    }
}

/// A ring and the program that fills it.
fn kernel_ring() -> (OwnedFd, bpf::Program) {
    let map = bpf::ring(DATA_BYTES).expect("a BPF ring");
    let program = bpf::Program::load(map.as_fd(), RECORD_BYTES as u32, 1, bpf::Then::Submit, bpf::NO_WAKEUP);
    (map, program.expect("a program"))
}

fn full_bpf() {
    if !bpf::available() {
        return;
    }
    // What fits: the kernel leaves a byte free.
    let records = (DATA_BYTES - 1) / (RECORD_BYTES + 8);
    let (ours_map, ours_program) = kernel_ring();
    let mut ours = Reader::from_bpf_map(ours_map.as_fd(), DATA_BYTES, RECORD_BYTES).expect("the map just made");
    let (aya_map, aya_program) = kernel_ring();
    let map = MapData::from_fd(aya_map).expect("a map");
    let mut theirs = RingBuf::try_from(Map::RingBuf(map)).expect("a ring");
    let mut series = [Series::new("reader"), Series::new("aya")];
    for round in 0..DRAIN_ROUNDS {
        for turn in [round % 2, (round + 1) % 2] {
            let (mut sum, mut seen) = (0, 0);
            let program = if turn == 0 { &ours_program } else { &aya_program };
            assert!(program.run(records).expect("a run") && !program.run(1).expect("a run"), "full to the brim");
            let start = Instant::now();
            if turn == 0 {
                seen = ours.drain(usize::MAX, |record| look(&mut sum, record)).expect("the kernel's").records;
            } else {
                while let Some(record) = theirs.next() {
                    look(&mut sum, &record);
                    seen += 1;
                }
            }
            series[turn].add(start, records);
            assert_eq!((seen, black_box(sum) > 0), (records, true));
        }
    }
    print("full_bpf_64", &mut series);
}

/// Times one round: a ring filled and emptied [`THROUGH_TURNS`] times. A function for each ring, so that the registers of one
/// do not depend on the others.
#[inline(never)]
fn in_turn(series: &mut Series, mut turn: impl FnMut() -> u64) {
    let start = Instant::now();
    for _ in 0..THROUGH_TURNS {
        black_box(turn());
    }
    series.add(start, THROUGH_TURNS * BATCH);
}

/// Times one half of a turn.
#[inline(never)]
fn once(series: &mut Series, half: impl FnOnce() -> u64) {
    let start = Instant::now();
    black_box(half());
    series.add(start, BATCH);
}

/// Records of lengths without a pattern that a processor could learn: xorshift, and another batch each round.
fn mixed_records() -> Vec<Vec<u8>> {
    let mut random = 88_172_645_463_325_252_u64;
    let record = |_| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        vec![1; [32, 48, 64, 96, 296][(random >> 32) as usize % 5]]
    };
    (0..MIXED_BATCHES * BATCH).map(record).collect()
}

/// One turn of rtrb by chunk: its sum.
#[inline]
fn chunk_turn(producer: &mut Producer<Record>, consumer: &mut Consumer<Record>, records: &[Record]) -> u64 {
    let mut sum = 0;
    let chunk = producer.write_chunk_uninit(BATCH).expect("room");
    chunk.fill_from_iter(black_box(records).iter().copied());
    let chunk = consumer.read_chunk(BATCH).expect("records");
    let (first, second) = chunk.as_slices();
    for record in first.iter().chain(second) {
        look(&mut sum, record);
    }
    chunk.commit_all();
    sum
}

fn one_thread() {
    let records: Vec<Record> = (0..BATCH).map(|number| [number as u8; 64]).collect();
    let (mut writer, memfd, _) = Writer::create(DATA_BYTES, "bench").expect("a memfd ring");
    let mut reader = Reader::from_memfd(memfd, Limits::default()).expect("the ring just made");
    let (shared, memfd, _) = SharedWriter::create(DATA_BYTES, "bench").expect("a memfd ring");
    let mut shared_reader = Reader::from_memfd(memfd, Limits::default()).expect("the ring just made");
    let (mut mixed, memfd, _) = Writer::create(DATA_BYTES, "bench").expect("a memfd ring");
    let mut mixed_reader = Reader::from_memfd(memfd, Limits::default()).expect("the ring just made");
    let mixed_records = mixed_records();
    let (mut chunk_producer, mut chunk_consumer) = rtrb::RingBuffer::<Record>::new(SLOTS);
    let (mut producer, mut consumer) = rtrb::RingBuffer::<Record>::new(SLOTS);
    let queue = ArrayQueue::<Record>::new(SLOTS);
    let mut series = [
        "memfd_ring",
        "memfd_ring, written",
        "memfd_ring, drained",
        "rtrb_chunk",
        "rtrb",
        "crossbeam_array_queue",
        "memfd_ring, shared",
        "mixed, drained",
    ]
    .map(Series::new);
    for round in 0..THROUGH_ROUNDS {
        in_turn(&mut series[0], || {
            let mut sum = 0;
            assert_eq!(writer.write_batch(black_box(&records).iter().map(Record::as_slice)), BATCH);
            reader.drain(BATCH, |record| look(&mut sum, record)).expect("an honest writer");
            sum
        });
        for _ in 0..THROUGH_TURNS {
            once(&mut series[1], || {
                assert_eq!(writer.write_batch(black_box(&records).iter().map(Record::as_slice)), BATCH);
                0
            });
            once(&mut series[2], || {
                let mut sum = 0;
                reader.drain(BATCH, |record| look(&mut sum, record)).expect("an honest writer");
                sum
            });
        }
        let batch = &mixed_records[round % MIXED_BATCHES * BATCH..][..BATCH];
        assert_eq!(mixed.write_batch(black_box(batch).iter().map(Vec::as_slice)), BATCH);
        once(&mut series[7], || {
            let mut sum = 0;
            mixed_reader.drain(BATCH, |record| look(&mut sum, record)).expect("an honest writer");
            sum
        });
        in_turn(&mut series[3], || chunk_turn(&mut chunk_producer, &mut chunk_consumer, &records));
        in_turn(&mut series[4], || {
            let mut sum = 0;
            for record in black_box(&records) {
                assert!(producer.push(*record).is_ok());
            }
            while let Ok(record) = consumer.pop() {
                look(&mut sum, &record);
            }
            sum
        });
        in_turn(&mut series[5], || {
            let mut sum = 0;
            for record in black_box(&records) {
                assert!(queue.push(*record).is_ok());
            }
            while let Some(record) = queue.pop() {
                look(&mut sum, &record);
            }
            sum
        });
        in_turn(&mut series[6], || {
            let mut sum = 0;
            for record in black_box(&records) {
                assert!(shared.write(record));
            }
            shared_reader.drain(BATCH, |record| look(&mut sum, record)).expect("an honest writer");
            sum
        });
    }
    print("one_thread_64", &mut series);
}

/// Times `consume`, which runs here, against `produce`, which runs in another thread.
fn across(series: &mut Series, produce: impl FnOnce() + Send, consume: impl FnOnce() -> u64) {
    std::thread::scope(|scope| {
        let start = Instant::now();
        scope.spawn(produce);
        black_box(consume());
        series.add(start, THREAD_RECORDS);
    });
}

/// Through a memfd ring.
fn memfd_across(series: &mut Series, records: &[Record]) {
    let (mut writer, memfd, _) = Writer::create(DATA_BYTES, "bench").expect("a memfd ring");
    let mut reader = Reader::from_memfd(memfd, Limits::default()).expect("the ring just made");
    let produce = || {
        for _ in 0..BATCHES {
            let mut rest = records;
            while !rest.is_empty() {
                let written = writer.write_batch(black_box(rest).iter().map(Record::as_slice));
                if written == 0 {
                    spin_loop();
                }
                rest = &rest[written..];
            }
        }
    };
    across(series, produce, || {
        let (mut sum, mut seen) = (0, 0);
        while seen < THREAD_RECORDS {
            seen += reader.drain(BATCH, |record| look(&mut sum, record)).expect("an honest writer").records;
        }
        sum
    });
}

/// Through rtrb by chunk.
fn chunk_across(series: &mut Series, records: &[Record]) {
    let (mut producer, mut consumer) = rtrb::RingBuffer::<Record>::new(SLOTS);
    let produce = || {
        for _ in 0..BATCHES {
            let mut rest = records;
            while !rest.is_empty() {
                let room = producer.slots().min(rest.len());
                let chunk = producer.write_chunk_uninit(room).expect("room");
                chunk.fill_from_iter(black_box(&rest[..room]).iter().copied());
                rest = &rest[room..];
            }
        }
    };
    across(series, produce, || {
        let (mut sum, mut seen) = (0, 0);
        while seen < THREAD_RECORDS {
            let chunk = consumer.read_chunk(consumer.slots().min(BATCH)).expect("records");
            let (first, second) = chunk.as_slices();
            seen += first.len() + second.len();
            for record in first.iter().chain(second) {
                look(&mut sum, record);
            }
            chunk.commit_all();
        }
        sum
    });
}

/// Through rtrb, one by one.
fn rtrb_across(series: &mut Series, records: &[Record]) {
    let (mut producer, mut consumer) = rtrb::RingBuffer::<Record>::new(SLOTS);
    let produce = || {
        for _ in 0..BATCHES {
            for record in black_box(records) {
                while producer.push(*record).is_err() {
                    spin_loop();
                }
            }
        }
    };
    across(series, produce, || {
        let (mut sum, mut seen) = (0, 0);
        while seen < THREAD_RECORDS {
            while let Ok(record) = consumer.pop() {
                look(&mut sum, &record);
                seen += 1;
            }
        }
        sum
    });
}

/// Through crossbeam's queue, one by one.
fn queue_across(series: &mut Series, records: &[Record]) {
    let queue = ArrayQueue::<Record>::new(SLOTS);
    let produce = || {
        for _ in 0..BATCHES {
            for record in black_box(records) {
                while queue.push(*record).is_err() {
                    spin_loop();
                }
            }
        }
    };
    across(series, produce, || {
        let (mut sum, mut seen) = (0, 0);
        while seen < THREAD_RECORDS {
            while let Some(record) = queue.pop() {
                look(&mut sum, &record);
                seen += 1;
            }
        }
        sum
    });
}

fn two_threads() {
    let records: Vec<Record> = (0..BATCH).map(|number| [number as u8; 64]).collect();
    let mut series = ["memfd_ring", "rtrb_chunk", "rtrb", "crossbeam_array_queue"].map(Series::new);
    let rings = [memfd_across, chunk_across, rtrb_across, queue_across];
    for _ in 0..THREAD_ROUNDS {
        for (series, through) in series.iter_mut().zip(rings) {
            through(series, &records);
        }
    }
    print("two_threads_64", &mut series);
}

fn main() {
    // Cargo passes `--bench`; anything else names the groups that are wanted.
    let wanted: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let groups: [(&str, fn()); 3] =
        [("full_bpf_64", full_bpf), ("one_thread_64", one_thread), ("two_threads_64", two_threads)];
    for (name, group) in groups {
        if wanted.is_empty() || wanted.iter().any(|wanted| name.contains(wanted.as_str())) {
            group();
        }
    }
}
