//! Shared by the end-to-end tests: requirements and how a test says that it was skipped, a node that is fed through a
//! ring, faults by the real command line.

#![allow(dead_code, reason = "every test program uses its part of this module")]

pub mod archive;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use serde_json::Value;
use tapio_perf::clock::wait_for;
use tapio_perf::load::generator::{Generator, Node, Pace, Publication, RingHandle};
use tapio_perf::load::ledger::NodeLedger;
use tapio_perf::processes::{Collector, CollectorOptions, Process, Server, http};

pub const PERF: &str = env!("CARGO_BIN_EXE_tapio-perf");
/// Data bytes of a test's ring.
const RING_BYTES: usize = 8 << 20;
const ENTITIES: usize = 200;

/// Lock that decides whose turn it is.
static TURN: RwLock<()> = RwLock::new(());
pub type Alone = RwLockWriteGuard<'static, ()>;
pub type Beside = RwLockReadGuard<'static, ()>;

/// The machine for a test that measures time or memory, loads it, or has probes in the kernel.
pub fn alone() -> Alone {
    TURN.write().unwrap_or_else(PoisonError::into_inner)
}

/// A place beside others, for a test that mostly waits.
pub fn beside() -> Beside {
    TURN.read().unwrap_or_else(PoisonError::into_inner)
}

/// The sum of a metric's series, of the program that serves this port.
pub fn metric(port: u16, name: &str) -> f64 {
    let (_, text) = http::get(port, "/metrics").expect("it answers");
    let series = text.lines().filter(|line| line.split(['{', ' ']).next() == Some(name));
    series.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

/// What not every machine has.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Need {
    Root,
    Cgroups,
    Bpf,
    Nats,
}

impl Need {
    fn missing(self) -> Option<&'static str> {
        let is_root = rustix::process::geteuid().is_root();
        match self {
            Self::Root if !is_root => Some("root"),
            Self::Cgroups if tapio_perf::inject::cgroup::Hierarchies::find().is_err() => {
                Some("a mounted cgroup v2 hierarchy")
            }
            Self::Bpf if !is_root || !Path::new("/sys/kernel/btf/vmlinux").exists() => {
                Some("root and a kernel with BTF")
            }
            Self::Nats if tapio_perf::processes::nats::Nats::program().is_err() => {
                Some("nats-server: deploy/local/install.sh nats installs it")
            }
            _ => None,
        }
    }
}

/// Whether `test` can run; says loudly why not, and fails where everything is required.
pub fn can_run(test: &str, needs: &[Need]) -> bool {
    let missing: Vec<&str> = needs.iter().filter_map(|need| need.missing()).collect();
    if missing.is_empty() {
        return true;
    }
    let text = format!("SKIP {test}: needs {}", missing.join(" and "));
    assert!(std::env::var("TAPIO_REQUIRE").as_deref() != Ok("all"), "{text}");
    eprintln!("{text}");
    false
}

/// A collector and the generator that feeds its ring; the ring outlives the collector.
pub struct FedNode {
    // The generator stops first, then the ring is taken back, then the collector ends.
    generator: Option<Generator>,
    publication: Option<Publication>,
    pub collector: Collector,
    ring: RingHandle,
}

impl FedNode {
    /// Starts both; `rate` is in events a second.
    pub fn start(name: &str, server: &str, rate: f64) -> Self {
        let options = CollectorOptions { node: name.into(), server: server.into(), ..CollectorOptions::default() };
        let collector = Collector::start(&options).unwrap_or_else(|error| panic!("{error}"));
        Self::feed(collector, rate)
    }

    /// Feeds a collector that runs.
    pub fn feed(collector: Collector, rate: f64) -> Self {
        Self::feed_by(collector, rate, RING_BYTES)
    }

    /// Feeds the collector through a ring of `ring_bytes`.
    pub fn feed_by(collector: Collector, rate: f64, ring_bytes: usize) -> Self {
        let name = &collector.node().to_owned();
        let (node, ring) = Node::new(name, 1, ENTITIES, ring_bytes).expect("a ring");
        let mut fed = Self { generator: None, publication: None, collector, ring };
        fed.publish();
        let generator = Generator::start(vec![node], Pace::PerSecond(rate), Duration::from_secs(3600));
        fed.generator = Some(generator.expect("a generator"));
        fed
    }

    /// Hands the ring to the collector that runs now.
    pub fn publish(&mut self) {
        self.publication = None;
        let published = self.ring.publish(self.collector.socket());
        self.publication = Some(published.unwrap_or_else(|error| panic!("{error}")));
    }

