//! What the probes are told to look for: the configuration's thresholds, as the probes know them.
//!
//! What enters: a configuration. What leaves: a [`Tuning`] to load with, and the same changes to one that is in force. What must
//! hold: sampling, which the governor decides, is not touched.

use std::time::Duration;

use rustix::io::Errno;
use tapio_probes::record::Kind;
use tapio_probes::{ExecCommand, Tuning};

use crate::intake::shared::severity;
use crate::settings::config::{Config, ExecArguments};

/// Errors of system calls that can be counted.
const ERRNOS: [(&str, Errno); 16] = [
    ("EIO", Errno::IO),
    ("EAGAIN", Errno::AGAIN),
    ("ENOMEM", Errno::NOMEM),
    ("EACCES", Errno::ACCESS),
    ("EBUSY", Errno::BUSY),
    ("ENFILE", Errno::NFILE),
    ("EMFILE", Errno::MFILE),
    ("EFBIG", Errno::FBIG),
    ("ENOSPC", Errno::NOSPC),
    ("EROFS", Errno::ROFS),
    ("EDQUOT", Errno::DQUOT),
    ("ESTALE", Errno::STALE),
    ("ENOBUFS", Errno::NOBUFS),
    ("ETIMEDOUT", Errno::TIMEDOUT),
    ("ECONNREFUSED", Errno::CONNREFUSED),
    ("EHOSTUNREACH", Errno::HOSTUNREACH),
];

/// The names of the errors that can be counted.
pub fn errno_names() -> impl Iterator<Item = &'static str> {
    ERRNOS.into_iter().map(|(name, _)| name)
}

/// The numbers of these errors: those that are counted, and those that are counted only where a process should be made.
pub fn errnos(names: &[String]) -> (Vec<u32>, Vec<u32>) {
    let named = names.iter().filter_map(|name| ERRNOS.iter().find(|(known, _)| known == name));
    // A read that would block fails with it all the time, and nothing is wrong.
    let (of_fork, anywhere): (Vec<_>, Vec<_>) = named.partition(|(_, errno)| *errno == Errno::AGAIN);
    let numbers =
        |errnos: Vec<&(&str, Errno)>| errnos.iter().map(|(_, errno)| errno.raw_os_error() as u32).collect::<Vec<_>>();
    (numbers(anywhere), numbers(of_fork))
}

/// Puts the configuration's thresholds into what is in force.
pub fn apply(config: &Config, tuning: &mut Tuning) {
    let ebpf = &config.collectors.ebpf;
    tuning.exec_command = match ebpf.exec_arguments {
        ExecArguments::Off => ExecCommand::Off,
        ExecArguments::Path => ExecCommand::Path,
        ExecArguments::Full => ExecCommand::Full,
    };
    tuning.run_queue_slow_ns = nanoseconds(ebpf.run_queue_slow);
    tuning.block_io_slow_ns = nanoseconds(ebpf.block_io_slow);
    tuning.reclaim_burst_ns = nanoseconds(ebpf.reclaim_burst);
    tuning.dns_slow_ns = nanoseconds(ebpf.dns_slow);
    tuning.bulk_kinds_off = 0;
    if config.pipeline.enable_filtering {
        // What would be dropped for its severity need not leave the kernel.
        let least = config.pipeline.filter_config.min_severity;
        let is_off = |kind: &Kind| !kind.is_lethal() && severity(*kind) < least;
        tuning.bulk_kinds_off = tapio_probes::kinds(Kind::ALL.into_iter().filter(is_off));
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_errors_are_those_that_the_probes_count_by_default() {
        let (mut anywhere, of_fork) = errnos(&Config::default().collectors.ebpf.syscall_errors);
        anywhere.sort_unstable();
        assert_eq!((&*anywhere, &*of_fork), (tapio_probes::DEFAULT_ERRNOS, tapio_probes::DEFAULT_ERRNOS_OF_FORK));
    }

    #[test]
    fn thresholds_begin_as_the_probes_own_and_sampling_is_left_alone() {
        let mut tuning = Tuning { bulk_sampling: 7, ..Tuning::default() };
        apply(&Config::default(), &mut tuning);
        assert_eq!(tuning, Tuning { bulk_sampling: 7, ..Tuning::default() });
    }
}
