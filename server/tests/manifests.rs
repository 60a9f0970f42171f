//! The manifests of `deploy/` and this program agree: configuration, ports, sizes, and a pod that "restricted" would admit.

use std::path::Path;

use serde_json::Value;
use tapio_server::auth::{NodeIdentity, Subject};
use tapio_server::config::Config;

fn text(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(name);
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("deploy/{name}: {error}"))
}

fn objects(name: &str, kind: &str) -> Vec<Value> {
    serde_saphyr::from_multiple::<Value>(&text(name))
        .unwrap_or_else(|error| panic!("deploy/{name}: {error}"))
        .into_iter()
        .filter(|object| object["kind"] == kind)
        .collect()
}

fn deployment() -> Value {
    objects("server-deployment.yaml", "Deployment").remove(0)
}

fn stateful_set() -> Value {
    objects("overlays/production/server-statefulset.yaml", "StatefulSet").remove(0)
}

fn bytes(quantity: &Value) -> u64 {
    let text = quantity.as_str().expect("a quantity");
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let unit = [("Mi", 1 << 20), ("Gi", 1 << 30)].into_iter().find(|(name, _)| *name == unit).expect("Mi or Gi").1;
    number.parse::<u64>().expect("a number") * unit
}

fn config(text: &str) -> Config {
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    std::fs::write(file.path(), text).expect("written");
    Config::load(Some(file.path())).unwrap_or_else(|error| panic!("{error}\n{text}"))
}

/// Each workload with its configuration and the size of the archive's volume.
fn workloads() -> [(Value, Config, u64); 2] {
    let map = objects("server-deployment.yaml", "ConfigMap").remove(0);
    let (deployment, set) = (deployment(), stateful_set());
    let volumes = deployment["spec"]["template"]["spec"]["volumes"].as_array().expect("volumes");
    let ephemeral = volumes.iter().find_map(|volume| volume.get("ephemeral")).expect("an ephemeral volume");
    let size = bytes(&ephemeral["volumeClaimTemplate"]["spec"]["resources"]["requests"]["storage"]);
    let kept = bytes(&set["spec"]["volumeClaimTemplates"][0]["spec"]["resources"]["requests"]["storage"]);
    [
        (deployment, config(map["data"]["server.yaml"].as_str().expect("server.yaml")), size),
        (set, config(&text("overlays/production/server.yaml")), kept),
    ]
}

#[test]
fn the_configurations_fit_ports_volumes_and_limits() {
    for (workload, config, volume_bytes) in workloads() {
        let container = &workload["spec"]["template"]["spec"]["containers"][0];
        let ports = &container["ports"];
        assert_eq!(ports[0]["containerPort"], u64::from(config.grpc_address().port()));
        assert_eq!(ports[1]["containerPort"], u64::from(config.http_address().port()));
        let mount =
            container["volumeMounts"].as_array().expect("mounts").iter().find(|mount| mount["name"] == "archive");
        assert_eq!(mount.expect("the archive's")["mountPath"].as_str(), config.archive.dir.to_str());
        // Segments are preallocated; one may be open beyond the bound, and file systems keep something for themselves.
        let archive_bytes = config.archive.max_bytes + 2 * config.archive.segment_bytes;
        assert!(archive_bytes + archive_bytes / 20 < volume_bytes, "{archive_bytes} in {volume_bytes}");
        let resources = &container["resources"];
        assert!(
            bytes(&resources["limits"]["memory"]) > (config.resources.max_memory_mb * 5 / 4) << 20,
            "room above the budget"
        );
        assert!(resources["limits"].get("cpu").is_none(), "no CPU limit");
    }
    for (_, config, _) in workloads() {
        let review = config.server.auth.token_review.expect("whoever comes brings a token");
        assert_eq!(config.server.auth.node_identity, NodeIdentity::Token);
        let (server, tapioctl) = ("tapio-server", "tapioctl");
        assert_eq!(review.may_query, [server, tapioctl].map(|name| Subject::account("tapio-system", name)));
        assert_eq!(review.may_ship, [Subject::account("tapio-system", "tapio-collector")]);
    }
    let [(_, plain, _), (_, production, _)] = workloads();
    assert!(plain.cluster.token_without_tls && !production.cluster.token_without_tls);
    assert!(!plain.server.tls_enabled && !plain.serves_api(), "no findings without a token");
    assert!(production.server.tls_enabled && !production.serves_api(), "no findings over plain HTTP beside TLS");
    assert!(production.server.tls.client_ca.is_some(), "only collectors with a certificate may ship");
}

