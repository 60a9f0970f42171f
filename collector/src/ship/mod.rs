//! Shipping: one stream to one server, opened again for as long as there is something to say.
//!
//! What enters: frames from the outboxes, acks from the server. What leaves: frames. What must hold: what is in flight
//! stays within the server's credit. After a break everything unacknowledged is sent again, in order, to the same
//! server or to the next. A stream moves to the preferred server only after that one has answered and nothing is in
//! flight. A frame that no server will ever take ends its epoch, and does not block those behind it
//! (`outbox/ending.rs`). Jitter spreads reconnects and moves, so that a thousand collectors do not return in the same
//! moment. A server that refuses this collector is asked rarely, since only a person can change that.

mod broken;
pub mod endpoints;
pub mod latency;
pub mod state;

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tapio_wire::frame::VERSION;
use tapio_wire::limits::MESSAGE_BYTES_MAX;
use tapio_wire::program::tls::{ClientFiles, Watched};
use tapio_wire::program::token::TokenFile;
use tapio_wire::program::{backoff, dial};
use tapio_wire::service::ingest_client::IngestClient;
use tapio_wire::service::{
    Hello, ShipRequest, ShipResponse, SourceOff, Watching, Welcome, ship_request, ship_response,
};
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Request, Streaming};

use self::broken::{Broken, newest_epoch};
use crate::base::clock::boottime_ns;
use crate::base::status::SourceState;
use crate::outbox::Outbox;
use crate::outbox::epochs::Cause;
use crate::ship::endpoints::{Candidate, Endpoints};
use crate::ship::latency::Latencies;
use crate::ship::state::ShipState;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const WELCOME_TIMEOUT: Duration = Duration::from_secs(10);
/// A peer that does not answer a ping is given up on after both: within 20 s.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);
const BACKOFF_MIN: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// The first and the longest pause after every server has refused this collector, before jitter.
const REFUSED_MIN: Duration = Duration::from_secs(1);
const REFUSED_MAX: Duration = Duration::from_secs(60);
/// How long a stream that is to move waits for what it has in flight. The rest is sent again on the new one.
const MOVE_TIMEOUT: Duration = Duration::from_secs(5);
const WINDOW_BYTES: u32 = 16 << 20;
/// How often the collector compares the sources that are off with what it last sent to the server.
const WATCHING_INTERVAL: Duration = Duration::from_secs(10);
/// Frames handed to the transport and not yet taken by it.
const HANDED_MAX: usize = 16;

/// Why a stream was ended from this side.
enum Ended {
    /// The epoch's last frame is acknowledged.
    Done,
    /// The stream moves: another server is preferred and has answered, or this one asks for a new stream.
    Moving,
    /// The epoch ended meanwhile: the next one wants a stream of its own.
    NextEpoch,
    /// The oldest frame is damaged, and in what way.
    Damaged(String),
}

/// Sends frames to one server and opens the stream again when it ends.
pub struct Shipper {
    pub endpoints: tokio::sync::Mutex<Endpoints>,
    pub tls: Option<Arc<Watched<ClientFiles>>>,
    pub token: Option<TokenFile>,
    /// How often the names are resolved while a stream is up; see [`backoff::spread`].
    pub resolve_interval: Duration,
    pub node_name: String,
    /// What earlier epochs left behind, oldest first: each goes out before this epoch's first frame.
    pub replays: Vec<Arc<Outbox>>,
    pub outbox: Arc<Outbox>,
    pub latencies: Arc<Latencies>,
    pub state: Arc<ShipState>,
    /// Counts streams: sources describe every entity again on a new one.
    pub generation: Arc<AtomicU64>,
    pub reconnect: bool,
    /// The events in a frame that the server asks for.
    pub batch_asked: Arc<AtomicUsize>,
    /// The configured sources: the server is sent those that are off.
    pub sources: Vec<SourceState>,
}

impl Shipper {
    /// Ships until the epoch's last frame is acknowledged, or `give_up` says to stop.
    pub async fn run(self, mut give_up: watch::Receiver<bool>) {
        for replay in &self.replays {
            tracing::info!(epoch = replay.epoch(), "sending an earlier epoch's frames first");
            self.ship(replay, &mut give_up).await;
        }
        self.ship(&self.outbox, &mut give_up).await;
        self.state.is_connected.store(false, Ordering::Relaxed);
    }

    /// Ships an outbox to its end, over all epochs that it has meanwhile.
    async fn ship(&self, outbox: &Arc<Outbox>, give_up: &mut watch::Receiver<bool>) {
        loop {
            while let Some(closing) = outbox.closing() {
                self.deliver(&closing, give_up).await;
                if !closing.is_done() {
                    return;
                }
                outbox.closing_delivered();
            }
            self.deliver(outbox, give_up).await;
            if outbox.closing().is_none() {
                return;
            }
        }
    }

