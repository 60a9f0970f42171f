//! From an event in a frame to a clue that stands for itself.
//!
//! What enters: one event, its frame, the topology. What must hold: an index past the name table is an unknown name, never a
//! panic. The class of a sender depends only on what the kernel says of it and where it runs, since a comm is easily forged.

use std::sync::Arc;

use tapio_wire::event::{ArchivedDetail, ArchivedEvent, ArchivedOom, EntityKind, Role};
use tapio_wire::frame::Frame;
use tapio_wire::program::glob;

use super::clue::{
    Burst, Clue, ClueDetail, ClueKind, ClueKinds, EvidenceId, Exec, Exit, Kill, LimitLevel, NsPid, Oom, SenderClass,
};
use super::facts;
use super::topology::{EntityInfo, NodeRef, Topology};

/// Programs that end containers and units in the course of their duty; `*` stands for any ending. The kernel cuts a comm to
/// 15 bytes.
const RUNTIMES: [&str; 35] = [
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
    "lxc-stop",
    "lxd",
    "incusd",
    "systemd-nspawn",
    "systemd-machine",
    "nomad",
    "hyperkube",
    // gVisor's, sysbox's, BuildKit's own, and Kata's.
    "runsc*",
    "sysbox-runc",
    "buildkit-runc",
    "kata-runtime",
    "kata-agent",
];

/// Of these the programs that run for one step of a container's life. A runtime's daemon starts them, never a service manager.
const STAGES: [&str; 7] = ["runc", "runc:*", "crun", "youki", "runsc*", "sysbox-runc", "buildkit-runc"];

/// Programs that start and watch daemons, also on hosts without systemd. The first process is called `init` here, whatever its name.
const STARTERS: [&str; 21] = [
    "init",
    "systemd",
    "(sd-executor)",
    "systemd-executo",
    "machined",
    "openrc-init",
    "supervise-daemo",
    "runsv",
    "s6-supervise",
    "dinit",
    "monit",
    "supervisord",
    "supervise",
    "k0s",
    // The first process of a machine that is a container itself, or of a user's engines.
    "init(*",
    "tini",
    "docker-init",
    "dumb-init",
    "catatonit",
    "k3d-entrypoint*",
    "rootlesskit",
];

/// Programs that start a runtime's stages and are no runtime's daemon themselves.
const BUILDERS: [&str; 4] = ["buildkitd", "gdn", "guardian", "dadoo"];

/// Units that run container runtimes, kubelet or the service manager: what they start is at its place there.
const RUNTIME_UNITS: [&str; 23] = [
    "containerd.service",
    "docker.service",
    "crio.service",
    "cri-dockerd.service",
    "cri-docker.service",
    "kubelet.service",
    "podman*",
    "snap.docker*",
    "k3s*",
    "rke2*",
    "k0s*",
    "microk8s*",
    "snap.microk8s*",
    "lxc*",
    "snap.lxd*",
    "incus*",
    "systemd-machined.service",
    "systemd-nspawn@*",
    "nomad*",
    "buildkit*",
    "sysbox*",
    "init.scope",
    "systemd-logind.service",
];

/// Scopes in which engines put their conmon, one for each container.
const MONITOR_SCOPES: [&str; 2] = ["libpod-conmon-*", "crio-conmon-*"];

/// Daemons whose duty is to kill before the kernel runs out of memory, and what their units are called.
const OOM_DAEMONS: [&str; 7] =
    ["systemd-oomd", "earlyoom", "oomd", "nohang", "nohang-desktop", "low-memory-mon*", "psi-monitor"];

