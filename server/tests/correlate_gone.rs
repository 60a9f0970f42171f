//! Pods that are gone, and by whose hand.

use crate::correlate_node::{Machine, Node, Process, SECOND, SIGTERM, findings_of, patterns_of};
use tapio_wire::event::EntityId;

/// Deleted through the API, and stopped by kubelet for it.
fn delete(node: &mut Node, pod: EntityId, container: EntityId, pid: u32, at: u64) {
    node.pod_state(at, pod, "", true);
    let unit = node.unit("containerd.service");
    let (target, shim) = (Process::init(container, pid, "nginx"), Process::of_node(unit, 55, "containerd-shim"));
    node.signal(at + SECOND, target, SIGTERM, Some(shim));
    node.exit(at + 2 * SECOND, target, 143 << 8);
    node.lethal(at + 3 * SECOND);
}

struct Gone {
    node: Node,
    pod: EntityId,
    container: EntityId,
}

fn web() -> Gone {
    let mut node = Node::new("n1");
    let container = node.kube_container("Deployment/web", "shop/web-1", "c1");
    let pod = node.kube_pod("Deployment/web", "shop/web-1");
    Gone { node, pod, container }
}

impl Gone {
    /// What is found after its deletion: one finding, with its stop as a consequence.
    fn found(mut self) -> (String, String) {
        delete(&mut self.node, self.pod, self.container, 100, 100 * SECOND);
        let found = findings_of(&self.node);
        assert_eq!(found.len(), 1, "{found:#?}");
        assert_eq!(found[0].consequences.len(), 1, "{found:#?}");
        assert_eq!(found[0].consequences[0].pattern, "stopped");
        (found[0].pattern.clone(), found[0].severity.clone())
    }
}

fn pair(pattern: &str, severity: &str) -> (String, String) {
    (pattern.into(), severity.into())
}

#[test]
fn an_unexplained_deletion_is_reported_as_a_deletion() {
    assert_eq!(web().found(), pair("pod-deleted", "info"));
}

#[test]
fn a_deletion_is_never_certain_as_controllers_may_speak_later() {
    let mut gone = web();
    delete(&mut gone.node, gone.pod, gone.container, 100, 100 * SECOND);
    let found = findings_of(&gone.node);
    assert!(found[0].pattern == "pod-deleted" && found[0].confidence < 0.8, "{found:#?}");
    // ReplicaSets speak of it after they did it.
    let workload = gone.node.kube_workload("Deployment/web", "shop");
    let mut told = |reason: &str, message: &str| {
        gone.node.said(104 * SECOND, workload, "Deployment", reason, message);
        gone.node.lethal(105 * SECOND);
        let found = findings_of(&gone.node);
        assert_eq!(found.len(), 1, "{found:#?}");
        (found[0].pattern.clone(), found[0].confidence >= 0.8)
    };
    let scaled = told("ScalingReplicaSet", "Scaled down replica set web-a to 1");
    assert_eq!(scaled, ("deleted-in-scale-down".into(), false), "somebody else may have deleted this one");
    assert_eq!(told("SuccessfulDelete", "Deleted pod: web-2").0, "deleted-in-scale-down");
    let combined = "(combined from similar events): Deleted pod: web-1";
    assert_eq!(told("SuccessfulDelete", combined), ("ended-by-controller".into(), true));
}

#[test]
fn the_pods_conditions_state_who_asked_for_its_deletion() {
    let cases = [
        ("PreemptionByScheduler", true, "preempted", "medium"),
        ("DeletionByTaintManager", true, "evicted-by-taint", "high"),
        ("EvictionByEvictionAPI", true, "evicted-by-api", "low"),
        ("TerminationByKubelet", false, "ended-by-kubelet", "medium"),
        ("DeadlineExceeded", false, "deadline-exceeded", "high"),
    ];
    for (reason, is_deleting, pattern, severity) in cases {
        let mut gone = web();
        gone.node.pod_state(99 * SECOND, gone.pod, reason, is_deleting);
        assert_eq!(gone.found(), pair(pattern, severity), "{reason}");
    }
}

