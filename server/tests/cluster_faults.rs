//! Faults of the log that several servers read. After each of them they find what servers find that nothing disturbs.

use std::sync::atomic::Ordering;
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

use crate::cluster_support::*;
use crate::cluster_whole::{findings, findings_when, limit_kill, ship, status};
use crate::correlate_node::{Node, SECOND};
use crate::whole_server::Whole;
use tapio_server::cluster::ClusterSection;
use tapio_wire::service::{Finding, ServerStatus};

fn through(proxy: &Proxy, server: &str) -> ClusterSection {
    ClusterSection { url: proxy.url(), server: Some(server.into()), ..ClusterSection::default() }
}

/// Deaths of one workload's replicas on two nodes, and of another's on the second.
fn deaths() -> (Node, Node) {
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

fn by_id(findings: &[Finding]) -> Vec<Finding> {
    let mut found = final_content(findings);
    found.sort_by(|a, b| a.id.cmp(&b.id));
    found
}

/// Waits until a server says what undisturbed ones say.
fn until_as(member: &Member, wanted: &[Finding]) {
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
async fn own_status(server: &Whole) -> ServerStatus {
    let is_own = |told: &ServerStatus| told.address.is_empty();
    status(server).await.servers.into_iter().find(is_own).expect("it is one of several")
}

/// Waits until both servers say what undisturbed ones say, and that the ledger closes.
async fn until_undisturbed(servers: &[&Whole], wanted: &[Finding]) {
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
    // Each question to NATS takes a good tenth of a second, and what the deaths are told by a part of a second.
    proxy.slow(Duration::from_millis(50), 32 << 10);
    let took = ship(&a, &first, 0).await.max(ship(&b, &second, 0).await);
    assert!(took < NOT_WAITED, "{took:?}");
    // It is slow still when all is told.
    until_undisturbed(&[&a, &b], &wanted).await;
    for server in [a, b] {
        server.pipeline.shutdown().await.expect("a good end");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_that_is_full_delays_no_acknowledgement_and_takes_all_of_it_when_there_is_room() {
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
        let told = own_status(server).await.log_trouble;
        assert!(told.contains("resource"), "{told}");
    }
    drop(watcher);
    nats.set_jetstream("");
    nats.restart();
    until_undisturbed(&[&a, &b], &wanted).await;
    for server in [a, b] {
        server.pipeline.shutdown().await.expect("a good end");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_nats_refuses_says_why_until_it_is_let_in() {
    let Some(nats) = Nats::with("authorization { user: tapio, password: right }") else { return };
    let dir = tempfile::tempdir().expect("a directory");
    let password = dir.path().join("password");
    std::fs::write(&password, "wrong").expect("written");
    let (user, file) = (Some("tapio".to_owned()), Some(password.clone()));
    let section = ClusterSection { user, password_file: file, ..section(&nats, "a") };
    let a = Whole::start(|config| config.cluster = section).await;
    let (code, text) = a.get("/readyz", "");
    assert!(code == 200 && text.starts_with("ready\n") && text.contains("authorization violation"), "{text}");
    let told = own_status(&a).await;
    assert!(told.alone && told.log_trouble.contains("authorization violation"), "{told:?}");
    let shown = std::process::Command::new(env!("CARGO_BIN_EXE_tapioctl"))
        .args(["--server", &a.pipeline.grpc_address.to_string(), "status"])
        .output()
        .expect("it starts");
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    assert!(shown.contains("cannot use the servers' log: no connection to NATS"), "{shown}");
    // The file is read anew for each connection.
    std::fs::write(&password, "right").expect("written");
    let deadline = Instant::now() + LIMIT;
    while a.get("/readyz", "").1 != "ready\n" {
        assert!(Instant::now() < deadline, "{:?}", a.get("/readyz", ""));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(own_status(&a).await.log_trouble, "");
    a.pipeline.shutdown().await.expect("a good end");
}

/// Far more frames than tokio lets one task poll for at once, of deaths whose counts grow by each of them.
fn many_deaths() -> (Node, Node) {
    let (mut first, mut second) = (Node::new("n1"), Node::new("n2"));
    for round in 0..400_u32 {
        let node = if round % 2 == 0 { &mut first } else { &mut second };
        let number = round / 2 % 16;
        let pod = format!("shop/w{number}-{}", round % 2);
        let entity = node.kube_container(&format!("Deployment/w{number}"), &pod, &pod);
        node.limit_kill(entity, 1000 + round, (100 + u64::from(round)) * SECOND);
    }
    (first, second)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_log_of_many_frames_is_filled_again_by_all_servers() {
    let Some(mut nats) = Nats::start() else { return };
    let (first, second) = many_deaths();
    let wanted = undisturbed(&[&first, &second]).expect("NATS is there");
    let a = Whole::start(|config| config.cluster = section(&nats, "a")).await;
    let b = Whole::start(|config| config.cluster = section(&nats, "b")).await;
    ship(&a, &first, 0).await;
    ship(&b, &second, 0).await;
    until_undisturbed(&[&a, &b], &wanted).await;
    nats.restart_empty();
    for server in [&a, &b] {
        server.until_metric("tapio_server_log_rebuilds_total", &[], |value| value >= 2.0).await;
        server.until_metric("tapio_server_log_healing_seconds", &[], |value| value == 0.0).await;
    }
    // Whoever joins now knows only what the log says.
    let c = Whole::start(|config| config.cluster = section(&nats, "c")).await;
    until_undisturbed(&[&a, &b, &c], &wanted).await;
    for server in [a, b, c] {
        server.pipeline.shutdown().await.expect("a good end");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_filling_the_log_again_ends_when_it_is_asked_to() {
    let Some(mut nats) = Nats::start() else { return };
    let (first, _) = many_deaths();
    let proxy = Proxy::start(nats.port());
    let a = Whole::start(|config| {
        config.cluster = through(&proxy, "a");
        // Whoever goes through the archive waits for room again and again.
        config.correlation.buffer_size = 16;
    })
    .await;
    ship(&a, &first, 0).await;
    findings_when(&a, |found| found.len() == 16).await;
    proxy.slow(Duration::from_millis(20), 64 << 10);
    nats.restart_empty();
    a.until_metric("tapio_server_log_healing_seconds", &[], |value| value > 0.0).await;
    proxy.hold(true);
    let told = own_status(&a).await;
    assert!(told.healing_ns > 0, "{told:?}");
    let ended = tokio::time::timeout(Duration::from_secs(20), a.pipeline.shutdown()).await;
    ended.expect("it ends within seconds").expect("a good end");
}

#[test]
fn a_server_that_is_cut_off_from_the_log_goes_on_alone_and_the_others_name_it() {
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
fn a_connection_that_breaks_again_and_again_loses_nothing_of_what_was_on_its_way() {
    let Some(nats) = Nats::start() else { return };
    let mut node = Node::new("n1");
    for round in 0..300 {
        let pod = format!("shop/web-{round}");
        // Each by itself: how many deaths of one workload are taken together is bounded, and in which order shards tell is open.
        let entity = node.kube_container(&format!("Deployment/web-{round}"), &pod, &pod);
        node.limit_kill(entity, 100 + round, (100 + 30 * u64::from(round)) * SECOND);
    }
    let wanted = undisturbed(&[&node]).expect("NATS is there");
    let proxy = Proxy::start(nats.port());
    let (a, b) = (Member::begin(through(&proxy, "a")), Member::start(&nats, "b"));
    settle(&[&a, &b]);
    let link = std::sync::Arc::clone(a.cluster.link());
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
fn a_server_that_fell_behind_the_log_says_so_and_finds_what_comes_after() {
    let Some(nats) = Nats::start() else { return };
    let small = |section: ClusterSection| ClusterSection { max_bytes: 32 << 10, ..section };
    let proxy = Proxy::start(nats.port());
    let a = Member::begin(small(section(&nats, "a")));
    let b = Member::begin(small(through(&proxy, "b")));
    settle(&[&a, &b]);
    proxy.hold(true);
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
    let entity = late.kube_container("Deployment/late", "shop/late-0", "late");
    late.limit_kill(entity, 101, 20_000 * SECOND);
    let frames = late.frames.len();
    a.deliver_part(&late, frames - 1..frames);
    settle(&[&a, &b]);
    let of_late = |member: &Member| {
        let mut found = member.findings();
        found.retain(|one| one.ended_ns >= crate::correlate_node::BOOTED + 19_000 * SECOND);
        final_content(&found)
    };
    assert_eq!(of_late(&a).len(), 1, "{:#?}", a.findings());
    assert_eq!(of_late(&b), of_late(&a));
    assert_eq!(of_late(&b)[0].entity.as_ref().map(|entity| entity.workload.as_str()), Some("Deployment/late"));
}

#[test]
fn a_message_that_is_missing_in_the_middle_of_the_log_does_not_keep_a_server_from_its_end() {
    let Some(nats) = Nats::start() else { return };
    let a = Member::start(&nats, "a");
    let (first, second) = deaths();
    a.deliver(&first);
    settle(&[&a]);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let client = async_nats::connect(nats.url()).await.expect("it listens");
        let log = async_nats::jetstream::new(client).get_stream("TAPIO_default_LOG").await.expect("it is there");
        let second = log.get_info().await.expect("told").state.first_sequence + 1;
        assert!(log.delete_message(second).await.expect("answered"));
    });
    let b = Member::begin(section(&nats, "b"));
    until("the log's end", || b.cluster.link().is_caught_up().then_some(()));
    b.deliver(&second);
    let began = Instant::now();
    b.findings_when(|found| found.iter().any(|one| one.ended_ns > crate::correlate_node::BOOTED + 399 * SECOND));
    assert!(b.cluster.link().rebuilds.load(Ordering::Relaxed) <= 2, "{:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_server_leads_the_status_names_it_and_without_a_log_the_only_one_does() {
    let Some(nats) = Nats::start() else { return };
    let a = Whole::start(|config| config.cluster = section(&nats, "a")).await;
    let b = Whole::start(|config| config.cluster = section(&nats, "b")).await;
    let leaders = async |server: &Whole| {
        let told = status(server).await;
        told.servers.into_iter().filter(|server| server.leads).map(|server| server.server).collect::<Vec<_>>()
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
fn a_finder_that_is_slow_is_no_log_that_is_away() {
    let Some(nats) = Nats::start() else { return };
    let mut node = Node::new("n1");
    let web = node.kube_container("Deployment/web", "shop/web-0", "c0");
    (0..200).for_each(|turn| node.limit_kill(web, 100 + turn, (100 + u64::from(turn)) * SECOND));
    let wanted = undisturbed(&[&node]).expect("NATS is there");
    let a = Member::start(&nats, "a");
    let link = a.cluster.link();
    // The finder waits until somebody takes what it has found.
    let (journal, changes) = sync_channel(0);
    a.store.set_journal(journal);
    (0..node.frames.len()).for_each(|frame| a.deliver_part(&node, frame..frame + 1));
    until("a reader that waits for its finder", || link.is_held.load(Ordering::Acquire).then_some(()));
    // For much longer than a message may take to be read.
    let (began, rebuilds) = (link.published_seq.load(Ordering::Acquire), link.rebuilds.load(Ordering::Acquire));
    until("what a server says every two seconds, six times", || {
        assert!(!link.is_alone(), "it went on alone, though the log is there");
        (link.published_seq.load(Ordering::Acquire) >= began + 6).then_some(())
    });
    let reader = std::thread::spawn(move || changes.iter().count());
    settle(&[&a]);
    assert_eq!(link.rebuilds.load(Ordering::Acquire), rebuilds);
    assert_eq!(final_content(&a.findings()), wanted);
    drop(a);
    reader.join().expect("it counts");
}
