//! `tapio-server archive export`.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use ring::digest::{SHA256, digest};
use serde_json::json;
use tapio_wire::complain;
use tapio_wire::program::units::human_bytes;
use tapio_wire::service::Finding;

use super::source::Folder;
use super::{CommandError, Directory, Source, Verdict, moment, print, progress, replay};
use crate::archive::index::Index;
use crate::archive::reader::{Reader, SegmentFile, Selection};
use crate::config::Config;
use crate::findings::{PatternSet, journal, text};
use crate::parquet::{ExportError, Exported, Exporter, SegmentId, Written};
use crate::remote::{self, Mark, RemoteSection, TableStore};

/// What to export, and where to.
#[derive(Args)]
pub struct ExportArguments {
    #[command(flatten)]
    directory: Directory,
    /// Target of the tables: a directory, or a URL as archive.remote.url. Existing tables are not written again
    #[arg(long, value_name = "DIR|URL")]
    to: String,
    /// Only segments with events since: an age (90s, 10m, 2h, 1d) or a date in UTC (2026-01-02T03:04:05Z)
    #[arg(long, value_name = "WHEN")]
    since: Option<String>,
    /// Only segments with events until: an age or a date, as in --since
    #[arg(long, value_name = "WHEN")]
    until: Option<String>,
    /// With a directory: the cluster's name in the paths of files; default: that of --config, or `default`
    #[arg(long, value_name = "NAME")]
    cluster: Option<String>,
    /// With a directory: the server's name in the ledger; default: that of --config, or this machine's
    #[arg(long, value_name = "NAME")]
    server: Option<String>,
    /// Write existing tables again
    #[arg(long)]
    again: bool,
    /// Omit the table of findings. It has a directory's stored findings, or the findings of a replay of a remote archive
    #[arg(long)]
    no_findings: bool,
}

#[derive(Default)]
struct Sums {
    segments: u64,
    skipped: u64,
    segment_bytes: u64,
    /// Segments that could not be read to their ends.
    unread: u64,
    exported: Exported,
    findings: u64,
}

pub(super) fn run(arguments: &ExportArguments) -> Result<Verdict, CommandError> {
    let source = &arguments.directory.source;
    let wanted = Selection {
        since_ns: moment(arguments.since.as_deref())?.unwrap_or(0),
        until_ns: moment(arguments.until.as_deref())?.unwrap_or(u64::MAX),
        ..Selection::default()
    };
    let config = source.config()?;
    let to = TableStore::open(&destination(&arguments.to, &config)?)?;
    let work = Work::new()?;
    let folders = source.folders(wanted.since_ns, wanted.until_ns)?;
    let mut sums = Sums::default();
    for folder in &folders {
        let (cluster, server) = whose(arguments, folder, &config)?;
        export_folder(arguments, folder, &wanted, &cluster, &server, (&to, &work.0), &mut sums)?;
    }
    if let Some(first) = folders.first() {
        let (cluster, server) = whose(arguments, first, &config)?;
        let exporter = Exporter::new(&cluster, &server);
        to.put(&work.0, &exporter.empty(&work.0)?)?;
        if !arguments.no_findings {
            let found = findings(source, &folders, &wanted)?;
            sums.findings = found.len() as u64;
            let files = exporter.findings(&found, &findings_name(&found), &work.0)?;
            to.put(&work.0, &files)?;
            sums.exported.files.extend(files);
        }
    }
    report(arguments, &sums)?;
    if sums.unread > 0 {
        complain!("tapio-server: {} could not be read, and have no tables", text::count(sums.unread, "segment"));
    }
    if sums.exported.damaged == 0 {
        return Ok(if sums.unread == 0 { Verdict::Done } else { Verdict::Found });
    }
    complain!(
        "tapio-server: DAMAGED: {} acknowledged events are missing; the table ledger counts them as damaged",
        sums.exported.damaged
    );
    Ok(Verdict::Found)
}

/// A folder for files that are under way; it goes with this value.
struct Work(PathBuf);

