//! The web page: findings for people with a browser, on the HTTP port beside the JSON API.
//!
//! What enters: requests of anyone who may connect and, where one is configured, brings the token. It comes as a bearer token or in
//! the cookie of [`login`]. What leaves: HTML that is whole without JavaScript, and Markdown. What must hold: every text of a
//! node is escaped, and no control character reaches a browser. Nothing runs or styles the page but the two files of [`assets`].
//! What is shown is computed where the API and `tapioctl` compute it.

mod assets;
mod commands;
mod curve;
mod event;
mod finding;
mod frame;
mod groups;
mod ledger;
mod live;
mod login;
mod markdown;
mod overview;
mod parts;
mod silences;
mod subject;
mod timeline;
mod unknown;

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use axum::Router;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use maud::Markup;
use tapio_wire::program::clock::now_ns;
use tapio_wire::service::{Event, ListFindingsRequest, StatusResponse, Unanswered};
use tonic::metadata::MetadataMap;

use crate::api;
use crate::auth::Auth;
use crate::events::Choice;
use crate::findings::{FindingStore, PatternSet};
use crate::query::{self, EventSource, Peers, StatusSource};
use crate::silences::Silences;

/// What the pages may load, and from where: nothing inline, nothing from elsewhere, in nobody's frame.
const POLICY: &str = "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; connect-src 'self'; \
                      form-action 'self'; base-uri 'none'; frame-ancestors 'none'";
/// Bytes of a form.
const FORM_BYTES_MAX: usize = 64 << 10;
/// Bytes of frames that one page reads of the archive at most, and how long it may wait for them.
const READ_BYTES_MAX: u64 = 1 << 30;
const READ_TIMEOUT: Duration = Duration::from_secs(5);
/// Pause between two attempts to read it while enough others do.
const READ_PAUSE: Duration = Duration::from_millis(50);

/// The status of this server, as soon as it has one: while the archive is being opened it has none.
pub type LateStatus = Arc<OnceLock<Arc<dyn StatusSource>>>;

/// What the pages show.
#[derive(Clone)]
pub struct Pages {
    pub store: Arc<FindingStore>,
    pub events: EventSource,
    pub peers: Option<Arc<Peers>>,
    pub patterns: Arc<PatternSet>,
    pub status: LateStatus,
    pub silences: Arc<Silences>,
}

/// The pages, for whoever may query.
pub fn router(pages: Pages, auth: Arc<Auth>) -> Router {
    let guarded = Router::new()
        .route("/", get(overview::page))
        .route("/f/{id}", get(finding::page))
        .route("/e/{id}", get(event::page))
        .route("/w/{namespace}/{*workload}", get(subject::workload))
        .route("/n/{node}", get(subject::node))
        .route("/f/{id}/acknowledge", post(silences::acknowledge))
        .route("/silences", get(silences::page).post(silences::add))
        .route("/silences/{id}/end", post(silences::end))
        .route("/ledger", get(ledger::page))
        .route("/live", get(live::changes))
        .with_state(pages)
        .layer(DefaultBodyLimit::max(FORM_BYTES_MAX))
        .layer(middleware::from_fn_with_state(Arc::clone(&auth), admit));
    let open = Router::new()
        .route("/login", get(login::form).post(login::submit))
        .route("/logout", post(login::leave))
        .with_state(auth)
        .layer(DefaultBodyLimit::max(FORM_BYTES_MAX))
        .merge(assets::router());
    guarded.merge(open).layer(middleware::map_response(secured))
}

/// What is served instead where the API is off.
pub fn router_off() -> Router {
    async fn off() -> Response {
        frame::message(StatusCode::FORBIDDEN, "The page is off", api::OFF).into_response()
    }
    Router::new().route("/", get(off)).merge(assets::router()).layer(middleware::map_response(secured))
}

/// What is served in the clear where the page is served over TLS: the way there. Nobody is to paste a token here.
pub fn router_to_tls() -> Router {
    async fn leads(request: Request) -> Response {
        let host = request.headers().get(header::HOST).and_then(|host| host.to_str().ok());
        let path = request.uri().path_and_query().map_or("/", |path| path.as_str());
        match (request.method(), host) {
            (&Method::GET | &Method::HEAD, Some(host)) => {
                axum::response::Redirect::temporary(&format!("https://{host}{path}")).into_response()
            }
            _ => frame::message(StatusCode::FORBIDDEN, "Not here", api::OFF).into_response(),
        }
    }
    Router::new().fallback(leads).layer(middleware::map_response(secured))
}

