//! What the outbox shares with the sources in front of it.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use crate::base::books::Books;
use crate::outbox::epochs::EndedEpochs;
use crate::outbox::queue::Queues;

/// References to what the outbox shares with the sources.
#[derive(Clone)]
pub struct Links {
    pub queues: Arc<Queues>,
    pub books: Arc<Books>,
    /// Counts the streams; a new one wants every entity described again.
    pub generation: Arc<AtomicU64>,
    /// Epochs that ended while the process went on.
    pub ended: Arc<EndedEpochs>,
}

impl Links {
    /// New counters, beside these queues.
    pub fn new(queues: Queues) -> Self {
        Self { queues: Arc::new(queues), books: Arc::default(), generation: Arc::default(), ended: Arc::default() }
    }
}
