//! The configuration's thresholds, in the form that the probes read.
//!
//! What enters: a configuration. What leaves: a [`Tuning`] to load with, and the same changes to one that is in force. What must
//! hold: sampling, which the governor decides, is not touched.

use std::time::Duration;

use tapio_probes::record::RecordKind;
use tapio_probes::{ExecCommand, Tuning};

use crate::settings::config::{Config, ExecArguments};
use crate::settings::severity::severity;

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
        let is_off = |kind: &RecordKind| !kind.is_lethal() && severity(*kind) < least;
        tuning.bulk_kinds_off = tapio_probes::kinds(RecordKind::ALL.into_iter().filter(is_off));
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thresholds_begin_as_the_probes_own_without_sampling() {
        let mut tuning = Tuning { bulk_sampling: 7, ..Tuning::default() };
        apply(&Config::default(), &mut tuning);
        assert_eq!(tuning, Tuning { bulk_sampling: 7, ..Tuning::default() });
    }
}
