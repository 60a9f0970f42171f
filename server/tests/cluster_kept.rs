//! What servers know that is older than their log. The log is a real NATS.

use std::sync::atomic::Ordering;

use async_nats::jetstream::stream::Stream;
use prost::Message as _;
use tapio_wire::service::Finding;

use crate::cluster_faults::{by_id, deaths, until_as};
use crate::cluster_support::*;
use crate::cluster_whole::limit_kill;
use crate::correlate_node::{Node, Process, SECOND};

/// The streams of a cluster, asked on a connection of its own.
fn with_stream<T>(nats: &Nats, name: &str, ask: impl AsyncFnOnce(Stream) -> T) -> T {
    beside(nats, async |context| ask(context.get_stream(name).await.expect("it is there")).await)
}

#[test]
fn a_server_that_joins_knows_what_the_log_has_forgotten() {
    let Some(nats) = Nats::start() else { return };
    let a = Member::begin_with(section(&nats, "a"), timing());
    let (first, _) = deaths();
    a.deliver(&first);
    settle(&[&a]);
    let mut second = Node::new("n2");
    let entity = second.kube_container("Deployment/db", "shop/db-0", "c9");
    second.limit_kill(entity, 400, 4000 * SECOND);
    let kept = |at_least: u64| {
        until("it is kept", || {
            let ask = async |stream: Stream| stream.get_info().await.expect("reported").state.messages;
            (with_stream(&nats, "TAPIO_default_FINDINGS", ask) >= at_least).then_some(())
        });
    };
    until("a leads", || a.cluster.leadership().term());
    kept(a.findings().len() as u64);
    with_stream(&nats, "TAPIO_default_LOG", async |stream: Stream| stream.purge().await.expect("purged"));
    a.deliver(&second);
    settle(&[&a]);
    let of_a = by_id(&a.findings());
    assert_eq!(of_a.len(), 2, "{of_a:#?}");

    let b = Member::begin_with(section(&nats, "b"), timing());
    until_as(&b, &of_a);
    assert_eq!(b.cluster.link().rebuilds.load(Ordering::Relaxed), 1);
    // It leads, and keeps the same once: what it has taken in is not written again.
    let before = with_stream(&nats, "TAPIO_default_FINDINGS", async |stream: Stream| {
        stream.get_info().await.expect("reported").state.last_sequence
    });
    drop(a);
    until("b leads", || b.cluster.leadership().term());
    let mut late = Node::new("late");
    let entity = late.kube_container("Deployment/late", "shop/late-0", "late");
    late.limit_kill(entity, 100, 8000 * SECOND);
    b.deliver(&late);
    settle(&[&b]);
    kept(of_a.len() as u64 + 1);
    let after = with_stream(&nats, "TAPIO_default_FINDINGS", async |stream: Stream| {
        stream.get_info().await.expect("reported").state.last_sequence
    });
    assert!(after > before && after - before <= 3, "{before} {after}");
}

/// The log is lost after a server and its archive are: what rests on that archive is kept by the findings of the other one alone.
#[test]
fn a_new_log_keeps_what_lost_archives_had() {
    let Some(mut nats) = Nats::start() else { return };
    let (first, mut second) = deaths();
    let a = Member::begin_with(section(&nats, "a"), timing());
    let b = Member::begin_with(section(&nats, "b"), timing());
    a.deliver(&first);
    b.deliver(&second);
    settle(&[&a, &b]);
    let mut known = by_id(&b.findings());
    assert!(!known.is_empty());
    drop(a);
    let c = Member::begin_with(section(&nats, "c"), timing());
    until_as(&c, &known);

    nats.restart_empty();
    settle(&[&b, &c]);
    until_as(&b, &known);
    until_as(&c, &known);
    let entity = second.kube_container("Deployment/late", "shop/late-0", "late");
    let before = second.frames.len();
    second.limit_kill(entity, 100, 8000 * SECOND);
    b.deliver_part(&second, before..second.frames.len());
    settle(&[&b, &c]);
    known = by_id(&b.findings());

    drop(c);
    nats.kill();
    nats.restart();
    let d = Member::begin_with(section(&nats, "d"), timing());
    settle(&[&b, &d]);
    until_as(&b, &known);
    until_as(&d, &known);

    // A server that joins before there is a leader finds nothing kept yet.
    drop(d);
    nats.restart_empty();
    let e = Member::begin_with(section(&nats, "e"), timing());
    settle(&[&b, &e]);
    until_as(&b, &known);
    until_as(&e, &known);
}

