//! Kubernetes Events, and the states of autoscalers and claims.
//!
//! What enters: the objects. What leaves: one event for each new or repeated Kubernetes Event, and one for each change
//! of a state. What must hold: an Event is a moment, reported only when it came after the former leader was last known
//! to be there. A state is reported once at the beginning and then when it changes.

use std::sync::Arc;

use tapio_wire::event::{Detail, KubeEvent};
use tapio_wire::program::EVENTS_COMPONENT;

use super::claims::KnownClaims;
use super::objects::{self, unix_ns};
use super::pods::is_system;
use super::report::{Subject, WatchReport};
use super::watch::{Follower, digest};
use super::workloads::ReplicaSets;
use crate::base::clock::realtime_ns;
use crate::intake::identity::directory::Directory;

/// How far clocks of different nodes may be apart for an Event still to be taken for new.
const SKEW_NS: u64 = 5_000_000_000;

/// An Event that arrives later than this was delayed by an outage of the API server, or by a change of leader. It keeps its own time,
/// so that it explains nothing that happens now. All others get the time of their arrival: an Event's own time has seconds only, and
/// is by another clock.
const LATE_NS: u64 = 30_000_000_000;
/// The same of an Event by which the control plane says that it deletes a pod. Its time is compared with that of the deletion, of
/// which nothing else may say who asked for it: before Kubernetes 1.25 the pod has no such condition.
const LATE_CLAIM_NS: u64 = 2_000_000_000;
/// Reasons of such Events.
const CLAIMS: [&str; 2] = ["Preempted", "TaintManagerEviction"];

/// Kubernetes Events.
pub struct Events {
    node: Arc<str>,
    directory: Arc<Directory>,
    replica_sets: ReplicaSets,
    claims: KnownClaims,
    since_ns: u64,
    excludes_system: bool,
}

impl Events {
    /// Reports Events after `since_ns`. An Event about a ReplicaSet gets its Deployment as subject. One without a uid gets the pod of
    /// its name, where that is of this node. The claims learn what is said of them.
    pub fn new(
        node: Arc<str>,
        (directory, replica_sets, claims): (Arc<Directory>, ReplicaSets, KnownClaims),
        since_ns: u64,
        excludes_system: bool,
    ) -> Self {
        Self { node, directory, replica_sets, claims, since_ns: since_ns.saturating_sub(SKEW_NS), excludes_system }
    }
}

/// The message. The scheduler names who took a pod's place by its uid alone since Kubernetes 1.29, from 1.26 on not at all, and
/// refers to it.
fn message_of(event: &objects::Event) -> String {
    let (message, by) = (&event.message, &event.related);
    let name = format!("{}/{}", by.namespace, by.name);
    let is_unnamed = by.kind == "Pod" && !by.name.is_empty() && !message.contains(&name);
    if event.reason != "Preempted" || !is_unnamed {
        return message.clone();
    }
    match !by.uid.is_empty() && message.contains(&*by.uid) {
        true => message.replacen(&*by.uid, &name, 1),
        false => format!("{message} (pod {name})"),
    }
}

impl Follower for Events {
    type Object = objects::Event;
    /// What was reported of it: how often and when it was said.
    type Kept = u64;

    fn seen(
        &mut self,
        event: &objects::Event,
        state: Option<u64>,
        _first: bool,
        reports: &mut Vec<WatchReport>,
    ) -> Option<u64> {
        let micro = |time: &Option<k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime>| {
            time.as_ref().map_or(0, |time| u64::try_from(time.0.as_nanosecond()).unwrap_or(0))
        };
        let made_ns = unix_ns(event.metadata.creation_timestamp.as_ref());
        let first_ns = [unix_ns(event.first_timestamp.as_ref()), micro(&event.event_time), made_ns];
        let first_ns = first_ns.into_iter().find(|time| *time > 0).unwrap_or(0);
        let series = event.series.as_ref();
        let last_ns = [
            series.map_or(0, |series| micro(&series.last_observed_time)),
            unix_ns(event.last_timestamp.as_ref()),
            first_ns,
        ];
        let last_ns = last_ns.into_iter().find(|time| *time > 0).unwrap_or(0);
        let count = series.map_or(event.count, |series| series.count).max(1);
        let print = digest(&(count, last_ns));
        if state != Some(print) {
            self.claims.said(event);
        }
        let about = &event.involved_object;
        let component = match event.source.component.is_empty() {
            true => &event.reporting_component,
            false => &event.source.component,
        };
        // Tapio's own words about a pod are no evidence.
        let is_own = component == EVENTS_COMPONENT;
        let is_excluded = is_own || self.excludes_system && is_system(&about.namespace);
        if state == Some(print) || last_ns < self.since_ns || is_excluded {
            return Some(print);
        }
        let owner = match &*about.kind {
            "ReplicaSet" => self.replica_sets.owner(&about.namespace, &about.name),
            // The controller that evicts pods for a taint names none.
            "Pod" if about.uid.is_empty() => {
                let uid = self.directory.uid_of(&about.namespace, &about.name);
                uid.and_then(|uid| Subject::of("Pod", &about.namespace, &about.name, &uid))
            }
            _ => None,
        };
        let subject = owner.or_else(|| Subject::of(&about.kind, &about.namespace, &about.name, &about.uid));
        let subject = subject.unwrap_or_else(|| Subject::Node(self.node.to_string()));
        let message = message_of(event);
        let texts = [&event.reason, &message, &about.kind, &about.namespace, &about.name, &about.field_path, component];
        let texts = texts.map(Clone::clone);
        let is_warning = event.r#type == "Warning";
        let late_ns = realtime_ns().saturating_sub(last_ns);
        let is_claim = CLAIMS.contains(&&*event.reason);
        let late_ns = if late_ns > if is_claim { LATE_CLAIM_NS } else { LATE_NS } { late_ns } else { 0 };
        let of_event = WatchReport::event(subject, move |batch| {
            let [reason, message, kind, namespace, name, field_path, component] = texts.map(|text| batch.text(&text));
            Detail::KubeEvent(Box::new(KubeEvent {
                reason,
                message,
                kind,
                namespace,
                name,
                field_path,
                component,
                count,
                first_ns,
                last_ns,
                is_warning,
            }))
        });
        reports.push(of_event.ago(late_ns));
        Some(print)
    }

