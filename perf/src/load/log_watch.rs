//! How servers keep up with the log that they share, sampled while a run goes on.
//!
//! In: what NATS says of the log, and each server's metrics. Out: how far behind each was at most. What must hold: the
//! log's last message is read before a server's count of messages, so that the lag is never overstated.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::servers::{LogCost, ReaderShare, ServerShare};
use crate::clock::{pause, wait_for};
use crate::error::Error;
use crate::processes::group::CLUSTER;
use crate::processes::metrics::Metrics;
use crate::processes::nats::{Nats, Traffic};
use crate::processes::usage::Usage;
use crate::processes::{Server, ServerGroup};

/// Samples before the load, to see what readers count besides the log's messages. Only samples between which nothing
/// was written count.
const FIRST_LOOKS: usize = 3;
const FIRST_INTERVAL: Duration = Duration::from_millis(20);
const FIRST_LIMIT: Duration = Duration::from_secs(20);
/// Places in the log whose time is remembered: more than samples of a reader that is hopelessly behind are worth.
const MARKS_MAX: usize = 10_000;

/// What a server's metrics say.
#[derive(Clone, Copy, Debug, Default)]
struct Reading {
    read: u64,
    written: u64,
    rebuilds: u64,
    waiting: u64,
    left_out: u64,
    is_alone: bool,
    queue: u64,
    clues: u64,
}

impl Reading {
    fn of(server: &Server) -> Result<Self, Error> {
        let metrics = Metrics::read(server.http_port())?;
        let sum = |name: &str| metrics.sum(name, &[]);
        Ok(Self {
            read: sum("tapio_server_log_read_messages_total"),
            written: sum("tapio_server_log_published_messages_total"),
            rebuilds: sum("tapio_server_log_rebuilds_total"),
            waiting: sum("tapio_server_log_waiting_entries"),
            left_out: sum("tapio_server_log_left_out_entries_total"),
            is_alone: sum("tapio_server_log_alone") > 0,
            queue: sum("tapio_server_finder_queue_clues"),
            clues: sum("tapio_server_finder_clues_total"),
        })
    }
}

/// What is known of one server.
struct Reader {
    first: Reading,
    last: Reading,
    /// The number of the log's last message less the messages that it had read, when it had read all.
    offset: i64,
    share: ReaderShare,
}

impl Reader {
    /// Starts from the first of these looks, when the reader may not have read everything yet.
    fn new(looks: &[Reading], last_seqs: &[u64]) -> Self {
        let last = looks.last().copied().unwrap_or_default();
        let offsets = looks.iter().zip(last_seqs).map(|(look, seq)| *seq as i64 - look.read as i64);
        Self { first: last, last, offset: offsets.min().unwrap_or(0), share: ReaderShare::default() }
    }

    /// The place in the log that it has read up to.
    fn place(&self, now: Reading) -> u64 {
        u64::try_from(now.read as i64 + self.offset).unwrap_or(0)
    }

    /// Takes a sample in. Returns whether nothing waits anywhere.
    fn take(&mut self, now: Reading, last_seq: u64, marks: &VecDeque<(Instant, u64)>, at: Instant) -> bool {
        let share = &mut self.share;
        share.waiting_entries_max = share.waiting_entries_max.max(now.waiting);
        share.finder_queue_max = share.finder_queue_max.max(now.queue);
        share.was_alone |= now.is_alone;
        self.last = now;
        let is_idle = now.waiting == 0 && now.queue == 0 && !now.is_alone;
        // After a rebuild it has read messages twice: its place is unknown.
        if now.rebuilds > self.first.rebuilds {
            return is_idle;
        }
        let place = self.place(now);
        let behind = last_seq.saturating_sub(place);
        let since = marks.iter().find(|(_, seq)| *seq > place).map_or(Duration::ZERO, |(since, _)| at - *since);
        let share = &mut self.share;
        share.behind_messages_max = share.behind_messages_max.max(behind);
        if behind > 0 {
            share.behind_ms_max = share.behind_ms_max.max(since.as_millis() as u64);
        }
        is_idle && behind == 0
    }
}

/// Reads how far the log is, and how far each server has read it.
pub(super) struct LogWatch {
    readers: Vec<Reader>,
    traffic: Traffic,
    usage: Usage,
    /// When the log was seen to end where; those that all have read are forgotten.
    marks: VecDeque<(Instant, u64)>,
}

impl LogWatch {
    /// Begins, where there is a log. The servers have nothing to do yet.
    pub fn start(group: &ServerGroup) -> Result<Option<Self>, Error> {
        let Some(nats) = group.nats() else { return Ok(None) };
        let servers = group.servers();
        let (mut looks, mut last_seqs) = (vec![Vec::new(); servers.len()], Vec::new());
        wait_for("a moment in which no server writes into the log", FIRST_LIMIT, |_| {
            pause(FIRST_INTERVAL)?;
            let before = nats.last_seq(CLUSTER)?;
            let now = servers.iter().map(Reading::of).collect::<Result<Vec<_>, _>>()?;
            if nats.last_seq(CLUSTER)? == before {
                looks.iter_mut().zip(now).for_each(|(looks, now)| looks.push(now));
                last_seqs.push(before);
            }
            Ok((last_seqs.len() == FIRST_LOOKS).then_some(()))
        })?;
        Ok(Some(Self {
            readers: looks.iter().map(|looks| Reader::new(looks, &last_seqs)).collect(),
            traffic: nats.traffic(CLUSTER)?,
            usage: nats.usage().unwrap_or_default(),
            marks: VecDeque::new(),
        }))
    }

