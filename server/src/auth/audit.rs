//! The audit log: who asked what of this server, one line a call, target `audit`.
//!
//! What must hold: a caller that asks all the time neither floods the log nor hides others. Lines are limited by what they are
//! about; what was left out is counted, and logged with the next line.

use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use prometheus::{IntCounterVec, Opts, Registry};
use tapio_wire::program::token_bucket::TokenBucket;

use super::Purpose;

/// Lines of one subject at once, and a second after that.
const BURST: u32 = 50;
const PER_SECOND: f64 = 5.0;
/// Characters of a caller's words in a line.
const TEXT_CHARS_MAX: usize = 200;

/// One call.
#[derive(Clone, Copy, Debug)]
pub struct Record<'a> {
    pub purpose: Purpose,
    /// The method, or method and path.
    pub call: &'a str,
    pub peer: Option<SocketAddr>,
    pub identity: &'a str,
    /// The server that asks for somebody, as it says; empty where the caller asks itself.
    pub asked_by: &'a str,
    /// `ok`, or what it was answered with.
    pub outcome: &'a str,
    pub is_denied: bool,
    pub took: Duration,
}

struct Bucket {
    lines: TokenBucket,
    left_out: u64,
}

/// Writes one line for each call: who asked what.
pub struct Audit {
    /// Allowed and denied calls of each purpose.
    buckets: Mutex<[Bucket; 8]>,
    calls: IntCounterVec,
    left_out: IntCounterVec,
}

impl Audit {
    pub(super) fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let calls =
            Opts::new("tapio_server_audit_calls_total", "Calls that the audit log records, by purpose and outcome.");
        let left_out =
            Opts::new("tapio_server_audit_suppressed_lines_total", "Audit log lines suppressed by the rate limit.");
        let now = Instant::now();
        let audit = Self {
            buckets: Mutex::new(std::array::from_fn(|_| Bucket {
                lines: TokenBucket::new(BURST, PER_SECOND, now),
                left_out: 0,
            })),
            calls: IntCounterVec::new(calls, &["purpose", "outcome"])?,
            left_out: IntCounterVec::new(left_out, &["purpose"])?,
        };
        registry.register(Box::new(audit.calls.clone()))?;
        registry.register(Box::new(audit.left_out.clone()))?;
        Ok(audit)
    }

    /// Writes a call down.
    pub fn record(&self, record: &Record<'_>) {
        let outcome = if record.is_denied { "denied" } else { "allowed" };
        self.calls.with_label_values(&[record.purpose.name(), outcome]).inc();
        let Some(left_out) = self.line(record, Instant::now()) else {
            self.left_out.with_label_values(&[record.purpose.name()]).inc();
            return;
        };
        let peer = record.peer.map(|peer| peer.to_string()).unwrap_or_default();
        tracing::info!(
            target: "audit",
            peer,
            identity = shortened(record.identity),
            asked_by = (!record.asked_by.is_empty()).then(|| shortened(record.asked_by)),
            call = shortened(record.call),
            outcome = record.outcome,
            took_ms = record.took.as_millis() as u64,
            left_out,
            "{outcome}"
        );
    }

    /// Whether there is room for a line; then also how many were left out since the last.
    fn line(&self, record: &Record<'_>, now: Instant) -> Option<u64> {
        let at = record.purpose as usize * 2 + usize::from(record.is_denied);
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        let bucket = &mut buckets[at];
        if bucket.lines.take(1, now).is_err() {
            bucket.left_out += 1;
            return None;
        }
        Some(std::mem::take(&mut bucket.left_out))
    }
}

fn shortened(text: &str) -> &str {
    text.char_indices().nth(TEXT_CHARS_MAX).map_or(text, |(end, _)| &text[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(purpose: Purpose, is_denied: bool) -> Record<'static> {
        Record {
            purpose,
            call: "/tapio.v1.Query/Status",
            peer: None,
            identity: "",
            asked_by: "",
            outcome: "ok",
            is_denied,
            took: Duration::ZERO,
        }
    }

    #[test]
    fn no_call_hides_another_kind_and_omissions_are_logged() {
        let audit = Audit::register(&Registry::new()).expect("metrics");
        let now = Instant::now();
        let denied = record(Purpose::Query, true);
        let lines = (0..BURST + 30).filter(|_| audit.line(&denied, now).is_some()).count();
        assert_eq!(lines, BURST as usize);
        assert_eq!(audit.line(&record(Purpose::Query, false), now), Some(0), "others have their own");
        let later = now + Duration::from_secs(1).div_f64(PER_SECOND);
        assert_eq!(audit.line(&denied, later), Some(30));
        assert_eq!(audit.line(&denied, later), None);
    }

    #[test]
    fn what_a_caller_says_is_cut() {
        assert_eq!(shortened(&"ä".repeat(500)).chars().count(), TEXT_CHARS_MAX);
        assert_eq!(shortened("short"), "short");
    }
}