    fn gone(&mut self, _state: u64, _reports: &mut Vec<WatchReport>) {
        // An Event that ran out says nothing.
    }
}

/// What was reported of an object of which only the state matters.
pub struct SeenState {
    subject: Subject,
    kind: &'static str,
    namespace: String,
    name: String,
    print: u64,
}

struct ReportedState<'a> {
    state: &'a str,
    reason: &'a str,
    message: &'a str,
    current: u64,
    desired: u64,
}

/// Reports a state when it is new.
fn report_state(mut seen: SeenState, state: &ReportedState<'_>, reports: &mut Vec<WatchReport>) -> SeenState {
    let print = digest(&(state.state, state.reason, state.current, state.desired));
    if seen.print != print {
        seen.print = print;
        reports.push(state_event(&seen, state, false));
    }
    seen
}

fn state_event(seen: &SeenState, state: &ReportedState<'_>, is_gone: bool) -> WatchReport {
    let texts = [seen.kind, &seen.namespace, &seen.name, state.state, state.reason, state.message];
    WatchReport::object_state(seen.subject.clone(), texts, (state.current, state.desired), is_gone)
}

fn state_gone(seen: &SeenState, reports: &mut Vec<WatchReport>) {
    reports.push(state_event(
        seen,
        &ReportedState { state: "", reason: "", message: "", current: 0, desired: 0 },
        true,
    ));
}

/// HorizontalPodAutoscalers.
pub struct Autoscalers {
    node: Arc<str>,
    excludes_system: bool,
}

impl Autoscalers {
    /// What targets no known workload is reported for the node.
    pub fn new(node: Arc<str>, excludes_system: bool) -> Self {
        Self { node, excludes_system }
    }
}

impl Follower for Autoscalers {
    type Object = objects::Autoscaler;
    type Kept = SeenState;

