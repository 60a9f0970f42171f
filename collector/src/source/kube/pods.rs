//! The pods of this node: their life, their containers' lives, and their names.
//!
//! What enters: pods by `spec.nodeName`. What leaves: changes of pods and containers, and names for the directory. What
//! must hold: each fact is reported once, except what keeps a container from running: that is reported again while it
//! lasts (see [`AGAIN`]). A run of a container that ended is reported either as its present state or as its last one,
//! never as both. A run that ended before the first list is reported only if no earlier collector can have reported it
//! (see [`RESTART`]).

use std::sync::Arc;
use std::time::{Duration, Instant};

use tapio_wire::entity_id;
use tapio_wire::event::{Detail, EntityId, EntityKind, PodState};

use super::client::Resource;
use super::container_state::{Shown, StateReport, hindrance, id_of, image_of, state_report};
use super::objects::{ContainerStatus, Pod, Terminated, unix_ns};
use super::report::{Subject, WatchReport};
use super::stuck::Stuck;
use super::watch::{Follower, digest};
use crate::base::clock::realtime_ns;
use crate::intake::identity::directory::{ContainerNames, Directory, Owner, PodNames, address_bytes};

/// How long a collector may be away without losing a fact. A run that ended longer than this before the first list was
/// reported by the former collector, or happened before there was any.
pub const RESTART: Duration = Duration::from_secs(60);

/// Namespaces of Kubernetes itself.
pub fn is_system(namespace: &str) -> bool {
    crate::settings::config::SYSTEM_NAMESPACES.contains(&namespace)
}

/// Pods that are bound to a node.
pub fn of_node(node: &str) -> Resource {
    Resource { fields: Some(format!("spec.nodeName={node}")), is_small: true, ..Resource::new("pods", "/api/v1/pods") }
}

/// Watches the pods of this node.
pub struct Pods {
    directory: Arc<Directory>,
    excludes_system: bool,
    stuck_after: Duration,
    /// Nothing that ended before is reported, nanoseconds since 1970.
    since_ns: u64,
}

/// What was reported of a pod.
pub struct Seen {
    subject: Subject,
    pod: u64,
    containers: Vec<SeenContainer>,
    conditions: Vec<Held>,
    stuck: Stuck,
    is_reported: bool,
    /// True if the pod has ended for good: that is a moment, and reported once.
    has_ended: bool,
    /// The last state, reported once more when the object is gone.
    last: LastWords,
}

struct SeenContainer {
    name: u64,
    /// What was reported of its present state.
    present: u64,
    /// The last run that ended, reported or too old to be.
    ended: u64,
    /// What keeps it from running, and when that was reported last.
    hindrance: Option<Box<(StateReport, Instant)>>,
}

#[derive(Clone, Copy)]
struct LastWords {
    phase: &'static str,
    /// One of [`DELETIONS`], or empty.
    reason: &'static str,
    deletion_ns: u64,
    deletion_grace_s: u32,
    qos: u8,
    is_scheduled: bool,
}

impl Pods {
    /// Nothing is known yet. `directory` learns every pod's names, also of namespaces that are excluded. What takes longer than
    /// `stuck_after` is reported.
    pub fn new(directory: Arc<Directory>, excludes_system: bool, stuck_after: Duration) -> Self {
        let since_ns = realtime_ns().saturating_sub(RESTART.as_nanos() as u64);
        Self { directory, excludes_system, stuck_after, since_ns }
    }

