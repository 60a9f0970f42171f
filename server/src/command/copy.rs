//! `tapio-server archive copy`.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::{CommandError, Directory, Verdict, print, progress};
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
            "sound": !copied.is_damaged,
        });
        print(&format!("{value}\n"))?;
    } else {
        let mut line = format!(
            "{} segments, {} frames of them in the newest, {} lines of findings, {}: copied to {}\n",
            copied.segments,
            copied.newest_frames,
            copied.journal_lines,
            text::bytes(copied.bytes),
            to.display()
        );
        if copied.deleted > 0 {
            line.push_str(&format!(
                "{} segments were deleted by age or size meanwhile, and are not in it\n",
                copied.deleted
            ));
        }
        if copied.is_damaged {
            line.push_str("DAMAGED: the newest segment was copied as it is; `archive verify` tells where\n");
        }
        print(&line)?;
    }
    Ok(if copied.is_damaged { Verdict::Found } else { Verdict::Done })
}
