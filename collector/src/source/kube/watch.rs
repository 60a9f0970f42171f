//! One watch: a list, then changes, for ever.
//!
//! What enters: a resource's objects. What leaves: what the follower of this resource reports of them. What must hold:
//! - a watch that ends is resumed from the last resource version that was seen, bookmarks included;
//! - when that version is too old (410), the list is read again: objects missing in it are reported as gone. A gap
//!   states since when changes may be missed;
//! - no answer, whichever it is, makes this a busy loop: a watch that ends early again and again is opened ever less often;
//! - on a new stream to a server, which may know nothing, the present states are reported once more (see [`Follower::forget`]);
//! - of each object only the follower's state is kept.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures::StreamExt;
use kube::core::WatchEvent;

use tapio_wire::program::backoff::Backoff;
use tokio::sync::watch as channel;

use super::client::{Access, Resource, Trouble, WATCH_TIMEOUT_S};
use super::objects::Object;
use super::report::{ReportSender, WatchReport};
use crate::base::clock::boottime_ns;
use crate::base::status::Status;

/// The pauses between failures, before they are spread.
const PAUSE_FIRST: Duration = Duration::from_millis(250);
const PAUSE_LONGEST: Duration = Duration::from_secs(30);
/// A watch that lived this long was a sound one.
const SOUND: Duration = Duration::from_secs(10);
/// Beyond the time after which the API server ends a watch, silence means that the connection is dead.
const SILENCE_MAX: Duration = Duration::from_secs(WATCH_TIMEOUT_S as u64 + 20);
/// How often in a row a watch may fail for an unknown reason before the list is read again.
const FAILURES_MAX: u32 = 8;
/// How many failures in a row are reported, once.
const REPORTED_FAILURES: u32 = 4;
/// How long to wait before a resource is tried again that may not be read.
const FORBIDDEN_PAUSE: Duration = Duration::from_secs(60);

/// How far apart lists for the sake of new streams are: streams may come and go by the second.
const RELIST_INTERVAL: Duration = Duration::from_secs(10);

/// What is made of a resource's objects.
pub trait Follower: Send {
    type Object: Object;
    /// What is kept of an object.
    type Kept: Send;

    /// An object that is new or has changed, or is as before when a list was read again. `first` marks the first list: what was
    /// so before anybody looked.
    fn seen(
        &mut self,
        object: &Self::Object,
        state: Option<Self::Kept>,
        first: bool,
        reports: &mut Vec<WatchReport>,
    ) -> Option<Self::Kept>;

    /// An object is gone.
    fn gone(&mut self, state: Self::Kept, reports: &mut Vec<WatchReport>);

    /// There is a new stream: what was reported of this object's present state is to be reported again when it is listed. False when
    /// the resource is one of moments, which are reported once.
    fn forget(&mut self, _state: &mut Self::Kept) -> bool {
        false
    }

    /// How often [`Self::look`] is called between changes; never, where it is none.
    const LOOK: Option<Duration> = None;

    /// Time went by: looks at what is kept of an object.
    fn look(&mut self, _now: Instant, _state: &mut Self::Kept, _reports: &mut Vec<WatchReport>) {}

    /// A list was read to its end.
    fn listed(&mut self, _reports: &mut Vec<WatchReport>) {}
}

/// Outcomes of lists and watches, for metrics.
pub const WATCH_OUTCOMES: [&str; 11] = [
    "listed",
    "closed",
    "silent",
    "expired",
    "unauthorized",
    "forbidden",
    "absent",
    "conflict",
    "busy",
    "undecodable",
    "broken",
];

/// Counts of [`WATCH_OUTCOMES`], over all watches.
#[derive(Default)]
pub struct WatchCounts([AtomicU64; WATCH_OUTCOMES.len()]);

impl WatchCounts {
    /// Each outcome and its count.
    pub fn get(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        WATCH_OUTCOMES.into_iter().zip(self.0.iter().map(|count| count.load(Ordering::Relaxed)))
    }

