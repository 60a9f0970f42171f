//! What the spool remembers of an epoch that ended while the process went on.
//!
//! Frames that were spooled before the end bear the ended epoch; read back, they are of the next one (`crate::outbox::shift`). A file
//! `NUMBER-EPOCH.ended` keeps that over a restart: a segment header and two records, each an empty frame.
//!
//! | record of epoch | place | ledger |
//! |---|---|---|
//! | the ended one | the closing frame, as it is to be sent | what the epoch accounts for |
//! | the next one | `seq`: the frames before its first | what its counters begin behind |
//!
//! The first is missing where the server knows more of the epoch than this process; the second where nothing was left to go on.

use std::io;
use std::path::{Path, PathBuf};

use bytes::Bytes;

use super::notes;
use crate::outbox::shift::Shift;

const SUFFIX: &str = "ended";

/// One ended epoch and what of it is still in the spool.
#[derive(Clone, Debug)]
pub(super) struct Ending {
    /// Number of the segment among all segments: those with smaller numbers were written before the end.
    pub number: u64,
    pub epoch: u64,
    pub node: u64,
    pub shift: Option<Shift>,
    pub closing: Option<Bytes>,
    /// Size of the file.
    pub bytes: u64,
}

impl Ending {
    fn path(&self, dir: &Path) -> PathBuf {
        dir.join(format!("{:012}-{}.{SUFFIX}", self.number, self.epoch))
    }

    /// Writes and syncs the file.
    pub fn write(&mut self, dir: &Path) -> io::Result<()> {
        let shift = self.shift.as_ref().map(|shift| notes::frame(self.node, shift.epoch, shift.seq, &shift.base));
        let frames: Vec<Bytes> = shift.transpose()?.into_iter().chain(self.closing.clone()).collect();
        self.bytes = notes::write(&self.path(dir), self.number, &frames)?;
        Ok(())
    }

    /// Reads a file that [`Ending::write`] wrote; `None` for what is none.
    pub fn read(path: &Path, (number, epoch): (u64, u64)) -> Option<Self> {
        let (frames, bytes) = notes::read(path, number).ok()?;
        let mut ending = Self { number, epoch, node: frames.first()?.header.node, shift: None, closing: None, bytes };
        for whole in frames {
            if whole.header.epoch == epoch {
                ending.closing = Some(whole.frame);
            } else {
                ending.shift = Some(Shift { epoch: whole.header.epoch, seq: whole.header.seq, base: whole.ledger });
            }
        }
        Some(ending)
    }

    /// Deletes the file.
    pub fn delete(&self, dir: &Path) {
        notes::delete(&self.path(dir));
    }
}

/// Number and epoch that a file's name says, if it is one of these.
pub(super) fn parse_name(path: &Path) -> Option<(u64, u64)> {
    if path.extension()? != SUFFIX {
        return None;
    }
    let (number, epoch) = path.file_stem()?.to_str()?.split_once('-')?;
    Some((number.parse().ok()?, epoch.parse().ok()?))
}
