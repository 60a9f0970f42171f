//! Deaths of a container's own making, and ends that are no death of it.

use std::fs;
use std::path::Path;
use std::time::Duration;

use super::scenario::{Caused, Scenario};
use super::stage::{ContainerCgroups, Pids, Stage};
use crate::clock::pause;
use crate::error::{Context, Error};
use crate::inject::cgroup::Cgroup;
use crate::inject::{Fault, crash};

const LOOP: &[&str] = &["crash-loop"];
const ERROR: &[&str] = &["exited-with-error"];
const CHILD_OOM: &[&str] = &["child-oom-exit"];
const ROLE: &str = "a program with a runtime's name";
const FORMS: &str = "forms of a cgroup's path";
const FAIL: &str = "sleep 0.2; exit 1";

pub const ALL: &[Scenario] = &[
    Scenario::new("segv-of-pid-1", "crash", |stage| stage.inject(Fault::Segv), &["crashed"]),
    Scenario { says: &["abort"], ..Scenario::new("abort-as-pid-1", "crash", abort, &["aborted-as-init"]) },
    Scenario {
        beside: &["crashed"],
        ..Scenario::new("child-aborts-init-exits-134", "a child's crash", child_abort, &["child-crash-exit"])
    },
    Scenario {
        beside: &["crashed"],
        ..Scenario::new(
            "child-segv-init-exits-139",
            "a child's crash",
            |stage| child_segv(stage, "$?"),
            &["child-crash-exit"],
        )
    },
    Scenario {
        beside: &["crashed"],
        ..Scenario::new(
            "child-segv-init-exits-1",
            "a child's crash",
            |stage| child_segv(stage, "1"),
            &["child-crash-before-exit"],
        )
    },
    Scenario {
        says: &["seccomp"],
        ..Scenario::new("system-call-forbidden", "crash", forbidden_call, &["forbidden-system-call"])
    },
    Scenario { says: &["nobody reads"], ..Scenario::new("writes-into-a-closed-pipe", "exit", closed_pipe, ERROR) },
    full_mount("sigbus-full-tmpfs", |stage| bus_error(stage, "sleep 0.4 & exec", "")),
    full_mount("sigbus-of-a-child-full-tmpfs", |stage| bus_error(stage, "", "; sleep 0.4; exit 0")),
    Scenario::new("exits-3-four-times", "crash loop", |stage| stage.inject(Fault::Exit), LOOP),
    Scenario::new("exits-1-three-times-shared-pid-namespace", "first process is not pid 1", shared_loop, LOOP),
    Scenario::new("exits-1", "exit", |stage| script(stage, FAIL), ERROR),
    Scenario::new("entry-point-called-runc-exits-1", ROLE, |stage| called(stage, "runc", FAIL), ERROR),
    Scenario::new("entry-point-called-crun-is-killed-for-memory", ROLE, |stage| called_eats(stage, "crun"), CHILD_OOM),
    Scenario {
        says: &["not found"],
        ..Scenario::new(
            "command-not-found",
            "start",
            |stage| script(stage, "sleep 0.2; exec /nonexistent/command"),
            &["command-cannot-run", "command-not-found"],
        )
    },
    Scenario {
        says: &["cpu"],
        ..Scenario::new(
            "cpu-time-limit",
            "killed by the kernel",
            |stage| script(stage, "ulimit -t 1; while :; do :; done"),
            &["cpu-limit-kill"],
        )
    },
    Scenario {
        names_pod: true,
        ..Scenario::new("docker-in-docker", "docker in docker", docker_in_docker, &["exited-with-error"])
    },
    after_restart(
        "exits-1-after-a-restart-own-pid-namespace",
        |stage| ends_later(stage, &|_| Pids::Own, "exit 1"),
        ERROR,
    ),
    after_restart("exits-1-after-a-restart-host-pid", |stage| ends_later(stage, &|_| Pids::Shared, "exit 1"), ERROR),
    after_restart("exits-1-after-a-restart-shared-pids", |stage| ends_later(stage, &Pids::Of, "exit 1"), ERROR),
    after_restart("oom-after-a-restart-shared-pids", oom_later, &["memory-limit-kill"]),
    silent("pid-namespace-torn-down", |stage| script(stage, "sleep 30 & sleep 0.2; exit 0")),
    silent("inner-pid-namespace-fails-four-times", |stage| {
        script(stage, "for i in 1 2 3 4; do unshare -fp sh -c 'sleep 0.1; exit 1'; done; sleep 0.5; exit 0")
    }),
    silent("exec-session-exits-1", exec_session),
    Scenario::new(
        "path-libpod",
        FORMS,
        |stage| at(stage, |id| format!("machine.slice/libpod-{id}.scope/container")),
        ERROR,
    ),
    Scenario::new("path-crio", FORMS, |stage| at(stage, |id| format!("machine.slice/crio-{id}.scope")), ERROR),
    Scenario::new(
        "path-with-colons",
        FORMS,
        |stage| at(stage, |id| format!("system.slice:cri-containerd:{id}")),
        ERROR,
    ),
    Scenario::new("path-docker", FORMS, |stage| at(stage, |id| format!("docker/{id}")), ERROR),
];

