//! What of the configuration may change while the collector runs.
//!
//! What enters: the configuration file, looked at from time to time (a ConfigMap changes by a swapped link, which no
//! watch on the file would see) and on SIGHUP. What leaves: a new log level, new limits of the bulk lane for every
//! intake, and new thresholds for the probes. What must hold: a file that is refused changes nothing, is logged once
//! and shows in a gauge. The log names a changed key that waits for a restart.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde_json::Value;
use tapio_probes::Controls;
use tapio_wire::program::yaml;

use crate::settings::config::{Config, LIVE};
use crate::settings::live::Live;
use crate::settings::thresholds;

/// How often the file is looked at.
pub const LOOK_INTERVAL: Duration = Duration::from_secs(5);

/// Applies those changes of the configuration that need no restart.
pub struct Reload {
    path: PathBuf,
    live: Arc<Live>,
    controls: Option<Arc<Controls>>,
    /// What was last looked at.
    seen: String,
    /// What was last taken.
    taken: String,
    set_level: Box<dyn Fn(&str) + Send>,
}

impl Reload {
    /// Watches `path`, whose content was taken at the start. `controls` are the probes', where they run.
    pub fn new(
        path: PathBuf,
        live: Arc<Live>,
        controls: Option<Arc<Controls>>,
        set_level: Box<dyn Fn(&str) + Send>,
    ) -> Self {
        let taken = std::fs::read_to_string(&path).unwrap_or_default();
        Self { path, live, controls, seen: taken.clone(), taken, set_level }
    }

    /// Looks at the file and takes what may be taken.
    pub fn look(&mut self) {
        let text = std::fs::read_to_string(&self.path).unwrap_or_default();
        if text == self.seen {
            return;
        }
        self.seen = text;
        // An absent or empty file is a swap under way, or a mistake; the defaults are asked for by an absent flag.
        let loaded = if self.seen.trim().is_empty() {
            Err("it is empty or cannot be read".to_owned())
        } else {
            Config::load(Some(&self.path)).map_err(|error| error.to_string())
        };
        self.live.is_stale.store(loaded.is_err(), Ordering::Relaxed);
        let config = match loaded {
            Ok(config) => config,
            Err(error) => {
                tracing::error!(error, "changed configuration refused; the previous configuration stays in force");
                return;
            }
        };
        let changed = changed_keys(&self.taken, &self.seen);
        self.taken.clone_from(&self.seen);
        if changed.iter().any(|key| key == "logging.level") {
            (self.set_level)(&config.logging.level);
        }
        if let Some(controls) = &self.controls
            && let Err(error) = controls.update(|tuning| thresholds::apply(&config, tuning))
        {
            tracing::error!(%error, "cannot set the changed thresholds in the probes");
        }
        self.live.set(&config);
        self.live.reloads.fetch_add(1, Ordering::Relaxed);
        let is_live = |key: &&String| LIVE.contains(&key.as_str());
        let live: Vec<&String> = changed.iter().filter(is_live).collect();
        let waiting: Vec<&String> = changed.iter().filter(|key| !is_live(key)).collect();
        tracing::info!(changed = ?live, "configuration reloaded");
        if !waiting.is_empty() {
            tracing::warn!(keys = ?waiting, "changes of these keys need a restart");
        }
    }
}

/// Keys, with dots, whose values differ.
fn changed_keys(before: &str, after: &str) -> Vec<String> {
    let keys = |text: &str| {
        let mut keys = BTreeMap::new();
        flatten("", &yaml::from_str(text).unwrap_or(Value::Null), &mut keys);
        keys
    };
    let (before, after) = (keys(before), keys(after));
    let all: std::collections::BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    all.into_iter().filter(|key| before.get(*key) != after.get(*key)).cloned().collect()
}

