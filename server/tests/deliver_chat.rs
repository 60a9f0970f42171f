//! Findings as messages of a chat, and signed webhooks, at a receiver that reads what was sent.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use prometheus::Registry;
use ring::hmac;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use serde_json::Value;
use tapio_server::cluster::Leadership;
use tapio_server::deliver::{
    Chat, ChatKind, ChatSection, DeliverMetrics, DeliverSection, Deliverer, MarksAt, OnlySection, Sink, Source,
    Webhook, WebhookSection,
};
use tapio_server::findings::{FindingStore, Severity};
use tapio_server::silences::Silences;
use tapio_wire::program::clock::now_ns;
use tapio_wire::program::tls::ClientFiles;
use tapio_wire::service::{EntityRef, Finding};

use crate::cluster_support::until;
use crate::cluster_whole::{limit_kill, ship};
use crate::correlate_node::{Node, SECOND};
use crate::whole_server::Whole;

/// One request.
#[derive(Clone, Debug)]
struct Request {
    line: String,
    headers: BTreeMap<String, String>,
    body: String,
}

impl Request {
    fn read(stream: impl Read) -> std::io::Result<Self> {
        let mut reader = BufReader::new(stream);
        let mut lines = Vec::new();
        loop {
            let mut line = String::new();
            reader.read_line(&mut line)?;
            match line.trim_end() {
                "" => break,
                line => lines.push(line.to_owned()),
            }
        }
        let mut lines = lines.into_iter();
        let line = lines.next().unwrap_or_default();
        let pair =
            |line: String| line.split_once(": ").map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()));
        let headers: BTreeMap<String, String> = lines.filter_map(pair).collect();
        let length = headers.get("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
        let mut body = vec![0; length];
        reader.read_exact(&mut body)?;
        Ok(Self { line, headers, body: String::from_utf8(body).expect("text") })
    }

    fn json(&self) -> Value {
        serde_json::from_str(&self.body).expect("JSON")
    }
}

/// What a chat's address leads to: answers with these codes, and then with 200.
struct Channel {
    address: SocketAddr,
    requests: Arc<Mutex<Vec<Request>>>,
}

impl Channel {
    fn start(codes: &[u16], tls: Option<Arc<ServerConfig>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("it is bound");
        let requests: Arc<Mutex<Vec<Request>>> = Arc::default();
        let (seen, mut codes) = (Arc::clone(&requests), codes.to_vec());
        std::thread::spawn(move || {
            for mut stream in listener.incoming().map_while(Result::ok) {
                let code = if codes.is_empty() { 200 } else { codes.remove(0) };
                // Who does not trust the certificate says nothing.
                let _ = match &tls {
                    None => answer(&mut stream, code, &seen),
                    Some(config) => {
                        let connection = ServerConnection::new(Arc::clone(config)).expect("a good configuration");
                        answer(&mut StreamOwned::new(connection, stream), code, &seen)
                    }
                };
            }
        });
        Self { address, requests }
    }

    fn requests(&self) -> Vec<Request> {
        self.requests.lock().expect("no panic").clone()
    }

    /// The headings of a Slack channel's messages.
    fn headings(&self) -> Vec<String> {
        let heading = |request: Request| request.json()["text"].as_str().expect("a text").to_owned();
        self.requests().into_iter().map(heading).collect()
    }
}

fn answer(stream: &mut (impl Read + Write), code: u16, seen: &Mutex<Vec<Request>>) -> std::io::Result<()> {
    let request = Request::read(&mut *stream)?;
    if code == 200 {
        seen.lock().expect("no panic").push(request);
    }
    write!(stream, "HTTP/1.1 {code} X\r\ncontent-length: 0\r\n\r\n")?;
    stream.flush()
}

/// A store whose findings one sink gets.
pub struct Delivering {
    pub store: Arc<FindingStore>,
    pub deliverer: Deliverer,
    /// Held as long as it is delivered from.
    folder: Option<tempfile::TempDir>,
}

