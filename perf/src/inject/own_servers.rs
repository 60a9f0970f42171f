//! How long findings take with servers that are started for it: with the log that they share, and without it in turn.
//!
//! In: a fault, how often, how many servers. Out: latencies at the server that the node's collector ships to, and at the others. What
//! must hold: a turn without the log comes right before one with it, each with fresh servers and a fresh collector.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use super::measure::{self, Measured, Series};
use super::{Fault, Injector};
use crate::client::FindingWatch;
use crate::error::Error;
use crate::latency::{Latencies, Summary};
use crate::load::SeveralServers;
use crate::processes::collector::Feed;
use crate::processes::{Collector, CollectorOptions, GroupOptions, Server, ServerGroup, ServerOptions};

/// Turns of each kind, at most.
pub const TURNS_MAX: u16 = 100;

/// Servers, a collector with probes that ships to the first of them, and what they publish.
pub struct OwnServers {
    // In this order: nobody watches a server that ends, and the collector ends before it too.
    watches: Vec<FindingWatch>,
    collector: Collector,
    group: ServerGroup,
}

impl OwnServers {
    /// Starts all. Without a log only the first server is watched: the others learn of nothing.
    pub fn start(several: SeveralServers, bin_dir: Option<PathBuf>) -> Result<Self, Error> {
        let server = ServerOptions { bin_dir: bin_dir.clone(), ..ServerOptions::default() };
        let group = ServerGroup::start(&GroupOptions { servers: several.count, with_log: several.with_log, server })?;
        let addresses: Vec<String> = group.servers().iter().map(Server::address).collect();
        let collector = Collector::start(&CollectorOptions {
            bin_dir,
            node: "inject".into(),
            server: addresses[0].clone(),
            feed: Feed::Ebpf,
            ..CollectorOptions::default()
        })?;
        let watched = if group.nats().is_some() { addresses.len() } else { 1 };
        let watches =
            addresses[..watched].iter().map(|address| FindingWatch::start(address)).collect::<Result<_, _>>()?;
        Ok(Self { watches, collector, group })
    }

    /// What they publish, the collector's server first.
    pub fn watches(&mut self) -> &mut [FindingWatch] {
        &mut self.watches
    }

    /// Ends all.
    pub fn stop(mut self) -> Result<(), Error> {
        self.watches.clear();
        self.collector.stop()?;
        self.group.stop()
    }
}

/// What was measured with the log, or without it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Side {
    pub injections: usize,
    pub missing: usize,
    /// Latency at the server that the collector ships to.
    pub latency_us: Summary,
    /// Latency at the server that had the finding last; without a log there is none.
    pub elsewhere_latency_us: Option<Summary>,
}

/// Both. Keys are read by other programs: they stay.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Comparison {
    pub fault: String,
    pub servers: usize,
    pub without_log: Side,
    pub with_log: Side,
    /// Ratio of the medians at the collector's server: with the log by without it.
    pub p50_ratio: f64,
    pub p99_ratio: f64,
}

impl Side {
    fn of(turns: &[Series]) -> Self {
        let all = || turns.iter().flat_map(|series| &series.injections);
        let summary = |values: Vec<u64>| {
            let mut latencies = Latencies::default();
            values.iter().for_each(|us| latencies.record(*us, 1));
            latencies.summary()
        };
        let elsewhere: Vec<u64> = all().filter_map(|one| one.elsewhere_latency_us).collect();
        Self {
            injections: all().count(),
            missing: turns.iter().map(|series| series.missing).sum(),
            latency_us: summary(all().filter_map(|one| one.latency_us).collect()),
            elsewhere_latency_us: (!elsewhere.is_empty()).then(|| summary(elsewhere)),
        }
    }
}

/// Injects as often as `how_often` says in each turn, in `turns` turns of each kind.
pub fn compare(
    injector: &mut Injector,
    fault: Fault,
    how_often: (usize, Duration),
    turns: u16,
    servers: usize,
    mut each: impl FnMut(bool, &Measured) -> Result<(), Error>,
) -> Result<Comparison, Error> {
    if servers < 2 {
        return Err(Error::Invalid("one server has no log to compare: --servers must be at least 2".into()));
    }
    let (mut without, mut with) = (Vec::new(), Vec::new());
    for _ in 0..turns {
        for with_log in [false, true] {
            let mut own = OwnServers::start(SeveralServers { count: servers, with_log }, None)?;
            let series = measure::run(injector, fault, how_often, own.watches(), |one| each(with_log, one))?;
            own.stop()?;
            if with_log { &mut with } else { &mut without }.push(series);
        }
    }
    let (without_log, with_log) = (Side::of(&without), Side::of(&with));
    let ratio = |of: fn(&Summary) -> u64| of(&with_log.latency_us) as f64 / of(&without_log.latency_us).max(1) as f64;
    Ok(Comparison {
        fault: fault.name().into(),
        servers,
        p50_ratio: ratio(|summary| summary.p50),
        p99_ratio: ratio(|summary| summary.p99),
        without_log,
        with_log,
    })
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, side) in [("without the log", &self.without_log), ("with the log", &self.with_log)] {
            let found = side.injections - side.missing;
            writeln!(f, "{name:15}  {found} of {} found: {}", side.injections, side.latency_us)?;
            if let Some(elsewhere) = &side.elsewhere_latency_us {
                writeln!(f, "{:15}  at the last of {} servers: {elsewhere}", "", self.servers)?;
            }
        }
        write!(f, "{:15}  p50 {:.2}  p99 {:.2}", "ratio", self.p50_ratio, self.p99_ratio)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inject::Injection;

    fn turn(latencies: &[(Option<u64>, Option<u64>)]) -> Series {
        let measured = |&(latency_us, elsewhere_latency_us): &(Option<u64>, Option<u64>)| Measured {
            injection: Injection::default(),
            pattern: None,
            finding_id: None,
            latency_us,
            elsewhere_latency_us,
        };
        Series {
            fault: "kill".into(),
            injections: latencies.iter().map(measured).collect(),
            missing: latencies.iter().filter(|(latency, _)| latency.is_none()).count(),
            latency_us: Summary::default(),
            elsewhere_latency_us: None,
        }
    }

    #[test]
    fn turns_of_one_kind_are_taken_together() {
        let side = Side::of(&[turn(&[(Some(10), Some(30)), (None, None)]), turn(&[(Some(20), Some(50))])]);
        assert_eq!((side.injections, side.missing), (3, 1));
        assert_eq!((side.latency_us.p50, side.latency_us.max), (10, 20));
        assert_eq!(side.elsewhere_latency_us.expect("elsewhere").max, 50);
        assert_eq!(Side::of(&[turn(&[(Some(10), None)])]).elsewhere_latency_us, None);
    }
}
