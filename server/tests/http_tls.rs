//! The HTTP port over TLS: the page and the API for who brings a token, health and metrics for everybody as before.

use std::sync::Arc;

use tapio_wire::program::tls::{ClientFiles, ServerFiles, Watched};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::auth::Authority;
use crate::whole_server::Whole;

const TOKEN: &str = "open;sesame";

struct Https {
    port: u16,
    files: ClientFiles,
}

struct Answer {
    head: String,
    body: String,
    /// The certificate that the server showed.
    certificate: Vec<u8>,
}

impl Answer {
    fn code(&self) -> &str {
        self.head.split(' ').nth(1).expect("a code")
    }

    fn header(&self, name: &str) -> &str {
        let lines = self.head.lines().filter_map(|line| line.split_once(": "));
        lines.filter(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value).next().unwrap_or_default()
    }
}

impl Https {
    fn of(server: &Whole, authority: &Authority) -> Self {
        let ca = authority.folder.path().join("ca.pem");
        Self { port: server.pipeline.http_address.port(), files: ClientFiles { ca, ..ClientFiles::default() } }
    }

    async fn ask(&self, request: &str) -> Answer {
        let mut config = (*Watched::load(self.files.clone()).expect("a CA").current()).clone();
        // As a browser does.
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let stream = TcpStream::connect(("127.0.0.1", self.port)).await.expect("it listens");
        let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
        let name = "tapio-server".try_into().expect("a name");
        let mut stream = connector.connect(name, stream).await.expect("a handshake");
        let certificate = stream.get_ref().1.peer_certificates().expect("one")[0].to_vec();
        stream.write_all(request.as_bytes()).await.expect("sent");
        let mut text = String::new();
        stream.read_to_string(&mut text).await.expect("answered");
        let (head, body) = text.split_once("\r\n\r\n").expect("a head");
        Answer { head: head.to_owned(), body: body.to_owned(), certificate }
    }

    async fn get(&self, path: &str, headers: &str) -> Answer {
        self.ask(&format!("GET {path} HTTP/1.0\r\nHost: tapio-server\r\n{headers}\r\n")).await
    }

    async fn post(&self, path: &str, headers: &str, form: &str) -> Answer {
        let length = form.len();
        let kind = "application/x-www-form-urlencoded";
        let head = format!("Host: tapio-server\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n{headers}");
        self.ask(&format!("POST {path} HTTP/1.0\r\n{head}\r\n{form}")).await
    }
}

async fn guarded(authority: &Authority, wants_certificates: bool) -> Whole {
    let path = |name: &str| authority.folder.path().join(name);
    std::fs::write(path("token"), TOKEN).expect("written");
    Whole::start(|config| {
        config.server.tls_enabled = true;
        let client_ca = wants_certificates.then(|| path("ca.pem"));
        config.server.tls = ServerFiles { cert: path("server.pem"), key: path("server.key"), client_ca };
        config.server.auth.token_file = Some(path("token"));
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_pasted_over_tls_opens_the_page_and_forms() {
    let authority = Authority::new();
    let server = guarded(&authority, false).await;
    let https = Https::of(&server, &authority);
    let first = https.get("/", "").await;
    assert!(first.code() == "401" && first.body.contains("name=\"token\""), "{}", first.body);
    assert_eq!(https.get("/api/v1/findings", "").await.code(), "401");
    let bearer = format!("Authorization: Bearer {TOKEN}\r\n");
    assert_eq!(https.get("/api/v1/findings", &bearer).await.code(), "200");

    assert_eq!(https.post("/login", "", "token=wrong").await.code(), "401");
    let login = https.post("/login", "", "token=open%3Bsesame&to=%2Fsilences").await;
    assert_eq!((login.code(), login.header("location")), ("303", "/silences"));
    let cookie = login.header("set-cookie").to_owned();
    for part in ["__Host-tapio=", "HttpOnly", "Secure", "SameSite=Strict", "Path=/"] {
        assert!(cookie.contains(part), "{cookie}");
    }
    let cookie = format!("Cookie: {}\r\n", cookie.split(';').next().expect("a pair"));
    assert_eq!(https.get("/", &cookie).await.code(), "200");
    // The API takes no cookie: another site's page could make a browser send it.
    assert_eq!(https.get("/api/v1/findings", &cookie).await.code(), "401");

    let form = "pattern=crashed&until=2h&reason=a+rehearsal";
    for elsewhere in
        ["Sec-Fetch-Site: cross-site\r\n", "Sec-Fetch-Site: same-site\r\n", "Origin: https://evil.example\r\n"]
    {
        let refused = https.post("/silences", &format!("{cookie}{elsewhere}"), form).await;
        assert!(refused.code() == "403" && refused.body.contains("another site"), "{elsewhere}{}", refused.body);
    }
    assert_eq!(https.post("/silences", "", form).await.code(), "401");
    let own = format!("{cookie}Sec-Fetch-Site: same-origin\r\n");
    assert_eq!(https.post("/silences", &own, form).await.header("location"), "/silences");
    let listed = https.get("/silences", &cookie).await;
    assert!(listed.body.contains("pattern crashed") && listed.body.contains("shared token"), "{}", listed.body);
    server.pipeline.shutdown().await.expect("a good end");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_the_clear_only_health_and_metrics_are_left() {
    let authority = Authority::new();
    let server = guarded(&authority, false).await;
    server.until_metric("tapio_server_archive_ready", &[], |ready| ready == 1.0).await;
    for path in ["/healthz", "/readyz", "/metrics"] {
        assert_eq!(server.get(path, "").0, 200, "{path}");
        assert_eq!(Https::of(&server, &authority).get(path, "").await.code(), "200", "{path}");
    }
    let bearer = format!("Authorization: Bearer {TOKEN}\r\n");
    let (code, body) = server.get("/api/v1/findings", &bearer);
    assert!(code == 403 && body.contains("https://"), "{code} {body}");
    let (code, body) = server.get("/?view=list", "");
    assert!(code == 307 && body.is_empty(), "{code} {body}");
    assert_eq!(server.get("/login", "").0, 307, "nobody is to paste a token here");
    server.pipeline.shutdown().await.expect("a good end");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_certificate_is_used_by_the_next_handshake() {
    let authority = Authority::new();
    let server = guarded(&authority, false).await;
    let https = Https::of(&server, &authority);
    let before = https.get("/healthz", "").await.certificate;
    assert_eq!(https.get("/healthz", "").await.certificate, before);
    authority.sign("server", "tapio-server", &["tapio-server"]);
    assert_ne!(https.get("/healthz", "").await.certificate, before);
    server.pipeline.shutdown().await.expect("a good end");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_clients_need_certificates_browsers_need_them_too() {
    let authority = Authority::new();
    let server = guarded(&authority, true).await;
    let with = Https { files: authority.sign("jane", "jane", &[]), ..Https::of(&server, &authority) };
    let bearer = format!("Authorization: Bearer {TOKEN}\r\n");
    assert_eq!(with.get("/api/v1/findings", &bearer).await.code(), "200");
    let without = Https::of(&server, &authority);
    let refused = tokio::spawn(async move { without.get("/", "").await.code().to_owned() }).await;
    assert!(refused.is_err(), "it was answered without a certificate");
    server.pipeline.shutdown().await.expect("a good end");
}
