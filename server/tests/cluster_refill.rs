//! A log that was lost is filled again from the archives.

use std::time::Duration;

use crate::cluster_faults::{own_status, through, until_undisturbed};
use crate::cluster_support::*;
use crate::cluster_whole::{findings_when, ship};
use crate::correlate_node::{Node, SECOND};
use crate::whole_server::{Stream, Whole, hello};
use tapio_wire::service::Finding;
use tokio::sync::watch;

/// How long a server is waited for that ends beside a log which takes nothing. It takes some 2 s here.
const HELD: Duration = Duration::from_secs(120);

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

async fn two(nats: &Nats) -> [Whole; 2] {
    let [a, b] = ["a", "b"].map(|server| Whole::start(|config| config.cluster = section(nats, server)));
    [a.await, b.await]
}

/// Waits until the log was read anew, and has what it lacked.
async fn refilled(servers: &[&Whole]) {
    for server in servers {
        server.until_metric("tapio_server_log_rebuilds_total", &[], |value| value >= 2.0).await;
        server.until_metric("tapio_server_log_healing_seconds", &[], |value| value == 0.0).await;
    }
}

/// Whoever joins now knows only what the log says: all find the same, and end.
async fn joined_and_ended(nats: &Nats, [a, b]: [Whole; 2], wanted: &[Finding]) {
    let c = Whole::start(|config| config.cluster = section(nats, "c")).await;
    until_undisturbed(&[&a, &b, &c], wanted).await;
    for server in [a, b, c] {
        server.pipeline.shutdown().await.expect("a good end");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_log_of_many_frames_is_refilled_by_all() {
    let Some(mut nats) = Nats::start() else { return };
    let (first, second) = many_deaths();
    let wanted = undisturbed(&[&first, &second]).expect("NATS is there");
    let [a, b] = two(&nats).await;
    ship(&a, &first, 0).await;
    ship(&b, &second, 0).await;
    until_undisturbed(&[&a, &b], &wanted).await;
    nats.restart_empty();
    refilled(&[&a, &b]).await;
    joined_and_ended(&nats, [a, b], &wanted).await;
}

/// Ships a node's frames one by one, and says after each that it is durable.
async fn ship_slowly(server: &Whole, node: &Node, durable: &watch::Sender<usize>) {
    let mut stream =
        Stream::open(server.channel().await, "", hello(&node.node.name, node.epoch)).await.expect("opened");
    stream.welcome().await.expect("welcome");
    for (place, bytes) in node.bytes.iter().enumerate() {
        stream.frame(bytes.clone()).await;
        stream.acknowledged(place as u64 + 1).await;
        durable.send_replace(place + 1);
    }
}

/// Whatever the log had taken of a death, and wherever its frame was when the log was lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_lost_under_load_costs_no_death() {
    let Some(mut nats) = Nats::start() else { return };
    let (first, second) = many_deaths();
    let wanted = undisturbed(&[&first, &second]).expect("NATS is there");
    let [a, b] = two(&nats).await;
    let (durable, _) = watch::channel(0);
    let losing = async {
        for at in [3, 6] {
            let reached = durable.subscribe().wait_for(|count| *count >= first.bytes.len() * at / 10).await.is_ok();
            assert!(reached);
            nats.restart_empty();
        }
    };
    let (other, _) = watch::channel(0);
    tokio::join!(ship_slowly(&a, &first, &durable), ship_slowly(&b, &second, &other), losing);
    until_undisturbed(&[&a, &b], &wanted).await;
    joined_and_ended(&nats, [a, b], &wanted).await;
}

/// NATS was killed before its last messages were on its disk.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_end_of_the_log_had_is_republished() {
    let Some(mut nats) = Nats::start() else { return };
    let (first, second) = many_deaths();
    let wanted = undisturbed(&[&first, &second]).expect("NATS is there");
    let [a, b] = two(&nats).await;
    ship(&a, &first, 0).await;
    findings_when(&b, |found| found.iter().map(|one| one.count).sum::<u32>() == 200).await;
    let earlier = nats.restart_saving();
    ship(&b, &second, 0).await;
    until_undisturbed(&[&a, &b], &wanted).await;
    nats.restart_with(&earlier);
    refilled(&[&a, &b]).await;
    joined_and_ended(&nats, [a, b], &wanted).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_refills_the_log_ends_on_request() {
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
    let own = own_status(&a).await;
    assert!(own.healing_ns > 0, "{own:?}");
    // The log is held for ever; a slow disk may hold the last writes for a while.
    let ended = tokio::time::timeout(HELD, a.pipeline.shutdown()).await;
    ended.expect("it ends though the log takes nothing").expect("a good end");
}
