//! Patterns of nodes and systemd units, each with its look-alike.

use crate::correlate_node::{MIB, MS, Node, Process, SECOND, SIGKILL, address, findings_of, patterns_of};
use tapio_wire::event::{Detail, HISTOGRAM_SLOTS, Histogram, Lane, Measure, Tcp};

#[test]
fn only_a_failed_runtime_takes_the_node_down() {
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
fn a_runtime_killed_for_memory_is_found_a_stopped_not() {
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
        let process =
            Process { entity, pid: 100 + time as u32, ns_pid: 1, ..Process::of_node(entity, 100 + time as u32, "db") };
        node.exit(at, process, 1 << 8);
        node.unit_state(at + MS, entity, "db.service", "auto-restart", "exit-code");
        node.lethal(at + 2 * MS);
    }
    node
}

#[test]
fn three_failures_of_a_unit_are_a_loop_absorbing_crashes() {
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
fn a_node_lost_to_stalled_storage_is_the_storages() {
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
fn failed_block_ios_mean_a_failing_disk_slow_do_not() {
    // EIO, ENODATA, EILSEQ. ETIMEDOUT may be a lost path, and EOPNOTSUPP, EREMOTEIO, ENOSPC, EBADE, ENOLINK are no fault of the disk.
    let certain = [-5, -61, -84].map(|error| (error, Some(0.85)));
    let no_fault = [0, -110, -95, -121, -28, -52, -67].map(|error| (error, None));
    for (error, expected) in certain.into_iter().chain(no_fault) {
        let mut node = Node::new("n1");
        let itself = node.itself();
        let io = Detail::BlockIo { latency_ns: 2 * SECOND, bytes: 4096, device: 8 << 20, error, operation: 1 };
        node.push(100 * SECOND, itself, 0, io);
        node.frame(Lane::Bulk, 101 * SECOND);
        let found = findings_of(&node);
        let told: Vec<_> = found.iter().map(|finding| (&*finding.pattern, finding.confidence)).collect();
        let expected = expected.map(|confidence| ("disk-failing", confidence));
        assert!(told.len() == usize::from(expected.is_some()), "errno {error}: {told:?}");
        let is_so = |(pattern, sure): (&str, f64)| told[0].0 == pattern && (told[0].1 - sure).abs() < 0.01;
        assert!(expected.is_none_or(is_so), "errno {error}: {told:?}");
        assert!(found.iter().all(|finding| finding.title.ends_with("device 8:0")));
    }
}

/// A client whose packets to 10.96.0.9 are sent again, while the table of connections has `entries` of 1000.
fn losing_packets(entries: u64, dropped: u64) -> Node {
    let mut node = Node::new("n1");
    let crawler = node.kube_container("Deployment/crawler", "shop/crawler-0", "crawler");
    node.lethal(SECOND);
    for step in 0..12 {
        let tcp = Tcp {
            source: address(1),
            destination: address(9),
            duration_us: 0,
            kib_sent: 0,
            kib_received: 0,
            source_port: 40_000,
            destination_port: 443,
            change: 5,
            active: true,
        };
        node.push(99 * SECOND + step * MS, crawler, 0, Detail::Tcp(tcp));
    }
    node.frame(Lane::Bulk, 99 * SECOND + 20 * MS);
    node.conntrack(100 * SECOND, entries, dropped, 7);
    node.lethal(101 * SECOND);
    node
}

#[test]
fn a_connection_table_that_drops_is_full_half_full_not() {
    for (entries, dropped, expected) in [
        (1000, 42, Some("conntrack-full")),
        (960, 0, Some("conntrack-nearly-full")),
        (960, u64::MAX, Some("conntrack-nearly-full")),
        (500, 0, None),
        (500, u64::MAX, None),
        (100, 42, None),
    ] {
        assert_eq!(
            patterns_of(&losing_packets(entries, dropped)),
            expected.into_iter().collect::<Vec<_>>(),
            "{entries} entries, {dropped} dropped"
        );
    }
}

#[test]
fn a_full_table_without_a_lost_packet_is_no_finding() {
    let mut node = Node::new("n1");
    node.conntrack(100 * SECOND, 990, 0, 7);
    node.lethal(101 * SECOND);
    assert!(patterns_of(&node).is_empty());
}

#[test]
fn a_full_table_is_one_finding_with_its_top_talker() {
    let mut node = losing_packets(960, 0);
    let netfilter = node.host("softirq");
    node.packet_drop(102 * SECOND, netfilter, "SOCKET_FILTER", 500);
    node.packet_drop(103 * SECOND, netfilter, "NETFILTER_DROP", 500);
    for turn in 0..3 {
        node.conntrack(105 * SECOND + 30 * turn * SECOND, 1000, 40 + turn, 7);
        node.lethal(106 * SECOND + 30 * turn * SECOND);
    }
    let found = findings_of(&node);
    let [full] = found.as_slice() else { panic!("{found:#?}") };
    assert_eq!((&*full.pattern, full.count), ("conntrack-full", 3));
    assert_eq!(full.title, "the connection table of node n1 is full and the kernel drops packets");
    assert!(full.summary.contains("10.96.0.7 has 70 % of the connections"), "{}", full.summary);
    assert!(full.summary.contains("500 packets were dropped by netfilter"), "{}", full.summary);
    assert_eq!(full.consequences.len(), 1, "{:?}", full.consequences);
}
