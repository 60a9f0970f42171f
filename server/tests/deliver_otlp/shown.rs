//! `tapioctl deliveries`, of a whole server.

use std::path::Path;

use serde_json::Value;
use tapio_server::deliver::{DeliverSection, OtlpProtocol};

use super::receiver::{Receiver, Reply};
use crate::cluster_whole::{findings_when, ship, when};
use crate::correlate_node::{Node, SECOND};
use crate::programs::{output, printed, tapioctl};
use crate::whole_server::Whole;

/// A node on which a workload died at a second.
fn death(node: &str, workload: &str, second: u64) -> Node {
    let mut node = Node::new(node);
    let pod = format!("shop/{workload}-0");
    let entity = node.kube_container(&format!("Deployment/{workload}"), &pod, &pod);
    node.limit_kill(entity, 100, second * SECOND);
    node
}

async fn start(dir: &Path, receiver: &Receiver) -> Whole {
    let (dir, otlp) = (dir.to_owned(), Some(receiver.section()));
    Whole::start(|config| {
        config.archive.dir = dir;
        config.deliver = DeliverSection { otlp, ..DeliverSection::default() };
    })
    .await
}

async fn deliveries(server: &Whole, arguments: &[&str]) -> String {
    let arguments = [&["deliveries"], arguments].concat();
    printed(output(tapioctl(server.pipeline.grpc_address, &arguments)).await)
}

/// Asks until the only sink stands so.
async fn sink_when(server: &Whole, so: impl Fn(&Value) -> bool) -> Value {
    let ask = async || {
        let text = deliveries(server, &["-o", "json"]).await;
        serde_json::from_str(&text).expect("one sink on one line")
    };
    when(ask, so).await
}

fn has(value: &Value, words: &str) -> bool {
    value.as_str().is_some_and(|text| text.contains(words))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_waits_and_what_was_given_up_is_shown() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut receiver = Receiver::start(OtlpProtocol::Grpc, None);
    receiver.will(&[Reply::Partial("the record is \u{1b}[2Jtoo old")]);
    let server = start(dir.path(), &receiver).await;
    ship(&server, &death("n1", "web", 100), 0).await;
    let sink = sink_when(&server, |sink| sink["refused"] == 1 && sink["waiting"] == 0).await;
    let refused = findings_when(&server, |found| found.len() == 1).await.remove(0).id;
    let given_up = sink["given_up"].clone();
    assert_eq!((&given_up[0]["finding"], &given_up[0]["revision"]), (&refused.as_str().into(), &1.into()));
    assert!(has(&given_up[0]["reason"], "the record is \u{fffd}[2Jtoo old"), "{sink:#}");

    tokio::task::block_in_place(|| receiver.end());
    ship(&server, &death("n2", "shop", 9_000), 0).await;
    let found = findings_when(&server, |found| found.len() == 2).await;
    let missed = &found.iter().find(|one| one.id != refused).expect("there are two").id;
    let is_away = |sink: &Value| sink["waiting"] == 1 && has(&sink["failure"]["reason"], "onnection refused");
    let sink = sink_when(&server, is_away).await;
    assert_eq!((&sink["failure"]["finding"], &sink["queued"][0]["finding"]), (&missed[..].into(), &missed[..].into()));
    assert!(has(&sink["trouble"], "onnection refused"), "{sink:#}");
    let text = deliveries(&server, &[]).await;
    for wanted in ["1 waiting\n", "1 given up", &refused, missed, "onnection refused", "[2Jtoo old"] {
        assert!(text.contains(wanted), "{wanted}: {text}");
    }
    assert!(!text.contains('\u{1b}'), "{text}");

    receiver.begin();
    let sink = sink_when(&server, |sink| sink["waiting"] == 0 && sink["delivered"] == 1).await;
    assert_eq!((&sink["queued"], &sink["trouble"], &sink["given_up"]), (&Value::Array(vec![]), &"".into(), &given_up));
    assert!(has(&sink["failure"]["reason"], "onnection refused"), "the last failure stays: {sink:#}");
    assert!(deliveries(&server, &[]).await.contains("0 waiting\n"));
    server.pipeline.shutdown().await.expect("a good end");

    // The reason is kept with the mark.
    let again = start(dir.path(), &receiver).await;
    let sink = sink_when(&again, |sink| sink["given_up"] == given_up).await;
    assert_eq!((&sink["refused"], &sink["delivered"]), (&0.into(), &0.into()));
    again.pipeline.shutdown().await.expect("a good end");
}
