//! The real programs, run from outside: found, configured, started, watched and always stopped.
//!
//! What must hold: only processes that were started here are signalled, and each of them is gone when its guard is dropped,
//! whatever the way out.

pub mod collector;
pub mod group;
pub mod http;
pub(crate) mod metrics;
pub mod nats;
mod program;
pub mod server;
pub mod usage;

use std::collections::HashSet;
use std::fs::{self, File};
use std::net::TcpListener;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

pub use collector::{Collector, CollectorOptions};
pub use group::{GroupOptions, ServerGroup};
pub use program::Program;
pub use server::{Server, ServerOptions};

use crate::clock::wait_for;
use crate::error::{Context, Error};

/// How long a program may take until it is ready.
pub const READY_LIMIT: Duration = Duration::from_secs(20);
/// How long a program may take to end after SIGTERM: Kubernetes would kill it after 30 s.
pub const END_LIMIT: Duration = Duration::from_secs(28);
/// How long a guard waits after SIGTERM before it kills.
const DROP_LIMIT: Duration = Duration::from_secs(5);
/// How much of a program's output an error quotes.
const OUTPUT_BYTES: usize = 4096;

/// The folder with the programs: `given`, or where this executable lies (a test lies one folder deeper, in `deps`).
pub fn bin_dir(given: Option<&Path>) -> Result<PathBuf, Error> {
    if let Some(folder) = given {
        return Ok(folder.to_owned());
    }
    let own = std::env::current_exe().context(|| "find this executable".into())?;
    let folder = own.parent().unwrap_or(Path::new("/"));
    Ok(if folder.ends_with("deps") { folder.parent().unwrap_or(folder).to_owned() } else { folder.to_owned() })
}

/// The path of one program.
pub fn binary(name: &str, folder: &Path) -> Result<PathBuf, Error> {
    let path = folder.join(name);
    if path.is_file() {
        Ok(path)
    } else {
        Err(Error::BinaryMissing { name: name.to_owned(), folder: folder.to_owned() })
    }
}

/// A TCP port of 127.0.0.1 that is free now and was not given out here before.
pub fn free_port() -> Result<u16, Error> {
    static GIVEN: Mutex<Option<HashSet<u16>>> = Mutex::new(None);
    let mut given = GIVEN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let given = given.get_or_insert_default();
    for _ in 0..1000 {
        let port = TcpListener::bind(("127.0.0.1", 0))
            .and_then(|listener| listener.local_addr())
            .context(|| "find a free port".into())?
            .port();
        if given.insert(port) {
            return Ok(port);
        }
    }
    Err(Error::Invalid("no free TCP port was found on 127.0.0.1".into()))
}

/// The program of util-linux.
const SETPRIV: &str = "/usr/bin/setpriv";

/// A running program. Its output goes to a file.
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
    ended: Option<ExitStatus>,
}

impl Process {
    /// Starts `command`; what it says is appended to `log`. It is killed when the thread that starts it ends before this
    /// guard is dropped, as when a test is killed.
    pub fn spawn(name: &str, command: Command, log: PathBuf) -> Result<Self, Error> {
        let mut command = ending_with_us(command);
        let open = || File::options().create(true).append(true).open(&log);
        let what = || format!("open {}", log.display());
        let (out, err) = (open().context(what)?, open().context(what)?);
        let child = command
            .stdin(Stdio::null())
            .stdout(out)
            .stderr(err)
            .spawn()
            .context(|| format!("start {}", command.get_program().display()))?;
        Ok(Self { name: name.to_owned(), child, log, ended: None })
    }