/// Takes the token out of the cookie where no other came, and asks whether it may query.
async fn admit(State(auth): State<Arc<Auth>>, mut request: Request, next: Next) -> Response {
    let is_form = !matches!(*request.method(), Method::GET | Method::HEAD);
    if is_form && login::is_of_another_site(request.headers()) {
        return frame::message(StatusCode::FORBIDDEN, "Not done", "another site sent this form").into_response();
    }
    let has_cookie = login::bear(&auth, request.headers_mut());
    // A form is not sent again after the login.
    let to = if is_form { None } else { request.uri().path_and_query() };
    let to = to.map_or("/silences", |path| path.as_str()).to_owned();
    api::guarded(&auth, request, next, |denied| {
        let (status, message) = api::denial(denied);
        login::refusal(status, &message, &to, has_cookie)
    })
    .await
}

/// Headers of every answer.
async fn secured(mut response: Response) -> Response {
    let headers = response.headers_mut();
    for (name, value) in [
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::X_FRAME_OPTIONS, "DENY"),
        // Nothing for others; with less a browser would not name the origin of our own forms.
        (header::REFERRER_POLICY, "same-origin"),
        (header::HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
        (header::HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    // Findings are nobody's to keep; the files of the program name themselves.
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    response
}

/// Why there is no page.
struct Failure {
    status: StatusCode,
    message: String,
}

impl Failure {
    fn usage(message: impl Into<String>) -> Self {
        Self { status: StatusCode::BAD_REQUEST, message: message.into() }
    }

    fn not_found(message: impl Into<String>) -> Self {
        Self { status: StatusCode::NOT_FOUND, message: message.into() }
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let title = match self.status {
            StatusCode::NOT_FOUND => "Not found",
            StatusCode::BAD_REQUEST => "This is not understood",
            _ => "This cannot be shown now",
        };
        frame::message(self.status, title, &self.message).into_response()
    }
}

type Page = Result<frame::Html, Failure>;

/// Events of the archive, and what is missing of them, for people.
#[derive(Default)]
struct Read {
    events: Vec<Event>,
    missing: Vec<String>,
}

impl Pages {
    /// Reads events within the bounds of a page. What nobody is called has none.
    async fn read(&self, choice: Choice, headers: &HeaderMap) -> Read {
        let choice = Choice { read_bytes_max: READ_BYTES_MAX, reads_remote: false, ..choice };
        let metadata = MetadataMap::from_headers(headers.clone());
        match tokio::time::timeout(READ_TIMEOUT, self.ask(choice, &metadata)).await {
            Ok(Ok(query::Told { events, incomplete, .. })) => {
                Read { events, missing: incomplete.iter().map(parts::unanswered).collect() }
            }
            Ok(Err(status)) if status.code() == tonic::Code::NotFound => Read::default(),
            Ok(Err(status)) => Read { events: Vec::new(), missing: vec![status.message().to_owned()] },
            Err(_) => {
                let late = format!("The archive was not read within {} s.", READ_TIMEOUT.as_secs());
                Read { events: Vec::new(), missing: vec![late] }
            }
        }
    }

    /// Asks again while others read the archive: few may at a time.
    async fn ask(&self, choice: Choice, metadata: &MetadataMap) -> Result<query::Told, tonic::Status> {
        loop {
            match query::events_of_all(&self.events, self.peers.as_deref(), choice.clone(), metadata).await {
                Err(status) if status.code() == tonic::Code::ResourceExhausted => {
                    tokio::time::sleep(READ_PAUSE).await;
                }
                answer => return answer,
            }
        }
    }

    /// Findings, with what is silenced marked.
    fn page(&self, request: &ListFindingsRequest, limit: usize) -> Result<query::Page, String> {
        let mut page = query::page(&self.store, request, limit)?;
        page.findings.iter_mut().for_each(|finding| *finding = self.silences.marked(Arc::clone(finding)));
        Ok(page)
    }

    /// Servers that are missing in what is found.
    fn unheard(&self) -> Vec<Unanswered> {
        query::unheard(self.peers.as_deref(), &self.store)
    }

    /// The status of all servers; [`None`] while this one starts.
    async fn status(&self, headers: &HeaderMap) -> Option<StatusResponse> {
        let mut status = self.status.get()?.status();
        if let Some(peers) = &self.peers {
            peers.complete(&mut status, &MetadataMap::from_headers(headers.clone())).await;
        } else {
            status.incomplete = self.unheard();
        }
        Some(status)
    }
}

/// Nothing, where an [`Option`] has nothing.
fn or_nothing<T>(value: Option<T>, show: impl FnOnce(T) -> Markup) -> Markup {
    value.map(show).unwrap_or_default()
}
