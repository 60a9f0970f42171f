//! Frames as a whole: round trips, golden bytes, and bytes of a hostile or broken peer.

use std::path::Path;

use proptest::prelude::*;
use tapio_wire::compress::Compression;
use tapio_wire::error::FrameError;
use tapio_wire::event::{
    Backend, Body, CgroupUse, ConfigChange, Conntrack, ContainerState, Curve, Detail, Endpoints, Entity, EntityKind,
    Event, Exec, Exit, Gap, HISTOGRAM_SLOTS, Histogram, KubeEvent, Lane, LogLines, Measure, Member, NO_NAME,
    NodeCondition, ObjectState, Observation, Oom, PodState, Point, Role, Rollout, Signal, Source, Tcp, Trouble,
    UnitJob, UnitState,
};
use tapio_wire::frame::{Encoder, Frame, HEADER_BYTES, Header, Stamp, restamp};
use tapio_wire::ledger::{Ledger, Reason, Stage};
use tapio_wire::{entity_id, node_id};

fn event(time_ns: u64, body: Detail) -> Event {
    Event { time_ns, entity: 0x1122_3344_5566_7788, pid: 4711, source: Source::Ebpf, body }
}

/// One event of every kind.
fn every_kind() -> Body {
    Body {
        names: vec!["web".into(), "bash".into(), "/kubepods/pod1".into()],
        entities: vec![Entity {
            parent: entity_id(EntityKind::Pod, "p1"),
            container_id: "c1".into(),
            pod_uid: "p1".into(),
            cgroup: "/kubepods/pod1/c1".into(),
            namespace: "shop".into(),
            pod: "web-0".into(),
            container: "web".into(),
            image: "web:1".into(),
            workload: "StatefulSet/web".into(),
            addresses: vec![[0; 16]],
            ..Entity::named(EntityKind::Container, entity_id(EntityKind::Container, "c1"), "shop/web-0/web")
        }],
        events: vec![
            event(
                1,
                Detail::Exec(Exec {
                    parent_pid: 1,
                    ns_pid: 1,
                    ns_level: 1,
                    comm: 0,
                    path: 2,
                    arguments: NO_NAME,
                    role: 0,
                }),
            ),
            event(
                2,
                Detail::Exit(Exit {
                    start_time_ns: 1,
                    parent_pid: 1,
                    ns_pid: 1,
                    ns_level: 1,
                    status: 9,
                    comm: 0,
                    oom_score_adj: -7,
                    role: 0,
                }),
            ),
            event(
                3,
                Detail::Oom(Box::new(Oom {
                    comm: 0,
                    ns_pid: 1,
                    ns_level: 1,
                    allocator_pid: 2,
                    allocator_comm: 1,
                    allocator_entity: 5,
                    total_vm_bytes: 1,
                    anon_rss_bytes: 6,
                    file_rss_bytes: 7,
                    shmem_rss_bytes: 8,
                    limit_cgroup: 2,
                    limit_bytes: 64 << 20,
                    usage_bytes: 64 << 20,
                    limit_height: 1,
                    oom_score_adj: 1000,
                    role: 0,
                    allocator_inside: 0,
                })),
            ),
            event(
                4,
                Detail::Signal(Box::new(Signal {
                    signal: 9,
                    code: 0,
                    ns_pid: 1,
                    ns_level: 1,
                    comm: 0,
                    sender_pid: 99,
                    sender_comm: 1,
                    sender_parent: 0,
                    sender_entity: 77,
                    from_kernel: false,
                    result: 0,
                    role: 0,
                    over_cpu_limit: 0,
                    repeats: 0,
                })),
            ),
            event(5, Detail::CgroupMade { path: 2 }),
            event(6, Detail::CgroupRemoved { path: 2 }),
            event(
                7,
                Detail::Tcp(Tcp {
                    source: [1; 16],
                    destination: [2; 16],
                    duration_us: 3,
                    kib_sent: 4,
                    kib_received: 5,
                    source_port: 6,
                    destination_port: 7,
                    change: 2,
                    active: true,
                }),
            ),
            event(8, Detail::Reclaim { stall_ns: 1, pages: 2, memcg: true }),
            event(9, Detail::BlockIo { latency_ns: 1, bytes: 2, device: 3, error: -5, operation: 1 }),
            event(10, Detail::SyscallError { count: 1, syscall: 2, errno: 24 }),
            event(11, Detail::Dns { latency_ns: 1, name: 0, query_type: 1, rcode: 3 }),
            event(12, Detail::RunQueue { wait_ns: 1 }),
            event(13, Detail::PacketDrop { count: 1, reason: 2, interface: 3 }),
            event(14, Detail::Fork { parent_pid: 1, ns_pid: 2, ns_level: 1, comm: 0 }),
            event(15, Detail::SignalDelivered { signal: 9, code: 0, ns_pid: 1, ns_level: 1, comm: 0 }),
            event(16, Detail::FileOpen { path: 2, comm: 0, flags: 0 }),
            event(
                17,
                Detail::Histogram(Box::new(Histogram {
                    measure: Measure::BlockLatency,
                    operation: 1,
                    device: 3,
                    interval_ns: 4,
                    total_ns: 5,
                    max_ns: 6,
                    counts: [7; HISTOGRAM_SLOTS],
                })),
            ),
            event(
                18,
                Detail::PodState(Box::new(PodState {
                    phase: 0,
                    reason: 1,
                    message: 2,
                    deletion_ns: 3,
                    deletion_grace_s: 30,
                    is_ready: true,
                    is_scheduled: true,
                    is_gone: false,
                    qos: 2,
                })),
            ),
            event(
                19,
                Detail::ContainerState(Box::new(ContainerState {
                    container: 0,
                    image: 1,
                    reason: 2,
                    message: NO_NAME,
                    exit_code: 137,
                    signal: 0,
                    restart_count: 2,
                    started_ns: 1,
                    finished_ns: 2,
                    state: 3,
                    is_last: true,
                    is_ready: false,
                    role: 0,
                    memory_limit_bytes: 1 << 20,
                    cpu_limit_milli: 500,
                })),
            ),
            event(
                20,
                Detail::KubeEvent(Box::new(KubeEvent {
                    reason: 0,
                    message: 1,
                    kind: 2,
                    namespace: 0,
                    name: 1,
                    field_path: NO_NAME,
                    component: 2,
                    count: 3,
                    first_ns: 4,
                    last_ns: 5,
                    is_warning: true,
                })),
            ),
            event(
                21,
                Detail::NodeCondition(Box::new(NodeCondition {
                    condition: 0,
                    reason: 1,
                    message: 2,
                    since_ns: 3,
                    status: 1,
                })),
            ),
            event(
                22,
                Detail::Rollout(Box::new(Rollout {
                    kind: 0,
                    namespace: 1,
                    name: 2,
                    images: 0,
                    images_before: 1,
                    reason: NO_NAME,
                    message: NO_NAME,
                    generation: 2,
                    observed_generation: 1,
                    desired: 3,
                    updated: 2,
                    ready: 1,
                    unavailable: 2,
                    is_gone: false,
                })),
            ),
            event(
                23,
                Detail::ConfigChange(Box::new(ConfigChange {
                    kind: 0,
                    namespace: 1,
                    name: 2,
                    resource_version: 0,
                    used_by: vec![7, 8],
                    change: 2,
                })),
            ),
            event(
                24,
                Detail::Endpoints(Box::new(Endpoints {
                    namespace: 0,
                    service: 1,
                    cluster_addresses: vec![[1; 16]],
                    ports: vec![80],
                    backends: vec![Backend { address: [2; 16], pod: 5, port: 8080, is_ready: true }],
                })),
            ),
            event(
                25,
                Detail::ObjectState(Box::new(ObjectState {
                    kind: 0,
                    namespace: 1,
                    name: 2,
                    state: 0,
                    reason: 1,
                    message: 2,
                    current: 3,
                    desired: 4,
                    is_gone: false,
                })),
            ),
            event(
                26,
                Detail::UnitState(Box::new(UnitState {
                    unit: 0,
                    active_state: 1,
                    sub_state: 2,
                    result: 0,
                    main_code: 1,
                    main_status: 3,
                    main_pid: 0,
                    restarts: 4,
                    main_exited_ns: 5,
                })),
            ),
            event(27, Detail::UnitJob(Box::new(UnitJob { unit: 0, result: 1 }))),
            event(
                28,
                Detail::Observation(Box::new(Observation {
                    cgroup: 2,
                    memory_limit_bytes: 1,
                    memory_usage_bytes: 2,
                    memory_peak_bytes: 3,
                    oom_kills: 4,
                    limit_hits: 5,
                    pids: 6,
                    pids_limit: 7,
                    throttled: 8,
                    throttled_us: 9,
                    memory_pressure: 10,
                    process: 11,
                    process_comm: 0,
                    process_command: 1,
                    process_entity: 12,
                    process_uid: 13,
                })),
            ),
            event(29, Detail::Gap(Box::new(Gap { what: 0, reason: 1, from_ns: 2, until_ns: 3, found_gone: 4 }))),
            event(
                30,
                Detail::Conntrack(Box::new(Conntrack {
                    entries: 99,
                    entries_max: 100,
                    dropped: 1,
                    early_dropped: 2,
                    top_address: [3; 16],
                    top_entries: 4,
                    looked_at: 5,
                    is_full: true,
                })),
            ),
        ],
    }
}

