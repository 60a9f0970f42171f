//! The command line's arguments. Their comments are the help that it prints.

use std::path::PathBuf;
use std::time::Duration;

use clap::builder::NonEmptyStringValueParser;
use clap::{Args, Parser, Subcommand, ValueEnum};
use tapio_perf::ingest::{Cores, FrameRate, IngestOptions};
use tapio_perf::inject::Fault;
use tapio_perf::inject::own_servers::TURNS_MAX;
use tapio_perf::inject::victim::{self, Victim};
use tapio_perf::load::SeveralServers;
use tapio_perf::load::compare::ROUNDS_MAX;
use tapio_perf::load::generator::Pace;
use tapio_perf::processes::collector::Resources;
use tapio_wire::program::units::{parse_bytes, parse_duration};

/// Loads Tapio, measures it, and causes faults for it to find.
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
    /// Measure a server by frames that were packed before: what a frame, an event, a node costs it
    Ingest(IngestArguments),
    /// Measure how long answers out of an archive take, cold and warm; the archive is built first
    Query(QueryArguments),
    /// Cause a real fault, in throw-away cgroups of this host (needs root)
    Inject(InjectArguments),
    /// Measure what the probes cost on this kernel: each on a loop that fires it, and all together (needs root)
    Probes(ProbesArguments),
    /// Estimate servers, CPU, memory, disk and network of a cluster from what events cost on this machine
    Capacity(CapacityArguments),
    /// Fork, exec and connect at this machine's limit under real probes, and check that every event is accounted for (needs root)
    Storm(StormArguments),
    /// Let containers flood this node with process events, and check that deaths of others are still found (needs root)
    Flood(FloodArguments),
    /// Cause deaths of every kind and check their findings: none may be wrong and certain (needs root)
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
    /// Additional clues a second over all nodes: processes of the containers are killed, crash, run out of memory
    #[arg(long, value_name = "RATE", value_parser = clue_rate)]
    pub clues: Option<f64>,
    /// host:port of a running server; without it, one is started and stopped
    #[arg(long, conflicts_with = "servers")]
    pub server: Option<String>,
    #[command(flatten)]
    pub several: SeveralArguments,
    /// Run this many times without the servers' log and with it, in turn, and report what it costs acknowledgements
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
    /// Seed of the events: the same seed makes the same events
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// grpc.batch_timeout of the collectors, like 100ms; default: theirs
    #[arg(long, value_parser = checked_duration)]
    pub batch_timeout: Option<String>,
    /// CPU budget of each collector's governor, thousandths of a core; 0 for none
    #[arg(long, default_value_t = Resources::default().max_cpu_milli)]
    pub max_cpu_milli: u64,
    /// Memory budget of each collector
    #[arg(long, default_value_t = Resources::default().max_memory_mb)]
    pub max_memory_mb: u64,
    /// Source that each collector runs beside its ring; may be repeated (ebpf needs root; k8s uses KUBECONFIG)
    #[arg(long, value_parser = ["ebpf", "systemd", "k8s"])]
    pub also: Vec<String>,
    /// Name of the only node, to watch the pods of a real node; default: a name of this run
    #[arg(long, value_parser = NonEmptyStringValueParser::new())]
    pub node_name: Option<String>,
    /// Additional line of the server's configuration, like `correlation: {max_entities: 1000000}`; may be repeated
    #[arg(long, value_name = "YAML", conflicts_with = "server")]
    pub server_config: Vec<String>,
    /// Directory of tapio-collector and tapio-server; default: beside this program
    #[arg(long)]
    pub bin_dir: Option<PathBuf>,
    /// Report as JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub struct IngestArguments {
    /// Streams, a node each
    #[arg(long, default_value_t = IngestOptions::default().nodes)]
    pub nodes: usize,
    /// Frames a second of each node, or max: as fast as the server gives credit
    #[arg(long, default_value = "5")]
    pub frames_per_sec: FrameRate,
    #[arg(long, default_value_t = IngestOptions::default().events_per_frame, conflicts_with = "archive")]
    pub events_per_frame: usize,
    /// Duration of the measured part; a second more comes before it
    #[arg(long, default_value = "10s", value_parser = parse_duration)]
    pub duration: Duration,
    /// Let each frame describe its entities
    #[arg(long)]
    pub describe: bool,
    /// Additional signals a second over all nodes, each with the death that it causes, in a frame of its own
    #[arg(long, value_name = "RATE", default_value_t = 0.0)]
    pub signals: f64,
    /// Containers of each node
    #[arg(long, default_value_t = IngestOptions::default().entities)]
    pub entities: usize,
    /// Directory of an archive whose first frames are sent, instead of frames of the mixed profile's bulk events
    #[arg(long, value_name = "DIR")]
    pub archive: Option<PathBuf>,
    /// Cores that the server is kept on, like 0 or 1-3; the load side then keeps to the others. Default: all for both
    #[arg(long, value_name = "LIST")]
    pub server_cores: Option<Cores>,
    /// Additional line of the server's configuration, like `correlation: {max_entities: 1000000}`; may be repeated
    #[arg(long, value_name = "YAML")]
    pub server_config: Vec<String>,
    /// Directory for the server's archive; default: a temporary one
    #[arg(long, value_name = "DIR")]
    pub archive_dir: Option<PathBuf>,
    /// Directory of tapio-server; default: beside this program
    #[arg(long)]
    pub bin_dir: Option<PathBuf>,
    /// Report as JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub struct QueryArguments {
    /// Events of the archive; a million take some 25 MB
    #[arg(long, default_value_t = 4_000_000)]
    pub events: u64,
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub nodes: u16,
    /// Warm answers to each question; the median is reported
    #[arg(long, default_value_t = 5)]
    pub repeats: usize,
    /// Cores that the server is kept on, like 0 or 1-3; default: all
    #[arg(long, value_name = "LIST")]
    pub server_cores: Option<Cores>,
    /// Directory of tapio-server and tapioctl; default: beside this program
    #[arg(long)]
    pub bin_dir: Option<PathBuf>,
    /// Report as JSON
    #[arg(long)]
    pub json: bool,
}

