//! The log in NATS JetStream.
//!
//! What enters: messages of this server. What leaves: those of all servers, in one order. What must hold: who this
//! server is, is read again from its files when NATS refuses it. What the streams are like is in `streams.rs`.
//!
//! ```text
//! TAPIO_<name>_LOG    tapio.<name>.batch.<server>     what happened; kept for twice the longest window
//!                     tapio.<name>.fact.<node>.<id>   what there is: pods, workloads, Services
//! TAPIO_<name>_FACTS  the last message of each fact, out of the log
//! TAPIO_<name>_FINDINGS tapio.<name>.finding.<id>  the last version of each finding, for servers that join later (`kept.rs`)
//! TAPIO_<name>_LEADER a key-value bucket: who delivers outwards (`leader.rs`)
//! TAPIO_<name>_DELIVERED another one: what was delivered (`deliver/log_marks.rs`)
//! ```

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use async_nats::connection::State;
use async_nats::jetstream::consumer::pull::{Ordered, OrderedConfig};
use async_nats::jetstream::consumer::{Consumer, DeliverPolicy};
use async_nats::jetstream::context::{Context, ContextBuilder};
use async_nats::jetstream::message::StreamMessage;
use async_nats::jetstream::stream::{Info, LastRawMessageErrorKind, State as StreamState, Stream};
use async_nats::{Auth, AuthError, ConnectOptions, HeaderMap};
use futures::StreamExt as _;
use tapio_wire::event::EntityId;
use tapio_wire::program::backoff;

use super::config::ClusterSection;
use super::connections::Connections;

/// How long JetStream may take to answer.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
const RECONNECT_MIN: Duration = Duration::from_millis(50);
const RECONNECT_MAX: Duration = Duration::from_secs(2);
/// Who wrote a message, also one that cannot be read.
pub const SERVER_HEADER: &str = "Tapio-Server";
/// What a message rests on: see [`Ground`].
pub const GROUND_HEADER: &str = "Tapio-Ground";
/// A log that is shorter by less than this has only lost messages by their age.
const AGED_MARGIN: Duration = Duration::from_secs(60);
/// The largest message.
pub const MESSAGE_BYTES_MAX: usize = 512 << 10;

/// Why the log cannot be reached, or not used.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    #[error("no connection to NATS at {url}: {error}; look at cluster.url, and at what cluster.user and its file say")]
    Connect { url: String, error: String },
    #[error("{path}: {error}")]
    File { path: String, error: std::io::Error },
    #[error("JetStream: {what}: {error}; {}", hint(error))]
    JetStream { what: &'static str, error: String },
    #[error(
        "the stream {stream} in NATS is not Tapio's, it has the subjects {subjects}: set another cluster.name, or remove that stream"
    )]
    Foreign { stream: String, subjects: String },
}

/// What an operator looks at after such an error.
fn hint(error: &str) -> &'static str {
    match error.contains("timed out") || error.contains("in time") {
        true => "NATS's log says why it does not answer: its disk may be full, or its streams have no leader",
        false => "is JetStream on, has it room for cluster.max_bytes and 768 MiB, may this user use it?",
    }
}

pub(super) fn jetstream(what: &'static str) -> impl Fn(Box<dyn std::error::Error + Send + Sync>) -> LogError {
    move |error| LogError::JetStream { what, error: error.to_string() }
}

/// How the streams are called.
#[derive(Clone, Debug)]
pub struct Names {
    cluster: String,
    server: String,
}

impl Names {
    /// Names the log of these servers, for this one.
    pub fn new(config: &ClusterSection) -> Self {
        Self { cluster: config.name.clone(), server: config.server_name() }
    }

    /// Returns the name of the cluster.
    pub fn cluster(&self) -> &str {
        &self.cluster
    }

    /// Returns the name of this server.
    pub fn server(&self) -> &str {
        &self.server
    }

    pub(super) fn stream(&self, what: &str) -> String {
        format!("TAPIO_{}_{what}", self.cluster)
    }

    /// The subject of this server's batches.
    pub fn batch(&self) -> String {
        format!("tapio.{}.batch.{}", self.cluster, self.server)
    }

    /// The subject of a fact, as this node has it: another one may say less.
    pub fn fact(&self, node: u64, id: EntityId) -> String {
        format!("tapio.{}.fact.{node:016x}.{id:016x}", self.cluster)
    }

    /// The subject of a finding.
    pub fn finding(&self, id: &str) -> String {
        format!("tapio.{}.finding.{id}", self.cluster)
    }

    pub(super) fn every(&self, what: &str) -> String {
        format!("tapio.{}.{what}.>", self.cluster)
    }
}

/// The last message of a server that the log took: what lacks it has lost something.
#[derive(Clone, Debug)]
pub struct Taken {
    /// When the log was made, nanoseconds since 1970: another one has another moment.
    pub created_ns: i128,
    pub seq: u64,
    /// Its id.
    pub id: String,
}

/// The log in which lies what a message relies on, and how far into it. What says how far frames reach counts nowhere else: the
/// clues of these frames would be missing there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ground {
    pub created_ns: i128,
    /// The last message that the writer knew to be taken.
    pub seq: u64,
}

