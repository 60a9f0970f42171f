//! Findings of a state: why a pod does not start, until it does.

use crate::correlate_node::{
    Machine, Node, Process, SECOND, SIGKILL, SIGTERM, findings_of, only_state, patterns_of, workload_of,
};
use tapio_wire::event::EntityId;

const PULL: [&str; 3] = ["web", "ErrImagePull", "rpc error: code = NotFound"];

fn pod(node: &mut Node, number: u32) -> EntityId {
    node.kube_pod("Deployment/web", &format!("shop/web-{number}"))
}

#[test]
fn an_unavailable_image_is_one_finding_until_all_pods_start() {
    let mut node = Node::new("n1");
    let [first, second] = [1, 2].map(|number| pod(&mut node, number));
    node.kube_event(99 * SECOND, first, "Failed", "Failed to pull image \"shop/web:2\": 401 Unauthorized");
    node.waits(100 * SECOND, first, PULL);
    node.waits(101 * SECOND, second, PULL);
    node.waits(110 * SECOND, first, ["web", "ImagePullBackOff", "Back-off pulling image"]);
    node.lethal(110 * SECOND);
    let found = only_state(&node, "image-pull-failed");
    assert!(found.ongoing && found.resolved_ns == 0 && found.count == 2, "{found:#?}");
    assert!(found.title.contains("shop/web:2"), "{}", found.title);
    assert!(found.summary.contains("401 Unauthorized"), "{}", found.summary);

    node.runs(200 * SECOND, first, "web");
    node.lethal(200 * SECOND);
    assert!(only_state(&node, "image-pull-failed").ongoing, "the second pod still waits");

    node.pod_gone(210 * SECOND, second);
    node.lethal(210 * SECOND);
    let over = only_state(&node, "image-pull-failed");
    assert_eq!((over.ongoing, &over.id), (false, &found.id));
    assert!(over.resolved_ns > over.ended_ns, "{over:#?}");
    assert_eq!(over.evidence.iter().filter(|piece| piece.step == "end").count(), 2);

    node.waits(300 * SECOND, first, PULL);
    node.lethal(300 * SECOND);
    let again = only_state(&node, "image-pull-failed");
    assert_eq!((again.ongoing, again.resolved_ns, &again.id), (true, 0, &found.id));
}

#[test]
fn another_container_of_the_pod_that_runs_ends_nothing() {
    let mut node = Node::new("n1");
    let pod = pod(&mut node, 1);
    node.waits(100 * SECOND, pod, PULL);
    node.runs(101 * SECOND, pod, "proxy");
    node.lethal(101 * SECOND);
    assert!(only_state(&node, "image-pull-failed").ongoing);
}

#[test]
fn the_end_of_a_state_may_arrive_before_its_beginning() {
    let mut node = Node::new("n1");
    let pod = pod(&mut node, 1);
    node.runs(200 * SECOND, pod, "web");
    node.lethal(200 * SECOND);
    node.waits(100 * SECOND, pod, PULL);
    node.lethal(200 * SECOND);
    assert!(!only_state(&node, "image-pull-failed").ongoing);
}

#[test]
fn a_state_that_an_earlier_run_found_ends_as_well() {
    let mut node = Node::new("n1");
    let pod = pod(&mut node, 1);
    node.waits(100 * SECOND, pod, PULL);
    node.lethal(100 * SECOND);
    let earlier = only_state(&node, "image-pull-failed");
    node.runs(200 * SECOND, pod, "web");
    node.lethal(200 * SECOND);
    let machine = Machine::start(1);
    machine.store.restore(earlier.clone());
    machine.deliver(&node.node, &node.frames[1..]);
    let found = machine.findings();
    assert_eq!(found.len(), 1, "{found:#?}");
    assert_eq!((found[0].ongoing, &found[0].id), (false, &earlier.id));
    assert!(found[0].resolved_ns > 0);
}

#[test]
fn a_waiting_container_is_reported_by_its_reason() {
    let cases = [
        (["web", "InvalidImageName", "couldn't parse image name"], "image-pull-failed"),
        (["web", "CreateContainerConfigError", "configmap \"settings\" not found"], "configuration-missing"),
        (["web", "CreateContainerConfigError", "couldn't find key a in Secret shop/b"], "configuration-missing"),
        (
            ["web", "CreateContainerConfigError", "container has runAsNonRoot and image will run as root (pod: \"x\")"],
            "user-refused",
        ),
        (["web", "CreateContainerConfigError", "something new"], "container-not-created"),
        (["web", "CreateContainerError", "device not found"], "container-not-created"),
    ];
    for (said, expected) in cases {
        let mut node = Node::new("n1");
        let pod = pod(&mut node, 1);
        node.waits(100 * SECOND, pod, said);
        node.lethal(100 * SECOND);
        assert!(only_state(&node, expected).ongoing, "{said:?}");
    }
    for said in [["web", "ContainerCreating", ""], ["web", "PodInitializing", ""]] {
        let mut node = Node::new("n1");
        let pod = pod(&mut node, 1);
        node.waits(100 * SECOND, pod, said);
        node.lethal(100 * SECOND);
        assert_eq!(patterns_of(&node), [""; 0], "{said:?} is how every container begins");
    }
}

