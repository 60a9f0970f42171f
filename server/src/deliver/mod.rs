//! Delivers findings outwards: each version of each finding to each sink, at least once, by the server that leads.
//!
//! What enters: the findings of this server's store, and the term in which it leads. What leaves: deliveries to sinks, and marks
//! that say what was delivered. What must hold: a sink that is slow or fails holds back neither the finder nor another sink. A
//! change of leader repeats only what was not confirmed, by the same id, and skips nothing. Every queue and every retry is bounded.
//!
//! ```text
//! store ──► worker of a sink: mark "intent" ──► sink ──► mark "confirmed"
//!           (a thread each)        └── compare-and-set, in JetStream or in a file beside the archive ──┘
//! ```
//!
//! A sink's worker runs while this server leads. It reads the marks, walks the store, and delivers what has no confirmed mark of the
//! same content. Whoever stops between the two marks leaves an intent behind: the next leader delivers the same again, by its id.

mod alertmanager;
mod chat;
mod config;
mod figures;
mod file_marks;
mod keeper;
mod kubernetes_events;
mod log_marks;
mod marks;
mod only;
mod otlp;
mod queue;
mod receiver;
mod standing;
mod webhook;
mod worker;

use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use tapio_wire::service::{DeliveryStatus, Finding};
use tokio::runtime;
use tokio::sync::watch;

pub use alertmanager::Alertmanager;
pub use chat::Chat;
pub use config::{AlertmanagerSection, ChatKind, ChatSection, DeliverSection, KubernetesEventsSection, WebhookSection};
pub use figures::DeliverMetrics;
use figures::Figures;
use file_marks::FileMarks;
pub use keeper::Keeper;
pub use kubernetes_events::KubernetesEvents;
use log_marks::LogMarks;
pub use only::OnlySection;
pub use otlp::{Otlp, OtlpProtocol, OtlpSection};
pub use webhook::{SinkConfigError, Webhook};
use worker::Worker;

use crate::cluster::{ClusterSection, Leadership, Link};
use crate::findings::FindingStore;
use crate::silences::Silences;
use crate::vitals::{Pulse, Sign, Vitals};

/// One version of a finding on its way outwards.
#[derive(Clone, Debug)]
pub struct Delivery {
    /// Id of the delivery: equal whenever the same version (finding, outward revision, content) is delivered again.
    pub id: String,
    /// Rises with each version of this finding: a receiver keeps the highest.
    pub revision: u32,
    /// The term of the leader that sends it.
    pub term: u64,
    /// What was found; `withdrawn` when it does not stand any more.
    pub finding: Arc<Finding>,
    /// The receiver has had this version's [`Sink::note`] before, for certain.
    pub is_known: bool,
    /// Other notes that the receiver may have had of this finding, also by other leaders.
    pub former: Vec<String>,
}

/// Why a delivery was not made, or may not have been.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SinkError {
    /// The sink is away, or takes nothing now: every delivery waits.
    #[error("{0}")]
    Away(String),
    /// The sink takes nothing for a while, and says for how long.
    #[error("{why}; it asks to wait {pause:?}")]
    Busy { why: String, pause: Duration },
    /// The sink takes others, and not this one.
    #[error("it refuses the delivery: {0}")]
    Refused(String),
    /// The sink will never take this one: it must not be sent again.
    #[error("it refuses the delivery for good: {0}")]
    Rejected(String),
}

impl SinkError {
    /// Time for which the sink asks not to be called again; 0 where it says nothing of it.
    fn pause(&self) -> Duration {
        match self {
            Self::Busy { pause, .. } => *pause,
            Self::Away(_) | Self::Refused(_) | Self::Rejected(_) => Duration::ZERO,
        }
    }
}

/// What a sink does with findings while they are silenced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenSilenced {
    /// It sends nothing of them, except that they are withdrawn.
    Hold,
    /// It sends one version with the silence in it, so that its receiver ends what it shows.
    End,
    /// It sends them as if there were no silence: its receiver keeps records, and calls nobody.
    Record,
}

/// What a sink answers.
pub type Delivering<'a> = Pin<Box<dyn Future<Output = Result<(), SinkError>> + Send + 'a>>;

/// Takes findings to where people or programs read them.
pub trait Sink: Send + Sync {
    /// Name in marks, metrics and the status: letters, digits and `-`.
    fn name(&self) -> &str;

    /// How long one delivery may take.
    fn timeout(&self) -> Duration;

    /// Whether its receiver is to hear of a finding at all. Of what it was sent once it hears every change.
    fn wants(&self, _finding: &Finding) -> bool {
        true
    }

