//! Workloads that live and have a trouble: each has a finding, which ends with the trouble.
//!
//! In: nothing. Out: findings. What must hold: each of these containers has a finding that goes on, and ends once the
//! container is well:
//! - one that is throttled by its CPU limit, or wants more processes than it may have;
//! - one that writes to a frozen file system, or has no file descriptor left;
//! - one whose first process is stopped, or survives its own SIGABRT.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde::Serialize;
use tapio_wire::service::Finding;

use crate::client::Client;
use crate::clock::wait_for;
use crate::error::{Context, Error};
use crate::inject::{InjectOptions, Injector};
use crate::processes::collector::Feed;
use crate::processes::{Collector, CollectorOptions, Server, ServerOptions, bin_dir, binary};
use crate::truth::stage::{Actor, ContainerCgroups, Pids, Stage};

/// How long a trouble may take to be found, and to end: samples are taken every second here.
const LIMIT: Duration = Duration::from_secs(90);

/// What was found about a trouble.
#[derive(Clone, Debug, Serialize)]
pub struct TroubleFinding {
    pub pattern: String,
    pub title: String,
    pub lasted_ns: u64,
}

/// What became of it.
#[derive(Clone, Debug, Default, Serialize)]
pub struct TroublesReport {
    pub findings: Vec<TroubleFinding>,
    /// Samples of the curve that a container had before it died.
    pub curve_points: usize,
}

/// A file system in a file that can be frozen. Dropping thaws and removes it.
struct Disk {
    mount: PathBuf,
    _folder: tempfile::TempDir,
}

impl Disk {
    fn make() -> Result<Self, Error> {
        let folder = tempfile::tempdir().context(|| "make a temporary folder".into())?;
        let (image, mount) = (folder.path().join("image"), folder.path().join("mount"));
        let file = fs::File::create(&image).context(|| format!("make {}", image.display()))?;
        file.set_len(64 << 20).context(|| format!("size {}", image.display()))?;
        fs::create_dir(&mount).context(|| format!("make {}", mount.display()))?;
        run("mkfs.ext4", &["-q", "-F", &image.display().to_string()])?;
        run("mount", &["-o", "loop", &image.display().to_string(), &mount.display().to_string()])?;
        Ok(Self { mount, _folder: folder })
    }

    fn freeze(&self, is_frozen: bool) -> Result<(), Error> {
        run("fsfreeze", &[if is_frozen { "-f" } else { "-u" }, &self.mount.display().to_string()])
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // It may be thawed already; what is mounted must not stay.
        let _ = self.freeze(false);
        let _ = run("umount", &["-l", &self.mount.display().to_string()]);
    }
}

