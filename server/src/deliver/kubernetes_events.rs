//! Findings as Events of Kubernetes, on the pod and its workload, so that `kubectl describe pod` shows them.
//!
//! What enters: versions of findings. What leaves: one Event an object, which later versions change. What must hold: it needs the
//! verbs `create` and `patch` on events and nothing else. An object gets no more Events than client-go would send it. Collectors do not
//! report these Events again: they know them by their component.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::Event;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use serde_json::{Value, json};
use tapio_wire::program::EVENTS_COMPONENT as COMPONENT;
use tapio_wire::program::token_bucket::TokenBucket;
use tapio_wire::service::{EntityRef, Finding};
use tokio::sync::OnceCell;

use super::alertmanager::alert_name;
use super::config::KubernetesEventsSection;
use super::{Delivering, Delivery, Sink, SinkError, WhenSilenced};
use crate::findings::Severity;
use crate::kube_client;
use crate::render::{clean, rfc3339};

/// What the API server takes at the most.
const MESSAGE_BYTES_MAX: usize = 1024;
/// Burst of client-go's EventSourceObjectSpamFilter.
const BURST: u32 = 25;
const PER_SECOND: f64 = 1.0 / 300.0;
/// Objects whose Events are counted.
const OBJECTS_MAX: usize = 4096;
const TIMEOUT: Duration = Duration::from_secs(10);

/// Writes Events.
pub struct KubernetesEvents {
    section: KubernetesEventsSection,
    server: String,
    client: OnceCell<Client>,
    buckets: Mutex<HashMap<String, TokenBucket>>,
}

impl KubernetesEvents {
    /// Nobody is connected to.
    pub fn new(section: &KubernetesEventsSection, server: &str) -> Self {
        Self { section: section.clone(), server: server.into(), client: OnceCell::new(), buckets: Mutex::default() }
    }

    async fn write(&self, delivery: &Delivery) -> Result<(), SinkError> {
        let finding = &delivery.finding;
        let severity = Severity::ALL.into_iter().find(|known| known.name() == finding.severity);
        let is_meant = severity.is_some_and(|severity| severity >= self.section.severity);
        let Some(entity) = finding.entity.as_ref().filter(|entity| is_meant && !entity.namespace.is_empty()) else {
            return Ok(());
        };
        let connect =
            || kube_client::connect(self.section.kubeconfig.as_deref(), "deliver.kubernetes_events.kubeconfig");
        let away = |error: &dyn std::fmt::Display| SinkError::Away(error.to_string());
        let client = self.client.get_or_try_init(connect).await.map_err(|error| away(&error))?;
        let events: Api<Event> = Api::namespaced(client.clone(), &entity.namespace);
        for (part, object) in [("pod", pod(entity)), ("workload", workload(entity))] {
            let Some(object) = object.filter(|object| finding.withdrawn || self.may_write(object)) else { continue };
            let event = self.event(part, finding, &object, &entity.namespace);
            let name = format!("tapio-{}-{part}", finding.id);
            let written = events.patch(&name, &PatchParams::apply(COMPONENT).force(), &Patch::Apply(&event)).await;
            match written.map(drop) {
                Ok(()) => self.count(&object),
                // The namespace is gone, or about to go, and with it who would read the Event.
                Err(kube::Error::Api(status)) if status.code == 404 || status.message.contains("being terminated") => {}
                Err(kube::Error::Api(status))
                    if status.code == 403 && status.message.contains("events is forbidden") =>
                {
                    return Err(away(&format_args!(
                        "{}; see deploy/components/kubernetes-events for the Role",
                        status.message
                    )));
                }
                Err(kube::Error::Api(status)) if matches!(status.code, 400 | 403 | 413 | 422) => {
                    return Err(SinkError::Refused(status.message.clone()));
                }
                Err(error) => return Err(away(&error)),
            }
        }
        Ok(())
    }

    /// Whether the object has had fewer Events than would be a flood. What is left out is not delivered later.
    fn may_write(&self, object: &Value) -> bool {
        let buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        buckets.get(&object.to_string()).is_none_or(|bucket| !bucket.is_empty(Instant::now()))
    }

    /// Counts one more. An attempt that failed does not count.
    fn count(&self, object: &Value) {
        let now = Instant::now();
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        if buckets.len() >= OBJECTS_MAX {
            buckets.clear();
        }
        let bucket = buckets.entry(object.to_string()).or_insert_with(|| TokenBucket::new(BURST, PER_SECOND, now));
        // Also a withdrawal that is written in spite of it.
        let _ = bucket.take(1, now);
    }

