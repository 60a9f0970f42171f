//! The HTTP side: `/healthz`, `/readyz`, `/metrics` and `/latency`.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::Json;
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use serde::Serialize;
use tapio_wire::program::http::{self, Bounds};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tower::ServiceExt;

use crate::base::metrics::Metrics;
use crate::base::status::{Alive, Running, SourceState};
use crate::budget::governed::Governed;
use crate::outbox::pack::PackCounts;
use crate::ship::latency::{Counts, Latencies};
use crate::ship::state::ShipState;

/// What the endpoints report, and where it comes from.
pub struct Health {
    pub metrics: Metrics,
    pub ship: Arc<ShipState>,
    pub governed: Arc<Governed>,
    pub latencies: Arc<Latencies>,
    pub pack: Arc<PackCounts>,
    pub sources: Vec<SourceState>,
    pub packer: Alive,
    pub running: Running,
    /// While it is true, what has ended has done so on purpose.
    pub stopping: watch::Receiver<bool>,
    pub metrics_enabled: bool,
}

#[derive(Serialize)]
struct Readiness<'a> {
    ready: bool,
    connected: bool,
    packing: bool,
    /// The server of the stream, or of the last one.
    server: String,
    /// Why there is no stream, and what to look at; empty while there is one.
    no_stream: String,
    cpu_budget: Budget,
    /// `running`, or why not, by source.
    sources: BTreeMap<&'a str, String>,
}

/// What the governor does.
#[derive(Serialize)]
struct Budget {
    /// Thousandths of a core; 0 for no limit.
    limit_milli: u64,
    used_milli: u64,
    /// True if it includes the probes' time in the kernel, which cannot be measured everywhere.
    includes_probes: bool,
    keeps_one_bulk_event_in: u32,
}

#[derive(Serialize)]
struct Latency {
    /// `[value, count]` pairs of an HDR histogram: from an event's time to its durable acknowledgement.
    event_to_ack_us: Counts,
    /// Latencies from a frame's first sending to its acknowledgement.
    frame_to_ack_us: Counts,
    frames: u64,
    bytes_raw: u64,
    bytes_wire: u64,
}

/// Binds the address, so that a port in use is an error at the start.
///
/// # Errors
/// What binding says.
pub async fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    TcpListener::bind(address).await
}

/// Serves until `end` changes.
pub async fn serve(listener: TcpListener, health: Health, end: watch::Receiver<bool>) {
    let router = Router::new()
        .route("/healthz", get(healthy))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics_text))
        .route("/latency", get(latency))
        .with_state(Arc::new(health));
    let answer = move |request: http::Incoming, _: SocketAddr| router.clone().oneshot(request);
    // Kubelet, Prometheus and a person; a collector has little memory to hold more.
    let bounds = Bounds { connections_max: 128, connections_max_of_peer: 32, ..Bounds::default() };
    http::serve(listener, bounds, answer, end).await;
}

/// Whether everything that should run does: what has ended does not come back by itself, a restart of the process brings it.
async fn healthy(State(shared): State<Arc<Health>>) -> (StatusCode, String) {
    let is_stopping = *shared.stopping.borrow();
    health(&shared.running.ended(), is_stopping)
}

fn health(ended: &[&str], is_stopping: bool) -> (StatusCode, String) {
    if ended.is_empty() || is_stopping {
        return (StatusCode::OK, "ok\n".into());
    }
    let ended = ended.join(", ");
    (
        StatusCode::SERVICE_UNAVAILABLE,
        format!("ended: {ended}; the log says why, and a restart of the collector brings it back\n"),
    )
}

async fn ready(State(shared): State<Arc<Health>>) -> impl IntoResponse {
    let connected = shared.ship.is_connected.load(Ordering::Relaxed);
    // A source that was off from the start was left out on purpose; one that has ended is a failure.
    let started = || shared.sources.iter().filter(|source| source.off.is_none());
    let packing = shared.packer.get();
    let ready = connected && packing && started().count() > 0 && started().all(|source| source.alive.get());
    let governed = &shared.governed;
    let cpu_budget = Budget {
        limit_milli: governed.budget_milli,
        used_milli: governed.used_milli.load(Ordering::Relaxed),
        includes_probes: governed.is_kernel_measured.load(Ordering::Relaxed),
        keeps_one_bulk_event_in: governed.sampling(),
    };
    let server = shared.ship.server();
    let no_stream = shared.ship.trouble().unwrap_or_default();
    let sources = shared.sources.iter().map(|source| (source.source, source.text())).collect();
    let code = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (code, Json(serde_json::json!(Readiness { ready, connected, packing, server, no_stream, cpu_budget, sources })))
}

async fn metrics_text(State(shared): State<Arc<Health>>) -> impl IntoResponse {
    if shared.metrics_enabled {
        let kind = [(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)];
        (StatusCode::OK, kind, shared.metrics.render())
    } else {
        let kind = [(header::CONTENT_TYPE, "text/plain")];
        (StatusCode::NOT_FOUND, kind, b"health.metrics_enabled is false\n".to_vec())
    }
}

async fn latency(State(shared): State<Arc<Health>>) -> impl IntoResponse {
    let (event_to_ack_us, frame_to_ack_us) = shared.latencies.counts();
    let pack = &shared.pack;
    Json(Latency {
        event_to_ack_us,
        frame_to_ack_us,
        frames: pack.frames.load(Ordering::Relaxed),
        bytes_raw: pack.raw_bytes.load(Ordering::Relaxed),
        bytes_wire: pack.wire_bytes.load(Ordering::Relaxed),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::status::Status;

    #[test]
    fn health_names_tasks_that_ended_but_not_finished_ones() {
        let begun = || {
            let alive = Alive::default();
            let guard = alive.begin();
            (alive, guard)
        };
        let state = |source, off, alive| SourceState { source, off, alive, status: Status::default() };
        let (packer, _packing) = begun();
        let (shipping, shipper) = begun();
        let (ebpf, source) = begun();
        let sources = [state("ebpf", None, ebpf), state("systemd", Some("no bus".into()), Alive::default())];
        let running = Running::of(&sources, vec![("ship", shipping)], &packer);
        let ask = |is_stopping| health(&running.ended(), is_stopping);
        assert_eq!(ask(false), (StatusCode::OK, "ok\n".into()));
        shipper.finished();
        assert_eq!(ask(false).0, StatusCode::OK, "as with grpc.reconnect_enabled: false");
        drop(source);
        let (status, text) = ask(false);
        assert!(status == StatusCode::SERVICE_UNAVAILABLE && text.starts_with("ended: ebpf;"), "{text}");
        assert_eq!(ask(true).0, StatusCode::OK, "on purpose");
    }
}
