//! What the processes of a fault do, each a run of this program with a hidden subcommand.
//!
//! ```text
//!  tapio-perf inject ──► launch ──(new pid namespace)──► enter ──exec──► act      the container's init
//!                    └─► send                              │              └──► act   its child, for silent-child-oom
//!                                                          └ joins the cgroups, so that the exec is seen in them
//! ```
//!
//! What leaves: one JSON line on standard output for every step. What must hold: no process outlives the one that started
//! it, by the kernel's parent death signal.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use rustix::process::{Pid, Resource, Rlimit, Signal, kill_process, set_parent_process_death_signal, setrlimit};
use rustix::thread::UnshareFlags;
use serde::{Deserialize, Serialize};

use crate::clock::boottime_ns;
use crate::error::{Context, Error};

/// The hidden subcommand's name.
pub const COMMAND: &str = "__victim";
/// The exit code of a container in a crash loop.
pub const CRASH_CODE: i32 = 3;
/// The exit code of a victim that should be dead and is not.
const SURVIVED_CODE: i32 = 99;
/// How long a container works before its fault.
const LEAD: Duration = Duration::from_millis(150);
/// Pause of [`Role::MakeFolders`] after each folder.
const FOLDER_PAUSE: Duration = Duration::from_micros(100);
/// How long the init of a silent child's container lives on: longer than an end that patterns take for the child's consequence
/// (`server/patterns/child-oom-exit.yaml`, within 2 s).
const SILENCE: Duration = Duration::from_millis(2500);
const CHUNK_BYTES: usize = 1 << 20;

/// What a container does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Role {
    /// Takes memory until it is killed.
    Allocate,
    /// Waits for a child that takes memory until it is killed, and says nothing of it.
    ShrugOff,
    /// Becomes the program that faults.
    Crash,
    /// Waits to be killed. As init of its namespace without a handler, it does not even notice SIGTERM.
    Wait,
    /// Ends with an error.
    Fail,
    /// Calls `abort()`.
    Abort,
    /// Writes to a file again and again, in a thread that is not its first.
    WriteInThread,
    /// Starts a program that ends at once, again and again.
    StartProcesses,
    /// Makes a folder and removes it, thousands of times a second.
    MakeFolders,
}

/// A role and what it needs.
#[derive(Clone, Debug, Args)]
pub struct Act {
    #[arg(long)]
    pub role: Role,
    /// The limit that it will run into.
    #[arg(long, default_value_t = 0)]
    pub limit_bytes: u64,
    /// The program to become or to start, the file to write to, or the folder to make.
    #[arg(long)]
    pub program: Option<PathBuf>,
}

/// The processes of a fault.
#[derive(Clone, Debug, Subcommand)]
pub enum Victim {
    /// Starts a container and reports its death.
    Launch(Container),
    /// Joins the cgroups and becomes the container.
    Enter(Container),
    /// Plays the role.
    Act(Act),
    /// Sends a signal, then waits for the end of standard input.
    Send { pid: i32, signal: i32 },
}

/// A role in cgroups.
#[derive(Clone, Debug, Args)]
pub struct Container {
    /// Folders of cgroups to join.
    #[arg(long)]
    pub cgroup: Vec<PathBuf>,
    #[command(flatten)]
    pub act: Act,
}

/// What these processes say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "step", rename_all = "snake_case")]
pub enum Step {
    /// The container's init was started.
    Started { pid: u32, time_ns: u64 },
    /// The init started a child; ids are the host's.
    Child { pid: u32, time_ns: u64 },
    /// The child died, with the status of `wait(2)`.
    ChildDied { status: i32, time_ns: u64 },
    /// The init died.
    Died { status: i32, time_ns: u64 },
    /// A signal was sent.
    Sent { time_ns: u64 },
}

fn say(step: Step) -> Result<(), Error> {
    let mut line = serde_json::to_string(&step).map_err(|error| Error::Invalid(error.to_string()))?;
    line.push('\n');
    io::stdout().write_all(line.as_bytes()).context(|| "report a step".into())
}

/// Runs one of these processes; its exit code.
pub fn run(victim: &Victim) -> Result<i32, Error> {
    set_parent_process_death_signal(Some(Signal::KILL)).context(|| "ask to die with the parent".into())?;
    match victim {
        Victim::Launch(container) => launch(container),
        Victim::Enter(container) => enter(container),
        Victim::Act(act) => perform(act),
        Victim::Send { pid, signal } => send(*pid, *signal),
    }
}

fn launch(container: &Container) -> Result<i32, Error> {
    new_pid_namespace()?;
    let mut command = own_command("enter", &container.act)?;
    for cgroup in &container.cgroup {
        command.arg("--cgroup").arg(cgroup);
    }
    let mut child = command.spawn().context(|| "start the container's init".into())?;
    say(Step::Started { pid: child.id(), time_ns: boottime_ns() })?;
    let status = child.wait().context(|| "wait for the container's init".into())?;
    say(Step::Died { status: status.into_raw(), time_ns: boottime_ns() })?;
    Ok(0)
}

#[expect(deprecated, reason = "it is deprecated for what it does to descriptor tables; a pid namespace touches none")]
fn new_pid_namespace() -> Result<(), Error> {
    rustix::thread::unshare(UnshareFlags::NEWPID).context(|| "make a pid namespace".into())
}