    fn name(&self, pod: &Pod, reports: &mut Vec<WatchReport>) {
        let meta = &pod.metadata;
        let names = PodNames {
            uid: uid_of(pod).into(),
            namespace: (&*meta.namespace).into(),
            name: (&*meta.name).into(),
            owner: owner_of(pod),
            addresses: addresses_of(pod),
        };
        let mut containers: Vec<ContainerNames> = Vec::new();
        for status in statuses(pod).map(|(status, _)| status) {
            let last = status.last_state.terminated.as_ref().map(|last| &*last.container_id);
            let ended = status.state.terminated.as_ref().map(|ended| &*ended.container_id);
            for id in [Some(&*status.container_id), ended, last].into_iter().flatten() {
                let id = bare_id(id);
                if !id.is_empty() && !containers.iter().any(|known| &*known.id == id) {
                    let image = image_of(pod, status);
                    containers.push(ContainerNames {
                        id: id.into(),
                        name: (&*status.name).into(),
                        image: image.into(),
                    });
                }
            }
        }
        let ids: Vec<Arc<str>> = containers.iter().map(|names| Arc::clone(&names.id)).collect();
        if self.directory.update(names, containers, Instant::now()) {
            // Whatever the kernel reported of them before can be named now, also when nothing more happens to them.
            reports.push(WatchReport::description(subject_of(pod)));
            reports.extend(ids.iter().map(|id| WatchReport::description(Subject::Container(id.to_string()))));
        }
    }

    fn report_containers(&self, pod: &Pod, seen: &mut Vec<SeenContainer>, reports: &mut Vec<WatchReport>) {
        for (status, role) in statuses(pod) {
            let name = digest(&(&status.name, role));
            let index = seen.iter().position(|seen| seen.name == name).unwrap_or_else(|| {
                seen.push(SeenContainer { name, present: 0, ended: 0, hindrance: None });
                seen.len() - 1
            });
            let seen = &mut seen[index];
            let report_of = |shown: &Shown| {
                let subject = match bare_id(shown.id) {
                    "" => subject_of(pod),
                    id => Subject::Container(id.to_owned()),
                };
                state_report(subject, pod, status, role, shown)
            };
            let report = |shown: &Shown, reports: &mut Vec<WatchReport>| reports.push(report_of(shown).event());
            let reported = seen.hindrance.take().map_or_else(Instant::now, |before| before.1);
            let lasts = hindrance(status).filter(|_| !has_ended(pod));
            seen.hindrance = lasts.map(|shown| Box::new((report_of(&shown), reported)));
            // The run before the present one first: so it was.
            if let Some(ended) = &status.last_state.terminated {
                let id = id_of(status, ended);
                let run = run_of(id, ended);
                if seen.ended != run {
                    seen.ended = run;
                    if self.is_news(ended) {
                        report(&Shown::ended(id, ended, true), reports);
                    }
                }
            }
            let state = &status.state;
            let present = if let Some(ended) = &state.terminated {
                let id = id_of(status, ended);
                let run = run_of(id, ended);
                seen.present = 0;
                if seen.ended == run || !self.is_news(ended) {
                    seen.ended = run;
                    continue;
                }
                seen.ended = run;
                report(&Shown::ended(id, ended, false), reports);
                continue;
            } else if let Some(running) = &state.running {
                Shown {
                    id: &status.container_id,
                    state: 2,
                    started_ns: unix_ns(running.started_at.as_ref()),
                    ..Shown::default()
                }
            } else if let Some(waiting) = &state.waiting {
                Shown::waiting(status, waiting)
            } else {
                continue;
            };
            // A message that counts up ("back-off 2m40s …") is no news.
            let print = digest(&(
                present.id,
                present.state,
                present.reason,
                present.started_ns,
                status.ready,
                status.restart_count,
            ));
            if seen.present != print {
                seen.present = print;
                report(&present, reports);
            }
        }
    }

    fn is_news(&self, ended: &Terminated) -> bool {
        unix_ns(ended.finished_at.as_ref()) >= self.since_ns
    }
}

impl Follower for Pods {
    type Object = Pod;
    type Kept = Seen;

