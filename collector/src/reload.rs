//! What of the configuration may change while the collector runs.
//!
//! What enters: the configuration file, looked at from time to time (a ConfigMap changes by a swapped link, which no watch on the
//! file would see) and on SIGHUP. What leaves: a new log level, and new limits of the bulk lane for every intake. What must hold: a
//! file that is refused changes nothing, is logged once and shows in a gauge; a changed key that is not live is named in the
//! log, since it waits for a restart.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_yaml_ng::Value;

use crate::config::Config;
use crate::intake::Filter;

/// How often the file is looked at.
pub const LOOK_INTERVAL: Duration = Duration::from_secs(5);

/// Keys that take effect at once.
const LIVE: [&str; 5] = [
    "logging.level",
    "collector.sampling_rate",
    "collector.max_events_per_sec",
    "pipeline.enable_filtering",
    "pipeline.filter_config.min_severity",
];

/// The limits of the bulk lane as they are now.
pub struct Live {
    filter: Mutex<Filter>,
    version: AtomicU64,
    /// Whether the file cannot be used, and what it said before still holds.
    pub is_stale: AtomicBool,
    pub reloads: AtomicU64,
}

impl Live {
    /// As configured at the start.
    pub fn new(filter: Filter) -> Self {
        Self {
            filter: Mutex::new(filter),
            version: AtomicU64::new(0),
            is_stale: AtomicBool::default(),
            reloads: AtomicU64::default(),
        }
    }

    /// The limits, when they have changed since `version`, which is brought up to date.
    pub fn newer(&self, version: &mut u64) -> Option<Filter> {
        let now = self.version.load(Ordering::Acquire);
        if now == *version {
            return None;
        }
        *version = now;
        Some(self.filter.lock().unwrap_or_else(PoisonError::into_inner).clone())
    }

    fn set(&self, filter: Filter) {
        *self.filter.lock().unwrap_or_else(PoisonError::into_inner) = filter;
        self.version.fetch_add(1, Ordering::Release);
    }
}

/// See the module.
pub struct Reload {
    path: PathBuf,
    live: Arc<Live>,
    /// What was last looked at.
    seen: String,
    /// What was last taken.
    taken: String,
    set_level: Box<dyn Fn(&str) + Send>,
}

impl Reload {
    /// Watches `path`, whose content was taken at the start.
    pub fn new(path: PathBuf, live: Arc<Live>, set_level: Box<dyn Fn(&str) + Send>) -> Self {
        let taken = std::fs::read_to_string(&path).unwrap_or_default();
        Self { path, live, seen: taken.clone(), taken, set_level }
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
                tracing::error!(error, "the changed configuration is refused; what was configured before still holds");
                return;
            }
        };
        let changed = changed_keys(&self.taken, &self.seen);
        self.taken.clone_from(&self.seen);
        if changed.iter().any(|key| key == "logging.level") {
            (self.set_level)(&config.logging.level);
        }
        self.live.set(Filter::of(&config));
        self.live.reloads.fetch_add(1, Ordering::Relaxed);
        let is_live = |key: &&String| LIVE.contains(&key.as_str());
        let live: Vec<&String> = changed.iter().filter(is_live).collect();
        let waiting: Vec<&String> = changed.iter().filter(|key| !is_live(key)).collect();
        tracing::info!(changed = ?live, "the configuration has changed");
        if !waiting.is_empty() {
            tracing::warn!(keys = ?waiting, "these changes of the configuration need a restart");
        }
    }
}

/// Keys, with dots, whose values differ.
fn changed_keys(before: &str, after: &str) -> Vec<String> {
    let keys = |text: &str| {
        let mut keys = BTreeMap::new();
        flatten("", &serde_yaml_ng::from_str(text).unwrap_or(Value::Null), &mut keys);
        keys
    };
    let (before, after) = (keys(before), keys(after));
    let all: std::collections::BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    all.into_iter().filter(|key| before.get(*key) != after.get(*key)).cloned().collect()
}

fn flatten(prefix: &str, value: &Value, keys: &mut BTreeMap<String, Value>) {
    match value {
        Value::Mapping(mapping) => {
            for (key, value) in mapping {
                let key = key.as_str().unwrap_or_default();
                let key = if prefix.is_empty() { key.to_owned() } else { format!("{prefix}.{key}") };
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
    use super::*;

    #[test]
    fn changed_keys_are_named_whether_added_changed_or_removed() {
        let before = "logging: {level: info}\ngrpc: {max_batch_size: 10}\n";
        let after = "collector: {sampling_rate: 0.5}\nlogging:\n  level: debug\n";
        assert_eq!(changed_keys(before, after), ["collector.sampling_rate", "grpc.max_batch_size", "logging.level"]);
        assert!(changed_keys(before, "grpc:\n  max_batch_size: 10\nlogging:\n  level: info\n").is_empty());
    }

    #[test]
    fn a_good_file_is_taken_and_a_bad_one_changes_nothing() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let write = |text: &str| std::fs::write(file.path(), text).expect("written");
        write("logging: {level: info}\n");
        let live = Arc::new(Live::new(Filter::of(&Config::default())));
        let levels = Arc::new(Mutex::new(Vec::new()));
        let told = Arc::clone(&levels);
        let set_level = Box::new(move |level: &str| told.lock().expect("no panic").push(level.to_owned()));
        let mut reload = Reload::new(file.path().into(), Arc::clone(&live), set_level);
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
}