    /// Whether its receiver can be told that a finding does not stand which it may never have had: of what was delivered before the
    /// marks were lost nobody knows.
    fn takes_unknown_withdrawals(&self) -> bool {
        false
    }

    /// What becomes of findings while they are silenced.
    fn when_silenced(&self) -> WhenSilenced {
        WhenSilenced::Hold
    }

    /// Delivers once. [`Ok`] means that the receiver has it.
    fn deliver<'a>(&'a self, delivery: &'a Delivery) -> Delivering<'a>;

    /// By what its receiver knows a finding, where that may change while the finding stays the same; it is kept with the marks.
    fn note(&self, _finding: &Finding) -> Option<String> {
        None
    }

    /// How often its receiver is sent again what stands, since it may forget it; [`None`]: never.
    fn repeats(&self) -> Option<Duration> {
        None
    }

    /// Whether the receiver must still know of a finding that it was given.
    fn stands(&self, _finding: &Finding) -> bool {
        false
    }
}

/// Where findings come from, and whether this server may deliver them.
#[derive(Clone)]
pub struct Source {
    pub store: Arc<FindingStore>,
    pub leadership: Arc<Leadership>,
    /// The servers' log, where there is one: nothing is delivered while it is away or is not read to its end.
    pub link: Option<Arc<Link>>,
    /// Of what nobody is notified.
    pub silences: Arc<Silences>,
}

/// Where marks are kept.
#[derive(Clone)]
pub enum MarksAt {
    /// Marks are in the servers' NATS, in a bucket without a time to live.
    Log(Box<ClusterSection>),
    /// Marks are in a file in this folder.
    Folder(PathBuf),
}

/// Owns the threads that deliver.
pub struct Deliverer {
    end: watch::Sender<bool>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    signs: Vec<(String, Sign)>,
    figures: Vec<Arc<Figures>>,
    keeper: Mutex<Option<Keeper>>,
}

impl Deliverer {
    /// Starts to deliver to each of these sinks.
    ///
    /// # Errors
    /// When a thread cannot be started.
    pub fn start(
        source: &Source,
        sinks: Vec<Box<dyn Sink>>,
        at: &MarksAt,
        metrics: &DeliverMetrics,
    ) -> io::Result<Self> {
        let (end, ended) = watch::channel(false);
        let mut started =
            Self { end, threads: Mutex::default(), signs: Vec::new(), figures: Vec::new(), keeper: Mutex::default() };
        for sink in sinks {
            let name = format!("deliver-{}", sink.name());
            let figures = Arc::new(metrics.of(sink.name()));
            started.figures.push(Arc::clone(&figures));
            let pulse = Pulse::default();
            started.signs.push((name.clone(), pulse.sign()));
            let (source, at, ended) = (source.clone(), at.clone(), ended.clone());
            let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
            let thread = std::thread::Builder::new().name(name).spawn(move || {
                let _pulse = pulse;
                match at {
                    MarksAt::Log(section) => {
                        let marks = LogMarks::new(*section, sink.name());
                        runtime.block_on(Worker::new(source, sink, marks, figures).run(ended));
                    }
                    MarksAt::Folder(folder) => {
                        let marks = FileMarks::new(&folder, sink.name());
                        runtime.block_on(Worker::new(source, sink, marks, figures).run(ended));
                    }
                }
                // A name that is being looked up is not waited for.
                runtime.shutdown_background();
            })?;
            started.threads.lock().unwrap_or_else(PoisonError::into_inner).push(thread);
        }
        Ok(started)
    }

    /// Keeps findings in the servers' NATS as well, as long as this delivers.
    pub fn with_keeper(mut self, keeper: Keeper) -> Self {
        self.signs.push(("log-findings".into(), keeper.sign()));
        self.keeper = Mutex::new(Some(keeper));
        self
    }

    /// How each sink stands.
    pub fn status(&self) -> Vec<DeliveryStatus> {
        self.figures.iter().map(|figures| figures.status()).collect()
    }

    /// Ends the threads. A delivery that is under way is repeated by whoever delivers next.
    pub fn stop(&self) {
        self.end.send_replace(true);
        drop(self.keeper.lock().unwrap_or_else(PoisonError::into_inner).take());
        for thread in self.threads.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread that delivers findings has failed");
            }
        }
    }

    /// Watches the threads.
    pub fn watch(&self, vitals: &Vitals) {
        for (name, sign) in &self.signs {
            vitals.watch(name.clone(), sign.clone());
        }
    }
}

impl Drop for Deliverer {
    fn drop(&mut self) {
        self.stop();
    }
}
