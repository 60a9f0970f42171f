//! Silences and acknowledgements: what is delivered while they hold, and that every server knows them after anything.

use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use prometheus::Registry;
use serde_json::{Value, json};
use tapio_server::cluster::Leadership;
use tapio_server::deliver::{DeliverMetrics, Deliverer, Delivering, Delivery, MarksAt, Sink, Source, WhenSilenced};
use tapio_server::findings::FindingStore;
use tapio_server::silences::{SharedSilences, Silences};
use tapio_wire::program::clock::now_ns;
use tapio_wire::service::silences_client::SilencesClient;
use tapio_wire::service::{
    AcknowledgeRequest, AddSilenceRequest, EndSilenceRequest, EntityRef, Finding, ListSilencesRequest, Silence,
};
use tonic::{Code, Request};

use crate::cluster_support::{LIMIT, Nats, section, until};
use crate::whole_server::Whole;

const HOUR_NS: u64 = 3600 * 1_000_000_000;

fn wanted(pattern: &str, namespace: &str) -> AddSilenceRequest {
    AddSilenceRequest {
        pattern: pattern.into(),
        namespace: namespace.into(),
        until_ns: now_ns() + HOUR_NS,
        reason: "a rehearsal".into(),
        ..AddSilenceRequest::default()
    }
}

fn finding(id: &str, namespace: &str, ongoing: bool) -> Finding {
    let entity = EntityRef { namespace: namespace.into(), pod: "web-0".into(), ..EntityRef::default() };
    Finding { id: id.into(), pattern: "crashed".into(), entity: Some(entity), ongoing, ..Finding::default() }
}

