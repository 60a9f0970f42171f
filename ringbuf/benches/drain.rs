//! What a record costs, in one run and one thread, so that the rings are compared on the same core at the same time.
//!
//! - `through_64`: batches of 64-byte records written and drained, through a memfd ring, crossbeam's `ArrayQueue`, and `rtrb`
//!   (records one by one, and by chunk). A ring's batch pays its fence and stores once, so the batch size is part of the name.
//! - `drain_64`, `drain_296`: the drain alone, `copied` from a memfd ring and `in_place` from a BPF ring that the kernel
//!   filled (needs CAP_BPF).
//!
//! Run with `cargo bench -p tapio-ringbuf`. Times are per batch; the `thrpt` line is records.

#[allow(dead_code, reason = "shared with a test, which uses another part of it")]
#[path = "../tests/bpf/mod.rs"]
mod bpf;

use std::hint::black_box;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use crossbeam::queue::ArrayQueue;
use tapio_ringbuf::{Limits, Reader, Writer};

const DATA_BYTES: usize = 1 << 18;
const SLOTS: usize = 2048;

type Record = [u8; 64];

/// What a consumer does with a record: looks at its first word.
#[inline]
fn look(sum: &mut u64, record: &[u8]) {
    if let Some(word) = record.first_chunk() {
        *sum = sum.wrapping_add(u64::from_ne_bytes(*word));
    }
}

fn ring() -> (Writer, Reader) {
    let (writer, memfd, _) = Writer::create(DATA_BYTES, "bench").expect("a memfd ring");
    (writer, Reader::from_memfd(memfd, Limits::default()).expect("the ring just made"))
}

fn through(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("through_64");
    for batch in [16usize, 256, 1024] {
        let records: Vec<Record> = (0..batch).map(|number| [number as u8; 64]).collect();
        group.throughput(Throughput::Elements(batch as u64));

        let (mut writer, mut reader) = ring();
        group.bench_function(BenchmarkId::new("memfd_ring", batch), |bencher| {
            bencher.iter(|| {
                let mut sum = 0;
                assert_eq!(writer.write_batch(black_box(&records).iter().map(Record::as_slice)), batch);
                reader.drain(batch, |record| look(&mut sum, record)).expect("an honest writer");
                sum
            });
        });

        let (mut writer, mut reader) = ring();
        group.bench_function(BenchmarkId::new("memfd_ring_published_one_by_one", batch), |bencher| {
            bencher.iter(|| {
                let mut sum = 0;
                for record in black_box(&records) {
                    assert!(writer.write(record));
                }
                reader.drain(batch, |record| look(&mut sum, record)).expect("an honest writer");
                sum
            });
        });

        let queue = ArrayQueue::<Record>::new(SLOTS);
        group.bench_function(BenchmarkId::new("crossbeam_array_queue", batch), |bencher| {
            bencher.iter(|| {
                let mut sum = 0;
                for record in black_box(&records) {
                    assert!(queue.push(*record).is_ok());
                }
                while let Some(record) = queue.pop() {
                    look(&mut sum, &record);
                }
                sum
            });
        });

        let (mut producer, mut consumer) = rtrb::RingBuffer::<Record>::new(SLOTS);
        group.bench_function(BenchmarkId::new("rtrb", batch), |bencher| {
            bencher.iter(|| {
                let mut sum = 0;
                for record in black_box(&records) {
                    assert!(producer.push(*record).is_ok());
                }
                while let Ok(record) = consumer.pop() {
                    look(&mut sum, &record);
                }
                sum
            });
        });

        let (mut producer, mut consumer) = rtrb::RingBuffer::<Record>::new(SLOTS);
        group.bench_function(BenchmarkId::new("rtrb_chunk", batch), |bencher| {
            bencher.iter(|| {
                let mut sum = 0;
                let chunk = producer.write_chunk_uninit(batch).expect("room");
                chunk.fill_from_iter(black_box(&records).iter().copied());
                let chunk = consumer.read_chunk(batch).expect("records");
                let (first, second) = chunk.as_slices();
                for record in first.iter().chain(second) {
                    look(&mut sum, record);
                }
                chunk.commit_all();
                sum
            });
        });
    }
    group.finish();
}

const DRAIN_BATCH: usize = 512;

/// Times the drains alone: the ring is filled between them.
fn time_drains(turns: u64, reader: &mut Reader, mut fill: impl FnMut()) -> Duration {
    let mut spent = Duration::ZERO;
    for _ in 0..turns {
        fill();
        let mut sum = 0;
        let start = Instant::now();
        let drained = reader.drain(DRAIN_BATCH, |record| look(&mut sum, record)).expect("an honest writer");
        spent += start.elapsed();
        assert_eq!((drained.records, black_box(sum) > 0), (DRAIN_BATCH, true));
    }
    spent
}

fn drain(criterion: &mut Criterion) {
    let with_kernel = bpf::available();
    for record_bytes in [64usize, 296] {
        let mut group = criterion.benchmark_group(format!("drain_{record_bytes}"));
        group.throughput(Throughput::Elements(DRAIN_BATCH as u64));

        let (mut writer, mut reader) = ring();
        let record = vec![1u8; record_bytes];
        group.bench_function("copied", |bencher| {
            bencher.iter_custom(|turns| {
                time_drains(turns, &mut reader, || {
                    let written = writer.write_batch(std::iter::repeat_n(&record[..], DRAIN_BATCH));
                    assert_eq!(written, DRAIN_BATCH);
                })
            });
        });

        if with_kernel {
            let map = bpf::ring(DATA_BYTES).expect("a BPF ring");
            let bytes = record_bytes as u32;
            let program =
                bpf::Program::load(map.as_fd(), bytes, 1, bpf::Then::Submit, bpf::NO_WAKEUP).expect("a program");
            let mut reader = Reader::from_bpf_map(map.as_fd(), DATA_BYTES, record_bytes).expect("the map just made");
            group.bench_function("in_place", |bencher| {
                bencher.iter_custom(|turns| {
                    time_drains(turns, &mut reader, || assert!(program.run(DRAIN_BATCH).expect("a run")))
                });
            });
        }
        group.finish();
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(30)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_millis(1200));
    targets = through, drain
}
criterion_main!(benches);
