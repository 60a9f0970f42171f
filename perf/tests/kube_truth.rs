//! On a real Kubernetes node: pods whose deaths are easily misjudged are explained right, and nothing else is claimed of them.
//!
//! Runs only by `make test-kube`, which starts a node where there is none (see `perf/lab/kube/`).

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use serde_json::{Value, json};
use tapio_perf::processes::bin_dir;

use crate::kube_node::beside::Beside;
use crate::kube_node::findings::{findings, listed, print};
use crate::kube_node::release::Front;
use crate::kube_node::{
    Namespace, await_that, container, eater, has_node, kubectl, kubectl_reading, pod, process_of, setting,
};

/// Minimum confidence of a finding that counts as a claim.
const CERTAIN: f64 = 0.8;
/// Waits for a file that the test makes, then takes memory until it is killed.
const EATS_ON_DEMAND: &str = "until [ -e /go ]; do busybox sleep 0.2; done; busybox tail /dev/zero";
/// Takes 24 MiB and holds them: what reads the pipe never does.
const HOLDS: &str = "busybox dd if=/dev/zero bs=24M count=1 | busybox sleep 600";

/// A pod or workload, the patterns that explain it, and those that may be found beside.
const EXPECTED: &[(&str, &[&str], &[&str])] = &[
    ("shared-eater", &["memory-limit-kill"], &[]),
    ("shared-looper", &["crash-loop"], &["exited-with-error"]),
    ("limited", &["pod-limit-kill"], &[]),
    ("debugged", &["memory-limit-kill"], &[]),
    ("nope", &["command-cannot-run"], &[]),
    ("not-found", &["command-not-found"], &[]),
    ("not-executable", &["command-not-found"], &[]),
    ("stuck", &["liveness-probe-kill"], &[]),
    ("throttled", &["throttled-into-probe-failure"], &[]),
    ("early", &["memory-limit-kill"], &[]),
    ("calm", &[], &["stopped", "ignored-sigterm", "pod-deleted"]),
    ("gone", &["pod-deleted"], &["stopped"]),
    ("eater", &["memory-limit-kill"], &["pod-deleted"]),
    (
        "front",
        &["bad-release"],
        &["stopped", "stopped-by-signal", "ignored-sigterm", "ended-by-controller", "deleted-in-scale-down"],
    ),
    // The last that happens.
    ("burst-then-idle", &["liveness-probe-kill"], &[]),
];

/// An answer that takes a fraction of a second with a core, and seconds with a part of a tenth of one.
const COUNTS: &str = r#"i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done; busybox printf "HTTP/1.0 200 OK\r\n\r\n""#;
/// Answers each connection by what a script writes.
const SERVES: &str = "busybox nc -ll -p 8080 -e /bin/sh -c";

/// A process's cgroup of a controller, in the hierarchy that has it.
fn cgroup(pid: u32, controller: &str) -> PathBuf {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).expect("its cgroups");
    let of_version_1 = text.lines().find_map(|line| line.split_once(&format!(":{controller}:")));
    PathBuf::from(match of_version_1 {
        Some((_, path)) => format!("/sys/fs/cgroup/{controller}{path}"),
        None => {
            let path = text.lines().find_map(|line| line.strip_prefix("0::")).expect("a unified path");
            format!("/sys/fs/cgroup{path}")
        }
    })
}

/// The memory cgroup of a process, `levels` above its own.
fn memory_cgroup(pid: u32, levels: usize) -> PathBuf {
    cgroup(pid, "memory").ancestors().nth(levels).expect("a cgroup above").to_owned()
}

fn limit_memory(cgroup: &std::path::Path, bytes: u64) {
    let file = ["memory.limit_in_bytes", "memory.max"].iter().map(|name| cgroup.join(name)).find(|file| file.exists());
    let file = file.unwrap_or_else(|| panic!("{} limits no memory", cgroup.display()));
    fs::write(&file, bytes.to_string()).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
}

/// Lets a container that waits for it go on.
fn go(pid: u32) {
    fs::write(format!("/proc/{pid}/root/go"), "").expect("its root can be written");
}

/// The first process of one of a pod's containers, on this machine.
fn process_in(namespace: &Namespace, pod: &str, statuses: &str, container: &str) -> u32 {
    let path = format!("{{.status.{statuses}[?(@.name==\"{container}\")].containerID}}");
    await_that(&format!("that {pod}/{container} runs"), |seen| {
        let id = namespace.get(&format!("pod/{pod}"), &path);
        seen.clone_from(&id);
        id.rsplit('/').next().filter(|id| !id.is_empty()).and_then(process_of)
    })
}

fn shared(mut pod: Value) -> Value {
    pod["spec"]["shareProcessNamespace"] = json!(true);
    pod
}

