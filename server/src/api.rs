//! The JSON API over HTTP: findings, and events out of the archive.
//!
//! What enters: requests of anyone who may connect and, where one is configured, brings the token. What leaves: JSON; errors are
//! `{"error": …}` and say what to do. What must hold: pages, streams and readers are bounded, as in [`crate::query`]. Without the
//! token nothing is returned, not even which paths exist.

mod silences;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use axum::body::{Body, Bytes};
use axum::extract::rejection::QueryRejection;
use axum::extract::{ConnectInfo, DefaultBodyLimit, Path, Query, Request, State};
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::sse::{KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, delete, get, post};
use axum::{Json, Router};
use serde::Deserialize;
use serde_json::{Value, json};
use tapio_wire::program::clock::now_ns;
use tapio_wire::service::ListFindingsRequest;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt, once};

use crate::auth::{Auth, Denied, Purpose, Record, Shown};
use crate::events::{self, Choice, EventsError};
use crate::findings::{FindingStore, LookupError};
use crate::query::{self, EventSource, Peers, Refused};
use crate::render;
use crate::silences::Silences;

/// Bytes of a request's body.
const BODY_BYTES_MAX: usize = 64 << 10;

#[derive(Clone)]
struct Api {
    store: Arc<FindingStore>,
    events: EventSource,
    peers: Option<Arc<Peers>>,
    silences: Arc<Silences>,
}

/// `/api/v1/…`, for whoever may query, or silence; with what other servers have.
pub fn router(
    store: Arc<FindingStore>,
    events: EventSource,
    peers: Option<Arc<Peers>>,
    silences: Arc<Silences>,
    auth: Arc<Auth>,
) -> Router {
    Router::new()
        .route("/api/v1/findings", get(findings))
        .route("/api/v1/findings/watch", get(watch))
        .route("/api/v1/findings/{id}", get(finding))
        .route("/api/v1/findings/{id}/acknowledge", post(silences::acknowledge))
        .route("/api/v1/silences", get(silences::list).post(silences::add))
        .route("/api/v1/silences/{id}", delete(silences::end))
        .route("/api/v1/events", get(list_events))
        .route("/api/{*rest}", get(unknown))
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(Api { store, events, peers, silences })
        .layer(middleware::from_fn_with_state(auth, admit))
}

/// What is served instead when the API is off.
pub fn router_off() -> Router {
    Router::new().route("/api/{*rest}", any(off))
}

/// Why nothing is served when it is off.
pub(crate) const OFF: &str = "this server asks for TLS or a token and HTTP is in the clear: use https:// where it has a \
                              certificate, or tapioctl on the gRPC port; or set metrics.api: true";

async fn off() -> Failure {
    Failure { status: StatusCode::FORBIDDEN, message: OFF.into() }
}

async fn admit(State(auth): State<Arc<Auth>>, request: Request, next: Next) -> Response {
    guarded(&auth, request, next, refusal).await
}

/// Lets a request go on if its token may query, and writes it to the audit log.
pub(crate) async fn guarded(
    auth: &Auth,
    mut request: Request,
    next: Next,
    refuse: impl FnOnce(&Denied) -> Response,
) -> Response {
    let began = Instant::now();
    let call = format!("{} {}", request.method(), request.uri());
    let peer = request.extensions().get::<ConnectInfo<SocketAddr>>().map(|peer| peer.0);
    let authorization = request.headers().get(header::AUTHORIZATION).cloned();
    let shown = Shown { authorization: authorization.as_ref().map(|value| value.as_bytes()), certificate: None, peer };
    let purpose = match *request.method() {
        Method::GET | Method::HEAD => Purpose::Query,
        _ => Purpose::Silence,
    };
    let admitted = auth.admit(purpose, shown).await;
    let is_denied = admitted.is_err();
    let (identity, response) = match admitted {
        Ok(caller) => {
            request.extensions_mut().insert(Arc::new(caller.clone()));
            (caller.identity, next.run(request).await)
        }
        Err(denied) => (String::new(), refuse(&denied)),
    };
    let status = response.status();
    auth.audit().record(&Record {
        purpose,
        call: &call,
        peer,
        identity: &identity,
        asked_by: "",
        outcome: if status.is_success() || status.is_redirection() { "ok" } else { status.as_str() },
        is_denied,
        took: began.elapsed(),
    });
    response
}

/// What a request is answered with that was not let in.
pub(crate) fn denial(denied: &Denied) -> (StatusCode, String) {
    let message = match denied {
        Denied::WrongToken => "the token is missing or wrong: send authorization: Bearer and the content of \
                               server.auth.token_file"
            .into(),
        Denied::NoToken { audience } => {
            format!("the token is missing: send authorization: Bearer and a token for the audience `{audience}`")
        }
        denied => denied.to_string(),
    };
    let status = match denied {
        Denied::WrongToken | Denied::NoToken { .. } | Denied::Refused { .. } => StatusCode::UNAUTHORIZED,
        Denied::NotAllowed { .. } | Denied::NoNode(_) => StatusCode::FORBIDDEN,
        Denied::Unreviewed(_) => StatusCode::SERVICE_UNAVAILABLE,
    };
    (status, message)
}

