//! What `resources` comes to: how much of everything that grows there may be, and how many threads.
//!
//! What must hold: the parts add up to less than the whole, since allocator, stacks, code and connections need memory too. What a
//! part cannot foresee (frames larger than usual, windows full of unread bytes) shows in the resident memory. From
//! [`MemoryWatch::SHORT`] on, collectors are asked to send no more than they must.

use std::thread;

use schemars::JsonSchema;
use serde::Deserialize;
use tapio_wire::limits::FRAME_BYTES_MAX;

use crate::archive::QUEUE_BYTES_MAX;

/// The least that a server can work with.
pub const MEMORY_MB_MIN: u64 = 64;
/// A decoded frame of the usual 4,096 events.
const USUAL_FRAME_BYTES: u64 = 512 << 10;
/// An entity: its place in tables that are half empty, in the time wheel, and a description with the names of Kubernetes.
const ENTITY_BYTES: u64 = 300;
/// A finding with its evidence.
const FINDING_BYTES: u64 = 4 << 10;
/// The parts, in hundredths.
const ENTITIES_SHARE: u64 = 60;
const QUEUE_SHARE: u64 = 12;
const DECODED_SHARE: u64 = 12;
const FINDINGS_SHARE: u64 = 8;
const _: () = assert!(ENTITIES_SHARE + QUEUE_SHARE + DECODED_SHARE + FINDINGS_SHARE <= 95);

/// `resources:`
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ResourcesSection {
    /// Sizes queues, tables and credit; 0 for no limit.
    pub max_memory_mb: u64,
    /// Rounded up to whole threads that correlate; unset or 0: one for each core that this process may use.
    #[schemars(example = 500)]
    pub max_cpu_milli: Option<u64>,
}

impl Default for ResourcesSection {
    fn default() -> Self {
        Self { max_memory_mb: 500, max_cpu_milli: None }
    }
}

/// The bounds and thread counts that follow from `resources`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Bytes of frames that wait for the archive.
    pub queue_bytes: usize,
    /// Decoded frames on their way through correlation.
    pub frames_in_flight: usize,
    /// Entities that are remembered.
    pub entities_max: usize,
    /// Findings that are kept.
    pub findings_max: usize,
    /// Bytes that all collectors together are invited to have in flight.
    pub in_flight_bytes: u64,
    /// Threads that correlate.
    pub shards: usize,
    /// Threads that receive, check and answer.
    pub io_threads: usize,
}

impl Budget {
    /// Sets the limit of this process; 0 is no limit.
    pub fn of(resources: &ResourcesSection) -> Self {
        Self::with(resources, thread::available_parallelism().map_or(1, usize::from))
    }

    fn with(resources: &ResourcesSection, cores: usize) -> Self {
        let cores = match resources.max_cpu_milli {
            None | Some(0) => cores,
            Some(milli) => cores.min(milli.div_ceil(1000) as usize),
        };
        // Receiving and decoding needs fewer threads than correlation.
        let (shards, io_threads) = (cores, cores.div_ceil(2));
        if resources.max_memory_mb == 0 {
            return Self {
                queue_bytes: QUEUE_BYTES_MAX,
                frames_in_flight: 256,
                entities_max: usize::MAX,
                findings_max: 10_000,
                in_flight_bytes: u64::MAX,
                shards,
                io_threads,
            };
        }
        let share = |hundredths: u64| (resources.max_memory_mb << 20) / 100 * hundredths;
        let bounded = |wanted: u64, least: u64, most: u64| wanted.clamp(least, most) as usize;
        Self {
            queue_bytes: bounded(share(QUEUE_SHARE), FRAME_BYTES_MAX as u64, QUEUE_BYTES_MAX as u64),
            frames_in_flight: bounded(share(DECODED_SHARE) / USUAL_FRAME_BYTES, 8, 256),
            entities_max: bounded(share(ENTITIES_SHARE) / ENTITY_BYTES, 1000, u64::MAX),
            findings_max: bounded(share(FINDINGS_SHARE) / FINDING_BYTES, 100, 10_000),
            // The queue to the archive is what takes them in; what does not fit there waits with the collectors.
            in_flight_bytes: share(QUEUE_SHARE) * 2,
            shards,
            io_threads,
        }
    }
}

/// Reports when resident memory comes close to its limit, and when it is away from it again.
#[derive(Clone, Copy, Debug)]
pub struct MemoryWatch {
    limit_bytes: u64,
    is_short: bool,
}

impl MemoryWatch {
    /// Hundredths of the limit from which on memory is short, and below which it is not any more.
    pub const SHORT: u64 = 90;
    const ENOUGH: u64 = 80;

    /// Makes a budget for a limit; 0 is none.
    pub fn new(max_memory_mb: u64) -> Self {
        Self { limit_bytes: max_memory_mb << 20, is_short: false }
    }

    /// Whether memory is short at this use.
    pub fn look(&mut self, resident_bytes: u64) -> bool {
        let threshold = if self.is_short { Self::ENOUGH } else { Self::SHORT };
        self.is_short = self.limit_bytes > 0 && resident_bytes >= self.limit_bytes / 100 * threshold;
        self.is_short
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resources(max_memory_mb: u64, max_cpu_milli: Option<u64>) -> ResourcesSection {
        ResourcesSection { max_memory_mb, max_cpu_milli }
    }

    #[test]
    fn the_parts_stay_within_the_whole() {
        for max_memory_mb in [MEMORY_MB_MIN, 100, 500, 4000, 64_000] {
            let budget = Budget::with(&resources(max_memory_mb, None), 4);
            let entities = budget.entities_max as u64 * ENTITY_BYTES;
            let frames = budget.frames_in_flight as u64 * USUAL_FRAME_BYTES + budget.queue_bytes as u64;
            let findings = budget.findings_max as u64 * FINDING_BYTES;
            let sum = entities + frames + findings;
            assert!(sum <= (max_memory_mb << 20) / 100 * 95, "{sum} of {max_memory_mb} MiB");
        }
    }

    #[test]
    fn the_guides_memory_is_enough_for_a_million_entities() {
        let budget = Budget::with(&resources(500, None), 2);
        assert!(budget.entities_max >= 1_000_000, "{budget:?}");
        assert_eq!(budget.findings_max, 10_000);
        assert!(budget.queue_bytes > 60_000_000 && budget.frames_in_flight >= 100, "{budget:?}");
    }

    #[test]
    fn milli_cpus_round_up_to_threads_but_not_beyond_cores() {
        for (milli, shards, io) in [
            (None, 8, 4),
            (Some(0), 8, 4),
            (Some(10), 1, 1),
            (Some(500), 1, 1),
            (Some(2500), 3, 2),
            (Some(64_000), 8, 4),
        ] {
            let budget = Budget::with(&resources(500, milli), 8);
            assert_eq!((budget.shards, budget.io_threads), (shards, io), "{milli:?}");
        }
    }

    #[test]
    fn memory_is_short_until_it_is_well_below_the_limit() {
        let mut watch = MemoryWatch::new(100);
        let mib = |mib: u64| mib << 20;
        assert!(!watch.look(mib(89)));
        assert!(watch.look(mib(91)));
        assert!(watch.look(mib(85)), "not yet");
        assert!(!watch.look(mib(79)));
        assert!(!watch.look(mib(85)));
        assert!(!MemoryWatch::new(0).look(u64::MAX), "no limit");
    }
}
