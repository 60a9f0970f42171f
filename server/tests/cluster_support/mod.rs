//! A real NATS, and servers that share it.

#![allow(dead_code, reason = "every test uses its part of this module")]

mod proxy;

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_nats::jetstream::Context;
pub use proxy::Proxy;
use tapio_server::cluster::{Cluster, ClusterLosses, ClusterSection, Timing};
use tapio_server::correlate::{CorrelateConfig, Correlator, LossBook, Topology};
use tapio_server::deliver::Keeper;
use tapio_server::findings::{Finder, FinderConfig, FindingStore, PatternSet};
use tapio_wire::service::Finding;

use crate::correlate_node::Node;

/// How long anything may take.
pub const LIMIT: Duration = Duration::from_secs(60);

/// Waits until something is so.
pub fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "{what} did not come about within {LIMIT:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// `nats-server` with JetStream on loopback; it ends with this.
pub struct Nats {
    port: u16,
    dir: tempfile::TempDir,
    extra: String,
    /// More keys of its `jetstream` block.
    jetstream: String,
    child: Option<Child>,
}

/// The first of these programs that is installed. `None` where there is none and it is not required.
pub fn installed(names: &[&str]) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let places = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/usr/local/bin".into()]);
    let mut programs = places.flat_map(|place| names.iter().map(move |name| place.join(name)));
    let found = programs.find(|program| program.is_file());
    if found.is_none() {
        let is_required = std::env::var("TAPIO_REQUIRE").as_deref() == Ok("all");
        assert!(!is_required, "no {}: `make test` installs it", names[0]);
        eprintln!("SKIP: no {}", names[0]);
    }
    found
}

impl Nats {
    /// Starts one. `None` where there is none and it is not required.
    pub fn start() -> Option<Self> {
        Self::with("")
    }

    /// Starts with additional lines of configuration.
    pub fn with(extra: &str) -> Option<Self> {
        installed(&["nats-server"])?;
        // Taken again right after it is given back.
        let port = TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a port").port();
        let dir = tempfile::tempdir().expect("a directory");
        let mut nats = Self { port, dir, extra: extra.into(), jetstream: String::new(), child: None };
        nats.begin();
        Some(nats)
    }

    fn begin(&mut self) {
        let store = self.dir.path().join("store");
        let config = format!(
            "listen: 127.0.0.1:{}\njetstream {{ store_dir: \"{}\"\n{} }}\n{}\n",
            self.port,
            store.display(),
            self.jetstream,
            self.extra
        );
        let file = self.dir.path().join("nats.conf");
        std::fs::write(&file, config).expect("written");
        let log = std::fs::File::create(self.dir.path().join("nats.log")).expect("a file");
        // It ends with the thread that started it, however that ends.
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--"])
            .arg(installed(&["nats-server"]).expect("it was there"))
            .arg("-c")
            .arg(&file)
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("nats-server starts");
        self.child = Some(child);
        until("NATS", || std::net::TcpStream::connect(("127.0.0.1", self.port)).ok());
    }

    pub fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// More keys of its `jetstream` block for its next start.
    pub fn set_jetstream(&mut self, keys: &str) {
        self.jetstream = keys.into();
    }

    /// Another configuration for its next start.
    pub fn set_extra(&mut self, extra: &str) {
        self.extra = extra.into();
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().expect("killed");
            child.wait().expect("waited for");
        }
    }

    /// Restarts at the same address with its data.
    pub fn restart(&mut self) {
        self.kill();
        self.begin();
    }

    /// Restarts at the same address without its data.
    pub fn restart_empty(&mut self) {
        self.kill();
        std::fs::remove_dir_all(self.dir.path().join("store")).expect("removed");
        self.begin();
    }

    /// Restarts it, and keeps what it has now.
    pub fn restart_saving(&mut self) -> tempfile::TempDir {
        self.kill();
        let saved = tempfile::tempdir().expect("a directory");
        copy_tree(&self.dir.path().join("store"), &saved.path().join("store"));
        self.begin();
        saved
    }

    /// Restarts it with what it had before.
    pub fn restart_with(&mut self, saved: &tempfile::TempDir) {
        self.kill();
        let store = self.dir.path().join("store");
        std::fs::remove_dir_all(&store).expect("removed");
        copy_tree(&saved.path().join("store"), &store);
        self.begin();
    }

    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("it runs").id()
    }

    /// Stops it, or lets it go on.
    pub fn pause(&self, is_paused: bool) {
        send_signal(self.pid(), if is_paused { libc::SIGSTOP } else { libc::SIGCONT });
    }
}

