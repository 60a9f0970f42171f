//! A workload that floods the lethal lane costs nobody else a record: real loops in real cgroups, beside real kills.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::lab::{Container, Session, can_run, inode};
use tapio_probes::clock::boottime_ns;
use tapio_probes::record::{CGROUP_V1_MEMORY, Exit, LeftOut, RecordKind, Signal};
use tapio_probes::{Counter, LoadConfig, Shares};
use zerocopy::FromBytes;

const KILLS: usize = 100;
const SIGKILL: u32 = 9;

/// What a loop that is killed leaves behind; dropped after it was killed, and before the container is.
struct Rest(PathBuf);

impl Drop for Rest {
    fn drop(&mut self) {
        // It is there only if the loop was killed in the midst of a turn.
        let _ = std::fs::remove_dir(&self.0);
    }
}

/// Looks at the shares and adds up what is reported of each cgroup.
fn look(shares: &mut Shares, now_ns: u64, reported: &mut HashMap<u64, u64>) -> usize {
    let mut over = 0;
    shares.read(now_ns, usize::MAX, |bytes| {
        let record = LeftOut::read_from_bytes(bytes).expect("a record of its size");
        *reported.entry(record.header.cgroup_id).or_default() += record.count;
        over += record.is_over as usize;
    });
    over
}

/// Kills processes in each of these in turn, and finds every death and signal. Returns the ids of their cgroups.
fn every_kill_is_recorded<const N: usize>(session: &mut Session, calm: &[Container; N]) -> [u64; N] {
    let mut killed = Vec::new();
    for number in 0..KILLS {
        // Each of them stays below what one cgroup may have.
        let mut victim = calm[number % N].spawn("sleep");
        let comm = format!("/proc/{}/comm", victim.0.id());
        while std::fs::read_to_string(&comm).expect("it lives").trim() != "victim" {
            session.drain();
        }
        victim.0.kill().expect("killed");
        victim.0.wait().expect("reaped");
        killed.push(victim.0.id());
        session.drain();
    }
    let calm_ids = calm.each_ref().map(|container| inode(&container.unified()));
    for (number, pid) in killed.iter().enumerate() {
        let exit: Exit = session.wait_for(RecordKind::Exit, |exit: &Exit| exit.header.pid == *pid);
        assert_eq!((exit.status, exit.header.cgroup_id), (SIGKILL, calm_ids[number % N]));
        session.wait_for(RecordKind::Signal, |signal: &Signal| signal.header.pid == *pid && signal.signal == SIGKILL);
    }
    calm_ids
}

#[test]
fn floods_crowd_out_no_death_and_are_reported_by_cgroup() {
    if !can_run("floods_crowd_out_no_death_and_are_reported_by_cgroup") {
        return;
    }
    // Low enough for the slowest loop on a machine that is emulated.
    let config = LoadConfig { cgroup_records_per_second: 200, ..LoadConfig::default() };
    let mut session = Session::start_with(&config);
    let mut shares = Shares::map(session.probes()).expect("the map can be mapped");
    let [hanging_up, starting, making] = [61, 62, 63].map(Container::make);
    let calm = [64, 65, 66, 67, 68].map(Container::make);
    let below = making.unified();
    let _rest = Rest(below.join("flood"));
    let loops = [
        hanging_up.spawn("hang-up"),
        starting.spawn("start"),
        making.spawn(&format!("make-cgroups {}", below.display())),
    ];
    // On a machine that is emulated one of them may be too slow to be bounded.
    let is_bounded = |session: &Session, kind| session.counted(kind, Counter::Limited) > 0;
    let bounded = [RecordKind::Exec, RecordKind::CgroupMkdir];
    let began = Instant::now();
    loop {
        let count = bounded.iter().filter(|&&kind| is_bounded(&session, kind)).count();
        if count == bounded.len() || count > 0 && began.elapsed() >= Duration::from_secs(5) {
            break;
        }
        assert!(began.elapsed() < Duration::from_secs(30), "the loops are too slow to be bounded");
        session.drain();
        std::thread::sleep(Duration::from_millis(2));
    }

    let calm_ids = every_kill_is_recorded(&mut session, &calm);

    // A signal that a process sends itself and ignores is recorded once a second, with a count.
    let hanging_id = inode(&hanging_up.unified());
    let hung_up = session.all_of(RecordKind::Signal, |signal: &Signal| signal.header.cgroup_id == hanging_id);
    let seconds = began.elapsed().as_secs() as usize;
    assert!((1..=seconds + 2).contains(&hung_up.len()), "{} in {seconds} s", hung_up.len());
    assert!(hung_up.iter().skip(1).all(|signal| signal.repeats > 10 && signal.result == 1), "{hung_up:?}");

    let flooding = [&starting, &making].map(|container| inode(&container.unified()));
    let mut reported = HashMap::new();
    let now_ns = boottime_ns();
    look(&mut shares, now_ns, &mut reported);
    let bounded: Vec<_> = flooding.iter().zip(bounded).filter(|&(_, kind)| is_bounded(&session, kind)).collect();
    for (cgroup, _) in &bounded {
        assert!(reported.get(cgroup).is_some_and(|count| *count > 0), "{cgroup} is not among {reported:?}");
    }
    for calm_id in calm_ids.into_iter().chain([hanging_id]) {
        assert!(
            !reported.contains_key(&calm_id) && !reported.contains_key(&(calm_id | CGROUP_V1_MEMORY)),
            "{reported:?}"
        );
    }
    drop(loops);
    // The clock is handed in: a flood is over when nothing was left out for ten seconds.
    look(&mut shares, now_ns + 1_000_000_000, &mut reported);
    assert!(shares.has_floods());
    let limited = |session: &Session| -> u64 {
        RecordKind::ALL.iter().map(|&kind| session.counted(kind, Counter::Limited)).sum()
    };
    // Of other tests, too, that run beside: the sum moves.
    let before = limited(&session);
    // A test beside this one may flood this machine for a moment longer.
    let (mut over, mut later_ns) = (0, now_ns);
    let deadline = Instant::now() + Duration::from_secs(60);
    while shares.has_floods() {
        assert!(Instant::now() < deadline, "{over} floods are over, and others are not");
        later_ns += 20_000_000_000;
        over += look(&mut shares, later_ns, &mut reported);
        session.drain();
    }
    assert!(over >= bounded.len(), "{over}");
    let sum: u64 = reported.values().sum();
    let after = limited(&session);
    assert!((before..=after + 8).contains(&sum), "{before} to {after} were left out, {sum} are reported by cgroup");
    let dropped = session.close_ledger();
    assert!(dropped.values().all(|count| *count == 0), "{dropped:?}");
}

#[test]
fn without_a_bound_nothing_is_left_out() {
    if !can_run("without_a_bound_nothing_is_left_out") {
        return;
    }
    let config = LoadConfig { cgroup_records_per_second: 0, lethal_ring_bytes: 32 << 20, ..LoadConfig::default() };
    let mut session = Session::start_with(&config);
    let container = Container::make(69);
    let flood = container.spawn("start");
    let deadline = Instant::now() + Duration::from_secs(60);
    while session.counted(RecordKind::Exec, Counter::Emitted) < 3_000 {
        assert!(Instant::now() < deadline, "the loop is too slow");
        session.drain();
        std::thread::sleep(Duration::from_millis(2));
    }
    drop(flood);
    assert_eq!(RecordKind::ALL.iter().map(|&kind| session.counted(kind, Counter::Limited)).sum::<u64>(), 0);
    session.close_ledger();
}
