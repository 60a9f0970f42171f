//! Findings as alerts of a real Alertmanager.

use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use prometheus::Registry;
use serde_json::Value;
use tapio_server::cluster::Leadership;
use tapio_server::deliver::{
    Alertmanager, AlertmanagerSection, DeliverMetrics, DeliverSection, Deliverer, MarksAt, Source,
};
use tapio_server::findings::FindingStore;
use tapio_server::silences::Silences;
use tapio_wire::program::clock::now_ns;
use tapio_wire::service::{AcknowledgeRequest, AddSilenceRequest, EntityRef, Finding};

use crate::cluster_support::{Nats, installed, section, until};
use crate::cluster_whole::{limit_kill, ship};
use crate::correlate_node::{Node, SECOND};
use crate::whole_server::{Whole, get};

/// A real Alertmanager on loopback; it ends with this value.
struct Alerts {
    port: u16,
    dir: tempfile::TempDir,
    child: Option<Child>,
}

const PROGRAMS: [&str; 2] = ["prometheus-alertmanager", "alertmanager"];

impl Alerts {
    fn start() -> Option<Self> {
        installed(&PROGRAMS)?;
        // Taken again right after it is given back.
        let port = TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a port").port();
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::write(dir.path().join("alerts.yml"), "route: {receiver: none}\nreceivers: [{name: none}]\n")
            .expect("written");
        let mut alerts = Self { port, dir, child: None };
        alerts.begin();
        Some(alerts)
    }

    /// Starts with nothing of what was before: it keeps no alerts on its disk.
    fn begin(&mut self) {
        let path = |name: &str| self.dir.path().join(name).display().to_string();
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--"])
            .arg(installed(&PROGRAMS).expect("it was there"))
            .args([format!("--config.file={}", path("alerts.yml")), format!("--storage.path={}", path("data"))])
            .args([format!("--web.listen-address=127.0.0.1:{}", self.port), "--cluster.listen-address=".into()])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        self.child = Some(child.expect("Alertmanager starts"));
        until("it answers", || std::net::TcpStream::connect(("127.0.0.1", self.port)).ok());
    }

    fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    fn section(&self) -> AlertmanagerSection {
        AlertmanagerSection {
            urls: vec![format!("http://127.0.0.1:{}", self.port)],
            repeat: Duration::from_secs(1),
            labels: [("team".to_owned(), "platform".to_owned())].into(),
            page_url: Some("https://tapio.example.com/".into()),
            ..AlertmanagerSection::default()
        }
    }

    /// What fires now.
    fn firing(&self) -> Vec<Value> {
        let (code, body) = get(([127, 0, 0, 1], self.port).into(), "/api/v2/alerts", "");
        assert_eq!(code, 200, "{body}");
        serde_json::from_str(&body).expect("JSON")
    }

    fn until_firing(&self, wanted: &[&str]) -> Vec<Value> {
        let mut wanted: Vec<&str> = wanted.to_vec();
        wanted.sort_unstable();
        until("just these fire", || {
            let firing = self.firing();
            let mut ids: Vec<&str> = firing.iter().filter_map(|one| one["labels"]["finding"].as_str()).collect();
            ids.sort_unstable();
            (ids == wanted).then(|| firing.clone())
        })
    }
}

impl Drop for Alerts {
    fn drop(&mut self) {
        self.kill();
    }
}

fn finding(id: &str, pod: &str, ongoing: bool) -> Finding {
    let now_ns = now_ns();
    let entity = EntityRef { namespace: "shop".into(), pod: pod.into(), ..EntityRef::default() };
    Finding {
        id: id.into(),
        pattern: "disk-nearly-full".into(),
        severity: "high".into(),
        title: format!("{pod} <b>\u{1b}[31m"),
        entity: Some(entity),
        started_ns: now_ns,
        ended_ns: now_ns,
        ongoing,
        ..Finding::default()
    }
}

