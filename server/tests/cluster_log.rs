//! Several servers, one answer: each sees a part, and all say the same. The log is a real NATS.

use std::sync::Arc;

use async_nats::jetstream::message::PublishMessage;

use crate::cluster_support::*;
use crate::correlate_node::{MIB, MS, Node, Process, SECOND, SIGKILL};
use tapio_server::cluster::Outgoing;
use tapio_server::correlate::batch::{Batch, Entry};
use tapio_server::correlate::clue::{Clue, ClueDetail, EvidenceId, Exec, NsPid};
use tapio_server::correlate::{
    ClueBus, CorrelateConfig, Correlator, EntityInfo, FrameBegun, LossBook, NodeClock, Topology,
};
use tapio_server::findings::PatternSet;
use tapio_wire::event::{EntityId, Role};
use tapio_wire::service::Finding;

const LIVENESS: &str = "Liveness probe failed: HTTP probe failed with statuscode: 503";

fn web(node: &mut Node) -> EntityId {
    node.kube_container("Deployment/web", "shop/web-0", "c0")
}

/// What the node itself sees, and what the collector that watches Kubernetes sees, which is on another node.
fn probe_kill() -> (Node, Node) {
    let (mut node, mut elected) = (Node::new("n1"), Node::new("n2"));
    let entity = web(&mut node);
    node.stop(entity, 100 * SECOND);
    let pod = elected.kube_pod("Deployment/web", "shop/web-0");
    elected.kube_event(98 * SECOND, pod, "Unhealthy", LIVENESS);
    elected.lethal(98 * SECOND);
    (node, elected)
}

#[test]
fn two_servers_with_half_the_events_each_find_the_same() {
    let Some(nats) = Nats::start() else { return };
    let (a, b) = (Member::start(&nats, "a"), Member::start(&nats, "b"));
    let (node, elected) = probe_kill();
    a.deliver(&node);
    b.deliver(&elected);
    let by_a = a.until_patterns(&["liveness-probe-kill"]);
    let by_b = b.until_patterns(&["liveness-probe-kill"]);
    settle(&[&a, &b]);
    assert_eq!((a.findings(), b.findings()), (by_a.clone(), by_b));
    assert_eq!(a.findings(), b.findings(), "to the byte, with revision and time");
    assert!(!by_a[0].possible && by_a[0].missing_servers.is_empty(), "{by_a:#?}");
}

#[test]
fn without_the_log_a_server_names_missing_peers_and_recovers() {
    let Some(mut nats) = Nats::start() else { return };
    let (a, b) = (Member::start(&nats, "a"), Member::start(&nats, "b"));
    settle(&[&a, &b]);
    nats.kill();
    let (node, elected) = probe_kill();
    a.deliver(&node);
    b.deliver(&elected);
    // It does not know of the probe, and says that it may not know all.
    let alone = a.until_patterns(&["stopped"]);
    assert!(alone[0].possible, "{alone:#?}");
    assert_eq!(alone[0].missing_servers, ["b"]);
    nats.restart();
    let by_a = a.until_patterns(&["liveness-probe-kill"]);
    let by_b = b.until_patterns(&["liveness-probe-kill"]);
    assert_eq!(by_a[0].id, alone[0].id, "the same death");
    assert!(by_a[0].revision > alone[0].revision, "{by_a:#?}");
    assert!(!by_a[0].possible && by_a[0].missing_servers.is_empty(), "{by_a:#?}");
    assert_eq!(final_content(&by_a), final_content(&by_b));
}

#[test]
fn a_finding_that_the_log_does_not_confirm_is_withdrawn() {
    let Some(mut nats) = Nats::start() else { return };
    let (a, b) = (Member::start(&nats, "a"), Member::start(&nats, "b"));
    settle(&[&a, &b]);
    nats.kill();
    // Two replicas of one workload die of their limit, one on each server's node: one finding of two deaths, and not two.
    let (mut first, mut second) = (Node::new("n1"), Node::new("n2"));
    for (node, pod, key) in [(&mut first, "shop/web-0", "c0"), (&mut second, "shop/web-1", "c1")] {
        let entity = node.kube_container("Deployment/web", pod, key);
        node.limit_kill(entity, 100, 100 * SECOND);
    }
    a.deliver(&first);
    b.deliver(&second);
    let alone = [a.until_patterns(&["memory-limit-kill"]), b.until_patterns(&["memory-limit-kill"])];
    nats.restart();
    for member in [&a, &b] {
        let found = until("one finding of two deaths", || {
            let found = member.findings();
            (found.len() == 1 && found[0].count == 2).then_some(found)
        });
        assert!(alone.iter().all(|alone| alone[0].id != found[0].id));
        // Whoever asks for what was published before gets what took its place.
        assert_eq!(member.findings(), found);
    }
    settle(&[&a, &b]);
    assert_eq!(final_content(&a.findings()), final_content(&b.findings()));
}