/// The reason stays on the object until somebody cleans it up.
#[test]
fn a_pod_that_ended_long_ago_does_not_end_again() {
    let short = "The node was low on resource: memory. Threshold quantity: 100Mi, available: 60Mi. ";
    for (reason, message, pattern) in [
        ("Evicted", short, "evicted"),
        (
            "Evicted",
            "Pod ephemeral local storage usage exceeds the total limit of containers 1Gi. ",
            "storage-limit-eviction",
        ),
        ("Terminated", "Pod was terminated in response to imminent node shutdown.", "node-shutdown"),
        ("Preempting", "Preempted in order to admit critical pod", "preempted-by-kubelet"),
        ("DeadlineExceeded", "Pod was active on the node longer than the specified deadline", "deadline-exceeded"),
    ] {
        let mut gone = web();
        gone.node.pod_says(100 * SECOND, gone.pod, [reason, message], false);
        gone.node.pod_says(3600 * SECOND, gone.pod, [reason, message], true);
        gone.node.lethal(3601 * SECOND);
        let found = findings_of(&gone.node);
        // Who cleaned it up is another matter.
        let ends: Vec<_> = found.iter().filter(|one| one.pattern != "pod-deleted").collect();
        assert_eq!(ends.len(), 1, "{found:#?}");
        assert_eq!((ends[0].pattern.as_str(), ends[0].count), (pattern, 1), "{found:#?}");
    }
}

/// A refused eviction, or a preemption that was given up, leaves no condition behind.
#[test]
fn a_condition_that_was_taken_back_explains_no_deletion() {
    for reason in ["PreemptionByScheduler", "DeletionByTaintManager", "EvictionByEvictionAPI"] {
        let mut gone = web();
        gone.node.pod_says(60 * SECOND, gone.pod, [reason, "asked for"], false);
        gone.node.pod_state(70 * SECOND, gone.pod, "", false);
        delete(&mut gone.node, gone.pod, gone.container, 100, 100 * SECOND);
        let found = findings_of(&gone.node);
        assert!(!found.is_empty() && found.iter().all(|one| one.severity == "info"), "{reason}: {found:#?}");
    }
}

/// The last report of a pod repeats the reason, without its message.
#[test]
fn what_was_said_of_a_deletion_outlives_the_pod() {
    let mut gone = web();
    gone.node.pod_says(100 * SECOND, gone.pod, ["PreemptionByScheduler", "batch: preempting for db-0"], true);
    gone.node.pod_state(110 * SECOND, gone.pod, "PreemptionByScheduler", true);
    gone.node.lethal(111 * SECOND);
    let found = findings_of(&gone.node);
    assert_eq!((found.len(), found[0].pattern.as_str()), (1, "preempted"), "{found:#?}");
    assert!(found[0].summary.contains("batch: preempting for db-0"), "{}", found[0].summary);
}

#[test]
fn kubelet_ends_pods_for_three_reasons_under_one_name() {
    let shutdown = "Pod was terminated in response to imminent node shutdown.";
    let short = "The node was low on resource: memory. Threshold quantity: 100Mi, available: 60Mi. ";
    let cases = [
        ("TerminationByKubelet", shutdown, "node-shutdown"),
        ("Terminated", shutdown, "node-shutdown"),
        ("NodeShutdown", "Pod was rejected as the node is shutting down.", "node-shutdown"),
        ("Shutdown", "Node is shutting, evicting pods", "node-shutdown"),
        ("NodeShutdown", "Pod was rejected: Pod was rejected as the node is shutting down.", "node-shutdown"),
        ("TerminationByKubelet", "Stopped by the shutdown hook of node-agent", "ended-by-kubelet"),
        ("TerminationByKubelet", "pod was terminated in response to imminent node shutdown", "ended-by-kubelet"),
        ("TerminationByKubelet", "Pod was preempted by Kubelet to accommodate a critical pod.", "preempted-by-kubelet"),
        ("Preempting", "Preempted in order to admit critical pod", "preempted-by-kubelet"),
        ("TerminationByKubelet", short, "ended-by-kubelet"),
        ("TerminationByKubelet", "", "ended-by-kubelet"),
    ];
    for (reason, message, pattern) in cases {
        let mut gone = web();
        // Kubelet deletes nothing: the pod stays, Failed.
        gone.node.stop(gone.container, 98 * SECOND);
        gone.node.pod_says(99 * SECOND, gone.pod, [reason, message], false);
        gone.node.lethal(100 * SECOND);
        let found = findings_of(&gone.node);
        assert_eq!(found.len(), 1, "{reason}, {message}: {found:#?}");
        let (finding, of) = (&found[0], found[0].consequences.iter().map(|one| one.pattern.as_str()));
        assert_eq!(
            (finding.pattern.as_str(), of.collect::<Vec<_>>()),
            (pattern, vec!["stopped"]),
            "{reason}, {message}"
        );
        let all = format!("{} {} {:?}", finding.title, finding.summary, finding.death);
        assert!(pattern == "node-shutdown" || !all.contains("shuts down"), "{all}");
        assert!(all.contains(message) && finding.confidence > 0.9, "{all}");
    }
}