impl Work {
    fn new() -> Result<Self, CommandError> {
        let dir = std::env::temp_dir().join(format!("tapio-export-{}", std::process::id()));
        std::fs::create_dir_all(&dir)?;
        Ok(Self(dir))
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        // Best effort: what was exported is at its place.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn destination(to: &str, config: &Option<Config>) -> Result<RemoteSection, CommandError> {
    let section = config.as_ref().and_then(|config| config.archive.remote.clone()).unwrap_or_default();
    if remote::is_url(to) {
        return Ok(RemoteSection { url: to.to_owned(), ..section });
    }
    std::fs::create_dir_all(to)?;
    let folder = std::fs::canonicalize(to)?;
    let folder = folder.to_str().ok_or_else(|| CommandError::Usage(format!("--to {to}: its path is no UTF-8")))?;
    Ok(RemoteSection { url: format!("file://{folder}"), ..RemoteSection::default() })
}

/// The cluster and the server that an archive is of.
fn whose(
    arguments: &ExportArguments,
    folder: &Folder,
    config: &Option<Config>,
) -> Result<(String, String), CommandError> {
    if let Some(label) = &folder.label {
        return Ok((label.cluster.clone(), label.server.clone()));
    }
    let default = Config::default();
    let config = config.as_ref().unwrap_or(&default);
    let (cluster, remote) = (&config.cluster, config.archive.remote.as_ref());
    // As the server names what it uploads, so that both write the same files.
    let of_remote = remote.and_then(|remote| remote.cluster.clone());
    let name = arguments.cluster.clone().or(of_remote).unwrap_or_else(|| cluster.name.clone());
    if !remote::is_name(&name) {
        return Err(CommandError::Usage(format!("--cluster {name}: letters, digits, -, _ and . only")));
    }
    let of_remote = remote.and_then(|remote| remote.server.clone());
    Ok((name, arguments.server.clone().or(of_remote).unwrap_or_else(|| cluster.server_name())))
}

fn export_folder(
    arguments: &ExportArguments,
    folder: &Folder,
    wanted: &Selection,
    cluster: &str,
    server: &str,
    (to, work): (&TableStore, &Path),
    sums: &mut Sums,
) -> Result<(), CommandError> {
    let segments = Reader::new(&folder.dir).segments()?;
    let bar = progress(segments.iter().map(|segment| segment.bytes).sum());
    let mut exporter = Exporter::new(cluster, server);
    for segment in &segments {
        let unread = |source| crate::archive::reader::ReadError::Segment { path: segment.path.clone(), source };
        let file = match File::open(&segment.path) {
            Ok(file) => file,
            // Retention was faster.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(unread(error).into()),
        };
        let opened = SegmentId::of(&file, segment.number)
            .and_then(|id| Index::read(&file, segment.number).map(|index| (id, index)));
        let (id, index) = match opened {
            Ok(opened) => opened,
            // The others may be sound.
            Err(source) => {
                complain!("tapio-server: {}", unread(source));
                sums.unread += 1;
                continue;
            }
        };
        let is_of_time =
            index.as_ref().is_none_or(|index| index.first_ns <= wanted.until_ns && index.last_ns >= wanted.since_ns);
        let Some(id) = id.filter(|_| is_of_time) else {
            bar.inc(segment.bytes);
            continue;
        };
        let bytes = file.metadata()?.len();
        let is_there = |mark: &Mark| mark.is_closed && mark.segment_bytes == bytes && index.is_some();
        let before = to.mark(cluster, &id)?;
        if !arguments.again && before.as_ref().is_some_and(is_there) {
            sums.skipped += 1;
            bar.inc(segment.bytes);
            continue;
        }
        let exported = match one(&mut exporter, segment, &id, (to, work), &mut |bytes| bar.inc(bytes)) {
            Err(CommandError::Export(error @ ExportError::Read { .. })) => {
                complain!("tapio-server: {error}");
                sums.unread += 1;
                continue;
            }
            exported => exported?,
        };
        to.put_mark(cluster, &Mark::of(&id, server, bytes, index.is_some(), &exported), before.as_ref())?;
        sums.segments += 1;
        sums.segment_bytes += bytes;
        sums.exported.add(exported);
    }
    bar.finish_and_clear();
    Ok(())
}

/// Exports a segment to where the tables go, without its mark.
fn one(
    exporter: &mut Exporter,
    segment: &SegmentFile,
    id: &SegmentId,
    (to, work): (&TableStore, &Path),
    read: &mut dyn FnMut(u64),
) -> Result<Exported, CommandError> {
    let exported = exporter.segment(segment, id, work, read)?;
    to.put(work, &exported.files)?;
    for written in &exported.files {
        std::fs::remove_file(crate::parquet::below(work, written))?;
    }
    Ok(exported)
}

/// What is stored beside the segments of a directory; what a replay finds in a remote archive.
fn findings(source: &Source, folders: &[Folder], wanted: &Selection) -> Result<Vec<Arc<Finding>>, CommandError> {
    let mut found: Vec<Arc<Finding>> = match source.directory() {
        Some(directory) => journal::read(directory)?.findings.into_values().map(Arc::new).collect(),
        None => {
            let patterns = PatternSet::load(None).map_err(|error| CommandError::Other(error.to_string()))?;
            replay::run_again(&Source::reader(folders), wanted, patterns, REPLAY_WINDOW)?.findings
        }
    };
    found.retain(|finding| finding.ended_ns >= wanted.since_ns && finding.ended_ns <= wanted.until_ns);
    found.sort_by(|a, b| (a.ended_ns, &a.id).cmp(&(b.ended_ns, &b.id)));
    Ok(found)
}

/// Analysis window, as correlation.analysis_window.
const REPLAY_WINDOW: Duration = Duration::from_secs(300);

/// Names a file after its findings: equal findings give the same name, so that a repeated export replaces its files.
fn findings_name(found: &[Arc<Finding>]) -> String {
    let ids: Vec<String> = found.iter().map(|finding| format!("{} {}", finding.id, finding.revision)).collect();
    let sum: String =
        digest(&SHA256, ids.join("\n").as_bytes()).as_ref()[..8].iter().map(|byte| format!("{byte:02x}")).collect();
    format!("findings-{sum}")
}

fn report(arguments: &ExportArguments, sums: &Sums) -> Result<(), CommandError> {
    let exported = &sums.exported;
    let bytes_of = |table: Option<&str>| -> u64 {
        let files = exported.files.iter().filter(|file| table.is_none_or(|table| file.table == table));
        files.map(|file| file.bytes).sum()
    };
    let an_event = |sum: f64| if exported.events == 0 { 0.0 } else { sum / exported.events as f64 };
    let (event_bytes, ns) = (an_event(bytes_of(Some("events")) as f64), an_event(exported.took.as_nanos() as f64));
    if arguments.directory.json {
        let mut tables = std::collections::BTreeMap::<&str, (u64, u64, u64)>::new();
        for Written { table, rows, bytes, .. } in &exported.files {
            let sum = tables.entry(table).or_default();
            *sum = (sum.0 + 1, sum.1 + rows, sum.2 + bytes);
        }
        let tables: serde_json::Map<_, _> = tables
            .into_iter()
            .map(|(table, (files, rows, bytes))| {
                (table.to_owned(), json!({"files": files, "rows": rows, "bytes": bytes}))
            })
            .collect();
        let value = json!({
            "to": arguments.to,
            "segments": sums.segments,
            "segments_there": sums.skipped,
            "segments_unread": sums.unread,
            "segment_bytes": sums.segment_bytes,
            "frames": exported.frames,
            "events": exported.events,
            "damaged_events": exported.damaged,
            "findings": sums.findings,
            "bytes_an_event": event_bytes,
            "ns_an_event": ns,
            "tables": tables,
        });
        return print(&format!("{value}\n"));
    }
    let there = match sums.skipped {
        0 => String::new(),
        skipped => format!(" ({} were there already)", text::count(skipped, "segment")),
    };
    print(&format!(
        "{}, {}, {} to {}{there}\n{} in {}: {event_bytes:.1} bytes and {ns:.0} ns an event\n",
        text::count(sums.segments, "segment"),
        text::count(exported.events, "event"),
        text::count(sums.findings, "finding"),
        arguments.to,
        human_bytes(bytes_of(None)),
        text::count(exported.files.len() as u64, "file"),
    ))
}
