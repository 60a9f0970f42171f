//! The JSON API over HTTP, against a real listener, store and archive.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;

use crate::archive_support::*;
use serde_json::Value;
use tapio_server::api;
use tapio_server::auth::{Auth, AuthSection};
use tapio_server::findings::FindingStore;
use tapio_server::query::EventSource;
use tapio_server::silences::Silences;
use tapio_wire::service::{EntityRef, Finding};

struct Server {
    address: SocketAddr,
    store: Arc<FindingStore>,
    _dir: tempfile::TempDir,
    _runtime: tokio::runtime::Runtime,
}

fn finding(number: u64, severity: &str) -> Finding {
    Finding {
        id: format!("{number:04}"),
        pattern: if number.is_multiple_of(2) { "even".into() } else { "odd".into() },
        severity: severity.into(),
        ended_ns: number * 1_000_000_000,
        entity: Some(EntityRef {
            kind: "container".into(),
            name: format!("shop/web-{number}/nginx"),
            node: "n1".into(),
            ..EntityRef::default()
        }),
        ..Finding::default()
    }
}

fn serve() -> Server {
    serve_to(None)
}

fn serve_to(token_file: Option<PathBuf>) -> Server {
    let dir = tempfile::tempdir().unwrap();
    let archive = open(plain(dir.path()));
    append_each(&archive, &mut Frames::new("n1", 1), 30);
    archive.shutdown();
    let store = Arc::new(FindingStore::new(100));
    for number in 1..=20 {
        store.publish(finding(number, if number > 15 { "critical" } else { "low" }));
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let section = AuthSection { token_file, ..AuthSection::default() };
    let auth = runtime.block_on(Auth::open(&section, &prometheus::Registry::new())).unwrap();
    let silences = Arc::new(Silences::in_memory());
    let router = api::router(Arc::clone(&store), EventSource::new(dir.path()), None, silences, Arc::new(auth));
    let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
    let address = listener.local_addr().unwrap();
    runtime.spawn(async move { axum::serve(listener, router).await });
    Server { address, store, _dir: dir, _runtime: runtime }
}

impl Server {
    fn ask(&self, path: &str) -> BufReader<TcpStream> {
        self.ask_with(path, "")
    }

    /// Asks with lines of headers.
    fn ask_with(&self, path: &str, headers: &str) -> BufReader<TcpStream> {
        let mut stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        write!(stream, "GET {path} HTTP/1.0\r\nHost: tapio\r\n{headers}\r\n").unwrap();
        BufReader::new(stream)
    }

    fn get(&self, path: &str) -> (u16, String) {
        let mut text = String::new();
        self.ask(path).read_to_string(&mut text).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }

    fn json(&self, path: &str) -> (u16, Value) {
        let (status, body) = self.get(path);
        (status, serde_json::from_str(&body).unwrap_or_else(|error| panic!("{path}: {error}: {body}")))
    }
}

#[test]
fn findings_come_in_pages_newest_first_and_narrowed() {
    let server = serve();
    let ids = |value: &Value| -> Vec<String> {
        let found = value["findings"].as_array().unwrap().iter();
        found.map(|finding| finding["id"].as_str().unwrap().to_owned()).collect()
    };
    let (status, first) = server.json("/api/v1/findings?limit=15&since=1970-01-01");
    assert_eq!((status, ids(&first).len(), ids(&first)[0].as_str()), (200, 15, "0020"));
    let token = first["next_page_token"].as_str().unwrap();
    let (_, second) = server.json(&format!("/api/v1/findings?limit=15&page_token={token}"));
    assert_eq!(ids(&second), ["0005", "0004", "0003", "0002", "0001"]);
    assert_eq!(second["next_page_token"], "");
    let (_, narrow) = server.json("/api/v1/findings?severity=high&pattern=even");
    assert_eq!(ids(&narrow), ["0020", "0018", "0016"]);
    assert_eq!(ids(&server.json("/api/v1/findings?limit=1000&page_token=").1).len(), 20);
    let (_, paged) = server.json("/api/v1/findings?pattern=even&limit=2");
    let token = paged["next_page_token"].as_str().unwrap();
    assert_eq!(ids(&server.json(&format!("/api/v1/findings?pattern=even&limit=1&page_token={token}")).1), ["0016"]);
    assert_eq!(ids(&server.json("/api/v1/findings?pod=web-7&namespace=shop").1), ["0007"]);
    assert_eq!(ids(&server.json("/api/v1/findings?pod=shop/web-8&node=n1").1), ["0008"]);
    assert_eq!(ids(&server.json("/api/v1/findings?node=n2").1), [""; 0]);
    assert_eq!(server.json("/api/v1/findings/0012").1["pattern"], "even");
}

#[test]
fn nothing_is_returned_without_the_token() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "open-sesame\n").unwrap();
    let server = serve_to(Some(file.path().into()));
    let status = |path: &str, headers: &str| {
        let mut text = String::new();
        server.ask_with(path, headers).read_to_string(&mut text).unwrap();
        (text.split(' ').nth(1).unwrap().parse::<u16>().unwrap(), text)
    };
    let right = "Authorization: Bearer open-sesame\r\n";
    for path in ["/api/v1/findings", "/api/v1/findings/0012", "/api/v1/findings/watch", "/api/v1/events", "/api/v2"] {
        for headers in ["", "Authorization: Bearer open-sesam\r\n", "Authorization: Basic open-sesame\r\n"] {
            let (code, text) = status(path, headers);
            assert!(
                code == 401 && text.contains("server.auth.token_file") && !text.contains("web-12"),
                "{path}: {text}"
            );
        }
    }
    assert_eq!(status("/api/v1/findings", right).0, 200);
    assert_eq!(status("/api/v1/events", right).0, 200);
    std::fs::write(file.path(), "another\n").unwrap();
    assert_eq!(status("/api/v1/findings", right).0, 401, "the token has changed");
}