fn stamp() -> Stamp {
    Stamp {
        node: node_id("node-1"),
        epoch: 1_700_000_000_000_000_000,
        seq: 3,
        boottime_ns: 100,
        realtime_ns: 200,
        is_final: false,
    }
}

fn ledger() -> Ledger {
    let mut ledger = Ledger::default();
    let account = ledger.account_mut(Source::Ebpf);
    account.emitted = 20;
    account.shipped = 13;
    account.drop_events(Stage::Ring, Reason::Full, 5);
    ledger
}

const COMPRESSIONS: [Compression; 3] = [Compression::Rows, Compression::Lz4, Compression::None];

fn frame(body: &Body, compression: Compression) -> Vec<u8> {
    let sealed = Encoder::default().seal(body, Lane::Lethal, compression).expect("within the limits");
    sealed.stamp(&stamp(), &ledger()).to_vec()
}

#[test]
fn a_restamped_frame_has_another_place_and_the_same_content() {
    let mut bytes = frame(&every_kind(), Compression::Rows);
    let moved = restamp(&bytes, 9, 1, |ledger| {
        let mut ledger = *ledger;
        ledger.account_mut(Source::Ebpf).drop_events(Stage::Outbox, Reason::Malformed, 2);
        ledger
    });
    let moved = Frame::decode(&moved.expect("a sound frame")).expect("a sound frame");
    let before = Frame::decode(&bytes).expect("sound");
    assert_eq!((moved.header().epoch, moved.header().seq), (9, 1));
    assert_eq!(moved.header().boottime_ns, before.header().boottime_ns);
    assert_eq!(moved.ledger().account(Source::Ebpf).dropped_total(), 7);
    let read = |frame: &Frame| rkyv::deserialize::<Body, rkyv::rancor::Error>(frame.body()).expect("deserialised");
    assert_eq!(read(&moved), read(&before));
    bytes[HEADER_BYTES] ^= 1;
    let legible = Header::check_without_payload(&bytes).expect("the header is sound");
    assert_eq!((legible.0, legible.1), (*before.header(), *before.ledger()));
    bytes[HEADER_BYTES] ^= 1;
    // A damaged one must not get a sound checksum.
    for (at, error) in [(32, FrameError::HeaderChecksum), (HEADER_BYTES, FrameError::PayloadChecksum)] {
        bytes[at] ^= 1;
        assert_eq!(restamp(&bytes, 9, 1, |ledger| *ledger), Err(error));
        bytes[at] ^= 1;
    }
}

