//! DNS queries that nobody answered.
//!
//! In: the map `dns_queries`, in which the programs keep each query until its answer comes. Out: a [`Dns`] record with the code
//! 255 for each that has waited too long. What holds: a query has one record, by a program or from here: by who takes it out of the
//! map. A query that still waits when the probes go has no record.

use std::time::{Duration, Instant};

use aya::Ebpf;
use aya::maps::{HashMap, MapData, MapError};
use rustix::io::Errno;
use zerocopy::IntoBytes;

use crate::clock::boottime_ns;
use crate::field::{u32_at, u64_at};
use crate::record::{Dns, Header, RecordKind};

const QUERIES: &str = "dns_queries";
/// `struct query_key` and `struct query` of `bpf/dns.bpf.c`.
const KEY_BYTES: usize = 16;
const QUERY_BYTES: usize = 320;
/// How many one look may take: looking is a system call for each.
const LOOKED_AT_MAX: usize = 8192;
const LOOK_INTERVAL_MAX: Duration = Duration::from_secs(1);
const NO_ANSWER: u8 = 255;

pub(crate) struct Unanswered {
    queries: HashMap<MapData, [u8; KEY_BYTES], [u8; QUERY_BYTES]>,
    pub(crate) timeout: Duration,
    looked: Instant,
}

impl Unanswered {
    pub(crate) fn open(object: &mut Ebpf, timeout: Duration) -> Result<Self, MapError> {
        // The object defines it, so loading it would have failed without.
        let map = object.take_map(QUERIES).unwrap_or_else(|| unreachable!("the object has no map {QUERIES}"));
        Ok(Self { queries: HashMap::try_from(map)?, timeout, looked: Instant::now() })
    }

    /// Hands out at most `room` records, when it is time to look again. Returns how many.
    pub(crate) fn take(&mut self, room: usize, each: &mut dyn FnMut(&[u8])) -> Result<usize, MapError> {
        if self.looked.elapsed() < LOOK_INTERVAL_MAX.min(self.timeout / 4) {
            return Ok(0);
        }
        let now_ns = boottime_ns();
        let mut late = Vec::new();
        for key in self.queries.keys().take(LOOKED_AT_MAX) {
            let key = key?;
            // Answered in this moment where it is gone.
            if let Ok(query) = self.queries.get(&key, 0)
                && is_late(&query, now_ns, self.timeout)
            {
                late.push((key, query));
            }
        }
        let mut taken = 0;
        for (key, query) in &late {
            if taken == room {
                // The rest with the next call, at once.
                return Ok(taken);
            }
            match self.queries.remove(key) {
                Ok(()) => {
                    each(record(query, now_ns).as_bytes());
                    taken += 1;
                }
                Err(MapError::SyscallError(error)) if Errno::from_io_error(&error.io_error) == Some(Errno::NOENT) => {}
                Err(error) => return Err(error),
            }
        }
        self.looked = Instant::now();
        Ok(taken)
    }
}

fn is_late(query: &[u8], now_ns: u64, timeout: Duration) -> bool {
    let since_ns = u64_at(query, 0);
    since_ns != 0 && u128::from(now_ns.saturating_sub(since_ns)) >= timeout.as_nanos()
}

fn record(query: &[u8; QUERY_BYTES], now_ns: u64) -> Dns {
    let mut name = [0; 72];
    // It begins with a dot.
    name.copy_from_slice(&query[33..105]);
    Dns {
        header: Header {
            kind: RecordKind::Dns as u16,
            size: size_of::<Dns>() as u16,
            cpu: 0,
            time_ns: now_ns,
            cgroup_id: u64_at(query, 8),
            pid: u32_at(query, 16),
            tid: u32_at(query, 20),
        },
        latency_ns: now_ns.saturating_sub(u64_at(query, 0)),
        rcode: NO_ANSWER,
        pad: 0,
        query_type: u16::from_ne_bytes([query[24], query[25]]),
        pad2: 0,
        name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::text;

    #[test]
    fn a_query_is_late_only_after_the_timeout() {
        let mut query = [0; QUERY_BYTES];
        let second = 1_000_000_000;
        assert!(!is_late(&query, 100 * second, Duration::from_secs(5)));
        query[..8].copy_from_slice(&(10 * second).to_ne_bytes());
        assert!(!is_late(&query, 15 * second - 1, Duration::from_secs(5)));
        assert!(is_late(&query, 15 * second, Duration::from_secs(5)));
        assert!(!is_late(&query, 9 * second, Duration::from_secs(5)));
    }

    #[test]
    fn the_record_says_who_asked_for_what_and_since_when() {
        let mut query = [0; QUERY_BYTES];
        query[..8].copy_from_slice(&700u64.to_ne_bytes());
        query[8..16].copy_from_slice(&44u64.to_ne_bytes());
        query[16..20].copy_from_slice(&5u32.to_ne_bytes());
        query[24..26].copy_from_slice(&28u16.to_ne_bytes());
        query[32..].copy_from_slice(&{
            let mut question = [0; 288];
            question[..12].copy_from_slice(b".example.org");
            question
        });
        let dns = record(&query, 1000);
        assert_eq!((dns.header.cgroup_id, dns.header.pid, dns.latency_ns), (44, 5, 300));
        assert_eq!((dns.rcode, dns.query_type, text(&dns.name).as_ref()), (255, 28, "example.org"));
    }
}
