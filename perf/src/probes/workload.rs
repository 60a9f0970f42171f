//! What makes hooks fire: loops of one operation each, without threads where the operation allows it.
//!
//! In: the name of a hook. Out: a loop that fires it. What must hold: what a loop needs (files, cgroups, processes) is gone when
//! it is dropped, and an operation is the same with and without probes.

use std::fs::{self, File};
use std::io::{ErrorKind, PipeReader, PipeWriter, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::network;
use crate::clock::wait_for;
use crate::error::{Context, Error};
use crate::inject::cgroup::{Cgroup, Hierarchies};
use crate::inject::crash;

/// A loop of one operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Workload {
    Process,
    Signal,
    Cgroup,
    Tcp,
    TcpReset,
    Block,
    Reclaim,
    Dns,
    Drop,
    Syscall,
    Open,
    Switch,
}

impl Workload {
    /// The loop that fires a hook; `None` for what cannot be made to happen often, such as OOM kills.
    pub fn for_hook(hook: &str) -> Option<Self> {
        let has = |words: &[&str]| words.iter().any(|word| hook.contains(word));
        // The more special names first.
        Some(if has(&["sched_process", "task_newtask"]) {
            Self::Process
        } else if has(&["signal_"]) {
            Self::Signal
        } else if has(&["cgroup_skb", "dns"]) {
            Self::Dns
        } else if has(&["cgroup_mkdir", "cgroup_rmdir"]) {
            Self::Cgroup
        } else if has(&["reset"]) {
            Self::TcpReset
        } else if has(&["inet_sock_set_state"]) {
            Self::Tcp
        } else if has(&["block_"]) {
            Self::Block
        } else if has(&["memcg_reclaim"]) {
            Self::Reclaim
        } else if has(&["kfree_skb"]) {
            Self::Drop
        } else if has(&["open"]) {
            Self::Open
        } else if has(&["sys_enter", "sys_exit"]) {
            Self::Syscall
        } else if has(&["sched_"]) {
            Self::Switch
        } else {
            return None;
        })
    }

    /// Name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Process => "process",
            Self::Signal => "signal",
            Self::Cgroup => "cgroup",
            Self::Tcp => "tcp",
            Self::TcpReset => "tcp_reset",
            Self::Block => "block",
            Self::Reclaim => "reclaim",
            Self::Dns => "dns",
            Self::Drop => "drop",
            Self::Syscall => "syscall",
            Self::Open => "open",
            Self::Switch => "switch",
        }
    }

    /// What is counted.
    pub fn operation(self) -> &'static str {
        match self {
            Self::Process => "fork+exec+exit of a static program",
            Self::Signal => "kill",
            Self::Cgroup => "mkdir+rmdir of a cgroup",
            Self::Tcp => "connect+accept+close over loopback",
            Self::TcpReset => "connect+accept+reset over loopback",
            Self::Block => "direct I/O of 64 KiB, writes and reads",
            Self::Reclaim => "32 MiB of a file read within 8 MiB",
            Self::Dns => "UDP query and answer over loopback, port 53",
            Self::Drop => "UDP datagram to a closed port",
            Self::Syscall => "getppid",
            Self::Open => "open+close",
            Self::Switch => "byte to another thread and back",
        }
    }

    /// Makes what the loop needs; files go into `directory`.
    pub fn prepare(self, directory: &Path) -> Result<Box<dyn Loop>, Error> {
        Ok(match self {
            Self::Process => Box::new(ProcessLoop::new()?),
            Self::Signal => Box::new(SignalLoop::new()?),
            Self::Cgroup => Box::new(CgroupLoop::new()?),
            Self::Tcp => Box::new(network::TcpLoop::new(false)?),
            Self::TcpReset => Box::new(network::TcpLoop::new(true)?),
            Self::Block => Box::new(BlockLoop::new(directory)?),
            Self::Reclaim => Box::new(ReclaimLoop::new(directory)?),
            Self::Dns => Box::new(network::DnsLoop::new()?),
            Self::Drop => Box::new(network::DropLoop::new()?),
            Self::Syscall => Box::new(SyscallLoop),
            Self::Open => Box::new(OpenLoop),
            Self::Switch => Box::new(SwitchLoop::new()?),
        })
    }
}

/// A loop that is ready.
pub trait Loop {
    /// Does the operation `operations` times.
    fn run(&mut self, operations: u64) -> Result<(), Error>;
}

/// How long a program that was just written may be open elsewhere.
const OPEN_LIMIT: Duration = Duration::from_secs(5);

struct ProcessLoop {
    program: PathBuf,
    _folder: TempDir,
}

