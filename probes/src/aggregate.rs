//! Sums that the programs keep in the kernel, and how they become records.
//!
//! In: for each aggregate two maps, `NAME_0` and `NAME_1`, of which the programs fill one. Out: a record for each key
//! of the other, in the layout that a ring would bring. When an interval is over the two are swapped by a store into a
//! map of maps. The kernel returns from that store only when no program that saw the old value runs. So the old map is
//! complete when it is read, and only what was read is removed. The store waits for the kernel for milliseconds, so it
//! has a thread of its own, and the reader of the rings never waits.
//!
//! What holds: a flush hands out at most as many records as there is room for, and the next one continues. Programs
//! count what found no room in a map as emitted and dropped, under the kind of the missing record.

use std::fmt;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use aya::Ebpf;
use aya::maps::{Array, ArrayOfMaps, HashMap, Map, MapData, MapError, PerCpuHashMap};
use zerocopy::IntoBytes;

use crate::clock::boottime_ns;
use crate::field::{u32_at, u64_at};
use crate::object::{HISTOGRAM_BYTES, SIDE};
use crate::record::{HISTOGRAM_SLOTS, Header, Histogram, PacketDrop, Reclaim, RecordKind, SyscallError};
use crate::unanswered::Unanswered;

/// The root of version 2, as in `bpf/include/record.h`.
const CGROUP_ROOT: u64 = 1;

/// The interval that a record is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Interval {
    /// `CLOCK_BOOTTIME`, nanoseconds.
    pub(crate) start_ns: u64,
    pub(crate) end_ns: u64,
}

impl Interval {
    /// The header of a record about it. No process is its subject.
    pub(crate) fn header<T>(self, kind: RecordKind, cgroup_id: u64) -> Header {
        let size = size_of::<T>() as u16;
        Header { kind: kind as u16, size, cpu: 0, time_ns: self.end_ns, cgroup_id, pid: 0, tid: 0 }
    }
}

/// Writes the record of one key. The values are those of all CPUs, a single one where CPUs share it. Writing nothing is
/// right only when nothing was summed.
type Write = fn(key: &[u8], values: &[&[u8]], interval: Interval, record: &mut Vec<u8>);

/// One aggregate.
pub(crate) struct Table {
    /// Without `_0` and `_1`.
    name: &'static str,
    open: fn(Map) -> Result<Box<dyn Side>, MapError>,
    write: Write,
}

/// Every aggregate: its maps, the sizes of their keys and values, and what a record is made of.
const TABLES: &[Table] = &[
    Table { name: "run_queue", open: per_cpu::<8, HISTOGRAM_BYTES>, write: write_run_queue_histogram },
    Table { name: "failing", open: shared::<16, 8>, write: write_syscall_error },
    Table { name: "block_latency", open: per_cpu::<8, HISTOGRAM_BYTES>, write: write_block_histogram },
    Table { name: "dns_latency", open: shared::<8, HISTOGRAM_BYTES>, write: write_dns_histogram },
    Table { name: "stalls", open: shared::<16, 16>, write: write_stall },
    Table { name: "packet_drops", open: per_cpu::<16, 8>, write: write_packet_drops },
];

/// The first of the interval had a record when it happened.
fn write_syscall_error(key: &[u8], values: &[&[u8]], interval: Interval, record: &mut Vec<u8>) {
    let count = values.iter().map(|value| u64_at(value, 0)).sum();
    if count > 0 {
        let header = interval.header::<SyscallError>(RecordKind::SyscallError, u64_at(key, 0));
        let error = SyscallError { header, syscall: u32_at(key, 8), errno: u32_at(key, 12), count };
        record.extend_from_slice(error.as_bytes());
    }
}

/// `struct block_key`: device, operation.
fn write_block_histogram(key: &[u8], values: &[&[u8]], interval: Interval, record: &mut Vec<u8>) {
    const BLOCK: u8 = 1;
    // No I/O is the business of one cgroup alone: the root's.
    write_histogram((BLOCK, u32_at(key, 4) as u8, u32_at(key, 0)), CGROUP_ROOT, values, interval, record);
}

fn write_dns_histogram(cgroup_id: &[u8], values: &[&[u8]], interval: Interval, record: &mut Vec<u8>) {
    const DNS: u8 = 3;
    write_histogram((DNS, 0, 0), u64_at(cgroup_id, 0), values, interval, record);
}