fn refusal(denied: &Denied) -> Response {
    let (status, message) = denial(denied);
    let failure = Failure { status, message };
    match status {
        StatusCode::UNAUTHORIZED => ([(header::WWW_AUTHENTICATE, "Bearer")], failure).into_response(),
        _ => failure.into_response(),
    }
}

struct Failure {
    status: StatusCode,
    message: String,
}

impl Failure {
    fn usage(message: impl Into<String>) -> Self {
        Self { status: StatusCode::BAD_REQUEST, message: message.into() }
    }
}

impl Failure {
    fn of_status(status: tonic::Status) -> Self {
        let code = match status.code() {
            tonic::Code::ResourceExhausted => StatusCode::TOO_MANY_REQUESTS,
            tonic::Code::NotFound => StatusCode::NOT_FOUND,
            tonic::Code::InvalidArgument => StatusCode::BAD_REQUEST,
            tonic::Code::Aborted => StatusCode::SERVICE_UNAVAILABLE,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self { status: code, message: status.message().to_owned() }
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        (self.status, Json(json!({ "error": self.message }))).into_response()
    }
}

impl From<QueryRejection> for Failure {
    fn from(rejection: QueryRejection) -> Self {
        Self::usage(rejection.body_text())
    }
}

impl From<Refused> for Failure {
    fn from(refused: Refused) -> Self {
        let status = match &refused {
            Refused::Busy => StatusCode::TOO_MANY_REQUESTS,
            Refused::Events(EventsError::Read(_)) => StatusCode::INTERNAL_SERVER_ERROR,
            Refused::Events(_) => StatusCode::NOT_FOUND,
        };
        Self { status, message: refused.to_string() }
    }
}

fn moment(text: Option<&str>) -> Result<Option<u64>, Failure> {
    let now = now_ns();
    text.map(|text| render::parse_since(text, now)).transpose().map_err(Failure::usage)
}

/// A filter's text. One that is there must say something: empty, it would choose everything.
fn filter(name: &str, given: Option<String>) -> Result<String, Failure> {
    match given {
        Some(text) if text.is_empty() => {
            Err(Failure::usage(format!("{name} is empty: give it a value, or leave it out")))
        }
        given => Ok(given.unwrap_or_default()),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
#[derive(Default)]
struct FindingsQuery {
    since: Option<String>,
    limit: Option<u32>,
    page_token: String,
    severity: Option<String>,
    pattern: Option<String>,
    pod: Option<String>,
    namespace: Option<String>,
    node: Option<String>,
    workload: Option<String>,
}

async fn findings(
    State(api): State<Api>,
    wanted: Result<Query<FindingsQuery>, QueryRejection>,
) -> Result<Json<Value>, Failure> {
    let Query(wanted) = wanted?;
    let request = ListFindingsRequest {
        since_ns: moment(wanted.since.as_deref())?.unwrap_or(0),
        limit: match wanted.limit {
            Some(0) => return Err(Failure::usage("limit 0 asks for nothing: it is from 1 to 1000")),
            limit => limit.unwrap_or(0),
        },
        page_token: wanted.page_token,
        severity: filter("severity", wanted.severity)?,
        pattern: filter("pattern", wanted.pattern)?,
        pod: filter("pod", wanted.pod)?,
        namespace: filter("namespace", wanted.namespace)?,
        node: filter("node", wanted.node)?,
        workload: filter("workload", wanted.workload)?,
    };
    let mut page = query::list(&api.store, &request).map_err(Failure::usage)?;
    page.findings.iter_mut().for_each(|finding| api.silences.mark(finding));
    Ok(Json(json!({
        "findings": page.findings.iter().map(render::finding_value).collect::<Vec<_>>(),
        "next_page_token": page.next_page_token,
        "incomplete": render::incomplete_value(&query::unheard(api.peers.as_deref(), &api.store)),
    })))
}

async fn finding(State(api): State<Api>, Path(id): Path<String>) -> Result<Json<Value>, Failure> {
    match api.store.get(&id) {
        Ok(finding) => Ok(Json(render::finding_value(&api.silences.marked(finding)))),
        Err(error @ LookupError::NotFound(_)) => Err(Failure {
            status: StatusCode::NOT_FOUND,
            message: format!("{error}: GET /api/v1/findings lists those that there are"),
        }),
        Err(error @ LookupError::Ambiguous { .. }) => Err(Failure::usage(error.to_string())),
    }
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct WatchQuery {
    since: Option<String>,
}

type Changes = Box<dyn Stream<Item = Result<axum::response::sse::Event, Infallible>> + Send + Unpin>;

/// Every finding when it is published and when it changes. An event's id lets a client that was cut off go on.
async fn watch(
    State(api): State<Api>,
    headers: HeaderMap,
    wanted: Result<Query<WatchQuery>, QueryRejection>,
) -> Result<Sse<axum::response::sse::KeepAliveStream<Changes>>, Failure> {
    let Query(wanted) = wanted?;
    let since_ns = moment(wanted.since.as_deref())?.unwrap_or(0);
    let had_ns = match headers.get("last-event-id").map(|id| id.to_str().ok().and_then(|id| id.parse().ok())) {
        Some(None) => return Err(Failure::usage("Last-Event-ID is no id of this stream: leave it out")),
        Some(had_ns) => had_ns,
        None => None,
    };
    let (sender, receiver) = mpsc::channel(query::WATCHER_QUEUE);
    tokio::spawn(query::watch(Arc::clone(&api.store), since_ns, had_ns, sender));
    let events = ReceiverStream::new(receiver).filter_map(Result::ok).map(move |mut finding| {
        api.silences.mark(&mut finding);
        let event = axum::response::sse::Event::default().event("finding").id(finding.published_ns.to_string());
        Ok(event.data(render::finding_json(&finding)))
    });
    let events: Changes = Box::new(events);
    Ok(Sse::new(events).keep_alive(KeepAlive::default()))
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct EventsQuery {
    since: Option<String>,
    until: Option<String>,
    node: Option<String>,
    namespace: Option<String>,
    pod: Option<String>,
    workload: Option<String>,
    entity: Option<String>,
    kind: Option<String>,
    limit: Option<u32>,
    newest: bool,
}

/// JSON lines: events, and a last line that says whether a bound cut them short, or what went wrong.
async fn list_events(
    State(api): State<Api>,
    headers: HeaderMap,
    wanted: Result<Query<EventsQuery>, QueryRejection>,
) -> Result<Response, Failure> {
    let Query(wanted) = wanted?;
    let limit = wanted.limit.unwrap_or(events::EVENTS_DEFAULT);
    let limit = events::within_limit(limit, wanted.newest).map_err(Failure::usage)?;
    let choice = Choice {
        since_ns: moment(wanted.since.as_deref())?.unwrap_or(0),
        until_ns: moment(wanted.until.as_deref())?,
        node: filter("node", wanted.node)?,
        namespace: filter("namespace", wanted.namespace)?,
        pod: filter("pod", wanted.pod)?,
        workload: filter("workload", wanted.workload)?,
        entity: filter("entity", wanted.entity)?,
        kinds: events::kinds_named(wanted.kind.as_deref()).map_err(Failure::usage)?,
        limit,
        newest: wanted.newest,
        read_bytes_max: events::READ_BYTES_MAX,
        reads_remote: true,
        tells_remote: true,
    };
    if api.peers.is_some() {
        let metadata = tonic::metadata::MetadataMap::from_headers(headers);
        let asked = query::events_of_all(&api.events, api.peers.as_deref(), choice, &metadata);
        let query::Told { events, incomplete, remote } = asked.await.map_err(Failure::of_status)?;
        let end = json!({ "end": {
            "events": events.len(),
            "cut": events.len() as u64 >= limit,
            "incomplete": render::incomplete_value(&incomplete),
            "remote": remote.as_ref().map(render::remote_value),
        } });
        let lines = events.iter().map(render::event_value).chain([end]).map(|line| format!("{line}\n"));
        return Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], lines.collect::<String>()).into_response());
    }
    let unheard = query::unheard(None, &api.store);
    let (mut receiver, ended) = api.events.stream(choice)?;
    // Nothing is answered before the first event, so that a wrong name is an error and not an empty list.
    let first = match receiver.recv().await {
        Some(Ok(event)) => Some(Ok(event)),
        Some(Err(refused)) => return Err(refused.into()),
        None => None,
    };
    // What is missing is in the last line.
    let events = tokio_stream::iter(first).chain(ReceiverStream::new(receiver)).filter_map(|event| match event {
        Ok(event) => (!event.id.is_empty()).then(|| render::event_value(&event)),
        Err(refused) => Some(json!({ "error": refused.to_string() })),
    });
    let end = once(()).map(move |()| {
        let outcome = ended.lock().unwrap_or_else(PoisonError::into_inner).take().unwrap_or_default();
        let incomplete: Vec<_> = outcome.incomplete().into_iter().chain(unheard.iter().cloned()).collect();
        json!({ "end": {
            "events": outcome.events,
            "cut": outcome.is_cut,
            "incomplete": render::incomplete_value(&incomplete),
            "bytes_read": outcome.effort.bytes,
            "blocks_skipped": outcome.effort.blocks_skipped,
            "segments_skipped": outcome.effort.segments_skipped,
            "remote": outcome.remote.map(|read| render::remote_value(&read.into())),
        } })
    });
    let lines = events.chain(end).map(|line| Ok::<_, Infallible>(Bytes::from(format!("{line}\n"))));
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response())
}

async fn unknown() -> Failure {
    Failure {
        status: StatusCode::NOT_FOUND,
        message: "there are /api/v1/findings, /api/v1/findings/{id}, /api/v1/findings/watch, /api/v1/events and /api/v1/silences".into(),
    }
}
