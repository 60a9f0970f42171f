//! How the memory budget is shared out, and what the configuration asks of the probes.

use crate::settings::config::Config;
use crate::settings::{errnos, thresholds};

/// The share of `max_memory_mb` that rings, queues and outbox are sized by.
const INTERNAL_SHARE: f64 = 0.7;
/// The least that a CPU's bulk ring has: some 700 records.
const BULK_RING_BYTES_MIN: usize = 64 << 10;

/// Sizes derived from the memory budget.
pub(crate) struct Budget {
    lethal_ring_bytes: u32,
    /// Size of each CPU's bulk ring.
    bulk_ring_bytes: u32,
    pub(crate) queue_batches: usize,
    pub(crate) outbox_bytes: usize,
}

impl Budget {
    pub(crate) fn of(config: &Config) -> Self {
        let internal = (config.resources.max_memory_mb as f64 * 1_048_576.0 * INTERNAL_SHARE) as usize;
        let event_bytes = size_of::<tapio_wire::event::Event>();
        let batch_bytes = config.grpc.max_batch_size * event_bytes;
        let lethal_ring_bytes = (1usize << (internal / 32).max(1).ilog2()).clamp(256 << 10, 4 << 20);
        // Where this is not known, no probe can be loaded.
        let cpus = tapio_probes::possible_cpus().unwrap_or(1);
        // Together at most a quarter of the internal budget, unless the least that is useful is more.
        let bulk_ring_bytes = (1usize << (internal / 4 / cpus).max(1).ilog2()).clamp(BULK_RING_BYTES_MIN, 1 << 20);
        // Bodies wait in the bulk queue, in the pool and in hands: three times what the queue holds.
        let queue_batches = (config.collector.buffer_size / config.grpc.max_batch_size).max(2);
        let queue_batches = queue_batches.min(internal / 4 / batch_bytes).max(2);
        let outbox_bytes =
            internal.saturating_sub(lethal_ring_bytes + cpus * bulk_ring_bytes + 3 * queue_batches * batch_bytes);
        Self {
            lethal_ring_bytes: lethal_ring_bytes as u32,
            bulk_ring_bytes: bulk_ring_bytes as u32,
            queue_batches,
            outbox_bytes: outbox_bytes.max(internal / 4),
        }
    }
}

/// The probes' part of the configuration.
pub fn load_config(config: &Config) -> tapio_probes::LoadConfig {
    let budget = Budget::of(config);
    let mut load = tapio_probes::LoadConfig {
        lethal_ring_bytes: budget.lethal_ring_bytes,
        bulk_ring_bytes: budget.bulk_ring_bytes,
        own_pid: crate::base::host::own_pid(),
        ..tapio_probes::LoadConfig::default()
    };
    load.btf = config.collectors.ebpf.btf.clone();
    if !config.collectors.ebpf.enable_process {
        let names = ["process_exec", "process_exit", "signal_sent", "process_fork", "signal_fatal"];
        load.disabled.extend(names.map(Into::into));
    }
    if !config.collectors.ebpf.enable_memory {
        let names = ["oom_victim", "reclaim_begin", "reclaim_end", "reclaim_mcg_begin", "reclaim_mcg_end"];
        load.disabled.extend(names.map(Into::into));
    }
    if !config.collectors.ebpf.enable_network {
        load.disabled.extend(["tcp_state", "tcp_retransmit", "tcp_reset_sent", "tcp_reset_recv"].map(Into::into));
        load.disabled.extend(["packet_drop", "dns_query", "packet_received"].map(Into::into));
    }
    let ebpf = &config.collectors.ebpf;
    for (is_enabled, names) in [
        (ebpf.enable_scheduler, &["sched_wakeup", "sched_wake_new", "sched_switch"][..]),
        (ebpf.enable_syscall_errors, &["syscall_errors"]),
        (ebpf.enable_file_audit, &["file_open"]),
    ] {
        if is_enabled {
            load.disabled.retain(|name| !names.contains(&name.as_str()));
        }
    }
    load.cgroup_records_per_second = ebpf.cgroup_records_per_second;
    load.audited_paths.clone_from(&ebpf.audited_paths);
    load.dns_timeout = ebpf.dns_timeout;
    (load.errnos, load.errnos_of_fork) = errnos::errnos(&ebpf.syscall_errors);
    thresholds::apply(config, &mut load.tuning);
    load
}

