//! The command line of `tapio-perf`. Exit codes: 0 all is well, 1 a check failed, 2 it could not be run.

#![forbid(unsafe_code)]

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use tapio_perf::capacity::{self, Cluster, CostSource};
use tapio_perf::client::FindingWatch;
use tapio_perf::error::{Context, Error};
use tapio_perf::flood::{self, FloodOptions};
use tapio_perf::inject::own_servers::{self, OwnServers, TURNS_MAX};
use tapio_perf::inject::victim::{self, Victim};
use tapio_perf::inject::{Fault, InjectOptions, Injector, measure};
use tapio_perf::interrupt;
use tapio_perf::load::compare::{self, ROUNDS_MAX};
use tapio_perf::load::generator::Pace;
use tapio_perf::load::{self, LoadOptions, SeveralServers};
use tapio_perf::probes::{self, ProbesOptions};
use tapio_perf::processes::collector::Resources;
use tapio_perf::storm::{self, StormOptions};
use tapio_perf::truth::{self, TruthOptions};
use tapio_wire::program::units::{parse_bytes, parse_duration};

const CHECK_FAILED: u8 = 1;
const NOT_RUN: u8 = 2;

/// Loads Tapio, measures it, and makes faults for it to find.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Simulate nodes: real collectors fed through rings, a real server, and a check that every event is accounted for
    Load(LoadArguments),
    /// Make a fault for real, in throw-away cgroups of this host (needs root)
    Inject(InjectArguments),
    /// Measure what the probes cost on this kernel: each on a loop that fires it, and all together (needs root)
    Probes(ProbesArguments),
    /// Say how many servers, how much CPU, memory, disk and network a cluster asks for, from what events cost on this machine
    Capacity(CapacityArguments),
    /// Fork, exec and connect at this machine's limit under real probes, and check that every event is accounted for (needs root)
    Storm(StormArguments),
    /// Let containers flood this node with process events, and check that deaths of others are still found (needs root)
    Flood(FloodArguments),
    /// Cause deaths of every kind and check what is said of them: nothing may be explained wrongly with certainty (needs root)
    Truth(TruthArguments),
    #[command(name = victim::COMMAND, hide = true, subcommand)]
    Victim(Victim),
}

/// What nodes report.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum ProfileName {
    /// 55 % tcp, 10 % dns, 8 % each of block I/O, reclaim and failed system calls, 5 % run queue, 3 % packet drops, 3 % lethal
    Mixed,
}

#[derive(Args)]
struct LoadArguments {
    /// Simulated nodes, a collector process each
    #[arg(long, default_value_t = 1)]
    nodes: usize,
    /// Events a second over all nodes together, or max: as fast as the rings have room
    #[arg(long, default_value = "max")]
    rate: Pace,
    #[arg(long, default_value = "10s", value_parser = parse_duration)]
    duration: Duration,
    #[arg(long, value_enum, default_value_t = ProfileName::Mixed)]
    profile: ProfileName,
    /// Beside these, so many clues a second over all nodes: processes of the containers are killed, crash, run out of memory
    #[arg(long, value_name = "RATE", value_parser = clue_rate)]
    clues: Option<f64>,
    /// host:port of a running server; without it, one is started and stopped
    #[arg(long, conflicts_with = "servers")]
    server: Option<String>,
    #[command(flatten)]
    several: SeveralArguments,
    /// Run without the servers' log and with it in turn, so many times each, and say what it costs acknowledgements
    #[arg(
        long,
        value_name = "ROUNDS",
        num_args = 0..=1,
        default_missing_value = "3",
        requires = "servers",
        conflicts_with = "without_log",
        value_parser = clap::value_parser!(u16).range(1..=i64::from(ROUNDS_MAX))
    )]
    compare_log: Option<u16>,
    /// Containers of each node
    #[arg(long, default_value_t = 1000)]
    entities: usize,
    /// Size of each node's ring: a power of two
    #[arg(long, default_value = "8MiB", value_parser = parse_bytes)]
    ring: u64,
    /// The same seed makes the same events
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// grpc.batch_timeout of the collectors, like 100ms; default: theirs
    #[arg(long, value_parser = checked_duration)]
    batch_timeout: Option<String>,
    /// The CPU budget that each collector's governor holds, thousandths of a core; 0 for none
    #[arg(long, default_value_t = Resources::default().max_cpu_milli)]
    max_cpu_milli: u64,
    /// The memory budget of each collector
    #[arg(long, default_value_t = Resources::default().max_memory_mb)]
    max_memory_mb: u64,
    /// A source that each collector runs beside its ring; may be repeated (ebpf needs root; k8s goes by KUBECONFIG)
    #[arg(long, value_parser = ["ebpf", "systemd", "k8s"])]
    also: Vec<String>,
    /// Name of the only node, where it is to be that of a real one, whose pods are then watched; default: one of this run
    #[arg(long)]
    node_name: Option<String>,
    /// A further line of the server's configuration, like `correlation: {max_entities: 1000000}`; may be repeated
    #[arg(long, value_name = "YAML", conflicts_with = "server")]
    server_config: Vec<String>,
    /// Where tapio-collector and tapio-server are; default: beside this program
    #[arg(long)]
    bin_dir: Option<PathBuf>,
    /// Report as JSON
    #[arg(long)]
    json: bool,
}

