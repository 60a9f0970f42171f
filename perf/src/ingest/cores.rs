//! The cores that a run is kept on.

use std::fmt;
use std::str::FromStr;

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::error::{Context, Error};

/// Some cores of this machine, by number, at least one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cores(Vec<usize>);

impl FromStr for Cores {
    type Err = String;

    /// Reads a list like `0`, `0,2` or `1-3`.
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no list of cores, like 0,2 or 1-3");
        let mut cores = Vec::new();
        for part in text.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let number = |text: &str| text.trim().parse::<usize>().map_err(|_| wrong());
            let (first, last) = (number(first)?, number(last)?);
            if first > last || last >= CpuSet::MAX_CPU {
                return Err(wrong());
            }
            cores.extend(first..=last);
        }
        cores.sort_unstable();
        cores.dedup();
        Ok(Self(cores))
    }
}

impl fmt::Display for Cores {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let numbers: Vec<String> = self.0.iter().map(usize::to_string).collect();
        f.write_str(&numbers.join(","))
    }
}

impl Cores {
    /// How many they are.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// The cores that this thread may use.
    pub fn allowed() -> Result<Self, Error> {
        let set = sched_getaffinity(None).context(|| "ask which cores there are".into())?;
        Ok(Self((0..CpuSet::MAX_CPU).filter(|&core| set.is_set(core)).collect()))
    }

    /// An error that names a core which is not among these.
    pub fn check_within(&self, allowed: &Self) -> Result<(), Error> {
        match self.0.iter().find(|core| !allowed.0.contains(core)) {
            None => Ok(()),
            Some(core) => {
                Err(Error::Invalid(format!("--server-cores: there is no core {core} here; there are {allowed}")))
            }
        }
    }

    /// Those of `self` that are not in `others`; none when none are left.
    pub fn without(&self, others: &Self) -> Option<Self> {
        let left: Vec<usize> = self.0.iter().copied().filter(|core| !others.0.contains(core)).collect();
        (!left.is_empty()).then_some(Self(left))
    }

    /// The last of these; none when there is no other.
    pub fn last_of_several(&self) -> Option<Self> {
        self.0.last().filter(|_| self.0.len() > 1).map(|&last| Self(vec![last]))
    }

    /// Keeps the calling thread, and what it starts, on these cores.
    pub fn enter(&self) -> Result<(), Error> {
        let mut set = CpuSet::new();
        self.0.iter().for_each(|&core| set.set(core));
        sched_setaffinity(None, &set).context(|| format!("stay on the cores {self}"))
    }

    /// Does something on these cores, and goes back to those of before.
    pub fn within<T>(&self, work: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
        let before = Self::allowed()?;
        self.enter()?;
        let done = work();
        before.enter()?;
        done
    }
}

#[cfg(test)]
mod tests {
    use super::Cores;

    fn cores(text: &str) -> Vec<usize> {
        text.parse::<Cores>().expect("a list").0
    }

    #[test]
    fn lists_and_ranges_are_read() {
        assert_eq!((cores("3"), cores("2,0,2"), cores("0-2,7")), (vec![3], vec![0, 2], vec![0, 1, 2, 7]));
        for wrong in ["", "a", "1-", "3-1", "1,,2", "-1", "99999"] {
            assert!(wrong.parse::<Cores>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_core_that_is_not_there_is_named() {
        let (few, many): (Cores, Cores) = ("0-1".parse().expect("a list"), "1,5".parse().expect("a list"));
        assert!(many.check_within(&few).expect_err("refused").to_string().contains("no core 5"));
        assert!(few.check_within(&few).is_ok());
        assert_eq!(few.without(&many).map(|left| left.0), Some(vec![0]));
        assert_eq!(few.without(&few), None);
        assert_eq!(few.last_of_several().map(|last| last.0), Some(vec![1]));
        assert_eq!(few.last_of_several().and_then(|last| last.last_of_several()), None);
    }

    #[test]
    fn a_thread_comes_back_to_its_cores() {
        let before = Cores::allowed().expect("cores");
        let one = Cores(before.0[..1].to_vec());
        let inside = one.within(Cores::allowed).expect("it may stay there");
        assert_eq!(inside, one);
        assert_eq!(Cores::allowed().expect("cores"), before);
    }
}
