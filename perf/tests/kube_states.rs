//! On a real Kubernetes node: why pods do not start, why they are gone, and what is wrong with the node itself. Findings of states close
//! by themselves when the state is over.
//!
//! Runs only by `make test-kube`, which starts a node where there is none (see `perf/lab/kube/`).

mod gone;
mod node;

use std::process::Command;

use serde_json::{Value, json};
use tapio_perf::processes::bin_dir;

use crate::kube_node::beside::Beside;
use crate::kube_node::findings::{findings, listed, print};
use crate::kube_node::{
    Namespace, await_that, container, deployment, has_node, kubectl, kubectl_reading, pod, setting,
};

const CALM: &str = "trap 'exit 0' TERM; while :; do busybox sleep 0.2; done";
/// A pod or workload, the pattern that says why it does not start, or not stay, and a part of what is said.
const EXPECTED: &[(&str, &str, &str)] = &[
    ("no-image", "image-pull-failed", "registry.invalid"),
    ("no-config", "configuration-missing", "\"settings\" not found"),
    ("no-key", "configuration-missing", "couldn't find key colour in ConfigMap"),
    ("no-secret-key", "configuration-missing", "couldn't find key password in Secret"),
    ("not-executable", "command-cannot-run", "permission denied"),
    ("no-volume", "volume-not-mounted", "secret \"key\" not found"),
    ("no-node", "unschedulable", "Insufficient cpu"),
    ("as-root", "user-refused", "runAsNonRoot"),
    ("hooked", "post-start-failed", "Exec lifecycle hook"),
    ("late", "startup-probe-kill", "Startup probe"),
    ("ends-well", "ends-and-restarts", "CrashLoopBackOff"),
];

/// A ConfigMap or Secret with one key.
fn made(kind: &str, name: &str, data: &str, key: &str) -> Value {
    json!({"apiVersion": "v1", "kind": kind, "metadata": {"name": name}, data: {key: "a"}})
}

fn objects() -> Vec<Value> {
    let mut no_image = container("web", CALM);
    no_image["image"] = json!("registry.invalid/shop/web:3");
    let mut no_image = deployment("no-image", no_image);
    no_image["spec"]["replicas"] = json!(2);
    let mut no_config = container("web", CALM);
    no_config["envFrom"] = json!([{"configMapRef": {"name": "settings"}}]);
    let of_key = |kind: &str, name: &str, key: &str| {
        let mut web = container("web", CALM);
        web["env"] = json!([{"name": "A", "valueFrom": {kind: {"name": name, "key": key}}}]);
        web
    };
    // It is in every container, and has no right to be run.
    let mut not_executable = container("web", CALM);
    not_executable["command"] = json!(["/etc/hosts"]);
    let mut no_volume = pod("no-volume", "Always", container("web", CALM));
    no_volume["spec"]["volumes"] = json!([{"name": "key", "secret": {"secretName": "key"}}]);
    no_volume["spec"]["containers"][0]["volumeMounts"] = json!([{"name": "key", "mountPath": "/key"}]);
    let mut no_node = container("web", CALM);
    no_node["resources"] = json!({"requests": {"cpu": "1000"}});
    let mut as_root = pod("as-root", "Always", container("web", CALM));
    as_root["spec"]["securityContext"] = json!({"runAsNonRoot": true});
    let mut hooked = container("web", CALM);
    hooked["lifecycle"] = json!({"postStart": {"exec": {"command": ["/bin/busybox", "false"]}}});
    let mut late = container("web", CALM);
    late["startupProbe"] =
        json!({"exec": {"command": ["/bin/busybox", "false"]}, "periodSeconds": 1, "failureThreshold": 3});
    vec![
        no_image,
        deployment("no-config", no_config),
        made("ConfigMap", "incomplete", "data", "size"),
        made("Secret", "incomplete", "stringData", "user"),
        deployment("no-key", of_key("configMapKeyRef", "incomplete", "colour")),
        deployment("no-secret-key", of_key("secretKeyRef", "incomplete", "password")),
        deployment("not-executable", not_executable),
        no_volume,
        deployment("no-node", no_node),
        as_root,
        pod("hooked", "Always", hooked),
        pod("late", "Always", late),
        deployment("ends-well", container("work", "busybox true")),
    ]
}

fn is_of(finding: &Value, namespace: &str, owner: &str) -> bool {
    let text = |key: &str| finding["entity"][key].as_str().unwrap_or_default();
    let of = text("workload").rsplit('/').next().filter(|name| !name.is_empty()).unwrap_or(text("pod"));
    text("namespace") == namespace && of == owner
}

