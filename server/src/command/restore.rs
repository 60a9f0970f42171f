//! `tapio-server archive restore`: a window of another archive, beside a server's own.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use serde_json::json;
use tapio_wire::program::units::human_bytes;
use tapio_wire::service::Finding;

use super::{CommandError, Source, Verdict, moment, print, replay};
use crate::archive::lock::DirectoryLock;
use crate::archive::reader::{Reader, Selection};
use crate::archive::restored::{self, Restored};
use crate::findings::{PatternSet, journal, text};

/// Analysis window, as correlation.analysis_window.
const REPLAY_WINDOW: Duration = Duration::from_secs(300);

/// What to restore, and where to.
#[derive(Args)]
pub struct RestoreArguments {
    #[command(flatten)]
    source: Source,
    /// Directory of the archive (archive.dir) whose server shall show it; that server is stopped
    to: PathBuf,
    /// Only segments with events since: an age (90s, 10m, 2h, 1d) or a date in UTC (2026-01-02T03:04:05Z)
    #[arg(long, value_name = "WHEN")]
    since: Option<String>,
    /// Only segments with events until: an age or a date, as in --since
    #[arg(long, value_name = "WHEN")]
    until: Option<String>,
    /// Name of the folder under restored/; default: made of the time
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(arguments: &RestoreArguments) -> Result<Verdict, CommandError> {
    let since_ns = moment(arguments.since.as_deref())?.unwrap_or(0);
    let until_ns = moment(arguments.until.as_deref())?.unwrap_or(u64::MAX);
    let to = arguments.to.as_path();
    let name = match &arguments.name {
        Some(name) if name.contains(['/', '.']) || name.is_empty() => {
            return Err(CommandError::Usage(format!("--name {name}: it is a folder's name, without / and .")));
        }
        Some(name) => name.clone(),
        None => format!("{}-{}", since_ns / 1_000_000_000, until_ns / 1_000_000_000),
    };
    let _lock = DirectoryLock::take(to).map_err(|error| CommandError::Other(error.to_string()))?;
    let folders = arguments.source.folders(since_ns, until_ns)?;
    let (mut sum, mut dirs) = (Restored::default(), Vec::new());
    for (place, folder) in folders.iter().enumerate() {
        let name = if folders.len() == 1 { name.clone() } else { format!("{name}-{place}") };
        let segments = Reader::new(&folder.dir).segments()?;
        if let Some(restored) = restored::restore(&segments, (since_ns, until_ns), to, &name)? {
            sum.segments += restored.segments;
            sum.bytes += restored.bytes;
            sum.frames += restored.frames;
            sum.events += restored.events;
            dirs.push(to.join(restored::FOLDER).join(&name));
        }
    }
    if dirs.is_empty() {
        return Err(CommandError::Other("nothing was restored: no segment there has events of that time".into()));
    }
    let found = findings(&arguments.source, &dirs, (since_ns, until_ns))?;
    let added = add_findings(to, found)?;
    if arguments.json {
        let dirs: Vec<String> = dirs.iter().map(|dir| dir.display().to_string()).collect();
        let value = json!({
            "to": dirs, "segments": sum.segments, "bytes": sum.bytes, "frames": sum.frames, "events": sum.events,
            "findings": added,
        });
        print(&format!("{value}\n"))?;
    } else {
        let dirs: Vec<String> = dirs.iter().map(|dir| dir.display().to_string()).collect();
        print(&format!(
            "{}, {}, {}, {} that were not there: restored to {}\n",
            text::count(sum.segments, "segment"),
            human_bytes(sum.bytes),
            text::count(sum.events, "event"),
            text::count(added, "finding"),
            dirs.join(", ")
        ))?;
    }
    Ok(Verdict::Done)
}

/// What was stored with a directory; what a replay finds in a remote archive.
fn findings(
    source: &Source,
    dirs: &[PathBuf],
    (since_ns, until_ns): (u64, u64),
) -> Result<Vec<Arc<Finding>>, CommandError> {
    let mut found: Vec<Arc<Finding>> = match source.directory() {
        Some(directory) => journal::read(directory)?.findings.into_values().map(Arc::new).collect(),
        None => {
            let patterns = PatternSet::load(None).map_err(|error| CommandError::Other(error.to_string()))?;
            let wanted = Selection { since_ns, until_ns, ..Selection::default() };
            replay::run_again(&Reader::over(dirs.to_vec()), &wanted, patterns, REPLAY_WINDOW)?.findings
        }
    };
    found.retain(|finding| finding.ended_ns >= since_ns && finding.ended_ns <= until_ns);
    found.sort_by(|a, b| (a.published_ns, &a.id).cmp(&(b.published_ns, &b.id)));
    Ok(found)
}

/// Adds those that a server's journal does not know. Returns how many.
fn add_findings(to: &Path, found: Vec<Arc<Finding>>) -> Result<u64, CommandError> {
    let known = journal::read(to)?;
    let is_new = |finding: &Arc<Finding>| {
        !known.findings.contains_key(&finding.id)
            && !known.successors.contains_key(&finding.id)
            && !known.withdrawn.contains(&finding.id)
    };
    let new: Vec<Arc<Finding>> = found.into_iter().filter(is_new).collect();
    journal::append(to, &new)?;
    Ok(new.len() as u64)
}
