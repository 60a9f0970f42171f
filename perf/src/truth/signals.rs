//! Deaths by a signal of somebody else.

use super::scenario::{Caused, Scenario};
use super::stage::{Pids, RUNC, Stage};
use crate::error::Error;
use crate::inject::{Fault, crash};

const STOPPED: &[&str] = &["stopped", "stopped-by-signal"];
const ENDING: &str = "signals that end a process";
const MASTER: &str = "a master kills its worker";
const OBEY: &str = "trap 'exit 0' TERM; while :; do sleep 0.05; done";

pub const ALL: &[Scenario] = &[
    Scenario::new(
        "killed-by-a-host-process",
        "from outside",
        |stage| stage.inject(Fault::Kill),
        &["killed-from-outside"],
    ),
    Scenario::new("sigterm-ignored", "stop", |stage| stage.inject(Fault::IgnoredSigterm), &["ignored-sigterm"]),
    Scenario::new("sigterm-obeyed", "stop", |stage| by_runtime(stage, Pids::Own, OBEY, "TERM"), STOPPED),
    Scenario::new(
        "sigterm-obeyed-shared-pid-namespace",
        "first process is not pid 1",
        |stage| by_runtime(stage, Pids::Shared, OBEY, "TERM"),
        STOPPED,
    ),
    Scenario::new(
        "quit-handled-exit-much-later",
        "no cause by its time alone",
        |stage| {
            by_host(stage, "trap : QUIT; i=0; while [ $i -lt 100 ]; do sleep 0.05; i=$((i+1)); done; exit 1", "QUIT")
        },
        &["exited-with-error"],
    ),
    Scenario::new(
        "third-sigterm-then-own-exit",
        "no cause by its time alone",
        |stage| inside(stage, "(for i in 1 2 3; do sleep 1.1; kill 1; done) & trap : TERM; wait; wait; wait; exit 3"),
        &["signalled-again-before-end"],
    ),
    Scenario::new(
        "interrupted-by-a-host-process",
        "from outside",
        |stage| by_host(stage, "trap 'exit 3' INT; while :; do sleep 0.05; done", "INT"),
        &["interrupted-from-outside"],
    ),
    Scenario::new(
        "hang-up-from-inside",
        "stop",
        |stage| inside(stage, "(sleep 0.3; kill -HUP 1) & trap 'exit 3' HUP; while :; do sleep 0.05; done"),
        &["interrupted-from-inside"],
    ),
    Scenario::new("own-sigterm-then-killed-by-a-host-process", "from outside", own_term, &["killed-from-outside"]),
    passes_on("child-killed-by-a-host-process-init-exits-137", |stage| child_killed(stage, "KILL")),
    passes_on("child-sent-a-segv-init-exits-139", |stage| child_killed(stage, "SEGV")),
    Scenario {
        never: &["worker of", "itself, sent"],
        ..Scenario::new("killed-by-a-sibling-container", MASTER, by_sibling, &["killed-by-own-process"])
    },
    Scenario::new("stopped-by-its-own-child", "stop", stopped_inside, &["stopped-from-inside"]),
    Scenario {
        says: &["hup"],
        never: &["by itself"],
        ..Scenario::new("sighup-exit-129", ENDING, |stage| by_runtime(stage, Pids::Own, HANG_UP, "HUP"), STOPPED)
    },
    Scenario {
        says: &["rt", "real-time", "34"],
        ..Scenario::new(
            "real-time-signal",
            ENDING,
            |stage| by_runtime(stage, Pids::Shared, "exec sleep 30", "34"),
            STOPPED,
        )
    },
    Scenario {
        says: &["usr1"],
        ..Scenario::new(
            "sigusr1-by-the-runtime",
            ENDING,
            |stage| by_runtime(stage, Pids::Shared, "exec sleep 30", "USR1"),
            STOPPED,
        )
    },
    Scenario {
        says: &["usr1"],
        ..Scenario::new("stopsignal-usr1-ignored", "stop", ignored_usr1, &["ignored-stopsignal"])
    },
    oom_daemon("systemd-oomd-kills", |stage| by_daemon(stage, "systemd-oomd")),
    oom_daemon("earlyoom-kills", |stage| by_daemon(stage, "earlyoom")),
    master("master-aborts-its-worker", |stage| by_master(stage, "kill -ABRT $w")),
    master("master-aborts-then-kills-its-worker", |stage| {
        by_master(stage, "kill -STOP $w; kill -ABRT $w; sleep 0.2; kill -KILL $w")
    }),
    of_kernel("sigio-of-its-own-pipe", |stage| by_pipe(stage, 0)),
    of_kernel("chosen-signal-of-its-own-pipe", |stage| by_pipe(stage, REAL_TIME)),
    of_kernel("alarm-of-its-own-timer", |stage| by_timer(stage, ALARM)),
    of_kernel("real-time-signal-of-its-own-timer", |stage| by_timer(stage, REAL_TIME)),
    made_up("alarm-made-up-by-a-host-process", |stage| by_forger(stage, ALARM, SI_TIMER)),
    made_up("kill-made-up-by-a-host-process", |stage| by_forger(stage, KILL, SI_MESGQ)),
    renamed("killed-by-a-container-called-runc", |stage| by_other_container(stage, "runc")),
    renamed("killed-by-a-container-called-earlyoom", |stage| by_other_container(stage, "earlyoom")),
    renamed("killed-by-a-session-called-runc", |stage| by_session(stage, "runc")),
    renamed("killed-by-a-session-called-earlyoom", |stage| by_session(stage, "earlyoom")),
    renamed("killed-by-a-hosts-program-called-runc", |stage| by_renamed(stage, "runc")),
    renamed("killed-by-a-hosts-program-called-earlyoom", |stage| by_renamed(stage, "earlyoom")),
];

