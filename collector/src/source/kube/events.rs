//! Kubernetes Events, the conditions of nodes, and the states of autoscalers and claims.
//!
//! What enters: the objects. What leaves: one event for each new or repeated Kubernetes Event, and one for each change
//! of a state. What must hold: an Event is a moment, reported only when it came after the former leader was last known
//! to be there. A state is reported once at the beginning and then when it changes; that a node is not ready for long is
//! reported again while it lasts.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tapio_wire::event::{Detail, KubeEvent, NodeCondition};
use tapio_wire::program::EVENTS_COMPONENT;

use super::claims::KnownClaims;
use super::objects::{self, Condition, unix_ns};
use super::pods::{AGAIN, is_system};
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
        let late_ns = if late_ns > LATE_NS { late_ns } else { 0 };
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

/// Nodes and their conditions.
pub struct Nodes {
    /// How many there are, for the election; 0 before they were listed.
    count: Arc<AtomicU64>,
    seen: u64,
    is_listed: bool,
    stuck_after: Duration,
}

/// What was reported of a node.
pub struct SeenNode {
    name: String,
    /// Reported conditions: the number of the name, and what was reported.
    conditions: Vec<(u64, u64)>,
    /// Its condition Ready while that is not true, and when this was reported last.
    not_ready: Option<(Condition, Option<Instant>)>,
}

impl Nodes {
    /// None seen yet. One that is not ready for longer than `stuck_after` is reported as that.
    pub fn new(count: Arc<AtomicU64>, stuck_after: Duration) -> Self {
        Self { count, seen: 0, is_listed: false, stuck_after }
    }

    fn count(&self) {
        if self.is_listed {
            self.count.store(self.seen, Ordering::Relaxed);
        }
    }

    fn report(node: &str, condition: &Condition, reports: &mut Vec<WatchReport>) {
        let texts = [&condition.r#type, &condition.reason, &condition.message].map(Clone::clone);
        let since_ns = unix_ns(condition.last_transition_time.as_ref());
        let status = match &*condition.status {
            "True" => 1,
            "False" => 0,
            _ => 2,
        };
        reports.push(WatchReport::event(Subject::Node(node.into()), move |batch| {
            let [condition, reason, message] = texts.map(|text| batch.text(&text));
            Detail::NodeCondition(Box::new(NodeCondition { condition, reason, message, since_ns, status }))
        }));
    }
}

impl Follower for Nodes {
    type Object = objects::Node;
    type Kept = SeenNode;

    fn seen(
        &mut self,
        node: &objects::Node,
        state: Option<SeenNode>,
        _first: bool,
        reports: &mut Vec<WatchReport>,
    ) -> Option<SeenNode> {
        let name = &node.metadata.name;
        if state.is_none() {
            self.seen += 1;
            self.count();
        }
        let new = || SeenNode { name: name.clone(), conditions: Vec::new(), not_ready: None };
        let mut seen = state.unwrap_or_else(new);
        let schedulable = Condition {
            r#type: "Schedulable".into(),
            status: if node.spec.unschedulable { "False" } else { "True" }.into(),
            ..Condition::default()
        };
        // Kubelet writes them every few minutes; only a change is news.
        for condition in node.status.conditions.iter().chain([&schedulable]) {
            let key = digest(&condition.r#type);
            let print = digest(&(&condition.status, &condition.reason));
            match seen.conditions.iter_mut().find(|(known, _)| *known == key) {
                Some((_, known)) if *known == print => continue,
                Some((_, known)) => *known = print,
                None => seen.conditions.push((key, print)),
            }
            Self::report(name, condition, reports);
        }
        let ready = node.status.conditions.iter().find(|condition| condition.r#type == "Ready");
        let reported = seen.not_ready.take().and_then(|(_, reported)| reported);
        match ready.filter(|ready| ready.status != "True") {
            Some(ready) => seen.not_ready = Some((ready.clone(), reported)),
            None if reported.is_some() => Self::report(name, &not_ready(&Condition::default(), "False"), reports),
            None => {}
        }
        self.look(Instant::now(), &mut seen, reports);
        Some(seen)
    }

    const LOOK: Option<Duration> = Some(Duration::from_secs(15));

    fn look(&mut self, now: Instant, seen: &mut SeenNode, reports: &mut Vec<WatchReport>) {
        let Some((ready, reported)) = &mut seen.not_ready else { return };
        let since_ns = unix_ns(ready.last_transition_time.as_ref());
        let has_lasted = realtime_ns().saturating_sub(since_ns) >= self.stuck_after.as_nanos() as u64;
        if since_ns > 0 && has_lasted && reported.is_none_or(|at| now.saturating_duration_since(at) >= AGAIN) {
            *reported = Some(now);
            Self::report(&seen.name, &not_ready(ready, "True"), reports);
        }
    }

    fn forget(&mut self, seen: &mut SeenNode) -> bool {
        seen.conditions.clear();
        if let Some((_, reported)) = &mut seen.not_ready {
            *reported = None;
        }
        true
    }

    fn listed(&mut self, _reports: &mut Vec<WatchReport>) {
        self.is_listed = true;
        self.count();
    }

    fn gone(&mut self, seen: SeenNode, reports: &mut Vec<WatchReport>) {
        self.seen -= 1;
        self.count();
        let gone = Condition {
            r#type: "Ready".into(),
            status: "Unknown".into(),
            reason: "NodeDeleted".into(),
            ..Condition::default()
        };
        Self::report(&seen.name, &gone, reports);
    }
}

/// A condition of Tapio's own: whether a node has not been ready for long, and for which reason. Unlike Ready it is reported again
/// while it holds.
fn not_ready(ready: &Condition, status: &str) -> Condition {
    Condition { r#type: "NotReady".into(), status: status.into(), ..ready.clone() }
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
    use super::*;
    use crate::base::clock::boottime_ns;
    use crate::intake::identity::directory::PodNames;
    use crate::source::kube::pods::pod_entity;

    /// The report of an Event of so long ago about a pod that the directory knows, by a uid or without.
    fn said(seconds_ago: u64, uid: &str) -> WatchReport {
        let at = k8s_openapi::jiff::Timestamp::now() - Duration::from_secs(seconds_ago);
        let event = serde_json::json!({
            "involvedObject": {"kind": "Pod", "namespace": "shop", "name": "web-1", "uid": uid},
            "reason": "Unhealthy", "message": "Liveness probe failed", "type": "Warning", "count": 1,
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
}
