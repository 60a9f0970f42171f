//! The governor: holds the collector to its CPU budget by keeping less of the bulk lane.
//!
//! What enters: the CPU time of this process, and of its probes inside the kernel, once a second. What leaves: the
//! sampling factor. The probes apply it before they touch a ring, and the intake does for every other source. What must
//! hold: the lethal lane is never touched. Each event left out is counted as `dropped{filter, sampled}`. One busy
//! second changes nothing, since decisions look at a window.
//!
//! The budget is a sustained one. What the start costs (loading probes, the first scan, the first lists and descriptions) is
//! counted apart and not held against the minutes after it. The start is over at the first [`WINDOW`] within the budget, and
//! at the latest after [`START_MAX`] or [`START_CPU_NS_MAX`]: a collector that never settles is governed like any other. What
//! the elected collector does for the whole cluster is counted apart too: to sample this node's events would not save it. Its
//! own metric shows it, and the log says when it alone is more than the budget.
//!
//! The probes' time is measured in one second of [`MEASURE_EVERY`] and stands for the others: measuring all the time would
//! cost about as much as the probes do. While sampling changes it is measured in every second: an old figure would be held
//! against each new decision. Where the kernel does not let it be measured, the process's own time is all that
//! counts, and `/readyz` says so.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use tapio_probes::{Controls, Measuring, RunTimes};

use crate::budget::governed::{Governed, ProgramTimes};

const TICK: Duration = Duration::from_secs(1);
/// Seconds that a decision looks at.
const WINDOW: usize = 5;
/// The longest that a start may take, in ticks, and the most CPU that it may use after the governor began.
const START_MAX: u32 = 30;
const START_CPU_NS_MAX: u64 = 5_000_000_000;
/// Ticks between two measurements of the probes.
const MEASURE_EVERY: u64 = 8;
/// Maximum sampling factor: at least one of this many events is kept.
const SAMPLING_MAX: u32 = 4096;
/// Above this share of the budget less is kept: where a cgroup's quota equals the budget no more than that can be used.
const OVER_SHARE: f64 = 0.95;
/// Below this share of the budget there is room to keep more.
const ROOM_SHARE: f64 = 0.75;
/// Ticks with room before more is kept.
const CALM_TICKS: u32 = 5;
/// Ticks within the budget, without that room, before sampling is lowered a little as a trial. Where wakeups take most
/// of a collector's CPU, sampling hardly saves any.
const TRIAL_TICKS: u32 = 10;

/// Decides, from what was used and what may be.
struct Controller {
    budget_milli: f64,
    /// Ticks of the start so far, and what they used; `None` when it is over.
    start: Option<(u32, f64)>,
    window: VecDeque<f64>,
    sampling: u32,
    /// Ticks in a row with room, and within the budget without it.
    calm: u32,
    close: u32,
}

impl Controller {
    fn new(budget_milli: f64) -> Self {
        let window = VecDeque::with_capacity(WINDOW);
        Self { budget_milli, start: Some((0, 0.0)), window, sampling: 1, calm: 0, close: 0 }
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
        if let Some((ticks, spent_milli)) = &mut self.start {
            *ticks += 1;
            *spent_milli += used_milli;
            let is_settled = self.window.len() == WINDOW && used <= limit;
            let is_enough = *ticks >= START_MAX || *spent_milli * 1e6 >= START_CPU_NS_MAX as f64;
            if is_settled || is_enough {
                self.start = None;
                // What the start used is not to be counted against the first decisions.
                self.window.clear();
            }
            return self.sampling;
        }
        if used > limit && used_milli > limit {
            // In proportion to the excess, since the cost of bulk events falls with it. The last second must exceed the
            // limit too: the window still has use from before the present value.
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

    /// Lowers the sampling factor by 1/`part`, at least by 1.
    fn keep_more(&mut self, part: u32) {
        self.sampling = self.sampling.saturating_sub((self.sampling / part).max(1)).max(1);
    }
}

/// What the work for the cluster uses, over a window as long as a report needs to be of interest.
#[derive(Default)]
struct ClusterShare {
    window: VecDeque<f64>,
    is_reported: bool,
}

impl ClusterShare {
    /// Seconds that are looked at: longer than the lists at the start of a term take.
    const SECONDS: usize = 60;

    /// Takes a second's use; the window's.
    fn add(&mut self, milli: f64) -> f64 {
        if self.window.len() == Self::SECONDS {
            self.window.pop_front();
        }
        self.window.push_back(milli);
        self.window.iter().sum::<f64>() / self.window.len() as f64
    }

    /// Whether it is over the budget for a whole window, for the first time.
    fn is_news(&mut self, budget_milli: f64) -> bool {
        let is_over = self.window.len() == Self::SECONDS
            && budget_milli > 0.0
            && self.window.iter().sum::<f64>() > budget_milli * Self::SECONDS as f64;
        is_over && !std::mem::replace(&mut self.is_reported, true)
    }
}

/// A future that counts the CPU time of the thread that polls it.
pub struct Metered<F> {
    inner: Pin<Box<F>>,
    cpu_ns: Arc<AtomicU64>,
}

impl<F: Future> Metered<F> {
    /// Adds what `inner` uses to `cpu_ns`.
    pub fn new(inner: F, cpu_ns: Arc<AtomicU64>) -> Self {
        Self { inner: Box::pin(inner), cpu_ns }
    }
}

impl<F: Future> Future for Metered<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        let before = cpu_ns_of(ClockId::ThreadCPUTime);
        let polled = self.inner.as_mut().poll(context);
        self.cpu_ns.fetch_add(cpu_ns_of(ClockId::ThreadCPUTime) - before, Ordering::Relaxed);
        polled
    }
}

