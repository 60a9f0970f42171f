//! Every field of every kind of event, each with a value of its own: two fields that change places change the golden bytes.
//! `server/tests/event_fields.rs` reads them too.

use std::path::Path;

use tapio_wire::compress::Compression;
use tapio_wire::event::{
    Backend, Body, CgroupUse, ConfigChange, Conntrack, ContainerState, Curve, Detail, Endpoints, Event, Exec, Exit,
    Gap, Histogram, Kind, KubeEvent, Lane, LogLines, Measure, Member, NO_NAME, NodeCondition, ObjectState, Observation,
    Oom, PodState, Point, Rollout, Signal, Source, Tcp, Trouble, UnitJob, UnitState,
};
use tapio_wire::frame::{Encoder, Frame, Stamp};
use tapio_wire::ledger::Ledger;

/// Counts up, and makes each number a value of the wanted type.
struct Next(u64);

impl Next {
    fn number(&mut self) -> u64 {
        self.0 += 1;
        self.0
    }
    fn name(&mut self) -> u32 {
        self.number() as u32
    }
    fn u8(&mut self) -> u8 {
        self.number() as u8
    }
    fn u16(&mut self) -> u16 {
        self.number() as u16 * 101
    }
    fn u32(&mut self) -> u32 {
        self.number() as u32 * 65_539
    }
    fn u64(&mut self) -> u64 {
        self.number() * 1_000_000_007
    }
    fn i16(&mut self) -> i16 {
        -(self.number() as i16)
    }
    fn i32(&mut self) -> i32 {
        -(self.number() as i32 * 65_539)
    }
    fn address(&mut self) -> [u8; 16] {
        [self.u8(); 16]
    }
}

fn processes(n: &mut Next) -> Vec<Detail> {
    vec![
        Detail::Exec(Exec {
            parent_pid: n.u32(),
            ns_pid: n.u32(),
            ns_level: n.u32(),
            comm: n.name(),
            path: n.name(),
            arguments: n.name(),
            role: n.u8(),
        }),
        Detail::Exit(Exit {
            start_time_ns: 1_000_000_001,
            parent_pid: n.u32(),
            ns_pid: n.u32(),
            ns_level: n.u32(),
            status: 7 << 8,
            comm: n.name(),
            oom_score_adj: n.i16(),
            role: n.u8(),
        }),
        Detail::Exit(Exit {
            start_time_ns: 0,
            parent_pid: n.u32(),
            ns_pid: n.u32(),
            ns_level: n.u32(),
            status: 11,
            comm: n.name(),
            oom_score_adj: n.i16(),
            role: n.u8(),
        }),
        Detail::Oom(Box::new(Oom {
            comm: n.name(),
            ns_pid: n.u32(),
            ns_level: n.u32(),
            allocator_pid: n.u32(),
            allocator_comm: n.name(),
            allocator_entity: n.u64(),
            total_vm_bytes: n.u64(),
            anon_rss_bytes: n.u64(),
            file_rss_bytes: n.u64(),
            shmem_rss_bytes: n.u64(),
            limit_cgroup: n.name(),
            limit_bytes: n.u64(),
            usage_bytes: n.u64(),
            limit_height: n.u32(),
            oom_score_adj: n.i16(),
            role: n.u8(),
            allocator_inside: n.u8(),
        })),
    ]
}

fn signals_and_cgroups(n: &mut Next) -> Vec<Detail> {
    vec![
        Detail::Signal(Box::new(Signal {
            signal: 15,
            code: n.i32(),
            ns_pid: n.u32(),
            ns_level: n.u32(),
            comm: n.name(),
            sender_pid: n.u32(),
            sender_comm: n.name(),
            sender_parent: 0,
            sender_entity: n.u64(),
            from_kernel: true,
            result: n.u8(),
            role: n.u8(),
            over_cpu_limit: n.u8(),
            repeats: n.u32(),
        })),
        Detail::Signal(Box::new(Signal {
            signal: 6,
            code: 0,
            ns_pid: n.u32(),
            ns_level: 0,
            comm: NO_NAME,
            sender_pid: 0,
            sender_comm: NO_NAME,
            sender_parent: 0,
            sender_entity: 0,
            from_kernel: false,
            result: 0,
            role: 0,
            over_cpu_limit: 0,
            repeats: 0,
        })),
        Detail::CgroupMade { path: n.name() },
        Detail::CgroupRemoved { path: n.name() },
    ]
}