/// Builds a command that runs this program again.
fn own_command(step: &str, act: &Act) -> Result<Command, Error> {
    let program = std::env::current_exe().context(|| "find this executable".into())?;
    let mut command = Command::new(program);
    let role = act.role.to_possible_value().map(|role| role.get_name().to_owned());
    command
        .args([COMMAND, step, "--role"])
        .arg(role.unwrap_or_default())
        .arg("--limit-bytes")
        .arg(act.limit_bytes.to_string());
    if let Some(program) = &act.program {
        command.arg("--program").arg(program);
    }
    Ok(command)
}

fn enter(container: &Container) -> Result<i32, Error> {
    for cgroup in &container.cgroup {
        let file = cgroup.join("cgroup.procs");
        // 0 is whoever writes it.
        fs::write(&file, "0").context(|| format!("join {}", file.display()))?;
    }
    // A fault must not fill the disk, nor wake up a crash handler.
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    setrlimit(Resource::Core, none).context(|| "forbid core dumps".into())?;
    let source = own_command("act", &container.act)?.exec();
    Err(Error::Io { what: "become the container".into(), source })
}

fn perform(act: &Act) -> Result<i32, Error> {
    match act.role {
        Role::Allocate => {
            thread::sleep(LEAD);
            Ok(allocate(act.limit_bytes))
        }
        Role::ShrugOff if is_init() => shrug_off(act),
        Role::ShrugOff => {
            fs::write("/proc/self/oom_score_adj", "1000").context(|| "volunteer for the OOM killer".into())?;
            say(Step::Child { pid: host_pid()?, time_ns: boottime_ns() })?;
            thread::sleep(LEAD);
            Ok(allocate(act.limit_bytes))
        }
        Role::Crash => {
            thread::sleep(LEAD);
            let program = act.program.as_deref().unwrap_or(Path::new("/nonexistent"));
            let source = Command::new(program).exec();
            Err(Error::Io { what: format!("become {}", program.display()), source })
        }
        Role::Wait => loop {
            thread::park();
        },
        Role::Fail => {
            thread::sleep(LEAD);
            Ok(CRASH_CODE)
        }
        Role::Abort => {
            thread::sleep(LEAD);
            std::process::abort()
        }
        Role::WriteInThread => {
            let path = act.program.clone().unwrap_or_default();
            let writer = thread::spawn(move || {
                loop {
                    fs::write(&path, "x").context(|| format!("write {}", path.display()))?;
                    thread::sleep(LEAD);
                }
            });
            let panicked = |_| Err(Error::Invalid("the thread that writes panicked".into()));
            let outcome: Result<(), Error> = writer.join().unwrap_or_else(panicked);
            outcome.map(|()| SURVIVED_CODE)
        }
        Role::StartProcesses => {
            let program = act.program.as_deref().unwrap_or(Path::new("/bin/true"));
            loop {
                Command::new(program).status().context(|| format!("start {}", program.display()))?;
            }
        }
        Role::MakeFolders => {
            let path = act.program.clone().unwrap_or_default();
            loop {
                fs::create_dir(&path).context(|| format!("make {}", path.display()))?;
                fs::remove_dir(&path).context(|| format!("remove {}", path.display()))?;
                // The kernel has one lock for all cgroups: others must be able to make theirs.
                thread::sleep(FOLDER_PAUSE);
            }
        }
    }
}

fn is_init() -> bool {
    std::process::id() == 1
}

/// Reads this process's id on the host: procfs was mounted there.
fn host_pid() -> Result<u32, Error> {
    let link = fs::read_link("/proc/self").context(|| "read /proc/self".into())?;
    let text = link.to_string_lossy();
    text.parse().map_err(|_| Error::Invalid(format!("/proc/self leads to {text:?}, not to a process id")))
}

/// Takes memory, page after page, until killed; stops far beyond the limit, so that a host without it is not harmed.
fn allocate(limit_bytes: u64) -> i32 {
    let mut held: Vec<Vec<u8>> = Vec::new();
    while (held.len() * CHUNK_BYTES) as u64 <= limit_bytes.saturating_mul(2) {
        held.push(vec![1; CHUNK_BYTES]);
        std::hint::black_box(&held);
    }
    SURVIVED_CODE
}

fn shrug_off(act: &Act) -> Result<i32, Error> {
    let mut child = own_command("act", act)?.spawn().context(|| "start the worker".into())?;
    let status = child.wait().context(|| "wait for the worker".into())?;
    say(Step::ChildDied { status: status.into_raw(), time_ns: boottime_ns() })?;
    thread::sleep(SILENCE);
    Ok(0)
}

fn send(pid: i32, signal: i32) -> Result<i32, Error> {
    let signal = Signal::from_named_raw(signal).ok_or_else(|| Error::Invalid(format!("{signal} is no signal")))?;
    let target = Pid::from_raw(pid).ok_or_else(|| Error::Invalid(format!("{pid} is no process")))?;
    kill_process(target, signal).context(|| format!("send a signal to {pid}"))?;
    say(Step::Sent { time_ns: boottime_ns() })?;
    // Who sent it can be looked at until the injection is over.
    io::stdin().read_to_end(&mut Vec::new()).context(|| "wait for the end of the injection".into())?;
    Ok(0)
}