const CREATE: &str = "failed to create containerd task: failed to create shim task: OCI runtime create failed: ";

#[test]
fn the_runtimes_words_explain_a_failed_start() {
    let runc = |said: &str| format!("{CREATE}runc create failed: unable to start container process: {said}: unknown");
    let init = |said: &str| runc(&format!("error during container init: {said}"));
    let cases = [
        // runc 1.1.5, 1.0, rc, 1.2 and crun.
        (runc("exec: \"nope\": executable file not found in $PATH"), "command-cannot-run"),
        (runc("exec: \"/nope\": stat /nope: no such file or directory"), "command-cannot-run"),
        (runc("exec: \"/etc/plain\": permission denied"), "command-cannot-run"),
        (init("exec: \"nope\": executable file not found in $PATH"), "command-cannot-run"),
        (
            format!(
                "{CREATE}container_linux.go:380: starting container process caused: exec: \"nope\": executable file not \
                 found in $PATH: unknown"
            ),
            "command-cannot-run",
        ),
        (
            "OCI runtime create failed: container_linux.go:345: starting container process caused \"exec: \\\"cd\\\": executable \
             file not found in $PATH\": unknown"
                .to_owned(),
            "command-cannot-run",
        ),
        (format!("{CREATE}executable file `nope` not found in $PATH: No such file or directory"), "command-cannot-run"),
        // The same words of something else than the program.
        (
            init("error mounting \"/none\" to rootfs at \"/x\": stat /none: no such file or directory"),
            "start-failed",
        ),
        (
            init("error mounting \"/tmp\" to rootfs at \"/etc/plain\": mount /tmp:/etc/plain: not a directory"),
            "start-failed",
        ),
        (
            init(
                "unable to apply apparmor profile: apparmor failed to apply profile: write /proc/self/attr/exec: permission \
                 denied",
            ),
            "start-failed",
        ),
        (init("error running hook #0: fork/exec /nohook: no such file or directory"), "start-failed"),
        (init("mkdir /etc/plain: not a directory"), "start-failed"),
        (runc("container init was OOM-killed (memory limit too low?)"), "start-failed"),
        (
            runc("unable to apply cgroup configuration: failed to write \"99\": numerical result out of range"),
            "start-failed",
        ),
        // The runtime's own program is missing on the node, not the container's.
        (
            format!(
                "{CREATE}unable to retrieve OCI runtime error (open /run/containerd/io.containerd.runtime.v2.task/k8s.io/1/log.json: \
                 no such file or directory): exec: \"nvidia-container-runtime\": executable file not found in $PATH: unknown"
            ),
            "start-failed",
        ),
        (String::new(), "start-failed"),
    ];
    for (message, expected) in &cases {
        let mut node = Node::new("n1");
        let web = node.kube_container("Deployment/web", "shop/web-1", "c1");
        let pod = pod(&mut node, 1);
        node.waits(100 * SECOND, pod, ["web", "RunContainerError", message]);
        node.start_fails(101 * SECOND, web, ["web", "StartError", message]);
        node.lethal(101 * SECOND);
        let found = only_state(&node, expected);
        assert!(found.ongoing && found.count == 1 && found.summary.contains(&**message), "{found:#?}");
        assert_eq!(found.title.contains("command"), *expected == "command-cannot-run", "{}", found.title);
        node.runs(150 * SECOND, web, "web");
        node.lethal(150 * SECOND);
        assert!(!only_state(&node, expected).ongoing, "{message}");
    }
}

#[test]
fn cri_o_names_the_fault_at_creation() {
    let crio = "container create failed: executable file `nope` not found in $PATH: No such file or directory";
    for (message, expected) in [(crio, "command-cannot-run"), ("container create failed: EOF", "container-not-created")]
    {
        let mut node = Node::new("n1");
        let pod = pod(&mut node, 1);
        node.waits(100 * SECOND, pod, ["web", "CreateContainerError", message]);
        node.lethal(100 * SECOND);
        assert!(only_state(&node, expected).ongoing);
    }
}

