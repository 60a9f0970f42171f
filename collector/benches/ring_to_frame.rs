//! What an event costs the collector, from the ring to the compressed frame, in one thread.
//!
//! - `drain_and_decode`: records of a memfd ring become a batch.
//! - `pack`: a batch becomes a compressed, sealed frame, `pack, lz4` with the other compression.
//! - `ring_to_frame`: draining and packing, one after the other.
//!
//! The mix: 55 % TCP, the rest block I/O, reclaim and run queue waits, of 200 cgroups, with an exit among each hundred. Values
//! differ as real ones do: what is all alike would compress in no time. Run with
//! `cargo bench --workspace --bench ring_to_frame`; the `thrpt` line is events, so 1/thrpt is the cost of one. It is this thread's CPU time, so
//! that others on the machine count little; writing into the ring is not counted.

use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use rustix::time::{ClockId, clock_gettime};
use tapio_collector::intake::Intake;
use tapio_collector::intake::identity::Identity;
use tapio_collector::intake::pass::Pass;
use tapio_collector::intake::source_context::SourceContext;
use tapio_collector::outbox::queue::{OpenLanes, Queues};
use tapio_collector::settings::config::Config;
use tapio_probes::record::{self, RecordKind};
use tapio_ringbuf::{Limits, Reader, Writer};
use tapio_wire::compress::Compression;
use tapio_wire::event::{Body, Lane, Source};
use tapio_wire::frame::Encoder;
use zerocopy::{FromZeros, IntoBytes};

const EVENTS: usize = 4096;
const CGROUPS: u64 = 200;

/// xorshift64 (Marsaglia 2003).
fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

fn records() -> Vec<Vec<u8>> {
    let mut state = 0x9e37_79b9_7f4a_7c15;
    let record = |number: u64| {
        let value = random(&mut state);
        let cgroup = (value >> 54) % CGROUPS;
        let header = |kind: RecordKind, size: usize| record::Header {
            kind: kind as u16,
            size: size as u16,
            cpu: (value % 4) as u32,
            time_ns: 1_000_000_000 + number * 6_000 + value % 5_000,
            cgroup_id: 1000 + cgroup,
            pid: (4000 + cgroup * 16 + value % 4) as u32,
            tid: (4000 + cgroup * 16 + value % 8) as u32,
        };
        let address = |last: u64| [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 255, 255, 10, 244, cgroup as u8, last as u8];
        match value % 100 {
            0 => {
                let mut exit = record::Exit::new_zeroed();
                exit.header = header(RecordKind::Exit, size_of_val(&exit));
                exit.start_time_ns = value >> 20;
                exit.comm = record::comm("worker");
                exit.as_bytes().to_vec()
            }
            1..=55 => {
                let mut tcp = record::Tcp::new_zeroed();
                tcp.header = header(RecordKind::Tcp, size_of_val(&tcp));
                (tcp.source, tcp.destination) = (address(value >> 8), address(16 + (value >> 16) % 64));
                (tcp.source_port, tcp.destination_port) = (32_768 + (value >> 32) as u16 % 28_000, 443);
                (tcp.duration_ns, tcp.change) = ((value >> 20) % 200_000_000, 1 + (value >> 40) as u8 % 4);
                (tcp.bytes_sent, tcp.bytes_received) = ((value >> 24) % (1 << 16), (value >> 30) % (1 << 19));
                tcp.as_bytes().to_vec()
            }
            56..=75 => {
                let mut io = record::BlockIo::new_zeroed();
                io.header = header(RecordKind::BlockIo, size_of_val(&io));
                (io.latency_ns, io.bytes, io.device) = (value >> 36, 4096 << (value % 8), 259 << 20);
                io.operation = (value >> 50) as u8 % 2;
                io.as_bytes().to_vec()
            }
            76..=85 => {
                let mut reclaim = record::Reclaim::new_zeroed();
                reclaim.header = header(RecordKind::Reclaim, size_of_val(&reclaim));
                (reclaim.stall_ns, reclaim.pages_reclaimed, reclaim.memcg) = (value >> 38, (value >> 12) % 4096, 1);
                reclaim.as_bytes().to_vec()
            }
            _ => {
                let mut wait = record::RunQueue::new_zeroed();
                wait.header = header(RecordKind::RunQueue, size_of_val(&wait));
                wait.wait_ns = value >> 36;
                wait.as_bytes().to_vec()
            }
        }
    };
    (0..EVENTS as u64).map(record).collect()
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
    context: SourceContext,
    intake: Intake,
    encoder: Encoder,
    compression: Compression,
}

impl Bench {
    fn new(compression: Compression) -> Self {
        let mut config = Config::default();
        config.collector.max_events_per_sec = 0;
        let (queues, _parker) = Queues::new(64);
        let context = SourceContext::for_config(&config, queues);
        let intake = Intake::new(context.clone(), Source::Shm, Identity::new(Vec::new()));
        let (writer, memfd, _) = Writer::create(4 << 20, "bench").expect("a memfd ring");
        let reader = Reader::from_memfd(memfd, Limits::default()).expect("the ring just made");
        Self { records: records(), writer, reader, context, intake, encoder: Encoder::default(), compression }
    }

    fn fill(&mut self) {
        assert_eq!(self.writer.write_batch(self.records.iter().map(Vec::as_slice)), EVENTS);
    }

    fn drain(&mut self) -> Vec<(Lane, Body)> {
        let mut pass = self.intake.begin();
        let room = pass.room();
        self.reader.drain_ahead(room, &mut pass, Pass::fetch, Pass::accept).expect("an honest writer");
        pass.finish_all();
        std::iter::from_fn(|| self.context.queues.pop(OpenLanes::Both)).collect()
    }

    fn pack(&mut self, bodies: &[(Lane, Body)]) -> usize {
        let seal = |(lane, body): &(Lane, Body)| {
            self.encoder.seal(body, *lane, self.compression).expect("within the limits").len()
        };
        bodies.iter().map(seal).sum()
    }
}

fn stages(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("collector");
    group.throughput(Throughput::Elements(EVENTS as u64));
    for (name, drains, packs, compression) in [
        ("drain_and_decode", true, false, Compression::Rows),
        ("pack", false, true, Compression::Rows),
        ("pack, lz4", false, true, Compression::Lz4),
        ("ring_to_frame", true, true, Compression::Rows),
    ] {
        let mut bench = Bench::new(compression);
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
                        bench.context.queues.recycle(body);
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
