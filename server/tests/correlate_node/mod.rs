//! A node made of frames.

#![allow(dead_code, reason = "each test binary uses its part")]

mod machine;
mod states;

use std::sync::Arc;

use bytes::Bytes;
pub use machine::{Machine, findings_of, only_state, patterns_of};
use tapio_server::correlate::NodeRef;
use tapio_wire::compress::Compression;
use tapio_wire::event::{
    Backend, Body, CgroupUse, ConfigChange, Conntrack, ContainerState, Detail, Endpoints, Entity, EntityId, EntityKind,
    Event, Exit, KubeEvent, Lane, NO_NAME, NodeCondition, Observation, Oom, PodState, Role, Rollout, Signal, Source,
    Tcp, UnitState,
};
use tapio_wire::frame::{Encoder, Frame, Stamp};
use tapio_wire::ledger::{Ledger, Reason, Stage};

pub const SECOND: u64 = 1_000_000_000;
pub const MS: u64 = 1_000_000;
pub const MIB: u64 = 1 << 20;
/// The moment since 1970 at which the nodes booted.
pub const BOOTED: u64 = 1_700_000_000 * SECOND;

pub const SIGKILL: u32 = 9;
pub const SIGSEGV: u32 = 11;
pub const SIGTERM: u32 = 15;

pub struct Node {
    pub node: NodeRef,
    pub epoch: u64,
    /// The moment since 1970 at which it booted, by its clock as it is set now.
    pub booted_ns: u64,
    seq: u64,
    body: Body,
    ledger: Ledger,
    encoder: Encoder,
    pub frames: Vec<Arc<Frame>>,
    /// The same, as a collector sends them.
    pub bytes: Vec<Bytes>,
}

/// A process as the kernel sees it.
#[derive(Clone, Copy)]
pub struct Process {
    pub entity: EntityId,
    pub pid: u32,
    pub ns_pid: u32,
    pub ns_level: u32,
    pub comm: &'static str,
    pub role: Role,
    pub parent_pid: u32,
}

impl Process {
    pub fn of_node(entity: EntityId, pid: u32, comm: &'static str) -> Self {
        Self { entity, pid, ns_pid: pid, ns_level: 0, comm, role: Role::Unknown, parent_pid: 1 }
    }

    pub fn init(entity: EntityId, pid: u32, comm: &'static str) -> Self {
        Self { entity, pid, ns_pid: 1, ns_level: 1, comm, role: Role::Unknown, parent_pid: 1 }
    }

    pub fn child(entity: EntityId, pid: u32, comm: &'static str) -> Self {
        Self { entity, pid, ns_pid: 7, ns_level: 1, comm, role: Role::Unknown, parent_pid: 1 }
    }
}

/// What the memory cgroup above a victim is, and whether who allocated is below it.
#[derive(Clone, Copy)]
pub struct FullLimit {
    pub cgroup: &'static str,
    pub height: u32,
    pub limit_bytes: u64,
    pub usage_bytes: u64,
    pub allocator_inside: u8,
}

impl Node {
    /// An OOM kill at a limit anywhere.
    pub fn oom_at(&mut self, at: u64, process: Process, full: FullLimit) {
        self.oom(at, process, full.limit_bytes, full.usage_bytes);
        let cgroup = self.name(full.cgroup);
        if let Some(Event { body: Detail::Oom(oom), .. }) = self.body.events.last_mut() {
            oom.limit_cgroup = cgroup;
            oom.limit_height = full.height;
            oom.allocator_inside = full.allocator_inside;
        }
    }

    /// What was read of a cgroup: `mib` of anonymous memory, page cache and shared memory.
    pub fn cgroup_use(&mut self, at: u64, process: Process, limit_bytes: u64, mib: [u64; 3], full_mount: &str) {
        let full_mount = if full_mount.is_empty() { NO_NAME } else { self.name(full_mount) };
        let used = CgroupUse {
            cgroup: NO_NAME,
            limit_bytes,
            usage_bytes: mib.iter().sum::<u64>() * MIB,
            anon_bytes: mib[0] * MIB,
            file_bytes: mib[1] * MIB,
            shmem_bytes: mib[2] * MIB,
            full_mount,
            full_mount_bytes: MIB,
            ..CgroupUse::default()
        };
        self.push(at, process.entity, process.pid, Detail::CgroupUse(Box::new(used)));
    }

