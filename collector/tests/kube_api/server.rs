//! An API server of the test's own that answers as the test wants. The tests of `perf` use this file too.

#![allow(dead_code, reason = "every test program uses its part of this module")]

use std::collections::HashMap;
use std::convert::Infallible;
use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{Method, Request, StatusCode};
use axum::response::Response;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::sync::mpsc;

/// A request as the API server sees it.
#[derive(Clone, Debug)]
pub struct Asked {
    pub at: Instant,
    pub method: Method,
    pub path: String,
    pub query: HashMap<String, String>,
    pub authorization: String,
    pub accept: String,
    pub body: Value,
}

impl Asked {
    pub fn is_watch(&self) -> bool {
        self.query.contains_key("watch")
    }

    pub fn version(&self) -> &str {
        self.query.get("resourceVersion").map_or("", String::as_str)
    }
}

/// What it answers.
pub enum Answer {
    Json(Value),
    /// A status with no body, and `Retry-After` in seconds.
    Refused(u16, Option<u64>),
    /// Lines of a watch that then ends.
    Lines(Vec<Value>),
    /// Lines of a watch as they come; it ends with its sender.
    Live(mpsc::UnboundedReceiver<Bytes>),
    /// A watch on which nothing happens.
    Silent,
}

type Script = Box<dyn FnMut(&Asked) -> Answer + Send>;

struct Shop {
    script: Mutex<Script>,
    asked: Mutex<Vec<Asked>>,
}

/// The API server.
pub struct Api {
    shop: Arc<Shop>,
    pub folder: tempfile::TempDir,
    runtime: tokio::runtime::Runtime,
}

impl Api {
    /// Answers by `script`; what that was asked is written down.
    pub fn start(script: impl FnMut(&Asked) -> Answer + Send + 'static) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
        let shop = Arc::new(Shop { script: Mutex::new(Box::new(script)), asked: Mutex::default() });
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).expect("a port");
        let address = listener.local_addr().expect("an address");
        let router = Router::new().fallback(answer).with_state(Arc::clone(&shop));
        runtime.spawn(async move { axum::serve(listener, router).await });
        let folder = tempfile::tempdir().expect("a folder");
        fs::write(folder.path().join("token"), "first").expect("written");
        let kubeconfig = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": format!("http://{address}")}}],
            "users": [{"name": "test", "user": {"tokenFile": folder.path().join("token")}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test", "namespace": "tapio-system"}}],
        });
        fs::write(folder.path().join("kubeconfig"), kubeconfig.to_string()).expect("written");
        Self { shop, folder, runtime }
    }

    /// What a client is started with.
    pub fn kubeconfig(&self) -> PathBuf {
        self.folder.path().join("kubeconfig")
    }

    pub fn rotate_token(&self, token: &str) {
        fs::write(self.folder.path().join("token"), token).expect("written");
    }

    /// Requests so far whose path ends so.
    pub fn asked(&self, path_end: &str) -> Vec<Asked> {
        let asked = self.shop.asked.lock().expect("no panic");
        asked.iter().filter(|asked| asked.path.ends_with(path_end)).cloned().collect()
    }

    pub fn runtime(&self) -> &tokio::runtime::Runtime {
        &self.runtime
    }
}