    fn seen(&mut self, pod: &Pod, state: Option<Seen>, _first: bool, reports: &mut Vec<WatchReport>) -> Option<Seen> {
        self.name(pod, reports);
        let is_reported = !(self.excludes_system && is_system(&pod.metadata.namespace));
        let (last, present) = pod_state(pod);
        let print = digest(&(
            &pod.status.phase,
            present.reason,
            last.deletion_ns,
            last.deletion_grace_s,
            present.is_ready,
            last.is_scheduled,
        ));
        let has_ended = has_ended(pod);
        let mut seen = state.unwrap_or_else(|| Seen {
            subject: subject_of(pod),
            // What has ended long ago was reported by the collector before.
            pod: if has_ended && ended_ns(pod) < self.since_ns { print } else { 0 },
            containers: Vec::new(),
            conditions: Vec::new(),
            stuck: Stuck::default(),
            is_reported,
            has_ended,
            last,
        });
        (seen.last, seen.has_ended) = (last, has_ended);
        let mut news = Vec::new();
        self.report_containers(pod, &mut seen.containers, &mut news);
        see_conditions(pod, &mut seen, &mut news);
        report_conditions(Instant::now(), &mut seen, &mut news);
        seen.stuck.seen(pod, &seen.subject, &mut news);
        seen.stuck.look(Instant::now(), self.stuck_after, &seen.subject, &mut news);
        if seen.pod != print {
            seen.pod = print;
            let [phase, reason, message] = [&*pod.status.phase, present.reason, present.message].map(str::to_owned);
            let is_ready = present.is_ready;
            news.push(WatchReport::event(seen.subject.clone(), move |batch| {
                Detail::PodState(Box::new(PodState {
                    phase: batch.text(&phase),
                    reason: batch.text(&reason),
                    message: batch.text(&message),
                    deletion_ns: last.deletion_ns,
                    deletion_grace_s: last.deletion_grace_s,
                    is_ready,
                    is_scheduled: last.is_scheduled,
                    is_gone: false,
                    qos: last.qos,
                }))
            }));
        }
        if is_reported {
            reports.append(&mut news);
        }
        Some(seen)
    }

    const LOOK: Option<Duration> = Some(Duration::from_secs(15));

    fn look(&mut self, now: Instant, seen: &mut Seen, reports: &mut Vec<WatchReport>) {
        if seen.is_reported {
            seen.stuck.look(now, self.stuck_after, &seen.subject, reports);
            report_conditions(now, seen, reports);
            for (report, reported) in seen.containers.iter_mut().filter_map(|seen| seen.hindrance.as_deref_mut()) {
                if now.saturating_duration_since(*reported) >= AGAIN {
                    *reported = now;
                    reports.push(report.event());
                }
            }
        }
    }

    fn forget(&mut self, seen: &mut Seen) -> bool {
        if !seen.has_ended {
            seen.pod = 0;
        }
        seen.conditions.iter_mut().for_each(|held| held.reported = None);
        seen.stuck.forget();
        // A run that ended is a moment: reported once.
        seen.containers.iter_mut().for_each(|container| container.present = 0);
        true
    }

    fn gone(&mut self, seen: Seen, reports: &mut Vec<WatchReport>) {
        self.directory.pod_gone(seen.subject.id(), Instant::now());
        let Subject::Pod { namespace, .. } = &seen.subject else { return };
        if self.excludes_system && is_system(namespace) {
            return;
        }
        let last = seen.last;
        reports.push(WatchReport::event(seen.subject, move |batch| {
            Detail::PodState(Box::new(PodState {
                phase: batch.text(last.phase),
                reason: batch.text(last.reason),
                message: batch.text(""),
                deletion_ns: last.deletion_ns,
                deletion_grace_s: last.deletion_grace_s,
                is_ready: false,
                is_scheduled: last.is_scheduled,
                is_gone: true,
                qos: last.qos,
            }))
        }));
    }
}

/// The uid that kubelet names the pod's cgroup by: of a static pod that is not the uid of its mirror in the API.
fn uid_of(pod: &Pod) -> &str {
    let hash = &pod.metadata.annotations.config_hash;
    if hash.is_empty() { &pod.metadata.uid } else { hash }
}

pub(super) fn subject_of(pod: &Pod) -> Subject {
    let meta = &pod.metadata;
    Subject::Pod { uid: uid_of(pod).into(), namespace: meta.namespace.clone(), name: meta.name.clone() }
}

/// The pod's entity, for those who refer to it by its uid.
pub fn pod_entity(uid: &str) -> EntityId {
    if uid.is_empty() { 0 } else { entity_id(EntityKind::Pod, uid) }
}

