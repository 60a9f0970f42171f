//! Who is let in: tokens that a Kubernetes API server reviews (one of the test's own), and certificates; and for which node
//! they may speak.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::archive_support::Frames;
use crate::whole_server::*;
use axum::extract::{Path as InPath, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};
use tapio_server::auth::{NodeIdentity, Subject, TokenReviewSection};
use tapio_server::config::Config;
use tapio_wire::program::clock::now_ns;
use tapio_wire::program::dial;
use tapio_wire::program::tls::{ClientFiles, ServerFiles, Watched};
use tapio_wire::service::query_client::QueryClient;
use tapio_wire::service::silences_client::SilencesClient;
use tapio_wire::service::{AddSilenceRequest, ListFindingsRequest, StatusRequest};
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

/// What the API server knows, and what it was asked.
#[derive(Default)]
struct Cluster {
    /// Answers by token: the status of a review.
    tokens: Mutex<HashMap<String, Value>>,
    /// Pods of `tapio-system` by name: uid and node.
    pods: Mutex<HashMap<String, (String, Option<String>)>>,
    asked: Mutex<Vec<Value>>,
    /// What it answers instead, when it is set.
    failure: Mutex<Option<StatusCode>>,
    /// Failure that requests for pods get.
    pods_failure: Mutex<Option<StatusCode>>,
}

impl Cluster {
    async fn start(dir: &Path) -> Arc<Self> {
        let cluster = Arc::new(Self::default());
        let router = Router::new()
            .route("/apis/authentication.k8s.io/v1/tokenreviews", post(review))
            .route("/api/v1/namespaces/tapio-system/pods/{name}", get(pod))
            .with_state(Arc::clone(&cluster));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, router).await });
        write_kubeconfig(dir, address);
        cluster
    }

    /// Knows a token of a service account of `tapio-system`, with the node of its pod.
    fn know(&self, token: &str, account: &str, audience: &str, node: Option<&str>) {
        let extra = node.map_or(json!({}), |node| json!({"authentication.kubernetes.io/node-name": [node]}));
        self.know_with(token, account, audience, &extra);
    }

    /// Knows a token that is bound to a pod without its node, as Kubernetes before 1.30 reports it.
    fn know_of_pod(&self, token: &str, account: &str, pod: &str, uid: &str) {
        let extra = json!({
            "authentication.kubernetes.io/pod-name": [pod], "authentication.kubernetes.io/pod-uid": [uid],
        });
        self.know_with(token, account, "tapio", &extra);
    }

    fn know_with(&self, token: &str, account: &str, audience: &str, extra: &Value) {
        let status = json!({
            "authenticated": true, "audiences": [audience],
            "user": {"username": format!("system:serviceaccount:tapio-system:{account}"),
                     "groups": ["system:serviceaccounts"], "extra": extra},
        });
        self.tokens.lock().unwrap().insert(token.into(), status);
    }

    fn asked(&self) -> usize {
        self.asked.lock().unwrap().len()
    }

    fn fail(&self, with: Option<StatusCode>) {
        *self.failure.lock().unwrap() = with;
    }
}

async fn pod(State(cluster): State<Arc<Cluster>>, InPath(name): InPath<String>) -> Response {
    cluster.asked.lock().unwrap().push(json!({"pod": name}));
    let failed = |code: StatusCode| {
        let body = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": format!("no {name}"),
                          "reason": "", "code": code.as_u16()});
        (code, Json(body)).into_response()
    };
    match (*cluster.pods_failure.lock().unwrap(), cluster.pods.lock().unwrap().get(&name)) {
        (Some(code), _) => failed(code),
        (None, None) => failed(StatusCode::NOT_FOUND),
        (None, Some((uid, node))) => {
            let spec = json!({"nodeName": node, "containers": []});
            let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "uid": uid}, "spec": spec});
            Json(pod).into_response()
        }
    }
}

async fn review(State(cluster): State<Arc<Cluster>>, Json(asked): Json<Value>) -> Response {
    cluster.asked.lock().unwrap().push(asked.clone());
    if let Some(status) = *cluster.failure.lock().unwrap() {
        let body = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": "not today",
                          "reason": "Forbidden", "code": status.as_u16()});
        return (status, Json(body)).into_response();
    }
    let token = asked["spec"]["token"].as_str().unwrap_or_default();
    let known = cluster.tokens.lock().unwrap().get(token).cloned();
    let status = known.unwrap_or_else(|| json!({"authenticated": false, "error": "invalid bearer token"}));
    let mut answer = asked;
    answer["status"] = status;
    (StatusCode::CREATED, Json(answer)).into_response()
}