#[test]
fn kubelets_own_preemption_is_joined_with_its_event() {
    let mut gone = web();
    let said = "Preempted in order to admit critical pod";
    gone.node.said(97 * SECOND, gone.pod, "Pod", "Preempting", said);
    gone.node.stop(gone.container, 98 * SECOND);
    gone.node.pod_says(99 * SECOND, gone.pod, ["Preempting", said], false);
    // Its controller deletes what failed.
    gone.node.pod_says(130 * SECOND, gone.pod, ["Preempting", said], true);
    gone.node.lethal(131 * SECOND);
    let found = findings_of(&gone.node);
    assert_eq!((found.len(), found[0].pattern.as_str(), found[0].count), (1, "preempted-by-kubelet", 1), "{found:#?}");
    assert!(found[0].evidence.len() >= 2 && found[0].title.contains("node n1"), "{found:#?}");
}

#[test]
fn a_pod_refused_by_kubelet_had_never_run() {
    let refused = |reason: &str, runs: bool| {
        let mut gone = web();
        if runs {
            gone.node.runs(90 * SECOND, gone.pod, "web");
        }
        gone.node.pod_state(100 * SECOND, gone.pod, reason, false);
        gone.node.lethal(100 * SECOND);
        findings_of(&gone.node)
    };
    for reason in ["OutOfcpu", "OutOfpods", "UnexpectedAdmissionError", "NodeAffinity", "TopologyAffinityError"] {
        let found = refused(reason, false);
        assert_eq!(found.len(), 1, "{reason}: {found:#?}");
        assert_eq!(found[0].pattern, "refused-by-kubelet");
        assert!(found[0].title.contains(reason) && found[0].title.contains("node n1"), "{}", found[0].title);
    }
    let none = |found: &[tapio_wire::service::Finding]| found.iter().all(|one| one.pattern != "refused-by-kubelet");
    assert!(none(&refused("NodeAffinity", true)), "kubelet that is started anew ends what ran");
    for reason in ["", "Evicted", "NodeShutdown", "DeadlineExceeded"] {
        assert!(none(&refused(reason, false)), "{reason}");
    }
}

#[test]
fn events_say_it_where_the_pod_does_not() {
    for (reason, message, pattern, severity) in [
        ("Preempted", "Preempted by shop/urgent on node n1", "preempted", "medium"),
        ("TaintManagerEviction", "Marking for deletion Pod shop/web-1", "evicted-by-taint", "high"),
    ] {
        let mut gone = web();
        gone.node.said(99 * SECOND, gone.pod, "Pod", reason, message);
        assert_eq!(gone.found(), pair(pattern, severity), "{reason}");
    }
    let mut gone = web();
    gone.node.said(99 * SECOND, gone.pod, "Pod", "TaintManagerEviction", "Cancelling deletion of Pod shop/web-1");
    assert_eq!(gone.found(), pair("pod-deleted", "info"), "it was not evicted for its taint");
}

#[test]
fn who_took_a_preempted_pods_place_is_said() {
    let said = "Preempted by pod pay/urgent on node n1";
    let mut gone = web();
    gone.node.said(99 * SECOND, gone.pod, "Pod", "Preempted", said);
    delete(&mut gone.node, gone.pod, gone.container, 100, 100 * SECOND);
    let found = findings_of(&gone.node);
    assert_eq!((found.len(), found[0].pattern.as_str()), (1, "preempted"), "{found:#?}");
    assert!(found[0].summary.contains(said), "{}", found[0].summary);
    // What the condition says names nobody.
    let said = "Scheduler: preempting to accommodate a higher priority pod";
    let mut gone = web();
    gone.node.pod_says(99 * SECOND, gone.pod, ["PreemptionByScheduler", said], true);
    delete(&mut gone.node, gone.pod, gone.container, 100, 100 * SECOND);
    let found = findings_of(&gone.node);
    assert!(found[0].pattern == "preempted" && found[0].summary.contains(said), "{found:#?}");
}

