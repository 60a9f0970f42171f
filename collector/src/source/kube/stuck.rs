//! Pods that are stuck: a pod that runs and is not ready, an init container that does not end, a deleted pod that stays. So is one
//! with a container that does not start while nobody says why.
//!
//! In: the pod's object, and the clock. Out: a trouble once a condition has lasted long enough, again while it lasts,
//! and when it ends. What must hold: a pod that waits for its image or is restarted again and again is not stuck, since
//! other findings explain it. Each trouble that was reported gets a report of its end.

use std::time::{Duration, Instant};

use tapio_wire::event::{Detail, Trouble};

use super::objects::{Condition, ContainerStatus, Pod, unix_ns};
use super::report::{Subject, WatchReport};
use crate::base::clock::{boottime_ns, realtime_ns};

/// The pause between two reports of a condition that lasts.
const REPEAT_INTERVAL: Duration = Duration::from_secs(120);

/// A condition that should not last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Lasting {
    /// Name of the trouble in events and patterns.
    pub(super) what: &'static str,
    /// When it began, nanoseconds since 1970.
    pub(super) since_ns: u64,
    /// The container that it is about, empty for none.
    pub(super) container: String,
    /// What Kubernetes says of it.
    pub(super) why: String,
}

impl Lasting {
    pub(super) fn has_lasted(&self, after: Duration) -> bool {
        self.since_ns > 0 && realtime_ns().saturating_sub(self.since_ns) >= after.as_nanos() as u64
    }
}

/// The conditions of one pod that should not last, and which of them were reported.
#[derive(Debug, Default)]
pub struct Stuck {
    lasting: Vec<Lasting>,
    reported: Vec<(Lasting, Instant)>,
}

impl Stuck {
    /// Takes in the pod as it is.
    pub fn seen(&mut self, pod: &Pod, subject: &Subject, reports: &mut Vec<WatchReport>) {
        self.lasting = lasting(pod);
        let goes_on = |known: &Lasting| {
            self.lasting.iter().any(|now| (now.what, &*now.container) == (known.what, &*known.container))
        };
        let over = self.reported.extract_if(.., |(known, _)| !goes_on(known));
        reports.extend(over.map(|(known, _)| event(subject, &known, true)));
    }

    /// Reports conditions that have lasted for `after`, unless a report was made lately.
    pub fn look(&mut self, now: Instant, after: Duration, subject: &Subject, reports: &mut Vec<WatchReport>) {
        for lasting in &self.lasting {
            if !lasting.has_lasted(after) {
                continue;
            }
            let is_it = |known: &&mut (Lasting, Instant)| {
                (known.0.what, &known.0.container) == (lasting.what, &lasting.container)
            };
            match self.reported.iter_mut().find(is_it) {
                Some((_, at)) if now.saturating_duration_since(*at) < REPEAT_INTERVAL => continue,
                Some(known) => *known = (lasting.clone(), now),
                None => self.reported.push((lasting.clone(), now)),
            }
            reports.push(event(subject, lasting, false));
        }
    }

    /// Forgets what was reported: there is a new stream to a server, which may know nothing.
    pub fn forget(&mut self) {
        self.reported.clear();
    }
}

pub(super) fn event(subject: &Subject, lasting: &Lasting, is_over: bool) -> WatchReport {
    let lasted_ns = realtime_ns().saturating_sub(lasting.since_ns);
    let Lasting { what, container, why, .. } = lasting.clone();
    WatchReport::event(subject.clone(), move |batch| {
        let (what, place, comm) = (batch.text(what), batch.text(&why), batch.text(&container));
        let since_ns = boottime_ns().saturating_sub(lasted_ns);
        let value = lasted_ns / 1_000_000_000;
        Detail::Trouble(Box::new(Trouble { what, place, comm, since_ns, value, limit: 0, is_over }))
    })
}