#[test]
fn events_explain_a_waiting_pod_until_a_container_runs() {
    let cases = [
        (
            "FailedMount",
            "MountVolume.SetUp failed for volume \"data\": configmap \"x\" not found",
            "volume-not-mounted",
        ),
        ("FailedAttachVolume", "Multi-Attach error for volume \"pvc-1\"", "volume-not-mounted"),
        ("FailedCreatePodSandBox", "failed to setup network for sandbox", "sandbox-failed"),
    ];
    for (reason, message, expected) in cases {
        let mut node = Node::new("n1");
        let pod = pod(&mut node, 1);
        node.said(100 * SECOND, pod, "Pod", reason, message);
        node.lethal(100 * SECOND);
        let found = only_state(&node, expected);
        assert!(found.ongoing && found.summary.contains(message), "{found:#?}");
        node.runs(150 * SECOND, pod, "web");
        node.lethal(150 * SECOND);
        assert!(!only_state(&node, expected).ongoing);
    }
}

#[test]
fn a_controller_that_may_not_make_pods_is_reported() {
    let mut node = Node::new("n1");
    pod(&mut node, 1);
    let workload = workload_of("Deployment/web", "shop");
    let message = "pods \"web-x\" is forbidden: exceeded quota: compute, requested: cpu=2, used: cpu=3, limited: cpu=4";
    node.said(100 * SECOND, workload, "ReplicaSet", "FailedCreate", message);
    node.lethal(100 * SECOND);
    let found = only_state(&node, "pods-refused");
    assert!(found.ongoing && found.summary.contains("exceeded quota"), "{found:#?}");
    node.said(160 * SECOND, workload, "ReplicaSet", "SuccessfulCreate", "Created pod: web-y");
    node.lethal(160 * SECOND);
    assert!(!only_state(&node, "pods-refused").ongoing);
}

#[test]
fn a_pod_waiting_for_a_claim_says_why() {
    const UNBOUND: &str = "0/3 nodes are available: pod has unbound immediate PersistentVolumeClaims";
    let found = |claim: bool| {
        let mut node = Node::new("n1");
        let pod = pod(&mut node, 1);
        node.waits_for_a_node(100 * SECOND, pod, "Unschedulable", UNBOUND, false);
        if claim {
            node.waits_for_a_claim(115 * SECOND, pod, "Pending", "ProvisioningFailed");
        }
        node.lethal(115 * SECOND);
        only_state(&node, "unschedulable")
    };
    let with = found(true);
    let says = "Its claim data-web-0 is Pending. Of that claim was said: storageclass \"fast\" not found (ProvisioningFailed).";
    assert!(with.ongoing && with.summary.contains(says), "{}", with.summary);
    assert!(!found(false).summary.contains("claim data"), "nothing is known of it");
}

#[test]
fn refused_pods_end_by_the_figures_of_their_own_controller() {
    let refused = |owner: &str, kind: &str| {
        let mut node = Node::new("n1");
        let workload = node.kube_workload(owner, "shop");
        node.said(100 * SECOND, workload, kind, "FailedCreate", "exceeded quota");
        node
    };
    let none = [0, 0, 0];
    let deployment = ["Deployment/web", "Deployment", ""];
    // Owner and kind that speak; what they say; whether it is over by that.
    let cases = [
        (("Deployment/web", "ReplicaSet"), (deployment, [3, 3, 0]), false),
        (("Deployment/web", "ReplicaSet"), (["Deployment/web", "Deployment", "FailedCreate"], none), true),
        (("Deployment/web", "ReplicaSet"), (["Deployment/web", "ReplicaSet", ""], [3, 3, 0]), true),
        (("ReplicaSet/web", "ReplicaSet"), (["ReplicaSet/web", "ReplicaSet", ""], [3, 3, 0]), false),
        (("StatefulSet/web", "StatefulSet"), (["StatefulSet/web", "StatefulSet", ""], [3, 2, 1]), true),
        (("StatefulSet/web", "StatefulSet"), (["StatefulSet/web", "StatefulSet", ""], [3, 3, 0]), false),
        // Of a Job these are pods at work, succeeded and failed.
        (("Job/web", "Job"), (["Job/web", "Job", ""], none), true),
        (("Job/web", "Job"), (["Job/web", "Job", ""], [1, 1, 0]), true),
        (("Job/web", "Job"), (["Job/web", "Job", "JobSuspended"], none), false),
        (("Job/web", "Job"), (["Job/web", "Job", "DeadlineExceeded"], [0, 0, 2]), false),
    ];
    for ((owner, kind), (texts, figures), goes_on) in cases {
        let mut node = refused(owner, kind);
        node.rolls_out(130 * SECOND, texts, figures);
        node.lethal(130 * SECOND);
        let found = findings_of(&node).into_iter().find(|one| one.pattern == "pods-refused").expect("it is reported");
        assert_eq!(found.ongoing, goes_on, "{texts:?} {figures:?}");
    }
}