    /// How often an entity was throttled, of 1000 periods in the last 100 s.
    pub fn throttling(&mut self, at: u64, entity: EntityId, throttled: u64) {
        let used = CgroupUse {
            cgroup: NO_NAME,
            full_mount: NO_NAME,
            window_ns: 100 * SECOND,
            periods: 1000,
            throttled,
            throttled_us: throttled * 100_000,
            ..CgroupUse::default()
        };
        self.push(at, entity, 0, Detail::CgroupUse(Box::new(used)));
    }

    /// The kernel's SIGKILL for used up CPU time.
    pub fn over_cpu_limit(&mut self, at: u64, target: Process) {
        self.signal(at, target, SIGKILL, None);
        if let Some(Event { body: Detail::Signal(signal), .. }) = self.body.events.last_mut() {
            signal.over_cpu_limit = 1;
        }
    }

    /// Of the signal pushed last: who was running when the kernel sent it.
    pub fn sent_while_running(&mut self, pid: u32) {
        if let Some(Event { body: Detail::Signal(signal), .. }) = self.body.events.last_mut() {
            signal.sender_pid = pid;
        }
    }

    /// A signal that its target ignores.
    pub fn ignored(&mut self, at: u64, target: Process, signal: u32, sender: Process) {
        self.signal(at, target, signal, Some(sender));
        if let Some(Event { body: Detail::Signal(signal), .. }) = self.body.events.last_mut() {
            signal.result = 1;
        }
    }

    pub fn new(name: &str) -> Self {
        Self {
            node: NodeRef::named(name),
            epoch: 5,
            booted_ns: BOOTED,
            seq: 0,
            body: Body::default(),
            ledger: Ledger::default(),
            encoder: Encoder::default(),
            frames: Vec::new(),
            bytes: Vec::new(),
        }
    }

    fn name(&mut self, name: &str) -> u32 {
        if let Some(index) = self.body.names.iter().position(|known| known == name) {
            return index as u32;
        }
        self.body.names.push(name.into());
        self.body.names.len() as u32 - 1
    }

    fn describe(&mut self, kind: EntityKind, key: &str, name: &str, parent: EntityId) -> EntityId {
        let id = tapio_wire::entity_id(kind, key);
        let is_container = kind == EntityKind::Container;
        self.body.entities.push(Entity {
            parent,
            container_id: if is_container { format!("{id:016x}").repeat(4) } else { String::new() },
            pod_uid: if parent == 0 { String::new() } else { format!("uid-{parent:x}") },
            cgroup: format!("/{key}"),
            ..Entity::named(kind, id, name)
        });
        id
    }

    pub fn container(&mut self, key: &str, name: &str) -> EntityId {
        self.describe(EntityKind::Container, key, name, 0)
    }

    pub fn container_of(&mut self, pod: &str, key: &str, name: &str) -> EntityId {
        let pod = self.describe(EntityKind::Pod, pod, pod, 0);
        self.describe(EntityKind::Container, key, name, pod)
    }

    pub fn unit(&mut self, name: &str) -> EntityId {
        self.describe(EntityKind::Unit, name, name, 0)
    }

    pub fn host(&mut self, name: &str) -> EntityId {
        self.describe(EntityKind::Host, name, name, 0)
    }

    pub fn push(&mut self, at: u64, entity: EntityId, pid: u32, body: Detail) {
        self.body.events.push(Event { time_ns: at, entity, pid, source: Source::Ebpf, body });
    }

    pub fn exit(&mut self, at: u64, process: Process, status: u32) {
        let comm = self.name(process.comm);
        let exit = Exit {
            start_time_ns: SECOND,
            parent_pid: process.parent_pid,
            ns_pid: process.ns_pid,
            ns_level: process.ns_level,
            status,
            comm,
            oom_score_adj: 0,
            role: process.role as u8,
        };
        self.push(at, process.entity, process.pid, Detail::Exit(exit));
    }

    pub fn oom(&mut self, at: u64, process: Process, limit_bytes: u64, usage_bytes: u64) {
        let comm = self.name(process.comm);
        let limit_cgroup = self.name("limited");
        let oom = Oom {
            comm,
            ns_pid: process.ns_pid,
            ns_level: process.ns_level,
            allocator_pid: process.pid,
            allocator_comm: comm,
            allocator_entity: process.entity,
            total_vm_bytes: usage_bytes,
            anon_rss_bytes: usage_bytes - usage_bytes / 8,
            file_rss_bytes: 0,
            shmem_rss_bytes: 0,
            limit_cgroup: if limit_bytes == 0 { NO_NAME } else { limit_cgroup },
            limit_bytes,
            usage_bytes,
            limit_height: 0,
            oom_score_adj: 0,
            role: process.role as u8,
            allocator_inside: 0,
        };
        self.push(at, process.entity, process.pid, Detail::Oom(Box::new(oom)));
    }

