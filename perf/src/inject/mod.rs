//! Faults, made for real in throw-away cgroups that are named as kubelet names them.
//!
//! In: which fault. Out: an [`Injection`], what was done to whom and when. What must hold: the node is as before afterwards,
//! also after a failure or an interrupt; guards see to it.

pub mod cgroup;
pub mod container;
pub mod crash;
pub mod measure;
pub mod own_servers;
pub mod victim;

use std::fs::{self, File, Permissions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;

use clap::ValueEnum;
use rustix::fs::{FlockOperation, flock};
use rustix::process::Signal;
use serde::Serialize;
use tapio_wire::wait_status::{Ending, ending};
use tempfile::TempDir;

use self::cgroup::Hierarchies;
use self::container::{Pod, Running, Sender};
use self::victim::{Act, Role, Step};
use crate::clock::{boottime_ns, pause, wait_for};
use crate::error::{Context, Error};
use crate::random::Random;

/// How long a victim may take to die of its fault.
const DEATH_LIMIT: Duration = Duration::from_secs(20);
/// How long a container works before it is killed.
const LEAD: Duration = Duration::from_millis(150);
/// What Kubernetes calls the grace period.
const GRACE: Duration = Duration::from_secs(2);
/// Containers of a crash loop.
const CRASHES: usize = 4;
/// How long another injection is waited for.
const LOCK_LIMIT: Duration = Duration::from_secs(120);

/// What is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Fault {
    /// A container runs into its memory limit.
    Oom,
    /// A child of a container's init runs into the limit; the init lives on and ends well.
    SilentChildOom,
    /// A container's init writes to address 0.
    Segv,
    /// An outside process sends SIGKILL to a container.
    Kill,
    /// A container does not react to SIGTERM and is killed two seconds later.
    IgnoredSigterm,
    /// A pod's container ends with an error, four times in a row.
    Exit,
}

impl Fault {
    /// Name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Oom => "oom",
            Self::SilentChildOom => "silent-child-oom",
            Self::Segv => "segv",
            Self::Kill => "kill",
            Self::IgnoredSigterm => "ignored-sigterm",
            Self::Exit => "exit",
        }
    }

    fn role(self) -> Role {
        match self {
            Self::Oom => Role::Allocate,
            Self::SilentChildOom => Role::ShrugOff,
            Self::Segv => Role::Crash,
            Self::Kill | Self::IgnoredSigterm => Role::Wait,
            Self::Exit => Role::Fail,
        }
    }

    fn is_limited(self) -> bool {
        matches!(self, Self::Oom | Self::SilentChildOom)
    }
}

/// What was done to one container. Times are `CLOCK_BOOTTIME`, ids the host's.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Injection {
    pub fault: String,
    pub pod_uid: String,
    pub container_id: String,
    /// Path of the cgroup in the unified hierarchy.
    pub cgroup: String,
    /// The victim.
    pub pid: u32,
    /// The container's init, when that is not the victim.
    pub init_pid: Option<u32>,
    /// Who sent the signal, unless the kernel did.
    pub sender_pid: Option<u32>,
    /// What the victim died of.
    pub signal: Option<i32>,
    /// What it ended with otherwise.
    pub exit_code: Option<i32>,
    pub limit_bytes: Option<u64>,
    /// The folder of the cgroup with the limit.
    pub limit_cgroup: Option<String>,
    pub started_ns: u64,
    /// When SIGTERM was sent and did not end it.
    pub sigterm_ns: Option<u64>,
    /// When the victim's death was seen by its parent.
    pub died_ns: u64,
    /// The earlier containers of a crash loop.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub earlier: Vec<Injection>,
}

/// How faults are made.
#[derive(Clone, Debug)]
pub struct InjectOptions {
    /// The limit of containers that run out of memory.
    pub memory_bytes: u64,
    /// How long cgroups and senders outlive the victim, for those who look at them.
    pub keep: Duration,
    /// The tapio-perf whose processes become the victims.
    pub program: PathBuf,
}

/// Makes faults, one at a time on this host.
pub struct Injector {
    options: InjectOptions,
    random: Random,
    crash_program: PathBuf,
    _folder: TempDir,
    _lock: File,
}

impl Injector {
    /// Needs root; waits for another injector of this host.
    pub fn new(options: InjectOptions) -> Result<Self, Error> {
        if !rustix::process::geteuid().is_root() {
            return Err(Error::NotRoot);
        }
        let folder = tempfile::Builder::new()
            .prefix("tapio-perf-inject-")
            .tempdir()
            .context(|| "make a temporary folder".into())?;
        let crash_program = folder.path().join("crash");
        write_crash_program(&crash_program)?;
        Ok(Self {
            options,
            random: Random::new(boottime_ns() ^ u64::from(std::process::id()) << 40),
            crash_program,
            _folder: folder,
            _lock: lock()?,
        })
    }

    /// Makes a fault and cleans up behind it.
    pub fn inject(&mut self, fault: Fault) -> Result<Injection, Error> {
        let limit = fault.is_limited().then_some(self.options.memory_bytes);
        let pod = Pod::create(&mut self.random, limit)?;
        let containers = if fault == Fault::Exit { CRASHES } else { 1 };
        let mut injections = Vec::new();
        for _ in 0..containers {
            injections.push(self.inject_container(fault, &pod)?);
        }
        let mut last = injections.pop().unwrap_or_default();
        last.earlier = injections;
        Ok(last)
    }

