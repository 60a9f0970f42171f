//! Marks that several servers share: a key-value bucket of JetStream, without a time to live.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::consumer::pull::OrderedConfig;
use async_nats::jetstream::kv::{Store, UpdateErrorKind};
use futures::StreamExt;

use super::marks::{Known, Mark, Marks, MarksError};
use crate::cluster::{Bucket, ClusterSection, Connections, Log, LogError};

/// A mark has some 200 bytes, and NATS adds as much. Notes add some 300 to it, and at most 2 KiB.
const VALUE_BYTES_MAX: i32 = 4096;
/// Room for the marks of some 90,000 findings in a webhook and Alertmanager.
const BUCKET_BYTES_MAX: i64 = 96 << 20;
/// How long the next mark may take while all are read.
const READ_TIMEOUT: Duration = Duration::from_secs(5);
const BUCKET: Bucket = Bucket {
    name: "DELIVERED",
    description: "Tapio: what was delivered outwards",
    max_age: Duration::ZERO,
    max_bytes: BUCKET_BYTES_MAX,
    value_bytes_max: VALUE_BYTES_MAX,
};

pub(super) struct LogMarks {
    section: ClusterSection,
    sink: String,
    connections: Arc<Connections>,
    bucket: Option<Store>,
}

fn failed(error: impl std::error::Error) -> MarksError {
    LogError::JetStream { what: "what was delivered", error: error.to_string() }.into()
}

/// A mark that cannot be read says as little as an intent: what it is about is delivered again.
fn decode(value: &[u8]) -> Mark {
    serde_json::from_slice(value).unwrap_or_else(|_| Mark::unreadable())
}

impl LogMarks {
    pub(super) fn new(section: ClusterSection, sink: &str) -> Self {
        Self { section, sink: sink.to_owned(), connections: Arc::default(), bucket: None }
    }

    fn key(&self, id: &str) -> String {
        format!("{}.{id}", self.sink)
    }

    async fn bucket(&mut self) -> Result<Store, MarksError> {
        if let Some(bucket) = &self.bucket {
            return Ok(bucket.clone());
        }
        // The streams are not made here, so how long they keep messages does not matter.
        let log = Log::connect(&self.section, Duration::ZERO, &self.connections).await?;
        Ok(self.bucket.insert(log.bucket(&BUCKET).await?).clone())
    }

    /// Connects again after an error: what it was connected to may not be what it is now.
    fn seen<T>(&mut self, outcome: Result<T, MarksError>) -> Result<T, MarksError> {
        if outcome.is_err() {
            self.bucket = None;
        }
        outcome
    }

    async fn load_all(&mut self) -> Result<HashMap<String, Known>, MarksError> {
        let bucket = self.bucket().await?;
        let prefix = format!("{}{}.", bucket.prefix, self.sink);
        let config = OrderedConfig { filter_subject: format!("{prefix}>"), ..OrderedConfig::default() };
        let consumer = bucket.stream.create_consumer(config).await.map_err(failed)?;
        let mut marks = HashMap::new();
        if consumer.cached_info().num_pending == 0 {
            return Ok(marks);
        }
        let mut messages = consumer.messages().await.map_err(failed)?;
        loop {
            let message = tokio::time::timeout(READ_TIMEOUT, messages.next()).await.map_err(failed)?;
            let Some(message) = message else { return Ok(marks) };
            let message = message.map_err(failed)?;
            let (place, pending) = match message.info() {
                Ok(info) => (info.stream_sequence, info.pending),
                Err(error) => {
                    let error = error.to_string();
                    return Err(LogError::JetStream { what: "what was delivered", error }.into());
                }
            };
            if let Some(id) = message.subject.strip_prefix(&prefix) {
                marks.insert(id.to_owned(), Known { mark: decode(&message.payload), place });
            }
            if pending == 0 {
                return Ok(marks);
            }
        }
    }
}

impl Marks for LogMarks {
    async fn load(&mut self) -> Result<HashMap<String, Known>, MarksError> {
        let loaded = self.load_all().await;
        self.seen(loaded)
    }

    async fn began_ns(&mut self) -> Result<u64, MarksError> {
        let bucket = self.bucket().await?;
        let info = bucket.stream.get_info().await.map_err(failed);
        let created = self.seen(info)?.created;
        Ok(u64::try_from(created.unix_timestamp_nanos()).unwrap_or(0))
    }

    async fn read(&mut self, id: &str) -> Result<Option<Known>, MarksError> {
        let (bucket, key) = (self.bucket().await?, self.key(id));
        let entry = bucket.entry(key).await.map_err(failed);
        let entry = self.seen(entry)?;
        Ok(entry.map(|entry| Known { mark: decode(&entry.value), place: entry.revision }))
    }

    async fn write(&mut self, id: &str, mark: &Mark, place: u64) -> Result<Option<u64>, MarksError> {
        let (bucket, key) = (self.bucket().await?, self.key(id));
        let value = serde_json::to_vec(mark).map_err(failed)?;
        let written = match bucket.update(key, value.into(), place).await {
            Ok(place) => Ok(Some(place)),
            Err(error) if error.kind() == UpdateErrorKind::WrongLastRevision => Ok(None),
            Err(error) => Err(failed(error)),
        };
        self.seen(written)
    }

    async fn purge(&mut self, ids: &[String]) -> Result<(), MarksError> {
        let bucket = self.bucket().await?;
        for id in ids {
            // A deletion by key would leave a message behind.
            let purged = bucket.stream.purge().filter(format!("{}{}", bucket.prefix, self.key(id))).await;
            self.seen(purged.map_err(failed))?;
        }
        Ok(())
    }
}
