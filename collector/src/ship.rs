//! Shipping: one stream to one server, opened again for as long as there is something to say.
//!
//! What enters: frames from the outbox, acks from the server. What leaves: frames. What must hold: what is in flight stays
//! within the server's credit; after a break everything unacknowledged is sent again, in order; reconnects are spread by
//! jitter, so that a thousand collectors do not return in the same moment.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tapio_wire::frame::VERSION;
use tapio_wire::limits::{MESSAGE_BYTES_MAX, NEWEST_EPOCH_KEY};
use tapio_wire::service::ingest_client::IngestClient;
use tapio_wire::service::{Hello, ShipRequest, ShipResponse, ship_request, ship_response};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Status, Streaming};

use crate::latency::{Latencies, boottime_ns};
use crate::outbox::Outbox;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const WELCOME_TIMEOUT: Duration = Duration::from_secs(10);
/// A peer that does not answer a ping is given up on after both: within 20 s.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);
const BACKOFF_MIN: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(5);
const WINDOW_BYTES: u32 = 16 << 20;
/// Frames handed to the transport and not yet taken by it.
const HANDED_MAX: usize = 16;

/// What is known about the stream, for `/readyz` and metrics.
#[derive(Default)]
pub struct ShipState {
    pub is_connected: AtomicBool,
    pub streams: AtomicU64,
    pub failures: AtomicU64,
    pub frames_sent: AtomicU64,
    pub acked_seq: AtomicU64,
    pub credit_bytes: AtomicU64,
}

