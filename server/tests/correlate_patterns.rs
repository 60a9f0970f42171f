//! Every pattern with its scenario, and the look-alikes that it must not match.

use crate::correlate_node;

use crate::correlate_node::{
    BOOTED, MIB, MS, Node, Process, SECOND, SIGKILL, SIGSEGV, SIGTERM, findings_of, patterns_of,
};

const LIMIT: u64 = 64 * MIB;

/// A container that is killed at its limit, with the kernel's order: the signal right before the report of the victim.
fn limit_kill(node: &mut Node, process: Process, at: u64) {
    node.reclaim(at - SECOND, process.entity);
    node.signal(at, process, SIGKILL, None);
    node.oom(at + 2000, process, LIMIT, LIMIT - 4096);
    node.exit(at + 5 * MS, process, SIGKILL);
    node.lethal(at + 6 * MS);
}

#[test]
fn a_limit_kill_has_its_causal_chain_and_certificate() {
    let mut node = Node::new("n1");
    let web = node.container("web", "web");
    limit_kill(&mut node, Process::init(web, 100, "nginx"), 100 * SECOND);
    let found = findings_of(&node);
    assert_eq!(found.len(), 1, "{found:#?}");
    let finding = &found[0];
    assert_eq!(finding.pattern, "memory-limit-kill");
    assert_eq!(finding.severity, "high");
    assert!(finding.title.contains("web (container "), "{}", finding.title);
    assert!(finding.title.ends_with("exceeded its memory limit of 64.0 MiB"));
    let steps: Vec<_> = finding.evidence.iter().map(|e| (e.step.as_str(), e.caused_by.as_str())).collect();
    assert_eq!(steps, [("reclaim", ""), ("oom", "reclaim"), ("kill", "oom"), ("exit", "kill")]);
    assert_eq!(finding.evidence[3].id, format!("{:x}:5:2:2", node.node.id));
    assert!((finding.confidence - 0.98).abs() < 1e-9, "{}", finding.confidence);
    assert_eq!(finding.ended_ns, BOOTED + 100 * SECOND + 5 * MS);
    let death = finding.death.as_ref().expect("a death has a certificate");
    assert_eq!((death.pid, death.signal, death.exit_code), (100, Some(9), None));
    assert_eq!(death.signal_name, "SIGKILL");
    assert!(death.sender.as_ref().expect("the sender is known").kernel);
    let limit = death.limit.as_ref().expect("the limit is known");
    assert_eq!((limit.limit_bytes, limit.usage_bytes, limit.hit), (LIMIT, LIMIT - 4096, true));
    assert!(!finding.advice.is_empty() && !death.verdict.is_empty());
}

#[test]
fn missing_optional_evidence_lowers_confidence() {
    let mut node = Node::new("n1");
    let web = node.container("web", "web");
    let process = Process::init(web, 100, "nginx");
    node.oom(100 * SECOND, process, LIMIT, LIMIT);
    node.exit(100 * SECOND + MS, process, SIGKILL);
    node.lethal(101 * SECOND);
    let found = findings_of(&node);
    assert_eq!(found[0].pattern, "memory-limit-kill");
    assert!((found[0].confidence - 0.90).abs() < 1e-9, "{}", found[0].confidence);
}

#[test]
fn an_oom_below_the_limit_is_the_nodes() {
    let mut node = Node::new("n1");
    let web = node.container("web", "web");
    let process = Process::init(web, 100, "nginx");
    node.oom(100 * SECOND, process, LIMIT, LIMIT / 2);
    node.signal(100 * SECOND, process, SIGKILL, None);
    node.exit(100 * SECOND + MS, process, SIGKILL);
    node.lethal(101 * SECOND);
    assert_eq!(patterns_of(&node), ["node-memory-exhausted"]);
}

#[test]
fn code_137_without_an_oom_is_no_memory_kill() {
    let mut node = Node::new("n1");
    let web = node.container("web", "web");
    node.exit(100 * SECOND, Process::init(web, 100, "sh"), 137 << 8);
    node.exit(101 * SECOND, Process::init(web, 101, "sh"), SIGKILL);
    node.lethal(102 * SECOND);
    assert_eq!(patterns_of(&node), ["exited-with-error", "exited-with-error"]);
}

