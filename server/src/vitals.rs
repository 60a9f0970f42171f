//! Whether the server's threads live.
//!
//! What enters: each thread that is started and must not end before the server does. What leaves: the names of those that have
//! ended. `/healthz` and `/readyz` name them, and the server drains and ends. Then kubelet or systemd restarts it, with the
//! back-off that they have. No thread is restarted here: its queue, its place in the books or its state of correlation went with
//! it. A start rebuilds all three from the archive.

use std::sync::{Arc, Mutex, PoisonError, Weak};

/// A thread holds it as long as it runs; a panic gives it up as well.
#[derive(Debug, Default)]
pub struct Pulse(Arc<()>);

impl Pulse {
    /// Makes a sign that can be checked from elsewhere.
    pub fn sign(&self) -> Sign {
        Sign(Arc::downgrade(&self.0))
    }
}

/// A check of whether a [`Pulse`] is still held.
#[derive(Clone, Debug)]
pub struct Sign(Weak<()>);

impl Sign {
    /// Whether the thread runs.
    pub fn is_alive(&self) -> bool {
        self.0.strong_count() > 0
    }
}

type Remark = Box<dyn Fn() -> Option<String> + Send + Sync>;

/// The threads that must live. There are as many as the pipeline starts.
#[derive(Default)]
pub struct Vitals {
    watched: Mutex<Vec<(String, Sign)>>,
    remarks: Mutex<Vec<Remark>>,
}

impl Vitals {
    /// Watches one more.
    pub fn watch(&self, name: impl Into<String>, sign: Sign) {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner).push((name.into(), sign));
    }

    /// Lets `/readyz` show this too, when it is not empty.
    pub fn remark(&self, remark: impl Fn() -> Option<String> + Send + Sync + 'static) {
        self.remarks.lock().unwrap_or_else(PoisonError::into_inner).push(Box::new(remark));
    }

    /// What is not as it should be, though the server does its work.
    pub fn remarks(&self) -> Vec<String> {
        self.remarks.lock().unwrap_or_else(PoisonError::into_inner).iter().filter_map(|remark| remark()).collect()
    }

    /// The names of those that have ended.
    pub fn ended(&self) -> Vec<String> {
        let watched = self.watched.lock().unwrap_or_else(PoisonError::into_inner);
        watched.iter().filter(|(_, sign)| !sign.is_alive()).map(|(name, _)| name.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_thread_that_panicked_is_named() {
        let vitals = Vitals::default();
        let (pulse, running) = (Pulse::default(), Pulse::default());
        vitals.watch("archive", pulse.sign());
        vitals.watch("finder", running.sign());
        assert!(vitals.ended().is_empty());
        let thread = std::thread::spawn(move || {
            let _pulse = pulse;
            panic!("as a defect would");
        });
        assert!(thread.join().is_err());
        assert_eq!(vitals.ended(), ["archive"]);
    }
}
