//! Workloads that flood their node with process events, beside deaths of others: each death is still found.
//!
//! In: how many deaths. Out: a [`FloodReport`]. What must hold: every death that is caused beside the floods is found,
//! and each flooding container has a finding. No lethal record finds its ring full, and every event is archived or
//! declared lost.
//!
//! Three containers run loops. One sends a signal to a process that ignores it, in a cgroup below its own. One starts processes that end
//! at once. One makes cgroups and removes them. Before that, the same deaths are caused beside three loops that only take CPU time.

use std::fmt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::Serialize;
use tapio_wire::program::units::human_duration;
use tapio_wire::service::Finding;

use crate::client::{Client, FindingWatch};
use crate::clock::wait_for;
use crate::error::Error;
use crate::host::Host;
use crate::inject::cgroup::Cgroup;
use crate::inject::{Fault, InjectOptions, Injector, crash, measure};
use crate::interrupt;
use crate::latency::Summary;
use crate::processes::collector::Feed;
use crate::processes::metrics::Metrics;
use crate::processes::usage;
use crate::processes::{Collector, CollectorOptions, Server, ServerOptions, bin_dir, binary};
use crate::truth::stage::{Actor, ContainerCgroups, Pids, Stage};

/// How long a loop may take to be bounded, and its finding to come.
const LIMIT: Duration = Duration::from_secs(30);
/// How long cgroups outlive their container.
const KEEP: Duration = Duration::from_millis(200);
const SPIN: &str = "while :; do :; done";
/// The folder that the first and the third loop make.
const FOLDER: &str = "flood";

/// What to run.
#[derive(Clone, Debug, Default)]
pub struct FloodOptions {
    /// Deaths before the floods, and beside them.
    pub before: usize,
    pub kills: usize,
    pub bin_dir: Option<PathBuf>,
}

/// What became of it. Keys are read by other programs: they stay.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct FloodReport {
    pub host: Host,
    pub before: usize,
    pub kills: usize,
    /// Deaths without a finding within 5 s.
    pub quiet_missing: usize,
    pub missing: usize,
    /// Latency from the last event of a finding's evidence to its arrival here.
    pub quiet_latency_us: Summary,
    pub latency_us: Summary,
    /// While the floods went on.
    pub seconds: f64,
    pub left_out_per_second: f64,
    pub archived_bytes_per_second: f64,
    /// CPU of the collector, as a share of one core.
    pub collector_cpu_share: f64,
    pub floods: usize,
    /// Floods that have a finding.
    pub floods_found: usize,
    pub lethal_ring_full: u64,
    pub unexplained: i64,
    /// What does not hold; empty when all does.
    pub complaints: Vec<String>,
}

/// A loop in a container. Dropped in this order: the loop ends, what it left behind goes, then its container.
struct Flood {
    _actor: Actor,
    _below: Cgroup,
    cgroups: ContainerCgroups,
}

impl Flood {
    fn start(stage: &mut Stage, script: impl Fn(&str) -> String) -> Result<Self, Error> {
        let cgroups = stage.cgroups(None)?;
        // The loop makes it.
        let below = Cgroup::adopt(cgroups.folder().join(FOLDER));
        let actor = stage.start(&cgroups, Pids::Own, &script(&below.path().display().to_string()))?;
        Ok(Self { _actor: actor, _below: below, cgroups })
    }
}

/// One that sends signals, one that starts processes, one that makes cgroups.
fn start_floods(stage: &mut Stage) -> Result<[Flood; 3], Error> {
    let quiet = stage.program("quiet", crash::quiet_program())?;
    let (start, make) = (stage.play("start-processes"), stage.play("make-folders"));
    Ok([
        Flood::start(stage, |folder| {
            format!(
                "mkdir {folder}; sh -c 'trap \"\" HUP; echo $$ >{folder}/cgroup.procs; exec sleep 1000' & t=$!; \
                 while ! grep -qx $t {folder}/cgroup.procs; do :; done; while :; do kill -HUP $t; done"
            )
        })?,
        Flood::start(stage, |_| format!("exec {start} --program {quiet}"))?,
        Flood::start(stage, |folder| format!("exec {make} --program {folder}"))?,
    ])
}

/// Waits until no event is held or unexplained.
fn await_closed_ledger(client: &mut Client) -> Result<i64, Error> {
    wait_for("the ledger's closing", LIMIT, |seen| {
        let status = client.status()?;
        let sources = || status.nodes.iter().flat_map(|node| &node.epochs).flat_map(|epoch| &epoch.sources);
        let unexplained: i64 = sources().map(|source| source.unexplained).sum();
        let held: u64 = sources().map(|source| source.held).sum();
        *seen = format!("{unexplained} unexplained, {held} held");
        Ok((unexplained == 0 && held == 0).then_some(unexplained))
    })
}

/// Which of these containers have a finding that calls them a flood.
fn flooding_containers(findings: &[Finding], containers: &[&str]) -> Vec<String> {
    let of_floods = findings.iter().filter(|finding| finding.pattern == "flood");
    let named = of_floods.filter_map(|finding| finding.entity.as_ref()).map(|entity| entity.container_id.clone());
    let mut found: Vec<String> = named.filter(|id| containers.contains(&&**id)).collect();
    found.sort();
    found.dedup();
    found
}

