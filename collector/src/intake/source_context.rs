//! What all sources share: the way on, the counters, and what may be dropped by configuration.
//!
//! In: the configuration. Out: a [`SourceContext`] that each source's [`crate::intake::Intake`] has a copy of. Held: references only,
//! to what other threads count in, read and change.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use crate::base::books::Books;
use crate::budget::governed::Governed;
use crate::intake::counts::{IdentityCounts, KindCounts};
use crate::intake::identity::directory::Directory;
use crate::intake::redact::Redactor;
use crate::outbox::epochs::EndedEpochs;
use crate::outbox::links::Links;
use crate::outbox::pack::Packer;
use crate::outbox::queue::Queues;
use crate::settings::config::Config;
use crate::settings::live::{Filter, Live};

/// What all sources share.
#[derive(Clone)]
pub struct SourceContext {
    pub queues: Arc<Queues>,
    pub books: Arc<Books>,
    pub kinds: Arc<KindCounts>,
    pub identities: Arc<IdentityCounts>,
    /// What Kubernetes calls entities.
    pub directory: Arc<Directory>,
    /// Counts the streams; a new one wants every entity described again.
    pub generation: Arc<AtomicU64>,
    pub filter: Filter,
    /// Epochs that ended while the process went on.
    pub ended: Arc<EndedEpochs>,
    /// What has become of the filter since the start.
    pub live: Arc<Live>,
    /// What the CPU budget lets pass.
    pub governed: Arc<Governed>,
    /// The configured bound of a batch; see [`SourceContext::batch_events`].
    pub batch_events_max: usize,
    /// The bound that the server asks for.
    pub batch_asked: Arc<AtomicUsize>,
    pub batch_timeout: Duration,
    pub redactor: Arc<Redactor>,
    /// Packs what a source brings, where that is on its way.
    pub packer: Option<Arc<Packer>>,
}

impl SourceContext {
    /// What the outbox shares with the sources.
    pub fn links(&self) -> Links {
        Links {
            queues: Arc::clone(&self.queues),
            books: Arc::clone(&self.books),
            generation: Arc::clone(&self.generation),
            ended: Arc::clone(&self.ended),
        }
    }

    /// Makes the context as configured, with counters at 0.
    pub fn for_config(config: &Config, queues: Queues) -> Self {
        let directory = Directory::default();
        directory.exclude_namespaces(config.collectors.k8s.excluded_namespaces());
        Self {
            queues: Arc::new(queues),
            books: Arc::default(),
            kinds: Arc::default(),
            identities: Arc::default(),
            directory: Arc::new(directory),
            generation: Arc::default(),
            filter: Filter::of(config),
            ended: Arc::default(),
            live: Arc::new(Live::new(config)),
            governed: Arc::new(Governed::new(config.resources.max_cpu_milli)),
            batch_events_max: config.grpc.max_batch_size,
            batch_asked: Arc::new(AtomicUsize::new(usize::MAX)),
            batch_timeout: config.grpc.batch_timeout,
            redactor: Arc::new(Redactor::new(&config.collectors.ebpf.redact)),
            packer: None,
        }
    }

    /// Events of a batch, which becomes a frame: as many as both this configuration and the server want.
    pub fn batch_events(&self) -> usize {
        self.batch_events_max.min(self.batch_asked.load(Ordering::Relaxed))
    }
}
