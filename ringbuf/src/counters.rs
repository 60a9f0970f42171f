//! Counters that the probes keep in a BPF array, read without a system call each.

use std::os::fd::BorrowedFd;

use crate::error::Error;
use crate::mapping::{Access, Mapping};
use crate::sync::Ordering;

/// A read-only view of a BPF array of u64 made with `BPF_F_MMAPABLE`.
///
/// Per-CPU arrays cannot be mapped; a probe that counts per CPU lays its counters out in a plain array.
pub struct CounterArray {
    mapping: Mapping,
    length: usize,
}

impl CounterArray {
    /// Maps the first `length` counters of the array.
    pub fn map(map: BorrowedFd<'_>, length: usize) -> Result<Self, Error> {
        let page_bytes = rustix::param::page_size();
        let advice = "check that the map is an array of u64 with BPF_F_MMAPABLE and at least as many entries";
        let bytes = length
            .max(1)
            .checked_mul(size_of::<u64>())
            .and_then(|bytes| bytes.checked_next_multiple_of(page_bytes))
            .ok_or(rustix::io::Errno::OVERFLOW);
        let mapping = bytes
            .and_then(|bytes| Mapping::shared(map, 0, bytes, Access::Read))
            .map_err(Error::system("map the BPF counter array", advice))?;
        Ok(Self { mapping, length })
    }

    /// The counter at `index`; counters are read one by one, not as of one moment. Panics when `index` is out of range.
    #[inline]
    pub fn get(&self, index: usize) -> u64 {
        assert!(index < self.length, "counter {index} of {}", self.length);
        self.mapping.word64(index * size_of::<u64>()).load(Ordering::Relaxed)
    }

    /// How many counters were mapped.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether no counter was mapped.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }
}
