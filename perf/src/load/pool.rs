//! Records that are prepared once and played many times.

use tapio_probes::record::{Exit, Header, Kind};
use zerocopy::FromBytes;

/// Where a record's time is.
const TIME_AT: usize = std::mem::offset_of!(Header, time_ns);

/// Records one after another in memory.
#[derive(Default)]
pub struct Pool {
    bytes: Vec<u8>,
    /// Where each record starts, and where the last one ends.
    starts: Vec<u32>,
    /// Those that must not wait in a ring.
    urgent: Vec<bool>,
}

/// Whether a record tells of a death, or of what brings one about.
fn is_urgent(record: &[u8]) -> bool {
    let kind = Header::read_from_prefix(record).ok().and_then(|(header, _)| Kind::from_u16(header.kind));
    match kind {
        Some(Kind::Oom | Kind::Signal | Kind::SignalDelivered) => true,
        Some(Kind::Exit) => Exit::read_from_bytes(record).is_ok_and(|exit| exit.status != 0),
        _ => false,
    }
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
