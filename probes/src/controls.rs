//! What of the probes may be changed while they run.
//!
//! In: a [`Tuning`]. Out: the entry of the map `tuning`, which every program of the bulk lane reads at each event. Nothing is
//! loaded anew. The kernel copies the entry word by word, so a program may for one event see some values old and some new;
//! each of them means something by itself.

use std::sync::{Mutex, PoisonError};
use std::{fmt, io};

use aya::maps::{Array, MapData, MapError};
use zerocopy::{Immutable, IntoBytes};

/// Thresholds and sampling.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuning {
    /// Of the bulk lane's records one in so many is kept, by lot: 1 keeps all, 0 none. What is left out is counted.
    pub bulk_sampling: u32,
    /// A block I/O that took longer is recorded; a failed one always is.
    pub block_io_slow_ns: u64,
    /// A cgroup's stalls in reclaim are recorded when they have added up to this.
    pub reclaim_burst_ns: u64,
}

impl Default for Tuning {
    fn default() -> Self {
        Self { bulk_sampling: 1, block_io_slow_ns: 100_000_000, reclaim_burst_ns: 1_000_000 }
    }
}

/// `struct tuning` of `bpf/include/tapio.h`.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Entry {
    bulk_sampling: u32,
    pad: u32,
    block_io_slow_ns: u64,
    reclaim_burst_ns: u64,
}

const ENTRY_BYTES: usize = size_of::<Entry>();
const _: () = assert!(ENTRY_BYTES == 24);

/// A handle on the running probes' [`Tuning`]; any thread may use it.
pub struct Controls {
    map: Mutex<(Array<MapData, [u8; ENTRY_BYTES]>, Tuning)>,
}

impl fmt::Debug for Controls {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_tuple("Controls").field(&self.get()).finish()
    }
}

impl Controls {
    pub(crate) fn new(map: Array<MapData, [u8; ENTRY_BYTES]>, tuning: Tuning) -> Result<Self, MapError> {
        let controls = Self { map: Mutex::new((map, tuning)) };
        controls.store(tuning)?;
        Ok(controls)
    }

    /// What holds now.
    pub fn get(&self) -> Tuning {
        self.map.lock().unwrap_or_else(PoisonError::into_inner).1
    }

    /// Holds from the next event on.
    ///
    /// # Errors
    /// When the kernel refuses to store it, which it has no reason to.
    pub fn set(&self, tuning: Tuning) -> io::Result<()> {
        self.store(tuning).map_err(io::Error::other)
    }

    fn store(&self, tuning: Tuning) -> Result<(), MapError> {
        let Tuning { bulk_sampling, block_io_slow_ns, reclaim_burst_ns } = tuning;
        let entry = Entry { bulk_sampling, pad: 0, block_io_slow_ns, reclaim_burst_ns };
        let mut bytes = [0; ENTRY_BYTES];
        bytes.copy_from_slice(entry.as_bytes());
        let mut map = self.map.lock().unwrap_or_else(PoisonError::into_inner);
        map.0.set(0, bytes, 0)?;
        map.1 = tuning;
        Ok(())
    }
}