    /// `sender` is `None` when the kernel sends it.
    pub fn signal(&mut self, at: u64, target: Process, signal: u32, sender: Option<Process>) {
        let comm = self.name(target.comm);
        let from = sender.unwrap_or(target);
        let sender_comm = self.name(from.comm);
        let detail = Signal {
            signal,
            code: 0,
            ns_pid: target.ns_pid,
            ns_level: target.ns_level,
            comm,
            sender_pid: from.pid,
            sender_comm,
            sender_entity: from.entity,
            from_kernel: sender.is_none(),
            result: 0,
            role: target.role as u8,
            over_cpu_limit: 0,
            repeats: 0,
        };
        self.push(at, target.entity, target.pid, Detail::Signal(Box::new(detail)));
    }

    pub fn lose(&mut self, events: u64) {
        let account = self.ledger.account_mut(Source::Ebpf);
        account.drop_events(Stage::Ring, Reason::Full, events);
        account.emitted += events;
    }

    /// Packs what was pushed into a frame stamped at `at`.
    pub fn frame(&mut self, lane: Lane, at: u64) -> Arc<Frame> {
        self.seq += 1;
        let account = self.ledger.account_mut(Source::Ebpf);
        account.emitted += self.body.events.len() as u64;
        account.shipped += self.body.events.len() as u64;
        let sealed = self.encoder.seal(&self.body, lane, Compression::Lz4).expect("a small body fits");
        let stamp = Stamp {
            node: self.node.id,
            epoch: self.epoch,
            seq: self.seq,
            boottime_ns: at,
            realtime_ns: self.booted_ns + at,
            is_final: false,
        };
        let bytes = sealed.stamp(&stamp, &self.ledger);
        self.body.clear();
        let frame = Arc::new(Frame::decode(&bytes).expect("a frame as it was packed"));
        self.frames.push(Arc::clone(&frame));
        self.bytes.push(bytes);
        frame
    }

    /// A container's first process is killed for its limit of 64 MiB.
    pub fn limit_kill(&mut self, entity: EntityId, pid: u32, at: u64) {
        let process = Process::init(entity, pid, "nginx");
        self.oom(at, process, 64 * MIB, 64 * MIB);
        self.signal(at, process, SIGKILL, None);
        self.exit(at + MS, process, SIGKILL);
        self.lethal(at + 2 * MS);
    }

    /// The shim of a container runtime, which runs in the runtime's unit.
    pub fn shim(&mut self) -> Process {
        let unit = self.unit("containerd.service");
        Process::of_node(unit, 55, "containerd-shim")
    }

    /// The runtime stops a container by SIGTERM.
    pub fn stop(&mut self, entity: EntityId, at: u64) {
        let (target, shim) = (Process::init(entity, 100, "nginx"), self.shim());
        self.signal(at, target, SIGTERM, Some(shim));
        self.exit(at + SECOND, target, 143 << 8);
        self.lethal(at + 2 * SECOND);
    }

    /// Packs what was pushed as lethal events.
    pub fn lethal(&mut self, at: u64) {
        self.frame(Lane::Lethal, at);
    }

    /// A burst of reclaim in an entity, in a frame of its own.
    pub fn reclaim(&mut self, at: u64, entity: EntityId) {
        for step in 0..10 {
            let reclaim = Detail::Reclaim { stall_ns: 3 * MS, pages: 64, memcg: true };
            self.push(at + step * MS, entity, 0, reclaim);
        }
        self.frame(Lane::Bulk, at + 20 * MS);
    }
}

/// What Kubernetes and systemd say.
impl Node {
    /// A container with all its names, its pod and its workload.
    pub fn kube_container(&mut self, workload: &str, pod: &str, key: &str) -> EntityId {
        self.kube_container_named(workload, pod, key, "web")
    }

    pub fn kube_container_named(&mut self, workload: &str, pod: &str, key: &str, name: &str) -> EntityId {
        let pod_id = self.kube_pod(workload, pod);
        let id = tapio_wire::entity_id(EntityKind::Container, key);
        self.body.entities.push(Entity {
            parent: pod_id,
            container_id: format!("{id:016x}").repeat(4),
            pod_uid: format!("uid-{pod}"),
            namespace: namespace(pod),
            pod: pod.split_once('/').map_or("", |(_, name)| name).to_owned(),
            container: name.into(),
            image: "shop/web:2".into(),
            workload: workload.into(),
            ..Entity::named(EntityKind::Container, id, format!("{pod}/{name}"))
        });
        id
    }

