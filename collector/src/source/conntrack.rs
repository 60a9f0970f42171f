//! The kernel's table of connections (nf_conntrack): how full it is, what that has cost, and who fills it.
//!
//! What enters: a look at procfs every few seconds, some 20 µs of work. What leaves: a `Conntrack` event of the lethal
//! lane when the table is full, again while it stays so, and once when there is room again. What must hold: a fill that
//! swings around one number is not reported twice. The table, which may have a million entries, is read only when it is
//! full, and then only [`SAMPLE_MAX`] of them.
//!
//! Every network namespace has a count and counters of its own, and the bound is the same for all. What matters is the node's
//! namespace, which is that of the process 1 whose `/proc` is seen at `HOST_PROC`: a collector in a pod has another one.

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tapio_wire::event::{Conntrack, Detail, EntityId, Event, Lane, Source};
use tokio::sync::watch;

use crate::base::clock::boottime_ns;
use crate::base::status::Status;
use crate::intake::Intake;
use crate::intake::pass::Pass;

/// Percent at which it is full, and below which it has room again.
const FULL_PERCENT: u64 = 95;
const ROOM_PERCENT: u64 = 85;
/// Packets are dropped for want of room only in a table that was full a moment ago, and most entries stay for longer than two looks are
/// apart. A burst of lookups that are not answered, which stay for 30 s, may be missed in a pod's own table: that is looked at each minute.
const WAS_FULL_PERCENT: u64 = 50;
/// How often a full table is reported again; at once when packets are dropped for the first time.
const REPEAT: Duration = Duration::from_secs(30);
/// Entries looked at to find who has most of them. They come in the order of a hash: a sample. Older kernels walk from the
/// table's start for every page that is read.
const SAMPLE_MAX: usize = 4096;
/// How often a table that is not there is looked for again: the kernel makes it with the first rule that needs it.
const ABSENT_INTERVAL: Duration = Duration::from_secs(60);

/// What one look found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fill {
    entries: u64,
    pub entries_max: u64,
    /// Since the namespace is there; `None` where the kernel does not count.
    dropped: Option<u64>,
    early_dropped: Option<u64>,
    /// Entries that another packet had entered first. Some such packets are dropped, which says nothing of room.
    insert_failed: u64,
}

impl Fill {
    fn is_above(&self, percent: u64) -> bool {
        self.entries_max > 0 && self.entries.saturating_mul(100) >= self.entries_max.saturating_mul(percent)
    }

    /// Sets the maximum number of entries of the table.
    pub fn of_at_most(self, entries_max: u64) -> Self {
        Self { entries_max, ..self }
    }

    /// Packets dropped for want of room since `before`, at least; [`None`] where the kernel does not count.
    pub fn dropped_since(&self, before: &Self) -> Option<u64> {
        let dropped = self.dropped?.saturating_sub(before.dropped?);
        let raced = self.insert_failed.saturating_sub(before.insert_failed);
        Some(if self.is_above(WAS_FULL_PERCENT) { dropped.saturating_sub(raced) } else { 0 })
    }
}

/// Where to look.
struct Files {
    bound: PathBuf,
    count: PathBuf,
    counters: PathBuf,
    table: PathBuf,
}

impl Files {
    /// Paths of the node whose `/proc` is at `root`.
    fn below(root: &Path) -> Self {
        let sysctl = root.join("sys/net/netfilter");
        let net = root.join("1/net");
        Self {
            bound: sysctl.join("nf_conntrack_max"),
            count: sysctl.join("nf_conntrack_count"),
            counters: net.join("stat/nf_conntrack"),
            table: net.join("nf_conntrack"),
        }
    }

    /// # Errors
    /// Why there is nothing to look at.
    fn read(&self) -> Result<Fill, String> {
        let entries_max = number(&self.bound)?;
        match fs::read_to_string(&self.counters).ok().and_then(|text| counters(&text)) {
            Some(fill) => Ok(Fill { entries_max, ..fill }),
            // A kernel without CONFIG_NF_CONNTRACK_PROCFS. This is the count of the collector's own namespace.
            None => Ok(Fill { entries: number(&self.count)?, entries_max, ..Fill::default() }),
        }
    }

