//! `tapio-server archive copy`.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use tapio_wire::program::units::human_bytes;

use super::{CommandError, Directory, Verdict, print, progress, verdict_on};
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
    let (from, to) = (&arguments.directory.dir, &arguments.to);
    let bar = progress(Reader::new(from).segments()?.iter().map(|segment| segment.bytes).sum());
    let copied = copy(from, to, &mut |bytes| bar.inc(bytes))?;
    bar.finish_and_clear();
    if arguments.directory.json {
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