/// What controls the pod. A ReplicaSet that is named by its Deployment and the hash of the pod's template stands for the
/// Deployment: only the Deployment controller sets that label and builds that name.
pub(super) fn owner_of(pod: &Pod) -> Option<Owner> {
    let owner = pod.metadata.owner_references.iter().find(|owner| owner.controller)?;
    let hash = &pod.metadata.labels.pod_template_hash;
    let (kind, name) = match &*owner.kind {
        "ReplicaSet" if !hash.is_empty() => {
            let deployment = owner.name.strip_suffix(&**hash).and_then(|name| name.strip_suffix('-'));
            deployment.map_or(("ReplicaSet", &*owner.name), |name| ("Deployment", name))
        }
        // A static pod's mirror belongs to its node.
        "Node" => return None,
        kind => (kind, &*owner.name),
    };
    Some(Owner { kind: kind.into(), name: name.into() })
}

/// A pod's own addresses: none where it has its node's, which others may have as well.
fn addresses_of(pod: &Pod) -> Vec<[u8; 16]> {
    let status = &pod.status;
    if pod.spec.host_network {
        return Vec::new();
    }
    if status.pod_ips.is_empty() {
        return address_bytes(&status.pod_ip).into_iter().collect();
    }
    status.pod_ips.iter().filter_map(|address| address_bytes(&address.ip)).collect()
}

/// `containerd://<64 hexadecimal digits>`, `cri-o://…`, `docker://…`.
fn bare_id(id: &str) -> &str {
    id.rsplit_once("://").map_or(id, |(_, id)| id)
}

/// Every container's status and its role: 0 ordinary, 1 init, 2 ephemeral.
fn statuses(pod: &Pod) -> impl Iterator<Item = (&ContainerStatus, u8)> {
    let status = &pod.status;
    let init = status.init_container_statuses.iter().map(|status| (status, 1));
    let ordinary = status.container_statuses.iter().map(|status| (status, 0));
    init.chain(ordinary).chain(status.ephemeral_container_statuses.iter().map(|status| (status, 2)))
}

fn has_ended(pod: &Pod) -> bool {
    matches!(&*pod.status.phase, "Succeeded" | "Failed")
}

fn run_of(id: &str, ended: &Terminated) -> u64 {
    digest(&(id, unix_ns(ended.started_at.as_ref()), unix_ns(ended.finished_at.as_ref()), ended.exit_code))
}

/// When a pod that has ended did so, as far as it says, nanoseconds since 1970.
fn ended_ns(pod: &Pod) -> u64 {
    let of_containers = statuses(pod).filter_map(|(status, _)| status.state.terminated.as_ref());
    let of_containers = of_containers.map(|ended| unix_ns(ended.finished_at.as_ref()));
    let of_conditions = pod.status.conditions.iter().map(|condition| unix_ns(condition.last_transition_time.as_ref()));
    of_containers.chain(of_conditions).max().unwrap_or(0)
}

/// Conditions of pods that say what nothing else does: how a change of resources in place goes (since Kubernetes 1.33), and that all
/// containers are restarted (since 1.35).
const CONDITIONS: [&str; 3] = ["PodResizePending", "PodResizeInProgress", "AllContainersRestarting"];

/// A condition of [`CONDITIONS`] that holds.
struct Held {
    name: &'static str,
    reason: String,
    message: String,
    reported: Option<Instant>,
}

impl Held {
    fn event(&self, subject: &Subject, is_gone: bool) -> WatchReport {
        let Subject::Pod { namespace, name, .. } = subject else { return WatchReport::description(subject.clone()) };
        let texts = ["Pod", namespace, name, self.name, &self.reason, &self.message];
        WatchReport::object_state(subject.clone(), texts, (0, 0), is_gone)
    }
}