#[test]
fn every_kind_of_event_survives_the_wire() {
    let body = every_kind();
    for compression in COMPRESSIONS {
        let decoded = Frame::decode(&frame(&body, compression)).expect("sound");
        let read = rkyv::deserialize::<Body, rkyv::rancor::Error>(decoded.body()).expect("deserialised");
        assert_eq!(read, body);
        assert_eq!(*decoded.ledger(), ledger());
        let header = decoded.header();
        assert_eq!((header.node, header.seq, header.lethal_events), (node_id("node-1"), 3, 30));
        assert_eq!((header.first_time_ns, header.last_time_ns, header.source_events[0]), (1, 30, 30));
    }
}

/// What version 2 added: a cgroup's use, and the part that a process has in its container.
fn every_kind_of_version_2() -> Body {
    let mut body = every_kind();
    for event in &mut body.events {
        match &mut event.body {
            Detail::Exec(exec) => exec.role = Role::First as u8,
            Detail::Exit(exit) => exit.role = Role::Member as u8,
            Detail::Oom(oom) => (oom.role, oom.allocator_inside) = (Role::Session as u8, 1),
            Detail::Signal(signal) => (signal.role, signal.over_cpu_limit) = (Role::First as u8, 1),
            _ => {}
        }
    }
    let member = Member { entity: 4, cgroup: 2, usage_bytes: 30 << 20, limit_bytes: 0, oom_score_adj: -900 };
    let used = CgroupUse {
        cgroup: 2,
        height: 1,
        usage_bytes: 56 << 20,
        limit_bytes: 56 << 20,
        anon_bytes: 40 << 20,
        file_bytes: 1 << 20,
        shmem_bytes: 2 << 20,
        kernel_bytes: 3 << 20,
        window_ns: 60_000_000_000,
        periods: 600,
        throttled: 7,
        throttled_us: 8,
        limit_hits: 9,
        oom_kills: 1,
        members: vec![member],
        full_mount: 1,
        full_mount_bytes: 1 << 20,
    };
    body.events.push(event(31, Detail::CgroupUse(Box::new(used))));
    body
}