/// Waits for a finding of a pattern about a pod or workload that says `text`, and shows it.
fn await_one(server: &str, namespace: &str, owner: &str, pattern: &str, text: &str) {
    let found = await_that(&format!("{pattern} of {owner}"), |seen| {
        let all = findings(server);
        *seen = all.iter().map(|one| format!("\n{} {} {}", one["pattern"], one["title"], one["summary"])).collect();
        let says = |one: &Value| ["title", "summary"].iter().any(|key| one[*key].as_str().unwrap_or("").contains(text));
        all.into_iter().find(|one| one["pattern"] == pattern && is_of(one, namespace, owner) && says(one))
    });
    print(server, &found);
}

/// Waits until no finding of a workload is about a state that goes on, and one is about a state that is over.
fn await_the_end(server: &str, namespace: &str, owner: &str, pattern: &str) {
    await_that(&format!("the end of {pattern} of {owner}"), |seen| {
        let all = findings(server);
        let of_it: Vec<_> =
            all.iter().filter(|one| one["pattern"] == pattern && is_of(one, namespace, owner)).collect();
        *seen =
            of_it.iter().map(|one| format!("\n{} {} {}", one["ongoing"], one["resolved_at"], one["title"])).collect();
        let is_over = !of_it.is_empty() && of_it.iter().all(|one| one["ongoing"] == false);
        (is_over && of_it.iter().all(|one| one["resolved_at"].is_string())).then_some(())
    });
}

/// A webhook that must allow the pods of one namespace, and whose Service has no pods. Dropping takes it away.
struct Webhook(String);

impl Webhook {
    fn make(namespace: &Namespace) -> Self {
        let name = &namespace.0;
        kubectl(&["label", "namespace", name, &format!("tapio-test={name}")]).expect("labelled");
        namespace.apply(vec![json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": "policy"},
            "spec": {"selector": {"app": "policy"}, "ports": [{"port": 443}]},
        })]);
        let webhook = json!({
            "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingWebhookConfiguration",
            "metadata": {"name": name},
            "webhooks": [{
                "name": "policy.tapio.test", "failurePolicy": "Fail", "timeoutSeconds": 2, "sideEffects": "None",
                "admissionReviewVersions": ["v1"], "namespaceSelector": {"matchLabels": {"tapio-test": name}},
                "clientConfig": {"service": {"namespace": name, "name": "policy"}},
                "rules": [{"apiGroups": [""], "apiVersions": ["v1"], "resources": ["pods"], "operations": ["CREATE"]}],
            }],
        });
        kubectl_reading(&["apply", "-f", "-"], &webhook.to_string()).expect("applied");
        // The API server learns of it a moment later.
        let probe = pod("probe", "Never", container("web", "true")).to_string();
        await_that("that the webhook bars", |seen| {
            let tried = ["-n", name, "create", "--dry-run=server", "-f", "-"];
            *seen = kubectl_reading(&tried, &probe).err()?;
            seen.contains("failed calling webhook").then_some(())
        });
        Self(name.clone())
    }
}

impl Drop for Webhook {
    fn drop(&mut self) {
        if let Err(error) = kubectl(&["delete", "validatingwebhookconfiguration", &self.0]) {
            eprintln!("the webhook {} is left behind: {error}", self.0);
        }
    }
}

/// Makes what was missing, and lets pods in that were refused; what cannot be fixed is deleted.
fn mend(namespace: &Namespace, refused: [&Namespace; 2]) {
    namespace.apply(vec![
        made("ConfigMap", "settings", "data", "a"),
        made("Secret", "key", "stringData", "a"),
        made("ConfigMap", "incomplete", "data", "colour"),
        made("Secret", "incomplete", "stringData", "password"),
        deployment("not-executable", container("web", CALM)),
    ]);
    for name in ["no-image", "no-node", "ends-well"] {
        kubectl(&["-n", &namespace.0, "delete", "deployment", name, "--wait=false"]).expect("deleted");
    }
    kubectl(&["-n", &namespace.0, "delete", "pod", "as-root", "--wait=false"]).expect("deleted");
    kubectl(&["-n", &refused[0].0, "delete", "resourcequota", "none"]).expect("deleted");
    for namespace in refused {
        // Its controller tries again at once, and else after minutes.
        kubectl(&["-n", &namespace.0, "annotate", "replicaset", "--all", "tapio.test/again=yes"]).expect("annotated");
    }
}

