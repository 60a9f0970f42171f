//! Findings as log records of OTLP, at receivers that decode what was sent: one speaks gRPC, the other HTTP.

mod receiver;
mod shown;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use axum::http::HeaderValue;
use opentelemetry_proto::tonic::common::v1::AnyValue;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use tapio_server::deliver::{DeliverSection, OnlySection, Otlp, OtlpProtocol, OtlpSection};
use tapio_server::findings::Severity;
use tapio_wire::program::clock::now_ns;
use tapio_wire::program::tls::ClientFiles;
use tapio_wire::service::{Death, EntityRef, Finding};
use tonic::transport::{Identity, ServerTlsConfig};

use self::receiver::{Receiver, Reply, Seen, values};
use crate::cluster_support::until;
use crate::cluster_whole::{limit_kill, ship};
use crate::correlate_node::{Node, SECOND};
use crate::deliver_chat::{Delivering, certificate_of_unknown, finding};
use crate::whole_server::Whole;

const BOTH: [OtlpProtocol; 2] = [OtlpProtocol::Grpc, OtlpProtocol::Http];

fn death(id: &str) -> Finding {
    let entity = EntityRef {
        kind: "container".into(),
        name: "web".into(),
        node: "n1".into(),
        pod_uid: "0b1c".into(),
        container_id: "c0ffee".into(),
        namespace: "shop".into(),
        pod: "web-0".into(),
        container: "app".into(),
        workload: "Deployment/web".into(),
        ..EntityRef::default()
    };
    let verdict = "Killed by the kernel: its own limit of 64 MiB.".to_owned();
    let advice = vec!["Raise the limit.".to_owned(), "Look for a leak.".to_owned()];
    Finding {
        entity: Some(entity),
        pattern: "memory-limit-kill".into(),
        title: "web exceeded its memory limit".into(),
        summary: "It grew for an hour.".into(),
        confidence: 0.95,
        count: 3,
        advice,
        death: Some(Death { exit_code: Some(137), verdict, ..Death::default() }),
        ..finding(id, "critical")
    }
}

fn text(value: &str) -> Value {
    Value::StringValue(value.into())
}

#[test]
fn a_finding_arrives_with_all_fields_over_grpc_and_http() {
    for protocol in BOTH {
        let receiver = Receiver::start(protocol, None);
        let section = OtlpSection {
            page_url: Some("https://tapio.example.com/".into()),
            headers: [("x-scope-orgid".to_owned(), "shop".to_owned())].into(),
            only: OnlySection { severity: Some(Severity::High), ..OnlySection::default() },
            ..receiver.section()
        };
        let delivering = Delivering::to(|_| Box::new(Otlp::new(&section, "prod", "server-0").expect("good")));
        delivering.publish(finding("b2", "medium"));
        delivering.publish(death("a1"));
        delivering.until_quiet(1);
        let seen = receiver.seen().remove(0);
        assert_eq!(seen.headers["x-scope-orgid"], "shop");
        let resource = values(&seen.request.resource_logs[0].resource.as_ref().expect("a resource").attributes);
        assert_eq!(resource["service.name"], text("tapio-server"));
        assert_eq!(resource["service.instance.id"], text("server-0"));
        assert_eq!(resource["k8s.cluster.name"], text("prod"));
        let (record, known) = (seen.record(), delivering.store.get("a1").expect("it is there"));
        assert_eq!((record.severity_number, record.severity_text.as_str()), (21, "critical"));
        assert_eq!((record.time_unix_nano, record.observed_time_unix_nano), (known.started_ns, known.published_ns));
        assert_eq!(record.event_name, "tapio.finding");
        assert_eq!(seen.body(), "Killed by the kernel: its own limit of 64 MiB.");
        let attributes = seen.attributes();
        for (key, value) in [
            ("k8s.cluster.name", text("prod")),
            ("k8s.namespace.name", text("shop")),
            ("k8s.pod.name", text("web-0")),
            ("k8s.pod.uid", text("0b1c")),
            ("k8s.container.name", text("app")),
            ("k8s.node.name", text("n1")),
            ("k8s.deployment.name", text("web")),
            ("container.id", text("c0ffee")),
            ("process.exit.code", Value::IntValue(137)),
            ("tapio.finding.id", text("a1")),
            ("tapio.finding.revision", Value::IntValue(1)),
            ("tapio.finding.state", text("stands")),
            ("tapio.finding.pattern", text("memory-limit-kill")),
            ("tapio.finding.title", text("web exceeded its memory limit")),
            ("tapio.finding.summary", text("It grew for an hour.")),
            ("tapio.finding.severity", text("critical")),
            ("tapio.finding.confidence", Value::DoubleValue(0.95)),
            ("tapio.finding.possible", Value::BoolValue(false)),
            ("tapio.finding.count", Value::IntValue(3)),
            ("tapio.finding.url", text("https://tapio.example.com/f/a1")),
        ] {
            assert_eq!(attributes.get(key), Some(&value), "{protocol:?}: {key}");
        }
        let Some(Value::ArrayValue(advice)) = attributes.get("tapio.finding.advice") else { panic!("no advice") };
        assert_eq!(advice.values[1], AnyValue { value: Some(text("Look for a leak.")) });
        assert!(seen.text("log.record.uid").starts_with("a1.1."), "{attributes:#?}");
        assert_eq!(receiver.seen().len(), 1, "the other one is not severe enough");
    }
}