#[test]
fn a_childs_oom_is_silent_and_not_the_containers_death() {
    let mut node = Node::new("n1");
    let web = node.container("web", "web");
    let worker = Process::child(web, 107, "worker");
    node.oom(100 * SECOND, worker, LIMIT, LIMIT);
    node.signal(100 * SECOND, worker, SIGKILL, None);
    node.exit(100 * SECOND + MS, worker, SIGKILL);
    node.lethal(101 * SECOND);
    let found = findings_of(&node);
    assert_eq!(found.len(), 1, "{found:#?}");
    assert_eq!(found[0].pattern, "silent-child-oom");
    assert!(found[0].title.contains("worker"), "{}", found[0].title);
}

#[test]
fn a_group_kill_is_not_silent() {
    let mut node = Node::new("n1");
    let web = node.container("web", "web");
    let (init, worker) = (Process::init(web, 100, "init"), Process::child(web, 107, "worker"));
    node.oom(100 * SECOND, worker, LIMIT, LIMIT);
    node.oom(100 * SECOND + 1, init, LIMIT, LIMIT);
    node.exit(100 * SECOND + MS, worker, SIGKILL);
    node.lethal(100 * SECOND + MS);
    node.exit(100 * SECOND + 2 * MS, init, SIGKILL);
    node.lethal(101 * SECOND);
    assert_eq!(patterns_of(&node), ["memory-limit-kill"]);
}

#[test]
fn a_shell_on_the_node_kills_from_outside() {
    let mut node = Node::new("n1");
    let web = node.container("web", "web");
    let session = node.unit("session-3.scope");
    let (target, shell) = (Process::init(web, 100, "nginx"), Process::of_node(session, 55, "bash"));
    node.signal(100 * SECOND, target, SIGKILL, Some(shell));
    node.exit(100 * SECOND + MS, target, SIGKILL);
    node.lethal(101 * SECOND);
    let found = findings_of(&node);
    assert_eq!(found.len(), 1, "{found:#?}");
    assert_eq!(found[0].pattern, "killed-from-outside");
    let sender = found[0].death.as_ref().and_then(|death| death.sender.clone()).expect("a sender");
    assert_eq!((sender.pid, sender.comm.as_str(), sender.kernel), (55, "bash", false));
    assert_eq!(sender.entity.expect("its entity").name, "session-3.scope");
}

#[test]
fn a_handled_signal_from_outside_counts_by_its_exit_code() {
    let mut node = Node::new("n1");
    let web = node.container("web", "web");
    let host = node.host("/");
    let (target, agent) = (Process::init(web, 100, "app"), Process::of_node(host, 55, "agent"));
    node.signal(100 * SECOND, target, SIGTERM, Some(agent));
    node.exit(101 * SECOND, target, 143 << 8);
    node.lethal(102 * SECOND);
    assert_eq!(patterns_of(&node), ["killed-from-outside"]);
}

#[test]
fn the_runtime_and_the_container_itself_are_not_outside() {
    for (comm, of_runtime) in [("containerd-shim", true), ("runc", true), ("supervisor", false)] {
        let mut node = Node::new("n1");
        let web = node.container("web", "web");
        let unit = node.unit("containerd.service");
        let target = Process::init(web, 100, "nginx");
        let sender = if of_runtime { Process::of_node(unit, 55, comm) } else { Process::child(web, 108, comm) };
        node.signal(100 * SECOND, target, SIGKILL, Some(sender));
        node.exit(100 * SECOND + MS, target, SIGKILL);
        node.lethal(101 * SECOND);
        let expected = if of_runtime { "stopped" } else { "killed-by-own-process" };
        assert_eq!(patterns_of(&node), [expected], "{comm}");
    }
}

#[test]
fn a_container_that_calls_itself_containerd_is_outside() {
    let mut node = Node::new("n1");
    let web = node.container("web", "web");
    let evil = node.container("evil", "evil");
    let (target, sender) = (Process::init(web, 100, "nginx"), Process::init(evil, 66, "containerd"));
    node.signal(100 * SECOND, target, SIGKILL, Some(sender));
    node.exit(100 * SECOND + MS, target, SIGKILL);
    node.lethal(101 * SECOND);
    assert_eq!(patterns_of(&node), ["killed-from-outside"]);
}