/// What `kill` calls SIGKILL and SIGALRM, and a signal that only programs give a meaning.
const KILL: u8 = 9;
const ALARM: u8 = 14;
const REAL_TIME: u8 = 40;

/// Codes by which the kernel says that a timer ran out, and that a queue of messages was written to.
const SI_TIMER: i8 = -2;
const SI_MESGQ: i8 = -3;

const HANG_UP: &str = "trap 'kill $c; exit 129' HUP; sleep 30 & c=$!; wait";

const fn oom_daemon(name: &'static str, cause: super::scenario::Cause) -> Scenario {
    Scenario { never: &["intruder"], ..Scenario::new(name, "userspace OOM daemon", cause, &["oom-daemon-kill"]) }
}

const fn master(name: &'static str, cause: super::scenario::Cause) -> Scenario {
    Scenario { never: &["the fault is its own"], ..Scenario::new(name, MASTER, cause, &["killed-by-own-process"]) }
}

/// The kernel sends a signal that the process itself asked for; who runs at that moment has nothing to do with it.
const fn of_kernel(name: &'static str, cause: super::scenario::Cause) -> Scenario {
    Scenario {
        says: &["sent by the kernel, because"],
        never: &["was running", "bash", "busy"],
        ..Scenario::new(name, "signals a process asked for", cause, &["exited-with-error"])
    }
}

/// Somebody queues a signal with a code by which the kernel says that the process asked for it.
const fn made_up(name: &'static str, cause: super::scenario::Cause) -> Scenario {
    Scenario {
        says: &["forger"],
        never: &["because", "the kernel itself"],
        ..Scenario::new(name, "a code that anybody can make up", cause, &["killed-from-outside"])
    }
}

/// Somebody who bears the name of a runtime or an OOM daemon, and is none.
const fn renamed(name: &'static str, cause: super::scenario::Cause) -> Scenario {
    Scenario::new(name, "a name that anybody can take", cause, &["killed-from-outside"])
}

/// The runtime sends a signal, and the container ends.
fn by_runtime(stage: &mut Stage, pids: Pids, script: &str, signal: &str) -> Result<Caused, Error> {
    signalled(stage, pids, script, RUNC, None, |pid| format!("kill -{signal} {pid}"))
}

/// A container runs a script; a program of the host, in a unit or in none, sends it what `kill` says of its first process.
fn signalled(
    stage: &mut Stage,
    pids: Pids,
    script: &str,
    sender: &str,
    unit: Option<&str>,
    kill: impl Fn(u32) -> String,
) -> Result<Caused, Error> {
    let cgroups = stage.cgroups(None)?;
    let mut actor = stage.start(&cgroups, pids, script)?;
    actor.await_sleep()?;
    stage.host(sender, unit, &kill(actor.pid))?;
    actor.wait_end()?;
    Ok(cgroups.caused(&[&actor]))
}

/// The first process passes on that its child was killed from outside.
const fn passes_on(name: &'static str, cause: super::scenario::Cause) -> Scenario {
    Scenario {
        beside: &["killed-from-outside"],
        ..Scenario::new(name, "a child killed from outside", cause, &["child-killed-exit"])
    }
}

fn child_killed(stage: &mut Stage, signal: &str) -> Result<Caused, Error> {
    let kill = |pid| format!("kill -{signal} $(cat /proc/{pid}/task/{pid}/children)");
    signalled(stage, Pids::Shared, "sleep 30 & wait $!; exit $?", "bash", None, kill)
}

/// A process of the host sends a signal, and the container ends some time.
fn by_host(stage: &mut Stage, script: &str, signal: &str) -> Result<Caused, Error> {
    signalled(stage, Pids::Own, script, "bash", None, |pid| format!("kill -{signal} {pid}"))
}

fn inside(stage: &mut Stage, script: &str) -> Result<Caused, Error> {
    let cgroups = stage.cgroups(None)?;
    stage.play_out(&cgroups, Pids::Own, script)
}