#[test]
fn the_servers_pod_is_one_that_the_restricted_level_admits() {
    for (workload, ..) in workloads() {
        let pod = &workload["spec"]["template"]["spec"];
        for shared in ["hostNetwork", "hostPID", "hostIPC"] {
            assert!(pod.get(shared).is_none(), "{shared}");
        }
        assert_eq!(pod["securityContext"]["runAsNonRoot"], true);
        assert_eq!(pod["securityContext"]["runAsUser"], 10001);
        assert_eq!(pod["automountServiceAccountToken"], false);
        let security = &pod["containers"][0]["securityContext"];
        assert_eq!(security["allowPrivilegeEscalation"], false);
        assert_eq!(security["readOnlyRootFilesystem"], true);
        assert_eq!(security["capabilities"]["drop"][0], "ALL");
        assert!(security["capabilities"].get("add").is_none() && security.get("privileged").is_none());
        assert_eq!(security["seccompProfile"]["type"], "RuntimeDefault");
        for volume in pod["volumes"].as_array().expect("volumes") {
            let kind = volume
                .as_object()
                .expect("a mapping")
                .keys()
                .find_map(|key| Some(key.as_str()).filter(|key| *key != "name"));
            assert!(["configMap", "secret", "projected", "ephemeral"].contains(&kind.expect("a kind")), "{volume:?}");
        }
    }
}

#[test]
fn deployment_and_stateful_set_differ_only_by_production_changes() {
    let template = |mut workload: Value, without: &[&str]| {
        let spec = &mut workload["spec"]["template"]["spec"];
        spec["volumes"]
            .as_array_mut()
            .expect("volumes")
            .retain(|v| !without.contains(&v["name"].as_str().expect("a name")));
        let container = &mut spec["containers"][0];
        container["resources"] = Value::Null;
        let mut variables = container["env"].as_array().cloned().unwrap_or_default();
        variables.retain(|one| !one["name"].as_str().expect("a name").starts_with("TAPIO_TLS_"));
        for one in variables.iter_mut().filter(|one| one["name"] == "TAPIO_CLUSTER_URL") {
            one["value"] = Value::Null;
        }
        container["env"] = Value::Array(variables);
        let mounts = container["volumeMounts"].as_array_mut().expect("mounts");
        mounts.retain(|mount| mount["name"] != "tls");
        let labels = workload["spec"]["template"]["metadata"]["labels"].clone();
        (labels, workload["spec"]["template"]["spec"].clone(), workload["spec"]["selector"].clone())
    };
    assert_eq!(template(deployment(), &["archive"]), template(stateful_set(), &["tls"]));
}

#[test]
fn the_autoscaler_sizes_the_servers_and_data_is_kept() {
    let (deployment, set) = (deployment(), stateful_set());
    for workload in [&deployment, &set] {
        assert_eq!(workload["metadata"]["name"], "tapio-server");
    }
    // An applied number would undo the autoscaler's. Without one, which are the three files of the quick start, there are two.
    assert_eq!(deployment["spec"]["replicas"], 2);
    assert!(
        text("kustomization.yaml").contains("{op: remove, path: /spec/replicas}")
            && set["spec"].get("replicas").is_none()
    );
    let policy = &set["spec"]["persistentVolumeClaimRetentionPolicy"];
    assert!(policy["whenDeleted"] == "Retain" && policy["whenScaled"] == "Retain", "{policy:?}");
    let scaler = objects("scaling.yaml", "HorizontalPodAutoscaler").remove(0);
    assert!(scaler["spec"]["minReplicas"] == 2 && scaler["spec"]["maxReplicas"] == 10);
    assert_eq!(objects("scaling.yaml", "PodDisruptionBudget")[0]["spec"]["maxUnavailable"], 1);
    let services = objects("server-deployment.yaml", "Service");
    let headless = services.iter().filter(|service| service["spec"]["clusterIP"] == "None");
    let names: Vec<_> = headless.filter_map(|service| service["metadata"]["name"].as_str()).collect();
    assert_eq!(names, ["tapio-server-headless", "tapio-nats"], "one for the collectors, one for the servers' log");
    assert_eq!(set["spec"]["serviceName"], "tapio-server-headless");
}