#[test]
fn processes_of_the_host_are_nobodys_finding() {
    let mut node = Node::new("n1");
    let host = node.host("/");
    let (target, sender) = (Process::of_node(host, 100, "sleep"), Process::of_node(host, 55, "bash"));
    node.signal(100 * SECOND, target, SIGKILL, Some(sender));
    node.exit(100 * SECOND + MS, target, SIGKILL);
    node.exit(101 * SECOND, Process::of_node(host, 101, "false"), 1 << 8);
    node.lethal(102 * SECOND);
    assert!(patterns_of(&node).is_empty());
}

fn term_then_kill(grace_ns: u64) -> Node {
    let mut node = Node::new("n1");
    let web = node.container("web", "web");
    let unit = node.unit("containerd.service");
    let (target, shim) = (Process::init(web, 100, "nginx"), Process::of_node(unit, 55, "containerd-shim"));
    node.signal(100 * SECOND, target, SIGTERM, Some(shim));
    node.lethal(100 * SECOND);
    node.signal(100 * SECOND + grace_ns, target, SIGKILL, Some(shim));
    node.exit(100 * SECOND + grace_ns + MS, target, SIGKILL);
    node.lethal(101 * SECOND + grace_ns);
    node
}

#[test]
fn sigterm_ignored_for_the_grace_period_is_reported() {
    let found = findings_of(&term_then_kill(30 * SECOND));
    assert_eq!(found.len(), 1, "{found:#?}");
    assert_eq!(found[0].pattern, "ignored-sigterm");
    assert!(found[0].summary.contains("containerd-shim"), "{}", found[0].summary);
}

#[test]
fn an_ignored_sigterm_is_found_behind_healthy_ends_of_children() {
    let mut node = Node::new("n1");
    let web = node.container("web", "web");
    let unit = node.unit("containerd.service");
    let (target, shim) = (Process::init(web, 100, "sh"), Process::of_node(unit, 55, "containerd-shim"));
    node.signal(100 * SECOND, target, SIGTERM, Some(shim));
    for child in 0..400u32 {
        let at = 100 * SECOND + u64::from(child + 1) * 50 * MS;
        node.exit(at, Process::child(web, 1000 + child, "sleep"), 0);
    }
    node.signal(130 * SECOND, target, SIGKILL, Some(shim));
    node.exit(130 * SECOND + MS, target, SIGKILL);
    node.lethal(131 * SECOND);
    assert_eq!(patterns_of(&node), ["ignored-sigterm"]);
}

#[test]
fn an_abort_by_the_service_manager_is_no_program_fault() {
    let mut node = Node::new("n1");
    let unit = node.unit("db.service");
    let init = node.unit("init.scope");
    let (target, systemd) = (Process::of_node(unit, 100, "db"), Process::of_node(init, 1, "systemd"));
    node.signal(100 * SECOND, target, 6, Some(systemd));
    node.exit(105 * SECOND, target, 6);
    node.lethal(106 * SECOND);
    assert!(!patterns_of(&node).contains(&"crashed".to_owned()));
}

#[test]
fn sigkill_right_after_sigterm_is_no_ignored_sigterm() {
    assert_eq!(patterns_of(&term_then_kill(200 * MS)), ["stopped"]);
}

#[test]
fn sigterm_handled_within_grace_is_a_stop() {
    for status in [0, 143 << 8, SIGTERM] {
        let mut node = Node::new("n1");
        let web = node.container("web", "web");
        let unit = node.unit("containerd.service");
        let (target, shim) = (Process::init(web, 100, "nginx"), Process::of_node(unit, 55, "containerd-shim"));
        node.signal(100 * SECOND, target, SIGTERM, Some(shim));
        node.exit(105 * SECOND, target, status);
        node.lethal(106 * SECOND);
        assert_eq!(patterns_of(&node), ["stopped"], "status {status}");
    }
}

#[test]
fn ignored_sigterm_by_a_person_names_the_person_once() {
    let mut node = Node::new("n1");
    let unit = node.unit("db.service");
    let session = node.unit("session-3.scope");
    let (target, shell) = (Process::of_node(unit, 100, "db"), Process::of_node(session, 55, "bash"));
    node.signal(100 * SECOND, target, SIGTERM, Some(shell));
    node.signal(110 * SECOND, target, SIGKILL, Some(shell));
    node.exit(110 * SECOND + MS, target, SIGKILL);
    node.lethal(111 * SECOND);
    let found = findings_of(&node);
    assert_eq!(found.len(), 1, "{found:#?}");
    assert_eq!(found[0].pattern, "ignored-sigterm");
    assert_eq!(found[0].death.as_ref().and_then(|d| d.sender.as_ref()).map(|s| s.pid), Some(55));
}

