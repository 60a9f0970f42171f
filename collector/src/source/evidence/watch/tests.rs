use super::*;

const INTERVAL: Duration = crate::settings::config::WATCH_INTERVAL;
const PATH: &str = "/docker/cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc";

fn at(start: Instant, samples: u64) -> Instant {
    start + INTERVAL * samples as u32
}

fn one() -> Paths {
    Paths { containers: vec![PATH.to_owned()], ..Paths::default() }
}

fn watched() -> Watched {
    Watched::default()
}

fn overs(reports: &[LiveReport]) -> Vec<(What, bool)> {
    let of = |report: &LiveReport| match report {
        LiveReport::Trouble(trouble) => Some((trouble.what, trouble.is_over)),
        LiveReport::Curve { .. } => None,
    };
    reports.iter().filter_map(of).collect()
}

#[test]
fn throttling_begins_and_ends_after_a_minute() {
    let (start, mut watched, mut reports) = (Instant::now(), watched(), Vec::new());
    let mut sample = Sample::default();
    for number in 0..30 {
        sample.periods += 100;
        sample.throttled += if (3..12).contains(&number) { 80 } else { 1 };
        watched.take(at(start, number), PATH, sample, (INTERVAL, INTERVAL * SAMPLES), &mut reports);
    }
    assert_eq!(overs(&reports), [(What::Throttled, false), (What::Throttled, true)]);
    let LiveReport::Trouble(trouble) = &reports[0] else { panic!("{reports:?}") };
    assert_eq!((trouble.since, trouble.value), (at(start, 3), 80));
}

#[test]
fn a_pids_limit_that_is_hit_is_reported_repeatedly() {
    let (start, mut watched, mut reports) = (Instant::now(), watched(), Vec::new());
    // What was counted before the first sample was long ago.
    let mut sample = Sample { pids_hits: 1_000, ..Sample::default() };
    for number in 0..20 {
        sample.pids_hits += u64::from((5..12).contains(&number));
        watched.take(at(start, number), PATH, sample, (INTERVAL, INTERVAL * SAMPLES), &mut reports);
    }
    let pids = What::PidsAtLimit;
    assert_eq!(overs(&reports), [(pids, false), (pids, false), (pids, true)]);
}

#[test]
fn a_new_container_reports_its_first_refusal_at_once() {
    let start = Instant::now();
    for (is_listed, expected) in [(true, &[(What::PidsAtLimit, false)][..]), (false, &[])] {
        let (mut watch, mut reports) = (Watch::new(INTERVAL), Vec::new());
        if is_listed {
            watch.cgroups(start, &Paths::default(), &mut reports);
        }
        watch.cgroups(at(start, 6), &one(), &mut reports);
        let watched = watch.watched.get_mut(PATH).expect("it is watched");
        let sample = Sample { pids_hits: 3, pids: 4, ..Sample::default() };
        watched.take(at(start, 6), PATH, sample, (INTERVAL, INTERVAL * SAMPLES), &mut reports);
        assert_eq!(overs(&reports), expected, "what was there before the first list may have been refused long ago");
    }
}

#[test]
fn a_container_that_waits_above_memory_high_is_stuck() {
    let (start, mut watched, mut reports) = (Instant::now(), watched(), Vec::new());
    watched.limits.high_bytes = 64 << 20;
    for number in 0..20 {
        let (memory_bytes, memory_pressure) = if number < 12 { (65 << 20, 80_00) } else { (60 << 20, 80_00) };
        let sample = Sample { memory_bytes, memory_pressure, high_hits: 7, ..Sample::default() };
        watched.take(at(start, number), PATH, sample, (INTERVAL, INTERVAL * SAMPLES), &mut reports);
    }
    let high = What::MemoryHigh;
    assert_eq!(overs(&reports), [(high, false), (high, true)]);
}

#[test]
fn a_container_that_is_gone_has_no_trouble_any_more() {
    let (start, mut watch, mut reports) = (Instant::now(), Watch::new(INTERVAL), Vec::new());
    watch.cgroups(start, &one(), &mut reports);
    let watched = watch.watched.get_mut(PATH).expect("it is watched");
    for number in 0..3 {
        let sample = Sample { pids_hits: number, ..Sample::default() };
        watched.take(at(start, number), PATH, sample, (INTERVAL, INTERVAL * SAMPLES), &mut reports);
    }
    watch.cgroups(start, &Paths::default(), &mut reports);
    assert_eq!(overs(&reports), [(What::PidsAtLimit, false), (What::PidsAtLimit, true)]);
    assert!(watch.curve(PATH).is_none());
}