    pub fn kube_pod(&mut self, workload: &str, pod: &str) -> EntityId {
        self.kube_pod_of(workload, pod, pod)
    }

    /// One of several that have the same name, one after the other.
    pub fn kube_pod_of(&mut self, workload: &str, pod: &str, uid: &str) -> EntityId {
        let id = tapio_wire::entity_id(EntityKind::Pod, uid);
        let parent = workload_of(workload, &namespace(pod));
        self.body.entities.push(Entity {
            parent,
            pod_uid: format!("uid-{uid}"),
            namespace: namespace(pod),
            pod: pod.split_once('/').map_or("", |(_, name)| name).to_owned(),
            workload: workload.into(),
            ..Entity::named(EntityKind::Pod, id, pod)
        });
        id
    }

    /// The node itself.
    pub fn itself(&self) -> EntityId {
        self.node.id
    }

    pub fn kube_event(&mut self, at: u64, entity: EntityId, reason: &str, message: &str) {
        let [reason, message] = [reason, message].map(|text| self.name(text));
        let field_path = self.name("spec.containers{web}");
        let event = KubeEvent {
            reason,
            message,
            kind: NO_NAME,
            namespace: NO_NAME,
            name: NO_NAME,
            field_path,
            component: NO_NAME,
            count: 1,
            first_ns: 0,
            last_ns: 0,
            is_warning: true,
        };
        self.push(at, entity, 0, Detail::KubeEvent(Box::new(event)));
    }

    pub fn container_ended(&mut self, at: u64, entity: EntityId, reason: &str, exit_code: i32) {
        let reason = self.name(reason);
        let state = ContainerState {
            container: NO_NAME,
            image: NO_NAME,
            reason,
            message: NO_NAME,
            exit_code,
            signal: 0,
            restart_count: 1,
            started_ns: 0,
            finished_ns: 0,
            state: 3,
            is_last: true,
            is_ready: false,
            role: 0,
            memory_limit_bytes: 0,
            cpu_limit_milli: 0,
        };
        self.push(at, entity, 0, Detail::ContainerState(Box::new(state)));
    }

    pub fn pod_state(&mut self, at: u64, entity: EntityId, reason: &str, is_deleting: bool) {
        let reason = self.name(reason);
        let phase = self.name("Failed");
        let state = PodState {
            phase,
            reason,
            message: NO_NAME,
            deletion_ns: u64::from(is_deleting),
            deletion_grace_s: 30,
            is_ready: false,
            is_scheduled: true,
            is_gone: false,
            qos: 0,
        };
        self.push(at, entity, 0, Detail::PodState(Box::new(state)));
    }

    pub fn node_condition(&mut self, at: u64, condition: &str, status: u8) {
        let condition = self.name(condition);
        let state = NodeCondition { condition, reason: NO_NAME, message: NO_NAME, since_ns: 0, status };
        let node = self.itself();
        self.push(at, node, 0, Detail::NodeCondition(Box::new(state)));
    }

    pub fn rollout(&mut self, at: u64, workload: &str, namespace: &str, images_before: Option<&str>) {
        let entity = workload_of(workload, namespace);
        let images_before = images_before.map_or(NO_NAME, |images| self.name(images));
        let images = self.name("shop/web:2");
        let rollout = Rollout {
            kind: NO_NAME,
            namespace: NO_NAME,
            name: NO_NAME,
            images,
            images_before,
            reason: NO_NAME,
            message: NO_NAME,
            generation: 2,
            observed_generation: 2,
            desired: 3,
            updated: 1,
            ready: 2,
            unavailable: 1,
            is_gone: false,
        };
        self.body.entities.push(Entity {
            namespace: namespace.into(),
            workload: workload.into(),
            ..Entity::named(EntityKind::Workload, entity, workload)
        });
        self.push(at, entity, 0, Detail::Rollout(Box::new(rollout)));
    }

    pub fn config_change(&mut self, at: u64, used_by: Vec<EntityId>) {
        let [kind, name, resource_version] = ["ConfigMap", "web-config", "42"].map(|text| self.name(text));
        let change = ConfigChange { kind, namespace: NO_NAME, name, resource_version, used_by, change: 2 };
        let node = self.itself();
        self.push(at, node, 0, Detail::ConfigChange(Box::new(change)));
    }