    /// Who began most of the connections, how many of them, and how many were looked at.
    fn top_talker(&self) -> Option<(IpAddr, u64, u64)> {
        let file = BufReader::new(fs::File::open(&self.table).ok()?);
        let mut talkers: HashMap<IpAddr, u64, foldhash::fast::RandomState> = HashMap::default();
        let mut looked_at = 0;
        for line in file.lines().take(SAMPLE_MAX) {
            // What began it comes first: `ipv4 2 tcp 6 431999 ESTABLISHED src=10.0.0.7 dst=… src=… [ASSURED] …`.
            let line = line.ok()?;
            let source = line.split(' ').find_map(|word| word.strip_prefix("src=")?.parse().ok());
            if let Some(source) = source {
                *talkers.entry(source).or_default() += 1;
                looked_at += 1;
            }
        }
        // Of equals always the same one.
        let (talker, entries) = talkers.into_iter().max_by_key(|&(address, entries)| (entries, address))?;
        Some((talker, entries, looked_at))
    }
}

fn number(path: &Path) -> Result<u64, String> {
    let text = fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
    text.trim().parse().map_err(|_| format!("{}: no number: {text:?}", path.display()))
}

/// `/proc/net/stat/nf_conntrack`: a line of names, then one of hexadecimal numbers for each CPU. The entries are the namespace's
/// in every line, the rest is to be added up.
pub fn counters(text: &str) -> Option<Fill> {
    let mut lines = text.lines();
    let names: Vec<&str> = lines.next()?.split_whitespace().collect();
    let column = |name: &str| names.iter().position(|known| *known == name);
    let (entries, dropped, early_dropped) = (column("entries")?, column("drop"), column("early_drop"));
    let insert_failed = column("insert_failed");
    let mut fill = Fill { dropped: dropped.map(|_| 0), early_dropped: early_dropped.map(|_| 0), ..Fill::default() };
    for line in lines {
        let numbers: Vec<u64> =
            line.split_whitespace().map(|hex| u64::from_str_radix(hex, 16).unwrap_or_default()).collect();
        let get = |column: Option<usize>| column.and_then(|column| numbers.get(column)).copied().unwrap_or_default();
        fill.entries = get(Some(entries));
        fill.dropped = fill.dropped.map(|sum| sum + get(dropped));
        fill.early_dropped = fill.early_dropped.map(|sum| sum + get(early_dropped));
        fill.insert_failed += get(insert_failed);
    }
    Some(fill)
}

/// Decides what to report of each look.
#[derive(Default)]
struct FillReporter {
    is_full: bool,
    /// The counters that were reported last.
    reported: Fill,
    reported_at: Option<Instant>,
    has_reported_drops: bool,
    seen: Option<Fill>,
}

impl FillReporter {
    /// What to report of this look, if anything: full or not, and what was dropped since the last report.
    fn look(&mut self, fill: Fill, now: Instant) -> Option<(bool, Option<u64>, Option<u64>)> {
        let before = *self.seen.get_or_insert_with(|| {
            self.reported = fill;
            fill
        });
        let since = |now: Option<u64>, before: Option<u64>| Some(now?.saturating_sub(before?));
        let drops_now = fill.dropped_since(&before).unwrap_or(0) > 0;
        self.seen = Some(fill);
        let was_full = self.is_full;
        // Between two looks it may have been full and have dropped packets.
        self.is_full = drops_now || fill.is_above(if was_full { ROOM_PERCENT } else { FULL_PERCENT });
        let is_due = self.reported_at.is_none_or(|reported| now.saturating_duration_since(reported) >= REPEAT);
        let is_news = match (was_full, self.is_full) {
            (false, true) | (true, false) => true,
            (true, true) => is_due || (drops_now && !self.has_reported_drops),
            (false, false) => false,
        };
        if !is_news {
            return None;
        }
        let dropped = fill.dropped_since(&self.reported);
        let early_dropped = since(fill.early_dropped, self.reported.early_dropped);
        self.has_reported_drops = self.is_full && (self.has_reported_drops || dropped.unwrap_or(0) > 0);
        self.reported = fill;
        self.reported_at = Some(now);
        Some((self.is_full, dropped, early_dropped))
    }
}

/// Reads the kernel's connection table at intervals and reports how full it is.
pub struct ConntrackPoll {
    files: Files,
    interval: Duration,
    node: EntityId,
    status: Status,
    reporter: FillReporter,
}

impl ConntrackPoll {
    /// Looks every `interval`. `node` is the node's entity.
    pub fn new(interval: Duration, node: EntityId) -> Self {
        Self::below(crate::base::host::proc_root(), interval, node)
    }

    fn below(root: &Path, interval: Duration, node: EntityId) -> Self {
        Self { files: Files::below(root), interval, node, status: Status::default(), reporter: FillReporter::default() }
    }

