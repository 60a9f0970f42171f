//! The manifests of `deploy/` and this program agree: permissions, configuration, capabilities, mounts, limits.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tapio_collector::settings::config::Config;
use tapio_collector::source::kube::PERMISSIONS;

fn deploy(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(name)
}

fn text(name: &str) -> String {
    std::fs::read_to_string(deploy(name)).unwrap_or_else(|error| panic!("deploy/{name}: {error}"))
}

fn objects(name: &str) -> Vec<Value> {
    serde_saphyr::from_multiple::<Value>(&text(name))
        .unwrap_or_else(|error| panic!("deploy/{name}: {error}"))
        .into_iter()
        .filter(|object| !object.is_null())
        .collect()
}

fn object(kind: &str) -> Value {
    let name = "collector-daemonset.yaml";
    let mut found = objects(name).into_iter().filter(|object| object["kind"] == kind);
    found.next().unwrap_or_else(|| panic!("deploy/{name} has no {kind}"))
}

fn strings(list: &Value) -> Vec<&str> {
    list.as_array().into_iter().flatten().filter_map(Value::as_str).collect()
}

/// Group, resource and verb of each right, and whether it is given for one named object only.
fn rights(role: &Value) -> BTreeSet<(String, String, String)> {
    let mut all = BTreeSet::new();
    for rule in role["rules"].as_array().expect("rules") {
        assert!(rule.get("nonResourceURLs").is_none(), "{rule:?}");
        for group in strings(&rule["apiGroups"]) {
            for resource in strings(&rule["resources"]) {
                for verb in strings(&rule["verbs"]) {
                    all.insert((group.to_owned(), resource.to_owned(), verb.to_owned()));
                }
            }
        }
    }
    all
}

fn mebibytes(quantity: &Value) -> u64 {
    quantity.as_str().and_then(|text| text.strip_suffix("Mi")?.parse().ok()).expect("a number of Mi")
}

fn config(text: &str) -> Config {
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    std::fs::write(file.path(), text).expect("written");
    Config::load(Some(file.path())).unwrap_or_else(|error| panic!("{error}\n{text}"))
}

fn default_config() -> Config {
    config(object("ConfigMap")["data"]["collector.yaml"].as_str().expect("collector.yaml"))
}

#[test]
fn the_roles_grant_what_the_code_uses_except_secrets() {
    let asked: BTreeSet<_> = PERMISSIONS
        .iter()
        .flat_map(|(group, resource, verbs)| verbs.iter().map(move |verb| (*group, *resource, *verb)))
        .map(|(group, resource, verb)| (group.to_owned(), resource.to_owned(), verb.to_owned()))
        .collect();
    let is_lease = |(_, resource, _): &&(String, String, String)| resource == "leases";
    // Left out on purpose, see the comment there; components/secret-metadata adds them.
    let is_secret = |(_, resource, _): &&(String, String, String)| resource == "secrets";
    let cluster: BTreeSet<_> = asked.iter().filter(|right| !is_lease(right) && !is_secret(right)).cloned().collect();
    let own: BTreeSet<_> = asked.iter().filter(is_lease).cloned().collect();
    assert_eq!(rights(&object("ClusterRole")), cluster);
    assert_eq!(rights(&object("Role")), own);
    assert!(
        asked.iter().any(|right| is_secret(&right)),
        "secrets are not asked for any more: fix the manifests' comments"
    );
    for rule in object("Role")["rules"].as_array().expect("rules") {
        let named = strings(&rule["resourceNames"]);
        if strings(&rule["verbs"]) == ["create"] {
            assert!(named.is_empty(), "creating cannot be bound to a name");
        } else {
            assert_eq!(named, ["tapio-collector"], "nobody else's Lease");
        }
    }
    let added = text("components/secret-metadata/kustomization.yaml");
    assert!(added.contains("/rules/0/resources/-, value: secrets"), "{added}");
    let first = &object("ClusterRole")["rules"][0];
    assert!(strings(&first["apiGroups"]) == [""] && strings(&first["verbs"]) == ["list", "watch"], "{first:?}");
}