const fn full_mount(name: &'static str, cause: super::scenario::Cause) -> Scenario {
    Scenario {
        // In a pid namespace of its own the collector cannot read the mounts: the finding then names no cause.
        beside: &["child-crash-exit", "bus-error"],
        says: &["/mnt"],
        ..Scenario::new(name, "a full file system", cause, &["bus-error-full"])
    }
}

const fn silent(name: &'static str, cause: super::scenario::Cause) -> Scenario {
    Scenario {
        may_be_silent: true,
        ..Scenario::new(
            name,
            "no death of the container",
            cause,
            &["stopped", "stopped-by-signal", "stopped-from-outside"],
        )
    }
}

const fn after_restart(name: &'static str, cause: super::scenario::Cause, right: &'static [&'static str]) -> Scenario {
    Scenario { never: &["code 3"], ..Scenario::new(name, "the collector was restarted", cause, right) }
}

/// The collector is restarted while a container runs whose first process has a child, an orphan and a session beside it. The session
/// fails, and then the first process ends.
fn ends_later(stage: &mut Stage, pids: &dyn Fn(u32) -> Pids, end: &str) -> Result<Caused, Error> {
    let name = stage.name();
    let other = stage.sibling(&name);
    let sandbox = stage.cgroups_at(other.clone(), &other.path(), &other.path(), None)?;
    let cgroups = stage.cgroups_at(name.clone(), &name.path(), &name.path(), Some(32))?;
    let pause = stage.start(&sandbox, Pids::Own, "exec sleep 60")?;
    let [session_ends, first_ends] =
        ["session", "first"].map(|who| stage.signpost(&format!("{who}-{}", name.container_id)));
    let until = |file: &Path| format!("until [ -e {} ]; do sleep 0.05; done", file.display());
    // The inner shell ends at once: what it started then has a parent outside of the container, but in a namespace of its own.
    let children = "sleep 60 & orphan=$(sh -c 'sleep 60 >/dev/null & echo $!')";
    let script = format!("{children}; {}; kill $! $orphan; {end}", until(&first_ends));
    let mut actor = stage.start(&cgroups, pids(pause.pid), &script)?;
    actor.await_sleep()?;
    let mut session = stage.enter(&cgroups, &actor, &format!("{}; exit 3", until(&session_ends)))?;
    stage.restart_collector()?;
    for (file, who) in [(session_ends, &mut session), (first_ends, &mut actor)] {
        fs::write(&file, "").context(|| format!("write {}", file.display()))?;
        who.wait_end()?;
    }
    drop(pause);
    let mut caused = cgroups.caused(&[&actor]);
    // The sandbox is of the same pod: only the container is judged.
    caused.pod_uids.clear();
    Ok(caused)
}

fn oom_later(stage: &mut Stage) -> Result<Caused, Error> {
    let end = format!("exec {}", stage.eat(32));
    ends_later(stage, &Pids::Of, &end)
}

fn script(stage: &mut Stage, script: &str) -> Result<Caused, Error> {
    let cgroups = stage.cgroups(None)?;
    stage.play_out(&cgroups, Pids::Own, script)
}

/// A container whose image has an entry point of this name.
fn called(stage: &mut Stage, name: &str, script: &str) -> Result<Caused, Error> {
    let cgroups = stage.cgroups(None)?;
    called_in(stage, &cgroups, name, script)
}

fn called_in(stage: &Stage, cgroups: &ContainerCgroups, name: &str, script: &str) -> Result<Caused, Error> {
    let mut actor = stage.start_as(cgroups, Pids::Own, &stage.shell(name)?, script)?;
    actor.wait_end()?;
    Ok(cgroups.caused(&[&actor]))
}

/// The same, with a child of it that its limit kills.
fn called_eats(stage: &mut Stage, name: &str) -> Result<Caused, Error> {
    let cgroups = stage.cgroups(Some(32))?;
    called_in(stage, &cgroups, name, &format!("{}; exit 137", stage.eat(64)))
}

fn abort(stage: &mut Stage) -> Result<Caused, Error> {
    let play = format!("exec {}", stage.play("abort"));
    script(stage, &play)
}

fn forbidden_call(stage: &mut Stage) -> Result<Caused, Error> {
    let program = stage.program("forbidden-call", crash::forbidden_call_program())?;
    script(stage, &format!("sleep 0.2; exec {program}"))
}

fn child_abort(stage: &mut Stage) -> Result<Caused, Error> {
    let play = format!("{}; exit $?", stage.play("abort"));
    script(stage, &play)
}

fn child_segv(stage: &mut Stage, code: &str) -> Result<Caused, Error> {
    let program = stage.program("segv", crash::program())?;
    script(stage, &format!("sleep 0.2; {program}; exit {code}"))
}

/// Writes to a pipe whose reader ends after a byte.
fn closed_pipe(stage: &mut Stage) -> Result<Caused, Error> {
    let cgroups = stage.cgroups(None)?;
    let script = "F=$(mktemp -u); mkfifo $F; (head -c 1 $F >/dev/null; rm $F) & sleep 0.2; exec yes >$F";
    stage.play_out(&cgroups, Pids::Shared, script)
}

/// A process maps a file of a full tmpfs and writes to it.
fn bus_error(stage: &mut Stage, before: &str, after: &str) -> Result<Caused, Error> {
    let program = stage.program("bus-error", crash::bus_error_program())?;
    let cgroups = stage.cgroups(None)?;
    let fills = format!("mount -t tmpfs -o size=1m none /mnt; sleep 0.2; {before} {program} /mnt/file{after}");
    let caused = stage.play_out(&cgroups, Pids::Shared, &format!("exec unshare -m sh -c '{fills}'"))?;
    // What is left of it ends by itself, not by the end of the container.
    pause(Duration::from_millis(400))?;
    Ok(caused)
}

/// The daemon in a pod makes a cgroup that its runtime names like docker's, outside of the pod's own.
fn docker_in_docker(stage: &mut Stage) -> Result<Caused, Error> {
    let cgroups = stage.cgroups(None)?;
    let inner = stage.name();
    let above = stage.inner("docker", &inner.container_id)?;
    let each = |line: fn(&Path) -> String| above.iter().map(|(_, path)| line(path)).collect::<String>();
    let make = each(|path| format!("mkdir {}; ", path.display()));
    let join = each(|path| format!("echo 0 >{}/cgroup.procs; ", path.display()));
    let inside = format!("{join} exec unshare -fp sh -c 'sleep 0.2; exit 1'");
    let played = stage.play_out(&cgroups, Pids::Own, &format!("{make} sh -c \"{inside}\"; sleep 0.5; exit 0"));
    for (_, path) in &above {
        drop(Cgroup::adopt(path.clone()));
    }
    let mut caused = played?;
    caused.container_ids.push(inner.container_id);
    Ok(caused)
}

fn shared_loop(stage: &mut Stage) -> Result<Caused, Error> {
    let mut name = stage.name();
    let mut all = Caused { pod_uids: vec![name.pod_uid.clone()], ..Caused::default() };
    for _ in 0..3 {
        name = stage.sibling(&name);
        let path = name.path();
        let cgroups = stage.cgroups_at(name.clone(), &path, &path, None)?;
        let caused = stage.play_out(&cgroups, Pids::Shared, FAIL)?;
        all.container_ids.extend(caused.container_ids);
        all.pids.extend(caused.pids);
    }
    Ok(all)
}

/// What `kubectl exec` starts: it joins the container's namespaces and cgroups from outside.
fn exec_session(stage: &mut Stage) -> Result<Caused, Error> {
    let cgroups = stage.cgroups(None)?;
    let mut actor = stage.start(&cgroups, Pids::Own, "sleep 2; exit 0")?;
    stage.session(&cgroups, &actor, "sh -c \"sleep 0.2; exit 1\"")?;
    // The container ends well and by itself, after the session.
    actor.wait_end()?;
    Ok(cgroups.caused(&[&actor]))
}

/// A container of no pod, by its path alone.
fn at(stage: &mut Stage, path: fn(&str) -> String) -> Result<Caused, Error> {
    let name = stage.name();
    let path = path(&name.container_id);
    let cgroups = stage.cgroups_at(name, &path, &path, None)?;
    let mut caused = stage.play_out(&cgroups, Pids::Own, FAIL)?;
    caused.pod_uids.clear();
    Ok(caused)
}
