//! The probes of tasks that are off unless asked for, and of what processes do: each test causes the real thing and reads its
//! record.
//!
//! As root: `TAPIO_REQUIRE=all cargo test -p tapio-probes`. Other processes' records are everywhere in between; each test
//! looks for those of the processes and cgroups that it made.

mod lab;

use lab::{Container, Session, can_run, inode};
use tapio_probes::record::{Histogram, Kind, RunQueue};
use tapio_probes::{LoadConfig, Tuning};

/// Programs that are off unless asked for run too.
fn everything(tuning: Tuning) -> LoadConfig {
    LoadConfig { tuning, disabled: Vec::new(), ..LoadConfig::default() }
}

#[test]
fn waiting_for_a_cpu_is_told_when_long_and_summed_up_by_cgroup() {
    const RUN_QUEUE: u8 = 2;
    if !can_run("waiting_for_a_cpu_is_told_when_long_and_summed_up_by_cgroup") {
        return;
    }
    let slow_ns = 500_000;
    let mut session = Session::start_with(&everything(Tuning { run_queue_slow_ns: slow_ns, ..Tuning::default() }));
    let container = Container::make(20);
    let spinning = [container.spawn("spin"), container.spawn("spin")];
    let id = inode(&container.unified());
    for child in &spinning {
        let pid = child.0.id();
        let wait: RunQueue = session.wait_for(Kind::RunQueue, |wait: &RunQueue| {
            wait.header.pid == pid && wait.header.cgroup_id == id && wait.wait_ns > 1_000_000
        });
        assert!(wait.wait_ns < 20_000_000_000, "{wait:?}");
    }
    let waits: Histogram = session.wait_for_sum(Kind::Histogram, |waits: &Histogram| {
        waits.header.cgroup_id == id && waits.measure == RUN_QUEUE && waits.max_ns > 1_000_000
    });
    let count: u32 = waits.counts.iter().sum();
    assert!(count > 0 && waits.total_ns >= waits.max_ns, "{waits:?}");
    assert!(waits.counts[9..].iter().sum::<u32>() > 0, "the slots from 512 us on: {waits:?}");
    assert_eq!((waits.header.pid, waits.operation, waits.device, waits.pad), (0, 0, 0, [0; 2]));
    // Every wait in the slots is at least as long as its slot begins, so the total bounds them from above.
    let least: u64 = (1..32).map(|slot| u64::from(waits.counts[slot]) * (1000 << slot)).sum();
    assert!(least <= waits.total_ns, "{waits:?}");
}
