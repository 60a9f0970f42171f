//! What `tapioctl why` is asked about.
//!
//! In: an argument as people write it, and a namespace. Out: what to ask the server for, or what is wrong with the argument. What must
//! hold: every kind that is understood stands in [`KNOWN`].

use tapio_server::query::why::{CONTAINER_ID_MIN, Subject};
use tapio_server::render;

use super::super::server::Failure;

/// What people write who think of kubectl, and the kinds of the API.
const WORKLOADS: [(&str, &str); 13] = [
    ("deployment", "Deployment"),
    ("deployments", "Deployment"),
    ("deploy", "Deployment"),
    ("statefulset", "StatefulSet"),
    ("statefulsets", "StatefulSet"),
    ("sts", "StatefulSet"),
    ("daemonset", "DaemonSet"),
    ("daemonsets", "DaemonSet"),
    ("ds", "DaemonSet"),
    ("replicaset", "ReplicaSet"),
    ("rs", "ReplicaSet"),
    ("job", "Job"),
    ("jobs", "Job"),
];
/// What nothing is found for by itself.
const OTHER_KINDS: [&str; 5] = ["cronjob", "cj", "service", "svc", "ingress"];
/// The kinds, for people.
pub const KNOWN: &str = "pod/NAME, deploy/NAME (or statefulset, daemonset, job), container/ID, unit/NAME, host/PATH, node/NAME or \
                     ns/NAME; pod and workload also as KIND/NAMESPACE/NAME";

/// Refuses more or fewer parts than names of a kind have.
fn check_parts(argument: &str, kind: &str, name: &str) -> Result<(), Failure> {
    let parts_max = match kind {
        // As findings call it, or with the runtime before the id, as Kubernetes writes it.
        "container" | "containers" => 3,
        "unit" | "units" | "node" | "nodes" | "ns" | "namespace" | "namespaces" => 1,
        _ => 2,
    };
    let parts = name.split('/').count();
    if parts > parts_max || parts == 2 && parts_max == 3 {
        return Err(Failure::Usage(format!("\"{argument}\" has too many parts: write {KNOWN}")));
    }
    Ok(())
}

/// What an argument and a namespace mean.
pub fn subject(argument: &str, namespace: &str) -> Result<Subject, Failure> {
    if argument.contains(|c: char| c.is_control()) {
        let shown = render::clean(argument);
        return Err(Failure::Usage(format!(
            "\"{shown}\" has a line break or another control character in it: no name has one"
        )));
    }
    // As findings call it.
    let argument = argument.strip_prefix("host group ").unwrap_or(argument);
    if let Some(path) = argument.strip_prefix('/').or_else(|| argument.strip_prefix("host/")) {
        let entity = format!("/{}", path.trim_matches('/'));
        return Ok(Subject { called: format!("host group {entity}"), entity, is_exact: true, ..Subject::default() });
    }
    let mut is_guessed = false;
    let workload = |kind: &str| WORKLOADS.iter().find(|(known, _)| *known == kind).map(|(_, kind)| *kind);
    let (kind, name) = match argument.split_once('/') {
        Some((
            kind @ ("pod" | "pods" | "po" | "container" | "containers" | "unit" | "units" | "node" | "nodes" | "ns"
            | "namespace" | "namespaces"),
            name,
        )) => (kind, name),
        Some((kind, name)) if workload(kind).is_some() => (kind, name),
        // Only the kinds that exist distinguish KIND/NAME from NAMESPACE/NAME.
        Some((kind, _)) if OTHER_KINDS.contains(&kind) || argument.split('/').count() > 2 => {
            return Err(Failure::Usage(format!("\"{kind}/…\" is not understood: write {KNOWN}")));
        }
        Some((_, _)) => {
            is_guessed = true;
            ("pod", argument)
        }
        None => ("pod", argument),
    };
    // A path may have blanks in it, and the name of a unit has none: systemd writes them as \x20.
    if argument.contains(char::is_whitespace) {
        return Err(Failure::Usage(format!("\"{argument}\" has a blank in it: no name of a {kind} has one")));
    }
    if name.is_empty() || name.ends_with('/') || name.starts_with('/') {
        return Err(Failure::Usage(format!("\"{argument}\" has no name: write {kind}/NAME")));
    }
    check_parts(argument, kind, name)?;
    if name.contains('/') && !namespace.is_empty() && !name.starts_with(&format!("{namespace}/")) {
        return Err(Failure::Usage(format!("\"{name}\" is not in the namespace {namespace}: leave one of them out")));
    }
    let mut subject = Subject { namespace: namespace.to_owned(), is_guessed, ..Subject::default() };
    let singular = match kind {
        "pod" | "pods" | "po" => "pod",
        "ns" | "namespace" | "namespaces" => "namespace",
        kind => workload(kind).unwrap_or(kind.trim_end_matches('s')),
    };
    match singular {
        "container" => {
            subject.entity = name.split_once("://").map_or(name, |(_, id)| id).to_owned();
            if subject.entity.len() < CONTAINER_ID_MIN && is_hex(&subject.entity) {
                return Err(Failure::Usage(format!(
                    "\"{argument}\" may mean many: write at least {CONTAINER_ID_MIN} digits of the id"
                )));
            }
        }
        "unit" => {
            // As systemctl(1) takes it.
            subject.entity = if name.contains('.') { name.to_owned() } else { format!("{name}.service") };
            subject.is_exact = true;
        }
        "node" => subject.node = name.to_owned(),
        "namespace" => subject.namespace = name.to_owned(),
        "pod" => subject.pod = name.to_owned(),
        kind => {
            let (namespace, name) = name.split_once('/').unwrap_or((namespace, name));
            (subject.namespace, subject.workload) = (namespace.to_owned(), format!("{kind}/{name}"));
        }
    }
    subject.called = format!("{singular} {name}");
    Ok(subject)
}