    /// Counts one.
    pub fn add(&self, outcome: &str) {
        if let Some(index) = WATCH_OUTCOMES.iter().position(|known| *known == outcome) {
            self.0[index].fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// What all watches share.
#[derive(Clone)]
pub struct Context {
    pub access: Arc<Access>,
    pub sender: ReportSender,
    pub counts: Arc<WatchCounts>,
    pub node: Arc<str>,
    /// Shows what the source waits for, by the watch of this node's pods.
    pub status: Status,
    /// Counts the streams to servers.
    pub streams: channel::Receiver<u64>,
}

/// The API server has no such resource.
pub struct Absent;

struct Watch<'a, F: Follower> {
    context: &'a Context,
    resource: &'a Resource,
    follower: &'a mut F,
    states: HashMap<u64, F::Kept, foldhash::fast::RandomState>,
    /// Where to go on; `None` when a list is due.
    version: Option<String>,
    has_listed: bool,
    /// Why changes may be missed since the last list; the next list states it.
    gap: Option<&'static str>,
    reports: Vec<WatchReport>,
    /// When something was heard last.
    heard_ns: u64,
    streams: channel::Receiver<u64>,
    listed_at: Instant,
    looked_at: Instant,
}

/// Follows a resource until it is dropped, or the API server turns out not to have it.
pub async fn follow<F: Follower>(context: &Context, resource: &Resource, follower: &mut F) -> Absent {
    let mut watch = Watch {
        context,
        resource,
        follower,
        states: HashMap::default(),
        version: None,
        has_listed: false,
        gap: None,
        reports: Vec::new(),
        heard_ns: boottime_ns(),
        streams: context.streams.clone(),
        listed_at: Instant::now(),
        looked_at: Instant::now(),
    };
    let mut backoff = Backoff::new(PAUSE_FIRST, PAUSE_LONGEST);
    loop {
        let began = Instant::now();
        // While nothing can be read, what is known goes on.
        if F::LOOK.is_some_and(|every| began.saturating_duration_since(watch.looked_at) >= every) {
            watch.look();
            context.sender.send(&mut watch.reports).await;
        }
        let outcome = match watch.version.clone() {
            None => match watch.list().await {
                Ok(()) => {
                    context.counts.add("listed");
                    if resource.is_small {
                        context.status.runs();
                    }
                    watch.gap = None;
                    // The pauses go on to grow where lists succeed and the watches after them fail.
                    continue;
                }
                Err(trouble) => Err(trouble),
            },
            Some(version) => watch.changes(&version).await,
        };
        if began.elapsed() >= SOUND {
            backoff.reset();
        }
        let mut asked = None;
        match outcome {
            Ok(outcome) => {
                context.counts.add(outcome);
                if resource.is_small {
                    context.status.runs();
                }
            }
            Err(trouble) => match watch.interrupted(trouble, backoff.failures()).await {
                Ok(pause) => asked = pause,
                Err(absent) => return absent,
            },
        }
        if began.elapsed() < SOUND || asked.is_some() {
            let pause = match asked {
                Some(asked) => backoff.pause_asked(asked),
                None => backoff.pause(),
            };
            if backoff.failures() == REPORTED_FAILURES {
                tracing::warn!(what = resource.what, "watch keeps failing: retrying");
            }
            tokio::time::sleep(pause).await;
        }
    }
}

/// Waits until another look is due.
async fn look_due(every: Option<Duration>, looked_at: Instant) {
    match every {
        Some(every) => tokio::time::sleep_until((looked_at + every).into()).await,
        None => std::future::pending().await,
    }
}

/// Waits for the next stream to a server, and then until `due`.
async fn new_stream(streams: &mut channel::Receiver<u64>, due: Instant) {
    let is_known = match streams.has_changed() {
        Ok(true) => true,
        Ok(false) => streams.changed().await.is_ok(),
        Err(_) => false,
    };
    if !is_known {
        // The source ends, and the watches with it.
        std::future::pending::<()>().await;
    }
    streams.mark_changed();
    tokio::time::sleep_until(due.into()).await;
    streams.mark_unchanged();
}

fn key<T: Object>(object: &T) -> u64 {
    let meta = object.meta();
    match meta.uid.is_empty() {
        false => digest(&meta.uid),
        true => digest(&(&meta.namespace, &meta.name)),
    }
}

/// A number that stands for what was reported.
pub fn digest(of: &impl std::hash::Hash) -> u64 {
    use std::hash::BuildHasher;
    foldhash::quality::FixedState::with_seed(0).hash_one(of)
}

impl<F: Follower> Watch<'_, F> {
    /// Decides what an error means for the next attempt, after so many failures in a row before it.
    ///
    /// Returns the pause that the error asks for.
    ///
    /// # Errors
    /// [`Absent`], when the API server never had the resource.
    async fn interrupted(&mut self, trouble: Trouble, failures: u32) -> Result<Option<Duration>, Absent> {
        let (context, what) = (self.context, &self.resource.what);
        context.counts.add(trouble.name());
        if self.resource.is_small && !matches!(trouble, Trouble::Expired) {
            context.status.waits_for(format!("waiting for the API server ({what}): {trouble}"));
        }
        tracing::debug!(what, %trouble, "watch interrupted");
        let mut asked = None;
        match trouble {
            Trouble::Expired if self.has_listed => {
                self.gap = Some("expired");
                self.version = None;
            }
            Trouble::Undecodable(_) if self.has_listed => {
                self.gap = Some("undecodable");
                self.version = None;
            }
            Trouble::Unauthorized => context.access.renew().await,
            Trouble::Absent if self.version.is_none() && !self.has_listed => return Err(Absent),
            Trouble::Absent => self.version = None,
            Trouble::Forbidden(reason) => {
                if failures == 0 {
                    tracing::warn!(what, reason, "RBAC denies reading this resource; see docs/kubernetes.md");
                }
                asked = Some(FORBIDDEN_PAUSE);
            }
            Trouble::Busy { retry_after, .. } => asked = retry_after,
            _ => {}
        }
        if failures >= FAILURES_MAX && self.has_listed && self.version.take().is_some() {
            self.gap = Some("watch failed");
        }
        Ok(asked)
    }

    /// Reads the list, page by page, and compares it with what is known.
    async fn list(&mut self) -> Result<(), Trouble> {
        let is_first = !self.has_listed;
        let mut listed: HashSet<u64, foldhash::fast::RandomState> = HashSet::default();
        let mut token = String::new();
        let version = loop {
            let page = self.context.access.list::<F::Object>(self.resource, &token, is_first).await?;
            for object in &page.items {
                let key = key(object);
                listed.insert(key);
                self.see(key, object, is_first);
                // Page by page would do for the tables, not for the channel's bound.
                self.context.sender.send(&mut self.reports).await;
            }
            if page.metadata.r#continue.is_empty() {
                break page.metadata.resource_version;
            }
            token = page.metadata.r#continue;
        };
        let missing: Vec<u64> = self.states.keys().filter(|key| !listed.contains(key)).copied().collect();
        for key in &missing {
            if let Some(state) = self.states.remove(key) {
                self.follower.gone(state, &mut self.reports);
            }
            self.context.sender.send(&mut self.reports).await;
        }
        self.follower.listed(&mut self.reports);
        if let Some(reason) = self.gap {
            let found_gone = u32::try_from(missing.len()).unwrap_or(u32::MAX);
            self.reports.push(WatchReport::gap(
                &self.context.node,
                self.resource.what,
                reason,
                self.heard_ns,
                found_gone,
            ));
        }
        self.context.sender.send(&mut self.reports).await;
        self.has_listed = true;
        self.listed_at = Instant::now();
        self.heard_ns = boottime_ns();
        self.version = Some(version);
        Ok(())
    }

