//! A node made of frames.

#![allow(dead_code, reason = "each test binary uses its part")]

mod cluster;
mod machine;
mod states;

use std::sync::Arc;

use bytes::Bytes;
pub use machine::{Machine, findings_of, only_state, patterns_of};
use tapio_server::correlate::NodeRef;
use tapio_wire::compress::Compression;
use tapio_wire::event::{
    Body, CgroupUse, Detail, Entity, EntityId, EntityKind, Event, Exit, Lane, NO_NAME, Oom, Role, Signal, Source,
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
    /// Frames as a collector sends them.
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

    /// Sets who was running when the kernel sent the signal that was pushed last.
    pub fn sent_while_running(&mut self, pid: u32) {
        if let Some(Event { body: Detail::Signal(signal), .. }) = self.body.events.last_mut() {
            signal.sender_pid = pid;
        }
    }

    /// Sets the code of the signal that was pushed last: sigaction(2).
    pub fn sent_with_code(&mut self, code: i32) {
        if let Some(Event { body: Detail::Signal(signal), .. }) = self.body.events.last_mut() {
            signal.code = code;
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
            sender_parent: 0,
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
