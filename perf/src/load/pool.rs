//! Records that are prepared once and played many times.

use tapio_probes::record::{Exit, Header, RecordKind};
use zerocopy::FromBytes;

/// Where a record's time is, and its process.
const TIME_AT: usize = std::mem::offset_of!(Header, time_ns);
const PID_AT: usize = std::mem::offset_of!(Header, pid);
const TID_AT: usize = std::mem::offset_of!(Header, tid);
/// Pids of processes that die when a pool is played, and are others each time: from here up to Linux's largest.
pub const MORTALS_FIRST: u32 = 1 << 20;
const MORTALS_SPAN: u32 = (1 << 22) - MORTALS_FIRST;

/// Records one after another in memory.
#[derive(Default)]
pub struct Pool {
    bytes: Vec<u8>,
    /// Where each record starts, and where the last one ends.
    starts: Vec<u32>,
    /// Whether each record is urgent: it must not wait in a ring.
    urgent: Vec<bool>,
    /// Where the records of processes that die start, and how many pids these have.
    mortals: Vec<u32>,
    mortal_pids: u32,
}

/// Whether a record is of a death, or of a cause of one.
fn is_urgent(record: &[u8]) -> bool {
    let kind = Header::read_from_prefix(record).ok().and_then(|(header, _)| RecordKind::from_u16(header.kind));
    match kind {
        Some(RecordKind::Oom | RecordKind::Signal | RecordKind::SignalDelivered) => true,
        Some(RecordKind::Exit) => Exit::read_from_bytes(record).is_ok_and(|exit| exit.status != 0),
        _ => false,
    }
}

fn read_u32(record: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes([record[at], record[at + 1], record[at + 2], record[at + 3]])
}

impl Pool {
    /// Appends a record, which starts with its header.
    pub fn push(&mut self, record: &[u8]) {
        if self.starts.is_empty() {
            self.starts.push(0);
        }
        self.bytes.extend_from_slice(record);
        self.starts.push(self.bytes.len() as u32);
        self.urgent.push(is_urgent(record));
    }

    /// Appends a record of a process that dies; its pid counts from [`MORTALS_FIRST`].
    pub fn push_mortal(&mut self, record: &[u8]) {
        self.mortals.push(self.bytes.len() as u32);
        self.push(record);
        let pid = read_u32(record, PID_AT);
        self.mortal_pids = self.mortal_pids.max(pid.saturating_sub(MORTALS_FIRST) + 1);
    }

    /// Lets other processes die from now on.
    pub fn renew(&mut self) {
        for &start in &self.mortals {
            let start = start as usize;
            let pid = read_u32(&self.bytes[start..], PID_AT);
            let next = MORTALS_FIRST + (pid - MORTALS_FIRST + self.mortal_pids) % MORTALS_SPAN;
            for at in [PID_AT, TID_AT] {
                self.bytes[start + at..start + at + 4].copy_from_slice(&next.to_ne_bytes());
            }
        }
    }

    /// Whether one of these records must not wait in a ring.
    pub fn are_urgent(&self, records: std::ops::Range<usize>) -> bool {
        self.urgent[records].contains(&true)
    }

    /// How many records there are.
    pub fn len(&self) -> usize {
        self.starts.len().saturating_sub(1)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// One record.
    #[inline]
    pub fn record(&self, index: usize) -> &[u8] {
        &self.bytes[self.starts[index] as usize..self.starts[index + 1] as usize]
    }

    /// Sets a record's time.
    #[inline]
    pub fn stamp(&mut self, index: usize, time_ns: u64) {
        let at = self.starts[index] as usize + TIME_AT;
        self.bytes[at..at + 8].copy_from_slice(&time_ns.to_ne_bytes());
    }
}