#[test]
fn an_unschedulable_pod_is_reported_with_the_schedulers_message() {
    let mut node = Node::new("n1");
    let pod = pod(&mut node, 1);
    let message = "0/3 nodes are available: 1 Insufficient cpu, 2 node(s) had untolerated taint {a: b}";
    node.waits_for_a_node(100 * SECOND, pod, "Unschedulable", message, false);
    node.lethal(100 * SECOND);
    let found = only_state(&node, "unschedulable");
    assert!(found.ongoing && found.title.contains("1 Insufficient cpu"), "{found:#?}");
    node.waits_for_a_node(130 * SECOND, pod, "", "", true);
    node.lethal(130 * SECOND);
    assert!(!only_state(&node, "unschedulable").ongoing);

    let mut node = Node::new("n1");
    let pod = self::pod(&mut node, 1);
    node.waits_for_a_node(100 * SECOND, pod, "SchedulingGated", "Scheduling is blocked", false);
    node.lethal(100 * SECOND);
    assert!(only_state(&node, "scheduling-gated").ongoing);
}

#[test]
fn a_program_that_ends_well_and_restarts_is_no_service() {
    let loops = |failure: Option<&str>| {
        let mut node = Node::new("n1");
        let web = node.kube_container("Deployment/web", "shop/web-1", "c1");
        if let Some(reason) = failure {
            node.container_ended(80 * SECOND, web, reason, 1);
        }
        node.completes(90 * SECOND, web, "web");
        node.waits(91 * SECOND, web, ["web", "CrashLoopBackOff", "back-off 40s"]);
        node.lethal(91 * SECOND);
        node
    };
    assert!(only_state(&loops(None), "ends-and-restarts").ongoing);
    assert_eq!(patterns_of(&loops(Some("Error"))), [""; 0], "one of its ends was a failure");
}

#[test]
fn a_failing_sidecar_is_named_not_its_neighbour() {
    let mut node = Node::new("n1");
    let web = node.kube_container("Deployment/web", "shop/web-1", "c1");
    node.runs(90 * SECOND, web, "web");
    for run in 0..4 {
        let proxy = node.kube_container_named("Deployment/web", "shop/web-1", &format!("p{run}"), "proxy");
        node.exit((100 + 20 * run) * SECOND, Process::init(proxy, 200 + run as u32, "envoy"), 1 << 8);
    }
    node.lethal(161 * SECOND);
    let found = only_state(&node, "crash-loop");
    assert!(found.title.contains("shop/web-1/proxy") && !found.title.contains("shop/web-1/web"), "{found:#?}");
}

#[test]
fn hooks_and_startup_probes_differ_from_stops_and_liveness() {
    let killed = |reason: &str, message: &str| {
        let mut node = Node::new("n1");
        let web = node.kube_container("Deployment/web", "shop/web-1", "c1");
        let pod = pod(&mut node, 1);
        let unit = node.unit("containerd.service");
        let (target, shim) = (Process::init(web, 100, "nginx"), Process::of_node(unit, 55, "containerd-shim"));
        node.kube_event(98 * SECOND, pod, reason, message);
        node.signal(100 * SECOND, target, SIGTERM, Some(shim));
        node.signal(130 * SECOND, target, SIGKILL, Some(shim));
        node.exit(130 * SECOND, target, SIGKILL);
        node.lethal(131 * SECOND);
        node
    };
    only_state(&killed("FailedPostStartHook", "Exec lifecycle hook ([false]) failed"), "post-start-failed");
    only_state(&killed("FailedPreStopHook", "Exec lifecycle hook ([false]) failed"), "pre-stop-failed");
    only_state(&killed("Unhealthy", "Startup probe failed: timeout"), "startup-probe-kill");
    only_state(&killed("Unhealthy", "Liveness probe failed: timeout"), "liveness-probe-kill");
}

