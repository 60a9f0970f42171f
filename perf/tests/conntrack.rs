//! A table of connections that is full for real: in a network namespace of the test's own, up to the kernel's bound.

use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::lab;
use crate::lab::can_run;
use tapio_perf::client::{Client, FindingWatch};
use tapio_perf::clock::wait_for;
use tapio_perf::error::Error;
use tapio_perf::inject::{InjectOptions, Injector};
use tapio_perf::processes::collector::Feed;
use tapio_perf::processes::{Collector, CollectorOptions, Server, ServerOptions};
use tapio_perf::truth::stage::{Actor, ContainerCgroups, Pids, Stage};
use tapio_wire::service::Finding;

/// More would take a small machine's memory: an entry has some 300 bytes in the kernel.
const ENTRIES_MAX: u64 = 600_000;
const PATIENCE: Duration = Duration::from_secs(30);
/// A lookup is unanswered after 5 s; three times that of one workload are a trouble.
const TROUBLE_PATIENCE: Duration = Duration::from_secs(90);
/// A query for the address of `a.`
const QUERY: &str = r"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x01a\x00\x00\x01\x00\x01";

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

    /// Another one, which reaches this one as 10.200.0.1.
    fn neighbour(&self) -> Option<Self> {
        let neighbour = Self { name: format!("{}-pod", self.name), inhabitant: None };
        let is_made = succeeds(Command::new("ip").args(["netns", "add", &neighbour.name]));
        let commands: [(&Self, &[&str]); 5] = [
            (self, &["link", "add", "pod", "type", "veth", "peer", "name", "eth0", "netns", &neighbour.name]),
            (self, &["address", "add", "10.200.0.1/24", "dev", "pod"]),
            (self, &["link", "set", "pod", "up"]),
            (&neighbour, &["address", "add", "10.200.0.2/24", "dev", "eth0"]),
            (&neighbour, &["link", "set", "eth0", "up"]),
        ];
        let joined = commands.iter().all(|(of, arguments)| succeeds(of.command("ip").args(*arguments)));
        (is_made && joined).then_some(neighbour)
    }

    /// The `/proc` of a node whose first process lives in it.
    fn as_node(&self) -> tempfile::TempDir {
        let root = tempfile::tempdir().expect("a folder");
        let pid = self.inhabitant.as_ref().expect("it lives there").id();
        symlink("/proc/sys", root.path().join("sys")).expect("a link");
        symlink(PathBuf::from("/proc").join(pid.to_string()), root.path().join("1")).expect("a link");
        root
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

/// A namespace to be filled, and how many connections that takes.
fn namespace(test: &str) -> Option<(Namespace, u64)> {
    if !succeeds(Command::new("conntrack").arg("--version")) {
        skip(test, "conntrack (Debian: conntrack) and nft");
        return None;
    }
    let Some(namespace) = Namespace::new() else {
        skip(test, "network namespaces with nft");
        return None;
    };
    let bound = std::fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_max").unwrap_or_default();
    match bound.trim().parse::<u64>() {
        Ok(bound) if bound <= ENTRIES_MAX => Some((namespace, bound)),
        _ => {
            skip(test, "a net.netfilter.nf_conntrack_max of at most 600,000");
            None
        }
    }
}

fn skip(test: &str, needs: &str) {
    let text = format!("SKIP {test}: needs {needs}");
    assert!(std::env::var("TAPIO_REQUIRE").as_deref() != Ok("all"), "{text}");
    eprintln!("{text}");
}

#[test]
fn a_full_connection_table_is_found_with_its_top_talker() {
    let _turn = lab::alone();
    if !can_run("a_full_connection_table_is_found_with_its_top_talker", &[lab::Need::Root]) {
        return;
    }
    let Some((namespace, bound)) = namespace("a_full_connection_table_is_found_with_its_top_talker") else {
        return;
    };
    // The node whose /proc this is has that process as its first one.
    let root = namespace.as_node();

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
    // Before it, nothing was found about a table that is half full, with packets.
    assert!(watch.seen().iter().all(|arrival| arrival.finding.id == finding.id || !is_full(&arrival.finding)));
}

/// A container whose first process runs this script in a network namespace.
fn container(stage: &mut Stage, namespace: &Namespace, script: &str) -> Result<(ContainerCgroups, Actor), Error> {
    let cgroups = stage.cgroups(None)?;
    let actor =
        stage.start(&cgroups, Pids::Own, &format!("exec ip netns exec {} bash -c '{script}'", namespace.name))?;
    Ok((cgroups, actor))
}

fn await_finding(client: &mut Client, what: &str, is_it: impl Fn(&Finding) -> bool) -> Result<Finding, Error> {
    wait_for(what, TROUBLE_PATIENCE, |seen| {
        let all = client.findings()?;
        let text = |one: &Finding| {
            let consequences: Vec<_> = one.consequences.iter().map(|one| &*one.pattern).collect();
            format!("{} {} ongoing {} {consequences:?}; ", one.pattern, one.title, one.ongoing)
        };
        *seen = all.iter().map(text).collect();
        Ok(all.into_iter().find(|one| is_it(one)))
    })
}

fn name_whose_connections_are_lost(full: &Namespace) -> Result<(), Error> {
    let Some(pod) = full.neighbour() else { return Err(Error::Invalid("no second network namespace".into())) };
    let program = lab::PERF.into();
    let inject = InjectOptions { memory_bytes: 32 << 20, keep: Duration::from_millis(200), program };
    let mut stage = Stage::new(Injector::new(inject)?, lab::PERF.into())?;
    let server = Server::start(&ServerOptions::default())?;
    let mut client = Client::connect(&server.address())?;
    let options = CollectorOptions { server: server.address(), feed: Feed::Ebpf, ..CollectorOptions::default() };

    // A workload whose packets go through the node's full table.
    let root = full.as_node();
    let of_node = Collector::start(&CollectorOptions {
        node: "full".into(),
        extra_collector: ", conntrack_interval: 100ms".into(),
        host_proc: Some(root.path().to_owned()),
        ..options.clone()
    })?;
    let asks = format!(
        "while :; do (exec 3<>/dev/tcp/10.200.0.1/443) & printf \"{QUERY}\" >/dev/udp/10.200.0.1/53; sleep 1; done"
    );
    let asking = container(&mut stage, &pod, &asks)?;
    let id = &asking.0.name.container_id;
    let root_cause = await_finding(&mut client, "the full table, and whose connections are lost", |one| {
        let is_its = |one: &tapio_wire::service::Consequence| {
            one.pattern == "connections-lost" && one.entity.as_ref().is_some_and(|entity| entity.container_id == *id)
        };
        one.pattern == "conntrack-full" && one.consequences.iter().any(is_its)
    })?;
    println!("{}", root_cause.title);
    root_cause.consequences.iter().for_each(|one| println!("  {}", one.title));
    let is_of = |one: &Finding, id: &str| one.entity.as_ref().is_some_and(|entity| entity.container_id == id);
    let lookups = await_finding(&mut client, "its lookups that get no answer", |one| {
        one.pattern == "dns-lookups-fail" && one.ongoing && is_of(one, id)
    })?;
    println!("{}", lookups.title);
    assert!(lookups.title.contains("unanswered"), "{}", lookups.title);
    drop((asking, of_node));

    // One whose own network namespace has a full table, on a node that has room.
    let _collector = Collector::start(&CollectorOptions {
        node: "roomy".into(),
        extra_collector: ", watch_interval: 1s".into(),
        ..options
    })?;
    let sends = "while :; do echo >/dev/udp/127.0.0.1/$((20000 + RANDOM % 20000)); sleep 0.2; done 2>/dev/null";
    let sending = container(&mut stage, full, sends)?;
    let pod_uid = &sending.0.name.pod_uid;
    let is_its = |one: &Finding| {
        one.pattern == "connections-dropped" && one.entity.as_ref().is_some_and(|entity| entity.pod_uid == *pod_uid)
    };
    let dropped = await_finding(&mut client, "its own full table", |one| is_its(one) && one.ongoing)?;
    println!("{}\n  {}", dropped.title, dropped.summary);
    assert!(succeeds(full.command("conntrack").arg("-F")), "the table is emptied");
    let over = await_finding(&mut client, "the end of it", |one| is_its(one) && !one.ongoing)?;
    assert!(over.id == dropped.id && over.resolved_ns > over.started_ns, "{over:#?}");
    let of_roomy = |one: &Finding| one.entity.as_ref().is_some_and(|entity| entity.node == "roomy");
    let wrong: Vec<_> =
        client.findings()?.into_iter().filter(|one| of_roomy(one) && one.pattern == "conntrack-full").collect();
    assert!(wrong.is_empty(), "the node has room: {wrong:#?}");
    Ok(())
}

#[test]
fn a_full_table_names_the_workload_that_loses_connections() {
    let _turn = lab::alone();
    let test = "a_full_table_names_the_workload_that_loses_connections";
    if !can_run(test, &[lab::Need::Root, lab::Need::Cgroups, lab::Need::Bpf]) {
        return;
    }
    let Some((namespace, bound)) = namespace(test) else { return };
    namespace.fill(0..bound + 1000);
    name_whose_connections_are_lost(&namespace).unwrap_or_else(|error| panic!("{error}"));
}

#[test]
fn a_node_without_a_connection_table_says_so() {
    let _turn = lab::beside();
    let root = tempfile::tempdir().expect("a folder");
    let server = Server::start(&ServerOptions::default()).unwrap_or_else(|error| panic!("{error}"));
    let _collector = Collector::start(&CollectorOptions {
        node: "bare".into(),
        server: server.address(),
        host_proc: Some(root.path().to_owned()),
        ..CollectorOptions::default()
    })
    .unwrap_or_else(|error| panic!("{error}"));
    let mut client = server.client().unwrap_or_else(|error| panic!("{error}"));
    let off = wait_for("what is not watched", PATIENCE, |seen| {
        let nodes = client.status()?.nodes;
        *seen = format!("{nodes:?}");
        Ok(nodes.into_iter().flat_map(|node| node.off).find(|off| off.source == "conntrack"))
    });
    let off = off.unwrap_or_else(|error| panic!("{error}"));
    assert!(off.reason.contains("nf_conntrack_max"), "{}", off.reason);
}
