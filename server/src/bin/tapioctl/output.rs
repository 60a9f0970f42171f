//! Formats that kubectl's users expect.

use std::io;
use std::thread;

use clap::ValueEnum;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::retry_on_intr;
use serde_json::Value;
use tapio_wire::program::{output, yaml};
use tokio::sync::oneshot;

use super::server::Failure;

/// See `--output`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    Table,
    Wide,
    Json,
    Yaml,
}

impl Format {
    /// Whether it is for people.
    pub fn is_table(self) -> bool {
        matches!(self, Self::Table | Self::Wide)
    }

    /// An object for programs; `None` where people want a table.
    pub fn one(self, value: &Value) -> Option<String> {
        match self {
            Self::Table | Self::Wide => None,
            Self::Json => Some(format!("{value}\n")),
            // What is JSON is YAML; an error here would be one of memory.
            Self::Yaml => Some(format!("---\n{}", yaml::to_string(value).unwrap_or_default())),
        }
    }
}

/// Writes to standard output, at once.
pub fn print(text: &str) -> Result<(), Failure> {
    Ok(output::print(text)?)
}

/// Ends when nobody reads standard output any more: a watcher need not wait for the next finding to notice. Never ends where that
/// cannot be known, as of a file.
pub async fn nobody_reads() -> Failure {
    let (gone, is_gone) = oneshot::channel();
    // A thread, since it may wait for good; it ends with the process.
    let waiting = thread::Builder::new().name("output".into()).spawn(move || {
        // No event is requested: an error or a hangup is reported nevertheless.
        let output = io::stdout();
        let wait = || poll(&mut [PollFd::new(&output, PollFlags::empty())], None);
        if retry_on_intr(wait).is_ok() {
            // The watcher may have ended for another reason.
            let _ = gone.send(());
        }
    });
    if waiting.is_ok() && is_gone.await.is_ok() {
        return Failure::Output(io::ErrorKind::BrokenPipe.into());
    }
    std::future::pending().await
}