impl ProcessLoop {
    fn new() -> Result<Self, Error> {
        let folder = tempfile::Builder::new()
            .prefix("tapio-perf-probes-")
            .tempdir()
            .context(|| "make a temporary folder".into())?;
        let program = folder.path().join("quiet");
        let bytes = crash::quiet_program()
            .ok_or_else(|| Error::Invalid("no program that does nothing is known for this architecture".into()))?;
        let what = || format!("write {}", program.display());
        fs::write(&program, bytes).context(what)?;
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).context(what)?;
        // A child that another thread started meanwhile has the file open for writing until it runs its own program.
        wait_for("that nobody has the program open for writing", OPEN_LIMIT, |_| {
            match Command::new(&program).status() {
                Err(error) if error.kind() == ErrorKind::ExecutableFileBusy => Ok(None),
                started => started.map(Some).context(|| "start a program".into()),
            }
        })?;
        Ok(Self { program, _folder: folder })
    }
}

impl Loop for ProcessLoop {
    fn run(&mut self, operations: u64) -> Result<(), Error> {
        for _ in 0..operations {
            let status = Command::new(&self.program).status().context(|| "start a program".into())?;
            if !status.success() {
                return Err(Error::Invalid(format!("a program that does nothing ended with {status}")));
            }
        }
        Ok(())
    }
}

/// Signals to a stopped process stay pending: the target does nothing with them.
struct SignalLoop {
    target: Child,
    pid: Pid,
}

impl SignalLoop {
    fn new() -> Result<Self, Error> {
        let target = Command::new("sleep").arg("3600").stdin(Stdio::null()).spawn().context(|| "start sleep".into())?;
        let pid =
            Pid::from_raw(target.id() as i32).ok_or_else(|| Error::Invalid("a process has no process id".into()))?;
        let made = Self { target, pid };
        kill_process(pid, Signal::STOP).context(|| "stop a process".into())?;
        Ok(made)
    }
}

impl Loop for SignalLoop {
    fn run(&mut self, operations: u64) -> Result<(), Error> {
        for _ in 0..operations {
            kill_process(self.pid, Signal::TERM).context(|| "send a signal".into())?;
        }
        Ok(())
    }
}

impl Drop for SignalLoop {
    fn drop(&mut self) {
        // Fails when it is dead already, which is what is wanted.
        let _ = self.target.kill();
        let _ = self.target.wait();
    }
}

struct CgroupLoop {
    child: PathBuf,
    _parent: Cgroup,
}

impl CgroupLoop {
    fn new() -> Result<Self, Error> {
        let name = format!("tapio-perf-probes-{}", std::process::id());
        let parent = Cgroup::create(&Hierarchies::find()?.v2, &name, false)?;
        Ok(Self { child: parent.path().join("child"), _parent: parent })
    }
}

impl Loop for CgroupLoop {
    fn run(&mut self, operations: u64) -> Result<(), Error> {
        for _ in 0..operations {
            fs::create_dir(&self.child).context(|| "make a cgroup".into())?;
            fs::remove_dir(&self.child).context(|| "remove a cgroup".into())?;
        }
        Ok(())
    }
}

const DIRECT_IO_BYTES: usize = 64 << 10;
const DIRECT_FILE_BYTES: u64 = 16 << 20;
const PAGE_BYTES: usize = 4096;

/// Direct I/O wants its memory aligned.
#[derive(Clone, IntoBytes, FromBytes, Immutable)]
#[repr(C, align(4096))]
struct Page([u8; PAGE_BYTES]);

struct BlockLoop {
    file: File,
    buffer: Vec<Page>,
    operation: u64,
}

impl BlockLoop {
    fn new(directory: &Path) -> Result<Self, Error> {
        let named = tempfile::Builder::new().prefix("tapio-perf-probes-").tempfile_in(directory);
        let named = named.context(|| format!("make a file in {}", directory.display()))?;
        let file = File::options()
            .read(true)
            .write(true)
            .custom_flags(rustix::fs::OFlags::DIRECT.bits() as i32)
            .open(named.path())
            .context(|| format!("open a file of {} for direct I/O", directory.display()))?;
        // The file lives by its descriptor alone from here on.
        let mut made = Self { file, buffer: vec![Page([7; PAGE_BYTES]); DIRECT_IO_BYTES / PAGE_BYTES], operation: 0 };
        // Blocks are allocated now, so that no later write does.
        made.run(DIRECT_FILE_BYTES / DIRECT_IO_BYTES as u64)?;
        Ok(made)
    }
}

impl Loop for BlockLoop {
    fn run(&mut self, operations: u64) -> Result<(), Error> {
        let blocks = DIRECT_FILE_BYTES / DIRECT_IO_BYTES as u64;
        for _ in 0..operations {
            let offset = self.operation % blocks * DIRECT_IO_BYTES as u64;
            if (self.operation / blocks).is_multiple_of(2) {
                self.file.write_all_at(self.buffer.as_bytes(), offset).context(|| "write to a file".into())?;
            } else {
                let buffer = self.buffer.as_mut_slice().as_mut_bytes();
                self.file.read_exact_at(buffer, offset).context(|| "read a file".into())?;
            }
            self.operation += 1;
        }
        Ok(())
    }
}

const RECLAIM_FILE_BYTES: usize = 32 << 20;
const RECLAIM_LIMIT_BYTES: u64 = 8 << 20;