#[test]
fn alerts_fire_while_findings_stand_also_after_a_loss() {
    let Some(mut alerts) = Alerts::start() else { return };
    let store = Arc::new(FindingStore::new(50));
    let (leadership, silences) = (Arc::new(Leadership::sole("a")), Arc::new(Silences::in_memory()));
    let source = Source { store: Arc::clone(&store), leadership, link: None, silences };
    let folder = tempfile::tempdir().expect("a folder");
    let metrics = DeliverMetrics::register(&Registry::new()).expect("fresh names");
    let sink = Alertmanager::new(&alerts.section(), "prod").expect("a good address");
    let at = MarksAt::Folder(folder.path().to_owned());
    let deliverer = Deliverer::start(&source, vec![Box::new(sink)], &at, &metrics).expect("it starts");
    for (id, pod, ongoing) in [("state", "web-0", true), ("death", "web-1", false), ("wrong", "web-2", false)] {
        store.publish(finding(id, pod, ongoing)).expect("it is new");
    }
    let firing = alerts.until_firing(&["state", "death", "wrong"]);
    let state = firing.iter().find(|one| one["labels"]["finding"] == "state").expect("it fires");
    assert_eq!(state["labels"]["alertname"], "TapioDiskNearlyFull");
    assert_eq!(state["labels"]["team"], "platform");
    assert_eq!(state["labels"]["cluster"], "prod");
    assert_eq!(state["generatorURL"], "https://tapio.example.com/f/state");

    // It is away, and comes back without its alerts. Meanwhile one is withdrawn, and another found.
    alerts.kill();
    store.withdraw("wrong", None).expect("it was there");
    store.publish(finding("later", "web-3", false)).expect("it is new");
    until("it is known to be away", || {
        deliverer.status().iter().any(|status| !status.trouble.is_empty()).then_some(())
    });
    alerts.begin();
    alerts.until_firing(&["state", "death", "later"]);
    store.publish(Finding { resolved_ns: 1, ongoing: false, ..finding("state", "web-0", false) }).expect("it is over");
    store.withdraw("later", None).expect("it was there");
    alerts.until_firing(&["death"]);
    // The alert is over before its confirmation is written.
    until("nothing waits", || (deliverer.status().remove(0).waiting == 0).then_some(()));
    let status = deliverer.status().remove(0);
    assert_eq!((status.lost, status.refused), (0, 0), "{status:#?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silence_ends_alerts_and_its_end_brings_them_back() {
    let Some(alerts) = Alerts::start() else { return };
    let store = Arc::new(FindingStore::new(50));
    let (leadership, silences) = (Arc::new(Leadership::sole("a")), Arc::new(Silences::in_memory()));
    let source = Source { store: Arc::clone(&store), leadership, link: None, silences: Arc::clone(&silences) };
    let folder = tempfile::tempdir().expect("a folder");
    let metrics = DeliverMetrics::register(&Registry::new()).expect("fresh names");
    let sink = Alertmanager::new(&alerts.section(), "prod").expect("a good address");
    let at = MarksAt::Folder(folder.path().to_owned());
    let _deliverer = Deliverer::start(&source, vec![Box::new(sink)], &at, &metrics).expect("it starts");
    for (id, ongoing) in [("state", true), ("death", false)] {
        store.publish(finding(id, "web-0", ongoing)).expect("it is new");
    }
    let until_firing = |wanted: &[&str]| tokio::task::block_in_place(|| alerts.until_firing(wanted));
    until_firing(&["state", "death"]);
    let wanted = AddSilenceRequest {
        namespace: "shop".into(),
        until_ns: now_ns() + 3600 * SECOND,
        reason: "a rehearsal".into(),
        ..AddSilenceRequest::default()
    };
    let silence = silences.add(wanted, "jane").await.expect("a good one");
    store.publish(finding("meanwhile", "web-1", false)).expect("it is new");
    until_firing(&[]);
    let acknowledged = AcknowledgeRequest { finding: "state".into(), ..AcknowledgeRequest::default() };
    silences.acknowledge(acknowledged, "joe").await.expect("a good one");
    silences.end(&silence.id, "jane").await.expect("it is there");
    // What was found and over meanwhile stays silent; what fired fires on.
    let firing = until_firing(&["state", "death"]);
    let state = firing.iter().find(|one| one["labels"]["finding"] == "state").expect("it fires");
    let said = state["annotations"]["acknowledged"].as_str().unwrap_or_default();
    assert!(said.starts_with("by joe, until") && state["annotations"]["silenced"].is_null(), "{state:#}");
}

/// A leader that delivers what is in its store, as the only one for as long as it lives.
fn leader(alerts: &Alerts, server: &str, nats: &Nats) -> (Arc<FindingStore>, Deliverer) {
    let store = Arc::new(FindingStore::new(50));
    let (leadership, silences) = (Arc::new(Leadership::sole(server)), Arc::new(Silences::in_memory()));
    let source = Source { store: Arc::clone(&store), leadership, link: None, silences };
    let metrics = DeliverMetrics::register(&Registry::new()).expect("fresh names");
    let sink = Alertmanager::new(&alerts.section(), "prod").expect("a good address");
    let at = MarksAt::Log(Box::new(section(nats, server)));
    (store, Deliverer::start(&source, vec![Box::new(sink)], &at, &metrics).expect("it starts"))
}

#[test]
fn the_next_leader_resolves_what_a_finding_was_called_before() {
    let (Some(alerts), Some(nats)) = (Alerts::start(), Nats::start()) else { return };
    let (store, first) = leader(&alerts, "a", &nats);
    // Deaths, whose alerts would fire for minutes.
    for (id, pod) in [("moved", "web-0"), ("taken", "web-1"), ("same", "web-2")] {
        store.publish(finding(id, pod, false)).expect("it is new");
    }
    let of = |firing: &[Value], id: &str| {
        let pods = firing.iter().filter(|one| one["labels"]["finding"] == id);
        pods.map(|one| one["labels"]["pod"].as_str().expect("a pod").to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(of(&alerts.until_firing(&["moved", "taken", "same"]), "moved"), ["web-0"]);
    until("all is confirmed", || (first.status()[0].delivered == 3).then_some(()));
    let same = (*store.get("same").expect("it is there")).clone();
    drop(first);
    // What the next one has found meanwhile: another pod, and that one is a part of another.
    let (store, second) = leader(&alerts, "b", &nats);
    for (id, pod) in [("moved", "web-9"), ("taken", "web-1"), ("better", "web-1")] {
        store.publish(finding(id, pod, false)).expect("it is new");
    }
    store.publish(same).expect("it is new");
    store.withdraw("taken", Some("better")).expect("it was there");
    let firing = until("no old name fires", || {
        let firing = alerts.firing();
        let is_over = of(&firing, "moved") == ["web-9"] && of(&firing, "taken").is_empty();
        (is_over && firing.len() == 3).then_some(firing)
    });
    assert_eq!((of(&firing, "better"), of(&firing, "same")), (vec!["web-1".to_owned()], vec!["web-2".to_owned()]));
    assert_eq!((second.status()[0].lost, second.status()[0].refused), (0, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_death_that_a_server_finds_fires_an_alert() {
    let Some(alerts) = Alerts::start() else { return };
    let deliver = DeliverSection { alertmanager: Some(alerts.section()), ..DeliverSection::default() };
    let server = Whole::start(|config| config.deliver = deliver).await;
    let mut node = Node::new("n1");
    limit_kill(&mut node, 100, 100 * SECOND);
    ship(&server, &node, 0).await;
    let firing = tokio::task::block_in_place(|| until("it fires", || alerts.firing().pop()));
    assert_eq!(firing["labels"]["alertname"], "TapioMemoryLimitKill", "{firing:#}");
    assert_eq!(firing["labels"]["workload"], "Deployment/web");
    assert!(firing["annotations"]["verdict"].as_str().is_some_and(|verdict| verdict.contains("limit")), "{firing:#}");
    server.pipeline.shutdown().await.expect("a good end");
}