impl Delivering {
    pub fn to(sink: impl FnOnce(&Path) -> Box<dyn Sink>) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let sink = sink(folder.path());
        let started = Self::with(Arc::new(FindingStore::new(100)), folder.path(), sink);
        Self { folder: Some(folder), ..started }
    }

    fn with(store: Arc<FindingStore>, folder: &Path, sink: Box<dyn Sink>) -> Self {
        let (leadership, silences) = (Arc::new(Leadership::sole("a")), Arc::new(Silences::in_memory()));
        let source = Source { store: Arc::clone(&store), leadership, link: None, silences };
        let metrics = DeliverMetrics::register(&Registry::new()).expect("fresh names");
        let at = MarksAt::Folder(folder.to_owned());
        let deliverer = Deliverer::start(&source, vec![sink], &at, &metrics).expect("it starts");
        Self { store, deliverer, folder: None }
    }

    fn folder(&self) -> &Path {
        self.folder.as_ref().expect("it has one").path()
    }

    pub fn publish(&self, finding: Finding) {
        self.store.publish(finding).expect("it says something new");
    }

    /// Waits until all is delivered that there is.
    pub fn until_quiet(&self, delivered: u64) {
        until("all is delivered", || {
            let status = self.deliverer.status().remove(0);
            (status.delivered == delivered && status.waiting == 0).then_some(())
        });
    }
}

fn url_file(folder: &Path, url: &str) -> ChatSection {
    let path = folder.join("url");
    std::fs::write(&path, format!("{url}\n")).expect("written");
    ChatSection { url_file: path, per_minute: 600, timeout: Duration::from_secs(20), ..ChatSection::default() }
}

pub fn finding(id: &str, severity: &str) -> Finding {
    let now_ns = now_ns();
    let entity = EntityRef { namespace: "shop".into(), pod: "web-0".into(), ..EntityRef::default() };
    Finding {
        id: id.into(),
        pattern: "disk-nearly-full".into(),
        severity: severity.into(),
        title: format!("disk of {id} <!channel>"),
        entity: Some(entity),
        started_ns: now_ns,
        ended_ns: now_ns,
        ongoing: true,
        ..Finding::default()
    }
}

#[test]
fn a_channel_hears_what_is_news_and_nothing_twice() {
    let channel = Channel::start(&[], None);
    let only = OnlySection { severity: Some(Severity::High), ..OnlySection::default() };
    let url = format!("http://{}/services/T0/B0/secret", channel.address);
    let delivering = Delivering::to(|folder| {
        Box::new(
            Chat::new("oncall", &ChatSection { only: only.clone(), ..url_file(folder, &url) }).expect("a good section"),
        )
    });
    delivering.publish(finding("a1", "high"));
    delivering.publish(finding("b2", "medium"));
    delivering.until_quiet(1);
    // More evidence of the same is no news; a higher severity is, and so is its end.
    delivering.publish(Finding { summary: "more of it".into(), revision: 2, ..finding("a1", "high") });
    delivering.until_quiet(2);
    delivering.publish(Finding { revision: 3, ..finding("a1", "critical") });
    delivering.until_quiet(3);
    // What the channel has heard of it hears the end of, also below its severity.
    delivering.publish(Finding { revision: 4, resolved_ns: now_ns(), ongoing: false, ..finding("a1", "medium") });
    delivering.until_quiet(4);
    delivering.publish(finding("c3", "high"));
    delivering.until_quiet(5);
    delivering.store.withdraw("c3", None).expect("it was there");
    delivering.until_quiet(6);
    let disk = |what: &str, id: &str| format!("{what}: disk of {id} &lt;!channel&gt;");
    let wanted = [
        disk("High", "a1"),
        disk("Changed, critical", "a1"),
        disk("Over", "a1"),
        disk("High", "c3"),
        disk("Withdrawn", "c3"),
    ];
    assert_eq!(channel.headings(), wanted);
    // Nor does the next leader, or the same server after a restart.
    delivering.publish(finding("d4", "high"));
    delivering.until_quiet(7);
    let (store, folder) = (Arc::clone(&delivering.store), delivering.folder().to_owned());
    delivering.deliverer.stop();
    let chat = Chat::new("oncall", &ChatSection { only, ..url_file(&folder, &url) }).expect("a good section");
    let next = Delivering::with(store, &folder, Box::new(chat));
    next.publish(Finding { summary: "more of it".into(), revision: 2, ..finding("d4", "high") });
    until("it is delivered", || (next.deliverer.status().remove(0).delivered >= 1).then_some(()));
    next.publish(finding("e5", "high"));
    until("another one is said", || (channel.headings().len() > wanted.len() + 1).then_some(()));
    assert_eq!(channel.headings()[wanted.len()..], [disk("High", "d4"), disk("High", "e5")]);
    assert!(channel.requests().iter().all(|request| request.line == "POST /services/T0/B0/secret HTTP/1.1"));
}

