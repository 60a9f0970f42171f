//! Causes that objects and the kernel report: containers that die in cgroups of their own, named as their pods' objects name them.

use serde_json::{Value, json};
use tapio_perf::kubelet::ContainerName;
use tapio_perf::truth::stage::{Actor, ContainerCgroups, Pids, RUNC};

use super::objects::{
    at, condition, container, end, event, kubelet_says, pod, run, running, set_condition, start_again,
};
use super::{Lab, Scenario};

/// A limit that a victim soon reaches, in MiB.
const LIMIT_MIB: u64 = 24;
/// As the first process of a pid namespace it ignores what it does not handle.
const STUBBORN: &str = "exec sleep 60";
const CALM: &str = "trap 'exit 143' TERM; while :; do sleep 0.2; done";

pub const SCENARIOS: &[Scenario] = &[
    Scenario { says: &["resize requires restart"], ..Scenario::new("resized", resized, "restarted-for-resize") },
    Scenario { says: &["memory limit of 24.0 MiB"], ..Scenario::new("shrunk", shrunk, "memory-limit-kill") },
    Scenario {
        container: "",
        says: &["RestartAllContainers"],
        beside: &["exited-with-error"],
        ..Scenario::new("together", together, "restarted-with-all")
    },
    Scenario { says: &["code 42"], ..Scenario::new("by-rule", by_rule, "exited-with-error") },
    Scenario {
        container: "",
        says: &["exit code 42 matching FailJob rule"],
        beside: &["exited-with-error"],
        ..Scenario::new("import", job_failed, "job-failed")
    },
    Scenario { container: "", says: &["through the API"], ..Scenario::new("report", evicted, "evicted-by-api") },
    Scenario {
        says: &["startup probe", "failureThreshold"],
        never: &["wants a startupProbe"],
        ..Scenario::new("late", late, "startup-probe-kill")
    },
    Scenario { container: "proxy", ..Scenario::new("with-sidecar", sidecar, "memory-limit-kill") },
    Scenario { container: "debugger", ..Scenario::new("debugged", debugged, "memory-limit-kill") },
    Scenario { says: &["pod's memory limit"], ..Scenario::new("shared-limit", shared_limit, "pod-limit-kill") },
    Scenario::new("own-users", own_users, "memory-limit-kill"),
    Scenario { says: &["USR1", "stopSignal"], ..Scenario::new("deaf", deaf, "ignored-stopsignal") },
    Scenario { says: &["USR1", "stopSignal"], ..Scenario::new("polite", polite, "stopped-by-signal") },
];

/// A container that runs.
pub struct Live {
    cgroups: ContainerCgroups,
    actor: Actor,
}

impl Lab {
    fn start(&mut self, name: ContainerName, limit_mib: Option<u64>, script: &str) -> Live {
        let path = name.path();
        let cgroups = self.stage.cgroups_at(name, &path, &path, limit_mib).expect("cgroups");
        let actor = self.stage.start(&cgroups, Pids::Own, script).expect("a container");
        Live { cgroups, actor }
    }

    /// The runtime does what a script says.
    fn runtime(&self, script: &str) {
        self.stage.host(RUNC, None, script).expect("a runtime");
    }

    fn eats(&self) -> String {
        format!("sleep 0.5; exec {}", self.stage.eat(LIMIT_MIB))
    }

    /// Kills a container as kubelet does whose container does not react.
    fn kill_slowly(&self, live: &mut Live, signal: &str) {
        live.actor.await_sleep().expect("it sleeps");
        let pid = live.actor.pid;
        self.runtime(&format!("kill -{signal} {pid}; sleep 2; kill -KILL {pid}"));
        live.actor.wait_end().expect("it ends");
    }

    /// A pod whose container web runs a script.
    fn pod_running(&mut self, name: &str, limit_mib: Option<u64>, script: &str) -> (Value, Live) {
        let id = self.stage.name();
        let mut pod = pod(name, &id.pod_uid);
        if let Some(mib) = limit_mib {
            pod["spec"]["containers"][0]["resources"] = json!({"limits": {"memory": format!("{mib}Mi")}});
        }
        run(&mut pod, vec![running("web", &id.container_id)]);
        (pod, self.start(id, limit_mib, script))
    }

    /// Kubelet reports the end of the pod's container, and its new run.
    fn report_end(&mut self, pod: &mut Value, list: &str, exit_code: i32, reason: &str) {
        let next = self.stage.name().container_id;
        let status = &mut pod["status"][list][0];
        end(status, exit_code, reason);
        self.put(pod);
        start_again(&mut pod["status"][list][0], &next);
        self.put(pod);
    }
}