#[test]
fn the_seccomp_profile_admits_io_uring_and_no_escape() {
    let profile: Value = serde_json::from_str(&text("seccomp/tapio-server.json")).expect("JSON");
    assert_eq!(profile["defaultAction"], "SCMP_ACT_ERRNO");
    let mut names = Vec::new();
    for rule in profile["syscalls"].as_array().expect("rules") {
        assert_eq!(rule["action"], "SCMP_ACT_ALLOW");
        names.extend(rule["names"].as_array().expect("names").iter().filter_map(Value::as_str));
    }
    for call in ["io_uring_setup", "io_uring_enter", "io_uring_register", "fdatasync", "execve"] {
        assert!(names.contains(&call), "{call}");
    }
    for call in [
        "mount",
        "umount2",
        "unshare",
        "setns",
        "ptrace",
        "bpf",
        "keyctl",
        "init_module",
        "perf_event_open",
        "process_vm_readv",
    ] {
        assert!(!names.contains(&call), "{call}");
    }
}

#[test]
fn the_servers_reach_nats_with_its_password() {
    let nats = objects("server-deployment.yaml", "StatefulSet").remove(0);
    let container = &nats["spec"]["template"]["spec"]["containers"][0];
    let password = &container["env"][0];
    let secret = &password["valueFrom"]["secretKeyRef"];
    let production = text("overlays/production/nats.conf");
    let maps = objects("server-deployment.yaml", "ConfigMap");
    let plain = maps.iter().find_map(|map| map["data"].get("nats.conf")?.as_str()).expect("nats.conf");
    for (workload, conf) in [(deployment(), plain), (stateful_set(), &production)] {
        let pod = &workload["spec"]["template"]["spec"];
        let of_server = |name: &str| {
            let variables = pod["containers"][0]["env"].as_array().expect("variables");
            variables.iter().find(|one| one["name"] == name).and_then(|one| one["value"].as_str()).expect("a value")
        };
        let volumes = pod["volumes"].as_array().expect("volumes");
        let mounted = volumes.iter().find(|volume| volume["name"] == "nats").expect("the Secret");
        assert_eq!(mounted["secret"]["secretName"], secret["name"]);
        let mounts = pod["containers"][0]["volumeMounts"].as_array().expect("mounts");
        let folder = mounts.iter().find(|mount| mount["name"] == "nats").and_then(|mount| mount["mountPath"].as_str());
        let file = format!("{}/{}", folder.expect("a folder"), secret["key"].as_str().expect("a key"));
        assert_eq!(of_server("TAPIO_CLUSTER_PASSWORD_FILE"), file);
        assert!(conf.contains(&format!("password: ${}", password["name"].as_str().expect("a name"))), "{conf}");
        assert!(conf.contains(&format!("user: {}", of_server("TAPIO_CLUSTER_USER"))), "{conf}");
        let is_tls = conf.contains("tls {");
        assert_eq!(of_server("TAPIO_CLUSTER_URL").starts_with("tls://tapio-nats."), is_tls);
        // A log and its index, beside what the file system keeps.
        assert!(conf.contains("max_file_store: 1800MB") && Config::default().cluster.max_bytes < 1_800_000_000);
    }
    let command = "#   kubectl -n tapio-system create secret generic tapio-nats --from-literal=password=";
    assert!(text("server-deployment.yaml").contains(command), "the manifest says how the Secret is made");
}