#[test]
fn pods_that_do_not_start_are_explained_until_they_do() {
    if !has_node("pods_that_do_not_start_are_explained_until_they_do") {
        return;
    }
    let tapio = Beside::start();
    let address = tapio.server.address();
    let namespace = Namespace::make("states");
    let refused = Namespace::make("refused");
    let barred = Namespace::make("barred");
    let ns = &namespace.0;
    let webhook = Webhook::make(&barred);
    let quota = json!({
        "apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none"}, "spec": {"hard": {"pods": "0"}},
    });
    refused.apply(vec![quota]);
    await_that("that the quota holds", |seen| {
        seen.clone_from(&refused.get("resourcequota/none", "{.status.hard.pods}"));
        (seen == "0").then_some(())
    });
    refused.apply(vec![deployment("refused", container("web", CALM))]);
    barred.apply(vec![deployment("barred", container("web", CALM))]);
    namespace.apply(objects());

    for (owner, pattern, text) in EXPECTED {
        await_one(&address, ns, owner, pattern, text);
    }
    await_one(&address, &barred.0, "barred", "pods-refused", "failed calling webhook");
    // One finding of the workload, and both of its pods.
    await_that("one finding of two pods", |seen| {
        let all = findings(&address);
        let of_it: Vec<_> =
            all.iter().filter(|one| one["pattern"] == "image-pull-failed" && is_of(one, ns, "no-image")).collect();
        *seen = of_it.iter().map(|one| format!("\n{} {}", one["count"], one["title"])).collect();
        assert!(of_it.len() <= 1, "{seen}");
        of_it.first().filter(|one| one["count"] == 2 && one["ongoing"] == true).map(|_| ())
    });
    let found = listed(&address, "pods-refused", |name| name.ends_with(&format!("{}/refused", refused.0)));
    assert!(found["summary"].as_str().is_some_and(|text| text.contains("exceeded quota")), "{found}");
    assert_eq!(found["ongoing"], true, "{found}");

    // Of a workload as a whole, and of one of which there is nothing to complain.
    for (subject, expected) in [
        (format!("deploy/{ns}/no-image"), "cannot be had"),
        (format!("ns/{ns}"), "Other findings"),
        ("node/".to_owned() + &setting("TAPIO_TEST_NODE"), "condition=Ready"),
    ] {
        let tapioctl = bin_dir(None).expect("the programs' folder").join("tapioctl");
        let why = Command::new(tapioctl).args(["--server", &address, "why", &subject]).output().expect("it starts");
        let answer = String::from_utf8_lossy(&why.stdout);
        println!("{answer}");
        assert!(why.status.success() && answer.contains(expected), "{subject}: {answer}");
        assert!(answer.contains("State now"), "{subject}: {answer}");
    }

    drop(webhook);
    mend(&namespace, [&refused, &barred]);
    for (owner, pattern, _) in EXPECTED.iter().filter(|(owner, ..)| !["hooked", "late"].contains(owner)) {
        await_the_end(&address, ns, owner, pattern);
    }
    await_the_end(&address, &refused.0, "refused", "pods-refused");
    await_the_end(&address, &barred.0, "barred", "pods-refused");

    drop((namespace, refused, barred));
    tapio.stop();
}

#[test]
fn stuck_pods_are_reported_until_it_is_over() {
    if !has_node("stuck_pods_are_reported_until_it_is_over") {
        return;
    }
    let tapio = Beside::start_with(", stuck_after: 5s");
    let address = tapio.server.address();
    let namespace = Namespace::make("stuck");
    let ns = &namespace.0;
    let mut unready = container("web", CALM);
    unready["readinessProbe"] =
        json!({"exec": {"command": ["/bin/busybox", "test", "-e", "/ready"]}, "periodSeconds": 1});
    let mut waits = pod("waits", "Always", container("web", CALM));
    waits["spec"]["initContainers"] = json!([container("wait", "while ! [ -e /go ]; do busybox sleep 0.2; done")]);
    let mut held = pod("held", "Always", container("web", CALM));
    held["metadata"]["finalizers"] = json!(["tapio.test/hold"]);
    namespace.apply(vec![deployment("unready", unready), waits, held]);
    await_that("the pod that is held", |seen| {
        seen.clone_from(&namespace.get("pod/held", "{.status.phase}"));
        (seen == "Running").then_some(())
    });
    kubectl(&["-n", ns, "delete", "pod", "held", "--wait=false"]).expect("asked to go");
    let expected = [("unready", "never-ready"), ("waits", "init-container-runs"), ("held", "never-goes")];
    for (owner, pattern) in expected {
        await_one(&address, ns, owner, pattern, "");
    }

    // What was waited for comes.
    kubectl(&["-n", ns, "exec", "deploy/unready", "--", "/bin/busybox", "touch", "/ready"]).expect("made");
    kubectl(&["-n", ns, "exec", "waits", "-c", "wait", "--", "/bin/busybox", "touch", "/go"]).expect("made");
    let free = r#"{"metadata": {"finalizers": null}}"#;
    kubectl(&["-n", ns, "patch", "pod", "held", "--type=merge", "-p", free]).expect("let go");
    for (owner, pattern) in expected {
        await_the_end(&address, ns, owner, pattern);
    }
    drop(namespace);
    tapio.stop();
}
