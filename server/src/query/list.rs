//! Pages of findings, narrowed by what they are about.

use std::sync::Arc;

use tapio_wire::service::{EntityRef, Finding, ListFindingsRequest, ListFindingsResponse};

use super::TOKEN_BYTES_MAX;
use crate::events::is_uid_of;
use crate::findings::{FindingStore, Position};

const PAGE_DEFAULT: usize = 100;
const PAGE_MAX: usize = 1000;
/// The severities of findings, the lowest first.
pub const SEVERITIES: [&str; 5] = ["info", "low", "medium", "high", "critical"];

/// Findings of one page, and where the next one begins: empty on the last.
#[derive(Debug, Default)]
pub struct Page {
    pub findings: Vec<Arc<Finding>>,
    pub next_page_token: String,
}

/// Returns one page.
pub fn list(store: &FindingStore, request: &ListFindingsRequest) -> Result<ListFindingsResponse, String> {
    let limit = match request.limit as usize {
        0 => PAGE_DEFAULT,
        limit if limit > PAGE_MAX => {
            return Err(format!("limit {limit} is not from 1 to {PAGE_MAX}: more come by next_page_token"));
        }
        limit => limit,
    };
    let page = page(store, request, limit)?;
    Ok(ListFindingsResponse {
        findings: page.findings.iter().map(|finding| (**finding).clone()).collect(),
        next_page_token: page.next_page_token,
        incomplete: Vec::new(),
    })
}

/// Lists with any limit, without a copy of each finding.
///
/// # Errors
/// As [`list`].
pub fn page(store: &FindingStore, request: &ListFindingsRequest, limit: usize) -> Result<Page, String> {
    if request.page_token.len() > TOKEN_BYTES_MAX {
        return Err(format!("a page token has at most {TOKEN_BYTES_MAX} bytes"));
    }
    let mut after = match request.page_token.as_str() {
        "" => None,
        token => Some(Position::from_token(token).ok_or("this page token was not given by this server: leave it out")?),
    };
    let severity_least = match request.severity.as_str() {
        "" => 0,
        name => severity_rank(name)
            .ok_or_else(|| format!("\"{name}\" is no severity: it is one of {}", SEVERITIES.join(", ")))?,
    };
    let is_wanted = |finding: &Finding| {
        severity_rank(&finding.severity).unwrap_or(SEVERITIES.len()) >= severity_least
            && (request.pattern.is_empty() || finding.pattern == request.pattern)
            && finding.entity.as_ref().map_or_else(
                || {
                    [&request.node, &request.namespace, &request.pod, &request.workload]
                        .iter()
                        .all(|text| text.is_empty())
                },
                |entity| is_about(entity, request),
            )
    };
    let mut findings: Vec<Arc<Finding>> = Vec::new();
    loop {
        // The store is bounded, and so are these rounds.
        let (found, next) = store.list(request.since_ns, after.as_ref(), PAGE_MAX);
        for finding in found {
            if findings.len() == limit {
                let last = findings.last().map(|last| Position { ended_ns: last.ended_ns, id: last.id.clone() });
                let next_page_token = last.as_ref().map(Position::to_token).unwrap_or_default();
                return Ok(Page { findings, next_page_token });
            }
            if is_wanted(&finding) {
                findings.push(finding);
            }
        }
        match next {
            Some(next) => after = Some(next),
            None => return Ok(Page { findings, next_page_token: String::new() }),
        }
    }
}

fn severity_rank(name: &str) -> Option<usize> {
    SEVERITIES.iter().position(|&known| known == name)
}

/// Whether a finding's entity is what a request asks for. Names of containers and pods are `namespace/pod/container`, as far as
/// Kubernetes reported them.
fn is_about(entity: &EntityRef, request: &ListFindingsRequest) -> bool {
    let mut path = entity.name.split('/');
    let (path_namespace, path_pod) = match (path.next(), path.next()) {
        (Some(namespace), Some(pod)) if matches!(entity.kind.as_str(), "pod" | "container") => (namespace, pod),
        _ => ("", ""),
    };
    // What Kubernetes reported counts, however the entity was called at first.
    let namespace = if entity.namespace.is_empty() { path_namespace } else { &entity.namespace };
    let pod = if entity.pod.is_empty() { path_pod } else { &entity.pod };
    let (wanted_namespace, wanted_pod) = match request.pod.split_once('/') {
        Some((namespace, pod)) => (namespace, pod),
        None => (request.namespace.as_str(), request.pod.as_str()),
    };
    (request.node.is_empty() || entity.node == request.node)
        && (request.workload.is_empty() || entity.workload == request.workload)
        && (wanted_namespace.is_empty() || namespace == wanted_namespace)
        && (wanted_pod.is_empty()
            || pod == wanted_pod
            || is_uid_of(wanted_pod, &entity.pod_uid)
            || (entity.kind == "pod" && entity.name == wanted_pod))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finding_is_about_the_pod_that_kubernetes_reported() {
        let uid = "3e85c211-bc0b-4842-8977-13a03203c69d";
        let entity = EntityRef {
            kind: "container".into(),
            name: "container dc31f2ad9b24".into(),
            namespace: "shop".into(),
            pod: "web-0".into(),
            pod_uid: uid.into(),
            ..EntityRef::default()
        };
        let about = |pod: &str, namespace: &str| {
            let request = ListFindingsRequest { pod: pod.into(), namespace: namespace.into(), ..Default::default() };
            is_about(&entity, &request)
        };
        assert!(about("web-0", "") && about("web-0", "shop") && about("shop/web-0", "") && about("3e85c211", ""));
        let of_workload = |workload: &str| {
            let entity = EntityRef { workload: "Deployment/web".into(), ..entity.clone() };
            is_about(&entity, &ListFindingsRequest { workload: workload.into(), ..Default::default() })
        };
        assert!(of_workload("Deployment/web") && !of_workload("StatefulSet/web") && !of_workload("web"));
        assert!(!about("web-0", "other") && !about("web-1", "shop") && !about("other/web-0", ""));
    }
}