    /// Looks at all. Returns how many clues each finder has dealt with, when all have read everything and nothing waits.
    pub fn sample(&mut self, group: &ServerGroup) -> Result<Option<Vec<u64>>, Error> {
        let Some(nats) = group.nats() else { return Ok(None) };
        let (at, last_seq) = (Instant::now(), nats.last_seq(CLUSTER)?);
        if self.marks.back().is_none_or(|(_, seq)| *seq < last_seq) && self.marks.len() < MARKS_MAX {
            self.marks.push_back((at, last_seq));
        }
        let mut is_settled = true;
        for (reader, server) in self.readers.iter_mut().zip(group.servers()) {
            match Reading::of(server) {
                Ok(now) => is_settled &= reader.take(now, last_seq, &self.marks, Instant::now()),
                // A server that is busy says so by this.
                Err(_) => {
                    reader.share.unanswered += 1;
                    is_settled = false;
                }
            }
        }
        let read_by_all = self.readers.iter().map(|reader| reader.place(reader.last)).min().unwrap_or(0);
        while self.marks.front().is_some_and(|(_, seq)| *seq <= read_by_all) {
            self.marks.pop_front();
        }
        Ok(is_settled.then(|| self.readers.iter().map(|reader| reader.last.clues).collect()))
    }

    /// What NATS has cost so far, in a run of `seconds`.
    pub fn cost(&self, nats: &Nats, seconds: f64) -> Result<LogCost, Error> {
        let (traffic, usage) = (nats.traffic(CLUSTER)?, nats.usage().unwrap_or_default());
        let cpu_ns = usage.cpu_ns.saturating_sub(self.usage.cpu_ns);
        Ok(LogCost {
            messages: traffic.last_seq.saturating_sub(self.traffic.last_seq),
            bytes_in: traffic.bytes_in.saturating_sub(self.traffic.bytes_in),
            bytes_out: traffic.bytes_out.saturating_sub(self.traffic.bytes_out),
            nats_cpu_percent_of_core: cpu_ns as f64 / (seconds.max(1e-9) * 1e9) * 100.0,
            nats_rss_bytes: usage.rss_peak_bytes,
        })
    }

    /// Adds each server's part.
    pub fn add_to(self, shares: &mut [ServerShare]) {
        for (reader, share) in self.readers.into_iter().zip(shares) {
            let (first, last) = (reader.first, reader.last);
            share.log = Some(ReaderShare {
                messages_written: last.written.saturating_sub(first.written),
                clues_found: last.clues.saturating_sub(first.clues),
                entries_left_out: last.left_out.saturating_sub(first.left_out),
                rebuilds: last.rebuilds.saturating_sub(first.rebuilds),
                ..reader.share
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_is_behind_by_its_unread_messages() {
        // It had read 7 facts besides the 10 messages of the log; at the first look one of these was on its way.
        let look = |read| Reading { read, rebuilds: 1, ..Reading::default() };
        let mut reader = Reader::new(&[look(16), look(17)], &[10, 10]);
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let marks = VecDeque::from([(at(0), 20), (at(100), 30), (at(200), 50)]);
        assert!(!reader.take(look(32), 50, &marks, at(200)));
        assert_eq!((reader.share.behind_messages_max, reader.share.behind_ms_max), (25, 100));
        assert!(reader.take(look(57), 50, &marks, at(300)));
        assert!(reader.take(look(60), 50, &marks, at(300)), "more than was asked for is not behind");
        assert_eq!((reader.share.behind_messages_max, reader.share.behind_ms_max), (25, 100));
        // What it reads a second time says nothing of where it is.
        reader.take(Reading { read: 60, rebuilds: 2, ..Reading::default() }, 5000, &marks, at(400));
        assert_eq!(reader.share.behind_messages_max, 25);
    }

    #[test]
    fn whoever_has_something_waiting_is_not_through() {
        let mut reader = Reader::new(&[Reading { read: 10, ..Reading::default() }], &[10]);
        let marks = VecDeque::new();
        for waiting in [
            Reading { read: 10, waiting: 1, ..Reading::default() },
            Reading { read: 10, queue: 1, ..Reading::default() },
            Reading { read: 10, is_alone: true, ..Reading::default() },
        ] {
            assert!(!reader.take(waiting, 10, &marks, Instant::now()), "{waiting:?}");
        }
        assert!(reader.take(Reading { read: 10, ..Reading::default() }, 10, &marks, Instant::now()));
    }
}
