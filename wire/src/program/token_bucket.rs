//! A token bucket: a burst after a quiet time, and a rate after that.
//!
//! It is kept as the moment until which everything that was taken is paid for (the generic cell rate algorithm of ITU-T I.371).
//! What must hold: no fraction of a token is lost between two calls, however close they are; a quiet time earns at most a burst.

use std::time::{Duration, Instant};

/// No amount is paid for longer than this.
const DEBT_MAX: Duration = Duration::from_secs(86_400);

/// A token bucket; see the module's head for how it is kept.
#[derive(Clone, Copy, Debug)]
pub struct TokenBucket {
    per_second: f64,
    /// Up to this debt another amount may be taken.
    debt_max: Duration,
    paid_until: Instant,
}

impl TokenBucket {
    /// A full bucket: `burst` tokens may be taken at once, one by one, and `per_second` after that.
    pub fn new(burst: u32, per_second: f64, now: Instant) -> Self {
        let debt_max = Duration::from_secs_f64(f64::from(burst.saturating_sub(1)) / per_second);
        Self::with_debt(per_second, debt_max, now)
    }

    /// A full bucket for amounts of any size: one is taken whole as long as what was taken before is paid for within
    /// `debt_max`.
    pub fn with_debt(per_second: f64, debt_max: Duration, now: Instant) -> Self {
        Self { per_second, debt_max, paid_until: now }
    }

    fn cost(&self, amount: u64) -> Duration {
        Duration::from_secs_f64((amount as f64 / self.per_second).min(DEBT_MAX.as_secs_f64()))
    }

    /// Takes `amount`.
    ///
    /// # Errors
    /// The moment from which it can be taken; nothing is taken.
    pub fn take(&mut self, amount: u64, now: Instant) -> Result<(), Instant> {
        if self.is_empty(now) {
            return Err(self.paid_until - self.debt_max);
        }
        self.paid_until = self.paid_until.max(now) + self.cost(amount);
        Ok(())
    }

    /// Takes `amount` even if it is not there. This alone makes no debt above `debt_max`.
    pub fn charge(&mut self, amount: u64, debt_max: Duration, now: Instant) {
        let later = self.paid_until.max(now) + self.cost(amount);
        self.paid_until = later.min(now + debt_max).max(self.paid_until);
    }

    /// Whether nothing can be taken now.
    pub fn is_empty(&self, now: Instant) -> bool {
        self.paid_until > now + self.debt_max
    }

    /// What a full bucket of [`with_debt`](Self::with_debt) gives before the first wait.
    pub fn burst(&self) -> u64 {
        (self.per_second * self.debt_max.as_secs_f64()) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quiet_time_earns_at_most_a_burst() {
        let start = Instant::now();
        let mut bucket = TokenBucket::new(50, 5.0, start);
        for now in [start, start + Duration::from_secs(3600)] {
            assert_eq!((0..100).filter(|_| bucket.take(1, now).is_ok()).count(), 50);
            assert_eq!(bucket.take(1, now), Err(now + Duration::from_millis(200)));
            let later = now + Duration::from_millis(200);
            assert_eq!((bucket.take(1, later).is_ok(), bucket.take(1, later).is_ok()), (true, false));
        }
    }

    #[test]
    fn calls_that_come_often_lose_no_fraction_of_a_token() {
        let start = Instant::now();
        let mut bucket = TokenBucket::new(10, 20.0, start);
        // Every 30 ms, 0.6 of a token: what each call rounded down would be none at all.
        let taken = (0..1000).filter(|&call| bucket.take(1, start + call * Duration::from_millis(30)).is_ok()).count();
        assert!((608..=610).contains(&taken), "{taken}");
    }

    #[test]
    fn amounts_are_taken_whole_and_the_rate_is_met() {
        let start = Instant::now();
        let mut bucket = TokenBucket::with_debt(1000.0, Duration::from_millis(250), start);
        let began = start + Duration::from_secs(3600);
        let mut now = began;
        for _ in 0..100 {
            while let Err(free_at) = bucket.take(100, now) {
                assert!(free_at > now, "it makes progress");
                now = free_at;
            }
        }
        let took = (now - began).as_secs_f64();
        // 10,000 at 1,000 a second; the burst, and the last one, are not waited for.
        assert!((9.6..=9.8).contains(&took), "{took}");
        assert_eq!(bucket.burst(), 250);
    }

    #[test]
    fn what_is_charged_makes_a_bounded_debt() {
        let (now, debt_max) = (Instant::now(), Duration::from_secs(2));
        let mut bucket = TokenBucket::with_debt(10.0, Duration::from_millis(250), now);
        for _ in 0..1000 {
            bucket.charge(1000, debt_max, now);
        }
        let free_at = bucket.take(1, now).expect_err("it is paid for first");
        assert!(bucket.is_empty(now) && free_at <= now + debt_max);
        bucket.take(1, free_at).expect("then it is free");
    }
}
