//! What of the probes may be changed while they run.
//!
//! In: a [`Tuning`], and cgroups to leave out. Out: the entry of the map `tuning`, which every program of the bulk lane reads
//! at each event, and the set `excluded`. Nothing is
//! loaded again. The kernel copies the entry word by word, so a program may for one event see some values old and some new;
//! each of them means something by itself.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::{fmt, io};

use aya::maps::{Array, HashMap, Map, MapData, MapError};
use zerocopy::{Immutable, IntoBytes};

use crate::record::RecordKind;

/// Thresholds and sampling.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuning {
    /// Sampling of the bulk lane: one record in this many is kept, at random; 1 keeps all, 0 none. What is left out is
    /// counted.
    pub bulk_sampling: u32,
    /// A block I/O that took longer is recorded; a failed one always is.
    pub block_io_slow_ns: u64,
    /// A cgroup's stalls in reclaim are recorded when they have added up to this.
    pub reclaim_burst_ns: u64,
    /// Kinds of the bulk lane that are not wanted, see [`kinds`]. Their records are counted as excluded; what is
    /// summed up in the kernel is then not summed up.
    pub bulk_kinds_off: u64,
    /// A wait for a CPU of at least this length is recorded.
    pub run_queue_slow_ns: u64,
    /// A DNS lookup that took at least as long is recorded; a failed one always is.
    pub dns_slow_ns: u64,
    /// How much of an exec's command is recorded.
    pub exec_command: ExecCommand,
}

/// How much of an exec's command is recorded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ExecCommand {
    /// Nothing but its name: [`crate::record::Exec`].
    #[default]
    Off = 0,
    /// The program's path: [`crate::record::ExecCommand`].
    Path = 1,
    /// The program's path and its first arguments, which may hold secrets.
    Full = 2,
}

/// A set of kinds: bit `kind as u16`.
pub fn kinds(kinds: impl IntoIterator<Item = RecordKind>) -> u64 {
    kinds.into_iter().fold(0, |set, kind| set | 1 << kind as u16)
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            bulk_sampling: 1,
            block_io_slow_ns: 100_000_000,
            reclaim_burst_ns: 1_000_000,
            bulk_kinds_off: 0,
            run_queue_slow_ns: 100_000_000,
            dns_slow_ns: 1_000_000_000,
            exec_command: ExecCommand::Off,
        }
    }
}

/// `struct tuning` of `bpf/include/tapio.h`.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Entry {
    bulk_sampling: u32,
    excluded_cgroups: u32,
    block_io_slow_ns: u64,
    reclaim_burst_ns: u64,
    bulk_kinds_off: u64,
    run_queue_slow_ns: u64,
    dns_slow_ns: u64,
    exec_command: u32,
    pad: u32,
}

const ENTRY_BYTES: usize = size_of::<Entry>();
const _: () = assert!(ENTRY_BYTES == 56);

/// What the maps hold.
struct Maps {
    tuning: Array<MapData, [u8; ENTRY_BYTES]>,
    present: Tuning,
    excluded: HashMap<MapData, u64, u8>,
    excluded_cgroups: u32,
}

/// A handle on the running probes' [`Tuning`] and on the cgroups that they leave out; any thread may use it.
pub struct Controls {
    maps: Mutex<Maps>,
}

impl fmt::Debug for Controls {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_tuple("Controls").field(&self.get()).finish()
    }
}

impl Controls {
    pub(crate) fn new(tuning: Map, excluded: Map, present: Tuning) -> Result<Self, MapError> {
        let (tuning, excluded) = (Array::try_from(tuning)?, HashMap::try_from(excluded)?);
        let mut maps = Maps { tuning, present, excluded, excluded_cgroups: 0 };
        maps.store()?;
        Ok(Self { maps: Mutex::new(maps) })
    }

    /// What holds now.
    pub fn get(&self) -> Tuning {
        self.lock().present
    }

    /// Holds from the next event on.
    ///
    /// # Errors
    /// When the kernel refuses to store it, which it has no reason to.
    pub fn set(&self, tuning: Tuning) -> io::Result<()> {
        let mut maps = self.lock();
        maps.present = tuning;
        maps.store().map_err(io::Error::other)
    }

    /// Changes part of it, while nobody else does. Holds from the next event on.
    ///
    /// # Errors
    /// As [`Controls::set`].
    pub fn update(&self, change: impl FnOnce(&mut Tuning)) -> io::Result<()> {
        let mut maps = self.lock();
        change(&mut maps.present);
        maps.store().map_err(io::Error::other)
    }

    /// Stops the bulk lane's records of a cgroup, from the next event on; the lethal lane keeps its records. Ids are
    /// those of records.
    ///
    /// # Errors
    /// When there is no room: 8,192 cgroups can be excluded.
    pub fn exclude_cgroup(&self, id: u64) -> io::Result<()> {
        let mut maps = self.lock();
        let is_new = maps.excluded.get(&id, 0).is_err();
        maps.excluded.insert(id, 1, 0).map_err(io::Error::other)?;
        maps.excluded_cgroups += u32::from(is_new);
        maps.store().map_err(io::Error::other)
    }

    /// Undoes [`Controls::exclude_cgroup`]; to be called too when the cgroup is gone. Nothing when it was not excluded.
    ///
    /// # Errors
    /// As [`Controls::set`].
    pub fn include_cgroup(&self, id: u64) -> io::Result<()> {
        let mut maps = self.lock();
        if maps.excluded_cgroups == 0 || maps.excluded.remove(&id).is_err() {
            return Ok(());
        }
        maps.excluded_cgroups -= 1;
        maps.store().map_err(io::Error::other)
    }

    /// How many are excluded.
    pub fn excluded_cgroups(&self) -> u32 {
        self.lock().excluded_cgroups
    }

    fn lock(&self) -> MutexGuard<'_, Maps> {
        self.maps.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Maps {
    fn store(&mut self) -> Result<(), MapError> {
        let tuning = self.present;
        let entry = Entry {
            bulk_sampling: tuning.bulk_sampling,
            excluded_cgroups: self.excluded_cgroups,
            block_io_slow_ns: tuning.block_io_slow_ns,
            reclaim_burst_ns: tuning.reclaim_burst_ns,
            bulk_kinds_off: tuning.bulk_kinds_off,
            run_queue_slow_ns: tuning.run_queue_slow_ns,
            dns_slow_ns: tuning.dns_slow_ns,
            exec_command: tuning.exec_command as u32,
            pad: 0,
        };
        let mut bytes = [0; ENTRY_BYTES];
        bytes.copy_from_slice(entry.as_bytes());
        self.tuning.set(0, bytes, 0)
    }
}
