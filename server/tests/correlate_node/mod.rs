//! A node made of frames, and the machine from correlator to store that they are driven through.

#![allow(dead_code, reason = "each test binary uses its part")]

use std::sync::Arc;

use tapio_server::correlate::{CorrelateConfig, Correlator, LossBook, LossView, NodeRef, Topology};
use tapio_server::findings::{Finder, FinderConfig, FindingStore, PatternSet};
use tapio_wire::compress::Compression;
use tapio_wire::event::{Body, Detail, Entity, EntityId, EntityKind, Event, Exit, Lane, NO_NAME, Oom, Signal, Source};
use tapio_wire::frame::{Encoder, Frame, Stamp};
use tapio_wire::ledger::{Ledger, Reason, Stage};
use tapio_wire::service::Finding;

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
    seq: u64,
    body: Body,
    ledger: Ledger,
    encoder: Encoder,
    pub frames: Vec<Arc<Frame>>,
}

/// A process as the kernel sees it.
#[derive(Clone, Copy)]
pub struct Process {
    pub entity: EntityId,
    pub pid: u32,
    pub ns_pid: u32,
    pub ns_level: u32,
    pub comm: &'static str,
}

impl Process {
    pub fn of_node(entity: EntityId, pid: u32, comm: &'static str) -> Self {
        Self { entity, pid, ns_pid: pid, ns_level: 0, comm }
    }

    pub fn init(entity: EntityId, pid: u32, comm: &'static str) -> Self {
        Self { entity, pid, ns_pid: 1, ns_level: 1, comm }
    }

    pub fn child(entity: EntityId, pid: u32, comm: &'static str) -> Self {
        Self { entity, pid, ns_pid: 7, ns_level: 1, comm }
    }
}

impl Node {
    pub fn new(name: &str) -> Self {
        Self {
            node: NodeRef::named(name),
            epoch: 5,
            seq: 0,
            body: Body::default(),
            ledger: Ledger::default(),
            encoder: Encoder::default(),
            frames: Vec::new(),
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
            parent_pid: 1,
            ns_pid: process.ns_pid,
            ns_level: process.ns_level,
            status,
            comm,
            oom_score_adj: 0,
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
            realtime_ns: BOOTED + at,
            is_final: false,
        };
        let bytes = sealed.stamp(&stamp, &self.ledger);
        self.body.clear();
        let frame = Arc::new(Frame::decode(&bytes).expect("a frame as it was packed"));
        self.frames.push(Arc::clone(&frame));
        frame
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

pub struct Machine {
    pub correlator: Correlator,
    pub finder: Finder,
    pub store: Arc<FindingStore>,
    pub losses: Arc<LossBook>,
}

impl Machine {
    pub fn start(shards: usize) -> Self {
        let patterns = PatternSet::embedded().expect("embedded patterns are valid");
        Self::with(shards, patterns)
    }

    pub fn with(shards: usize, patterns: PatternSet) -> Self {
        let config = CorrelateConfig { shards: Some(shards), wanted: patterns.kinds(), ..CorrelateConfig::default() };
        Self::sized(&config, patterns)
    }

    pub fn sized(config: &CorrelateConfig, patterns: PatternSet) -> Self {
        Self::chained(config, patterns, FinderConfig::default())
    }

    pub fn chained(config: &CorrelateConfig, patterns: PatternSet, finder: FinderConfig) -> Self {
        let topology = Arc::new(Topology::new(config.entities_max));
        let store = Arc::new(FindingStore::new(1000));
        let losses = Arc::new(LossBook::default());
        let view: Arc<dyn LossView> = Arc::<LossBook>::clone(&losses);
        let finder = Finder::start(&finder, Arc::new(patterns), Arc::clone(&topology), view, Arc::clone(&store))
            .expect("the finder starts");
        let correlator = Correlator::start(config, topology, Arc::clone(&losses), Arc::new(finder.bus()))
            .expect("the correlator starts");
        Self { correlator, finder, store, losses }
    }

    pub fn deliver(&self, node: &NodeRef, frames: &[Arc<Frame>]) {
        for frame in frames {
            self.correlator.deliver_blocking(node.clone(), Arc::clone(frame)).expect("the correlator runs");
        }
    }

    /// Waits until everything delivered has led to what it leads to.
    pub fn settle(&self) {
        self.correlator.drained_blocking().expect("the correlator runs");
        self.finder.bus().barrier().expect("the finder runs");
    }

    /// What frames lead to, the oldest finding first.
    pub fn findings(&self) -> Vec<Finding> {
        self.settle();
        let (mut found, _) = self.store.list(0, None, 1000);
        found.reverse();
        found.iter().map(|finding| (**finding).clone()).collect()
    }
}

/// What a node's frames lead to.
pub fn findings_of(node: &Node) -> Vec<Finding> {
    let machine = Machine::start(1);
    machine.deliver(&node.node, &node.frames);
    machine.findings()
}

/// The patterns that a node's frames lead to, the oldest first.
pub fn patterns_of(node: &Node) -> Vec<String> {
    findings_of(node).into_iter().map(|finding| finding.pattern).collect()
}