    /// What it waits for, for `/readyz`.
    pub fn status(&self) -> Status {
        self.status.clone()
    }

    /// Looks until it is stopped and everything was handed on.
    pub async fn run(mut self, mut intake: Intake, mut stopped: watch::Receiver<bool>) {
        let mut was_absent = None;
        let mut next = tokio::time::Instant::now();
        let mut pass = intake.begin();
        loop {
            let until = match pass.is_empty() {
                true => next,
                false => next.min(tokio::time::Instant::now() + pass.sleep_limit()),
            };
            tokio::select! {
                _ = stopped.wait_for(|&stopped| stopped) => break,
                () = tokio::time::sleep_until(until) => {}
            }
            if tokio::time::Instant::now() >= next {
                let absent = self.look(&mut pass).err();
                next += if absent.is_some() { self.interval.max(ABSENT_INTERVAL) } else { self.interval };
                match &absent {
                    Some(reason) => self.status.waits_for(format!("off, no table of connections: {reason}")),
                    None => self.status.runs(),
                }
                if was_absent.as_ref() != Some(&absent) {
                    match &absent {
                        Some(reason) => tracing::info!(reason, "conntrack table not watched"),
                        None => tracing::info!(interval = ?self.interval, "watching the conntrack table"),
                    }
                    was_absent = Some(absent);
                }
            }
            pass.renew();
        }
        pass.finish();
        while let Some(pause) = intake.hand_on() {
            tokio::time::sleep(pause).await;
        }
    }

