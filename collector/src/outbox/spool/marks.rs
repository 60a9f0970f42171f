//! How far an epoch was acknowledged when a segment of it was deleted: `EPOCH.acked`.
//!
//! What must hold: a later run can distinguish an acknowledged first segment from one that somebody deleted. The mark
//! is written when an epoch comes to the disk and before a segment is deleted. It is removed with the epoch's last
//! segment.

use std::io;
use std::path::{Path, PathBuf};

use tapio_wire::event::{SOURCES, Source};
use tapio_wire::ledger::Ledger;

use super::notes;

const SUFFIX: &str = "acked";

/// The content of one `EPOCH.acked` file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Mark {
    pub seq: u64,
    /// Events up to that frame, by source.
    pub events: [u64; SOURCES],
}

impl Mark {
    /// Writes and syncs the file.
    pub fn write(&self, dir: &Path, node: u64, epoch: u64) -> io::Result<()> {
        let mut ledger = Ledger::default();
        for source in Source::ALL {
            ledger.account_mut(source).shipped = self.events[source as usize];
        }
        notes::write(&path(dir, epoch), epoch, &[notes::frame(node, epoch, self.seq, &ledger)?]).map(|_| ())
    }

    /// Reads a file that [`Mark::write`] wrote; `None` where there is none.
    pub fn read(dir: &Path, epoch: u64) -> Option<Self> {
        let (frames, _) = notes::read(&path(dir, epoch), epoch).ok()?;
        let whole = frames.first()?;
        let events = Source::ALL.map(|source| whole.ledger.account(source).shipped);
        Some(Self { seq: whole.header.seq, events })
    }
}

/// Forgets an epoch.
pub(super) fn delete(dir: &Path, epoch: u64) {
    notes::delete(&path(dir, epoch));
}

/// The epoch that a file's name says, if it is one of these.
pub(super) fn parse_name(path: &Path) -> Option<u64> {
    if path.extension()? != SUFFIX {
        return None;
    }
    path.file_stem()?.to_str()?.parse().ok()
}

fn path(dir: &Path, epoch: u64) -> PathBuf {
    dir.join(format!("{epoch}.{SUFFIX}"))
}
