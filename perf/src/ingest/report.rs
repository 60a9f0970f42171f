//! What a run of ingest says, for programs and for people.

use std::fmt;

use serde::Serialize;

use super::feed::Timings;
use super::streams::Sent;
use super::{FrameRate, IngestOptions, Measured};
use crate::host::Host;
use crate::latency::Summary;
use crate::processes::usage::ThreadUsage;

/// What the server used between warm-up and end.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ServerCost {
    pub cpu_us_per_frame: f64,
    pub cpu_ns_per_event: f64,
    pub cpu_percent_of_core: f64,
    /// The most it ever was.
    pub rss_bytes: u64,
    /// Where it was kept; empty for everywhere.
    pub cores: String,
    pub threads: Vec<ThreadCost>,
}

/// What the threads of one name used.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ThreadCost {
    pub name: String,
    pub cpu_us_per_frame: f64,
    /// How often they fell asleep, and so were woken.
    pub wakeups_per_frame: f64,
}

/// A run's report. Keys are read by other programs: they stay.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct IngestReport {
    pub nodes: usize,
    /// Frames a second that each node was to send, or max.
    pub frame_rate: String,
    pub events_per_frame: f64,
    pub describes: bool,
    pub signals_per_second: f64,
    /// Between warm-up and end; these are acknowledged in that time.
    pub duration_s: f64,
    pub events_per_second: f64,
    pub frames_per_second: f64,
    pub bytes_per_frame: f64,
    pub server: ServerCost,
    /// CPU of this program: the load side, in percent of a core.
    pub load_cpu_percent_of_core: f64,
    /// From a frame's intended time to its acknowledgement.
    pub ack_latency_us: Summary,
    /// From a frame's intended time to its leaving. Where this is large, the load side was late, or the server gave no credit.
    pub send_lag_us: Summary,
    pub events_emitted: u64,
    pub events_archived: u64,
    /// Every event was acknowledged, and the server's books have it.
    pub ledger_closes: bool,
    /// The accounts of nodes whose ledger does not close.
    pub open_ledgers: Vec<String>,
    pub entities: u64,
    pub findings: u64,
    pub host: Host,
    /// The server's build.
    pub revision: String,
}

impl IngestReport {
    pub(super) fn new(options: &IngestOptions, measured: &Measured) -> Self {
        let Measured { before, after } = measured;
        let seconds = match (before.at, after.at) {
            (Some(before), Some(after)) => (after - before).as_secs_f64(),
            _ => 0.0,
        };
        let (frames, events) = (after.frames - before.frames, after.events - before.events);
        let cpu_ns = after.server.cpu_ns.saturating_sub(before.server.cpu_ns) as f64;
        let load_ns = after.load.cpu_ns.saturating_sub(before.load.cpu_ns) as f64;
        let a_frame = 1.0 / frames.max(1) as f64;
        let thread = |thread: &ThreadUsage| {
            let earlier = before.threads.iter().find(|earlier| earlier.name == thread.name);
            let (cpu_ns, sleeps) = earlier.map_or((0, 0), |earlier| (earlier.cpu_ns, earlier.sleeps));
            ThreadCost {
                name: thread.name.clone(),
                cpu_us_per_frame: thread.cpu_ns.saturating_sub(cpu_ns) as f64 / 1e3 * a_frame,
                wakeups_per_frame: thread.sleeps.saturating_sub(sleeps) as f64 * a_frame,
            }
        };
        Self {
            nodes: options.nodes,
            frame_rate: match options.frame_rate {
                FrameRate::Max => "max".into(),
                FrameRate::PerSecond(rate) => rate.to_string(),
            },
            events_per_frame: events as f64 * a_frame,
            describes: options.describe,
            signals_per_second: options.signals,
            duration_s: seconds,
            events_per_second: events as f64 / seconds.max(1e-9),
            frames_per_second: frames as f64 / seconds.max(1e-9),
            server: ServerCost {
                cpu_us_per_frame: cpu_ns / 1e3 * a_frame,
                cpu_ns_per_event: cpu_ns / events.max(1) as f64,
                cpu_percent_of_core: cpu_ns / seconds.max(1e-9) / 1e7,
                rss_bytes: after.server.rss_peak_bytes,
                cores: options.server_cores.as_ref().map_or_else(String::new, ToString::to_string),
                threads: after.threads.iter().map(thread).collect(),
            },
            load_cpu_percent_of_core: load_ns / seconds.max(1e-9) / 1e7,
            host: Host::read(),
            ..Self::default()
        }
    }

    pub(super) fn add_sent(&mut self, sent: &[Sent], timings: &Timings) {
        self.ack_latency_us = timings.latency.summary();
        self.send_lag_us = timings.lag.summary();
        self.events_emitted = sent.iter().map(|sent| sent.flow.emitted).sum();
        let sum = |of: fn(&Sent) -> u64| sent.iter().map(of).sum::<u64>();
        let (bytes, frames) = (sum(|sent| sent.flow.bytes), sum(|sent| sent.flow.acked_frames));
        self.bytes_per_frame = bytes as f64 / frames.max(1) as f64;
    }
}

impl fmt::Display for IngestReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let server = &self.server;
        let rate =
            if self.frame_rate == "max" { "as fast as it goes".into() } else { format!("{}/s", self.frame_rate) };
        writeln!(
            f,
            "{} nodes, frames {rate} each{}, {:.1} s on {} cores of {}, Linux {}",
            self.nodes,
            if self.describes { ", each describes its entities" } else { "" },
            self.duration_s,
            self.host.cores,
            self.host.cpu_model,
            self.host.kernel
        )?;
        writeln!(
            f,
            "archived   {:.0} events/s in {:.0} frames/s of {:.1} events and {:.0} bytes; {} entities, {} findings",
            self.events_per_second,
            self.frames_per_second,
            self.events_per_frame,
            self.bytes_per_frame,
            self.entities,
            self.findings
        )?;
        writeln!(
            f,
            "server     {:.1} µs CPU a frame, {:.0} ns an event, {:.1} % of a core, {:.0} MiB at the most{}",
            server.cpu_us_per_frame,
            server.cpu_ns_per_event,
            server.cpu_percent_of_core,
            server.rss_bytes as f64 / f64::from(1 << 20),
            if server.cores.is_empty() { String::new() } else { format!(", on core {}", server.cores) }
        )?;
        for thread in &server.threads {
            writeln!(
                f,
                "           {:<16} {:>7.2} µs, {:>6.3} wakeups a frame",
                thread.name, thread.cpu_us_per_frame, thread.wakeups_per_frame
            )?;
        }
        writeln!(f, "to the ack {}", self.ack_latency_us)?;
        writeln!(f, "to leaving {}", self.send_lag_us)?;
        writeln!(f, "load side  {:.1} % of a core", self.load_cpu_percent_of_core)?;
        match self.ledger_closes {
            true => write!(f, "ledger     closes: {} events emitted and archived", self.events_emitted),
            false => {
                write!(f, "ledger     OPEN: {} emitted, {} archived", self.events_emitted, self.events_archived)?;
                self.open_ledgers.iter().take(10).try_for_each(|ledger| write!(f, "\n           {ledger}"))
            }
        }
    }
}