fn resized(lab: &mut Lab) {
    let (mut pod, mut live) = lab.pod_running("resized", None, STUBBORN);
    pod["spec"]["containers"][0]["resizePolicy"] =
        json!([{"resourceName": "memory", "restartPolicy": "RestartContainer"}]);
    set_condition(&mut pod, condition("PodResizeInProgress", "True", "", ""));
    lab.put(&pod);
    lab.says(&kubelet_says(&pod, "web", ["Normal", "Killing", "Container web resize requires restart"]));
    lab.kill_slowly(&mut live, "TERM");
    lab.report_end(&mut pod, "containerStatuses", 137, "Error");
}

/// The limit is lowered in place to little more than what is used.
fn shrunk(lab: &mut Lab) {
    let go = lab.stage.signpost("shrunk");
    let script = format!("while [ ! -e {} ]; do sleep 0.1; done; exec {}", go.display(), lab.stage.eat(LIMIT_MIB));
    let (mut pod, mut live) = lab.pod_running("shrunk", Some(8 * LIMIT_MIB), &script);
    lab.put(&pod);
    let control = lab.stage.memory_control().expect("memory is limited");
    live.cgroups.limiting().limit_memory(control, LIMIT_MIB << 20).expect("lowered");
    let lowered = json!({"limits": {"memory": format!("{LIMIT_MIB}Mi")}});
    pod["spec"]["containers"][0]["resources"] = lowered.clone();
    pod["status"]["containerStatuses"][0]["resources"] = lowered;
    pod["metadata"]["generation"] = json!(2);
    lab.put(&pod);
    std::fs::write(&go, "").expect("written");
    live.actor.wait_end().expect("it ends");
    lab.report_end(&mut pod, "containerStatuses", 137, "OOMKilled");
}

/// One container ends with the code that restarts all: one of the others stops when asked to, one does not.
fn together(lab: &mut Lab) {
    let first = lab.stage.name();
    let (calm, stubborn) = (lab.stage.sibling(&first), lab.stage.sibling(&first));
    let ids = [("trigger", first.clone()), ("calm", calm.clone()), ("stubborn", stubborn.clone())];
    let mut pod = pod("together", &first.pod_uid);
    pod["spec"]["containers"] = json!(ids.iter().map(|(name, _)| container(name)).collect::<Vec<_>>());
    let trigger = &mut pod["spec"]["containers"][0];
    trigger["restartPolicy"] = json!("Never");
    trigger["restartPolicyRules"] =
        json!([{"action": "RestartAllContainers", "exitCodes": {"operator": "In", "values": [42]}}]);
    run(&mut pod, ids.iter().map(|(name, id)| running(name, &id.container_id)).collect());
    set_condition(&mut pod, condition("AllContainersRestarting", "False", "", ""));
    lab.put(&pod);
    let (mut calm, mut stubborn) = (lab.start(calm, None, CALM), lab.start(stubborn, None, STUBBORN));
    for live in [&calm, &stubborn] {
        live.actor.await_sleep().expect("it sleeps");
    }
    lab.start(first, None, "sleep 0.5; exit 42").actor.wait_end().expect("it ends");
    end(&mut pod["status"]["containerStatuses"][0], 42, "Error");
    let message = "container exited with restart policy rule";
    set_condition(&mut pod, condition("AllContainersRestarting", "True", "RestartAllContainersStarted", message));
    lab.put(&pod);
    let (calm_pid, pid) = (calm.actor.pid, stubborn.actor.pid);
    lab.runtime(&format!("kill -TERM {calm_pid}; kill -TERM {pid}; sleep 2; kill -KILL {pid}"));
    for live in [&mut calm, &mut stubborn] {
        live.actor.wait_end().expect("it ends");
    }
    for (number, code) in [(1, 143), (2, 137)] {
        end(&mut pod["status"]["containerStatuses"][number], code, "Error");
    }
    lab.put(&pod);
    for number in 0..3 {
        let next = lab.stage.name().container_id;
        start_again(&mut pod["status"]["containerStatuses"][number], &next);
    }
    set_condition(&mut pod, condition("AllContainersRestarting", "False", "", ""));
    lab.put(&pod);
}

/// A container whose own rule starts it again, in a pod that restarts nothing.
fn by_rule(lab: &mut Lab) {
    let (mut pod, mut live) = lab.pod_running("by-rule", None, "sleep 0.5; exit 42");
    pod["spec"]["restartPolicy"] = json!("Never");
    let web = &mut pod["spec"]["containers"][0];
    web["restartPolicy"] = json!("Never");
    web["restartPolicyRules"] = json!([{"action": "Restart", "exitCodes": {"operator": "In", "values": [42]}}]);
    lab.put(&pod);
    live.actor.wait_end().expect("it ends");
    lab.report_end(&mut pod, "containerStatuses", 42, "Error");
}