/// A file that is larger than its reader's cgroup may be: each page read takes the place of another.
struct ReclaimLoop {
    file: PathBuf,
    cgroup: Cgroup,
    _folder: TempDir,
}

impl ReclaimLoop {
    fn new(directory: &Path) -> Result<Self, Error> {
        let hierarchies = Hierarchies::find()?;
        let control = hierarchies.memory_control()?;
        let (root, delegate) = match &hierarchies.v1_memory {
            Some(memory) if control == crate::inject::cgroup::MemoryControl::V1 => (memory, false),
            _ => (&hierarchies.v2, true),
        };
        let name = format!("tapio-perf-probes-memory-{}", std::process::id());
        let cgroup = Cgroup::create(root, &name, delegate)?;
        cgroup.limit_memory(control, RECLAIM_LIMIT_BYTES)?;
        let folder = tempfile::Builder::new().prefix("tapio-perf-probes-").tempdir_in(directory);
        let folder = folder.context(|| format!("make a folder in {}", directory.display()))?;
        let path = folder.path().join("pages");
        let file = File::create(&path).context(|| format!("make {}", path.display()))?;
        let what = || format!("write {}", path.display());
        (&file).write_all(&vec![7; RECLAIM_FILE_BYTES]).context(what)?;
        file.sync_all().context(what)?;
        // Out of the page cache, where its pages would belong to this process's cgroup.
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).context(what)?;
        Ok(Self { file: path, cgroup, _folder: folder })
    }
}

impl Loop for ReclaimLoop {
    fn run(&mut self, operations: u64) -> Result<(), Error> {
        let script = r#"echo $$ > "$1/cgroup.procs" && i=0 && while [ $i -lt "$3" ]; do cat "$2"; i=$((i+1)); done"#;
        let status = Command::new("sh")
            .args(["-ec", script, "sh"])
            .arg(self.cgroup.path())
            .arg(&self.file)
            .arg(operations.to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .status()
            .context(|| "start sh".into())?;
        if status.success() {
            Ok(())
        } else {
            Err(Error::Invalid(format!("reading within a limit ended with {status}")))
        }
    }
}

struct SyscallLoop;

impl Loop for SyscallLoop {
    fn run(&mut self, operations: u64) -> Result<(), Error> {
        for _ in 0..operations {
            std::hint::black_box(rustix::process::getppid());
        }
        Ok(())
    }
}

struct OpenLoop;

impl Loop for OpenLoop {
    fn run(&mut self, operations: u64) -> Result<(), Error> {
        for _ in 0..operations {
            File::open("/dev/null").context(|| "open /dev/null".into())?;
        }
        Ok(())
    }
}

/// A thread that sends each byte back.
struct SwitchLoop {
    // Dropped first: the thread ends with it.
    to: Option<PipeWriter>,
    from: PipeReader,
    echo: Option<JoinHandle<()>>,
}

impl SwitchLoop {
    fn new() -> Result<Self, Error> {
        let pipe = || std::io::pipe().context(|| "make a pipe".into());
        let ((mut there, to), (from, mut back)) = (pipe()?, pipe()?);
        let echo = thread::spawn(move || {
            let mut byte = [0];
            while there.read_exact(&mut byte).is_ok() && back.write_all(&byte).is_ok() {}
        });
        Ok(Self { to: Some(to), from, echo: Some(echo) })
    }
}

impl Loop for SwitchLoop {
    fn run(&mut self, operations: u64) -> Result<(), Error> {
        let what = || "send a byte to a thread".into();
        let Some(to) = &mut self.to else {
            return Ok(());
        };
        for _ in 0..operations {
            to.write_all(&[1]).context(what)?;
            self.from.read_exact(&mut [0]).context(what)?;
        }
        Ok(())
    }
}

impl Drop for SwitchLoop {
    fn drop(&mut self) {
        self.to = None;
        if let Some(echo) = self.echo.take() {
            // It cannot panic: nothing in it does.
            let _ = echo.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use tapio_probes::PROGRAMS;

    use super::Workload;

    #[test]
    fn loops_that_need_no_root_do_their_operation() {
        let directory = std::env::temp_dir();
        for workload in [Workload::Process, Workload::Signal, Workload::Tcp, Workload::TcpReset, Workload::Drop] {
            let mut operations = workload.prepare(&directory).expect("it can be prepared");
            operations.run(3).unwrap_or_else(|error| panic!("{}: {error}", workload.name()));
        }
        for workload in [Workload::Syscall, Workload::Open, Workload::Switch] {
            workload.prepare(&directory).expect("it can be prepared").run(3).expect("it runs");
        }
    }

    #[test]
    fn only_what_is_rare_has_no_workload() {
        let without: Vec<&str> =
            PROGRAMS.iter().map(|program| program.hook).filter(|hook| Workload::for_hook(hook).is_none()).collect();
        for hook in &without {
            let is_rare = ["mark_victim", "direct_reclaim", "retransmit"].iter().any(|word| hook.contains(word));
            assert!(is_rare, "{hook} has no workload: add one to perf/src/probes/workload.rs");
        }
    }
}