/// The clue that a lethal event stands for; `None` when nobody wants its kind.
pub fn lethal(
    node: &NodeRef,
    frame: &Frame,
    index: u32,
    event: &ArchivedEvent,
    topology: &Topology,
    wanted: ClueKinds,
) -> Option<Clue> {
    let name = |index: u32| -> Arc<str> { frame.body().name(index).unwrap_or("").into() };
    let ns = |pid: u32, level: u32| NsPid { pid, level };
    let kind = match &event.body {
        ArchivedDetail::Exec(_) => ClueKind::Exec,
        ArchivedDetail::Exit(_) => ClueKind::Exit,
        ArchivedDetail::Oom(_) => ClueKind::Oom,
        ArchivedDetail::Signal(_) => ClueKind::Kill,
        detail => facts::kind(detail)?,
    };
    if !wanted.contains(kind) {
        return None;
    }
    let pid = event.pid.to_native();
    let entity = topology.describe(node, event.entity.to_native());
    let detail = match &event.body {
        ArchivedDetail::Exec(exec) => ClueDetail::Exec(Exec {
            comm: name(exec.comm.to_native()),
            parent_pid: exec.parent_pid.to_native(),
            ns: ns(exec.ns_pid.to_native(), exec.ns_level.to_native()),
            role: Role::from_u8(exec.role),
        }),
        ArchivedDetail::Exit(exit) => ClueDetail::Exit(Exit {
            comm: name(exit.comm.to_native()),
            parent_pid: exit.parent_pid.to_native(),
            ns: ns(exit.ns_pid.to_native(), exit.ns_level.to_native()),
            status: exit.status.to_native(),
            start_time_ns: exit.start_time_ns.to_native(),
            oom_score_adj: exit.oom_score_adj.to_native(),
            role: Role::from_u8(exit.role),
        }),
        ArchivedDetail::Oom(event) => ClueDetail::Oom(oom(frame, event, &entity)),
        ArchivedDetail::Signal(signal) => {
            let sender = topology.describe(node, signal.sender_entity.to_native());
            let sender_pid = signal.sender_pid.to_native();
            let sender_comm = name(signal.sender_comm.to_native());
            let parent = signal.sender_parent.to_native().checked_sub(1).and_then(|name| frame.body().name(name));
            let sender_class = if signal.from_kernel {
                SenderClass::Kernel
            } else {
                classify(&entity, pid, &Sender { entity: &sender, pid: sender_pid, comm: &sender_comm, parent })
            };
            ClueDetail::Kill(Kill {
                signal: signal.signal.to_native(),
                code: signal.code.to_native(),
                comm: name(signal.comm.to_native()),
                ns: ns(signal.ns_pid.to_native(), signal.ns_level.to_native()),
                sender_pid,
                sender_comm,
                sender,
                sender_class,
                ignored: signal.result == 1,
                role: Role::from_u8(signal.role),
                over_cpu_limit: signal.over_cpu_limit != 0,
                repeats: signal.repeats.to_native(),
            })
        }
        detail => {
            let describe = |id, path: &str| match topology.get(node.id, id) {
                Some(entity) => entity.to_string(),
                None => path.rsplit('/').next().unwrap_or_default().to_owned(),
            };
            ClueDetail::Fact(Box::new(facts::fact(frame, detail, event.time_ns.to_native(), describe)?))
        }
    };
    Some(clue(node, frame, index, event, entity, detail))
}

/// A kill for memory, with its texts resolved.
fn oom(frame: &Frame, oom: &ArchivedOom, entity: &EntityInfo) -> Oom {
    let name = |index: u32| -> Arc<str> { frame.body().name(index).unwrap_or("").into() };
    Oom {
        comm: name(oom.comm.to_native()),
        ns: NsPid { pid: oom.ns_pid.to_native(), level: oom.ns_level.to_native() },
        allocator_pid: oom.allocator_pid.to_native(),
        allocator_comm: name(oom.allocator_comm.to_native()),
        anon_pages: Oom::pages(oom.anon_rss_bytes.to_native()),
        shmem_pages: Oom::pages(oom.shmem_rss_bytes.to_native()),
        rss_bytes: oom
            .anon_rss_bytes
            .to_native()
            .saturating_add(oom.file_rss_bytes.to_native())
            .saturating_add(oom.shmem_rss_bytes.to_native()),
        limit_cgroup: name(oom.limit_cgroup.to_native()),
        limit_bytes: oom.limit_bytes.to_native(),
        // The kernel saw the limit full. What others freed before the record was read still counts as used.
        usage_bytes: match oom.allocator_inside {
            3 => oom.usage_bytes.to_native().max(oom.limit_bytes.to_native()),
            _ => oom.usage_bytes.to_native(),
        },
        oom_score_adj: oom.oom_score_adj.to_native(),
        role: Role::from_u8(oom.role),
        limit_height: oom.limit_height.to_native(),
        limit_level: LimitLevel::of(
            frame.body().name(oom.limit_cgroup.to_native()).unwrap_or_default(),
            entity,
            oom.limit_height.to_native(),
        ),
        allocator_inside: match oom.allocator_inside {
            1 | 3 => Some(true),
            2 => Some(false),
            _ => None,
        },
        kills_for_limit: oom.allocator_inside == 3,
    }
}

