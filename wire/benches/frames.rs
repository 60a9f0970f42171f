//! What a frame costs on each side, in nanoseconds an event: `cargo bench --workspace --bench frames`.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use tapio_wire::compress::Compression;
use tapio_wire::event::{Body, Detail, Event, Lane, Source, Tcp};
use tapio_wire::frame::{Encoder, Frame, Header, Stamp};
use tapio_wire::ledger::Ledger;

const EVENTS: u64 = 4096;

/// Events of mixed kinds whose values differ as real ones do.
fn mixed() -> Body {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let event = |i: u64| {
        let value = random();
        let body = match value % 10 {
            0..6 => Detail::Tcp(Tcp {
                source: [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 255, 255, 10, 0, 3, (value >> 8) as u8],
                destination: [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 255, 255, 10, 0, 7, (value >> 16) as u8 % 16],
                duration_us: (value >> 20) as u32 % 50_000,
                kib_sent: (value >> 24) as u32 % 64,
                kib_received: (value >> 30) as u32 % 512,
                source_port: (value >> 32) as u16,
                destination_port: 443,
                change: 1 + (value >> 40) as u8 % 4,
                active: true,
            }),
            6 | 7 => Detail::BlockIo {
                latency_ns: value >> 36,
                bytes: 4096,
                device: 8 << 20,
                error: 0,
                operation: (value >> 50) as u8 % 2,
            },
            8 => Detail::Reclaim { stall_ns: value >> 40, pages: 32, memcg: true },
            _ => Detail::RunQueue { wait_ns: value >> 42 },
        };
        Event {
            time_ns: 1_000_000_000 + i * 6_000,
            entity: 0x517c_c1b7_2722_0a95u64.wrapping_mul(value >> 54),
            pid: 1000 + (value >> 44) as u32 % 500,
            source: Source::Ebpf,
            body,
        }
    };
    Body { events: (0..EVENTS).map(event).collect(), ..Body::default() }
}

fn frames(criterion: &mut Criterion) {
    let body = mixed();
    let stamp = Stamp { node: 1, epoch: 1, seq: 1, boottime_ns: 1, realtime_ns: 1, is_final: false };
    let mut encoder = Encoder::default();
    let compressions = [("rows", Compression::Rows), ("lz4", Compression::Lz4), ("none", Compression::None)];
    let mut group = criterion.benchmark_group("frame of 4096 events");
    group.throughput(Throughput::Elements(EVENTS));
    for (name, compression) in compressions {
        let sealed = encoder.seal(&body, Lane::Bulk, compression).expect("within the limits");
        println!("{name}: bytes of the body {}, of the frame {}", sealed.raw_bytes(), sealed.len());
        let bytes = sealed.stamp(&stamp, &Ledger::default());
        group.bench_function(format!("seal, {name}"), |bencher| {
            bencher.iter(|| encoder.seal(black_box(&body), Lane::Bulk, compression).map(|frame| frame.len()));
        });
        group.bench_function(format!("check header and checksums, {name}"), |bencher| {
            bencher.iter(|| Header::check(black_box(&bytes)).is_ok());
        });
        group.bench_function(format!("decode, {name}"), |bencher| {
            bencher.iter(|| Frame::decode(black_box(&bytes)).map(|frame| frame.body().events.len()));
        });
    }
    group.finish();
}

criterion_group!(benches, frames);
criterion_main!(benches);
