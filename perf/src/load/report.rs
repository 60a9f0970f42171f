//! What a load run found, for people and for machines.

use std::fmt;

use serde::Serialize;
use tapio_wire::program::units::human_duration;

use super::ledger::NodeLedger;
use super::servers::{Agreement, ClusterReport};
use crate::host::Host;
use crate::latency::Summary;

/// What the collectors cost.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct CollectorCost {
    /// CPU time of all collectors by events archived.
    pub cpu_ns_per_event: f64,
    /// CPU of one collector, on average; 100 is one core for the whole run.
    pub cpu_percent_of_core: f64,
    /// CPU of one collector without the start: from [`crate::load::WARM_UP`] to the generator's end, seen within 250
    /// ms. [`None`] in a run too short for it.
    pub steady_cpu_percent_of_core: Option<f64>,
    /// Peak memory of the collector that had most.
    pub rss_bytes: u64,
}

/// What the server cost, or several together; all 0 when it is not on this host.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ServerCost {
    pub cpu_ns_per_event: f64,
    /// 100 is one core for the whole run.
    pub cpu_percent_of_core: f64,
    /// Peak memory; with several servers, the largest one's.
    pub rss_bytes: u64,
    /// Memory at the end of the run.
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
    /// Clues of deaths a second beside these; missing where there were none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clues_per_second: Option<f64>,
    /// Events that were due in the run.
    pub events_offered: u64,
    /// Events produced, including those that found no space.
    pub events_emitted: u64,
    pub events_archived: u64,
    pub events_correlated: u64,
    pub events_dropped: u64,
    pub events_unexplained: u64,
    pub ledger_closes: bool,
    /// Archived events by the time until the pipeline was empty.
    pub events_per_second: f64,
    /// Time from the first event until the pipeline was empty.
    pub duration_s: f64,
    /// Latency from an event's intended time to its durable acknowledgement.
    pub latency_us: Summary,
    /// Latency from the sending of a frame to its acknowledgement.
    pub ack_latency_us: Summary,
    pub collector: CollectorCost,
    pub server: ServerCost,
    pub frames: u64,
    pub bytes_raw: u64,
    pub bytes_wire: u64,
    /// Bytes written to segments; 0 where the server does not say.
    pub archive_bytes: u64,
    pub host: Host,
    /// The server's build.
    pub revision: String,
    /// Each node's account.
    pub ledger: Vec<NodeLedger>,
    /// What each of several servers did; missing where `--servers` was not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster: Option<ClusterReport>,
}

impl LoadReport {
    /// The ledger closes, and servers that share a log found the same.
    pub fn is_sound(&self) -> bool {
        let findings = self.cluster.as_ref().and_then(|cluster| cluster.findings.as_ref());
        self.ledger_closes && findings.is_none_or(|agreement| agreement.equal)
    }
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

impl fmt::Display for ClusterReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for share in &self.servers {
            writeln!(
                f,
                "{}   {} nodes, {:.0} events/s, {:.0} % of a core, {:.0} MiB at the most, {} findings{}",
                share.server,
                share.nodes,
                share.events_per_second,
                share.cpu_percent_of_core,
                mib(share.rss_bytes),
                share.findings,
                if share.ledger_closes { "" } else { ", LEDGER OPEN" }
            )?;
            let Some(log) = &share.log else { continue };
            writeln!(
                f,
                "           wrote {} messages, found {} clues; behind by {} messages ({}) and {} in the finder's queue at the most",
                log.messages_written,
                log.clues_found,
                log.behind_messages_max,
                human_duration(log.behind_ms_max * 1_000_000),
                log.finder_queue_max
            )?;
            if log.was_alone || log.rebuilds + log.entries_left_out + log.unanswered > 0 {
                writeln!(
                    f,
                    "           DISTURBED: {}{} rebuilds, {} entries found no room, {} samples without an answer",
                    if log.was_alone { "went on alone, " } else { "" },
                    log.rebuilds,
                    log.entries_left_out,
                    log.unanswered
                )?;
            }
        }
        match &self.log {
            Some(log) => writeln!(
                f,
                "log        {} messages, {:.1} MiB in, {:.1} MiB out; NATS {:.0} % of a core, {:.0} MiB at the most",
                log.messages,
                mib(log.bytes_in),
                mib(log.bytes_out),
                log.nats_cpu_percent_of_core,
                mib(log.nats_rss_bytes)
            )?,
            None => writeln!(f, "log        none: each server finds what its own nodes report")?,
        }
        self.findings.as_ref().map_or(Ok(()), |agreement| write!(f, "{agreement}"))
    }
}

