//! A table of connections that is full for real: in a network namespace of the test's own, up to the kernel's bound.

use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::lab;
use crate::lab::can_run;
use tapio_perf::client::FindingWatch;
use tapio_perf::processes::{Collector, CollectorOptions, Server, ServerOptions};
use tapio_wire::service::Finding;

/// More would take a small machine's memory: an entry has some 300 bytes in the kernel.
const ENTRIES_MAX: u64 = 600_000;
const PATIENCE: Duration = Duration::from_secs(30);

/// A network namespace that tracks connections, and a process in it; both go with it.
struct Namespace {
    name: String,
    inhabitant: Option<Child>,
}

impl Namespace {
    fn new() -> Option<Self> {
        let name = format!("tapio-conntrack-{}", std::process::id());
        if !succeeds(Command::new("ip").args(["netns", "add", &name])) {
            return None;
        }
        let mut namespace = Self { name, inhabitant: None };
        // Only a rule that asks for a connection's state makes the kernel track connections.
        let rules = "add table ip t; add chain ip t c { type filter hook output priority 0; }; add rule ip t c ct state new accept";
        let is_made = succeeds(namespace.command("ip").args(["link", "set", "lo", "up"]))
            && succeeds(namespace.command("nft").arg(rules));
        namespace.inhabitant = namespace.command("sleep").arg("600").spawn().ok();
        (is_made && namespace.inhabitant.is_some()).then_some(namespace)
    }

    /// A command in it: `ip netns exec` replaces itself by the program.
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name, program]);
        command
    }

    /// Enters connections until there is no room, or all of these; three in four were begun by 10.0.0.7.
    fn fill(&self, numbers: std::ops::Range<u64>) {
        let mut loading = self.command("conntrack");
        loading.args(["--load-file", "-"]).stdin(Stdio::piped()).stderr(Stdio::null()).stdout(Stdio::null());
        let mut loading = loading.spawn().expect("conntrack starts");
        let mut input = std::io::BufWriter::new(loading.stdin.take().expect("it is piped"));
        for number in numbers {
            let client = if number % 4 == 3 { 20 + number / 4 % 50 } else { 7 };
            let (server, port) = (1 + number / 50_000, 1024 + number % 50_000);
            let line = writeln!(
                input,
                "-I -s 10.0.0.{client} -d 10.9.0.{server} -p tcp --sport {port} --dport 443 --state ESTABLISHED -u \
                 SEEN_REPLY,ASSURED -t 600"
            );
            if line.is_err() {
                // It ends with the first that finds no room.
                break;
            }
        }
        drop(input);
        loading.wait().expect("it ends");
    }

    /// Sends packets of as many new connections.
    fn send(&self, packets: u32) {
        let script = format!("for i in $(seq {packets}); do echo > /dev/udp/127.0.0.1/$((20000 + i)); done");
        // Where the table is full, each fails.
        let _ = self.command("bash").args(["-c", &script]).stderr(Stdio::null()).status();
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if let Some(mut inhabitant) = self.inhabitant.take() {
            let _ = inhabitant.kill();
            let _ = inhabitant.wait();
        }
        let _ = Command::new("ip").args(["netns", "delete", &self.name]).status();
    }
}

fn succeeds(command: &mut Command) -> bool {
    command.stderr(Stdio::null()).stdout(Stdio::null()).status().is_ok_and(|status| status.success())
}

fn skip(needs: &str) {
    let text = format!("SKIP a_full_table_of_connections_is_found_with_its_top_talker: needs {needs}");
    assert!(std::env::var("TAPIO_REQUIRE").as_deref() != Ok("all"), "{text}");
    eprintln!("{text}");
}

#[test]
fn a_full_table_of_connections_is_found_with_its_top_talker() {
    let _turn = lab::alone();
    if !can_run("a_full_table_of_connections_is_found_with_its_top_talker", &[lab::Need::Root]) {
        return;
    }
    if !succeeds(Command::new("conntrack").arg("--version")) {
        return skip("conntrack (Debian: conntrack) and nft");
    }
    let Some(namespace) = Namespace::new() else { return skip("network namespaces with nft") };
    let bound = std::fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_max").unwrap_or_default();
    let bound = match bound.trim().parse::<u64>() {
        Ok(bound) if bound <= ENTRIES_MAX => bound,
        _ => return skip("a net.netfilter.nf_conntrack_max of at most 600,000"),
    };
    // The node whose /proc this is has that process as its first one.
    let root = tempfile::tempdir().expect("a folder");
    let pid = namespace.inhabitant.as_ref().expect("it lives there").id();
    symlink("/proc/sys", root.path().join("sys")).expect("a link");
    symlink(PathBuf::from("/proc").join(pid.to_string()), root.path().join("1")).expect("a link");

    let server = Server::start(&ServerOptions::default()).unwrap_or_else(|error| panic!("{error}"));
    let mut watch = FindingWatch::start(&server.address()).unwrap_or_else(|error| panic!("{error}"));
    let collector = Collector::start(&CollectorOptions {
        node: "conntrack".into(),
        server: server.address(),
        extra_collector: ", conntrack_interval: 100ms".into(),
        host_proc: Some(root.path().to_owned()),
        ..CollectorOptions::default()
    })
    .unwrap_or_else(|error| panic!("{error}"));

    namespace.fill(0..bound / 2);
    namespace.send(20);
    let is_full = |finding: &Finding| finding.pattern.starts_with("conntrack-");
    namespace.fill(bound / 2..bound + 1000);
    namespace.send(20);
    let found = watch.wait(PATIENCE, is_full).unwrap_or_else(|error| panic!("{error}"));
    let Some(found) = found else { panic!("no finding\n{}\n{}", collector.output(), server.output()) };
    let finding = found.finding;
    assert_eq!(finding.pattern, "conntrack-full", "{finding:#?}");
    assert!(finding.summary.contains("10.0.0.7 has 7"), "{}", finding.summary);
    assert!(finding.summary.contains(&format!(" of {bound} connections")), "{}", finding.summary);
    // A table that is half full, with packets, was told before nothing else.
    assert!(watch.seen().iter().all(|arrival| arrival.finding.id == finding.id || !is_full(&arrival.finding)));
}
