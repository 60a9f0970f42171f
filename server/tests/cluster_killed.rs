//! A server that is killed between archive and log, alone and together with the log.

use crate::cluster_support::*;
use crate::cluster_whole::{findings_by_when, findings_when, limit_kill, member, ship, ship_by, status};
use crate::correlate_node::{Node, SECOND};
use crate::reconnect_storm::Running;
use crate::whole_server::Whole;
use tapio_wire::service::Finding;
use tonic::transport::{Channel, Endpoint};

async fn channel(server: &Running) -> Channel {
    Endpoint::from_shared(format!("http://{}", server.grpc)).expect("a URL").connect().await.expect("it listens")
}

/// The log is away while both servers archive deaths; then one of them is killed, and the log comes back, with what it had or empty.
async fn both_are_lost(is_emptied: bool) {
    let Some(mut nats) = Nats::start() else { return };
    let dir = tempfile::tempdir().expect("a directory");
    let section = format!("cluster: {{url: \"{}\", server: a}}\n", nats.url());
    let a = Running::start_with(dir.path(), &section);
    let b = Whole::start(member(&nats, "b")).await;
    // As collectors do, each says whose frames they are.
    let [mut first, mut second] = ["n1", "n2"].map(|name| {
        let mut node = Node::new(name);
        node.calls(node.itself(), name);
        node
    });
    limit_kill(&mut first, 100, 100 * SECOND);
    ship_by(channel(&a).await, &first, 0).await;
    findings_when(&b, |found| found.len() == 1).await;

    nats.kill();
    limit_kill(&mut first, 101, 160 * SECOND);
    let entity = second.kube_container("Deployment/db", "shop/db-0", "c9");
    second.limit_kill(entity, 500, 160 * SECOND);
    ship_by(channel(&a).await, &first, 1).await;
    ship(&b, &second, 0).await;
    // SIGKILL: it can say nothing more.
    drop(a);
    if is_emptied {
        nats.restart_empty()
    } else {
        nats.restart()
    }
    let a = Running::start_with(dir.path(), &section);

    let is_whole = |found: &[Finding]| {
        let is_certain = |one: &Finding| !one.possible && one.missing_servers.is_empty();
        found.len() == 2 && found.iter().all(is_certain) && found.iter().map(|one| one.count).sum::<u32>() == 3
    };
    let by_a = findings_by_when(channel(&a).await, is_whole).await;
    let by_b = findings_when(&b, is_whole).await;
    let undisturbed = tokio::task::block_in_place(|| undisturbed(&[&first, &second])).expect("there is a NATS");
    let by_id = |mut found: Vec<Finding>| {
        found.sort_by(|a, b| a.id.cmp(&b.id));
        found
    };
    let undisturbed = by_id(undisturbed);
    assert_eq!(by_id(final_content(&by_a)), undisturbed);
    assert_eq!(by_id(final_content(&by_b)), undisturbed);
    assert_eq!(status(&b).await.unexplained_events, 0);
    b.pipeline.shutdown().await.expect("a good end");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_killed_between_archive_and_log_loses_nothing() {
    both_are_lost(false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_and_the_log_lost_at_once_lose_nothing() {
    both_are_lost(true).await;
}
