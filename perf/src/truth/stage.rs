//! Where scenarios play: containers whose first process is a shell script, and those who signal them from outside.
//!
//! What must hold: nothing outlives its guard. Processes end with the thread that started them, cgroups with their container.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;

use super::scenario::Caused;
use crate::clock::{boottime_ns, pause, wait_for};
use crate::error::{Context, Error};
use crate::inject::cgroup::{Cgroup, Hierarchies, MemoryControl};
use crate::inject::{Fault, Injection, Injector};
use crate::kubelet::ContainerName;
use crate::processes::{Collector, CollectorOptions, Process};
use crate::random::Random;

const START_LIMIT: Duration = Duration::from_secs(10);
const END_LIMIT: Duration = Duration::from_secs(20);
/// How long cgroups outlive the victim, for those who look at them.
const KEEP: Duration = Duration::from_millis(200);
/// A container's runtime, as the container's shim starts it: see [`Stage::host`].
pub const RUNC: &str = "containerd-shim/runc";
/// Joins the cgroups of its first two arguments and becomes the rest.
const ENTER: &str = "echo 0 >\"$1\"; [ -z \"$2\" ] || echo 0 >\"$2\"; ulimit -c 0; shift 2; exec \"$@\"";

/// Whether SIGINT or SIGQUIT is ignored here, as in a shell's background: children inherit that, and a shell cannot trap them then.
fn ignores_interrupts() -> bool {
    const INTERRUPTS: u64 = 1 << 1 | 1 << 2;
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("SigIgn:")?.trim(), 16).ok());
    ignored.is_some_and(|signals| signals & INTERRUPTS != 0)
}

/// Makes containers and runs their scripts; senders of signals are processes of the host.
pub struct Stage {
    pub injector: Injector,
    /// Path of this program, which plays roles.
    program: PathBuf,
    hierarchies: Hierarchies,
    random: Random,
    folder: TempDir,
    /// Who watches it, once it was started.
    collector: Option<Collector>,
}

/// Whether the first process of a container is pid 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pids {
    /// A namespace of its own.
    Own,
    /// No: it is the host's, as in a pod with `hostPID`.
    Shared,
    /// No: it is this process's, as in a pod with `shareProcessNamespace`.
    Of(u32),
}

/// A container's cgroups.
pub struct ContainerCgroups {
    pub name: ContainerName,
    v2: Cgroup,
    v1: Option<Cgroup>,
    control: MemoryControl,
}

/// A container that runs.
pub struct Actor {
    process: Process,
    /// Host pid of its first process; 0 when it had ended before it was seen.
    pub pid: u32,
}

impl Stage {
    /// Needs what the injector needs.
    pub fn new(injector: Injector, program: PathBuf) -> Result<Self, Error> {
        let folder = tempfile::Builder::new()
            .prefix("tapio-perf-truth-")
            .tempdir()
            .context(|| "make a temporary folder".into())?;
        let random = Random::new(boottime_ns() ^ u64::from(std::process::id()) << 20);
        Ok(Self { injector, program, hierarchies: Hierarchies::find()?, random, folder, collector: None })
    }

    /// Starts the collector that watches what is played here.
    pub fn watch(&mut self, options: &CollectorOptions) -> Result<(), Error> {
        self.collector = Some(Collector::start(options)?);
        Ok(())
    }

    /// Stops the collector and starts it again: what runs then it has to find by itself.
    pub fn restart_collector(&mut self) -> Result<(), Error> {
        let collector = self.collector.as_mut().ok_or_else(|| Error::Invalid("nobody watches".into()))?;
        collector.stop()?;
        collector.restart()
    }

    /// What limits memory here.
    pub fn memory_control(&self) -> Result<MemoryControl, Error> {
        self.hierarchies.memory_control()
    }

    /// A container of a new pod.
    pub fn name(&mut self) -> ContainerName {
        ContainerName::random(&mut self.random)
    }

    /// Names another container of the same pod.
    pub fn sibling(&mut self, name: &ContainerName) -> ContainerName {
        name.sibling(&mut self.random)
    }

    /// Makes a container where kubelet would, with a memory limit in MiB.
    pub fn cgroups(&mut self, limit_mib: Option<u64>) -> Result<ContainerCgroups, Error> {
        let name = self.name();
        let path = name.path();
        self.cgroups_at(name, &path, &path, limit_mib)
    }