#[test]
fn a_server_that_joins_late_knows_events_and_facts() {
    let Some(nats) = Nats::start() else { return };
    let a = Member::start(&nats, "a");
    let (node, mut elected) = probe_kill();
    a.deliver(&node);
    a.deliver(&elected);
    let by_a = a.until_patterns(&["liveness-probe-kill"]);
    settle(&[&a]);
    let c = Member::start(&nats, "c");
    assert_eq!(final_content(&c.findings()), final_content(&by_a));
    // What is sent to the newcomer is explained with what it never received: the pod's workload.
    let entity = web(&mut elected);
    elected.limit_kill(entity, 300, 2000 * SECOND);
    c.deliver_part(&elected, 1..elected.frames.len());
    until("the second death", || c.findings().iter().find(|one| one.pattern == "memory-limit-kill").cloned());
    settle(&[&a, &c]);
    assert_eq!(final_content(&a.findings()), final_content(&c.findings()));
}

#[test]
fn what_is_sent_twice_counts_once() {
    let Some(nats) = Nats::start() else { return };
    let (a, b) = (Member::start(&nats, "a"), Member::start(&nats, "b"));
    let mut node = Node::new("n1");
    let entity = web(&mut node);
    for round in 0..3 {
        node.limit_kill(entity, 100 + round, (100 + u64::from(round) * 5) * SECOND);
    }
    a.deliver(&node);
    let once = a.findings_when(|found| found.iter().any(|one| one.count == 3));
    settle(&[&a, &b]);
    // The acknowledgements were lost, so the collector sends all of it to the other server too.
    b.deliver(&node);
    settle(&[&a, &b]);
    assert_eq!(a.findings(), once);
    assert_eq!(final_content(&b.findings()), final_content(&once));
}

#[test]
fn a_server_that_ends_says_so_a_killed_one_cannot() {
    let Some(nats) = Nats::start() else { return };
    let (a, b, c) = (Member::start(&nats, "a"), Member::start(&nats, "b"), Member::start(&nats, "c"));
    settle(&[&a, &b, &c]);
    b.cluster.stop();
    // Killed: nothing more is heard of it.
    c.cluster.freeze();
    until("silence", || (a.cluster.silent() == ["c"]).then_some(()));
    let mut node = Node::new("n1");
    let entity = web(&mut node);
    node.limit_kill(entity, 100, 100 * SECOND);
    a.deliver(&node);
    let found = a.until_patterns(&["memory-limit-kill"]);
    assert_eq!(found[0].missing_servers, ["c"]);
    assert!(found[0].loss.as_ref().is_some_and(|loss| loss.open_interval), "{found:#?}");
}

#[test]
fn a_moved_stream_is_a_gap_only_without_the_log() {
    let Some(nats) = Nats::start() else { return };
    let (a, b) = (Member::start(&nats, "a"), Member::start(&nats, "b"));
    // The OOM record goes to one server, the exit to the other.
    let mut node = Node::new("n1");
    let entity = web(&mut node);
    let process = Process::init(entity, 100, "nginx");
    node.oom(100 * SECOND, process, 64 * MIB, 64 * MIB);
    node.signal(100 * SECOND, process, SIGKILL, None);
    node.lethal(100 * SECOND + MS);
    // A collector describes on a new stream what it speaks of.
    web(&mut node);
    node.exit(100 * SECOND + 2 * MS, process, SIGKILL);
    node.lethal(101 * SECOND);
    a.deliver_part(&node, 0..1);
    b.deliver_part(&node, 1..2);
    let found =
        b.findings_when(|found| found.len() == 1 && found[0].loss.as_ref().is_some_and(|loss| !loss.open_interval));
    assert_eq!((found[0].pattern.as_str(), found[0].possible), ("memory-limit-kill", false));
    settle(&[&a, &b]);
    assert_eq!(a.findings(), b.findings());

    let alone = crate::correlate_node::Machine::start(1);
    alone.deliver(&node.node, &node.frames[1..]);
    let found = alone.findings();
    assert_eq!(found.len(), 1, "{found:#?}");
    assert!(found[0].possible && found[0].loss.as_ref().is_some_and(|loss| loss.open_interval), "{found:#?}");
}

