//! Spreads pauses, so that the collectors of many nodes do not come back as one.

use std::time::Duration;

use crate::base::clock::realtime_ns;

/// A small generator for back-off times; it need not be unpredictable, only different on each node.
pub struct Jitter(u64);

impl Jitter {
    /// For whoever this number stands for.
    pub fn new(node: u64) -> Self {
        Self::seeded(realtime_ns() ^ u64::from(std::process::id()).rotate_left(32) ^ node)
    }

    /// Seeds that are close to each other, like the clocks of nodes that start at once, must not begin alike.
    pub(crate) fn seeded(seed: u64) -> Self {
        // splitmix64 (Steele et al. 2014).
        let mixed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        Self(mixed ^ (mixed >> 31) | 1)
    }

    /// Between half of `pause` and one and a half.
    pub fn spread(&mut self, pause: Duration) -> Duration {
        pause / 2 + self.up_to(pause)
    }

    /// Between none and all of `pause`.
    pub fn up_to(&mut self, pause: Duration) -> Duration {
        // xorshift64 (Marsaglia 2003).
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        pause.mul_f64((self.0 >> 11) as f64 / (1u64 << 53) as f64)
    }
}
