//! The bulk events that a source may have in a second.

use std::time::{Duration, Instant};

/// What is left of the present second's events.
pub(super) struct Allowance {
    left: u64,
    since: Instant,
}

impl Allowance {
    /// A full second's worth.
    pub(super) fn new(per_second: u64, now: Instant) -> Self {
        Self { left: per_second, since: now }
    }

    /// Begins a new second when the present one is over.
    pub(super) fn refill(&mut self, per_second: u64, now: Instant) {
        if now.duration_since(self.since) >= Duration::from_secs(1) {
            *self = Self::new(per_second, now);
        }
    }

    /// Whether one more event may pass. With `per_second` 0 there is no limit.
    #[inline]
    pub(super) fn take(&mut self, per_second: u64) -> bool {
        if per_second == 0 {
            return true;
        }
        let may_pass = self.left > 0;
        self.left = self.left.saturating_sub(1);
        may_pass
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_second_passes_its_allowance() {
        let now = Instant::now();
        let mut allowance = Allowance::new(2, now);
        allowance.refill(2, now + Duration::from_millis(999));
        assert_eq!([(); 3].map(|()| allowance.take(2)), [true, true, false]);
        assert!(allowance.take(0), "there is no limit");
        allowance.refill(2, now + Duration::from_secs(1));
        assert_eq!([(); 3].map(|()| allowance.take(2)), [true, true, false]);
    }
}
