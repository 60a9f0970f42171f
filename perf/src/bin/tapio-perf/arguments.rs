//! The command line's arguments. Their comments are the help that it prints.

use std::path::PathBuf;
use std::time::Duration;

use clap::builder::NonEmptyStringValueParser;
use clap::{Args, Parser, Subcommand, ValueEnum};
use tapio_perf::inject::Fault;
use tapio_perf::inject::own_servers::TURNS_MAX;
use tapio_perf::inject::victim::{self, Victim};
use tapio_perf::load::SeveralServers;
use tapio_perf::load::compare::ROUNDS_MAX;
use tapio_perf::load::generator::Pace;
use tapio_perf::processes::collector::Resources;
use tapio_wire::program::units::{parse_bytes, parse_duration};

/// Loads Tapio, measures it, and makes faults for it to find.
#[derive(Parser)]
#[command(version)]
pub struct Arguments {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand)]
pub enum Command {
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
pub enum ProfileName {
    /// 55 % tcp, 10 % dns, 8 % each of block I/O, reclaim and failed system calls, 5 % run queue, 3 % packet drops, 3 % lethal
    Mixed,
}

#[derive(Args)]
pub struct LoadArguments {
    /// Simulated nodes, a collector process each
    #[arg(long, default_value_t = 1)]
    pub nodes: usize,
    /// Events a second over all nodes together, or max: as fast as the rings have room
    #[arg(long, default_value = "max")]
    pub rate: Pace,
    #[arg(long, default_value = "10s", value_parser = parse_duration)]
    pub duration: Duration,
    #[arg(long, value_enum, default_value_t = ProfileName::Mixed)]
    pub profile: ProfileName,
    /// Beside these, so many clues a second over all nodes: processes of the containers are killed, crash, run out of memory
    #[arg(long, value_name = "RATE", value_parser = clue_rate)]
    pub clues: Option<f64>,
    /// host:port of a running server; without it, one is started and stopped
    #[arg(long, conflicts_with = "servers")]
    pub server: Option<String>,
    #[command(flatten)]
    pub several: SeveralArguments,
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
    pub compare_log: Option<u16>,
    /// Containers of each node
    #[arg(long, default_value_t = 1000)]
    pub entities: usize,
    /// Size of each node's ring: a power of two
    #[arg(long, default_value = "8MiB", value_parser = parse_bytes)]
    pub ring: u64,
    /// The same seed makes the same events
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// grpc.batch_timeout of the collectors, like 100ms; default: theirs
    #[arg(long, value_parser = checked_duration)]
    pub batch_timeout: Option<String>,
    /// The CPU budget that each collector's governor holds, thousandths of a core; 0 for none
    #[arg(long, default_value_t = Resources::default().max_cpu_milli)]
    pub max_cpu_milli: u64,
    /// The memory budget of each collector
    #[arg(long, default_value_t = Resources::default().max_memory_mb)]
    pub max_memory_mb: u64,
    /// A source that each collector runs beside its ring; may be repeated (ebpf needs root; k8s goes by KUBECONFIG)
    #[arg(long, value_parser = ["ebpf", "systemd", "k8s"])]
    pub also: Vec<String>,
    /// Name of the only node, where it is to be that of a real one, whose pods are then watched; default: one of this run
    #[arg(long, value_parser = NonEmptyStringValueParser::new())]
    pub node_name: Option<String>,
    /// A further line of the server's configuration, like `correlation: {max_entities: 1000000}`; may be repeated
    #[arg(long, value_name = "YAML", conflicts_with = "server")]
    pub server_config: Vec<String>,
    /// Where tapio-collector and tapio-server are; default: beside this program
    #[arg(long)]
    pub bin_dir: Option<PathBuf>,
    /// Report as JSON
    #[arg(long)]
    pub json: bool,
}

/// How many servers are started.
#[derive(Args, Clone, Copy)]
pub struct SeveralArguments {
    /// Start so many servers, which share a log in a nats-server of their own; nodes ship to them round robin
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=10))]
    pub servers: Option<u8>,
    /// Let them share no log
    #[arg(long, requires = "servers")]
    pub without_log: bool,
}

impl SeveralArguments {
    pub fn several(self) -> Option<SeveralServers> {
        self.servers.map(|count| SeveralServers { count: count.into(), with_log: !self.without_log })
    }
}

/// The text, when it is a rate of clues.
pub fn clue_rate(text: &str) -> Result<f64, String> {
    match text.parse()? {
        Pace::PerSecond(rate) => Ok(rate),
        Pace::Max => Err("clues come at a rate, as 50000".into()),
    }
}

/// The text, when it is a duration.
pub fn checked_duration(text: &str) -> Result<String, String> {
    parse_duration(text).map(|_| text.to_owned())
}