fn pods() -> Vec<Value> {
    let mut probed = container("probed", "busybox sleep 600");
    probed["livenessProbe"] =
        json!({"exec": {"command": ["/bin/busybox", "false"]}, "periodSeconds": 1, "failureThreshold": 1});
    // Both are slowed down by their CPU limit; one of them long before its probe times out. Kubelet 1.20 says that it did of probes
    // over the network only.
    let slowed = |name: &str, script: &str, fails_after_s: u32| {
        let mut slowed = container(name, script);
        slowed["resources"] = json!({"limits": {"cpu": "100m"}});
        slowed["livenessProbe"] = json!({
            "httpGet": {"port": 8080}, "initialDelaySeconds": fails_after_s, "periodSeconds": 1, "failureThreshold": 1,
            "timeoutSeconds": 1,
        });
        slowed
    };
    let burst = "end=$(($(busybox date +%s) + 10)); while [ $(busybox date +%s) -lt $end ]; do :; done";
    let burst = format!("{burst}; {SERVES} 'busybox sleep 10'");
    let throttled = format!("{SERVES} '{COUNTS}' & while :; do :; done");
    let mut nope = container("nope", "");
    nope["command"] = json!(["nope"]);
    let mut limited = pod("limited", "Never", container("holder", HOLDS));
    limited["spec"]["containers"].as_array_mut().expect("a list").push(container("victim", EATS_ON_DEMAND));
    let mut early = pod("early", "Never", container("main", "busybox sleep 600"));
    early["spec"]["initContainers"] = json!([eater("init")]);
    let calm = "trap 'exit 0' TERM; while :; do busybox sleep 0.2; done";
    vec![
        shared(pod("shared-eater", "Never", eater("eater"))),
        shared(pod("shared-looper", "Always", container("loop", "busybox sleep 0.5; exit 1"))),
        limited,
        pod("debugged", "Never", container("app", "busybox sleep 600")),
        pod("nope", "Never", nope),
        // The shell is there, and what it should run is not, or is no program.
        pod("not-found", "Never", container("sh", "nope")),
        pod("not-executable", "Never", container("sh", "/etc/hosts")),
        pod("stuck", "Always", probed),
        pod("burst-then-idle", "Never", slowed("app", &burst, 160)),
        pod("throttled", "Never", slowed("app", &throttled, 75)),
        early,
        pod("calm", "Always", container("calm", calm)),
        pod("gone", "Never", container("gone", calm)),
        pod("eater", "Never", eater("eater")),
    ]
}

/// A release whose first new pod crashes, while the others go on: the Deployment never lets two crash at a time.
fn release(namespace: &Namespace) {
    let calm = "trap 'exit 0' TERM; while :; do busybox sleep 0.2; done";
    let front = Front::running(calm, 0, 1, 0);
    namespace.apply(vec![front.object()]);
    front.replace(namespace, "busybox sleep 0.5; exit 1");
}

/// `kubectl debug` puts a container into a running pod; it is killed for its memory.
fn debug(namespace: &Namespace) {
    namespace.wait_running("pod/debugged");
    // As kubectl of this API server's version does it; later ones patch the pod instead.
    let debugger = json!({
        "name": "debugger", "targetContainerName": "app", "image": setting("TAPIO_TEST_IMAGE"),
        "imagePullPolicy": "IfNotPresent", "terminationMessagePolicy": "File", "command": ["/bin/sh", "-c", EATS_ON_DEMAND],
    });
    let containers = json!({
        "apiVersion": "v1", "kind": "EphemeralContainers", "metadata": {"name": "debugged"},
        "ephemeralContainers": [debugger.clone()],
    });
    let path = format!("/api/v1/namespaces/{}/pods/debugged/ephemeralcontainers", namespace.0);
    let put = |body: &Value| kubectl_reading(&["replace", "--raw", &path, "-f", "-"], &body.to_string());
    put(&containers)
        .or_else(|_| {
            let pod = kubectl(&["-n", &namespace.0, "get", "pod", "debugged", "-o", "json"])?;
            let mut pod: Value = serde_json::from_str(&pod).map_err(|error| error.to_string())?;
            pod["spec"]["ephemeralContainers"] = json!([debugger]);
            put(&pod)
        })
        .expect("a debug container");
    let pid = process_in(namespace, "debugged", "ephemeralContainerStatuses", "debugger");
    limit_memory(&memory_cgroup(pid, 0), 24 << 20);
    go(pid);
}

/// What a certain finding claims of a pod that nobody expects; with the text of it.
fn is_wrong(finding: &Value, namespace: &str) -> Option<String> {
    let text = |key: &str| finding["entity"][key].as_str().unwrap_or_default();
    let is_certain = finding["confidence"].as_f64().unwrap_or(0.0) >= CERTAIN && finding["possible"] == false;
    if !is_certain || finding["withdrawn"] == true || text("namespace") != namespace {
        return None;
    }
    let owner = text("workload").strip_prefix("Deployment/").unwrap_or(text("pod"));
    let pattern = finding["pattern"].as_str().unwrap_or_default();
    let expected = EXPECTED.iter().find(|(name, ..)| *name == owner);
    let is_expected = expected.is_some_and(|(_, right, beside)| right.contains(&pattern) || beside.contains(&pattern));
    let is_pause = finding["death"]["comm"] == "pause";
    (!is_expected || is_pause).then(|| format!("{owner}: {pattern}: {}", finding["title"]))
}