#[test]
fn a_receiver_that_comes_back_gets_what_it_missed() {
    for protocol in BOTH {
        let mut receiver = Receiver::start(protocol, None);
        let delivering = receiver.delivering();
        delivering.publish(death("a1"));
        delivering.publish(death("c3"));
        delivering.until_quiet(2);
        receiver.end();
        delivering.publish(Finding { revision: 2, count: 4, ..death("a1") });
        delivering.publish(death("b2"));
        delivering.store.withdraw("c3", Some("b2")).expect("it was there");
        delivering.publish(Finding { revision: 3, resolved_ns: now_ns(), ongoing: false, ..death("a1") });
        until("it is known to be away", || {
            let status = delivering.deliverer.status().remove(0);
            (!status.trouble.is_empty() && status.waiting == 3).then_some(())
        });
        // The answer to what it takes first is lost.
        receiver.will(&[Reply::TakeAndFail]);
        receiver.begin();
        delivering.until_quiet(5);
        let taken: Vec<Seen> = receiver.seen().into_iter().filter(|seen| seen.was_taken).collect();
        let uids: Vec<String> = taken.iter().map(|seen| seen.text("log.record.uid")).collect();
        assert_eq!(uids.len(), 6, "{uids:?}");
        // By its id the receiver tells that one came twice.
        let latest: BTreeMap<String, &Seen> = taken.iter().map(|seen| (seen.text("log.record.uid"), seen)).collect();
        // The highest revision of a finding is what holds.
        let last = |id: &str| {
            let of_id = latest.values().filter(|seen| seen.text("tapio.finding.id") == id);
            let last = of_id.max_by_key(|seen| seen.revision()).unwrap_or_else(|| panic!("{id}: {uids:?}"));
            (last.text("tapio.finding.state"), last.body().to_owned(), last.record().severity_number)
        };
        let verdict = "Killed by the kernel: its own limit of 64 MiB.".to_owned();
        assert_eq!(latest.len(), 5, "{uids:?}");
        assert_eq!(last("a1"), ("over".into(), verdict.clone(), 21));
        assert_eq!(last("b2"), ("stands".into(), verdict, 21));
        assert_eq!(last("c3"), ("withdrawn".into(), "Withdrawn: finding b2 explains it better.".into(), 9));
        let status = delivering.deliverer.status().remove(0);
        assert_eq!((status.lost, status.refused), (0, 0), "{protocol:?} {status:#?}");
        assert!(status.repeated >= 1, "{protocol:?} {status:#?}");
    }
}

#[test]
fn what_a_receiver_refuses_is_sent_once_and_told() {
    for protocol in BOTH {
        for (reply, reason) in
            [(Reply::Partial("the record is too old"), "the record is too old"), (Reply::Invalid, "no such field")]
        {
            let receiver = Receiver::start(protocol, None);
            receiver.will(&[reply]);
            let delivering = receiver.delivering();
            delivering.publish(death("a1"));
            let status = until("it is refused", || {
                let status = delivering.deliverer.status().remove(0);
                (status.refused == 1 && status.waiting == 0).then_some(status)
            });
            assert!(status.trouble.contains(reason), "{protocol:?}: {status:#?}");
            assert_eq!((status.delivered, status.failed), (0, 1), "{status:#?}");
            // Others are taken, and so is the next version of the same.
            delivering.publish(death("b2"));
            delivering.publish(Finding { revision: 2, count: 4, ..death("a1") });
            delivering.until_quiet(2);
            let ids: Vec<String> = receiver.seen().iter().map(|seen| seen.text("tapio.finding.id")).collect();
            assert_eq!(ids, ["a1", "b2", "a1"], "{protocol:?}");
            assert_eq!(delivering.deliverer.status()[0].refused, 1);
        }
    }
}

