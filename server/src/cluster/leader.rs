//! Which of the servers leads, and so may deliver outwards.
//!
//! What enters: a lease in a key-value bucket of JetStream, which servers take and renew by compare-and-set. What leaves: a
//! [`Term`] while this server leads. What must hold: at most one term is valid at a time. This holds also when a server was
//! stopped and goes on, NATS lost what it had, or somebody sets a clock.
//!
//! ```text
//! holder      sends a renewal ── it is taken ───────── its term ends, unless it was renewed
//!                 │◄──────────────── LEASE - MARGIN ────────────────►│
//! candidate             sees the lease ◄──────────── LEASE ─────────────────► may take it, where it is the same still
//! ```
//!
//! A holder counts from before it asked, a candidate from after it was answered, both by `CLOCK_BOOTTIME` of their own machine. So
//! it does not matter what NATS' clock says, nor when NATS deletes the lease: its bucket's time to live only clears up behind
//! servers that are gone. A bucket that was recreated counts as a lease that was seen just now.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_nats::jetstream::kv::{Store, UpdateErrorKind};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::config::ClusterSection;
use super::link::Link;
use super::log::{Log, LogError};
use super::streams::Bucket;

/// The lease's key in its bucket.
const KEY: &str = "leader";
/// Multiple of its length after which a lease without renewals is deleted.
const BUCKET_AGE_LEASES: u32 = 6;
const VALUE_BYTES_MAX: i32 = 4096;
const BUCKET_BYTES_MAX: i64 = 1 << 20;
/// Why a leader gives up whose renewal came too late, or not at all.
const TOO_LATE: &str = "it could not renew its lease in time";
/// How long a leader that ends waits for its release.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(1);

/// How long a lease lasts, how it is kept, and how long a server waits for its archive.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// How long others leave a lease alone.
    pub lease: Duration,
    /// How much earlier its holder gives up: the possible drift between clocks during one lease.
    pub margin: Duration,
    /// Between two renewals, and between two looks.
    pub interval: Duration,
    /// First wait for frames that the archive does not have yet when the log is refilled from it; each next wait is twice as long.
    pub disk_wait: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        let (lease, margin) = (Duration::from_secs(12), Duration::from_secs(2));
        Self { lease, margin, interval: Duration::from_secs(2), disk_wait: Duration::from_millis(250) }
    }
}

/// Nanoseconds by a clock that nobody sets and that goes on while the machine sleeps.
fn boottime_ns() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32).as_nanos() as u64
}

fn nanos(duration: Duration) -> u64 {
    duration.as_nanos() as u64
}

/// Proof that this server leads, as long as it is valid. Check it before and after everything that only the leader may
/// do.
#[derive(Clone, Debug)]
pub struct Term {
    number: u64,
    /// End of the term by [`boottime_ns`]; renewals move it.
    until_ns: Arc<AtomicU64>,
}

impl Term {
    fn new(number: u64, until_ns: u64) -> Self {
        Self { number, until_ns: Arc::new(AtomicU64::new(until_ns)) }
    }

    /// Later leaders have higher ones.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Whether this server leads at this moment.
    pub fn is_valid_now(&self) -> bool {
        !self.left().is_zero()
    }

    /// How long it leads, unless it renews its lease; zero when the term is over.
    pub fn left(&self) -> Duration {
        // Relaxed: it guards nothing but itself.
        Duration::from_nanos(self.until_ns.load(Ordering::Relaxed).saturating_sub(boottime_ns()))
    }

    fn extend(&self, until_ns: u64) {
        self.until_ns.store(until_ns, Ordering::Relaxed);
    }

    fn end(&self) {
        self.extend(0);
    }
}

/// Who leads, as this server knows it.
pub struct Leadership {
    server: String,
    standing: watch::Sender<Standing>,
    changes: AtomicU64,
    /// The last term that was counted.
    term_seen: AtomicU64,
}

#[derive(Clone, Default)]
struct Standing {
    term: Option<Term>,
    /// Who holds the lease, and in which term.
    leader: Option<(String, u64)>,
}

impl Leadership {
    /// Makes the state of a server that shares a log with others: there is no leader until the lease is taken.
    pub fn shared(server: &str) -> Self {
        Self {
            server: server.into(),
            standing: watch::Sender::default(),
            changes: AtomicU64::new(0),
            term_seen: AtomicU64::new(0),
        }
    }

