//! What numbers and times of a configuration may be.

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

#[cfg(test)]
mod tests {
    use super::super::tests::parse;

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
