//! Whole servers that share a log: acknowledgements, restarts, a log that is lost, and questions to any of them.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::cluster_support::*;
use crate::correlate_node::{MIB, MS, Node, Process, SECOND, SIGKILL};
use crate::whole_server::{Stream, Whole, hello};
use tapio_server::config::Config;
use tapio_wire::service::query_client::QueryClient;
use tapio_wire::service::{
    Event, Finding, ListEventsRequest, ListFindingsRequest, StatusRequest, StatusResponse, Unanswered,
};
use tonic::transport::Channel;

pub fn member(nats: &Nats, server: &str) -> impl FnOnce(&mut Config) {
    let section = section(nats, server);
    move |config| config.cluster = section
}

/// Starts a member with an existing archive.
pub fn member_at(nats: &Nats, server: &str, dir: &Path) -> impl FnOnce(&mut Config) {
    let (section, dir) = (section(nats, server), dir.to_owned());
    move |config| {
        config.cluster = section;
        config.archive.dir = dir;
    }
}

pub fn limit_kill(node: &mut Node, pid: u32, at: u64) {
    let entity = node.kube_container("Deployment/web", "shop/web-0", "c0");
    node.limit_kill(entity, pid, at);
}

/// Ships a node's frames from this one on, and waits until they are durable.
pub async fn ship(server: &Whole, node: &Node, from: usize) -> Duration {
    ship_by(server.channel().await, node, from).await
}

/// The same, to the server that this channel leads to.
pub async fn ship_by(channel: Channel, node: &Node, from: usize) -> Duration {
    let began = Instant::now();
    let mut stream = Stream::open(channel, "", hello(&node.node.name, node.epoch)).await.expect("opened");
    stream.welcome().await.expect("welcome");
    for bytes in &node.bytes[from..] {
        stream.frame(bytes.clone()).await;
    }
    stream.acknowledged(node.bytes.len() as u64).await;
    began.elapsed()
}

async fn query(server: &Whole) -> QueryClient<Channel> {
    QueryClient::new(server.channel().await)
}

pub async fn findings(server: &Whole) -> Vec<Finding> {
    findings_by(server.channel().await).await
}

async fn findings_by(channel: Channel) -> Vec<Finding> {
    let answer = QueryClient::new(channel).list_findings(ListFindingsRequest::default()).await.expect("answered");
    answer.into_inner().findings
}

pub async fn findings_when(server: &Whole, so: impl Fn(&[Finding]) -> bool) -> Vec<Finding> {
    findings_by_when(server.channel().await, so).await
}

/// Waits until the findings of the server that this channel leads to are so.
pub async fn findings_by_when(channel: Channel, so: impl Fn(&[Finding]) -> bool) -> Vec<Finding> {
    when(async || findings_by(channel.clone()).await, |found| so(found)).await
}

