use super::*;

fn reports(units: &mut Units) -> Vec<UnitReport> {
    std::iter::from_fn(|| units.next_report()).collect()
}

fn settle(units: &mut Units, now: Instant) {
    while let Some(name) = units.question() {
        units.answer(&name, Some(&Properties { slice: Some("system.slice"), ..Properties::default() }), now);
    }
}

fn service<'a>(pid: u32, restarts: u32, exited_us: u64) -> Properties<'a> {
    Properties {
        main_pid: Some(pid),
        restarts: Some(restarts),
        main_exited_us: Some(exited_us),
        result: Some(if exited_us == 0 { "success" } else { "exit-code" }),
        ..Properties::default()
    }
}

fn state<'a>(active: &'a str, sub: &'a str) -> Properties<'a> {
    Properties { active_state: Some(active), sub_state: Some(sub), ..Properties::default() }
}

fn change(units: &mut Units, own: &Properties<'_>, common: &Properties<'_>, now: Instant) -> Vec<UnitReport> {
    units.signal("web.service", own, false, now);
    units.signal("web.service", common, true, now);
    settle(units, now);
    reports(units)
}

#[test]
fn at_the_start_failed_units_are_reported_once() {
    let (mut units, now) = (Units::default(), Instant::now());
    units.list("web.service", "active", "running", true, now);
    units.list("bad.service", "failed", "failed", true, now);
    units.list("data.mount", "active", "mounted", true, now);
    settle(&mut units, now);
    let reported = reports(&mut units);
    assert_eq!(reported.iter().map(|report| &*report.unit).collect::<Vec<_>>(), ["bad.service"]);
    assert_eq!(reported[0].cgroup, "/system.slice/bad.service");
    assert_eq!(units.len(), 2, "a mount that is well is not remembered");
    units.list("bad.service", "failed", "failed", false, now);
    settle(&mut units, now);
    assert_eq!(reports(&mut units), []);
}

#[test]
fn a_failure_during_a_daemon_reload_is_reported() {
    let (mut units, now) = (Units::default(), Instant::now());
    assert_eq!(change(&mut units, &service(10, 0, 0), &state("active", "running"), now).len(), 1);
    let failed = Properties { active_state: Some("failed"), ..service(0, 0, 5) };
    units.signal("web.service", &failed, false, now);
    units.reloaded();
    units.tick(now + HALF);
    settle(&mut units, now + HALF);
    let reported = reports(&mut units);
    assert_eq!(reported.iter().map(|report| &*report.active_state).collect::<Vec<_>>(), ["failed"]);
}

#[test]
fn a_refused_restart_is_a_start_limit() {
    let (mut units, now) = (Units::default(), Instant::now());
    let reported = change(&mut units, &service(10, 0, 0), &state("active", "running"), now);
    assert_eq!((reported.len(), reported[0].main_pid), (1, 10));
    let reported = change(&mut units, &service(0, 0, 5), &state("activating", "auto-restart"), now);
    assert_eq!((reported.len(), &*reported[0].sub_state, &*reported[0].result), (1, "auto-restart", "exit-code"));
    let reported = change(&mut units, &service(11, 1, 5), &state("active", "running"), now);
    assert_eq!((reported.len(), reported[0].restarts), (1, 1));
    let reported = change(&mut units, &service(0, 1, 9), &state("activating", "auto-restart"), now);
    assert_eq!(reported.len(), 1);
    let reported = change(&mut units, &service(0, 2, 9), &state("failed", "failed"), now);
    assert_eq!(
        (&*reported[0].active_state, &*reported[0].result, reported[0].restarts),
        ("failed", "start-limit-hit", 2)
    );
}

#[test]
fn transitional_states_are_not_reported() {
    let (mut units, now) = (Units::default(), Instant::now());
    change(&mut units, &service(10, 0, 0), &state("active", "running"), now);
    assert_eq!(change(&mut units, &service(10, 0, 0), &state("reloading", "reload"), now), []);
    assert_eq!(change(&mut units, &service(10, 0, 0), &state("active", "running"), now), []);
    assert_eq!(change(&mut units, &service(10, 0, 0), &state("deactivating", "stop-sigterm"), now), []);
    assert_eq!(change(&mut units, &service(0, 0, 5), &state("inactive", "dead"), now).len(), 1);
}

#[test]
fn half_a_change_is_reported_without_the_other_half() {
    let (mut units, now) = (Units::default(), Instant::now());
    change(&mut units, &service(10, 0, 0), &state("active", "running"), now);
    units.signal("web.service", &service(12, 0, 0), false, now);
    assert_eq!(reports(&mut units), []);
    let due = units.next_tick().expect("it is waited for");
    units.tick(due);
    assert_eq!(reports(&mut units)[0].main_pid, 12);
    assert_eq!(units.next_tick(), None);
}

#[test]
fn a_restless_unit_is_limited_except_its_last_state() {
    let (mut units, mut now) = (Units::default(), Instant::now());
    let start = now;
    let mut reported = Vec::new();
    for round in 0..1000 {
        reported.extend(change(&mut units, &service(round + 1, round, 0), &state("active", "running"), now));
        now += Duration::from_millis(1);
        units.tick(now);
        reported.extend(reports(&mut units));
    }
    let coalesced = units.take_coalesced();
    let bound = BURST as usize + (now.duration_since(start).as_secs_f64() * PER_SECOND) as usize + 1;
    assert!(reported.len() <= bound, "{} reports", reported.len());
    assert!(coalesced >= 900, "{coalesced} coalesced");
    units.tick(now + Duration::from_secs(1).div_f64(PER_SECOND));
    reported.extend(reports(&mut units));
    assert_eq!(reported.last().expect("some").main_pid, 1000);
}

#[test]
fn other_units_are_reported_when_they_fail_and_recover() {
    let (mut units, now) = (Units::default(), Instant::now());
    units.signal("data.mount", &state("active", "mounted"), true, now);
    units.signal("data.mount", &state("failed", "failed"), true, now);
    settle(&mut units, now);
    units.signal("data.mount", &state("active", "mounting-done"), true, now);
    let states: Vec<String> = reports(&mut units).into_iter().map(|report| report.active_state).collect();
    assert_eq!(states, ["failed", "active"]);
    assert_eq!(units.len(), 0);
}

#[test]
fn a_cgroup_that_is_gone_is_remembered() {
    let (mut units, now) = (Units::default(), Instant::now());
    units.list("web.service", "active", "running", true, now);
    units.question();
    let running = Properties { cgroup: Some("/shop.slice/web.service"), ..service(10, 0, 0) };
    units.answer("web.service", Some(&running), now);
    let gone = Properties { cgroup: Some(""), slice: Some("system.slice"), ..service(0, 0, 5) };
    units.signal("web.service", &gone, false, now);
    units.signal("web.service", &state("failed", "failed"), true, now);
    assert_eq!(reports(&mut units)[0].cgroup, "/shop.slice/web.service");
}

#[test]
fn the_table_is_bounded_and_forgets_what_is_gone_first() {
    let (mut units, now) = (Units::default(), Instant::now());
    units.list("kept.service", "active", "running", true, now);
    for number in 0..UNITS_MAX + 100 {
        let name = format!("run-{number}.service");
        units.signal(&name, &service(1, 0, 0), true, now);
        units.remove(&name, now);
    }
    assert!(units.len() <= UNITS_MAX);
    assert!(units.units.contains_key("kept.service"));
    units.tick(now + 2 * REMEMBERED);
    assert_eq!(units.len(), 1, "what is gone is not remembered for ever");
}
