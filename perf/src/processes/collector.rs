//! A real `tapio-collector` with a configuration, a health port and a ring socket of its own.

use std::fmt::Write;
use std::fs;
use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use tempfile::TempDir;

use super::{Program, bin_dir, binary, free_port, http};
use crate::error::{Context, Error};

/// Where a collector gets its events from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Feed {
    /// Memfd rings of local processes.
    #[default]
    Shm,
    /// The kernel: needs root.
    Ebpf,
    /// The kernel and the Kubernetes API, by the kubeconfig that `KUBECONFIG` names: needs root.
    Kube,
}

/// What a collector is started with.
#[derive(Clone, Debug, Default)]
pub struct CollectorOptions {
    /// Where the programs are; beside this executable when not given.
    pub bin_dir: Option<PathBuf>,
    /// The node's name.
    pub node: String,
    /// `host:port` of the server.
    pub server: String,
    pub feed: Feed,
    /// Sources beside that, by their names.
    pub also: Vec<String>,
    /// `resources.max_memory_mb` and `max_cpu_milli`.
    pub resources: Resources,
    /// Further keys of `grpc:`, each after a comma.
    pub extra_grpc: String,
    /// Further lines of `collector.yaml`.
    pub extra_config: String,
    /// Further keys of `collectors: ebpf:`, each after a comma.
    pub extra_ebpf: String,
    /// More of `collectors.k8s`, with a comma before.
    pub extra_k8s: String,
    /// Further keys of `collector:`, each after a comma.
    pub extra_collector: String,
    /// Runs it in a pid namespace and with its own procfs, as on a node that is a container itself. It ends by SIGKILL
    /// only.
    pub own_pid_namespace: bool,
    /// Path of the node's `/proc`, if it is not at its place.
    pub host_proc: Option<PathBuf>,
}

/// What a collector may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resources {
    pub max_memory_mb: u64,
    /// Thousandths of a core; 0 for no limit.
    pub max_cpu_milli: u64,
}

impl Default for Resources {
    fn default() -> Self {
        Self { max_memory_mb: 256, max_cpu_milli: 0 }
    }
}

/// What `GET /latency` says.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct LatencyReport {
    /// Latencies from an event's time to the durable acknowledgement: pairs of microseconds and number of events.
    pub event_to_ack_us: Vec<(u64, u64)>,
    /// Latencies from the sending of a frame to its acknowledgement: pairs of microseconds and number of frames.
    pub frame_to_ack_us: Vec<(u64, u64)>,
    pub frames: u64,
    /// Bytes before compression.
    pub bytes_raw: u64,
    /// Bytes as they travelled.
    pub bytes_wire: u64,
}

/// A collector that ends when this is dropped. Port and socket outlive a restart.
pub struct Collector {
    // Before the folder: the process ends before its files go.
    program: Program,
    socket: PathBuf,
    node: String,
    port: u16,
    _folder: TempDir,
}

impl Deref for Collector {
    type Target = Program;

    fn deref(&self) -> &Program {
        &self.program
    }
}

impl DerefMut for Collector {
    fn deref_mut(&mut self) -> &mut Program {
        &mut self.program
    }
}

impl Collector {
    /// Starts a collector and waits until it is ready.
    pub fn start(options: &CollectorOptions) -> Result<Self, Error> {
        let mut collector = Self::prepare(options)?;
        collector.spawn()?;
        collector.wait_ready()?;
        Ok(collector)
    }

    /// Writes the configuration and starts nothing yet.
    pub fn prepare(options: &CollectorOptions) -> Result<Self, Error> {
        let binary = binary("tapio-collector", &bin_dir(options.bin_dir.as_deref())?)?;
        let folder = tempfile::Builder::new()
            .prefix("tapio-perf-collector-")
            .tempdir()
            .context(|| "make a temporary folder".into())?;
        let (port, socket) = (free_port()?, folder.path().join("rings.sock"));
        let config = folder.path().join("collector.yaml");
        fs::write(&config, config_text(options, &socket, port)).context(|| format!("write {}", config.display()))?;
        let name = format!("tapio-collector of {}", options.node);
        let mut program = Program::new(name, binary, config, folder.path().join("collector.log"), port);
        if let Some(root) = &options.host_proc {
            program.set_environment("HOST_PROC", root.clone());
        }
        if options.own_pid_namespace {
            program.set_launcher(&["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--"]);
        }
        Ok(Self { program, socket, node: options.node.clone(), port, _folder: folder })
    }

    /// The node's name.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// Where rings are handed over.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The port of `/readyz`, `/metrics` and `/latency`.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// What it measured so far.
    pub fn latency(&self) -> Result<LatencyReport, Error> {
        let wrong = |message: String| Error::Http { port: self.port, path: "/latency".into(), message };
        let (status, body) = http::get(self.port, "/latency")?;
        if status != 200 {
            return Err(wrong(format!("status {status}: {}", body.trim())));
        }
        serde_json::from_str(&body).map_err(|error| wrong(error.to_string()))
    }
}

/// A `collector.yaml` for this host.
pub fn config_text(options: &CollectorOptions, socket: &Path, port: u16) -> String {
    let (enabled, source) = match options.feed {
        Feed::Shm => ("shm", format!("shm: {{enabled: true, socket: \"{}\"}}", socket.display())),
        Feed::Ebpf => ("ebpf", format!("ebpf: {{enabled: true{}}}", options.extra_ebpf)),
        Feed::Kube => (
            "ebpf\", \"k8s",
            format!("ebpf: {{enabled: true{}}}, k8s: {{in_cluster: false{}}}", options.extra_ebpf, options.extra_k8s),
        ),
    };
    let source =
        if options.also.iter().any(|also| also == "k8s") { source + ", k8s: {in_cluster: false}" } else { source };
    let enabled: String =
        [enabled].into_iter().chain(options.also.iter().map(String::as_str)).collect::<Vec<_>>().join("\", \"");
    let Resources { max_memory_mb, max_cpu_milli } = options.resources;
    let mut text = format!(
        "collector: {{enabled_collectors: [\"{enabled}\"], node_name: \"{}\", max_events_per_sec: 0{}}}\n\
         grpc: {{server_endpoints: [\"{}\"]{}}}\n\
         resources: {{max_memory_mb: {max_memory_mb}, max_cpu_milli: {max_cpu_milli}}}\n\
         collectors: {{{source}}}\n\
         health: {{port: {port}}}\n\
         logging: {{level: warn}}\n",
        options.node, options.extra_collector, options.server, options.extra_grpc
    );
    let _ = write!(text, "{}", options.extra_config);
    text
}