impl Ground {
    /// As a header says it.
    pub fn header(self) -> String {
        format!("{:x} {}", self.created_ns, self.seq)
    }

    /// What a header says; [`None`] where nothing can be read.
    fn of(header: &str) -> Option<Self> {
        let (created, seq) = header.split_once(' ')?;
        Some(Self { created_ns: i128::from_str_radix(created, 16).ok()?, seq: seq.parse().ok()? })
    }

    /// Whether it is under a message of this log at this place.
    fn is_under(self, created_ns: i128, seq: u64) -> bool {
        self.created_ns == created_ns && self.seq < seq
    }
}

/// Whether a message was written to follow what is in this log. One of an older version does not say so, and is believed.
pub fn follows(headers: Option<&HeaderMap>, created_ns: i128, seq: u64) -> bool {
    match headers.and_then(|headers| headers.get(GROUND_HEADER)) {
        Some(ground) => Ground::of(ground.as_str()).is_some_and(|ground| ground.is_under(created_ns, seq)),
        None => true,
    }
}

/// Where a reader is, and in which log.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Position {
    /// When the log was made.
    pub created_ns: i128,
    pub seq: u64,
    /// When the message was written; [`None`] where none was read there.
    pub written_ns: Option<u64>,
}

/// The message at a place of a stream; [`None`] where there is none any more.
///
/// # Errors
/// [`LogError::JetStream`] when NATS does not answer.
pub async fn message_at(stream: &Stream, seq: u64) -> Result<Option<StreamMessage>, LogError> {
    match stream.get_raw_message(seq).await {
        Ok(message) => Ok(Some(message)),
        Err(error) if matches!(error.kind(), LastRawMessageErrorKind::NoMessageFound) => Ok(None),
        Err(error) => Err(jetstream("a message")(error.into())),
    }
}

/// A connection to the log.
pub struct Log {
    pub context: Context,
    pub names: Names,
    pub(super) config: ClusterSection,
    pub(super) keep: Duration,
}

impl Log {
    /// Connects; the streams are not looked at.
    ///
    /// # Errors
    /// See [`LogError`].
    pub(crate) async fn connect(
        config: &ClusterSection,
        keep: Duration,
        connections: &Arc<Connections>,
    ) -> Result<Self, LogError> {
        let options = options(config, connections).await?;
        let refused = |error: String| LogError::Connect { url: config.urls_to_show(), error };
        let connecting = options.connect(config.urls());
        let client = match tokio::time::timeout(CONNECT_TIMEOUT * 2, connecting).await {
            Ok(Ok(client)) => client,
            Ok(Err(error)) => return Err(refused(error.to_string())),
            Err(_) => return Err(refused("no answer in time".into())),
        };
        let context = ContextBuilder::new().timeout(ANSWER_TIMEOUT).backpressure_on_inflight(true).build(client);
        Ok(Self { context, names: Names::new(config), config: config.clone(), keep })
    }

    /// Whether the connection has broken since it was made, and NATS may have lost what it had.
    pub fn has_broken(&self) -> bool {
        self.context.client().connection_state() != State::Connected || self.connects() > 1
    }

    /// How often it was connected: again and again, by itself, when the connection breaks.
    pub fn connects(&self) -> u64 {
        self.context.client().statistics().connects.load(Ordering::Acquire)
    }

    /// What NATS takes in one message.
    pub fn max_payload(&self) -> usize {
        self.context.client().server_info().max_payload.max(64 << 10)
    }

    /// The stream of facts.
    ///
    /// # Errors
    /// [`LogError::JetStream`] when it cannot be had.
    pub async fn facts(&self) -> Result<Stream, LogError> {
        let found = self.context.get_stream(self.names.stream("FACTS")).await;
        found.map_err(|error| jetstream("the facts")(error.into()))
    }
}

/// The next message of a stream that has one.
///
/// # Errors
/// Why there is none.
pub async fn next_within(
    messages: &mut Ordered,
    limit: Duration,
) -> Result<async_nats::jetstream::Message, Box<dyn std::error::Error + Send + Sync>> {
    match tokio::time::timeout(limit, messages.next()).await {
        Ok(Some(message)) => Ok(message?),
        Ok(None) => Err("the consumer ended".into()),
        Err(_) => Err("no message came in time".into()),
    }
}

/// By how much a full log is shorter than `keep`; nothing where messages were only deleted by their age.
pub(super) fn short_of(info: &Info, keep: Duration) -> Duration {
    short(&info.state, info.config.max_bytes, keep)
}

fn short(state: &StreamState, max_bytes: i64, keep: Duration) -> Duration {
    let room = 2 * MESSAGE_BYTES_MAX.min(max_bytes.max(0) as usize / 8) as u64;
    let is_full = max_bytes > 0 && state.bytes + room >= max_bytes as u64;
    if !is_full || state.first_sequence <= 1 {
        return Duration::ZERO;
    }
    let has: Duration = (state.last_timestamp - state.first_timestamp).try_into().unwrap_or_default();
    match keep.saturating_sub(has) {
        // NATS deletes a message some time after its age is reached, and the last one was written a moment ago.
        little if little < AGED_MARGIN => Duration::ZERO,
        short => short,
    }
}