/// Makes a body of version 3: what goes wrong with what lives, and how a container's use went.
fn every_kind_of_version_3() -> Body {
    let mut body = every_kind_of_version_2();
    for event in &mut body.events {
        if let Detail::Signal(signal) = &mut event.body {
            (signal.repeats, signal.sender_parent) = (7, 2);
        }
    }
    let trouble =
        Trouble { what: 1, place: 2, comm: 1, since_ns: 1_000_000_000, value: 90, limit: 100, is_over: false };
    body.events.push(event(32, Detail::Trouble(Box::new(trouble))));
    body.events.push(event(34, Detail::LogLines(Box::new(LogLines { lines: vec![1, 2] }))));
    let points = vec![
        Point { memory_kib: 1024, file_share: 10, shmem_share: 20, cpu_milli: 500, throttled: 3 },
        Point { memory_kib: 2048, file_share: 11, shmem_share: 21, cpu_milli: 501, throttled: 4 },
    ];
    let curve = Curve { cgroup: 2, limit_bytes: 1 << 30, interval_ns: 10_000_000_000, points };
    body.events.push(event(33, Detail::Curve(Box::new(curve))));
    body
}

/// The bytes of older versions, as the archive of an older server holds them: this build must go on reading them.
#[test]
fn the_golden_frames_of_older_versions_are_read() {
    let bodies: [(u8, fn() -> Body); 2] = [(1, every_kind), (2, every_kind_of_version_2)];
    for (version, body) in bodies {
        for ending in ["", "-rows"] {
            let file = format!("tests/golden/frame-v{version}{ending}.bin");
            let golden = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(&file));
            let golden = golden.expect("the golden frames are part of the repository");
            let decoded = Frame::decode(&golden).expect("sound");
            assert_eq!(rkyv::deserialize::<Body, rkyv::rancor::Error>(decoded.body()).expect("deserialised"), body());
        }
    }
}

/// The bytes of version 3, which this build writes.
#[test]
fn golden_frames_of_version_3_are_written_and_read() {
    for (compression, file) in [(Compression::None, "frame-v3.bin"), (Compression::Rows, "frame-v3-rows.bin")] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(file);
        let written = frame(&every_kind_of_version_3(), compression);
        if std::env::var_os("TAPIO_WRITE_GOLDEN").is_some() {
            std::fs::write(&path, &written).expect("written");
        }
        let golden = std::fs::read(&path).expect("the golden frames are part of the repository");
        assert_eq!(written, golden, "{file}: the layout changed: raise frame::VERSION and keep reading the old one");
        let decoded = Frame::decode(&golden).expect("sound");
        assert_eq!(
            rkyv::deserialize::<Body, rkyv::rancor::Error>(decoded.body()).expect("deserialised"),
            every_kind_of_version_3()
        );
    }
}

#[test]
fn every_flipped_bit_is_noticed() {
    for compression in [Compression::Rows, Compression::Lz4] {
        let good = frame(&every_kind(), compression);
        for bit in 0..good.len() * 8 {
            let mut damaged = good.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(Frame::decode(&damaged).is_err(), "bit {bit}");
        }
    }
}

