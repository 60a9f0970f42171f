//! A pod and its containers on this host: their cgroups, the process that is their init, and those who signal it.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use rustix::process::{Pid, Signal, kill_process};

use super::cgroup::{Cgroup, Hierarchies, MemoryControl};
use super::victim::{self, Act, Step};
use crate::clock::wait_for;
use crate::error::{Context, Error};
use crate::interrupt;
use crate::kubelet::ContainerName;
use crate::random::Random;

/// How long the processes of a fault may take to start.
const START_LIMIT: Duration = Duration::from_secs(10);
/// How long they may take to end after SIGKILL.
const END_LIMIT: Duration = Duration::from_secs(2);

/// A memory limit, and where it is set.
#[derive(Clone, Copy, Debug)]
struct Limit {
    control: MemoryControl,
    bytes: u64,
}

/// A pod's cgroups.
pub struct Pod {
    hierarchies: Hierarchies,
    name: ContainerName,
    limit: Option<Limit>,
    // Removed when the pod is dropped, after its containers.
    _v2: Cgroup,
    _v1: Option<Cgroup>,
}

impl Pod {
    /// A pod whose containers get `limit_bytes` of memory each.
    pub fn create(random: &mut Random, limit_bytes: Option<u64>) -> Result<Self, Error> {
        let hierarchies = Hierarchies::find()?;
        let name = ContainerName::random(random);
        let limit = match limit_bytes {
            None => None,
            Some(bytes) => {
                let control = hierarchies.memory_control()?;
                Some(Limit { control, bytes })
            }
        };
        let control = limit.map(|limit| limit.control);
        let delegate = control == Some(MemoryControl::V2);
        let v2 = Cgroup::create(&hierarchies.v2, &name.pod_path(), delegate)?;
        if delegate {
            v2.write("cgroup.subtree_control", "+memory")?;
        }
        let v1 = match (&hierarchies.v1_memory, control) {
            (Some(root), Some(MemoryControl::V1)) => Some(Cgroup::create(root, &name.pod_path(), false)?),
            _ => None,
        };
        Ok(Self { hierarchies, name, limit, _v2: v2, _v1: v1 })
    }

    /// The limit of its containers.
    pub fn limit_bytes(&self) -> Option<u64> {
        self.limit.map(|limit| limit.bytes)
    }

    /// A new container's cgroups.
    pub fn container(&self, random: &mut Random) -> Result<Container, Error> {
        let name = self.name.sibling(random);
        let v2 = Cgroup::create(&self.hierarchies.v2, &name.path(), false)?;
        let mut container = Container { name, v2, v1: None, limit: self.limit };
        match (self.limit, &self.hierarchies.v1_memory) {
            (Some(limit), Some(root)) if limit.control == MemoryControl::V1 => {
                let v1 = Cgroup::create(root, &container.name.path(), false)?;
                v1.limit_memory(limit.control, limit.bytes)?;
                container.v1 = Some(v1);
            }
            (Some(limit), _) => container.v2.limit_memory(limit.control, limit.bytes)?,
            (None, _) => {}
        }
        Ok(container)
    }
}

/// A container's cgroups.
pub struct Container {
    name: ContainerName,
    v2: Cgroup,
    v1: Option<Cgroup>,
    limit: Option<Limit>,
}

impl Container {
    /// Names of the container.
    pub fn name(&self) -> &ContainerName {
        &self.name
    }

    /// The folder of the cgroup that limits it.
    pub fn limit_folder(&self) -> Option<String> {
        self.limit?;
        let cgroup = self.v1.as_ref().unwrap_or(&self.v2);
        Some(cgroup.path().display().to_string())
    }
}

/// The steps that a process reports on its standard output.
struct Steps {
    receiver: Receiver<Step>,
    seen: Vec<Step>,
}

impl Steps {
    fn of(child: &mut Child) -> Result<Self, Error> {
        let stdout = child.stdout.take().ok_or_else(|| Error::Invalid("the process has no standard output".into()))?;
        let (sender, receiver) = channel();
        thread::Builder::new()
            .name("steps".into())
            .spawn(move || {
                for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                    match serde_json::from_str(&line) {
                        Ok(step) if sender.send(step).is_ok() => {}
                        _ => return,
                    }
                }
            })
            .context(|| "start a thread".into())?;
        Ok(Self { receiver, seen: Vec::new() })
    }

    fn wait_for(&mut self, limit: Duration, wanted: impl Fn(&Step) -> bool) -> Result<Step, Error> {
        if let Some(step) = self.seen.iter().find(|step| wanted(step)) {
            return Ok(*step);
        }
        let end = Instant::now() + limit;
        loop {
            interrupt::check()?;
            match self.receiver.recv_timeout(Duration::from_millis(20)) {
                Ok(step) => {
                    self.seen.push(step);
                    if wanted(&step) {
                        return Ok(step);
                    }
                }
                Err(RecvTimeoutError::Timeout) if Instant::now() < end => {}
                Err(RecvTimeoutError::Timeout) => {
                    return Err(Error::TimedOut {
                        what: "the next step of the fault".into(),
                        seconds: limit.as_secs(),
                        seen: format!("{:?}", self.seen),
                    });
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Error::Invalid(format!(
                        "a process of the fault ended early, after {:?}; its message is above",
                        self.seen
                    )));
                }
            }
        }
    }
}

