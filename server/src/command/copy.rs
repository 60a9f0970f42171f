//! `tapio-server archive copy`.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;

use tapio_wire::program::units::human_bytes;

use super::{CommandError, Directory, Source, Verdict, print, progress, verdict_on};
use crate::archive::copy::copy;
use crate::archive::reader::Reader;
use crate::findings::text;

/// What to copy, and where to.
#[derive(Args)]
pub struct CopyArguments {
    #[command(flatten)]
    directory: Directory,
    /// The copy's directory: new or empty, on any disk
    to: PathBuf,
}

pub(super) fn run(arguments: &CopyArguments) -> Result<Verdict, CommandError> {
    let (source, to, is_json) = (&arguments.directory.source, &arguments.to, arguments.directory.json);
    match source.directory() {
        Some(from) => copy_folder(from, to, is_json),
        None => copy_remote(source, to, is_json),
    }
}

/// Fetches beside `to`, so that it can be resumed.
fn copy_remote(source: &Source, to: &Path, is_json: bool) -> Result<Verdict, CommandError> {
    let mut beside = to.as_os_str().to_owned();
    beside.push(".fetched");
    let beside = PathBuf::from(beside);
    let views = source.fetch_to(&beside)?;
    let (mut verdict, is_only) = (Verdict::Done, views.len() == 1);
    for view in &views {
        let label = &view.label;
        let to =
            if is_only { to.to_owned() } else { to.join(format!("{}-{}-{}", label.cluster, label.server, label.life)) };
        if let Some(parent) = to.parent().filter(|_| !is_only) {
            std::fs::create_dir_all(parent)?;
        }
        if copy_folder(&view.dir, &to, is_json)? == Verdict::Found {
            verdict = Verdict::Found;
        }
    }
    drop(views);
    std::fs::remove_dir_all(&beside)?;
    Ok(verdict)
}

fn copy_folder(from: &Path, to: &Path, is_json: bool) -> Result<Verdict, CommandError> {
    let bar = progress(Reader::new(from).segments()?.iter().map(|segment| segment.bytes).sum());
    let copied = copy(from, to, &mut |bytes| bar.inc(bytes))?;
    bar.finish_and_clear();
    if is_json {
        let value = json!({
            "to": to.display().to_string(),
            "segments": copied.segments,
            "bytes": copied.bytes,
            "newest_frames": copied.newest_frames,
            "journal_lines": copied.journal_lines,
            "deleted_meanwhile": copied.deleted,
            "sound": copied.damages.is_empty(),
        });
        print(&format!("{value}\n"))?;
    } else {
        let mut line = format!(
            "{}, {} of them in the newest, {} of findings, {}: copied to {}\n",
            text::count(copied.segments, "segment"),
            text::count(copied.newest_frames, "frame"),
            text::count(copied.journal_lines, "line"),
            human_bytes(copied.bytes),
            to.display()
        );
        if copied.deleted > 0 {
            line.push_str(&format!(
                "{} deleted by age or size meanwhile, not in it\n",
                text::count(copied.deleted, "segment")
            ));
        }
        print(&line)?;
    }
    Ok(verdict_on(&copied.damages, 0))
}
