//! What a load run found, for people and for machines.

use std::fmt;
use std::fs;

use serde::Serialize;

use crate::latency::Summary;
use crate::load::ledger::NodeLedger;

/// The machine a figure was measured on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Host {
    pub cores: usize,
    pub kernel: String,
    pub cpu_model: String,
    pub memory_bytes: u64,
}

impl Host {
    /// This machine.
    pub fn read() -> Self {
        let text = |path| fs::read_to_string(path).unwrap_or_default();
        let field = |text: &str, key: &str| {
            let line = text.lines().find(|line| line.starts_with(key))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        };
        let memory = field(&text("/proc/meminfo"), "MemTotal").unwrap_or_default();
        let kib: u64 = memory.strip_suffix(" kB").and_then(|kib| kib.trim().parse().ok()).unwrap_or(0);
        Self {
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            kernel: text("/proc/sys/kernel/osrelease").trim().to_owned(),
            cpu_model: field(&text("/proc/cpuinfo"), "model name").unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
            memory_bytes: kib * 1024,
        }
    }
}

/// What the collectors cost.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct CollectorCost {
    /// CPU time of all collectors by events archived.
    pub cpu_ns_per_event: f64,
    /// Of one collector, on average; 100 is one core for the whole run.
    pub cpu_percent_of_core: f64,
    /// The same without the start: from [`crate::load::WARM_UP`] to the generator's end, seen within 250 ms. [`None`] in a run too short for it.
    pub steady_cpu_percent_of_core: Option<f64>,
    /// Of the collector that had most; its peak.
    pub rss_bytes: u64,
}

/// What the server cost; all 0 when it is not on this host.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ServerCost {
    pub cpu_ns_per_event: f64,
    /// 100 is one core for the whole run.
    pub cpu_percent_of_core: f64,
    /// Its peak.
    pub rss_bytes: u64,
    /// At the end of the run.
    pub rss_end_bytes: u64,
    /// Entities that its shards remember, and those that had to make room.
    pub entities: u64,
    pub entities_evicted: u64,
}

/// A load run. Keys are read by other programs: they stay.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct LoadReport {
    pub nodes: usize,
    /// Events a second over all nodes, or `max`.
    pub rate: String,
    /// Events that were due in the run.
    pub events_offered: u64,
    /// Events that were brought forth, those that found no room included.
    pub events_emitted: u64,
    pub events_archived: u64,
    pub events_correlated: u64,
    pub events_dropped: u64,
    pub events_unexplained: u64,
    pub ledger_closes: bool,
    /// Archived events by the time until the pipeline was empty.
    pub events_per_second: f64,
    /// From the first event until the pipeline was empty.
    pub duration_s: f64,
    /// From an event's intended time to its durable acknowledgement.
    pub latency_us: Summary,
    /// From the sending of a frame to its acknowledgement.
    pub ack_latency_us: Summary,
    pub collector: CollectorCost,
    pub server: ServerCost,
    pub frames: u64,
    pub bytes_raw: u64,
    pub bytes_wire: u64,
    pub archive_bytes: u64,
    pub host: Host,
    /// The server's build.
    pub revision: String,
    /// Each node's account.
    pub ledger: Vec<NodeLedger>,
}

