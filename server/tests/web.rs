//! The web page, against real servers: findings are caused by frames, and every page is fetched as a browser would.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::correlate_node::{MIB, MS, Node, Process, SECOND, SIGKILL};
use crate::whole_server::{LIMIT, Stream, Whole, hello};
use tapio_server::auth::{Auth, AuthSection};
use tapio_server::findings::{FindingStore, PatternSet};
use tapio_server::query::EventSource;
use tapio_server::silences::Silences;
use tapio_server::web::{self, LateStatus, Pages};
use tapio_wire::program::clock::now_ns;
use tapio_wire::service::{Death, EntityRef, Finding};

/// Bytes of a page at the most.
const WEIGHT_MAX: usize = 150_000;
/// What a hostile pod may be called: markup, what ends attributes and elements, an escape of a terminal, a turn of direction.
const HOSTILE: &str = "<script>alert(1)</script>\"'><img src=x onerror=y>\x1b[2J\u{202e}&amp;";

struct Answer {
    code: u16,
    head: String,
    body: String,
}

impl Answer {
    fn header(&self, name: &str) -> &str {
        let lines = self.head.lines().filter_map(|line| line.split_once(": "));
        lines.filter(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value).next().unwrap_or_default()
    }
}

fn ask(address: SocketAddr, request: &str) -> Answer {
    let mut stream = TcpStream::connect(address).expect("it listens");
    stream.set_read_timeout(Some(LIMIT)).expect("set");
    stream.write_all(request.as_bytes()).expect("sent");
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("answered");
    let (head, body) = text.split_once("\r\n\r\n").expect("a head");
    let code = head.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a code");
    Answer { code, head: head.to_owned(), body: body.to_owned() }
}

fn get_with(address: SocketAddr, path: &str, headers: &str) -> Answer {
    ask(address, &format!("GET {path} HTTP/1.0\r\nHost: tapio\r\n{headers}\r\n"))
}

/// A page; what must hold of each is checked here.
fn get(address: SocketAddr, path: &str) -> Answer {
    let answer = get_with(address, path, "");
    let is_clean =
        |c: char| c == '\n' || !c.is_control() && !matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    assert!(answer.body.chars().all(is_clean), "{path} has a control character");
    assert!(answer.body.len() <= WEIGHT_MAX, "{path} has {} bytes", answer.body.len());
    if answer.header("content-type").starts_with("text/html") {
        for part in ["<script>", "<img", "<b>", " style=", " onclick=", "javascript:"] {
            assert!(!answer.body.contains(part), "{path} has {part}: {}", answer.body);
        }
        let policy = answer.header("content-security-policy");
        for part in
            ["default-src 'none'", "script-src 'self'", "style-src 'self'", "frame-ancestors 'none'", "base-uri 'none'"]
        {
            assert!(policy.contains(part), "{path}: {policy}");
        }
        assert!(!policy.contains("unsafe") && !policy.contains("data:"), "{policy}");
        assert_eq!(answer.header("x-content-type-options"), "nosniff");
        assert_eq!(answer.header("cache-control"), "no-store");
    }
    answer
}

/// Where a page's links of a kind lead.
pub fn links(page: &str, start: &str) -> BTreeSet<String> {
    let found = page.split("href=\"").skip(1).filter_map(|rest| rest.split('"').next());
    found.filter(|link| link.starts_with(start)).map(|link| link.replace("&amp;", "&")).collect()
}

/// A node that booted 1000 s ago.
pub fn node(name: &str) -> Node {
    let mut node = Node::new(name);
    node.booted_ns = now_ns() - 1000 * SECOND;
    node
}

/// A workload gets a new image.
pub fn release(node: &mut Node, workload: &str, namespace: &str) {
    node.rollout(600 * SECOND, workload, namespace, Some("shop/web:1"));
    node.lethal(601 * SECOND);
}

/// A container of a pod is killed for its limit, after its memory had grown.
pub fn kill(node: &mut Node, workload: &str, pod: &str, pid: u32, comm: &'static str) {
    let web = node.kube_container(workload, pod, pod);
    let process = Process::init(web, pid, comm);
    node.oom(900 * SECOND, process, 64 * MIB, 64 * MIB);
    node.signal(900 * SECOND, process, SIGKILL, None);
    node.exit(900 * SECOND + MS, process, SIGKILL);
    node.curve(900 * SECOND + 2 * MS, web, 64 * MIB, (0..60).map(|step| step + 4));
    node.container_ended(901 * SECOND, web, "Error", 137);
    node.lethal(902 * SECOND);
}