#[test]
fn what_its_controller_ends_was_meant() {
    let mut gone = web();
    let workload = gone.node.kube_workload("Deployment/web", "shop");
    gone.node.said(
        99 * SECOND,
        workload,
        "StatefulSet",
        "SuccessfulDelete",
        "delete Pod web-1 in StatefulSet web successful",
    );
    assert_eq!(gone.found(), pair("ended-by-controller", "info"));
    let mut gone = web();
    let workload = gone.node.kube_workload("Deployment/web", "shop");
    gone.node.said(99 * SECOND, workload, "Deployment", "ScalingReplicaSet", "Scaled down replica set web-a to 1");
    assert_eq!(gone.found(), pair("deleted-in-scale-down", "info"));
    // Scaling up explains no end.
    let mut gone = web();
    let workload = gone.node.kube_workload("Deployment/web", "shop");
    gone.node.said(99 * SECOND, workload, "Deployment", "ScalingReplicaSet", "Scaled up replica set web-a to 3");
    assert_eq!(gone.found(), pair("pod-deleted", "info"));
}

#[test]
fn pods_that_a_controller_names_are_one_finding() {
    let mut node = Node::new("n1");
    let workload = node.kube_workload("Deployment/web", "shop");
    node.said(99 * SECOND, workload, "Deployment", "ScalingReplicaSet", "Scaled down replica set web-a to 1");
    for number in 1..=4u32 {
        let name = format!("shop/web-{number}");
        let (container, pod) = (node.kube_container("Deployment/web", &name, &format!("c{number}")), number);
        let entity = node.kube_pod("Deployment/web", &name);
        delete(&mut node, entity, container, 100 + number, (100 + u64::from(number)) * SECOND);
        // Of the last one only the Deployment has spoken.
        if pod < 4 {
            let said = format!("Deleted pod: web-{number}");
            node.said((101 + u64::from(number)) * SECOND, workload, "Deployment", "SuccessfulDelete", &said);
        }
    }
    node.lethal(120 * SECOND);
    let mut found = findings_of(&node);
    found.sort_by(|a, b| a.pattern.cmp(&b.pattern));
    let counts: Vec<_> = found.iter().map(|one| (&*one.pattern, one.count)).collect();
    assert_eq!(counts, [("deleted-in-scale-down", 1), ("ended-by-controller", 3)], "{found:#?}");
}

#[test]
fn pods_leaving_a_cordoned_node_are_one_probable_drain() {
    let mut node = Node::new("n1");
    node.node_condition(90 * SECOND, "Schedulable", 0);
    for number in 1..=3 {
        let name = format!("shop/web-{number}");
        let container = node.kube_container("Deployment/web", &name, &format!("c{number}"));
        let pod = node.kube_pod("Deployment/web", &name);
        delete(&mut node, pod, container, 100 + number, (100 + u64::from(number)) * SECOND);
    }
    let found = findings_of(&node);
    assert_eq!(found.len(), 1, "{found:#?}");
    assert_eq!((found[0].pattern.as_str(), found[0].count), ("drained", 3));
    assert!(found[0].confidence < 0.8, "the deletion may have another reason");
}

#[test]
fn a_failed_hook_is_found_beside_the_deletion() {
    let mut node = Node::new("n1");
    let container = node.kube_container("Deployment/web", "shop/web-1", "c1");
    let pod = node.kube_pod("Deployment/web", "shop/web-1");
    delete(&mut node, pod, container, 101, 100 * SECOND);
    // Kubelet's Event comes after the end, which was taken for a part of the deletion until then.
    node.kube_event(104 * SECOND, pod, "FailedPreStopHook", "Exec lifecycle hook ([false]) failed");
    node.lethal(105 * SECOND);
    let mut found = patterns_of(&node);
    found.sort();
    assert_eq!(found, ["pod-deleted", "pre-stop-failed"]);
}

