//! What the watches report, on its way to the intake.
//!
//! What enters: subjects and details that the followers of the watches made. What leaves: events with interned names,
//! and descriptions of their subjects where due. What must hold: the channel in between is bounded and nothing in it is
//! dropped. A watch that finds it full waits, and its unread answers wait in the API server.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tapio_wire::event::{Detail, Entity, EntityId, EntityKind, Event, Gap, Lane, ObjectState, Source};
use tapio_wire::{entity_id, node_id};
use tokio::sync::mpsc;

use crate::base::clock::boottime_ns;
use crate::intake::decode::Batch;
use crate::intake::identity::directory::{Directory, Owner, workload_entity};
use crate::intake::pass::Pass;

/// Observations between the watches and the intake.
pub const CHANNEL_MAX: usize = 256;
/// How often a description is repeated when there are events.
const REPEATED: Duration = Duration::from_secs(60);
/// Descriptions whose time is remembered.
const DESCRIBED_MAX: usize = 16_384;

/// Bytes of texts in a batch, after which it is handed on. Far from the bounds of a frame, whose names cannot be split,
/// and small enough for a queue of such batches.
const BATCH_TEXT_BYTES_MAX: usize = 256 << 10;

/// What an observation is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Subject {
    /// A container, by its id; its names are in the directory.
    Container(String),
    Pod {
        uid: String,
        namespace: String,
        name: String,
    },
    Workload {
        kind: String,
        namespace: String,
        name: String,
    },
    Node(String),
}

impl Subject {
    /// Id of the entity.
    pub fn id(&self) -> EntityId {
        match self {
            Self::Container(id) => entity_id(EntityKind::Container, id),
            Self::Pod { uid, .. } => entity_id(EntityKind::Pod, uid),
            Self::Workload { kind, namespace, name } => entity_id(
                EntityKind::Workload,
                &crate::intake::identity::directory::workload_key(kind, namespace, name),
            ),
            Self::Node(name) => node_id(name),
        }
    }

    /// The subject for an object that Kubernetes refers to; `None` when it is no entity.
    pub fn of(kind: &str, namespace: &str, name: &str, uid: &str) -> Option<Self> {
        match kind {
            "Pod" if !uid.is_empty() => {
                Some(Self::Pod { uid: uid.into(), namespace: namespace.into(), name: name.into() })
            }
            "Node" => Some(Self::Node(name.into())),
            "Deployment" | "ReplicaSet" | "ReplicationController" | "StatefulSet" | "DaemonSet" | "Job" | "CronJob" => {
                Some(Self::Workload { kind: kind.into(), namespace: namespace.into(), name: name.into() })
            }
            _ => None,
        }
    }
}

type Make = Box<dyn FnOnce(&mut Batch) -> Detail + Send>;

/// One observation; without a detail only a description.
pub struct WatchReport {
    pub(super) subject: Subject,
    pub(super) time_ns: u64,
    make: Option<Make>,
    /// Owner of a pod that the directory does not know.
    owner: Option<Owner>,
}

impl WatchReport {
    /// Something happened now.
    pub fn event(subject: Subject, make: impl FnOnce(&mut Batch) -> Detail + Send + 'static) -> Self {
        Self { subject, time_ns: boottime_ns(), make: Some(Box::new(make)), owner: None }
    }

    /// Dates the report back by `late_ns`.
    pub fn ago(self, late_ns: u64) -> Self {
        Self { time_ns: self.time_ns.saturating_sub(late_ns), ..self }
    }

    /// The state of an object: its kind, namespace and name; its state, the reason and the message.
    pub fn object_state(subject: Subject, texts: [&str; 6], (current, desired): (u64, u64), is_gone: bool) -> Self {
        let texts = texts.map(str::to_owned);
        Self::event(subject, move |batch| {
            let [kind, namespace, name, state, reason, message] = texts.map(|text| batch.text(&text));
            let state = ObjectState { kind, namespace, name, state, reason, message, current, desired, is_gone };
            Detail::ObjectState(Box::new(state))
        })
    }

    /// The directory knows more of this one than before.
    pub fn description(subject: Subject) -> Self {
        Self { subject, time_ns: 0, make: None, owner: None }
    }

    /// Makes the report about a pod that this owns; the directory need not know the pod.
    pub fn owned_by(self, owner: Option<Owner>) -> Self {
        Self { owner, ..self }
    }

    /// Something was missed.
    pub fn gap(node: &str, what: &'static str, reason: &'static str, from_ns: u64, found_gone: u32) -> Self {
        let until_ns = boottime_ns();
        Self::event(Subject::Node(node.into()), move |batch| {
            let (what, reason) = (batch.text(what), batch.text(reason));
            Detail::Gap(Box::new(Gap { what, reason, from_ns, until_ns, found_gone }))
        })
    }
}

/// Where the watches send their reports.
#[derive(Clone)]
pub struct ReportSender {
    sender: mpsc::Sender<WatchReport>,
}