fn crashes(times: u64) -> Node {
    let mut node = Node::new("n1");
    for time in 0..times {
        // A restarted container has a new id.
        let web = node.container_of("shop/web-1", &format!("web{time}"), "web-1/web");
        let at = (100 + 60 * time) * SECOND;
        node.exit(at, Process::init(web, 100 + time as u32, "app"), 1 << 8);
        node.lethal(at + MS);
    }
    node
}

#[test]
fn two_crashes_are_no_loop() {
    let found = findings_of(&crashes(2));
    assert_eq!(found.len(), 1, "a pod's deaths alike are one finding: {found:#?}");
    assert_eq!((&*found[0].pattern, found[0].count), ("exited-with-error", 2));
}

#[test]
fn a_crash_loop_absorbs_its_deaths() {
    for (times, evidence) in [(3, 3), (5, 5), (40, 8)] {
        let found = findings_of(&crashes(times));
        assert_eq!(found.len(), 1, "{found:#?}");
        let finding = &found[0];
        assert_eq!(finding.pattern, "crash-loop");
        assert_eq!(u64::from(finding.count), times);
        assert_eq!(finding.evidence.len(), evidence);
        assert_eq!(finding.started_ns, BOOTED + 100 * SECOND);
        let death = finding.death.as_ref().expect("the last certificate");
        assert_eq!(u64::from(death.pid), 99 + times);
    }
}

#[test]
fn a_death_that_a_loop_absorbed_keeps_its_id() {
    let node = crashes(3);
    let machine = correlate_node::Machine::start(1);
    machine.deliver(&node.node, &node.frames[..1]);
    let single = machine.findings().remove(0);
    machine.deliver(&node.node, &node.frames[1..]);
    let looped = machine.findings().remove(0);
    assert_ne!(single.id, looped.id);
    assert_eq!(machine.store.get(&single.id).expect("an alias").id, looped.id);
}

#[test]
fn a_loops_better_explained_death_stands_by_itself() {
    let mut node = crashes(3);
    let web = node.container_of("shop/web-1", "web9", "web-1/web");
    limit_kill(&mut node, Process::init(web, 900, "app"), 300 * SECOND);
    assert_eq!(patterns_of(&node), ["crash-loop", "memory-limit-kill"]);
}

#[test]
fn a_scaled_down_pod_is_no_crash_loop() {
    let mut node = Node::new("n1");
    for container in 0..4u32 {
        let web = node.container_of("shop/web-1", &format!("c{container}"), "c");
        node.exit(100 * SECOND, Process::init(web, 100 + container, "app"), 143 << 8);
    }
    node.lethal(101 * SECOND);
    assert!(!patterns_of(&node).contains(&"crash-loop".to_owned()));
}

#[test]
fn a_fault_is_a_crash_of_any_process() {
    let mut node = Node::new("n1");
    let web = node.container("web", "web");
    let worker = Process::child(web, 107, "worker");
    node.signal(100 * SECOND, worker, SIGSEGV, None);
    node.exit(101 * SECOND, worker, SIGSEGV | 0x80);
    node.lethal(102 * SECOND);
    let found = findings_of(&node);
    assert_eq!(found.len(), 1, "{found:#?}");
    assert_eq!((found[0].pattern.as_str(), found[0].severity.as_str()), ("crashed", "medium"));
}

#[test]
fn a_process_that_ends_well_is_no_finding() {
    let mut node = Node::new("n1");
    let web = node.container("web", "web");
    node.exit(100 * SECOND, Process::init(web, 100, "job"), 0);
    node.exit(100 * SECOND, Process::child(web, 101, "grep"), 1 << 8);
    node.lethal(101 * SECOND);
    assert!(patterns_of(&node).is_empty());
}

#[test]
fn events_lost_in_the_window_lower_confidence_and_are_stated() {
    let mut node = Node::new("n1");
    let web = node.container("web", "web");
    node.lethal(99 * SECOND);
    node.lose(37);
    limit_kill(&mut node, Process::init(web, 100, "nginx"), 101 * SECOND);
    let found = findings_of(&node);
    assert_eq!(found[0].loss.as_ref().map(|loss| (loss.events, loss.open_interval)), Some((37, false)));
    assert!((found[0].confidence - 0.88).abs() < 1e-9, "{}", found[0].confidence);
}