#[test]
fn the_configurations_are_accepted() {
    let plain = default_config();
    assert!(!plain.grpc.tls_enabled && plain.grpc.token_without_tls);
    let production = config(&text("overlays/production/collector.yaml"));
    assert!(production.grpc.tls_enabled && !production.grpc.token_without_tls);
    assert!(plain.grpc.token_file.is_some() && plain.grpc.token_file == production.grpc.token_file);
    assert_eq!(plain.grpc.server_endpoints, production.grpc.server_endpoints);
    assert_eq!(plain.resources.max_cpu_milli, production.resources.max_cpu_milli);
}

#[test]
fn the_container_has_the_rights_it_needs_and_no_more() {
    let set = object("DaemonSet");
    let pod = &set["spec"]["template"]["spec"];
    for shared in ["hostNetwork", "hostPID", "hostIPC"] {
        assert!(pod.get(shared).is_none(), "{shared}");
    }
    let container = &pod["containers"][0];
    let security = &container["securityContext"];
    assert_eq!(security["privileged"], false);
    assert_eq!(security["allowPrivilegeEscalation"], false);
    assert_eq!(security["readOnlyRootFilesystem"], true);
    assert_eq!(security["seccompProfile"]["type"], "RuntimeDefault");
    assert_eq!(strings(&security["capabilities"]["drop"]), ["ALL"]);
    assert_eq!(strings(&security["capabilities"]["add"]), ["BPF", "PERFMON", "NET_ADMIN"]);
    let hosts: Vec<_> = pod["volumes"].as_array().expect("volumes").iter().filter_map(|v| v.get("hostPath")).collect();
    let paths: Vec<_> = hosts.iter().filter_map(|host| host["path"].as_str()).collect();
    assert_eq!(
        paths,
        ["/sys/fs/cgroup", "/proc", "/run/dbus"],
        "no container runtime's socket, nothing that is not read"
    );
    for volume in pod["volumes"].as_array().expect("volumes").iter().filter(|volume| volume.get("hostPath").is_some()) {
        let mounts = container["volumeMounts"].as_array().expect("mounts");
        let mount = mounts.iter().find(|mount| mount["name"] == volume["name"]).expect("it is mounted");
        assert_eq!(mount["readOnly"], true, "{mount:?}");
    }
    assert_eq!(pod["automountServiceAccountToken"], false);
}

#[test]
fn requests_and_limits_fit_the_budgets_of_the_configuration() {
    let (set, config) = (object("DaemonSet"), default_config());
    let resources = &set["spec"]["template"]["spec"]["containers"][0]["resources"];
    assert_eq!(resources["requests"]["cpu"], format!("{}m", config.resources.max_cpu_milli).as_str());
    assert!(
        resources["limits"].get("cpu").is_none(),
        "a CPU limit would stop all threads for hundreds of milliseconds"
    );
    assert!(
        mebibytes(&resources["limits"]["memory"]) > config.resources.max_memory_mb * 5 / 4,
        "room above the budget"
    );
}

#[test]
fn names_ports_and_labels_are_those_of_the_deployment_guide() {
    let set = object("DaemonSet");
    let template = &set["spec"]["template"];
    assert_eq!(set["metadata"]["name"], "tapio-collector");
    assert_eq!(set["spec"]["updateStrategy"]["rollingUpdate"]["maxUnavailable"], "10%");
    for labels in [&template["metadata"]["labels"], &set["spec"]["selector"]["matchLabels"]] {
        assert_eq!(labels["app.kubernetes.io/component"], "collector");
        assert_eq!(labels["app.kubernetes.io/part-of"], "tapio");
    }
    let config = default_config();
    let container = &template["spec"]["containers"][0];
    assert_eq!(container["ports"][0]["containerPort"], u64::from(config.health.port));
    for (probe, path) in [("startupProbe", "/healthz"), ("livenessProbe", "/healthz"), ("readinessProbe", "/readyz")] {
        assert_eq!(container[probe]["httpGet"]["path"], path);
        assert_eq!(container[probe]["httpGet"]["port"], "http");
    }
    for object in objects("collector-daemonset.yaml") {
        let namespace = object["metadata"].get("namespace");
        let is_cluster_wide = object["kind"].as_str().is_some_and(|kind| kind.starts_with("ClusterRole"));
        assert_eq!(namespace.and_then(Value::as_str), (!is_cluster_wide).then_some("tapio-system"), "{object:?}");
    }
}