/// Hands on what it is given.
struct Told(&'static str, WhenSilenced, Mutex<Sender<(String, Finding)>>);

impl Sink for Told {
    fn name(&self) -> &str {
        self.0
    }

    fn timeout(&self) -> Duration {
        Duration::from_secs(5)
    }

    fn when_silenced(&self) -> WhenSilenced {
        self.1
    }

    fn deliver<'a>(&'a self, delivery: &'a Delivery) -> Delivering<'a> {
        let sent = (delivery.finding.id.clone(), (*delivery.finding).clone());
        // The test may have seen enough.
        let _ = self.2.lock().expect("no panic").send(sent);
        Box::pin(async { Ok(()) })
    }
}

struct Delivering3 {
    store: Arc<FindingStore>,
    silences: Arc<Silences>,
    told: BTreeMap<&'static str, Receiver<(String, Finding)>>,
    _deliverer: Deliverer,
    _folder: tempfile::TempDir,
}

impl Delivering3 {
    fn start() -> Self {
        let (store, silences) = (Arc::new(FindingStore::new(50)), Arc::new(Silences::in_memory()));
        let source = Source {
            store: Arc::clone(&store),
            leadership: Arc::new(Leadership::sole("a")),
            link: None,
            silences: Arc::clone(&silences),
        };
        let mut told = BTreeMap::new();
        let sinks = [("hold", WhenSilenced::Hold), ("end", WhenSilenced::End), ("record", WhenSilenced::Record)];
        let sinks = sinks.map(|(name, when)| {
            let (sender, receiver) = channel();
            told.insert(name, receiver);
            Box::new(Told(name, when, Mutex::new(sender))) as Box<dyn Sink>
        });
        let folder = tempfile::tempdir().expect("a folder");
        let metrics = DeliverMetrics::register(&Registry::new()).expect("fresh names");
        let at = MarksAt::Folder(folder.path().to_owned());
        let deliverer = Deliverer::start(&source, sinks.into(), &at, &metrics).expect("it starts");
        Self { store, silences, told, _deliverer: deliverer, _folder: folder }
    }

    fn next(&self, sink: &str) -> Finding {
        self.told[sink].recv_timeout(LIMIT).expect("a delivery").1
    }

    /// Publishes a finding that nothing silences, and sees to it that it is the next that a sink gets.
    fn nothing_before(&self, sinks: &[&str], id: &str) {
        self.store.publish(finding(id, "open", false)).expect("it is new");
        for sink in sinks {
            assert_eq!(self.next(sink).id, id, "{sink}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silenced_findings_reach_records_only_and_end_what_was_shown() {
    let all = Delivering3::start();
    all.store.publish(finding("before", "shop", true)).expect("it is new");
    for sink in ["hold", "end", "record"] {
        assert_eq!(all.next(sink).id, "before", "{sink}");
    }
    let silence = all.silences.add(wanted("crashed", "shop"), "jane").await.expect("a good one");
    // A receiver that shows open findings hears once that this one is silenced.
    let ended = all.next("end");
    assert_eq!((ended.id.as_str(), ended.silence.as_ref()), ("before", Some(&silence)));
    for (id, ongoing) in [("while", false), ("still", true)] {
        all.store.publish(finding(id, "shop", ongoing)).expect("it is new");
        let recorded = all.next("record");
        assert!(recorded.id == id && recorded.silence.is_none(), "{recorded:?}");
    }
    all.nothing_before(&["hold", "end", "record"], "open-1");
    // A withdrawal is delivered all the same.
    all.store.withdraw("before", None).expect("it was there");
    for sink in ["hold", "end", "record"] {
        let gone = all.next(sink);
        assert!(gone.id == "before" && gone.withdrawn, "{sink}: {gone:?}");
    }
    all.silences.end(&silence.id, "joe").await.expect("it is there");
    // What goes on is news; what was over before is none.
    for sink in ["hold", "end"] {
        let still = all.next(sink);
        assert!(still.id == "still" && still.silence.is_none(), "{sink}: {still:?}");
    }
    all.nothing_before(&["hold", "end", "record"], "open-2");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silence_that_runs_out_lets_go_by_itself() {
    let all = Delivering3::start();
    let short = AddSilenceRequest { until_ns: now_ns() + 1_500_000_000, ..wanted("*", "") };
    all.silences.add(short, "jane").await.expect("a good one");
    all.store.publish(finding("state", "shop", true)).expect("it is new");
    assert_eq!(all.next("record").id, "state");
    let began = now_ns();
    let told = all.next("hold");
    assert!(told.id == "state" && told.silence.is_none() && now_ns() > began, "{told:?}");
    assert!(all.silences.list(false).is_empty() && all.silences.list(true).len() == 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_acknowledgement_is_told_and_silences_nobody() {
    let all = Delivering3::start();
    all.store.publish(finding("one", "shop", true)).expect("it is new");
    assert_eq!(all.next("hold").id, "one");
    let request = AcknowledgeRequest { finding: "one".into(), reason: "on it".into(), ..AcknowledgeRequest::default() };
    all.silences.acknowledge(request, "jane").await.expect("a good one");
    let told = all.next("hold");
    assert_eq!(told.acknowledged.map(|by| (by.by, by.reason)), Some(("jane".into(), "on it".into())));
    all.store.publish(Finding { ongoing: false, resolved_ns: 9, ..finding("one", "shop", false) }).expect("it is over");
    assert_eq!(all.next("hold").resolved_ns, 9);
}

fn shared(nats: &Nats, server: &str, dir: &std::path::Path) -> (Arc<Silences>, SharedSilences) {
    let silences = Arc::new(Silences::open(dir));
    let sharing = SharedSilences::start(&section(nats, server), &silences).expect("it starts");
    (silences, sharing)
}

async fn until_added(silences: &Arc<Silences>, pattern: &str) -> Silence {
    let deadline = std::time::Instant::now() + LIMIT;
    loop {
        match silences.add(wanted(pattern, ""), "jane").await {
            Ok(silence) => return silence,
            Err(error) => assert!(std::time::Instant::now() < deadline, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_server_knows_what_one_was_asked_after_any_loss() {
    let Some(mut nats) = Nats::start() else { return };
    let dirs = [(); 3].map(|()| tempfile::tempdir().expect("a folder"));
    let (one, _one) = shared(&nats, "a", dirs[0].path());
    let (two, _two) = shared(&nats, "b", dirs[1].path());
    let first = until_added(&one, "crashed").await;
    let known = |silences: &Arc<Silences>, id: &str| silences.list(false).iter().any(|silence| silence.id == id);
    tokio::task::block_in_place(|| until("the other knows", || known(&two, &first.id).then_some(())));
    let second = until_added(&two, "stopped").await;
    two.end(&first.id, "joe").await.expect("it is there");
    tokio::task::block_in_place(|| until("it is over", || (!known(&one, &first.id)).then_some(())));
    // One that joins later, or comes back without its folder, reads them all.
    let (late, _late) = shared(&nats, "c", dirs[2].path());
    tokio::task::block_in_place(|| until("it has read", || (late.list(true).len() == 2).then_some(())));
    // While the log is away nothing is promised, and what holds goes on.
    nats.kill();
    let refused = one.add(wanted("killed", ""), "jane").await.expect_err("it cannot be kept");
    assert!(refused.to_string().contains("could not be kept"), "{refused}");
    assert!(known(&one, &second.id) && one.list(true).len() == 2);
    // A server that starts meanwhile knows them by its file.
    assert_eq!(Silences::open(dirs[1].path()).list(true).len(), 2);
    // NATS has lost everything: the servers put it back, with the end of the first.
    nats.restart_empty();
    let third = until_added(&one, "third").await;
    let dir = tempfile::tempdir().expect("a folder");
    let (fresh, _fresh) = shared(&nats, "d", dir.path());
    tokio::task::block_in_place(|| until("all of them", || (fresh.list(true).len() == 3).then_some(())));
    assert!(known(&fresh, &second.id) && known(&fresh, &third.id) && !known(&fresh, &first.id));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_brings_no_token_may_not_silence() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), "sesame").expect("written");
    let server = Whole::start(|config| config.server.auth.token_file = Some(file.path().to_owned())).await;
    let mut client = SilencesClient::new(server.channel().await);
    let denied = client.add_silence(wanted("crashed", "")).await.expect_err("no token");
    assert_eq!(denied.code(), Code::Unauthenticated, "{denied}");
    let mut request = Request::new(wanted("crashed", ""));
    request.metadata_mut().insert("authorization", "Bearer sesame".parse().expect("ASCII"));
    let added = client.add_silence(request).await.expect("the shared token may").into_inner();
    assert_eq!(added.by, "shared token");
    let denied = server.metric("tapio_server_denied_requests_total", &["purpose=\"silence\""]);
    assert_eq!(denied, 1.0);
    assert_eq!(server.metric("tapio_server_silences", &["kind=\"silence\""]), 1.0);
    server.pipeline.shutdown().await.expect("a good end");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silences_outlive_the_server_and_are_asked_for_by_grpc() {
    let server = Whole::start(|_| {}).await;
    let mut client = SilencesClient::new(server.channel().await);
    let added = client.add_silence(wanted("crashed", "")).await.expect("kept").into_inner();
    let error = client.add_silence(AddSilenceRequest::default()).await.expect_err("it says nothing");
    assert_eq!(error.code(), Code::InvalidArgument, "{error}");
    let request = AcknowledgeRequest { finding: "nothing".into(), ..AcknowledgeRequest::default() };
    let error = client.acknowledge(request).await.expect_err("there is none");
    assert_eq!(error.code(), Code::NotFound, "{error}");
    let dir = server.dir;
    server.pipeline.shutdown().await.expect("a good end");
    let again = Whole::start(|config| config.archive.dir = dir.path().to_owned()).await;
    let mut client = SilencesClient::new(again.channel().await);
    let listed = client.list_silences(ListSilencesRequest::default()).await.expect("listed").into_inner();
    assert_eq!(listed.silences, std::slice::from_ref(&added));
    client.end_silence(EndSilenceRequest { id: added.id[..8].into() }).await.expect("it is there");
    let listed = client.list_silences(ListSilencesRequest { all: true }).await.expect("listed").into_inner();
    assert!(listed.silences.len() == 1 && listed.silences[0].ended_ns > 0, "{listed:?}");
    again.pipeline.shutdown().await.expect("a good end");
}

fn send(server: &Whole, method: &str, path: &str, body: &Value, kind: &str) -> (u16, Value) {
    use std::io::{Read, Write};
    let mut stream = std::net::TcpStream::connect(server.pipeline.http_address).expect("it listens");
    let body = body.to_string();
    let head = format!("Host: tapio\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n", body.len());
    write!(stream, "{method} {path} HTTP/1.0\r\n{head}\r\n{body}").expect("sent");
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("answered");
    let (head, body) = text.split_once("\r\n\r\n").expect("a head");
    let code = head.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a code");
    (code, serde_json::from_str(body).unwrap_or(Value::Null))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn programs_silence_by_json_and_other_sites_cannot() {
    let server = Whole::start(|_| {}).await;
    let good = json!({"pattern": "crashed", "until": "2h", "reason": "a rehearsal"});
    let json = "application/json";
    let (code, added) = send(&server, "POST", "/api/v1/silences", &good, json);
    assert!(code == 201 && added["pattern"] == "crashed", "{code} {added}");
    // What a form of another site can send.
    assert_eq!(send(&server, "POST", "/api/v1/silences", &good, "text/plain").0, 415);
    for (wrong, said) in [
        (json!({"pattern": "crashed", "until": "soon", "reason": "x"}), "no end"),
        (json!({"pattern": "crashed", "until": "2h"}), "reason"),
        (json!({"until": "2h", "reason": "x"}), "name a pattern"),
        (json!({"patern": "x"}), "unknown field"),
    ] {
        let (code, answer) = send(&server, "POST", "/api/v1/silences", &wrong, json);
        let text = answer["error"].as_str().unwrap_or_default().to_owned();
        assert!(matches!(code, 400 | 422) && text.contains(said), "{wrong}: {code} {answer}");
    }
    let listed: Value = serde_json::from_str(&server.get("/api/v1/silences", "").1).expect("JSON");
    assert_eq!(listed["silences"].as_array().map(Vec::len), Some(1));
    let path = format!("/api/v1/silences/{}", added["id"].as_str().expect("an id"));
    let (code, ended) = send(&server, "DELETE", &path, &Value::Null, json);
    assert!(code == 200 && ended["ended_at"].is_string(), "{code} {ended}");
    let (code, _) = send(&server, "POST", "/api/v1/findings/nothing/acknowledge", &json!({}), json);
    assert_eq!(code, 404);
    server.pipeline.shutdown().await.expect("a good end");
}