/// How many servers are started.
#[derive(Args, Clone, Copy)]
struct SeveralArguments {
    /// Start so many servers, which share a log in a nats-server of their own; nodes ship to them by turns
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=10))]
    servers: Option<u8>,
    /// Let them share no log
    #[arg(long, requires = "servers")]
    without_log: bool,
}

impl SeveralArguments {
    fn several(self) -> Option<SeveralServers> {
        self.servers.map(|count| SeveralServers { count: count.into(), with_log: !self.without_log })
    }
}

/// The text, when it is a rate of clues.
fn clue_rate(text: &str) -> Result<f64, String> {
    match text.parse()? {
        Pace::PerSecond(rate) => Ok(rate),
        Pace::Max => Err("clues come at a rate, as 50000".into()),
    }
}

/// The text, when it is a duration.
fn checked_duration(text: &str) -> Result<String, String> {
    parse_duration(text).map(|_| text.to_owned())
}

#[derive(Args)]
struct InjectArguments {
    fault: Fault,
    /// The limit of a container that runs out of memory
    #[arg(long, default_value = "64MiB", value_parser = parse_bytes)]
    memory: u64,
    /// How long cgroups outlive the victim, for those who look at them
    #[arg(long, default_value = "200ms", value_parser = parse_duration)]
    keep_time: Duration,
    #[arg(long, default_value_t = 1)]
    repeat: usize,
    /// Between two injections
    #[arg(long, default_value = "1s", value_parser = parse_duration)]
    interval: Duration,
    /// host:port of the server whose findings are measured
    #[arg(long, default_value = "127.0.0.1:9090", conflicts_with = "servers")]
    server: String,
    /// Wait for the finding of each injection, and report how long it took
    #[arg(long)]
    measure: bool,
    #[command(flatten)]
    several: SeveralArguments,
    /// Measure without the servers' log and with it in turn, so many turns each of --repeat injections
    #[arg(
        long,
        value_name = "TURNS",
        num_args = 0..=1,
        default_missing_value = "2",
        requires = "servers",
        conflicts_with = "without_log",
        value_parser = clap::value_parser!(u16).range(1..=i64::from(TURNS_MAX))
    )]
    compare_log: Option<u16>,
    /// Report as JSON: one object
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct ProbesArguments {
    /// All measurements together; each has at least three rounds, however long they take
    #[arg(long, default_value = "2m", value_parser = parse_duration)]
    duration: Duration,
    /// An uninterrupted stretch of operations
    #[arg(long, default_value = "50ms", value_parser = parse_duration)]
    slice: Duration,
    /// Where files for block I/O and reclaim are made: on a disk
    #[arg(long, default_value_os_t = std::env::temp_dir())]
    directory: PathBuf,
    /// Only programs whose names contain this; may be repeated
    #[arg(long)]
    only: Vec<String>,
    /// End with exit code 1 when a goal is missed
    #[arg(long)]
    check: bool,
    /// Report as JSON
    #[arg(long)]
    json: bool,
}