async fn answer(State(shop): State<Arc<Shop>>, request: Request<Body>) -> Response {
    let (parts, body) = request.into_parts();
    let body = axum::body::to_bytes(body, 1 << 20).await.unwrap_or_default();
    let header =
        |name: &str| parts.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned();
    let query = parts.uri.query().unwrap_or_default().split('&').filter_map(|pair| pair.split_once('='));
    let asked = Asked {
        at: Instant::now(),
        method: parts.method.clone(),
        path: parts.uri.path().to_owned(),
        query: query.map(|(key, value)| (key.to_owned(), value.replace("%3D", "="))).collect(),
        authorization: header("authorization"),
        accept: header("accept"),
        body: serde_json::from_slice(&body).unwrap_or(Value::Null),
    };
    shop.asked.lock().expect("no panic").push(asked.clone());
    let answer = (shop.script.lock().expect("no panic"))(&asked);
    let response = Response::builder().header("content-type", "application/json");
    let response = match answer {
        Answer::Json(value) => response.status(StatusCode::OK).body(Body::from(value.to_string())),
        Answer::Refused(status, retry_after) => {
            let response = response.status(status);
            let response = match retry_after {
                Some(seconds) => response.header("retry-after", seconds),
                None => response,
            };
            let text = json!({"kind": "Status", "code": status, "status": "Failure", "reason": reason_of(status), "message": "refused"});
            response.body(Body::from(text.to_string()))
        }
        Answer::Lines(lines) => {
            let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
            response.body(Body::from(text))
        }
        Answer::Live(lines) => {
            let lines = tokio_stream::wrappers::UnboundedReceiverStream::new(lines);
            use futures::StreamExt;
            response.body(Body::from_stream(lines.map(Ok::<_, Infallible>)))
        }
        Answer::Silent => response.body(Body::from_stream(futures::stream::pending::<Result<Bytes, Infallible>>())),
    };
    response.expect("a response")
}

/// A Lease as an API server keeps it: a write must name the version that it replaces.
#[derive(Default)]
pub struct LeaseStore {
    pub lease: Mutex<Option<Value>>,
}

impl LeaseStore {
    pub fn answer(&self, asked: &Asked) -> Answer {
        let mut lease = self.lease.lock().expect("no panic");
        let version =
            |lease: &Value| lease["metadata"]["resourceVersion"].as_str().and_then(|text| text.parse::<u64>().ok());
        let held = lease.as_ref().and_then(version);
        match (&asked.method, held) {
            (&Method::GET, None) => Answer::Refused(404, None),
            (&Method::GET, Some(_)) => Answer::Json(lease.clone().expect("held")),
            (&Method::POST, Some(_)) => Answer::Refused(409, None),
            (&Method::PUT, Some(_)) if version(&asked.body) != held => Answer::Refused(409, None),
            _ => {
                let mut next = asked.body.clone();
                next["metadata"]["resourceVersion"] = json!((held.unwrap_or(0) + 1).to_string());
                *lease = Some(next.clone());
                Answer::Json(next)
            }
        }
    }
}

fn reason_of(status: u16) -> &'static str {
    match status {
        404 => "NotFound",
        409 => "Conflict",
        410 => "Expired",
        _ => "",
    }
}

/// Returns the moment this many seconds ago, as the API writes it.
pub fn ago(seconds: i64) -> String {
    let now = k8s_openapi::jiff::Timestamp::now();
    (now - k8s_openapi::jiff::SignedDuration::from_secs(seconds)).to_string()
}

pub fn list(version: u64, items: Vec<Value>) -> Answer {
    Answer::Json(json!({"kind": "List", "metadata": {"resourceVersion": version.to_string()}, "items": items}))
}

pub fn change(kind: &str, object: Value) -> Value {
    json!({"type": kind, "object": object})
}

/// The object, which must have nothing that its type in the newest API does not know.
pub fn checked<T: DeserializeOwned + Serialize>(object: Value) -> Value {
    let typed: T = serde_json::from_value(object.clone()).expect("an object of the API");
    let written = serde_json::to_value(typed).expect("written");
    assert_known(&object, &written, "");
    object
}

/// The types leave out what they do not know, and add what every object says of itself.
fn assert_known(object: &Value, written: &Value, path: &str) {
    match (object, written) {
        (Value::Object(fields), Value::Object(_)) => {
            for (name, value) in fields {
                assert_known(value, &written[name], &format!("{path}.{name}"));
            }
        }
        (Value::Array(items), Value::Array(known)) if items.len() == known.len() => {
            for (item, known) in items.iter().zip(known) {
                assert_known(item, known, path);
            }
        }
        // Times are written to the second.
        (Value::String(text), Value::String(known)) if known.ends_with('Z') && text.ends_with('Z') => {
            assert_eq!(text.get(..19), known.get(..19), "{path}");
        }
        _ => assert_eq!(object, written, "the API does not know {path}"),
    }
}