#[test]
fn errors_say_what_to_do() {
    let server = serve();
    for (path, status, part) in [
        ("/api/v1/findings/nope", 404, "/api/v1/findings lists"),
        ("/api/v1/findings/00", 400, "give more of it"),
        ("/api/v1/findings?severity=bad", 400, "critical"),
        ("/api/v1/findings?since=whenever", 400, "how long ago"),
        ("/api/v1/findings?page_token=x", 400, "leave it out"),
        ("/api/v1/findings?sevrity=low", 400, "unknown field"),
        ("/api/v1/events?kind=nonsense", 400, "the kinds are"),
        ("/api/v1/events?pod=nobody", 404, "nothing is called pod nobody"),
        ("/api/v1/events?node=n2", 404, "known are: n1"),
        ("/api/v1/findings?limit=0", 400, "from 1 to 1000"),
        ("/api/v1/findings?limit=1001", 400, "from 1 to 1000"),
        ("/api/v1/findings?limit=-1", 400, "limit"),
        ("/api/v1/events?limit=0", 400, "from 1 to 1000000"),
        ("/api/v1/events?limit=1000001", 400, "from 1 to 1000000"),
        ("/api/v1/events?limit=50001&newest=true", 400, "from 1 to 50000"),
        ("/api/v1/findings?pod=", 400, "pod is empty"),
        ("/api/v1/findings?severity=", 400, "severity is empty"),
        ("/api/v1/events?pod=", 400, "pod is empty"),
        ("/api/v1/events?node=", 400, "node is empty"),
        ("/api/v1/events?kind=", 400, "the kinds are"),
        ("/api/v1/events?since=", 400, "how long ago"),
        ("/api/v2", 404, "/api/v1/events"),
    ] {
        let (got, value) = server.json(path);
        assert_eq!(got, status, "{path}: {value}");
        assert!(value["error"].as_str().unwrap().contains(part), "{path}: {value}");
    }
}

#[test]
fn events_are_lines_and_the_last_says_if_more_follow() {
    let server = serve();
    let lines = |path: &str| -> Vec<Value> {
        let (status, body) = server.get(path);
        assert_eq!(status, 200, "{body}");
        body.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let all = lines("/api/v1/events");
    assert_eq!(all.len(), 31);
    assert_eq!(all[0]["kind"], "run_queue");
    assert_eq!((&all[30]["end"]["events"], &all[30]["end"]["cut"]), (&Value::from(30), &Value::from(false)));
    let some = lines("/api/v1/events?limit=5&kind=run_queue,oom");
    assert_eq!((some.len(), &some[5]["end"]["cut"]), (6, &Value::from(true)));
    let last = lines("/api/v1/events?limit=2&newest=true");
    assert_eq!(last[1]["id"], all[29]["id"]);
    let since = all[20]["time"].as_str().unwrap();
    assert_eq!(lines(&format!("/api/v1/events?since={since}")).len(), 11);
    assert_eq!(lines("/api/v1/events?kind=oom").len(), 1);
}

#[test]
fn a_watcher_is_sent_what_is_published() {
    let server = serve();
    let mut answer = server.ask("/api/v1/findings/watch?since=1970-01-01T00:00:20Z");
    let mut line = || {
        let mut line = String::new();
        answer.read_line(&mut line).unwrap();
        line
    };
    let mut data = || loop {
        if let Some(json) = line().strip_prefix("data: ") {
            return serde_json::from_str::<Value>(json).unwrap();
        }
    };
    assert_eq!(data()["id"], "0020");
    server.store.publish(finding(21, "high"));
    assert_eq!(data()["id"], "0021");
}