#[test]
fn what_is_deleted_after_an_uncordon_was_not_drained() {
    let mut node = Node::new("n1");
    node.node_condition(90 * SECOND, "Schedulable", 0);
    node.node_condition(95 * SECOND, "Schedulable", 1);
    let container = node.kube_container("Deployment/web", "shop/web-1", "c1");
    let pod = node.kube_pod("Deployment/web", "shop/web-1");
    delete(&mut node, pod, container, 101, 100 * SECOND);
    let found = findings_of(&node);
    assert_eq!(found.len(), 1, "{found:#?}");
    assert_eq!(found[0].pattern, "pod-deleted", "{found:#?}");
}

/// `pods` pods with a container each, evicted through the API one after the other.
fn evict(node: &mut Node, pods: u32, workload: &str) {
    for number in 1..=pods {
        let name = format!("shop/web-{number}");
        let at = (100 + u64::from(number)) * SECOND;
        let container = node.kube_container(workload, &name, &format!("c{number}"));
        let pod = node.kube_pod(workload, &name);
        // The API server writes the condition first, and deletes then; the last report has it as well.
        let mut says = |at: u64, is_deleting: bool| {
            node.pod_says(at, pod, ["EvictionByEvictionAPI", "Eviction API: evicting"], is_deleting);
        };
        says(at, false);
        says(at, true);
        says(at + 2 * SECOND, true);
        node.stop(container, at + SECOND);
    }
}

#[test]
fn pods_evicted_from_a_cordoned_node_are_one_drain() {
    let mut node = Node::new("n1");
    // Cordoned before, and not for the drain that comes.
    for (at, status) in [(60, 0), (80, 1), (90, 0)] {
        node.node_condition(at * SECOND, "Schedulable", status);
    }
    evict(&mut node, 3, "Deployment/web");
    // One goes as it would by an API server that says no more of it.
    let container = node.kube_container("Deployment/old", "shop/old-1", "c9");
    let pod = node.kube_pod("Deployment/old", "shop/old-1");
    delete(&mut node, pod, container, 109, 110 * SECOND);
    // It takes pods again when that is over.
    node.node_condition(600 * SECOND, "Schedulable", 1);
    node.lethal(600 * SECOND);
    let mut found = findings_of(&node);
    let probable = found.iter().position(|one| one.pattern == "drained").expect("of the old one");
    assert_eq!(found.remove(probable).count, 1);
    assert_eq!(found.len(), 1, "{found:#?}");
    assert_eq!((found[0].pattern.as_str(), found[0].count), ("evicted-by-drain", 3), "{found:#?}");
    assert!(found[0].title.contains("node n1 is probably drained: 3 of its pods"), "{}", found[0].title);
    assert!(found[0].confidence < 0.8 && found[0].severity == "low", "nothing says who asked: {found:#?}");
}

/// A collector that restarts, or a watch that folds changes, sees condition and deletion at once.
#[test]
fn a_reason_heard_of_with_the_deletion_counts() {
    for (reason, pattern) in [
        ("PreemptionByScheduler", "preempted"),
        ("DeletionByTaintManager", "evicted-by-taint"),
        ("EvictionByEvictionAPI", "evicted-by-api"),
    ] {
        let mut node = Node::new("n1");
        let pod = node.kube_pod("Deployment/web", "shop/web-1");
        node.pod_says(100 * SECOND, pod, [reason, "said by the pod"], true);
        node.lethal(101 * SECOND);
        let found = findings_of(&node);
        let seen: Vec<&str> = found.iter().map(|finding| finding.pattern.as_str()).collect();
        assert_eq!(seen, [pattern], "{found:#?}");
        assert_eq!(found[0].evidence.len(), 1, "its one event is listed once: {found:#?}");
    }
}