#[test]
fn a_curve_is_bounded_and_reported_every_ten_minutes() {
    let (start, mut watch, mut reports) = (Instant::now(), Watch::new(INTERVAL), Vec::new());
    watch.cgroups(start, &one(), &mut reports);
    let watched = watch.watched.get_mut(PATH).expect("it is watched");
    for number in 0..400 {
        let sample = Sample { memory_bytes: number << 20, cpu_us: number * 5_000_000, ..Sample::default() };
        watched.take(at(start, number), PATH, sample, (INTERVAL, INTERVAL * SAMPLES), &mut reports);
    }
    assert_eq!(reports.len(), 6);
    let points = watch.curve(PATH).expect("it was sampled").points;
    assert_eq!(points.len(), POINTS_MAX);
    assert_eq!(points.last().map(|point| (point.memory_kib >> 10, point.cpu_milli)), Some((399, 500)));
}

#[test]
fn troubles_of_processes_are_reported_until_they_end() {
    let (start, mut watched, mut reports) = (Instant::now(), watched(), Vec::new());
    let descriptors = processes::Descriptors { pid: 9, comm: "web".into(), open: 1020, limit: 1024 };
    for number in 0..40 {
        watched.processes = match number {
            5..15 => Looked { descriptors: Some(descriptors.clone()), ..Looked::default() },
            15..30 => Looked { stopped: Some((9, "web".into())), ..Looked::default() },
            _ => Looked::default(),
        };
        watched.take(at(start, number), PATH, Sample::default(), (INTERVAL, INTERVAL * SAMPLES), &mut reports);
    }
    let (full, stopped) = (What::DescriptorsAtLimit, What::Stopped);
    let expected = [(full, false), (full, false), (full, true), (stopped, false), (stopped, false), (stopped, true)];
    assert_eq!(overs(&reports), expected);
    let LiveReport::Trouble(first) = &reports[0] else { panic!("{reports:?}") };
    assert_eq!((first.pid, first.value, first.limit), (9, 1020, 1024));
}

#[test]
fn drops_in_a_pods_network_namespace_are_its_trouble() {
    const POD: &str = "/kubepods/pod01234567-89ab-cdef-0123-456789abcdef";
    let path = format!("{POD}/cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc");
    let (start, mut watched, mut reports) = (Instant::now(), watched(), Vec::new());
    // What was dropped before the first look was long ago.
    for (look, dropped) in [900, 900, 917, 918, 918, 918].into_iter().enumerate() {
        let text = format!("entries insert_failed drop\n64 00 {dropped:x}\n");
        let fill = crate::source::conntrack::counters(&text).expect("as the kernel writes it").of_at_most(100);
        let now = at(start, look as u64 * NETWORK_SAMPLES);
        watched.look_at_connections(now, &path, fill, INTERVAL * SAMPLES, &mut reports);
    }
    let dropped = What::ConnectionsDropped;
    assert_eq!(overs(&reports), [(dropped, false), (dropped, false), (dropped, true)]);
    let LiveReport::Trouble(first) = &reports[0] else { panic!("{reports:?}") };
    assert_eq!((first.value, &first.whose), (17, &Whose::Cgroup(POD.to_owned())));
    assert_eq!(with_network(PATH), PATH, "it is in no pod");
}

#[test]
fn a_container_without_a_sample_began_with_zero_counters() {
    const NEW: &str = "/docker/aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
    let (start, mut watch) = (Instant::now(), Watch::new(INTERVAL));
    let counters = Counters { throttled: 3, ..Counters::default() };
    assert_eq!(watch.difference(start, NEW, counters), None, "nothing was listed yet");
    watch.cgroups(start, &one(), &mut Vec::new());
    let now = at(start, 2);
    assert_eq!(watch.difference(now, NEW, counters), Some((INTERVAL * 2, counters)));
    assert_eq!(watch.difference(now, "/system.slice", counters), None, "only containers are sampled");
    assert_eq!(watch.difference(now, PATH, counters), None, "listed, and not sampled yet: it may be old");
    assert_eq!(watch.difference(now, &format!("{NEW}/init"), counters), None, "only a container as a whole is");
}
