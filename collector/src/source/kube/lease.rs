//! The election: one collector at a time watches what concerns the whole cluster.
//!
//! What enters: the Lease `tapio-collector`. What leaves: whether this collector leads, and since when the one before
//! it may have missed something. What must hold: two never lead at the same time for longer than a request takes. Each
//! write names the resource version that it replaces. Another's Lease is taken only after it was not renewed for its
//! duration, by this collector's own clock. A leader that could not renew gives up before its Lease runs out.
//!
//! However many collectors there are, all together read the Lease about [`READS_PER_S`] times a second. The leader counts the
//! cluster's nodes and writes the count into the Lease; each of the others looks once in count / [`READS_PER_S`] seconds, each
//! at its own time. One that finds the Lease not renewed for its duration looks again when that has passed once more by its own
//! clock, and takes the Lease when nothing has changed. So the next leads within twice the duration and a few seconds.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::{ObjectMeta, PostParams};
use tapio_wire::program::backoff;
use tokio::sync::watch;

use super::client::{Access, Trouble};
use crate::base::clock::realtime_ns;

/// The Lease's name.
pub const LEASE: &str = "tapio-collector";

/// The annotation of the Lease in which the leader writes how many nodes there are.
const NODES: &str = "tapio-collector/nodes";
/// How often all collectors together look at a Lease that another holds.
const READS_PER_S: f64 = 4.0;
/// How long one waits that does not know yet how many there are, and the longest that one waits.
const UNKNOWN_PAUSE: Duration = Duration::from_secs(30);
const PAUSE_MAX: Duration = Duration::from_secs(3600);

/// How fast an election goes.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// How long a Lease is good for after it was renewed.
    pub duration: Duration,
    pub renew: Duration,
    /// When a leader that cannot renew gives up.
    pub give_up: Duration,
    /// Candidates that start at once look for the first time within this time.
    pub start: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Self { duration: seconds(15), renew: seconds(5), give_up: seconds(10), start: seconds(1) }
    }
}

/// Leads since now; what happened since `since_ns` may not have been reported by anybody (nanoseconds since 1970, the clock of
/// the leader before).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Term {
    pub since_ns: u64,
}

/// One candidate.
pub struct Election {
    access: Arc<Access>,
    namespace: String,
    identity: String,
    pace: Pace,
    /// Last seen Lease of another holder, and when it changed by the own clock.
    others: Option<(String, Instant)>,
    renewed: Option<Instant>,
    /// The nodes of the cluster, as this collector counts them while it leads; 0 when it does not know.
    nodes: Arc<AtomicU64>,
    /// How long to wait before another's Lease is looked at again.
    look_again: Duration,
    /// The last look found the Lease not renewed.
    is_closer: bool,
    /// Attempts in a row that brought no answer.
    failures: u32,
}

impl Election {
    /// A candidate of this name, which no other may have.
    pub fn new(access: Arc<Access>, namespace: String, identity: String, pace: Pace, nodes: Arc<AtomicU64>) -> Self {
        Self {
            access,
            namespace,
            identity,
            pace,
            others: None,
            renewed: None,
            nodes,
            look_again: pace.renew,
            is_closer: false,
            failures: 0,
        }
    }

    /// Takes part until dropped; `term` is what others look at.
    pub async fn run(mut self, term: watch::Sender<Option<Term>>) {
        tokio::time::sleep(backoff::up_to(self.pace.start)).await;
        loop {
            let asked = Instant::now();
            self.look_again = backoff::spread(self.pace.renew);
            let attempt = tokio::time::timeout(self.pace.renew, self.attempt());
            let outcome = attempt.await.unwrap_or(Err(Trouble::Broken("no answer".into())));
            if outcome.is_ok() {
                self.failures = 0;
            }
            match outcome {
                Ok(Some(since_ns)) => {
                    // The Lease was renewed at some moment after it was asked for.
                    self.renewed = Some(asked);
                    term.send_if_modified(|term| {
                        let is_new = term.is_none();
                        if is_new {
                            tracing::info!(
                                identity = self.identity,
                                "acquired the Lease: watching the cluster's objects"
                            );
                            *term = Some(Term { since_ns });
                        }
                        is_new
                    });
                }
                Ok(None) => self.lose(&term, "another holds the Lease"),
                Err(trouble) => {
                    tracing::debug!(%trouble, "cannot acquire the Lease");
                    if matches!(trouble, Trouble::Unauthorized) {
                        self.access.renew().await;
                    }
                    if self.renewed.is_some_and(|at| at.elapsed() >= self.pace.give_up) {
                        self.lose(&term, "the Lease could not be renewed");
                    }
                    // Where none may read the Lease, all would ask at the pace of a leader.
                    self.failures = self.failures.saturating_add(1);
                    if self.failures > 2 {
                        self.look_again = backoff::spread(UNKNOWN_PAUSE);
                    }
                }
            }
            let pause = match (self.renewed, *term.borrow()) {
                // The give-up must not come late because of a nap.
                (Some(at), Some(_)) => self.pace.renew.min(self.pace.give_up.saturating_sub(at.elapsed())),
                _ => self.look_again,
            };
            tokio::time::sleep(pause.max(self.pace.renew / 8)).await;
        }
    }

    fn lose(&mut self, term: &watch::Sender<Option<Term>>, reason: &str) {
        self.renewed = None;
        if term.send_replace(None).is_some() {
            tracing::info!(
                identity = self.identity,
                reason,
                "lost the Lease: no longer watching the cluster's objects"
            );
        }
    }

