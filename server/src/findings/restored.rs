//! What is compared between a finding of an earlier run and one of this run.

use std::collections::HashSet;

use tapio_wire::event::EntityKind;
use tapio_wire::service::{EntityRef, Evidence, Finding};

/// One death: node, entity, process, moment.
pub(super) type DeathKey = (String, u64, u32, u64);

pub(super) fn death_key(finding: &Finding) -> Option<DeathKey> {
    let (entity, death) = (finding.entity.as_ref()?, finding.death.as_ref()?);
    Some((entity.node.clone(), entity.id, death.pid, finding.ended_ns))
}

/// The entities that a finding's evidence is about, and their pods.
pub(super) fn subjects(finding: &Finding) -> HashSet<u64> {
    let ends = finding.evidence.iter().filter(|piece| piece.step != "observed");
    let of: Vec<&EntityRef> = ends.filter_map(|piece| piece.entity.as_ref()).chain(&finding.entity).collect();
    let is_container = |entity: &&&EntityRef| entity.kind == EntityKind::Container.name() && !entity.pod_uid.is_empty();
    match pattern_is_of_pods(finding) {
        true => of
            .iter()
            .map(|entity| match is_container(&entity) {
                true => tapio_wire::entity_id(EntityKind::Pod, &entity.pod_uid),
                false => entity.id,
            })
            .collect(),
        false => finding.entity.iter().map(|entity| entity.id).collect(),
    }
}

/// The node of what a finding is about; empty where it is about none.
pub(super) fn node_of(finding: &Finding) -> &str {
    finding.entity.as_ref().map_or("", |entity| entity.node.as_str())
}

/// The entity that a finding is about; 0 where it is about none.
pub(super) fn entity_of(finding: &Finding) -> u64 {
    finding.entity.as_ref().map_or(0, |entity| entity.id)
}

/// Whether a trouble is that of this disk or task, or of a whole entity; see `endings::trouble_of`.
pub(super) fn is_of_part(piece: &Evidence, part: &str) -> bool {
    match part.split_once(' ') {
        Some(("task", pid)) => piece.pid.to_string() == pid,
        Some((what @ ("disk-full" | "inodes-full" | "disk-filling" | "inodes-filling"), place)) => {
            piece.text.starts_with(what) && piece.text.contains(&format!(" in {place}, "))
        }
        _ => true,
    }
}

/// Whether what a finding reports is a pod's: troubles and floods are reported of one container, unit or node.
pub(super) fn pattern_is_of_pods(finding: &Finding) -> bool {
    finding.evidence.iter().all(|piece| !matches!(piece.kind.as_str(), "trouble" | "gap"))
}

pub(super) fn says_less(finding: &Finding, known: &Finding) -> bool {
    let goes_on_again = finding.ongoing && !known.ongoing && finding.ended_ns <= known.ended_ns;
    goes_on_again
        || finding.ended_ns < known.ended_ns
        || finding.count < known.count
        || finding.count == known.count && finding.evidence.len() < known.evidence.len()
}