/// Sends itself a SIGTERM, which it handles as a reload. The later kill is unrelated.
fn own_term(stage: &mut Stage) -> Result<Caused, Error> {
    let script = "trap : TERM; (sleep 0.2; kill -TERM 1) & while :; do sleep 0.05; done";
    signalled(stage, Pids::Own, script, "bash", None, |pid| format!("sleep 2; kill -KILL {pid}"))
}

fn by_sibling(stage: &mut Stage) -> Result<Caused, Error> {
    let name = stage.name();
    let other = stage.sibling(&name);
    let cgroups = stage.cgroups_at(name.clone(), &name.path(), &name.path(), None)?;
    let beside = stage.cgroups_at(other.clone(), &other.path(), &other.path(), None)?;
    let mut actor = stage.start(&cgroups, Pids::Shared, "exec sleep 30")?;
    actor.await_sleep()?;
    stage.play_out(&beside, Pids::Shared, &format!("kill -KILL {}; sleep 0.3; exit 0", actor.pid))?;
    actor.wait_end()?;
    Ok(cgroups.caused(&[&actor]))
}

/// What `nginx -s stop` does: a process of the container asks the first one to end.
fn stopped_inside(stage: &mut Stage) -> Result<Caused, Error> {
    inside(stage, &format!("(sleep 0.3; kill -TERM 1) & {OBEY}"))
}

/// A process of the host writes into a pipe, of which the container's first process asked for a signal.
fn by_pipe(stage: &mut Stage, signal: u8) -> Result<Caused, Error> {
    let name = format!("asynchronous-reader-{signal}");
    let program = stage.program(&name, crash::asynchronous_reader_program(signal))?;
    let pipe = format!("{program}.pipe");
    let cgroups = stage.cgroups(None)?;
    stage.host("bash", None, &format!("mkfifo {pipe}"))?;
    let mut actor = stage.start(&cgroups, Pids::Shared, &format!("exec {program} {pipe}"))?;
    actor.await_pause()?;
    stage.host("bash", None, &format!("echo >{pipe}"))?;
    actor.wait_end()?;
    Ok(cgroups.caused(&[&actor]))
}

/// A timer of the container's first process runs out while others keep every core busy.
fn by_timer(stage: &mut Stage, signal: u8) -> Result<Caused, Error> {
    let program = stage.program(&format!("timer-{signal}"), crash::timer_program(signal))?;
    let cgroups = stage.cgroups(None)?;
    let mut actor = stage.start(&cgroups, Pids::Shared, &format!("exec {program}"))?;
    let busy = "for i in $(nproc) 1; do timeout 1 sh -c 'while :; do :; done' & done; wait";
    stage.host("busy", None, busy)?;
    actor.wait_end()?;
    Ok(cgroups.caused(&[&actor]))
}

/// A process of the host queues the signal, with a code of its own making.
fn by_forger(stage: &mut Stage, signal: u8, code: i8) -> Result<Caused, Error> {
    let program = stage.program(&format!("forger-{signal}"), crash::forger_program(signal, code))?;
    signalled(stage, Pids::Shared, "exec sleep 30", "bash", None, |pid| format!("{program} {pid}"))
}

/// A process of another pod's container kills it, as one may whose pod has the host's pid namespace.
fn by_other_container(stage: &mut Stage, comm: &str) -> Result<Caused, Error> {
    let other = stage.name().path();
    signalled(stage, Pids::Own, "exec sleep 30", comm, Some(&other), |pid| format!("kill -KILL {pid}"))
}

/// A process of the host in no unit, which a person's shell could have started.
fn by_renamed(stage: &mut Stage, comm: &str) -> Result<Caused, Error> {
    signalled(stage, Pids::Own, "exec sleep 30", comm, None, |pid| format!("kill -KILL {pid}"))
}

fn by_session(stage: &mut Stage, comm: &str) -> Result<Caused, Error> {
    let session = Some("user.slice/user-1000.slice/session-3.scope");
    signalled(stage, Pids::Own, "exec sleep 30", comm, session, |pid| format!("kill -KILL {pid}"))
}

fn ignored_usr1(stage: &mut Stage) -> Result<Caused, Error> {
    let kill = |pid| format!("kill -USR1 {pid}; sleep 2; kill -KILL {pid}");
    signalled(stage, Pids::Own, "exec sleep 30", RUNC, None, kill)
}

fn by_daemon(stage: &mut Stage, name: &str) -> Result<Caused, Error> {
    let unit = format!("system.slice/{name}.service");
    signalled(stage, Pids::Own, "exec sleep 30", name, Some(&unit), |pid| format!("kill -KILL {pid}"))
}

fn by_master(stage: &mut Stage, kill: &str) -> Result<Caused, Error> {
    inside(stage, &format!("sleep 30 & w=$!; sleep 0.2; {kill}; wait; sleep 1; exit 0"))
}
