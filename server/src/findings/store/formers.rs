//! Findings of several deaths that an earlier run made, and that this one may go on with.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hash};
use std::sync::Arc;

use foldhash::fast::RandomState;
use tapio_wire::service::{EntityRef, Evidence, Finding};

use super::FindingStore;
use super::table::Table;
use crate::correlate::clue::EvidenceId;
use crate::findings::pattern::Pattern;
use crate::findings::series::Former;

/// Their ids, by what they are looked up by.
#[derive(Default)]
pub(super) struct Formers {
    by_evidence: HashMap<EvidenceId, Vec<String>, RandomState>,
    by_place: HashMap<(String, Place), Vec<String>>,
    /// What a replay found that may be a part of one of them, by id.
    pub parts: HashMap<String, Finding>,
}

/// Where the deaths of a finding happened. Deaths of one entity, or of one container of a pod or of a workload, have one in common.
#[derive(PartialEq, Eq, Hash)]
enum Place {
    Entity(u64),
    Pod { uid: String, container: String },
    Workload { namespace: String, name: String, container: String },
}

impl Place {
    fn all_of(entity: &EntityRef) -> impl Iterator<Item = Self> {
        let container = || entity.container.clone();
        let pod =
            (!entity.pod_uid.is_empty()).then(|| Self::Pod { uid: entity.pod_uid.clone(), container: container() });
        let workload = (!entity.workload.is_empty()).then(|| Self::Workload {
            namespace: entity.namespace.clone(),
            name: entity.workload.clone(),
            container: container(),
        });
        [Some(Self::Entity(entity.id)), pod, workload].into_iter().flatten()
    }
}

/// Adds an id to those that are found by a key.
fn add_id<K: Hash + Eq, S: BuildHasher>(ids_by: &mut HashMap<K, Vec<String>, S>, key: K, id: &str) {
    let ids = ids_by.entry(key).or_default();
    if !ids.iter().any(|known| known == id) {
        ids.push(id.to_owned());
    }
}

/// Takes an id out of those that are found by a key.
fn remove_id<K: Hash + Eq, S: BuildHasher>(ids_by: &mut HashMap<K, Vec<String>, S>, key: &K, id: &str) {
    let Some(ids) = ids_by.get_mut(key) else { return };
    ids.retain(|known| known != id);
    if ids.is_empty() {
        ids_by.remove(key);
    }
}

/// Whether it may grow.
fn is_group(finding: &Finding) -> bool {
    finding.count > 1 && !finding.ongoing && finding.resolved_ns == 0
}

fn pieces(finding: &Finding) -> impl Iterator<Item = EvidenceId> {
    finding.evidence.iter().filter_map(|piece| EvidenceId::parse(&piece.id))
}

/// Whether the deaths of both are of one container of a pod.
fn is_of_one_pod(one: &EntityRef, other: &EntityRef) -> bool {
    one.id == other.id || one.container == other.container && !one.pod_uid.is_empty() && one.pod_uid == other.pod_uid
}

/// Whether the deaths of both are of one container of a pod, or of a workload.
fn is_of_same(one: &EntityRef, other: &EntityRef) -> bool {
    let is_one_workload =
        !one.workload.is_empty() && (&one.namespace, &one.workload) == (&other.namespace, &other.workload);
    is_of_one_pod(one, other) || one.container == other.container && is_one_workload
}

impl Formers {
    pub fn add(&mut self, finding: &Finding) {
        if !is_group(finding) {
            return;
        }
        for place in finding.entity.iter().flat_map(Place::all_of) {
            add_id(&mut self.by_place, (finding.pattern.clone(), place), &finding.id);
        }
        for evidence in pieces(finding) {
            add_id(&mut self.by_evidence, evidence, &finding.id);
        }
    }

    pub fn remove(&mut self, finding: &Finding) {
        for place in finding.entity.iter().flat_map(Place::all_of) {
            remove_id(&mut self.by_place, &(finding.pattern.clone(), place), &finding.id);
        }
        for evidence in pieces(finding) {
            remove_id(&mut self.by_evidence, &evidence, &finding.id);
        }
    }

    pub fn clear(&mut self) {
        *self = Self::default();
    }
}

impl Table {
    /// Whether what a replay found is a part of a finding of an earlier run. The replay comes to the last death of that.
    pub fn is_within_former(&self, finding: &Finding) -> bool {
        self.is_within(finding, is_of_same)
    }