    /// Makes the state of the only server: it always leads.
    pub fn sole(server: &str) -> Self {
        let leadership = Self::shared(server);
        let (term, leader) = (Some(Term::new(1, u64::MAX)), Some((server.to_owned(), 1)));
        leadership.standing.send_replace(Standing { term, leader });
        leadership
    }

    /// Returns this server's term; [`None`] while it does not lead.
    pub fn term(&self) -> Option<Term> {
        self.standing.borrow().term.clone().filter(Term::is_valid_now)
    }

    /// Waits until this server leads.
    pub async fn led(&self) -> Term {
        let mut standing = self.standing.subscribe();
        loop {
            if let Some(term) = self.term() {
                return term;
            }
            // The sender is in `self`.
            let _ = standing.changed().await;
        }
    }

    /// The name of the server that leads; [`None`] while nobody does, or it is not known.
    pub fn leader(&self) -> Option<String> {
        if self.term().is_some() {
            return Some(self.server.clone());
        }
        let of_others = self.standing.borrow().leader.clone().filter(|(server, _)| *server != self.server);
        of_others.map(|(server, _)| server)
    }

    /// How often another term began, as far as this server saw it.
    pub fn changes(&self) -> u64 {
        self.changes.load(Ordering::Relaxed)
    }

    fn set(&self, term: Option<Term>, leader: Option<(String, u64)>) {
        self.standing.send_replace(Standing { term, leader: leader.clone() });
        if let Some((server, number)) = leader
            && self.term_seen.swap(number, Ordering::Relaxed) != number
        {
            self.changes.fetch_add(1, Ordering::Relaxed);
            tracing::info!(leader = server, term = number, "new leader");
        }
    }
}

/// What is in the bucket.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
struct Lease {
    server: String,
    /// Distinguishes a server's runs.
    run: String,
    term: u64,
    renewal: u64,
    /// True if its holder has ended: it may be taken at once.
    is_released: bool,
}

impl Lease {
    /// Whether it is the other one, renewed or not.
    fn is_of(&self, other: &Self) -> bool {
        self.run == other.run && self.term == other.term
    }
}

/// A lease of this run.
struct Held {
    lease: Lease,
    /// Revision of the lease in the bucket.
    revision: u64,
    term: Term,
}

/// What a candidate saw, and the moment at which it had seen it first.
struct Seen {
    /// When the bucket was made: revisions start again in another one.
    created_ns: i128,
    entry: Option<(u64, Vec<u8>)>,
    since_ns: u64,
}

/// What came of writing the lease.
enum Written {
    At(u64),
    /// There is another one than was expected.
    Refused,
}

/// Takes the lease where it is free, and keeps it.
pub(super) struct Election {
    config: ClusterSection,
    keep: Duration,
    timing: Timing,
    leadership: Arc<Leadership>,
    link: Arc<Link>,
    run: String,
    held: Option<Held>,
    seen: Option<Seen>,
    /// The highest term that this server knows of.
    term_max: u64,
    /// The last term of another server that it has seen going on.
    watched: Option<u64>,
    trouble: Option<String>,
}