    fn look(&mut self, pass: &mut Pass<'_>) -> Result<(), String> {
        let fill = self.files.read()?;
        // Without room nothing is looked at: the next look reports what this one would have.
        if pass.room_of(Lane::Lethal) == 0 {
            return Ok(());
        }
        let Some((is_full, dropped, early_dropped)) = self.reporter.look(fill, Instant::now()) else {
            return Ok(());
        };
        let talker = if is_full { self.files.top_talker() } else { None };
        let (top_address, top_entries, looked_at) = talker.map_or(([0; 16], 0, 0), |(address, entries, looked_at)| {
            let address = match address {
                IpAddr::V4(address) => address.to_ipv6_mapped(),
                IpAddr::V6(address) => address,
            };
            (address.octets(), entries, looked_at)
        });
        pass.observe(|_, _| Event {
            time_ns: boottime_ns(),
            entity: self.node,
            pid: 0,
            source: Source::Collector,
            body: Detail::Conntrack(Box::new(Conntrack {
                entries: fill.entries,
                entries_max: fill.entries_max,
                dropped: dropped.unwrap_or(u64::MAX),
                early_dropped: early_dropped.unwrap_or(u64::MAX),
                top_address,
                top_entries,
                looked_at,
                is_full,
            })),
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::intake::identity::Identity;
    use crate::intake::source_context::SourceContext;
    use crate::outbox::queue::{OpenLanes, Queues};
    use crate::settings::config::Config;

    const STAT: &str = "\
entries  clashres found new invalid ignore delete chainlength insert insert_failed drop early_drop icmp_error  expect_new
000003e7  00000000 00000000 00000000 00000000 00000000 00000000 00000000 00000000 00000000 0000000a 00000002 00000000  00000000
000003e7  00000000 00000000 00000000 00000000 00000000 00000000 00000000 00000000 00000000 00000010 00000001 00000000  00000000
";

    #[test]
    fn counters_are_added_up_and_entries_are_not() {
        let fill = counters(STAT).expect("as the kernel writes it");
        let expected =
            Fill { entries: 999, dropped: Some(26), early_dropped: Some(3), insert_failed: 0, ..Fill::default() };
        assert_eq!(fill, expected);
        assert_eq!(counters("something else"), None);
        assert_eq!(counters(""), None);
    }

    fn reports(fills: &[(u64, u64)]) -> Vec<Option<(bool, u64)>> {
        let (mut reporter, start) = (FillReporter::default(), Instant::now());
        let looks = fills.iter().enumerate().map(|(turn, &(entries, dropped))| {
            let (dropped, early_dropped) = (Some(dropped), Some(0));
            let fill = Fill { entries, entries_max: 100, dropped, early_dropped, insert_failed: 0 };
            let report = reporter.look(fill, start + Duration::from_secs(5) * turn as u32);
            report.map(|(is_full, dropped, _)| (is_full, dropped.expect("counted")))
        });
        looks.collect()
    }

    #[test]
    fn a_fill_around_the_threshold_is_reported_once() {
        let looks = reports(&[(94, 0), (95, 0), (94, 0), (95, 0), (86, 0), (84, 0), (90, 0), (50, 0)]);
        let full = Some((true, 0));
        assert_eq!(looks, [None, full, None, None, None, Some((false, 0)), None, None]);
    }

    #[test]
    fn the_first_drops_are_reported_at_once_later_ones_periodically() {
        let mut fills = vec![(96, 7), (99, 7), (100, 9)];
        fills.extend((0..12).map(|turn| (100, 10 + turn)));
        let looks = reports(&fills);
        assert_eq!(
            looks[..4],
            [Some((true, 0)), None, Some((true, 2)), None],
            "what was dropped before is not reported"
        );
        let repeated: Vec<_> = looks[3..].iter().flatten().collect();
        assert_eq!(repeated, [&(true, 6), &(true, 6)], "every 30 s, with all that was dropped in between");
    }

    #[test]
    fn a_table_that_was_full_between_looks_is_reported() {
        assert_eq!(reports(&[(40, 7), (60, 19), (60, 19)]), [None, Some((true, 12)), Some((false, 0))]);
    }

    #[test]
    fn drops_in_a_table_with_room_report_nothing() {
        assert_eq!(reports(&[(10, 7), (12, 19), (12, 30)]), [None; 3], "it had room all the time");
        let fill = |dropped, insert_failed| Fill {
            entries: 100,
            entries_max: 100,
            dropped: Some(dropped),
            insert_failed,
            ..Fill::default()
        };
        assert_eq!(fill(40, 25).dropped_since(&fill(10, 5)), Some(10));
        assert_eq!(fill(40, 99).dropped_since(&fill(10, 5)), Some(0));
    }

    fn node(entries: u64, with_counters: bool) -> tempfile::TempDir {
        let root = tempfile::tempdir().expect("a folder");
        for folder in ["sys/net/netfilter", "1/net/stat"] {
            fs::create_dir_all(root.path().join(folder)).expect("a folder");
        }
        let write = |name: &str, text: String| fs::write(root.path().join(name), text).expect("written");
        write("sys/net/netfilter/nf_conntrack_max", "1000\n".into());
        write("sys/net/netfilter/nf_conntrack_count", format!("{entries}\n"));
        if with_counters {
            write("1/net/stat/nf_conntrack", STAT.replace("000003e7", &format!("{entries:08x}")));
        }
        let line = |source: &str| {
            format!("ipv4     2 tcp      6 99 ESTABLISHED src={source} dst=10.0.0.1 sport=1 src=9.9.9.9\n")
        };
        write("1/net/nf_conntrack", line("10.0.0.2").repeat(2) + &line("10.0.0.7").repeat(6));
        root
    }

    fn events_of(root: &Path) -> Vec<Conntrack> {
        let (queues, _parker) = Queues::new(64);
        let context = SourceContext::for_config(&Config::default(), queues);
        let mut intake = Intake::new(context.clone(), Source::Collector, Identity::new(Vec::new()));
        let mut pass = intake.begin();
        ConntrackPoll::below(root, Duration::from_secs(5), 7).look(&mut pass).expect("there is a table");
        pass.finish_all();
        let bodies = std::iter::from_fn(|| context.queues.pop(OpenLanes::Both));
        let events = bodies.flat_map(|(_, body)| body.events.clone());
        events
            .map(|event| match event.body {
                Detail::Conntrack(table) if event.entity == 7 => *table,
                other => panic!("{other:?}"),
            })
            .collect()
    }

    #[test]
    fn a_full_table_names_its_top_talker() {
        for with_counters in [true, false] {
            let events = events_of(node(960, with_counters).path());
            let [table] = events.as_slice() else { panic!("{events:?}") };
            assert_eq!((table.entries, table.entries_max, table.is_full), (960, 1000, true));
            let address = std::net::Ipv4Addr::new(10, 0, 0, 7).to_ipv6_mapped().octets();
            assert_eq!((table.top_address, table.top_entries, table.looked_at), (address, 6, 8));
            assert_eq!(table.dropped, if with_counters { 0 } else { u64::MAX });
            assert!(events_of(node(500, with_counters).path()).is_empty());
        }
    }

    #[test]
    fn where_there_is_no_table_it_says_so() {
        let root = tempfile::tempdir().expect("a folder");
        let error = Files::below(root.path()).read().expect_err("nothing is there");
        assert!(error.contains("nf_conntrack_max"), "{error}");
    }
}
