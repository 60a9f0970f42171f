//! The ledger over several archives: what every server of a cluster wrote, taken together.
//!
//! A server's own ledger covers what was acknowledged to it; whether nothing was lost between two servers shows only where their
//! archives are read side by side.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use tapio_wire::event::SOURCES;
use tapio_wire::frame::{HEADER_BYTES, Header, VERSION};
use tapio_wire::ledger::Ledger;
use tapio_wire::segment::{Found, SEGMENT_HEADER_BYTES, SegmentRecordKind, find_record, parse_segment_header};

/// One run of one collector.
#[derive(Default)]
pub struct Epoch {
    /// Frames, each once, whoever archived it.
    pub seqs: BTreeSet<u64>,
    /// The wire versions that they were written in.
    pub versions: BTreeSet<u16>,
    /// Events in them.
    pub events: [u64; SOURCES],
    pub is_final: bool,
    /// Ledger as the last frame states it.
    ledger: Ledger,
}

impl Epoch {
    fn add(&mut self, header: &Header, ledger: &Ledger, version: u16) {
        if !self.seqs.insert(header.seq) {
            return;
        }
        self.versions.insert(version);
        for (sum, &events) in self.events.iter_mut().zip(&header.source_events) {
            *sum += u64::from(events);
        }
        self.is_final |= header.is_final;
        if self.seqs.last() == Some(&header.seq) {
            self.ledger = *ledger;
        }
    }

    /// What does not add up; empty when all does.
    fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let last = self.seqs.last().copied().unwrap_or_default();
        if self.seqs.len() as u64 != last {
            problems.push(format!("{} of {last} frames", self.seqs.len()));
        }
        for (source, account) in self.ledger.accounts.iter().enumerate() {
            let archived = self.events[source];
            if archived != account.shipped {
                problems.push(format!("source {source}: shipped {}, archived {archived}", account.shipped));
            }
            if self.is_final && account.emitted != archived + account.dropped_total() {
                let dropped = account.dropped_total();
                problems.push(format!("source {source}: emitted {} = {archived} + {dropped}?", account.emitted));
            }
        }
        problems
    }

    /// Emitted, archived and dropped, of all sources together.
    pub fn sums(&self) -> (u64, u64, u64) {
        let accounts = &self.ledger.accounts;
        let emitted = accounts.iter().map(|account| account.emitted).sum();
        let dropped = accounts.iter().map(tapio_wire::ledger::Account::dropped_total).sum();
        (emitted, self.events.iter().sum(), dropped)
    }
}

/// The epochs of each node, in their order.
pub type Epochs = BTreeMap<(u64, u64), Epoch>;

/// Everything in the archives that lie in the folders of a folder.
pub fn read(volumes: &Path) -> Epochs {
    let mut epochs = Epochs::new();
    for path in segments(volumes) {
        // One that was renamed in between is read at the next look.
        let Ok(bytes) = fs::read(path) else { continue };
        let Some(number) = parse_segment_header(&bytes) else { continue };
        let mut offset = SEGMENT_HEADER_BYTES;
        while let Found::Record { kind, bytes: record, size } = find_record(&bytes[offset..], number, offset as u64) {
            if kind == SegmentRecordKind::Frame
                && let Some((version, frame)) = readable(record)
                && let Ok((header, ledger)) = Header::check(&frame)
            {
                epochs.entry((header.node, header.epoch)).or_default().add(&header, &ledger, version);
            }
            offset += size;
        }
    }
    epochs
}

/// A frame's version, and the frame as this build reads it: the next version is laid out alike. [`None`] for a damaged one.
fn readable(record: &[u8]) -> Option<(u16, Vec<u8>)> {
    const SUM: std::ops::Range<usize> = 68..72;
    let mut frame = record.to_vec();
    let version = u16::from_le_bytes(frame.get(4..6)?.try_into().ok()?);
    if version == VERSION + 1 {
        let payload = u32::from_le_bytes(frame.get(60..64)?.try_into().ok()?) as usize;
        let ledger = HEADER_BYTES.checked_add(payload).filter(|&ledger| ledger <= record.len())?;
        let sum = |frame: &[u8]| crc32c::crc32c_append(crc32c::crc32c(&frame[..HEADER_BYTES]), &frame[ledger..]);
        let declared = u32::from_le_bytes(frame[SUM].try_into().ok()?);
        frame[SUM].fill(0);
        if sum(&frame) != declared {
            return None;
        }
        frame[4..6].copy_from_slice(&VERSION.to_le_bytes());
        let resigned = sum(&frame).to_le_bytes();
        frame[SUM].copy_from_slice(&resigned);
    }
    Some((version, frame))
}

/// What does not add up, by epoch.
pub fn problems(epochs: &Epochs) -> Vec<String> {
    let of = |(node, epoch): &(u64, u64)| format!("node {node:x} epoch {epoch:x}");
    epochs
        .iter()
        .flat_map(|(key, epoch)| epoch.problems().into_iter().map(move |text| format!("{}: {text}", of(key))))
        .collect()
}

fn segments(volumes: &Path) -> Vec<PathBuf> {
    let entries = |folder: &Path| -> Vec<PathBuf> {
        fs::read_dir(folder).map(|entries| entries.flatten().map(|entry| entry.path()).collect()).unwrap_or_default()
    };
    let files = entries(volumes).into_iter().flat_map(|volume| entries(&volume));
    files.filter(|path| path.to_string_lossy().contains(".segment")).collect()
}