/// Runs it.
pub fn run(options: &FloodOptions) -> Result<FloodReport, Error> {
    let program = binary("tapio-perf", &bin_dir(options.bin_dir.as_deref())?)?;
    let inject = InjectOptions { memory_bytes: 32 << 20, keep: KEEP, program: program.clone() };
    let mut stage = Stage::new(Injector::new(inject)?, program)?;
    let mut server = Server::start(&ServerOptions { bin_dir: options.bin_dir.clone(), ..ServerOptions::default() })?;
    let mut collector = Collector::start(&CollectorOptions {
        bin_dir: options.bin_dir.clone(),
        node: "flood".into(),
        server: server.address(),
        feed: Feed::Ebpf,
        ..CollectorOptions::default()
    })?;
    let mut client = Client::connect(&server.address())?;
    let mut watch = FindingWatch::start(&server.address())?;
    let kill = |stage: &mut Stage, watch: &mut FindingWatch, times: usize| {
        measure::run(&mut stage.injector, Fault::Kill, (times, Duration::ZERO), std::slice::from_mut(watch), |_| Ok(()))
    };
    // As busy as the floods make the machine, but without a flood.
    let busy = [SPIN; 3].map(|script| Flood::start(&mut stage, |_| script.into()));
    let quiet = kill(&mut stage, &mut watch, options.before)?;
    drop(busy);

    let floods = start_floods(&mut stage)?;
    let left_out = |collector: &Collector| -> Result<u64, Error> {
        let metrics = Metrics::read(collector.port())?;
        Ok(metrics.sum("tapio_collector_events_dropped_total", &["stage=\"ring\"", "reason=\"rate_limited\""]))
    };
    wait_for("a flood to be bounded", LIMIT, |seen| {
        let count = left_out(&collector)?;
        *seen = format!("{count} left out");
        Ok((count > 0).then_some(()))
    })?;
    interrupt::check()?;
    let bytes = |server: &Server| {
        Ok::<_, Error>(Metrics::read(server.http_port())?.sum("tapio_server_archive_written_bytes_total", &[]))
    };
    let cpu_ns = |collector: &Collector| collector.pid().and_then(usage::read).map_or(0, |usage| usage.cpu_ns);
    let (began, bytes_before, left_before, cpu_before) =
        (Instant::now(), bytes(&server)?, left_out(&collector)?, cpu_ns(&collector));
    let flooded = kill(&mut stage, &mut watch, options.kills)?;
    let seconds = began.elapsed().as_secs_f64();
    let per_second = |count: u64| count as f64 / seconds;
    let mut report = FloodReport {
        host: Host::read(),
        before: options.before,
        kills: options.kills,
        quiet_missing: quiet.missing,
        missing: flooded.missing,
        quiet_latency_us: quiet.latency_us,
        latency_us: flooded.latency_us,
        seconds,
        left_out_per_second: per_second(left_out(&collector)?.saturating_sub(left_before)),
        archived_bytes_per_second: per_second(bytes(&server)?.saturating_sub(bytes_before)),
        collector_cpu_share: cpu_ns(&collector).saturating_sub(cpu_before) as f64 / 1e9 / seconds,
        ..FloodReport::default()
    };
    let containers: Vec<&str> = floods.iter().map(|flood| &*flood.cgroups.name.container_id).collect();
    let mut flooding = Vec::new();
    let all_found = wait_for("a finding for each flood", LIMIT, |seen| {
        flooding = flooding_containers(&client.findings()?, &containers);
        *seen = format!("{} of {}", flooding.len(), containers.len());
        Ok((flooding.len() == containers.len()).then_some(()))
    });
    match all_found {
        // The judgement counts them.
        Ok(()) | Err(Error::TimedOut { .. }) => {}
        Err(error) => return Err(error),
    }
    (report.floods, report.floods_found) = (containers.len(), flooding.len());
    drop(floods);
    report.lethal_ring_full = Metrics::read(collector.port())?.sum("tapio_collector_lethal_ring_full_total", &[]);
    collector.stop()?;
    report.unexplained = await_closed_ledger(&mut client)?;
    server.stop()?;
    report.judge();
    Ok(report)
}

impl FloodReport {
    fn judge(&mut self) {
        let mut complain = |holds: bool, text: String| {
            if !holds {
                self.complaints.push(text);
            }
        };
        complain(self.quiet_missing == 0, format!("{} deaths were not found before the floods", self.quiet_missing));
        complain(self.missing == 0, format!("{} of {} deaths were not found", self.missing, self.kills));
        let (found, floods) = (self.floods_found, self.floods);
        complain(found == floods, format!("{found} of {floods} floods were found"));
        complain(self.lethal_ring_full == 0, format!("{} lethal records found their ring full", self.lethal_ring_full));
        complain(
            self.archived_bytes_per_second < 1_048_576.0,
            format!("the archive grew by {:.0} bytes a second", self.archived_bytes_per_second),
        );
    }
}

impl fmt::Display for FloodReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "before: {} of {} deaths found; p50 {}, p99 {}",
            self.before - self.quiet_missing,
            self.before,
            human_duration(self.quiet_latency_us.p50 * 1000),
            human_duration(self.quiet_latency_us.p99 * 1000)
        )?;
        writeln!(
            f,
            "floods: {} of {} deaths found; p50 {}, p99 {}; {} of {} floods found",
            self.kills - self.missing,
            self.kills,
            human_duration(self.latency_us.p50 * 1000),
            human_duration(self.latency_us.p99 * 1000),
            self.floods_found,
            self.floods
        )?;
        write!(
            f,
            "{:.0} s: {:.0} events a second left out, {:.0} bytes a second archived, collector {:.2} % of a core; {} found \
             the lethal ring full",
            self.seconds,
            self.left_out_per_second,
            self.archived_bytes_per_second,
            self.collector_cpu_share * 100.0,
            self.lethal_ring_full
        )?;
        for complaint in &self.complaints {
            write!(f, "\nDOES NOT HOLD: {complaint}")?;
        }
        Ok(())
    }
}
