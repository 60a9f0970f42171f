//! The HTTP side: `/healthz`, `/readyz`, `/metrics`, and what [`crate::api`] adds.

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::archive::ArchiveState;
use crate::correlate::Correlator;
use crate::metrics::Metrics;

struct Shared {
    metrics: Arc<OnceLock<Metrics>>,
    archive: watch::Receiver<ArchiveState>,
    correlator: Arc<Correlator>,
    metrics_enabled: bool,
}

/// Why a server whose correlation has failed is not ready.
pub const CORRELATION_FAILED: &str =
    "correlation has failed: frames are archived, but nothing is found; restart the server";

/// Serves until `end` is set. The metrics may come later: a server that recovers a large archive is alive all the while.
pub async fn serve(
    listener: TcpListener,
    metrics: Arc<OnceLock<Metrics>>,
    archive: watch::Receiver<ArchiveState>,
    correlator: Arc<Correlator>,
    metrics_enabled: bool,
    api: Router,
    mut end: watch::Receiver<bool>,
) {
    let router = Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics_text))
        .with_state(Arc::new(Shared { metrics, archive, correlator, metrics_enabled }))
        .merge(api);
    let router = router.into_make_service_with_connect_info::<SocketAddr>();
    let served = axum::serve(listener, router).with_graceful_shutdown(async move {
        // An error means that the other side is gone, which is an end too.
        let _ = end.wait_for(|end| *end).await;
    });
    if let Err(error) = served.await {
        tracing::error!(%error, "the HTTP server ended");
    }
}

async fn ready(State(shared): State<Arc<Shared>>) -> (StatusCode, String) {
    match &*shared.archive.borrow() {
        ArchiveState::Ready if shared.correlator.has_failed() => {
            (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {CORRELATION_FAILED}\n"))
        }
        ArchiveState::Ready => (StatusCode::OK, "ready\n".into()),
        ArchiveState::NotReady(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {reason}\n")),
    }
}

async fn metrics_text(State(shared): State<Arc<Shared>>) -> impl IntoResponse {
    let plain = [(header::CONTENT_TYPE, "text/plain")];
    match shared.metrics.get() {
        _ if !shared.metrics_enabled => {
            (StatusCode::NOT_FOUND, plain, b"metrics.prometheus_enabled is false\n".to_vec())
        }
        Some(metrics) => (StatusCode::OK, [(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], metrics.render()),
        None => (StatusCode::SERVICE_UNAVAILABLE, plain, b"the archive is being opened\n".to_vec()),
    }
}