/// Sets the pod's limit, as pod-level resources do: this Kubernetes has none, so it is written where kubelet would write it.
fn limit_pod(namespace: &Namespace) {
    let holder = process_in(namespace, "limited", "containerStatuses", "holder");
    let victim = process_in(namespace, "limited", "containerStatuses", "victim");
    let held = memory_cgroup(holder, 0);
    await_that("that the holder holds", |seen| {
        let used = ["memory.usage_in_bytes", "memory.current"]
            .iter()
            .find_map(|file| fs::read_to_string(held.join(file)).ok());
        *seen = used.unwrap_or_default().trim().to_owned();
        seen.parse().ok().filter(|&bytes: &u64| bytes > 20 << 20)
    });
    limit_memory(&memory_cgroup(victim, 1), 56 << 20);
    go(victim);
}

#[test]
fn deaths_that_are_easily_misjudged_are_explained_correctly() {
    if !has_node("deaths_that_are_easily_misjudged_are_explained_correctly") {
        return;
    }
    let tapio = Beside::start();
    let address = tapio.server.address();

    let namespace = Namespace::make("truth");
    let ns = &namespace.0;
    namespace.apply(pods());
    let burst = cgroup(process_in(&namespace, "burst-then-idle", "containerStatuses", "app"), "cpu");
    // It is slowed down, or it would prove nothing. Later it is killed, and its cgroup goes.
    await_that("a burst that is throttled", |seen| {
        *seen = fs::read_to_string(burst.join("cpu.stat")).expect("its CPU's figures");
        let times = seen.lines().find_map(|line| line.strip_prefix("nr_throttled "));
        times.and_then(|times| times.parse().ok()).filter(|times: &u64| *times > 20).map(drop)
    });
    release(&namespace);
    debug(&namespace);

    limit_pod(&namespace);

    // A session that fails is no crash of its container.
    namespace.wait_running("pod/calm");
    for _ in 0..3 {
        let failed = kubectl(&["-n", ns, "exec", "calm", "--", "/bin/sh", "-c", "exit 1"]);
        assert!(failed.is_err(), "{failed:?}");
    }
    namespace.wait_running("pod/gone");
    kubectl(&["-n", ns, "delete", "pod", "gone", "--wait=true"]).expect("deleted");

    for (owner, right, _) in EXPECTED {
        for pattern in *right {
            let of_owner = |name: &str| {
                let rest = name.rsplit_once(&format!("{ns}/")).map_or("", |(_, rest)| rest);
                rest.strip_prefix(owner).is_some_and(|rest| rest.is_empty() || rest.starts_with(['/', '-']))
            };
            print(&address, &listed(&address, pattern, of_owner));
        }
    }
    // Which container of the pod, and whose memory.
    let limited = listed(&address, "pod-limit-kill", |name| name == format!("{ns}/limited/victim"));
    assert!(limited["summary"].as_str().is_some_and(|text| text.contains("holder")), "{limited}");
    listed(&address, "memory-limit-kill", |name| name == format!("{ns}/debugged/debugger"));
    listed(&address, "memory-limit-kill", |name| name == format!("{ns}/early/init"));
    // A bare pod that is killed again and again is one finding.
    await_that("one finding of three probe kills", |seen| {
        let all = findings(&address);
        let of_stuck = |one: &&Value| one["pattern"] == "liveness-probe-kill" && one["entity"]["pod"] == "stuck";
        let found: Vec<_> = all.iter().filter(of_stuck).collect();
        *seen = found.iter().map(|one| format!("{} {}\n", one["count"], one["title"])).collect();
        assert!(found.len() <= 1, "{seen}");
        found.first().filter(|one| one["count"].as_u64() >= Some(3)).map(|_| ())
    });

    // The question of the quick start.
    let tapioctl = bin_dir(None).expect("the programs' folder").join("tapioctl");
    let why = Command::new(&tapioctl).args(["--server", &address, "why", "pod/eater"]).output().expect("it starts");
    let answer = String::from_utf8_lossy(&why.stdout);
    println!("{answer}");
    assert!(why.status.success() && answer.contains("exceeded its memory limit"), "{answer}");

    kubectl(&["-n", ns, "delete", "pod", "eater", "--wait=true"]).expect("deleted");
    let wrong: Vec<String> = findings(&address).iter().filter_map(|one| is_wrong(one, ns)).collect();
    assert!(wrong.is_empty(), "explained with certainty and wrongly:\n{}", wrong.join("\n"));

    drop(namespace);
    tapio.stop();
}