#[test]
fn an_unreadable_message_is_counted_and_the_next_are_read() {
    let Some(nats) = Nats::start() else { return };
    let a = Member::start(&nats, "a");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let client = async_nats::connect(nats.url()).await.expect("it listens");
        let context = async_nats::jetstream::new(client);
        for message in [&b""[..], b"\xff of a later version", b"\x01 damaged"] {
            let message = PublishMessage::build().payload(message.into()).header("Tapio-Server", "x");
            let ack = context.send_publish("tapio.default.batch.x", message).await.expect("sent");
            ack.await.expect("taken");
        }
    });
    let mut node = Node::new("n1");
    let entity = web(&mut node);
    node.limit_kill(entity, 100, 100 * SECOND);
    a.deliver(&node);
    let found = a.until_patterns(&["memory-limit-kill"]);
    assert_eq!(found[0].missing_servers, ["x"], "what it said may have mattered");
    assert_eq!(a.cluster.link().unreadable.load(std::sync::atomic::Ordering::Relaxed), 3);
}

/// What a server's shards say of these nodes, in messages of a few entries.
fn messages_of(server: &str, nodes: &[Node]) -> Vec<Vec<u8>> {
    let patterns = PatternSet::embedded().expect("embedded patterns are valid");
    let config = CorrelateConfig { shards: Some(1), wanted: patterns.kinds(), ..CorrelateConfig::default() };
    let outgoing = Arc::new(Outgoing::new(100_000));
    let bus: Arc<dyn ClueBus> = Arc::<Outgoing>::clone(&outgoing);
    let topology = Arc::new(Topology::new(100_000));
    let correlator =
        Correlator::start(&config, topology, Arc::new(LossBook::default()), bus).expect("the correlator starts");
    let mut messages = Vec::new();
    let mut write = |mut entries: Vec<Entry>| {
        while !entries.is_empty() {
            let rest = entries.split_off(entries.len().min(3));
            let batch = Batch { server: server.into(), address: String::new(), entries };
            messages.push(batch.encode().expect("written"));
            entries = rest;
        }
    };
    for node in nodes {
        for frame in &node.frames {
            correlator.deliver_blocking(node.node.clone(), Arc::clone(frame)).expect("the correlator runs");
            correlator.drained_blocking().expect("the correlator runs");
            outgoing.flush();
            write(outgoing.take());
        }
    }
    messages
}

/// The frame after may describe an entity before the shard has come to the clue that names it.
#[test]
fn a_description_that_overtakes_its_clue_is_published() {
    let outgoing = Outgoing::new(1000);
    let mut node = Node::new("n1");
    let entity = web(&mut node);
    node.exit(100 * SECOND, Process::init(entity, 100, "app"), 1 << 8);
    let frame = node.frame(tapio_wire::event::Lane::Lethal, 101 * SECOND);
    let named = EntityInfo { container: "web".into(), ..EntityInfo::unknown(&node.node, entity) };
    let described = vec![Arc::new(named)];
    outgoing.began(&FrameBegun { node: &node.node, frame: &frame, described, lost: None });
    let clue = Clue {
        entity: Arc::new(EntityInfo::unknown(&node.node, entity)),
        pid: 100,
        boottime_ns: 100 * SECOND,
        realtime_ns: 100 * SECOND,
        evidence: EvidenceId { node: node.node.id, epoch: 1, seq: 0, index: 0 },
        detail: ClueDetail::Exec(Exec {
            comm: "app".into(),
            parent_pid: 1,
            ns: NsPid { pid: 1, level: 1 },
            role: Role::First,
        }),
    };
    outgoing.publish(clue).expect("open");
    let names: Vec<String> = outgoing
        .take()
        .into_iter()
        .filter_map(|entry| match entry {
            Entry::Clue(clue) => Some(clue.entity.container.clone()),
            Entry::Described(entity) => Some(entity.container.clone()),
            _ => None,
        })
        .collect();
    assert_eq!(names, ["", "web"]);
}

/// What a finder makes of messages in this order; the log takes one each 10 ms.
fn read_in_order<'a>(messages: impl IntoIterator<Item = &'a Vec<u8>>) -> Vec<Finding> {
    let (finder, store) = finder();
    for (number, message) in messages.into_iter().enumerate() {
        let at_ns = 1_800_000_000 * SECOND + number as u64 * 10 * MS;
        finder.send(Batch::decode(message).expect("as it was written"), at_ns).expect("the finder runs");
    }
    finder.bus().barrier().expect("the finder runs");
    store.everything().0.iter().map(|finding| (**finding).clone()).collect()
}

