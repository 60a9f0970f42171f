//! The HTTP side: `/healthz`, `/readyz`, `/metrics`, and what [`crate::api`] and [`crate::web`] add.

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};

use axum::Router;
use axum::extract::{ConnectInfo, State};
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use tapio_wire::program::http::{self, Bounds, Handshakes, OverTls};
use tapio_wire::program::tls::{ServerFiles, Watched};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tower::ServiceExt;

use crate::archive::ArchiveState;
use crate::correlate::Correlator;
use crate::metrics::Metrics;
use crate::vitals::Vitals;

struct HttpState {
    metrics: Arc<OnceLock<Metrics>>,
    archive: watch::Receiver<ArchiveState>,
    correlator: Arc<Correlator>,
    vitals: Arc<Vitals>,
    metrics_enabled: bool,
}

/// Why a server whose correlation has failed is not ready.
pub const CORRELATION_FAILED: &str =
    "correlation has failed: frames are archived, but nothing is found; restart the server";

/// What is served besides health and metrics: to whom in the clear, and to whom over TLS.
#[derive(Default)]
pub struct Routes {
    pub clear: Router,
    pub over_tls: Router,
    /// The certificate of gRPC, where there is one.
    pub tls: Option<Arc<Watched<ServerFiles>>>,
}

#[allow(clippy::too_many_arguments, reason = "each is a part of the server")]
/// Serves until `end` is set. The metrics may come later: a server that recovers a large archive is alive all the while.
pub async fn serve(
    listener: TcpListener,
    metrics: Arc<OnceLock<Metrics>>,
    archive: watch::Receiver<ArchiveState>,
    correlator: Arc<Correlator>,
    vitals: Arc<Vitals>,
    metrics_enabled: bool,
    more: Routes,
    end: watch::Receiver<bool>,
) {
    let router = Router::new()
        .route("/healthz", get(alive))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics_text))
        .with_state(Arc::new(HttpState { metrics, archive, correlator, vitals, metrics_enabled }));
    let (clear, over_tls) = (router.clone().merge(more.clear), router.merge(more.over_tls));
    let answer = move |mut request: http::Incoming, peer: SocketAddr| {
        request.extensions_mut().insert(ConnectInfo(peer));
        let is_tls = request.extensions().get::<OverTls>().is_some();
        if is_tls { over_tls.clone() } else { clear.clone() }.oneshot(request)
    };
    let handshakes = more.tls.map(|tls| -> Handshakes { Arc::new(move || http::over_http1(&tls.current())) });
    http::serve_with(listener, handshakes, Bounds::default(), answer, end).await;
}

/// What has ended before its time; `None` when everything lives.
fn dead(state: &HttpState) -> Option<String> {
    let mut ended = state.vitals.ended();
    if state.correlator.has_failed() && !ended.iter().any(|name| name == "finder") {
        ended.push("correlate".to_owned());
    }
    let names = ended.join(", ");
    (!ended.is_empty()).then(|| format!("ended before its time: {names}; restart the server, its log says why\n"))
}

async fn alive(State(state): State<Arc<HttpState>>) -> (StatusCode, String) {
    match dead(&state) {
        Some(dead) => (StatusCode::SERVICE_UNAVAILABLE, dead),
        None => (StatusCode::OK, "ok\n".into()),
    }
}

async fn ready(State(state): State<Arc<HttpState>>) -> (StatusCode, String) {
    let unready = |reason: &str| (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {reason}\n"));
    match &*state.archive.borrow() {
        ArchiveState::Ready if state.correlator.has_failed() => unready(CORRELATION_FAILED),
        ArchiveState::Ready => match dead(&state) {
            Some(dead) => unready(dead.trim_end()),
            None => {
                let remarks = state.vitals.remarks().into_iter().map(|remark| format!("{remark}\n"));
                (StatusCode::OK, std::iter::once("ready\n".to_owned()).chain(remarks).collect())
            }
        },
        ArchiveState::NotReady(reason) => unready(reason),
    }
}

async fn metrics_text(State(state): State<Arc<HttpState>>) -> impl IntoResponse {
    let plain = [(header::CONTENT_TYPE, "text/plain")];
    match state.metrics.get() {
        _ if !state.metrics_enabled => {
            (StatusCode::NOT_FOUND, plain, b"metrics.prometheus_enabled is false\n".to_vec())
        }
        Some(metrics) => (StatusCode::OK, [(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], metrics.render()),
        None => (StatusCode::SERVICE_UNAVAILABLE, plain, b"the archive is being opened\n".to_vec()),
    }
}
