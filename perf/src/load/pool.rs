//! Records that are prepared once and played many times.

use tapio_probes::record::Header;

/// Where a record's time is.
const TIME_AT: usize = std::mem::offset_of!(Header, time_ns);

/// Records one after another in memory.
#[derive(Default)]
pub struct Pool {
    bytes: Vec<u8>,
    /// Where each record starts, and where the last one ends.
    starts: Vec<u32>,
}

impl Pool {
    /// Appends a record, which starts with its header.
    pub fn push(&mut self, record: &[u8]) {
        if self.starts.is_empty() {
            self.starts.push(0);
        }
        self.bytes.extend_from_slice(record);
        self.starts.push(self.bytes.len() as u32);
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