/// `struct stall_key`: cgroup, memcg. `struct stall`: nanoseconds and pages that no program has recorded, or below 0 where two
/// recorded the same.
fn write_stall(key: &[u8], values: &[&[u8]], interval: Interval, record: &mut Vec<u8>) {
    let sum = |offset| values.iter().map(|value| u64_at(value, offset) as i64).sum::<i64>();
    if let Ok(stall_ns @ 1..) = u64::try_from(sum(0)) {
        let reclaim = Reclaim {
            header: interval.header::<Reclaim>(RecordKind::Reclaim, u64_at(key, 0)),
            stall_ns,
            pages_reclaimed: u64::try_from(sum(8)).unwrap_or(0),
            memcg: u8::from(u64_at(key, 8) != 0),
            pad: [0; 7],
        };
        record.extend_from_slice(reclaim.as_bytes());
    }
}

/// `struct drop_key`: cgroup, reason, interface.
fn write_packet_drops(key: &[u8], values: &[&[u8]], interval: Interval, record: &mut Vec<u8>) {
    let count = values.iter().map(|value| u64_at(value, 0)).sum();
    if count > 0 {
        let header = interval.header::<PacketDrop>(RecordKind::PacketDrop, u64_at(key, 0));
        let drops = PacketDrop { header, reason: u32_at(key, 8), interface: u32_at(key, 12), count };
        record.extend_from_slice(drops.as_bytes());
    }
}

fn write_run_queue_histogram(cgroup_id: &[u8], values: &[&[u8]], interval: Interval, record: &mut Vec<u8>) {
    const RUN_QUEUE: u8 = 2;
    write_histogram((RUN_QUEUE, 0, 0), u64_at(cgroup_id, 0), values, interval, record);
}

/// The map that says which side the programs fill, and the value for each.
struct Sides {
    chosen: ArrayOfMaps<MapData>,
    numbers: [MapData; 2],
}

impl Sides {
    fn open(object: &mut Ebpf) -> Result<Self, MapError> {
        // The object defines it, so loading it would have failed without.
        let map = object.take_map(SIDE).unwrap_or_else(|| unreachable!("the object has no map {SIDE}"));
        let mut sides = Self { chosen: ArrayOfMaps::try_from(map)?, numbers: [side_number(0)?, side_number(1)?] };
        sides.choose(0)?;
        Ok(sides)
    }

    /// Returns when no program fills the other side any more.
    fn choose(&mut self, side: usize) -> Result<(), MapError> {
        self.chosen.set(0, &self.numbers[side], 0)
    }
}

fn side_number(number: u32) -> Result<MapData, MapError> {
    let kind = aya_obj::generated::bpf_map_type::BPF_MAP_TYPE_ARRAY as u32;
    let mut map = Map::Array(MapData::create(aya_obj::Map::new_from_params(kind, 4, 4, 1, 0), "side_number", None)?);
    Array::try_from(&mut map)?.set(0, number, 0)?;
    match map {
        Map::Array(data) => Ok(data),
        _ => unreachable!("it was made an array"),
    }
}

/// How far the present exchange of the sides is.
enum Phase {
    /// The programs fill one side; the other is empty, or being emptied.
    Filling(Box<Sides>),
    /// The kernel waits for programs that still fill the side that is to be emptied.
    Changing(JoinHandle<(Box<Sides>, Result<(), MapError>)>),
    /// The thread died: the sums stay where they are.
    Broken,
}

/// The maps of every aggregate, and whose turn it is.
pub struct Aggregates {
    phase: Phase,
    maps: Vec<([Box<dyn Side>; 2], Write)>,
    /// The side that the programs fill.
    filled: usize,
    filled_since_ns: u64,
    changed: Instant,
    /// What the other side holds.
    interval: Interval,
    /// The first aggregate whose other side may hold something; past the last one when all are empty.
    next: usize,
    record: Vec<u8>,
    unanswered: Unanswered,
}

impl fmt::Debug for Aggregates {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Aggregates").field("filled", &self.filled).field("next", &self.next).finish()
    }
}

impl Aggregates {
    /// Takes the maps out of the loaded object.
    pub(crate) fn open(object: &mut Ebpf, dns_timeout: Duration) -> Result<Self, MapError> {
        let unanswered = Unanswered::open(object, dns_timeout)?;
        let mut maps = Vec::new();
        for table in TABLES {
            let mut side = |number: usize| {
                let name = format!("{}_{number}", table.name);
                let map = object.take_map(&name).unwrap_or_else(|| unreachable!("the object has no map {name}"));
                (table.open)(map)
            };
            maps.push(([side(0)?, side(1)?], table.write));
        }
        let phase = Phase::Filling(Box::new(Sides::open(object)?));
        let now_ns = boottime_ns();
        let interval = Interval { start_ns: now_ns, end_ns: now_ns };
        let (next, changed) = (maps.len(), Instant::now());
        Ok(Self {
            phase,
            maps,
            filled: 0,
            filled_since_ns: now_ns,
            changed,
            interval,
            next,
            record: Vec::new(),
            unanswered,
        })
    }

