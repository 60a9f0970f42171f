//! ConfigMaps and Secrets: that they changed, and who uses them.
//!
//! What enters: their metadata, which is all that is asked for, and the pod templates of workloads. What leaves: an event for
//! each change, with the workloads that mount the object or take their environment from it. What must hold: contents are
//! never requested; an object that an election writes every few seconds is left out.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tapio_wire::event::{ConfigChange, Detail, EntityId};

use super::objects::{Metadata, PodSpec, unix_ns};
use super::pods::is_system;
use super::report::{Subject, WatchReport};
use super::watch::{Follower, digest};

/// Workloads named in one change.
const USED_BY_MAX: usize = 64;

/// Which workloads use which objects.
#[derive(Default)]
pub struct Uses(HashMap<u64, Vec<EntityId>, foldhash::fast::RandomState>);

impl Uses {
    /// A workload uses `now` and no longer `before`.
    pub fn change(&mut self, workload: EntityId, before: &[u64], now: &[u64]) {
        for key in before.iter().filter(|key| !now.contains(key)) {
            if let Some(users) = self.0.get_mut(key) {
                users.retain(|user| *user != workload);
                if users.is_empty() {
                    self.0.remove(key);
                }
            }
        }
        for key in now.iter().filter(|key| !before.contains(key)) {
            self.0.entry(*key).or_default().push(workload);
        }
    }

    fn of(&self, key: u64) -> Vec<EntityId> {
        self.0.get(&key).map(|users| users.iter().take(USED_BY_MAX).copied().collect()).unwrap_or_default()
    }
}

fn use_key(kind: &str, namespace: &str, name: &str) -> u64 {
    digest(&(kind, namespace, name))
}

/// Everything that a pod template takes its files or environment from.
pub fn uses_of(namespace: &str, spec: &PodSpec) -> Vec<u64> {
    let mut keys = Vec::new();
    let mut add = |kind: &str, name: &str| {
        if !name.is_empty() {
            let key = use_key(kind, namespace, name);
            if !keys.contains(&key) {
                keys.push(key);
            }
        }
    };
    for volume in &spec.volumes {
        add("ConfigMap", &volume.config_map.name);
        add("Secret", &volume.secret.secret_name);
        for source in &volume.projected.sources {
            add("ConfigMap", &source.config_map.name);
            add("Secret", &source.secret.name);
        }
    }
    for container in spec.containers.iter().chain(&spec.init_containers) {
        for from in &container.env_from {
            add("ConfigMap", &from.config_map_ref.name);
            add("Secret", &from.secret_ref.name);
        }
        for variable in &container.env {
            add("ConfigMap", &variable.value_from.config_map_key_ref.name);
            add("Secret", &variable.value_from.secret_key_ref.name);
        }
    }
    keys
}

/// Watches ConfigMaps and Secrets and knows which workloads use them.
pub struct Configs {
    kind: &'static str,
    node: Arc<str>,
    uses: Arc<Mutex<Uses>>,
    since_ns: u64,
    excludes_system: bool,
}

/// What was reported of an object.
pub struct SeenConfig {
    namespace: Box<str>,
    name: Box<str>,
    version: u64,
}

impl Configs {
    /// Makes a follower of one kind: `ConfigMap` or `Secret`. What was made before `since_ns` counts as reported.
    pub fn new(
        kind: &'static str,
        node: Arc<str>,
        uses: Arc<Mutex<Uses>>,
        since_ns: u64,
        excludes_system: bool,
    ) -> Self {
        Self { kind, node, uses, since_ns, excludes_system }
    }

    fn report(&self, namespace: &str, name: &str, version: &str, change: u8, reports: &mut Vec<WatchReport>) {
        if self.excludes_system && is_system(namespace) {
            return;
        }
        let uses = self.uses.lock().unwrap_or_else(PoisonError::into_inner);
        let used_by = uses.of(use_key(self.kind, namespace, name));
        let texts = [self.kind, namespace, name, version].map(str::to_owned);
        reports.push(WatchReport::event(Subject::Node(self.node.to_string()), move |batch| {
            let [kind, namespace, name, resource_version] = texts.map(|text| batch.text(&text));
            Detail::ConfigChange(Box::new(ConfigChange { kind, namespace, name, resource_version, used_by, change }))
        }));
    }
}

impl Follower for Configs {
    type Object = Metadata;
    type Kept = SeenConfig;

    fn seen(
        &mut self,
        object: &Metadata,
        state: Option<SeenConfig>,
        first: bool,
        reports: &mut Vec<WatchReport>,
    ) -> Option<SeenConfig> {
        let meta = &object.metadata;
        if !meta.annotations.leader.is_empty() {
            return None;
        }
        let version = digest(&meta.resource_version);
        let change = match &state {
            Some(seen) if seen.version == version => return state,
            Some(_) => Some(2),
            None if first && unix_ns(meta.creation_timestamp.as_ref()) < self.since_ns => None,
            None => Some(1),
        };
        if let Some(change) = change {
            // The last write of an object that is being deleted brings no change of its data.
            if meta.deletion_timestamp.is_none() {
                self.report(&meta.namespace, &meta.name, &meta.resource_version, change, reports);
            }
        }
        Some(SeenConfig { namespace: (&*meta.namespace).into(), name: (&*meta.name).into(), version })
    }

    fn gone(&mut self, seen: SeenConfig, reports: &mut Vec<WatchReport>) {
        self.report(&seen.namespace, &seen.name, "", 3, reports);
    }
}