    /// A container whose paths in the unified and in the memory hierarchy are these.
    pub fn cgroups_at(
        &self,
        name: ContainerName,
        v2: &str,
        v1: &str,
        limit_mib: Option<u64>,
    ) -> Result<ContainerCgroups, Error> {
        let control = self.hierarchies.memory_control()?;
        let delegate = control == MemoryControl::V2;
        let v2 = Cgroup::create(&self.hierarchies.v2, v2, delegate)?;
        let v1 = match &self.hierarchies.v1_memory {
            Some(root) if control == MemoryControl::V1 => Some(Cgroup::create(root, v1, false)?),
            _ => None,
        };
        let cgroups = ContainerCgroups { name, v2, v1, control };
        if let Some(mib) = limit_mib {
            cgroups.limiting().limit_memory(control, mib << 20)?;
        }
        Ok(cgroups)
    }

    /// The hierarchies in which a container has a cgroup.
    fn roots(&self) -> Result<Vec<&PathBuf>, Error> {
        let v1 = match self.hierarchies.memory_control()? {
            MemoryControl::V1 => self.hierarchies.v1_memory.as_ref(),
            MemoryControl::V2 => None,
        };
        Ok([&self.hierarchies.v2].into_iter().chain(v1).collect())
    }

    /// Where a container makes a cgroup outside of its own by its own means: the cgroup above it, which must outlive it, and
    /// its path, in every hierarchy.
    pub fn inner(&self, above: &str, name: &str) -> Result<Vec<(Cgroup, PathBuf)>, Error> {
        let make = |root: &PathBuf| {
            let above = Cgroup::create(root, above, false)?;
            let path = above.path().join(name);
            Ok((above, path))
        };
        self.roots()?.into_iter().map(make).collect()
    }

    /// A cgroup above containers with a limit of its own; it must outlive them.
    pub fn limited_level(&self, path: &str, mib: u64) -> Result<Cgroup, Error> {
        let control = self.hierarchies.memory_control()?;
        let root = match (control, &self.hierarchies.v1_memory) {
            (MemoryControl::V1, Some(root)) => root,
            _ => &self.hierarchies.v2,
        };
        let level = Cgroup::create(root, path, control == MemoryControl::V2)?;
        level.limit_memory(control, mib << 20)?;
        Ok(level)
    }

    /// The command of a process that takes `mib` MiB and twice as much, until it is killed.
    pub fn eat(&self, mib: u64) -> String {
        format!("{} __victim act --role allocate --limit-bytes {}", self.program.display(), mib << 20)
    }

    /// The command of a process that plays a role.
    pub fn play(&self, role: &str) -> String {
        format!("{} __victim act --role {role}", self.program.display())
    }

