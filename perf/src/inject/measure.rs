//! How long a finding takes: from the kernel's event to its arrival at a client, both on this host's `CLOCK_BOOTTIME`.

use std::fmt;
use std::time::Duration;

use serde::Serialize;
use tapio_wire::program::units::human_duration;

use super::{Fault, Injection, Injector};
use crate::client::FindingWatch;
use crate::clock::pause;
use crate::error::Error;
use crate::latency::{Latencies, Summary};

/// How long a finding is waited for.
pub const FINDING_LIMIT: Duration = Duration::from_secs(5);

/// An injection and the finding it led to.
#[derive(Clone, Debug, Serialize)]
pub struct Measured {
    #[serde(flatten)]
    pub injection: Injection,
    /// The finding's pattern; nothing when none came in time.
    pub pattern: Option<String>,
    pub finding_id: Option<String>,
    pub latency_us: Option<u64>,
    /// Latency at the last of the servers, where several are watched.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub elsewhere_latency_us: Option<u64>,
}

/// Several injections of one fault.
#[derive(Clone, Debug, Serialize)]
pub struct Series {
    pub fault: String,
    pub injections: Vec<Measured>,
    /// Injections whose finding did not come in time; 0 when findings were not waited for.
    pub missing: usize,
    /// Latency from the last event of a finding's evidence to its arrival here.
    pub latency_us: Summary,
    /// Latency at the last of the servers, where several are watched.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub elsewhere_latency_us: Option<Summary>,
}

/// Injects `repeat` times; waits for each finding at every server that is watched.
pub fn run(
    injector: &mut Injector,
    fault: Fault,
    (repeat, interval): (usize, Duration),
    watches: &mut [FindingWatch],
    mut each: impl FnMut(&Measured) -> Result<(), Error>,
) -> Result<Series, Error> {
    let mut series = Series {
        fault: fault.name().into(),
        injections: Vec::new(),
        missing: 0,
        latency_us: Summary::default(),
        elsewhere_latency_us: None,
    };
    let (mut latencies, mut elsewhere) = (Latencies::default(), Latencies::default());
    for number in 0..repeat {
        if number > 0 {
            pause(interval)?;
        }
        let injection = injector.inject(fault)?;
        let mut measured =
            Measured { injection, pattern: None, finding_id: None, latency_us: None, elsewhere_latency_us: None };
        let mut is_missing = false;
        for (index, watch) in watches.iter_mut().enumerate() {
            let found = wait(watch, &measured.injection)?;
            watch.forget();
            match found {
                Some((pattern, id, us)) if index == 0 => {
                    (measured.pattern, measured.finding_id, measured.latency_us) = (Some(pattern), Some(id), Some(us));
                }
                Some((.., us)) => {
                    let later = [measured.latency_us, measured.elsewhere_latency_us, Some(us)];
                    measured.elsewhere_latency_us = later.into_iter().max().flatten();
                }
                None => is_missing = true,
            }
        }
        if is_missing {
            measured.elsewhere_latency_us = None;
        }
        series.missing += usize::from(is_missing);
        measured.latency_us.into_iter().for_each(|us| latencies.record(us, 1));
        measured.elsewhere_latency_us.into_iter().for_each(|us| elsewhere.record(us, 1));
        each(&measured)?;
        series.injections.push(measured);
    }
    series.latency_us = latencies.summary();
    series.elsewhere_latency_us = (elsewhere.count() > 0).then(|| elsewhere.summary());
    Ok(series)
}

/// The first finding of the victim's death: pattern, id, microseconds.
fn wait(watch: &mut FindingWatch, injection: &Injection) -> Result<Option<(String, String, u64)>, Error> {
    let arrival =
        watch.wait(FINDING_LIMIT, |finding| finding.death.as_ref().is_some_and(|death| death.pid == injection.pid))?;
    Ok(arrival.map(|arrival| {
        let since = match arrival.finding.last_boottime_ns {
            0 => injection.died_ns,
            event_ns => event_ns,
        };
        let us = arrival.arrived_ns.saturating_sub(since) / 1000;
        (arrival.finding.pattern, arrival.finding.id, us)
    }))
}

impl fmt::Display for Measured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.injection)?;
        if let (Some(pattern), Some(us)) = (&self.pattern, self.latency_us) {
            write!(f, "; {pattern} found after {}", human_duration(us * 1000))?;
        }
        if let Some(us) = self.elsewhere_latency_us {
            write!(f, ", by all servers after {}", human_duration(us * 1000))?;
        }
        Ok(())
    }
}