/// Asks until the answer is so.
pub async fn when<T: std::fmt::Debug>(ask: impl AsyncFn() -> T, so: impl Fn(&T) -> bool) -> T {
    let deadline = Instant::now() + LIMIT;
    loop {
        let answer = ask().await;
        if so(&answer) {
            return answer;
        }
        assert!(Instant::now() < deadline, "it did not come about: {answer:#?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

pub async fn status(server: &Whole) -> StatusResponse {
    query(server).await.status(StatusRequest::default()).await.expect("answered").into_inner()
}

async fn status_when(server: &Whole, so: impl Fn(&StatusResponse) -> bool) -> StatusResponse {
    when(async || status(server).await, so).await
}

async fn events(server: &Whole) -> Vec<Event> {
    let mut stream =
        query(server).await.list_events(ListEventsRequest::default()).await.expect("answered").into_inner();
    let mut events = Vec::new();
    while let Some(event) = stream.message().await.expect("an event") {
        events.push(event);
    }
    events
}

const ONE_LIMIT_KILL: fn(&[Finding]) -> bool = |found| found.len() == 1 && found[0].pattern == "memory-limit-kill";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acknowledgements_do_not_wait_for_a_hanging_log() {
    let Some(nats) = Nats::start() else { return };
    let a = Whole::start(member(&nats, "a")).await;
    nats.pause(true);
    let mut node = Node::new("n1");
    for round in 0..200 {
        limit_kill(&mut node, 100 + round, (100 + u64::from(round)) * SECOND);
    }
    // Were one of them to wait, none would come while NATS stands still.
    ship(&a, &node, 0).await;
    // What it found, it found by itself.
    let alone = findings_when(&a, |found| !found.is_empty()).await;
    nats.pause(false);
    let found = findings_when(&a, |found| found.iter().all(|one| one.missing_servers.is_empty())).await;
    assert_eq!(found.len(), alone.len());
    a.until_metric("tapio_server_log_alone", &[], |value| value == 0.0).await;
    assert_eq!(status(&a).await.unexplained_events, 0);
    a.pipeline.shutdown().await.expect("a good end");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restarted_server_publishes_the_rest_and_nothing_twice() {
    let Some(mut nats) = Nats::start() else { return };
    let a = Whole::start(member(&nats, "a")).await;
    let b = Whole::start(member(&nats, "b")).await;
    let mut node = Node::new("n1");
    limit_kill(&mut node, 100, 100 * SECOND);
    ship(&a, &node, 0).await;
    let first = findings_when(&b, ONE_LIMIT_KILL).await;
    // The second is archived and not in the log, since the log is away when its server ends.
    nats.kill();
    limit_kill(&mut node, 101, 160 * SECOND);
    ship(&a, &node, 1).await;
    let dir = a.dir;
    a.pipeline.shutdown().await.expect("a good end");
    nats.restart();
    let again = Whole::start(member_at(&nats, "a", dir.path())).await;
    // Its journal has what it found alone.
    let is_joined = |found: &[Finding]| found.len() == 1 && found[0].count == 2 && found[0].missing_servers.is_empty();
    let by_a = findings_when(&again, is_joined).await;
    let by_b = findings_when(&b, |found| found.len() == 1 && found[0].count == 2).await;
    assert_eq!(final_content(&by_a), final_content(&by_b));
    assert!(first[0].count == 1 && !by_b[0].possible, "{by_b:#?}");
    again.pipeline.shutdown().await.expect("a good end");
    b.pipeline.shutdown().await.expect("a good end");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_lost_log_had_is_republished_from_the_archives() {
    let Some(mut nats) = Nats::start() else { return };
    let a = Whole::start(member(&nats, "a")).await;
    let b = Whole::start(member(&nats, "b")).await;
    let (mut first, mut second) = (Node::new("n1"), Node::new("n2"));
    limit_kill(&mut first, 100, 100 * SECOND);
    let entity = second.kube_container("Deployment/db", "shop/db-0", "c9");
    let process = Process::init(entity, 500, "postgres");
    second.oom(100 * SECOND, process, 64 * MIB, 64 * MIB);
    second.exit(100 * SECOND + MS, process, SIGKILL);
    second.lethal(101 * SECOND);
    ship(&a, &first, 0).await;
    ship(&b, &second, 0).await;
    let before = findings_when(&a, |found| found.len() == 2).await;
    findings_when(&b, |found| found.len() == 2).await;
    nats.restart_empty();
    // Whoever joins now knows only what the log says.
    for server in [&a, &b] {
        server.until_metric("tapio_server_log_rebuilds_total", &[], |value| value >= 2.0).await;
    }
    let c = Whole::start(member(&nats, "c")).await;
    let by_c = findings_when(&c, |found| found.len() == 2).await;
    assert_eq!(final_content(&by_c), final_content(&before));
    let by_a = findings_when(&a, |found| found.iter().all(|one| one.missing_servers.is_empty())).await;
    assert_eq!(final_content(&by_a), final_content(&before));
    for server in [a, b, c] {
        assert_eq!(status(&server).await.unexplained_events, 0);
        server.pipeline.shutdown().await.expect("a good end");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_server_answers_for_all_and_names_missing_parts() {
    let Some(nats) = Nats::start() else { return };
    let a = Whole::start(member(&nats, "a")).await;
    let b = Whole::start(member(&nats, "b")).await;
    let (mut first, mut second) = (Node::new("n1"), Node::new("n2"));
    limit_kill(&mut first, 100, 100 * SECOND);
    limit_kill(&mut second, 100, 100 * SECOND);
    ship(&a, &first, 0).await;
    ship(&b, &second, 0).await;
    let found = status_when(&a, |status| status.servers.len() == 2 && status.nodes.len() == 2).await;
    let of: Vec<_> = found.nodes.iter().map(|node| (node.node.as_str(), node.server.as_str())).collect();
    assert_eq!(of, [("n1", "a"), ("n2", "b")]);
    assert!(found.incomplete.is_empty() && found.unexplained_events == 0, "{found:#?}");
    let (by_a, by_b) = (events(&a).await, events(&b).await);
    assert_eq!(
        by_a.iter().map(|event| &event.id).collect::<Vec<_>>(),
        by_b.iter().map(|event| &event.id).collect::<Vec<_>>()
    );
    assert!(by_a.len() >= 6 && by_a.iter().all(|event| event.incomplete.is_empty()), "{by_a:#?}");
    assert!(by_a.iter().all(|event| event.cluster == "default"), "also those of others");

    // Gone without a word: asked at its address, it does not answer.
    b.pipeline.abandon();
    let lacking = status_when(&a, |status| !status.incomplete.is_empty()).await;
    assert_eq!(lacking.incomplete[0].server, "b");
    assert_eq!(lacking.incomplete[0].nodes, ["n2"]);
    let last = events(&a).await.pop().expect("a last word");
    assert_eq!((last.id.as_str(), last.incomplete[0].server.as_str()), ("", "b"));
    a.pipeline.shutdown().await.expect("a good end");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hanging_peer_costs_one_wait_and_answers_are_incomplete() {
    let Some(nats) = Nats::start() else { return };
    // Connections to it are made, and nothing is ever said.
    let hangs = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = hangs.local_addr().expect("an address").to_string();
    let section = section(&nats, "b");
    let a = Whole::start(member(&nats, "a")).await;
    let b = Whole::start(move |config| {
        config.cluster = section;
        config.cluster.advertise = Some(address);
    })
    .await;
    let is_missing = |incomplete: &[Unanswered]| incomplete.iter().any(|one| one.server == "b");
    let first = status_when(&a, |status| is_missing(&status.incomplete)).await;
    assert!(first.incomplete.iter().any(|one| one.reason.contains("in time")), "{first:#?}");
    let began = Instant::now();
    let last = events(&a).await.pop().expect("a last word");
    assert!(is_missing(&last.incomplete) && is_missing(&status(&a).await.incomplete));
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    let output = crate::programs::output(crate::programs::tapioctl(a.pipeline.grpc_address, &["why", "nosuch"])).await;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(4) && said.contains("nothing is known of"), "{said}");
    assert!(began.elapsed() < Duration::from_secs(25), "{:?}", began.elapsed());
    a.pipeline.shutdown().await.expect("a good end");
    b.pipeline.shutdown().await.expect("a good end");
}

#[tokio::test(flavor = "multi_thread")]
async fn single_and_watched_findings_say_what_they_may_lack() {
    let Some(mut nats) = Nats::start() else { return };
    let a = Whole::start(member(&nats, "a")).await;
    let mut node = Node::new("n1");
    limit_kill(&mut node, 100, 100 * SECOND);
    ship(&a, &node, 0).await;
    let id = findings_when(&a, |found| !found.is_empty()).await[0].id.clone();
    let tapioctl = |arguments: &[&str]| {
        let output = crate::programs::tapioctl(a.pipeline.grpc_address, arguments).output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout), text(output.stderr))
    };
    let (code, printed, lacking) = tapioctl(&["finding", &id]);
    assert!(code == Some(0) && printed.contains(&id) && lacking.is_empty(), "{code:?} {printed} {lacking}");
    nats.kill();
    a.until_metric("tapio_server_log_alone", &[], |alone| alone == 1.0).await;
    let (code, printed, lacking) = tapioctl(&["finding", &id]);
    assert!(
        code == Some(4) && printed.contains(&id) && lacking.contains("the servers' log is away"),
        "{code:?} {lacking}"
    );
    let (code, printed, lacking) = tapioctl(&["finding", "unheard-of"]);
    assert!(
        code == Some(4) && printed.is_empty() && lacking.contains("the servers' log is away"),
        "{code:?} {lacking}"
    );
    for whole in [["finding", &id], ["findings", "--watch"]] {
        let (code, printed, _) = tapioctl(&["--require-complete", whole[0], whole[1]]);
        assert!(code == Some(4) && printed.is_empty(), "{whole:?}: {code:?} {printed}");
    }
    a.pipeline.shutdown().await.expect("a good end");
}