/// How much a node has to report. These are assumptions: a node of yours says it in tapio_collector_events_emitted_total.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum NodeProfile {
    /// 20 events/s, and 1 more for each pod
    Quiet,
    /// 100 events/s, and 10 more for each pod
    Typical,
    /// 500 events/s, and 50 more for each pod
    Busy,
}

impl NodeProfile {
    fn events_per_second(self, pods: u64) -> f64 {
        let (node, pod) = match self {
            Self::Quiet => (20, 1),
            Self::Typical => (100, 10),
            Self::Busy => (500, 50),
        };
        f64::from(node) + f64::from(pod) * pods as f64
    }
}

#[derive(Args)]
struct CapacityArguments {
    #[arg(long)]
    nodes: u64,
    #[arg(long, default_value_t = 30)]
    pods_per_node: u64,
    #[arg(long, value_enum, default_value_t = NodeProfile::Typical)]
    profile: NodeProfile,
    /// Events a second of a node, instead of a profile's
    #[arg(long, value_name = "RATE")]
    events_per_node: Option<f64>,
    /// How many times more there may be at the peak
    #[arg(long, default_value_t = 4.0, value_name = "FACTOR")]
    peak: f64,
    /// How long events are kept
    #[arg(long, default_value = "24h", value_parser = parse_duration)]
    retention: Duration,
    /// Cores that one server may use: its CPU limit
    #[arg(long, default_value_t = 1.0, value_name = "CORES")]
    server_cores: f64,
    /// What of these may be used at the peak, up to 1
    #[arg(long, default_value_t = 0.6, value_name = "SHARE")]
    utilisation: f64,
    /// What the probes take in the kernel for an event: tapio-perf probes measures it
    #[arg(long, default_value_t = 400.0, value_name = "NS")]
    probe_ns: f64,
    /// A report of tapio-perf load --json, instead of measuring; may be repeated, best with different rates and numbers of nodes
    #[arg(long, value_name = "FILE")]
    measured: Vec<PathBuf>,
    /// Of each of the four runs that measure
    #[arg(long, default_value = "8s", value_parser = parse_duration)]
    duration: Duration,
    /// Where tapio-collector and tapio-server are; default: beside this program
    #[arg(long)]
    bin_dir: Option<PathBuf>,
    /// Report as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct StormArguments {
    #[arg(long, default_value = "10m", value_parser = parse_duration)]
    duration: Duration,
    /// Threads that make it; default: two for each core
    #[arg(long)]
    threads: Option<usize>,
    /// Where tapio-collector and tapio-server are; default: beside this program
    #[arg(long)]
    bin_dir: Option<PathBuf>,
    /// Report as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct FloodArguments {
    /// Deaths before the floods, for comparison
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u16).range(1..=10_000))]
    before: u16,
    /// Deaths beside the floods
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u16).range(1..=10_000))]
    kills: u16,
    /// Where tapio-collector and tapio-server are; default: beside this program
    #[arg(long)]
    bin_dir: Option<PathBuf>,
    /// Report as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct TruthArguments {
    /// Only scenarios whose names contain this; may be repeated
    #[arg(long, value_name = "NAME", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    only: Vec<String>,
    /// Only say which scenarios there are
    #[arg(long)]
    list: bool,
    /// Run the collector in a pid namespace of its own, as on a node that is a container itself (kind, k3d, minikube)
    #[arg(long)]
    pid_namespace: bool,
    /// The page whose table is compared, as docs/truth.md: what it calls right must be right. With TAPIO_UPDATE_DOCS=1 it is
    /// rewritten
    #[arg(long, value_name = "FILE", conflicts_with = "only")]
    page: Option<PathBuf>,
    /// Where tapio-collector and tapio-server are; default: beside this program
    #[arg(long)]
    bin_dir: Option<PathBuf>,
    /// Report as JSON
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    if let Err(error) = tapio_wire::program::descriptors::raise_limit() {
        eprintln!("tapio-perf: the limit of open files stays as it is: {error}");
    }
    let result = match Arguments::parse().command {
        // These must not start threads: a process that has left its pid namespace cannot.
        Command::Victim(victim) => victim::run(&victim).map(|code| code as u8),
        Command::Load(arguments) => interrupt::listen().and_then(|()| run_load(arguments)),
        Command::Probes(arguments) => interrupt::listen().and_then(|()| run_probes(arguments)),
        Command::Capacity(arguments) => interrupt::listen().and_then(|()| run_capacity(arguments)),
        Command::Storm(arguments) => interrupt::listen().and_then(|()| run_storm(arguments)),
        Command::Flood(arguments) => interrupt::listen().and_then(|()| run_flood(arguments)),
        Command::Truth(arguments) => interrupt::listen().and_then(|()| run_truth(arguments)),
        Command::Inject(arguments) => interrupt::listen().and_then(|()| run_inject(&arguments)),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("tapio-perf: {error}");
            ExitCode::from(NOT_RUN)
        }
    }
}