struct Guarded {
    server: Whole,
    cluster: Arc<Cluster>,
    _kube: tempfile::TempDir,
}

impl Guarded {
    async fn start(change: impl FnOnce(&mut Config)) -> Self {
        let kube = tempfile::tempdir().unwrap();
        let cluster = Cluster::start(kube.path()).await;
        let server = Whole::start(|config| {
            config.metrics.api = Some(true);
            config.server.auth.token_review = Some(TokenReviewSection {
                may_query: vec![Subject::account("tapio-system", "operator"), Subject::Group("sre".into())],
                may_silence: vec![Subject::account("tapio-system", "oncall")],
                kubeconfig: Some(kube.path().join("kubeconfig")),
                ..TokenReviewSection::default()
            });
            change(config);
        })
        .await;
        Self { server, cluster, _kube: kube }
    }

    async fn ship(&self, token: &str, node: &str) -> Result<Stream, Status> {
        let mut stream = Stream::open(self.server.channel().await, token, hello(node, 1)).await?;
        stream.welcome().await?;
        Ok(stream)
    }

    async fn query(&self, token: &str) -> Result<(), Status> {
        let mut request = Request::new(ListFindingsRequest::default());
        request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
        QueryClient::new(self.server.channel().await).list_findings(request).await.map(drop)
    }

