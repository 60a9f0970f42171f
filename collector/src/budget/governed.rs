//! What the governor has decided and measured, for every thread that asks.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use prometheus::{CounterVec, Opts};

use crate::base::metrics::{Metrics, raise};

/// Nanoseconds by program.
pub(super) type ProgramTimes = Vec<(&'static str, u64)>;

/// What the governor does, for metrics, `/readyz` and the intake.
#[derive(Default)]
pub struct Governed {
    /// Thousandths of a core; 0 for no limit.
    pub budget_milli: u64,
    /// One of this many bulk events is kept; 0 counts as 1.
    pub(super) sampling: AtomicU32,
    /// CPU used in the window, thousandths of a core.
    pub used_milli: AtomicU64,
    /// CPU used by the probes in the kernel, part of `used_milli`.
    pub kernel_milli: AtomicU64,
    /// CPU time of this process until its start was over, nanoseconds, and whether it is.
    pub start_cpu_ns: AtomicU64,
    pub has_started: AtomicBool,
    /// Nanoseconds that the work for the whole cluster took, counted where it is done, and the window's thousandths of a core.
    pub cluster_cpu_ns: Arc<AtomicU64>,
    pub cluster_milli: AtomicU64,
    /// Whether the kernel's part is known.
    pub is_kernel_measured: AtomicBool,
    /// Decisions to keep less, and to keep more.
    pub raised: AtomicU64,
    pub lowered: AtomicU64,
    /// Nanoseconds of each program, by estimate.
    pub programs: Mutex<ProgramTimes>,
}

impl Governed {
    /// Nothing is sampled away yet.
    pub fn new(budget_milli: u64) -> Self {
        Self { budget_milli, ..Self::default() }
    }

    /// Returns the sampling factor: one of this many bulk events is kept.
    pub fn sampling(&self) -> u32 {
        self.sampling.load(Ordering::Relaxed).max(1)
    }

    /// Registers its metrics.
    ///
    /// # Errors
    /// When two metrics have the same name.
    pub fn register(self: &Arc<Self>, metrics: &mut Metrics) -> Result<(), prometheus::Error> {
        let milli = metrics.gauges(
            "tapio_collector_governor_cpu_millicores",
            "CPU in thousandths of a core: budget (0 for none), used, probes (part of used) and cluster (not part of used)",
            &["what"],
        )?;
        let keep_one_in = metrics.gauge(
            "tapio_collector_governor_keep_one_in",
            "One of this many bulk events is kept, to stay within the CPU budget",
        )?;
        let decisions = metrics.counters(
            "tapio_collector_governor_decisions_total",
            "Decisions of the governor to keep less or more of the bulk lane",
            &["keep"],
        )?;
        let start_cpu_ms = metrics.gauge(
            "tapio_collector_start_cpu_milliseconds",
            "CPU time of this process's start, which does not count towards the CPU budget",
        )?;
        let cluster_cpu_ms = metrics.counter(
            "tapio_collector_cluster_cpu_milliseconds_total",
            "CPU time of the elected collector's cluster watches, which does not count towards the CPU budget",
        )?;
        let name = "tapio_collector_probe_run_seconds_total";
        let probe_run = Opts::new(name, "Run time of a probe, measured in one second of 8");
        let probe_run = metrics.register(CounterVec::new(probe_run, &["program"])?)?;
        let governed = Arc::clone(self);
        metrics.on_scrape(move || {
            let load = |value: &AtomicU64| value.load(Ordering::Relaxed);
            for (what, value) in [
                ("budget", governed.budget_milli),
                ("used", load(&governed.used_milli)),
                ("probes", load(&governed.kernel_milli)),
                ("cluster", load(&governed.cluster_milli)),
            ] {
                milli.with_label_values(&[what]).set(value as i64);
            }
            start_cpu_ms.set((load(&governed.start_cpu_ns) / 1_000_000) as i64);
            raise(&cluster_cpu_ms, load(&governed.cluster_cpu_ns) / 1_000_000);
            keep_one_in.set(i64::from(governed.sampling()));
            for (keep, count) in [("less", &governed.raised), ("more", &governed.lowered)] {
                raise(&decisions.with_label_values(&[keep]), load(count));
            }
            for (program, ns) in governed.programs.lock().unwrap_or_else(PoisonError::into_inner).iter() {
                let counter = probe_run.with_label_values(&[program]);
                counter.inc_by((*ns as f64 / 1e9 - counter.get()).max(0.0));
            }
        });
        Ok(())
    }
}
