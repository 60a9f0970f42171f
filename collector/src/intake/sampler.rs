//! Keeps a share of the bulk events, evenly spread.

/// Keeps one event each time that the shares of those seen add up to a whole one.
#[derive(Default)]
pub(super) struct Sampler {
    /// The sum of the shares since the last event that was kept.
    credit: f64,
}

impl Sampler {
    /// Whether this event is kept, of which `rate` is the share to keep.
    #[inline]
    pub(super) fn keeps(&mut self, rate: f64) -> bool {
        if rate >= 1.0 {
            return true;
        }
        self.credit += rate;
        if self.credit < 1.0 {
            return false;
        }
        self.credit -= 1.0;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_kept_evenly_and_a_whole_changes_nothing() {
        let mut sampler = Sampler::default();
        let kept: Vec<bool> = (0..8).map(|_| sampler.keeps(0.25)).collect();
        assert_eq!(kept, [false, false, false, true, false, false, false, true]);
        sampler.keeps(0.75);
        assert!(sampler.keeps(1.0) && sampler.keeps(0.25), "0.75 and 0.25 are one");
    }
}