/// Compares CPU use with the budget and sets how much of the bulk lane is kept.
pub struct Governor {
    governed: Arc<Governed>,
    controls: Option<Arc<Controls>>,
    run_times: Option<RunTimes>,
    /// The log says that not everything is kept.
    is_reported: bool,
}

impl Governor {
    /// Makes a governor; `controls` are the probes' controls, where they run.
    pub fn new(governed: Arc<Governed>, controls: Option<Arc<Controls>>, run_times: Option<RunTimes>) -> Self {
        Self { governed, controls, run_times, is_reported: false }
    }

    /// Looks and decides, for ever.
    pub async fn run(mut self) {
        let governed = Arc::clone(&self.governed);
        let mut controller = Controller::new(governed.budget_milli as f64);
        let mut interval = tokio::time::interval(TICK);
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let (mut at, mut cpu_ns) = (Instant::now(), process_cpu_ns());
        let mut cluster_ns = governed.cluster_cpu_ns.load(Ordering::Relaxed);
        let mut cluster = ClusterShare::default();
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
            let cluster_now_ns = governed.cluster_cpu_ns.load(Ordering::Relaxed);
            let own_ns = (cpu_now_ns - cpu_ns).saturating_sub(cluster_now_ns - cluster_ns);
            let own_milli = own_ns as f64 * 1000.0 / wall_ns;
            let cluster_milli = cluster.add((cluster_now_ns - cluster_ns) as f64 * 1000.0 / wall_ns);
            cluster_ns = cluster_now_ns;
            governed.cluster_milli.store(cluster_milli.round() as u64, Ordering::Relaxed);
            if cluster.is_news(governed.budget_milli as f64) {
                tracing::info!(
                    cluster_milli = cluster_milli.round() as u64,
                    budget_milli = governed.budget_milli,
                    "cluster watches use more than the CPU budget; the governor does not sample for them"
                );
            }
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
            if !governed.has_started.load(Ordering::Relaxed) {
                governed.start_cpu_ns.store(cpu_now_ns, Ordering::Relaxed);
                if controller.start.is_none() {
                    governed.has_started.store(true, Ordering::Relaxed);
                }
                if controller.start.is_none() && governed.budget_milli > 0 {
                    tracing::info!(
                        cpu_ms = cpu_now_ns / 1_000_000,
                        "start finished: the CPU budget applies from now on"
                    );
                }
            }
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
                    Err(error) => tracing::debug!(%error, "the kernel does not report what the probes cost"),
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
        let is_news = if self.is_reported { sampling == 1 } else { sampling > 2 };
        if is_news {
            self.is_reported = !self.is_reported;
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
            tracing::warn!(%error, "cannot change the probes' sampling");
        }
    }
}

/// CPU time of this process, nanoseconds.
pub fn process_cpu_ns() -> u64 {
    cpu_ns_of(ClockId::ProcessCPUTime)
}