fn print_json(value: &impl serde::Serialize) -> Result<(), Error> {
    let text = serde_json::to_string_pretty(value).map_err(|error| Error::Invalid(error.to_string()))?;
    println!("{text}");
    Ok(())
}

fn run_load(arguments: LoadArguments) -> Result<u8, Error> {
    let ProfileName::Mixed = arguments.profile;
    let is_json = arguments.json;
    let options = LoadOptions {
        nodes: arguments.nodes,
        pace: arguments.rate,
        clues: arguments.clues,
        duration: arguments.duration,
        server: arguments.server,
        servers: arguments.several.several(),
        entities: arguments.entities,
        ring_bytes: arguments.ring as usize,
        seed: arguments.seed,
        bin_dir: arguments.bin_dir,
        batch_timeout: arguments.batch_timeout,
        resources: Resources { max_memory_mb: arguments.max_memory_mb, max_cpu_milli: arguments.max_cpu_milli },
        also: arguments.also,
        node_name: arguments.node_name,
        collector_config: String::new(),
        server_config: arguments.server_config.iter().map(|line| format!("{line}\n")).collect(),
    };
    let is_sound = match arguments.compare_log {
        Some(rounds) => {
            let comparison = compare::compare(&options, rounds, |with_log, report| {
                if !is_json {
                    println!("{} THE LOG\n{report}\n", if with_log { "WITH" } else { "WITHOUT" });
                }
            })?;
            print(is_json, &comparison)?;
            comparison.is_sound
        }
        None => {
            let report = load::run(&options)?;
            print(is_json, &report)?;
            report.is_sound()
        }
    };
    Ok(if is_sound { 0 } else { CHECK_FAILED })
}

fn print(as_json: bool, report: &(impl serde::Serialize + std::fmt::Display)) -> Result<(), Error> {
    if as_json {
        return print_json(report);
    }
    println!("{report}");
    Ok(())
}

fn run_probes(arguments: ProbesArguments) -> Result<u8, Error> {
    let report = probes::run(&ProbesOptions {
        duration: arguments.duration,
        slice: arguments.slice,
        directory: arguments.directory,
        only: arguments.only,
    })?;
    if arguments.json {
        print_json(&report)?;
    } else {
        println!("{report}");
    }
    Ok(if arguments.check && !report.are_goals_met { CHECK_FAILED } else { 0 })
}

fn run_capacity(arguments: CapacityArguments) -> Result<u8, Error> {
    let pods = arguments.pods_per_node;
    let cluster = Cluster {
        nodes: arguments.nodes,
        pods_per_node: pods,
        events_per_node: arguments.events_per_node.unwrap_or_else(|| arguments.profile.events_per_second(pods)),
        peak_factor: arguments.peak,
        retention_s: arguments.retention.as_secs(),
        server_cores: arguments.server_cores,
        utilisation: arguments.utilisation,
        probe_ns_per_event: arguments.probe_ns,
    };
    let source = if arguments.measured.is_empty() {
        CostSource::Runs { duration: arguments.duration, bin_dir: arguments.bin_dir }
    } else {
        CostSource::Files(arguments.measured)
    };
    let plan = capacity::run(&cluster, &source)?;
    if arguments.json {
        print_json(&plan)?;
    } else {
        print!("{plan}");
    }
    Ok(0)
}

