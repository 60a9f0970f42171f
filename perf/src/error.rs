//! What can go wrong here; every text says what to do about it, or at least where to look.

use std::io;
use std::path::PathBuf;

/// Why something could not be done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused.
    #[error("cannot {what}: {source}")]
    Io { what: String, source: io::Error },
    /// A program of Tapio is not where it should be.
    #[error("{name} is not in {folder}: run make build, or name its folder with --bin-dir", folder = .folder.display())]
    BinaryMissing { name: String, folder: PathBuf },
    /// Servers cannot share a log without NATS.
    #[error(
        "several servers share a log in nats-server, which is not installed: run deploy/local/install.sh nats (Debian's package \
         nats-server), or measure without the log by --without-log"
    )]
    NatsMissing,
    /// A program ended before it was ready.
    #[error("{name} ended at its start with {status}; it said:\n{output}")]
    EndedAtStart { name: String, status: String, output: String },
    /// A program ended while it was needed.
    #[error("{name} ended in the middle of the run with {status}; it said:\n{output}")]
    EndedEarly { name: String, status: String, output: String },
    /// A program did not do in time what it was waited for.
    #[error("{what} did not happen within {seconds} s; last seen: {seen}")]
    TimedOut { what: String, seconds: u64, seen: String },
    /// The server could not be reached or refused.
    #[error("server at {address}: {message}")]
    Server { address: String, message: String },
    /// An HTTP endpoint answered something else than what was asked for.
    #[error("GET http://127.0.0.1:{port}{path}: {message}")]
    Http { port: u16, path: String, message: String },
    /// Faults need the rights to make cgroups and to kill.
    #[error("faults are made in cgroups and pid namespaces of this host: run tapio-perf inject as root")]
    NotRoot,
    /// The host has no unified hierarchy.
    #[error("no cgroup v2 hierarchy is mounted: mount -t cgroup2 none /sys/fs/cgroup (or /sys/fs/cgroup/unified)")]
    NoCgroupV2,
    /// Memory cannot be limited.
    #[error(
        "memory cannot be limited here: neither cgroup v2 has the memory controller nor is a version 1 memory hierarchy mounted"
    )]
    NoMemoryController,
    /// A victim outlived its fault.
    #[error("{fault}: {what}")]
    Survived { fault: &'static str, what: String },
    /// A ring could not be made or handed over.
    #[error("ring: {0}")]
    Ring(String),
    /// Ctrl-C or SIGTERM.
    #[error("interrupted; what was started has been stopped and removed")]
    Interrupted,
    /// Something that was given makes no sense.
    #[error("{0}")]
    Invalid(String),
}

/// Adds what was tried to an error of the operating system.
pub trait Context<T> {
    /// `what` completes the sentence "cannot …".
    fn context(self, what: impl FnOnce() -> String) -> Result<T, Error>;
}

impl<T, E: Into<io::Error>> Context<T> for Result<T, E> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T, Error> {
        self.map_err(|source| Error::Io { what: what(), source: source.into() })
    }
}