fn cpu_ns_of(clock: ClockId) -> u64 {
    let time = clock_gettime(clock);
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

    fn started() -> Controller {
        Controller { start: None, ..Controller::new(10.0) }
    }

    #[test]
    fn the_cost_of_the_start_does_not_count_later() {
        let mut controller = Controller::new(10.0);
        for second in [400.0, 900.0, 700.0, 200.0, 60.0, 12.0, 3.0] {
            assert_eq!(controller.decide(second), 1, "loading, scanning, describing");
        }
        let after = settle(&mut controller, 3.0, 2.0, 60);
        assert!(after.iter().all(|(sampling, _)| *sampling == 1), "everything is kept: {after:?}");
        // A storm after that is brought under the budget as before.
        assert!(settle(&mut controller, 2.0, 500.0, 10).last().expect("seconds").0 > 10);
    }

    #[test]
    fn a_collector_that_never_settles_is_governed_after_a_while() {
        let mut by_time = Controller::new(10.0);
        let seconds = settle(&mut by_time, 2.0, 100.0, 40);
        assert!(seconds[..START_MAX as usize].iter().all(|(sampling, _)| *sampling == 1), "{seconds:?}");
        assert!(seconds[START_MAX as usize + 4..].iter().all(|(sampling, _)| *sampling > 4), "{seconds:?}");
        let mut by_cpu = Controller::new(10.0);
        let seconds = settle(&mut by_cpu, 0.0, 2000.0, 10);
        let governed = seconds.iter().position(|(sampling, _)| *sampling > 1).expect("governed");
        assert!(governed as u64 <= START_CPU_NS_MAX / 2_000_000_000 + 1, "{seconds:?}");
    }

    #[test]
    fn cluster_work_above_the_budget_is_reported_once() {
        let mut share = ClusterShare::default();
        // The lists at the start of a term are no news.
        let mut news = 0;
        for second in 0..240 {
            share.add(if second < 5 { 500.0 } else { 4.0 });
            news += u32::from(second > ClusterShare::SECONDS && share.is_news(100.0));
        }
        assert_eq!(news, 0);
        for _ in 0..240 {
            share.add(15.0);
            news += u32::from(share.is_news(10.0));
        }
        assert_eq!(news, 1);
    }

    #[tokio::test]
    async fn a_metered_future_counts_the_cost_of_its_polls_only() {
        let cpu_ns = Arc::<AtomicU64>::default();
        let busy = || {
            let from = cpu_ns_of(ClockId::ThreadCPUTime);
            while cpu_ns_of(ClockId::ThreadCPUTime) - from < 20_000_000 {}
        };
        let work = async {
            busy();
            tokio::task::yield_now().await;
            busy();
        };
        let began = process_cpu_ns();
        futures::join!(Metered::new(work, Arc::clone(&cpu_ns)), async { busy() });
        let counted = cpu_ns.load(Ordering::Relaxed);
        let all = process_cpu_ns() - began;
        assert!(counted >= 40_000_000 && counted + 20_000_000 <= all, "{counted} of {all}");
    }

    #[test]
    fn a_storm_is_under_the_budget_within_seconds() {
        let mut controller = started();
        let seconds = settle(&mut controller, 2.0, 500.0, 60);
        assert!(seconds[10..].iter().all(|(_, used)| *used <= 12.0), "{seconds:?}");
        let mean = seconds[20..].iter().map(|(_, used)| used).sum::<f64>() / 40.0;
        assert!((6.0..10.5).contains(&mean), "the budget is used and held: {mean}");
    }

    #[test]
    fn when_the_storm_is_over_everything_is_kept_again() {
        let mut controller = started();
        settle(&mut controller, 2.0, 500.0, 30);
        assert!(controller.sampling > 10);
        assert_eq!(settle(&mut controller, 2.0, 5.0, 60).last().expect("seconds").0, 1);
    }

    #[test]
    fn what_was_left_out_in_vain_is_kept_again() {
        let mut controller = started();
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
    fn close_to_the_budget_steps_are_far_apart() {
        let mut controller = started();
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
    fn one_busy_second_changes_nothing_and_sampling_is_bounded() {
        let mut controller = started();
        settle(&mut controller, 1.0, 1.0, 10);
        assert_eq!(controller.decide(30.0), 1);
        let seconds = settle(&mut controller, 50.0, 50.0, 100);
        assert_eq!(seconds.last().expect("seconds").0, SAMPLING_MAX);
    }
}
