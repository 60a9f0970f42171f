//! Keeps findings for servers that join later.
//!
//! What enters: this server's findings, while it leads. What leaves: the last version of each, in a stream of NATS. What must hold:
//! nothing waits for it. What a server alone found is not kept before the log confirms it.

use std::collections::HashMap;
use std::hash::BuildHasher as _;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use foldhash::fast::RandomState;
use futures::future::try_join_all;
use prost::Message as _;
use tapio_wire::program::backoff::doubled;
use tapio_wire::service::Finding;
use tokio::runtime;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{broadcast, watch};
use tokio::time::timeout;

use crate::cluster::{
    ClusterSection, Connections, Leadership, Link, Log, LogError, MESSAGE_BYTES_MAX, Term, read_kept,
};
use crate::findings::FindingStore;
use crate::vitals::{Pulse, Sign};

/// Shortest pause between two attempts while NATS is away.
const BACK_OFF_MIN: Duration = Duration::from_millis(500);
const BACK_OFF_MAX: Duration = Duration::from_secs(5);
/// How often it is looked whether this server leads still, while nothing is found.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// Findings whose content is remembered; beyond that the stream is read again.
const CONTENTS_MAX: usize = 100_000;
/// Messages on their way at once.
const FLIGHT_MAX: usize = 64;
/// Owns the thread that keeps findings.
pub struct Keeper {
    end: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
    sign: Sign,
}

struct Writer {
    config: ClusterSection,
    store: Arc<FindingStore>,
    leadership: Arc<Leadership>,
    link: Arc<Link>,
    connections: Arc<Connections>,
}

/// What is in the stream: by id, what the last version says.
struct Written {
    hasher: RandomState,
    contents: HashMap<String, u64>,
}

impl Written {
    /// The message of a finding, unless the stream says the same already. When it was published, and how often, does not count:
    /// the next leader may have found the same by fewer steps.
    fn message(&mut self, finding: &Finding) -> Option<Vec<u8>> {
        let content = self.content(finding);
        (self.contents.insert(finding.id.clone(), content) != Some(content)).then(|| last_word(finding).encode_to_vec())
    }

    fn content(&self, finding: &Finding) -> u64 {
        let said = Finding { revision: 0, published_ns: 0, ..last_word(finding) };
        self.hasher.hash_one(said.encode_to_vec())
    }
}

/// Returns what is kept of a finding; of a withdrawn one only that it was withdrawn.
fn last_word(finding: &Finding) -> Finding {
    match finding.withdrawn {
        true => Finding {
            id: finding.id.clone(),
            withdrawn: true,
            superseded_by: finding.superseded_by.clone(),
            // Who took in the finding is to take in this.
            count: finding.count,
            started_ns: finding.started_ns,
            ended_ns: finding.ended_ns,
            published_ns: finding.published_ns,
            ..Finding::default()
        },
        false => finding.clone(),
    }
}