fn bulk(n: &mut Next) -> Vec<Detail> {
    let tcp = |n: &mut Next, change| {
        Detail::Tcp(Tcp {
            source: n.address(),
            destination: [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 255, 255, 10, 0, 0, n.u8()],
            duration_us: n.u32(),
            kib_sent: n.u32(),
            kib_received: n.u32(),
            source_port: n.u16(),
            destination_port: n.u16(),
            change,
            active: true,
        })
    };
    vec![
        tcp(n, 2),
        tcp(n, 77),
        Detail::Reclaim { stall_ns: n.u64(), pages: n.u64(), memcg: true },
        Detail::BlockIo { latency_ns: n.u64(), bytes: n.u64(), device: n.u32(), error: n.i32(), operation: n.u8() },
        Detail::SyscallError { count: n.u64(), syscall: n.u32(), errno: n.u32() },
        Detail::Dns { latency_ns: n.u64(), name: n.name(), query_type: n.u16(), rcode: n.u8() },
        Detail::RunQueue { wait_ns: n.u64() },
        Detail::PacketDrop { count: n.u64(), reason: n.name(), interface: n.u32() },
        Detail::Fork { parent_pid: n.u32(), ns_pid: n.u32(), ns_level: n.u32(), comm: n.name() },
        Detail::SignalDelivered { signal: 9, code: n.i32(), ns_pid: n.u32(), ns_level: n.u32(), comm: n.name() },
        Detail::FileOpen { path: n.name(), comm: n.name(), flags: n.u32() },
        Detail::Histogram(Box::new(Histogram {
            measure: Measure::DnsLatency,
            operation: n.u8(),
            device: n.u32(),
            interval_ns: n.u64(),
            total_ns: n.u64(),
            max_ns: n.u64(),
            counts: std::array::from_fn(|_| n.u32()),
        })),
    ]
}

fn pods(n: &mut Next) -> Vec<Detail> {
    vec![
        Detail::PodState(Box::new(PodState {
            phase: n.name(),
            reason: n.name(),
            message: n.name(),
            deletion_ns: n.u64(),
            deletion_grace_s: n.u32(),
            is_ready: true,
            is_scheduled: false,
            is_gone: true,
            qos: n.u8(),
        })),
        Detail::ContainerState(Box::new(ContainerState {
            container: n.name(),
            image: n.name(),
            reason: n.name(),
            message: n.name(),
            exit_code: n.i32(),
            signal: n.i32(),
            restart_count: n.u32(),
            started_ns: n.u64(),
            finished_ns: n.u64(),
            state: 3,
            is_last: true,
            is_ready: false,
            role: n.u8(),
            memory_limit_bytes: n.u64(),
            cpu_limit_milli: n.u64(),
        })),
        Detail::KubeEvent(Box::new(KubeEvent {
            reason: n.name(),
            message: n.name(),
            kind: n.name(),
            namespace: n.name(),
            name: n.name(),
            field_path: n.name(),
            component: n.name(),
            count: n.u32(),
            first_ns: n.u64(),
            last_ns: n.u64(),
            is_warning: true,
        })),
    ]
}

fn objects(n: &mut Next) -> Vec<Detail> {
    vec![
        Detail::NodeCondition(Box::new(NodeCondition {
            condition: n.name(),
            reason: n.name(),
            message: n.name(),
            since_ns: n.u64(),
            status: 1,
        })),
        Detail::Rollout(Box::new(Rollout {
            kind: n.name(),
            namespace: n.name(),
            name: n.name(),
            images: n.name(),
            images_before: n.name(),
            reason: n.name(),
            message: n.name(),
            generation: n.u64(),
            observed_generation: n.u64(),
            desired: n.u32(),
            updated: n.u32(),
            ready: n.u32(),
            unavailable: n.u32(),
            is_gone: true,
        })),
        Detail::ConfigChange(Box::new(ConfigChange {
            kind: n.name(),
            namespace: n.name(),
            name: n.name(),
            resource_version: n.name(),
            used_by: vec![n.u64(), n.u64()],
            change: 2,
        })),
        Detail::Endpoints(Box::new(Endpoints {
            namespace: n.name(),
            service: n.name(),
            cluster_addresses: vec![n.address(), n.address()],
            ports: vec![n.u16(), n.u16(), n.u16()],
            backends: [true, false, true]
                .map(|is_ready| Backend { address: n.address(), pod: n.u64(), port: n.u16(), is_ready })
                .to_vec(),
        })),
        Detail::ObjectState(Box::new(ObjectState {
            kind: n.name(),
            namespace: n.name(),
            name: n.name(),
            state: n.name(),
            reason: n.name(),
            message: n.name(),
            current: n.u64(),
            desired: n.u64(),
            is_gone: true,
        })),
    ]
}