fn run(program: &str, arguments: &[&str]) -> Result<(), Error> {
    let output = Command::new(program).args(arguments).output().context(|| format!("start {program}"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(Error::Invalid(format!("{program} {}: {said}", arguments.join(" "))))
}

/// Runs it.
pub fn run_all(bin: Option<PathBuf>) -> Result<TroublesReport, Error> {
    let program = binary("tapio-perf", &bin_dir(bin.as_deref())?)?;
    let inject = InjectOptions { memory_bytes: 32 << 20, keep: Duration::from_millis(200), program: program.clone() };
    let mut stage = Stage::new(Injector::new(inject)?, program)?;
    let server = Server::start(&ServerOptions { bin_dir: bin.clone(), ..ServerOptions::default() })?;
    let _collector = Collector::start(&CollectorOptions {
        bin_dir: bin,
        node: "troubles".into(),
        server: server.address(),
        feed: Feed::Ebpf,
        extra_collector: ", watch_interval: 1s".into(),
        ..CollectorOptions::default()
    })?;
    let mut client = Client::connect(&server.address())?;
    let disk = Disk::make()?;

    let slow = start(&mut stage, None, "while :; do :; done")?;
    let cpu = slow.0.controller("cpu", slow.1.pid)?;
    cpu.set(("cpu.cfs_quota_us", "20000"), ("cpu.max", "20000 100000"))?;
    // A shell that cannot fork ends: one within another tries it, and the outer one, which counts as well, always finds room.
    let crowded =
        start(&mut stage, None, "while :; do /bin/sh -c 'sleep 0.3 & sleep 0.3 & sleep 0.3 & sleep 0.3 & wait'; done")?;
    let pids = crowded.0.controller("pids", crowded.1.pid)?;
    pids.set(("pids.max", "4"), ("pids.max", "4"))?;
    let file = disk.mount.join("file").display().to_string();
    let hung = start(&mut stage, None, &format!("while :; do echo x >{file}; sleep 0.1; done"))?;
    // The first thread of this one waits for the one that hangs, and can be interrupted.
    let in_thread = disk.mount.join("file-of-a-thread").display().to_string();
    let play = format!("exec {} --program {in_thread}", stage.play("write-in-thread"));
    let hung_thread = start(&mut stage, None, &play)?;
    wait_for("the thread's first write", LIMIT, |_| Ok(Path::new(&in_thread).exists().then_some(())))?;
    disk.freeze(true)?;
    // Ten are open when no more than ten may be; what is closed on request has no child, which could not be started.
    let full = start(
        &mut stage,
        None,
        "exec 3</dev/null 4</dev/null 5</dev/null 6</dev/null 7</dev/null 8</dev/null 9</dev/null; ulimit -Sn 10; \
         trap 'exec 3<&- 4<&- 5<&- 6<&-' USR1; while :; do :; done",
    )?;
    let stopped = start(&mut stage, None, "while :; do sleep 0.2; done")?;
    signal(&stopped, Signal::STOP)?;
    let survivor = start(&mut stage, None, "while kill -ABRT $$; do sleep 0.3; done")?;

    let mut report = TroublesReport::default();
    let wanted = [
        (&slow, "throttled-now"),
        (&crowded, "pids-at-limit"),
        (&hung, "task-blocked"),
        (&hung_thread, "task-blocked"),
        (&full, "descriptors-at-limit"),
        (&stopped, "process-stopped"),
        (&survivor, "fatal-signal-survived"),
    ];
    for (of, pattern) in wanted {
        await_finding(&mut client, of, pattern, |finding| finding.ongoing)?;
    }
    disk.freeze(false)?;
    signal(&full, Signal::USR1)?;
    signal(&stopped, Signal::CONT)?;
    signal(&survivor, Signal::KILL)?;
    cpu.set(("cpu.cfs_quota_us", "-1"), ("cpu.max", "max 100000"))?;
    pids.set(("pids.max", "max"), ("pids.max", "max"))?;
    for (of, pattern) in wanted {
        let over = await_finding(&mut client, of, pattern, |finding| !finding.ongoing && finding.resolved_ns > 0)?;
        report.findings.push(TroubleFinding {
            lasted_ns: over.resolved_ns.saturating_sub(over.started_ns),
            pattern: over.pattern,
            title: over.title,
        });
    }

    let twice = client.findings()?.into_iter().filter(|one| one.pattern == "pids-at-limit").collect::<Vec<_>>();
    if twice.len() > 1 {
        let both: String = twice.iter().map(|one| format!("{} {} {:#?}\n", one.id, one.title, one.evidence)).collect();
        return Err(Error::Invalid(format!("one trouble is reported twice: {both}")));
    }

    report_leak(&mut stage, &mut client, &mut report)?;
    Ok(report)
}

/// A container holds ever more memory until its first process is killed for that: the finding has its curve.
fn report_leak(stage: &mut Stage, client: &mut Client, report: &mut TroublesReport) -> Result<(), Error> {
    let eats = "echo 1000 >/proc/self/oom_score_adj; while :; do \
                (echo 0 >/proc/self/oom_score_adj; x=$(head -c 500000 /dev/zero | tr '\\0' a); sleep 90; :) & sleep 1.6; done";
    let leaking = start(stage, Some(24), eats)?;
    let killed = await_finding(client, &leaking, "memory-limit-kill", |finding| {
        finding.evidence.iter().any(|piece| piece.kind == "curve")
    })?;
    report.findings.push(TroubleFinding { pattern: killed.pattern, title: killed.summary, lasted_ns: 0 });
    report.curve_points = killed.evidence.iter().filter(|piece| piece.kind == "curve").count();
    Ok(())
}

fn start(stage: &mut Stage, limit_mib: Option<u64>, script: &str) -> Result<(ContainerCgroups, Actor), Error> {
    let cgroups = stage.cgroups(limit_mib)?;
    let actor = stage.start(&cgroups, Pids::Own, script)?;
    Ok((cgroups, actor))
}

fn signal(of: &(ContainerCgroups, Actor), signal: Signal) -> Result<(), Error> {
    let pid = Pid::from_raw(of.1.pid as i32).ok_or_else(|| Error::Invalid("the process has no id".into()))?;
    kill_process(pid, signal).context(|| format!("send {signal:?} to process {}", of.1.pid))
}

fn await_finding(
    client: &mut Client,
    of: &(ContainerCgroups, Actor),
    pattern: &str,
    is_it: impl Fn(&Finding) -> bool,
) -> Result<Finding, Error> {
    let container = &of.0.name.container_id;
    wait_for(&format!("the finding {pattern}"), LIMIT, |seen| {
        let all = client.findings()?;
        *seen = all
            .iter()
            .map(|one| format!("{} {} {} ongoing {}; ", one.id, one.pattern, one.title, one.ongoing))
            .collect();
        Ok(all.into_iter().find(|one| {
            one.pattern == pattern
                && one.entity.as_ref().is_some_and(|entity| entity.container_id == *container)
                && is_it(one)
        }))
    })
}

impl fmt::Display for TroublesReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for found in &self.findings {
            writeln!(f, "{:18} {:>6} ms  {}", found.pattern, found.lasted_ns / 1_000_000, found.title)?;
        }
        Ok(())
    }
}
