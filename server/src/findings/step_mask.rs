//! Sets of steps.
//!
//! What must hold: all steps of all patterns fit into a [`StepMask`], which is small enough to be copied with every clue.

/// Steps of all patterns together.
pub const STEPS_MAX: usize = 512;

/// A set of steps of all patterns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct StepMask([u64; STEPS_MAX / 64]);

impl StepMask {
    /// Puts a step in.
    pub fn insert(&mut self, step: usize) {
        self.0[step / 64] |= 1 << (step % 64);
    }

    /// Whether a step is in.
    pub fn contains(&self, step: usize) -> bool {
        self.0[step / 64] & (1 << (step % 64)) != 0
    }

    /// Returns the numbers in the set, the lowest first.
    pub fn numbers(&self) -> impl Iterator<Item = usize> + use<> {
        self.0.into_iter().enumerate().flat_map(|(place, word)| {
            let rest = |word: &u64| Some(word & (word - 1)).filter(|rest| *rest != 0);
            let words = std::iter::successors(Some(word).filter(|word| *word != 0), rest);
            words.map(move |word| place * 64 + word.trailing_zeros() as usize)
        })
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.0 == [0; STEPS_MAX / 64]
    }

    /// Puts all of another's steps in.
    pub fn unite(&mut self, other: &Self) {
        self.0.iter_mut().zip(&other.0).for_each(|(word, other)| *word |= other);
    }

    /// Takes all of another's steps out.
    pub fn remove_all(&mut self, other: &Self) {
        self.0.iter_mut().zip(&other.0).for_each(|(word, other)| *word &= !other);
    }

    /// Whether all of another's steps are in.
    pub fn contains_all(&self, other: &Self) -> bool {
        self.0.iter().zip(&other.0).all(|(word, other)| other & !word == 0)
    }

    /// Whether both have one in common.
    pub fn intersects(&self, other: &Self) -> bool {
        self.0.iter().zip(&other.0).any(|(a, b)| a & b != 0)
    }
}

const _: () = assert!(size_of::<StepMask>() <= 64);
