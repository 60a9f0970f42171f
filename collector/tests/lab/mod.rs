//! What the live tests share: a real systemd, probes, cgroups, and the events that sources produce.

#![allow(dead_code, reason = "every test program uses its part of this module")]

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tapio_collector::base::books::Books;
use tapio_collector::intake::Intake;
use tapio_collector::intake::identity::Identity;
use tapio_collector::intake::identity::exclusion::Exclusion;
use tapio_collector::intake::requests::Evidence;
use tapio_collector::intake::source_context::SourceContext;
use tapio_collector::outbox::queue::{OpenLanes, Queues};
use tapio_collector::settings::config::Config;
use tapio_collector::source::ebpf::EbpfSource;
use tapio_collector::source::stop::Stop;
use tapio_probes::{Controls, LoadConfig};
use tapio_wire::event::{Body, Detail, Entity, EntityId, Event, NO_NAME, Name, SOURCES, Source};

/// How long anything that is awaited may take.
pub const LIMIT: Duration = Duration::from_secs(15);

/// Whether a test can run: as root, with these programs. Says loudly why not, and fails where everything is required.
pub fn can_run(test: &str, programs: &[&str]) -> bool {
    let mut missing: Vec<String> =
        programs.iter().filter(|program| !Path::new(program).exists()).map(|program| program.to_string()).collect();
    if !rustix::process::geteuid().is_root() {
        missing.push("root".into());
    }
    if missing.is_empty() {
        return true;
    }
    let text = format!("SKIP {test}: needs {}", missing.join(" and "));
    assert!(std::env::var("TAPIO_REQUIRE").as_deref() != Ok("all"), "{text}");
    eprintln!("{text}");
    false
}

/// What the lab's systemd needs.
pub const SYSTEMD: [&str; 3] = ["/lib/systemd/systemd", "/usr/bin/dbus-daemon", "/usr/bin/nsenter"];

/// A systemd of its own, which ends with this, and with the test however it ends.
pub struct Systemd {
    pub pid: u32,
    pub bus: String,
    /// Path of its cgroup in the file system.
    pub cgroup: PathBuf,
    _state: tempfile::TempDir,
}

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../perf/lab/systemd").join(name)
}

impl Systemd {
    pub fn start() -> Self {
        let state = tempfile::tempdir().expect("a folder");
        let output = Command::new(script("up.sh")).arg(state.path()).arg(std::process::id().to_string()).output();
        let output = output.expect("up.sh runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8(output.stdout).expect("text");
        let values: HashMap<&str, &str> = text.split_whitespace().filter_map(|pair| pair.split_once('=')).collect();
        Self {
            pid: values["PID"].parse().expect("a pid"),
            bus: values["BUS"].into(),
            cgroup: values["CGROUP"].into(),
            _state: state,
        }
    }

    /// Runs a program beside it.
    pub fn run(&self, command: &[&str]) -> Output {
        let pid = self.pid.to_string();
        let output = Command::new("nsenter").args(["-t", &pid, "-m", "-p", "--"]).args(command).output();
        output.expect("nsenter runs")
    }

    /// Starts a transient service with these properties.
    pub fn service(&self, name: &str, properties: &[&str], shell: &str) {
        let mut command = vec!["systemd-run".to_owned(), format!("--unit={name}")];
        command.extend(properties.iter().map(|property| format!("--property={property}")));
        command.extend(["sh", "-c", shell].map(String::from));
        let command: Vec<&str> = command.iter().map(String::as_str).collect();
        let output = self.run(&command);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    /// A file of its file system.
    pub fn file(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.pid))
    }

    /// The processes of a unit of `system.slice`, by their pids here.
    pub fn processes(&self, unit: &str) -> Vec<u32> {
        let path = self.cgroup.join("system.slice").join(unit).join("cgroup.procs");
        let text = std::fs::read_to_string(path).unwrap_or_default();
        text.lines().filter_map(|line| line.parse().ok()).collect()
    }
}

impl Drop for Systemd {
    fn drop(&mut self) {
        let ended = Command::new(script("down.sh")).arg(self.pid.to_string()).arg(&self.cgroup).status();
        if !ended.is_ok_and(|status| status.success()) {
            eprintln!("the lab's systemd {} did not end", self.pid);
        }
    }
}

/// An event with its names.
#[derive(Clone, Debug)]
pub struct Seen {
    pub event: Event,
    names: Arc<Vec<String>>,
}

impl Seen {
    pub fn name(&self, name: Name) -> &str {
        if name == NO_NAME { "" } else { &self.names[name as usize] }
    }
}

/// What sources share, and what came out of their queues.
pub struct Lab {
    pub context: SourceContext,
    pub seen: Vec<Seen>,
    pub entities: HashMap<EntityId, Entity>,
}

impl Lab {
    pub fn new() -> Self {
        Self::with(Config::default())
    }

    /// Starts with this configuration, without a limit of events a second.
    pub fn with(mut config: Config) -> Self {
        config.collector.max_events_per_sec = 0;
        let (queues, _parker) = Queues::new(4096);
        Self { context: SourceContext::for_config(&config, queues), seen: Vec::new(), entities: HashMap::new() }
    }