/// Why a stream ended.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error("cannot reach the server: {}", with_causes(.0))]
    Connect(#[from] tonic::transport::Error),
    #[error("the server ended the stream: {} ({:?})", .0.message(), .0.code())]
    Status(#[from] Status),
    #[error("the server did not answer in time")]
    Silent,
    #[error("the server closed the stream")]
    Closed,
    #[error("the server does not speak the protocol: {0}")]
    Protocol(&'static str),
}

/// The newest epoch that the server knows of this node, when it refused ours as older.
fn newest_epoch(status: &Status) -> Option<u64> {
    status.metadata().get(NEWEST_EPOCH_KEY)?.to_str().ok()?.parse().ok()
}

fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// See the module.
pub struct Shipper {
    pub endpoints: Vec<Uri>,
    pub node_name: String,
    pub outbox: Arc<Outbox>,
    pub latencies: Arc<Latencies>,
    pub state: Arc<ShipState>,
    /// Counts streams: sources describe every entity again on a new one.
    pub generation: Arc<AtomicU64>,
    pub reconnect: bool,
}

impl Shipper {
    /// Ships until the epoch's last frame is acknowledged, or `give_up` says to stop.
    pub async fn run(self, mut give_up: watch::Receiver<bool>) {
        let mut jitter = Jitter::new();
        let mut attempt = 0u32;
        let mut endpoint = 0;
        while !*give_up.borrow() && !self.outbox.is_done() {
            let uri = self.endpoints[endpoint % self.endpoints.len()].clone();
            let acked_before = self.state.acked_seq.load(Ordering::Relaxed);
            let mut was_welcome = false;
            let outcome = tokio::select! {
                outcome = self.stream(&uri, &mut was_welcome) => outcome,
                _ = give_up.wait_for(|give_up| *give_up) => break,
            };
            self.state.is_connected.store(false, Ordering::Relaxed);
            let Err(error) = outcome else { break };
            self.state.failures.fetch_add(1, Ordering::Relaxed);
            if let Broken::Status(status) = &error
                && let Some(newest) = newest_epoch(status)
                && self.outbox.outdo_epoch(newest)
            {
                tracing::warn!(
                    newest,
                    epoch = self.outbox.epoch(),
                    "the clock went back since the last run: a newer epoch"
                );
            }
            if !was_welcome {
                endpoint += 1;
            }
            let has_progressed = self.state.acked_seq.load(Ordering::Relaxed) > acked_before;
            attempt = if has_progressed { 0 } else { attempt.saturating_add(1) };
            let pause = jitter.spread(BACKOFF_MIN.saturating_mul(1 << attempt.min(8)).min(BACKOFF_MAX));
            if attempt <= 1 || attempt.is_power_of_two() {
                tracing::warn!(server = %uri, %error, attempt, retry_in_ms = pause.as_millis() as u64, "no stream");
            }
            if !self.reconnect {
                tracing::error!("grpc.reconnect_enabled is false: nothing more will be sent");
                break;
            }
            // A back-off, not a wait for a condition; giving up ends it.
            if tokio::time::timeout(pause, give_up.wait_for(|give_up| *give_up)).await.is_ok() {
                break;
            }
        }
        self.state.is_connected.store(false, Ordering::Relaxed);
    }

    async fn stream(&self, uri: &Uri, was_welcome: &mut bool) -> Result<(), Broken> {
        let channel: Channel = Endpoint::from(uri.clone())
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT)
            .keep_alive_while_idle(true)
            .initial_stream_window_size(WINDOW_BYTES)
            .initial_connection_window_size(WINDOW_BYTES)
            .connect()
            .await?;
        let mut client = IngestClient::new(channel)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        let (requests, receiver) = mpsc::channel(HANDED_MAX);
        let (acked_seq, acked_events) = self.outbox.acknowledged();
        let hello = Hello {
            version: u32::from(VERSION),
            node: self.node_name.clone(),
            node_id: self.outbox.node(),
            epoch: self.outbox.epoch(),
            revision: env!("CARGO_PKG_VERSION").into(),
            acked_seq,
            acked_events: acked_events.to_vec(),
        };
        let hello = ShipRequest { kind: Some(ship_request::Kind::Hello(hello)) };
        requests.try_send(hello).map_err(|_| Broken::Closed)?;
        let opened = tokio::time::timeout(WELCOME_TIMEOUT, client.ship(ReceiverStream::new(receiver)));
        let mut responses = opened.await.map_err(|_| Broken::Silent)??.into_inner();
        let first = tokio::time::timeout(WELCOME_TIMEOUT, responses.message()).await;
        let first = first.map_err(|_| Broken::Silent)??.ok_or(Broken::Closed)?;
        let Some(ship_response::Kind::Welcome(welcome)) = first.kind else {
            return Err(Broken::Protocol("its first message was no welcome"));
        };
        *was_welcome = true;
        self.acknowledge(welcome.durable_seq);
        self.outbox.restart(welcome.durable_seq);
        self.generation.fetch_add(1, Ordering::Relaxed);
        self.state.streams.fetch_add(1, Ordering::Relaxed);
        self.state.credit_bytes.store(welcome.credit_bytes, Ordering::Relaxed);
        self.state.is_connected.store(true, Ordering::Relaxed);
        tracing::info!(server = %uri, durable_seq = welcome.durable_seq, "streaming");
        self.pump(&requests, &mut responses, welcome.credit_bytes).await
    }

    async fn pump(
        &self,
        requests: &mpsc::Sender<ShipRequest>,
        responses: &mut Streaming<ShipResponse>,
        mut credit_bytes: u64,
    ) -> Result<(), Broken> {
        let mut may_send = true;
        while !self.outbox.is_done() {
            tokio::select! {
                response = responses.message() => {
                    let Some(ship_response::Kind::Ack(ack)) = response?.ok_or(Broken::Closed)?.kind else {
                        return Err(Broken::Protocol("it sent something else than an ack"));
                    };
                    credit_bytes = ack.credit_bytes;
                    self.state.credit_bytes.store(credit_bytes, Ordering::Relaxed);
                    self.acknowledge(ack.durable_seq);
                    may_send = true;
                }
                permit = requests.reserve(), if may_send => {
                    let permit = permit.map_err(|_| Broken::Closed)?;
                    match self.outbox.next(credit_bytes) {
                        Some(frame) => {
                            permit.send(ShipRequest { kind: Some(ship_request::Kind::Frame(frame)) });
                            self.state.frames_sent.fetch_add(1, Ordering::Relaxed);
                        }
                        None => may_send = false,
                    }
                }
                () = self.outbox.changed.notified(), if !may_send => may_send = true,
            }
        }
        Ok(())
    }

    fn acknowledge(&self, durable_seq: u64) {
        let now_ns = boottime_ns();
        for acknowledged in self.outbox.acknowledge(durable_seq) {
            self.latencies.record(&acknowledged.times, acknowledged.sent_ns, now_ns);
        }
        self.state.acked_seq.fetch_max(durable_seq, Ordering::Relaxed);
    }
}

/// A small generator for back-off times; it need not be unpredictable, only different on each node.
struct Jitter(u64);

impl Jitter {
    fn new() -> Self {
        Self(crate::latency::realtime_ns() ^ u64::from(std::process::id()).rotate_left(32) | 1)
    }

    /// Between half of `pause` and one and a half.
    fn spread(&mut self, pause: Duration) -> Duration {
        // xorshift64 (Marsaglia 2003).
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        pause.mul_f64(0.5 + (self.0 >> 11) as f64 / (1u64 << 53) as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jitter_stays_within_its_bounds_and_varies() {
        let mut jitter = Jitter::new();
        let pauses: Vec<Duration> = (0..100).map(|_| jitter.spread(Duration::from_secs(1))).collect();
        assert!(pauses.iter().all(|pause| (0.5..1.5).contains(&pause.as_secs_f64())));
        assert!(pauses.iter().any(|pause| *pause != pauses[0]));
    }
}