/// Takes in which of [`CONDITIONS`] hold, and reports those that have ceased to.
fn see_conditions(pod: &Pod, seen: &mut Seen, reports: &mut Vec<WatchReport>) {
    let find = |name: &str| {
        pod.status.conditions.iter().find(|condition| {
            // What is on its way is no news.
            let is_news = name != "PodResizeInProgress" || condition.reason == "Error";
            condition.r#type == name && condition.status == "True" && is_news
        })
    };
    seen.conditions.retain(|held| {
        let holds = find(held.name).is_some();
        if !holds {
            reports.push(held.event(&seen.subject, true));
        }
        holds
    });
    for (name, condition) in CONDITIONS.into_iter().filter_map(|name| Some((name, find(name)?))) {
        let (reason, message) = (condition.reason.clone(), condition.message.clone());
        match seen.conditions.iter_mut().find(|held| held.name == name) {
            Some(held) if (&held.reason, &held.message) == (&reason, &message) => {}
            Some(held) => (held.reason, held.message, held.reported) = (reason, message, None),
            None => seen.conditions.push(Held { name, reason, message, reported: None }),
        }
    }
}

/// How often a state that goes on is reported again. Its end may be missed: by a server that is away, or by a watch that begins
/// when the object is gone. The server takes a state that is not reported any more for over.
pub const AGAIN: Duration = Duration::from_secs(120);

fn report_conditions(now: Instant, seen: &mut Seen, reports: &mut Vec<WatchReport>) {
    for held in &mut seen.conditions {
        if held.reported.is_none_or(|at| now.saturating_duration_since(at) >= AGAIN) {
            held.reported = Some(now);
            reports.push(held.event(&seen.subject, false));
        }
    }
}

/// Reasons of disruptions that delete a pod at once. The last report of the pod repeats them, or it would be a deletion without one.
const DELETIONS: [&str; 5] = [
    "EvictionByEvictionAPI",
    "DeletionByTaintManager",
    "PreemptionByScheduler",
    "PreemptionByKubeScheduler",
    "DeletionByPodGC",
];

struct PresentPod<'a> {
    reason: &'a str,
    message: &'a str,
    is_ready: bool,
}

fn pod_state(pod: &Pod) -> (LastWords, PresentPod<'_>) {
    let status = &pod.status;
    let holds = |name: &str| status.conditions.iter().find(|condition| condition.r#type == name);
    let is_true = |name: &str| holds(name).is_some_and(|condition| condition.status == "True");
    // Since 1.26 the reason of a disruption is in a condition, and may be there alone.
    let disruption = holds("DisruptionTarget").filter(|condition| condition.status == "True");
    let (reason, message) = match disruption {
        Some(condition) if status.reason.is_empty() => (&*condition.reason, &*condition.message),
        _ => (&*status.reason, &*status.message),
    };
    let phase = ["Pending", "Running", "Succeeded", "Failed"].into_iter().find(|phase| *phase == status.phase);
    let grace_s = pod.metadata.deletion_grace_period_seconds;
    // The API names the moment when the grace period ends.
    let deletion_ns = unix_ns(pod.metadata.deletion_timestamp.as_ref());
    let qos = match &*status.qos_class {
        "Guaranteed" => 1,
        "Burstable" => 2,
        "BestEffort" => 3,
        _ => 0,
    };
    let last = LastWords {
        phase: phase.unwrap_or("Unknown"),
        reason: DELETIONS.into_iter().find(|known| *known == reason).unwrap_or_default(),
        deletion_ns: deletion_ns.saturating_sub(u64::from(grace_s) * 1_000_000_000),
        deletion_grace_s: grace_s,
        qos,
        is_scheduled: is_true("PodScheduled") || !pod.spec.node_name.is_empty(),
    };
    (last, PresentPod { reason, message, is_ready: is_true("Ready") })
}

#[cfg(test)]
mod tests {
    use super::{Pod, addresses_of};

    #[test]
    fn pods_on_their_nodes_network_own_no_address() {
        let addresses = |host_network: bool| {
            let pod = serde_json::json!({
                "metadata": {"name": "p"}, "spec": {"hostNetwork": host_network, "containers": []},
                "status": {"podIP": "10.0.0.7", "podIPs": [{"ip": "10.0.0.7"}, {"ip": "fd00::7"}]},
            });
            addresses_of(&serde_json::from_value::<Pod>(pod).expect("a pod")).len()
        };
        assert_eq!((addresses(true), addresses(false)), (0, 2));
    }
}