    fn take(&mut self, body: Body) {
        let names = Arc::new(body.names);
        self.entities.extend(body.entities.into_iter().map(|entity| (entity.id, entity)));
        self.seen.extend(body.events.into_iter().map(|event| Seen { event, names: Arc::clone(&names) }));
    }

    pub fn drain(&mut self) {
        while let Some((_, body)) = self.context.queues.pop(OpenLanes::Both) {
            self.take(body);
        }
    }

    /// The first event that `wanted` accepts, of those after the first `from`; waits for it.
    pub fn wait_from(&mut self, from: usize, what: &str, wanted: impl Fn(&Seen) -> bool) -> Seen {
        let deadline = Instant::now() + LIMIT;
        loop {
            self.drain();
            if let Some(found) = self.seen.iter().skip(from).find(|seen| wanted(seen)) {
                return found.clone();
            }
            let systemd = |seen: &&Seen| seen.event.source != Source::Ebpf;
            assert!(
                Instant::now() < deadline,
                "no {what} among {:#?}",
                self.seen.iter().filter(systemd).collect::<Vec<_>>()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn wait(&mut self, what: &str, wanted: impl Fn(&Seen) -> bool) -> Seen {
        self.wait_from(0, what, wanted)
    }

    /// Everything of a unit, in order.
    pub fn states<'l>(&'l self, unit: &'l str) -> impl Iterator<Item = &'l tapio_wire::event::UnitState> {
        self.seen.iter().filter_map(move |seen| match &seen.event.body {
            Detail::UnitState(state) if seen.name(state.unit) == unit => Some(&**state),
            _ => None,
        })
    }

    /// Whether what arrived here is what a source produced, once it has ended.
    pub fn assert_books_close(&mut self, source: Source) {
        self.drain();
        let arrived = self.seen.iter().filter(|seen| seen.event.source == source).count() as u64;
        let ledger = Books::snapshot(&self.context.books, &[0; SOURCES]);
        let account = ledger.account(source);
        assert_eq!(account.emitted, arrived + account.dropped.iter().flatten().sum::<u64>(), "{account:?}");
    }
}

/// The kernel's source on a thread of its own.
pub struct Kernel {
    stop: Arc<Stop>,
    thread: Option<JoinHandle<()>>,
    pub controls: Arc<Controls>,
}

impl Kernel {
    pub fn start(context: &SourceContext) -> Self {
        Self::start_with(context, None)
    }

    pub fn start_with(context: &SourceContext, evidence: Option<Evidence>) -> Self {
        let stop = Arc::new(Stop::new().expect("an eventfd"));
        let load = LoadConfig { own_pid: Some(std::process::id()), ..LoadConfig::default() };
        let source = EbpfSource::load(&load, Duration::from_millis(1), Duration::from_secs(10), Arc::clone(&stop))
            .expect("the probes load");
        let controls = source.controls().expect("it was not stopped");
        let exclusion = context.directory.excludes().then(|| Exclusion::new(Arc::clone(&controls)));
        let identity = Identity::of_this_machine(Arc::clone(&context.directory)).with_exclusion(exclusion);
        let intake = Intake::new(context.clone(), Source::Ebpf, identity).with_evidence(evidence);
        let thread = std::thread::spawn(move || source.run(intake).expect("the rings are sound"));
        Self { stop, thread: Some(thread), controls }
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        self.stop.set();
        if let Some(Err(_)) = self.thread.take().map(JoinHandle::join) {
            eprintln!("the kernel's source panicked");
        }
    }
}

/// A cgroup of the version 1 memory hierarchy with a limit; [`None`] where there is no such hierarchy.
pub struct MemoryCgroup(pub PathBuf);

impl MemoryCgroup {
    pub fn make(name: &str, limit_bytes: u64) -> Option<Self> {
        let root = Path::new("/sys/fs/cgroup/memory");
        if !root.join("cgroup.procs").exists() {
            return None;
        }
        let cgroup = Self(root.join(format!("tapio-test-{}-{name}", std::process::id())));
        std::fs::create_dir(&cgroup.0).expect("a cgroup");
        std::fs::write(cgroup.0.join("memory.limit_in_bytes"), limit_bytes.to_string()).expect("a limit");
        Some(cgroup)
    }

    pub fn add(&self, pid: u32) {
        // A child of a shell may have ended since it was listed.
        if let Err(error) = std::fs::write(self.0.join("cgroup.procs"), pid.to_string()) {
            let gone = rustix::io::Errno::SRCH.raw_os_error();
            assert_eq!(error.raw_os_error(), Some(gone), "{error}");
        }
    }
}

impl Drop for MemoryCgroup {
    fn drop(&mut self) {
        // Busy until its last process is reaped.
        let deadline = Instant::now() + LIMIT;
        while let Err(error) = std::fs::remove_dir(&self.0) {
            if error.raw_os_error() != Some(rustix::io::Errno::BUSY.raw_os_error()) || Instant::now() > deadline {
                eprintln!("{}: {error}", self.0.display());
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}