fn is_hex(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// How a container is written, where what was written is no id.
pub fn hint(subject: &Subject) -> &'static str {
    let is_container = subject.called.starts_with("container ");
    match is_container && !is_hex(&subject.entity) {
        true => {
            ". A container is called by its id or the beginning of it, in digits from 0 to 9 and a to f, or as findings call it, \
             NAMESPACE/POD/NAME; pod/NAME is about all containers of a pod"
        }
        false => "",
    }
}

/// The container that an argument without a kind may mean, where no pod is called so.
pub fn as_container(argument: &str, namespace: &str) -> Option<Subject> {
    let is_id = argument.len() >= CONTAINER_ID_MIN && is_hex(argument);
    is_id.then(|| Subject {
        called: format!("container {argument}"),
        entity: argument.to_owned(),
        namespace: namespace.to_owned(),
        ..Subject::default()
    })
}

#[cfg(test)]
mod tests {
    use tapio_server::query::why::is_about;
    use tapio_wire::service::{EntityRef, Finding};

    use super::*;

    #[test]
    fn pods_containers_units_and_nodes_are_understood_other_kinds_refused() {
        let of = |text: &str| subject(text, "").expect("understood");
        for (text, pod) in [
            ("web-0", "web-0"),
            ("pod/web-0", "web-0"),
            ("pods/shop/web-0", "shop/web-0"),
            ("shop/web-0", "shop/web-0"),
        ] {
            assert_eq!(of(text).pod, pod, "{text}");
        }
        assert_eq!(of("container/containerd://dc31f2ad9b24").entity, "dc31f2ad9b24");
        assert_eq!((of("unit/bad.service").entity.as_str(), of("node/n1").node.as_str()), ("bad.service", "n1"));
        let web = of("deploy/shop/web");
        assert_eq!((web.workload.as_str(), web.namespace.as_str()), ("Deployment/web", "shop"));
        assert_eq!(of("job/import").workload, "Job/import");
        assert_eq!(of("ns/shop").namespace, "shop");
        for (text, path) in
            [("host/a/b", "/a/b"), ("host//a/b", "/a/b"), ("/a/b", "/a/b"), ("host group /a/b", "/a/b"), ("/", "/")]
        {
            let host = of(text);
            assert_eq!((host.entity.as_str(), host.is_exact), (path, true), "{text}");
            assert_eq!(host.called, format!("host group {path}"));
        }
        assert_eq!(of("unit/nginx").entity, "nginx.service");
        assert!(of("foo/bar").is_guessed && !of("pod/foo/bar").is_guessed);
        assert!(as_container("dc31f2ad9b24", "").is_some() && as_container("web-0", "").is_none());
        assert_eq!(of("container/shop/web-0/web").entity, "shop/web-0/web");
        for text in [
            "service/web",
            "cronjob/x",
            "pod/",
            "deploy/",
            "ns/",
            "a/b/c",
            "deploy/shop/",
            "deploy/a/b/c",
            "pod/a/b/c",
            "ns/a/b",
            "container/dc31f",
            "container/web-0/web",
            "container/a/b/c/d",
            "container/containerd://",
            "container/containerd://dc31f2ad9b24/x",
            "unit/a/b",
            "unit/a b",
            "pod/web 0",
            " web-0",
            "pod/web\n",
            "host/a\nb",
            "/a\u{1b}[31m",
        ] {
            assert!(matches!(subject(text, ""), Err(Failure::Usage(_))), "{text}");
        }
        assert!(matches!(subject("pod/shop/web-0", "other"), Err(Failure::Usage(_))));
    }

    #[test]
    fn containers_are_named_by_id_prefix_and_units_by_name() {
        let entity = |name: &str, container_id: &str| Finding {
            entity: Some(EntityRef { name: name.into(), container_id: container_id.into(), ..EntityRef::default() }),
            ..Finding::default()
        };
        let of = |text: &str| subject(text, "").expect("understood");
        assert!(is_about(&of("container/dc31f2ad"), &entity("shop/web/x", "dc31f2ad9b24")));
        assert!(!is_about(&of("container/dc31f2ad"), &entity("shop/web/x", "ac31f2ad9b24")));
        assert!(is_about(&of("unit/bad.service"), &entity("bad.service", "")));
        assert!(!is_about(&of("unit/bad.service"), &entity("worse-bad.service", "")));
        assert!(is_about(&of("/tapio/one"), &entity("/tapio/one", "")));
        assert!(!is_about(&of("/tapio"), &entity("/tapio/one", "")));
    }
}