#[test]
fn a_flood_is_reported_and_doubts_only_its_own_deaths() {
    let mut node = Node::new("n1");
    let [loud, calm] = ["loud", "calm"]
        .map(|name| node.kube_container(&format!("Deployment/{name}"), &format!("shop/{name}-1"), name));
    node.floods(90 * SECOND, loud, 700_000);
    for (entity, pid) in [(loud, 100), (calm, 200)] {
        let process = Process::init(entity, pid, "nginx");
        node.exit(95 * SECOND, process, 1 << 8);
    }
    node.lethal(96 * SECOND);
    let found = findings_of(&node);
    let of = |pattern: &str, pod: &str| {
        let is_it = |one: &&tapio_wire::service::Finding| {
            one.pattern == pattern && one.entity.as_ref().is_some_and(|entity| entity.pod == pod)
        };
        found.iter().find(is_it).unwrap_or_else(|| panic!("no {pattern} of {pod}: {found:#?}"))
    };
    assert!(of("flood", "loud-1").ongoing && of("flood", "loud-1").confidence > 0.9);
    let confidence = |pod: &str| of("exited-with-error", pod).confidence;
    assert!(confidence("loud-1") < confidence("calm-1"), "{found:#?}");
    assert_eq!(of("exited-with-error", "calm-1").loss.map(|loss| loss.events), Some(0));
    assert_eq!(of("exited-with-error", "loud-1").loss.map(|loss| loss.events), Some(700_000));

    node.floods(120 * SECOND, loud, 0);
    node.lethal(120 * SECOND);
    let over = findings_of(&node).into_iter().find(|one| one.pattern == "flood").expect("it is listed");
    assert!(!over.ongoing && over.resolved_ns > 0);
}

#[test]
fn a_state_with_a_forgotten_beginning_stays_one_finding() {
    let mut node = Node::new("n1");
    let web = node.kube_container("Deployment/web", "shop/web-1", "c1");
    node.trouble(100 * SECOND, web, "pids-at-limit", "", false);
    // More of its kind than a history of evidence holds.
    for number in 0..300 {
        node.trouble(101 * SECOND + number, web, "throttled", "", false);
    }
    node.trouble(160 * SECOND, web, "pids-at-limit", "", false);
    node.lethal(160 * SECOND);
    let pids = |node: &Node| {
        let mut found = findings_of(node);
        found.retain(|finding| finding.pattern == "pids-at-limit");
        assert_eq!(found.len(), 1, "{found:#?}");
        found.remove(0)
    };
    let found = pids(&node);
    assert!(found.ongoing, "{found:#?}");
    node.trouble(200 * SECOND, web, "pids-at-limit", "", true);
    node.lethal(200 * SECOND);
    let over = pids(&node);
    assert!(!over.ongoing, "{over:#?}");
    let first = findings_of(&{
        let mut node = Node::new("n1");
        let web = node.kube_container("Deployment/web", "shop/web-1", "c1");
        node.trouble(100 * SECOND, web, "pids-at-limit", "", false);
        node.lethal(110 * SECOND);
        node
    });
    assert_eq!((found.started_ns, over.started_ns), (first[0].started_ns, first[0].started_ns));
}

#[test]
fn a_pod_whose_workload_comes_late_keeps_one_finding() {
    let mut node = Node::new("n1");
    let bare = node.pod_without_workload("shop/web-1");
    node.waits(100 * SECOND, bare, ["web", "CreateContainerConfigError", "configmap \"settings\" not found"]);
    node.lethal(100 * SECOND);
    let named = pod(&mut node, 1);
    assert_eq!(bare, named);
    node.waits(110 * SECOND, named, ["web", "CreateContainerConfigError", "configmap \"settings\" not found"]);
    node.lethal(110 * SECOND);
    node.waits(120 * SECOND, named, ["web", "CreateContainerConfigError", "configmap \"settings\" not found"]);
    node.lethal(120 * SECOND);
    let machine = Machine::start(1);
    for frame in 0..node.frames.len() {
        machine.deliver(&node.node, &node.frames[frame..=frame]);
        let found = machine.findings();
        assert_eq!(found.len(), 1, "after frame {frame}: {found:#?}");
        assert!(found[0].ongoing);
    }
}

#[test]
fn two_containers_waiting_alike_are_one_finding_until_both_run() {
    let mut node = Node::new("n1");
    let pod = pod(&mut node, 1);
    node.waits(100 * SECOND, pod, PULL);
    node.waits(101 * SECOND, pod, ["proxy", "ErrImagePull", "the registry does not answer"]);
    node.lethal(101 * SECOND);
    assert_eq!(only_state(&node, "image-pull-failed").count, 2);
    for (at, container, ongoing) in [(110, "web", true), (120, "proxy", false)] {
        node.runs(at * SECOND, pod, container);
        node.lethal(at * SECOND);
        assert_eq!(only_state(&node, "image-pull-failed").ongoing, ongoing, "{container} runs");
    }
}
