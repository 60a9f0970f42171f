//! What is in NATS under the names of the servers' log, and is not theirs. The log is a real NATS.

use std::sync::atomic::Ordering;
use std::time::Duration;

use async_nats::jetstream::stream;
use futures::StreamExt as _;
use tapio_server::cluster::ClusterSection;

use crate::cluster_faults::{by_id, deaths, until_as};
use crate::cluster_support::*;

#[test]
fn a_stream_of_somebody_else_is_not_taken_over() {
    let Some(nats) = Nats::start() else { return };
    let name = "TAPIO_default_LOG";
    beside(&nats, async |context| {
        let subjects = vec!["orders.>".to_owned()];
        let config = stream::Config { name: name.into(), subjects, ..stream::Config::default() };
        context.create_stream(config).await.expect("created");
        context.publish("orders.1", "an order".into()).await.expect("sent").await.expect("taken");
    });
    let a = Member::begin_with(section(&nats, "a"), timing());
    let trouble = until("it says what is wrong", || a.cluster.link().trouble());
    assert!(trouble.contains("orders.>") && trouble.contains("cluster.name"), "{trouble}");
    // It goes on alone.
    let (first, _) = deaths();
    a.deliver(&first);
    a.findings_when(|found| !found.is_empty());
    beside(&nats, async |context| {
        let mut found = context.get_stream(name).await.expect("it is there");
        let info = found.info().await.expect("reported");
        assert_eq!((info.config.subjects.join(","), info.state.messages), ("orders.>".to_owned(), 1));
        context.delete_stream(name).await.expect("deleted");
    });
    until("it has a log", || a.cluster.link().trouble().is_none().then_some(()));
    settle(&[&a]);
}

#[test]
fn bytes_that_are_no_finding_become_none() {
    let Some(nats) = Nats::start() else { return };
    let a = Member::begin_with(section(&nats, "a"), timing());
    let (first, _) = deaths();
    a.deliver(&first);
    settle(&[&a]);
    until("a leads", || a.cluster.leadership().term());
    beside(&nats, async |context| {
        for payload in [&b""[..], &[0xff; 40], b"\x0a\x00"] {
            let taken = context.publish("tapio.default.finding.x", payload.into()).await.expect("sent");
            taken.await.expect("taken");
        }
    });
    let of_a = by_id(&a.findings());
    let b = Member::begin_with(section(&nats, "b"), timing());
    until_as(&b, &of_a);
    assert!(b.findings().iter().all(|finding| !finding.id.is_empty()));
    assert_eq!(b.cluster.link().rebuilds.load(Ordering::Relaxed), 1);
}

/// Nobody could count on from there.
#[test]
fn a_lease_of_the_last_term_ends_no_server() {
    let Some(nats) = Nats::start() else { return };
    let a = Member::begin_with(section(&nats, "a"), timing());
    let term = until("a leads", || a.cluster.leadership().term()).number();
    beside(&nats, async |context| {
        let bucket = context.get_key_value("TAPIO_default_LEADER").await.expect("it is there");
        let key = "leader";
        let value = bucket.get(key).await.expect("read").expect("a lease");
        let text = String::from_utf8(value.to_vec()).expect("JSON");
        let absurd =
            text.replace(&format!("\"term\":{term}"), &format!("\"term\":{}", u64::MAX)).replace("\"a\"", "\"x\"");
        assert_ne!(absurd, text);
        bucket.put(key, absurd.into()).await.expect("written");
    });
    let again = until("a leads again", || a.cluster.leadership().term().filter(|led| led.number() > term));
    assert!(again.number() < u64::MAX / 2 && again.is_valid_now(), "{}", again.number());
}

#[test]
fn two_servers_of_one_name_are_told_of() {
    let Some(nats) = Nats::start() else { return };
    let servers = ["a", "b", "a"].map(|name| Member::begin_with(section(&nats, name), timing()));
    for server in &servers {
        until("it is noticed", || (server.cluster.link().namesakes() == ["a"]).then_some(()));
    }
}

#[test]
fn of_several_addresses_one_that_answers_is_enough() {
    let Some(nats) = Nats::start() else { return };
    let url = format!("nats://127.0.0.1:{}, {}", crate::whole_server::free_port(), nats.url());
    let a = Member::begin_with(ClusterSection { url, ..section(&nats, "a") }, timing());
    until("the log's end", || a.cluster.link().is_caught_up().then_some(()));
    let (first, _) = deaths();
    a.deliver(&first);
    settle(&[&a]);
    assert!(!a.findings().is_empty() && !a.cluster.link().is_alone());
}

#[test]
fn a_stream_is_updated_only_where_it_differs() {
    let Some(nats) = Nats::start() else { return };
    let updated = beside(&nats, async |context| {
        let mut requests = context.client().subscribe("$JS.API.STREAM.UPDATE.>").await.expect("subscribed");
        context.client().flush().await.expect("NATS knows of it");
        let (a, b) =
            (Member::begin_with(section(&nats, "a"), timing()), Member::begin_with(section(&nats, "b"), timing()));
        settle(&[&a, &b]);
        drop((a, b));
        // One that finds the streams wants the log to be smaller.
        let smaller = ClusterSection { max_bytes: 80 << 20, ..section(&nats, "c") };
        let c = Member::begin_with(smaller, timing());
        settle(&[&c]);
        let request = tokio::time::timeout(Duration::from_secs(30), requests.next()).await;
        let request = request.expect("in time").expect("a request");
        let mut log = context.get_stream("TAPIO_default_LOG").await.expect("it is there");
        assert_eq!(log.info().await.expect("reported").config.max_bytes, 80 << 20);
        String::from_utf8(request.payload.to_vec()).expect("JSON")
    });
    // It is that of the third server: none came before it.
    assert!(updated.contains("TAPIO_default_LOG") && updated.contains("83886080"), "{updated}");
}