    /// Sets how long a DNS query may take before it counts as unanswered.
    pub fn set_dns_timeout(&mut self, timeout: Duration) {
        self.unanswered.timeout = timeout;
    }

    /// Hands out at most `room` records of the interval that is over. When all were handed out and `every` has passed
    /// since the last time, the next interval begins. Its records come with one of the next calls, when the kernel is
    /// ready. Returns how many there were. Cheap when there is nothing to do.
    ///
    /// # Errors
    /// When the kernel refuses what it has no reason to refuse. Then it may be called again, and goes on.
    pub fn flush(&mut self, every: Duration, room: usize, each: &mut dyn FnMut(&[u8])) -> Result<usize, MapError> {
        self.finish_change(false)?;
        let mut handed_out = self.unanswered.take(room, each)?;
        handed_out += self.empty(room - handed_out, each)?;
        if self.next == self.maps.len() && !self.maps.is_empty() && self.changed.elapsed() >= every {
            self.begin_change();
        }
        Ok(handed_out)
    }

    /// Hands out at most `room` records of both sides, once no program runs any more. Returns how many there were; when they
    /// are fewer than `room`, nothing is left.
    ///
    /// # Errors
    /// As [`Aggregates::flush`].
    pub fn flush_rest(&mut self, room: usize, each: &mut dyn FnMut(&[u8])) -> Result<usize, MapError> {
        self.finish_change(true)?;
        let mut handed_out = self.empty(room, each)?;
        if self.next == self.maps.len() && handed_out < room {
            // The other side is empty. Nobody fills this one any more: no need to ask the kernel.
            self.turn();
            handed_out += self.empty(room - handed_out, each)?;
        }
        Ok(handed_out)
    }

    fn begin_change(&mut self) {
        match std::mem::replace(&mut self.phase, Phase::Broken) {
            Phase::Filling(mut sides) => {
                let side = 1 - self.filled;
                self.phase = Phase::Changing(std::thread::spawn(move || {
                    let result = sides.choose(side);
                    (sides, result)
                }));
                self.changed = Instant::now();
            }
            phase => self.phase = phase,
        }
    }

    fn finish_change(&mut self, wait: bool) -> Result<(), MapError> {
        match std::mem::replace(&mut self.phase, Phase::Broken) {
            Phase::Changing(thread) if wait || thread.is_finished() => {
                if let Ok((sides, result)) = thread.join() {
                    self.phase = Phase::Filling(sides);
                    result?;
                    self.turn();
                }
            }
            phase => self.phase = phase,
        }
        Ok(())
    }

    /// The side that was filled is now to be emptied.
    fn turn(&mut self) {
        let now_ns = boottime_ns();
        self.interval = Interval { start_ns: self.filled_since_ns, end_ns: now_ns };
        self.filled_since_ns = now_ns;
        self.filled = 1 - self.filled;
        self.next = 0;
    }

    fn empty(&mut self, room: usize, each: &mut dyn FnMut(&[u8])) -> Result<usize, MapError> {
        let mut left = room;
        while let Some((sides, write)) = self.maps.get_mut(self.next).filter(|_| left > 0) {
            let (interval, record) = (self.interval, &mut self.record);
            let taken = sides[1 - self.filled].take(left, &mut |key, values| {
                record.clear();
                write(key, values, interval, record);
                if !record.is_empty() {
                    left -= 1;
                    each(record);
                }
            })?;
            if taken == 0 {
                self.next += 1;
            }
        }
        Ok(room - left)
    }
}

/// Takes a key and its values.
type EachSum<'a> = dyn FnMut(&[u8], &[&[u8]]) + 'a;

