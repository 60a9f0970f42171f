//! The streams and buckets of the servers in NATS JetStream.
//!
//! What enters: how each is to be. What leaves: each as it is wanted. What must hold: what is as it is wanted is not touched,
//! nor is what belongs to somebody else.
//!
//! All servers look at the same streams at the same time. NATS 2.9 crashes if it is to update a stream that another connection
//! is creating. So a stream is updated only where it differs, and never by the attempt that found it missing.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher as _;
use std::time::Duration;

use async_nats::jetstream::ErrorCode;
use async_nats::jetstream::context::{GetStreamError, GetStreamErrorKind};
use async_nats::jetstream::kv::Store;
use async_nats::jetstream::stream::{self, DiscardPolicy, Source, StorageType, Stream};

use super::log::{Log, LogError, MESSAGE_BYTES_MAX, jetstream};

/// How long NATS remembers which messages it had.
const DUPLICATE_WINDOW: Duration = Duration::from_secs(120);
/// Age at which a fact is forgotten if no server sends it again.
const FACTS_AGE: Duration = Duration::from_secs(7 * 24 * 3600);
const FACTS_BYTES_MAX: i64 = 512 << 20;
/// Age and total size up to which findings are kept, the latest first.
const FINDINGS_AGE: Duration = Duration::from_secs(30 * 24 * 3600);
const FINDINGS_BYTES_MAX: i64 = 128 << 20;
/// The longest time for which a connection waits before it creates a stream. Each waits for a random time, so that few create at
/// once: there is nothing that says when another one is about to.
const CREATE_WAIT_MAX_MS: u64 = 100;

/// How a key-value bucket is to be.
pub struct Bucket {
    /// What it is called among those of this cluster.
    pub name: &'static str,
    pub description: &'static str,
    /// Zero: for ever.
    pub max_age: Duration,
    pub max_bytes: i64,
    pub value_bytes_max: i32,
}

/// Whether there is no stream of that name.
fn is_absent(error: &GetStreamError) -> bool {
    matches!(error.kind(), GetStreamErrorKind::JetStream(refused) if refused.error_code() == ErrorCode::STREAM_NOT_FOUND)
}

/// Whether a stream is as it is wanted, in the keys that are set here: others have the defaults of NATS's version.
fn is_as_wanted(is: &stream::Config, wanted: &stream::Config) -> bool {
    let sources = |config: &stream::Config| {
        let sources = config.sources.iter().flatten();
        sources.map(|source| (source.name.clone(), source.filter_subject.clone())).collect::<Vec<_>>()
    };
    is.subjects == wanted.subjects
        && sources(is) == sources(wanted)
        && is.description == wanted.description
        && is.max_bytes.max(0) == wanted.max_bytes.max(0)
        && is.max_messages_per_subject.max(0) == wanted.max_messages_per_subject.max(0)
        && is.max_message_size.max(0) == wanted.max_message_size.max(0)
        && is.max_age == wanted.max_age
        && is.max_messages.max(0) == wanted.max_messages.max(0)
        && (is.no_ack, is.discard_new_per_subject) == (wanted.no_ack, wanted.discard_new_per_subject)
        && (wanted.duplicate_window.is_zero() || is.duplicate_window == wanted.duplicate_window)
        && is.num_replicas.max(1) == wanted.num_replicas.max(1)
        && (is.discard, is.storage) == (wanted.discard, wanted.storage)
        && (is.allow_rollup || !wanted.allow_rollup)
        && (is.deny_delete || !wanted.deny_delete)
        && (is.allow_direct || !wanted.allow_direct)
}

impl Log {
    /// Makes the streams what they are to be.
    ///
    /// # Errors
    /// [`LogError::JetStream`] when NATS refuses, [`LogError::Foreign`] when one is not Tapio's.
    pub async fn ensure(&self) -> Result<Stream, LogError> {
        let log = stream::Config {
            name: self.names.stream("LOG"),
            subjects: vec![self.names.every("batch"), self.names.every("fact")],
            max_age: self.keep,
            max_bytes: i64::try_from(self.config.max_bytes).unwrap_or(i64::MAX),
            discard: DiscardPolicy::Old,
            storage: StorageType::File,
            num_replicas: self.config.replicas,
            max_message_size: MESSAGE_BYTES_MAX as i32,
            duplicate_window: DUPLICATE_WINDOW.min(self.keep),
            description: Some("Tapio: messages between its servers".into()),
            ..stream::Config::default()
        };
        let facts = stream::Config {
            name: self.names.stream("FACTS"),
            sources: Some(vec![Source {
                name: log.name.clone(),
                filter_subject: Some(self.names.every("fact")),
                ..Source::default()
            }]),
            max_messages_per_subject: 1,
            max_age: FACTS_AGE,
            max_bytes: FACTS_BYTES_MAX,
            description: Some("Tapio: the last word on each pod, workload and Service".into()),
            ..log.clone()
        };
        let facts = stream::Config { subjects: Vec::new(), ..facts };
        // Before one is made: who uses another's name gets none.
        self.look(&facts, "the facts").await?;
        let log = self.make(&log, "the log").await?;
        self.make(&facts, "the facts").await?;
        Ok(log)
    }