    /// Renews or takes the Lease. `Some` when it is this collector's, with the moment since when nobody watched.
    async fn attempt(&mut self) -> Result<Option<u64>, Trouble> {
        let leases: Api<Lease> = Api::namespaced(self.access.client(), &self.namespace);
        let write = PostParams::default();
        let found = match leases.get(LEASE).await.map_err(Trouble::from) {
            Ok(lease) => Some(lease),
            Err(Trouble::Absent) => None,
            Err(trouble) => return Err(trouble),
        };
        let Some(lease) = found else {
            let lease = Lease {
                metadata: ObjectMeta {
                    name: Some(LEASE.into()),
                    annotations: self.counted(None),
                    ..ObjectMeta::default()
                },
                spec: Some(self.spec(None, true)),
            };
            return match leases.create(&write, &lease).await.map_err(Trouble::from) {
                Ok(_) => Ok(Some(self.nobody_since())),
                Err(Trouble::Conflict(_)) => Ok(None),
                Err(trouble) => Err(trouble),
            };
        };
        let before = lease.spec.clone().unwrap_or_default();
        let holder = before.holder_identity.as_deref().unwrap_or_default();
        let is_own = holder == self.identity;
        if !is_own && !holder.is_empty() {
            let version = lease.metadata.resource_version.clone().unwrap_or_default();
            let duration = before.lease_duration_seconds.and_then(|seconds| u64::try_from(seconds).ok());
            let duration = duration.map_or(self.pace.duration, Duration::from_secs);
            let seen_at = match &self.others {
                Some((known, at)) if *known == version => *at,
                _ => {
                    // Clocks of nodes differ: this one's only says whether it is worth while to look closer. One that was
                    // found alive on the closer look is left alone for as long as any other.
                    let is_stale = |time: &MicroTime| {
                        let renewed_ns = u64::try_from(time.0.as_nanosecond()).unwrap_or(0);
                        realtime_ns().saturating_sub(renewed_ns) > duration.as_nanos() as u64
                    };
                    let is_suspected = before.renew_time.as_ref().is_none_or(is_stale) && !self.is_closer;
                    self.is_closer = is_suspected;
                    self.others = Some((version, Instant::now()));
                    self.look_again = match is_suspected {
                        true => duration + backoff::up_to(self.pace.renew / 4),
                        false => self.pause_of(&lease),
                    };
                    return Ok(None);
                }
            };
            if seen_at.elapsed() < duration {
                return Ok(None);
            }
        }
        let since_ns = before
            .renew_time
            .as_ref()
            .and_then(|time| u64::try_from(time.0.as_nanosecond()).ok())
            .unwrap_or_else(|| self.nobody_since());
        // The resource version goes along in the metadata: the write fails when anybody else wrote in between.
        let metadata =
            ObjectMeta { annotations: self.counted(lease.metadata.annotations.clone()), ..lease.metadata.clone() };
        let lease = Lease { metadata, spec: Some(self.spec(Some(&before), !is_own)) };
        match leases.replace(LEASE, &write, &lease).await.map_err(Trouble::from) {
            Ok(_) => Ok(Some(since_ns)),
            Err(Trouble::Conflict(_)) => Ok(None),
            Err(trouble) => Err(trouble),
        }
    }

    /// The annotations of the Lease, with the count of the nodes where it is known.
    fn counted(&self, annotations: Option<BTreeMap<String, String>>) -> Option<BTreeMap<String, String>> {
        match self.nodes.load(Ordering::Relaxed) {
            0 => annotations,
            nodes => {
                let mut annotations = annotations.unwrap_or_default();
                annotations.insert(NODES.into(), nodes.to_string());
                Some(annotations)
            }
        }
    }

    /// How long to leave a Lease alone that another renews.
    fn pause_of(&mut self, lease: &Lease) -> Duration {
        let nodes =
            lease.metadata.annotations.as_ref().and_then(|annotations| annotations.get(NODES)?.parse::<u32>().ok());
        let pause = nodes.map_or(UNKNOWN_PAUSE, |nodes| Duration::from_secs_f64(f64::from(nodes) / READS_PER_S));
        // From none to twice as long: collectors that were rolled out together must not all be silent at the same time.
        backoff::up_to(pause.clamp(self.pace.renew, PAUSE_MAX) * 2).max(self.pace.renew / 2)
    }

    fn nobody_since(&self) -> u64 {
        realtime_ns().saturating_sub(super::pods::RESTART.as_nanos() as u64)
    }

    fn spec(&self, before: Option<&LeaseSpec>, is_taken: bool) -> LeaseSpec {
        let now = MicroTime(Timestamp::now());
        let transitions = before.and_then(|before| before.lease_transitions).unwrap_or(0);
        LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: Some(i32::try_from(self.pace.duration.as_secs().max(1)).unwrap_or(i32::MAX)),
            acquire_time: if is_taken {
                Some(now.clone())
            } else {
                before.and_then(|before| before.acquire_time.clone())
            },
            renew_time: Some(now),
            lease_transitions: Some(transitions.saturating_add(i32::from(is_taken && before.is_some()))),
            ..LeaseSpec::default()
        }
    }
}

/// Gives the Lease back when it is held by `identity`, so that the next need not wait for it to run out.
pub async fn release(access: &Access, namespace: &str, identity: &str) {
    let leases: Api<Lease> = Api::namespaced(access.client(), namespace);
    let Ok(Some(mut lease)) = leases.get_opt(LEASE).await else { return };
    let Some(spec) = &mut lease.spec else { return };
    if spec.holder_identity.as_deref() != Some(identity) {
        return;
    }
    spec.holder_identity = None;
    spec.renew_time = Some(MicroTime(Timestamp::now()));
    if let Err(error) = leases.replace(LEASE, &PostParams::default(), &lease).await {
        tracing::debug!(%error, "cannot release the Lease: it expires by itself");
    }
}