    /// Writes a program that scenarios run; its path.
    pub fn program(&self, name: &str, bytes: Option<Vec<u8>>) -> Result<String, Error> {
        let bytes = bytes.ok_or_else(|| Error::Invalid(format!("{name} is not known for this architecture")))?;
        let path = self.folder.path().join(name);
        if !path.exists() {
            fs::write(&path, bytes).context(|| format!("write {}", path.display()))?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755))
                .context(|| format!("run {}", path.display()))?;
        }
        Ok(path.display().to_string())
    }

    /// A file that does not exist yet, for which a script may wait.
    pub fn signpost(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Starts a container whose first process is a shell with this script.
    pub fn start(&self, cgroups: &ContainerCgroups, pids: Pids, script: &str) -> Result<Actor, Error> {
        self.start_as(cgroups, pids, Path::new("/bin/sh"), script)
    }

    /// A shell under another name.
    pub fn shell(&self, name: &str) -> Result<PathBuf, Error> {
        let path = self.folder.path().join(name);
        if !path.exists() {
            fs::copy("/bin/sh", &path).context(|| format!("write {}", path.display()))?;
        }
        Ok(path)
    }

    /// Starts a container whose first process is this shell with a script.
    pub fn start_as(
        &self,
        cgroups: &ContainerCgroups,
        pids: Pids,
        program: &Path,
        script: &str,
    ) -> Result<Actor, Error> {
        let launcher: &[&str] = if ignores_interrupts() { &["/usr/bin/env", "--default-signal"] } else { &[] };
        let holder;
        let shell: &[&str] = match pids {
            Pids::Own => &["/usr/bin/unshare", "--pid", "--fork", "--kill-child", "--", "/bin/sh"],
            Pids::Shared => &["/bin/sh"],
            Pids::Of(pid) => {
                holder = pid.to_string();
                &["/usr/bin/nsenter", "-t", &holder, "-p", "--", "/bin/sh"]
            }
        };
        let words = [launcher, shell].concat();
        let mut command = Command::new(words[0]);
        command.args(&words[1..]);
        let v1 = cgroups.v1.as_ref().map(|v1| v1.path().join("cgroup.procs")).unwrap_or_default();
        let v2 = cgroups.v2.path().join("cgroup.procs");
        command.args(["-c", ENTER, "enter"]).arg(&v2).arg(v1).arg(program).args(["-c", script]);
        let log = self.folder.path().join("actor.log");
        let mut actor = Actor { process: Process::spawn("a container", command, log)?, pid: 0 };
        actor.pid = wait_for("a container's first process", START_LIMIT, |seen| {
            if actor.process.ended().is_some() {
                return Ok(Some(0));
            }
            let pids = fs::read_to_string(&v2).unwrap_or_default();
            seen.clone_from(&pids);
            let first = pids.lines().find_map(|line| line.parse::<u32>().ok());
            Ok(first.filter(|pid| {
                let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                !line.is_empty() && !line.contains("shift 2")
            }))
        })?;
        Ok(actor)
    }

    /// What `kubectl exec` starts: a command that joins a container's pid namespace and cgroups from outside.
    pub fn session(&self, cgroups: &ContainerCgroups, actor: &Actor, command: &str) -> Result<(), Error> {
        let (v2, v1) = cgroups.join_files();
        let join: String =
            [Some(v2), v1].iter().flatten().map(|file| format!("echo 0 >{}; ", file.display())).collect();
        self.host(RUNC, None, &format!("nsenter -t {} -p sh -c '{join} exec {command}'", actor.pid))
    }

    /// A session as [`Self::session`] has it that goes on: a shell with this script.
    pub fn enter(&self, cgroups: &ContainerCgroups, actor: &Actor, script: &str) -> Result<Actor, Error> {
        let (v2, v1) = cgroups.join_files();
        let mut command = Command::new("/usr/bin/nsenter");
        command.args(["-t", &actor.pid.to_string(), "-p", "--", "/bin/sh", "-c", ENTER, "enter"]);
        command.arg(&v2).arg(v1.unwrap_or_default()).args(["/bin/sh", "-c", script]);
        let before = fs::read_to_string(&v2).unwrap_or_default();
        let mut session =
            Actor { process: Process::spawn("a session", command, self.folder.path().join("session.log"))?, pid: 0 };
        session.pid = wait_for("a session's process", START_LIMIT, |seen| {
            seen.clone_from(&fs::read_to_string(&v2).unwrap_or_default());
            let new = seen.lines().filter(|pid| !before.lines().any(|known| known == *pid));
            let is_session = |pid: &u32| {
                let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                line.contains(script) && !line.contains("shift 2")
            };
            Ok(new.filter_map(|pid| pid.parse::<u32>().ok()).find(is_session))
        })?;
        Ok(session)
    }

    /// Plays a script to its end.
    pub fn play_out(&mut self, cgroups: &ContainerCgroups, pids: Pids, script: &str) -> Result<Caused, Error> {
        let mut actor = self.start(cgroups, pids, script)?;
        actor.wait_end()?;
        Ok(cgroups.caused(&[&actor]))
    }

    /// A process of the host with this name runs a shell script and ends. `a/b` is a process `b` that a process `a` starts.
    pub fn host(&self, comm: &str, cgroup: Option<&str>, script: &str) -> Result<(), Error> {
        let mut shells = Vec::new();
        for name in comm.split('/') {
            shells.push(self.shell(name)?);
        }
        let (path, children) = (shells[0].clone(), &shells[1..]);
        let home = cgroup.map(|path| Cgroup::create(&self.hierarchies.v2, path, false)).transpose()?;
        let mut command = match &home {
            Some(home) => {
                let mut command = Command::new("/bin/sh");
                command.args(["-c", ENTER, "enter"]).arg(home.path().join("cgroup.procs")).arg("").arg(&path);
                command
            }
            None => Command::new(&path),
        };
        // It is there for a while after what it did, for those who look at it.
        let script = format!("{script}; sleep 0.3");
        match children {
            [] => command.args(["-c", &script]),
            [child, ..] => command.args(["-c", "\"$0\" -c \"$1\"; exit $?"]).arg(child).arg(&script),
        };
        let mut process = Process::spawn(comm, command, self.folder.path().join("host.log"))?;
        let ended = process.wait(END_LIMIT);
        ended.map(|_| ()).ok_or_else(|| Error::Invalid(format!("{comm} did not end: {}", process.output())))
    }

    /// One of the injector's faults.
    pub fn inject(&mut self, fault: Fault) -> Result<Caused, Error> {
        let injection = self.injector.inject(fault)?;
        let all: Vec<&Injection> = injection.earlier.iter().chain([&injection]).collect();
        Ok(Caused {
            container_ids: all.iter().map(|one| one.container_id.clone()).collect(),
            pod_uids: vec![injection.pod_uid.clone()],
            pids: all.iter().map(|one| one.pid).collect(),
        })
    }
}

