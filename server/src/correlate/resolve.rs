//! From an event in a frame to a signal that stands for itself.
//!
//! What enters: one event, its frame, the topology. What must hold: an index past the name table is an unknown name, never a
//! panic; the class of a sender depends only on what the kernel says of it and where it runs, since a comm is easily forged.

use std::sync::Arc;

use tapio_wire::event::{ArchivedDetail, ArchivedEvent, EntityKind};
use tapio_wire::frame::Frame;

use super::facts;
use super::signal::{
    Burst, Detail, EvidenceId, Exec, Exit, Kill, NsPid, Oom, SenderClass, Signal, SignalKind, SignalKinds,
};
use super::topology::{EntityInfo, NodeRef, Topology};

/// Programs that end containers and units in the course of their duty; `*` stands for any ending. The kernel cuts a comm to
/// 15 bytes.
const RUNTIMES: [&str; 24] = [
    "systemd",
    "(sd-executor)",
    "systemd-executo",
    "systemd-shutdow",
    "systemd-logind",
    "init",
    "containerd",
    "containerd-shim*",
    "runc",
    "runc:*",
    "crun",
    "youki",
    "conmon",
    "conmonrs",
    "crio",
    "cri-dockerd",
    "dockerd",
    "kubelet",
    "kubelite",
    "podman",
    "k3s*",
    "rke2*",
    "lxc-start",
    "lxd",
];

/// The signal that a lethal event stands for; `None` when nobody wants its kind.
pub fn lethal(
    node: &NodeRef,
    frame: &Frame,
    index: u32,
    event: &ArchivedEvent,
    topology: &Topology,
    wanted: SignalKinds,
) -> Option<Signal> {
    let name = |index: u32| -> Arc<str> { frame.body().name(index).unwrap_or("").into() };
    let ns = |pid: u32, level: u32| NsPid { pid, level };
    let kind = match &event.body {
        ArchivedDetail::Exec(_) => SignalKind::Exec,
        ArchivedDetail::Exit(_) => SignalKind::Exit,
        ArchivedDetail::Oom(_) => SignalKind::Oom,
        ArchivedDetail::Signal(_) => SignalKind::Kill,
        detail => facts::kind(detail)?,
    };
    if !wanted.contains(kind) {
        return None;
    }
    let pid = event.pid.to_native();
    let entity = topology.describe(node, event.entity.to_native());
    let detail = match &event.body {
        ArchivedDetail::Exec(exec) => Detail::Exec(Exec {
            comm: name(exec.comm.to_native()),
            parent_pid: exec.parent_pid.to_native(),
            ns: ns(exec.ns_pid.to_native(), exec.ns_level.to_native()),
        }),
        ArchivedDetail::Exit(exit) => Detail::Exit(Exit {
            comm: name(exit.comm.to_native()),
            parent_pid: exit.parent_pid.to_native(),
            ns: ns(exit.ns_pid.to_native(), exit.ns_level.to_native()),
            status: exit.status.to_native(),
            start_time_ns: exit.start_time_ns.to_native(),
            oom_score_adj: exit.oom_score_adj.to_native(),
        }),
        ArchivedDetail::Oom(oom) => Detail::Oom(Oom {
            comm: name(oom.comm.to_native()),
            ns: ns(oom.ns_pid.to_native(), oom.ns_level.to_native()),
            allocator_pid: oom.allocator_pid.to_native(),
            allocator_comm: name(oom.allocator_comm.to_native()),
            rss_bytes: oom
                .anon_rss_bytes
                .to_native()
                .saturating_add(oom.file_rss_bytes.to_native())
                .saturating_add(oom.shmem_rss_bytes.to_native()),
            limit_cgroup: name(oom.limit_cgroup.to_native()),
            limit_bytes: oom.limit_bytes.to_native(),
            usage_bytes: oom.usage_bytes.to_native(),
            oom_score_adj: oom.oom_score_adj.to_native(),
        }),
        ArchivedDetail::Signal(signal) => {
            let sender = topology.describe(node, signal.sender_entity.to_native());
            let sender_pid = signal.sender_pid.to_native();
            let sender_comm = name(signal.sender_comm.to_native());
            let sender_class = if signal.from_kernel {
                SenderClass::Kernel
            } else {
                classify(&entity, pid, &sender, sender_pid, &sender_comm)
            };
            Detail::Kill(Kill {
                signal: signal.signal.to_native(),
                code: signal.code.to_native(),
                comm: name(signal.comm.to_native()),
                ns: ns(signal.ns_pid.to_native(), signal.ns_level.to_native()),
                sender_pid,
                sender_comm,
                sender,
                sender_class,
                ignored: signal.result == 1,
            })
        }
        detail => Detail::Fact(Box::new(facts::fact(frame, detail)?)),
    };
    Some(signal(node, frame, index, event, entity, detail))
}

/// The signal that a burst stands for; its evidence is the event that made it one.
pub fn burst(
    node: &NodeRef,
    frame: &Frame,
    index: u32,
    event: &ArchivedEvent,
    topology: &Topology,
    mut burst: Burst,
) -> Signal {
    if let ArchivedDetail::PacketDrop { reason, .. } = &event.body {
        burst.drop_reason = frame.body().name(reason.to_native()).map(Arc::from);
    }
    let entity = topology.describe(node, event.entity.to_native());
    signal(node, frame, index, event, entity, Detail::Burst(burst))
}

fn signal(
    node: &NodeRef,
    frame: &Frame,
    index: u32,
    event: &ArchivedEvent,
    entity: Arc<EntityInfo>,
    detail: Detail,
) -> Signal {
    let header = frame.header();
    let boottime_ns = event.time_ns.to_native();
    let realtime_ns = if boottime_ns <= header.boottime_ns {
        header.realtime_ns.saturating_sub(header.boottime_ns - boottime_ns)
    } else {
        header.realtime_ns.saturating_add(boottime_ns - header.boottime_ns)
    };
    Signal {
        entity,
        pid: event.pid.to_native(),
        boottime_ns,
        realtime_ns,
        evidence: EvidenceId { node: node.id, epoch: header.epoch, seq: header.seq, index },
        detail,
    }
}

fn classify(
    target: &EntityInfo,
    target_pid: u32,
    sender: &EntityInfo,
    sender_pid: u32,
    sender_comm: &str,
) -> SenderClass {
    let in_container = matches!(sender.kind, Some(EntityKind::Container | EntityKind::Pod));
    if sender_pid == target_pid && target_pid != 0 {
        SenderClass::Itself
    } else if sender.id == target.id && target.id != 0 || target.pod_id() != 0 && sender.pod_id() == target.pod_id() {
        SenderClass::Same
    } else if !in_container && is_runtime(sender_comm) {
        SenderClass::Runtime
    } else {
        SenderClass::Outside
    }
}

fn is_runtime(comm: &str) -> bool {
    RUNTIMES.iter().any(|name| match name.strip_suffix('*') {
        Some(start) => comm.starts_with(start),
        None => comm == *name,
    })
}
