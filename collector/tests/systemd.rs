//! The systemd source against a real systemd on a bus of its own, beside the kernel's source.

mod lab;

use lab::{Kernel, Lab, MemoryCgroup, SYSTEMD, Seen, Systemd, can_run};
use tapio_collector::config::SystemdSection;
use tapio_collector::health::Status;
use tapio_collector::identity::Identity;
use tapio_collector::intake::Intake;
use tapio_collector::source::systemd::SystemdSource;
use tapio_wire::event::{Detail, EntityKind, Source, UnitState};
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio::task::JoinHandle;

const NODE: u64 = 77;

/// The systemd source on a runtime of its own.
struct Watching {
    runtime: Runtime,
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
    status: Status,
}

impl Watching {
    fn start(lab: &Lab, section: &SystemdSection) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.expect("a runtime");
        let source = runtime.block_on(SystemdSource::connect(section, NODE)).expect("systemd is on the bus");
        let (stop, stopped) = watch::channel(false);
        let status = source.status();
        let intake = Intake::new(lab.shared.clone(), Source::Systemd, Identity::new(Vec::new()));
        let task = runtime.spawn(source.run(intake, stopped));
        Self { runtime, stop, task, status }
    }

    fn end(self) {
        self.stop.send_replace(true);
        self.runtime.block_on(self.task).expect("no panic");
    }
}

fn section(systemd: &Systemd) -> SystemdSection {
    SystemdSection { bus: Some(systemd.bus.clone()), ..SystemdSection::default() }
}

/// A state of `unit` that `wanted` accepts.
fn state(lab: &mut Lab, unit: &str, what: &str, wanted: impl Fn(&Seen, &UnitState) -> bool) -> (Seen, UnitState) {
    let seen = lab.wait(&format!("{what} of {unit}"), |seen| match &seen.event.body {
        Detail::UnitState(state) => seen.name(state.unit) == unit && wanted(seen, state),
        _ => false,
    });
    let Detail::UnitState(state) = seen.event.body.clone() else { unreachable!("it was looked for") };
    (seen, *state)
}

fn failed(lab: &mut Lab, unit: &str) -> (Seen, UnitState) {
    state(lab, unit, "failure", |seen, state| seen.name(state.active_state) == "failed")
}

#[test]
fn failures_restarts_and_start_limits_are_told_of_the_entity_that_the_kernel_names() {
    let test = "failures_restarts_and_start_limits_are_told_of_the_entity_that_the_kernel_names";
    if !can_run(test, &SYSTEMD) {
        return;
    }
    let (systemd, mut lab) = (Systemd::start(), Lab::new());
    systemd.service("before", &[], "exit 4");
    let kernel = Kernel::start(&lab.shared);
    let watching = Watching::start(&lab, &section(&systemd));
    let (_, before) = failed(&mut lab, "before.service");
    assert_eq!((before.main_code, before.main_status), (1, 4), "what failed before is told too");

    systemd.service("fails", &[], "exit 3");
    let (seen, fails) = failed(&mut lab, "fails.service");
    assert_eq!((seen.name(fails.result), fails.main_code, fails.main_status), ("exit-code", 1, 3));
    assert_eq!((seen.name(fails.sub_state), fails.main_pid, fails.restarts), ("failed", 0, 0));
    let entity = lab.entities[&seen.event.entity].clone();
    assert_eq!((entity.kind, &*entity.name), (EntityKind::Unit, "fails.service"));
    let of_unit = seen.event.entity;
    let exit = lab.wait("the kernel's word of it", |seen| {
        matches!(&seen.event.body, Detail::Exit(exit) if exit.status == 3 << 8) && seen.event.entity == of_unit
    });
    let apart_ns = fails.main_exited_ns.abs_diff(exit.event.time_ns);
    assert!(apart_ns < 1_000_000_000, "systemd and the kernel are {apart_ns} ns apart");

    systemd.service(
        "comes-back",
        &["Restart=on-failure", "RestartSec=50ms"],
        "[ -e /run/well ] && exec sleep 600; exit 1",
    );
    state(&mut lab, "comes-back.service", "automatic restart", |seen, state| {
        seen.name(state.sub_state).starts_with("auto-restart") && seen.name(state.result) == "exit-code"
    });
    std::fs::write(systemd.file("/run/well"), "").expect("a file");
    let (_, back) = state(&mut lab, "comes-back.service", "recovery", |seen, state| {
        seen.name(state.active_state) == "active" && state.restarts > 0 && state.main_pid > 0
    });
    assert!(back.restarts < 5, "{back:?}");

    systemd.service("too-often", &["Restart=always", "RestartSec=20ms", "StartLimitBurst=3"], "exit 1");
    let (_, limit) = state(&mut lab, "too-often.service", "start limit", |seen, state| {
        seen.name(state.active_state) == "failed" && seen.name(state.result) == "start-limit-hit"
    });
    assert_eq!(limit.restarts, 3);

    watching.end();
    drop(kernel);
    lab.assert_books_close(Source::Systemd);
}

