//! `tapio-server archive erase`: events of a namespace or a pod, out of segments, tables and findings.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use clap::Args;
use clap::builder::NonEmptyStringValueParser;
use serde_json::{Value, json};
use tapio_wire::program::clock::now_ns;

use super::place::Place;
use super::{CommandError, Verdict, hold, moment, print};
use crate::archive::erase::{Erased, Erasure, owned_like, rewrite, rewrite_lines};
use crate::archive::lock::DirectoryLock;
use crate::archive::reader::{ReadError, Reader};
use crate::archive::restored;
use crate::events::entities_of;
use crate::findings::{journal, text};
use crate::parquet::Exporter;
use crate::remote::{ErasureReport, RemoteError, TableStore, erasable, rewrite_tables};
use crate::render::rfc3339;

/// Folders of an archive's directory with copies of what is in segments, or of what could not be read.
const COPIES: [&str; 3] = [QUARANTINE, "remote-cache", WORK];
const QUARANTINE: &str = "quarantine";
/// Tables on their way.
const WORK: &str = "parquet-work";

/// Whom to erase.
#[derive(Args)]
pub struct EraseArguments {
    #[command(flatten)]
    place: Place,
    /// Namespace to erase
    #[arg(long, short, value_parser = NonEmptyStringValueParser::new())]
    namespace: String,
    /// Only this pod of it, by name
    #[arg(long, value_name = "NAME", value_parser = NonEmptyStringValueParser::new())]
    pod: Option<String>,
    /// Only events since: an age (90s, 10m, 2h, 1d) or a date in UTC (2026-01-02T03:04:05Z)
    #[arg(long, value_name = "WHEN")]
    since: Option<String>,
    /// Only events until: an age or a date, as in --since
    #[arg(long, value_name = "WHEN")]
    until: Option<String>,
    /// Why, for the audit
    #[arg(long)]
    reason: Option<String>,
    /// With a directory: where its tables were exported to, to write them again. Those in a remote archive are found
    #[arg(long, value_name = "DIR|URL")]
    tables: Option<String>,
    /// With --tables: the cluster's and the server's names, as at the export
    #[arg(long, value_name = "NAME", default_value = "default")]
    cluster: String,
    #[arg(long, value_name = "NAME", default_value = "")]
    server: String,
    /// With a remote archive: a directory for one segment at a time
    #[arg(long, value_name = "DIR", default_value = "/var/tmp/tapio-erase")]
    work: PathBuf,
    /// Count what would be erased, and change nothing
    #[arg(long)]
    dry_run: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Default)]
struct Sums {
    report: ErasureReport,
    findings: u64,
    /// The quarantine stays for a legal hold.
    keeps_quarantine: bool,
}

/// Writes into the audit who begins, before anything is changed.
fn begins(arguments: &EraseArguments, wanted: &Erasure, by: &str) -> Result<(), RemoteError> {
    if arguments.dry_run {
        return Ok(());
    }
    let record = json!({
        "at": rfc3339(now_ns()), "what": "erase begins", "by": by, "reason": arguments.reason,
        "namespace": wanted.namespace, "pod": wanted.pod, "since": rfc3339(wanted.since_ns),
        "until": (wanted.until_ns < u64::MAX).then(|| rfc3339(wanted.until_ns)),
    });
    arguments.place.audit(&record).map_err(|error| RemoteError::Usage(error.to_string()))
}

pub(super) fn run(arguments: &EraseArguments) -> Result<Verdict, CommandError> {
    let by = arguments.place.by()?;
    let wanted = Erasure {
        namespace: arguments.namespace.clone(),
        pod: arguments.pod.clone(),
        since_ns: moment(arguments.since.as_deref())?.unwrap_or(0),
        until_ns: moment(arguments.until.as_deref())?.unwrap_or(u64::MAX),
        entities: Default::default(),
    };
    let sums = match arguments.place.directory() {
        Some(dir) => erase_folder(arguments, dir, &wanted, &by)?,
        None => {
            let mut entities = |reader: &Reader| {
                begins(arguments, &wanted, &by)?;
                let found = entities_of(reader, &wanted.namespace, wanted.pod.as_deref());
                let found = found.map_err(|error| RemoteError::Usage(error.to_string()))?;
                Ok(Erasure { entities: found, ..wanted.clone() })
            };
            let work = arguments.work.join(std::process::id().to_string());
            fs::create_dir_all(&work)?;
            let keeping = arguments.place.keeping()?;
            let outcome = keeping.erase(&wanted, &by, &work, arguments.dry_run, &mut entities);
            fs::remove_dir_all(&work)?;
            let report = outcome?;
            Sums { report, ..Sums::default() }
        }
    };
    let record = record(arguments, &wanted, &by, &sums);
    if !arguments.dry_run {
        arguments.place.audit(&record)?;
    }
    match arguments.json {
        true => print(&format!("{record}\n"))?,
        false => print(&said(arguments, &sums))?,
    }
    Ok(Verdict::Done)
}

fn record(arguments: &EraseArguments, wanted: &Erasure, by: &str, sums: &Sums) -> Value {
    let report = &sums.report;
    json!({
        "at": rfc3339(now_ns()), "what": if arguments.dry_run { "erase (dry run)" } else { "erase" }, "by": by,
        "reason": arguments.reason, "namespace": wanted.namespace, "pod": wanted.pod,
        "since": rfc3339(wanted.since_ns),
        "until": (wanted.until_ns < u64::MAX).then(|| rfc3339(wanted.until_ns)),
        "segments": report.segments, "segments_rewritten": report.rewritten,
        "events": report.erased.events, "events_erased_before": report.erased.before,
        "references": report.erased.references, "descriptions": report.erased.descriptions,
        "damaged_bytes": report.erased.damaged_bytes, "undecodable_frames": report.erased.undecodable,
        "findings": sums.findings, "segments_with_tables": report.tables,
        "files_of_findings_deleted": report.findings_files,
    })
}