impl Drop for Nats {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Sends a signal to a process that the test started.
fn send_signal(pid: u32, signal: i32) {
    let pid = rustix::process::Pid::from_raw(pid as i32).expect("a pid");
    let signal = rustix::process::Signal::from_named_raw(signal).expect("a signal");
    rustix::process::kill_process(pid, signal).expect("signalled");
}

/// Lets somebody use NATS on a connection of its own.
pub fn beside<T>(nats: &Nats, act: impl AsyncFnOnce(Context) -> T) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let client = async_nats::connect(nats.url()).await.expect("it listens");
        act(async_nats::jetstream::new(client)).await
    })
}

/// A process that a test started; it ends with the test.
pub struct Process(pub Child);

impl Process {
    pub fn signal(&self, signal: i32) {
        send_signal(self.0.id(), signal);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Leases that are over soon.
pub fn timing() -> Timing {
    let ms = Duration::from_millis;
    Timing { lease: ms(4000), margin: ms(800), interval: ms(300), disk_wait: ms(5) }
}

pub fn section(nats: &Nats, server: &str) -> ClusterSection {
    ClusterSection { url: nats.url(), server: Some(server.into()), ..ClusterSection::default() }
}

fn copy_tree(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("made");
    for entry in std::fs::read_dir(from).expect("read") {
        let entry = entry.expect("an entry");
        let (path, copy) = (entry.path(), to.join(entry.file_name()));
        if path.is_dir() {
            copy_tree(&path, &copy);
        } else {
            std::fs::copy(&path, &copy).expect("copied");
        }
    }
}

/// Shards, log and finder of a server, without an archive.
pub struct Member {
    pub correlator: Correlator,
    pub cluster: Cluster,
    pub finder: Finder,
    pub store: Arc<FindingStore>,
    _keeper: Keeper,
}

impl Member {
    pub fn start(nats: &Nats, server: &str) -> Self {
        let member = Self::begin(section(nats, server));
        until("the log's end", || member.cluster.link().is_caught_up().then_some(()));
        member
    }

    pub fn begin(section: ClusterSection) -> Self {
        Self::begin_with(section, Timing { disk_wait: timing().disk_wait, ..Timing::default() })
    }

    /// Starts with leases of another length.
    pub fn begin_with(section: ClusterSection, timing: Timing) -> Self {
        let patterns = Arc::new(PatternSet::embedded().expect("embedded patterns are valid"));
        let config = CorrelateConfig { shards: Some(2), wanted: patterns.kinds(), ..CorrelateConfig::default() };
        let store = Arc::new(FindingStore::new(1000));
        store.set_cluster(&section.name);
        let losses = Arc::new(ClusterLosses::default());
        let finder = FinderConfig::default();
        let finder = Finder::start_from_log(&finder, patterns, 100_000, Arc::clone(&losses), Arc::clone(&store))
            .expect("the finder starts");
        let keep = Duration::from_secs(3600);
        // This server has no archive: after NATS lost its data, it waits for frames that never come. `disk_wait` keeps that short.
        let healer = Box::new(|_, _: &dyn Fn() -> bool| Ok(()));
        let cluster = Cluster::start_with(&section, keep, timing, "", 100_000, &finder.bus(), losses, healer);
        let cluster = cluster.expect("it starts");
        let topology = Arc::new(Topology::new(100_000));
        let correlator = Correlator::start(&config, topology, Arc::new(LossBook::default()), cluster.bus())
            .expect("the correlator starts");
        let keeper = Keeper::start(&section, &store, cluster.leadership(), cluster.link()).expect("it starts");
        Self { correlator, cluster, finder, store, _keeper: keeper }
    }

    /// Delivers a node's frames, and waits until the shards are through with them.
    pub fn deliver(&self, node: &Node) {
        self.deliver_part(node, 0..node.frames.len());
    }

    pub fn deliver_part(&self, node: &Node, frames: std::ops::Range<usize>) {
        for frame in &node.frames[frames] {
            self.correlator.deliver_blocking(node.node.clone(), Arc::clone(frame)).expect("the correlator runs");
        }
        self.correlator.drained_blocking().expect("the correlator runs");
        self.cluster.bus().flush();
    }

    /// The findings, the oldest first.
    pub fn findings(&self) -> Vec<Finding> {
        self.finder.bus().barrier().expect("the finder runs");
        let (mut found, _) = self.store.list(0, None, 1000);
        found.reverse();
        found.iter().map(|finding| (**finding).clone()).collect()
    }

    /// Waits until the findings are so.
    pub fn findings_when(&self, so: impl Fn(&[Finding]) -> bool) -> Vec<Finding> {
        let deadline = Instant::now() + LIMIT;
        loop {
            let found = self.findings();
            if so(&found) {
                return found;
            }
            assert!(Instant::now() < deadline, "it did not come about: {found:#?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until these are the patterns of its findings.
    pub fn until_patterns(&self, wanted: &[&str]) -> Vec<Finding> {
        let deadline = Instant::now() + LIMIT;
        loop {
            let found = self.findings();
            if found.iter().map(|finding| finding.pattern.as_str()).eq(wanted.iter().copied()) {
                return found;
            }
            assert!(Instant::now() < deadline, "{wanted:?} did not come about: {found:#?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// What servers that nothing disturbs find, of which each sees one of these nodes; the first is the oldest.
pub fn undisturbed(nodes: &[&Node]) -> Option<Vec<Finding>> {
    let nats = Nats::start()?;
    let members: Vec<Member> =
        (0..nodes.len()).map(|number| Member::start(&nats, &format!("server-{number}"))).collect();
    nodes.iter().zip(&members).for_each(|(node, member)| member.deliver(node));
    settle(&members.iter().collect::<Vec<_>>());
    let found = members[0].findings();
    assert!(!found.is_empty() && found.iter().all(|one| one.missing_servers.is_empty()), "{found:#?}");
    Some(final_content(&found))
}

/// What findings say, without how often and when each server had said it.
pub fn final_content(findings: &[Finding]) -> Vec<Finding> {
    let plain = |finding: &Finding| Finding { revision: 0, published_ns: 0, ..finding.clone() };
    findings.iter().map(plain).collect()
}

/// Waits until all have read what any of them has written so far, and have published what has grown.
pub fn settle(members: &[&Member]) {
    for member in members {
        until("an empty queue", || member.cluster.bus().is_empty().then_some(()));
    }
    // What was taken from the queue is on its way for a moment.
    read_on(members, 1);
    // What has grown waits for the log's clock, which two messages of a server that has nothing else to say move on by 2 s.
    if members.iter().any(|member| member.findings().iter().any(|finding| finding.count >= 4)) {
        read_on(members, 2);
    }
}

/// Waits until each has written so many messages more, and all have read them.
fn read_on(members: &[&Member], more: u64) {
    let published = |member: &&Member| member.cluster.link().published_seq.load(std::sync::atomic::Ordering::Acquire);
    let mut before: Vec<u64> = members.iter().map(published).collect();
    until("more messages of each", || {
        let now: Vec<u64> = members.iter().map(published).collect();
        // A log that lost everything counts from 1 again.
        before.iter_mut().zip(&now).for_each(|(before, now)| *before = *now.min(before));
        now.iter().zip(&before).all(|(now, before)| *now >= *before + more).then_some(())
    });
    // There may be more than goes at once.
    for member in members {
        let waiting = || member.cluster.link().waiting.load(std::sync::atomic::Ordering::Acquire);
        until("an empty publisher", || (waiting() == 0).then_some(()));
    }
    let last = members.iter().map(published).max().unwrap_or(0);
    for member in members {
        let read = || member.cluster.link().read_seq.load(std::sync::atomic::Ordering::Acquire);
        until("what was written", || (read() >= last).then_some(()));
        member.finder.bus().barrier().expect("the finder runs");
    }
}

/// A finder that reads the log, and what it finds.
pub fn finder() -> (Finder, Arc<FindingStore>) {
    let patterns = Arc::new(PatternSet::embedded().expect("embedded patterns are valid"));
    let (store, losses) = (Arc::new(FindingStore::new(10_000)), Arc::new(ClusterLosses::default()));
    let finder = Finder::start_from_log(&FinderConfig::default(), patterns, 100_000, losses, Arc::clone(&store));
    (finder.expect("the finder starts"), store)
}