/// A crash loop that is longer than the log is the same finding on a server that joins, and stays it.
#[test]
fn a_long_crash_loop_is_the_same_on_a_joiner() {
    let Some(nats) = Nats::start() else { return };
    let mut node = Node::new("n1");
    let mut ends = Vec::new();
    for time in 0..40_u32 {
        let web = node.container_of("shop/web-1", &format!("web{time}"), "web-1/web");
        let at = u64::from(100 + 60 * time) * SECOND;
        node.exit(at, Process::init(web, 100 + time, "app"), 1 << 8);
        node.lethal(at);
        ends.push(node.frames.len());
    }
    let a = Member::begin_with(section(&nats, "a"), timing());
    until("a leads", || a.cluster.leadership().term());
    a.deliver_part(&node, 0..ends[9]);
    settle(&[&a]);
    with_stream(&nats, "TAPIO_default_LOG", async |stream: Stream| stream.purge().await.expect("purged"));
    // Longer than the pattern's window.
    a.deliver_part(&node, ends[9]..ends[29]);
    settle(&[&a]);
    let of_a = by_id(&a.findings());
    assert_eq!(of_a.iter().map(|finding| finding.count).collect::<Vec<_>>(), [30], "{of_a:#?}");
    until("it is kept", || {
        with_stream(&nats, "TAPIO_default_FINDINGS", async |stream: Stream| {
            let id = &of_a[0].id;
            let last = stream.get_last_raw_message_by_subject(&format!("tapio.default.finding.{id}")).await.ok()?;
            let kept = Finding::decode(last.payload).expect("a finding");
            (kept.count == 30).then_some(())
        })
    });
    let b = Member::begin_with(section(&nats, "b"), timing());
    until_as(&b, &of_a);
    a.deliver_part(&node, ends[29]..ends[39]);
    settle(&[&a, &b]);
    let of_a = by_id(&a.findings());
    assert_eq!(of_a.iter().map(|finding| finding.count).collect::<Vec<_>>(), [40], "{of_a:#?}");
    until_as(&b, &of_a);
}

/// What each counted alone, of a series that is longer than the log, is counted together afterwards.
#[test]
fn what_each_counted_alone_counts_on_both() {
    let Some(mut nats) = Nats::start() else { return };
    let (mut first, mut second) = (Node::new("n1"), Node::new("n2"));
    for round in 0..33_u32 {
        limit_kill(&mut first, 100 + round, (100 + u64::from(round)) * SECOND);
    }
    let entity = second.kube_container("Deployment/web", "shop/web-1", "c1");
    let before = second.frames.len();
    for round in 0..2_u32 {
        // Between those of the first, and after the last of them.
        second.limit_kill(entity, 300 + round, (131 + 10 * u64::from(round)) * SECOND);
    }
    let known = first.frames.len() - 3;
    let a = Member::begin_with(section(&nats, "a"), timing());
    let b = Member::begin_with(section(&nats, "b"), timing());
    let counts = |member: &Member| member.findings().iter().map(|finding| finding.count).collect::<Vec<_>>();
    a.deliver_part(&first, 0..known - 20);
    b.deliver_part(&second, 0..before);
    settle(&[&a, &b]);
    with_stream(&nats, "TAPIO_default_LOG", async |stream: Stream| stream.purge().await.expect("purged"));
    a.deliver_part(&first, known - 20..known);
    settle(&[&a, &b]);
    until("both count the same", || (counts(&a) == [30] && counts(&b) == [30]).then_some(()));
    nats.kill();
    until("alone", || (a.cluster.link().is_alone() && b.cluster.link().is_alone()).then_some(()));
    a.deliver_part(&first, known..first.frames.len());
    b.deliver_part(&second, before..second.frames.len());
    until("each counts its own", || (counts(&a) == [33] && counts(&b) == [32]).then_some(()));
    nats.restart();
    until("both count all", || (counts(&a) == [35] && counts(&b) == [35]).then_some(()));
    settle(&[&a, &b]);
    assert_eq!(by_id(&a.findings()), by_id(&b.findings()));
    assert_eq!(counts(&a), [35]);
}