fn run_storm(arguments: StormArguments) -> Result<u8, Error> {
    let report = storm::run(&StormOptions {
        duration: arguments.duration,
        threads: arguments.threads,
        bin_dir: arguments.bin_dir,
        is_quiet: arguments.json,
    })?;
    if arguments.json {
        print_json(&report)?;
    } else {
        println!("{report}");
    }
    Ok(if report.is_accounted_for { 0 } else { CHECK_FAILED })
}

fn run_flood(arguments: FloodArguments) -> Result<u8, Error> {
    let report = flood::run(&FloodOptions {
        before: arguments.before.into(),
        kills: arguments.kills.into(),
        bin_dir: arguments.bin_dir,
    })?;
    if arguments.json {
        print_json(&report)?;
    } else {
        println!("{report}");
    }
    Ok(if report.complaints.is_empty() { 0 } else { CHECK_FAILED })
}

fn run_truth(arguments: TruthArguments) -> Result<u8, Error> {
    if arguments.list {
        for scenario in truth::scenarios(&arguments.only) {
            let line = format!("{:40}  {:30}  {}", scenario.name, scenario.kind, scenario.expected());
            // Who has seen enough may go.
            if writeln!(std::io::stdout(), "{line}").is_err() {
                break;
            }
        }
        return Ok(0);
    }
    let report = truth::run(&TruthOptions {
        only: arguments.only,
        own_pid_namespace: arguments.pid_namespace,
        bin_dir: arguments.bin_dir,
        page: arguments.page,
        update: std::env::var_os("TAPIO_UPDATE_DOCS").is_some_and(|value| value == "1"),
        is_quiet: arguments.json,
    })?;
    if arguments.json {
        print_json(&report)?;
    } else {
        println!("{report}");
    }
    Ok(if report.is_true() { 0 } else { CHECK_FAILED })
}

fn run_inject(arguments: &InjectArguments) -> Result<u8, Error> {
    if arguments.repeat == 0 {
        return Err(Error::Invalid("--repeat must be at least 1".into()));
    }
    let several = arguments.several.several();
    if several.is_some() && !arguments.measure {
        return Err(Error::Invalid("--servers starts servers to measure their findings: add --measure".into()));
    }
    let mut injector = Injector::new(InjectOptions {
        memory_bytes: arguments.memory,
        keep: arguments.keep_time,
        program: std::env::current_exe().context(|| "find this executable".into())?,
    })?;
    let how_often = (arguments.repeat, arguments.interval);
    if let (Some(turns), Some(several)) = (arguments.compare_log, several) {
        let comparison =
            own_servers::compare(&mut injector, arguments.fault, how_often, turns, several.count, |with_log, one| {
                if !arguments.json {
                    println!("{} the log: {one}", if with_log { "with" } else { "without" });
                }
            })?;
        print(arguments.json, &comparison)?;
        let missing = comparison.without_log.missing + comparison.with_log.missing;
        return Ok(if missing > 0 { CHECK_FAILED } else { 0 });
    }
    let mut own = several.map(|several| OwnServers::start(several, None)).transpose()?;
    let mut watches = Vec::new();
    if arguments.measure && own.is_none() {
        watches.push(FindingWatch::start(&arguments.server)?);
    }
    let watched = match &mut own {
        Some(own) => own.watches(),
        None => watches.as_mut_slice(),
    };
    let series = measure::run(&mut injector, arguments.fault, how_often, watched, |measured| {
        if !arguments.json {
            println!("{measured}");
        }
    })?;
    own.map_or(Ok(()), OwnServers::stop)?;
    if arguments.json {
        match series.injections.as_slice() {
            [only] if !arguments.measure => print_json(&only.injection)?,
            _ => print_json(&series)?,
        }
    } else if arguments.measure {
        let found = series.injections.len() - series.missing;
        println!("{found} of {} found: {}", series.injections.len(), series.latency_us);
        if let Some(elsewhere) = &series.elsewhere_latency_us {
            println!("by all servers: {elsewhere}");
        }
    }
    if series.missing > 0 {
        eprintln!(
            "tapio-perf: {} of {} injections led to no finding within {} s",
            series.missing,
            series.injections.len(),
            measure::FINDING_LIMIT.as_secs()
        );
        return Ok(CHECK_FAILED);
    }
    Ok(0)
}