/// Waits until a page says something.
pub async fn until(address: SocketAddr, path: &str, part: &str) -> String {
    let deadline = Instant::now() + LIMIT;
    loop {
        let page = tokio::task::block_in_place(|| get(address, path)).body;
        if page.contains(part) {
            return page;
        }
        assert!(Instant::now() < deadline, "{path} does not say {part}: {page}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A server that got a node's frames.
async fn served(node: &Node) -> (Whole, Stream) {
    let server = Whole::start(|_| {}).await;
    let hello = hello(&node.node.name, node.epoch);
    let mut stream = Stream::open(server.channel().await, "", hello).await.expect("it is taken");
    stream.welcome().await.expect("welcome");
    for bytes in &node.bytes {
        stream.frame(bytes.clone()).await;
    }
    stream.acknowledged(node.bytes.len() as u64).await;
    (server, stream)
}

/// The path of the finding that a server's list has, as soon as it has it.
async fn found(address: SocketAddr) -> String {
    let page = until(address, "/?view=list", "href=\"/f/").await;
    links(&page, "/f/").into_iter().next().expect("a finding")
}

fn post(address: SocketAddr, path: &str, headers: &str, form: &str) -> Answer {
    let kind = "application/x-www-form-urlencoded";
    let head = format!("Host: tapio\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n{headers}", form.len());
    ask(address, &format!("POST {path} HTTP/1.0\r\n{head}\r\n{form}"))
}

#[test]
fn forms_silence_and_acknowledge_hostile_words_stay_words() {
    let server = small(10, None);
    server.store.publish(finding(7)).expect("it is new");
    let page = get(server.address, "/?view=list").body;
    let path = links(&page, "/f/").into_iter().next().expect("a finding");
    assert!(get(server.address, &path).body.contains("I deal with it"));
    let encoded: String = HOSTILE.bytes().map(|byte| format!("%{byte:02X}")).collect();
    let form = format!("until=1d&reason={encoded}");
    let done = post(server.address, &format!("{path}/acknowledge"), "Origin: http://tapio\r\n", &form);
    assert_eq!((done.code, done.header("location")), (303, path.as_str()));
    let finding = get(server.address, &path).body;
    assert!(finding.contains("Acknowledged until") && !finding.contains("I deal with it"), "{finding}");
    let form = format!("pattern=*&namespace=%3Cb%3E%22'&until=2h&reason={encoded}");
    assert_eq!(post(server.address, "/silences", "", &form).header("location"), "/silences");
    let listed = get(server.address, "/silences").body;
    assert!(listed.contains("&lt;script&gt;") && listed.contains("namespace &lt;b&gt;"), "{listed}");
    for (headers, form, code) in [
        ("Origin: http://evil.example\r\n", "pattern=x&until=2h&reason=x", 403),
        ("Origin: null\r\n", "pattern=x&until=2h&reason=x", 403),
        ("", "pattern=x&until=whenever&reason=x", 400),
        ("", "pattern=x&until=2h", 400),
        ("", "unknown=x", 422),
    ] {
        assert_eq!(post(server.address, "/silences", headers, form).code, code, "{headers}{form}");
    }
    let ends: Vec<&str> = listed.split("action=\"").skip(1).filter_map(|rest| rest.split('"').next()).collect();
    let ends: Vec<&str> = ends.into_iter().filter(|path| path.ends_with("/end")).collect();
    assert_eq!(ends.len(), 2, "{listed}");
    for path in ends {
        assert_eq!(post(server.address, path, "", "").code, 303, "{path}");
    }
    assert!(get(server.address, "/silences").body.contains("Nothing is silenced"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_death_is_explained_from_list_to_raw_records() {
    let mut node = node("n1");
    release(&mut node, "Deployment/web", "shop");
    kill(&mut node, "Deployment/web", "shop/web-0", 100, "nginx");
    let (server, _stream) = served(&node).await;
    let address = server.pipeline.http_address;
    let path = found(address).await;
    until(address, &path, "contradicts what happened").await;
    let get = |path: &str| tokio::task::block_in_place(|| get(address, path));

    let first = get("/");
    for part in [
        "shop › Deployment/web",
        "exceeded its memory limit of 64.0 MiB",
        "in the last 24 hours",
        "/w/shop/Deployment/web",
    ] {
        assert!(first.body.contains(part), "{part}: {}", first.body);
    }
    assert_eq!(links(&first.body, "/f/").into_iter().next().as_deref(), Some(path.as_str()));
    let page = get(&path);
    for part in [
        "Killed by the kernel because its memory limit of 64.0 MiB was reached",
        "sure",
        "Death certificate",
        "Kubernetes says Error (exit code 137): contradicts what happened",
        "64.0 MiB of 64.0 MiB used in limited",
        "<svg",
        "brought about by 1",
        "What changed before",
        "shop/web:1",
        "Memory until then",
        "limit 64.0 MiB",
        "No event was lost",
        "kubectl logs -n shop pod/web-",
        "lane-name",
    ] {
        assert!(page.body.contains(part), "{part}: {}", page.body);
    }
    // Every number of the timeline opens its record.
    let records = links(&page.body, "/e/");
    assert!(records.len() >= 4, "{records:?}");
    for record in &records {
        let raw = get(record);
        let id = record["/e/".len()..].split('?').next().expect("an id");
        assert!(raw.code == 200 && raw.body.contains(id) && raw.body.contains("boottime_ns"), "{record}: {}", raw.body);
    }

    let markdown = get(&format!("{path}.md"));
    assert!(markdown.header("content-type").starts_with("text/markdown"));
    for part in ["# ", "## What happened", "| 1 | +0 ns | oom |", "## What to do", "kubectl describe -n shop pod/web-"]
    {
        assert!(markdown.body.contains(part), "{part}: {}", markdown.body);
    }

    let workload = get("/w/shop/Deployment/web");
    for part in ["exceeded its memory limit", "Memory of", "Changes", "shop/web:2", "1 death"] {
        assert!(workload.body.contains(part), "{part}: {}", workload.body);
    }
    assert!(get("/w/shop/Pod/web-0").body.contains("exceeded its memory limit"));
    let of_node = get("/n/n1");
    for part in ["Node n1", "exceeded its memory limit", "connected", "The ledger closes"] {
        assert!(of_node.body.contains(part), "{part}: {}", of_node.body);
    }
    let ledger = get("/ledger");
    assert!(ledger.body.contains("The ledger closes") && ledger.body.contains("ebpf"), "{}", ledger.body);

    for (path, code) in [("/f/nope", 404), ("/w/shop/Deployment/none", 404), ("/n/none", 404), ("/e/1:2:3:4?at=5", 404)]
    {
        assert_eq!(get(path).code, code, "{path}");
    }
    for path in ["/?severity=bad", "/?since=whenever", "/?nonsense=1", "/w/shop/web", "/e/x?at=1", "/e/1:2:3:4"] {
        assert_eq!(get(path).code, 400, "{path}");
    }
    let begins = get(&path[..path.len() - 4]);
    assert_eq!((begins.code, begins.header("location")), (303, path.as_str()), "the beginning of an id leads to it");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_lost_lowers_certainty_and_is_said_first() {
    let mut node = node("n1");
    release(&mut node, "Deployment/web", "shop");
    node.lose(7);
    kill(&mut node, "Deployment/web", "shop/web-0", 100, "nginx");
    let (server, stream) = served(&node).await;
    let address = server.pipeline.http_address;
    let path = found(address).await;
    let page = until(address, &path, "were lost on this node in the window").await;
    assert!(page.contains("events were lost on the node in the window") && page.contains("class=\"band\""), "{page}");
    let get = |path: &str| tokio::task::block_in_place(|| get(address, path));
    let first = get("/");
    assert!(first.body.contains("7 events lost on n1: ring/full 7"), "{}", first.body);
    drop(stream);
    let deadline = Instant::now() + LIMIT;
    loop {
        let first = get("/").body;
        let (at, list) = (first.find("The collector of n1 is gone"), first.find("class=\"findings\""));
        if let Some(at) = at {
            assert!(list.is_some_and(|list| at < list), "what is not known comes first: {first}");
            break;
        }
        assert!(Instant::now() < deadline, "{first}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_names_stay_text_on_every_page() {
    let mut node = node("n1");
    let workload = format!("Deployment/{}", HOSTILE.replace('/', "|"));
    let pod = format!("shop/{}", HOSTILE.replace('/', "|"));
    release(&mut node, &workload, "shop");
    kill(&mut node, &workload, &pod, 100, HOSTILE);
    let (server, _stream) = served(&node).await;
    let address = server.pipeline.http_address;
    let path = found(address).await;
    until(address, &path, "contradicts what happened").await;
    let get = |path: &str| tokio::task::block_in_place(|| get(address, path));
    let mut seen: BTreeSet<String> = BTreeSet::new();
    let mut waiting = vec!["/".to_owned(), "/?view=list".to_owned(), "/ledger".to_owned()];
    while let Some(path) = waiting.pop() {
        if !seen.insert(path.clone()) {
            continue;
        }
        let page = get(&path);
        assert_eq!(page.code, 200, "{path}: {}", page.body);
        for start in ["/f/", "/e/", "/w/", "/n/", "/?"] {
            waiting.extend(links(&page.body, start));
        }
    }
    let has = |start: &str| seen.iter().any(|path| path.starts_with(start));
    assert!(has("/f/") && has("/e/") && has("/w/shop/Deployment/%3Cscript%3E") && has("/w/shop/Pod/"), "{seen:?}");
    let markdown = seen.iter().find(|path| path.ends_with(".md")).expect("Markdown");
    let text = get(markdown).body;
    assert!(text.contains("\\<script\\>"), "{text}");
    // In a block of code it is no markup.
    let (before, commands) = text.split_once("```sh").expect("commands");
    assert!(!before.contains("<script>") && commands.matches("```").count() == 1, "{text}");
}

/// Pages over a store, without a machine behind it.
struct Small {
    address: SocketAddr,
    store: Arc<FindingStore>,
    _dir: tempfile::TempDir,
    _runtime: tokio::runtime::Runtime,
}

fn small(findings_max: usize, token_file: Option<PathBuf>) -> Small {
    let dir = tempfile::tempdir().expect("a directory");
    let store = Arc::new(FindingStore::new(findings_max));
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
    let section = AuthSection { token_file, ..AuthSection::default() };
    let auth = runtime.block_on(Auth::open(&section, &prometheus::Registry::new())).expect("a token");
    let pages = Pages {
        store: Arc::clone(&store),
        events: EventSource::new(dir.path()),
        peers: None,
        patterns: Arc::new(PatternSet::embedded().expect("patterns")),
        status: LateStatus::default(),
        silences: Arc::new(Silences::in_memory()),
    };
    let router = web::router(pages, Arc::new(auth));
    let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).expect("a port");
    let address = listener.local_addr().expect("an address");
    runtime.spawn(async move { axum::serve(listener, router).await });
    Small { address, store, _dir: dir, _runtime: runtime }
}

fn finding(number: u64) -> Finding {
    let workload = number % 500;
    Finding {
        id: format!("{number:016x}"),
        pattern: "memory-limit-kill".into(),
        severity: if number.is_multiple_of(10) { "critical" } else { "low" }.into(),
        title: format!("shop/web-{workload}-{number}/nginx exceeded its memory limit of 64.0 MiB"),
        confidence: 0.95,
        ended_ns: now_ns() - number * SECOND,
        count: 1,
        death: Some(Death::default()),
        entity: Some(EntityRef {
            kind: "container".into(),
            name: format!("shop/web-{workload}-{number}/nginx"),
            node: format!("node-{}", number % 300),
            namespace: format!("shop-{}", number % 50),
            pod: format!("web-{workload}-{number}"),
            workload: format!("Deployment/web-{workload}"),
            ..EntityRef::default()
        }),
        ..Finding::default()
    }
}

#[test]
fn ten_thousand_findings_come_in_light_pages_each_once() {
    const FINDINGS: u64 = 10_000;
    let server = small(FINDINGS as usize, None);
    for number in 1..=FINDINGS {
        server.store.publish(finding(number));
    }
    let began = Instant::now();
    let first = get(server.address, "/");
    let took = began.elapsed();
    println!("the first page: {} bytes in {took:?}", first.body.len());
    assert!(took < Duration::from_secs(1), "{took:?}");
    assert!(first.body.contains("10000 findings") && first.body.contains("Page 1 of 25"), "{}", first.body);
    let mut groups = BTreeSet::new();
    for page in 1..=25 {
        let page = get(server.address, &format!("/?page={page}"));
        groups.extend(links(&page.body, "/w/"));
    }
    assert_eq!(groups.len(), 500);
    let (mut path, mut found) = ("/?view=list&severity=high".to_owned(), BTreeSet::new());
    loop {
        let page = get(server.address, &path);
        let of_page = links(&page.body, "/f/");
        assert!(of_page.iter().all(|link| found.insert(link.clone())), "each once");
        match links(&page.body, "/?")
            .into_iter()
            .find(|link| link.contains("page_token=") && page.body.contains("rel=\"next\""))
        {
            Some(next) => path = next,
            None => break,
        }
    }
    assert_eq!(found.len(), 1000);
    let narrow = get(server.address, "/?workload=Deployment/web-7&namespace=shop-7&view=list");
    assert_eq!(links(&narrow.body, "/f/").len(), 20);
    assert!(get(server.address, "/?pod=nobody").body.contains("Nothing was found that matches"));
    assert!(get(server.address, &format!("/f/{:016x}", 1)).body.contains("Other pods of this workload"));
}

#[test]
fn an_open_page_is_notified_of_findings() {
    let server = small(10, None);
    let mut stream = TcpStream::connect(server.address).expect("it listens");
    stream.set_read_timeout(Some(LIMIT)).expect("set");
    stream.write_all(b"GET /live HTTP/1.0\r\nHost: tapio\r\n\r\n").expect("sent");
    let mut lines = BufReader::new(stream).lines().map(|line| line.expect("a line"));
    assert!(lines.any(|line| line.is_empty()), "the head ends");
    server.store.publish(finding(1));
    let word = lines.find(|line| line.starts_with("data: ")).expect("a word");
    assert_eq!(word, "data: {\"id\":\"0000000000000001\",\"revision\":1,\"withdrawn\":false}");
}

fn login(server: &Small, token: &str, headers: &str) -> Answer {
    let form = format!("token={}&to=%2Ff%2F1", token.replace('%', "%25").replace('&', "%26").replace('+', "%2B"));
    let length = form.len();
    let request = format!(
        "POST /login HTTP/1.0\r\nHost: tapio\r\ncontent-type: application/x-www-form-urlencoded\r\ncontent-length: {length}\r\n\
         {headers}\r\n{form}"
    );
    ask(server.address, &request)
}

#[test]
fn a_token_is_asked_once_and_hidden_from_scripts() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), "open;sesame=\"%+&'\n").expect("written");
    let server = small(10, Some(file.path().into()));
    server.store.publish(finding(1));
    let paths =
        ["/", "/f/0000000000000001", "/f/0000000000000001.md", "/e/1:2:3:4", "/w/a/b/c", "/n/a", "/ledger", "/live"];
    let wrong =
        ["", "Authorization: Bearer open\r\n", "Cookie: __Host-tapio=open\r\n", "Cookie: tapio=open%3bsesame\r\n"];
    for path in paths {
        for headers in wrong {
            let answer = get_with(server.address, path, headers);
            assert_eq!(answer.code, 401, "{path} {headers}: {}", answer.body);
            assert!(
                answer.body.contains("name=\"token\"") && !answer.body.contains("web-1"),
                "{path}: {}",
                answer.body
            );
            assert_eq!(answer.header("x-content-type-options"), "nosniff");
        }
    }
    assert_eq!(get_with(server.address, "/assets/tapio.css", "").code, 200, "files say nothing");
    let bearer = "Authorization: Bearer open;sesame=\"%+&'\r\n";
    assert_eq!(get_with(server.address, "/", bearer).code, 200);

    assert_eq!(login(&server, "wrong", "").code, 401);
    let token = "open;sesame=\"%+&'";
    assert_eq!(login(&server, token, "sec-fetch-site: cross-site\r\n").code, 403);
    let answer = login(&server, token, "sec-fetch-site: same-origin\r\n");
    assert_eq!((answer.code, answer.header("location")), (303, "/f/1"), "{}", answer.body);
    let cookie = answer.header("set-cookie").to_owned();
    for part in ["__Host-tapio=", "; Path=/", "; Secure", "; HttpOnly", "; SameSite=Strict"] {
        assert!(cookie.contains(part), "{cookie}");
    }
    let cookie = format!("Cookie: a=b; {}\r\n", cookie.split(';').next().expect("a value"));
    assert_eq!(get_with(server.address, "/", &cookie).code, 200);
    let both = format!("{cookie}Authorization: Bearer wrong\r\n");
    assert_eq!(get_with(server.address, "/", &both).code, 401, "a bearer token is not overruled");

    std::fs::write(file.path(), "another\n").expect("written");
    let answer = get_with(server.address, "/", &cookie);
    assert!(answer.code == 401 && answer.body.contains("not valid any more"), "{}", answer.body);
    let left = ask(server.address, "POST /logout HTTP/1.0\r\nHost: tapio\r\ncontent-length: 0\r\n\r\n");
    assert!(left.code == 303 && left.header("set-cookie").contains("Max-Age=0"), "{}", left.head);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_the_api_is_off_so_is_the_page() {
    let server = Whole::start(|config| config.metrics.api = Some(false)).await;
    let get = |path: &str| tokio::task::block_in_place(|| get(server.pipeline.http_address, path));
    let first = get("/");
    assert!(first.code == 403 && first.body.contains("metrics.api: true"), "{}", first.body);
    assert_eq!(get("/f/1").code, 404);
    assert_eq!((get("/healthz").code, get("/api/v1/findings").code), (200, 403));
}
