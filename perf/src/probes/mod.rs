//! What the probes cost: each one on a loop that fires it, and all together on three loops that a node must not feel.
//!
//! In: how long it may take. Out: a [`ProbesReport`]. What must hold: what is compared was measured in the same run, in turn,
//! so that what else the machine does falls on both sides; the rings are read meanwhile.
//!
//! A round of a program is five slices:
//! - nothing attached;
//! - the program attached;
//! - the program with thresholds at which every event makes a record, while the kernel measures run times;
//! - an empty program at the same hook, likewise;
//! - a program that writes a bare record into a ring, likewise.
//!
//! The first two show what an operation loses. The others show what a record costs, a difference too small to see in
//! the operation. The last one is the part that no program which writes into a ring at this hook can save.
//!
//! A round of a loop is three slices: nothing attached; everything; at each program's hook one that does nothing instead.

mod network;
pub mod report;
mod session;
pub mod workload;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use report::{LOSS_GOAL_PERCENT, Loss, ProbesReport, ProgramCost, RECORD_GOAL_NS, Spread};
use session::{Reading, Session, count_run_time, emit_all};
use tapio_probes::{EmptyPrograms, PROGRAMS, ProgramInfo, Tuning, Yardstick};
use workload::{Loop, Workload};

use crate::error::{Context, Error};
use crate::host::Host;
use crate::interrupt;

/// Fewer rounds have no middle.
const ROUNDS_MIN: usize = 3;
/// The three that must lose less than the goal.
const LOSS_WORKLOADS: [Workload; 3] = [Workload::Process, Workload::Tcp, Workload::Block];
/// Part of the time that goes to these three.
const LOSS_PART: f64 = 0.4;
/// The slices of a loop's round.
const NOTHING: usize = 0;
const EVERYTHING: usize = 1;
const EMPTY: usize = 2;

/// What to run.
#[derive(Clone, Debug)]
pub struct ProbesOptions {
    /// All together; each measurement has at least three rounds, however long they take.
    pub duration: Duration,
    /// How long an uninterrupted stretch of operations lasts, about.
    pub slice: Duration,
    /// Where files are made: on a disk, for block I/O and reclaim.
    pub directory: PathBuf,
    /// Names of which a measured program's name contains one; all when empty.
    pub only: Vec<String>,
}

/// Measures.
pub fn run(options: &ProbesOptions) -> Result<ProbesReport, Error> {
    if !rustix::process::geteuid().is_root() {
        return Err(Error::Invalid("probes are attached to this kernel: run tapio-perf probes as root".into()));
    }
    let start = Instant::now();
    let is_wanted = |program: &&ProgramInfo| {
        options.only.is_empty() || options.only.iter().any(|part| program.name.contains(part.as_str()))
    };
    let wanted: Vec<&ProgramInfo> = PROGRAMS.iter().filter(is_wanted).collect();
    let mut report = ProbesReport { host: Host::read(), record_goal_ns: RECORD_GOAL_NS, ..ProbesReport::default() };
    if options.only.is_empty() {
        let share = options.duration.mul_f64(LOSS_PART / LOSS_WORKLOADS.len() as f64);
        for workload in LOSS_WORKLOADS {
            report.losses.push(measure_loss(workload, share, options)?);
        }
    }
    for (index, &program) in wanted.iter().enumerate() {
        let left = options.duration.saturating_sub(start.elapsed());
        report.programs.push(measure_program(program, left / (wanted.len() - index) as u32, options)?);
    }
    let is_above = |cost: &&ProgramCost| cost.record_ns.is_some_and(|record| record.median > RECORD_GOAL_NS);
    report.above_record_goal = report.programs.iter().filter(is_above).map(|cost| cost.program.clone()).collect();
    report.are_goals_met = report.above_record_goal.is_empty() && report.losses.iter().all(|loss| loss.is_met);
    report.duration_s = start.elapsed().as_secs_f64();
    Ok(report)
}

/// Nanoseconds of an operation.
fn time(operations: &mut dyn Loop, count: u64) -> Result<f64, Error> {
    interrupt::check()?;
    let start = Instant::now();
    operations.run(count)?;
    Ok(start.elapsed().as_nanos() as f64 / count as f64)
}

/// Measures as [`time`], after uncounted operations: loading and unloading programs leaves caches cold and work undone
/// behind.
fn settled_time(operations: &mut dyn Loop, count: u64) -> Result<f64, Error> {
    operations.run(count / 4 + 1)?;
    time(operations, count)
}

