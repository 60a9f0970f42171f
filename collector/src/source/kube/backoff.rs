//! How long to wait before the next attempt.
//!
//! What must hold: attempts that fail alike become rarer up to a bound; a thousand collectors do not return in the same
//! moment; what the API server asks for is waited for, within reason.

use std::time::Duration;

use crate::base::clock::realtime_ns;

const FIRST: Duration = Duration::from_millis(250);
const LONGEST: Duration = Duration::from_secs(30);
/// However long the API server asks to wait.
const ASKED_MAX: Duration = Duration::from_secs(120);

/// Computes the wait before the next attempt.
pub struct Backoff {
    failures: u32,
    seed: u64,
}

impl Backoff {
    /// No failure yet.
    pub fn new(salt: &str) -> Self {
        let seed =
            salt.bytes().fold(realtime_ns(), |seed, byte| (seed ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
        Self { failures: 0, seed: seed | 1 }
    }

    /// It works.
    pub fn reset(&mut self) {
        self.failures = 0;
    }

    /// Failures in a row.
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// The pause after one more failure; at least what was asked for, a little more so that not all return at once.
    pub fn next(&mut self, asked: Option<Duration>) -> Duration {
        let pause = FIRST.saturating_mul(1 << self.failures.min(10)).min(LONGEST);
        self.failures = self.failures.saturating_add(1);
        match asked {
            Some(asked) => asked.min(ASKED_MAX) + self.share_of(pause.min(Duration::from_secs(1))),
            None => pause / 2 + self.share_of(pause),
        }
    }

    /// Between none and all of it.
    fn share_of(&mut self, pause: Duration) -> Duration {
        // xorshift64 (Marsaglia 2003).
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        pause.mul_f64((self.seed >> 11) as f64 / (1u64 << 53) as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_up_to_a_bound_and_start_over() {
        let mut backoff = Backoff::new("pods");
        let pauses: Vec<Duration> = (0..20).map(|_| backoff.next(None)).collect();
        assert!(pauses[0] < FIRST * 2 && pauses[19] >= LONGEST / 2 && pauses[19] <= LONGEST * 3 / 2);
        backoff.reset();
        assert!(backoff.next(None) < FIRST * 2);
    }

    #[test]
    fn what_was_asked_for_is_waited_for_within_reason() {
        let mut backoff = Backoff::new("pods");
        let asked = Duration::from_secs(7);
        let pause = backoff.next(Some(asked));
        assert!(pause >= asked && pause < asked + Duration::from_secs(1), "{pause:?}");
        assert!(backoff.next(Some(Duration::from_secs(86_400))) <= ASKED_MAX + Duration::from_secs(1));
    }
}
