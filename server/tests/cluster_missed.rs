//! Messages that are in the log and of no use: deleted from its middle, damaged, or of another version. What they said is sent
//! again from the archives.

use std::time::Instant;

use async_nats::jetstream::message::PublishMessage;
use async_nats::jetstream::stream::Stream;
use tapio_server::correlate::batch::{Batch, Entry};
use tapio_wire::service::Finding;

use crate::cluster_support::*;
use crate::cluster_whole::{findings, findings_when, limit_kill, member, member_at, ship, status};
use crate::correlate_node::{Node, SECOND};
use crate::whole_server::Whole;

async fn stream(nats: &Nats) -> Stream {
    let client = async_nats::connect(nats.url()).await.expect("it listens");
    async_nats::jetstream::new(client).get_stream("TAPIO_default_LOG").await.expect("it is there")
}

async fn log_has(log: &Stream, messages: u64) {
    let deadline = Instant::now() + LIMIT;
    while log.get_info().await.expect("it is reported").state.messages < messages {
        assert!(Instant::now() < deadline, "the log does not grow");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

/// Deletes every message with a clue and without the reach of frames. Returns how many there were.
async fn delete_clues(log: &Stream) -> usize {
    let state = log.get_info().await.expect("it is reported").state;
    let mut deleted = 0;
    for seq in state.first_sequence..=state.last_sequence {
        let message = log.get_raw_message(seq).await.expect("it is there");
        let entries = Batch::decode(&message.payload).expect("of this version").entries;
        let has_clue = entries.iter().any(|entry| matches!(entry, Entry::Clue(_)));
        if has_clue && !entries.iter().any(|entry| matches!(entry, Entry::Covered(covered) if !covered.is_empty())) {
            assert!(log.delete_message(seq).await.expect("answered"));
            deleted += 1;
        }
    }
    deleted
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_deleted_messages_said_is_sent_again_and_nothing_withdrawn() {
    let Some(nats) = Nats::start() else { return };
    let a = Whole::start(member(&nats, "a")).await;
    let log = stream(&nats).await;
    // What is deleted is in the middle: there are messages before it and after it.
    log_has(&log, 1).await;
    let mut node = Node::new("n1");
    limit_kill(&mut node, 100, 100 * SECOND);
    ship(&a, &node, 0).await;
    let wanted = findings_when(&a, |found| found.len() == 1 && found[0].pattern == "memory-limit-kill").await;
    let has = log.get_info().await.expect("it is reported").state.messages;
    log_has(&log, has + 1).await;
    assert!(delete_clues(&log).await > 0);
    // The log says still that all frames are in it. Who joins takes that for less than it is, until they come again.
    let b = Whole::start(member(&nats, "b")).await;
    let deadline = Instant::now() + LIMIT;
    let plain = |found: &[Finding]| final_content(found);
    while plain(&findings(&b).await) != plain(&wanted) || !status(&a).await.incomplete.is_empty() {
        let at_a = findings(&a).await;
        assert!(at_a.len() == 1 && at_a[0].id == wanted[0].id, "{at_a:#?}");
        assert!(Instant::now() < deadline, "{:#?}, not {wanted:#?}", findings(&b).await);
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    assert!(a.metric("tapio_server_log_rebuilds_total", &[]) >= 2.0);
    for server in [a, b] {
        server.pipeline.shutdown().await.expect("a good end");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rolling_update_of_the_servers_ends_whole() {
    let Some(nats) = Nats::start() else { return };
    let dir = tempfile::tempdir().expect("a directory");
    // A server of another version: what it archives is readable, what it writes into the log is not.
    let before = Whole::start(|config| config.archive.dir = dir.path().to_owned()).await;
    let mut first = Node::new("n1");
    limit_kill(&mut first, 100, 100 * SECOND);
    ship(&before, &first, 0).await;
    let known = findings_when(&before, |found| found.len() == 1).await;
    before.pipeline.shutdown().await.expect("a good end");
    let b = Whole::start(member(&nats, "b")).await;
    let log = stream(&nats).await;
    log_has(&log, 1).await;
    let client = async_nats::connect(nats.url()).await.expect("it listens");
    let context = async_nats::jetstream::new(client);
    for _ in 0..3 {
        let message = PublishMessage::build().payload((&b"\x00 of an earlier version"[..]).into());
        let sent = context.send_publish("tapio.default.batch.a", message.header("Tapio-Server", "a")).await;
        sent.expect("sent").await.expect("taken");
    }
    let mut second = Node::new("n2");
    let entity = second.kube_container("Deployment/db", "shop/db-0", "c9");
    second.limit_kill(entity, 200, 400 * SECOND);
    ship(&b, &second, 0).await;
    // Who it is and what to do is said wherever one asks.
    let found = findings_when(&b, |found| found.len() == 1).await;
    assert_eq!(found[0].missing_servers, ["a"]);
    let lacking = status(&b).await.incomplete;
    assert!(lacking.len() == 1 && lacking[0].server == "a", "{lacking:#?}");
    assert!(lacking[0].reason.contains("give all servers the same version"), "{lacking:#?}");

    // It comes back with the version of the others.
    let a = Whole::start(member_at(&nats, "a", dir.path())).await;
    let c = Whole::start(member(&nats, "c")).await;
    for server in [&b, &a, &c] {
        let found = findings_when(server, |found| found.len() == 2).await;
        assert!(found.iter().any(|one| one.id == known[0].id), "{found:#?}");
        server.until_metric("tapio_server_log_healing_seconds", &[], |seconds| seconds == 0.0).await;
        assert_eq!(findings(server).await.len(), 2);
    }
    let ids = async |server: &Whole| findings(server).await.into_iter().map(|one| one.id).collect::<Vec<_>>();
    assert_eq!((ids(&a).await, ids(&c).await), (ids(&b).await, ids(&b).await));
    for server in [a, b, c] {
        server.pipeline.shutdown().await.expect("a good end");
    }
}