/// Reads a stream in order, from the message of this number on, or from the first one that there is.
///
/// # Errors
/// [`LogError::JetStream`] when it cannot be read.
pub async fn read_from(stream: &Stream, seq: u64) -> Result<Ordered, LogError> {
    let failed = |error: Box<dyn std::error::Error + Send + Sync>| jetstream("reading")(error);
    let deliver_policy = match seq {
        0 | 1 => DeliverPolicy::All,
        start_sequence => DeliverPolicy::ByStartSequence { start_sequence },
    };
    let config = OrderedConfig { deliver_policy, ..OrderedConfig::default() };
    let consumer: Consumer<OrderedConfig> =
        stream.create_consumer(config).await.map_err(|error| failed(error.into()))?;
    consumer.messages().await.map_err(|error| failed(error.into()))
}

async fn options(config: &ClusterSection, connections: &Arc<Connections>) -> Result<ConnectOptions, LogError> {
    let connections = Arc::clone(connections);
    let mut options = match (&config.credentials_file, &config.user, &config.password_file) {
        (Some(file), ..) => ConnectOptions::with_credentials_file(file)
            .await
            .map_err(|error| LogError::File { path: file.display().to_string(), error })?,
        (None, Some(user), Some(file)) => {
            let (user, file) = (user.clone(), file.clone());
            ConnectOptions::with_auth_callback(move |_| {
                let (user, file) = (user.clone(), file.clone());
                async move {
                    let unreadable = |error| AuthError::new(format!("cannot read {}: {error}", file.display()));
                    let password = tokio::fs::read_to_string(&file).await.map_err(unreadable)?;
                    let mut auth = Auth::new();
                    auth.username = Some(user);
                    auth.password = Some(password.trim_end().to_owned());
                    Ok(auth)
                }
            })
        }
        _ => ConnectOptions::new(),
    };
    if let Some(ca) = &config.tls.ca {
        options = options.add_root_certificates(ca.clone()).require_tls(true);
    }
    if let (Some(cert), Some(key)) = (&config.tls.cert, &config.tls.key) {
        options = options.add_client_certificate(cert.clone(), key.clone());
    }
    Ok(options
        .name(format!("tapio-server {}", config.server_name()))
        .connection_timeout(CONNECT_TIMEOUT)
        .ping_interval(Duration::from_secs(5))
        .request_timeout(Some(ANSWER_TIMEOUT))
        .max_reconnects(None)
        .reconnect_delay_callback(|attempt| {
            backoff::doubled(RECONNECT_MIN, u32::try_from(attempt).unwrap_or(u32::MAX), RECONNECT_MAX)
        })
        .event_callback(move |event| {
            let connections = Arc::clone(&connections);
            async move { connections.note(&event) }
        }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_full_log_is_too_short() {
        let of = |first_seq: u64, bytes: u64, first_ts: &str| -> Duration {
            let state = serde_json::json!({
                "messages": 10, "bytes": bytes, "first_seq": first_seq, "first_ts": first_ts, "last_seq": first_seq + 9,
                "last_ts": "2026-11-28T10:00:00Z", "consumer_count": 1,
            });
            short(&serde_json::from_value(state).expect("a state"), 1000, Duration::from_secs(3600))
        };
        assert_eq!(of(400, 990, "2026-11-28T09:50:00Z"), Duration::from_secs(3000));
        assert_eq!(of(400, 990, "2026-11-28T09:00:01Z"), Duration::ZERO, "by age");
        assert_eq!(of(400, 700, "2026-11-28T09:50:00Z"), Duration::ZERO, "after a gap");
        assert_eq!(of(400, 90, "2026-11-28T09:50:00Z"), Duration::ZERO, "emptied");
        assert_eq!(of(1, 990, "2026-11-28T09:50:00Z"), Duration::ZERO, "young");
    }

    #[test]
    fn an_error_of_nats_says_what_to_look_at() {
        let said = |error: &'static str| jetstream("the facts")(error.into()).to_string();
        for late in ["jetstream request timed out", "no message came in time"] {
            assert!(said(late).contains("its disk may be full"), "{}", said(late));
        }
        assert!(said("jetstream not enabled").contains("is JetStream on"));
    }

    #[test]
    fn a_message_follows_only_what_its_own_log_has() {
        let ground = Ground { created_ns: 1_796_043_538_878_806_081, seq: 41 };
        assert_eq!(Ground::of(&ground.header()), Some(ground));
        let headers = |ground: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(GROUND_HEADER, ground);
            headers
        };
        let own = headers(&ground.header());
        assert!(follows(Some(&own), ground.created_ns, 42));
        assert!(!follows(Some(&own), ground.created_ns, 41), "the log has lost its end");
        assert!(!follows(Some(&own), ground.created_ns + 1, 42), "another log");
        assert!(!follows(Some(&headers("x")), ground.created_ns, 42));
        assert!(follows(None, ground.created_ns, 42), "an older version says nothing");
    }
}