/// How many operations take about as long as a slice.
fn calibrate(operations: &mut dyn Loop, slice: Duration) -> Result<u64, Error> {
    let mut count = 1;
    loop {
        let spent = time(operations, count)? * count as f64;
        let wanted = slice.as_nanos() as f64;
        if spent * 8.0 >= wanted {
            return Ok((count as f64 * wanted / spent.max(1.0)).ceil().max(1.0) as u64);
        }
        count *= 4;
    }
}

/// Everything is loaded once; a round attaches it for one slice of three. Loading again would leave the kernel with work to do in the
/// slices after it.
fn measure_loss(workload: Workload, share: Duration, options: &ProbesOptions) -> Result<Loss, Error> {
    let mut operations = workload.prepare(&options.directory)?;
    let mut session = Session::all()?;
    // Not earlier: the thread that reads the rings stays free to run elsewhere.
    let _one_cpu = OneCpu::take()?;
    session.suspend()?;
    let place = |error| Error::Invalid(format!("programs that do nothing cannot be attached: {error}"));
    let mut empties =
        EmptyPrograms::for_programs(PROGRAMS.iter().filter(|program| program.by_default)).map_err(place)?;
    let count = calibrate(&mut *operations, options.slice)?;
    let (mut without, mut with, mut losses, mut empty_losses) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let start = Instant::now();
    while without.len() < ROUNDS_MIN || start.elapsed() < share {
        let mut measured = [0.0; 3];
        // The order rotates, so that a drift of the machine favours none.
        for turn in 0..3 {
            let slice = (without.len() + turn) % 3;
            match slice {
                EVERYTHING => session.resume()?,
                EMPTY => drop(empties.attach().map_err(place)?),
                _ => {}
            }
            measured[slice] = settled_time(&mut *operations, count)?;
            match slice {
                EVERYTHING => session.suspend()?,
                EMPTY => empties.detach().map_err(place)?,
                _ => {}
            }
        }
        let loss = |slice: usize| (measured[slice] - measured[NOTHING]) / measured[NOTHING] * 100.0;
        losses.push(loss(EVERYTHING));
        empty_losses.push(loss(EMPTY));
        without.push(measured[NOTHING]);
        with.push(measured[EVERYTHING]);
    }
    let loss_percent = Spread::of(losses);
    Ok(Loss {
        workload: workload.name().into(),
        operation: workload.operation().into(),
        rounds: without.len(),
        without_ns: Spread::of(without),
        with_ns: Spread::of(with),
        loss_percent,
        empty_loss_percent: Spread::of(empty_losses),
        goal_percent: LOSS_GOAL_PERCENT,
        is_met: loss_percent.median < LOSS_GOAL_PERCENT,
    })
}

/// Keeps the calling thread, and the processes that it starts from now on, on the last CPU that it may use. Whether a loop's
/// processes meet on one CPU or on two makes more of a difference than what is to be measured.
struct OneCpu(CpuSet);

impl OneCpu {
    fn take() -> Result<Self, Error> {
        let what = || "choose a CPU".into();
        let before = sched_getaffinity(None).context(what)?;
        let mut one = CpuSet::new();
        if let Some(cpu) = (0..CpuSet::MAX_CPU).rev().find(|&cpu| before.is_set(cpu)) {
            one.set(cpu);
            sched_setaffinity(None, &one).context(what)?;
        }
        Ok(Self(before))
    }
}

impl Drop for OneCpu {
    fn drop(&mut self) {
        // It was allowed before.
        let _ = sched_setaffinity(None, &self.0);
    }
}

/// What the rounds of a program gave.
#[derive(Default)]
struct Rounds {
    without: Vec<f64>,
    with: Vec<f64>,
    cost: Vec<f64>,
    rate: Vec<f64>,
    run: Vec<f64>,
    empty: Vec<f64>,
    bare: Vec<f64>,
    record: Vec<f64>,
    runs: u64,
    records: u64,
    operations: u64,
}

