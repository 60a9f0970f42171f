//! A plan for people.

use std::fmt;

use tapio_wire::program::units::{human_bytes, human_duration};

use super::plan::Plan;
use super::server_line::FitPoint;

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.fmt_costs(f)?;
        self.fmt_rows(f)?;
        self.warnings.iter().try_for_each(|warning| writeln!(f, "Note: {warning}"))
    }
}

impl Plan {
    /// What the plan rests on.
    fn fmt_costs(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cluster = &self.cluster;
        writeln!(
            f,
            "For {} nodes with {} pods each, {:.0} events/s a node ({:.0} in all, {:.0} at the peak of {} times), kept {}",
            cluster.nodes,
            cluster.pods_per_node,
            cluster.events_per_node,
            self.events_per_second,
            self.events_per_second_peak,
            cluster.peak_factor,
            days(cluster.retention_s)
        )?;
        writeln!(
            f,
            "Measured in {} runs on {} cores of {}, Linux {}",
            self.costs.runs, self.host.cores, self.host.cpu_model, self.host.kernel
        )?;
        let line = |name, line: super::cost::Line| {
            format!(
                "  {name:<10} {:.1} ms CPU a second for being there, {:.0} ns an event",
                line.idle / 1e6,
                line.event
            )
        };
        writeln!(
            f,
            "{}; and {:.0} ns in the kernel",
            line("collector", self.costs.collector),
            cluster.probe_ns_per_event
        )?;
        let server = self.costs.server;
        writeln!(
            f,
            "  {:<10} {:.1} ms CPU a second for being there, {:.3} ms for each node, {:.1} µs a frame, {:.0} ns an event",
            "server",
            server.idle / 1e6,
            server.node / 1e6,
            server.frame / 1e3,
            server.event
        )?;
        for point in &self.costs.fit.points {
            writeln!(f, "             {}", met(point))?;
        }
        writeln!(f, "  {:<10} misses these by {:.0} % at the most", "the line", self.costs.fit.error_percent_max)?;
        if let Some(check) = &self.check {
            writeln!(f, "  {:<10} {}", "checked", met(&check.point))?;
            writeln!(
                f,
                "             {:.0} of {} nodes, {:.1} % of the frames served, p99 to the ack {}, {}",
                check.point.nodes,
                check.nodes_wanted,
                check.served * 100.0,
                human_duration(check.ack_p99_us * 1000),
                human_bytes(check.rss_bytes)
            )?;
        }
        writeln!(
            f,
            "  {:<10} {:.0} bytes a second of a node for being there, {:.1} bytes an event\n",
            "wire", self.costs.wire.idle, self.costs.wire.event
        )
    }

    fn fmt_rows(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:<36} {:>14}", "SERVER", "")?;
        let mut row = |name: &str, value: String| writeln!(f, "  {name:<36} {value:>16}");
        row("replicas, one of which may be missing", self.server_replicas.to_string())?;
        row("nodes that one can take at the peak", self.server_nodes_max.to_string())?;
        row("CPU request, average", format!("{} m", self.server.cpu_milli))?;
        row("CPU at the peak, one missing", format!("{} m", self.server.cpu_milli_peak))?;
        row("memory request", format!("{} MiB", self.server.memory_request_mib))?;
        row("memory limit", format!("{} MiB", self.server.memory_limit_mib))?;
        row("archive.max_bytes of each", human_bytes(self.archive_max_bytes))?;
        row("archive, all of them, a day", human_bytes(self.archive_bytes_per_day))?;
        row("network in, all of them, peak", format!("{}/s", human_bytes(self.server_bytes_per_second_peak)))?;
        writeln!(f, "{:<36} {:>14}", "COLLECTOR, each node", "")?;
        let mut row = |name: &str, value: String| writeln!(f, "  {name:<36} {value:>16}");
        row("CPU request, average, probes included", format!("{} m", self.collector.cpu_milli))?;
        row("CPU at the peak", format!("{} m", self.collector.cpu_milli_peak))?;
        row("memory request", format!("{} MiB", self.collector.memory_request_mib))?;
        row("memory limit", format!("{} MiB", self.collector.memory_limit_mib))?;
        row("network out", format!("{}/s", human_bytes(self.node_bytes_per_second)))?;
        row("network out, peak", format!("{}/s", human_bytes(self.node_bytes_per_second_peak)))
    }
}

/// A run beside the line.
fn met(point: &FitPoint) -> String {
    format!(
        "{:.0} nodes, {:.0} frames/s, {:.0} events/s: {:.0} m, by the line {:.0} m ({:+.0} %)",
        point.nodes,
        point.frames_per_second,
        point.events_per_second,
        point.measured_cpu_milli,
        point.fitted_cpu_milli,
        point.error_percent
    )
}

fn days(seconds: u64) -> String {
    let hours = seconds as f64 / 3600.0;
    if hours >= 48.0 { format!("{:.0} days", hours / 24.0) } else { format!("{hours:.0} hours") }
}

#[cfg(test)]
mod tests {
    use super::days;

    #[test]
    fn times_are_shown_in_a_fitting_unit() {
        assert_eq!((days(86_400).as_str(), days(7 * 86_400).as_str()), ("24 hours", "7 days"));
    }
}