fn flatten(prefix: &str, value: &Value, keys: &mut BTreeMap<String, Value>) {
    match value {
        Value::Object(mapping) => {
            for (key, value) in mapping {
                let key = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
                flatten(&key, value, keys);
            }
        }
        Value::Null => {}
        value => {
            keys.insert(prefix.to_owned(), value.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[test]
    fn changed_keys_are_named_whether_added_changed_or_removed() {
        let before = "logging: {level: info}\ngrpc: {max_batch_size: 10}\n";
        let after = "collector: {sampling_rate: 0.5}\nlogging:\n  level: debug\n";
        assert_eq!(changed_keys(before, after), ["collector.sampling_rate", "grpc.max_batch_size", "logging.level"]);
        assert!(changed_keys(before, "grpc:\n  max_batch_size: 10\nlogging:\n  level: info\n").is_empty());
    }

    #[test]
    fn a_good_file_applies_and_a_bad_one_changes_nothing() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let write = |text: &str| std::fs::write(file.path(), text).expect("written");
        write("logging: {level: info}\n");
        let live = Arc::new(Live::new(&Config::default()));
        let levels = Arc::new(Mutex::new(Vec::new()));
        let set = Arc::clone(&levels);
        let set_level = Box::new(move |level: &str| set.lock().expect("no panic").push(level.to_owned()));
        let mut reload = Reload::new(file.path().into(), Arc::clone(&live), None, set_level);
        let mut version = 0;
        reload.look();
        assert!(live.newer(&mut version).is_none());
        for bad in ["logging: {level: loud}\n", "", "colector: {}\n"] {
            write(bad);
            reload.look();
            assert!(live.is_stale.load(Ordering::Relaxed) && live.newer(&mut version).is_none(), "{bad}");
        }
        write("logging: {level: debug}\ncollector: {sampling_rate: 0.5}\n");
        reload.look();
        assert!(live.newer(&mut version).is_some() && !live.is_stale.load(Ordering::Relaxed));
        assert!(live.newer(&mut version).is_none());
        assert_eq!(*levels.lock().expect("no panic"), ["debug"]);
    }

    #[test]
    fn new_thresholds_apply_and_keep_the_governors_sampling() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIP new_thresholds_apply_and_keep_the_governors_sampling: needs root and BPF");
            assert!(!std::env::var("TAPIO_REQUIRE").is_ok_and(|value| value == "all"), "TAPIO_REQUIRE=all");
            return;
        }
        let probes = tapio_probes::Probes::load(&Default::default()).expect("the probes load");
        let controls = probes.controls();
        let file = tempfile::NamedTempFile::new().expect("a file");
        let live = Arc::new(Live::new(&Config::default()));
        let mut reload =
            Reload::new(file.path().into(), Arc::clone(&live), Some(Arc::clone(&controls)), Box::new(|_| {}));
        controls.update(|tuning| tuning.bulk_sampling = 7).expect("it can be set");
        std::fs::write(
            file.path(),
            "collectors: {ebpf: {block_io_slow: 5ms, reclaim_burst: 6ms, run_queue_slow: 7ms, dns_slow: 8ms, \
             dns_timeout: 900ms, exec_arguments: path}}\npipeline: {filter_config: {min_severity: high}}\n",
        )
        .expect("written");
        reload.look();
        let wanted = tapio_probes::Tuning {
            bulk_sampling: 7,
            block_io_slow_ns: 5_000_000,
            reclaim_burst_ns: 6_000_000,
            run_queue_slow_ns: 7_000_000,
            dns_slow_ns: 8_000_000,
            exec_command: tapio_probes::ExecCommand::Path,
            bulk_kinds_off: controls.get().bulk_kinds_off,
        };
        assert_eq!(controls.get(), wanted);
        assert_ne!(wanted.bulk_kinds_off & tapio_probes::kinds([tapio_probes::record::RecordKind::Dns]), 0);
        assert_eq!(live.dns_timeout(), Duration::from_millis(900));
        std::fs::write(file.path(), "logging: {level: info}\n").expect("written");
        reload.look();
        assert_eq!(controls.get(), tapio_probes::Tuning { bulk_sampling: 7, ..Default::default() });
    }
}