    fn inject_container(&mut self, fault: Fault, pod: &Pod) -> Result<Injection, Error> {
        let container = pod.container(&mut self.random)?;
        let act = Act {
            role: fault.role(),
            limit_bytes: pod.limit_bytes().unwrap_or(0),
            program: (fault == Fault::Segv).then(|| self.crash_program.clone()),
        };
        let started_ns = boottime_ns();
        let mut running = Running::start(&self.options.program, &container, &act)?;
        let mut injection = Injection {
            fault: fault.name().into(),
            pod_uid: container.name().pod_uid.clone(),
            container_id: container.name().container_id.clone(),
            cgroup: format!("/{}", container.name().path()),
            pid: running.init_pid(),
            limit_bytes: pod.limit_bytes(),
            limit_cgroup: container.limit_folder(),
            started_ns,
            ..Injection::default()
        };
        let _sender = self.bring_about(fault, &mut running, &mut injection)?;
        let step = running.wait_for(DEATH_LIMIT, |step| matches!(step, Step::Died { .. }))?;
        if fault != Fault::SilentChildOom {
            record_death(step, &mut injection);
        }
        check_death(fault, &injection)?;
        // Those who look at cgroup and sender after the death find them.
        pause(self.options.keep)?;
        Ok(injection)
    }

    /// Does from outside what the fault needs. The sender of a signal lives as long as what is returned.
    fn bring_about(
        &self,
        fault: Fault,
        running: &mut Running,
        injection: &mut Injection,
    ) -> Result<Option<Sender>, Error> {
        let pid = running.init_pid();
        match fault {
            Fault::Kill => {
                container::wait_for_exec(pid)?;
                pause(LEAD)?;
                let sender = Sender::start(&self.options.program, pid, Signal::KILL)?;
                injection.sender_pid = Some(sender.pid());
                Ok(Some(sender))
            }
            Fault::IgnoredSigterm => {
                container::wait_for_exec(pid)?;
                pause(LEAD)?;
                injection.sigterm_ns = Some(boottime_ns());
                injection.sender_pid = Some(std::process::id());
                running.signal_init(Signal::TERM)?;
                pause(GRACE)?;
                running.signal_init(Signal::KILL)?;
                Ok(None)
            }
            Fault::SilentChildOom => {
                let is_child = |step: &Step| matches!(step, Step::Child { .. });
                let child = running.wait_for(DEATH_LIMIT, is_child)?;
                let is_death = |step: &Step| matches!(step, Step::ChildDied { .. });
                let death = running.wait_for(DEATH_LIMIT, is_death)?;
                injection.init_pid = Some(pid);
                if let Step::Child { pid, .. } = child {
                    injection.pid = pid;
                }
                record_death(death, injection);
                Ok(None)
            }
            Fault::Oom | Fault::Segv | Fault::Exit => Ok(None),
        }
    }
}

/// Notes the time and the cause of a death.
fn record_death(step: Step, injection: &mut Injection) {
    if let Step::Died { status, time_ns } | Step::ChildDied { status, time_ns } = step {
        injection.died_ns = time_ns;
        match ending(status.cast_unsigned()) {
            Ending::Exited(code) => injection.exit_code = Some(code.cast_signed()),
            Ending::Killed(signal) => injection.signal = Some(signal.cast_signed()),
        }
    }
}

/// A victim that died of something else did not suffer the fault.
fn check_death(fault: Fault, injection: &Injection) -> Result<(), Error> {
    let expected = match fault {
        Fault::Segv => (Some(11), None),
        Fault::Exit => (None, Some(victim::CRASH_CODE)),
        Fault::Oom | Fault::SilentChildOom | Fault::Kill | Fault::IgnoredSigterm => (Some(9), None),
    };
    if (injection.signal, injection.exit_code) == expected {
        return Ok(());
    }
    Err(Error::Survived {
        fault: fault.name(),
        what: format!(
            "the victim ended with signal {:?} and exit code {:?} instead of {:?} and {:?}",
            injection.signal, injection.exit_code, expected.0, expected.1
        ),
    })
}

fn write_crash_program(path: &std::path::Path) -> Result<(), Error> {
    let what = || format!("write {}", path.display());
    let program = crash::program()
        .ok_or_else(|| Error::Invalid("no program that crashes is known for this architecture".into()))?;
    let mut file = File::create(path).context(what)?;
    file.write_all(&program).context(what)?;
    drop(file);
    fs::set_permissions(path, Permissions::from_mode(0o755)).context(what)
}

/// One injector at a time: they share the cgroups above their pods. The lock is on the hierarchy's root, so it leaves no file.
fn lock() -> Result<File, Error> {
    let path = Hierarchies::find()?.v2;
    let root = File::open(&path).context(|| format!("open {}", path.display()))?;
    let what = format!("the end of another injection, which holds a lock on {}", path.display());
    wait_for(&what, LOCK_LIMIT, |_| Ok(flock(&root, FlockOperation::NonBlockingLockExclusive).ok()))?;
    Ok(root)
}

impl std::fmt::Display for Injection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for earlier in &self.earlier {
            writeln!(f, "{earlier}")?;
        }
        write!(f, "{}: process {} of {}", self.fault, self.pid, self.cgroup)?;
        if let (Some(bytes), Some(folder)) = (self.limit_bytes, &self.limit_cgroup) {
            write!(f, ", limited to {bytes} bytes by {folder},")?;
        }
        match (self.signal, self.exit_code) {
            (Some(signal), _) => write!(f, " died of signal {signal}")?,
            (None, code) => write!(f, " ended with exit code {}", code.unwrap_or(0))?,
        }
        if let Some(sender) = self.sender_pid {
            write!(f, " sent by process {sender}")?;
        }
        if let Some(init) = self.init_pid {
            write!(f, " while init {init} lived on")?;
        }
        let lived_ms = self.died_ns.saturating_sub(self.started_ns) as f64 / 1e6;
        write!(f, " after {lived_ms:.0} ms")
    }
}