/// A container's cgroup of one controller; dropping removes it.
pub struct Controlled {
    cgroup: Option<Cgroup>,
    folder: PathBuf,
}

impl Controlled {
    /// Writes the file of either version: its name there, and the text.
    pub fn set(&self, version_1: (&str, &str), version_2: (&str, &str)) -> Result<(), Error> {
        let (file, text) = if self.cgroup.is_some() { version_1 } else { version_2 };
        let path = self.folder.join(file);
        fs::write(&path, text).context(|| format!("write {text:?} to {}", path.display()))
    }
}

impl ContainerCgroups {
    /// The cgroup that limits its memory.
    pub fn limiting(&self) -> &Cgroup {
        match (&self.v1, self.control) {
            (Some(v1), MemoryControl::V1) => v1,
            _ => &self.v2,
        }
    }

    /// Makes the cgroup of another controller with process `pid` in it, where that controller is of version 1.
    /// Otherwise returns the unified cgroup, with the controller switched on.
    pub fn controller(&self, name: &str, pid: u32) -> Result<Controlled, Error> {
        let relative = self.name.path();
        let root = Path::new("/sys/fs/cgroup").join(name);
        if root.join("cgroup.procs").exists() {
            let cgroup = Cgroup::create(&root, &relative, false)?;
            cgroup.write("cgroup.procs", &pid.to_string())?;
            return Ok(Controlled { cgroup: Some(cgroup), folder: root.join(relative) });
        }
        let mut folder = self.v2.path().to_owned();
        for _ in relative.split('/') {
            folder.pop();
        }
        for component in relative.split('/') {
            let file = folder.join("cgroup.subtree_control");
            fs::write(&file, format!("+{name}")).context(|| format!("switch {name} on in {}", file.display()))?;
            folder.push(component);
        }
        Ok(Controlled { cgroup: None, folder })
    }

    /// The folder of its unified cgroup.
    pub fn folder(&self) -> &Path {
        self.v2.path()
    }

    /// The files through which a process joins it.
    pub fn join_files(&self) -> (PathBuf, Option<PathBuf>) {
        let file = |cgroup: &Cgroup| Path::new(cgroup.path()).join("cgroup.procs");
        (file(&self.v2), self.v1.as_ref().map(file))
    }

    /// What was done to it, and its processes.
    pub fn caused(&self, actors: &[&Actor]) -> Caused {
        Caused {
            container_ids: vec![self.name.container_id.clone()],
            pod_uids: vec![self.name.pod_uid.clone()],
            pids: actors.iter().map(|actor| actor.pid).filter(|&pid| pid != 0).collect(),
        }
    }
}

impl Actor {
    /// Waits until its first process, or a child of it, sleeps: what a script sets up before, such as a trap, is there then.
    pub fn await_sleep(&self) -> Result<(), Error> {
        let pid = self.pid;
        wait_for("a container that sleeps", START_LIMIT, |seen| {
            let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
            let pids = children.split_whitespace().map(str::to_owned).chain([pid.to_string()]);
            let comms = pids.filter_map(|pid| fs::read_to_string(format!("/proc/{pid}/comm")).ok());
            *seen = comms.collect();
            Ok(seen.lines().any(|comm| comm == "sleep").then_some(()))
        })
    }

    /// Waits until its first process waits in pause(2): what it set up before is there then.
    pub fn await_pause(&self) -> Result<(), Error> {
        let file = format!("/proc/{}/syscall", self.pid);
        wait_for("a container that waits for a signal", START_LIMIT, |seen| {
            seen.clone_from(&fs::read_to_string(&file).unwrap_or_default());
            Ok(seen.starts_with("34 ").then_some(()))
        })
    }

    /// Waits until its first process has ended, and a moment more.
    pub fn wait_end(&mut self) -> Result<(), Error> {
        wait_for("the end of a container", END_LIMIT, |seen| {
            seen.clone_from(&self.process.output());
            Ok(self.process.ended().map(|_| ()))
        })?;
        pause(KEEP)
    }
}
