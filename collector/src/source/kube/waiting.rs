//! Pods that no node has taken yet.
//!
//! What enters: the pods without a node, of the whole cluster. What leaves: an event when the scheduler has given a
//! reason, when the reason changes, again while it stands, and when the pod has a node or is gone. Its claims that are not
//! bound are reported with it, and a pod of which no scheduler has said anything for long. What must hold: a pod that is scheduled at
//! once is never reported. A pod's owner is reported with it, since no node's collector can name it yet.

use std::time::{Duration, Instant};

use super::claims::{KnownClaims, claims_of};
use super::client::Resource;
use super::objects::{Condition, Pod, unix_ns};
use super::pods::{AGAIN, is_system, owner_of, subject_of};
use super::report::{Subject, WatchReport};
use super::stuck::{self, Lasting};
use super::watch::{Follower, digest};
use crate::intake::identity::directory::Owner;

/// Pods that are bound to no node.
pub fn without_node() -> Resource {
    Resource { fields: Some("spec.nodeName=".into()), ..Resource::new("pods without a node", "/api/v1/pods") }
}

/// Watches the pods that have no node yet.
pub struct Waiting {
    excludes_system: bool,
    stuck_after: Duration,
    claims: KnownClaims,
}

impl Waiting {
    /// Knows of none yet. One of which no scheduler says anything for `stuck_after` is reported.
    pub fn new(excludes_system: bool, stuck_after: Duration, claims: KnownClaims) -> Self {
        Self { excludes_system, stuck_after, claims }
    }

    /// Reports which of its claims are not bound, where that is news or `again`.
    fn report_claims(&self, seen: &mut Seen, again: bool, reports: &mut Vec<WatchReport>) {
        let unbound = self.claims.unbound(&seen.namespace, &seen.claims);
        let print = digest(&unbound);
        if again || seen.claims_print != print {
            seen.claims_print = print;
            reports.extend(unbound.iter().map(|[name, phase, reason, message]| {
                let texts = ["PersistentVolumeClaim", &seen.namespace, name, phase, reason, message];
                WatchReport::object_state(seen.subject.clone(), texts, (0, 0), false).owned_by(seen.owner.clone())
            }));
        }
    }
}

/// What was reported of a pod.
pub struct Seen {
    subject: Subject,
    owner: Option<Owner>,
    namespace: String,
    name: String,
    /// Digest of the last report; 0 for none, or none on this stream.
    print: u64,
    /// What the scheduler said last, reason and message, and when that was reported.
    reported: Option<(String, String, Instant)>,
    /// No scheduler has said anything, and when that was reported last.
    unseen: Option<(Lasting, Option<Instant>)>,
    claims: Vec<String>,
    /// Of what was reported of them.
    claims_print: u64,
}

impl Seen {
    fn event(&self, reason: &str, message: &str, is_gone: bool) -> WatchReport {
        let texts = ["Pod", &self.namespace, &self.name, "Waiting", reason, message];
        WatchReport::object_state(self.subject.clone(), texts, (0, 0), is_gone).owned_by(self.owner.clone())
    }
}

impl Seen {
    fn trouble(&self, lasting: &Lasting, is_over: bool) -> WatchReport {
        stuck::event(&self.subject, lasting, is_over).owned_by(self.owner.clone())
    }
}

/// What the condition says, and the names of the pod's scheduling gates, which it leaves out.
fn message_of(pod: &Pod, why: &Condition) -> String {
    let gates: Vec<&str> = pod.spec.scheduling_gates.iter().map(|gate| &*gate.name).collect();
    match gates.is_empty() {
        true => why.message.clone(),
        false => format!("{}: {}", why.message, gates.join(", ")),
    }
}

impl Follower for Waiting {
    type Object = Pod;
    type Kept = Seen;

    fn seen(&mut self, pod: &Pod, state: Option<Seen>, _first: bool, reports: &mut Vec<WatchReport>) -> Option<Seen> {
        let meta = &pod.metadata;
        if self.excludes_system && is_system(&meta.namespace) {
            return None;
        }
        let mut seen = state.unwrap_or_else(|| Seen {
            subject: subject_of(pod),
            owner: owner_of(pod),
            namespace: meta.namespace.clone(),
            name: meta.name.clone(),
            print: 0,
            reported: None,
            unseen: None,
            claims: claims_of(pod),
            claims_print: 0,
        });
        let scheduled = pod.status.conditions.iter().find(|condition| condition.r#type == "PodScheduled");
        let before = seen.unseen.take();
        match (scheduled, before) {
            // While the scheduler has not looked at it there is nothing to say, for a while.
            (None, before) => {
                let why = format!("no scheduler has said anything of it; it asks for {}", pod.spec.scheduler_name);
                let since_ns = unix_ns(meta.creation_timestamp.as_ref());
                let lasting = Lasting { what: "pending", since_ns, container: String::new(), why };
                seen.unseen = Some((lasting, before.and_then(|(_, reported)| reported)));
            }
            (Some(_), Some((lasting, Some(_)))) => reports.push(seen.trouble(&lasting, true)),
            (Some(_), _) => {}
        }
        if let Some(why) = scheduled.filter(|condition| condition.status == "False") {
            let message = message_of(pod, why);
            let print = digest(&(&why.reason, &message)).max(1);
            if seen.print != print {
                seen.print = print;
                reports.push(seen.event(&why.reason, &message, false));
                seen.reported = Some((why.reason.clone(), message, Instant::now()));
            }
        }
        self.look(Instant::now(), &mut seen, reports);
        Some(seen)
    }

    const LOOK: Option<Duration> = Some(Duration::from_secs(15));

    fn look(&mut self, now: Instant, seen: &mut Seen, reports: &mut Vec<WatchReport>) {
        let is_due = |at: &Instant| now.saturating_duration_since(*at) >= AGAIN;
        if let Some((reason, message, at)) = seen.reported.take_if(|(_, _, at)| is_due(at)) {
            reports.push(seen.event(&reason, &message, false));
            seen.reported = Some((reason, message, now.max(at)));
            self.report_claims(seen, true, reports);
        } else if seen.reported.is_some() {
            self.report_claims(seen, false, reports);
        }
        if let Some((lasting, reported)) = seen.unseen.take() {
            let is_due = reported.is_none_or(|at| is_due(&at)) && lasting.has_lasted(self.stuck_after);
            if is_due {
                reports.push(seen.trouble(&lasting, false));
            }
            seen.unseen = Some((lasting, if is_due { Some(now) } else { reported }));
        }
    }

    fn forget(&mut self, seen: &mut Seen) -> bool {
        (seen.print, seen.claims_print) = (0, 0);
        if let Some((_, reported)) = &mut seen.unseen {
            *reported = None;
        }
        true
    }

    fn gone(&mut self, seen: Seen, reports: &mut Vec<WatchReport>) {
        if seen.reported.is_some() {
            reports.push(seen.event("", "", true));
        }
        if let Some((lasting, Some(_))) = &seen.unseen {
            reports.push(seen.trouble(lasting, true));
        }
    }
}