fn lasting(pod: &Pod) -> Vec<Lasting> {
    let mut found = Vec::new();
    if let Some(deletion) = &pod.metadata.deletion_timestamp {
        // The API names the end of the grace period.
        let since_ns = unix_ns(Some(deletion));
        let status = &pod.status;
        let all = status.init_container_statuses.iter().chain(&status.container_statuses);
        let is_up = |status: &&ContainerStatus| status.state.running.is_some();
        let all = all.chain(&status.ephemeral_container_statuses).filter(is_up);
        let up: Vec<&str> = all.map(|status| &*status.name).collect();
        let why = match (&*up.join(", "), &*pod.metadata.finalizers.join(", ")) {
            ("", "") => "none of its containers runs: its volumes, network or cgroups are not taken apart".to_owned(),
            ("", finalizers) => format!("finalizers hold it: {finalizers}"),
            (up, _) => format!("still running: {up}"),
        };
        found.push(Lasting { what: "terminating", since_ns, container: String::new(), why });
        return found;
    }
    if matches!(&*pod.status.phase, "Succeeded" | "Failed") {
        return found;
    }
    for status in &pod.status.init_container_statuses {
        if let Some(running) = status.state.running.as_ref().filter(|_| !is_sidecar(pod, &status.name)) {
            let since_ns = unix_ns(running.started_at.as_ref());
            found.push(Lasting { what: "init-runs", since_ns, container: status.name.clone(), why: String::new() });
        }
    }
    found.extend(pending(pod));
    found.extend(starting(pod));
    let statuses = &pod.status.container_statuses;
    let all_run = !statuses.is_empty() && statuses.iter().all(|status| status.state.running.is_some());
    // A container that is starting has its startup probe, whose failures kill it. The node controller also sets Ready to False when a
    // node is lost, but without kubelet's reasons.
    let starts = statuses.iter().any(|status| status.started == Some(false));
    let is_it = |condition: &&Condition| {
        condition.r#type == "Ready"
            && condition.status == "False"
            && matches!(&*condition.reason, "ContainersNotReady" | "ReadinessGatesNotReady")
    };
    let ready = pod.status.conditions.iter().find(is_it);
    if let Some(ready) = ready.filter(|_| all_run && !starts) {
        let started = |status: &ContainerStatus| {
            unix_ns(status.state.running.as_ref().and_then(|running| running.started_at.as_ref()))
        };
        // The time to become ready begins with the container that started last.
        let since_ns =
            statuses.iter().map(started).max().unwrap_or(0).max(unix_ns(ready.last_transition_time.as_ref()));
        let unready = statuses.iter().find(|status| !status.ready).map(|status| status.name.clone());
        found.push(Lasting {
            what: "not-ready",
            since_ns,
            container: unready.unwrap_or_default(),
            why: ready.message.clone(),
        });
    }
    found.retain(|lasting| lasting.since_ns > 0);
    found
}

/// Whether it is an init container that is always restarted: a sidecar.
fn is_sidecar(pod: &Pod, name: &str) -> bool {
    pod.spec.init_containers.iter().any(|container| container.name == name && container.restart_policy == "Always")
}

