//! What runs, what is off, and what a source waits for.
//!
//! In: what sources, threads and tasks say of themselves. Out: the same, for `/healthz`, `/readyz` and the server. What must hold: a
//! thread that panics does not count as running.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// What a source is doing, for `/readyz`.
#[derive(Clone, Debug)]
pub struct SourceState {
    pub source: &'static str,
    /// Why it is off; `None` when it was started.
    pub off: Option<String>,
    /// Whether its thread runs.
    pub alive: Alive,
    /// What it waits for while it runs.
    pub status: Status,
}

/// What a source that runs waits for, if anything.
#[derive(Clone, Debug, Default)]
pub struct Status(Arc<Mutex<Option<String>>>);

impl Status {
    /// Marks the part as running: it has what it needs.
    pub fn runs(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Marks the part as waiting for `what`.
    pub fn waits_for(&self, what: String) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(what);
    }

    /// What it waits for.
    pub fn get(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Shows whether a thread or task runs: true from [`Alive::begin`] until what that returned is dropped, however the thread ends. One
/// that has finished its work counts as running.
#[derive(Clone, Debug, Default)]
pub struct Alive(Arc<AtomicBool>);

/// See [`Alive`].
pub struct AliveGuard {
    alive: Arc<AtomicBool>,
    is_finished: bool,
}

impl Alive {
    /// Marks the part as alive until the guard is dropped.
    pub fn begin(&self) -> AliveGuard {
        self.0.store(true, Ordering::Release);
        AliveGuard { alive: Arc::clone(&self.0), is_finished: false }
    }

    /// Whether it runs, or has finished.
    pub fn get(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

impl AliveGuard {
    /// Nothing is left to do: the end is not a failure, and a restart would bring nothing back.
    pub fn finished(mut self) {
        self.is_finished = true;
    }
}

impl Drop for AliveGuard {
    fn drop(&mut self) {
        self.alive.store(self.is_finished, Ordering::Release);
    }
}

impl SourceState {
    /// `running`, or why not.
    pub fn text(&self) -> String {
        self.why_off().unwrap_or_else(|| "running".into())
    }

    /// Why it does not run, or what it lacks; [`None`] while all of it runs.
    pub fn why_off(&self) -> Option<String> {
        match &self.off {
            Some(reason) => Some(reason.clone()),
            None if self.alive.get() => self.status.get(),
            None => Some("ended: the log says why".into()),
        }
    }
}

/// Everything that runs as long as the collector does, by name.
#[derive(Clone, Debug, Default)]
pub struct Running(Vec<(&'static str, Alive)>);

impl Running {
    /// The sources that were started, the other threads and tasks, and the packer.
    pub fn of(sources: &[SourceState], parts: Vec<(&'static str, Alive)>, packer: &Alive) -> Self {
        let sources = sources.iter().filter(|source| source.off.is_none());
        let sources = sources.map(|source| (source.source, source.alive.clone()));
        Self(sources.chain(parts).chain([("pack", packer.clone())]).collect())
    }

    /// The names of those that ended by themselves. Their state is lost, so the whole program must be restarted.
    pub fn ended(&self) -> Vec<&'static str> {
        self.0.iter().filter(|(_, alive)| !alive.get()).map(|(name, _)| *name).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_panics_is_no_longer_alive() {
        let alive = Alive::default();
        let guard = alive.begin();
        assert!(alive.get());
        let thread = std::thread::spawn(move || {
            let _alive = guard;
            panic!("as a source might");
        });
        assert!(thread.join().is_err());
        assert!(!alive.get());
    }
}