impl ReportSender {
    /// A channel of [`CHANNEL_MAX`] observations.
    pub fn channel() -> (Self, mpsc::Receiver<WatchReport>) {
        let (sender, receiver) = mpsc::channel(CHANNEL_MAX);
        (Self { sender }, receiver)
    }

    /// Hands everything on, in order, and waits for room.
    pub async fn send(&self, reports: &mut Vec<WatchReport>) {
        for report in reports.drain(..) {
            // An error means that the source ends; the watches end with it.
            if self.sender.send(report).await.is_err() {
                return;
            }
        }
    }
}

/// How a subject was described last.
struct Described {
    stream: u64,
    when: Instant,
    names: u64,
    /// Owner of a pod that the directory does not know; kept, since other reporters may not know it.
    owner: Option<Owner>,
}

/// Turns observations into events, and knows which subjects were described.
pub struct Scribe {
    directory: Arc<Directory>,
    described: HashMap<EntityId, Described, foldhash::fast::RandomState>,
    /// Bytes of texts since the intake was empty.
    text_bytes: usize,
}

impl Scribe {
    /// Nothing was described yet.
    pub fn new(directory: Arc<Directory>) -> Self {
        Self { directory, described: HashMap::default(), text_bytes: 0 }
    }

    /// Whether one more observation may be written: by the number of events, and by the bytes of what they say.
    pub fn has_room(&mut self, pass: &mut Pass<'_>) -> bool {
        if self.text_bytes >= BATCH_TEXT_BYTES_MAX {
            pass.make_room();
        }
        if pass.is_empty() {
            self.text_bytes = 0;
        }
        self.text_bytes < BATCH_TEXT_BYTES_MAX && pass.room_of(Lane::Lethal) > 0
    }

    /// Hands one observation to the intake, which must have room.
    pub fn write(&mut self, report: WatchReport, pass: &mut Pass<'_>) {
        let generation = pass.generation();
        pass.describe(|entities| self.describe(&report.subject, report.owner.as_ref(), generation, entities));
        let WatchReport { subject, time_ns, make, .. } = report;
        if let Some(make) = make {
            let text_bytes = &mut self.text_bytes;
            pass.observe(|batch, _| {
                let before = batch.body.names.len();
                let body = make(batch);
                *text_bytes += batch.body.names[before..].iter().map(String::len).sum::<usize>();
                Event { time_ns, entity: subject.id(), pid: 0, source: Source::Kube, body }
            });
        }
    }

    fn describe(&mut self, subject: &Subject, owner: Option<&Owner>, generation: u64, entities: &mut Vec<Entity>) {
        let id = subject.id();
        let version = match subject {
            Subject::Container(_) => self.directory.container_version(id, 0).0,
            Subject::Pod { .. } => self.directory.pod_version(id),
            Subject::Workload { .. } | Subject::Node(_) => 0,
        };
        let now = Instant::now();
        let last = self.described.get(&id);
        let is_fresh = last.is_some_and(|last| {
            last.stream == generation
                && last.names == version
                && (owner.is_none() || last.owner.as_ref() == owner)
                && now.saturating_duration_since(last.when) < REPEATED
        });
        if is_fresh {
            return;
        }
        let owner = owner.or(last.and_then(|last| last.owner.as_ref())).cloned();
        if self.described.len() >= DESCRIBED_MAX {
            self.described.retain(|_, last| now.saturating_duration_since(last.when) < REPEATED);
            if self.described.len() >= DESCRIBED_MAX {
                self.described.clear();
            }
        }
        let described = Described { stream: generation, when: now, names: version, owner: owner.clone() };
        self.described.insert(id, described);
        let mut pod = match subject {
            Subject::Container(container_id) => {
                let short = container_id.get(..12).unwrap_or(container_id);
                let mut entity =
                    Entity { container_id: container_id.clone(), ..Entity::named(EntityKind::Container, id, short) };
                self.directory.complete(&mut entity, entities);
                let pod = (entity.parent != 0).then(|| Entity {
                    pod_uid: entity.pod_uid.clone(),
                    ..Entity::named(EntityKind::Pod, entity.parent, entity.pod_uid.clone())
                });
                entities.push(entity);
                pod
            }
            Subject::Pod { uid, namespace, name } => Some(Entity {
                pod_uid: uid.clone(),
                namespace: namespace.clone(),
                pod: name.clone(),
                ..Entity::named(EntityKind::Pod, id, format!("{namespace}/{name}"))
            }),
            Subject::Workload { kind, namespace, name } => {
                entities.push(workload_entity(kind, namespace, name));
                None
            }
            // It may be another node than this one, which may have no collector.
            Subject::Node(name) => {
                entities.push(Entity::named(EntityKind::Node, id, name.clone()));
                None
            }
        };
        if let Some(entity) = &mut pod {
            let is_known = self.directory.complete(entity, entities);
            if let Some(owner) = owner.filter(|_| !is_known) {
                let workload = workload_entity(&owner.kind, &entity.namespace, &owner.name);
                (entity.parent, entity.workload) = (workload.id, workload.workload.clone());
                entities.push(workload);
            }
        }
        entities.extend(pod);
    }
}

