//! Pods that are stuck: a pod that runs and is not ready, an init container that does not end, a deleted pod that stays.
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
struct Lasting {
    /// Name of the trouble in events and patterns.
    what: &'static str,
    /// When it began, nanoseconds since 1970.
    since_ns: u64,
    /// The container that it is about, empty for none.
    container: String,
    /// What Kubernetes says of it.
    why: String,
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
        let now_ns = realtime_ns();
        for lasting in &self.lasting {
            if now_ns.saturating_sub(lasting.since_ns) < after.as_nanos() as u64 {
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

fn event(subject: &Subject, lasting: &Lasting, is_over: bool) -> WatchReport {
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
        let specified = pod.spec.init_containers.iter().find(|container| container.name == status.name);
        // An init container that is always restarted is a sidecar.
        let is_sidecar = specified.is_some_and(|container| container.restart_policy == "Always");
        if let Some(running) = status.state.running.as_ref().filter(|_| !is_sidecar) {
            let since_ns = unix_ns(running.started_at.as_ref());
            found.push(Lasting { what: "init-runs", since_ns, container: status.name.clone(), why: String::new() });
        }
    }
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
        let mut starts = not_ready("2026-01-01T00:00:00Z");
        starts["containerStatuses"][0]["started"] = false.into();
        let mut given_up = not_ready("2026-01-01T00:00:00Z");
        given_up["conditions"][0]["reason"] = serde_json::Value::Null;
        for other in [starts, given_up] {
            stuck.seen(&pod(other, false), &subject(), &mut reports);
            stuck.look(Instant::now(), STUCK_AFTER, &subject(), &mut reports);
        }
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
    fn a_pod_that_does_not_go_names_what_holds_it() {
        let gone = serde_json::json!({"phase": "Running"});
        let found = lasting(&pod(gone, true));
        assert_eq!(found[0].why, "finalizers hold it: example.com/hold");
        let found = lasting(&pod(not_ready("2026-01-01T00:00:00Z"), true));
        assert_eq!((found.len(), &*found[0].why), (1, "still running: web"));
    }
}