#[test]
fn a_pause_that_a_receiver_asks_for_is_kept() {
    for protocol in BOTH {
        let receiver = Receiver::start(protocol, None);
        receiver.will(&[Reply::Later(None), Reply::Later(Some(2)), Reply::Garbage]);
        let delivering = receiver.delivering();
        delivering.publish(death("a1"));
        delivering.until_quiet(1);
        let at: Vec<Instant> = receiver.seen().iter().map(|seen| seen.at).collect();
        assert_eq!(at.len(), 4, "{protocol:?}");
        assert!(at[2] - at[1] >= Duration::from_secs(2), "{protocol:?}: {:?}", at[2] - at[1]);
        let status = delivering.deliverer.status().remove(0);
        assert_eq!((status.failed, status.refused, status.delivered), (3, 0, 1), "{status:#?}");
    }
}

#[test]
fn a_hostile_name_is_plain_text_at_its_receiver() {
    for protocol in BOTH {
        let receiver = Receiver::start(protocol, None);
        let delivering = receiver.delivering();
        let name = "\u{1b}]0;x\u{7}<script>\u{202e}{{.Body}}\r\ngrpc-status: 0\0";
        let mut hostile = Finding { title: name.into(), ..death("a1") };
        let entity = hostile.entity.as_mut().expect("an entity");
        entity.name = name.repeat(5000);
        entity.container = name.into();
        entity.workload = format!("Deployment/{name}");
        hostile.death.as_mut().expect("a death").verdict = format!("{name} died.");
        delivering.publish(hostile);
        delivering.until_quiet(1);
        let seen = receiver.seen().remove(0);
        let plain = "\u{fffd}]0;x\u{fffd}<script>\u{fffd}{{.Body}}\u{fffd}\u{fffd}grpc-status: 0\u{fffd}";
        for key in ["tapio.finding.title", "k8s.container.name", "k8s.deployment.name"] {
            assert_eq!(seen.text(key), plain, "{protocol:?}: {key}");
        }
        assert_eq!(seen.body(), format!("{plain} died."));
        assert_eq!(seen.text("tapio.entity.name").chars().count(), 4096);
    }
}

#[test]
fn a_token_goes_to_a_certificate_that_is_trusted() {
    let keys = tempfile::tempdir().expect("a folder");
    let (certificate, key) = certificate_of_unknown(keys.path());
    let identity = Identity::from_pem(certificate, key);
    let receiver = Receiver::start(OtlpProtocol::Grpc, Some(ServerTlsConfig::new().identity(identity)));
    let token_file = Some(keys.path().join("token"));
    std::fs::write(keys.path().join("token"), "s3cret\n").expect("written");
    let section = OtlpSection { token_file, ..receiver.section() };
    // This machine does not know the CA.
    let distrusting = Delivering::to(|_| Box::new(Otlp::new(&section, "prod", "server-0").expect("good")));
    distrusting.publish(death("a1"));
    until("it is not trusted", || {
        let trouble = distrusting.deliverer.status().remove(0).trouble;
        (trouble.contains("TLS") && trouble.contains("deliver.otlp.tls")).then_some(())
    });
    assert!(receiver.seen().is_empty());
    let tls = Some(ClientFiles { ca: keys.path().join("ca.pem"), ..ClientFiles::default() });
    let section = OtlpSection { tls, ..section };
    let trusting = Delivering::to(|_| Box::new(Otlp::new(&section, "prod", "server-0").expect("good")));
    trusting.publish(death("a1"));
    trusting.until_quiet(1);
    std::fs::write(keys.path().join("token"), "an0ther").expect("written");
    trusting.publish(death("b2"));
    trusting.until_quiet(2);
    let tokens: Vec<HeaderValue> = receiver.seen().iter().map(|seen| seen.headers["authorization"].clone()).collect();
    assert_eq!(tokens, ["Bearer s3cret", "Bearer an0ther"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_death_that_a_server_finds_is_a_record() {
    let receiver = Receiver::start(OtlpProtocol::Grpc, None);
    let deliver = DeliverSection { otlp: Some(receiver.section()), ..DeliverSection::default() };
    let server = Whole::start(|config| config.deliver = deliver).await;
    let mut node = Node::new("n1");
    limit_kill(&mut node, 100, 100 * SECOND);
    ship(&server, &node, 0).await;
    let seen = tokio::task::block_in_place(|| until("it is there", || receiver.seen().pop()));
    assert_eq!(seen.text("tapio.finding.pattern"), "memory-limit-kill");
    assert_eq!(seen.text("k8s.deployment.name"), "web");
    assert!(seen.body().contains("limit"), "{}", seen.body());
    server.until_metric("tapio_server_deliveries_total", &["sink=\"otlp\""], |value| value >= 1.0).await;
    server.pipeline.shutdown().await.expect("a good end");
}