#[test]
fn events_lost_long_before_do_not_matter() {
    let mut node = Node::new("n1");
    let web = node.container("web", "web");
    node.lethal(9 * SECOND);
    node.lose(37);
    node.lethal(10 * SECOND);
    limit_kill(&mut node, Process::init(web, 100, "nginx"), 101 * SECOND);
    let found = findings_of(&node);
    assert_eq!(found[0].loss.as_ref().map(|loss| loss.events), Some(0));
}

#[test]
fn a_collector_that_died_leaves_an_open_interval() {
    let mut node = Node::new("n1");
    let web = node.container("web", "web");
    node.lethal(99 * SECOND);
    let mut next = Node::new("n1");
    next.epoch = 6;
    limit_kill(&mut next, Process::init(web, 100, "nginx"), 101 * SECOND);
    node.frames.extend(next.frames);
    let found = findings_of(&node);
    assert_eq!(found[0].pattern, "memory-limit-kill");
    assert_eq!(found[0].loss.as_ref().map(|loss| loss.open_interval), Some(true));
}

#[test]
fn readings_for_another_later_process_are_no_evidence() {
    let mut node = Node::new("n1");
    let web = node.container("web", "web");
    let (first, other) = (Process::init(web, 100, "app"), Process::child(web, 200, "helper"));
    let read = |node: &mut Node, at: u64, of: Process| node.cgroup_use(at, of, 64 * MIB, [9, 1, 1], "");
    read(&mut node, 50 * SECOND, other);
    node.exit(100 * SECOND, first, 1 << 8);
    read(&mut node, 100 * SECOND + 5 * MS, first);
    read(&mut node, 105 * SECOND, other);
    // Long after it, for whatever reason.
    read(&mut node, 106 * SECOND, first);
    node.lethal(106 * SECOND);
    let found = findings_of(&node);
    assert_eq!(found.len(), 1, "{found:#?}");
    let observed: Vec<_> = found[0].evidence.iter().filter(|piece| piece.step == "observed").collect();
    assert_eq!(observed.len(), 1, "{observed:#?}");
    assert_eq!((observed[0].pid, observed[0].time_ns), (100, BOOTED + 100 * SECOND + 5 * MS));
}

#[test]
fn what_the_kernel_sent_has_one_sender_everywhere() {
    const SIGHUP: u32 = 1;
    let mut node = Node::new("n1");
    let web = node.container("web", "web");
    let first = Process::init(web, 100, "app");
    node.signal(100 * SECOND, first, SIGHUP, None);
    node.sent_while_running(77);
    node.exit(100 * SECOND + MS, first, SIGHUP);
    node.lethal(101 * SECOND);
    let found = findings_of(&node);
    let by = "the kernel, while app (pid 77) was running";
    let death = found[0].death.as_ref().expect("somebody died");
    assert!(found[0].summary.contains(by), "{}", found[0].summary);
    assert!(death.verdict.contains(by) && death.sender.as_ref().is_some_and(|sender| sender.kernel), "{death:#?}");
    assert!(found[0].evidence.iter().any(|piece| piece.step == "kill" && piece.text.ends_with(by)), "{found:#?}");
}

#[test]
fn a_memory_kill_does_not_explain_a_later_own_end() {
    for (status, is_because) in [(0, false), (1 << 8, false), (137 << 8, true)] {
        let mut node = Node::new("n1");
        let web = node.container("web", "web");
        let (first, child) = (Process::init(web, 100, "app"), Process::child(web, 200, "worker"));
        node.oom(100 * SECOND, child, 64 * MIB, 64 * MIB);
        node.signal(100 * SECOND, child, SIGKILL, None);
        node.exit(100 * SECOND + MS, child, SIGKILL);
        node.exit(100 * SECOND + 50 * MS, first, status);
        node.lethal(101 * SECOND);
        let found = findings_of(&node);
        let ended = found.iter().find(|finding| finding.pattern == "child-oom-exit").expect("it is explained");
        assert!(ended.title.contains("ended right after its process worker"), "{}", ended.title);
        assert_eq!(ended.summary.contains("because of it"), is_because, "{status}: {}", ended.summary);
        assert!(!ended.death.as_ref().is_some_and(|death| death.verdict.contains("because")), "{ended:#?}");
    }
}