impl fmt::Display for Agreement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.equal {
            return writeln!(
                f,
                "findings   {} on all servers, {} after the end",
                self.count,
                human_duration(self.after_ms * 1_000_000)
            );
        }
        let what = if self.equal_by_id { "the same ids, not the same content" } else { "NOT THE SAME" };
        writeln!(f, "findings   {what}; {} are the same on all servers", self.count)?;
        self.differences.iter().try_for_each(|difference| writeln!(f, "  {difference}"))
    }
}

impl fmt::Display for ServerCost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A process that runs has memory.
        if self.rss_bytes == 0 {
            write!(f, "not measured: it was started elsewhere (--server)")?;
        } else {
            write!(
                f,
                "{:.0} ns CPU per event, {:.0} % of a core, {:.0} MiB at the most, {:.0} MiB at the end",
                self.cpu_ns_per_event,
                self.cpu_percent_of_core,
                mib(self.rss_bytes),
                mib(self.rss_end_bytes)
            )?;
        }
        write!(f, ", {} entities, {} evicted", self.entities, self.entities_evicted)
    }
}

impl fmt::Display for LoadReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ratio = |over: u64, under: u64| over as f64 / under.max(1) as f64;
        let clues = self.clues_per_second.map_or_else(String::new, |rate| format!(" and {rate} clues of deaths"));
        writeln!(
            f,
            "{} nodes, rate {}{clues}, {:.2} s, build {}, on {} cores of {}, Linux {}",
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
        writeln!(f, "server     {}", self.server)?;
        writeln!(
            f,
            "frames     {}, {:.0} events each, {:.1} bytes an event on the wire, compressed {:.2} times",
            self.frames,
            ratio(self.events_archived, self.frames),
            ratio(self.bytes_wire, self.events_archived),
            ratio(self.bytes_raw, self.bytes_wire)
        )?;
        match self.archive_bytes {
            0 => writeln!(f, "archive    not measured: this server does not say what it wrote")?,
            bytes => {
                let of_event = ratio(bytes, self.events_archived);
                writeln!(f, "archive    {:.1} MiB, {of_event:.1} bytes an event", mib(bytes))?;
            }
        }
        if let Some(cluster) = &self.cluster {
            write!(f, "{cluster}")?;
        }
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
    use super::LoadReport;
    use crate::host::Host;
    use crate::load::ledger::NodeLedger;
    use crate::load::servers::{Agreement, ClusterReport, LogCost, ReaderShare, ServerShare};

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
    fn several_servers_add_their_keys() {
        let share =
            ServerShare { server: "server-1".into(), log: Some(ReaderShare::default()), ..ServerShare::default() };
        let cluster = ClusterReport {
            servers: vec![share],
            log: Some(LogCost::default()),
            findings: Some(Agreement { differences: vec!["x".into()], ..Agreement::default() }),
        };
        let report = LoadReport {
            clues_per_second: Some(5.0),
            ledger_closes: true,
            cluster: Some(cluster),
            ..LoadReport::default()
        };
        let value = serde_json::to_value(&report).expect("it serialises");
        let keys = |value: &serde_json::Value| -> Vec<String> {
            value.as_object().expect("an object").keys().cloned().collect()
        };
        assert_eq!(value["clues_per_second"], 5.0);
        assert_eq!(keys(&value["cluster"]), ["findings", "log", "servers"]);
        let share = &value["cluster"]["servers"][0];
        for key in ["server", "nodes", "events_per_second", "cpu_percent_of_core", "rss_bytes", "ledger_closes"] {
            assert!(!share[key].is_null(), "{key}: {share}");
        }
        for key in ["behind_messages_max", "behind_ms_max", "finder_queue_max", "clues_found", "was_alone"] {
            assert!(!share["log"][key].is_null(), "{key}: {share}");
        }
        assert!(!report.is_sound(), "they did not find the same");
        let text = report.to_string();
        for part in ["and 5 clues", "server-1", "NATS", "NOT THE SAME"] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }

    #[test]
    fn what_was_not_measured_is_no_zero() {
        let line = |report: &LoadReport, begin: &str| {
            let text = report.to_string();
            let line = text.lines().find(|line| line.starts_with(begin)).map(str::to_owned);
            line.unwrap_or_else(|| panic!("{begin}: {text}"))
        };
        let mut report = LoadReport { events_archived: 10, ..LoadReport::default() };
        report.server.entities = 7;
        for (begin, says) in [("server", "not measured"), ("server", "7 entities"), ("archive", "not measured")] {
            let line = line(&report, begin);
            assert!(line.contains(says) && !line.contains(" 0 ns") && !line.contains("0.0 MiB"), "{line}");
        }
        report.archive_bytes = 1 << 20;
        (report.server.rss_bytes, report.server.cpu_ns_per_event) = (3 << 20, 400.0);
        assert!(line(&report, "archive").contains("1.0 MiB, 104857.6 bytes an event"));
        assert!(line(&report, "server").contains("400 ns CPU per event, 0 % of a core, 3 MiB at the most"));
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