#[cfg(test)]
mod tests {
    use tapio_probes::record::RecordKind;

    use super::*;

    #[test]
    fn bulk_rings_take_at_most_a_quarter_of_the_budget() {
        let cpus = tapio_probes::possible_cpus().expect("/sys is mounted");
        for max_memory_mb in [16, 100, 500, 4000] {
            let mut config = Config::default();
            config.resources.max_memory_mb = max_memory_mb;
            let budget = Budget::of(&config);
            let ring = budget.bulk_ring_bytes as usize;
            let internal = (max_memory_mb as f64 * 1_048_576.0 * INTERNAL_SHARE) as usize;
            assert!(ring.is_power_of_two());
            assert!(ring == BULK_RING_BYTES_MIN || ring > BULK_RING_BYTES_MIN && ring * cpus <= internal / 4, "{ring}");
        }
    }

    #[test]
    fn what_is_switched_off_is_not_loaded() {
        let mut config = Config::default();
        let off = tapio_probes::off_by_default();
        let disabled = |config: &Config| {
            let disabled = load_config(config).disabled;
            disabled.into_iter().filter(|name| !off.contains(name)).collect::<Vec<_>>()
        };
        assert!(disabled(&config).is_empty());
        assert_eq!(load_config(&config).disabled, off);
        config.collectors.ebpf.enable_network = false;
        let of_network = |name: &String| ["tcp_", "dns_", "packet_"].iter().any(|question| name.starts_with(question));
        assert!(disabled(&config).iter().all(of_network) && disabled(&config).len() == 7);
        config.collectors.ebpf.enable_network = true;
        config.collectors.ebpf.enable_memory = false;
        let known = |name: &String| tapio_probes::PROGRAMS.iter().any(|program| program.name == name);
        assert!(disabled(&config).iter().all(known) && disabled(&config).len() == 5);
        config.collectors.ebpf.enable_process = false;
        assert!(disabled(&config).iter().all(known) && disabled(&config).len() == 10);

        for (ebpf, names) in [
            ("enable_scheduler", vec!["sched_wakeup", "sched_wake_new", "sched_switch"]),
            ("enable_syscall_errors", vec!["syscall_errors"]),
            ("enable_file_audit", vec!["file_open"]),
        ] {
            let mut config = Config::default();
            match ebpf {
                "enable_scheduler" => config.collectors.ebpf.enable_scheduler = true,
                "enable_syscall_errors" => config.collectors.ebpf.enable_syscall_errors = true,
                _ => config.collectors.ebpf.enable_file_audit = true,
            }
            let left = load_config(&config).disabled;
            let enabled: Vec<_> = off.iter().filter(|name| !left.contains(name)).collect();
            assert_eq!(enabled, names, "{ebpf}");
        }
    }

    #[test]
    fn kinds_below_the_least_severity_are_off_in_the_kernel() {
        let mut config = Config::default();
        assert_eq!(load_config(&config).tuning.bulk_kinds_off, 0);
        config.pipeline.filter_config.min_severity = crate::settings::severity::Severity::Medium;
        let off = load_config(&config).tuning.bulk_kinds_off;
        assert_ne!(off & tapio_probes::kinds([RecordKind::Fork]), 0);
        assert_eq!(off & tapio_probes::kinds([RecordKind::Tcp, RecordKind::Exec, RecordKind::Exit]), 0);
        config.pipeline.enable_filtering = false;
        assert_eq!(load_config(&config).tuning.bulk_kinds_off, 0);
    }
}
