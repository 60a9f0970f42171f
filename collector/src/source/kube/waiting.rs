//! Pods that no node has taken yet.
//!
//! What enters: the pods without a node, of the whole cluster. What leaves: an event when the scheduler has given a
//! reason, when the reason changes, again while it stands, and when the pod has a node or is gone. What must hold: a pod that is scheduled at
//! once is never reported. A pod's owner is reported with it, since no node's collector can name it yet.

use std::time::{Duration, Instant};

use super::client::Resource;
use super::objects::Pod;
use super::pods::{AGAIN, is_system, owner_of, subject_of};
use super::report::{Subject, WatchReport};
use super::watch::{Follower, digest};
use crate::intake::identity::directory::Owner;

/// Pods that are bound to no node.
pub fn without_node() -> Resource {
    Resource { fields: Some("spec.nodeName=".into()), ..Resource::new("pods without a node", "/api/v1/pods") }
}

/// Watches the pods that have no node yet.
pub struct Waiting {
    excludes_system: bool,
}

impl Waiting {
    /// Knows of none yet.
    pub fn new(excludes_system: bool) -> Self {
        Self { excludes_system }
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
}

impl Seen {
    fn event(&self, reason: &str, message: &str, is_gone: bool) -> WatchReport {
        let texts = ["Pod", &self.namespace, &self.name, "Waiting", reason, message];
        WatchReport::object_state(self.subject.clone(), texts, (0, 0), is_gone).owned_by(self.owner.clone())
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
        });
        let scheduled = pod.status.conditions.iter().find(|condition| condition.r#type == "PodScheduled");
        // While the scheduler has not looked at it there is nothing to say.
        if let Some(why) = scheduled.filter(|condition| condition.status == "False") {
            let print = digest(&(&why.reason, &why.message)).max(1);
            if seen.print != print {
                seen.print = print;
                seen.reported = Some((why.reason.clone(), why.message.clone(), Instant::now()));
                reports.push(seen.event(&why.reason, &why.message, false));
            }
        }
        Some(seen)
    }

    const LOOK: Option<Duration> = Some(Duration::from_secs(15));

    fn look(&mut self, now: Instant, seen: &mut Seen, reports: &mut Vec<WatchReport>) {
        let is_due = |at: &Instant| now.saturating_duration_since(*at) >= AGAIN;
        if let Some((reason, message, at)) = seen.reported.take_if(|(_, _, at)| is_due(at)) {
            reports.push(seen.event(&reason, &message, false));
            seen.reported = Some((reason, message, now.max(at)));
        }
    }

    fn forget(&mut self, seen: &mut Seen) -> bool {
        seen.print = 0;
        true
    }

    fn gone(&mut self, seen: Seen, reports: &mut Vec<WatchReport>) {
        if seen.reported.is_some() {
            reports.push(seen.event("", "", true));
        }
    }
}
