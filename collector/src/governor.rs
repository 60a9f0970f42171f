//! The governor: holds the collector to its CPU budget by keeping less of the bulk lane.
//!
//! What enters: the CPU time of this process, and of its probes inside the kernel, once a second. What leaves: how many bulk
//! events are kept, one in so many, by the probes before they touch a ring and by the intake for every other source. What
//! must hold: the lethal lane is never touched; what is left out is counted as `dropped{filter, sampled}`; a second's work more
//! or less changes nothing, since decisions look at a window.
//!
//! The probes' time is measured in one second of [`MEASURE_EVERY`] and stands for the others: measuring all the time would
//! cost about as much as the probes do. While sampling changes it is measured in every second: an old figure would be held
//! against each new decision. Where the kernel does not let it be measured, the process's own time is all that
//! counts, and `/readyz` says so.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use tapio_probes::{Controls, Measuring, RunTimes};

const TICK: Duration = Duration::from_secs(1);
/// Seconds that a decision looks at.
const WINDOW: usize = 5;
/// One in so many ticks measures the probes.
const MEASURE_EVERY: u64 = 8;
/// One event in so many is the least that is kept.
const SAMPLING_MAX: u32 = 4096;
/// Above this share of the budget less is kept: where a cgroup's quota equals the budget no more than that can be used.
const OVER_SHARE: f64 = 0.95;
/// Below this share of the budget there is room to keep more.
const ROOM_SHARE: f64 = 0.75;
/// Ticks with room before more is kept.
const CALM_TICKS: u32 = 5;
/// Ticks within the budget, without that room, before it is tried whether a little more fits: where a collector's CPU is mostly
/// waking, what was left out has hardly saved any.
const TRIAL_TICKS: u32 = 10;

