//! The metrics that a program exposes, read once and asked by name and label.

use super::http;
use crate::error::Error;

/// A page of metrics.
pub(crate) struct Metrics(String);

impl Metrics {
    pub(crate) fn read(port: u16) -> Result<Self, Error> {
        Ok(Self(http::get(port, "/metrics")?.1))
    }

    /// The sum of a metric over all lines that have these labels.
    pub(crate) fn sum(&self, name: &str, labels: &[&str]) -> u64 {
        let of_name = |line: &&str| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' ']));
        let lines = self.0.lines().filter(of_name).filter(|line| labels.iter().all(|label| line.contains(label)));
        lines.filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok()).sum::<f64>() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::Metrics;

    #[test]
    fn metrics_are_summed_by_name_and_label() {
        let page =
            "# HELP a_total x\na_total{kind=\"exec\",lane=\"lethal\"} 3\na_total{kind=\"exit\"} 4\na_total_b 9\nc 7\n";
        let metrics = Metrics(page.into());
        assert_eq!(metrics.sum("a_total", &[]), 7);
        assert_eq!(metrics.sum("a_total", &["kind=\"exec\""]), 3);
        assert_eq!(metrics.sum("c", &[]), 7);
        assert_eq!(metrics.sum("absent", &[]), 0);
    }
}
