//! What `tapio-server archive …` and `tapio-server replay` do: for people at a machine that has the archive.
//!
//! What enters: arguments. What leaves: text or JSON lines on standard output, progress and errors on standard error, an exit
//! code. What must hold: only restore, erase and hold change an archive ([`place`]); the others lock nothing and are safe beside a
//! running server. A remote archive is fetched first ([`source`]), and what was fetched is kept for the next time.

mod cat;
mod check;
mod copy;
mod erase;
mod export;
mod hold;
mod place;
mod replay;
mod restore;
mod source;
mod stat;
mod verify;

use std::io::{self, IsTerminal};
use std::process::ExitCode;

use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use tapio_wire::complain;
use tapio_wire::program::clock::now_ns;
use tapio_wire::program::output;

use crate::archive::copy::CopyError;
use crate::archive::damage::Damage;
use crate::archive::reader::ReadError;
use crate::events::EventsError;
use crate::parquet::ExportError;
use crate::remote::RemoteError;
use crate::render::{self, Style};

pub use cat::CatArguments;
pub use check::{check, print_config};
pub use copy::CopyArguments;
pub use erase::EraseArguments;
pub use export::ExportArguments;
pub use hold::HoldCommand;
pub use replay::ReplayArguments;
pub use restore::RestoreArguments;
pub use source::Source;

/// An archive, and how to print.
#[derive(Args)]
pub struct Directory {
    #[command(flatten)]
    source: Source,
    /// Print JSON, one object a line
    #[arg(long)]
    json: bool,
}

/// `tapio-server archive …`
#[derive(Subcommand)]
pub enum ArchiveCommand {
    /// Check every record of every segment and index; exit code 3 if acknowledged bytes are damaged
    Verify(Directory),
    /// Summarize: time range, nodes, epochs, events by kind, compression
    Stat(Directory),
    /// Print events
    Cat(CatArguments),
    /// Copy an archive (a server may be writing it) to a new or empty directory; exit code 3 if acknowledged events in it are
    /// damaged
    Copy(CopyArguments),
    /// Write an archive as Parquet, for SQL (docs/sql.md); exit code 3 if acknowledged events are damaged
    Export(ExportArguments),
    /// Bring a window of another archive back beside a stopped server's own: it shows those events and findings then
    Restore(RestoreArguments),
    /// Erase the events of a namespace or a pod, in an archive that no server has open, or in a remote archive
    Erase(EraseArguments),
    /// Legal holds: what retention and erase must not delete
    #[command(subcommand)]
    Hold(HoldCommand),
}

impl ArchiveCommand {
    /// Does it.
    ///
    /// # Errors
    /// [`CommandError`] with what to do.
    pub fn run(self) -> Result<Verdict, CommandError> {
        match self {
            Self::Verify(directory) => verify::run(&directory),
            Self::Stat(directory) => stat::run(&directory),
            Self::Cat(arguments) => cat::run(&arguments),
            Self::Copy(arguments) => copy::run(&arguments),
            Self::Export(arguments) => export::run(&arguments),
            Self::Restore(arguments) => restore::run(&arguments),
            Self::Erase(arguments) => erase::run(&arguments),
            Self::Hold(command) => hold::run(&command),
        }
    }
}

/// How it came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Done,
    /// Damage, or differences.
    Found,
}

/// Why it could not be done.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(transparent)]
    Events(#[from] EventsError),
    #[error(transparent)]
    Copy(#[from] CopyError),
    #[error(transparent)]
    Remote(#[from] RemoteError),
    #[error(transparent)]
    Export(#[from] ExportError),
    #[error("{0}")]
    Usage(String),
    #[error("{0}")]
    Other(String),
    #[error("cannot write: {0}")]
    Output(#[from] io::Error),
}

/// The process's exit code, after an error was printed.
pub fn exit_code(outcome: Result<Verdict, CommandError>) -> ExitCode {
    let code = match &outcome {
        Ok(Verdict::Done) => return ExitCode::SUCCESS,
        // Whoever read the output has seen enough.
        Err(CommandError::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => return ExitCode::SUCCESS,
        Ok(Verdict::Found) => return ExitCode::from(3),
        Err(CommandError::Usage(_)) => 2,
        Err(_) => 1,
    };
    if let Err(error) = outcome {
        complain!("tapio-server: {}", render::clean_lines(&error.to_string()));
    }
    ExitCode::from(code)
}

fn print(text: &str) -> Result<(), CommandError> {
    Ok(output::print(text)?)
}

/// Damaged stretches that are named on standard error.
const DAMAGES_NAMED_MAX: usize = 20;

/// Reports on standard error what could not be read, and how much is missing.
fn verdict_on(damages: &[Damage], undecodable: u64) -> Verdict {
    if damages.is_empty() && undecodable == 0 {
        return Verdict::Done;
    }
    for damage in damages.iter().take(DAMAGES_NAMED_MAX) {
        complain!("tapio-server: {damage}");
    }
    if damages.len() > DAMAGES_NAMED_MAX {
        complain!("tapio-server: and {} more damaged stretches", damages.len() - DAMAGES_NAMED_MAX);
    }
    if undecodable > 0 {
        complain!("tapio-server: {undecodable} frames cannot be decoded: their events are missing");
    }
    let missing: u64 = damages.iter().filter_map(|damage| damage.missing).map(|missing| missing.events).sum();
    let is_more = undecodable > 0 || damages.iter().any(|damage| damage.missing.is_none());
    let at_least = if is_more { "at least " } else { "" };
    complain!(
        "tapio-server: DAMAGED: {at_least}{missing} acknowledged events are missing; `tapio-server archive verify` checks every record"
    );
    Verdict::Found
}

fn style() -> Style {
    let no_colour = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    Style { colour: io::stdout().is_terminal() && !no_colour }
}

/// A progress bar over bytes; it is drawn only where standard error is a terminal.
fn progress(bytes: u64) -> ProgressBar {
    let bar = ProgressBar::new(bytes);
    let template = "{elapsed_precise} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec}, {eta} left";
    bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar
}

fn moment(text: Option<&str>) -> Result<Option<u64>, CommandError> {
    let now = now_ns();
    text.map(|text| render::parse_since(text, now)).transpose().map_err(CommandError::Usage)
}