/// Nanoseconds by program.
type ProgramTimes = Vec<(&'static str, u64)>;

/// What the governor does, for metrics, `/readyz` and the intake.
#[derive(Default)]
pub struct Governed {
    /// Thousandths of a core; 0 for no limit.
    pub budget_milli: u64,
    /// One bulk event in so many is kept; 0 counts as 1.
    sampling: AtomicU32,
    /// Of the window, thousandths of a core.
    pub used_milli: AtomicU64,
    /// Of that, the probes inside the kernel.
    pub kernel_milli: AtomicU64,
    /// Whether the kernel's part is known.
    pub is_kernel_measured: AtomicBool,
    /// Decisions to keep less, and to keep more.
    pub raised: AtomicU64,
    pub lowered: AtomicU64,
    /// Nanoseconds of each program, by estimate.
    pub programs: std::sync::Mutex<ProgramTimes>,
}

impl Governed {
    /// Nothing is sampled away yet.
    pub fn new(budget_milli: u64) -> Self {
        Self { budget_milli, ..Self::default() }
    }

    /// One bulk event in so many is kept.
    pub fn sampling(&self) -> u32 {
        self.sampling.load(Ordering::Relaxed).max(1)
    }
}

/// Decides, from what was used and what may be.
struct Controller {
    budget_milli: f64,
    window: VecDeque<f64>,
    sampling: u32,
    /// Ticks in a row with room, and within the budget without it.
    calm: u32,
    close: u32,
}

impl Controller {
    fn new(budget_milli: f64) -> Self {
        Self { budget_milli, window: VecDeque::with_capacity(WINDOW), sampling: 1, calm: 0, close: 0 }
    }

    fn used_milli(&self) -> f64 {
        self.window.iter().sum::<f64>() / self.window.len().max(1) as f64
    }

    /// Takes a second's use; how many there are to one that is kept from now on.
    fn decide(&mut self, used_milli: f64) -> u32 {
        if self.window.len() == WINDOW {
            self.window.pop_front();
        }
        self.window.push_back(used_milli);
        let used = self.used_milli();
        let limit = self.budget_milli * OVER_SHARE;
        if used > limit && used_milli > limit {
            // By as much as it is too much, since what bulk costs falls with it; and what it began with in the window is not
            // to be counted against the new value.
            let factor = (used_milli / limit).clamp(1.25, 4.0);
            self.sampling = ((f64::from(self.sampling) * factor).ceil() as u32).min(SAMPLING_MAX);
            (self.calm, self.close) = (0, 0);
        } else if used < self.budget_milli * ROOM_SHARE {
            (self.calm, self.close) = (self.calm + 1, 0);
            if self.calm >= CALM_TICKS {
                self.keep_more(8);
            }
        } else if used <= limit {
            (self.calm, self.close) = (0, self.close + 1);
            if self.close >= TRIAL_TICKS {
                self.keep_more(4);
                self.close = 0;
            }
        } else {
            (self.calm, self.close) = (0, 0);
        }
        self.sampling
    }

    /// Samples less, by the `part`th part of the factor and by one at least.
    fn keep_more(&mut self, part: u32) {
        self.sampling = self.sampling.saturating_sub((self.sampling / part).max(1)).max(1);
    }
}

/// See the module.
pub struct Governor {
    governed: Arc<Governed>,
    controls: Option<Arc<Controls>>,
    run_times: Option<RunTimes>,
    /// The log says that not everything is kept.
    is_told: bool,
}

impl Governor {
    /// For the probes, where they run.
    pub fn new(governed: Arc<Governed>, controls: Option<Arc<Controls>>, run_times: Option<RunTimes>) -> Self {
        Self { governed, controls, run_times, is_told: false }
    }

    /// Looks and decides, for ever.
    pub async fn run(mut self) {
        let governed = Arc::clone(&self.governed);
        let mut controller = Controller::new(governed.budget_milli as f64);
        let mut interval = tokio::time::interval(TICK);
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let (mut at, mut cpu_ns) = (Instant::now(), process_cpu_ns());
        let mut measuring: Option<(Measuring, ProgramTimes, Instant)> = None;
        let mut kernel_milli = 0.0;
        // The tick at whose end the last measurement ended, and the one from which on the next is due.
        let (mut measured, mut due) = (0, 0);
        for tick in 0u64.. {
            interval.tick().await;
            let (now, cpu_now_ns) = (Instant::now(), process_cpu_ns());
            let wall_ns = now.duration_since(at).as_nanos() as f64;
            if wall_ns < 1e6 {
                continue;
            }
            let own_milli = (cpu_now_ns - cpu_ns) as f64 * 1000.0 / wall_ns;
            (at, cpu_ns) = (now, cpu_now_ns);
            if let Some((guard, before, since)) = measuring.take()
                && let Some(times) = &self.run_times
            {
                let after: Vec<_> = times.get().collect();
                drop(guard);
                let spent: u64 = after.iter().zip(&before).map(|(after, before)| after.1 - before.1).sum();
                kernel_milli = spent as f64 * 1000.0 / since.elapsed().as_nanos() as f64;
                let mut programs = governed.programs.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                programs.resize(after.len(), ("", 0));
                for ((total, after), before) in programs.iter_mut().zip(&after).zip(&before) {
                    *total = (after.0, total.1 + (after.1 - before.1) * (tick - measured));
                }
                measured = tick;
            }
            let before = governed.sampling();
            let sampling = controller.decide(own_milli + kernel_milli);
            governed.used_milli.store(controller.used_milli().round() as u64, Ordering::Relaxed);
            governed.kernel_milli.store(kernel_milli.round() as u64, Ordering::Relaxed);
            if governed.budget_milli > 0 && sampling != before {
                self.apply(before, sampling);
                due = tick;
            }
            if tick >= due
                && let Some(times) = &self.run_times
            {
                match times.measure() {
                    Ok(guard) => measuring = Some((guard, times.get().collect(), Instant::now())),
                    Err(error) => tracing::debug!(%error, "the kernel does not tell what the probes cost"),
                }
                governed.is_kernel_measured.store(measuring.is_some(), Ordering::Relaxed);
                due = tick + MEASURE_EVERY;
            }
        }
    }

    fn apply(&mut self, before: u32, sampling: u32) {
        let counter = if sampling > before { &self.governed.raised } else { &self.governed.lowered };
        counter.fetch_add(1, Ordering::Relaxed);
        self.governed.sampling.store(sampling, Ordering::Relaxed);
        // Where the cost is close to the budget it may go to and fro between all and every second event for ever.
        let is_news = if self.is_told { sampling == 1 } else { sampling > 2 };
        if is_news {
            self.is_told = !self.is_told;
            let used = self.governed.used_milli.load(Ordering::Relaxed);
            tracing::info!(
                used_milli = used,
                budget_milli = self.governed.budget_milli,
                keep_one_in = sampling,
                "CPU budget"
            );
        }
        if let Some(controls) = &self.controls
            && let Err(error) = controls.update(|tuning| tuning.bulk_sampling = sampling)
        {
            tracing::warn!(%error, "the probes' sampling cannot be changed");
        }
    }
}

/// CPU time of this process, nanoseconds.
pub fn process_cpu_ns() -> u64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine whose cost is a fixed part and a part that falls with sampling.
    fn settle(controller: &mut Controller, fixed_milli: f64, bulk_milli: f64, seconds: usize) -> Vec<(u32, f64)> {
        let mut sampling = controller.sampling;
        let second = |_| {
            let used = fixed_milli + bulk_milli / f64::from(sampling);
            sampling = controller.decide(used);
            (sampling, used)
        };
        (0..seconds).map(second).collect()
    }

    #[test]
    fn a_storm_is_brought_under_the_budget_within_seconds_and_stays_there() {
        let mut controller = Controller::new(10.0);
        let seconds = settle(&mut controller, 2.0, 500.0, 60);
        assert!(seconds[10..].iter().all(|(_, used)| *used <= 12.0), "{seconds:?}");
        let mean = seconds[20..].iter().map(|(_, used)| used).sum::<f64>() / 40.0;
        assert!((6.0..10.5).contains(&mean), "the budget is used and held: {mean}");
    }

    #[test]
    fn when_the_storm_is_over_everything_is_kept_again() {
        let mut controller = Controller::new(10.0);
        settle(&mut controller, 2.0, 500.0, 30);
        assert!(controller.sampling > 10);
        assert_eq!(settle(&mut controller, 2.0, 5.0, 60).last().expect("seconds").0, 1);
    }

    #[test]
    fn what_was_left_out_in_vain_is_kept_again() {
        let mut controller = Controller::new(10.0);
        settle(&mut controller, 30.0, 0.0, 4);
        assert!(controller.sampling > 10);
        // Above three quarters of the budget, and within it, however much is kept.
        assert_eq!(settle(&mut controller, 8.5, 0.5, 300).last().expect("seconds").0, 1);
        // Where not everything fits, about as much as fits.
        settle(&mut controller, 30.0, 0.0, 4);
        let seconds = settle(&mut controller, 8.5, 4.0, 600).split_off(300);
        assert!(seconds.iter().all(|(sampling, used)| *sampling <= 8 && *used <= 10.6), "{seconds:?}");
        let mean = seconds.iter().map(|(_, used)| used).sum::<f64>() / 300.0;
        assert!((8.9..9.6).contains(&mean), "the budget is used and held: {mean}");
    }

    #[test]
    fn close_to_the_budget_more_is_kept_by_steps_far_apart() {
        let mut controller = Controller::new(10.0);
        settle(&mut controller, 100.0, 0.0, 12);
        let storm = controller.sampling;
        settle(&mut controller, 2.0, 0.0, 16);
        let with_room = controller.sampling;
        assert!(with_room < storm);
        // Whatever was counted with room does not count here, and the other way round.
        let seconds = settle(&mut controller, 9.0, 0.0, 12);
        assert!(seconds[5..].iter().all(|(sampling, _)| *sampling == seconds[4].0), "{seconds:?}");
        let close = controller.sampling;
        settle(&mut controller, 9.0, 0.0, 9);
        assert_eq!(controller.sampling, close - close / 4);
    }

    #[test]
    fn one_busy_second_changes_nothing_and_a_hopeless_case_is_bounded() {
        let mut controller = Controller::new(10.0);
        settle(&mut controller, 1.0, 1.0, 10);
        assert_eq!(controller.decide(30.0), 1);
        let seconds = settle(&mut controller, 50.0, 50.0, 100);
        assert_eq!(seconds.last().expect("seconds").0, SAMPLING_MAX);
    }
}