    fn event(&self, part: &str, finding: &Finding, object: &Value, namespace: &str) -> Value {
        let is_warning = !finding.withdrawn && finding.severity != Severity::Info.name();
        json!({
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": format!("tapio-{}-{part}", finding.id), "namespace": namespace},
            "involvedObject": object,
            "type": if is_warning { "Warning" } else { "Normal" },
            "reason": alert_name(&finding.pattern),
            "message": message(finding),
            "firstTimestamp": seconds(finding.started_ns),
            "lastTimestamp": seconds(finding.ended_ns),
            "count": finding.count.max(1),
            "source": {"component": COMPONENT},
            "reportingComponent": COMPONENT,
            "reportingInstance": self.server,
        })
    }
}

/// `2026-11-29T13:00:00Z`: these fields have no fractions.
fn seconds(ns: u64) -> String {
    let whole = rfc3339(ns);
    whole.split_once('.').map_or_else(|| whole.clone(), |(seconds, _)| format!("{seconds}Z"))
}

fn message(finding: &Finding) -> String {
    if finding.withdrawn && !finding.superseded_by.is_empty() {
        return format!("Part of another finding now: tapioctl finding {}", finding.superseded_by);
    }
    if finding.withdrawn {
        return format!("Withdrawn: what came later speaks against it. tapioctl finding {}", finding.id);
    }
    let said = finding.death.as_ref().map_or("", |death| death.verdict.as_str());
    let said = if said.is_empty() { &finding.summary } else { said };
    let tail = format!(" ({:.0} %). tapioctl finding {}", finding.confidence * 100.0, finding.id);
    let mut text = clean(&format!("{}. {}", finding.title, said.trim_end_matches('.')));
    while text.len() + tail.len() > MESSAGE_BYTES_MAX {
        text.pop();
    }
    text + &tail
}

fn pod(entity: &EntityRef) -> Option<Value> {
    let mut object = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "namespace": entity.namespace,
        "name": entity.pod,
    });
    // With another uid than the pod's, `kubectl describe` would not show it.
    if !entity.pod_uid.is_empty() {
        object["uid"] = entity.pod_uid.clone().into();
    }
    if !entity.container.is_empty() {
        object["fieldPath"] = format!("spec.containers{{{}}}", entity.container).into();
    }
    (!entity.pod.is_empty()).then_some(object)
}

/// Refers to a workload without its uid, which is not known: `kubectl events --for` shows it.
fn workload(entity: &EntityRef) -> Option<Value> {
    let (kind, name) = entity.workload.split_once('/')?;
    let version = match kind {
        "Deployment" | "StatefulSet" | "DaemonSet" | "ReplicaSet" => "apps/v1",
        "Job" | "CronJob" => "batch/v1",
        _ => return None,
    };
    Some(json!({"apiVersion": version, "kind": kind, "namespace": entity.namespace, "name": name}))
}

impl Sink for KubernetesEvents {
    fn name(&self) -> &str {
        "kubernetes-events"
    }

    fn timeout(&self) -> Duration {
        TIMEOUT
    }

    fn when_silenced(&self) -> WhenSilenced {
        WhenSilenced::Record
    }

    fn deliver<'a>(&'a self, delivery: &'a Delivery) -> Delivering<'a> {
        Box::pin(self.write(delivery))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_short_and_shows_no_control_characters() {
        let finding = Finding {
            id: "23841bace3".into(),
            title: "\u{1b}[31mred".into(),
            summary: "é".repeat(5000),
            confidence: 0.95,
            ..Finding::default()
        };
        let said = message(&finding);
        assert!(said.len() <= MESSAGE_BYTES_MAX && said.ends_with(" (95 %). tapioctl finding 23841bace3"), "{said}");
        assert!(!said.chars().any(char::is_control), "{said}");
    }

    #[test]
    fn an_object_gets_no_flood_of_events() {
        let sink = KubernetesEvents::new(&KubernetesEventsSection::default(), "a");
        let object = json!({"kind": "Pod", "name": "loud"});
        let writes = |_: &i32| sink.may_write(&object).then(|| sink.count(&object)).is_some();
        assert_eq!((0..100).filter(writes).count(), 25);
        assert!(!sink.may_write(&object), "what is only asked costs nothing, and what is used up is");
        assert!(sink.may_write(&json!({"kind": "Pod", "name": "calm"})));
    }
}