    /// A Service at 10.96.0.`last` with one backend.
    pub fn service(&mut self, at: u64, name: &str, last: u8, port: u16, pod: EntityId, is_ready: bool) {
        let (namespace, service) = name.split_once('/').expect("a namespace");
        let [namespace, service] = [namespace, service].map(|text| self.name(text));
        let endpoints = Endpoints {
            namespace,
            service,
            cluster_addresses: vec![address(last)],
            ports: vec![port],
            backends: vec![Backend { address: address(100 + last), pod, port, is_ready }],
        };
        let node = self.itself();
        self.push(at, node, 0, Detail::Endpoints(Box::new(endpoints)));
    }

    pub fn unit_state(&mut self, at: u64, entity: EntityId, unit: &str, sub_state: &str, result: &str) {
        let [unit, active_state, sub_state, result] = [unit, "failed", sub_state, result].map(|text| self.name(text));
        let state = UnitState {
            unit,
            active_state,
            sub_state,
            result,
            main_code: 1,
            main_status: 1,
            main_pid: 0,
            restarts: 3,
            main_exited_ns: 0,
        };
        self.push(at, entity, 0, Detail::UnitState(Box::new(state)));
    }

    pub fn observation(&mut self, at: u64, entity: EntityId, throttled: u64, pids: u64) {
        let observation = Observation {
            cgroup: NO_NAME,
            memory_limit_bytes: 64 * MIB,
            memory_usage_bytes: 32 * MIB,
            memory_peak_bytes: 0,
            oom_kills: 0,
            limit_hits: 0,
            pids,
            pids_limit: 100,
            throttled,
            throttled_us: throttled * 100_000,
            memory_pressure: 0,
            process: 0,
            process_comm: NO_NAME,
            process_command: NO_NAME,
            process_entity: 0,
            process_uid: 0,
        };
        self.push(at, entity, 0, Detail::Observation(Box::new(observation)));
    }

    /// The table of connections at `entries` of 1000, most of them begun by 10.96.0.`talker`. `dropped` is `u64::MAX` where the
    /// kernel does not report it.
    pub fn conntrack(&mut self, at: u64, entries: u64, dropped: u64, talker: u8) {
        let table = Conntrack {
            entries,
            entries_max: 1000,
            dropped,
            early_dropped: 0,
            top_address: address(talker),
            top_entries: 700,
            looked_at: 1000,
            is_full: entries >= 950,
        };
        let node = self.itself();
        self.push(at, node, 0, Detail::Conntrack(Box::new(table)));
    }

    /// Packets that the kernel dropped for a reason.
    pub fn packet_drop(&mut self, at: u64, entity: EntityId, reason: &str, count: u64) {
        let reason = self.name(reason);
        self.push(at, entity, 0, Detail::PacketDrop { count, reason, interface: 0 });
        self.frame(Lane::Bulk, at + MS);
    }

    /// Connections to 10.96.0.`last`: change 2 refused, 6 SYN retransmitted.
    pub fn connects(&mut self, at: u64, entity: EntityId, last: u8, change: u8) {
        for step in 0..4 {
            let tcp = Tcp {
                source: address(1),
                destination: address(last),
                duration_us: 0,
                kib_sent: 0,
                kib_received: 0,
                source_port: 40_000,
                destination_port: 5432,
                change,
                active: true,
            };
            self.push(at + step * SECOND, entity, 0, Detail::Tcp(tcp));
        }
        self.frame(Lane::Bulk, at + 4 * SECOND);
    }

    pub fn syscall_error(&mut self, at: u64, entity: EntityId, errno: u32) {
        self.push(at, entity, 0, Detail::SyscallError { count: 5, syscall: 1, errno });
        self.frame(Lane::Bulk, at + MS);
    }
}

pub fn address(last: u8) -> [u8; 16] {
    std::net::Ipv4Addr::new(10, 96, 0, last).to_ipv6_mapped().octets()
}

fn namespace(pod: &str) -> String {
    pod.split_once('/').map_or("", |(namespace, _)| namespace).to_owned()
}

/// The entity of `Deployment/web`.
pub fn workload_of(workload: &str, namespace: &str) -> EntityId {
    let (kind, name) = workload.split_once('/').expect("a kind and a name");
    tapio_wire::entity_id(EntityKind::Workload, &format!("{kind}/{namespace}/{name}"))
}