#[test]
fn an_address_is_read_anew_and_is_in_no_message() {
    let channel = Channel::start(&[429, 500], None);
    let delivering = Delivering::to(|folder| Box::new(Chat::new("oncall", &url_file(folder, "s3cret")).expect("good")));
    delivering.publish(finding("a1", "high"));
    let trouble = |wanted: &str| {
        until(wanted, || {
            let trouble = delivering.deliverer.status().remove(0).trouble;
            trouble.contains(wanted).then_some(trouble)
        })
    };
    assert!(!trouble("it holds no address").contains("s3cret"));
    let path = delivering.folder().join("url");
    std::fs::write(&path, "http://chat.example.com/s3cret").expect("written");
    assert!(!trouble("use https://").contains("s3cret"));
    std::fs::write(&path, format!("http://{}/s3cret", channel.address)).expect("written");
    delivering.until_quiet(1);
    assert_eq!(channel.headings().len(), 1);
}

#[test]
fn more_findings_than_a_channel_takes_wait_for_their_turn() {
    let channel = Channel::start(&[], None);
    let url = format!("http://{}/x", channel.address);
    let delivering = Delivering::to(|folder| {
        // A message each 100 ms, after the first five.
        Box::new(Chat::new("oncall", &url_file(folder, &url)).expect("a good section"))
    });
    let began = std::time::Instant::now();
    for number in 0..15 {
        delivering.publish(finding(&format!("f{number}"), "high"));
    }
    delivering.until_quiet(15);
    assert!(began.elapsed() >= Duration::from_millis(900), "{:?}", began.elapsed());
    assert_eq!(channel.headings().len(), 15);
}

/// Writes a CA that nobody knows to `ca.pem`, and returns a server's certificate of it and the key (PEM).
pub(crate) fn certificate_of_unknown(folder: &Path) -> (String, String) {
    let mut params = rcgen::CertificateParams::default();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let key = rcgen::KeyPair::generate().expect("a key");
    std::fs::write(folder.join("ca.pem"), params.self_signed(&key).expect("signed").pem()).expect("written");
    let issuer = rcgen::Issuer::new(params, key);
    let own = rcgen::KeyPair::generate().expect("a key");
    let params = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()]).expect("a name");
    (params.signed_by(&own, &issuer).expect("signed").pem(), own.serialize_pem())
}

/// A server's TLS with such a certificate.
fn authority(folder: &Path) -> Arc<ServerConfig> {
    let (certificate, key) = certificate_of_unknown(folder);
    let chain = vec![CertificateDer::from_pem_slice(certificate.as_bytes()).expect("PEM")];
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).expect("PEM");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let config = builder.expect("versions").with_no_client_auth().with_single_cert(chain, key);
    Arc::new(config.expect("they belong together"))
}