fn said(arguments: &EraseArguments, sums: &Sums) -> String {
    let (report, erased) = (&sums.report, &sums.report.erased);
    let would = if arguments.dry_run { "would be " } else { "" };
    let mut out = format!(
        "{} {would}erased, and {} of others to them; {} of {} {would}rewritten, {} {would}deleted\n",
        text::count(erased.events, "event"),
        text::count(erased.references, "reference"),
        report.rewritten,
        text::count(report.segments, "segment"),
        text::count(sums.findings, "finding"),
    );
    if report.tables > 0 {
        out.push_str(&format!("the tables of {} were written again\n", text::count(report.tables, "segment")));
    }
    if report.findings_files > 0 {
        let files = text::count(report.findings_files, "file");
        out.push_str(&format!(
            "{files} of the table findings deleted: `tapio-server archive export` makes them again\n"
        ));
    }
    if sums.keeps_quarantine {
        out.push_str("The folder quarantine stays as long as there is a legal hold: it may have such events.\n");
    }
    if erased.damaged_bytes + erased.undecodable > 0 {
        out.push_str("What could not be read may have such events. It is left out of segments that were rewritten.\n");
    }
    out
}

/// Erases in an archive's directory that no server has.
fn erase_folder(arguments: &EraseArguments, dir: &Path, wanted: &Erasure, by: &str) -> Result<Sums, CommandError> {
    // Before the lock is made: a directory without segments is a mistake.
    Reader::new(dir).segments()?;
    let _lock = DirectoryLock::take(dir).map_err(|error| CommandError::Other(error.to_string()))?;
    erasable(&hold::of(&arguments.place)?, wanted)?;
    let dirs: Vec<PathBuf> = restored::dirs(dir).into_iter().chain([dir.to_owned()]).collect();
    let entities = entities_of(&Reader::over(dirs.clone()), &wanted.namespace, wanted.pod.as_deref())?;
    let erasure = Erasure { entities, ..wanted.clone() };
    begins(arguments, wanted, by)?;
    let tables = match &arguments.tables {
        Some(to) => Some(TableStore::open(&arguments.place.section(Some(&url(to)?))?)?),
        None => None,
    };
    let mut sums = Sums::default();
    let tables = tables.as_ref().map(|tables| (tables, dir.join(WORK)));
    for dir in &dirs {
        segments_of(arguments, dir, &erasure, tables.as_ref(), &mut sums)?;
    }
    if arguments.dry_run {
        return Ok(sums);
    }
    for path in journal::paths(dir) {
        sums.findings += rewrite_lines(&path, &erasure)?;
    }
    // What could not be read may be what a hold keeps.
    sums.keeps_quarantine = !hold::of(&arguments.place)?.is_empty() && dir.join(QUARANTINE).exists();
    for name in COPIES.into_iter().filter(|name| !(sums.keeps_quarantine && *name == QUARANTINE)) {
        match fs::remove_dir_all(dir.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
    }
    File::open(dir)?.sync_all()?;
    Ok(sums)
}

fn segments_of(
    arguments: &EraseArguments,
    dir: &Path,
    erasure: &Erasure,
    tables: Option<&(&TableStore, PathBuf)>,
    sums: &mut Sums,
) -> Result<(), CommandError> {
    let mut exporter = Exporter::new(&arguments.cluster, &arguments.server);
    for segment in Reader::new(dir).segments()? {
        // A start removes what an interrupted run leaves under this name.
        let new = segment.path.with_extension("segment.new");
        let failed = |source| ReadError::Segment { path: segment.path.clone(), source };
        let file = File::open(&segment.path).map_err(failed)?;
        let erased: Erased = rewrite(&file, segment.number, erasure, &new)?;
        sums.report.segments += 1;
        sums.report.erased.add(&erased);
        // One may have been added since.
        let holds = hold::of(&arguments.place)?;
        erasable(&holds, erasure)?;
        let is_changed = erased.replaces(&holds).map_err(|hold| RemoteError::unread(segment.number, hold))?;
        if !is_changed || arguments.dry_run {
            sums.report.rewritten += u64::from(is_changed);
            fs::remove_file(&new)?;
            continue;
        }
        if let Some((tables, work)) = tables {
            let names = (arguments.cluster.as_str(), arguments.server.as_str());
            let has_tables = rewrite_tables((&file, &new), segment.number, names, tables, &mut exporter, work)?;
            sums.report.tables += u64::from(has_tables);
        }
        owned_like(&new, &file.metadata().map_err(failed)?)?;
        fs::rename(&new, &segment.path)?;
        File::open(dir)?.sync_all()?;
        sums.report.rewritten += 1;
    }
    Ok(())
}

fn url(to: &str) -> Result<String, CommandError> {
    if crate::remote::is_url(to) {
        return Ok(to.to_owned());
    }
    let folder = fs::canonicalize(to)?;
    let folder = folder.to_str().ok_or_else(|| CommandError::Usage(format!("--tables {to}: its path is no UTF-8")))?;
    Ok(format!("file://{folder}"))
}