#[test]
fn a_unit_that_runs_out_of_memory_is_told_with_its_signal() {
    let test = "a_unit_that_runs_out_of_memory_is_told_with_its_signal";
    if !can_run(test, &SYSTEMD) {
        return;
    }
    let (systemd, mut lab) = (Systemd::start(), Lab::new());
    let watching = Watching::start(&lab, &section(&systemd));
    let grows = "until [ -e /run/grow ]; do sleep 0.02; done; exec tail /dev/zero";
    systemd.service("grows", &["MemoryMax=24M", "MemorySwapMax=0"], grows);
    let (started, _) = state(&mut lab, "grows.service", "start", |_, state| state.main_pid > 0);
    // Where version 2 has the memory controller, MemoryMax limits; otherwise version 1 has to.
    let limit = MemoryCgroup::make("grows", 24 << 20);
    if let Some(limit) = &limit {
        systemd.processes("grows.service").into_iter().for_each(|pid| limit.add(pid));
    }
    std::fs::write(systemd.file("/run/grow"), "").expect("a file");
    let (seen, killed) = failed(&mut lab, "grows.service");
    assert_eq!((killed.main_code, killed.main_status), (2, 9), "CLD_KILLED by SIGKILL: {killed:?}");
    // systemd reads `memory.events`, which only version 2 has.
    let expected = if limit.is_some() { "signal" } else { "oom-kill" };
    assert_eq!(seen.name(killed.result), expected);
    assert_eq!(seen.event.entity, started.event.entity);
    watching.end();
}

#[test]
fn a_bus_that_restarts_leaves_a_gap_and_nothing_is_missed_after_it() {
    let test = "a_bus_that_restarts_leaves_a_gap_and_nothing_is_missed_after_it";
    if !can_run(test, &SYSTEMD) {
        return;
    }
    let (systemd, mut lab) = (Systemd::start(), Lab::new());
    systemd.service("steady", &[], "exec sleep 600");
    let watching = Watching::start(&lab, &section(&systemd));
    systemd.service("first", &[], "exit 1");
    failed(&mut lab, "first.service");
    let from = lab.seen.len();
    assert!(systemd.run(&["systemctl", "kill", "--signal=KILL", "dbus.service"]).status.success());
    // In the gap: found by the list that follows it.
    systemd.run(&["systemctl", "kill", "--signal=SEGV", "steady.service"]);
    let gap = lab.wait_from(from, "gap", |seen| matches!(&seen.event.body, Detail::Gap(_)));
    let Detail::Gap(declared) = &gap.event.body else { unreachable!("it was looked for") };
    assert_eq!((gap.name(declared.what), gap.event.entity), ("units", NODE));
    assert!(gap.name(declared.reason).contains("bus"), "{}", gap.name(declared.reason));
    assert!(
        declared.from_ns < declared.until_ns && declared.until_ns - declared.from_ns < 15_000_000_000,
        "{declared:?}"
    );
    let (_, steady) = failed(&mut lab, "steady.service");
    assert_eq!((steady.main_code & !1, steady.main_status), (2, 11), "CLD_KILLED or CLD_DUMPED: {steady:?}");
    let output = systemd.run(&["systemctl", "start", "dbus.service"]);
    assert!(output.status.success(), "{output:?}");
    systemd.service("second", &[], "exit 2");
    let (_, second) = failed(&mut lab, "second.service");
    assert_eq!(second.main_status, 2);
    assert_eq!(lab.states("first.service").filter(|state| state.main_status == 1).count(), 1, "told once");
    watching.end();
    lab.assert_books_close(Source::Systemd);
}

#[test]
fn units_that_are_left_out_bring_nothing_forth_and_are_counted() {
    let test = "units_that_are_left_out_bring_nothing_forth_and_are_counted";
    if !can_run(test, &SYSTEMD) {
        return;
    }
    let (systemd, mut lab) = (Systemd::start(), Lab::new());
    let section = SystemdSection { exclude_units: vec!["noise-*.service".into()], ..section(&systemd) };
    let source = Watching::start(&lab, &section);
    systemd.service("noise-1", &[], "exit 1");
    systemd.service("quiet", &[], "exit 1");
    failed(&mut lab, "quiet.service");
    assert_eq!(lab.states("noise-1.service").count(), 0);
    source.end();
    lab.assert_books_close(Source::Systemd);
}

#[test]
fn without_a_bus_it_says_so() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let section = SystemdSection { bus: Some("unix:path=/nowhere/bus".into()), ..SystemdSection::default() };
    let error = runtime.block_on(SystemdSource::connect(&section, NODE)).err().expect("there is none").to_string();
    assert!(error.contains("/nowhere/bus") && error.contains("collectors.systemd.bus"), "{error}");
}
