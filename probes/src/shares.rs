//! Cgroups that flood the lethal lane.
//!
//! In: the map `shares`, where the programs note for each cgroup what it has had of the lane and how many of its records they left
//! out. Out: a [`LeftOut`] record when a cgroup's records begin to be left out, every ten seconds while that goes on, and when it
//! is over. What must hold: reported counts add up to what was left out; bounded memory.

use std::collections::HashMap;

use tapio_ringbuf::{CounterArray, Error};
use zerocopy::IntoBytes;

use crate::loader::Probes;
use crate::record::{Header, LeftOut, RecordKind};

/// Number of shares, as in `bpf/include/tapio.h`.
const SHARES: usize = 1 << 12;
/// A `struct share`: cgroup, when it is due, when its reserve is, records left out.
const WORDS: usize = 4;
const CGROUP: usize = 0;
const LEFT_OUT: usize = 3;

/// How often it is reported that a flood goes on, and how long nothing was left out when it is over. The programs give a cgroup's place
/// to another one after as long without a record.
const REPORT_INTERVAL_NS: u64 = 10_000_000_000;

/// Floods at the same time. More are in the ledger only.
const FLOODS_MAX: usize = 1024;

struct Flood {
    /// Left out since the last report.
    count: u64,
    reported_ns: u64,
    /// When the latest was seen to be left out.
    latest_ns: u64,
}

/// Reads the probes' table of cgroups that flood the lethal lane.
pub struct Shares {
    map: CounterArray,
    records_per_second: u32,
    /// Cgroup in each place, and how many of its records had been left out.
    places: HashMap<usize, (u64, u64)>,
    floods: HashMap<u64, Flood>,
}

impl Shares {
    /// Maps what the programs note.
    ///
    /// # Errors
    /// When the map cannot be mapped.
    pub fn map(probes: &Probes) -> Result<Self, Error> {
        Ok(Self {
            map: CounterArray::map(probes.shares_map(), SHARES * WORDS)?,
            records_per_second: probes.cgroup_records_per_second(),
            places: HashMap::new(),
            floods: HashMap::new(),
        })
    }

    /// Whether a flood goes on: then it is worth looking, also when nothing more was left out.
    pub fn has_floods(&self) -> bool {
        !self.floods.is_empty()
    }

    /// Looks at all places. `now_ns` is `CLOCK_BOOTTIME`; `each` gets at most `room` records, what is left is reported with the
    /// next look. Once a second is often enough.
    pub fn read(&mut self, now_ns: u64, mut room: usize, mut each: impl FnMut(&[u8])) {
        for place in 0..SHARES {
            let left_out = self.map.get(place * WORDS + LEFT_OUT);
            if left_out == 0 {
                continue;
            }
            let cgroup = self.map.get(place * WORDS + CGROUP);
            let before = match self.places.insert(place, (cgroup, left_out)) {
                Some((was, before)) if was == cgroup && before <= left_out => before,
                _ => 0,
            };
            if left_out > before && (self.floods.len() < FLOODS_MAX || self.floods.contains_key(&cgroup)) {
                let flood = self.floods.entry(cgroup);
                let flood = flood.or_insert(Flood { count: 0, reported_ns: 0, latest_ns: now_ns });
                flood.count += left_out - before;
                flood.latest_ns = now_ns;
            }
        }
        let records_per_second = self.records_per_second;
        self.floods.retain(|&cgroup_id, flood| {
            let is_over = now_ns.saturating_sub(flood.latest_ns) >= REPORT_INTERVAL_NS;
            if room == 0 {
                return true;
            }
            if is_over || now_ns.saturating_sub(flood.reported_ns) >= REPORT_INTERVAL_NS {
                let interval_ns = if flood.reported_ns == 0 { 0 } else { now_ns - flood.reported_ns };
                let header = Header {
                    kind: RecordKind::LeftOut as u16,
                    size: size_of::<LeftOut>() as u16,
                    cpu: 0,
                    time_ns: now_ns,
                    cgroup_id,
                    pid: 0,
                    tid: 0,
                };
                let count = std::mem::take(&mut flood.count);
                let is_over = u32::from(is_over);
                each(LeftOut { header, count, interval_ns, records_per_second, is_over }.as_bytes());
                flood.reported_ns = now_ns;
                room -= 1;
            }
            !is_over
        });
    }
}
