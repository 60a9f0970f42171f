//! Deaths of too little memory.

use std::fs;
use std::time::Duration;

use super::scenario::{Caused, Scenario};
use super::stage::{Pids, Stage};
use crate::clock::wait_for;
use crate::error::{Context, Error};
use crate::inject::cgroup::{Cgroup, MemoryControl};
use crate::inject::{Fault, crash};
use crate::kubelet::ContainerName;

const CHILD: &str = "a child's OOM kill";
const ABOVE: &str = "a limit above";
const LIMIT_MIB: u64 = 32;
const HOLD_LIMIT: Duration = Duration::from_secs(20);
/// How long a container may take to have waited for memory for a while.
const STALL_LIMIT: Duration = Duration::from_secs(120);

pub const ALL: &[Scenario] = &[
    Scenario::new("oom-of-pid-1", "memory limit", |stage| stage.inject(Fault::Oom), &["memory-limit-kill"]),
    Scenario {
        says: &["limit"],
        ..Scenario::new(
            "child-oom-unnoticed",
            CHILD,
            |stage| stage.inject(Fault::SilentChildOom),
            &["silent-child-oom", "child-oom-exit"],
        )
    },
    child_oom("child-oom-init-exits-0", |stage| child_exits(stage, "exit 0")),
    child_oom("child-oom-init-exits-1", |stage| child_exits(stage, "exit 1")),
    child_oom("child-oom-init-exits-137", |stage| child_exits(stage, "exit $?")),
    Scenario {
        beside: &["child-oom-before-exit"],
        ..Scenario::new("child-oom-then-exit-much-later", CHILD, |stage| child_exits(stage, "sleep 4; exit 0"), SILENT)
    },
    Scenario { beside: SILENT, ..Scenario::new("child-oom-then-segv", CHILD, oom_then_segv, &["crashed"]) },
    Scenario {
        // On cgroup v2 processes are in the lowest cgroups only.
        only_where: Some(MemoryControl::V1),
        says: &["inside"],
        ..Scenario::new("limit-of-an-inner-cgroup", "memory limit", inner_limit, &["slice-limit-kill"])
    },
    Scenario::new("oom-shared-pid-namespace", "first process is not pid 1", shared_oom, &["memory-limit-kill"]),
    Scenario { says: &["pod"], ..Scenario::new("pod-limit-full", ABOVE, pod_limit, &["pod-limit-kill"]) },
    child_of_level("pod-limit-full-child-dies", &["raise it (spec.resources.limits.memory)"], pod_limit_child),
    child_of_level("allocatable-limit-full-child-dies", &["helps nothing"], allocatable_limit_child),
    Scenario::new("own-limit-and-the-pods-are-the-same", ABOVE, same_limit, &["memory-limit-kill"]),
    Scenario { says: &["burstable"], ..Scenario::new("qos-limit-full", ABOVE, qos_limit, &["node-allocatable-kill"]) },
    Scenario {
        says: &["allocatable"],
        ..Scenario::new("allocatable-limit-full", ABOVE, allocatable_limit, &["node-allocatable-kill"])
    },
    Scenario {
        says: &["tenant.slice"],
        ..Scenario::new("slice-limit-full", ABOVE, slice_limit, &["slice-limit-kill"])
    },
    // Between two of its own scores a child may be chosen: then the first process is the second victim. Version 2 is caused in emulation
    // only, and there the children are chosen again and again.
    Scenario {
        only_where: Some(MemoryControl::V1),
        ..Scenario::new(
            "many-children-fill-it-init-is-chosen",
            "memory limit",
            crowd,
            &["memory-limit-kill", "second-limit-kill"],
        )
    },
    Scenario::new("exec-session-oom", CHILD, session_oom, &["session-oom"]),
    Scenario {
        says: &["tmpfs", "shmem", "shared memory"],
        never: &["leak"],
        ..Scenario::new("tmpfs-fills-the-limit", "what filled the limit", tmpfs, &["memory-limit-kill"])
    },
    Scenario {
        // The machine in which version 2 is caused has no disk: its files are in a tmpfs.
        only_where: Some(MemoryControl::V1),
        says: &["page cache filled it"],
        never: &["leak", "tmpfs"],
        ..Scenario::new("page-cache-fills-the-limit", "what filled the limit", page_cache, &["memory-limit-kill"])
    },
    Scenario {
        // The second where the cgroup's own figures were read too late, as on a slow machine.
        says: &["its own memory filled it", "of the victim's own share"],
        never: &["tmpfs filled", "page cache filled"],
        ..Scenario::new("anonymous-memory-fills-the-limit", "what filled the limit", own_memory, &["memory-limit-kill"])
    },
    Scenario::new("oom-beside-a-shared-pause", "first process is not pid 1", beside_pause, &["memory-limit-kill"]),
    Scenario {
        only_where: Some(MemoryControl::V1),
        ..Scenario::new("oom-v2-path-of-the-runtime", "hierarchies disagree", hybrid, &["memory-limit-kill"])
    },
    Scenario {
        only_where: Some(MemoryControl::V2),
        says: &["lowered"],
        ..Scenario::new(
            "limit-lowered-under-its-use",
            "memory limit",
            lowered,
            &["memory-limit-kill", "second-limit-kill"],
        )
    },
    Scenario {
        only_where: Some(MemoryControl::V2),
        // Its maker ends it.
        beside: &["killed-from-outside"],
        ..Scenario::new("stuck-above-memory-high", "memory limit", above_high, &["memory-high-stall"])
    },
    Scenario {
        only_where: Some(MemoryControl::V2),
        ..Scenario::new("whole-group-killed", CHILD, whole_group, &["memory-limit-kill"])
    },
];