    /// Ships until everything is acknowledged, a closing frame is to be sent first, or nothing more is to be sent.
    async fn deliver(&self, outbox: &Arc<Outbox>, give_up: &mut watch::Receiver<bool>) {
        let mut attempt = 0u32;
        while !*give_up.borrow() && outbox.closing().is_none() {
            if outbox.is_ending() {
                // By the spool's thread, which sends a notice when it is done.
                tokio::select! {
                    () = outbox.changed.notified() => continue,
                    _ = give_up.wait_for(|give_up| *give_up) => return,
                }
            }
            if outbox.is_done() {
                return;
            }
            let unresolved = self.endpoints.lock().await.resolve().await;
            let candidate = self.endpoints.lock().await.next();
            let acked_before = outbox.acknowledged().0;
            let outcome = match &candidate {
                None => Err(Broken::Resolve(unresolved.unwrap_or_default())),
                Some(candidate) => tokio::select! {
                    biased;
                    outcome = self.stream(outbox, candidate) => outcome,
                    _ = give_up.wait_for(|give_up| *give_up) => return outbox.disconnected(),
                },
            };
            let is_stuck = match &outcome {
                Err(error) => error.is_about_frame() && outbox.refused(error.blames_frame()),
                Ok(_) => false,
            };
            outbox.disconnected();
            let error = match outcome {
                Ok(Ended::Done) => return,
                Ok(Ended::NextEpoch) => continue,
                Ok(Ended::Damaged(detail)) => {
                    outbox.give_up(Cause::Damaged, detail);
                    continue;
                }
                Ok(Ended::Moving) => {
                    self.state.moves.fetch_add(1, Ordering::Relaxed);
                    continue;
                }
                Err(error) => error,
            };
            self.state.is_connected.store(false, Ordering::Relaxed);
            let is_news = self.state.failed(&error);
            if is_stuck {
                outbox.give_up(Cause::Refused, error.to_string());
                continue;
            }
            if let Broken::Status(status) = &error
                && let Some(newest) = newest_epoch(status)
                && is_over(outbox, newest)
            {
                return;
            }
            let has_progressed = outbox.acknowledged().0 > acked_before;
            attempt = if has_progressed { 0 } else { attempt.saturating_add(1) };
            let pause = backoff::spread(self.pause_after(&error, candidate.as_ref(), attempt).await);
            // A refusal stays as it is until somebody acts: said once.
            if is_news || !error.is_refusal() && (attempt <= 1 || attempt.is_power_of_two()) {
                let server = candidate.map_or_else(String::new, |candidate| candidate.address.to_string());
                tracing::warn!(server, %error, attempt, retry_in_ms = pause.as_millis() as u64, "cannot stream to the server");
            }
            if !self.reconnect {
                tracing::error!("grpc.reconnect_enabled is false: nothing more is sent");
                return;
            }
            // A back-off, not a wait for a condition; giving up ends it.
            if timeout(pause, give_up.wait_for(|give_up| *give_up)).await.is_ok() {
                return;
            }
        }
    }

    /// How long to wait after this many attempts in a row have failed, the last one with this candidate.
    async fn pause_after(&self, error: &Broken, candidate: Option<&Candidate>, attempt: u32) -> Duration {
        let Some(candidate) = candidate else {
            return backoff::doubled(BACKOFF_MIN, attempt, BACKOFF_MAX);
        };
        let mut endpoints = self.endpoints.lock().await;
        endpoints.failed(candidate);
        // While there are others to try there is no reason to wait long.
        if !endpoints.are_exhausted() {
            return BACKOFF_MIN;
        }
        let rounds = attempt / endpoints.ranked().len().max(1) as u32;
        let (first, longest) = if error.is_refusal() { (REFUSED_MIN, REFUSED_MAX) } else { (BACKOFF_MIN, BACKOFF_MAX) };
        backoff::doubled(first, rounds, longest)
    }