    /// SIGKILL for the collector; a new one takes the same ring over.
    pub fn replace_collector(&mut self) {
        self.collector.kill();
        self.collector.restart().unwrap_or_else(|error| panic!("{error}"));
        self.publish();
    }

    /// Events of this node that the server has archived.
    pub fn archived(&self, server: &Server) -> u64 {
        let status = server
            .client()
            .and_then(|mut client| client.status())
            .unwrap_or_else(|error| panic!("{error}\n{}", server.output()));
        NodeLedger::new(self.collector.node(), 0, &status).archived
    }

    /// Waits until `more` events were archived since the last look at `archived`.
    pub fn wait_for_progress(&self, server: &Server, archived: &mut u64, more: u64) {
        let wanted = *archived + more;
        let result = wait_for("archived events", Duration::from_secs(30), |seen| {
            let now = self.archived(server);
            *seen = format!("{now} events archived, {wanted} wanted");
            Ok((now >= wanted).then_some(now))
        });
        *archived = result.unwrap_or_else(|error| {
            panic!("{error}\ncollector:\n{}\nserver:\n{}", self.collector.output(), server.output())
        });
    }

    /// Stops the generator and waits until the collector has read all of it; how many events there were.
    pub fn stop_feeding(&mut self) -> u64 {
        let generator = self.generator.take().expect("it runs");
        generator.stop();
        let node = generator.join().expect("the generator ends").remove(0);
        wait_for("the ring to be read", Duration::from_secs(30), |_| Ok(node.is_consumed().then_some(())))
            .unwrap_or_else(|error| panic!("{error}\n{}", self.collector.output()));
        node.emitted()
    }

    /// Stops the generator, then the collector, and checks the ledger: every event archived or declared lost.
    pub fn finish(mut self, server: &Server) -> (NodeLedger, Vec<String>) {
        let generator = self.generator.take().expect("it runs");
        generator.stop();
        let node = generator.join().expect("the generator ends").remove(0);
        let limit = Duration::from_secs(30);
        wait_for("the ring to be read", limit, |_| Ok(node.is_consumed().then_some(())))
            .unwrap_or_else(|error| panic!("{error}\n{}", self.collector.output()));
        let status = self.collector.stop().unwrap_or_else(|error| panic!("{error}"));
        assert!(status.is_some_and(|status| status.success()), "{status:?}: {}", self.collector.output());
        let mut client = server.client().expect("the server answers");
        let name = self.collector.node().to_owned();
        let mut last = None;
        let closed = wait_for("the ledger's closing", Duration::from_secs(10), |seen| {
            let status = client.status()?;
            let ledger = NodeLedger::new(&name, node.emitted(), &status);
            *seen = ledger.to_string();
            let closes = ledger.closes();
            let states = status.nodes.iter().filter(|node| node.node == name);
            let states = states.flat_map(|node| node.epochs.iter().map(|epoch| epoch.state.clone()));
            last = Some((ledger, states.collect()));
            Ok(closes.then_some(()))
        });
        closed.unwrap_or_else(|error| panic!("{error}"));
        last.expect("there was a status")
    }
}

/// Makes a fault by the command line; what was done.
pub fn inject(arguments: &[&str]) -> Value {
    let output = Command::new(PERF).arg("inject").args(arguments).arg("--json").output().expect("tapio-perf starts");
    assert!(output.status.success(), "inject {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("one JSON object")
}

/// Runs a program that must refuse to start; what it said.
///
/// A refusal is an exit code of its own choice: neither 0 nor a panic's nor a signal.
pub fn refusal(mut command: Command, what: &str) -> String {
    let folder = tempfile::tempdir().expect("a folder");
    let start = Instant::now();
    command.env("RUST_BACKTRACE", "0");
    let mut process = Process::spawn(what, command, folder.path().join("log")).expect("the program starts");
    let status = process.wait(Duration::from_secs(20));
    let output = process.output();
    let Some(status) = status else {
        panic!("{what}: still runs after {:?}:\n{output}", start.elapsed());
    };
    assert!(status.code().is_some_and(|code| code != 0 && code != 101), "{what}: {status}:\n{output}");
    assert!(!output.contains("panicked at"), "{what}:\n{output}");
    output
}

/// The path of one of Tapio's programs.
pub fn program(name: &str) -> PathBuf {
    tapio_perf::processes::bin_dir(None)
        .and_then(|folder| tapio_perf::processes::binary(name, &folder))
        .unwrap_or_else(|error| panic!("{error}"))
}

/// Fails unless the text has every word, whatever its case.
pub fn assert_says(text: &str, words: &[&str]) {
    let lower = text.to_lowercase();
    for word in words {
        assert!(lower.contains(&word.to_lowercase()), "{word:?} is missing in:\n{text}");
    }
}
