//! How long to wait before the next attempt, and how programs avoid acting all at the same moment.
//!
//! What must hold: attempts that keep failing become rarer, up to a bound. A thousand collectors that lost the same
//! server do not return together. A pause that a server asks for is kept, up to a bound.

use std::time::Duration;

/// A server that asks for a longer pause is asked again after this time nevertheless.
const ASKED_MAX: Duration = Duration::from_secs(120);
/// What comes on top of a pause that a server asks for is at most this.
const ASKED_SPREAD_MAX: Duration = Duration::from_secs(1);
/// No pause is doubled more often.
const DOUBLINGS_MAX: u32 = 16;

/// Pauses that double with each failure in a row, up to a bound, each spread by [`spread`].
#[derive(Clone, Debug)]
pub struct Backoff {
    first: Duration,
    longest: Duration,
    failures: u32,
}

impl Backoff {
    /// No failure yet.
    pub fn new(first: Duration, longest: Duration) -> Self {
        Self { first, longest, failures: 0 }
    }

    /// Begins with the first pause again: the last attempt succeeded.
    pub fn reset(&mut self) {
        self.failures = 0;
    }

    /// Failures in a row.
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// The pause after one more failure.
    pub fn pause(&mut self) -> Duration {
        spread(self.fail())
    }

    /// The pause after one more failure when the server asks for one: at least that, and a little more, so that not all clients
    /// return at once.
    pub fn pause_asked(&mut self, asked: Duration) -> Duration {
        asked.min(ASKED_MAX) + up_to(self.fail().min(ASKED_SPREAD_MAX))
    }

    fn fail(&mut self) -> Duration {
        let pause = doubled(self.first, self.failures, self.longest);
        self.failures = self.failures.saturating_add(1);
        pause
    }
}

/// `first`, doubled once for each failure, at most `longest`. Not spread.
pub fn doubled(first: Duration, failures: u32, longest: Duration) -> Duration {
    first.saturating_mul(1 << failures.min(DOUBLINGS_MAX)).min(longest)
}

/// Returns a random pause between half of `pause` and one and a half.
pub fn spread(pause: Duration) -> Duration {
    pause / 2 + up_to(pause)
}

/// Returns a random pause between none and all of `pause`.
pub fn up_to(pause: Duration) -> Duration {
    pause.mul_f64(fastrand::f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: Duration = Duration::from_millis(250);
    const LONGEST: Duration = Duration::from_secs(30);

    #[test]
    fn pauses_grow_up_to_a_bound_and_start_over() {
        let mut backoff = Backoff::new(FIRST, LONGEST);
        let pauses: Vec<Duration> = (0..200).map(|_| backoff.pause()).collect();
        assert!(pauses[0] <= FIRST * 3 / 2 && pauses[199] >= LONGEST / 2 && pauses[199] <= LONGEST * 3 / 2);
        assert_eq!(backoff.failures(), 200);
        backoff.reset();
        assert!(backoff.pause() <= FIRST * 3 / 2);
    }

    #[test]
    fn doubling_never_overflows_or_passes_the_bound() {
        assert_eq!(doubled(FIRST, 0, LONGEST), FIRST);
        assert_eq!(doubled(FIRST, 3, LONGEST), FIRST * 8);
        assert_eq!(doubled(FIRST, u32::MAX, LONGEST), LONGEST);
    }

    #[test]
    fn what_was_asked_for_is_waited_for_within_reason() {
        let mut backoff = Backoff::new(FIRST, LONGEST);
        let asked = Duration::from_secs(7);
        let pause = backoff.pause_asked(asked);
        assert!(pause >= asked && pause <= asked + ASKED_SPREAD_MAX, "{pause:?}");
        assert!(backoff.pause_asked(Duration::from_secs(86_400)) <= ASKED_MAX + ASKED_SPREAD_MAX);
    }

    #[test]
    fn a_thousand_clients_return_spread_over_time() {
        // Each is a process of its own, with a generator of its own.
        let pause = || std::thread::spawn(|| spread(LONGEST).as_secs_f64() / LONGEST.as_secs_f64()).join();
        let pauses: Vec<f64> = (0..1000).map(|_| pause().expect("no panic")).collect();
        assert!(pauses.iter().all(|pause| (0.5..=1.5).contains(pause)));
        // No tenth of the time sees more than twice its share.
        for tenth in 0..10 {
            let from = 0.5 + f64::from(tenth) / 10.0;
            let inside = pauses.iter().filter(|pause| (from..from + 0.1).contains(*pause)).count();
            assert!((1..=200).contains(&inside), "{inside} of 1000 come within the tenth at {from}");
        }
    }
}
