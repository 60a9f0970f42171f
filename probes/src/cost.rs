//! What programs cost, as the kernel itself measures it. It also has programs to compare with: some that do nothing,
//! and one that only writes a record into a ring.
//!
//! In: the name of a raw tracepoint. Out: runs and nanoseconds. Held: the kernel's accounting, switched on as long as
//! the descriptor of [`count_run_time`] is open. It costs every BPF program of the machine two readings of a clock a
//! run, so only a measurement switches it on.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use aya::Ebpf;
use aya::programs::{Program, ProgramError, RawTracePoint};
use aya::sys::{Stats, enable_stats};

use crate::attach::{Failure, Link, ProgramState, attach, detach};
use crate::object::{Attachment, ProgramInfo};

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

/// Reads the run time by the program's descriptor, from its `/proc/PID/fdinfo`.
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
    /// When there is no such raw tracepoint, or a capability is missing.
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

/// Programs that do nothing, attached in place of some of ours: they measure the cost of the hook itself.
#[derive(Debug)]
pub struct EmptyPrograms {
    programs: Vec<(Ebpf, ProgramInfo, Option<Link>)>,
}

impl EmptyPrograms {
    /// Loads one for each; none is attached yet.
    ///
    /// # Errors
    /// When the kernel takes none of them because a capability is missing.
    pub fn for_programs<'a>(programs: impl IntoIterator<Item = &'a ProgramInfo>) -> io::Result<Self> {
        let load = |program: &ProgramInfo| {
            let name = match program.attachment {
                Attachment::RawTracepoint | Attachment::TypedTracepoint => "empty",
                Attachment::CgroupEgress => "empty_egress",
                Attachment::CgroupIngress => "empty_ingress",
            };
            let object = Ebpf::load(EMPTY).map_err(io::Error::other)?;
            let attachment = match program.attachment {
                Attachment::TypedTracepoint => Attachment::RawTracepoint,
                other => other,
            };
            Ok((object, ProgramInfo { name, attachment, ..*program }, None))
        };
        programs.into_iter().map(load).collect::<io::Result<_>>().map(|programs| Self { programs })
    }

    /// Attaches all whose hooks this kernel has, and returns how many that are.
    ///
    /// # Errors
    /// When one may not be attached where the kernel has its hook.
    pub fn attach(&mut self) -> io::Result<usize> {
        for (object, info, link) in &mut self.programs {
            if link.is_none() {
                *link = match attach(object, info, None) {
                    Ok(attached) => Some(attached),
                    Err(Failure::Program(ProgramState::NotOnThisKernel(_))) => None,
                    Err(Failure::Program(state)) => return Err(io::Error::other(format!("{}: {state:?}", info.hook))),
                    Err(Failure::NotPermitted(error)) => return Err(error),
                };
            }
        }
        Ok(self.programs.iter().filter(|(_, _, link)| link.is_some()).count())
    }

    /// Takes all from their hooks; they stay loaded.
    ///
    /// # Errors
    /// When the kernel does not let one go.
    pub fn detach(&mut self) -> io::Result<()> {
        for (object, info, link) in &mut self.programs {
            if let Some(link) = link.take() {
                detach(object, info, link).map_err(io_error)?;
            }
        }
        Ok(())
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
    use crate::object::PROGRAMS;

    #[test]
    fn run_time_is_read_from_a_programs_fdinfo() {
        let text = "pos:\t0\nprog_type:\t17\nrun_time_ns:\t1234\nrun_cnt:\t5\nrecursion_misses:\t0\n";
        assert_eq!(parse(text), Some(RunTime { runs: 5, ns: 1234 }));
        assert_eq!(parse("prog_type:\t17\n"), None);
    }

    #[test]
    fn the_yardstick_runs_at_its_hook_and_is_measured() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIP the_yardstick_runs_at_its_hook_and_is_measured: needs root and BPF");
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

        let by_default: Vec<_> = PROGRAMS.iter().filter(|program| program.by_default).collect();
        let mut empties = EmptyPrograms::for_programs(by_default.iter().copied()).expect("root may");
        let runs = |empties: &EmptyPrograms| -> Vec<_> {
            let of = |(object, info, _): &(Ebpf, ProgramInfo, _)| object.program(info.name).and_then(run_time);
            empties.programs.iter().map(|program| of(program).unwrap_or_default().runs).collect()
        };
        let send = || {
            let socket = std::net::UdpSocket::bind("127.0.0.1:0").expect("a port");
            socket.connect(socket.local_addr().expect("it has one")).expect("to itself");
            socket.send(b"a").expect("it is sent");
            socket.recv(&mut [0]).expect("it comes");
            std::process::Command::new("true").status().expect("it starts");
        };
        send();
        assert!(runs(&empties).iter().all(|&runs| runs == 0), "nothing is attached yet");
        assert!(empties.attach().expect("root may") >= by_default.len() - 2, "an older kernel lacks two at the most");
        send();
        let ran = runs(&empties);
        let has_run = |hook| by_default.iter().zip(&ran).all(|(program, &runs)| program.hook != hook || runs > 0);
        assert!(["sched_process_exec", "cgroup_skb/egress", "cgroup_skb/ingress"].into_iter().all(has_run), "{ran:?}");
        empties.detach().expect("they go");
        let ran = runs(&empties);
        send();
        assert_eq!(runs(&empties), ran, "nothing is attached any more");
        assert!(empties.attach().is_ok_and(|attached| attached > 0), "they may come back");
    }
}
