//! Tapio's probes: BPF programs in C that answer one question a file, and the loader that attaches them.
//!
//! In: a [`LoadConfig`]. Out: [`Probes`], which keeps the programs attached while it lives. It hands out the
//! descriptors of the ring, the counters and the control word, and has a [`Verdict`] on every program of [`PROGRAMS`].
//! The programs' output is defined in [`record`].
//!
//! What holds:
//! - One program that a kernel lacks or refuses never stops the others; the reason is in its verdict.
//! - Every record that was attempted is counted as emitted; every one that found its ring full as dropped too, and every one
//!   that sampling left out as sampled too. What the reader takes out is the rest, exactly: see [`counter_index`].
//! - No program outlives its [`Probes`]: nothing is pinned.
//!
//! ```text
//!  bpf/process.bpf.c ┐                                       ┌► lethal_ring    records, see `record`
//!  bpf/oom.bpf.c     ├─ bpf/tapio.bpf.c ─ object ─ loader ───┼► bulk_rings     the same, one ring a CPU
//!  bpf/signal.bpf.c  │  one object: the      │               ├► counters_map   u64[cpu][kind][emitted, dropped, sampled, excluded]
//!  bpf/tcp.bpf.c     │  maps are shared      │               ├► control_map    u32 need_wakeup
//!  …                 ┘                       └─ attach       ├► controls       what may change while the programs run
//!                                                            └► verdicts       one a program
//! ```
#![forbid(unsafe_code)]

mod aggregate;
mod attach;
pub mod clock;
mod controls;
mod cost;
mod drop_reasons;
mod field;
mod loader;
pub mod mountinfo;
mod object;
pub mod record;
mod run_time;
mod shares;
mod unanswered;

pub use aggregate::Aggregates;
pub use attach::{ProgramState, Verdict};
pub use controls::{Controls, ExecCommand, Tuning, kinds};
pub use cost::{EmptyPrograms, RunTime, Yardstick, count_run_time};
pub use drop_reasons::drop_reason_name;
pub use loader::{Error, LoadConfig, Probes, possible_cpus};
pub use object::{
    AUDITED_PATH_BYTES_MAX, AUDITED_PATHS_MAX, Attachment, Counter, DEFAULT_AUDITED_PATHS,
    DEFAULT_CGROUP_RECORDS_PER_SECOND, DEFAULT_ERRNOS, DEFAULT_ERRNOS_OF_FORK, DEFAULT_SIGNAL_MASK,
    DEFAULT_SIGNAL_MASK_UNHANDLED, PROGRAMS, ProgramInfo, RecordLane, counter_index, object, off_by_default,
    signal_mask,
};
pub use run_time::{Measuring, RunTimes};
pub use shares::Shares;