fn node(n: &mut Next) -> Vec<Detail> {
    vec![
        Detail::UnitState(Box::new(UnitState {
            unit: n.name(),
            active_state: n.name(),
            sub_state: n.name(),
            result: n.name(),
            main_code: n.i32(),
            main_status: n.i32(),
            main_pid: n.u32(),
            restarts: n.u32(),
            main_exited_ns: n.u64(),
        })),
        Detail::UnitJob(Box::new(UnitJob { unit: n.name(), result: n.name() })),
        Detail::Observation(Box::new(Observation {
            cgroup: n.name(),
            memory_limit_bytes: n.u64(),
            memory_usage_bytes: n.u64(),
            memory_peak_bytes: n.u64(),
            oom_kills: n.u64(),
            limit_hits: n.u64(),
            pids: n.u64(),
            pids_limit: u64::MAX,
            throttled: n.u64(),
            throttled_us: n.u64(),
            memory_pressure: n.u32(),
            process: n.u32(),
            process_comm: n.name(),
            process_command: n.name(),
            process_entity: n.u64(),
            process_uid: n.u32(),
        })),
        Detail::Gap(Box::new(Gap {
            what: n.name(),
            reason: n.name(),
            from_ns: n.u64(),
            until_ns: n.u64(),
            found_gone: n.u32(),
        })),
        Detail::Conntrack(Box::new(Conntrack {
            entries: n.u64(),
            entries_max: n.u64(),
            dropped: n.u64(),
            early_dropped: u64::MAX,
            top_address: n.address(),
            top_entries: n.u64(),
            looked_at: n.u64(),
            is_full: true,
        })),
        Detail::Conntrack(Box::new(Conntrack {
            entries: 0,
            entries_max: n.u64(),
            dropped: u64::MAX,
            early_dropped: 0,
            top_address: n.address(),
            top_entries: 0,
            looked_at: 0,
            is_full: false,
        })),
    ]
}

fn use_and_troubles(n: &mut Next) -> Vec<Detail> {
    let point = |n: &mut Next| Point {
        memory_kib: n.u32(),
        file_share: n.u8(),
        shmem_share: n.u8(),
        cpu_milli: n.u16(),
        throttled: n.u8(),
    };
    let member = |n: &mut Next| Member {
        entity: n.u64(),
        cgroup: n.name(),
        usage_bytes: n.u64(),
        limit_bytes: n.u64(),
        oom_score_adj: n.i16(),
    };
    vec![
        Detail::CgroupUse(Box::new(CgroupUse {
            cgroup: n.name(),
            height: n.u32(),
            usage_bytes: n.u64(),
            limit_bytes: n.u64(),
            anon_bytes: n.u64(),
            file_bytes: n.u64(),
            shmem_bytes: n.u64(),
            kernel_bytes: n.u64(),
            window_ns: n.u64(),
            periods: n.u64(),
            throttled: n.u64(),
            throttled_us: n.u64(),
            limit_hits: n.u64(),
            oom_kills: n.u64(),
            members: vec![member(n), member(n)],
            full_mount: n.name(),
            full_mount_bytes: n.u64(),
        })),
        Detail::Trouble(Box::new(Trouble {
            what: n.name(),
            place: n.name(),
            comm: n.name(),
            since_ns: n.u64(),
            value: n.u64(),
            limit: n.u64(),
            is_over: true,
        })),
        Detail::Curve(Box::new(Curve {
            cgroup: n.name(),
            limit_bytes: n.u64(),
            interval_ns: n.u64(),
            points: (0..20).map(|_| point(n)).collect(),
        })),
        Detail::LogLines(Box::new(LogLines { lines: vec![n.name(), n.name()] })),
    ]
}

fn every_field() -> Body {
    let mut n = Next(0);
    let details = [processes, signals_and_cgroups, bulk, pods, objects, node, use_and_troubles]
        .into_iter()
        .flat_map(|some| some(&mut n))
        .collect::<Vec<_>>();
    let event = |(index, body)| Event {
        time_ns: 500_000_000_000 + index as u64,
        entity: 0x1122_3344_5566_7700 + index as u64,
        pid: 1000 + index as u32,
        source: Source::Ebpf,
        body,
    };
    Body {
        names: (0..=n.0).map(|number| format!("name {number}")).collect(),
        entities: Vec::new(),
        events: details.into_iter().enumerate().map(event).collect(),
    }
}

#[test]
fn every_field_of_every_kind_has_its_golden_place() {
    let body = every_field();
    for kind in Kind::ALL {
        assert!(body.events.iter().any(|event| event.kind() == kind), "{} is missing here", kind.name());
    }
    let stamp = Stamp { node: 1, epoch: 2, seq: 3, boottime_ns: 4, realtime_ns: 5, is_final: false };
    for (compression, file) in [(Compression::None, "fields-v3.bin"), (Compression::Rows, "fields-v3-rows.bin")] {
        let sealed = Encoder::default().seal(&body, Lane::Lethal, compression).expect("within the limits");
        let written = sealed.stamp(&stamp, &Ledger::default());
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(file);
        if std::env::var_os("TAPIO_WRITE_GOLDEN").is_some() {
            std::fs::write(&path, &written).expect("written");
        }
        let golden = std::fs::read(&path).expect("the golden frames are part of the repository");
        assert!(
            written[..] == golden[..],
            "{file}: the layout changed: raise frame::VERSION and keep reading the old one"
        );
        let decoded = Frame::decode(&golden).expect("sound");
        assert_eq!(rkyv::deserialize::<Body, rkyv::rancor::Error>(decoded.body()).expect("deserialised"), body);
    }
}
