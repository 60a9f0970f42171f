//! Findings are delivered outwards by the leader: at least once, repeats by the same id, nothing skipped.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use crate::cluster_support::*;
use crate::cluster_whole::{findings_when, limit_kill, ship, status};
use crate::correlate_node::{Node, SECOND};
use crate::whole_server::Whole;
use prometheus::Registry;
use serde_json::Value;
use tapio_server::cluster::ClusterSection;
use tapio_server::deliver::{
    DeliverMetrics, DeliverSection, Deliverer, Delivering, Delivery, MarksAt, Sink, Source, Webhook, WebhookSection,
};
use tapio_server::findings::FindingStore;
use tapio_server::silences::Silences;
use tapio_wire::service::{DeliveryStatus, Finding};

const PATIENCE: Duration = Duration::from_secs(30);

/// One request to a receiver.
#[derive(Clone, Debug)]
struct Posted {
    id: String,
    finding: String,
    revision: u64,
    server: String,
    content: Value,
}

#[derive(Default)]
struct Answers {
    /// What is answered; 200 after them.
    next: Vec<u16>,
    /// The finding that is answered with 500, always: the first that comes.
    stumbling_block: Option<String>,
    stumbles: bool,
    /// The request of this number, and all after it of the same server, get no answer.
    silent_from: Option<usize>,
    /// The server that gets none.
    silenced: Option<String>,
    posted: Vec<Posted>,
    confirmed: Vec<Posted>,
}

/// Receives what a webhook posts, as a program of an operator would.
struct Receiving {
    address: SocketAddr,
    answers: Arc<(Mutex<Answers>, Condvar)>,
}

impl Receiving {
    fn start(next: &[u16]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("it is bound");
        let answers = Arc::new((Mutex::new(Answers { next: next.to_vec(), ..Answers::default() }), Condvar::new()));
        let of_thread = Arc::clone(&answers);
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let answers = Arc::clone(&of_thread);
                std::thread::spawn(move || {
                    // Whoever was killed in the middle has said nothing.
                    let _ = receive(stream, &answers);
                });
            }
        });
        Self { address, answers }
    }

    fn section(&self) -> WebhookSection {
        let url = format!("http://{}/findings?of=test", self.address);
        WebhookSection { url, timeout: PATIENCE, ..WebhookSection::default() }
    }

    fn change(&self, change: impl FnOnce(&mut Answers)) {
        change(&mut self.answers.0.lock().expect("no panic"));
        self.answers.1.notify_all();
    }

    fn posted(&self) -> Vec<Posted> {
        self.answers.0.lock().expect("no panic").posted.clone()
    }

    fn confirmed(&self) -> Vec<Posted> {
        self.answers.0.lock().expect("no panic").confirmed.clone()
    }
}

fn receive(stream: TcpStream, answers: &(Mutex<Answers>, Condvar)) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    assert_eq!(line, "POST /findings?of=test HTTP/1.1\r\n");
    let mut headers = BTreeMap::new();
    loop {
        line.clear();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.split_once(": ") else { break };
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    let mut body = vec![0; headers["content-length"].parse().expect("a length")];
    reader.read_exact(&mut body)?;
    let body: Value = serde_json::from_slice(&body).expect("JSON");
    assert_eq!(headers["idempotency-key"], body["id"]);
    let text = |value: &Value| value.as_str().expect("a text").to_owned();
    let mut content = body["finding"].clone();
    // Each server's own.
    for key in ["revision", "published_at"] {
        content.as_object_mut().expect("an object").remove(key);
    }
    let posted = Posted {
        id: text(&body["id"]),
        finding: text(&body["finding"]["id"]),
        revision: body["revision"].as_u64().expect("a number"),
        server: text(&body["server"]),
        content,
    };
    let mut known = answers.0.lock().expect("no panic");
    known.posted.push(posted.clone());
    if known.silent_from.is_some_and(|from| known.posted.len() > from) && known.silenced.is_none() {
        known.silenced = Some(posted.server.clone());
    }
    if known.stumbles && known.stumbling_block.is_none() {
        known.stumbling_block = Some(posted.finding.clone());
    }
    let code = match &known.stumbling_block {
        Some(block) if *block == posted.finding => 500,
        _ if known.next.is_empty() => 200,
        _ => known.next.remove(0),
    };
    answers.1.notify_all();
    let mut known =
        answers.1.wait_while(known, |known| known.silenced.as_ref() == Some(&posted.server)).expect("no panic");
    let mut stream = stream;
    write!(stream, "HTTP/1.1 {code} X\r\ncontent-length: 0\r\n\r\n")?;
    if code == 200 {
        known.confirmed.push(posted);
    }
    Ok(())
}