    async fn connect(&self, candidate: &Candidate) -> Result<IngestClient<Channel>, Broken> {
        let endpoint = dial::endpoint(&candidate.name.host, candidate.name.port, self.tls.is_some())?
            .connect_timeout(CONNECT_TIMEOUT)
            .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT)
            .keep_alive_while_idle(true)
            .initial_stream_window_size(WINDOW_BYTES)
            .initial_connection_window_size(WINDOW_BYTES);
        let channel = dial::dial(&endpoint, candidate.address, self.tls.as_ref()).await?;
        let client = IngestClient::new(channel);
        Ok(client.max_decoding_message_size(MESSAGE_BYTES_MAX).max_encoding_message_size(MESSAGE_BYTES_MAX))
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        if let Some(token) = &self.token {
            request.metadata_mut().insert("authorization", token.header());
        }
        request
    }

    async fn stream(&self, outbox: &Arc<Outbox>, candidate: &Candidate) -> Result<Ended, Broken> {
        let mut client = self.connect(candidate).await?;
        let deadline = Instant::now() + WELCOME_TIMEOUT;
        let (requests, receiver) = mpsc::channel(HANDED_MAX);
        let (epoch, acked_seq, acked_events) = outbox.standing();
        let hello = Hello {
            version: u32::from(VERSION),
            node: self.node_name.clone(),
            node_id: outbox.node(),
            epoch,
            revision: env!("CARGO_PKG_VERSION").into(),
            acked_seq,
            acked_events: acked_events.to_vec(),
        };
        let hello = ShipRequest { kind: Some(ship_request::Kind::Hello(hello)) };
        requests.try_send(hello).map_err(|_| Broken::Closed)?;
        let opened = timeout_at(deadline, client.ship(self.request(ReceiverStream::new(receiver))));
        let mut responses = opened.await.map_err(|_| Broken::Silent)?.map_err(Broken::before_welcome)?.into_inner();
        let first = timeout_at(deadline, responses.message()).await;
        let first = first.map_err(|_| Broken::Silent)?.map_err(Broken::before_welcome)?.ok_or(Broken::Closed)?;
        let Some(ship_response::Kind::Welcome(welcome)) = first.kind else {
            return Err(Broken::Protocol("its first message was no welcome"));
        };
        self.endpoints.lock().await.recovered(candidate);
        self.acknowledge(outbox, epoch, welcome.durable_seq);
        outbox.restart(epoch, welcome.durable_seq);
        self.generation.fetch_add(1, Ordering::Relaxed);
        self.state.credit_bytes.store(welcome.credit_bytes, Ordering::Relaxed);
        let frame_events = if welcome.frame_events == 0 { usize::MAX } else { welcome.frame_events as usize };
        self.batch_asked.store(frame_events, Ordering::Relaxed);
        *self.state.server.lock().unwrap_or_else(PoisonError::into_inner) = candidate.address.to_string();
        self.state.streams();
        tracing::info!(
            server = %candidate.address, name = candidate.name.host, durable_seq = welcome.durable_seq, "streaming"
        );
        self.pump((outbox, epoch), candidate, &requests, &mut responses, &welcome).await
    }

    async fn pump(
        &self,
        (outbox, epoch): (&Arc<Outbox>, u64),
        candidate: &Candidate,
        requests: &mpsc::Sender<ShipRequest>,
        responses: &mut Streaming<ShipResponse>,
        welcome: &Welcome,
    ) -> Result<Ended, Broken> {
        let mut credit_bytes = welcome.credit_bytes;
        let mut look = tokio::time::interval(WATCHING_INTERVAL);
        let mut watching_sent: Option<Watching> = None;
        let mut better = std::pin::pin!(self.better_than(candidate));
        let mut move_until: Option<Instant> = None;
        // There may be something to send.
        let mut may_send = true;
        while !outbox.is_done() {
            if outbox.epoch() != epoch {
                return Ok(Ended::NextEpoch);
            }
            if may_send && move_until.is_none() {
                may_send = self.send_frames(outbox, credit_bytes, requests)?;
            }
            if let Some(damage) = outbox.damage() {
                return Ok(Ended::Damaged(damage));
            }
            if let Some(deadline) = move_until
                && (outbox.in_flight_bytes() == 0 || Instant::now() >= deadline)
            {
                return Ok(Ended::Moving);
            }
            tokio::select! {
                biased;
                response = responses.message() => {
                    let Some(ship_response::Kind::Ack(ack)) = response?.ok_or(Broken::Closed)?.kind else {
                        return Err(Broken::Protocol("it sent something else than an ack"));
                    };
                    credit_bytes = ack.credit_bytes;
                    self.state.credit_bytes.store(credit_bytes, Ordering::Relaxed);
                    self.acknowledge(outbox, epoch, ack.durable_seq);
                    if ack.move_on && move_until.is_none() {
                        tracing::info!(server = %candidate.address, "the server asked for a new stream");
                        move_until = Some(Instant::now() + MOVE_TIMEOUT);
                    }
                    may_send = true;
                }
                // Room again: the permit is given back, and asked for at the next turn.
                permit = requests.reserve(), if may_send && move_until.is_none() => {
                    permit.map_err(|_| Broken::Closed)?;
                }
                () = outbox.changed.notified(), if !may_send => may_send = true,
                _ = look.tick(), if welcome.takes_watching => {
                    let watching = watching(&self.sources);
                    // If the channel is full, the next look sends it.
                    if watching_sent.as_ref() != Some(&watching)
                        && requests.try_send(ShipRequest {
                            kind: Some(ship_request::Kind::Watching(watching.clone())),
                        }).is_ok()
                    {
                        watching_sent = Some(watching);
                    }
                }
                () = &mut better, if move_until.is_none() => move_until = Some(Instant::now() + MOVE_TIMEOUT),
                // As a block, so that the timer is only made when it is asked for.
                () = async { tokio::time::sleep_until(move_until.unwrap_or_else(Instant::now)).await },
                    if move_until.is_some() => {}
            }
        }
        Ok(Ended::Done)
    }

    /// Sends all frames that the credit and the channel take now: another turn of [`Self::pump`] for each would poll
    /// everything else as often. Returns whether there may be more to send.
    fn send_frames(
        &self,
        outbox: &Outbox,
        credit_bytes: u64,
        requests: &mpsc::Sender<ShipRequest>,
    ) -> Result<bool, Broken> {
        loop {
            let permit = match requests.try_reserve() {
                Ok(permit) => permit,
                Err(TrySendError::Full(())) => return Ok(true),
                Err(TrySendError::Closed(())) => return Err(Broken::Closed),
            };
            let Some(frame) = outbox.next(credit_bytes) else { return Ok(false) };
            permit.send(ShipRequest { kind: Some(ship_request::Kind::Frame(frame)) });
            self.state.frames_sent.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Returns when another candidate is preferred and has answered. Looks from time to time, each node at its own.
    async fn better_than(&self, present: &Candidate) {
        loop {
            tokio::time::sleep(backoff::spread(self.resolve_interval)).await;
            let preferred = {
                let mut endpoints = self.endpoints.lock().await;
                endpoints.resolve().await;
                endpoints.ranked().into_iter().next()
            };
            let Some(preferred) = preferred.filter(|preferred| preferred.address != present.address) else {
                continue;
            };
            match timeout(WELCOME_TIMEOUT, self.probe(&preferred)).await {
                Ok(Ok(())) => {
                    self.endpoints.lock().await.recovered(&preferred);
                    tracing::info!(from = %present.address, to = %preferred.address, "moving to the preferred server");
                    return;
                }
                Ok(Err(error)) => {
                    tracing::debug!(server = %preferred.address, %error, "the preferred server is not ready")
                }
                Err(_) => tracing::debug!(server = %preferred.address, "the preferred server does not answer"),
            }
        }
    }

    /// Whether a server takes streams: it answers one that is over before a word was said.
    async fn probe(&self, candidate: &Candidate) -> Result<(), Broken> {
        let mut client = self.connect(candidate).await?;
        let mut responses = client.ship(self.request(tokio_stream::empty())).await?.into_inner();
        match responses.message().await? {
            None => Ok(()),
            Some(_) => Err(Broken::Protocol("it answered a stream that said nothing")),
        }
    }

    fn acknowledge(&self, outbox: &Outbox, epoch: u64, durable_seq: u64) {
        let now_ns = boottime_ns();
        for acknowledged in outbox.acknowledge(epoch, durable_seq) {
            self.latencies.record(&acknowledged.times, acknowledged.sent_ns, now_ns);
        }
        self.state.acked_seq.fetch_max(durable_seq, Ordering::Relaxed);
    }
}

/// Lists the sources that are off, with the reason, for the server.
fn watching(sources: &[SourceState]) -> Watching {
    let off = sources.iter().filter_map(|state| {
        let reason = state.why_off()?;
        Some(SourceOff { source: state.source.to_owned(), reason })
    });
    Watching { off: off.collect() }
}

/// Whether nothing more can be sent of an outbox whose epoch a server refuses, since it knows `newest`.
fn is_over(outbox: &Outbox, newest: u64) -> bool {
    if outbox.outdo_epoch(newest) {
        tracing::warn!(newest, epoch = outbox.epoch(), "the clock went back since the last run: a newer epoch");
        return false;
    }
    if outbox.is_closing() {
        // It was delivered before, as far as this server is concerned, or the next epoch was.
        outbox.give_up_replay();
        return true;
    }
    let is_deleted = outbox.give_up_replay();
    if is_deleted {
        tracing::error!(newest, epoch = outbox.epoch(), "the server refuses this epoch: deleted its spool");
    }
    is_deleted
}

#[cfg(test)]
mod tests;