impl Election {
    pub(super) fn new(
        config: &ClusterSection,
        keep: Duration,
        timing: Timing,
        leadership: Arc<Leadership>,
        link: Arc<Link>,
    ) -> Self {
        let started = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_nanos());
        Self {
            config: config.clone(),
            keep,
            timing,
            leadership,
            link,
            run: format!("{started:x}-{}", std::process::id()),
            held: None,
            seen: None,
            term_max: 0,
            watched: None,
            trouble: None,
        }
    }

    /// Stands for leader until `ended`, and then lets others lead at once.
    pub(super) async fn run(mut self, mut ended: watch::Receiver<bool>) {
        let mut bucket: Option<Store> = None;
        loop {
            if self.link.frozen.load(Ordering::Acquire) {
                let _ = ended.wait_for(|is| *is).await;
                return;
            }
            tokio::select! {
                outcome = self.step(&mut bucket) => self.note(outcome, &mut bucket),
                _ = ended.wait_for(|is| *is) => break,
            }
            tokio::select! {
                () = tokio::time::sleep(self.timing.interval) => {}
                _ = ended.wait_for(|is| *is) => break,
            }
        }
        if let (Some(bucket), Some(held)) = (bucket, self.give_up("it ends")) {
            let lease = Lease { is_released: true, renewal: held.lease.renewal + 1, ..held.lease };
            // Without it others wait until the lease is over.
            let _ = tokio::time::timeout(RELEASE_TIMEOUT, write(&bucket, &lease, held.revision)).await;
        }
    }

    fn note(&mut self, outcome: Result<(), LogError>, bucket: &mut Option<Store>) {
        let trouble = outcome.err().map(|error| error.to_string());
        if trouble.is_some() {
            // What it was connected to may not be what it is now.
            *bucket = None;
            if self.held.is_none() {
                self.leadership.set(None, None);
            }
        }
        if let Some(error) = trouble.as_ref().filter(|_| self.trouble != trouble) {
            tracing::warn!(error, "cannot read which server leads");
        }
        self.trouble = trouble;
        // Not before there is an answer, or none in time: others may get their answer a moment later, and never too long.
        if self.held.as_ref().is_some_and(|held| !held.term.is_valid_now()) {
            self.give_up(TOO_LATE);
        }
    }

    async fn step(&mut self, bucket: &mut Option<Store>) -> Result<(), LogError> {
        let bucket = match bucket {
            Some(bucket) => bucket,
            None => bucket.insert(self.connect().await?),
        };
        if self.held.as_ref().is_some_and(|held| !held.term.is_valid_now()) {
            self.give_up(TOO_LATE);
        }
        if self.link.cannot_heal.load(Ordering::Acquire) {
            // It delivers nothing until then: another may.
            self.give_up("its archive cannot be read");
            return Ok(());
        }
        match self.held {
            Some(_) => self.renew(bucket).await,
            None => self.stand(bucket).await,
        }
    }

    async fn connect(&self) -> Result<Store, LogError> {
        let log = Log::connect(&self.config, self.keep, &self.link.connections).await?;
        let bucket = Bucket {
            name: "LEADER",
            description: "Tapio: which of its servers leads",
            max_age: self.timing.lease * BUCKET_AGE_LEASES,
            max_bytes: BUCKET_BYTES_MAX,
            value_bytes_max: VALUE_BYTES_MAX,
        };
        log.bucket(&bucket).await
    }

    /// Keeps the lease.
    async fn renew(&mut self, bucket: &Store) -> Result<(), LogError> {
        // It stays there meanwhile: the server may end at any moment.
        let Some(held) = &self.held else { return Ok(()) };
        let lease = Lease { renewal: held.lease.renewal + 1, ..held.lease.clone() };
        let (known, sent_ns) = (held.revision, boottime_ns());
        let revision = match write(bucket, &lease, known).await? {
            Written::At(revision) => {
                // A term that lapsed during the write stays over: its users have seen that already.
                if held.term.is_valid_now() {
                    held.term.extend(self.until_ns(sent_ns));
                }
                revision
            }
            Written::Refused => match read(bucket).await? {
                // NATS has lost it. Nobody takes it within the term: they see a bucket that is new to them.
                None => 0,
                // A renewal had come through whose answer had not, or the last one is lost.
                Some((revision, value)) if decode(&value).is_some_and(|found| found.is_of(&lease)) => revision,
                Some(_) => {
                    self.give_up("another server has taken the lease");
                    return Ok(());
                }
            },
        };
        if let Some(held) = &mut self.held {
            (held.lease, held.revision) = (lease, revision);
        }
        Ok(())
    }

    /// Looks who leads, and takes the lease when that is nobody any more.
    async fn stand(&mut self, bucket: &Store) -> Result<(), LogError> {
        let created_ns = bucket.stream.get_info().await.map_err(failed)?.created.unix_timestamp_nanos();
        let entry = read(bucket).await?;
        let answered_ns = boottime_ns();
        let lease = entry.as_ref().and_then(|(_, value)| decode(value));
        self.term_max = self.term_max.max(lease.as_ref().map_or(0, |lease| lease.term));
        let revision = entry.as_ref().map_or(0, |(revision, _)| *revision);
        self.watched = lease.as_ref().filter(|lease| !lease.is_released).map(|lease| lease.term).or(self.watched);
        // NATS that lost later writes shows an old release again: only the release of the term that was seen going on counts.
        let is_known = |lease: &Lease| lease.term == self.term_max && self.watched == Some(lease.term);
        let is_released = lease.as_ref().is_some_and(|lease| lease.is_released && is_known(lease));
        let is_same = |seen: &&Seen| seen.created_ns == created_ns && seen.entry == entry;
        let since_ns = self.seen.as_ref().filter(is_same).map_or(answered_ns, |seen| seen.since_ns);
        let is_over = is_released || answered_ns - since_ns >= nanos(self.timing.lease);
        self.seen = Some(Seen { created_ns, entry, since_ns });
        if !is_over {
            // A lease of an earlier run of this server is nobody's.
            let leader = lease.filter(|lease| lease.run != self.run).map(|lease| (lease.server, lease.term));
            self.leadership.set(None, leader);
            return Ok(());
        }
        let lease = Lease {
            server: self.leadership.server.clone(),
            run: self.run.clone(),
            term: self.term_max + 1,
            renewal: 0,
            is_released: false,
        };
        let sent_ns = boottime_ns();
        if let Written::At(revision) = write(bucket, &lease, revision).await? {
            let term = Term::new(lease.term, self.until_ns(sent_ns));
            self.term_max = lease.term;
            self.seen = None;
            self.leadership.set(Some(term.clone()), Some((lease.server.clone(), lease.term)));
            self.held = Some(Held { lease, revision, term });
        }
        Ok(())
    }

    /// Until when a lease that was asked for at this moment is this server's.
    fn until_ns(&self, sent_ns: u64) -> u64 {
        sent_ns + nanos(self.timing.lease) - nanos(self.timing.margin)
    }

    fn give_up(&mut self, reason: &str) -> Option<Held> {
        let held = self.held.take()?;
        held.term.end();
        self.seen = None;
        self.leadership.set(None, None);
        tracing::info!(term = held.term.number, reason, "this server is no longer the leader");
        Some(held)
    }
}