/// A container that runs. Dropping it kills the launcher, and the kernel kills the container with it.
pub struct Running {
    launcher: Child,
    steps: Steps,
    init_pid: u32,
    has_died: bool,
}

impl Running {
    /// Starts a container.
    pub fn start(program: &Path, container: &Container, act: &Act) -> Result<Self, Error> {
        let mut command = Command::new(program);
        let role = act.role.to_possible_value();
        command
            .args([victim::COMMAND, "launch", "--role"])
            .arg(role.map(|role| role.get_name().to_owned()).unwrap_or_default())
            .arg("--limit-bytes")
            .arg(act.limit_bytes.to_string());
        if let Some(program) = &act.program {
            command.arg("--program").arg(program);
        }
        for cgroup in [Some(&container.v2), container.v1.as_ref()].into_iter().flatten() {
            command.arg("--cgroup").arg(cgroup.path());
        }
        let mut launcher = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context(|| format!("start {}", program.display()))?;
        let steps = Steps::of(&mut launcher);
        // The guard first: an error from here on ends the launcher.
        let mut running = Self { launcher, steps: steps?, init_pid: 0, has_died: false };
        let is_start = |step: &Step| matches!(step, Step::Started { .. });
        if let Step::Started { pid, .. } = running.steps.wait_for(START_LIMIT, is_start)? {
            running.init_pid = pid;
        }
        Ok(running)
    }

    /// The init's process id on the host.
    pub fn init_pid(&self) -> u32 {
        self.init_pid
    }

    /// Waits for a step; one that was reported before counts as well.
    pub fn wait_for(&mut self, limit: Duration, wanted: impl Fn(&Step) -> bool) -> Result<Step, Error> {
        let step = self.steps.wait_for(limit, wanted)?;
        self.has_died |= matches!(step, Step::Died { .. });
        Ok(step)
    }

    /// Signals the init.
    pub fn signal_init(&self, signal: Signal) -> Result<(), Error> {
        match Pid::from_raw(self.init_pid as i32) {
            Some(pid) if !self.has_died => {
                kill_process(pid, signal).context(|| format!("send a signal to {}", self.init_pid))
            }
            _ => Err(Error::Invalid("the container has died already".into())),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.has_died {
            let _ = self.signal_init(Signal::KILL);
        }
        // The launcher ends by itself once it has reaped the init: killed before, it would leave a zombie.
        let end = Instant::now() + END_LIMIT;
        while matches!(self.launcher.try_wait(), Ok(None)) && Instant::now() < end {
            thread::sleep(Duration::from_millis(2));
        }
        let _ = self.launcher.kill();
        let _ = self.launcher.wait();
    }
}

/// Waits until a container's init has become what it plays: its exec is then seen in its cgroup.
pub fn wait_for_exec(pid: u32) -> Result<(), Error> {
    wait_for("the container's exec", START_LIMIT, |seen| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let is_acting = line.split(|&byte| byte == 0).any(|word| word == b"act");
        *seen = String::from_utf8_lossy(&line).replace('\0', " ");
        Ok(is_acting.then_some(()))
    })
}

/// A process outside of the container that has sent it a signal, and stays until this is dropped.
pub struct Sender {
    child: Child,
    stdin: Option<ChildStdin>,
}

impl Sender {
    /// Sends.
    pub fn start(program: &Path, pid: u32, signal: Signal) -> Result<Self, Error> {
        let mut child = Command::new(program)
            .args([victim::COMMAND, "send"])
            .args([pid.to_string(), signal.as_raw().to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context(|| format!("start {}", program.display()))?;
        let steps = Steps::of(&mut child);
        let stdin = child.stdin.take();
        let sender = Self { child, stdin };
        steps?.wait_for(START_LIMIT, |step| matches!(step, Step::Sent { .. }))?;
        Ok(sender)
    }

    /// Process id of the container.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        drop(self.stdin.take());
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
