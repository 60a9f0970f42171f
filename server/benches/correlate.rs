//! What correlation costs an event: routing a frame, and a shard's work on it, for bulk events of many entities.

use std::sync::Arc;
use std::time::Duration;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use tapio_server::correlate::clue::{Clue, ClueKinds};
use tapio_server::correlate::shard::Shard;
use tapio_server::correlate::{BusClosed, ClueBus, NodeRef, RoutedFrame, Topology};
use tapio_wire::compress::Compression;
use tapio_wire::event::{Body, Detail, Event, Lane, Source, Tcp};
use tapio_wire::frame::{Encoder, Frame, Stamp};
use tapio_wire::ledger::Ledger;

const EVENTS: u64 = 4096;
const FRAMES: u64 = 64;

struct Discard;

impl ClueBus for Discard {
    fn publish(&self, clue: Clue) -> Result<(), BusClosed> {
        std::hint::black_box(clue);
        Ok(())
    }
}

/// Mostly TCP, as on a node with traffic; some of everything else.
fn detail(number: u64) -> Detail {
    match number % 16 {
        0 => Detail::Reclaim { stall_ns: 200_000, pages: 32, memcg: true },
        1 => Detail::SyscallError { count: 3, syscall: 257, errno: 2 },
        2 => Detail::RunQueue { wait_ns: 3_000_000 },
        3 => Detail::BlockIo { latency_ns: 20_000_000, bytes: 4096, device: 8, error: 0, operation: 1 },
        4 => Detail::PacketDrop { count: 1, reason: 2, interface: 3 },
        _ => Detail::Tcp(Tcp {
            source: [1; 16],
            destination: [2; 16],
            duration_us: 900,
            kib_sent: 1,
            kib_received: 4,
            source_port: 40_000,
            destination_port: 443,
            change: if number % 16 == 5 { 5 } else { 4 },
            active: true,
        }),
    }
}

/// Frames of one second of a node's events over `entities` entities.
fn frames(entities: u64) -> Vec<Arc<Frame>> {
    let mut encoder = Encoder::default();
    let mut random = 1u64;
    let mut frame = |seq: u64| {
        let mut event = |number: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            Event {
                time_ns: (seq * EVENTS + number) * 4_000,
                entity: 1 + random % entities,
                pid: 100,
                source: Source::Ebpf,
                body: detail(random >> 40),
            }
        };
        let body = Body { events: (0..EVENTS).map(&mut event).collect(), ..Body::default() };
        let sealed = encoder.seal(&body, Lane::Bulk, Compression::Rows).expect("it fits");
        let stamp = Stamp { node: 7, epoch: 1, seq: seq + 1, boottime_ns: 0, realtime_ns: 0, is_final: false };
        let bytes = sealed.stamp(&stamp, &Ledger::default());
        Arc::new(Frame::decode(&bytes).expect("a valid frame"))
    };
    (0..FRAMES).map(&mut frame).collect()
}

fn correlate(criterion: &mut Criterion) {
    let node = NodeRef { id: 7, name: "n".into() };
    for entities in [100, 10_000, 100_000] {
        let frames = frames(entities);
        let mut group = criterion.benchmark_group(format!("{entities} entities"));
        group.throughput(Throughput::Elements(EVENTS));
        group.measurement_time(Duration::from_secs(3)).warm_up_time(Duration::from_secs(1));
        for shards in [1, 4] {
            let mut next = 0;
            group.bench_function(format!("route to {shards}"), |bencher| {
                bencher.iter(|| {
                    next += 1;
                    let frame = Arc::clone(&frames[next % frames.len()]);
                    RoutedFrame::new(node.clone(), frame, shards, None)
                });
            });
        }
        let topology = Arc::new(Topology::new(1000));
        let mut shard = Shard::new(0, 200_000, Duration::from_secs(300), topology, ClueKinds::all(), None);
        let mut next = 0;
        group.bench_function("shard", |bencher| {
            bencher.iter_batched(
                || {
                    next += 1;
                    let frame = Arc::clone(&frames[next % frames.len()]);
                    RoutedFrame::new(node.clone(), frame, 1, None)
                },
                |routed| shard.process(&routed, &Discard),
                BatchSize::SmallInput,
            );
        });
        group.finish();
    }
}

criterion_group!(benches, correlate);
criterion_main!(benches);