#[cfg(test)]
mod tests {
    use tapio_wire::event::KubeEvent;

    use super::*;
    use crate::intake::Intake;
    use crate::intake::decode::TEXT_BYTES_MAX;
    use crate::intake::identity::Identity;
    use crate::intake::source_context::SourceContext;
    use crate::outbox::queue::{OpenLanes, Queues};
    use crate::settings::config::Config;

    /// An Event whose message is as long as its author pleased.
    fn long(number: usize) -> WatchReport {
        WatchReport::event(Subject::Node("node".into()), move |batch| {
            let message = batch.text(&format!("{number} {}", "é".repeat(100_000)));
            let [reason, kind, namespace, name, field_path, component] = ["x"; 6].map(|text| batch.text(text));
            Detail::KubeEvent(Box::new(KubeEvent {
                reason,
                message,
                kind,
                namespace,
                name,
                field_path,
                component,
                count: 1,
                first_ns: 1,
                last_ns: 1,
                is_warning: true,
            }))
        })
    }

    #[test]
    fn long_texts_are_cut_and_batches_of_them_stay_small() {
        let (queues, _parker) = Queues::new(64);
        let context = SourceContext::for_config(&Config::default(), queues);
        let mut intake = Intake::new(context.clone(), Source::Kube, Identity::new(Vec::new()));
        let mut scribe = Scribe::new(Arc::default());
        let mut pass = intake.begin();
        for number in 0..1000 {
            assert!(scribe.has_room(&mut pass), "the queue takes what is full");
            scribe.write(long(number), &mut pass);
        }
        pass.finish_all();
        let bodies: Vec<_> = std::iter::from_fn(|| context.queues.pop(OpenLanes::Both)).map(|(_, body)| body).collect();
        assert_eq!(bodies.iter().map(|body| body.events.len()).sum::<usize>(), 1000);
        for body in &bodies {
            assert!(body.names.iter().all(|name| name.len() <= TEXT_BYTES_MAX));
            let bytes = body.names.iter().map(String::len).sum::<usize>();
            assert!(bytes < BATCH_TEXT_BYTES_MAX + 8 * TEXT_BYTES_MAX, "{bytes}");
        }
    }

    #[test]
    fn a_pods_owner_is_described_once_it_is_known() {
        let mut scribe = Scribe::new(Arc::default());
        let pod = Subject::Pod { uid: "u1".into(), namespace: "shop".into(), name: "web-1".into() };
        let owner = Owner { kind: "Deployment".into(), name: "web".into() };
        let mut described = |owner: Option<&Owner>, stream| {
            let mut entities = Vec::new();
            scribe.describe(&pod, owner, stream, &mut entities);
            entities.last().map(|entity| entity.workload.clone())
        };
        assert_eq!(described(None, 1).as_deref(), Some(""));
        assert_eq!(described(Some(&owner), 1).as_deref(), Some("Deployment/web"), "news, though it was described");
        assert_eq!(described(Some(&owner), 1), None);
        assert_eq!(described(None, 1), None);
        assert_eq!(described(None, 2).as_deref(), Some("Deployment/web"), "known from before");
    }

    #[test]
    fn a_replication_controller_stands_for_itself() {
        let subject = Subject::of("ReplicationController", "shop", "old", "");
        let names = ("ReplicationController".into(), "shop".into(), "old".into());
        assert_eq!(subject, Some(Subject::Workload { kind: names.0, namespace: names.1, name: names.2 }));
        assert_eq!(Subject::of("PersistentVolumeClaim", "shop", "data", ""), None, "a claim is no entity");
    }

    #[test]
    fn another_node_is_described_by_its_name() {
        let mut scribe = Scribe::new(Arc::default());
        let mut entities = Vec::new();
        for _ in 0..2 {
            scribe.describe(&Subject::Node("far".into()), None, 1, &mut entities);
        }
        let described: Vec<_> = entities.iter().map(|node| (node.kind, node.id, &*node.name)).collect();
        assert_eq!(described, [(EntityKind::Node, node_id("far"), "far")]);
    }

    #[test]
    fn a_batch_of_long_texts_without_room_does_not_grow() {
        let (queues, _parker) = Queues::new(1);
        let context = SourceContext::for_config(&Config::default(), queues);
        let mut intake = Intake::new(context.clone(), Source::Kube, Identity::new(Vec::new()));
        let mut scribe = Scribe::new(Arc::default());
        let mut pass = intake.begin();
        let mut number = 0;
        while scribe.has_room(&mut pass) {
            scribe.write(long(number), &mut pass);
            number += 1;
            assert!(number < 10_000, "its bytes are not bounded");
        }
        while context.queues.pop(OpenLanes::Both).is_some() {}
        assert!(scribe.has_room(&mut pass), "there is room again");
    }
}
