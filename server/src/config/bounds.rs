//! What numbers, times and paths of a configuration may be.

use std::path::Path;
use std::time::Duration;

use tapio_wire::limits::FRAME_EVENTS_MAX;
use tapio_wire::program::config_file::{Times, numbers_within, times_within};

use super::Config;
use crate::remote::RemoteSection;

const DAY_S: u64 = 86_400;

impl Config {
    /// Numbers and times: what they size is allocated, multiplied and waited for.
    pub(super) fn bounded(&self) -> Result<(), (&'static str, String)> {
        let (server, correlation) = (&self.server, &self.correlation);
        let every = self.archive.remote.as_ref().map_or(RemoteSection::default().every, |remote| remote.every);
        numbers_within(&[
            ("server.max_concurrent_streams", server.max_concurrent_streams.into(), 1..=100_000),
            ("server.max_events_per_sec", server.max_events_per_sec, 0..=1_000_000_000),
            ("server.max_batch_size", server.max_batch_size as u64, 1..=FRAME_EVENTS_MAX as u64),
            ("correlation.buffer_size", correlation.buffer_size as u64, 1..=1_000_000),
            ("correlation.max_correlation_depth", correlation.max_correlation_depth.into(), 0..=1000),
            ("correlation.shards", correlation.shards.unwrap_or(1) as u64, 1..=1024),
            ("correlation.max_entities", correlation.max_entities as u64, 1..=100_000_000),
            ("resources.max_memory_mb", self.resources.max_memory_mb, 0..=16 << 20),
            ("resources.max_cpu_milli", self.resources.max_cpu_milli.unwrap_or(0), 0..=1_024_000),
        ])?;
        let times = |least_ms, most_s, may_be_off| {
            let (least, most) = (Duration::from_millis(least_ms), Duration::from_secs(most_s));
            Times { least, most, may_be_off }
        };
        times_within(&[
            // Less would do nothing but reconnect.
            ("server.max_connection_age", server.max_connection_age, times(1000, 365 * DAY_S, true)),
            ("correlation.analysis_window", correlation.analysis_window, times(1000, 7 * DAY_S, false)),
            // Less would delete what was just written.
            ("archive.max_age", self.archive.max_age, times(60_000, 36_500 * DAY_S, false)),
            // More would hold back acknowledgements.
            ("archive.commit_interval", self.archive.commit_interval, times(0, 1, false)),
            // Less would make nothing but segments.
            ("archive.remote.every", every, times(1000, DAY_S, false)),
        ])
    }
}

impl Config {
    /// Paths that must point somewhere.
    pub(super) fn pointed(&self) -> Result<(), (&'static str, String)> {
        let is_empty = |path: &Path| path.as_os_str().is_empty();
        let problem = |what: &str| format!("it is empty: name {what}, or leave it out");
        if is_empty(&self.archive.dir) {
            return Err(("archive.dir", problem("a directory")));
        }
        if self.correlation.patterns.as_deref().is_some_and(is_empty) {
            return Err(("correlation.patterns", problem("a directory")));
        }
        if self.cluster.peer_tls.as_ref().is_some_and(|tls| is_empty(&tls.ca)) {
            return Err(("cluster.peer_tls.ca", "name the CA of the servers' certificates".into()));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::parse;

    #[test]
    fn settings_that_would_silently_do_nothing_are_refused() {
        for (text, key, says) in [
            ("archive: {dir: 5}", "archive.dir", "`5` is no text"),
            ("archive: {dir: ''}", "archive.dir", "name a directory"),
            ("correlation: {patterns: ''}", "correlation.patterns", "name a directory"),
            ("archive:\n  remote:\n", "archive.remote", "leave it out"),
            ("deliver:\n  webhook:\n", "deliver.webhook", "leave it out"),
            ("deliver: {webhook: {url: 'http://:80/a'}}", "deliver.webhook.url", "as https://host"),
            ("deliver: {webhook: {url: 'http://a:0/b'}}", "deliver.webhook.url", "port 0"),
            ("cluster:\n  peer_tls:\n", "cluster.peer_tls", "leave it out"),
            ("cluster: {peer_tls: {}}", "cluster.peer_tls.ca", "name the CA"),
            ("cluster: {url: 'nats://'}", "cluster.url", "names no host"),
            ("cluster: {url: 'nats://a:4222, nats://:4222'}", "cluster.url", "`nats://:4222`"),
            ("cluster: {url: 'nats://a:0'}", "cluster.url", "port 0"),
            ("cluster: {url: ' , '}", "cluster.url", "names no host"),
            ("cluster: {url: 'ws://a:4222'}", "cluster.url", "nats:// nor tls://"),
            ("logging: {level: ''}", "logging.level", "none of trace, debug, info, warn, error, off"),
        ] {
            let error = parse(text).expect_err(text).to_string();
            assert!(error.contains(&format!("{key}: ")) && error.contains(says) && error.contains("line"), "{error}");
        }
    }

    /// The last value that is accepted, and the next one, which is not.
    #[test]
    fn what_sizes_or_paces_something_is_bounded_on_both_sides() {
        for (section, key, accepted, refused) in [
            ("server", "max_concurrent_streams", ["1", "100000"], ["0", "100001"]),
            ("server", "max_events_per_sec", ["0", "1000000000"], ["-1", "1000000001"]),
            ("server", "max_batch_size", ["1", "65536"], ["0", "65537"]),
            ("server", "max_connection_age", ["0s", "365d"], ["999ms", "366d"]),
            ("correlation", "buffer_size", ["1", "1000000"], ["0", "18446744073709551615"]),
            ("correlation", "max_correlation_depth", ["0", "1000"], ["-1", "1001"]),
            ("correlation", "shards", ["1", "1024"], ["0", "1025"]),
            ("correlation", "max_entities", ["1", "100000000"], ["0", "100000001"]),
            ("correlation", "analysis_window", ["1s", "7d"], ["999ms", "8d"]),
            ("resources", "max_memory_mb", ["0", "16777216"], ["1", "16777217"]),
            ("resources", "max_cpu_milli", ["0", "1024000"], ["-1", "1024001"]),
            ("archive", "max_age", ["1m", "36500d"], ["59s", "36501d"]),
            ("archive", "commit_interval", ["0s", "1s"], ["-1s", "1001ms"]),
        ] {
            let of = |value: &str| parse(&format!("# a file\n{section}:\n  {key}: {value}\n"));
            for value in accepted {
                of(value).unwrap_or_else(|error| panic!("{error}"));
            }
            for value in refused {
                let error = of(value).expect_err(value).to_string();
                assert!(error.contains(&format!("{section}.{key}: ")) && error.contains("line 3"), "{error}");
            }
        }
    }
}