fn failed(error: impl std::error::Error + Send + Sync + 'static) -> LogError {
    LogError::JetStream { what: "the lease of the leader", error: error.to_string() }
}

/// The lease of an entry. One whose numbers no servers get to in their lives is damaged, and nobody's.
fn decode(value: &[u8]) -> Option<Lease> {
    let lease: Lease = serde_json::from_slice(value).ok()?;
    (lease.term.max(lease.renewal) < u64::MAX / 2).then_some(lease)
}

/// The lease as it is in the bucket, and its place; also one that was deleted or that nobody can read.
async fn read(bucket: &Store) -> Result<Option<(u64, Vec<u8>)>, LogError> {
    let entry = bucket.entry(KEY).await.map_err(failed)?;
    Ok(entry.map(|entry| (entry.revision, entry.value.to_vec())))
}

/// Writes the lease where the one at `revision` is the last one; 0: where there is none.
async fn write(bucket: &Store, lease: &Lease, revision: u64) -> Result<Written, LogError> {
    let value = serde_json::to_vec(lease).map_err(failed)?;
    match bucket.update(KEY, value.into(), revision).await {
        Ok(revision) => Ok(Written::At(revision)),
        Err(error) if error.kind() == UpdateErrorKind::WrongLastRevision => Ok(Written::Refused),
        Err(error) => Err(failed(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_term_ends_for_all_holders_by_time_or_release() {
        let term = Term::new(3, boottime_ns() + nanos(Duration::from_secs(3600)));
        let other = term.clone();
        assert!(term.is_valid_now() && other.left() > Duration::from_secs(3500));
        other.end();
        assert!(!term.is_valid_now() && term.left().is_zero());
        term.extend(boottime_ns());
        assert!(!other.is_valid_now());
    }

    #[test]
    fn the_only_server_leads_always() {
        let leadership = Leadership::sole("a");
        let term = leadership.term().expect("it leads");
        assert!(term.left() > Duration::from_secs(1 << 30));
        assert_eq!((leadership.leader().as_deref(), leadership.changes()), (Some("a"), 0));
        assert_eq!(Leadership::shared("b").leader(), None);
    }

    #[test]
    fn a_holder_gives_up_before_others_may_take_over() {
        let timing = Timing::default();
        assert!(timing.margin > Duration::ZERO && timing.margin + 2 * timing.interval < timing.lease);
    }
}