impl fmt::Display for LoadReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ratio = |over: u64, under: u64| over as f64 / under.max(1) as f64;
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        writeln!(
            f,
            "{} nodes, rate {}, {:.2} s, build {}, on {} cores of {}, Linux {}",
            self.nodes,
            self.rate,
            self.duration_s,
            self.revision,
            self.host.cores,
            self.host.cpu_model,
            self.host.kernel
        )?;
        writeln!(
            f,
            "events     offered {}  emitted {}  archived {}  correlated {}  dropped {}  unexplained {}",
            self.events_offered,
            self.events_emitted,
            self.events_archived,
            self.events_correlated,
            self.events_dropped,
            self.events_unexplained
        )?;
        writeln!(f, "throughput {:.0} events/s", self.events_per_second)?;
        writeln!(f, "event→ack  {}", self.latency_us)?;
        writeln!(f, "frame→ack  {}", self.ack_latency_us)?;
        writeln!(
            f,
            "collector  {:.0} ns CPU per event, {:.2} % of a core each{}, {:.1} MiB at the most",
            self.collector.cpu_ns_per_event,
            self.collector.cpu_percent_of_core,
            self.collector
                .steady_cpu_percent_of_core
                .map_or_else(String::new, |percent| format!(", {percent:.2} % once it runs")),
            mib(self.collector.rss_bytes)
        )?;
        writeln!(
            f,
            "server     {:.0} ns CPU per event, {:.0} % of a core, {:.0} MiB at the most, {:.0} MiB at the end, {} entities, {} evicted",
            self.server.cpu_ns_per_event,
            self.server.cpu_percent_of_core,
            mib(self.server.rss_bytes),
            mib(self.server.rss_end_bytes),
            self.server.entities,
            self.server.entities_evicted
        )?;
        writeln!(
            f,
            "frames     {}, {:.0} events each, {:.1} bytes an event on the wire, compressed {:.2} times",
            self.frames,
            ratio(self.events_archived, self.frames),
            ratio(self.bytes_wire, self.events_archived),
            ratio(self.bytes_raw, self.bytes_wire)
        )?;
        writeln!(
            f,
            "archive    {:.1} MiB, {:.1} bytes an event",
            mib(self.archive_bytes),
            ratio(self.archive_bytes, self.events_archived)
        )?;
        let open: Vec<&NodeLedger> = self.ledger.iter().filter(|ledger| !ledger.closes()).collect();
        if open.is_empty() && self.ledger_closes {
            return write!(f, "ledger     closes on all {} nodes", self.nodes);
        }
        write!(f, "ledger     DOES NOT CLOSE on {} of {} nodes", open.len(), self.nodes)?;
        for ledger in open.iter().take(20) {
            write!(f, "\n  {ledger}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{Host, LoadReport};
    use crate::load::ledger::NodeLedger;

    #[test]
    fn the_keys_are_the_promised_ones() {
        let value = serde_json::to_value(LoadReport::default()).expect("it serialises");
        let keys = |value: &serde_json::Value| -> Vec<String> {
            let object = value.as_object().expect("an object");
            let mut keys: Vec<String> = object.keys().cloned().collect();
            keys.sort();
            keys
        };
        assert_eq!(
            keys(&value),
            [
                "ack_latency_us",
                "archive_bytes",
                "bytes_raw",
                "bytes_wire",
                "collector",
                "duration_s",
                "events_archived",
                "events_correlated",
                "events_dropped",
                "events_emitted",
                "events_offered",
                "events_per_second",
                "events_unexplained",
                "frames",
                "host",
                "latency_us",
                "ledger",
                "ledger_closes",
                "nodes",
                "rate",
                "revision",
                "server",
            ]
        );
        for latency in ["latency_us", "ack_latency_us"] {
            assert_eq!(keys(&value[latency]), ["max", "p50", "p90", "p99", "p999"], "{latency}");
        }
        assert_eq!(
            keys(&value["collector"]),
            ["cpu_ns_per_event", "cpu_percent_of_core", "rss_bytes", "steady_cpu_percent_of_core"]
        );
        let of_server =
            ["cpu_ns_per_event", "cpu_percent_of_core", "entities", "entities_evicted", "rss_bytes", "rss_end_bytes"];
        assert_eq!(keys(&value["server"]), of_server);
        assert_eq!(keys(&value["host"]), ["cores", "cpu_model", "kernel", "memory_bytes"]);
    }

    #[test]
    fn an_open_ledger_names_the_node() {
        let ledger = NodeLedger { node: "load-3".into(), emitted: 5, unexplained: 5, ..NodeLedger::default() };
        let report = LoadReport { nodes: 1, ledger: vec![ledger], ..LoadReport::default() };
        let text = report.to_string();
        assert!(text.contains("DOES NOT CLOSE on 1 of 1") && text.contains("load-3: emitted 5"), "{text}");
    }

    #[test]
    fn the_host_is_described() {
        let host = Host::read();
        assert!(host.cores > 0 && host.memory_bytes > 0 && !host.kernel.is_empty());
    }
}