/// Waits until the latest version of each of these was confirmed.
fn until_delivered(receiving: &Receiving, findings: impl Fn() -> Vec<Finding>) {
    until("every finding at its receiver", || {
        let findings = findings();
        let mut last: BTreeMap<String, Posted> = BTreeMap::new();
        for posted in receiving.confirmed() {
            match last.get(&posted.finding) {
                Some(known) if known.revision > posted.revision => {}
                _ => drop(last.insert(posted.finding.clone(), posted)),
            }
        }
        let is_last = |finding: &Finding| {
            let mut wanted = tapio_server::render::finding_value(finding);
            for key in ["revision", "published_at"] {
                wanted.as_object_mut().expect("an object").remove(key);
            }
            last.get(&finding.id).is_some_and(|posted| posted.content == wanted)
        };
        (!findings.is_empty() && findings.iter().all(is_last)).then_some(())
    });
}

/// Deliveries that came more than once.
fn repeated(posted: &[Posted]) -> BTreeSet<String> {
    let mut seen = BTreeSet::new();
    posted.iter().filter(|one| !seen.insert(one.id.clone())).map(|one| one.id.clone()).collect()
}

fn deliverer(member: &Member, section: &ClusterSection, webhook: &WebhookSection) -> Deliverer {
    let source = Source {
        store: Arc::clone(&member.store),
        leadership: Arc::clone(member.cluster.leadership()),
        link: Some(Arc::clone(member.cluster.link())),
        silences: Arc::new(Silences::in_memory()),
    };
    let sink = Webhook::new(webhook, &section.name, member.cluster.server()).expect("a good address");
    let metrics = DeliverMetrics::register(&Registry::new()).expect("fresh names");
    let at = MarksAt::Log(Box::new(section.clone()));
    Deliverer::start(&source, vec![Box::new(sink)], &at, &metrics).expect("it starts")
}

/// Makes deaths of this many workloads.
fn deaths(workloads: u32) -> Node {
    let mut node = Node::new("n1");
    for number in 0..workloads {
        let pod = format!("shop/web{number}-0");
        let entity = node.kube_container(&format!("Deployment/web{number}"), &pod, &pod);
        node.limit_kill(entity, 100 + number, (100 + 30 * u64::from(number)) * SECOND);
    }
    node
}

const NATS_VARIABLE: &str = "TAPIO_TEST_DELIVER_NATS";
const URL_VARIABLE: &str = "TAPIO_TEST_DELIVER_URL";

/// A server that delivers, in a process of its own, until it is killed.
#[test]
#[ignore = "the next tests run it"]
fn a_deliverer_in_a_process_of_its_own() {
    let variable = |name: &str| std::env::var(name).expect("run by the next tests");
    let section =
        ClusterSection { url: variable(NATS_VARIABLE), server: Some("child".into()), ..ClusterSection::default() };
    let webhook = WebhookSection { url: variable(URL_VARIABLE), timeout: PATIENCE, ..WebhookSection::default() };
    let member = Member::begin_with(section.clone(), timing());
    let _deliverer = deliverer(&member, &section, &webhook);
    until("the feeder leads", || (member.cluster.leadership().leader().as_deref() == Some("feeder")).then_some(()));
    println!("it knows who leads");
    // Its standard input ends with the test that started it.
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
}

/// A server of its own that leads and delivers.
fn deliverer_process(nats: &Nats, receiving: &Receiving) -> Process {
    let child = Command::new(std::env::current_exe().expect("this program"))
        .args(["--ignored", "--exact", "--nocapture", "cluster_deliver::a_deliverer_in_a_process_of_its_own"])
        .env(NATS_VARIABLE, nats.url())
        .env(URL_VARIABLE, receiving.section().url)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn();
    let mut child = child.expect("this program starts");
    let lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();
    let knows = |line: &String| line.ends_with("it knows who leads");
    assert!(lines.map_while(Result::ok).any(|line| knows(&line)), "it ended");
    Process(child)
}