/// The clue that a burst stands for; its evidence is the event that made it one.
pub fn burst(
    node: &NodeRef,
    frame: &Frame,
    index: u32,
    event: &ArchivedEvent,
    topology: &Topology,
    mut burst: Burst,
) -> Clue {
    if let ArchivedDetail::PacketDrop { reason, .. } = &event.body {
        burst.drop_reason = frame.body().name(reason.to_native()).map(Arc::from);
    }
    let entity = topology.describe(node, event.entity.to_native());
    clue(node, frame, index, event, entity, ClueDetail::Burst(burst))
}

fn clue(
    node: &NodeRef,
    frame: &Frame,
    index: u32,
    event: &ArchivedEvent,
    entity: Arc<EntityInfo>,
    detail: ClueDetail,
) -> Clue {
    let header = frame.header();
    let boottime_ns = event.time_ns.to_native();
    let realtime_ns = if boottime_ns <= header.boottime_ns {
        header.realtime_ns.saturating_sub(header.boottime_ns - boottime_ns)
    } else {
        header.realtime_ns.saturating_add(boottime_ns - header.boottime_ns)
    };
    Clue {
        entity,
        pid: event.pid.to_native(),
        boottime_ns,
        realtime_ns,
        evidence: EvidenceId { node: node.id, epoch: header.epoch, seq: header.seq, index },
        detail,
    }
}

/// Who sent a signal. `parent` is the comm of the process that started it, where the collector says that.
struct Sender<'a> {
    entity: &'a EntityInfo,
    pid: u32,
    comm: &'a str,
    parent: Option<&'a str>,
}

fn classify(target: &EntityInfo, target_pid: u32, by: &Sender) -> SenderClass {
    let &Sender { entity: sender, pid: sender_pid, comm: sender_comm, .. } = by;
    let in_container = matches!(sender.kind, Some(EntityKind::Container | EntityKind::Pod));
    // A pod's own cgroup holds what the runtime puts beside its containers: CRI-O's conmon, a virtual machine's shim.
    let beside_containers = sender.kind == Some(EntityKind::Pod) && sender.id == target.pod_id();
    if sender_pid == target_pid && target_pid != 0 {
        SenderClass::Itself
    } else if beside_containers && is_one_of(&RUNTIMES, sender_comm) {
        SenderClass::Runtime
    } else if sender.id == target.id && target.id != 0 || target.pod_id() != 0 && sender.pod_id() == target.pod_id() {
        SenderClass::Same
    } else if in_container {
        SenderClass::Outside
    } else if is_one_of(&OOM_DAEMONS, sender_comm) && is_at_its_place(by, target, &[&OOM_DAEMONS]) {
        SenderClass::OomDaemon
    } else if sender_pid == 1
        || is_one_of(&RUNTIMES, sender_comm) && is_at_its_place(by, target, &[&RUNTIME_UNITS, &MONITOR_SCOPES])
    {
        SenderClass::Runtime
    } else {
        SenderClass::Outside
    }
}