#[test]
fn a_teams_card_goes_to_a_certificate_that_is_trusted() {
    let keys = tempfile::tempdir().expect("a folder");
    let channel = Channel::start(&[], Some(authority(keys.path())));
    let url = format!("https://{}/workflows/1", channel.address);
    let teams = |folder: &Path| ChatSection { kind: ChatKind::Teams, ..url_file(folder, &url) };
    // This machine does not know the CA.
    let distrusting = Delivering::to(|folder| Box::new(Chat::new("oncall", &teams(folder)).expect("good")));
    distrusting.publish(finding("a1", "high"));
    until("it is not trusted", || {
        let trouble = distrusting.deliverer.status().remove(0).trouble;
        (trouble.contains("TLS") && trouble.contains("deliver.chats.*.tls")).then_some(())
    });
    assert!(channel.requests().is_empty());
    let tls = Some(ClientFiles { ca: keys.path().join("ca.pem"), ..ClientFiles::default() });
    let trusting = Delivering::to(|folder| {
        Box::new(Chat::new("oncall", &ChatSection { tls, ..teams(folder) }).expect("a good section"))
    });
    trusting.publish(finding("a1", "high"));
    trusting.until_quiet(1);
    let card = channel.requests()[0].json()["attachments"][0]["content"].clone();
    assert_eq!(card["body"][0]["inlines"][0]["text"], "High: disk of a1 <!channel>", "{card:#}");
}

#[test]
fn a_webhook_is_signed_so_that_its_receiver_can_tell() {
    let channel = Channel::start(&[], None);
    let delivering = Delivering::to(|folder| {
        let key = folder.join("key");
        std::fs::write(&key, "k3y\n").expect("written");
        let section = WebhookSection {
            url: format!("http://{}/tapio", channel.address),
            signing_key_file: Some(key),
            ..WebhookSection::default()
        };
        Box::new(Webhook::new(&section, "prod", "a").expect("a good section"))
    });
    delivering.publish(finding("a1", "high"));
    delivering.until_quiet(1);
    let request = channel.requests().remove(0);
    let signature = &request.headers["tapio-signature"];
    let (seconds, hex) = signature.strip_prefix("t=").and_then(|rest| rest.split_once(",v1=")).expect("its form");
    let seconds_ago = (now_ns() / 1_000_000_000).abs_diff(seconds.parse().expect("a number"));
    assert!(seconds_ago <= 60, "{signature}");
    let tag: Vec<u8> =
        (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).expect("hex")).collect();
    let key = hmac::Key::new(hmac::HMAC_SHA256, b"k3y");
    hmac::verify(&key, format!("{seconds}.{}", request.body).as_bytes(), &tag).expect("signed by the key");
    let other = format!("{seconds}.{}x", request.body);
    hmac::verify(&key, other.as_bytes(), &tag).expect_err("another body");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_death_that_a_server_finds_is_a_message() {
    let channel = Channel::start(&[], None);
    let folder = tempfile::tempdir().expect("a folder");
    let page_url = Some("https://tapio.example.com".to_owned());
    let section =
        ChatSection { page_url, ..url_file(folder.path(), &format!("http://{}/services/x", channel.address)) };
    let deliver = DeliverSection { chats: [("oncall".to_owned(), section)].into(), ..DeliverSection::default() };
    let server = Whole::start(|config| config.deliver = deliver).await;
    let mut node = Node::new("n1");
    limit_kill(&mut node, 100, 100 * SECOND);
    ship(&server, &node, 0).await;
    let message = tokio::task::block_in_place(|| until("it is there", || channel.requests().pop())).json();
    assert!(message["text"].as_str().is_some_and(|text| text.contains("exceeded its memory limit")), "{message:#}");
    let link = message["blocks"][3]["text"]["text"].as_str().expect("a link");
    assert!(link.starts_with("<https://tapio.example.com/f/"), "{message:#}");
    server.pipeline.shutdown().await.expect("a good end");
}