#[test]
fn every_cut_and_every_extension_is_refused() {
    for compression in COMPRESSIONS {
        let good = frame(&every_kind(), compression);
        for length in 0..good.len() {
            assert!(Frame::decode(&good[..length]).is_err(), "cut to {length}");
        }
        let mut longer = good;
        longer.push(0);
        assert!(matches!(Frame::decode(&longer), Err(FrameError::Truncated { .. })));
    }
}

/// Recomputes the checksums, as a hostile peer would.
fn resign(bytes: &mut [u8]) {
    let payload = u32::from_le_bytes(bytes[60..64].try_into().expect("four bytes")) as usize;
    let end = (HEADER_BYTES + payload).min(bytes.len());
    let crc = crc32c::crc32c(&bytes[HEADER_BYTES..end]);
    bytes[64..68].copy_from_slice(&crc.to_le_bytes());
    bytes[68..72].fill(0);
    let crc = crc32c::crc32c_append(crc32c::crc32c(&bytes[..HEADER_BYTES]), &bytes[end..]);
    bytes[68..72].copy_from_slice(&crc.to_le_bytes());
}

#[test]
fn a_declared_size_beyond_the_limits_is_refused_without_allocation() {
    for compression in COMPRESSIONS {
        for raw in [u32::MAX, 9 << 20, 1 << 20] {
            let mut bomb = frame(&Body::default(), compression);
            bomb[56..60].copy_from_slice(&raw.to_le_bytes());
            resign(&mut bomb);
            assert!(matches!(Frame::decode(&bomb), Err(FrameError::DeclaredSize { .. })), "{compression:?} {raw}");
        }
    }
    let mut long = frame(&Body::default(), Compression::Lz4);
    long[60..64].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(matches!(Frame::decode(&long), Err(FrameError::TooLong { .. })));
}

#[test]
fn a_header_that_contradicts_its_body_is_refused() {
    let lying = |compression| {
        let mut lying = frame(&every_kind(), compression);
        lying[48..52].copy_from_slice(&12u32.to_le_bytes());
        lying[80..84].copy_from_slice(&12u32.to_le_bytes());
        resign(&mut lying);
        Frame::decode(&lying)
    };
    assert!(matches!(lying(Compression::Lz4), Err(FrameError::Contradiction { .. })));
    // Rows cannot even be distinguished by a wrong number of them.
    assert!(matches!(lying(Compression::Rows), Err(FrameError::Compression)));
    let mut two_ways = frame(&every_kind(), Compression::Lz4);
    two_ways[6] |= 8;
    resign(&mut two_ways);
    assert!(matches!(Frame::decode(&two_ways), Err(FrameError::Compression)));
    let mut unbalanced = frame(&every_kind(), Compression::Lz4);
    unbalanced[48..52].copy_from_slice(&12u32.to_le_bytes());
    resign(&mut unbalanced);
    assert!(matches!(Frame::decode(&unbalanced), Err(FrameError::Contradiction { .. })));
}

#[test]
fn an_unknown_version_says_what_to_do() {
    let mut newer = frame(&Body::default(), Compression::Lz4);
    newer[4..6].copy_from_slice(&(tapio_wire::frame::VERSION + 1).to_le_bytes());
    resign(&mut newer);
    let error = Frame::decode(&newer).err().expect("refused");
    assert!(error.to_string().contains("upgrade the servers first"), "{error}");
}

proptest! {
    #[test]
    fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..4096)) {
        prop_assert!(Frame::decode(&bytes).is_err());
        let _ = Header::peek(&bytes);
    }

    /// Payloads that pass every checksum, but are not what the archive's types demand.
    #[test]
    fn resigned_mutations_are_refused_or_read_within_bounds(
        flips in proptest::collection::vec((0usize..4096, any::<u8>()), 1..8),
        compression in proptest::sample::select(&COMPRESSIONS[..]),
    ) {
        let mut bytes = frame(&every_kind(), compression);
        let end = bytes.len();
        for (at, value) in flips {
            bytes[HEADER_BYTES + at % (end - HEADER_BYTES)] = value;
        }
        resign(&mut bytes);
        if let Ok(frame) = Frame::decode(&bytes) {
            // What was let through can be walked to its last byte.
            let body = frame.body();
            let names: usize = body.names.iter().map(|name| name.len()).sum();
            let sum = body.events.iter().fold(names as u64, |sum, event| {
                sum.wrapping_add(event.time_ns.to_native()).wrapping_add(event.kind() as u64)
            });
            std::hint::black_box(sum);
        }
    }
}