/// Whether a process that bears the name of a runtime or a daemon runs where such a one does: a name is taken by anybody. Where a
/// user runs containers, it is in that user's slice, as its target. Else it is in one of `units`, or in none and a child of who
/// starts such processes. That is neither a person's session nor a shell.
fn is_at_its_place(by: &Sender, target: &EntityInfo, units: &[&[&str]]) -> bool {
    let sender = by.entity;
    let user_slice = |cgroup: &str| {
        cgroup.split('/').find(|part| part.starts_with("user-") && part.ends_with(".slice")).map(str::to_owned)
    };
    if let Some(user) = user_slice(&sender.cgroup) {
        return user_slice(&target.cgroup) == Some(user);
    }
    match sender.kind {
        Some(EntityKind::Unit) => {
            let name = sender.name.strip_suffix(".service").unwrap_or(&sender.name);
            units.iter().any(|units| is_one_of(units, &sender.name) || is_one_of(units, name))
        }
        // A collector of an earlier version does not say whose child it is.
        _ => by.parent.is_none_or(|parent| {
            is_one_of(&RUNTIMES, parent) && !is_one_of(&STARTERS, parent)
                || is_one_of(&BUILDERS, parent)
                || !is_one_of(&STAGES, by.comm) && is_one_of(&STARTERS, parent)
        }),
    }
}

