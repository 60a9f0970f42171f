//! Patterns of nodes and systemd units, each with its look-alike.

mod correlate_node;

use correlate_node::{MIB, MS, Node, Process, SECOND, SIGKILL, findings_of, patterns_of};
use tapio_wire::event::{Detail, HISTOGRAM_SLOTS, Histogram, Lane, Measure};

#[test]
fn a_container_runtime_that_fails_takes_the_node_and_another_unit_does_not() {
    for (unit, expected) in [("containerd.service", Some("runtime-died")), ("db.service", None)] {
        let mut node = Node::new("n1");
        let entity = node.unit(unit);
        node.unit_state(100 * SECOND, entity, unit, "failed", "exit-code");
        node.node_condition(140 * SECOND, "Ready", 2);
        node.lethal(141 * SECOND);
        let found = findings_of(&node);
        let patterns: Vec<_> = found.iter().map(|finding| &*finding.pattern).collect();
        assert_eq!(patterns, expected.into_iter().collect::<Vec<_>>());
        assert!(found.iter().all(|finding| finding.summary.contains("Ready became unknown")));
    }
}

#[test]
fn a_runtime_killed_for_memory_says_so_and_one_that_was_stopped_is_no_finding() {
    let mut node = Node::new("n1");
    let entity = node.unit("kubelet.service");
    let process = Process::of_node(entity, 50, "kubelet");
    node.oom(100 * SECOND, process, 0, 64 * MIB);
    node.exit(100 * SECOND + MS, process, SIGKILL);
    node.unit_state(100 * SECOND + 5 * MS, entity, "kubelet.service", "auto-restart", "oom-kill");
    node.lethal(101 * SECOND);
    let found = findings_of(&node);
    let died = found.iter().find(|finding| finding.pattern == "runtime-died").expect("found");
    assert!(died.summary.contains("the kernel killed kubelet (pid 50) for memory"), "{}", died.summary);

    let mut node = Node::new("n1");
    let entity = node.unit("kubelet.service");
    node.unit_state(100 * SECOND, entity, "kubelet.service", "dead", "success");
    node.lethal(101 * SECOND);
    assert!(patterns_of(&node).is_empty());
}

fn failing_unit(times: u64) -> Node {
    let mut node = Node::new("n1");
    let entity = node.unit("db.service");
    for time in 0..times {
        let at = (100 + 10 * time) * SECOND;
        let process = Process { entity, pid: 100 + time as u32, ns_pid: 1, ns_level: 0, comm: "db" };
        node.exit(at, process, 1 << 8);
        node.unit_state(at + MS, entity, "db.service", "auto-restart", "exit-code");
        node.lethal(at + 2 * MS);
    }
    node
}

#[test]
fn a_unit_that_fails_three_times_is_in_a_loop_and_absorbs_its_crashes() {
    let found = findings_of(&failing_unit(4));
    assert_eq!(found.len(), 1, "{found:#?}");
    assert_eq!((&*found[0].pattern, found[0].count), ("unit-restart-loop", 4));
    assert_eq!(found[0].title, "db.service keeps failing with result exit-code: 4 times");
}

#[test]
fn a_unit_that_fails_twice_is_in_no_loop() {
    assert!(patterns_of(&failing_unit(2)).is_empty());
}

#[test]
fn a_start_limit_is_the_end_of_the_loop() {
    let mut node = failing_unit(4);
    let entity = node.unit("db.service");
    node.unit_state(150 * SECOND, entity, "db.service", "failed", "start-limit-hit");
    node.lethal(151 * SECOND);
    let found = findings_of(&node);
    assert_eq!(found.len(), 1, "{found:#?}");
    assert_eq!(found[0].pattern, "unit-start-limit");
}

fn histogram(slot: usize) -> Detail {
    let mut counts = [0; HISTOGRAM_SLOTS];
    counts[7] = 90;
    counts[slot] = 10;
    Detail::Histogram(Box::new(Histogram {
        measure: Measure::BlockLatency,
        operation: 0,
        device: 8 << 20,
        interval_ns: SECOND,
        total_ns: SECOND,
        max_ns: 3 * SECOND,
        counts,
    }))
}

#[test]
fn a_node_that_is_lost_while_its_storage_stalls_is_the_storages() {
    for (slot, status, expected) in [(21, 2, Some("storage-stall")), (12, 2, None), (21, 1, None)] {
        let mut node = Node::new("n1");
        let itself = node.itself();
        node.push(100 * SECOND, itself, 0, histogram(slot));
        node.frame(Lane::Bulk, 101 * SECOND);
        node.node_condition(140 * SECOND, "Ready", status);
        node.lethal(141 * SECOND);
        assert_eq!(patterns_of(&node), expected.into_iter().collect::<Vec<_>>(), "slot {slot}, status {status}");
    }
}

#[test]
fn failed_block_ios_are_a_failing_disk_and_slow_ones_are_not() {
    for (error, expected) in [(-5, Some("disk-failing")), (0, None)] {
        let mut node = Node::new("n1");
        let itself = node.itself();
        let io = Detail::BlockIo { latency_ns: 2 * SECOND, bytes: 4096, device: 8 << 20, error, operation: 1 };
        node.push(100 * SECOND, itself, 0, io);
        node.frame(Lane::Bulk, 101 * SECOND);
        let found = findings_of(&node);
        let patterns: Vec<_> = found.iter().map(|finding| &*finding.pattern).collect();
        assert_eq!(patterns, expected.into_iter().collect::<Vec<_>>());
        assert!(found.iter().all(|finding| finding.title.ends_with("device 8:0")));
    }
}
