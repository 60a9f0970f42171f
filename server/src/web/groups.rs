//! Findings by what they are about: a workload, a pod, a unit, a node.

use std::collections::HashMap;
use std::sync::Arc;

use foldhash::fast::RandomState;
use tapio_wire::service::{EntityRef, Finding};

use super::parts;

/// The findings of one workload, pod, unit or container.
pub struct Group {
    pub called: String,
    /// Path of the group's own page, if it has one.
    pub path: Option<String>,
    /// The newest first.
    pub findings: Vec<Arc<Finding>>,
}

impl Group {
    /// How many deaths its findings stand for.
    pub fn deaths(&self) -> u64 {
        let dead = self.findings.iter().filter(|finding| finding.death.is_some());
        dead.map(|finding| u64::from(finding.count.max(1))).sum()
    }
}

fn subject(entity: Option<&EntityRef>) -> (String, Option<String>) {
    let Some(entity) = entity else { return ("of nothing in particular".into(), None) };
    if let Some((path, called)) = parts::owner(entity) {
        return (called, Some(path));
    }
    let path = (!entity.node.is_empty()).then(|| format!("/n/{}", parts::encoded(&entity.node)));
    match entity.kind.as_str() {
        "node" => (format!("node {}", entity.node), path),
        _ => (format!("{} on {}", parts::called(entity), entity.node), path),
    }
}

/// Findings, the newest first, by what they are about; what has the newest finding comes first.
pub fn of(findings: &[Arc<Finding>]) -> Vec<Group> {
    let mut places: HashMap<String, usize, RandomState> = HashMap::default();
    let mut groups: Vec<Group> = Vec::new();
    for finding in findings {
        let (called, path) = subject(finding.entity.as_ref());
        let place = *places.entry(called).or_insert_with_key(|called| {
            groups.push(Group { called: called.clone(), path, findings: Vec::new() });
            groups.len() - 1
        });
        groups[place].findings.push(Arc::clone(finding));
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replicas_of_a_workload_are_together_the_newest_first() {
        let of_pod = |id: &str, namespace: &str, pod: &str, workload: &str| {
            let entity = EntityRef {
                kind: "container".into(),
                node: "n1".into(),
                namespace: namespace.into(),
                pod: pod.into(),
                workload: workload.into(),
                ..EntityRef::default()
            };
            Arc::new(Finding { id: id.into(), entity: Some(entity), ..Finding::default() })
        };
        let unit =
            EntityRef { kind: "unit".into(), name: "a.service".into(), node: "n1".into(), ..EntityRef::default() };
        let unit = Arc::new(Finding { id: "4".into(), entity: Some(unit), ..Finding::default() });
        let found = [
            of_pod("1", "shop", "web-0", "Deployment/web"),
            of_pod("2", "other", "web-0", "Deployment/web"),
            of_pod("3", "shop", "web-1", "Deployment/web"),
            unit,
            of_pod("5", "shop", "lone", ""),
        ];
        let groups = of(&found);
        let called: Vec<_> = groups.iter().map(|group| group.called.as_str()).collect();
        let wanted = ["shop › Deployment/web", "other › Deployment/web", "unit a.service on n1", "shop › Pod/lone"];
        assert_eq!(called, wanted);
        assert_eq!(groups[0].findings.len(), 2);
        assert_eq!(groups[0].path.as_deref(), Some("/w/shop/Deployment/web"));
    }
}
