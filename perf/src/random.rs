//! A small seeded generator of pseudo-random numbers, so that a run can be repeated: splitmix64 (Steele, Lea, Flood 2014).

/// The state of a generator.
#[derive(Clone, Debug)]
pub struct Random {
    state: u64,
}

impl Random {
    /// Makes a generator; the same seed gives the same numbers.
    pub fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    /// 64 bits.
    #[inline]
    pub fn next_u64(&mut self) -> u64 {
        self.state = self.state.wrapping_add(tapio_wire::MIX_STEP);
        tapio_wire::mix(self.state)
    }

    /// A number below `bound`, which must not be 0.
    #[inline]
    pub fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next_u64()) * u128::from(bound)) >> 64) as u64
    }

    /// A number from 0 up to 1.
    pub fn fraction(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// A number between two bounds whose logarithm is evenly spread, as durations and sizes tend to be.
    pub fn log_uniform(&mut self, low: u64, high: u64) -> u64 {
        let (low, high) = ((low as f64).ln(), (high as f64).ln());
        (low + (high - low) * self.fraction()).exp() as u64
    }

    /// One of the weighted choices.
    pub fn weighted<T: Copy>(&mut self, choices: &[(T, u32)]) -> T {
        let total: u64 = choices.iter().map(|&(_, weight)| u64::from(weight)).sum();
        let mut point = self.below(total);
        for &(choice, weight) in choices {
            if point < u64::from(weight) {
                return choice;
            }
            point -= u64::from(weight);
        }
        unreachable!("the point is below the sum of all weights")
    }
}

/// Popularity by rank: the n-th is chosen in proportion to 1/n (Zipf's law with exponent 1).
pub struct Zipf {
    cumulative: Vec<f64>,
}

impl Zipf {
    /// Over `count` ranks, at least one.
    pub fn new(count: usize) -> Self {
        let mut sum = 0.0;
        let cumulative = (1..=count.max(1))
            .map(|rank| {
                sum += 1.0 / rank as f64;
                sum
            })
            .collect();
        Self { cumulative }
    }

    /// A rank, from 0.
    pub fn draw(&self, random: &mut Random) -> usize {
        let point = random.fraction() * self.cumulative[self.cumulative.len() - 1];
        self.cumulative.partition_point(|&sum| sum <= point).min(self.cumulative.len() - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::{Random, Zipf};

    #[test]
    fn a_seed_repeats_itself() {
        let numbers = |seed| {
            let mut random = Random::new(seed);
            [0; 8].map(|_| random.next_u64())
        };
        assert_eq!(numbers(7), numbers(7));
        assert_ne!(numbers(7), numbers(8));
        // The first output of the reference implementation for seed 0.
        assert_eq!(Random::new(0).next_u64(), 0xe220_a839_7b1d_cdaf);
    }

    #[test]
    fn the_first_of_a_thousand_gets_a_seventh() {
        let (zipf, mut random) = (Zipf::new(1000), Random::new(3));
        let mut hits = vec![0u32; 1000];
        for _ in 0..100_000 {
            hits[zipf.draw(&mut random)] += 1;
        }
        // 1 / H(1000) = 0.1336
        assert!((12_800..13_900).contains(&hits[0]), "{}", hits[0]);
        assert!(hits[0] > hits[1] && hits[1] > hits[9] && hits[9] > hits[99]);
    }
}
