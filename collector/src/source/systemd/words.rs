//! Words of states and results, which are systemd's and few, by number.

/// Words that are learned at the most.
const WORDS_MAX: usize = 256;

/// An index into [`Words`].
pub(super) type Word = u16;

/// Interned states and results, so that a unit's state needs no memory of its own.
pub(super) struct Words(pub(super) Vec<String>);

impl Words {
    /// The number of a word, which is learned when it is new.
    pub(super) fn index(&mut self, text: &str) -> Word {
        if let Some(known) = self.0.iter().position(|word| word == text) {
            return known as Word;
        }
        if self.0.len() >= WORDS_MAX {
            // No systemd has that many: the sender makes them up.
            return Self::EMPTY;
        }
        self.0.push(text.to_owned());
        (self.0.len() - 1) as Word
    }

    pub(super) const EMPTY: Word = 0;
    pub(super) const SUCCESS: Word = 1;
    pub(super) const INACTIVE: Word = 2;
    pub(super) const ACTIVE: Word = 3;
    pub(super) const FAILED: Word = 4;
    pub(super) const ACTIVATING: Word = 5;
    pub(super) const START_LIMIT_HIT: Word = 6;

    pub(super) fn new() -> Self {
        let known = ["", "success", "inactive", "active", "failed", "activating", "start-limit-hit"];
        Self(known.map(String::from).into())
    }
}
