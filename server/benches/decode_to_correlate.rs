//! What an event costs on one core from the bytes of a frame to the state of its entity, stage by stage. Frames are of the load
//! generator's mixed profile, events of 100,000 entities by Zipf's law.
//!
//! `cargo bench -p tapio-server --bench decode_to_correlate`; the goal is 200 ns an event for `all`. Beside it, what the archive's
//! index takes of a decoded frame. Lethal events are left out: they travel in frames of their own, three in a hundred.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use tapio_server::archive::index::Summary;
use tapio_server::correlate::clue::Clue;
use tapio_server::correlate::shard::Shard;
use tapio_server::correlate::{BusClosed, ClueBus, NodeRef, RoutedFrame, Topology};
use tapio_server::findings::PatternSet;
use tapio_wire::compress::Compression;
use tapio_wire::event::{Body, Detail, Event, Lane, Source, Tcp};
use tapio_wire::frame::{Encoder, Frame, Stamp};
use tapio_wire::ledger::Ledger;

const EVENTS: u64 = 4096;
const FRAMES: u64 = 64;
const ENTITIES: usize = 100_000;
const SERVICES: u32 = 64;
const DROP_REASONS: u32 = 5;

struct Discard;

impl ClueBus for Discard {
    fn publish(&self, clue: Clue) -> Result<(), BusClosed> {
        black_box(clue);
        Ok(())
    }
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: u64) -> u64 {
        (self.next() >> 16) % bound
    }

    /// Every order of magnitude as often as the others.
    fn log_uniform(&mut self, least: u64, most: u64) -> u64 {
        let fraction = (self.next() >> 11) as f64 / (1u64 << 53) as f64;
        (least as f64 * (most as f64 / least as f64).powf(fraction)) as u64
    }
}

/// The weights of the mixed profile's bulk events.
fn detail(random: &mut Random) -> Detail {
    match random.below(9200) {
        0..5500 => {
            let change = match random.below(1000) {
                0..400 => 1,
                400..850 => 4,
                850..930 => 5,
                930..950 => 2,
                950..955 => 3,
                _ => 6 + random.below(3) as u8,
            };
            let mut destination = [0; 16];
            destination[10..14].copy_from_slice(&[0xff, 0xff, 10, 96]);
            destination[15] = random.below(u64::from(SERVICES)) as u8;
            let kib = |random: &mut Random| if change == 4 { random.log_uniform(1, 8192) as u32 } else { 0 };
            Detail::Tcp(Tcp {
                source: [1; 16],
                destination,
                duration_us: random.log_uniform(50, 200_000) as u32,
                kib_sent: kib(random),
                kib_received: kib(random),
                source_port: 32_768 + random.below(28_000) as u16,
                destination_port: [443, 8080, 5432, 6379, 9092][random.below(5) as usize],
                change,
                active: random.below(4) > 0,
            })
        }
        5500..6500 => Detail::Dns {
            latency_ns: random.log_uniform(200_000, 2_000_000_000),
            name: random.below(u64::from(SERVICES)) as u32,
            query_type: 1,
            rcode: [0, 0, 0, 3][random.below(4) as usize],
        },
        6500..7300 => Detail::BlockIo {
            latency_ns: random.log_uniform(64_000, 2_000_000_000),
            bytes: 4096 << random.below(8),
            device: 259 << 20,
            error: if random.below(500) == 0 { -5 } else { 0 },
            operation: random.below(2) as u8,
        },
        7300..8100 => Detail::Reclaim {
            stall_ns: random.log_uniform(10_000, 200_000_000),
            pages: random.log_uniform(1, 4096),
            memcg: random.below(10) > 0,
        },
        8100..8900 => Detail::SyscallError { count: random.log_uniform(1, 500), syscall: 257, errno: 2 },
        _ if random.below(8) < 5 => Detail::RunQueue { wait_ns: random.log_uniform(1_000_000, 500_000_000) },
        _ => Detail::PacketDrop {
            count: random.log_uniform(1, 64),
            reason: SERVICES + random.below(u64::from(DROP_REASONS)) as u32,
            interface: 2 + random.below(30) as u32,
        },
    }
}