    fn denied(&self, reason: &str) -> f64 {
        self.server.metric("tapio_server_denied_requests_total", &[&format!("reason=\"{reason}\"")])
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accounts_may_do_what_is_listed_and_are_reviewed_once() {
    let guarded = Guarded::start(|_| {}).await;
    guarded.cluster.know("ship", "tapio-collector", "tapio", None);
    guarded.cluster.know("ask", "operator", "tapio", None);
    guarded.cluster.know("stranger", "default", "tapio", None);
    guarded.cluster.know("elsewhere", "tapio-collector", "vault", None);

    let mut stream = guarded.ship("ship", "node-1").await.expect("let in");
    stream.frame(Frames::new("node-1", 1).next()).await;
    stream.acknowledged(1).await;
    guarded.query("ask").await.expect("let in");
    let asked = guarded.cluster.asked.lock().unwrap()[0].clone();
    assert_eq!((&asked["spec"]["audiences"], &asked["spec"]["token"]), (&json!(["tapio"]), &json!("ship")));

    for (token, code, says, reason) in [
        ("", Code::Unauthenticated, "audience `tapio`", "no_token"),
        ("nobodys", Code::Unauthenticated, "not accepted", "refused_token"),
        ("elsewhere", Code::Unauthenticated, "not accepted", "refused_token"),
        ("stranger", Code::PermissionDenied, "system:serviceaccount:tapio-system:default may not ship", "not_allowed"),
        ("ask", Code::PermissionDenied, "server.auth.token_review.may_ship", "not_allowed"),
    ] {
        let before = guarded.denied(reason);
        let status = guarded.ship(token, "node-2").await.expect_err(token);
        assert_eq!(status.code(), code, "{token}: {status}");
        assert!(status.message().contains(says), "{token}: {status}");
        assert_eq!(guarded.denied(reason), before + 1.0, "{reason}");
    }
    let status = guarded.query("ship").await.expect_err("a collector may not query");
    assert_eq!(status.code(), Code::PermissionDenied, "{status}");

    // The five tokens were asked about once each, good and bad ones; no second time.
    assert_eq!(guarded.cluster.asked(), 5);
    for _ in 0..3 {
        guarded.query("ask").await.expect("let in");
        guarded.ship("nobodys", "node-2").await.expect_err("still nobody's");
    }
    assert_eq!(guarded.cluster.asked(), 5);
    let reviews =
        |result: &str| guarded.server.metric("tapio_server_token_reviews_total", &[&format!("result=\"{result}\"")]);
    assert_eq!((reviews("accepted"), reviews("refused"), reviews("error")), (3.0, 2.0, 0.0));
    assert!(guarded.server.metric("tapio_server_token_review_cache_hits_total", &[]) >= 6.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_may_query_may_not_silence() {
    let guarded = Guarded::start(|_| {}).await;
    guarded.cluster.know("ask", "operator", "tapio", None);
    guarded.cluster.know("call", "oncall", "tapio", None);
    let mut client = SilencesClient::new(guarded.server.channel().await);
    let wanted = AddSilenceRequest {
        pattern: "crashed".into(),
        until_ns: now_ns() + 60_000_000_000,
        reason: "a rehearsal".into(),
        ..AddSilenceRequest::default()
    };
    let request = |token: &str| {
        let mut request = Request::new(wanted.clone());
        request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
        request
    };
    let denied = client.add_silence(request("ask")).await.expect_err("it may only query");
    assert_eq!(denied.code(), Code::PermissionDenied, "{denied}");
    assert!(denied.message().contains("server.auth.token_review.may_silence"), "{denied}");
    let added = client.add_silence(request("call")).await.expect("let in").into_inner();
    assert_eq!(added.by, "system:serviceaccount:tapio-system:oncall");
    let (code, body) = guarded.server.get("/api/v1/silences", "Authorization: Bearer ask\r\n");
    assert!(code == 200 && body.contains("tapio-system:oncall"), "{code} {body}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_is_let_in_while_the_api_server_is_unreachable() {
    let guarded = Guarded::start(|config| {
        if let Some(review) = &mut config.server.auth.token_review {
            review.ttl = Duration::ZERO;
        }
    })
    .await;
    guarded.cluster.know("ship", "tapio-collector", "tapio", None);
    guarded.ship("ship", "node-1").await.expect("let in");
    for (failure, says) in
        [(StatusCode::INTERNAL_SERVER_ERROR, "not today"), (StatusCode::FORBIDDEN, "system:auth-delegator")]
    {
        guarded.cluster.fail(Some(failure));
        let status = guarded.ship("ship", "node-1").await.expect_err("not let in");
        assert_eq!(status.code(), Code::Unavailable, "so that a collector tries again: {status}");
        assert!(status.message().contains("cannot be reviewed") && status.message().contains(says), "{status}");
    }
    assert_eq!(guarded.denied("unreviewed"), 2.0);
    assert_eq!(guarded.server.metric("tapio_server_token_reviews_total", &["result=\"error\""]), 2.0);
    // This server's own credentials are read again, once.
    let before = guarded.cluster.asked();
    guarded.cluster.fail(Some(StatusCode::UNAUTHORIZED));
    guarded.ship("ship", "node-1").await.expect_err("not let in");
    assert_eq!(guarded.cluster.asked(), before + 2);
    guarded.cluster.fail(None);
    guarded.ship("ship", "node-1").await.expect("failures are not remembered");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn http_authenticates_alike_with_its_own_codes() {
    let guarded = Guarded::start(|_| {}).await;
    guarded.cluster.know("ask", "operator", "tapio", None);
    guarded.cluster.know("ship", "tapio-collector", "tapio", None);
    let path = "/api/v1/findings";
    let server = &guarded.server;
    let get =
        |token: &str| tokio::task::block_in_place(|| server.get(path, &format!("Authorization: Bearer {token}\r\n")));
    assert_eq!(get("ask").0, 200);
    assert_eq!(get("nobodys").0, 401);
    assert_eq!(get("ship").0, 403);
    guarded.cluster.fail(Some(StatusCode::INTERNAL_SERVER_ERROR));
    let (code, text) = get("new");
    assert_eq!(code, 503, "{text}");
    assert!(text.contains("cannot be reviewed"), "{text}");
    let calls = |outcome: &str| server.metric("tapio_server_audit_calls_total", &[&format!("outcome=\"{outcome}\"")]);
    assert_eq!((calls("allowed"), calls("denied")), (1.0, 3.0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pods_token_speaks_for_the_pods_node() {
    let guarded = Guarded::start(|_| {}).await;
    guarded.cluster.know("bound", "tapio-collector", "tapio", Some("node-1"));
    guarded.cluster.know("unbound", "tapio-collector", "tapio", None);
    guarded.ship("bound", "node-1").await.expect("its own node");
    let status = guarded.ship("bound", "node-2").await.expect_err("another's");
    assert_eq!(status.code(), Code::PermissionDenied);
    assert!(status.message().contains("may not ship for node `node-2`"), "{status}");
    let refused = "tapio_server_ingest_refused_total";
    assert_eq!(guarded.server.metric(refused, &["reason=\"not_its_node\""]), 1.0);
    guarded.ship("unbound", "node-2").await.expect("clusters that name no node: the hello is believed");

    let strict = Guarded::start(|config| config.server.auth.node_identity = NodeIdentity::Token).await;
    strict.cluster.know("bound", "tapio-collector", "tapio", Some("node-1"));
    strict.cluster.know("unbound", "tapio-collector", "tapio", None);
    strict.ship("bound", "node-1").await.expect("its own node");
    let status = strict.ship("unbound", "node-2").await.expect_err("it names no node");
    assert_eq!(status.code(), Code::PermissionDenied);
    assert_eq!(strict.denied("no_node"), 1.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_reviews_name_no_node_the_pod_does() {
    let guarded = Guarded::start(|config| {
        if let Some(review) = &mut config.server.auth.token_review {
            (review.ttl, review.refused_ttl) = (Duration::ZERO, Duration::ZERO);
        }
    })
    .await;
    let cluster = &guarded.cluster;
    let put = |name: &str, uid: &str, node: Option<&str>| {
        cluster.pods.lock().unwrap().insert(name.into(), (uid.into(), node.map(str::to_owned)));
    };
    put("collector-1", "uid-1", Some("node-1"));
    put("collector-new", "uid-of-another", Some("node-1"));
    put("collector-waiting", "uid-3", None);
    cluster.know_of_pod("bound", "tapio-collector", "collector-1", "uid-1");
    cluster.know_of_pod("outlived", "tapio-collector", "collector-new", "uid-of-old");
    cluster.know_of_pod("gone", "tapio-collector", "collector-gone", "uid-2");
    cluster.know_of_pod("waiting", "tapio-collector", "collector-waiting", "uid-3");
    cluster.know_of_pod("ask", "operator", "tapioctl", "uid-4");

    guarded.ship("bound", "node-1").await.expect("its own node");
    let status = guarded.ship("bound", "node-2").await.expect_err("another's");
    assert!(status.message().contains("may not ship for node `node-2`"), "{status}");
    for token in ["outlived", "gone"] {
        let status = guarded.ship(token, "node-1").await.expect_err(token);
        assert_eq!(status.code(), Code::Unauthenticated, "{token}: {status}");
    }
    let status = guarded.ship("waiting", "node-3").await.expect_err("nothing runs there yet");
    assert_eq!(status.code(), Code::Unauthenticated, "{status}");
    let before = cluster.asked();
    guarded.query("ask").await.expect("let in");
    assert_eq!(cluster.asked(), before + 1, "where who asks runs is nobody's business");

    // A server that may not read pods knows as little as before; one that gets no answer lets nobody in.
    *cluster.pods_failure.lock().unwrap() = Some(StatusCode::FORBIDDEN);
    guarded.ship("bound", "node-2").await.expect("the hello is believed");
    assert_eq!(guarded.server.metric("tapio_server_token_nodes_unknown_total", &[]), 1.0);
    *cluster.pods_failure.lock().unwrap() = Some(StatusCode::INTERNAL_SERVER_ERROR);
    let status = guarded.ship("bound", "node-1").await.expect_err("not let in");
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    *cluster.pods_failure.lock().unwrap() = None;

    let strict = Guarded::start(|config| config.server.auth.node_identity = NodeIdentity::Token).await;
    strict.cluster.pods.lock().unwrap().insert("collector-1".into(), ("uid-1".into(), Some("node-1".into())));
    strict.cluster.know_of_pod("bound", "tapio-collector", "collector-1", "uid-1");
    strict.ship("bound", "node-1").await.expect("its own node");
    // What was said of a token is remembered, with the node of its pod.
    *strict.cluster.pods_failure.lock().unwrap() = Some(StatusCode::FORBIDDEN);
    let asked = strict.cluster.asked();
    strict.ship("bound", "node-1").await.expect("its own node");
    let status = strict.ship("bound", "node-2").await.expect_err("another's");
    assert!(status.message().contains("may not ship for node `node-2`"), "{status}");
    assert_eq!(strict.cluster.asked(), asked);
    strict.cluster.know_of_pod("unknown", "tapio-collector", "collector-1", "uid-1");
    let status = strict.ship("unknown", "node-1").await.expect_err("its pod may not be read");
    assert_eq!(status.code(), Code::PermissionDenied, "{status}");
    assert_eq!(strict.denied("no_node"), 1.0);
}

/// A CA, a server's pair, and what a client needs.
pub struct Authority {
    pub folder: tempfile::TempDir,
    issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
}

impl Authority {
    pub fn new() -> Self {
        let mut params = rcgen::CertificateParams::default();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = rcgen::KeyPair::generate().unwrap();
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("ca.pem"), params.self_signed(&key).unwrap().pem()).unwrap();
        let authority = Self { folder, issuer: rcgen::Issuer::new(params, key) };
        authority.sign("server", "tapio-server", &["tapio-server"]);
        authority
    }

    pub fn sign(&self, file: &str, common: &str, dns: &[&str]) -> ClientFiles {
        let dns: Vec<String> = dns.iter().map(|name| (*name).to_owned()).collect();
        let mut params = rcgen::CertificateParams::new(dns).unwrap();
        params.distinguished_name.push(rcgen::DnType::CommonName, common);
        let key = rcgen::KeyPair::generate().unwrap();
        let cert = params.signed_by(&key, &self.issuer).unwrap();
        let path = |ending: &str| self.folder.path().join(format!("{file}.{ending}"));
        std::fs::write(path("pem"), cert.pem()).unwrap();
        std::fs::write(path("key"), key.serialize_pem()).unwrap();
        ClientFiles {
            ca: self.folder.path().join("ca.pem"),
            cert: Some(path("pem")),
            key: Some(path("key")),
            server_name: Some("tapio-server".into()),
        }
    }

    async fn server(&self, identity: NodeIdentity) -> Whole {
        Whole::start(|config| {
            let path = |name: &str| self.folder.path().join(name);
            config.server.tls_enabled = true;
            config.server.tls =
                ServerFiles { cert: path("server.pem"), key: path("server.key"), client_ca: Some(path("ca.pem")) };
            config.server.auth.node_identity = identity;
        })
        .await
    }
}

async fn over_tls(server: &Whole, files: &ClientFiles) -> Channel {
    let address = server.pipeline.grpc_address;
    let files = Arc::new(Watched::load(files.clone()).unwrap());
    let endpoint = dial::endpoint("tapio-server", address.port(), true).unwrap();
    dial::dial(&endpoint, address, Some(&files)).await.unwrap()
}

async fn ships(server: &Whole, files: &ClientFiles, node: &str) -> Result<(), Status> {
    let mut stream = Stream::open(over_tls(server, files).await, "", hello(node, 1)).await?;
    stream.welcome().await?;
    stream.frame(Frames::new(node, 1).next()).await;
    stream.acknowledged(1).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_speaks_for_the_node_that_it_names() {
    let authority = Authority::new();
    let one = authority.sign("one", "system:node:node-1", &[]);
    let two = authority.sign("two", "collector", &["node-2"]);
    let shared = authority.sign("shared", "collector", &["tapio-collector"]);

    let server = authority.server(NodeIdentity::Auto).await;
    ships(&server, &one, "node-1").await.expect("its own node");
    let status = ships(&server, &one, "node-9").await.expect_err("another's");
    assert_eq!(status.code(), Code::PermissionDenied, "{status}");
    ships(&server, &shared, "node-9").await.expect("a certificate that all collectors share names no node");

    let strict = authority.server(NodeIdentity::Certificate).await;
    ships(&strict, &one, "node-1").await.expect("its common name");
    ships(&strict, &two, "node-2").await.expect("its DNS name");
    for (files, node) in [(&one, "node-2"), (&two, "node-1"), (&shared, "node-1")] {
        let status = ships(&strict, files, node).await.expect_err("another's");
        assert_eq!(status.code(), Code::PermissionDenied, "{status}");
    }
    assert_eq!(strict.metric("tapio_server_ingest_refused_total", &["reason=\"not_its_node\""]), 3.0);
    // Who may connect may query.
    let mut query = QueryClient::new(over_tls(&strict, &shared).await);
    query.status(StatusRequest::default()).await.expect("let in");
}