/// How many servers are started.
#[derive(Args, Clone, Copy)]
pub struct SeveralArguments {
    /// Number of servers to start; they share a log in their own nats-server, and nodes ship to them round robin
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=10))]
    pub servers: Option<u8>,
    /// Start the servers without a shared log
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
    /// Memory limit of a container that runs out of memory
    #[arg(long, default_value = "64MiB", value_parser = parse_bytes)]
    pub memory: u64,
    /// Time that cgroups outlive the victim
    #[arg(long, default_value = "200ms", value_parser = parse_duration)]
    pub keep_time: Duration,
    #[arg(long, default_value_t = 1)]
    pub repeat: usize,
    /// Time between two injections
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
    /// Measure without the servers' log and with it in turn: this many turns, each of --repeat injections
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
    /// Duration of all measurements together; each has at least three rounds, however long they take
    #[arg(long, default_value = "2m", value_parser = parse_duration)]
    pub duration: Duration,
    /// Duration of an uninterrupted run of operations
    #[arg(long, default_value = "50ms", value_parser = parse_duration)]
    pub slice: Duration,
    /// Directory on a disk for the files of block I/O and reclaim
    #[arg(long, default_value_os_t = std::env::temp_dir())]
    pub directory: PathBuf,
    /// Measure only programs whose names contain this; may be repeated
    #[arg(long, value_name = "NAME", value_parser = NonEmptyStringValueParser::new())]
    pub only: Vec<String>,
    /// Exit with code 1 if a goal is missed
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
    /// Factor of the peak over the average
    #[arg(long, default_value_t = 4.0, value_name = "FACTOR")]
    pub peak: f64,
    /// Time that events are kept
    #[arg(long, default_value = "24h", value_parser = parse_duration)]
    pub retention: Duration,
    /// Cores that one server may use: its CPU limit
    #[arg(long, default_value_t = 1.0, value_name = "CORES")]
    pub server_cores: f64,
    /// Share of these cores that may be used at the peak, up to 1
    #[arg(long, default_value_t = 0.6, value_name = "SHARE")]
    pub utilisation: f64,
    /// Nanoseconds that the probes take in the kernel for an event, as tapio-perf probes measures
    #[arg(long, default_value_t = 400.0, value_name = "NS")]
    pub probe_ns: f64,
    /// A report of tapio-perf load --json (for collectors) or ingest --json (for servers), instead of measuring; may be repeated
    #[arg(long, value_name = "FILE")]
    pub measured: Vec<PathBuf>,
    /// Duration of each of the ten measuring runs; the last one checks the plan
    #[arg(long, default_value = "8s", value_parser = parse_duration)]
    pub duration: Duration,
    /// Directory of tapio-collector and tapio-server; default: beside this program
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
    /// Threads that make the storm; default: two for each core
    #[arg(long)]
    pub threads: Option<usize>,
    /// Directory of tapio-collector and tapio-server; default: beside this program
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
    /// Directory of tapio-collector and tapio-server; default: beside this program
    #[arg(long)]
    pub bin_dir: Option<PathBuf>,
    /// Report as JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub struct TruthArguments {
    /// Run only scenarios whose names contain this; may be repeated
    #[arg(long, value_name = "NAME", value_parser = NonEmptyStringValueParser::new())]
    pub only: Vec<String>,
    /// List the scenarios and exit
    #[arg(long)]
    pub list: bool,
    /// Run the collector in a pid namespace of its own, as on a node that is a container itself (kind, k3d, minikube)
    #[arg(long)]
    pub pid_namespace: bool,
    /// Page whose table is compared, as docs/truth.md: what it calls right must be right. TAPIO_UPDATE_DOCS=1 rewrites it
    #[arg(long, value_name = "FILE", conflicts_with = "only")]
    pub page: Option<PathBuf>,
    /// Directory of tapio-collector and tapio-server; default: beside this program
    #[arg(long)]
    pub bin_dir: Option<PathBuf>,
    /// Report as JSON
    #[arg(long)]
    pub json: bool,
}