/// Frames as they come from a node at 40,000 events a second.
fn frames() -> Vec<Bytes> {
    let mut sum = 0.0;
    let popularity: Vec<f64> = (1..=ENTITIES)
        .map(|rank| {
            sum += 1.0 / rank as f64;
            sum
        })
        .collect();
    let mut names: Vec<String> =
        (0..SERVICES).map(|number| format!("service-{number}.team.svc.cluster.local")).collect();
    names.extend((0..DROP_REASONS).map(|number| format!("REASON_{number}")));
    let mut encoder = Encoder::default();
    let mut random = Random(1);
    let mut frame = |seq: u64| {
        let mut event = |number: u64| {
            let point = (random.next() >> 11) as f64 / (1u64 << 53) as f64 * sum;
            let rank = popularity.partition_point(|&sum| sum <= point).min(ENTITIES - 1) as u64;
            Event {
                time_ns: (seq * EVENTS + number) * 25_000,
                // Ids are hashes: neighbours in popularity are none in memory.
                entity: (rank + 1).wrapping_mul(0xd134_2543_de82_ef95),
                pid: 2000 + rank as u32 * 4,
                source: Source::Ebpf,
                body: detail(&mut random),
            }
        };
        let body = Body { names: names.clone(), events: (0..EVENTS).map(&mut event).collect(), ..Body::default() };
        let sealed = encoder.seal(&body, Lane::Bulk, Compression::Rows).expect("it fits");
        let stamp = Stamp { node: 7, epoch: 1, seq: seq + 1, boottime_ns: 0, realtime_ns: 0, is_final: false };
        sealed.stamp(&stamp, &Ledger::default())
    };
    (0..FRAMES).map(&mut frame).collect()
}

fn decode_to_correlate(criterion: &mut Criterion) {
    let node = NodeRef { id: 7, name: "n".into() };
    let bytes = frames();
    let decoded: Vec<Arc<Frame>> =
        bytes.iter().map(|bytes| Arc::new(Frame::decode(bytes).expect("a valid frame"))).collect();
    let patterns = Arc::new(PatternSet::embedded().expect("embedded patterns are valid"));
    let shard = || {
        let patterns = Arc::clone(&patterns);
        let (topology, wanted) = (Arc::new(Topology::new(1000)), patterns.kinds());
        let interest = Arc::new(move |clue: &Clue| patterns.wants(clue));
        Shard::new(0, 2 * ENTITIES, Duration::from_secs(300), topology, wanted, Some(interest))
    };
    let mut group = criterion.benchmark_group("decode to correlate");
    group.throughput(Throughput::Elements(EVENTS));
    group.measurement_time(Duration::from_secs(3)).warm_up_time(Duration::from_secs(1));
    let mut turn = (0..FRAMES as usize).cycle();
    let mut next = move || turn.next().unwrap_or(0);
    group.bench_function("decode", |bencher| {
        bencher.iter(|| Frame::decode(&bytes[next()]).expect("a valid frame"));
    });
    group.bench_function("summary", |bencher| {
        bencher.iter(|| Summary::of(&decoded[next()]));
    });
    for shards in [1, 4] {
        group.bench_function(format!("route to {shards}"), |bencher| {
            bencher.iter(|| RoutedFrame::new(node.clone(), Arc::clone(&decoded[next()]), shards, None));
        });
    }
    let mut one = shard();
    group.bench_function("correlate", |bencher| {
        bencher.iter_batched(
            || RoutedFrame::new(node.clone(), Arc::clone(&decoded[next()]), 1, None),
            |routed| one.process(&routed, &Discard),
            BatchSize::SmallInput,
        );
    });
    let mut one = shard();
    group.bench_function("all", |bencher| {
        bencher.iter(|| {
            let frame = Arc::new(Frame::decode(&bytes[next()]).expect("a valid frame"));
            black_box(Summary::of(&frame));
            one.process(&RoutedFrame::new(node.clone(), frame, 1, None), &Discard)
        });
    });
    group.finish();
}

criterion_group!(benches, decode_to_correlate);
criterion_main!(benches);