/// A Job, and the owner reference of its pods.
fn job(name: &str) -> Value {
    json!({
        "apiVersion": "batch/v1", "kind": "Job",
        "metadata": {"name": name, "namespace": "shop", "uid": format!("job-{name}"), "generation": 1, "creationTimestamp": at(60)},
        "spec": {
            "completions": 1, "parallelism": 1, "backoffLimit": 6, "completionMode": "NonIndexed", "suspend": false,
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {"rules": [
                {"action": "FailJob", "onExitCodes": {"containerName": "web", "operator": "In", "values": [42]}},
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]},
            "template": {"metadata": {}, "spec": {"restartPolicy": "Never", "containers": [container("web")]}},
        },
        "status": {"active": 1, "ready": 1, "startTime": at(60), "uncountedTerminatedPods": {}, "terminating": 0},
    })
}

fn of_job(pod: &mut Value, job: &Value) {
    let meta = &job["metadata"];
    pod["metadata"]["ownerReferences"] = json!([{
        "apiVersion": "batch/v1", "kind": "Job", "name": meta["name"], "uid": meta["uid"], "controller": true,
        "blockOwnerDeletion": true,
    }]);
    pod["metadata"]["finalizers"] = json!(["batch.kubernetes.io/job-tracking"]);
    pod["spec"]["restartPolicy"] = json!("Never");
}

/// The pod has failed: none of its containers runs any more.
fn fail(pod: &mut Value, exit_code: i32) {
    pod["status"]["phase"] = json!("Failed");
    end(&mut pod["status"]["containerStatuses"][0], exit_code, "Error");
    for kind in ["ContainersReady", "Ready"] {
        set_condition(pod, condition(kind, "False", "PodFailed", ""));
    }
}

fn job_failed(lab: &mut Lab) {
    let mut import = job("import");
    let (mut pod, mut live) = lab.pod_running("import-x7k2p", None, "sleep 0.5; exit 42");
    of_job(&mut pod, &import);
    lab.put(&import);
    lab.put(&pod);
    live.actor.wait_end().expect("it ends");
    fail(&mut pod, 42);
    lab.put(&pod);
    let message = "Container web for pod shop/import-x7k2p failed with exit code 42 matching FailJob rule at index 0";
    let failed = |kind: &str| {
        let mut failed = condition(kind, "True", "PodFailurePolicy", message);
        failed.as_object_mut().expect("a condition").remove("observedGeneration");
        failed["lastProbeTime"] = json!(at(0));
        failed
    };
    import["status"] = json!({
        "failed": 1, "startTime": at(60), "uncountedTerminatedPods": {}, "ready": 0, "terminating": 0,
        "conditions": [failed("FailureTarget"), failed("Failed")],
    });
    lab.put(&import);
    lab.says(&event(&import, ["Warning", "PodFailurePolicy", message], "job-controller"));
}

/// The pod is deleted for a disruption.
pub fn disrupt(pod: &mut Value, reason: &str, message: &str) {
    set_condition(pod, condition("DisruptionTarget", "True", reason, message));
    pod["metadata"]["deletionTimestamp"] = json!(at(-30));
    pod["metadata"]["deletionGracePeriodSeconds"] = json!(30);
}

fn evicted(lab: &mut Lab) {
    let report = job("report");
    let (mut pod, mut live) = lab.pod_running("report-9q4cd", None, CALM);
    of_job(&mut pod, &report);
    lab.put(&report);
    lab.put(&pod);
    live.actor.await_sleep().expect("it sleeps");
    disrupt(&mut pod, "EvictionByEvictionAPI", "Eviction API: evicting");
    lab.put(&pod);
    lab.says(&kubelet_says(&pod, "web", ["Normal", "Killing", "Stopping container web"]));
    lab.runtime(&format!("kill -TERM {}", live.actor.pid));
    live.actor.wait_end().expect("it ends");
    fail(&mut pod, 143);
    lab.put(&pod);
    lab.cluster.delete(&pod);
}

fn late(lab: &mut Lab) {
    let (mut pod, mut live) = lab.pod_running("late", None, STUBBORN);
    pod["spec"]["containers"][0]["startupProbe"] =
        json!({"httpGet": {"path": "/started", "port": 8080}, "periodSeconds": 1, "failureThreshold": 3});
    let status = &mut pod["status"]["containerStatuses"][0];
    (status["ready"], status["started"]) = (json!(false), json!(false));
    lab.put(&pod);
    let failed = "Startup probe failed: HTTP probe failed with statuscode: 503";
    lab.says(&kubelet_says(&pod, "web", ["Warning", "Unhealthy", failed]));
    let killing = "Container web failed startup probe, will be restarted";
    lab.says(&kubelet_says(&pod, "web", ["Normal", "Killing", killing]));
    lab.kill_slowly(&mut live, "TERM");
    lab.report_end(&mut pod, "containerStatuses", 137, "Error");
}