/// One map of an aggregate.
trait Side: Send {
    /// Removes at most `most` entries and hands them out. Returns how many; 0 when it is empty.
    fn take(&mut self, most: usize, each: &mut EachSum<'_>) -> Result<usize, MapError>;
}

struct OfEachCpu<const KEY: usize, const VALUE: usize>(PerCpuHashMap<MapData, [u8; KEY], [u8; VALUE]>);

impl<const KEY: usize, const VALUE: usize> Side for OfEachCpu<KEY, VALUE> {
    fn take(&mut self, most: usize, each: &mut EachSum<'_>) -> Result<usize, MapError> {
        let keys = self.0.keys().take(most).collect::<Result<Vec<_>, _>>()?;
        for key in &keys {
            let values = self.0.get(key, 0)?;
            self.0.remove(key)?;
            let values: Vec<&[u8]> = values.iter().map(<[u8; VALUE]>::as_slice).collect();
            each(key, &values);
        }
        Ok(keys.len())
    }
}

struct OfAllCpus<const KEY: usize, const VALUE: usize>(HashMap<MapData, [u8; KEY], [u8; VALUE]>);

impl<const KEY: usize, const VALUE: usize> Side for OfAllCpus<KEY, VALUE> {
    fn take(&mut self, most: usize, each: &mut EachSum<'_>) -> Result<usize, MapError> {
        let keys = self.0.keys().take(most).collect::<Result<Vec<_>, _>>()?;
        for key in &keys {
            let value = self.0.get(key, 0)?;
            self.0.remove(key)?;
            each(key, &[&value]);
        }
        Ok(keys.len())
    }
}

/// Opens a `BPF_MAP_TYPE_PERCPU_HASH`.
fn per_cpu<const KEY: usize, const VALUE: usize>(map: Map) -> Result<Box<dyn Side>, MapError> {
    Ok(Box::new(OfEachCpu::<KEY, VALUE>(PerCpuHashMap::try_from(map)?)))
}

/// Opens a `BPF_MAP_TYPE_HASH`.
fn shared<const KEY: usize, const VALUE: usize>(map: Map) -> Result<Box<dyn Side>, MapError> {
    Ok(Box::new(OfAllCpus::<KEY, VALUE>(HashMap::try_from(map)?)))
}

/// The record of one key's durations, of all CPUs; nothing when no CPU counted any.
fn write_histogram(of: (u8, u8, u32), cgroup_id: u64, values: &[&[u8]], interval: Interval, record: &mut Vec<u8>) {
    let (measure, operation, device) = of;
    let mut histogram = Histogram {
        header: interval.header::<Histogram>(RecordKind::Histogram, cgroup_id),
        measure,
        operation,
        pad: [0; 2],
        device,
        interval_ns: interval.end_ns - interval.start_ns,
        total_ns: 0,
        max_ns: 0,
        counts: [0; HISTOGRAM_SLOTS],
    };
    for value in values {
        histogram.total_ns = histogram.total_ns.saturating_add(u64_at(value, 0));
        histogram.max_ns = histogram.max_ns.max(u64_at(value, 8));
        for (slot, count) in histogram.counts.iter_mut().enumerate() {
            *count = count.saturating_add(u32_at(value, 16 + 4 * slot));
        }
    }
    if histogram.counts.iter().any(|&count| count > 0) {
        record.extend_from_slice(histogram.as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use zerocopy::FromBytes;

    use super::*;

    fn sums(total_ns: u64, max_ns: u64, slot: usize, count: u32) -> [u8; HISTOGRAM_BYTES] {
        let mut value = [0; HISTOGRAM_BYTES];
        value[..8].copy_from_slice(&total_ns.to_ne_bytes());
        value[8..16].copy_from_slice(&max_ns.to_ne_bytes());
        value[16 + 4 * slot..][..4].copy_from_slice(&count.to_ne_bytes());
        value
    }

    #[test]
    fn a_histogram_sums_the_cpus_and_skips_empty_ones() {
        let interval = Interval { start_ns: 100, end_ns: 350 };
        let (first, second) = (sums(10, 7, 0, 2), sums(5000, 4000, 31, 1));
        let mut record = Vec::new();
        write_histogram((2, 0, 9), 77, &[&first, &second], interval, &mut record);
        let histogram = Histogram::read_from_bytes(&record).expect("it has the size of one");
        assert_eq!((histogram.total_ns, histogram.max_ns, histogram.interval_ns), (5010, 4000, 250));
        assert_eq!((histogram.counts[0], histogram.counts[31]), (2, 1));
        assert_eq!((histogram.header.cgroup_id, histogram.header.time_ns, histogram.device), (77, 350, 9));
        assert_eq!(usize::from(histogram.header.size), record.len());

        record.clear();
        write_histogram((2, 0, 9), 77, &[&[0; HISTOGRAM_BYTES]], interval, &mut record);
        assert!(record.is_empty());
    }
}