fn is_one_of(names: &[&str], name: &str) -> bool {
    names.iter().any(|known| glob::matches(known, name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entity(kind: EntityKind, id: u64, name: &str, cgroup: &str) -> EntityInfo {
        let node = NodeRef::named("n");
        EntityInfo { kind: Some(kind), name: name.into(), cgroup: cgroup.into(), ..EntityInfo::unknown(&node, id) }
    }

    /// The class of a sender beside a target.
    fn by(target: &EntityInfo, entity: &EntityInfo, comm: &str, parent: Option<&str>) -> &'static str {
        classify(target, 50, &Sender { entity, pid: 60, comm, parent }).name()
    }

    #[test]
    fn without_a_unit_a_runtime_is_known_by_its_parent() {
        let target = entity(EntityKind::Container, 1, "web", "/kubepods/pod1/c1");
        for place in
            [entity(EntityKind::Host, 2, "/", "/"), entity(EntityKind::Host, 2, "/system/runtime", "/system/runtime")]
        {
            let class = |comm: &str, parent: &str| by(&target, &place, comm, Some(parent));
            assert_eq!(class("runc", "containerd-shim"), "runtime");
            assert_eq!(class("runc:[2:INIT]", "runc"), "runtime");
            assert_eq!(class("containerd-shim", "init"), "runtime");
            assert_eq!(class("kubelet", "supervise-daemo"), "runtime");
            assert_eq!(class("runc", "buildkitd"), "runtime");
            assert_eq!(class("containerd-shim", "tini"), "runtime");
            for stage in ["runsc", "runsc-sandbox", "sysbox-runc", "buildkit-runc"] {
                assert_eq!((class(stage, "containerd-shim"), class(stage, "bash")), ("runtime", "outside"), "{stage}");
            }
            assert_eq!(class("containerd", "init(Ubuntu)"), "runtime");
            assert_eq!(class("earlyoom", "init"), "oom_daemon");
            for (comm, parent) in [("runc", "bash"), ("containerd-shim", "sh"), ("earlyoom", "bash"), ("runc", "init")]
            {
                assert_eq!(class(comm, parent), "outside", "{comm} of {parent}: a name that anybody can take");
            }
        }
        let unit = entity(EntityKind::Unit, 2, "containerd.service", "/system.slice/containerd.service");
        assert_eq!(by(&target, &unit, "containerd", Some("sh")), "runtime", "known by its unit");
    }

    #[test]
    fn a_sender_is_known_by_place_not_by_name_alone() {
        let target = entity(EntityKind::Container, 1, "web", "/kubepods/pod1/c1");
        let class =
            |kind, name: &str, cgroup: &str, comm: &str| by(&target, &entity(kind, 2, name, cgroup), comm, None);
        let unit = |name: &str, comm: &str| class(EntityKind::Unit, name, &format!("/system.slice/{name}"), comm);
        assert_eq!(unit("containerd.service", "containerd-shim"), "runtime");
        assert_eq!(unit("k3s-agent.service", "k3s-agent"), "runtime");
        for (name, comm) in [
            ("containerd.service", "runsc"),
            ("incus.service", "incusd"),
            ("nomad.service", "nomad"),
            ("systemd-machined.service", "systemd-machine"),
            ("systemd-nspawn@web.service", "systemd-nspawn"),
        ] {
            assert_eq!((unit(name, comm), unit("backup.service", comm)), ("runtime", "outside"), "{comm}");
        }
        assert_eq!(unit("backup.service", "runc"), "outside", "a name that anybody can take");
        assert_eq!(class(EntityKind::Host, "/", "/", "runc"), "runtime");
        let session = "/user.slice/user-1000.slice/session-3.scope";
        assert_eq!(class(EntityKind::Unit, "session-3.scope", session, "runc"), "outside", "a person's session");
        assert_eq!(class(EntityKind::Container, "x", "/kubepods/pod2/c2", "containerd-shim"), "outside");
        assert_eq!(unit("systemd-oomd.service", "systemd-oomd"), "oom_daemon");
        assert_eq!(unit("backup.service", "earlyoom"), "outside");
        assert_eq!(class(EntityKind::Host, "/", "/", "earlyoom"), "oom_daemon");
        assert_eq!(class(EntityKind::Container, "x", "/kubepods/pod2/c2", "earlyoom"), "outside");
        assert_eq!(class(EntityKind::Unit, "session-3.scope", session, "earlyoom"), "outside", "a person's session");
        let conmon = |scope: &str, comm: &str| class(EntityKind::Unit, scope, &format!("/machine.slice/{scope}"), comm);
        assert_eq!(conmon("libpod-conmon-1.scope", "conmon"), "runtime");
        assert_eq!(conmon("crio-conmon-1.scope", "crun"), "runtime");
        assert_eq!(conmon("libpod-conmon-1.scope", "earlyoom"), "outside", "no OOM daemon runs there");
        assert_eq!(conmon("myconmon.service", "runc"), "outside", "a unit's name is taken as easily");
        assert_eq!(unit("kubepods-watch.service", "runc"), "outside");
        let within = EntityInfo { parent: 9, ..entity(EntityKind::Container, 1, "web", "/kubepods/pod1/c1") };
        let beside = |pod: u64, comm: &str| {
            by(&within, &entity(EntityKind::Pod, pod, "pod1", "/kubepods/pod1/crio-conmon-1"), comm, None)
        };
        assert_eq!((beside(9, "conmon"), beside(9, "sh"), beside(8, "conmon")), ("runtime", "same", "outside"));
        let rootless =
            entity(EntityKind::Container, 1, "web", "/user.slice/user-1000.slice/user@1000.service/libpod-1.scope");
        assert_eq!(by(&rootless, &entity(EntityKind::Unit, 2, "session-3.scope", session), "podman", None), "runtime");
    }

    #[test]
    fn the_level_of_a_limit_is_read_from_its_cgroup() {
        let uid = "8f1c2d3e-4a5b-6c7d-8e9f-0a1b2c3d4e5f";
        let slice = uid.replace('-', "_");
        let pod = format!("/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{slice}.slice");
        let victim = entity(EntityKind::Container, 1, "web", &format!("{pod}/cri-containerd-1.scope"));
        let level = |path: &str, height| LimitLevel::of(path, &victim, height).name();
        assert_eq!(level(&victim.cgroup, 0), "own");
        assert_eq!(level(&format!("{}/below", victim.cgroup), 1), "inner");
        assert_eq!((level(&pod, 1), level(&format!("/kubepods/burstable/pod{uid}"), 1)), ("pod", "pod"));
        assert_eq!(
            (level("/kubepods.slice/kubepods-burstable.slice", 2), level("/kubepods/besteffort", 2)),
            ("qos", "qos")
        );
        assert_eq!((level("/kubepods.slice", 3), level("/kubepods", 3)), ("allocatable", "allocatable"));
        assert_eq!((level("/system.slice", 1), level("/system.slice/docker.service", 1)), ("slice", "unit"));
        assert_eq!(level("/custom", 1), "other");
    }
}