    fn is_within(&self, finding: &Finding, is_of_same: fn(&EntityRef, &EntityRef) -> bool) -> bool {
        let Some(entity) = &finding.entity else { return false };
        let ids_at = |place| self.formers.by_place.get(&(finding.pattern.clone(), place)).into_iter().flatten();
        let ids = Place::all_of(entity).flat_map(ids_at);
        let mut formers = ids.filter_map(|id| self.findings.get(id)).filter(|former| !self.is_replayed(former));
        formers.any(|former| {
            (former.started_ns..=former.ended_ns).contains(&finding.started_ns)
                && finding.ended_ns <= former.ended_ns
                && former.entity.as_ref().is_some_and(|of| is_of_same(of, entity))
        })
    }

    /// Whether a finding of an earlier run names all deaths that this one does, which a replay found by what is left to go by.
    pub fn is_named_by_former(&self, finding: &Finding) -> bool {
        let is_death = |piece: &&Evidence| matches!(piece.kind.as_str(), "exit" | "oom" | "signal");
        let mut deaths = finding.evidence.iter().filter(is_death).peekable();
        let is_standing = |id: &String| self.findings.get(id).is_some_and(|former| !self.is_replayed(former));
        let is_named = |death: EvidenceId| {
            let mut ids = self.formers.by_evidence.get(&death).into_iter().flatten();
            ids.any(is_standing)
        };
        deaths.peek().is_some() && deaths.all(|piece| EvidenceId::parse(&piece.id).is_some_and(is_named))
    }
}

impl FindingStore {
    /// Whether there are any.
    pub fn has_formers(&self) -> bool {
        !self.read().formers.by_evidence.is_empty()
    }

    /// The deaths that they name, each with its pattern.
    pub fn deaths_of_formers(&self) -> Vec<(String, EvidenceId)> {
        let inner = self.read();
        let pattern = |id: &String| Some(inner.findings.get(id)?.pattern.clone());
        let of = |(death, ids): (&EvidenceId, &Vec<String>)| {
            ids.iter().filter_map(pattern).map(|pattern| (pattern, *death)).collect::<Vec<_>>()
        };
        let mut deaths: Vec<_> = inner.formers.by_evidence.iter().flat_map(of).collect();
        deaths.sort_unstable_by(|(a, death), (b, other)| (death, a).cmp(&(other, b)));
        deaths
    }

    /// Publishes what was held back in a replay and no finding of an earlier run goes on with.
    pub fn publish_parts(&self) {
        let mut inner = self.write();
        inner.held_back.clear();
        let parts = std::mem::take(&mut inner.formers.parts).into_values();
        // The last death of that one may be on its way still.
        let mut parts: Vec<Finding> = parts.filter(|part| !inner.is_within(part, is_of_one_pod)).collect();
        drop(inner);
        parts.sort_by(|a, b| a.id.cmp(&b.id));
        for part in parts {
            self.publish(part);
        }
    }

    /// The finding of this pattern whose last death is one of these, and that death; of several the one that counts most.
    pub fn former(&self, pattern: &Pattern, deaths: impl Iterator<Item = EvidenceId>) -> Option<(Former, EvidenceId)> {
        // What counts something else than deaths does not grow with each of them.
        if pattern.anchor_step().distinct.is_some() {
            return None;
        }
        let inner = self.read();
        let step = &pattern.anchor_step().name;
        let last = |finding: &Finding| {
            let last = finding.evidence.iter().rev().find(|piece| piece.step == *step)?;
            EvidenceId::parse(&last.id)
        };
        let of_death = |death: EvidenceId| {
            let ids = inner.formers.by_evidence.get(&death).into_iter().flatten();
            let findings = ids.filter_map(|id| inner.findings.get(id));
            findings.map(move |finding| (finding, death))
        };
        let is_it = |(finding, death): &(&Arc<Finding>, EvidenceId)| {
            finding.pattern == pattern.id && !inner.is_replayed(finding) && last(finding) == Some(*death)
        };
        let found =
            deaths.flat_map(of_death).filter(is_it).max_by(|(a, _), (b, _)| (a.count, &b.id).cmp(&(b.count, &a.id)));
        found.map(|(finding, death)| {
            let (id, started_ns) = (finding.id.as_str().into(), finding.started_ns);
            (Former { id, count: finding.count, started_ns }, death)
        })
    }
}
