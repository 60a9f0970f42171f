//! The clock of kernel events, and waiting for conditions.

use std::thread;
use std::time::{Duration, Instant};

pub use tapio_probes::clock::boottime_ns;

use crate::error::Error;
use crate::interrupt;

/// Asks `condition` every few milliseconds until it answers.
///
/// `what` names what is awaited and `seen` what was seen last, for the error when `limit` has passed.
pub fn wait_for<T>(
    what: &str,
    limit: Duration,
    mut condition: impl FnMut(&mut String) -> Result<Option<T>, Error>,
) -> Result<T, Error> {
    let start = Instant::now();
    let mut seen = String::from("nothing");
    let mut pause = Duration::from_millis(1);
    loop {
        interrupt::check()?;
        if let Some(answer) = condition(&mut seen)? {
            return Ok(answer);
        }
        if start.elapsed() >= limit {
            return Err(Error::TimedOut { what: what.to_owned(), seconds: limit.as_secs(), seen });
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}

/// Sleeps, in steps short enough to notice an interrupt.
pub fn pause(duration: Duration) -> Result<(), Error> {
    let end = Instant::now() + duration;
    loop {
        interrupt::check()?;
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        thread::sleep(left.min(Duration::from_millis(20)));
    }
}
