//! Silences that several servers share: a key-value bucket of the log, without a time to live.
//!
//! What enters: what people ask of this server, and what the bucket has. What leaves: every server knows the same. What must hold: a
//! silence counts when the bucket has it. Where NATS lost the bucket, each server puts back what it knows; of two that know
//! different things the end of a silence counts.

use std::io;
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use async_nats::jetstream::consumer::pull::{Ordered, OrderedConfig};
use async_nats::jetstream::kv::Store;
use futures::StreamExt;
use tapio_wire::program::backoff::doubled;
use tapio_wire::program::clock::now_ns;
use tapio_wire::service::Silence;
use tokio::runtime;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;

use super::Silences;
use crate::cluster::{Bucket, ClusterSection, Connections, Log, LogError};
use crate::vitals::{Pulse, Sign};

const BUCKET: Bucket = Bucket {
    name: "SILENCES",
    description: "Tapio: of which findings nobody is notified",
    max_age: Duration::ZERO,
    max_bytes: 16 << 20,
    value_bytes_max: 16 << 10,
};
/// How long somebody waits until a silence is kept.
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the next one may take while all are read.
const READ_TIMEOUT: Duration = Duration::from_secs(5);
/// How often old ones are looked for, and whether the bucket is still the same one.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);
const RETRY_MIN: Duration = Duration::from_millis(250);
const RETRY_MAX: Duration = Duration::from_secs(10);
/// Wishes that wait.
const WISHES_MAX: usize = 16;

/// A silence that is to be kept, and who waits for that.
pub(super) struct Wish {
    silence: Silence,
    kept: oneshot::Sender<Result<(), String>>,
}

/// Asks the thread to keep one.
pub(super) async fn write(log: &mpsc::Sender<Wish>, silence: Silence) -> Result<(), String> {
    let (kept, answer) = oneshot::channel();
    let asked = async {
        log.send(Wish { silence, kept }).await.map_err(|_| "the server ends".to_owned())?;
        answer.await.unwrap_or_else(|_| Err("the server ends".into()))
    };
    timeout(WRITE_TIMEOUT, asked).await.unwrap_or_else(|_| Err("the servers' log did not answer in time".into()))
}

/// Owns the thread that reads and writes the bucket.
pub struct SharedSilences {
    end: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
    sign: Sign,
}

struct Keeper {
    config: ClusterSection,
    silences: Arc<Silences>,
    connections: Arc<Connections>,
    wishes: mpsc::Receiver<Wish>,
    trouble: String,
}

impl SharedSilences {
    /// Starts to share them with the other servers.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn start(config: &ClusterSection, silences: &Arc<Silences>) -> io::Result<Self> {
        let (end, mut ended) = watch::channel(false);
        let (sender, wishes) = mpsc::channel(WISHES_MAX);
        *silences.log.write().unwrap_or_else(PoisonError::into_inner) = Some(sender);
        let mut keeper = Keeper {
            config: config.clone(),
            silences: Arc::clone(silences),
            connections: Arc::default(),
            wishes,
            trouble: "the servers' log was not reached yet".into(),
        };
        let pulse = Pulse::default();
        let sign = pulse.sign();
        let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
        let thread = std::thread::Builder::new().name("log-silences".into()).spawn(move || {
            let _pulse = pulse;
            runtime.block_on(async {
                tokio::select! {
                    () = keeper.run() => {}
                    _ = ended.wait_for(|is| *is) => {}
                }
            });
            // A name that is being looked up is not waited for.
            runtime.shutdown_background();
        })?;
        Ok(Self { end, thread: Some(thread), sign })
    }

    /// Whether the thread lives.
    pub fn sign(&self) -> Sign {
        self.sign.clone()
    }
}

impl Drop for SharedSilences {
    fn drop(&mut self) {
        self.end.send_replace(true);
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread that shares silences has failed");
        }
    }
}

fn failed(error: impl std::fmt::Display) -> LogError {
    LogError::JetStream { what: "the silences", error: error.to_string() }
}

impl Keeper {
    async fn run(&mut self) {
        let mut failures = 0;
        loop {
            let mut has_read = false;
            if let Err(error) = self.share(&mut has_read).await {
                failures = if has_read { 1 } else { failures + 1 };
                if failures == 1 {
                    tracing::warn!(%error, "cannot share silences with the other servers: retrying");
                }
                self.trouble = error.to_string();
                self.rest(doubled(RETRY_MIN, failures - 1, RETRY_MAX)).await;
            }
        }
    }

