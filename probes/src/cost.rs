//! What programs cost, as the kernel itself measures it, and programs to compare with: one that does nothing, and one that does
//! no more than to put a record into a ring.
//!
//! In: the name of a raw tracepoint. Out: runs and nanoseconds. Held: the kernel's accounting, switched on as long as the
//! descriptor of [`count_run_time`] is open; it costs every BPF program of the machine two readings of a clock a run, so
//! nothing but a measurement switches it on.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use aya::Ebpf;
use aya::programs::{Program, ProgramError, RawTracePoint};
use aya::sys::{Stats, enable_stats};

static EMPTY: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/empty.bpf.o"));
static BARE: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/bare.bpf.o"));
/// The size of its ring in `bare.bpf.c`.
const BARE_RING_BYTES: usize = 1 << 20;

/// What the kernel measured of one program.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RunTime {
    /// How often it ran.
    pub runs: u64,
    /// How long that took, all together.
    pub ns: u64,
}

impl RunTime {
    /// What was added since `earlier`.
    pub fn since(self, earlier: Self) -> Self {
        Self { runs: self.runs.saturating_sub(earlier.runs), ns: self.ns.saturating_sub(earlier.ns) }
    }
}

/// Has the kernel measure every BPF program while the descriptor is open (`BPF_ENABLE_STATS`).
///
/// # Errors
/// Without CAP_SYS_ADMIN.
pub fn count_run_time() -> io::Result<OwnedFd> {
    enable_stats(Stats::RunTime).map_err(|error| error.io_error)
}

/// What the kernel measured of a loaded program.
pub(crate) fn run_time(program: &Program) -> Option<RunTime> {
    run_time_of(program.fd().ok()?.as_fd())
}

/// The same by the program's descriptor: from its `/proc/PID/fdinfo`.
pub(crate) fn run_time_of(program: BorrowedFd<'_>) -> Option<RunTime> {
    parse(&std::fs::read_to_string(format!("/proc/self/fdinfo/{}", program.as_raw_fd())).ok()?)
}

fn parse(fdinfo: &str) -> Option<RunTime> {
    let number = |key| fdinfo.lines().find_map(|line| line.strip_prefix(key))?.trim().parse().ok();
    Some(RunTime { runs: number("run_cnt:")?, ns: number("run_time_ns:")? })
}

/// A program to compare with, attached to a raw tracepoint until this is dropped.
#[derive(Debug)]
pub struct Yardstick {
    object: Ebpf,
    name: &'static str,
}

impl Yardstick {
    /// Attaches a program that does nothing.
    ///
    /// # Errors
    /// When there is no such raw tracepoint, or for want of a capability.
    pub fn empty(hook: &str) -> io::Result<Self> {
        Self::attach(EMPTY, "empty", hook)
    }

    /// Attaches a program that puts a record of 96 bytes with a time and a CPU into [`Self::ring`], and nothing else.
    ///
    /// # Errors
    /// As [`Self::empty`].
    pub fn bare(hook: &str) -> io::Result<Self> {
        Self::attach(BARE, "bare", hook)
    }

    fn attach(object: &[u8], name: &'static str, hook: &str) -> io::Result<Self> {
        let mut object = Ebpf::load(object).map_err(io::Error::other)?;
        let program = object.program_mut(name).ok_or_else(|| io::Error::other("the object has no such program"))?;
        let program: &mut RawTracePoint = program.try_into().map_err(io_error)?;
        program.load().map_err(io_error)?;
        program.attach(hook).map_err(io_error)?;
        Ok(Self { object, name })
    }

    /// What the kernel measured of it while [`count_run_time`] was on.
    pub fn run_time(&self) -> RunTime {
        self.object.program(self.name).and_then(run_time).unwrap_or_default()
    }

    /// Where its records go, and the ring's size in bytes; [`None`] of the empty one.
    pub fn ring(&self) -> Option<(BorrowedFd<'_>, usize)> {
        let aya::maps::Map::RingBuf(ring) = self.object.map("ring")? else { return None };
        Some((ring.fd().as_fd(), BARE_RING_BYTES))
    }
}

fn io_error(error: ProgramError) -> io::Error {
    match error {
        ProgramError::LoadError { io_error, .. } => io_error,
        ProgramError::SyscallError(error) => error.io_error,
        other => io::Error::other(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_measured_is_read_from_what_it_says_of_a_program() {
        let text = "pos:\t0\nprog_type:\t17\nrun_time_ns:\t1234\nrun_cnt:\t5\nrecursion_misses:\t0\n";
        assert_eq!(parse(text), Some(RunTime { runs: 5, ns: 1234 }));
        assert_eq!(parse("prog_type:\t17\n"), None);
    }

    #[test]
    fn what_to_compare_with_runs_at_its_hook_and_is_measured() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIP what_to_compare_with_runs_at_its_hook_and_is_measured: needs root and BPF");
            assert!(!std::env::var("TAPIO_REQUIRE").is_ok_and(|value| value == "all"), "TAPIO_REQUIRE=all");
            return;
        }
        let _counting = count_run_time().expect("root may");
        let empty = Yardstick::empty("sched_process_exec").expect("every kernel has it");
        let bare = Yardstick::bare("sched_process_exec").expect("every kernel has it");
        let before = [&empty, &bare].map(Yardstick::run_time);
        std::process::Command::new("true").status().expect("it starts");
        for (yardstick, before) in [&empty, &bare].into_iter().zip(before) {
            let measured = yardstick.run_time().since(before);
            assert!(measured.runs >= 1 && measured.ns > 0, "{} {measured:?}", yardstick.name);
        }
        assert!(empty.ring().is_none() && bare.ring().is_some());
        assert!(Yardstick::empty("no_such_tracepoint").is_err());
    }
}
