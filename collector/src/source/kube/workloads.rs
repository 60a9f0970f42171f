//! Deployments, ReplicaSets, StatefulSets, DaemonSets and Jobs: how their rollouts go.
//!
//! What enters: the objects. What leaves: an event for each change of their images, generations, counts or worst condition, and who
//! changed their specification. What must hold: images and limits before a change are reported with it; a ReplicaSet that wants no
//! pods is history and not reported.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tapio_wire::event::{Detail, Rollout};

use super::config::{Uses, uses_of};
use super::objects::{Condition, Meta, Workload, WorkloadStatus, unix_ns};
use super::pods::is_system;
use super::report::{Subject, WatchReport};
use super::watch::{Follower, digest};

/// Which of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WorkloadKind {
    Deployment,
    ReplicaSet,
    StatefulSet,
    DaemonSet,
    Job,
}

impl WorkloadKind {
    /// The name in the API.
    pub fn name(self) -> &'static str {
        match self {
            Self::Deployment => "Deployment",
            Self::ReplicaSet => "ReplicaSet",
            Self::StatefulSet => "StatefulSet",
            Self::DaemonSet => "DaemonSet",
            Self::Job => "Job",
        }
    }

    /// The resource's name.
    pub fn what(self) -> &'static str {
        match self {
            Self::Deployment => "deployments",
            Self::ReplicaSet => "replicasets",
            Self::StatefulSet => "statefulsets",
            Self::DaemonSet => "daemonsets",
            Self::Job => "jobs",
        }
    }

    /// The resource's path.
    pub fn path(self) -> &'static str {
        match self {
            Self::Deployment => "/apis/apps/v1/deployments",
            Self::ReplicaSet => "/apis/apps/v1/replicasets",
            Self::StatefulSet => "/apis/apps/v1/statefulsets",
            Self::DaemonSet => "/apis/apps/v1/daemonsets",
            Self::Job => "/apis/batch/v1/jobs",
        }
    }

    /// Conditions that mean trouble, the worst first.
    fn troubles(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Deployment => &[("ReplicaFailure", "True"), ("Progressing", "False"), ("Available", "False")],
            Self::ReplicaSet => &[("ReplicaFailure", "True")],
            Self::Job => &[("Failed", "True"), ("Suspended", "True")],
            Self::StatefulSet | Self::DaemonSet => &[],
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Counts {
    desired: u32,
    updated: u32,
    ready: u32,
    unavailable: u32,
}

impl Counts {
    fn of(kind: WorkloadKind, workload: &Workload) -> Self {
        let status: &WorkloadStatus = &workload.status;
        let replicas = workload.spec.replicas.unwrap_or(1);
        match kind {
            WorkloadKind::Deployment => Self {
                desired: replicas,
                updated: status.updated_replicas,
                ready: status.ready_replicas,
                unavailable: status.unavailable_replicas,
            },
            WorkloadKind::ReplicaSet => Self {
                desired: replicas,
                updated: status.replicas,
                ready: status.ready_replicas,
                unavailable: replicas.saturating_sub(status.available_replicas),
            },
            WorkloadKind::StatefulSet => Self {
                desired: replicas,
                updated: status.updated_replicas,
                ready: status.ready_replicas,
                unavailable: replicas.saturating_sub(status.ready_replicas),
            },
            WorkloadKind::DaemonSet => Self {
                desired: status.desired_number_scheduled,
                updated: status.updated_number_scheduled,
                ready: status.number_ready,
                unavailable: status.number_unavailable,
            },
            // Of a Job: pods at work, succeeded, failed.
            WorkloadKind::Job => Self {
                desired: workload.spec.completions.unwrap_or(1),
                updated: status.active,
                ready: status.succeeded,
                unavailable: status.failed,
            },
        }
    }
}

/// Which ReplicaSet belongs to which Deployment, for those who know a ReplicaSet only.
#[derive(Clone, Default)]
pub struct ReplicaSets {
    owners: Arc<Mutex<HashMap<(String, String), Subject>>>,
}

impl ReplicaSets {
    /// What owns the ReplicaSet of this namespace and name.
    pub fn owner(&self, namespace: &str, name: &str) -> Option<Subject> {
        let owners = self.owners.lock().unwrap_or_else(PoisonError::into_inner);
        owners.get(&(namespace.to_owned(), name.to_owned())).cloned()
    }

    fn learn(&self, meta: &Meta, owner: &Subject) {
        let mut owners = self.owners.lock().unwrap_or_else(PoisonError::into_inner);
        owners.insert((meta.namespace.clone(), meta.name.clone()), owner.clone());
    }

    fn forget(&self, namespace: &str, name: &str) {
        let mut owners = self.owners.lock().unwrap_or_else(PoisonError::into_inner);
        owners.remove(&(namespace.to_owned(), name.to_owned()));
    }
}

/// Watches workloads and reports their rollouts.
pub struct Workloads {
    kind: WorkloadKind,
    uses: Arc<Mutex<Uses>>,
    replica_sets: ReplicaSets,
    excludes_system: bool,
}

/// What was reported of a workload.
pub struct SeenWorkload {
    subject: Subject,
    name: String,
    images: Box<str>,
    limits: Vec<Limited>,
    uses: Vec<u64>,
    print: u64,
    /// Generation of its specification when it was seen last.
    generation: u64,
}

impl Workloads {
    /// Makes a follower of one kind; `uses` learns what their pods mount, `replica_sets` whose ReplicaSets they are.
    pub fn new(kind: WorkloadKind, uses: Arc<Mutex<Uses>>, replica_sets: ReplicaSets, excludes_system: bool) -> Self {
        Self { kind, uses, replica_sets, excludes_system }
    }

    /// Takes in the limits of the template, and says which have changed. A ReplicaSet has what its Deployment has.
    fn take_limits(&self, seen: &mut SeenWorkload, workload: &Workload) -> String {
        if self.kind == WorkloadKind::ReplicaSet {
            return String::new();
        }
        let limits = limits_of(workload);
        let changes = changed_limits(&seen.limits, &limits);
        seen.limits = limits;
        changes
    }

    fn change_uses(&self, seen: &mut SeenWorkload, now: Vec<u64>) {
        // A ReplicaSet has what its Deployment has.
        if self.kind != WorkloadKind::ReplicaSet && seen.uses != now {
            let mut uses = self.uses.lock().unwrap_or_else(PoisonError::into_inner);
            uses.change(seen.subject.id(), &seen.uses, &now);
            seen.uses = now;
        }
    }
}

/// The images of a template.
fn images_of(workload: &Workload) -> String {
    let spec = &workload.spec.template.spec;
    let images = spec.init_containers.iter().chain(&spec.containers).map(|container| &*container.image);
    images.collect::<Vec<_>>().join(",")
}

/// A container of the template: its name and its limits of memory and CPU as they are written; empty where there is none.
#[derive(PartialEq, Eq)]
struct Limited {
    name: Box<str>,
    limits: [Box<str>; 2],
}

/// Containers of a template whose limits are compared.
const LIMITED_MAX: usize = 32;

/// The limits of a template, by container.
fn limits_of(workload: &Workload) -> Vec<Limited> {
    let spec = &workload.spec.template.spec;
    let containers = spec.init_containers.iter().chain(&spec.containers).take(LIMITED_MAX);
    let limited = containers.map(|container| {
        let limits = &container.resources.limits;
        Limited { name: (&*container.name).into(), limits: [(&*limits.memory).into(), (&*limits.cpu).into()] }
    });
    limited.collect()
}

/// Which limits of containers that were there before have changed, for people.
fn changed_limits(before: &[Limited], now: &[Limited]) -> String {
    let word = |limit: &str| if limit.is_empty() { "none" } else { limit }.to_owned();
    let mut changes = Vec::new();
    for container in now {
        let Some(known) = before.iter().find(|known| known.name == container.name) else { continue };
        for (what, (from, to)) in ["memory", "CPU"].into_iter().zip(known.limits.iter().zip(&container.limits)) {
            if from != to {
                changes.push(format!("{what} limit of {} from {} to {}", container.name, word(from), word(to)));
            }
        }
    }
    changes.join(", ")
}

/// Who changed the specification of an object, by the newest of its `managedFields` that is none of its status, and which limits.
fn changed_by(kind: WorkloadKind, meta: &Meta, subject: &Subject, limits: &str) -> Option<WatchReport> {
    // The Deployment controller writes the revision into the object after each change.
    let is_echo = |manager: &str, subresource: &str| manager == "kube-controller-manager" && subresource.is_empty();
    let of_spec = meta
        .managed_fields
        .iter()
        .filter(|fields| fields.subresource != "status" && !is_echo(&fields.manager, &fields.subresource));
    let newest = of_spec.max_by_key(|fields| unix_ns(fields.time.as_ref()));
    let how = match newest.map(|fields| (&*fields.subresource, &*fields.operation)) {
        None if limits.is_empty() => return None,
        None => "its specification was changed".to_owned(),
        Some(("scale", _)) => "scaled it".to_owned(),
        Some((_, operation)) => format!("changed its specification ({operation})"),
    };
    let how = if limits.is_empty() { how } else { format!("{how}: {limits}") };
    let manager = newest.map_or("", |fields| &fields.manager);
    let texts = [kind.name(), &meta.namespace, &meta.name, "Changed", manager, &how];
    Some(WatchReport::object_state(subject.clone(), texts, (meta.generation, meta.generation), false))
}

impl Follower for Workloads {
    type Object = Workload;
    type Kept = SeenWorkload;

    fn seen(
        &mut self,
        workload: &Workload,
        state: Option<SeenWorkload>,
        _first: bool,
        reports: &mut Vec<WatchReport>,
    ) -> Option<SeenWorkload> {
        let meta = &workload.metadata;
        let is_new = state.is_none();
        let mut seen = state.unwrap_or_else(|| {
            let owner = meta.owner_references.iter().find(|owner| owner.controller);
            let (kind, name) = match owner {
                Some(owner) if self.kind == WorkloadKind::ReplicaSet => (&*owner.kind, &owner.name),
                _ => (self.kind.name(), &meta.name),
            };
            SeenWorkload {
                subject: Subject::Workload { kind: kind.into(), namespace: meta.namespace.clone(), name: name.clone() },
                name: meta.name.clone(),
                images: Box::default(),
                limits: Vec::new(),
                uses: Vec::new(),
                print: 0,
                generation: meta.generation,
            }
        });
        if is_new && self.kind == WorkloadKind::ReplicaSet {
            self.replica_sets.learn(meta, &seen.subject);
        }
        self.change_uses(&mut seen, uses_of(&meta.namespace, &workload.spec.template.spec));
        let is_excluded = self.excludes_system && is_system(&meta.namespace);
        let has_changed = seen.generation != meta.generation && self.kind != WorkloadKind::ReplicaSet;
        seen.generation = meta.generation;
        if is_new || has_changed {
            let changes = self.take_limits(&mut seen, workload);
            let report = || changed_by(self.kind, meta, &seen.subject, &changes);
            reports.extend((has_changed && !is_excluded).then(report).flatten());
        }
        let images = images_of(workload);
        let counts = Counts::of(self.kind, workload);
        let trouble = self.kind.troubles().iter().find_map(|(kind, bad)| {
            let is_it = |condition: &&Condition| condition.r#type == *kind && condition.status == *bad;
            workload.status.conditions.iter().find(is_it)
        });
        let reason = trouble.map_or("", |condition| &condition.reason);
        let status = &workload.status;
        let print = digest(&(meta.generation, status.observed_generation, counts, reason, &images));
        let is_history = self.kind == WorkloadKind::ReplicaSet && counts.desired == 0 && status.replicas == 0;
        if seen.print == print || is_excluded || (is_new || seen.print == 0) && is_history {
            (seen.print, seen.images) = (print, images.into());
            return Some(seen);
        }
        seen.print = print;
        let before = if is_new || *seen.images == *images { "" } else { &*seen.images };
        let message = trouble.map_or("", |condition| &condition.message);
        let texts =
            [self.kind.name(), &meta.namespace, &meta.name, &images, before, reason, message].map(str::to_owned);
        let (generation, observed_generation) = (meta.generation, status.observed_generation);
        reports.push(WatchReport::event(seen.subject.clone(), move |batch| {
            let [kind, namespace, name, images, images_before, reason, message] = texts.map(|text| batch.text(&text));
            let Counts { desired, updated, ready, unavailable } = counts;
            Detail::Rollout(Box::new(Rollout {
                kind,
                namespace,
                name,
                images,
                images_before,
                reason,
                message,
                generation,
                observed_generation,
                desired,
                updated,
                ready,
                unavailable,
                is_gone: false,
            }))
        }));
        seen.images = images.into();
        Some(seen)
    }

    fn forget(&mut self, seen: &mut SeenWorkload) -> bool {
        seen.print = 0;
        true
    }

    fn gone(&mut self, mut seen: SeenWorkload, reports: &mut Vec<WatchReport>) {
        self.change_uses(&mut seen, Vec::new());
        let Subject::Workload { namespace, .. } = &seen.subject else { return };
        if self.kind == WorkloadKind::ReplicaSet {
            self.replica_sets.forget(namespace, &seen.name);
        }
        if self.excludes_system && is_system(namespace) {
            return;
        }
        let texts = [self.kind.name(), namespace, &seen.name, &seen.images].map(str::to_owned);
        reports.push(WatchReport::event(seen.subject, move |batch| {
            let [kind, namespace, name, images] = texts.map(|text| batch.text(&text));
            let none = batch.text("");
            Detail::Rollout(Box::new(Rollout {
                kind,
                namespace,
                name,
                images,
                images_before: none,
                reason: none,
                message: none,
                generation: 0,
                observed_generation: 0,
                desired: 0,
                updated: 0,
                ready: 0,
                unavailable: 0,
                is_gone: true,
            }))
        }));
    }
}