    /// Refuses what is asked for meanwhile.
    async fn rest(&mut self, pause: Duration) {
        let refusing = async {
            while let Some(wish) = self.wishes.recv().await {
                // Whoever asked may be gone.
                let _ = wish.kept.send(Err(self.trouble.clone()));
            }
            std::future::pending::<()>().await;
        };
        let _ = timeout(pause, refusing).await;
    }

    /// Reads the bucket, puts back what it lacks, and goes on until something breaks.
    async fn share(&mut self, has_read: &mut bool) -> Result<(), LogError> {
        let log = Log::connect(&self.config, Duration::ZERO, &self.connections).await?;
        let bucket = log.bucket(&BUCKET).await?;
        let created = bucket.stream.get_info().await.map_err(failed)?.created;
        let (mut messages, there) = self.read_all(&bucket).await?;
        let lacking: Vec<Silence> = self.silences.list(true).into_iter().filter(|one| !there.contains(one)).collect();
        for silence in lacking {
            put(&bucket, &silence).await?;
        }
        self.save();
        *has_read = true;
        let mut look = tokio::time::interval(LOOK_INTERVAL);
        loop {
            tokio::select! {
                message = messages.next() => {
                    let message = message.ok_or_else(|| failed("the consumer ended"))?.map_err(failed)?;
                    if self.take(&message.payload) {
                        self.save();
                    }
                }
                wish = self.wishes.recv() => {
                    let Some(wish) = wish else { return std::future::pending().await };
                    let outcome = put(&bucket, &wish.silence).await;
                    let answer = outcome.as_ref().map_err(ToString::to_string);
                    // Whoever asked may be gone.
                    let _ = wish.kept.send(answer.copied());
                    outcome?;
                }
                _ = look.tick() => {
                    if bucket.stream.get_info().await.map_err(failed)?.created != created {
                        return Err(failed("it is another bucket"));
                    }
                    self.forget_old(&bucket).await?;
                }
            }
        }
    }

    /// Reads what the bucket has now, and goes on from there.
    async fn read_all(&self, bucket: &Store) -> Result<(Ordered, Vec<Silence>), LogError> {
        let config = OrderedConfig { filter_subject: format!("{}>", bucket.prefix), ..OrderedConfig::default() };
        let consumer = bucket.stream.create_consumer(config).await.map_err(failed)?;
        let mut pending = consumer.cached_info().num_pending;
        let mut messages = consumer.messages().await.map_err(failed)?;
        let mut there = Vec::new();
        while pending > 0 {
            let message = timeout(READ_TIMEOUT, messages.next()).await.map_err(failed)?;
            let message = message.ok_or_else(|| failed("the consumer ended"))?.map_err(failed)?;
            pending = message.info().map_err(failed)?.pending;
            there.extend(serde_json::from_slice::<Silence>(&message.payload));
            self.take(&message.payload);
        }
        Ok((messages, there))
    }

    /// Takes in what a message says. What cannot be read says nothing.
    fn take(&self, payload: &[u8]) -> bool {
        match serde_json::from_slice::<Silence>(payload) {
            Ok(silence) if !silence.id.is_empty() => self.silences.take_in(silence),
            _ => false,
        }
    }

    async fn forget_old(&self, bucket: &Store) -> Result<(), LogError> {
        let before = self.silences.list(true);
        if !self.silences.known.write().unwrap_or_else(PoisonError::into_inner).forget_old(now_ns()) {
            return Ok(());
        }
        let after = self.silences.list(true);
        for gone in before.iter().filter(|one| !after.contains(one)) {
            // A deletion by key would leave a message behind.
            let subject = format!("{}{}", bucket.prefix, gone.id);
            bucket.stream.purge().filter(subject).await.map_err(failed)?;
        }
        self.save();
        Ok(())
    }

    fn save(&self) {
        if let Err(error) = self.silences.save(None) {
            tracing::warn!(%error, "cannot write silences.json: they are in the servers' log");
        }
    }
}

async fn put(bucket: &Store, silence: &Silence) -> Result<(), LogError> {
    let value = serde_json::to_vec(silence).map_err(failed)?;
    bucket.put(silence.id.as_str(), value.into()).await.map_err(failed)?;
    Ok(())
}