    /// Takes changes until the watch ends. Returns how it ended.
    async fn changes(&mut self, version: &str) -> Result<&'static str, Trouble> {
        let mut changes = self.context.access.watch::<F::Object>(self.resource, version).await?;
        let mut silent_from = Instant::now() + SILENCE_MAX;
        loop {
            let change = tokio::select! {
                biased;
                change = changes.next() => change,
                () = tokio::time::sleep_until(silent_from.into()) => return Ok("silent"),
                () = look_due(F::LOOK, self.looked_at) => {
                    self.look();
                    self.context.sender.send(&mut self.reports).await;
                    continue;
                }
                () = new_stream(&mut self.streams, self.listed_at + RELIST_INTERVAL) => {
                    let follower = &mut *self.follower;
                    let forgotten: usize =
                        self.states.values_mut().map(|state| usize::from(follower.forget(state))).sum();
                    if forgotten > 0 {
                        tracing::debug!(what = self.resource.what, forgotten, "new stream: relisting resources");
                        self.version = None;
                        return Ok("closed");
                    }
                    continue;
                }
            };
            silent_from = Instant::now() + SILENCE_MAX;
            let Some(change) = change else { return Ok("closed") };
            let change = change?;
            match change {
                WatchEvent::Added(object) | WatchEvent::Modified(object) => {
                    self.see(key(&object), &object, false);
                    self.note_version(&object.meta().resource_version);
                }
                WatchEvent::Deleted(object) => {
                    let key = key(&object);
                    // It carries the last state, which may say more than what was reported so far.
                    self.see(key, &object, false);
                    if let Some(state) = self.states.remove(&key) {
                        self.follower.gone(state, &mut self.reports);
                    }
                    self.note_version(&object.meta().resource_version);
                }
                WatchEvent::Bookmark(bookmark) => self.note_version(&bookmark.metadata.resource_version),
                WatchEvent::Error(_) => unreachable!("the client turns it into an error"),
            }
            self.context.sender.send(&mut self.reports).await;
            self.heard_ns = boottime_ns();
        }
    }

    fn see(&mut self, key: u64, object: &F::Object, first: bool) {
        let state = self.states.remove(&key);
        if let Some(state) = self.follower.seen(object, state, first, &mut self.reports) {
            self.states.insert(key, state);
        }
    }

    fn look(&mut self) {
        let now = Instant::now();
        self.looked_at = now;
        for state in self.states.values_mut() {
            self.follower.look(now, state, &mut self.reports);
        }
    }

    fn note_version(&mut self, version: &str) {
        if !version.is_empty() {
            self.version = Some(version.to_owned());
        }
    }
}