    /// Process id of the program.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, if it did.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait().ok().flatten();
        }
        self.ended
    }

    /// An error when it has ended.
    pub fn check_running(&mut self) -> Result<(), Error> {
        match self.ended() {
            None => Ok(()),
            Some(status) => {
                Err(Error::EndedEarly { name: self.name.clone(), status: status_text(status), output: self.output() })
            }
        }
    }

    /// The end of what it said.
    pub fn output(&self) -> String {
        let text = fs::read(&self.log).unwrap_or_default();
        let start = text.len().saturating_sub(OUTPUT_BYTES);
        String::from_utf8_lossy(&text[start..]).trim().to_owned()
    }

    /// Sends it a signal; a process that has ended gets none.
    pub fn signal(&mut self, signal: Signal) {
        if self.ended().is_none()
            && let Some(pid) = Pid::from_raw(self.child.id() as i32)
        {
            // It is not reaped yet, so the id is still its own.
            let _ = kill_process(pid, signal);
        }
    }

    /// SIGKILL, and waits.
    pub fn kill(&mut self) {
        self.signal(Signal::KILL);
        if self.ended.is_none() {
            self.ended = self.child.wait().ok();
        }
    }

    /// SIGTERM, and waits; one that does not end in time is killed, and that is an error.
    pub fn terminate(&mut self, limit: Duration) -> Result<ExitStatus, Error> {
        self.signal(Signal::TERM);
        match self.wait(limit) {
            Some(status) => Ok(status),
            None => {
                self.kill();
                Err(Error::TimedOut {
                    what: format!("the end of {} after SIGTERM", self.name),
                    seconds: limit.as_secs(),
                    seen: self.output(),
                })
            }
        }
    }

    /// Waits for it to end by itself.
    pub fn wait(&mut self, limit: Duration) -> Option<ExitStatus> {
        let end = Instant::now() + limit;
        loop {
            if let Some(status) = self.ended() {
                return Some(status);
            }
            if Instant::now() >= end {
                return None;
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until `GET http://127.0.0.1:port/readyz` says 200.
    pub fn wait_ready(&mut self, port: u16) -> Result<(), Error> {
        let what = format!("readiness of {} (GET :{port}/readyz)", self.name);
        let result = wait_for(&what, READY_LIMIT, |seen| {
            if let Some(status) = self.ended() {
                return Err(Error::EndedAtStart {
                    name: self.name.clone(),
                    status: status_text(status),
                    output: self.output(),
                });
            }
            match http::get(port, "/readyz") {
                Ok((200, _)) => return Ok(Some(())),
                Ok((status, body)) => *seen = format!("{status} {}", body.trim()),
                Err(error) => *seen = error.to_string(),
            }
            Ok(None)
        });
        result.map_err(|error| match error {
            Error::TimedOut { what, seconds, seen } => {
                Error::TimedOut { what, seconds, seen: format!("{seen}; it said:\n{}", self.output()) }
            }
            other => other,
        })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.signal(Signal::TERM);
        if self.wait(DROP_LIMIT).is_none() {
            self.kill();
        }
    }
}

/// Wraps the command so that the kernel ends it when the thread that started it has ended, if `setpriv` exists to ask
/// for that. A user or group that was set on the command is lost: it cannot be asked for.
fn ending_with_us(command: Command) -> Command {
    let program = Path::new(command.get_program());
    if !Path::new(SETPRIV).exists() || !program.is_file() {
        return command;
    }
    let mut ending = Command::new(SETPRIV);
    ending.args(["--pdeathsig", "KILL", "--"]).arg(program).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => ending.env(name, value),
            None => ending.env_remove(name),
        };
    }
    if let Some(folder) = command.get_current_dir() {
        ending.current_dir(folder);
    }
    ending
}

/// How a process ended, for people.
pub fn status_text(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => status.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::{Process, binary, free_port};
    use std::path::Path;
    use std::process::Command;
    use std::time::Duration;

    fn shell(script: &str, folder: &Path) -> Process {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]);
        Process::spawn("sh", command, folder.join("log")).expect("sh starts")
    }

    #[test]
    fn what_was_started_is_gone_when_its_guard_is() {
        let folder = tempfile::tempdir().expect("a folder");
        let process = shell("exec sleep 1000", folder.path());
        let proc = format!("/proc/{}", process.pid());
        assert!(Path::new(&proc).exists());
        drop(process);
        assert!(!Path::new(&proc).exists());
    }

    #[test]
    fn children_end_with_the_thread_that_started_them() {
        if !Path::new(super::SETPRIV).exists() {
            println!("SKIP children_end_with_the_thread_that_started_them: needs {}", super::SETPRIV);
            assert!(std::env::var("TAPIO_REQUIRE").as_deref() != Ok("all"), "TAPIO_REQUIRE=all");
            return;
        }
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().to_owned();
        let up = move || {
            let process = shell("echo up; exec sleep 1000", &path);
            while process.output() != "up" {
                std::thread::sleep(Duration::from_millis(1));
            }
            process
        };
        let mut process = std::thread::spawn(up).join().expect("no panic");
        let status = process.wait(Duration::from_secs(10)).expect("it has ended");
        assert_eq!(super::status_text(status), "signal 9");
    }

    #[test]
    fn an_early_end_is_reported_with_the_last_words() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut process = shell("echo unknown key >&2; exit 2", folder.path());
        let error = process.wait_ready(free_port().expect("a port")).expect_err("it ended");
        let text = error.to_string();
        assert!(text.contains("exit code 2") && text.contains("unknown key"), "{text}");
    }

    #[test]
    fn sigterm_ends_a_willing_process() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut process = shell("trap 'exit 7' TERM; echo up; while :; do sleep 0.01; done", folder.path());
        while process.output() != "up" {
            std::thread::sleep(Duration::from_millis(1));
        }
        let status = process.terminate(Duration::from_secs(5)).expect("it ends");
        assert_eq!(status.code(), Some(7));
    }

    #[test]
    fn a_missing_program_says_how_to_get_it() {
        let error = binary("tapio-nothing", Path::new("/nonexistent")).expect_err("it is missing");
        assert!(error.to_string().contains("make build"));
    }
}
