//! Faults of the log that several servers read. After each of them they find what servers find that nothing disturbs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::cluster_support::*;
use crate::cluster_whole::{findings, findings_when, limit_kill, ship, status};
use crate::correlate_node::{Node, SECOND};
use crate::reconnect_storm::Running;
use crate::whole_server::{Stream, Whole, hello};
use tapio_server::cluster::ClusterSection;
use tapio_server::correlate::batch::{Batch, Entry};
use tapio_server::correlate::{NodeClock, NodeRef};
use tapio_wire::program::clock::now_ns;
use tapio_wire::service::{Finding, ServerStatus};
use tonic::transport::Endpoint;

pub fn through(proxy: &Proxy, server: &str) -> ClusterSection {
    ClusterSection { url: proxy.url(), server: Some(server.into()), ..ClusterSection::default() }
}

/// Deaths of one workload's replicas on two nodes, and of another's on the second.
pub fn deaths() -> (Node, Node) {
    let (mut first, mut second) = (Node::new("n1"), Node::new("n2"));
    for round in 0..20 {
        limit_kill(&mut first, 100 + round, (100 + u64::from(round)) * SECOND);
    }
    let entity = second.kube_container("Deployment/web", "shop/web-1", "c1");
    second.limit_kill(entity, 300, 110 * SECOND);
    let entity = second.kube_container("Deployment/db", "shop/db-0", "c9");
    second.limit_kill(entity, 400, 400 * SECOND);
    (first, second)
}

pub fn by_id(findings: &[Finding]) -> Vec<Finding> {
    let mut found = final_content(findings);
    found.sort_by(|a, b| a.id.cmp(&b.id));
    found
}

