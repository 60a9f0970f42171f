//! Bodies with an event of every kind, as each version of the format knows them.

use tapio_wire::entity_id;
use tapio_wire::event::{
    Backend, Body, CgroupUse, ConfigChange, Conntrack, ContainerState, Curve, Detail, Endpoints, Entity, EntityKind,
    Event, Exec, Exit, Gap, HISTOGRAM_SLOTS, Histogram, KubeEvent, LogLines, Measure, Member, NO_NAME, NodeCondition,
    ObjectState, Observation, Oom, PodState, Point, Role, Rollout, Signal, Source, Tcp, Trouble, UnitJob, UnitState,
};

fn event(time_ns: u64, body: Detail) -> Event {
    Event { time_ns, entity: 0x1122_3344_5566_7788, pid: 4711, source: Source::Ebpf, body }
}

/// One event of every kind of version 1, the n-th at time n.
pub fn every_kind() -> Body {
    let kinds = [processes(), measured(), pods(), objects(), units_and_node()].concat();
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
        events: (1..).zip(kinds).map(|(time_ns, detail)| event(time_ns, detail)).collect(),
    }
}

/// Processes and their cgroups.
fn processes() -> Vec<Detail> {
    vec![
        Detail::Exec(Exec { parent_pid: 1, ns_pid: 1, ns_level: 1, comm: 0, path: 2, arguments: NO_NAME, role: 0 }),
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
        Detail::CgroupMade { path: 2 },
        Detail::CgroupRemoved { path: 2 },
    ]
}

/// What the bulk lane measures and lists.
fn measured() -> Vec<Detail> {
    vec![
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
        Detail::Reclaim { stall_ns: 1, pages: 2, memcg: true },
        Detail::BlockIo { latency_ns: 1, bytes: 2, device: 3, error: -5, operation: 1 },
        Detail::SyscallError { count: 1, syscall: 2, errno: 24 },
        Detail::Dns { latency_ns: 1, name: 0, query_type: 1, rcode: 3 },
        Detail::RunQueue { wait_ns: 1 },
        Detail::PacketDrop { count: 1, reason: 2, interface: 3 },
        Detail::Fork { parent_pid: 1, ns_pid: 2, ns_level: 1, comm: 0 },
        Detail::SignalDelivered { signal: 9, code: 0, ns_pid: 1, ns_level: 1, comm: 0 },
        Detail::FileOpen { path: 2, comm: 0, flags: 0 },
        Detail::Histogram(Box::new(Histogram {
            measure: Measure::BlockLatency,
            operation: 1,
            device: 3,
            interval_ns: 4,
            total_ns: 5,
            max_ns: 6,
            counts: [7; HISTOGRAM_SLOTS],
        })),
    ]
}

/// Pods, their containers and Kubernetes' Events.
fn pods() -> Vec<Detail> {
    vec![
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
    ]
}

/// Other objects of Kubernetes.
fn objects() -> Vec<Detail> {
    vec![
        Detail::NodeCondition(Box::new(NodeCondition { condition: 0, reason: 1, message: 2, since_ns: 3, status: 1 })),
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
        Detail::ConfigChange(Box::new(ConfigChange {
            kind: 0,
            namespace: 1,
            name: 2,
            resource_version: 0,
            used_by: vec![7, 8],
            change: 2,
        })),
        Detail::Endpoints(Box::new(Endpoints {
            namespace: 0,
            service: 1,
            cluster_addresses: vec![[1; 16]],
            ports: vec![80],
            backends: vec![Backend { address: [2; 16], pod: 5, port: 8080, is_ready: true }],
        })),
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
    ]
}

/// What systemd says, and what the collector reads itself.
fn units_and_node() -> Vec<Detail> {
    vec![
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
        Detail::UnitJob(Box::new(UnitJob { unit: 0, result: 1 })),
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
        Detail::Gap(Box::new(Gap { what: 0, reason: 1, from_ns: 2, until_ns: 3, found_gone: 4 })),
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
    ]
}

/// What version 2 added: a cgroup's use, and the part that a process has in its container.
pub fn every_kind_of_version_2() -> Body {
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
pub fn every_kind_of_version_3() -> Body {
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