impl Keeper {
    /// Starts to keep what this server finds while it leads.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn start(
        config: &ClusterSection,
        store: &Arc<FindingStore>,
        leadership: &Arc<Leadership>,
        link: &Arc<Link>,
    ) -> io::Result<Self> {
        let (end, ended) = watch::channel(false);
        let writer = Writer {
            config: config.clone(),
            store: Arc::clone(store),
            leadership: Arc::clone(leadership),
            link: Arc::clone(link),
            connections: Arc::default(),
        };
        let pulse = Pulse::default();
        let sign = pulse.sign();
        let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
        let thread = std::thread::Builder::new().name("log-findings".into()).spawn(move || {
            let _pulse = pulse;
            runtime.block_on(writer.run(ended));
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

impl Drop for Keeper {
    fn drop(&mut self) {
        self.end.send_replace(true);
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread that keeps findings has failed");
        }
    }
}

impl Writer {
    /// Writes whenever this server leads, until `ended`.
    async fn run(self, mut ended: watch::Receiver<bool>) {
        tokio::select! {
            () = self.serve() => {}
            _ = ended.wait_for(|is| *is) => {}
        }
    }

    async fn serve(&self) {
        let mut failures = 0;
        loop {
            let term = self.leadership.led().await;
            match self.lead(&term).await {
                Ok(()) => failures = 0,
                Err(error) => {
                    failures += 1;
                    if failures == 1 {
                        tracing::warn!(%error, "cannot keep findings beyond the servers' log");
                    }
                    tokio::time::sleep(doubled(BACK_OFF_MIN, failures - 1, BACK_OFF_MAX)).await;
                }
            }
        }
    }

    /// What a server alone finds, or one that is behind, may not stand.
    fn may_write(&self, term: &Term) -> bool {
        term.is_valid_now() && self.link.is_confirmed() && !self.link.frozen.load(Ordering::Acquire)
    }

    async fn lead(&self, term: &Term) -> Result<(), LogError> {
        let log = Log::connect(&self.config, Duration::ZERO, &self.connections).await?;
        let stream = log.ensure_findings().await?;
        let created = async || Ok::<_, LogError>(stream.get_info().await.map_err(|error| failed(&error))?.created);
        let made_at = created().await?;
        let mut written = Written { hasher: RandomState::default(), contents: HashMap::new() };
        read_kept(&stream, |finding| {
            let content = written.content(&finding);
            written.contents.insert(finding.id, content);
        })
        .await?;
        let (mut changes, _) = self.store.watch();
        let (mut seen_ns, mut is_behind, mut has_paused) = (0, true, false);
        while term.is_valid_now() {
            if !self.may_write(term) {
                if self.link.frozen.load(Ordering::Acquire) {
                    // It says nothing more, as if it were killed.
                    return std::future::pending().await;
                }
                // Whether the term is valid still is to be looked at.
                let _ = timeout(LOOK_INTERVAL, self.link.confirmed()).await;
                (is_behind, has_paused) = (true, true);
                continue;
            }
            if std::mem::take(&mut has_paused) && created().await? != made_at {
                // NATS has lost what was written: it is written again, within the same term too.
                return Ok(());
            }
            let news = match std::mem::take(&mut is_behind) {
                true => self.store.changed_after(seen_ns),
                false => match next(&mut changes).await {
                    Ok(news) => news,
                    Err(()) => {
                        is_behind = true;
                        continue;
                    }
                },
            };
            for together in news.chunks(FLIGHT_MAX) {
                if !self.may_write(term) {
                    is_behind = true;
                    break;
                }
                self.write(&log, together, &mut written).await?;
            }
            if is_behind {
                continue;
            }
            if written.contents.len() > CONTENTS_MAX {
                // What the stream has forgotten meanwhile is forgotten here too.
                return Ok(());
            }
            seen_ns = news.last().map_or(seen_ns, |last| last.published_ns.max(seen_ns));
        }
        Ok(())
    }

    async fn write(&self, log: &Log, findings: &[Arc<Finding>], written: &mut Written) -> Result<(), LogError> {
        let mut acks = Vec::new();
        for finding in findings {
            let Some(message) = written.message(finding) else { continue };
            if message.len() > log.max_payload().min(MESSAGE_BYTES_MAX) {
                tracing::warn!(id = finding.id, bytes = message.len(), "finding too large to keep in the servers' log");
                continue;
            }
            let sent = log.context.publish(log.names.finding(&finding.id), Bytes::from(message)).await;
            acks.push(sent.map_err(|error| failed(&error))?.into_future());
        }
        try_join_all(acks).await.map_err(|error| failed(&error))?;
        Ok(())
    }
}

/// What is published next, with what is there besides; an error when something was missed.
async fn next(changes: &mut broadcast::Receiver<Arc<Finding>>) -> Result<Vec<Arc<Finding>>, ()> {
    let first = match timeout(LOOK_INTERVAL, changes.recv()).await {
        Ok(Ok(finding)) => finding,
        Ok(Err(RecvError::Lagged(_))) => return Err(()),
        // The store is there as long as this is.
        Ok(Err(RecvError::Closed)) | Err(_) => return Ok(Vec::new()),
    };
    let mut news = vec![first];
    while let Ok(finding) = changes.try_recv() {
        news.push(finding);
    }
    Ok(news)
}

fn failed(error: &dyn std::fmt::Display) -> LogError {
    LogError::JetStream { what: "the findings", error: error.to_string() }
}