#[test]
fn evictions_that_need_not_be_a_drain_are_evictions() {
    for (pods, conditions, why) in [
        (3, vec![], "it was not cordoned"),
        (3, vec![(90, 1)], "it takes pods"),
        (3, vec![(60, 0), (90, 1)], "it takes pods again"),
        (1, vec![(90, 0)], "one alone may be anybody's"),
    ] {
        let mut node = Node::new("n1");
        for (at, status) in conditions {
            node.node_condition(at * SECOND, "Schedulable", status);
        }
        evict(&mut node, pods, "Deployment/web");
        node.lethal(200 * SECOND);
        let found = findings_of(&node);
        assert!(!found.is_empty() && found.iter().all(|one| one.pattern == "evicted-by-api"), "{why}: {found:#?}");
    }
    // Another node was cordoned.
    let (mut node, mut other) = (Node::new("n1"), Node::new("n2"));
    other.node_condition(90 * SECOND, "Schedulable", 0);
    other.lethal(90 * SECOND);
    evict(&mut node, 3, "Deployment/web");
    node.lethal(200 * SECOND);
    let machine = Machine::start(1);
    machine.deliver(&other.node, &other.frames);
    machine.deliver(&node.node, &node.frames);
    let found = machine.findings();
    assert!(!found.is_empty() && found.iter().all(|one| one.pattern == "evicted-by-api"), "{found:#?}");
}

#[test]
fn an_evicted_pod_of_a_job_fails_no_job() {
    let mut node = Node::new("n1");
    evict(&mut node, 1, "Job/import");
    node.lethal(200 * SECOND);
    let found = findings_of(&node);
    assert_eq!(found.len(), 1, "{found:#?}");
    let entity = found[0].entity.as_ref().expect("an entity");
    assert_eq!((found[0].pattern.as_str(), entity.workload.as_str()), ("evicted-by-api", "Job/import"));
}

#[test]
fn a_job_that_gave_up_says_why() {
    let reasons =
        ["BackoffLimitExceeded", "DeadlineExceeded", "PodFailurePolicy", "FailedIndexes", "MaxFailedIndexesExceeded"];
    for reason in reasons {
        let mut node = Node::new("n1");
        node.job_failed(100 * SECOND, "shop", "import", reason);
        let job = node.kube_workload("Job/import", "shop");
        let message = "Container work for pod shop/import-x failed with exit code 42 matching FailJob rule at index 0";
        node.said_of(101 * SECOND, job, ["Job", "import", reason, message]);
        node.lethal(101 * SECOND);
        let found = findings_of(&node);
        assert_eq!(found.len(), 1, "{found:#?}");
        assert_eq!(found[0].pattern, "job-failed");
        assert!(found[0].title.contains("shop/import") && found[0].title.contains(reason), "{}", found[0].title);
        // Of its Event and its condition, which are joined.
        assert!(found[0].summary.contains(message) && found[0].summary.contains("4 of its pods failed"), "{found:#?}");
        assert_eq!(found[0].evidence.len(), 2, "{found:#?}");
    }
}

#[test]
fn a_jobs_failure_policy_is_found_beside_its_exit() {
    let mut node = Node::new("n1");
    let work = node.kube_container_named("Job/import", "shop/import-x", "c1", "work");
    node.exit(99 * SECOND, Process::init(work, 100, "import"), 42 << 8);
    node.job_failed(100 * SECOND, "shop", "import", "PodFailurePolicy");
    let job = node.kube_workload("Job/import", "shop");
    node.said_of(101 * SECOND, job, ["Job", "import", "PodFailurePolicy", "failed with exit code 42"]);
    node.lethal(101 * SECOND);
    let mut found = findings_of(&node);
    found.sort_by(|a, b| a.pattern.cmp(&b.pattern));
    let patterns: Vec<_> = found.iter().map(|one| one.pattern.as_str()).collect();
    assert_eq!(patterns, ["exited-with-error", "job-failed"], "{found:#?}");
    assert!(found[0].title.contains("42"), "{}", found[0].title);
}

#[test]
fn a_job_that_has_done_its_work_is_no_failure() {
    let mut node = Node::new("n1");
    let job = node.kube_workload("Job/import", "shop");
    node.said_of(100 * SECOND, job, ["Job", "import", "Completed", "Job completed"]);
    // A CronJob says so too, in other words, of a Job that has an Event of its own.
    let cron = node.kube_workload("CronJob/import", "shop");
    node.said_of(100 * SECOND, cron, ["CronJob", "import", "SawCompletedJob", "Saw completed job: import"]);
    node.lethal(100 * SECOND);
    let found = findings_of(&node);
    assert_eq!(found.len(), 1, "{found:#?}");
    assert_eq!((found[0].pattern.as_str(), found[0].severity.as_str()), ("job-finished", "info"));
    assert!(found[0].title.contains("Job shop/import has finished"), "{}", found[0].title);
}