/// A container that kubelet has not started and gives no reason for: a slow pull, a volume, a hook that hangs.
fn pending(pod: &Pod) -> Option<Lasting> {
    let status = &pod.status;
    let (init, ordinary) = (&status.init_container_statuses, &status.container_statuses);
    let is_on_its_way = |status: &ContainerStatus| {
        let waiting = status.state.waiting.as_ref();
        waiting.is_none_or(|waiting| matches!(&*waiting.reason, "" | "ContainerCreating" | "PodInitializing"))
    };
    let init_runs = init.iter().any(|one| one.state.running.is_some() && !is_sidecar(pod, &one.name));
    if status.phase != "Pending" || init_runs || !init.iter().chain(ordinary).all(is_on_its_way) {
        return None;
    }
    let why = match init.iter().chain(ordinary).find(|one| one.state.waiting.is_some()) {
        Some(one) => format!("kubelet has not started container {}, and does not say what it waits for", one.name),
        None if ordinary.is_empty() => "kubelet has said nothing of its containers".to_owned(),
        None => return None,
    };
    let scheduled = status.conditions.iter().find(|condition| condition.r#type == "PodScheduled");
    let scheduled = scheduled.and_then(|condition| condition.last_transition_time.as_ref());
    let ended = init.iter().filter_map(|one| one.state.terminated.as_ref()?.finished_at.as_ref());
    let begun = ended.chain(scheduled).chain(&pod.metadata.creation_timestamp);
    let since_ns = begun.map(|time| unix_ns(Some(time))).max().unwrap_or(0);
    Some(Lasting { what: "pending", since_ns, container: String::new(), why })
}

/// Containers that run and have not started as Kubernetes means it.
fn starting(pod: &Pod) -> impl Iterator<Item = Lasting> {
    let sidecars = pod.status.init_container_statuses.iter().filter(move |status| is_sidecar(pod, &status.name));
    sidecars.chain(&pod.status.container_statuses).filter(|status| status.started == Some(false)).filter_map(|status| {
        let running = status.state.running.as_ref()?;
        let why = format!("container {} runs, and its postStart hook or startup probe has not passed", status.name);
        let since_ns = unix_ns(running.started_at.as_ref());
        Some(Lasting { what: "starting", since_ns, container: status.name.clone(), why })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::config::STUCK_AFTER;

    fn pod(status: serde_json::Value, deleted: bool) -> Pod {
        let mut pod = serde_json::json!({
            "metadata": {"name": "web", "namespace": "shop", "uid": "u1"},
            "spec": {"containers": [{"name": "web"}], "initContainers": [
                {"name": "wait"}, {"name": "proxy", "restartPolicy": "Always"},
            ]},
            "status": status,
        });
        if deleted {
            pod["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
            pod["metadata"]["finalizers"] = serde_json::json!(["example.com/hold"]);
        }
        serde_json::from_value(pod).expect("a pod")
    }

    fn running(name: &str, ready: bool, started: &str) -> serde_json::Value {
        serde_json::json!({"name": name, "ready": ready, "state": {"running": {"startedAt": started}}})
    }

    fn not_ready(started: &str) -> serde_json::Value {
        serde_json::json!({
            "phase": "Running",
            "conditions": [{"type": "Ready", "status": "False", "reason": "ContainersNotReady", "message": "containers with unready status: [web]",
                "lastTransitionTime": "2026-01-01T00:00:00Z"}],
            "containerStatuses": [running("web", false, started)],
        })
    }

    fn subject() -> Subject {
        Subject::Pod { uid: "u1".into(), namespace: "shop".into(), name: "web".into() }
    }

    #[test]
    fn an_unready_pod_is_reported_again_and_when_over() {
        let (mut stuck, mut reports, now) = (Stuck::default(), Vec::new(), Instant::now());
        stuck.seen(&pod(not_ready("2026-01-01T00:00:00Z"), false), &subject(), &mut reports);
        for seconds in [0, 10, 121, 130] {
            stuck.look(now + Duration::from_secs(seconds), STUCK_AFTER, &subject(), &mut reports);
        }
        assert_eq!(reports.len(), 2, "at once, since it has lasted, and again after two minutes");
        let ready = serde_json::json!({"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}],
            "containerStatuses": [running("web", true, "2026-01-01T00:00:00Z")]});
        stuck.seen(&pod(ready, false), &subject(), &mut reports);
        assert_eq!(reports.len(), 3);
        assert!(stuck.reported.is_empty());
    }

    #[test]
    fn brief_or_restarting_conditions_are_not_reported() {
        let (mut stuck, mut reports) = (Stuck::default(), Vec::new());
        let now = k8s_openapi::jiff::Timestamp::now().to_string();
        stuck.seen(&pod(not_ready(&now), false), &subject(), &mut reports);
        stuck.look(Instant::now(), STUCK_AFTER, &subject(), &mut reports);
        let mut given_up = not_ready("2026-01-01T00:00:00Z");
        given_up["conditions"][0]["reason"] = serde_json::Value::Null;
        stuck.seen(&pod(given_up, false), &subject(), &mut reports);
        stuck.look(Instant::now(), STUCK_AFTER, &subject(), &mut reports);
        let mut waits = not_ready("2026-01-01T00:00:00Z");
        waits["containerStatuses"][0]["state"] = serde_json::json!({"waiting": {"reason": "CrashLoopBackOff"}});
        stuck.seen(&pod(waits, false), &subject(), &mut reports);
        stuck.look(Instant::now(), STUCK_AFTER, &subject(), &mut reports);
        assert!(reports.is_empty());
    }

    #[test]
    fn a_running_init_container_is_reported_a_sidecar_is_not() {
        let started = "2026-01-01T00:00:00Z";
        let status = serde_json::json!({"phase": "Pending", "initContainerStatuses": [
            running("wait", false, started), running("proxy", true, started),
        ]});
        let found = lasting(&pod(status, false));
        assert_eq!(found.iter().map(|one| (one.what, &*one.container)).collect::<Vec<_>>(), [("init-runs", "wait")]);
    }

    #[test]
    fn an_unstarted_container_without_a_reason_is_pending() {
        const LONG_AGO: &str = "2026-01-01T00:00:00Z";
        let waiting = |reason: &str| serde_json::json!({"name": "web", "state": {"waiting": {"reason": reason}}});
        let of = |phase: &str, init: serde_json::Value, containers: serde_json::Value| {
            let scheduled =
                serde_json::json!({"type": "PodScheduled", "status": "True", "lastTransitionTime": LONG_AGO});
            let found = lasting(&pod(
                serde_json::json!({"phase": phase, "conditions": [scheduled], "initContainerStatuses": init, "containerStatuses": containers}),
                false,
            ));
            found.into_iter().map(|one| (one.what, one.why)).collect::<Vec<_>>()
        };
        let none = serde_json::json!([]);
        let creating = serde_json::json!([waiting("ContainerCreating")]);
        let web = "kubelet has not started container web, and does not say what it waits for";
        let pending = |why: &str| vec![("pending", why.to_owned())];
        assert_eq!(of("Pending", none.clone(), creating.clone()), pending(web));
        // A hook of the second container hangs, with a sidecar that runs.
        let mut second = running("proxy2", true, LONG_AGO);
        second["started"] = true.into();
        let both = serde_json::json!([second, waiting("ContainerCreating")]);
        assert_eq!(of("Pending", serde_json::json!([running("proxy", true, LONG_AGO)]), both), pending(web));
        assert_eq!(of("Pending", none.clone(), none.clone()), pending("kubelet has said nothing of its containers"));
        for reason in ["ImagePullBackOff", "CreateContainerConfigError", "CrashLoopBackOff"] {
            assert!(of("Pending", none.clone(), serde_json::json!([waiting(reason)])).is_empty(), "{reason}");
        }
        let init = serde_json::json!([running("wait", false, LONG_AGO)]);
        let initializing = serde_json::json!([waiting("PodInitializing")]);
        assert_eq!(of("Pending", init, initializing), [("init-runs", String::new())], "its init container says it");
        assert!(of("Running", none.clone(), creating).is_empty());
        let mut starts = running("web", false, LONG_AGO);
        starts["started"] = false.into();
        let found = of("Running", none, serde_json::json!([starts]));
        assert!(found.len() == 1 && found[0].0 == "starting" && found[0].1.contains("startup probe"), "{found:?}");
    }

    #[test]
    fn a_pod_that_does_not_go_names_what_holds_it() {
        let gone = serde_json::json!({"phase": "Running"});
        let found = lasting(&pod(gone, true));
        assert_eq!(found[0].why, "finalizers hold it: example.com/hold");
        let found = lasting(&pod(not_ready("2026-01-01T00:00:00Z"), true));
        assert_eq!((found.len(), &*found[0].why), (1, "still running: web"));
    }
}