/// A pod whose container `web` lives on beside another one, which exceeds its memory limit and is in other lists.
fn eaten_beside(lab: &mut Lab, name: &str, eater: Value, [specified, reported]: [&str; 2]) -> Value {
    let web = lab.stage.name();
    let beside = lab.stage.sibling(&web);
    let mut pod = pod(name, &web.pod_uid);
    let eater_is_called = eater["name"].as_str().expect("a name").to_owned();
    pod["spec"][specified] = json!([eater]);
    run(&mut pod, vec![running("web", &web.container_id)]);
    pod["status"][reported] = json!([running(&eater_is_called, &beside.container_id)]);
    lab.put(&pod);
    let (eats, web) = (lab.eats(), lab.start(web, None, CALM));
    lab.bystanders.push(web);
    lab.start(beside, Some(LIMIT_MIB), &eats).actor.wait_end().expect("it ends");
    pod
}

/// A sidecar is an init container that goes on.
fn sidecar(lab: &mut Lab) {
    let mut proxy = container("proxy");
    proxy["restartPolicy"] = json!("Always");
    proxy["resources"] = json!({"limits": {"memory": format!("{LIMIT_MIB}Mi")}});
    let mut pod = eaten_beside(lab, "with-sidecar", proxy, ["initContainers", "initContainerStatuses"]);
    lab.report_end(&mut pod, "initContainerStatuses", 137, "OOMKilled");
}

/// An ephemeral container is not started again.
fn debugged(lab: &mut Lab) {
    let mut debugger = container("debugger");
    debugger["targetContainerName"] = json!("web");
    let mut pod = eaten_beside(lab, "debugged", debugger, ["ephemeralContainers", "ephemeralContainerStatuses"]);
    end(&mut pod["status"]["ephemeralContainerStatuses"][0], 137, "OOMKilled");
    lab.put(&pod);
}

/// The pod has a limit, and its container none.
fn shared_limit(lab: &mut Lab) {
    let id = lab.stage.name();
    let mut pod = pod("shared-limit", &id.pod_uid);
    pod["spec"]["resources"] = json!({"limits": {"memory": format!("{LIMIT_MIB}Mi")}});
    run(&mut pod, vec![running("web", &id.container_id)]);
    lab.put(&pod);
    let _level = lab.stage.limited_level(&id.pod_path(), LIMIT_MIB).expect("a limit");
    let eats = lab.eats();
    lab.start(id, None, &eats).actor.wait_end().expect("it ends");
    lab.report_end(&mut pod, "containerStatuses", 137, "OOMKilled");
}

/// Root in its container is nobody on its node.
fn own_users(lab: &mut Lab) {
    let script = format!("exec unshare --user --map-root-user -- /bin/sh -c '{}'", lab.eats());
    let (mut pod, mut live) = lab.pod_running("own-users", Some(LIMIT_MIB), &script);
    pod["spec"]["hostUsers"] = json!(false);
    lab.put(&pod);
    live.actor.wait_end().expect("it ends");
    lab.report_end(&mut pod, "containerStatuses", 137, "OOMKilled");
}

/// A pod that is deleted, and names the signal that stops its container.
fn stop_by_usr1(lab: &mut Lab, name: &str, script: &str) -> (Value, Live) {
    let (mut pod, live) = lab.pod_running(name, None, script);
    pod["spec"]["os"] = json!({"name": "linux"});
    pod["spec"]["containers"][0]["lifecycle"] = json!({"stopSignal": "SIGUSR1"});
    pod["status"]["containerStatuses"][0]["stopSignal"] = json!("SIGUSR1");
    lab.put(&pod);
    live.actor.await_sleep().expect("it sleeps");
    (pod, live)
}

fn deaf(lab: &mut Lab) {
    let (mut pod, mut live) = stop_by_usr1(lab, "deaf", STUBBORN);
    lab.kill_slowly(&mut live, "USR1");
    lab.report_end(&mut pod, "containerStatuses", 137, "Error");
}

fn polite(lab: &mut Lab) {
    let (mut pod, mut live) = stop_by_usr1(lab, "polite", "trap 'exit 138' USR1; while :; do sleep 0.2; done");
    lab.runtime(&format!("kill -USR1 {}", live.actor.pid));
    live.actor.wait_end().expect("it ends");
    lab.report_end(&mut pod, "containerStatuses", 138, "Error");
}