const SILENT: &[&str] = &["silent-child-oom"];

const fn child_oom(name: &'static str, cause: super::scenario::Cause) -> Scenario {
    Scenario {
        never: &["keeps running", "nothing else explains"],
        ..Scenario::new(name, CHILD, cause, &["child-oom-exit"])
    }
}

/// The limit of a level above the container is full, and a child of the container dies for it.
const fn child_of_level(name: &'static str, says: &'static [&'static str], cause: super::scenario::Cause) -> Scenario {
    Scenario { says, never: &["raise the limit of"], ..Scenario::new(name, ABOVE, cause, SILENT) }
}

fn child_exits(stage: &mut Stage, end: &str) -> Result<Caused, Error> {
    let cgroups = stage.cgroups(Some(LIMIT_MIB))?;
    let script = format!("sleep 0.2; {}; {end}", stage.eat(LIMIT_MIB));
    stage.play_out(&cgroups, Pids::Own, &script)
}

fn oom_then_segv(stage: &mut Stage) -> Result<Caused, Error> {
    let program = stage.program("segv", crash::program())?;
    child_exits(stage, &format!("sleep 0.5; exec {program}"))
}

/// A container makes a cgroup inside of its own and limits that.
fn inner_limit(stage: &mut Stage) -> Result<Caused, Error> {
    let cgroups = stage.cgroups(Some(8 * LIMIT_MIB))?;
    let inner = cgroups.limiting().path().join("inner");
    fs::create_dir(&inner).context(|| format!("make the cgroup {}", inner.display()))?;
    let inner = Cgroup::adopt(inner);
    inner.limit_memory(stage.memory_control()?, LIMIT_MIB << 20)?;
    let join = format!("echo 0 >{}/cgroup.procs", inner.path().display());
    stage.play_out(&cgroups, Pids::Own, &format!("sleep 0.2; {join}; exec {}", stage.eat(LIMIT_MIB)))
}

/// Somebody lowers the limit below what the container holds.
fn lowered(stage: &mut Stage) -> Result<Caused, Error> {
    let cgroups = stage.cgroups(Some(4 * LIMIT_MIB))?;
    let mut actor = stage.start(&cgroups, Pids::Own, "x=$(head -c 48000000 /dev/zero | tr '\\0' a); sleep 30")?;
    let holds = cgroups.limiting().path().join("memory.current");
    wait_for("that the container holds its memory", HOLD_LIMIT, |seen| {
        seen.clone_from(&fs::read_to_string(&holds).unwrap_or_default());
        Ok(seen.trim().parse().ok().filter(|&bytes: &u64| bytes > 45_000_000).map(|_| ()))
    })?;
    cgroups.limiting().limit_memory(MemoryControl::V2, LIMIT_MIB << 20)?;
    actor.wait_end()?;
    Ok(cgroups.caused(&[&actor]))
}

/// Above `memory.high` the kernel lets it wait, and kills nothing.
fn above_high(stage: &mut Stage) -> Result<Caused, Error> {
    let cgroups = stage.cgroups(Some(8 * LIMIT_MIB))?;
    cgroups.limiting().write("memory.high", &(LIMIT_MIB << 20).to_string())?;
    let script = format!("exec {}", stage.eat(3 * LIMIT_MIB));
    let actor = stage.start(&cgroups, Pids::Own, &script)?;
    let pressure = cgroups.limiting().path().join("memory.pressure");
    wait_for("that it has waited for memory for 20 s", STALL_LIMIT, |seen| {
        seen.clone_from(&fs::read_to_string(&pressure).unwrap_or_default());
        let full = seen.lines().find(|line| line.starts_with("full")).unwrap_or_default();
        let total_us = full.split_once("total=").and_then(|(_, total)| total.trim().parse::<u64>().ok());
        Ok(total_us.filter(|total_us| *total_us >= 20_000_000).map(|_| ()))
    })?;
    Ok(cgroups.caused(&[&actor]))
}

/// `memory.oom.group`: the kernel kills all of a container for the memory of one.
fn whole_group(stage: &mut Stage) -> Result<Caused, Error> {
    let cgroups = stage.cgroups(Some(LIMIT_MIB))?;
    cgroups.limiting().write("memory.oom.group", "1")?;
    stage.play_out(&cgroups, Pids::Own, &format!("sleep 0.2; {}; sleep 1; exit 0", stage.eat(LIMIT_MIB)))
}

fn shared_oom(stage: &mut Stage) -> Result<Caused, Error> {
    let cgroups = stage.cgroups(Some(LIMIT_MIB))?;
    let script = format!("sleep 0.2; exec {}", stage.eat(LIMIT_MIB));
    stage.play_out(&cgroups, Pids::Shared, &script)
}

fn hybrid(stage: &mut Stage) -> Result<Caused, Error> {
    let name = stage.name();
    let cgroups = stage.cgroups_at(name.clone(), "system.slice/containerd.service", &name.path(), Some(LIMIT_MIB))?;
    let script = format!("sleep 0.2; exec {}", stage.eat(LIMIT_MIB));
    stage.play_out(&cgroups, Pids::Own, &script)
}

fn tmpfs(stage: &mut Stage) -> Result<Caused, Error> {
    let cgroups = stage.cgroups(Some(2 * LIMIT_MIB))?;
    let fill = "mount -t tmpfs -o size=50m none /mnt && dd if=/dev/zero of=/mnt/a bs=1M count=48 2>/dev/null";
    let script = format!("sleep 0.2; exec unshare -m sh -c '{fill}; exec {}'", stage.eat(LIMIT_MIB));
    stage.play_out(&cgroups, Pids::Own, &script)
}

/// A child holds a file's pages in memory, so that the kernel cannot take them back; the first process then wants the same again.
fn page_cache(stage: &mut Stage) -> Result<Caused, Error> {
    let program = stage.program("file-locking", crash::file_locking_program())?;
    let cgroups = stage.cgroups(Some(2 * LIMIT_MIB))?;
    // Where files are on a disk: the temporary folder may be a tmpfs. It outlives the container, as its pages then do.
    let file = tempfile::Builder::new().prefix("tapio-perf-truth-").tempfile_in("/var/tmp");
    let file = file.context(|| "make a file in /var/tmp".into())?;
    let path = file.path().display();
    let fill = format!("head -c 50331648 /dev/zero >{path}; sync {path}");
    let lock = format!("(echo -1000 >/proc/self/oom_score_adj; exec {program} {path}) & sleep 0.5");
    stage.play_out(&cgroups, Pids::Own, &format!("{fill}; {lock}; exec {}", stage.eat(2 * LIMIT_MIB)))
}

fn own_memory(stage: &mut Stage) -> Result<Caused, Error> {
    let cgroups = stage.cgroups(Some(2 * LIMIT_MIB))?;
    stage.play_out(&cgroups, Pids::Own, &format!("sleep 0.2; exec {}", stage.eat(2 * LIMIT_MIB)))
}

/// A pod that shares its pid namespace: its sandbox is pid 1 of it, and the container joins.
fn beside_pause(stage: &mut Stage) -> Result<Caused, Error> {
    let name = stage.name();
    let other = stage.sibling(&name);
    let sandbox = stage.cgroups_at(other.clone(), &other.path(), &other.path(), None)?;
    let victim = stage.cgroups_at(name.clone(), &name.path(), &name.path(), Some(LIMIT_MIB))?;
    let pause = stage.start(&sandbox, Pids::Own, "exec sleep 30")?;
    let script = format!("sleep 0.2; exec {}", stage.eat(LIMIT_MIB));
    let played = stage.play_out(&victim, Pids::Of(pause.pid), &script);
    drop(pause);
    let mut caused = played?;
    // The sandbox is of the same pod: only the victim is judged.
    caused.pod_uids.clear();
    Ok(caused)
}

fn pod_limit(stage: &mut Stage) -> Result<Caused, Error> {
    let name = stage.name();
    let level = name.pod_path();
    full_level(stage, &level, &name, ContainerName::path, FIRST)
}

fn pod_limit_child(stage: &mut Stage) -> Result<Caused, Error> {
    let name = stage.name();
    let level = name.pod_path();
    full_level(stage, &level, &name, ContainerName::path, CHILD_OF_FIRST)
}

/// Kubelet gives a pod the sum of its containers' limits, and its sandbox needs a little of it.
fn same_limit(stage: &mut Stage) -> Result<Caused, Error> {
    let name = stage.name();
    let _level = stage.limited_level(&name.pod_path(), LIMIT_MIB)?;
    let other = stage.sibling(&name);
    let sandbox = stage.cgroups_at(other.clone(), &other.path(), &other.path(), None)?;
    let victim = stage.cgroups_at(name.clone(), &name.path(), &name.path(), Some(LIMIT_MIB))?;
    let pause = stage.start(&sandbox, Pids::Own, "exec sleep 30")?;
    let played = stage.play_out(&victim, Pids::Own, &format!("sleep 0.2; exec {}", stage.eat(LIMIT_MIB)));
    drop(pause);
    let mut caused = played?;
    // The sandbox is of the same pod: only the victim is judged.
    caused.pod_uids.clear();
    Ok(caused)
}

fn qos_limit(stage: &mut Stage) -> Result<Caused, Error> {
    let name = stage.name();
    let path = |name: &ContainerName| format!("kubepods/burstable/pod{}/{}", name.pod_uid, name.container_id);
    full_level(stage, "kubepods/burstable", &name, path, FIRST)
}

fn allocatable_limit(stage: &mut Stage) -> Result<Caused, Error> {
    let name = stage.name();
    full_level(stage, "kubepods.slice", &name, ContainerName::path, FIRST)
}

fn allocatable_limit_child(stage: &mut Stage) -> Result<Caused, Error> {
    let name = stage.name();
    full_level(stage, "kubepods.slice", &name, ContainerName::path, CHILD_OF_FIRST)
}

fn slice_limit(stage: &mut Stage) -> Result<Caused, Error> {
    let name = stage.name();
    let path = |name: &ContainerName| format!("tenant.slice/docker-{}.scope", name.container_id);
    full_level(stage, "tenant.slice", &name, path, FIRST)
}

/// Children hold what fills the limit, and the first process is killed for it: it has the highest score.
fn crowd(stage: &mut Stage) -> Result<Caused, Error> {
    let cgroups = stage.cgroups(Some(LIMIT_MIB))?;
    // One child after another lowers its score, takes memory, leaves it to a child of its own and ends. Nobody else is born
    // meanwhile, so the first process has the highest score whenever memory is taken, however fast the machine is.
    let script = "echo 1000 >/proc/self/oom_score_adj; while :; do \
                  (echo 0 >/proc/self/oom_score_adj; x=$(head -c 1000000 /dev/zero | tr '\\0' a); \
                  (sleep 60; echo $x) >/dev/null &) & wait $!; done";
    stage.play_out(&cgroups, Pids::Own, script)
}

/// What `kubectl exec` starts is killed for its memory, and the container goes on.
fn session_oom(stage: &mut Stage) -> Result<Caused, Error> {
    let cgroups = stage.cgroups(Some(LIMIT_MIB))?;
    let mut actor = stage.start(
        &cgroups,
        Pids::Own,
        // The kernel may take another one before the first one's memory is given back.
        "echo -1000 >/proc/self/oom_score_adj; trap 'exit 0' TERM; i=0; while [ $i -lt 60 ]; do sleep 0.05; i=$((i+1)); done",
    )?;
    let eat = stage.eat(LIMIT_MIB);
    stage.session(&cgroups, &actor, &eat)?;
    actor.wait_end()?;
    Ok(cgroups.caused(&[&actor]))
}

/// What the victim runs: the first process takes the memory.
const FIRST: fn(&str) -> String = |eat| format!("echo 1000 >/proc/self/oom_score_adj; sleep 0.5; exec {eat}");
/// What the victim runs: a child takes the memory, and the first process lives on for longer than a consequence takes.
const CHILD_OF_FIRST: fn(&str) -> String =
    |eat| format!("sleep 0.5; sh -c 'echo 1000 >/proc/self/oom_score_adj; exec {eat}'; sleep 4; exit 0");

/// One container holds most of what a level may use; another one, without a limit, is chosen by its score.
fn full_level(
    stage: &mut Stage,
    level: &str,
    name: &ContainerName,
    path: fn(&ContainerName) -> String,
    runs: fn(&str) -> String,
) -> Result<Caused, Error> {
    let _level = stage.limited_level(level, 2 * LIMIT_MIB)?;
    let other = stage.sibling(name);
    let holder = stage.cgroups_at(other.clone(), &path(&other), &path(&other), None)?;
    let victim = stage.cgroups_at(name.clone(), &path(name), &path(name), None)?;
    // It holds what it took: 16 MiB of a level's 64, and the victim wants twice that.
    let hold = "echo -900 >/proc/self/oom_score_adj; x=$(head -c 24000000 /dev/zero | tr '\\0' a); sleep 30";
    let holds = stage.start(&holder, Pids::Own, hold)?;
    let script = runs(&stage.eat(2 * LIMIT_MIB));
    let mut dies = stage.start(&victim, Pids::Own, &script)?;
    dies.wait_end()?;
    drop(holds);
    let mut caused = victim.caused(&[&dies]);
    // The pod is the holder's, too: only the victim is judged.
    caused.pod_uids.clear();
    Ok(caused)
}