    /// Looks for a stream.
    ///
    /// # Errors
    /// [`LogError::Foreign`] when one of that name is not Tapio's: it must not be made into what is wanted.
    async fn look(&self, wanted: &stream::Config, what: &'static str) -> Result<Option<Stream>, LogError> {
        let found = match self.context.get_stream(&wanted.name).await {
            Ok(found) => found,
            Err(error) if is_absent(&error) => return Ok(None),
            Err(error) => return Err(jetstream(what)(error.into())),
        };
        let subjects = &found.cached_info().config.subjects;
        let own = format!("tapio.{}.", self.names.cluster());
        let has_as_many = wanted.subjects.is_empty() == subjects.is_empty();
        match has_as_many
            && subjects.iter().all(|subject| wanted.subjects.contains(subject) || subject.starts_with(&own))
        {
            true => Ok(Some(found)),
            false => Err(LogError::Foreign { stream: wanted.name.clone(), subjects: subjects.join(", ") }),
        }
    }

    /// Returns a stream that is as it is wanted: creates it, updates it, or leaves it alone.
    async fn make(&self, wanted: &stream::Config, what: &'static str) -> Result<Stream, LogError> {
        let is_right = |found: &Stream| is_as_wanted(&found.cached_info().config, wanted);
        let mut found = self.look(wanted, what).await?;
        if found.is_none() {
            tokio::time::sleep(Duration::from_millis(RandomState::new().hash_one(0) % CREATE_WAIT_MAX_MS)).await;
            found = self.look(wanted, what).await?;
        }
        match found {
            Some(found) if is_right(&found) => return Ok(found),
            Some(_) => {}
            None => match self.context.create_stream(wanted.clone()).await {
                Ok(made) => return Ok(made),
                // Another connection was faster. Where it wants something else, the caller's next attempt updates the stream.
                Err(error) => {
                    let made = self.look(wanted, what).await?.filter(is_right);
                    return made.ok_or_else(|| jetstream(what)(error.into()));
                }
            },
        }
        let updated = self.context.update_stream(wanted).await;
        updated.map_err(|error| jetstream(what)(error.into()))?;
        let found = self.context.get_stream(&wanted.name).await;
        found.map_err(|error| jetstream(what)(error.into()))
    }

    /// Makes a key-value bucket what it is to be.
    ///
    /// # Errors
    /// [`LogError::JetStream`] when NATS refuses.
    pub async fn bucket(&self, bucket: &Bucket) -> Result<Store, LogError> {
        let name = self.names.stream(bucket.name);
        // As `create_key_value` makes it, which cannot read what NATS before 2.10 says of the account.
        let config = stream::Config {
            name: format!("KV_{name}"),
            subjects: vec![format!("$KV.{name}.>")],
            description: Some(bucket.description.into()),
            max_messages_per_subject: 1,
            max_age: bucket.max_age,
            max_bytes: bucket.max_bytes,
            max_message_size: bucket.value_bytes_max,
            discard: DiscardPolicy::New,
            storage: StorageType::File,
            num_replicas: self.config.replicas,
            allow_rollup: true,
            deny_delete: true,
            allow_direct: true,
            ..stream::Config::default()
        };
        self.make(&config, "a bucket").await?;
        self.context.get_key_value(name).await.map_err(|error| jetstream("a bucket")(error.into()))
    }

    /// Makes the stream of findings what it is to be.
    ///
    /// # Errors
    /// [`LogError::JetStream`] when NATS refuses.
    pub async fn ensure_findings(&self) -> Result<Stream, LogError> {
        let config = stream::Config {
            name: self.names.stream("FINDINGS"),
            subjects: vec![self.names.every("finding")],
            max_messages_per_subject: 1,
            max_age: FINDINGS_AGE,
            max_bytes: FINDINGS_BYTES_MAX,
            max_message_size: MESSAGE_BYTES_MAX as i32,
            discard: DiscardPolicy::Old,
            storage: StorageType::File,
            num_replicas: self.config.replicas,
            description: Some("Tapio: the last version of each finding".into()),
            ..stream::Config::default()
        };
        self.make(&config, "the findings").await
    }
}
