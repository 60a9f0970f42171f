//! The systemd source against a real systemd on a bus of its own, beside the kernel's source.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::lab;
use crate::lab::{Kernel, Lab, MemoryCgroup, SYSTEMD, Seen, Systemd, can_run};
use tapio_collector::base::status::Status;
use tapio_collector::intake::Intake;
use tapio_collector::intake::identity::Identity;
use tapio_collector::pipeline::Pipeline;
use tapio_collector::settings::config::{Config, SystemdSection};
use tapio_collector::source::systemd::{SystemdCounts, SystemdSource};
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
    counts: Arc<SystemdCounts>,
}

impl Watching {
    fn start(lab: &Lab, section: &SystemdSection) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.expect("a runtime");
        let source = runtime.block_on(SystemdSource::connect(section, NODE)).expect("systemd is on the bus");
        let (stop, stopped) = watch::channel(false);
        let (status, counts) = (source.status(), source.counts());
        let intake = Intake::new(lab.context.clone(), Source::Systemd, Identity::new(Vec::new()));
        let task = runtime.spawn(source.run(intake, stopped));
        // What begins before the first list is where it starts from, and is reported only when it fails.
        let deadline = Instant::now() + lab::LIMIT;
        while counts.units() == 0 {
            assert!(Instant::now() < deadline, "systemd's units are not listed: {:?}", status.get());
            std::thread::sleep(Duration::from_millis(2));
        }
        Self { runtime, stop, task, status, counts }
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
fn failures_and_restarts_have_the_kernels_entity() {
    let test = "failures_and_restarts_have_the_kernels_entity";
    if !can_run(test, &SYSTEMD) {
        return;
    }
    let (systemd, mut lab) = (Systemd::start(), Lab::new());
    systemd.service("before", &[], "exit 4");
    let kernel = Kernel::start(&lab.context);
    let watching = Watching::start(&lab, &section(&systemd));
    let (_, before) = failed(&mut lab, "before.service");
    assert_eq!((before.main_code, before.main_status), (1, 4), "what failed before is reported too");

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
fn a_unit_out_of_memory_is_reported_with_its_signal() {
    let test = "a_unit_out_of_memory_is_reported_with_its_signal";
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
fn a_bus_that_restarts_leaves_a_gap_only() {
    let test = "a_bus_that_restarts_leaves_a_gap_only";
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
    assert_eq!(watching.status.get(), None, "it runs again");
    let (_, steady) = failed(&mut lab, "steady.service");
    assert_eq!((steady.main_code & !1, steady.main_status), (2, 11), "CLD_KILLED or CLD_DUMPED: {steady:?}");
    let output = systemd.run(&["systemctl", "start", "dbus.service"]);
    assert!(output.status.success(), "{output:?}");
    systemd.service("second", &[], "exit 2");
    let (_, second) = failed(&mut lab, "second.service");
    assert_eq!(second.main_status, 2);
    assert!(systemd.run(&["systemctl", "daemon-reload"]).status.success());
    systemd.service("third", &[], "exit 3");
    failed(&mut lab, "third.service");
    assert_eq!(lab.states("second.service").filter(|state| state.main_status == 2).count(), 1, "reported once");
    assert_eq!(lab.states("first.service").filter(|state| state.main_status == 1).count(), 1, "reported once");
    watching.end();
    lab.assert_books_close(Source::Systemd);
}

#[test]
fn without_a_bus_it_says_what_it_waits_for() {
    let test = "without_a_bus_it_says_what_it_waits_for";
    if !can_run(test, &SYSTEMD) {
        return;
    }
    let (systemd, mut lab) = (Systemd::start(), Lab::new());
    let watching = Watching::start(&lab, &section(&systemd));
    systemd.service("here", &[], "exit 1");
    failed(&mut lab, "here.service");
    let output = systemd.run(&["systemctl", "stop", "dbus.socket", "dbus.service"]);
    assert!(output.status.success(), "{output:?}");
    let deadline = Instant::now() + lab::LIMIT;
    let waits = || watching.status.get().filter(|waits| waits.contains("no bus:"));
    while waits().is_none() {
        assert!(Instant::now() < deadline, "{:?}", watching.status.get());
        std::thread::sleep(Duration::from_millis(5));
    }
    // Without a bus there is no systemd-run.
    std::fs::create_dir_all(systemd.file("/run/systemd/system")).expect("a folder");
    let unit = "[Service]\nExecStart=/bin/sh -c 'exit 5'\n";
    std::fs::write(systemd.file("/run/systemd/system/unseen.service"), unit).expect("a unit");
    let output = systemd.run(&["systemctl", "start", "unseen.service"]);
    assert!(output.status.success(), "{output:?}");
    let output = systemd.run(&["systemctl", "start", "dbus.socket", "dbus.service"]);
    assert!(output.status.success(), "{output:?}");
    lab.wait("gap", |seen| matches!(&seen.event.body, Detail::Gap(_)));
    let (_, unseen) = failed(&mut lab, "unseen.service");
    assert_eq!(unseen.main_status, 5, "the list after the gap names it");
    assert!(watching.counts.reconnects() > 0);
    watching.end();
    lab.assert_books_close(Source::Systemd);
}

/// What `GET /readyz` says of the systemd source.
fn readiness(port: u16) -> Option<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    stream.write_all(b"GET /readyz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    let body: serde_json::Value = serde_json::from_str(text.split_once("\r\n\r\n")?.1).ok()?;
    body["sources"]["systemd"].as_str().map(str::to_owned)
}

#[test]
fn the_collector_runs_it_or_says_why_not() {
    let test = "the_collector_runs_it_or_says_why_not";
    if !can_run(test, &SYSTEMD) {
        return;
    }
    let systemd = Systemd::start();
    let port = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port").port();
    let mut config = Config::default();
    config.collector.enabled_collectors = vec!["systemd".into()];
    config.collectors.systemd = section(&systemd);
    config.grpc.server_endpoints = vec!["127.0.0.1:1".into()];
    config.health.address = [127, 0, 0, 1].into();
    config.health.port = port;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.expect("a runtime");
    let start = |config: &Config, allow| runtime.block_on(Pipeline::start(config, allow));
    let running = start(&config, false).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(readiness(port).as_deref(), Some("running"));
    drop(running);
    config.collectors.systemd.bus = Some("unix:path=/nowhere/bus".into());
    config.health.enabled = false;
    let error = start(&config, false).err().expect("there is no bus").to_string();
    assert!(error.contains("systemd source") && error.contains("/nowhere/bus"), "{error}");
    drop(start(&config, true).unwrap_or_else(|error| panic!("{error}")));
    runtime.shutdown_background();
}

#[test]
fn excluded_units_emit_nothing_and_are_counted() {
    let test = "excluded_units_emit_nothing_and_are_counted";
    if !can_run(test, &SYSTEMD) {
        return;
    }
    let (systemd, mut lab) = (Systemd::start(), Lab::new());
    let section = SystemdSection { exclude_units: vec!["noise-*.service".into()], ..section(&systemd) };
    let watching = Watching::start(&lab, &section);
    systemd.service("noise-1", &[], "exit 1");
    systemd.service("quiet", &[], "exit 1");
    failed(&mut lab, "quiet.service");
    assert_eq!(lab.states("noise-1.service").count(), 0);
    let counts = watching.counts.skipped_by_reason();
    assert!(counts[1].0 == "excluded" && counts[1].1 > 0, "{counts:?}");
    watching.end();
    lab.assert_books_close(Source::Systemd);
}

#[test]
fn without_a_bus_it_says_so() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let section = SystemdSection { bus: Some("unix:path=/nowhere/bus".into()), ..SystemdSection::default() };
    let error = runtime.block_on(SystemdSource::connect(&section, NODE)).err().expect("there is none").to_string();
    assert!(error.contains("/nowhere/bus") && error.contains("collectors.systemd.bus"), "{error}");
}
