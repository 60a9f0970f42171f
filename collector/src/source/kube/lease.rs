//! The election: one collector at a time watches what concerns the whole cluster.
//!
//! What enters: the Lease `tapio-collector`. What leaves: whether this collector leads, and since when the one before it may
//! have missed something. What must hold: two never lead at the same time for longer than a request takes. Each write names
//! the resource version that it replaces; another's Lease is taken only after it was not renewed for its duration by this
//! collector's own clock; a leader that could not renew gives up before its Lease runs out.

use std::sync::Arc;
use std::time::{Duration, Instant};

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::{ObjectMeta, PostParams};
use tokio::sync::watch;

use super::client::{Access, Trouble};
use crate::latency::realtime_ns;

/// The Lease's name.
pub const LEASE: &str = "tapio-collector";

/// How fast an election goes.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// How long a Lease is good for after it was renewed.
    pub duration: Duration,
    pub renew: Duration,
    /// When a leader that cannot renew gives up.
    pub give_up: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Self { duration: seconds(15), renew: seconds(5), give_up: seconds(10) }
    }
}

/// Leads since now; what happened since `since_ns` may not have been told by anybody (nanoseconds since 1970, the clock of
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
    /// Another's Lease as it was seen last, and when it changed by the own clock.
    others: Option<(String, Instant)>,
    renewed: Option<Instant>,
}

impl Election {
    /// A candidate of this name, which no other may have.
    pub fn new(access: Arc<Access>, namespace: String, identity: String, pace: Pace) -> Self {
        Self { access, namespace, identity, pace, others: None, renewed: None }
    }

    /// Takes part until dropped; `term` is what others look at.
    pub async fn run(mut self, term: watch::Sender<Option<Term>>) {
        loop {
            let asked = Instant::now();
            let attempt = tokio::time::timeout(self.pace.renew, self.attempt());
            match attempt.await.unwrap_or(Err(Trouble::Broken("no answer".into()))) {
                Ok(Some(since_ns)) => {
                    // The Lease was renewed at some moment after it was asked for.
                    self.renewed = Some(asked);
                    term.send_if_modified(|term| {
                        let is_new = term.is_none();
                        if is_new {
                            tracing::info!(identity = self.identity, "this collector watches the cluster's objects");
                            *term = Some(Term { since_ns });
                        }
                        is_new
                    });
                }
                Ok(None) => self.lose(&term, "another holds the Lease"),
                Err(trouble) => {
                    tracing::debug!(%trouble, "the Lease cannot be had");
                    if matches!(trouble, Trouble::Unauthorized) {
                        self.access.renew().await;
                    }
                    if self.renewed.is_some_and(|at| at.elapsed() >= self.pace.give_up) {
                        self.lose(&term, "the Lease could not be renewed");
                    }
                }
            }
            let pause = match (self.renewed, *term.borrow()) {
                // The give-up must not come late because of a nap.
                (Some(at), Some(_)) => self.pace.renew.min(self.pace.give_up.saturating_sub(at.elapsed())),
                _ => self.pace.renew,
            };
            tokio::time::sleep(pause.max(self.pace.renew / 8)).await;
        }
    }

    fn lose(&mut self, term: &watch::Sender<Option<Term>>, reason: &str) {
        self.renewed = None;
        if term.send_replace(None).is_some() {
            tracing::info!(identity = self.identity, reason, "this collector no longer watches the cluster's objects");
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
                metadata: ObjectMeta { name: Some(LEASE.into()), ..ObjectMeta::default() },
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
            let seen_at = match &self.others {
                Some((known, at)) if *known == version => *at,
                _ => {
                    self.others = Some((version, Instant::now()));
                    return Ok(None);
                }
            };
            let duration = before.lease_duration_seconds.and_then(|seconds| u64::try_from(seconds).ok());
            if seen_at.elapsed() < duration.map_or(self.pace.duration, Duration::from_secs) {
                return Ok(None);
            }
        }
        let since_ns = before
            .renew_time
            .as_ref()
            .and_then(|time| u64::try_from(time.0.as_nanosecond()).ok())
            .unwrap_or_else(|| self.nobody_since());
        // The resource version goes along in the metadata: the write fails when anybody else wrote in between.
        let lease = Lease { spec: Some(self.spec(Some(&before), !is_own)), ..lease };
        match leases.replace(LEASE, &write, &lease).await.map_err(Trouble::from) {
            Ok(_) => Ok(Some(since_ns)),
            Err(Trouble::Conflict(_)) => Ok(None),
            Err(trouble) => Err(trouble),
        }
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
        tracing::debug!(%error, "the Lease is left to run out");
    }
}