/// A leader gets this signal after its receiver has got a delivery and before it has confirmed it; another takes over.
fn a_leader_is_lost_between_intent_and_confirmation(signal: i32) {
    let Some(nats) = Nats::start() else { return };
    let receiving = Receiving::start(&[]);
    receiving.change(|answers| answers.silent_from = Some(2));
    // Who has nothing to deliver to finds all of it, and lets the child lead.
    let feeder = Member::begin_with(section(&nats, "feeder"), timing());
    feeder.deliver(&deaths(6));
    settle(&[&feeder]);
    until("the feeder leads", || feeder.cluster.leadership().term());
    let child = deliverer_process(&nats, &receiving);
    feeder.cluster.stop();
    let held = until("the third delivery of the child", || receiving.posted().get(2).cloned());
    let of_b = section(&nats, "b");
    let b = Member::begin_with(of_b.clone(), timing());
    until("the child leads", || (b.cluster.leadership().leader().as_deref() == Some("child")).then_some(()));
    let by_b = deliverer(&b, &of_b, &receiving.section());
    child.signal(signal);

    until_delivered(&receiving, || b.findings());
    assert_eq!(b.findings().len(), 6);
    let posted = receiving.posted();
    let of_child: BTreeSet<_> = posted.iter().take(2).map(|one| one.id.clone()).collect();
    assert!(posted[..3].iter().all(|one| one.server == "child") && of_child.len() == 2, "{posted:#?}");
    assert!(posted[3..].iter().all(|one| one.server == "b"), "{posted:#?}");
    // What was not confirmed, by its id, and nothing else.
    assert_eq!(repeated(&posted), BTreeSet::from([held.id.clone()]));
    until("nothing that waits", || (by_b.status()[0].waiting == 0).then_some(()));
    assert_eq!((by_b.status()[0].repeated, by_b.status()[0].lost), (1, 0));

    if signal == libc::SIGSTOP {
        // It goes on and hears that its receiver had it. It neither delivers nor changes what the other leader wrote.
        receiving.change(|answers| (answers.silent_from, answers.silenced) = (None, None));
        // Once it goes on, its patience may be over before it reads the answer, and it closes the connection.
        until("the answer that came late", || {
            receiving.confirmed().iter().any(|one| one.server == "child" && one.id == held.id).then_some(())
        });
        child.signal(libc::SIGCONT);
        drop(by_b);
        b.cluster.stop();
        // The child leads again, and finds nothing left to do but what is new.
        let of_c = section(&nats, "c");
        let c = Member::begin_with(of_c, timing());
        until("the child leads", || (c.cluster.leadership().leader().as_deref() == Some("child")).then_some(()));
        let before = receiving.posted().len();
        let mut more = Node::new("n2");
        limit_kill(&mut more, 100, 9_000 * SECOND);
        c.deliver(&more);
        until_delivered(&receiving, || c.findings());
        let posted = receiving.posted();
        let known: BTreeSet<_> = posted[..before].iter().map(|one| one.finding.clone()).collect();
        assert!(posted[before..].iter().all(|one| !known.contains(&one.finding)), "{:#?}", &posted[before..]);
    }
}

#[test]
fn what_a_killed_leader_left_unconfirmed_is_delivered_again() {
    a_leader_is_lost_between_intent_and_confirmation(libc::SIGKILL);
}

#[test]
fn a_leader_stopped_before_confirmation_changes_nothing_later() {
    a_leader_is_lost_between_intent_and_confirmation(libc::SIGSTOP);
}

#[test]
fn marks_that_nats_has_lost_cost_repeats_and_no_finding() {
    let Some(mut nats) = Nats::start() else { return };
    let receiving = Receiving::start(&[]);
    let of_a = section(&nats, "a");
    let a = Member::begin_with(of_a.clone(), timing());
    let _deliverer = deliverer(&a, &of_a, &receiving.section());
    a.deliver(&deaths(2));
    until_delivered(&receiving, || a.findings());
    let before = receiving.posted().len();
    nats.kill();
    until("nobody leads", || a.cluster.leadership().term().is_none().then_some(()));
    nats.restart_empty();
    let mut more = Node::new("n2");
    limit_kill(&mut more, 100, 9_000 * SECOND);
    a.deliver(&more);
    until("all of them again", || (receiving.posted().len() >= before + 3).then_some(()));
    until_delivered(&receiving, || a.findings());
}