/// More deaths than are looked at again for their time alone, while server b is silent and once it has spoken again.
#[test]
fn confidence_lowered_by_a_servers_silence_rises_when_it_speaks() {
    const DEATHS: u32 = 1500;
    let mut node = Node::new("n1");
    for number in 0..DEATHS {
        let pod = format!("shop/w{number}-0");
        let entity = node.kube_container(&format!("Deployment/w{number}"), &pod, &pod);
        node.limit_kill(entity, 1000 + number, (100 + u64::from(number)) * SECOND);
    }
    let messages = messages_of("a", &[node]);
    let run = || {
        let (finder, store) = finder();
        let began_ns = 1_800_000_000 * SECOND;
        let b_speaks = |at_ns| {
            let nothing = Batch { server: "b".into(), address: String::new(), entries: Vec::new() };
            finder.send(nothing, at_ns).expect("the finder runs");
        };
        let found = || {
            finder.bus().barrier().expect("the finder runs");
            store.everything().0.iter().map(|finding| (**finding).clone()).collect::<Vec<Finding>>()
        };
        b_speaks(began_ns);
        for (number, message) in messages.iter().enumerate() {
            let at_ns = began_ns + 20 * SECOND + number as u64 * MS;
            finder.send(Batch::decode(message).expect("as it was written"), at_ns).expect("the finder runs");
        }
        let lowered = found();
        b_speaks(began_ns + 20 * SECOND + messages.len() as u64 * MS);
        (lowered, found())
    };
    let (lowered, lifted) = run();
    assert_eq!(lowered.len(), DEATHS as usize);
    assert!(
        lowered
            .iter()
            .all(|one| one.missing_servers == ["b"] && one.loss.as_ref().is_some_and(|loss| loss.open_interval))
    );
    let in_doubt =
        |one: &&Finding| !one.missing_servers.is_empty() || one.loss.as_ref().is_none_or(|loss| loss.open_interval);
    assert_eq!((lifted.len(), lifted.iter().filter(in_doubt).count()), (DEATHS as usize, 0));
    assert_eq!(run().1, lifted, "the log alone decides");
}

/// Deaths whose evidence is spread over three servers.
fn spread() -> Vec<Vec<Vec<u8>>> {
    let (node, elected) = probe_kill();
    let (mut first, mut second) = (Node::new("n3"), Node::new("n4"));
    for (node, pod, key) in [(&mut first, "shop/db-0", "c7"), (&mut second, "shop/db-1", "c8")] {
        let entity = node.kube_container("Deployment/db", pod, key);
        node.limit_kill(entity, 200, 110 * SECOND);
        node.limit_kill(entity, 201, 140 * SECOND);
    }
    vec![messages_of("a", &[node, first]), messages_of("b", &[elected]), messages_of("c", &[second])]
}

#[test]
fn the_same_log_gives_the_same_findings_to_the_byte() {
    let messages: Vec<Vec<u8>> = spread().into_iter().flatten().collect();
    let once = read_in_order(&messages);
    assert!(once.len() >= 2, "{once:#?}");
    for _ in 0..5 {
        assert_eq!(read_in_order(&messages), once);
    }
}

#[test]
fn any_interleaving_of_servers_messages_gives_the_same_findings() {
    let messages = spread();
    let last_word = |found: Vec<Finding>| {
        let mut found = final_content(&found);
        found.sort_by(|a, b| a.id.cmp(&b.id));
        found
    };
    let wanted = last_word(read_in_order(messages.iter().flatten()));
    for seed in 1..=40_u64 {
        let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut left: Vec<_> = messages.iter().map(|of_one| of_one.iter()).collect();
        let mut mixed = Vec::new();
        while left.iter().any(|of_one| of_one.len() > 0) {
            // xorshift64 (Marsaglia 2003).
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let server = random as usize % left.len();
            mixed.extend(left[server].next());
        }
        let found = last_word(read_in_order(mixed));
        let (found, wanted) = (format!("{found:#?}"), format!("{wanted:#?}"));
        let difference = found.lines().zip(wanted.lines()).find(|(found, wanted)| found != wanted);
        assert!(found == wanted, "seed {seed}: {difference:?} in {found}");
    }
}

#[test]
fn a_message_of_this_version_is_read_for_ever() {
    let golden = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/log-message-v1.bin");
    let (mut node, elected) = probe_kill();
    // With the OOM kill and the burst: every kind of `Detail` that a pattern asks for.
    let entity = node.kube_container("Deployment/web", "shop/web-1", "b0");
    node.limit_kill(entity, 300, 200 * SECOND);
    node.reclaim(200 * SECOND, entity);
    let now: Vec<u8> = [node, elected].into_iter().flat_map(|node| messages_of("a", &[node])).flatten().collect();
    if std::env::var_os("TAPIO_WRITE_GOLDEN").is_some() {
        std::fs::write(&golden, &now).expect("written");
    }
    let known = std::fs::read(&golden).expect("TAPIO_WRITE_GOLDEN=1 writes it");
    assert!(
        known == now,
        "the layout of messages has changed: give batch::VERSION another number, and a golden file of it"
    );
}

