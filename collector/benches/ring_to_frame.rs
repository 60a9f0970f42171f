//! What an event costs the collector, from the ring to the compressed frame, in one thread.
//!
//! - `drain_and_decode`: records of a memfd ring become a batch.
//! - `pack`: a batch becomes a compressed, sealed frame.
//! - `ring_to_frame`: both, one after the other.
//!
//! The mix: run queue waits, block I/O and TCP of 200 cgroups, with an exit among each hundred. Run with
//! `cargo bench -p tapio-collector`; the `thrpt` line is events, so 1/thrpt is the cost of one. It is this thread's CPU time, so
//! that others on the machine count little; writing into the ring is not counted.

use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use rustix::time::{ClockId, clock_gettime};
use tapio_collector::config::Config;
use tapio_collector::identity::Identity;
use tapio_collector::intake::{Intake, Shared};
use tapio_collector::outbox::Room;
use tapio_collector::queue::Queues;
use tapio_probes::record::{self, Kind};
use tapio_ringbuf::{Limits, Reader, Writer};
use tapio_wire::compress::Compression;
use tapio_wire::event::{Body, Lane, Source};
use tapio_wire::frame::Encoder;
use zerocopy::{FromZeros, IntoBytes};

const EVENTS: usize = 4096;
const CGROUPS: u64 = 200;

fn records() -> Vec<Vec<u8>> {
    let header = |kind: Kind, size: usize, number: u64| record::Header {
        kind: kind as u16,
        size: size as u16,
        cpu: (number % 4) as u32,
        time_ns: 1_000_000_000 + number * 977,
        cgroup_id: 1000 + number * 7 % CGROUPS,
        pid: 4000 + (number * 7 % CGROUPS) as u32,
        tid: 4000 + (number * 7 % CGROUPS) as u32,
    };
    (0..EVENTS as u64)
        .map(|number| match number % 100 {
            0 => {
                let mut exit = record::Exit::new_zeroed();
                exit.header = header(Kind::Exit, size_of_val(&exit), number);
                exit.as_bytes().to_vec()
            }
            1..=40 => {
                let mut io = record::BlockIo::new_zeroed();
                io.header = header(Kind::BlockIo, size_of_val(&io), number);
                io.as_bytes().to_vec()
            }
            41..=70 => {
                let mut tcp = record::Tcp::new_zeroed();
                tcp.header = header(Kind::Tcp, size_of_val(&tcp), number);
                tcp.as_bytes().to_vec()
            }
            _ => {
                let mut wait = record::RunQueue::new_zeroed();
                wait.header = header(Kind::RunQueue, size_of_val(&wait), number);
                wait.wait_ns = 10_000 + number * 13 % 100_000;
                wait.as_bytes().to_vec()
            }
        })
        .collect()
}

/// What this thread has used: others on the machine do not count.
fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

struct Bench {
    records: Vec<Vec<u8>>,
    writer: Writer,
    reader: Reader,
    shared: Shared,
    intake: Intake,
    encoder: Encoder,
}

impl Bench {
    fn new() -> Self {
        let mut config = Config::default();
        config.collector.max_events_per_sec = 0;
        let (queues, _parker) = Queues::new(64);
        let shared = Shared::for_config(&config, queues);
        let intake = Intake::new(shared.clone(), Source::Shm, Identity::new(Vec::new()));
        let (writer, memfd, _) = Writer::create(4 << 20, "bench").expect("a memfd ring");
        let reader = Reader::from_memfd(memfd, Limits::default()).expect("the ring just made");
        Self { records: records(), writer, reader, shared, intake, encoder: Encoder::default() }
    }

    fn fill(&mut self) {
        assert_eq!(self.writer.write_batch(self.records.iter().map(Vec::as_slice)), EVENTS);
    }

    fn drain(&mut self) -> Vec<(Lane, Body)> {
        let room = self.intake.room();
        let intake = &mut self.intake;
        self.reader.drain(room, |record| intake.accept(record)).expect("an honest writer");
        intake.flush(true);
        std::iter::from_fn(|| self.shared.queues.pop(Room::Both)).collect()
    }

    fn pack(&mut self, bodies: &[(Lane, Body)]) -> usize {
        let seal = |(lane, body): &(Lane, Body)| {
            self.encoder.seal(body, *lane, Compression::Lz4).expect("within the limits").len()
        };
        bodies.iter().map(seal).sum()
    }
}

fn stages(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("collector");
    group.throughput(Throughput::Elements(EVENTS as u64));
    for (name, drains, packs) in
        [("drain_and_decode", true, false), ("pack", false, true), ("ring_to_frame", true, true)]
    {
        let mut bench = Bench::new();
        group.bench_function(name, |bencher| {
            bencher.iter_custom(|iterations| {
                let mut spent = Duration::ZERO;
                for _ in 0..iterations {
                    bench.fill();
                    let start = cpu_time();
                    let bodies = bench.drain();
                    let drained = cpu_time();
                    assert_eq!(bodies.iter().map(|(_, body)| body.events.len()).sum::<usize>(), EVENTS);
                    let pack_start = cpu_time();
                    assert!(bench.pack(&bodies) > 0);
                    let packed = cpu_time() - pack_start;
                    for (_, body) in bodies {
                        bench.shared.queues.recycle(body);
                    }
                    spent += if drains { drained - start } else { Duration::ZERO };
                    spent += if packs { packed } else { Duration::ZERO };
                }
                spent
            });
        });
    }
}

criterion_group!(benches, stages);
criterion_main!(benches);