#[test]
fn what_is_withdrawn_is_told_though_marks_are_lost() {
    let Some(mut nats) = Nats::start() else { return };
    let (receiving, of_a) = (Receiving::start(&[]), section(&nats, "a"));
    let a = Member::begin_with(of_a.clone(), timing());
    let _deliverer = deliverer(&a, &of_a, &receiving.section());
    let mut node = Node::new("n1");
    limit_kill(&mut node, 100, 100 * SECOND);
    a.deliver(&node);
    until_delivered(&receiving, || a.findings());
    let first = a.findings().remove(0).id;
    nats.kill();
    // A second death: both are one finding from now on.
    limit_kill(&mut node, 101, 160 * SECOND);
    a.deliver_part(&node, node.frames.len() - 1..node.frames.len());
    a.findings_when(|found| found[0].count == 2);
    nats.restart_empty();
    let is_told = |of: &Posted| of.finding == first && of.content["withdrawn"] == true;
    until("the withdrawal", || receiving.confirmed().iter().any(is_told).then_some(()));
}

fn webhook(receiving: &Receiving) -> DeliverSection {
    DeliverSection { webhook: Some(receiving.section()), ..DeliverSection::default() }
}

async fn delivery_when(server: &Whole, so: impl Fn(&DeliveryStatus) -> bool) -> DeliveryStatus {
    let deadline = std::time::Instant::now() + LIMIT;
    loop {
        let delivery = status(server).await.deliveries.remove(0);
        if so(&delivery) {
            return delivery;
        }
        assert!(std::time::Instant::now() < deadline, "it did not come about: {delivery:#?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn at(dir: &Path, receiving: &Receiving) -> impl FnOnce(&mut tapio_server::config::Config) {
    let (dir, deliver) = (dir.to_owned(), webhook(receiving));
    move |config| {
        config.archive.dir = dir;
        config.deliver = deliver;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restarted_single_server_repeats_only_unconfirmed_deliveries() {
    let receiving = Receiving::start(&[]);
    receiving.change(|answers| answers.silent_from = Some(2));
    let dir = tempfile::tempdir().expect("a directory");
    // All of it is found before anything is delivered.
    let first = Whole::start(|config| config.archive.dir = dir.path().to_owned()).await;
    ship(&first, &deaths(5), 0).await;
    findings_when(&first, |found| found.len() == 5).await;
    assert!(status(&first).await.deliveries.is_empty());
    first.pipeline.shutdown().await.expect("a good end");
    let server = Whole::start(at(dir.path(), &receiving)).await;
    let held = tokio::task::block_in_place(|| until("the third", || receiving.posted().get(2).cloned()));
    server.pipeline.shutdown().await.expect("a good end");
    let confirmed: BTreeSet<_> = receiving.confirmed().into_iter().map(|one| one.id).collect();
    assert_eq!(confirmed.len(), 2);

    receiving.change(|answers| (answers.silent_from, answers.silenced) = (None, None));
    let again = Whole::start(at(dir.path(), &receiving)).await;
    let status = delivery_when(&again, |status| status.delivered == 3 && status.waiting == 0).await;
    assert_eq!((status.repeated, status.failed, status.trouble.as_str()), (1, 0, ""));
    let posted = receiving.posted();
    assert_eq!(posted.len(), 6, "{posted:#?}");
    assert_eq!(repeated(&posted), BTreeSet::from([held.id]));
    assert_eq!(again.metric("tapio_server_deliveries_repeated_total", &["sink=\"webhook\""]), 1.0);
    again.pipeline.shutdown().await.expect("a good end");

    // All is confirmed: nothing is sent.
    let last = Whole::start(at(dir.path(), &receiving)).await;
    findings_when(&last, |found| found.len() == 5).await;
    ship_more(&last).await;
    delivery_when(&last, |status| status.delivered >= 1).await;
    let known: BTreeSet<_> = posted.iter().map(|one| one.finding.clone()).collect();
    let later = receiving.posted().split_off(posted.len());
    assert!(later.iter().all(|one| !known.contains(&one.finding)), "{later:#?}");
    last.pipeline.shutdown().await.expect("a good end");
}

/// One more death, of another node.
async fn ship_more(server: &Whole) {
    let mut more = Node::new("n2");
    limit_kill(&mut more, 100, 9_000 * SECOND);
    ship(server, &more, 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failing_sink_shows_in_status_and_gets_everything_afterwards() {
    let receiving = Receiving::start(&[503, 500, 429]);
    let server = Whole::start(|config| config.deliver = webhook(&receiving)).await;
    ship(&server, &deaths(5), 0).await;
    let failing = delivery_when(&server, |status| status.failed > 0 && status.delivered == 0).await;
    assert!(failing.trouble.contains("HTTP") && failing.waiting > 0, "{failing:#?}");
    let status = delivery_when(&server, |status| status.delivered >= 5 && status.waiting == 0).await;
    assert_eq!((status.failed, status.refused, status.lost, status.trouble.as_str()), (3, 0, 0, ""));
    let found = findings_when(&server, |found| found.len() == 5).await;
    tokio::task::block_in_place(|| until_delivered(&receiving, || found.clone()));
    assert_eq!(server.metric("tapio_server_delivery_failures_total", &["sink=\"webhook\""]), 3.0);
    server.pipeline.shutdown().await.expect("a good end");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_finding_that_is_refused_does_not_delay_others() {
    let receiving = Receiving::start(&[]);
    receiving.change(|answers| answers.stumbles = true);
    let server = Whole::start(|config| config.deliver = webhook(&receiving)).await;
    ship(&server, &deaths(5), 0).await;
    let others = delivery_when(&server, |deliveries| deliveries.delivered >= 4 && deliveries.waiting == 1).await;
    assert_eq!((others.refused, others.lost), (0, 0), "{others:#?}");
    server.pipeline.shutdown().await.expect("a good end");
}

/// Takes what it is given when the test lets it.
struct Held {
    name: &'static str,
    started: Mutex<Sender<String>>,
    is_free: tokio::sync::watch::Receiver<bool>,
}

impl Sink for Held {
    fn name(&self) -> &str {
        self.name
    }

    fn timeout(&self) -> Duration {
        LIMIT
    }

    fn deliver<'a>(&'a self, delivery: &'a Delivery) -> Delivering<'a> {
        Box::pin(async move {
            let mut is_free = self.is_free.clone();
            is_free.wait_for(|is| *is).await.expect("the test goes on");
            self.started.lock().expect("no panic").send(delivery.id.clone()).expect("the test goes on");
            Ok(())
        })
    }
}

#[test]
fn a_stuck_sink_delays_nobody_and_its_queue_is_bounded() {
    let store = Arc::new(FindingStore::new(50));
    let (free, is_free) = tokio::sync::watch::channel(false);
    let (_always, always) = tokio::sync::watch::channel(true);
    let (slow, of_slow) = channel();
    let (fast, of_fast) = channel();
    let held = |name, started, is_free| Box::new(Held { name, started: Mutex::new(started), is_free }) as Box<dyn Sink>;
    let sinks = vec![held("slow", slow, is_free), held("fast", fast, always)];
    let leadership = Arc::new(tapio_server::cluster::Leadership::sole("a"));
    let silences = Arc::new(Silences::in_memory());
    let source = Source { store: Arc::clone(&store), leadership, link: None, silences };
    let folder = tempfile::tempdir().expect("a folder");
    let metrics = DeliverMetrics::register(&Registry::new()).expect("fresh names");
    let at = MarksAt::Folder(folder.path().to_owned());
    let deliverer = Deliverer::start(&source, sinks, &at, &metrics).expect("it starts");
    let next = |of: &Receiver<String>| of.recv_timeout(LIMIT).expect("a delivery");
    for number in 0..200 {
        let finding = Finding { id: format!("f{number}"), ended_ns: number, ..Finding::default() };
        store.publish(finding).expect("it is new");
        // The slow one has the first since then.
        assert!(next(&of_fast).starts_with(&format!("f{number}.1.")));
    }
    assert!(of_slow.try_recv().is_err());
    // One is on its way and fifty more wait; the others are counted as without room.
    until("the bound", || {
        let slow = deliverer.status().remove(0);
        (slow.lost == 149 && slow.waiting == 51).then_some(())
    });
    free.send_replace(true);
    let first = next(&of_slow);
    assert!(first.starts_with("f0.1."), "{first}");
    let rest: Vec<String> = (150..200).map(|_| next(&of_slow)).collect();
    assert!(rest.iter().zip(150..200).all(|(id, number)| id.starts_with(&format!("f{number}.1."))), "{rest:?}");
    // A withdrawal is delivered to whoever got the finding.
    store.withdraw("f199", None).expect("it is there");
    assert!(next(&of_slow).starts_with("f199.2.") && next(&of_fast).starts_with("f199.2."));
}