#[derive(Args)]
pub struct InjectArguments {
    pub fault: Fault,
    /// The limit of a container that runs out of memory
    #[arg(long, default_value = "64MiB", value_parser = parse_bytes)]
    pub memory: u64,
    /// How long cgroups outlive the victim, for those who look at them
    #[arg(long, default_value = "200ms", value_parser = parse_duration)]
    pub keep_time: Duration,
    #[arg(long, default_value_t = 1)]
    pub repeat: usize,
    /// Between two injections
    #[arg(long, default_value = "1s", value_parser = parse_duration)]
    pub interval: Duration,
    /// host:port of the server whose findings are measured
    #[arg(long, default_value = "127.0.0.1:9090", conflicts_with = "servers")]
    pub server: String,
    /// Wait for the finding of each injection, and report how long it took
    #[arg(long)]
    pub measure: bool,
    #[command(flatten)]
    pub several: SeveralArguments,
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
    pub compare_log: Option<u16>,
    /// Report as JSON: one object
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub struct ProbesArguments {
    /// All measurements together; each has at least three rounds, however long they take
    #[arg(long, default_value = "2m", value_parser = parse_duration)]
    pub duration: Duration,
    /// An uninterrupted stretch of operations
    #[arg(long, default_value = "50ms", value_parser = parse_duration)]
    pub slice: Duration,
    /// Where files for block I/O and reclaim are made: on a disk
    #[arg(long, default_value_os_t = std::env::temp_dir())]
    pub directory: PathBuf,
    /// Only programs whose names contain this; may be repeated
    #[arg(long, value_name = "NAME", value_parser = NonEmptyStringValueParser::new())]
    pub only: Vec<String>,
    /// End with exit code 1 when a goal is missed
    #[arg(long)]
    pub check: bool,
    /// Report as JSON
    #[arg(long)]
    pub json: bool,
}

/// How much a node has to report. These are assumptions: a node of yours says it in tapio_collector_events_emitted_total.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum NodeProfile {
    /// 20 events/s, and 1 more for each pod
    Quiet,
    /// 100 events/s, and 10 more for each pod
    Typical,
    /// 500 events/s, and 50 more for each pod
    Busy,
}

impl NodeProfile {
    pub fn events_per_second(self, pods: u64) -> f64 {
        let (node, pod) = match self {
            Self::Quiet => (20, 1),
            Self::Typical => (100, 10),
            Self::Busy => (500, 50),
        };
        f64::from(node) + f64::from(pod) * pods as f64
    }
}

#[derive(Args)]
pub struct CapacityArguments {
    #[arg(long)]
    pub nodes: u64,
    #[arg(long, default_value_t = 30)]
    pub pods_per_node: u64,
    #[arg(long, value_enum, default_value_t = NodeProfile::Typical)]
    pub profile: NodeProfile,
    /// Events a second of a node, instead of a profile's
    #[arg(long, value_name = "RATE")]
    pub events_per_node: Option<f64>,
    /// How many times more there may be at the peak
    #[arg(long, default_value_t = 4.0, value_name = "FACTOR")]
    pub peak: f64,
    /// How long events are kept
    #[arg(long, default_value = "24h", value_parser = parse_duration)]
    pub retention: Duration,
    /// Cores that one server may use: its CPU limit
    #[arg(long, default_value_t = 1.0, value_name = "CORES")]
    pub server_cores: f64,
    /// What of these may be used at the peak, up to 1
    #[arg(long, default_value_t = 0.6, value_name = "SHARE")]
    pub utilisation: f64,
    /// What the probes take in the kernel for an event: tapio-perf probes measures it
    #[arg(long, default_value_t = 400.0, value_name = "NS")]
    pub probe_ns: f64,
    /// A report of tapio-perf load --json, instead of measuring; may be repeated, best with different rates and numbers of nodes
    #[arg(long, value_name = "FILE")]
    pub measured: Vec<PathBuf>,
    /// Of each of the four runs that measure
    #[arg(long, default_value = "8s", value_parser = parse_duration)]
    pub duration: Duration,
    /// Where tapio-collector and tapio-server are; default: beside this program
    #[arg(long)]
    pub bin_dir: Option<PathBuf>,
    /// Report as JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub struct StormArguments {
    #[arg(long, default_value = "10m", value_parser = parse_duration)]
    pub duration: Duration,
    /// Threads that make it; default: two for each core
    #[arg(long)]
    pub threads: Option<usize>,
    /// Where tapio-collector and tapio-server are; default: beside this program
    #[arg(long)]
    pub bin_dir: Option<PathBuf>,
    /// Report as JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub struct FloodArguments {
    /// Deaths before the floods, for comparison
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u16).range(1..=10_000))]
    pub before: u16,
    /// Deaths beside the floods
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u16).range(1..=10_000))]
    pub kills: u16,
    /// Where tapio-collector and tapio-server are; default: beside this program
    #[arg(long)]
    pub bin_dir: Option<PathBuf>,
    /// Report as JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub struct TruthArguments {
    /// Only scenarios whose names contain this; may be repeated
    #[arg(long, value_name = "NAME", value_parser = NonEmptyStringValueParser::new())]
    pub only: Vec<String>,
    /// Only say which scenarios there are
    #[arg(long)]
    pub list: bool,
    /// Run the collector in a pid namespace of its own, as on a node that is a container itself (kind, k3d, minikube)
    #[arg(long)]
    pub pid_namespace: bool,
    /// The page whose table is compared, as docs/truth.md: what it calls right must be right. With TAPIO_UPDATE_DOCS=1 it is
    /// rewritten
    #[arg(long, value_name = "FILE", conflicts_with = "only")]
    pub page: Option<PathBuf>,
    /// Where tapio-collector and tapio-server are; default: beside this program
    #[arg(long)]
    pub bin_dir: Option<PathBuf>,
    /// Report as JSON
    #[arg(long)]
    pub json: bool,
}