/// Waits until a server says what undisturbed ones say.
pub fn until_as(member: &Member, wanted: &[Finding]) {
    let deadline = Instant::now() + LIMIT;
    loop {
        let found = by_id(&member.findings());
        let wanted = by_id(wanted);
        if found == wanted {
            return;
        }
        let difference = found.iter().zip(&wanted).find(|(found, wanted)| found != wanted);
        let counts = (found.len(), wanted.len());
        assert!(Instant::now() < deadline, "{counts:?} findings, the first that differ: {difference:#?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// What a server says of itself.
pub async fn own_status(server: &Whole) -> ServerStatus {
    let is_own = |status: &ServerStatus| status.address.is_empty();
    status(server).await.servers.into_iter().find(is_own).expect("it is one of several")
}

/// Waits until both servers say what undisturbed ones say, and that the ledger closes.
pub async fn until_undisturbed(servers: &[&Whole], wanted: &[Finding]) {
    for server in servers {
        let found = findings_when(server, |found| by_id(found) == by_id(wanted)).await;
        assert!(found.iter().all(|one| one.missing_servers.is_empty()), "{found:#?}");
        assert_eq!(status(server).await.unexplained_events, 0);
    }
}

/// Longer than durable writes take, also on a machine that has much to do.
const NOT_WAITED: Duration = Duration::from_secs(10);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_log_delays_no_acknowledgement_and_changes_no_finding() {
    let Some(nats) = Nats::start() else { return };
    let (first, second) = deaths();
    let wanted = undisturbed(&[&first, &second]).expect("NATS is there");
    let proxy = Proxy::start(nats.port());
    let a = Whole::start(|config| config.cluster = through(&proxy, "a")).await;
    let b = Whole::start(|config| config.cluster = through(&proxy, "b")).await;
    // Each question to NATS takes a good tenth of a second, and the messages about the deaths a part of a second.
    proxy.slow(Duration::from_millis(50), 32 << 10);
    let took = ship(&a, &first, 0).await.max(ship(&b, &second, 0).await);
    assert!(took < NOT_WAITED, "{took:?}");
    // It is slow still when everything is published.
    until_undisturbed(&[&a, &b], &wanted).await;
    for server in [a, b] {
        server.pipeline.shutdown().await.expect("a good end");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_log_delays_no_ack_and_gets_everything_later() {
    let Some(mut nats) = Nats::start() else { return };
    let (first, second) = deaths();
    let wanted = undisturbed(&[&first, &second]).expect("NATS is there");
    let a = Whole::start(|config| config.cluster = section(&nats, "a")).await;
    let b = Whole::start(|config| config.cluster = section(&nats, "b")).await;
    let watcher = Member::start(&nats, "c");
    // Less than it holds: nothing more is taken.
    nats.set_jetstream("max_file_store: 1");
    nats.restart();
    // The log takes nothing meanwhile: that they are acknowledged at all shows that they do not wait for it.
    ship(&a, &first, 0).await;
    ship(&b, &second, 0).await;
    findings_when(&b, |found| found.len() == 2 && found.iter().all(|one| !one.missing_servers.is_empty())).await;
    let trouble = until("trouble", || watcher.cluster.link().trouble());
    assert!(trouble.contains("resource"), "{trouble}");
    for server in [&a, &b] {
        server.until_metric("tapio_server_log_alone", &[], |value| value == 1.0).await;
        let trouble = own_status(server).await.log_trouble;
        assert!(trouble.contains("resource"), "{trouble}");
    }
    drop(watcher);
    nats.set_jetstream("");
    nats.restart();
    until_undisturbed(&[&a, &b], &wanted).await;
    for server in [a, b] {
        server.pipeline.shutdown().await.expect("a good end");
    }
}

#[test]
fn a_server_reads_on_after_a_restart_of_nats() {
    let Some(mut nats) = Nats::start() else { return };
    let a = Member::start(&nats, "a");
    let rebuilds = || a.cluster.link().rebuilds.load(Ordering::Relaxed);
    // On a slow machine NATS may be away for so long that the server goes on alone.
    let mut attempts = 0..4;
    until("a restart without a rebuild", || {
        attempts.next().expect("it reads on after one of the restarts");
        let before = rebuilds();
        nats.restart();
        settle(&[&a]);
        settle(&[&a]);
        (rebuilds() == before).then_some(())
    });
}

/// Deaths of so many workloads, within less time than an archive is gone through.
const WORKLOADS: u32 = 3000;
/// Entries that may wait, and clues before the finder.
const ENTRIES: u64 = 1000;

/// The most memory that a process has had, in bytes.
fn peak_bytes(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("it is reported");
    peak.trim().trim_end_matches("kB").trim().parse::<u64>().expect("a number") << 10
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_its_log_a_server_stays_bounded_and_catches_up() {
    let Some(nats) = Nats::start() else { return };
    let b = Whole::start(|config| {
        config.cluster = section(&nats, "b");
        // So that it keeps every finding.
        config.resources.max_memory_mb = 0;
    })
    .await;
    let dir = tempfile::tempdir().expect("a directory");
    let cluster = format!("cluster: {{url: \"{}\", server: a}}\ncorrelation: {{buffer_size: {ENTRIES}}}\n", nats.url());
    let a = Running::start_with(dir.path(), &cluster);
    let mut node = Node::new("n1");
    for number in 0..WORKLOADS {
        let pod = format!("shop/web{number}-0");
        let entity = node.kube_container(&format!("Deployment/web{number}"), &pod, &pod);
        node.limit_kill(entity, 100 + number, (100 * SECOND) + u64::from(number) * SECOND / 2);
    }
    let channel =
        Endpoint::from_shared(format!("http://{}", a.grpc)).expect("a URL").connect().await.expect("it listens");
    let mut stream = Stream::open(channel, "", hello("n1", node.epoch)).await.expect("opened");
    stream.welcome().await.expect("welcome");
    nats.pause(true);
    let (left_out, waiting) = ("tapio_server_log_left_out_entries_total", "tapio_server_log_waiting_entries");
    let mut reached = None;
    for (number, bytes) in node.bytes.iter().enumerate() {
        stream.frame(bytes.clone()).await;
        if number % 50 == 49 || number + 1 == node.bytes.len() {
            // It acknowledges all the while.
            stream.acknowledged(number as u64 + 1).await;
            let now = a.metric(waiting);
            if a.metric(left_out) > 0.0 {
                // What is in messages then, and a full queue before them.
                let bound: f64 = *reached.get_or_insert(now + ENTRIES as f64);
                assert!(now <= bound, "{now} entries wait, after there was no room for more than {bound}");
            }
        }
    }
    let deadline = Instant::now() + LIMIT;
    while a.metric(left_out) == 0.0 {
        assert!(Instant::now() < deadline, "everything found room: the bound was not reached");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let peak = peak_bytes(a.child.id());
    assert!(peak < 400 << 20, "{} MiB", peak >> 20);

    nats.pause(false);
    // What b knows of them, it knows by the log.
    let deadline = Instant::now() + 2 * LIMIT;
    loop {
        let found = status(&b).await.findings;
        if found >= u64::from(WORKLOADS) && a.metric("tapio_server_log_alone") == 0.0 && a.metric(waiting) == 0.0 {
            break;
        }
        assert!(Instant::now() < deadline, "{found} of {WORKLOADS} findings have landed");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let found = findings(&b).await;
    assert!(found.iter().all(|one| one.missing_servers.is_empty() && !one.possible), "{found:#?}");
    drop(a);
    b.pipeline.shutdown().await.expect("a good end");
}

#[test]
fn what_waits_in_messages_counts_as_waiting() {
    let Some(nats) = Nats::start() else { return };
    let a = Member::start(&nats, "a");
    settle(&[&a]);
    let registry = prometheus::Registry::new();
    a.cluster.register(&registry).expect("fresh names");
    let waiting = || {
        let families = registry.gather();
        let family =
            families.iter().find(|family| family.name() == "tapio_server_log_waiting_entries").expect("it is there");
        family.get_metric()[0].get_gauge().get_value()
    };
    nats.pause(true);
    // Each death gives three clues.
    a.deliver(&deaths().0);
    until("all of them in messages", || (a.cluster.bus().is_empty() && waiting() >= 60.0).then_some(()));
    nats.pause(false);
    until("an empty queue", || (waiting() == 0.0).then_some(()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_nats_refuses_says_why() {
    let Some(nats) = Nats::with("authorization { user: tapio, password: right }") else { return };
    let dir = tempfile::tempdir().expect("a directory");
    let password = dir.path().join("password");
    std::fs::write(&password, "wrong").expect("written");
    let (user, file) = (Some("tapio".to_owned()), Some(password.clone()));
    let section = ClusterSection { user, password_file: file, ..section(&nats, "a") };
    let a = Whole::start(|config| config.cluster = section).await;
    // A task of its own reports readiness, a moment after the start.
    let text = until("ready", || Some(a.get("/readyz", "")).filter(|(code, _)| *code == 200)).1;
    assert!(text.starts_with("ready\n") && text.contains("authorization violation"), "{text}");
    let own = own_status(&a).await;
    assert!(own.alone && own.log_trouble.contains("authorization violation"), "{own:?}");
    let shown = crate::programs::tapioctl(a.pipeline.grpc_address, &["status"]).output().expect("it starts");
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    assert!(shown.contains("cannot use the servers' log: no connection to NATS"), "{shown}");
    // The file is read again for each connection.
    std::fs::write(&password, "right").expect("written");
    let deadline = Instant::now() + LIMIT;
    while a.get("/readyz", "").1 != "ready\n" {
        assert!(Instant::now() < deadline, "{:?}", a.get("/readyz", ""));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(own_status(&a).await.log_trouble, "");
    a.pipeline.shutdown().await.expect("a good end");
}

#[test]
fn a_disconnected_server_goes_on_alone_others_name_it() {
    let Some(nats) = Nats::start() else { return };
    let (first, second) = deaths();
    let wanted = undisturbed(&[&first, &second]).expect("NATS is there");
    let proxy = Proxy::start(nats.port());
    let a = Member::start(&nats, "a");
    let b = Member::begin(through(&proxy, "b"));
    settle(&[&a, &b]);
    proxy.hold(true);
    a.deliver(&first);
    b.deliver(&second);
    b.findings_when(|found| found.len() == 2 && found.iter().all(|one| one.missing_servers == ["a"]));
    assert!(b.cluster.link().is_alone());
    let by_a = a.findings_when(|found| found.len() == 1 && found[0].missing_servers == ["b"]);
    assert!(!a.cluster.link().is_alone(), "{by_a:#?}");
    proxy.hold(false);
    for member in [&a, &b] {
        until_as(member, &wanted);
    }
}

#[test]
fn a_connection_that_breaks_repeatedly_loses_nothing() {
    let Some(nats) = Nats::start() else { return };
    let mut node = Node::new("n1");
    for round in 0..300 {
        let pod = format!("shop/web-{round}");
        // Each by itself: how many deaths of one workload are taken together is bounded, and shards publish in any order.
        let entity = node.kube_container(&format!("Deployment/web-{round}"), &pod, &pod);
        node.limit_kill(entity, 100 + round, (100 + 30 * u64::from(round)) * SECOND);
    }
    let wanted = undisturbed(&[&node]).expect("NATS is there");
    let proxy = Proxy::start(nats.port());
    let (a, b) = (Member::begin(through(&proxy, "a")), Member::start(&nats, "b"));
    settle(&[&a, &b]);
    let link = Arc::clone(a.cluster.link());
    std::thread::scope(|scope| {
        let proxy = &proxy;
        scope.spawn(move || {
            // Each time when some more of it came through.
            let published = || link.messages_published.load(Ordering::Relaxed);
            for _ in 0..10 {
                let before = published();
                until("another message", || (published() > before).then_some(()));
                proxy.cut();
            }
        });
        a.deliver(&node);
    });
    for member in [&a, &b] {
        until_as(member, &wanted);
    }
}

#[test]
fn a_server_that_fell_behind_says_so_and_goes_on() {
    let Some(nats) = Nats::start() else { return };
    let small = |section: ClusterSection| ClusterSection { max_bytes: 32 << 10, ..section };
    let proxy = Proxy::start(nats.port());
    let a = Member::begin(small(section(&nats, "a")));
    let b = Member::begin(small(through(&proxy, "b")));
    settle(&[&a, &b]);
    // Without a connection: what is sent to one that is only slow waits in its buffers, and b has missed nothing.
    proxy.hold(true);
    proxy.cut();
    // What b does not read before it is deleted.
    let mut late = Node::new("late");
    let entity = late.kube_container("Deployment/late", "shop/late-0", "late");
    late.limit_kill(entity, 100, 100 * SECOND);
    a.deliver(&late);
    let mut noise = Node::new("noise");
    for round in 0..400 {
        let pod = format!("shop/web-{round}");
        let entity = noise.kube_container("Deployment/web", &pod, &pod);
        noise.limit_kill(entity, 100 + round, (100 + 30 * u64::from(round)) * SECOND);
    }
    a.deliver(&noise);
    settle(&[&a]);
    proxy.hold(false);
    until("b says so", || (b.cluster.link().fell_behind.load(Ordering::Relaxed) >= 1).then_some(()));
    until("the log's end", || b.cluster.link().is_caught_up().then_some(()));
    let mut more = Node::new("more");
    until("both say how little is left", || {
        // The messages before may have left room.
        let round = more.frames.len() as u64;
        let entity = more.kube_container("Deployment/more", "shop/more-0", &format!("more-{round}"));
        more.limit_kill(entity, 100 + round as u32, (100 + 30 * round) * SECOND);
        a.deliver_part(&more, round as usize..more.frames.len());
        [&a, &b].iter().all(|of| of.cluster.link().short_ns.load(Ordering::Relaxed) > 0).then_some(())
    });
    let entity = late.kube_container("Deployment/late", "shop/late-0", "late");
    // When the first frame that b knows was begun, b cannot say: only what comes after it is known to be complete.
    late.lethal(19_000 * SECOND);
    late.limit_kill(entity, 101, 20_000 * SECOND);
    let frames = late.frames.len();
    a.deliver_part(&late, frames - 2..frames);
    settle(&[&a, &b]);
    let of_late = |member: &Member| {
        let mut found = member.findings();
        found.retain(|one| one.ended_ns >= crate::correlate_node::BOOTED + 19_000 * SECOND);
        found
    };
    assert_eq!(of_late(&a).len(), 1, "{:#?}", a.findings());
    let alike = |one: &Finding, other: &Finding| {
        (&one.id, &one.pattern, &one.title, one.confidence)
            == (&other.id, &other.pattern, &other.title, other.confidence)
    };
    until("the same on both", || (of_late(&b).len() == 1 && alike(&of_late(&b)[0], &of_late(&a)[0])).then_some(()));
    assert!(!of_late(&b)[0].possible, "{:#?}", of_late(&b));
    assert_eq!(of_late(&b)[0].entity.as_ref().map(|entity| entity.workload.as_str()), Some("Deployment/late"));
}

#[test]
fn a_message_missing_from_the_log_does_not_stop_reading() {
    let Some(nats) = Nats::start() else { return };
    let a = Member::start(&nats, "a");
    let (first, second) = deaths();
    a.deliver(&first);
    settle(&[&a]);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let client = async_nats::connect(nats.url()).await.expect("it listens");
        let log = async_nats::jetstream::new(client).get_stream("TAPIO_default_LOG").await.expect("it is there");
        let second = log.get_info().await.expect("it is reported").state.first_sequence + 1;
        assert!(log.delete_message(second).await.expect("answered"));
    });
    let b = Member::begin(section(&nats, "b"));
    until("the log's end", || b.cluster.link().is_caught_up().then_some(()));
    b.deliver(&second);
    let began = Instant::now();
    let found =
        b.findings_when(|found| found.iter().any(|one| one.ended_ns > crate::correlate_node::BOOTED + 399 * SECOND));
    // There is no archive that could say what was in it.
    let lacks = |one: &Finding| one.missing_servers == ["deleted messages of the servers' log"];
    assert!(found.iter().all(lacks), "{found:#?}");
    assert!(b.cluster.link().rebuilds.load(Ordering::Relaxed) <= 2, "{:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_server_leads_by_log_or_as_the_only_one() {
    let Some(nats) = Nats::start() else { return };
    let a = Whole::start(|config| config.cluster = section(&nats, "a")).await;
    let b = Whole::start(|config| config.cluster = section(&nats, "b")).await;
    let leaders = async |server: &Whole| {
        let answer = status(server).await;
        answer.servers.into_iter().filter(|server| server.leads).map(|server| server.server).collect::<Vec<_>>()
    };
    let deadline = Instant::now() + LIMIT;
    let led = loop {
        let led = leaders(&a).await;
        if !led.is_empty() {
            break led;
        }
        assert!(Instant::now() < deadline, "nobody leads");
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    assert_eq!((led.len(), leaders(&b).await), (1, led.clone()));
    let says = |server: &Whole| server.metric("tapio_server_log_leader", &[]);
    assert_eq!((says(&a), says(&b)), if led == ["a"] { (1.0, 0.0) } else { (0.0, 1.0) });
    b.until_metric("tapio_server_log_leader_changes_total", &[], |value| value >= 1.0).await;
    for server in [a, b] {
        server.pipeline.shutdown().await.expect("a good end");
    }
    let sole = Whole::start(|_| {}).await;
    assert_eq!(says(&sole), 1.0);
    assert!(findings(&sole).await.is_empty());
    sole.pipeline.shutdown().await.expect("a good end");
}

#[test]
fn a_slow_finder_is_not_a_missing_log() {
    let Some(nats) = Nats::start() else { return };
    let mut node = Node::new("n1");
    let web = node.kube_container("Deployment/web", "shop/web-0", "c0");
    (0..200).for_each(|turn| node.limit_kill(web, 100 + turn, (100 + u64::from(turn)) * SECOND));
    let wanted = undisturbed(&[&node]).expect("NATS is there");
    let a = Member::start(&nats, "a");
    let link = a.cluster.link();
    // There is always more for the finder to do than its queue has room for.
    let is_over = Arc::new(AtomicBool::new(false));
    let over = Over(Arc::clone(&is_over));
    std::thread::scope(|scope| {
        let over = over;
        scope.spawn(|| {
            while !is_over.load(Ordering::Acquire) {
                let now_ns = now_ns();
                let clock = NodeClock { node: NodeRef::named("n0"), epoch: 1, boottime_ns: 1, realtime_ns: now_ns };
                let entries = (0..20_000).map(|_| Entry::Clock(clock.clone())).collect();
                let batch = Batch { server: "a".into(), address: String::new(), entries };
                a.finder.send(batch, now_ns).expect("the finder runs");
            }
        });
        (0..node.frames.len()).for_each(|frame| a.deliver_part(&node, frame..frame + 1));
        until("a reader that waits for its finder", || link.is_held.load(Ordering::Acquire).then_some(()));
        // For much longer than a message may take to be read.
        let (began, rebuilds) = (link.published_seq.load(Ordering::Acquire), link.rebuilds.load(Ordering::Acquire));
        until("what a server says every two seconds, six times", || {
            assert!(!link.is_alone(), "it went on alone, though the log is there");
            (link.published_seq.load(Ordering::Acquire) >= began + 6).then_some(())
        });
        drop(over);
        assert_eq!(link.rebuilds.load(Ordering::Acquire), rebuilds);
    });
    settle(&[&a]);
    assert_eq!(final_content(&a.findings()), wanted);
}

/// Ends what runs until it is over, also where a test fails.
struct Over(Arc<AtomicBool>);

impl Drop for Over {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}