fn measure_program(program: &ProgramInfo, share: Duration, options: &ProbesOptions) -> Result<ProgramCost, Error> {
    let mut cost = ProgramCost {
        program: program.name.into(),
        hook: program.hook.into(),
        lane: program.lane.name().into(),
        ..ProgramCost::default()
    };
    let Some(workload) = Workload::for_hook(program.hook) else {
        cost.why = Some("no loop makes this happen often".into());
        return Ok(cost);
    };
    cost.workload = Some(workload.name().into());
    cost.operation = Some(workload.operation().into());
    let mut operations = match workload.prepare(&options.directory) {
        Ok(operations) => operations,
        Err(Error::Interrupted) => return Err(Error::Interrupted),
        Err(error) => {
            cost.why = Some(error.to_string());
            return Ok(cost);
        }
    };
    let count = calibrate(&mut *operations, options.slice)?;
    let mut rounds = Rounds::default();
    let start = Instant::now();
    while rounds.without.len() < ROUNDS_MIN || start.elapsed() < share {
        if !round(program, &mut *operations, count, &mut rounds)? {
            cost.why = Some("this kernel does not take it: see tapio-collector probes".into());
            return Ok(cost);
        }
    }
    cost.rounds = rounds.without.len();
    let some = |values: Vec<f64>| (!values.is_empty()).then(|| Spread::of(values));
    cost.without_ns = some(rounds.without);
    cost.with_ns = some(rounds.with);
    cost.cost_ns = some(rounds.cost);
    cost.records_per_second = some(rounds.rate).map(|rate| rate.median);
    cost.run_ns = some(rounds.run);
    cost.empty_run_ns = some(rounds.empty);
    cost.record_ns = some(rounds.record);
    cost.bare_record_ns = some(rounds.bare);
    cost.runs_per_operation = Some(rounds.runs as f64 / rounds.operations as f64);
    cost.records_per_operation = Some(rounds.records as f64 / rounds.operations as f64);
    if rounds.runs == 0 {
        cost.why = Some(format!("the loop does not fire it; is {} on a disk?", options.directory.display()));
    }
    Ok(cost)
}

/// The five slices of a round; whether this kernel takes the program.
fn round(program: &ProgramInfo, operations: &mut dyn Loop, count: u64, rounds: &mut Rounds) -> Result<bool, Error> {
    let is_first = rounds.without.len().is_multiple_of(2);
    let mut without = if is_first { settled_time(operations, count)? } else { 0.0 };
    {
        let Some(session) = Session::only(program)? else {
            return Ok(false);
        };
        operations.run(count / 4 + 1)?;
        let before = session.records(&[program]);
        let with = time(operations, count)?;
        let records = session.records(&[program]) - before;
        rounds.with.push(with);
        rounds.rate.push(records as f64 * 1e9 / (with * count as f64));
        let _counting = count_run_time()?;
        session.tune(emit_all())?;
        let (ran, wrote) = (session.run_time(program), session.records(&[program]));
        time(operations, count)?;
        let ran = session.run_time(program).since(ran);
        let wrote = session.records(&[program]) - wrote;
        session.tune(Tuning::default())?;
        let empty = yardstick_run(Yardstick::empty(program.hook), operations, count)?;
        let bare = yardstick_run(Yardstick::bare(program.hook), operations, count)?;
        rounds.runs += ran.runs;
        rounds.records += wrote;
        rounds.operations += count;
        rounds.empty.extend(empty);
        rounds.bare.extend(empty.zip(bare).map(|(empty, bare)| bare - empty));
        if ran.runs > 0 {
            rounds.run.push(ran.ns as f64 / ran.runs as f64);
        }
        if let (Some(empty), 1..) = (empty, wrote) {
            rounds.record.push((ran.ns as f64 - empty * ran.runs as f64) / wrote as f64);
        }
    }
    if !is_first {
        without = settled_time(operations, count)?;
    }
    rounds.without.push(without);
    rounds.cost.push(rounds.with[rounds.with.len() - 1] - without);
    Ok(true)
}

/// Nanoseconds of a run of a program to compare with, beside the program itself; `None` where the hook is no raw tracepoint or
/// did not fire.
fn yardstick_run(
    yardstick: std::io::Result<Yardstick>,
    operations: &mut dyn Loop,
    count: u64,
) -> Result<Option<f64>, Error> {
    let Ok(yardstick) = yardstick else {
        return Ok(None);
    };
    let _reading = Reading::of(&yardstick)?;
    let before = yardstick.run_time();
    time(operations, count)?;
    let ran = yardstick.run_time().since(before);
    Ok((ran.runs > 0).then(|| ran.ns as f64 / ran.runs as f64))
}