#[test]
fn a_gap_that_shows_after_a_finding_makes_it_doubtful() {
    // The first frame went to a server that never wrote of it; of the second the clues stand before the stretch.
    let mut node = Node::new("n1");
    let entity = web(&mut node);
    node.stop(entity, 50 * SECOND);
    let entity = web(&mut node);
    node.stop(entity, 100 * SECOND);
    node.frames.remove(0);
    let found = read_in_order(&messages_of("b", &[node]));
    assert_eq!(found.len(), 1, "{found:#?}");
    assert!(found[0].possible && found[0].loss.as_ref().is_some_and(|loss| loss.open_interval), "{found:#?}");
}

#[test]
fn a_server_started_without_the_log_says_it_knows_nobody() {
    let Some(mut nats) = Nats::start() else { return };
    let b = Member::start(&nats, "b");
    settle(&[&b]);
    nats.kill();
    let a = Member::begin(section(&nats, "a"));
    let (node, elected) = probe_kill();
    a.deliver(&node);
    let alone = a.until_patterns(&["stopped"]);
    assert!(alone[0].possible, "{alone:#?}");
    assert_eq!(alone[0].missing_servers, ["all other servers"]);
    b.deliver(&elected);
    nats.restart();
    let found = a.until_patterns(&["liveness-probe-kill"]);
    assert!(!found[0].possible && found[0].missing_servers.is_empty() && found[0].id == alone[0].id, "{found:#?}");
}

#[test]
fn a_changed_password_is_read_again() {
    let guarded = |password: &str| format!("authorization {{ user: tapio, password: \"{password}\" }}");
    let Some(mut nats) = Nats::with(&guarded("first")) else { return };
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), "first\n").expect("written");
    let guarded_section = |server: &str| {
        let mut section = section(&nats, server);
        (section.user, section.password_file) = (Some("tapio".into()), Some(file.path().to_owned()));
        section
    };
    let (a, b) = (Member::begin(guarded_section("a")), Member::begin(guarded_section("b")));
    settle(&[&a, &b]);
    nats.set_extra(&guarded("second"));
    nats.restart();
    until("being alone", || (a.cluster.link().is_alone() && b.cluster.link().is_alone()).then_some(()));
    std::fs::write(file.path(), "second\n").expect("written");
    let (node, elected) = probe_kill();
    a.deliver(&node);
    b.deliver(&elected);
    for member in [&a, &b] {
        let found = member.until_patterns(&["liveness-probe-kill"]);
        member.findings_when(|found| found.iter().all(|one| one.missing_servers.is_empty()));
        assert_eq!(found.len(), 1);
    }
}

#[test]
fn a_server_that_may_write_only_goes_on_alone() {
    let may = "authorization { users: [{ user: tapio, password: x, permissions: { \
               publish: { deny: [\"$JS.API.CONSUMER.>\"] } } }] }";
    let Some(nats) = Nats::with(may) else { return };
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), "x").expect("written");
    let mut section = section(&nats, "a");
    (section.user, section.password_file) = (Some("tapio".into()), Some(file.path().to_owned()));
    let a = Member::begin(section);
    let (node, _) = probe_kill();
    a.deliver(&node);
    let found = a.until_patterns(&["stopped"]);
    assert!(found[0].possible && !found[0].missing_servers.is_empty(), "{found:#?}");
    assert!(a.cluster.link().is_alone());
}

#[test]
fn a_server_that_ends_does_not_wait_for_the_archive() {
    let Some(nats) = Nats::start() else { return };
    let a = Member::start(&nats, "a");
    // More than there is room for comes out of the archive, and nobody takes it any more.
    let bus = a.cluster.bus();
    a.cluster.begin_replay();
    a.cluster.freeze();
    let mut node = Node::new("n1");
    let entity = web(&mut node);
    node.limit_kill(entity, 100, 100 * SECOND);
    let filling = std::thread::spawn(move || {
        let clock =
            |number: u64| NodeClock { node: node.node.clone(), epoch: 5, boottime_ns: number, realtime_ns: number };
        (0..100_001).for_each(|number| bus.clock(clock(number)));
        bus.wait_passed();
    });
    a.cluster.stop();
    filling.join().expect("it does not wait for ever");
}