    fn seen(
        &mut self,
        autoscaler: &objects::Autoscaler,
        state: Option<SeenState>,
        _first: bool,
        reports: &mut Vec<WatchReport>,
    ) -> Option<SeenState> {
        let meta = &autoscaler.metadata;
        if self.excludes_system && is_system(&meta.namespace) {
            return None;
        }
        let seen = state.unwrap_or_else(|| {
            let target = &autoscaler.spec.scale_target_ref;
            let subject = Subject::of(&target.kind, &meta.namespace, &target.name, "");
            SeenState {
                subject: subject.unwrap_or_else(|| Subject::Node(self.node.to_string())),
                kind: "HorizontalPodAutoscaler",
                namespace: meta.namespace.clone(),
                name: meta.name.clone(),
                print: 0,
            }
        });
        let status = &autoscaler.status;
        // The worst first: what keeps it from working, then what keeps it from going further.
        let worst = [("AbleToScale", "False"), ("ScalingActive", "False"), ("ScalingLimited", "True")];
        let worst = worst.into_iter().find_map(|(kind, bad)| {
            status.conditions.iter().find(|condition| condition.r#type == kind && condition.status == bad)
        });
        let state = ReportedState {
            state: worst.map_or("ScalingActive", |condition| &condition.r#type),
            reason: worst.map_or("", |condition| &condition.reason),
            message: worst.map_or("", |condition| &condition.message),
            current: status.current_replicas,
            desired: status.desired_replicas,
        };
        Some(report_state(seen, &state, reports))
    }

    fn forget(&mut self, seen: &mut SeenState) -> bool {
        seen.print = 0;
        true
    }

    fn gone(&mut self, seen: SeenState, reports: &mut Vec<WatchReport>) {
        state_gone(&seen, reports);
    }
}

/// PersistentVolumeClaims.
pub struct Claims {
    node: Arc<str>,
    known: KnownClaims,
    excludes_system: bool,
}

impl Claims {
    /// A claim is no entity: it is reported for the node that watches. `known` learns them.
    pub fn new(node: Arc<str>, known: KnownClaims, excludes_system: bool) -> Self {
        Self { node, known, excludes_system }
    }
}

impl Follower for Claims {
    type Object = objects::Claim;
    type Kept = SeenState;

    fn seen(
        &mut self,
        claim: &objects::Claim,
        state: Option<SeenState>,
        _first: bool,
        reports: &mut Vec<WatchReport>,
    ) -> Option<SeenState> {
        let meta = &claim.metadata;
        if self.excludes_system && is_system(&meta.namespace) {
            return None;
        }
        let seen = state.unwrap_or_else(|| SeenState {
            subject: Subject::Node(self.node.to_string()),
            kind: "PersistentVolumeClaim",
            namespace: meta.namespace.clone(),
            name: meta.name.clone(),
            print: 0,
        });
        self.known.seen(&meta.namespace, &meta.name, &claim.status.phase);
        let condition = claim.status.conditions.iter().find(|condition| condition.status == "True");
        let state = ReportedState {
            state: &claim.status.phase,
            reason: condition.map_or("", |condition| &condition.r#type),
            message: condition.map_or("", |condition| &condition.message),
            current: 0,
            desired: 0,
        };
        Some(report_state(seen, &state, reports))
    }

    fn forget(&mut self, seen: &mut SeenState) -> bool {
        seen.print = 0;
        true
    }

    fn gone(&mut self, seen: SeenState, reports: &mut Vec<WatchReport>) {
        self.known.gone(&seen.namespace, &seen.name);
        state_gone(&seen, reports);
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::base::clock::boottime_ns;
    use crate::intake::identity::directory::PodNames;
    use crate::source::kube::pods::pod_entity;

    /// The report of an Event of so long ago about a pod that the directory knows, by a uid or without.
    fn said(seconds_ago: u64, uid: &str) -> WatchReport {
        said_for(seconds_ago, uid, "Unhealthy")
    }

    fn said_for(seconds_ago: u64, uid: &str, reason: &str) -> WatchReport {
        let at = k8s_openapi::jiff::Timestamp::now() - Duration::from_secs(seconds_ago);
        let event = serde_json::json!({
            "involvedObject": {"kind": "Pod", "namespace": "shop", "name": "web-1", "uid": uid},
            "reason": reason, "message": "Liveness probe failed", "type": "Warning", "count": 1,
            "lastTimestamp": at.to_string(),
        });
        let event: objects::Event = serde_json::from_value(event).expect("an Event");
        let (directory, now) = (Arc::new(Directory::default()), Instant::now());
        for uid in ["u0", "u1"] {
            let [uid, namespace, name] = [uid, "shop", "web-1"].map(Arc::from);
            directory.update(PodNames { uid, namespace, name, owner: None, addresses: Vec::new() }, Vec::new(), now);
            directory.pod_gone(pod_entity("u0"), now);
        }
        let known = (directory, ReplicaSets::default(), KnownClaims::default());
        let mut events = Events::new("node".into(), known, 0, false);
        let mut reports = Vec::new();
        events.seen(&event, None, true, &mut reports);
        reports.pop().expect("it is reported")
    }

    #[test]
    fn events_without_a_uid_find_their_pod_by_name() {
        for uid in ["u1", ""] {
            assert_eq!(said(5, uid).subject.id(), pod_entity("u1"), "{uid}");
        }
    }

    #[test]
    fn an_event_after_an_outage_keeps_its_own_time() {
        let now_ns = boottime_ns();
        assert!(said(5, "u1").time_ns >= now_ns, "an Event of just now");
        let late_ns = boottime_ns().saturating_sub(said(600, "u1").time_ns);
        assert!((599_000_000_000..610_000_000_000).contains(&late_ns), "{late_ns}");
    }

    #[test]
    fn who_deletes_a_pod_is_dated_by_the_event_itself() {
        for (reason, seconds_ago, is_dated_back) in [
            ("Preempted", 8, true),
            ("TaintManagerEviction", 8, true),
            ("Preempted", 0, false),
            ("Unhealthy", 8, false),
        ] {
            let now_ns = boottime_ns();
            let at_ns = said_for(seconds_ago, "u1", reason).time_ns;
            assert_eq!(at_ns < now_ns - 7_000_000_000, is_dated_back, "{reason} of {seconds_ago} s ago");
        }
    }
}
